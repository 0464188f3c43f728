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
        eps_uncond, eps_cond = denoise(torch.cat([x, x]), sigma).eps.chunk(2)  # (B,4,h,w) each
        eps = eps_uncond + scale * (eps_cond - eps_uncond)
        if rescale:
            # v = sqrt(a) eps - sqrt(1 - a) x0 with a = 1 / (1 + sigma^2), x0 = x - sigma eps, is c eps - d x:
            c, d = ((1 + sigma**2) ** 0.5, sigma / (1 + sigma**2) ** 0.5) if v else (1.0, 0.0)
            out, out_cond = c * eps - d * x, c * eps_cond - d * x
            ratio = out_cond.std(dim=(1, 2, 3), keepdim=True) / out.std(dim=(1, 2, 3), keepdim=True)  # (B,1,1,1)
            eps = ((rescale * ratio + 1 - rescale) * out + d * x) / c
        return Prediction(x - sigma * eps, eps, eps_cond, eps_uncond)

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
