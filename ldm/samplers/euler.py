"""Euler's method on the probability flow ODE dx/dsigma = (x - x0) / sigma = eps."""

from collections.abc import Iterator

from torch import Tensor

from ldm.samplers.denoiser import Denoiser
from ldm.samplers.step import Noise, Step, intervals


def euler(denoise: Denoiser, x: Tensor, sigmas: Tensor, noise: Noise) -> Iterator[Step]:
    """Karras et al. 2022, algorithm 2 without churn: order 1, one evaluation a step, no noise drawn."""
    for i, (sigma, sigma_next) in intervals(sigmas):
        prediction = denoise(x, sigma)
        x = x + (sigma_next - sigma) * prediction.eps
        yield Step(i, sigma, sigma_next, x, *prediction)
