"""Denoising diffusion implicit models (Song et al. 2021), in the scale x = x0 + sigma eps."""

from torch import Tensor

from ldm.samplers.denoiser import Denoiser
from ldm.samplers.euler import ancestral, noised
from ldm.samplers.step import Noise, Step, Steps, after, intervals


def ddim(denoise: Denoiser, x: Tensor, sigmas: Tensor, noise: Noise, eta: float = 0.0) -> Steps:
    """Equation 12 divided by sqrt(a_next); sigma_up is equation 16's sigma_t in that scale.

    eta 0 is deterministic and draws nothing, eta 1 is DDPM's ancestral step: eta scales a standard deviation.
    """
    for i, (sigma, sigma_next) in intervals(sigmas):
        sigma_down, sigma_up = ancestral(sigma, sigma_next, eta)
        prediction = denoise(x, sigma)
        x = prediction.x0 + sigma_down * prediction.eps
        x, fresh = noised(x, sigma_up, noise, sigma, sigma_next)
        step = Step(i, sigma, sigma_next, x, *prediction, noise=fresh)
        x = after(step, (yield step)).x


def ddpm(denoise: Denoiser, x: Tensor, sigmas: Tensor, noise: Noise) -> Steps:
    """Ancestral sampling (Ho et al. 2020, algorithm 2 with the posterior's variance, equation 7): DDIM's with eta 1."""
    yield from ddim(denoise, x, sigmas, noise, eta=1.0)
