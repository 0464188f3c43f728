"""Samplers: generator functions that own their loop, `sampler(denoise, x, sigmas, noise, **options)`."""

from collections.abc import Callable

from ldm.samplers.brownian import Brownian
from ldm.samplers.consistency import lcm, tcd
from ldm.samplers.ddim import ddim, ddpm
from ldm.samplers.deis import deis
from ldm.samplers.denoiser import PREDICTION_TYPES, Denoiser, Prediction, checkpointed, net_denoiser
from ldm.samplers.dpm_2 import dpm_2, dpm_2_ancestral
from ldm.samplers.dpm_adaptive import dpm_adaptive
from ldm.samplers.dpmpp import dpmpp_2m, dpmpp_2m_sde, dpmpp_2s_ancestral, dpmpp_3m_sde, dpmpp_sde
from ldm.samplers.euler import euler, euler_ancestral, euler_cfg_pp
from ldm.samplers.heun import heun
from ldm.samplers.lms import lms
from ldm.samplers.plms import plms
from ldm.samplers.restart import restart
from ldm.samplers.schedule import SPACINGS, Schedule
from ldm.samplers.step import Noise, Step, Steps, after, intervals
from ldm.samplers.unipc import unipc

Sampler = Callable[..., Steps]

SAMPLERS: dict[str, Sampler] = {
    "ddim": ddim,
    "ddpm": ddpm,
    "euler": euler,
    "euler_ancestral": euler_ancestral,
    "euler_cfg_pp": euler_cfg_pp,
    "heun": heun,
    "dpm_2": dpm_2,
    "dpm_2_ancestral": dpm_2_ancestral,
    "lms": lms,
    "plms": plms,
    "dpmpp_2s_ancestral": dpmpp_2s_ancestral,
    "dpmpp_sde": dpmpp_sde,
    "dpmpp_2m": dpmpp_2m,
    "dpmpp_2m_sde": dpmpp_2m_sde,
    "dpmpp_3m_sde": dpmpp_3m_sde,
    "dpm_adaptive": dpm_adaptive,
    "unipc": unipc,
    "deis": deis,
    "lcm": lcm,
    "tcd": tcd,
    "restart": restart,
}

# The spellings of webui and of diffusers.
ALIASES = {
    "DDIM": "ddim",
    "DDIMScheduler": "ddim",
    "DDPMScheduler": "ddpm",
    "DPM adaptive": "dpm_adaptive",
    "DPM++ 2M": "dpmpp_2m",
    "DPM++ 2M SDE": "dpmpp_2m_sde",
    "DPM++ 2S a": "dpmpp_2s_ancestral",
    "DPM++ 3M SDE": "dpmpp_3m_sde",
    "DPM++ SDE": "dpmpp_sde",
    "DPMSolverSDEScheduler": "dpmpp_sde",
    "Euler": "euler",
    "EulerDiscreteScheduler": "euler",
    "Euler a": "euler_ancestral",
    "EulerAncestralDiscreteScheduler": "euler_ancestral",
    "Heun": "heun",
    "HeunDiscreteScheduler": "heun",
    "DPM2": "dpm_2",
    "KDPM2DiscreteScheduler": "dpm_2",
    "DPM2 a": "dpm_2_ancestral",
    "KDPM2AncestralDiscreteScheduler": "dpm_2_ancestral",
    "LMS": "lms",
    "LMSDiscreteScheduler": "lms",
    "Restart": "restart",
    "DEISMultistepScheduler": "deis",
    "LCM": "lcm",
    "LCMScheduler": "lcm",
    "PLMS": "plms",
    "TCDScheduler": "tcd",
    "UniPC": "unipc",
    "UniPCMultistepScheduler": "unipc",
}

# Defined on the variance-preserving process: their references space "leading", start from noise of unit variance in
# that process's scale and end at the sigma of t = 0. The others space "linspace", start from sigma * noise, end at 0.
VARIANCE_PRESERVING: set[Sampler] = {ddim, ddpm, plms}

# Their noise is taken along one Brownian path per picture, as in k-diffusion, whatever the steps are.
BROWNIAN: set[Sampler] = {dpmpp_sde, dpmpp_2m_sde, dpmpp_3m_sde}

__all__ = [
    "ALIASES",
    "BROWNIAN",
    "PREDICTION_TYPES",
    "SAMPLERS",
    "SPACINGS",
    "VARIANCE_PRESERVING",
    "Brownian",
    "Denoiser",
    "Noise",
    "Prediction",
    "Sampler",
    "Schedule",
    "Step",
    "Steps",
    "after",
    "checkpointed",
    "ddim",
    "ddpm",
    "deis",
    "dpm_2",
    "dpm_2_ancestral",
    "dpm_adaptive",
    "dpmpp_2m",
    "dpmpp_2m_sde",
    "dpmpp_2s_ancestral",
    "dpmpp_3m_sde",
    "dpmpp_sde",
    "euler",
    "euler_ancestral",
    "euler_cfg_pp",
    "heun",
    "intervals",
    "lcm",
    "lms",
    "net_denoiser",
    "plms",
    "restart",
    "tcd",
    "unipc",
]
