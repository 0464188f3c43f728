"""The table and its spacings against diffusers and k-diffusion; every place where they differ on purpose is a test."""

import json
import re
from inspect import signature

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler
from samplers.reference import (
    COUNTS,
    EULER_SPACINGS,
    SD1,
    TABLE,
    MixtureNet,
    diffusers_ddim,
    diffusers_euler,
    float64,
    k_model,
    k_sampling,
)
from torch import Tensor

from ldm.samplers import SPACINGS, Prediction, Schedule, ddim, euler
from ldm.samplers.schedule import TIMESTEPS

TOLERANCE = 1e-6  # relative: references keep timesteps and sigmas in float32
EVERY = range(1, 1001)
T = torch.arange(1000, dtype=torch.float64)

schedule = Schedule()


def difference(ours: Tensor, theirs: Tensor) -> float:
    """The largest relative difference; of two zeros it is 0."""
    assert ours.shape == theirs.shape
    return float(((ours - theirs).abs() / theirs.abs().clamp(min=1e-12)).max())


def reference_timesteps(scheduler: EulerDiscreteScheduler | DDIMScheduler) -> Tensor:
    return scheduler.timesteps.double()


# The table


def test_table():
    a = schedule.alphas_cumprod
    assert a.dtype == torch.float64 and a.shape == (1000,)
    assert a[0].item() == pytest.approx(1 - 0.00085, rel=1e-12)
    assert a[999].item() == pytest.approx(0.0046600985, rel=1e-8)
    assert schedule.sigma_min == pytest.approx(0.02916716, rel=1e-7)
    assert schedule.sigma_max == pytest.approx(14.61464123, rel=1e-9)
    assert difference(schedule.sigma(T), torch.from_numpy(TABLE)) < 1e-12


def test_difference_float32_table():
    """diffusers' own table is float32: alphas_cumprod agrees to 1e-6, but the sigma of t = 0 is off by 1.3e-5."""
    theirs = EulerDiscreteScheduler(**SD1)
    assert difference(theirs.alphas_cumprod.double(), schedule.alphas_cumprod) < 1e-6
    sigmas = theirs.sigmas[:-1].flip(0).double()
    assert 1e-5 < difference(sigmas, schedule.sigma(T)) < 2e-5
    assert difference(sigmas[99:], schedule.sigma(T[99:])) < 1e-5


def test_t_of_sigma():
    fine = torch.arange(0, 999.001, 0.01, dtype=torch.float64)
    for log in (False, True):
        t = schedule.t(schedule.sigma(fine, log), log)
        assert (t - fine).abs().max() < 1e-9
        assert (t.diff() > 0).all() and (schedule.sigma(fine, log).diff() > 0).all()
        assert (schedule.t(schedule.sigma(T, not log), log) - T).abs().max() < 1e-9
        assert schedule.t(0.0, log) == schedule.t(schedule.sigma_min / 2, log) == 0
        assert schedule.t(20.0, log) == schedule.t(float("inf"), log) == 999


# The spacings against the references


@pytest.mark.parametrize("steps", COUNTS)
@pytest.mark.parametrize("spacing", EULER_SPACINGS)
def test_diffusers_euler(spacing, steps):
    theirs = diffusers_euler(spacing, steps, table64=True)
    sigmas = schedule.sigmas(steps, spacing)
    assert difference(sigmas, theirs.sigmas.double()) <= TOLERANCE
    ours = schedule.t(sigmas[:-1], log=True) if spacing == "karras" else TIMESTEPS[spacing](steps)
    if spacing == "leading":
        ours = TIMESTEPS[spacing](steps, 1)
    assert difference(ours, reference_timesteps(theirs)) <= TOLERANCE


@pytest.mark.parametrize("steps", COUNTS)
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_diffusers_ddim(spacing, steps):
    theirs = diffusers_ddim(spacing, steps)
    assert torch.equal(TIMESTEPS[spacing](steps), reference_timesteps(theirs))
    sigmas = schedule.sigmas(steps, spacing, end=schedule.sigma_min)
    last = theirs.final_alpha_cumprod.double()
    assert sigmas[-1].item() == pytest.approx(float(((1 - last) / last).sqrt()), rel=2e-5)  # a float32 table's


@pytest.mark.parametrize("steps", COUNTS)
def test_k_diffusion(steps):
    with float64():
        theirs = k_model(MixtureNet("epsilon")).get_sigmas(steps)
        karras = k_sampling.get_sigmas_karras(steps, TABLE[0], TABLE[-1])
    assert difference(schedule.sigmas(steps, "linspace", log=True), theirs) <= TOLERANCE
    assert difference(schedule.sigmas(steps, "karras"), karras) <= TOLERANCE


@pytest.mark.parametrize("rho", [1.0, 3.0])
def test_k_diffusion_rho(rho):
    with float64():
        theirs = k_sampling.get_sigmas_karras(20, TABLE[0], TABLE[-1], rho)
    assert difference(schedule.sigmas(20, "karras", rho=rho), theirs) <= TOLERANCE


def test_every_count_is_exact():
    """In whole numbers: trailing rounds 1000 (n - k) / n, and halves to the even side."""
    for steps in EVERY:
        left = np.arange(steps, 0, -1)
        whole, rest = np.divmod(1000 * left, steps)
        up = (2 * rest > steps) | ((2 * rest == steps) & (whole % 2 == 1))
        assert np.array_equal(TIMESTEPS["trailing"](steps), whole + up - 1)
        assert np.array_equal(TIMESTEPS["leading"](steps), (left - 1) * (1000 // steps) + (steps < 1000))
        linspace = torch.from_numpy(999 * (left - 1) / (steps - 1)) if steps > 1 else torch.tensor([999.0])
        assert difference(TIMESTEPS["linspace"](steps), linspace) < 1e-12


# Where they differ on purpose


def test_difference_one_step():
    """diffusers' Euler starts its only step at t = 0, with no noise to speak of; k-diffusion and we start at 999."""
    for config in ({}, {"use_karras_sigmas": True}):
        theirs = EulerDiscreteScheduler(**SD1, **config)
        theirs.set_timesteps(1)
        assert theirs.sigmas[0].item() == pytest.approx(schedule.sigma_min, rel=2e-5)
    for spacing in ("linspace", "karras"):
        assert schedule.sigmas(1, spacing).tolist() == [pytest.approx(schedule.sigma_max), 0]


def test_difference_leading_1000():
    """diffusers adds the offset even where it leads out of the table."""
    theirs = DDIMScheduler(**SD1)
    theirs.set_timesteps(1000)
    assert theirs.timesteps[0] == 1000
    with pytest.raises(IndexError):
        theirs.step(torch.zeros(1), theirs.timesteps[0], torch.zeros(1))
    assert schedule.sigmas(1000, "leading")[0] == schedule.sigma_max


@pytest.mark.parametrize(("steps", "offset"), [(999, 1), (999, 2), (500, 2), (50, 30), (1, 999)])
def test_leading_stays_in_the_table(steps, offset):
    sigmas = Schedule(steps_offset=offset).sigmas(steps, "leading")
    assert sigmas[0] <= schedule.sigma_max and (sigmas.diff() < 0).all()


def test_difference_trailing_slips():
    """np.arange(1000, 0, -1000 / n) slips: a 62nd timestep, -1, for 61 steps; 936 where 936.5 rounds to 938 - 1."""
    theirs = EulerDiscreteScheduler(**SD1, timestep_spacing="trailing")
    theirs.set_timesteps(61)
    assert len(theirs.timesteps) == 62 and theirs.timesteps[-1] == -1
    slipped = []
    for steps in EVERY:
        theirs.set_timesteps(steps)
        if theirs.timesteps.tolist() != TIMESTEPS["trailing"](steps).tolist():
            slipped.append(steps)
    assert len(slipped) == 111 and not set(slipped) & set(COUNTS)


def test_difference_ddim_trailing_aims_beside_its_next_timestep():
    """diffusers' DDIM steps to t - 1000 // n, which is not its next timestep unless n divides 1000: we step to that."""

    def gaps(spacing: str, steps: int) -> set[int]:
        return set((-diffusers_ddim(spacing, steps).timesteps.diff()).tolist())

    assert [n for n in COUNTS if gaps("trailing", n) - {1000 // n}] == [3, 7, 30, 999]
    assert [n for n in COUNTS if gaps("leading", n) - {1000 // n}] == []


def test_difference_ddim_linspace_rounds():
    """diffusers' DDIM cannot run between two timesteps."""
    for steps in COUNTS[1:]:
        theirs = DDIMScheduler(**SD1, timestep_spacing="linspace")
        theirs.set_timesteps(steps)
        assert torch.equal(TIMESTEPS["linspace"](steps).round(), reference_timesteps(theirs))


def test_difference_linspace_t():
    """diffusers' linspace is linear in sigma, k-diffusion's in log sigma: to read t the other way moves it by 0.026.

    (Which was enough to move whole pictures' latents by 1e-3.)
    """
    spaced = {n: (schedule.sigmas(n)[:-1], TIMESTEPS["linspace"](n)) for n in EVERY}
    assert max(float((schedule.t(sigmas) - t).abs().max()) for sigmas, t in spaced.values()) < 1e-9
    assert 0.025 < max(float((schedule.t(sigmas, log=True) - t).abs().max()) for sigmas, t in spaced.values()) < 0.026


def test_difference_karras_range():
    """diffusers spans Karras' range over the timesteps of its spacing: "leading" cuts both ends off; ours is whole."""
    theirs = EulerDiscreteScheduler(**SD1, timestep_spacing="leading", use_karras_sigmas=True)
    theirs.set_timesteps(20)
    ends = schedule.sigmas(20, "leading")[[0, -2]]
    assert theirs.sigmas[[0, -2]].tolist() == pytest.approx(ends.tolist(), rel=2e-5)
    assert schedule.sigmas(20, "karras")[[0, -2]].tolist() == pytest.approx([TABLE[-1], TABLE[0]])


def test_difference_ddim_ends_twice_at_0():
    """Where the last timestep is 0, diffusers with set_alpha_to_one=False makes a last step from t = 0 to t = 0."""
    theirs = DDIMScheduler(**SD1 | {"steps_offset": 0}, clip_sample=False, set_alpha_to_one=False)
    theirs.set_timesteps(20)
    assert theirs.timesteps[-1] == 0 and theirs.final_alpha_cumprod == theirs.alphas_cumprod[0]
    sigmas = Schedule(steps_offset=0).sigmas(20, "leading", end=schedule.sigma_min)
    assert sigmas[-2:].tolist() == [schedule.sigma_min, 0]


# For every number of steps


@pytest.mark.parametrize("end", [0.0, schedule.sigma_min])
@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_every_count_decreases(spacing, log, end):
    for steps in EVERY:
        sigmas = schedule.sigmas(steps, spacing, log=log, end=end)
        assert sigmas.dtype == torch.float64 and sigmas.shape == (steps + 1,)
        assert (sigmas[1:] < sigmas[:-1]).all(), steps
        assert sigmas[0] <= schedule.sigma_max * (1 + 1e-12) and sigmas[-1] in (0, end)


SOME = (*range(1, 33), 50, 97, 250, 333, 998, 999, 1000)


@pytest.mark.parametrize("counts", [SOME, pytest.param(EVERY, marks=pytest.mark.full)], ids=["some", "every"])
@pytest.mark.parametrize(("sampler", "end"), [(ddim, schedule.sigma_min), (euler, 0.0)])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_a_count_evaluates_exactly_that_often(spacing, sampler, end, counts):
    """Every number of steps: pytest -m full tests/samplers/test_schedule.py, some ten minutes."""
    number = torch.ones(())
    prediction = Prediction(x0=number / 2, eps=number)
    for steps in counts:
        sigmas = schedule.sigmas(steps, spacing, end=end)
        asked = []
        yielded = sum(1 for _ in sampler(lambda x, sigma: asked.append(sigma) or prediction, number, sigmas, None))  # noqa: B023
        assert torch.equal(torch.stack(asked), sigmas[:-1]) and yielded == len(asked) == steps


# Configuration and errors


def test_default_spacing():
    assert torch.equal(schedule.sigmas(20), schedule.sigmas(20, "linspace"))
    assert torch.equal(Schedule(spacing="trailing").sigmas(20), schedule.sigmas(20, "trailing"))
    assert torch.equal(Schedule(spacing="trailing").sigmas(20, "karras"), schedule.sigmas(20, "karras"))


def test_from_config():
    config = SD1 | {"timestep_spacing": "trailing", "set_alpha_to_one": True, "steps_offset": 0, "skip_prk_steps": True}
    made = Schedule.from_config(config)
    assert (made.spacing, made.set_alpha_to_one, made.steps_offset) == ("trailing", True, 0)
    assert torch.equal(made.alphas_cumprod, schedule.alphas_cumprod)
    assert Schedule.from_config(SD1 | {"use_karras_sigmas": True}).spacing == "karras"
    bare = Schedule.from_config({name: value for name, value in SD1.items() if name != "steps_offset"})
    assert (bare.spacing, bare.set_alpha_to_one, bare.steps_offset) == (None, False, 1)
    bent = Schedule.from_config(SD1 | {"beta_end": 0.02})
    theirs = np.cumprod(1 - np.linspace(0.00085**0.5, 0.02**0.5, 1000) ** 2)
    assert difference(bent.alphas_cumprod, torch.from_numpy(theirs)) < 1e-12


@pytest.mark.parametrize(
    ("field", "value", "accepted"),
    [
        ("beta_schedule", "linear", "'scaled_linear'"),
        ("beta_start", "0.00085", "a number between 0 and 1"),
        ("beta_start", 0.0, "a number between 0 and 1"),
        ("beta_end", None, "a number between 0 and 1"),
        ("num_train_timesteps", 500, "1000"),
        ("steps_offset", 1.5, "a whole number from 0 to 999"),
        ("steps_offset", True, "a whole number from 0 to 999"),
        ("steps_offset", -1, "a whole number from 0 to 999"),
        ("set_alpha_to_one", None, "True or False"),
        ("timestep_spacing", "sideways", "'leading' or 'trailing' or 'linspace' or None"),
        ("timestep_type", "continuous", "'discrete'"),
        ("trained_betas", [0.1, 0.2], "null or false"),
        ("rescale_betas_zero_snr", "yes", "True or False"),
        ("clip_sample", True, "null or false"),
        ("thresholding", True, "null or false"),
        ("use_karras_sigmas", "no", "True or False or None"),
        ("use_exponential_sigmas", "no", "True or False or None"),
        ("use_beta_sigmas", True, "null or false"),
        ("use_lu_lambdas", True, "null or false"),
        ("use_flow_sigmas", True, "null or false"),
        ("invert_sigmas", True, "null or false"),
        ("interpolation_type", "log_linear", "'linear'"),
        ("sigma_min", 0.0, "None"),
        ("sigma_max", 80.0, "None"),
        ("final_sigmas_type", "sigma_max", "'zero' or 'sigma_min'"),
        ("variance_type", "learned_range", "'fixed_small' or 'fixed_small_log' or .* or None"),
        ("a_field_of_next_year", "on", "null or false"),
    ],
)
def test_from_config_refuses_other_schedules(field, value, accepted):
    message = f"^{field} is {re.escape(repr(value))}, but this version only does {accepted}$"
    with pytest.raises(ValueError, match=message):
        Schedule.from_config(SD1 | {field: value})


def test_from_config_exponential():
    """diffusers spans its range over the spaced timesteps, which are all of them for linspace."""
    made = Schedule.from_config(SD1 | {"use_exponential_sigmas": True, "timestep_spacing": "linspace"})
    for cls in (diffusers.EulerDiscreteScheduler, diffusers.DPMSolverMultistepScheduler):
        theirs = cls(**SD1, use_exponential_sigmas=True)
        theirs.set_timesteps(20)
        assert difference(made.sigmas(20)[:-1], theirs.sigmas[:-1].double()) < 2e-5  # a float32 table's sigma_min
    with pytest.raises(ValueError, match=r"^use_karras_sigmas and use_exponential_sigmas both"):
        Schedule.from_config(SD1 | {"use_exponential_sigmas": True, "use_karras_sigmas": True})


def test_from_config_final_sigma():
    made = Schedule.from_config(SD1 | {"final_sigmas_type": "sigma_min", "timestep_spacing": "trailing"})
    assert made.final_sigmas_type == "sigma_min" and schedule.final_sigmas_type == "zero"
    for cls in (
        diffusers.EulerDiscreteScheduler,
        diffusers.DPMSolverMultistepScheduler,
        diffusers.UniPCMultistepScheduler,
    ):
        theirs = cls(**SD1, final_sigmas_type="sigma_min", timestep_spacing="trailing")
        theirs.set_timesteps(20)
        assert difference(made.sigmas(20, end=made.sigma_min), theirs.sigmas.double()) < 2e-5


def test_difference_final_sigma_of_linspace():
    """diffusers' Euler takes a last step from sigma_min to sigma_min, ours leads to 0."""
    theirs = EulerDiscreteScheduler(**SD1, final_sigmas_type="sigma_min")
    theirs.set_timesteps(20)
    assert theirs.sigmas[-1] == theirs.sigmas[-2]
    assert schedule.sigmas(20, "linspace", end=schedule.sigma_min)[-2:].tolist() == [schedule.sigma_min, 0]


@pytest.mark.parametrize("missing", ["beta_schedule", "beta_start", "beta_end"])
def test_from_config_needs_the_betas(missing):
    """diffusers would take other ones: its defaults are not Stable Diffusion's."""
    with pytest.raises(ValueError, match=f"^{missing} missing: "):
        Schedule.from_config({name: value for name, value in SD1.items() if name != missing})


@pytest.mark.parametrize(
    "scheduler",
    [
        *(diffusers.DDIMScheduler, diffusers.DDPMScheduler, diffusers.PNDMScheduler, diffusers.LCMScheduler),
        *(diffusers.EulerDiscreteScheduler, diffusers.EulerAncestralDiscreteScheduler, diffusers.LMSDiscreteScheduler),
        *(diffusers.HeunDiscreteScheduler, diffusers.KDPM2DiscreteScheduler, diffusers.TCDScheduler),
        *(diffusers.DPMSolverMultistepScheduler, diffusers.DPMSolverSinglestepScheduler),
        *(diffusers.UniPCMultistepScheduler, diffusers.DEISMultistepScheduler),
    ],
)
def test_from_config_takes_what_diffusers_writes(scheduler, tmp_path):
    """Whatever scheduler a folder was saved with: what its class adds at its defaults does not matter to ours."""
    known = signature(scheduler.__init__).parameters
    wanted = SD1 | {"clip_sample": False}
    scheduler(**{name: value for name, value in wanted.items() if name in known}).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "scheduler_config.json").read_text())
    made = Schedule.from_config(config)
    assert made.spacing == config.get("timestep_spacing") and made.steps_offset == 1
    assert torch.equal(made.alphas_cumprod, schedule.alphas_cumprod)


@pytest.mark.parametrize(
    ("steps", "spacing"),
    [(-1, "linspace"), (0, "linspace"), (0, "karras")]
    + [(1001, spacing) for spacing in ("leading", "trailing", "simple", "beta")],
)
def test_steps_out_of_range(steps, spacing):
    with pytest.raises(ValueError, match=f"steps={steps}.*from 1 to 1000"):
        schedule.sigmas(steps, spacing)


@pytest.mark.parametrize("spacing", ["linspace", "karras"])
def test_more_steps_than_timesteps(spacing):
    """Between whole timesteps there is room for them."""
    sigmas = schedule.sigmas(20_000, spacing)
    assert len(sigmas) == 20_001 and (sigmas[1:] < sigmas[:-1]).all()
    assert (sigmas[0], sigmas[-2]) == pytest.approx((schedule.sigma_max, schedule.sigma_min))


def test_unknown_spacing():
    with pytest.raises(ValueError, match=r"'sideways'.*leading, trailing, linspace, .*karras"):
        schedule.sigmas(20, "sideways")


@pytest.mark.parametrize("end", [-1.0, 1.0, 20.0])
def test_end_out_of_range(end):
    with pytest.raises(ValueError, match=f"end={end}: give a sigma of 0 or more, below"):
        schedule.sigmas(20, "leading", end=end)
