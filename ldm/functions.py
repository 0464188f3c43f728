"""The samplers, guidances and levels of noise that a call is given: checked before any work is done."""

import inspect
import math
from collections.abc import Callable, Mapping
from numbers import Integral, Real
from types import NoneType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ldm.guidance import GIVEN, GUIDANCES, accepted, asked
from ldm.samplers import SAMPLERS, SPACINGS
from ldm.samplers.step import checked

if TYPE_CHECKING:
    from ldm.settings import Settings


def check_sampler(s: "Settings") -> None:
    """Raises ValueError for what is no sampler, with what it has to go through to be one."""
    if hasattr(s.sampler, "set_timesteps"):
        raise ValueError(
            f"sampler is a scheduler of diffusers ({type(s.sampler).__name__}): give"
            " from_diffusers(scheduler), of ldm.samplers.adapters"
        )
    try:
        names = list(inspect.signature(s.sampler).parameters) if callable(s.sampler) else []
    except ValueError as error:  # of some builtins
        raise ValueError(f"sampler {s.sampler_name!r}: {error}; give a generator function") from error
    if names[:2] == ["model", "x"]:
        raise ValueError(
            f"sampler {s.sampler_name!r} is a function (model, x, sigmas, ...) of k-diffusion: give"
            " from_k_diffusion(function), of ldm.samplers.adapters"
        )
    if not callable(s.sampler) and s.sampler_name not in SAMPLERS:
        raise ValueError(f"unknown sampler {s.sampler!r}: use {', '.join(SAMPLERS)}, or pass a function")


def check_sigmas(s: "Settings") -> None:
    """Raises ValueError for an unknown spacing, and for levels that do not fall."""
    if isinstance(s.sigmas, str) and s.sigmas not in SPACINGS:
        raise ValueError(f"unknown spacing sigmas={s.sigmas!r}: use {', '.join(SPACINGS)}, or pass a tensor")
    if not isinstance(s.sigmas, (str, Tensor, NoneType)):
        raise ValueError(f"sigmas is a {type(s.sigmas).__name__}: give a spacing by name, or a tensor (n+1,)")
    if isinstance(s.sigmas, Tensor):
        given = s.sigmas
        if given.is_complex() or given.dtype == torch.bool or given.shape == (1,):
            raise ValueError(
                f"sigmas {tuple(given.shape)} of {given.dtype}: give numbers (steps + 1,) that fall, 2 or more"
            )
        checked(given, falling=True)


def check_options(s: "Settings") -> None:
    """Raises ValueError for options that the sampler lacks or cannot have."""
    for kind in ("sampler", "guidance"):
        given = getattr(s, f"{kind}_options")
        if not isinstance(given, (Mapping, NoneType)):
            raise ValueError(f"{kind}_options={given!r}: give a dictionary of the {kind}'s arguments")
    if s.eta is not None and "eta" in (s.sampler_options or {}):
        raise ValueError("eta and sampler_options['eta'] say the same: give one of them")
    whose = f"the sampler {s.sampler_name!r}"
    check_known(s.options, s.accepted_options, whose)
    check_values(s.options, s.sampler_function, whose)
    try:
        inspect.signature(s.sampler_function).bind(None, None, None, None, **s.options)
    except TypeError as error:
        raise ValueError(
            f"{whose} with the options {s.options}: {error}; it is called with denoise, x, sigmas, noise, and"
            " the options by their names"
        ) from error
    if not 0 <= s.options.get("eta", 0) <= 1:
        raise ValueError(f"eta={s.options['eta']}: give a number from 0 (DDIM) to 1 (DDPM)")
    cfg_pp = [s.sampler_name == "euler_cfg_pp", s.guidance_name == "cfg_pp"]
    if all(cfg_pp):
        raise ValueError("guidance 'cfg_pp' with the sampler 'euler_cfg_pp': they do the same, give one of them")
    if any(cfg_pp) and not 0 <= s.guidance_scale <= 1:
        raise ValueError(f"guidance_scale={s.guidance_scale}: that of CFG++ goes from 0 to 1, 0.6 is usual")


def check_guidance(s: "Settings") -> None:
    """Raises ValueError for a guidance that cannot be called, options that it lacks, and no interval."""
    if not callable(s.guidance) and s.guidance_name not in GUIDANCES:
        raise ValueError(
            f"unknown guidance {s.guidance!r}: use {', '.join(GUIDANCES)}, or pass a function of (eps_cond,"
            " eps_uncond, sigma)"
        )
    function, options = s.guidance_function, dict(s.guidance_options or {})
    check_known(options, accepted(function), f"the guidance {s.guidance_name!r}")
    check_values(options, function, f"the guidance {s.guidance_name!r}")
    try:
        inspect.signature(function).bind(None, None, None, **dict.fromkeys(asked(function)), **options)
    except TypeError as error:
        raise ValueError(
            f"guidance {s.guidance_name!r} with guidance_options={options}: {error}; it is called with eps_cond,"
            f" eps_uncond and sigma, by name with what it asks for of {', '.join(GIVEN)}, and with the options"
        ) from error
    if s.guidance_interval is not None:
        pair = s.guidance_interval
        two = isinstance(pair, (list, tuple)) and len(pair) == 2
        numbers = two and all(isinstance(n, Real) and not isinstance(n, bool) for n in pair)
        if not numbers or not 0 <= pair[0] < pair[1]:
            raise ValueError(f"guidance_interval={pair!r}: give two sigmas (low, high) with 0 <= low < high")


def check_known(given: Mapping[str, Any], known: list[str] | None, whose: str) -> None:
    """Raises ValueError for an option that is not among those that are known; None: any is."""
    for name, value in given.items():
        if known is not None and name not in known:
            has = f"it has {', '.join(known)}" if known else "it has no options"
            raise ValueError(f"{name}={value}: {whose} has no {name}; {has}")


def check_values(given: Mapping[str, Any], function: Callable, whose: str) -> None:
    """Raises ValueError for the value of an option that is of another kind than its default: numbers, whole or not."""
    parameters = inspect.signature(function).parameters
    for name, value in given.items():
        default = parameters[name].default if name in parameters else None
        if isinstance(default, float) and not (isinstance(value, Real) and not math.isnan(value)):
            raise ValueError(f"{name}={value!r}: {whose} takes a number, {default} unless given")
        if type(default) is int and (not isinstance(value, Integral) or isinstance(value, bool)):
            raise ValueError(f"{name}={value!r}: {whose} takes a whole number, {default} unless given")
