"""The code in the documentation runs as it stands, page by page, from top to bottom."""

import re
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
    assert gradients["loss"] < 1.8  # from 2.05


def test_conventions(tmp_path, monkeypatch, capsys):
    """What the page prints, and what it says of that. Rounding may differ on another machine."""
    run("docs/conventions.md", tmp_path, monkeypatch)
    page = (ROOT / "docs" / "conventions.md").read_text()
    shown = "".join(re.findall(r"^```text\n(.*?)^```$", page, re.M | re.S))
    printed, number = capsys.readouterr().out, r"\d+\.?\d*(?:e-\d+)?"
    assert re.sub(number, "", printed).split() == re.sub(number, "", shown).split()
    numbers = [[float(n) for n in re.findall(number, text)] for text in (printed, shown)]
    np.testing.assert_allclose(*numbers, rtol=0.05, atol=2e-3)
    beside, strength = shown.splitlines()[:4], re.findall(r"(\d+) evaluations", shown)
    first, second = zip(*([float(n) for n in re.findall(number, line)] for line in beside), strict=True)
    assert first[1] < 1e-3 < first[2] < 0.1 < first[3] and second[1] < 1e-3 < 0.1 < min(second[2:])
    assert strength == ["28", "29", "100", "28"]
