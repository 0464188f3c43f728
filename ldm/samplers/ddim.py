"""Denoising diffusion implicit models (Song et al. 2021), in the scale x = x0 + sigma eps."""

from collections.abc import Iterator

from torch import Tensor

from ldm.samplers.denoiser import Denoiser
from ldm.samplers.step import Noise, Step, intervals


def ddim(denoise: Denoiser, x: Tensor, sigmas: Tensor, noise: Noise, eta: float = 0.0) -> Iterator[Step]:
    """Equation 12 divided by sqrt(a_next); `up` is equation 16's sigma_t in that scale.

    eta 0 is deterministic and draws nothing, eta 1 is DDPM's ancestral step: eta scales a standard deviation.
    """
    for i, (sigma, sigma_next) in intervals(sigmas):
        prediction = denoise(x, sigma)
        up = eta * sigma_next * (1 - (sigma_next / sigma) ** 2) ** 0.5
        x = prediction.x0 + (sigma_next**2 - up**2) ** 0.5 * prediction.eps
        if eta > 0:
            x = x + up * noise()
        yield Step(i, sigma, sigma_next, x, *prediction)
