"""Schedulers of diffusers, unchanged, as our samplers: whole runs beside diffusers' own pipelines."""

import copy
import inspect
from functools import cache

import diffusers
import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline
from family import SD1, SD2_V, assert_close, contiguous, ours, photo, reference, saved, theirs

from ldm.samplers import Prediction, Schedule, euler
from ldm.samplers.adapters import from_diffusers

CASES = {
    "DDIM": ("DDIMScheduler", {"clip_sample": False}),
    "DDIM trailing": ("DDIMScheduler", {"clip_sample": False, "timestep_spacing": "trailing"}),
    "DDPM": ("DDPMScheduler", {"clip_sample": False}),
    "PNDM": ("PNDMScheduler", {"skip_prk_steps": True}),
    "LMS": ("LMSDiscreteScheduler", {}),
    "LMS Karras": ("LMSDiscreteScheduler", {"use_karras_sigmas": True}),
    "Euler": ("EulerDiscreteScheduler", {}),
    "Euler leading": ("EulerDiscreteScheduler", {"timestep_spacing": "leading"}),
    "Euler beta": ("EulerDiscreteScheduler", {"use_beta_sigmas": True}),
    "Euler a": ("EulerAncestralDiscreteScheduler", {}),
    "Heun": ("HeunDiscreteScheduler", {}),
    "KDPM2": ("KDPM2DiscreteScheduler", {}),
    "KDPM2 a": ("KDPM2AncestralDiscreteScheduler", {}),
    "DPM++ 2M": ("DPMSolverMultistepScheduler", {}),
    "DPM++ 2M Karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "DPM++ 3M lu": ("DPMSolverMultistepScheduler", {"use_lu_lambdas": True, "solver_order": 3}),
    "DPM": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}),
    "DPM++ 2M SDE": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "DPM SDE": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver", "final_sigmas_type": "sigma_min"}),
    "DPM++ singlestep": ("DPMSolverSinglestepScheduler", {}),
    "DPM++ SDE": ("DPMSolverSDEScheduler", {}),
    "UniPC": ("UniPCMultistepScheduler", {}),
    "UniPC Karras": ("UniPCMultistepScheduler", {"use_karras_sigmas": True}),
    "DEIS": ("DEISMultistepScheduler", {}),
    "DEIS Karras": ("DEISMultistepScheduler", {"use_karras_sigmas": True}),
    "LCM": ("LCMScheduler", {}),
    "TCD": ("TCDScheduler", {}),
    "SA": ("SASolverScheduler", {}),
}
cases = pytest.mark.parametrize("case", CASES)
SMALL = {"prompt": "a cat", "negative_prompt": "the red", "width": 40, "height": 24}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """made(model): our pipeline and diffusers' of the same parts."""

    @cache
    def make(kind):
        pipe = reference({"epsilon": SD1, "v_prediction": SD2_V}[kind], diffusers.DDIMScheduler)
        pipe.scheduler.register_to_config(timestep_spacing=None)
        return saved(pipe, tmp_path_factory.mktemp("adapters") / "model"), pipe

    return make


def scheduler_of(case, pipe):
    """As users make it: from the configuration of the pipeline's own, without the fields that SD 1's does not have."""
    name, options = CASES[case]
    config = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}
    config |= {"set_alpha_to_one": False, "prediction_type": pipe.scheduler.config.prediction_type}
    return getattr(diffusers, name).from_config(config, **options)


def seeded(scheduler, seed):
    """DPMSolverSDEScheduler draws its Brownian tree by a seed of its own; ours hands it those of the pictures."""
    if hasattr(scheduler, "noise_sampler_seed"):
        scheduler.noise_sampler_seed = [seed]
    return scheduler


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@cases
def test_text_to_image(made, case, kind):
    pipe, other = made(kind)
    other.scheduler = seeded(scheduler_of(case, other), 5)
    for steps in (1, 4):
        a = ours(pipe, 5, steps, sampler=from_diffusers(scheduler_of(case, other)), **SMALL)
        assert_close(a, theirs(other, 5, steps, **SMALL))


def from_image(made, case, kind="epsilon"):
    """The latents of ours and theirs, from the same picture."""
    pipe, other = made(kind)
    scheduler = scheduler_of(case, other)
    other = StableDiffusionImg2ImgPipeline(**other.components)
    other.set_progress_bar_config(disable=True)
    other.scheduler = seeded(copy.deepcopy(scheduler), 5)
    common = {"prompt": "a cat", "strength": 0.6}
    a = ours(pipe, 5, sampler=from_diffusers(scheduler), image=photo(), **common)
    return a, theirs(other, 5, image=contiguous(photo()), **common)


@pytest.mark.parametrize("case", [case for case in CASES if case != "PNDM"])
def test_image_to_image(made, case):
    assert_close(*from_image(made, case))


def test_difference_pndm_from_an_image(made):
    """diffusers cuts off the first of a list of timesteps in which the second stands twice: what is left begins a
    level too early, and PNDM takes the level after it for the one it has just evaluated. Ours is plms."""
    a, b = from_image(made, "PNDM")
    assert (a - b).abs().max() > 0.05
    assert_close(a, ours(made("epsilon")[0], 5, sampler="plms", image=photo(), prompt="a cat", strength=0.6))


def test_batch(made):
    """Each picture has its own noise, and its own Brownian tree."""
    pipe, other = made("epsilon")
    for case in ("Euler a", "DPM++ SDE", "DPM++ 2M SDE"):
        common = {"sampler": from_diffusers(scheduler_of(case, other)), **SMALL}
        for row, seed in zip(ours(pipe, [3, 0], **common), (3, 0), strict=True):
            assert_close(row[None], ours(pipe, seed, **common))


def test_eta(made):
    """0 unless given, as in diffusers' pipelines; and the options are those of the scheduler's step."""
    pipe, other = made("epsilon")
    for case in ("DDIM", "TCD"):
        other.scheduler = scheduler_of(case, other)
        a = ours(pipe, 5, sampler=from_diffusers(other.scheduler), eta=0.3, **SMALL)
        assert_close(a, theirs(other, 5, eta=0.3, **SMALL))
        assert (a - theirs(other, 5, **SMALL)).abs().max() > 0.05
    sampler = from_diffusers(scheduler_of("Heun", other))
    with pytest.raises(
        ValueError, match=r"^eta=0\.5: the sampler 'HeunDiscreteScheduler' has no eta; it has schedule$"
    ):
        pipe("", sampler=sampler, eta=0.5)


def test_another_prediction_type(made):
    """A scheduler that asks for v or x0 gets it from a net that predicts epsilon: in exact arithmetic the same run."""
    pipe, other = made("epsilon")
    runs = []
    for kind in ("epsilon", "v_prediction", "sample"):
        scheduler = diffusers.UniPCMultistepScheduler.from_config(other.scheduler.config, prediction_type=kind)
        runs.append(ours(pipe, 5, sampler=from_diffusers(scheduler), **SMALL))
    assert_close(runs[0], runs[1])
    assert_close(runs[0], runs[2])


def test_zero_snr(made):
    pipe, other = made("v_prediction")
    options = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "clip_sample": False}
    for name in ("DDIMScheduler", "EulerDiscreteScheduler"):
        other.scheduler = getattr(diffusers, name).from_config(scheduler_of("Euler", other).config, **options)
        assert_close(ours(pipe, 5, sampler=from_diffusers(other.scheduler), **SMALL), theirs(other, 5, **SMALL))


# On a denoiser that is known

SCHEDULE = Schedule()


def point(x, sigma):
    """All of the data is one picture of 0.5: every solver without fresh noise is exact."""
    x0 = torch.full_like(x, 0.5)
    return Prediction(x0, (x - x0) / sigma)


def draws():
    generator = torch.Generator().manual_seed(3)
    return lambda *_: torch.randn(2, 4, 4, 4, generator=generator, dtype=torch.float64)


def plain(case):
    name, options = CASES[case]
    config = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}
    return getattr(diffusers, name).from_config(config, **options)


@pytest.mark.parametrize("case", ["DDIM", "PNDM", "Euler", "Heun", "KDPM2", "DPM++ 2M", "UniPC", "DPM++ singlestep"])
def test_steps(case):
    """One for each interval of its sigmas, in our scale: x = x0 + sigma eps all the way.

    To 1e-3: of sigma between two timesteps KDPM2 reads t logarithmically, and the denoiser reads it back linearly.
    """
    sampler = from_diffusers(plain(case))
    sigmas = sampler.sigmas(6)
    x = 0.5 + sigmas[0] * draws()()
    steps = list(sampler(point, x, sigmas, draws()))
    assert sigmas.shape == (7,) and [step.i for step in steps] == list(range(6))
    assert torch.stack([step.sigma for step in steps]).equal(sigmas[:-1])
    assert torch.stack([step.sigma_next for step in steps]).equal(sigmas[1:])
    for step in steps:
        torch.testing.assert_close(step.x, 0.5 + step.sigma_next / sigmas[0] * (x - 0.5), rtol=0, atol=1e-3)
        assert step.noise is None
    assert sampler.__name__ == CASES[case][0]


@pytest.mark.parametrize("case", ["DDIM", "PNDM", "Euler", "Heun", "DPM++ 2M"])
def test_another_x_may_be_sent(case):
    sampler = from_diffusers(plain(case))
    sigmas = sampler.sigmas(6)
    steps = sampler(point, 0.5 + sigmas[0] * draws()(), sigmas, draws())
    step = next(steps)
    other = 0.5 - 2 * step.sigma_next * draws()()
    changed, kept = steps.send(other), next(steps)
    assert changed.x0.equal(torch.full_like(other, 0.5))
    torch.testing.assert_close(changed.eps, (other - 0.5) / step.sigma_next, rtol=0, atol=1e-3)
    assert torch.isfinite(kept.x).all()
    with pytest.raises(ValueError, match=r"^step 2 was sent x \(1,\)"):
        steps.send(torch.zeros(1))


def test_noise_is_ours():
    sampler, noise = from_diffusers(plain("Euler a")), draws()
    sigmas = sampler.sigmas(6)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    *steps, _ = sampler(point, torch.zeros(2, 4, 4, 4, dtype=torch.float64), sigmas, noise)
    assert torch.equal(torch.get_rng_state(), before)
    again = draws()
    assert all(step.noise.equal(again()) for step in steps)


def test_the_scheduler_is_never_changed():
    """Two runs of one sampler at a time, begun at different levels, are as if each were alone."""
    scheduler = plain("DPM++ 2M")
    scheduler.set_timesteps(3)
    before = copy.deepcopy(vars(scheduler))
    sampler = from_diffusers(scheduler)
    sigmas = sampler.sigmas(6)
    xs = [s[0] * draws()() for s in (sigmas, sigmas[2:])]
    alone = [list(sampler(point, x, s, draws())) for x, s in zip(xs, (sigmas, sigmas[2:]), strict=True)]
    together = zip(
        *[sampler(point, x, s, draws()) for x, s in zip(xs, (sigmas, sigmas[2:]), strict=True)], strict=False
    )
    for i, (first, second) in enumerate(together):
        assert first.x.equal(alone[0][i].x) and second.x.equal(alone[1][i].x)
    assert i == 3 and str(vars(scheduler)) == str(before)


def test_all_of_its_sigmas_can_be_begun_with():
    """However few of however many."""
    sampler = from_diffusers(plain("Euler"))
    sigmas = sampler.sigmas(50)
    x = 0.5 + sigmas[-3] * draws()()
    last = list(sampler(point, x, sigmas[-3:], draws()))[-1]
    torch.testing.assert_close(last.x, torch.full_like(last.x, 0.5), rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", ["Euler", "LCM"])
def test_sigmas_that_are_not_its_own(case):
    sampler = from_diffusers(plain(case))
    with pytest.raises(
        ValueError, match=r"^4 sigmas from 14\.6146 to 0\.0000 are not the last of those of .*leave sigmas"
    ):
        next(sampler(point, torch.zeros(1), SCHEDULE.sigmas(3, "karras"), draws()))


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (diffusers.DDIMScheduler, "^DDIMScheduler is no scheduler that samples: give an object"),
        (euler, "^function is no scheduler that samples"),
        (
            diffusers.FlowMatchEulerDiscreteScheduler(),
            "^FlowMatchEulerDiscreteScheduler with prediction_type=None is for",
        ),
        (diffusers.EDMEulerScheduler(), "^EDMEulerScheduler .* give one that has alphas_cumprod"),
        (
            diffusers.DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
            "flow matching",
        ),
        (diffusers.DDPMWuerstchenScheduler(), "^DDPMWuerstchenScheduler"),
        (diffusers.PNDMScheduler(skip_prk_steps=False), "^PNDMScheduler with skip_prk_steps=False: give"),
    ],
    ids=lambda value: getattr(value, "__name__", type(value).__name__),
)
def test_what_is_refused(scheduler, message):
    with pytest.raises(ValueError, match=message):
        from_diffusers(scheduler)


def test_inverse_is_refused():
    sampler = from_diffusers(diffusers.DDIMInverseScheduler())
    with pytest.raises(ValueError, match=r"^DDIMInverseScheduler goes from less noise to more"):
        sampler.sigmas(5)


def test_sigmas_of_the_call_are_refused(made):
    pipe, other = made("epsilon")
    sampler = from_diffusers(scheduler_of("Euler", other))
    with pytest.raises(ValueError, match=r"^sigmas='karras': the sampler 'EulerDiscreteScheduler' has its own spacing"):
        pipe("", sampler=sampler, sigmas="karras")
    plan = pipe.plan_strength(sampler=sampler, steps=10, strength=0.3)
    assert torch.equal(plan.sigmas, sampler.sigmas(10)[7:])


def test_options_are_shown():
    names = list(inspect.signature(from_diffusers(plain("Euler"))).parameters)
    assert names == ["denoise", "x", "sigmas", "noise", "schedule", "s_churn", "s_tmin", "s_tmax", "s_noise"]
