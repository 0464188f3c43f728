"""Where each sampler begins, what levels it takes and where it ends: whole runs beside diffusers' pipelines.

The reference is made as its users make it, from SD 1's own configuration, which has no timestep_spacing: each class
then takes its default. It is used with a tiny model.
"""

import functools

import diffusers
import pytest
import torch
from diffusers.schedulers import scheduling_dpmsolver_sde
from family import SD1, assert_close, ours, reference, saved, theirs

import ldm
from ldm import levels
from ldm.samplers import ALIASES, REFERENCES, SAMPLERS, SPACED, Brownian, Schedule, deis, euler
from ldm.samplers.adapters import from_diffusers, from_k_diffusion
from ldm.samplers.schedule import TIMESTEPS
from ldm.settings import Settings

CONFIG = {
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "clip_sample": False,
    "prediction_type": "epsilon",
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
}
NAMES = sorted({name for name in [*ALIASES, *SPACED] if name.endswith("Scheduler")})
SMALL = {"prompt": "a cat", "negative_prompt": "the red", "width": 40, "height": 24}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    other = reference(SD1, diffusers.DDIMScheduler)
    other.scheduler.register_to_config(timestep_spacing=None)
    return saved(other, tmp_path_factory.mktemp("levels") / "model"), other


def tree(steps):
    """Our Brownian path in the place of diffusers' tree, which is of the same law and has other draws.

    The path is rough: their sigmas, in float32, are taken for ours.
    """
    sigmas = Schedule().sigmas(steps)[:-1]
    known = torch.cat([sigmas, (sigmas[1:] * sigmas[:-1]).sqrt()])

    def make(x, low, high, seed):
        path = Brownian([5], x.shape[1:], sigmas[0], sigmas[-1])
        return lambda *pair: path(*(known[(known - sigma).abs().argmin()] for sigma in pair))

    return make


def scheduler(name, **changes):
    return getattr(diffusers, name).from_config(CONFIG | changes)


CASES = [(name, steps) for name in NAMES for steps in (1, 4, 7)]
# With "linspace" their only step starts at t = 0: pinned in tests/samplers/test_schedule.py.
FROM_0 = {name for name in NAMES if float(scheduler(name).init_noise_sigma) != 1}


@pytest.mark.parametrize(("name", "steps"), [(n, steps) for n, steps in CASES if steps > 1 or n not in FROM_0])
def test_diffusers(pair, name, steps, monkeypatch):
    monkeypatch.setattr(scheduling_dpmsolver_sde, "BrownianTreeNoiseSampler", tree(steps))
    pipe, other = pair
    other.scheduler = scheduler(name)
    eta = {"eta": 0.3} if name == "TCDScheduler" else {}  # what its authors take, and we by default as gamma
    a, b = ours(pipe, 5, steps, sampler=name, **SMALL), theirs(other, 5, steps, **SMALL, **eta)
    assert_close(a, b)


def test_all_of_diffusers_are_there():
    """But for those that are none of ours: one evaluation a step of a singlestep solver, and stochastic Adams."""
    assert len(NAMES) == 15
    assert {name for name in NAMES if name.startswith(("Euler", "Heun", "KDPM2", "LMS", "DPMSolverSDE"))} == FROM_0


@pytest.mark.parametrize("name", ["LCMScheduler", "TCDScheduler"])
def test_the_model_s_spacing_is_not_lcm_s(name):
    """A model's timestep_spacing is for the others: consistency models know 50 timesteps."""
    s = Settings(sampler=name, steps=4)
    sigmas = levels.sigmas(s, Schedule(spacing="leading"))
    theirs = scheduler(name, timestep_spacing="leading")
    theirs.set_timesteps(4)
    assert torch.equal(sigmas[:-1], Schedule().sigma(theirs.timesteps.double()))
    assert levels.spacing(Settings(sampler="unipc"), Schedule(spacing="trailing")) == "trailing"
    assert levels.spacing(Settings(sampler=name, sigmas="karras"), Schedule()) == "karras"


def test_difference_leading_of_the_multistep_solvers():
    """diffusers' take a stride of 1000 // (n + 1) there; ours is the other classes' 1000 // n for all."""
    theirs = scheduler("UniPCMultistepScheduler", timestep_spacing="leading")
    theirs.set_timesteps(4)
    sigmas = levels.sigmas(Settings(sampler="unipc", steps=4), Schedule(spacing="leading"))
    assert theirs.timesteps.tolist() == [801, 601, 401, 201]
    assert Schedule().t(sigmas[:-1]).round().tolist() == [751, 501, 251, 1]


@pytest.mark.parametrize("steps", [1, 2, 3, 10, 49, 50])
def test_spacings(steps):
    """Whole timesteps: exactly those of diffusers' classes."""
    for name, spacing in (("UniPCMultistepScheduler", "dpm_solver"), ("LCMScheduler", "lcm"), ("TCDScheduler", "lcm")):
        theirs = scheduler(name)
        theirs.set_timesteps(steps)
        assert torch.equal(Schedule().sigmas(steps, spacing)[:-1], Schedule().sigma(theirs.timesteps.double()))


def test_difference_beyond_the_timesteps():
    """Above 50 steps diffusers' LCM refuses; two of its DPM-Solver's 1000 steps begin at one timestep."""
    with pytest.raises(ValueError, match="50"):
        scheduler("LCMScheduler").set_timesteps(51)
    assert Schedule().sigmas(51, "lcm").equal(Schedule().sigmas(51, "simple"))
    multistep = scheduler("DPMSolverMultistepScheduler")
    for steps in range(1, 1001):
        multistep.set_timesteps(steps)
        assert torch.equal(multistep.timesteps.double(), TIMESTEPS["dpm_solver"](steps)) == (steps < 1000)


@pytest.mark.parametrize(
    ("sampler", "options", "last"),
    [
        ("ddim", {}, "t = 0"),
        ("ddim", {"set_alpha_to_one": True}, "zero"),
        ("ddim", {"final_sigmas_type": "sigma_min"}, "t = 0"),
        ("plms", {"set_alpha_to_one": True}, "zero"),
        ("ddpm", {"final_sigmas_type": "sigma_min"}, "zero"),
        ("lcm", {"final_sigmas_type": "sigma_min"}, "zero"),
        ("tcd", {"set_alpha_to_one": True}, "t = 0"),
        ("deis", {}, "t = 0"),
        ("unipc", {}, "zero"),
        ("unipc", {"final_sigmas_type": "sigma_min"}, "t = 0"),
        ("heun", {"final_sigmas_type": "sigma_min", "spacing": "leading"}, "t = 0"),
    ],
)
def test_ends(sampler, options, last):
    schedule = Schedule(**options)
    end = float(levels.sigmas(Settings(sampler=sampler, steps=4), schedule)[-1])
    assert end == {"zero": 0, "t = 0": schedule.sigma_min}[last]


def test_each_function_is_known_by_its_partial():
    part = functools.partial(deis, order=3)
    assert levels.reference(Settings(sampler=part)) == levels.reference(Settings(sampler="deis")) == REFERENCES[deis]
    assert levels.reference(Settings(sampler=euler)) == levels.reference(Settings(sampler="dpmpp_2m_sde_heun"))


# The model's own schedule


def test_tcd_is_given_the_model_s_schedule(pair):
    """Its s is a timestep: in a model of other betas it has another sigma."""
    pipe, other = pair
    betas = {"beta_start": 0.0005, "beta_end": 0.02}
    other.scheduler = scheduler("TCDScheduler", **betas)
    other.unet.to(memory_format=torch.channels_last)  # as ours computes: latents of 160 show how layouts round
    mine = ldm.Pipeline(pipe.unet, pipe.vae, pipe.text_encoder, pipe.tokenizer, Schedule(**betas), size=64)
    b = theirs(other, 5, eta=0.3, **SMALL)
    assert_close(ours(mine, 5, sampler="tcd", **SMALL), b)
    other_schedule = {"sampler_options": {"schedule": Schedule()}}
    assert (ours(mine, 5, sampler="tcd", **other_schedule, **SMALL) - b).abs().max() > 0.01


# Spellings


def test_spellings_that_space(pair):
    s = Settings(sampler="DPM++ 2M SDE Heun Karras")
    assert (s.sampler_name, s.sigmas) == ("dpmpp_2m_sde_heun", "karras")
    assert Settings(sampler="DPM++ 2M Exponential").sigmas == "exponential"
    assert Settings(sampler="Euler a Karras", sigmas="simple").sigmas == "simple"
    a = ours(pair[0], 5, sampler="DPM++ 2M Karras", **SMALL)
    assert torch.equal(a, ours(pair[0], 5, sampler="dpmpp_2m", sigmas="karras", **SMALL))
    heun, midpoint = (ours(pair[0], 5, sampler=f"DPM++ 2M SDE{kind}", **SMALL) for kind in (" Heun", ""))
    assert torch.equal(heun, ours(pair[0], 5, sampler="dpmpp_2m_sde", sampler_options={"solver_type": "heun"}, **SMALL))
    assert (heun - midpoint).abs().max() > 0.01
    assert all(ALIASES.get(name, name) in SAMPLERS for name, _ in SPACED.values())


# What is no sampler


def sample_own(model, x, sigmas, extra_args=None, callback=None, disable=None):
    return x


def sample_range(model, x, sigma_min, sigma_max, n):
    return x


@pytest.mark.parametrize("function", [sample_own, sample_range])
def test_a_function_of_k_diffusion_is_named(pair, function):
    with pytest.raises(ValueError, match=rf"^sampler '{function.__name__}' is a function .* give from_k_diffusion"):
        pair[0]("", sampler=function)
    assert Settings(sampler=from_k_diffusion(function)).sampler_name


def test_a_scheduler_is_named(pair):
    made = scheduler("UniPCMultistepScheduler")
    with pytest.raises(ValueError, match=r"^sampler is a scheduler of diffusers \(UniPC\w+\): give from_diffusers"):
        pair[0]("", sampler=made)
    assert Settings(sampler=from_diffusers(made)).sampler_name == "UniPCMultistepScheduler"


@pytest.mark.parametrize("how", ["call", "stream"])
def test_a_function_that_returns(pair, how):
    def lazy(denoise, x, sigmas, noise):
        return x

    pipe = pair[0]
    with pytest.raises(ValueError, match=r"^the sampler 'lazy' returned a Tensor: a sampler yields a Step"):
        pipe("", sampler=lazy, steps=2, progress=False) if how == "call" else pipe.stream("", sampler=lazy, steps=2)
