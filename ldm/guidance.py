"""Classifier-free guidance (Ho & Salimans 2022, eq. 6), its rescaling, and the change of model within a run."""

import torch
from torch import Tensor

from ldm.samplers.denoiser import Denoiser, Prediction
from ldm.samplers.schedule import Schedule


def guided(denoise: Denoiser, scale: float, rescale: float = 0.0, v: bool = False) -> Denoiser:
    """eps = eps_uncond + scale (eps_cond - eps_uncond).

    `denoise` runs one batch (2B,4,h,w), the unconditional half first: its texts are [negative prompts, prompts].
    Scale 1 is no guidance: use the denoiser of the prompts alone and save half of the work.

    rescale: 0 to 1, how far the net's guided output is brought back to the standard deviation that it has for the
    prompt alone (Lin et al. 2023, eq. 14 to 16). That is of epsilon, or of v if the net predicts `v`.
    """

    def denoise_guided(x: Tensor, sigma: Tensor) -> Prediction:
        both = denoise(torch.cat([x, x]), sigma)
        eps_uncond, eps_cond = both.eps.chunk(2)  # (B,4,h,w) each
        # The net's own output, epsilon or v = sqrt(a) eps - sqrt(1 - a) x0 with a = 1 / (1 + sigma^2), is c eps - d x0.
        c, d = (1 / (1 + sigma**2) ** 0.5, sigma / (1 + sigma**2) ** 0.5) if v else (1.0, 0.0)
        out_uncond, out_cond = (c * both.eps - d * both.x0).chunk(2)
        out = out_uncond + scale * (out_cond - out_uncond)
        if rescale:
            ratio = out_cond.std(dim=(1, 2, 3), keepdim=True) / out.std(dim=(1, 2, 3), keepdim=True)  # (B,1,1,1)
            out = (rescale * ratio + 1 - rescale) * out
        eps = c * out + c * d * x
        # Of v directly: at the sigma of 4096 of a zero terminal SNR, x - sigma eps would leave three digits.
        x0 = c**2 * x - d * out if v else x - sigma * eps
        return Prediction(x0, eps, eps_cond, eps_uncond)

    return denoise_guided


def handed_over(base: Denoiser, refiner: Denoiser, schedule: Schedule, start: float) -> Denoiser:
    """`base` for the first `start` (0 to 1) of the 1000 timesteps, counted from the noisy end, then `refiner`.

    The boundary is that of diffusers' denoising_end and denoising_start.
    """
    boundary = round(1000 - start * 1000)

    def denoise(x: Tensor, sigma: Tensor) -> Prediction:
        # A hair below: the sigma of a whole timestep may come back as 199.9999...
        return (base if schedule.t(sigma) >= boundary - 1e-6 else refiner)(x, sigma)

    return denoise
