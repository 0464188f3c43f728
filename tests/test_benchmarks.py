"""`python -m benchmarks` on tiny nets: its rows, and that a net that is wrong is told."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import median

import numpy as np
import pytest

from benchmarks import contenders, model
from benchmarks.model import Case
from benchmarks.report import Row, line
from benchmarks.stages import NET, Stages
from ldm.unet import UNet

ROOT = Path(__file__).parent.parent
BASES = ["diffusers", "diffusers channels-last"]


VALUES = {"diffusers": [5.0, 4.0, 9.0], "diffusers channels-last": [3.0, 8.0, 4.0], "ldm": [2.0, 1.0, 2.5]}


def test_ratio_is_of_medians_to_the_faster_of_both_memory_formats():
    row = Row("UNet", "float32", "s", VALUES, {"ldm": 2e-6}, 1e-4)
    assert row.medians == {"diffusers": 5, "diffusers channels-last": 4, "ldm": 2}
    shown = line(row, ["diffusers", "OpenVINO"], target=1.8)
    assert shown == "| UNet | float32 | 2 s (1 s to 2.5 s) | 5 s |  | 2.00x | 1.8x met | 2.0e-06 (1.0e-04) |"
    assert "| 2.1x missed |" in line(row, [], target=2.1)


@pytest.mark.parametrize(
    ("dtype", "off", "agrees"),
    [
        ("float32", 0.9e-4, True),
        ("float32", 1.1e-4, False),
        ("float32", float("nan"), False),
        ("bfloat16", 1.9e-2, True),  # diffusers' own, below
        ("bfloat16", 2.1e-2, False),
    ],
)
def test_agreement(tmp_path, dtype, off, agrees):
    stages, exact = Stages(tmp_path, "tiny", rounds=1, compiled=False), np.ones(4, np.float32)
    for name, kind, own in (
        ("diffusers", "float32", 0),
        ("diffusers channels-last", "float32", 1e-3),
        ("diffusers", "bfloat16", 1e-2),
        ("diffusers channels-last", "bfloat16", 2e-2),
    ):
        assert stages.off("case", name, kind, exact + own) == pytest.approx(own, rel=1e-3)
    found = stages.off("case", "ldm", dtype, exact + off)
    row = Row("UNet", dtype, "s", VALUES, {"ldm": found}, stages.tolerance("case", dtype, NET))
    assert row.agrees is agrees
    assert ("DIFFERS" in line(row, [], None)) is not agrees


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("benchmarks") / "model"
    model.synthesise(path, "tiny")
    return path


def off(folder: Path, part: str) -> float:
    """Of ours and diffusers, which run here instead of in processes of their own."""
    stages, case = Stages(folder, "tiny", rounds=1, compiled=False), Case(part, 2, 64)
    for name in ("diffusers", "ldm"):
        contenders.load(name, folder, "float32", part)
        result, _ = contenders.begin(folder, case, "float32")
        assert result.dtype == np.float32 and contenders.measure() > 0
        found = stages.off(case, name, "float32", result)
    return found


@pytest.mark.parametrize("part", model.PARTS)
def test_contenders_are_given_the_same(folder, part):
    assert off(folder, part) <= 1e-5


def test_a_wrong_net_is_told(folder, monkeypatch):
    right = UNet.forward
    monkeypatch.setattr(UNet, "forward", lambda *inputs: 1.001 * right(*inputs))
    assert off(folder, "unet") > NET


def run(where: Path, folder: Path, stages: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "benchmarks", "--size", "tiny", "--rounds", "1", "--stages", stages]
    return subprocess.run([*command, "--save", folder], cwd=where, stdout=subprocess.PIPE, text=True)


@pytest.mark.full
def test_results(tmp_path):
    done = run(ROOT, tmp_path, "unet,decode")
    results = json.loads((tmp_path / "results.json").read_text())
    assert done.returncode == 0, done.stdout
    rows = {(row["stage"], row["dtype"]): row for row in results["rows"]}
    stages = ("UNet, batch 2, 64x64", "decode, 64x64")
    assert list(rows) == [(stage, dtype) for stage in stages for dtype in ("float32", "bfloat16")]
    for row in rows.values():
        assert set(row["values"]) >= {"ldm", *BASES} and all(len(values) == 1 for values in row["values"].values())
        medians = {name: median(values) for name, values in row["values"].items()}
        assert row["ratio"] == min(medians[name] for name in BASES) / medians["ldm"]
        assert row["off"]["ldm"] <= row["tolerance"] and row["agrees"]
    for (_, dtype), row in list(rows.items())[:2]:
        largest = max(results["limits"][dtype].values())
        assert results["shares"][dtype]["ldm"] == pytest.approx(results["gigaflop"] / row["medians"]["ldm"] / largest)
    assert done.stdout == (tmp_path / "results.md").read_text()
    assert "stable-diffusion.cpp: " in done.stdout


@pytest.mark.full
def test_a_wrong_net_ends_with_1(tmp_path):
    """Ours is broken in a copy of the project."""
    for package in ("ldm", "tests", "benchmarks"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    with (tmp_path / "ldm" / "unet" / "__init__.py").open("a") as file:
        file.write("\n_right = UNet.forward\nUNet.forward = lambda *inputs: 1.001 * _right(*inputs)\n")
    assert run(tmp_path, tmp_path / "results", "unet").returncode == 1
    rows = json.loads((tmp_path / "results" / "results.json").read_text())["rows"]
    assert not rows[0]["agrees"]
