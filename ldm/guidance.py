"""Classifier-free guidance (Ho & Salimans 2022, eq. 6)."""

import torch
from torch import Tensor

from ldm.samplers.denoiser import Denoiser, Prediction


def guided(denoise: Denoiser, scale: float) -> Denoiser:
    """eps = eps_uncond + scale (eps_cond - eps_uncond).

    `denoise` runs one batch (2B,4,h,w), the unconditional half first: its texts are [negative prompts, prompts].
    Scale 1 is no guidance: use the denoiser of the prompts alone and save half of the work.
    """

    def denoise_guided(x: Tensor, sigma: Tensor) -> Prediction:
        eps_uncond, eps_cond = denoise(torch.cat([x, x]), sigma).eps.chunk(2)  # (B,4,h,w) each
        eps = eps_uncond + scale * (eps_cond - eps_uncond)
        return Prediction(x - sigma * eps, eps, eps_cond, eps_uncond)

    return denoise_guided
