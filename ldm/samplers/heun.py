"""Heun's method on the probability flow ODE dx/dsigma = (x - x0) / sigma = eps."""

import math

from torch import Tensor

from ldm.samplers.denoiser import Denoiser, Prediction
from ldm.samplers.euler import churned
from ldm.samplers.step import Noise, Step, Steps, after, intervals


def heun(
    denoise: Denoiser,
    x: Tensor,
    sigmas: Tensor,
    noise: Noise,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
) -> Steps:
    """Karras et al. 2022, algorithm 2: order 2, two evaluations a step and one for the step to 0.

    Steps show the prediction of the first. The options are those of `euler`.
    """
    for i, (sigma, sigma_next) in intervals(sigmas, falling=s_churn > 0):
        x, sigma_hat, fresh = churned(x, sigma, noise, len(sigmas) - 1, s_churn, s_tmin, s_tmax, s_noise)
        x, prediction = heun_step(denoise, x, sigma_hat, sigma_next)
        step = Step(i, sigma, sigma_next, x, *prediction, noise=fresh)
        x = after(step, (yield step)).x


def heun_step(denoise: Denoiser, x: Tensor, sigma: Tensor, sigma_next: Tensor) -> tuple[Tensor, Prediction]:
    """Lines 7 to 11 of algorithm 2: x at sigma_next, and the prediction made at sigma."""
    prediction = denoise(x, sigma)
    d = prediction.eps
    x_next = x + (sigma_next - sigma) * d
    if sigma_next > 0:
        d_prime = denoise(x_next, sigma_next).eps
        x_next = x + (sigma_next - sigma) * (d + d_prime) / 2
    return x_next, prediction
