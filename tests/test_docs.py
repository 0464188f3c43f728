"""The code in the documentation runs as it stands, page by page, from top to bottom."""

import re
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parent.parent


def blocks(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", (ROOT / page).read_text(), re.M | re.S)


def run(page: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """The names after each block of the page, which run one after the other in an empty folder."""
    monkeypatch.chdir(folder)
    names, after = {}, []
    for block in blocks(page):
        exec(compile(block, page, "exec"), names)
        after.append(dict(names))
    return after


def test_readme(tmp_path, monkeypatch):
    names = run("README.md", tmp_path, monkeypatch)[-1]
    assert (tmp_path / "heart.png").exists() and (tmp_path / "blue.png").exists()
    assert names["out"].images[0].size == (64, 64)


def test_guide(tmp_path, monkeypatch):
    """The orders that it prints, and its plot."""
    names = run("docs/new_sampler.md", tmp_path, monkeypatch)[-1]
    assert names["plain"].slope == pytest.approx(1, abs=0.1)
    assert names["better"].slope == pytest.approx(2, abs=0.1)
    assert (tmp_path / "convergence.png").stat().st_size > 5000
    assert len((ROOT / "docs" / "new_sampler.md").read_text().splitlines()) < 150


def test_loop(tmp_path, monkeypatch):
    """What each section claims; its examples have fewer than 15 lines."""
    _, inpainting, guidance, editing, backwards, gradients = run("docs/loop.md", tmp_path, monkeypatch)
    assert max(len(block.splitlines()) for block in blocks("docs/loop.md")) < 15
    heart, x0 = inpainting["heart"].latents, inpainting["x0"]
    assert torch.equal(x0[..., :8], heart[..., :8]) and (x0[..., 8:] - heart[..., 8:]).abs().mean() > 0.1
    assert len(guidance["apart"]) == 20 and len(guidance["pictures"]) == 4
    first, second, alone = (
        editing["layout"].x,
        editing["step"].x,
        editing["pipe"]("blue heart, twemoji style", steps=20, seed=1, progress=False).latents,
    )
    assert (second - first).norm() < (alone - first).norm()
    again = np.asarray(backwards["pictures"][0], float) - np.asarray(inpainting["heart"].images[0], float)
    assert np.abs(again).mean() < 8
    assert gradients["loss"] < 2.5  # from 2.92


def test_step(tmp_path, monkeypatch, capsys):
    """What it prints is what stands there, and what it says about that is so."""
    page = (ROOT / "docs/step.md").read_text()
    names = run("docs/step.md", tmp_path, monkeypatch)[-1]
    told = re.findall(r"^```text\n(.*?)^```$", page, re.M | re.S)
    number = r"-?\d[\d,]*\.?\d*(?:e-?\d+)?"
    for got, stands in zip(capsys.readouterr().out.splitlines(), "".join(told).splitlines(), strict=True):
        assert re.sub(number, "", got).split() == re.sub(number, "", stands).split()
        if "ulp" not in got and "recorded" not in got:
            values = [[float(n.replace(",", "")) for n in re.findall(number, line)] for line in (got, stands)]
            assert values[0] == pytest.approx(values[1], rel=0.02)
    step, trace = names["step"], names["trace"]
    assert (names["x0"] - step.x0).abs().max() < 1e-5 > (names["x_next"] - step.x).abs().max()
    assert [d.quantity for d in trace.compare(names["other"]).first[:3]] == ["eps", "x0", "x"]
    share = dict(zip(trace.words[0], trace.attention().mean(dim=0), strict=True))
    in_the_middle = {word: float(heat[2:6, 2:6].mean() / heat.mean()) for word, heat in share.items()}
    assert min(in_the_middle[word] for word in ("red", "heart")) > 1.5 > 1.3 > in_the_middle["style"] > 0.8
    assert sum(share.values()).max() < 0.6  # most of it goes to the ends of the text
    assert names["page"].stat().st_size > 100_000


def test_wrong_layer(tmp_path, monkeypatch):
    """What the page shows is what is printed, but for figures below 100, which may be rounding."""
    monkeypatch.chdir(tmp_path)
    names = {}
    outputs = runpy.run_path(str(ROOT / "docs" / "parity.py"))["run"](names)
    assert len(outputs) == 3
    for shown, printed in outputs:
        assert [*map(words, shown.splitlines())] == [*map(words, printed.splitlines())]
        large = [[n for n in map(float, re.findall(NUMBER, text)) if n >= 100] for text in (shown, printed)]
        assert large[0] == pytest.approx(large[1], rel=0.1)
        for counted in (r"\d+ faults", r"all \d+ outputs"):
            assert re.findall(counted, shown) == re.findall(counted, printed)
    assert [fault.culprit for fault in names["report"].faults] == [
        "mid_block.attentions.0.transformer_blocks.0.ff.net.0"
    ]


NUMBER = r"(?<![\w.])\d[\d.]*(?:e[+-]\d+)?(?=\s|$)"


def words(line: str) -> list[str]:
    """Without the columns of figures."""
    return [word for word in line.split() if not re.fullmatch(NUMBER, word)]


def test_conventions(tmp_path, monkeypatch, capsys):
    """What the page prints, and what it says of that. Rounding may differ on another machine."""
    run("docs/conventions.md", tmp_path, monkeypatch)
    page = (ROOT / "docs" / "conventions.md").read_text()
    shown = "".join(re.findall(r"^```text\n(.*?)^```$", page, re.M | re.S))
    printed, number = capsys.readouterr().out, r"\d+\.?\d*(?:e-\d+)?"
    assert re.sub(number, "", printed).split() == re.sub(number, "", shown).split()
    pixels = r"pixels (\d+) of 255"
    numbers = [[float(n) for n in re.findall(number, re.sub(pixels, "", text))] for text in (printed, shown)]
    np.testing.assert_allclose(*numbers, rtol=0.05, atol=2e-3)
    values = [[float(n) for n in re.findall(pixels, text)] for text in (printed, shown)]
    np.testing.assert_allclose(*values, rtol=0.05, atol=1)
    beside, strength = shown.splitlines()[:4], re.findall(r"(\d+) evaluations", shown)
    first, second = zip(*([float(n) for n in re.findall(number, line)] for line in beside), strict=True)
    assert first[1] < 1e-3 < first[2] < 0.1 < first[3] and second[1] < 1e-3 < 0.1 < min(second[2:])
    assert strength == ["28", "29", "100", "28"]
