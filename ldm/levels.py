"""The levels of noise that a call goes through: where its sampler's reference begins and ends unless the call says."""

import torch
from torch import Tensor

from ldm.img2img import StrengthPlan, strength_plan
from ldm.samplers import VARIANCE_PRESERVING, Sampler, Schedule
from ldm.samplers.schedule import SIGMAS
from ldm.settings import Settings


def sigmas(s: Settings, schedule: Schedule, steps: int | None = None) -> Tensor:
    """The whole schedule of the call (n+1,) float64, or that of another number of steps."""
    if isinstance(s.sigmas, Tensor):
        if steps not in (None, len(s.sigmas) - 1):
            raise ValueError(
                f"strength_rule={s.strength_rule!r} with sigmas as a tensor: it needs another schedule, of {steps}"
                " steps; give the sigmas by name, or take another rule"
            )
        return s.sigmas.to("cpu", torch.float64)
    end = schedule.sigma_min if is_of(s, VARIANCE_PRESERVING) and not schedule.set_alpha_to_one else 0.0
    return schedule.sigmas(steps or s.steps, spacing(s, schedule), end=end)


def spacing(s: Settings, schedule: Schedule) -> str | None:
    """The name of the schedule's spacing, if it has one."""
    if isinstance(s.sigmas, Tensor):
        return None
    return s.sigmas or schedule.spacing or ("leading" if is_of(s, VARIANCE_PRESERVING) else "linspace")


def in_log(s: Settings, schedule: Schedule) -> bool:
    """Whether the net's t is read off log sigma: where the sigmas are spaced whatever t that is."""
    return spacing(s, schedule) in SIGMAS


def first_std(s: Settings, schedule: Schedule, sigma: Tensor) -> Tensor:
    """The standard deviation () of the noise that a run begins with at the first sigma."""
    of_unit_variance = is_of(s, VARIANCE_PRESERVING) or spacing(s, schedule) == "leading"  # in that process's scale
    return (1 + sigma**2) ** 0.5 if of_unit_variance else sigma


def plan(s: Settings, schedule: Schedule) -> StrengthPlan:
    """Which of the levels a picture to start from leaves."""
    steps = len(s.sigmas) - 1 if isinstance(s.sigmas, Tensor) else s.steps
    masked = s.mask is not None or s.extend is not None
    return strength_plan(s.strength, steps, lambda n: sigmas(s, schedule, n), s.strength_rule, masked)


def is_of(s: Settings, kind: set[Sampler]) -> bool:
    """Whether the sampler is one of them; a functools.partial of a sampler counts as it."""
    return getattr(s.sampler_function, "func", s.sampler_function) in kind
