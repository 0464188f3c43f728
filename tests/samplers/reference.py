"""diffusers and k-diffusion, set as Stable Diffusion 1 sets them, and denoisers that are known on paper."""

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from types import ModuleType

import numpy as np
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler
from torch import Tensor

from ldm.samplers import Denoiser, Prediction

COUNTS = (1, 2, 3, 7, 20, 30, 50, 999, 1000)
EULER_SPACINGS = ("leading", "trailing", "linspace", "karras")  # those that diffusers_euler knows

# The table once more, by another library than ours.
ALPHAS_CUMPROD = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
TABLE = np.sqrt((1 - ALPHAS_CUMPROD) / ALPHAS_CUMPROD)  # sigma of t = 0..999
ALL, LOG_TABLE = np.arange(1000), np.log(TABLE)

SD1 = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}


def import_k_diffusion() -> tuple[ModuleType, ModuleType]:
    """Its `sampling` and `external` alone: its __init__ asks for a dozen packages that these two do not need."""
    package = ModuleType("k_diffusion")
    package.__path__ = find_spec("k_diffusion").submodule_search_locations
    sys.modules["k_diffusion"] = package
    absent = [] if find_spec("torchvision") else ["torchvision", "torchvision.transforms"]
    sys.modules |= {name: ModuleType(name) for name in absent}
    if absent:
        sys.modules["torchvision.transforms"].functional = None
    modules = tuple(importlib.import_module(f"k_diffusion.{name}") for name in ("sampling", "external"))
    for name in absent:  # so that nobody else takes the empty modules for the package
        del sys.modules[name]
    return modules


k_sampling, k_external = import_k_diffusion()


@contextmanager
def float64() -> Iterator[None]:
    """k-diffusion builds its ramps in the default dtype: in float32 they are off by 1e-6 themselves."""
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def k_model(net: "MixtureNet") -> k_external.DiscreteSchedule:
    """k-diffusion's wrapper of a net: its schedule, and model(x, sigma) -> x0."""
    wrappers = {"epsilon": k_external.DiscreteEpsDDPMDenoiser, "v_prediction": k_external.DiscreteVDDPMDenoiser}
    return wrappers[net.prediction_type](net, torch.from_numpy(ALPHAS_CUMPROD), quantize=False)


def diffusers_euler(
    spacing: str, steps: int, prediction_type: str = "epsilon", table64: bool = False
) -> EulerDiscreteScheduler:
    """As SD 1 configures it, set to `steps` timesteps. Three corners where it leaves the table are set right:

    leading at 1000 asks for t = 1000; linspace at 1 starts at t = 0; and so does karras, whose range is linspace's.
    table64: with alphas_cumprod in float64; diffusers' is float32, in which 1 - alphas_cumprod[0] keeps four digits.
    """
    config = SD1 | {"timestep_spacing": spacing, "prediction_type": prediction_type}
    if spacing == "leading" and steps == 1000:
        config |= {"steps_offset": 0}
    if spacing == "karras":
        config |= {"timestep_spacing": "linspace", "use_karras_sigmas": True}
        if steps == 1:
            config |= {"sigma_min": TABLE[0], "sigma_max": TABLE[-1]}
    scheduler = EulerDiscreteScheduler(**config)
    if table64:
        scheduler.alphas_cumprod = torch.from_numpy(ALPHAS_CUMPROD)
    if spacing == "linspace" and steps == 1:
        scheduler.set_timesteps(timesteps=[999])
    else:
        scheduler.set_timesteps(steps)
    return scheduler


def diffusers_ddim(spacing: str, steps: int, prediction_type: str = "epsilon", table64: bool = False) -> DDIMScheduler:
    """As SD 1 configures it, set to `steps` timesteps; two corners are set right:

    leading at 1000 asks for t = 1000; and where the last timestep is 0, the last step would lead from t = 0 to t = 0.
    """
    config = SD1 | {"timestep_spacing": spacing, "prediction_type": prediction_type}
    if spacing == "leading" and steps == 1000:
        config |= {"steps_offset": 0}
    ends_at_0 = steps == 1000 or (spacing == "trailing" and steps == 999)
    scheduler = DDIMScheduler(**config, clip_sample=False, set_alpha_to_one=ends_at_0)
    if table64:
        scheduler.alphas_cumprod = torch.from_numpy(ALPHAS_CUMPROD)
        if not ends_at_0:
            scheduler.final_alpha_cumprod = scheduler.alphas_cumprod[0]
    scheduler.set_timesteps(steps)
    return scheduler


def gaussian(mean: float, std: float) -> Denoiser:
    """For data from N(mean, std^2): x0 is E[x0 | x], and eps = sigma (x - mean) / (std^2 + sigma^2)."""

    def denoise(x: Tensor, sigma: Tensor) -> Prediction:
        variance = std**2 + sigma**2
        return Prediction((std**2 * x + sigma**2 * mean) / variance, sigma * (x - mean) / variance)

    return denoise


def mixture(x: Tensor, sigma: Tensor | float) -> Tensor:
    """E[x0 | x] for data from three Gaussians: nonlinear in x and in sigma."""
    mean, std = torch.tensor([-0.5, 1.2, 2.0], dtype=x.dtype), torch.tensor([0.5, 0.3, 0.8], dtype=x.dtype)
    weight = torch.tensor([0.3, 0.5, 0.2], dtype=x.dtype)
    x, variance = x[..., None], std**2 + sigma**2
    share = (weight.log() - variance.log() / 2 - (x - mean) ** 2 / (2 * variance)).softmax(-1)
    return (share * (std**2 * x + sigma**2 * mean) / variance).sum(-1)


class MixtureNet:
    """The mixture as a net: variance-preserving x (B,4,h,w) and t in, epsilon or v out. `ts` are the t it was given.

    log: between two timesteps a t means a sigma that is linear in log sigma, as to k-diffusion and diffusers' karras;
    else linear in sigma, as in diffusers' "linspace".
    """

    def __init__(self, prediction_type: str, log: bool = True):
        self.prediction_type = prediction_type
        self.log = log
        self.ts: list[float] = []

    def __call__(self, x: Tensor, t: Tensor, context: Tensor | None = None) -> Tensor:
        t = float(t.flatten()[0])
        self.ts.append(t)
        sigma = float(np.exp(np.interp(t, ALL, LOG_TABLE)) if self.log else np.interp(t, ALL, TABLE))
        scale = (1 + sigma**2) ** 0.5
        x0 = mixture(x * scale, sigma)
        eps = (x * scale - x0) / sigma
        return eps if self.prediction_type == "epsilon" else (eps - sigma * x0) / scale
