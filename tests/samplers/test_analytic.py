"""Answers on paper: for data from N(MEAN, STD^2) the denoiser and the solution of the flow have a closed form."""

import math

import numpy as np
import pytest
import torch
from samplers.reference import gaussian, mixture
from torch import Tensor

from ldm.samplers import SPACINGS, Denoiser, Prediction, Schedule, ddim, euler

MEAN, STD = 0.7, 0.8

schedule = Schedule()


def normal(count: int) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def mixture_denoiser(x: Tensor, sigma: Tensor) -> Prediction:
    x0 = mixture(x, sigma)
    return Prediction(x0, (x - x0) / sigma)


def flow(x: Tensor, sigma: Tensor, sigma_end: Tensor | float) -> Tensor:
    """dx/dsigma = sigma (x - mean) / (std^2 + sigma^2), solved: x - mean grows as sqrt(std^2 + sigma^2)."""
    return MEAN + (x - MEAN) * ((STD**2 + sigma_end**2) / (STD**2 + sigma**2)) ** 0.5


@pytest.mark.parametrize("denoise", [gaussian(MEAN, STD), mixture_denoiser], ids=["gaussian", "mixture"])
@pytest.mark.parametrize("end", [0.0, schedule.sigma_min])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_ddim_is_euler(spacing, end, denoise):
    sigmas = schedule.sigmas(20, spacing, end=end)
    x = normal(100) * sigmas[0]
    for a, b in zip(ddim(denoise, x, sigmas, None), euler(denoise, x, sigmas, None), strict=True):
        assert (a.x - b.x).abs().max() <= 1e-6 * b.x.abs().max()


@pytest.mark.parametrize("sampler", [ddim, euler])
def test_steps_show_what_happened(sampler):
    """Step i: from sigma to sigma_next, the prediction that splits the x it started from, and the x it went to."""
    sigmas = schedule.sigmas(7, "karras")
    x = normal(100) * sigmas[0]
    steps = list(sampler(gaussian(MEAN, STD), x, sigmas, None))
    assert [step.i for step in steps] == list(range(7))
    assert torch.equal(torch.stack([step.sigma for step in steps]), sigmas[:-1])
    assert torch.equal(torch.stack([step.sigma_next for step in steps]), sigmas[1:])
    for step in steps:
        torch.testing.assert_close(step.x0 + step.sigma * step.eps, x, rtol=1e-12, atol=1e-12)
        x = step.x
    torch.testing.assert_close(x, steps[-1].x0, rtol=0, atol=1e-12)  # sigma ends at 0


@pytest.mark.parametrize("sampler", [ddim, euler])
def test_converges_with_order_1(sampler):
    counts = np.array([20, 40, 80, 160, 320])
    errors = []
    for count in counts:
        sigmas = schedule.sigmas(count + 1, "karras")[:-1]  # to sigma_min: the step from there to 0 never gets smaller
        x = MEAN + normal(100) * sigmas[0]
        *_, last = sampler(gaussian(MEAN, STD), x, sigmas, None)
        errors.append(float((last.x - flow(x, sigmas[0], sigmas[-1])).abs().max()))
    slope, _ = np.polyfit(np.log(counts), np.log(errors), 1)
    assert 0.9 < -slope < 1.1
    assert errors[-1] < 0.02 * STD


def assert_distributed(x: Tensor, mean: float, std: float) -> None:
    """Within 4 standard errors of the mean and of the variance."""
    count = x.numel()
    assert abs(float(x.mean()) - mean) < 4 * std / math.sqrt(count)
    assert abs(float(x.var()) - std**2) < 4 * std**2 * math.sqrt(2 / count)


def sample(denoise: Denoiser, x: Tensor, sigmas: Tensor, eta: float) -> Tensor:
    generator = torch.Generator().manual_seed(3)

    def noise(*_: Tensor) -> Tensor:
        return torch.randn(len(x), generator=generator, dtype=torch.float64)

    *_, last = ddim(denoise, x, sigmas, noise, eta)
    return last.x


def begin(sigma: Tensor) -> Tensor:
    """Data + sigma noise."""
    return MEAN + (STD**2 + sigma**2) ** 0.5 * normal(20_000)


# 999 steps: their own error in the variance is a sixth of what the test allows. Again not the step to 0.
SIGMAS = schedule.sigmas(1000, "karras")[:-1]
END = math.hypot(STD, schedule.sigma_min)


@pytest.mark.parametrize("sampler", [ddim, euler])
def test_distribution(sampler):
    *_, last = sampler(gaussian(MEAN, STD), begin(SIGMAS[0]), SIGMAS, None)
    assert_distributed(last.x, MEAN, END)


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_distribution_with_fresh_noise(eta):
    assert_distributed(sample(gaussian(MEAN, STD), begin(SIGMAS[0]), SIGMAS, eta), MEAN, END)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_variance_on_the_way(eta):
    """For data that is one point the steps are exact however few: x is that point + sigma * noise at every sigma."""
    sigmas = schedule.sigmas(4, "trailing", end=schedule.sigma_min)
    x = MEAN + sigmas[0] * normal(20_000)
    for i, sigma in enumerate(sigmas[1:].tolist(), 2):
        assert_distributed(sample(gaussian(MEAN, 0.0), x, sigmas[:i], eta), MEAN, sigma)


def test_eta_1_is_the_reversed_diffusion():
    """Two neighbours of the forward process x_next + sqrt(sigma^2 - sigma_next^2) noise have covariance sigma_next^2.

    With eta between, the old noise keeps the share sqrt(1 - eta^2 (1 - (sigma_next / sigma)^2)).
    """
    sigma, sigma_next = 2.0, 1.0
    x = sigma * normal(20_000)
    for eta in (0.0, 0.5, 1.0):
        x_next = sample(gaussian(0.0, 0.0), x, torch.tensor([sigma, sigma_next], dtype=torch.float64), eta)
        expected = sigma * sigma_next * math.sqrt(1 - eta**2 * (1 - (sigma_next / sigma) ** 2))
        error = math.sqrt((sigma**2 * sigma_next**2 + expected**2) / len(x))
        assert abs(float((x * x_next).mean()) - expected) < 4 * error
    assert expected == pytest.approx(sigma_next**2)
