"""The rows beside their systems: whole pipelines of diffusers, and k-diffusion put together as webui and ComfyUI do.

A row has to give the reference's latents, pixels, sigmas, and timesteps as the net is told them. And each entry has to
matter there: with another value for it alone, one of these is off. So LIVE cannot claim what no run here would notice.
"""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
)
from family import SD1, contiguous, photo, reference, saved
from PIL import Image
from samplers.reference import ALPHAS_CUMPROD, k_external, k_sampling

import ldm
from ldm import levels
from ldm.conventions import CONVENTIONS, ENTRIES, LIVE, Conventions, explain, proof, with_one
from ldm.image import to_images
from ldm.noise import SeededNoise, drawn_each_step
from ldm.run import begin
from ldm.samplers import SAMPLERS, Schedule, euler, euler_ancestral
from ldm.settings import Settings

TEXT, NEGATIVE = "a (cat:1.3)", "the red"
SIZE = {"width": 40, "height": 24}
CONFIG = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    other = reference(SD1, DDIMScheduler)
    other.scheduler.register_to_config(timestep_spacing=None)
    return saved(other, tmp_path_factory.mktemp("conventions") / "model"), other


# What a run is: latents (B,4,h,w), pixels (B,h,w,3), the sigmas, and every timestep that the net was told


def watched(net, run):
    """What `run` returns, and the timesteps that the net is called with meanwhile."""
    told = []
    hook = net.register_forward_pre_hook(lambda net, inputs: told.append(float(inputs[1].flatten()[0])))
    made = run()
    hook.remove()
    return made, torch.tensor(told)


def assert_same(pipe, how, call, theirs):
    """Ours is the run `theirs`, which may have fewer quantities. Most pixels are the same, the others next to it."""
    settings = Settings(conventions=how, **call)
    if "sigmas" in theirs:  # in float32 diffusers' sigma at t = 0 keeps four digits
        mine, expected = begin(pipe, settings).sigmas, theirs["sigmas"].double()
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(mine[:-2], expected[:-2], rtol=1e-5, atol=0)
    out, told = watched(pipe.unet, lambda: pipe.run(settings, progress=False))
    assert told.shape == theirs["told"].shape and (told - theirs["told"]).abs().max() <= 0.01
    assert out.latents.shape == theirs["latents"].shape
    assert (out.latents - theirs["latents"]).abs().max() <= 1e-3
    if "pixels" in theirs:
        pixels = torch.from_numpy(np.stack([np.asarray(image, int) for image in out.images]))
        difference = (pixels - theirs["pixels"]).abs()
        assert difference.max() <= 1 and difference.double().mean() < 0.02


# diffusers


def diffusers_run(other, seeds, sigmas=True, kind=None, **call):
    """Of a list of generators, or of one for all; the scheduler's last sigmas are those that are run."""
    pipe = other if kind is None else kind(**other.components)
    pipe.set_progress_bar_config(disable=True)
    made = [torch.Generator().manual_seed(seed) for seed in seeds]
    latents = []

    def keep(pipe, i, t, now):
        latents.append(now["latents"])
        return {}

    call = {"guidance_scale": 7.5, "generator": made if len(made) > 1 else made[0], "callback_on_step_end": keep} | call
    images, told = watched(pipe.unet, lambda: pipe(**call).images)
    pixels = torch.from_numpy(np.stack([np.asarray(image, int) for image in images]))
    run = {"latents": latents[-1], "pixels": pixels, "told": told}
    return run | ({"sigmas": pipe.scheduler.sigmas[-len(told) - 1 :]} if sigmas else {})


def text(other):
    """Two pictures, with weights, clip skip and noise in each step."""
    other.scheduler = EulerAncestralDiscreteScheduler(**CONFIG)
    call = {"prompt": TEXT, "negative_prompt": NEGATIVE, "clip_skip": 1} | SIZE
    mine = call | {"steps": 7, "seed": 3, "batch_size": 2, "sampler": "euler_ancestral"}
    return mine, diffusers_run(other, [3, 4], num_inference_steps=7, num_images_per_prompt=2, **call)


def multistep(other, karras=False):
    other.scheduler = DPMSolverMultistepScheduler(**CONFIG, use_karras_sigmas=karras)
    call = {"prompt": TEXT} | SIZE
    mine = call | {"steps": 7, "seed": 3, "sampler": "dpmpp_2m", "sigmas": "karras" if karras else None}
    return mine, diffusers_run(other, [3], num_inference_steps=7, **call)


def from_image(other):
    """int(50 * 0.58) is 28."""
    other.scheduler = EulerAncestralDiscreteScheduler(**CONFIG)
    call = {"prompt": TEXT, "strength": 0.58}
    mine = call | {"image": photo(), "steps": 50, "seed": 3, "sampler": "euler_ancestral"}
    image = {"image": contiguous(photo()), "num_inference_steps": 50}
    return mine, diffusers_run(other, [3], kind=StableDiffusionImg2ImgPipeline, **image, **call)


def inpainted(other):
    other.scheduler = EulerAncestralDiscreteScheduler(**CONFIG)
    image, mask = photo(), Image.new("L", (40, 24))
    mask.paste(255, (9, 5, 28, 18))
    call = {"prompt": TEXT, "strength": 0.8}
    mine = call | {"image": image, "mask": mask, "steps": 5, "seed": 3, "sampler": "euler_ancestral"}
    given = {"image": contiguous(image), "mask_image": mask, "num_inference_steps": 5} | SIZE
    return mine, diffusers_run(other, [3], kind=StableDiffusionInpaintPipeline, **given, **call)


def ddim(other):
    """As CompVis' scripts: one generator, of which each step draws for the whole batch."""
    other.scheduler = DDIMScheduler(**CONFIG, clip_sample=False, set_alpha_to_one=False)
    call = {"prompt": TEXT, "eta": 0.5} | SIZE
    theirs = diffusers_run(other, [3], sigmas=False, num_inference_steps=5, num_images_per_prompt=2, **call)
    theirs.pop("pixels")
    return call | {"steps": 5, "seed": 3, "batch_size": 2, "sampler": "ddim"}, theirs


# k-diffusion


def k_run(pipe, sample, steps, start, first, quantize=False, ends_above=False, **options):
    """start(sigma): of what standard deviation the noise is that a run begins with, `first`. ends_above: the timesteps
    are those of one step more, without t = 0."""
    context = [pipe.encode_text([words], emphasis=None).context for words in (TEXT, NEGATIVE)]
    alphas = torch.from_numpy(ALPHAS_CUMPROD).float()
    model = k_external.DiscreteEpsDDPMDenoiser(lambda x, t, c: pipe.unet(x, t, c), alphas, quantize)

    def guided(x, sigma):
        cond, uncond = (model(x, sigma, c=each.expand(len(x), -1, -1)) for each in context)
        return uncond + 7.5 * (cond - uncond)

    sigmas = model.get_sigmas(steps + ends_above)
    sigmas = torch.cat([sigmas[:steps], sigmas[-1:]])
    run = partial(sample, guided, first * start(sigmas[0]), sigmas, disable=True, **options)
    with torch.no_grad():
        latents, told = watched(pipe.unet, run)
    return {"latents": latents, "told": told[::2], "sigmas": sigmas}


K_CALL = {"prompt": TEXT, "negative_prompt": NEGATIVE, "emphasis": None, "steps": 24} | SIZE


def churned(pipe):
    """As webui: k-diffusion draws in each step, also where sigma is outside of what is churned."""
    churn = {"s_churn": 20.0, "s_tmin": 0.1, "s_tmax": 3.0}
    torch.manual_seed(3)
    theirs = k_run(pipe, k_sampling.sample_euler, 24, lambda sigma: sigma, torch.randn(1, 4, 12, 20), **churn)
    return K_CALL | {"seed": 3, "sampler": "euler", "sampler_options": churn}, theirs


def uniform(pipe):
    """As webui's "SGM Uniform", which goes to 0 from above t = 0."""
    first = torch.randn(1, 4, 12, 20, generator=torch.Generator().manual_seed(3))
    theirs = k_run(pipe, k_sampling.sample_euler, 5, lambda sigma: sigma, first, ends_above=True)
    return K_CALL | {"seed": 3, "sampler": "euler", "sigmas": "sgm_uniform", "steps": 5}, theirs


def ancestral(pipe):
    """As ComfyUI: the noise of a batch at once, that of the loop of the next seed, timesteps rounded."""
    first = torch.randn(2, 4, 12, 20, generator=torch.Generator().manual_seed(3))
    loop = torch.Generator().manual_seed(4)
    own = {"noise_sampler": lambda *_: torch.randn(2, 4, 12, 20, generator=loop), "quantize": True}
    run = partial(k_run, pipe, k_sampling.sample_euler_ancestral, 24)
    theirs = run(lambda sigma: (1 + sigma**2) ** 0.5, first, **own)
    return K_CALL | {"seed": 3, "batch_size": 2, "sampler": "euler_ancestral"}, theirs


# By run: the row that it is about, and entries with a value that would show
RUNS = {
    text: (
        "diffusers",
        {
            **{"start": "unit", "whole": True, "shares": True, "loop_seed": 1},
            **{"emphasis": "mean", "last_layer": 1, "cuts_negative": True, "truncates": True},
        },
    ),
    multistep: ("diffusers", {"spacing": "linspace", "start": "sigma", "end": "t = 0"}),
    partial(multistep, karras=True): ("diffusers", {"whole": False}),
    from_image: ("diffusers", {"strength_rule": "floor", "samples_posterior": False, "log": True}),
    inpainted: ("diffusers", {"blend": "x0", "paste_back": True, "idle_draws": None}),
    churned: (
        "webui",
        {
            **{"spacing": "sgm_uniform", "firm": False, "start": "unit", "log": False, "whole": True},
            **{"idle_draws": None},
        },
    ),
    uniform: ("webui", {"end": "t = 0"}),
    ancestral: (
        "comfy",
        {
            **{"spacing": "sgm_uniform", "firm": False, "start": "sigma", "log": False, "whole": False},
            **{"shares": False, "loop_seed": None},
        },
    ),
    ddim: (
        "compvis",
        {"spacing": "linspace", "firm": False, "start": "sigma", "end": "zero", "shares": False},
    ),
}


def changed(how, sampler, name, value):
    """The row with another value for one entry."""
    function = SAMPLERS[sampler]
    if name in Conventions.__dataclass_fields__:
        return replace(how, **{name: value})
    return replace(how, references={**how.references, function: how.reference_of(function)._replace(**{name: value})})


@pytest.mark.parametrize("run", RUNS, ids=lambda run: getattr(run, "__name__", "karras"))
def test_live(pair, run, monkeypatch):
    pipe, other = pair
    system, entries = RUNS[run]
    if system != "diffusers":  # they do not look at a folder's configuration
        monkeypatch.setattr(pipe, "schedule", Schedule(spacing="trailing"))
    call, theirs = run(pipe if system in ("webui", "comfy") else other)
    assert_same(pipe, system, call, theirs)
    for name, value in entries.items():
        how = changed(CONVENTIONS[system], call["sampler"], name, value)
        assert how != CONVENTIONS[system]
        with pytest.raises(AssertionError):
            assert_same(pipe, how, call, theirs)
            pytest.fail(f"{name}={value!r} changes nothing", pytrace=False)


def test_what_is_claimed_is_run():
    """Of ComfyUI and CompVis more is pinned than claimed: how the noise is drawn and scaled is put together here."""
    for system, (_, names, _) in LIVE.items():
        shown = {name for row, entries in RUNS.values() if row == system for name in entries}
        assert names <= shown or system == "ldm", (system, names - shown)


def test_by_other_samplers_less_is_proven():
    """What a run with another sampler would have to show: its levels of noise and its draws."""
    assert proof("webui", "log", "euler") == "k-diffusion, live" != proof("webui", "log", "unipc")
    assert proof("comfy", "spacing", "euler_ancestral") != proof("comfy", "spacing", "ddim") == "source, not run"
    assert proof("diffusers", "whole", "unipc") == "source, not run" != proof("diffusers", "truncates", "unipc")
    for system, (_, names, samplers) in LIVE.items():
        assert {proof(system, name, sampler) for name in names for sampler in samplers} == {LIVE[system][0]}


# On paper


def test_our_own_row_is_the_default(pair):
    call = {"prompt": TEXT, "seed": 1, "batch_size": 2, "steps": 2, "progress": False} | SIZE
    assert torch.equal(pair[0](**call).latents, pair[0](**call, conventions="ldm").latents)
    assert Settings().how == CONVENTIONS["ldm"] and Settings(conventions="comfy").how == CONVENTIONS["comfy"]


@pytest.mark.parametrize("system", CONVENTIONS)
def test_what_the_call_says_goes_before_it(system):
    own = {"strength_rule": "continuous", "blend": "noise", "paste_back": True, "emphasis": "none"}
    for name, value in own.items():
        how = Settings(conventions=system, **{name: value}).how
        assert how == replace(CONVENTIONS[system], **{name: value})
    assert Settings(conventions=system, emphasis=None).how.emphasis is None
    sigmas = levels.sigmas(Settings(conventions=system, sigmas="karras", steps=5), Schedule())
    assert torch.equal(sigmas[:-1], Schedule().sigmas(5, "karras")[:-1])


def test_seeds_that_are_listed_have_a_generator_each(pair):
    pipe, call = pair[0], {"conventions": "comfy", "steps": 1, "progress": False} | SIZE
    batch, listed, alone = (pipe(**call, **seed).latents for seed in ({"batch_size": 2}, {"seed": [0, 1]}, {"seed": 1}))
    assert torch.equal(listed[0], batch[0]) and torch.allclose(listed[1:], alone, atol=1e-4)
    assert not torch.allclose(batch[1:], alone, atol=0.1)


@pytest.mark.parametrize(
    ("system", "numbers"),
    [("webui", {1: 1, 2: 2, 3: 3}), ("diffusers", {0: 1, 1: 2}), ("comfy", {-1: 1, -2: 2}), (None, {None: 1, 2: 2})],
)
def test_clip_skip(system, numbers):
    assert {n: Settings(conventions=system, clip_skip=n).layer for n in numbers} == numbers


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"conventions": "a1111"}, "conventions='a1111': use 'ldm', 'diffusers', 'webui', 'comfy', 'compvis', or give"),
        ({"conventions": ["webui"]}, r"conventions=\['webui'\]: use"),
        ({"conventions": "webui", "clip_skip": 0}, r"clip_skip=0: give a whole number from 1 \(.*\) up"),
        ({"conventions": "diffusers", "clip_skip": -1}, r"clip_skip=-1: give a whole number from 0 \(.*\) up"),
        ({"conventions": "comfy", "clip_skip": 1}, r"clip_skip=1: give a whole number from -1 \(.*\) down"),
        ({"conventions": replace(CONVENTIONS["ldm"], blend="x")}, "blend='x': use 'x0', 'noise'"),
        (
            {"conventions": "comfy", "image": photo(), "strength": 0.5, "sigmas": torch.tensor([9.0, 1.0, 0.0])},
            "strength_rule='comfy' with sigmas as a tensor",
        ),
    ],
)
def test_errors(settings, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        levels.plan(Settings(**settings), Schedule())


@pytest.mark.parametrize(
    ("system", "sampler", "first", "last"),
    [
        ("diffusers", "euler", "sigma", 0),
        ("diffusers", "ddim", "unit", 0.02916716),
        ("webui", "euler", "sigma", 0),
        ("webui", "ddim", "unit", 0.02916716),
        ("comfy", "euler", "unit", 0),
        ("comfy", "ddim", "unit", 0),
        ("compvis", "euler", "unit", 0.02916716),
    ],
)
def test_the_ends_of_a_run(system, sampler, first, last):
    s = Settings(conventions=system, sampler=sampler)
    sigmas = levels.sigmas(s, Schedule())
    assert float(sigmas[-1]) == pytest.approx(last, abs=1e-8)
    expected = {"sigma": sigmas[0], "unit": (1 + sigmas[0] ** 2) ** 0.5}[first]
    assert float(levels.first_std(s, Schedule(), sigmas[0])) == float(expected)
    if sigmas[0] > 14:
        assert float(expected) == pytest.approx({"sigma": 14.6146412, "unit": 14.6488136}[first], abs=1e-6)


def test_only_the_highest_level_of_comfy_has_a_variance_of_1():
    s, schedule = Settings(conventions="comfy"), Schedule()
    for sigma, alone in ((14.6146412, True), (14.6146412, False), (9.0, True), (9.0, False)):
        expected = 14.6488136 if sigma > 14 else sigma
        assert float(levels.first_std(s, schedule, torch.tensor(sigma), alone)) == pytest.approx(expected, abs=1e-6)
    unit = Settings(sampler="ddim")
    assert levels.first_std(unit, schedule, torch.tensor(9.0), alone=False) == 9


def test_one_generator_for_the_batch():
    noise = SeededNoise([5, 6], (4, 2, 2), shared=True)
    generator = torch.Generator().manual_seed(5)
    for _ in range(2):
        assert torch.equal(noise(), torch.randn(2, 4, 2, 2, generator=generator))
    varied = SeededNoise([5, 6], (4, 2, 2), shared=True).varied([5, 6], 0.5)
    torch.testing.assert_close(varied, SeededNoise([5, 6], (4, 2, 2), shared=True)())


def test_draws_that_are_dropped():
    """One a step: euler without noise makes as many as euler_ancestral, and its x is the same as ever."""
    for sampler, unused in ((euler, 4), (euler_ancestral, 1)):  # the step to 0 adds none
        noise, sigmas = SeededNoise([0], (1, 1, 1)), Schedule().sigmas(4)
        denoise = lambda x, sigma: ldm.samplers.Prediction(0 * x, x / sigma)  # noqa: E731
        plain, counted = SeededNoise([0], (1, 1, 1)), SeededNoise([0], (1, 1, 1))
        a = [step.x for step in sampler(denoise, noise(), sigmas, plain)]
        b = [
            step.x
            for step in drawn_each_step(sampler(denoise, SeededNoise([0], (1, 1, 1))(), sigmas, counted), counted)
        ]
        assert all(map(torch.equal, a, b)) and (plain.draws, counted.draws) == (4 - unused, 4)


def test_a_step_that_is_sent_goes_through():
    denoise = lambda x, sigma: ldm.samplers.Prediction(0 * x, x / sigma)  # noqa: E731
    steps = drawn_each_step(
        euler(denoise, torch.ones(1, 1, 1, 1), torch.tensor([2.0, 1.0, 0.5]), None), lambda *_: None
    )
    assert next(steps).x == 0.5 and steps.send(torch.full((1, 1, 1, 1), 8.0)).x == 4


def test_pixels_that_are_cut_off():
    """254.6 and 0.6 of 255."""
    values = torch.tensor([254.6, 0.6, 300, -3]).div(127.5).sub(1).expand(1, 3, 1, 4)
    assert [np.asarray(to_images(values, cut)[0])[0, :, 0].tolist() for cut in (False, True)] == [
        [255, 1, 255, 0],
        [254, 0, 255, 0],
    ]


# explain


def test_explain(pair, monkeypatch):
    """All that differs is named, and each by itself moves the run."""
    monkeypatch.setattr(pair[0], "size", 32)
    said = explain("webui", "diffusers", pipe=pair[0], steps=5)
    a, b = CONVENTIONS["webui"], CONVENTIONS["diffusers"]
    own = {name for name in ENTRIES if hasattr(a, name) and getattr(a, name) != getattr(b, name)}
    assert {d.name for d in said.differences} == own | {"log"}
    for d in said.differences:
        assert d.values[0] != d.values[1] and (d.latents > 0 or d.pixels > 0), d
        assert d.proofs == (proof("webui", d.name, "euler"), "diffusers, live")
    assert str(said) == repr(said) and all(ENTRIES[d.name][0] in str(said) for d in said.differences)
    lines = str(said).splitlines()
    i = lines.index("evaluations of 100 steps at strength 0.29")
    assert [line.split()[1] for line in lines[i + 1 : i + 3]] == ["29", "28"]
    assert lines[i + 1].endswith("(source, not run)") and lines[i + 2].endswith("(diffusers, live)")


def test_explain_says_numbers(pair, monkeypatch):
    few = {name: ENTRIES[name] for name in ("log", "start", "end", "last_layer")}
    monkeypatch.setattr("ldm.conventions.ENTRIES", few)
    differences = {d.name: d for d in explain("comfy", "webui", pipe=pair[0], steps=3).differences}
    assert differences["start"].values == ("sqrt(1 + sigma^2) = 14.6488", "sigma = 14.6146")
    assert differences["start"].latents > 0 and differences["last_layer"].latents is None  # -2 is no number of webui's
    assert set(differences) == {"start", "last_layer"}
    assert explain("webui", "comfy", "DPM++ 2M", pair[0], steps=1).sampler == "dpmpp_2m"


def test_explain_is_of_one_entry():
    """Two rows, and what is between them: each entry alone makes the one into the other, all of them do."""
    how, other = CONVENTIONS["webui"], CONVENTIONS["compvis"]
    for name in ENTRIES:
        how = with_one(how, other, name, euler)
    assert replace(how, references={}, reference=other.reference) == other
    assert how.reference_of(euler) == other.reference_of(euler)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("webui", "forge"), "conventions 'forge': use 'ldm', "), (("webui", "comfy", "eular"), "sampler 'eular': use")],
)
def test_explain_errors(arguments, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        explain(*arguments)
