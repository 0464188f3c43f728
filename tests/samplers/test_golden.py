"""Every step of k-diffusion's samplers as it was recorded: see tests/golden/record_samplers.py."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from samplers.reference import mixture
from torch import Tensor

from ldm.samplers import SAMPLERS, Prediction

FILE = Path(__file__).parent.parent / "golden" / "k_diffusion.safetensors"

with safe_open(FILE, "pt") as golden:
    RECORDED = {name: golden.get_tensor(name) for name in golden.keys()}  # noqa: SIM118
    VERSIONS = golden.metadata()
RUNS = sorted(name for name in RECORDED if not name.startswith("sigmas"))


def denoise(x: Tensor, sigma: Tensor) -> Prediction:
    x0 = mixture(x, sigma)
    return Prediction(x0, (x - x0) / sigma)


@pytest.mark.parametrize("run", RUNS)
def test_golden(run):
    name, steps = run.split("/")
    sigmas, theirs = RECORDED[f"sigmas/{steps}"], RECORDED[run]
    generator = torch.Generator().manual_seed(1)

    def noise(*_: Tensor) -> Tensor:
        return torch.randn(1, 4, 2, 2, generator=generator, dtype=torch.float64)

    x = noise() * sigmas[0]
    ours = torch.stack([x, *(step.x for step in SAMPLERS[name](denoise, x, sigmas, noise))])  # (n+1,1,4,2,2)
    assert ours.shape == theirs.shape
    off = (ours - theirs).flatten(1).abs().amax(1) / theirs.flatten(1).abs().amax(1)
    assert off.max() <= 1e-5


def test_all_is_recorded():
    """Eleven functions at six numbers of steps, but for the two that break in k-diffusion at one step to 0."""
    assert len(RUNS) == 11 * 6 - 2
    assert {"k-diffusion", "torch"} <= VERSIONS.keys()
