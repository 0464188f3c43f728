"""From the net's epsilon or v to what samplers ask for: the clean latents x0 and the noise eps in x = x0 + sigma eps.

Everything that knows the net's own scale (VP: sqrt(a) x0 + sqrt(1 - a) eps, a = 1 / (1 + sigma^2)) stands here.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ldm.samplers.schedule import Schedule


class Prediction(NamedTuple):
    """x0 and eps (B,4,h,w) float32; with guidance also the two noises that eps was made of."""

    x0: Tensor
    eps: Tensor
    eps_cond: Tensor | None = None
    eps_uncond: Tensor | None = None


Denoiser = Callable[[Tensor, Tensor], Prediction]  # denoise(x (B,4,h,w), sigma ()) -> Prediction

PREDICTION_TYPES = ("epsilon", "v_prediction")


def net_denoiser(
    net: Callable[[Tensor, Tensor, Tensor], Tensor],
    context: Tensor,
    schedule: Schedule,
    prediction_type: str = "epsilon",
    log: bool = False,
    whole: bool = False,
) -> Denoiser:
    """The UNet as a denoiser under one text: `context` (B,n,width) in the dtype in which the net shall run.

    prediction_type: "epsilon" (Ho et al. 2020) or "v_prediction": v = sqrt(a) eps - sqrt(1 - a) x0 (Salimans & Ho
    2022, appendix D).
    log: read t between two timesteps off the logarithm of sigma, as k-diffusion always does and diffusers for karras.
    whole: round t to a timestep that the net was trained on, as ComfyUI always does and diffusers in DPM-Solver.
    The denoiser raises FloatingPointError when the net returns NaN or infinity, ValueError for another shape than x's.
    """
    if prediction_type not in PREDICTION_TYPES:
        raise ValueError(f"prediction_type={prediction_type!r}: use one of {', '.join(PREDICTION_TYPES)}")

    def denoise(x: Tensor, sigma: Tensor) -> Prediction:
        scale = (1 + sigma**2) ** 0.5
        t = schedule.t(sigma, log)
        t = (t.round() if whole else t).to(x.device, torch.float32)
        out = net((x / scale).to(context.dtype), t, context).to(x.dtype)
        if out.shape != x.shape:
            raise ValueError(f"the UNet returned {tuple(out.shape)} for x {tuple(x.shape)}: it must keep the shape")
        if not torch.isfinite(out).all():
            raise FloatingPointError(
                f"the UNet returned NaN or infinity at sigma={float(sigma):.4f}, running in {context.dtype}:"
                " load it with dtype=torch.float32 or torch.bfloat16, and check that the weights are finite"
            )
        if prediction_type == "epsilon":
            return Prediction(x0=x - sigma * out, eps=out)
        return Prediction(x0=x / scale**2 - sigma / scale * out, eps=out / scale + sigma / scale**2 * x)

    return denoise


def checkpointed(denoise: Denoiser) -> Denoiser:
    """A denoiser of which a gradient remembers x alone: what is inside is evaluated again on the way back.

    The memory of sampling with gradients then grows by one latent for each evaluation, and not by all of the net's
    activations; it takes half as long again.
    """

    def denoise_again(x: Tensor, sigma: Tensor) -> Prediction:
        return checkpoint(denoise, x, sigma, use_reentrant=False)

    return denoise_again
