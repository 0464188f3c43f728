"""Samplers: generator functions that own their loop, `sampler(denoise, x, sigmas, noise, **options)`."""

from collections.abc import Callable

from ldm.samplers.ddim import ddim, ddpm
from ldm.samplers.denoiser import PREDICTION_TYPES, Denoiser, Prediction, net_denoiser
from ldm.samplers.euler import euler, euler_ancestral
from ldm.samplers.schedule import SPACINGS, Schedule
from ldm.samplers.step import Noise, Step, Steps, after, intervals

Sampler = Callable[..., Steps]

SAMPLERS: dict[str, Sampler] = {
    "ddim": ddim,
    "ddpm": ddpm,
    "euler": euler,
    "euler_ancestral": euler_ancestral,
}

# The spellings of webui and of diffusers.
ALIASES = {
    "DDIM": "ddim",
    "DDIMScheduler": "ddim",
    "DDPMScheduler": "ddpm",
    "Euler": "euler",
    "EulerDiscreteScheduler": "euler",
    "Euler a": "euler_ancestral",
    "EulerAncestralDiscreteScheduler": "euler_ancestral",
}

# Defined on the variance-preserving process: their references space "leading", start from noise of unit variance in
# that process's scale and end at the sigma of t = 0. The others space "linspace", start from sigma * noise, end at 0.
VARIANCE_PRESERVING = {ddim, ddpm}

__all__ = [
    "ALIASES",
    "PREDICTION_TYPES",
    "SAMPLERS",
    "SPACINGS",
    "VARIANCE_PRESERVING",
    "Denoiser",
    "Noise",
    "Prediction",
    "Sampler",
    "Schedule",
    "Step",
    "Steps",
    "after",
    "ddim",
    "ddpm",
    "euler",
    "euler_ancestral",
    "intervals",
    "net_denoiser",
]
