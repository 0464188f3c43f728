"""DPM-Solver-2 (Lu et al. 2022) on the probability flow ODE dx/dsigma = (x - x0) / sigma = eps, and its ancestral kind.

Its algorithm 1 has lambda = -log(sigma) in the scale x = x0 + sigma eps: half way in lambda is the geometric mean.
"""

import math

from torch import Tensor

from ldm.samplers.denoiser import Denoiser, Prediction
from ldm.samplers.euler import ancestral, churned, noised
from ldm.samplers.step import Noise, Step, Steps, after, intervals


def dpm_2(
    denoise: Denoiser,
    x: Tensor,
    sigmas: Tensor,
    noise: Noise,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
) -> Steps:
    """DPM-Solver-2 under the churn of Karras et al. 2022, algorithm 2: order 2, two evaluations a step and one for the
    step to 0.

    Steps show the prediction of the first. The options are those of `euler`.
    """
    for i, (sigma, sigma_next) in intervals(sigmas, falling=s_churn > 0):
        x, sigma_hat, fresh = churned(x, sigma, noise, len(sigmas) - 1, s_churn, s_tmin, s_tmax, s_noise)
        x, prediction = dpm_2_step(denoise, x, sigma_hat, sigma_next)
        step = Step(i, sigma, sigma_next, x, *prediction, noise=fresh)
        x = after(step, (yield step)).x


def dpm_2_ancestral(
    denoise: Denoiser, x: Tensor, sigmas: Tensor, noise: Noise, eta: float = 1.0, s_noise: float = 1.0
) -> Steps:
    """DPM-Solver-2's step to sigma_down, then noise of standard deviation sigma_up, as in `euler_ancestral`.

    Two evaluations a step and one where sigma or sigma_down is 0; steps show the prediction of the first.
    """
    for i, (sigma, sigma_next) in intervals(sigmas):
        sigma_down, sigma_up = ancestral(sigma, sigma_next, eta)
        x, prediction = dpm_2_step(denoise, x, sigma, sigma_down)
        x, fresh = noised(x, sigma_up * s_noise, noise, sigma, sigma_next)
        step = Step(i, sigma, sigma_next, x, *prediction, noise=fresh)
        x = after(step, (yield step)).x


def dpm_2_step(denoise: Denoiser, x: Tensor, sigma: Tensor, sigma_next: Tensor) -> tuple[Tensor, Prediction]:
    """Algorithm 1 with r_1 = 1/2, Euler's step to and from 0: x at sigma_next, and the prediction made at sigma."""
    prediction = denoise(x, sigma)
    d = prediction.eps
    if sigma * sigma_next > 0:
        sigma_mid = (sigma * sigma_next) ** 0.5
        d = denoise(x + (sigma_mid - sigma) * d, sigma_mid).eps
    return x + (sigma_next - sigma) * d, prediction
