"""The levels of noise that a call goes through: where its sampler's reference begins and ends unless the call says."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ldm.img2img import StrengthPlan, strength_plan
from ldm.samplers import Reference, Sampler, Schedule
from ldm.samplers.schedule import SIGMAS
from ldm.settings import Settings


def sigmas(s: Settings, schedule: Schedule, steps: int | None = None) -> Tensor:
    """The whole schedule of the call (n+1,) float64, or that of another number of steps."""
    if isinstance(s.sigmas, Tensor):
        if steps not in (None, len(s.sigmas) - 1):
            raise ValueError(
                f"strength_rule={s.how.strength_rule!r} with sigmas as a tensor: it needs another schedule, of {steps}"
                " steps; give the sigmas by name, or take another rule"
            )
        return s.sigmas.to("cpu", torch.float64)
    if own := carried(s, "sigmas"):
        if s.sigmas is not None:
            raise ValueError(
                f"sigmas={s.sigmas!r}: the sampler {s.sampler_name!r} has its own spacing, leave sigmas out and set it"
                " there (use_karras_sigmas, timestep_spacing)"
            )
        return own(steps or s.steps)
    at_t_0 = {
        "zero": False,
        "t = 0": True,
        "set_alpha_to_one": not schedule.set_alpha_to_one,
        "final_sigmas_type": schedule.final_sigmas_type == "sigma_min",
    }
    theirs = reference(s)
    end = schedule.sigma_min if at_t_0[theirs.end] else 0.0
    return schedule.sigmas(steps or s.steps, spacing(s, schedule), log=theirs.log, end=end)


def spacing(s: Settings, schedule: Schedule) -> str | None:
    """The name of the schedule's spacing, if it has one."""
    if isinstance(s.sigmas, Tensor) or carried(s, "sigmas"):
        return None
    theirs = reference(s)
    return s.sigmas or (None if theirs.firm else schedule.spacing) or theirs.spacing


def reading(s: Settings, schedule: Schedule) -> tuple[bool, bool]:
    """Whether the net's t is read off log sigma, as always where sigmas are spaced whatever t that is; and rounded."""
    theirs = reference(s)
    return theirs.log or spacing(s, schedule) in SIGMAS, theirs.whole


def first_std(s: Settings, schedule: Schedule, sigma: Tensor, alone: bool = True) -> Tensor:
    """The standard deviation () of the noise that a run begins with at the first sigma, `alone` or on a picture."""
    own, start = carried(s, "first_std"), reference(s).start
    if own and alone:
        return own(sigma)
    unit = {
        "unit": alone,
        "sigma": False,
        "highest": math.isclose(sigma, schedule.sigma_max, rel_tol=1e-5),
        "spacing": alone and spacing(s, schedule) in ("leading", "dpm_solver"),
    }
    return (1 + sigma**2) ** 0.5 if unit[start] else sigma


def plan(s: Settings, schedule: Schedule) -> StrengthPlan:
    """Which of the levels a picture to start from leaves."""
    steps = len(s.sigmas) - 1 if isinstance(s.sigmas, Tensor) else s.steps
    masked = s.mask is not None or s.extend is not None
    return strength_plan(s.strength, steps, lambda n: sigmas(s, schedule, n), s.how.strength_rule, masked)


def options(s: Settings, schedule: Schedule) -> dict[str, Any]:
    """The further arguments of the sampler: those of the call, and the schedule for one that looks at it."""
    looks = "schedule" in (s.accepted_options or ())
    return ({"schedule": schedule} if looks else {}) | s.options


def bare(s: Settings) -> Sampler:
    """The sampler's function; a functools.partial of a sampler counts as it."""
    return getattr(s.sampler_function, "func", s.sampler_function)


def reference(s: Settings) -> Reference:
    """How the call's sampler begins and ends, by the conventions."""
    return s.how.reference_of(bare(s))


def carried(s: Settings, name: str) -> Callable[..., Tensor] | None:
    """What a sampler that has levels of its own says about them: `sigmas(steps)`, `first_std(sigma)`."""
    own = getattr(bare(s), name, None)
    return own if callable(own) else None
