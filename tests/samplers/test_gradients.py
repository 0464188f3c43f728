"""Gradients through sampling: right to the last digits, and cheap to keep."""

import sys

import pytest
import torch
from samplers.reference import mixture
from samplers.test_step import draws
from torch import Tensor, nn

from ldm.samplers import SAMPLERS, Denoiser, Prediction, Sampler, Schedule, checkpointed, ddim, dpmpp_2m, euler

ADAPTIVE = sys.modules["ldm.samplers.dpm_adaptive"]
SIGMAS = torch.tensor([3.0, 2.0, 1.2, 0.7, 0.3, 0.1, 0.0], dtype=torch.float64)
X, WEIGHT, *FRESH = torch.randn(20, 2, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
PLAIN = [
    *[(name, {}) for name in SAMPLERS if name != "restart"],
    *(("restart", {"segments": [(2, 1, 0.1, 2.0)]}), ("ddim", {"eta": 0.5}), ("dpm_2_ancestral", {"eta": 0.0})),
    *((name, {"s_churn": 1.0}) for name in ("euler", "heun", "dpm_2")),
    *(("dpm_adaptive", {"eta": 1.0}), ("unipc", {"order": 3}), ("deis", {"order": 3})),
]
CASES = [(*case, lambda denoise: denoise) for case in PLAIN]


def denoiser(a: Tensor) -> Denoiser:
    """The mixture, changed by a parameter."""

    def denoise(x: Tensor, sigma: Tensor) -> Prediction:
        x0 = mixture(a * x, sigma) + a
        eps = (x - x0) / sigma
        return Prediction(x0, eps, eps, a * eps)

    return denoise


class Recorded(ADAPTIVE.PID):
    """The steps h that were taken."""

    def accepts(self, error: float) -> bool:
        h = self.h
        if taken := super().accepts(error):
            self.taken.append(h)
        return taken


class Replayed:
    """The same again, whatever the error."""

    def __init__(self, *_: float):
        self.left = iter(self.taken)
        self.h = next(self.left)

    def accepts(self, error: float) -> bool:
        self.h = next(self.left, 0.0)
        return True


@pytest.mark.parametrize(("name", "options", "wrap"), [*CASES, ("euler", {}, checkpointed), ("heun", {}, checkpointed)])
def test_against_finite_differences(name, options, wrap, monkeypatch):
    """Of one number made of the last x, by the first x and by a parameter of the denoiser.

    The noise is the same each time, and so are the steps of dpm_adaptive, through which no gradient flows.
    """

    def final(x: Tensor, a: Tensor) -> Tensor:
        noise = iter(FRESH)
        *_, last = SAMPLERS[name](wrap(denoiser(a)), x, SIGMAS, lambda *_: next(noise), **options)
        return (WEIGHT * last.x).sum()

    x, a = (SIGMAS[0] * X).requires_grad_(), torch.tensor(0.9, dtype=torch.float64, requires_grad=True)
    taken: list[float] = []
    monkeypatch.setattr(Recorded, "taken", taken, raising=False)
    monkeypatch.setattr(Replayed, "taken", taken, raising=False)
    monkeypatch.setattr(ADAPTIVE, "PID", Recorded)
    by_x, by_a = torch.autograd.grad(final(x, a), (x, a))
    monkeypatch.setattr(ADAPTIVE, "PID", Replayed)

    def difference(dx: Tensor, da: float, h: float = 1e-5) -> Tensor:
        with torch.no_grad():
            return (final(x + h * dx, a + h * da) - final(x - h * dx, a - h * da)) / (2 * h)

    basis = torch.eye(x.numel(), dtype=x.dtype).reshape(-1, *x.shape)
    for ours, expected in (
        (by_x, torch.stack([difference(e, 0.0) for e in basis]).reshape(x.shape)),
        (by_a, difference(torch.zeros_like(x), 1.0)),
    ):
        assert (ours - expected).abs().max() <= 1e-6 * expected.abs().max()


# ------------------------------------------------------------------------------------------------ memory


class Wide(nn.Module):
    """Two layers inside, each 25 times as large as its input."""

    def __init__(self):
        super().__init__()
        one, two, three = nn.Conv2d(4, 100, 1), nn.Conv2d(100, 100, 1), nn.Conv2d(100, 4, 1)
        self.layers = nn.Sequential(one, nn.Tanh(), two, nn.Tanh(), three)

    def forward(self, x: Tensor, sigma: Tensor) -> Prediction:
        eps = self.layers(x / (1 + sigma**2) ** 0.5)
        return Prediction(x - sigma * eps, eps)


def saved(sampler: Sampler, denoise: Denoiser, x: Tensor, steps: int) -> int:
    """Bytes of all storages that autograd keeps for the way back, but for single numbers: sigmas."""
    sizes: dict[int, int] = {}
    kept = []  # so that no address is given twice

    def pack(tensor: Tensor) -> Tensor:
        if tensor.numel() > 1:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        *_, last = sampler(denoise, x, Schedule().sigmas(steps, "karras"), draws())
    last.x.sum().backward()
    return sum(sizes.values())


@pytest.mark.parametrize("sampler", [ddim, euler, dpmpp_2m])
def test_memory_grows_by_a_latent_a_step(sampler):
    net = Wide()
    x = torch.randn(2, 4, 16, 16, requires_grad=True)

    def growth(denoise: Denoiser) -> float:
        """In latents a step."""
        few, many = (saved(sampler, denoise, x, steps) for steps in (5, 25))
        return (many - few) / 20 / x.nbytes

    assert growth(checkpointed(net)) <= 1
    assert growth(net) > 50
