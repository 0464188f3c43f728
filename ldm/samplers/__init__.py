"""Samplers: generator functions that own their loop, `sampler(denoise, x, sigmas, noise, **options)`."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

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
    "dpmpp_2m_sde_heun": partial(dpmpp_2m_sde, solver_type="heun"),
    "dpmpp_3m_sde": dpmpp_3m_sde,
    "dpm_adaptive": dpm_adaptive,
    "unipc": unipc,
    "deis": deis,
    "lcm": lcm,
    "tcd": tcd,
    "restart": restart,
}

# The spellings of webui, of which those of its k-diffusion samplers may end in " Karras", and of diffusers.
# (DPMSolverSinglestepScheduler, with one evaluation a step, is none of ours: `ldm.samplers.adapters.from_diffusers`.)
WEBUI = {
    "DPM++ 2M": "dpmpp_2m",
    "DPM++ 2M SDE": "dpmpp_2m_sde",
    "DPM++ 2M SDE Heun": "dpmpp_2m_sde_heun",
    "DPM++ 2S a": "dpmpp_2s_ancestral",
    "DPM++ 3M SDE": "dpmpp_3m_sde",
    "DPM++ SDE": "dpmpp_sde",
    "DPM2": "dpm_2",
    "DPM2 a": "dpm_2_ancestral",
    "Euler": "euler",
    "Euler a": "euler_ancestral",
    "Heun": "heun",
    "LMS": "lms",
    "Restart": "restart",
}
ALIASES = WEBUI | {
    "DDIM": "ddim",
    "DPM adaptive": "dpm_adaptive",
    "LCM": "lcm",
    "PLMS": "plms",
    "UniPC": "unipc",
    "DDIMScheduler": "ddim",
    "DDPMScheduler": "ddpm",
    "DEISMultistepScheduler": "deis",
    "DPMSolverSDEScheduler": "dpmpp_sde",
    "EulerAncestralDiscreteScheduler": "euler_ancestral",
    "EulerDiscreteScheduler": "euler",
    "HeunDiscreteScheduler": "heun",
    "KDPM2AncestralDiscreteScheduler": "dpm_2_ancestral",
    "KDPM2DiscreteScheduler": "dpm_2",
    "LCMScheduler": "lcm",
    "LMSDiscreteScheduler": "lms",
    "PNDMScheduler": "plms",
    "TCDScheduler": "tcd",
    "UniPCMultistepScheduler": "unipc",
}

# Spellings that say how the sigmas are spaced as well, whatever a model's configuration asks for: (sampler, spacing).
SPACED = {f"{name} {spacing.capitalize()}": (name, spacing) for name in WEBUI for spacing in ("karras", "exponential")}
SPACED |= {"DPMSolverMultistepScheduler": ("dpmpp_2m", "dpm_solver")}


class Reference(NamedTuple):
    """How the reference pipeline of a sampler begins and ends, where a call does not say.

    spacing: unless the model's configuration asks for another, and even then if `firm`. start: the standard deviation
    of the noise that a run begins with, "unit" if its variance is 1 in the variance-preserving scale, sqrt(1 + sigma^2)
    in ours; "sigma"; "highest", unit only at the highest sigma of the schedule; "spacing", unit where that is "leading"
    or "dpm_solver". end: "zero"; "t = 0" for the sigma of that timestep; or the field of the configuration that chooses
    one of the two. log: between two timesteps sigma is interpolated, and t read off it, in log sigma (else that is so
    only where sigmas are spaced whatever t that is). whole: the net is told the timestep that is nearest.
    """

    spacing: str = "linspace"
    firm: bool = False
    start: str = "spacing"
    end: str = "final_sigmas_type"
    log: bool = False
    whole: bool = False


# Those of diffusers' schedulers; of the other samplers k-diffusion's, which is Reference().
REFERENCES: dict[Sampler, Reference] = {
    ddim: Reference("leading", start="unit", end="set_alpha_to_one"),
    ddpm: Reference("leading", start="unit", end="zero"),
    plms: Reference("leading", start="unit", end="set_alpha_to_one"),
    unipc: Reference("dpm_solver", start="unit"),
    deis: Reference("dpm_solver", start="unit", end="t = 0"),
    lcm: Reference("lcm", firm=True, start="unit", end="zero"),
    tcd: Reference("lcm", firm=True, start="unit", end="t = 0"),
}

# Their noise is taken along one Brownian path per picture, as in k-diffusion, whatever the steps are.
BROWNIAN: set[Sampler] = {dpmpp_sde, dpmpp_2m_sde, dpmpp_3m_sde}


def is_brownian(sampler: Sampler) -> bool:
    """Whether it is one of them, or another that says so by an attribute, `my_sampler.brownian = True`."""
    function = getattr(sampler, "func", sampler)  # of a functools.partial
    return any(function is other for other in BROWNIAN) or getattr(function, "brownian", False)


__all__ = [
    "ALIASES",
    "BROWNIAN",
    "PREDICTION_TYPES",
    "REFERENCES",
    "SAMPLERS",
    "SPACED",
    "SPACINGS",
    "Brownian",
    "Denoiser",
    "Noise",
    "Prediction",
    "Reference",
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
    "is_brownian",
    "lcm",
    "lms",
    "net_denoiser",
    "plms",
    "restart",
    "tcd",
    "unipc",
]
