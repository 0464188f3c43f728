"""Samplers: generator functions that own their loop, `sampler(denoise, x, sigmas, noise, **options)`."""

from collections.abc import Callable

from ldm.samplers.consistency import lcm, tcd
from ldm.samplers.ddim import ddim, ddpm
from ldm.samplers.deis import deis
from ldm.samplers.denoiser import PREDICTION_TYPES, Denoiser, Prediction, net_denoiser
from ldm.samplers.euler import euler, euler_ancestral, euler_cfg_pp
from ldm.samplers.plms import plms
from ldm.samplers.schedule import SPACINGS, Schedule
from ldm.samplers.step import Noise, Step, Steps, after, intervals
from ldm.samplers.unipc import unipc

Sampler = Callable[..., Steps]

SAMPLERS: dict[str, Sampler] = {
    "ddim": ddim,
    "ddpm": ddpm,
    "deis": deis,
    "euler": euler,
    "euler_ancestral": euler_ancestral,
    "euler_cfg_pp": euler_cfg_pp,
    "lcm": lcm,
    "plms": plms,
    "tcd": tcd,
    "unipc": unipc,
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
    "DEISMultistepScheduler": "deis",
    "LCM": "lcm",
    "LCMScheduler": "lcm",
    "PLMS": "plms",
    "PNDMScheduler": "plms",
    "TCDScheduler": "tcd",
    "UniPC": "unipc",
    "UniPCMultistepScheduler": "unipc",
}

# Defined on the variance-preserving process: their references space "leading", start from noise of unit variance in
# that process's scale and end at the sigma of t = 0. The others space "linspace", start from sigma * noise, end at 0.
VARIANCE_PRESERVING = {ddim, ddpm, plms}

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
    "deis",
    "euler",
    "euler_ancestral",
    "euler_cfg_pp",
    "intervals",
    "lcm",
    "net_denoiser",
    "plms",
    "tcd",
    "unipc",
]
