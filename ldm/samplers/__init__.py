"""Samplers: generator functions that own their loop, `sampler(denoise, x, sigmas, noise, **options)`."""

from collections.abc import Callable, Iterator

from ldm.samplers.ddim import ddim
from ldm.samplers.denoiser import PREDICTION_TYPES, Denoiser, Prediction, net_denoiser
from ldm.samplers.euler import euler
from ldm.samplers.schedule import SPACINGS, Schedule
from ldm.samplers.step import Noise, Step, intervals

Sampler = Callable[..., Iterator[Step]]

SAMPLERS: dict[str, Sampler] = {"ddim": ddim, "euler": euler}

# The spellings of webui and of diffusers.
ALIASES = {"DDIM": "ddim", "DDIMScheduler": "ddim", "Euler": "euler", "EulerDiscreteScheduler": "euler"}

# Defined on the variance-preserving process: their references space "leading", start from noise of unit variance in
# that process's scale and end at the sigma of t = 0. The others space "linspace", start from sigma * noise, end at 0.
VARIANCE_PRESERVING = {ddim}

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
    "ddim",
    "euler",
    "intervals",
    "net_denoiser",
]
