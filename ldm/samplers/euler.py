"""Euler's method on the probability flow ODE dx/dsigma = (x - x0) / sigma = eps, and its ancestral kind."""

import math

import torch
from torch import Tensor

from ldm.samplers.denoiser import Denoiser
from ldm.samplers.step import Noise, Step, Steps, after, intervals


def euler(
    denoise: Denoiser,
    x: Tensor,
    sigmas: Tensor,
    noise: Noise,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
) -> Steps:
    """Karras et al. 2022, algorithm 2 without its correction: order 1, one evaluation a step.

    s_churn 0 draws no noise; above, each sigma between s_tmin and s_tmax is raised to sigma_hat = (1 + gamma) sigma
    first, with noise of standard deviation s_noise.
    """
    for i, (sigma, sigma_next) in intervals(sigmas, falling=s_churn > 0):
        x, sigma_hat, fresh = churned(x, sigma, noise, len(sigmas) - 1, s_churn, s_tmin, s_tmax, s_noise)
        prediction = denoise(x, sigma_hat)
        x = x + (sigma_next - sigma_hat) * prediction.eps
        step = Step(i, sigma, sigma_next, x, *prediction, noise=fresh)
        x = after(step, (yield step)).x


def churned(
    x: Tensor, sigma: Tensor, noise: Noise, steps: int, s_churn: float, s_tmin: float, s_tmax: float, s_noise: float
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Lines 4 to 6 of algorithm 2: x and sigma after the noise that was added, and that noise."""
    if not s_churn >= 0 or not s_noise >= 0:
        raise ValueError(f"s_churn={s_churn}, s_noise={s_noise}: give numbers of 0 or more")
    gamma = min(s_churn / steps, 2**0.5 - 1) if s_tmin <= sigma <= s_tmax else 0.0
    if gamma == 0:
        return x, sigma, None
    sigma_hat = (1 + gamma) * sigma
    fresh = noise(sigma, sigma_hat)
    return x + (sigma_hat**2 - sigma**2) ** 0.5 * s_noise * fresh, sigma_hat, fresh


def euler_ancestral(
    denoise: Denoiser, x: Tensor, sigmas: Tensor, noise: Noise, eta: float = 1.0, s_noise: float = 1.0
) -> Steps:
    """Euler's step to sigma_down, then noise of standard deviation sigma_up: k-diffusion's, after DDPM's posterior.

    In this scale it is DDIM's step for the same eta; what differs is where their references start and end.
    """
    for i, (sigma, sigma_next) in intervals(sigmas):
        sigma_down, sigma_up = ancestral(sigma, sigma_next, eta)
        prediction = denoise(x, sigma)
        x = x + (sigma_down - sigma) * prediction.eps
        x, fresh = noised(x, sigma_up * s_noise, noise, sigma, sigma_next)
        step = Step(i, sigma, sigma_next, x, *prediction, noise=fresh)
        x = after(step, (yield step)).x


def euler_cfg_pp(denoise: Denoiser, x: Tensor, sigmas: Tensor, noise: Noise) -> Steps:
    """CFG++ (Chung et al. 2024, algorithm 2): x0 is the guided one, what is left of the noise is the unconditional one.

    Its guidance scale lies between 0 and 1. Without guidance it is Euler's method.
    """
    for i, (sigma, sigma_next) in intervals(sigmas):
        prediction = denoise(x, sigma)
        eps = prediction.eps if prediction.eps_uncond is None else prediction.eps_uncond
        x = prediction.x0 + sigma_next * eps
        step = Step(i, sigma, sigma_next, x, *prediction)
        x = after(step, (yield step)).x


def ancestral(sigma: Tensor, sigma_next: Tensor, eta: float) -> tuple[Tensor, Tensor]:
    """sigma_down and sigma_up, sigma_down^2 + sigma_up^2 = sigma_next^2; sigma_up is eta times that of DDPM's posterior
    (Ho et al. 2020, eq. 7, in the scale x = x0 + sigma eps), and sigma_next at most.

    Raises ValueError for eta above 0 where sigma rises.
    """
    if eta == 0:
        return sigma_next, torch.zeros_like(sigma_next)
    if sigma_next > sigma:
        raise ValueError(
            f"eta={eta} with sigma rising from {sigma:.4f} to {sigma_next:.4f}: fresh noise cannot be taken out,"
            " use a sampler with eta=0"
        )
    q = sigma_next / sigma
    sigma_up = min(sigma_next, eta * sigma_next * (1 - q**2) ** 0.5)
    return sigma_next * (1 - eta**2 + (eta * q) ** 2).clamp(min=0) ** 0.5, sigma_up  # no difference of what is close


def noised(x: Tensor, std: Tensor, noise: Noise, sigma: Tensor, sigma_next: Tensor) -> tuple[Tensor, Tensor | None]:
    """x with fresh noise of a standard deviation, and that noise: none is drawn where it would be nothing."""
    if std == 0:
        return x, None
    fresh = noise(sigma, sigma_next)
    return x + std * fresh, fresh
