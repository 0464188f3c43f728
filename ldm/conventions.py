"""What other systems do differently, a row each: why two programs draw different pictures from one seed.

`pipe(..., conventions="webui")` takes a row for whatever the call does not say itself, and
`print(ldm.conventions.explain("webui", "diffusers"))` measures what each difference comes to. A row of your own is
`dataclasses.replace(CONVENTIONS["webui"], truncates=False)`.

The rows are what the programs do unless they are told otherwise: diffusers 0.42, AUTOMATIC1111's webui (schedule type
Automatic as before 1.9, random numbers of the CPU), ComfyUI (KSampler, scheduler "normal"), CompVis' scripts. The tests
run diffusers and k-diffusion; the other three were read, not run, and `LIVE` says what of them is proven. Not followed:

    diffusers   "leading" of the multistep solvers; karras between the ends of a spacing that is not linspace; PNDM's
                image to image, a step longer; independent noise in dpmpp_2m_sde; prompts cut at 75 tokens
    webui       UniPC; image to image with DDIM and PLMS; DPM2's schedule without its last sigma but one
    comfy       weights in prompts as distances from the empty text; churn; clip skip of SD 2 and SDXL, counted from the
                layer after the one they are trained with; masks rounded in latents
    compvis     the further steps where 1000 is no multiple of their number; image to image, whose picture is given the
                noise of a level that is one above the first denoised
    others      SDXL without a negative prompt, which is zeros in diffusers alone (give "")
    all         the draws of Brownian noise; random numbers of a GPU
"""

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter

from ldm.samplers import ALIASES, REFERENCES, SAMPLERS, Reference, Sampler, ddim, deis, dpmpp_2m, plms, unipc

if TYPE_CHECKING:
    from ldm.output import Output
    from ldm.pipeline import Pipeline


OWN = Reference()  # k-diffusion's samplers, in the library's own row


@dataclass(frozen=True)
class Conventions:
    """What is done where a call does not say. The defaults are the library's own, each sampler as its own reference.

    references, reference: how a run of a sampler begins, is spaced and ends, and of those that are not listed.
    strength_rule, blend, emphasis, paste_back: as in `ldm.Settings`.
    last_layer: the clip_skip that cuts nothing; below 0 the numbers go down. cuts_negative: it is for both texts.
    shares: one generator draws for the whole batch, if the seed is one number; else each picture has its own.
    samples_posterior: a picture's latents are drawn from the VAE's posterior, before any other noise; else its mean
        (for systems whose draw does not depend on the seed, so that nobody can repeat it).
    loop_seed: the sampler draws from another generator, of a seed that is so many further; None: from the same.
    idle_draws: what is drawn and not used, and moves the draws after it: "step", noise in a step that adds none (as
        without churn, or outside of its range); "mask", for the masked picture that only an inpainting model looks at.
    truncates: pixels are cut off to whole numbers, not rounded.
    """

    references: Mapping[Sampler, Reference]
    reference: Reference = OWN
    strength_rule: str = "floor"
    blend: str = "x0"
    emphasis: str | None = "mean"
    paste_back: bool = True
    last_layer: int = 1
    cuts_negative: bool = True
    shares: bool = False
    samples_posterior: bool = True
    loop_seed: int | None = None
    idle_draws: str | None = None
    truncates: bool = False

    def reference_of(self, sampler: Sampler) -> Reference:
        return next((theirs for function, theirs in self.references.items() if function is sampler), self.reference)

    def layer(self, clip_skip: int) -> int:
        """clip_skip as webui counts, 1 is the last layer; below 1 for a number that means none."""
        return 1 + (clip_skip - self.last_layer) * (-1 if self.last_layer < 0 else 1)


K_DIFFUSION = Reference("linspace", firm=True, start="sigma", end="zero", log=True)
COMPVIS = Reference("leading", firm=True, start="unit", end="t = 0")
COMFY = K_DIFFUSION._replace(start="highest", whole=True)
ROUNDS_T = {dpmpp_2m: Reference("dpm_solver", start="unit", whole=True)}
ROUNDS_T |= {sampler: REFERENCES[sampler]._replace(whole=True) for sampler in (unipc, deis)}

CONVENTIONS = {
    "ldm": Conventions(REFERENCES),
    "diffusers": Conventions(
        REFERENCES | ROUNDS_T,
        strength_rule="diffusers",
        blend="noise",
        emphasis=None,
        paste_back=False,
        last_layer=0,
        cuts_negative=False,
        idle_draws="mask",
    ),
    "webui": Conventions(
        REFERENCES | {ddim: COMPVIS, plms: COMPVIS},
        K_DIFFUSION,
        strength_rule="webui",
        samples_posterior=False,
        idle_draws="step",
        truncates=True,
    ),
    "comfy": Conventions(
        REFERENCES | {ddim: COMFY},
        COMFY,
        strength_rule="comfy",
        emphasis="none",
        paste_back=False,
        last_layer=-1,
        shares=True,
        samples_posterior=False,
        loop_seed=1,
        truncates=True,
    ),
    "compvis": Conventions(
        {},
        COMPVIS,
        strength_rule="diffusers",
        emphasis=None,
        paste_back=False,
        shares=True,
        idle_draws="step",
        truncates=True,
    ),
}

# What each entry is about, and the words for its values.
ENTRIES: dict[str, tuple[str, dict[Any, str]]] = {
    "spacing": ("the spacing of the steps", {}),
    "log": ("sigma between two timesteps", {}),
    "start": ("the noise that a run begins with", {}),
    "end": ("the last sigma", {}),
    "whole": ("the timestep that the net is told", {True: "the nearest whole one", False: "with its fraction"}),
    "strength_rule": ("evaluations of 100 steps at strength 0.29", {}),
    "samples_posterior": (
        "latents of a picture",
        {True: "drawn first, from the seed", False: "drawn by no seed: the mean"},
    ),
    "shares": ("generators of random numbers", {True: "one for the batch", False: "one for each picture"}),
    "loop_seed": ("noise in the loop", {None: "goes on after the first", 1: "of the next seed"}),
    "idle_draws": (
        "draws that are not used",
        {None: "none", "step": "in each step", "mask": "one for the masked picture"},
    ),
    "blend": ("what a mask keeps, in the loop", {"x0": "set in x0", "noise": "noised again after each step"}),
    "paste_back": ("what a mask keeps, in the end", {True: "the picture itself", False: "as the VAE has it"}),
    "emphasis": ("(word:1.3)", {"mean": "weight, mean kept", "none": "weight", None: "text"}),
    "last_layer": ("clip skip without a cut", {}),
    "cuts_negative": ("clip skip of the negative prompt", {True: "cut as well", False: "not cut"}),
    "truncates": ("pixels", {True: "cut off to whole numbers", False: "rounded"}),
}


# What was run beside ours, which entries it proves, and with which samplers those of them that hang on the sampler, in
# tests/test_conventions.py (diffusers' also in tests/test_levels.py); the others are from the sources.
LIVE = {
    "ldm": ("itself", {*ENTRIES}, {*SAMPLERS}),
    "diffusers": ("diffusers, live", {*ENTRIES}, {*SAMPLERS} - {"unipc", "deis"}),
    "webui": ("k-diffusion, live", {"spacing", "start", "end", "log", "whole", "idle_draws"}, {"euler"}),
    "comfy": ("k-diffusion, live", {"spacing", "log", "whole"}, {"euler_ancestral"}),
    "compvis": ("diffusers' DDIM, live", {"spacing", "start", "end"}, {"ddim"}),
}


def proof(system: str, name: str, sampler: str) -> str:
    """By what an entry of a row, or of its references, is proven."""
    how, names, samplers = LIVE[system]
    hangs = name in Reference._fields or name == "idle_draws"
    return how if name in names and (sampler in samplers or not hangs) else "source, not run"


@dataclass(frozen=True)
class Difference:
    """One entry: the two values, how each is proven, and the effect of this alone on a run: the largest difference of
    latents and of pixels (of 255); None where the other system takes the example's arguments for an error."""

    name: str
    values: tuple[str, str]
    proofs: tuple[str, str]
    latents: float | None
    pixels: int | None


@dataclass(frozen=True, repr=False)
class Explanation:
    systems: tuple[str, str]
    sampler: str
    model: str
    differences: tuple[Difference, ...]

    def __str__(self) -> str:
        first, second = self.systems
        lines = [f"{first} and {second}: {self.sampler} on {self.model}, each difference by itself in {first}'s run"]
        for d in self.differences:
            lines += ["", ENTRIES[d.name][0]]
            lines += [f"  {s:<11}{v:<44}({p})" for s, v, p in zip(self.systems, d.values, d.proofs, strict=True)]
            moved = "an argument that the other refuses"
            if d.latents is not None:
                moved = f"latents {d.latents:.2g}, pixels {d.pixels} of 255"
            lines += [f"  {'moves':<11}{moved}"]
        return "\n".join(lines)

    __repr__ = __str__


def explain(
    first: str, second: str, sampler: str = "euler", pipe: "Pipeline | None" = None, steps: int = 20
) -> Explanation:
    """Each difference between two rows, and its effect, measured: two runs of `pipe` (the default model) that differ in
    this entry alone, the others being the first system's. To print. Raises ValueError for an unknown system or sampler.

    The runs are such as show it: of a batch, from a picture, with a mask, with weights in the prompt.
    """
    from ldm.pipeline import Pipeline

    for name in (first, second):
        if name not in CONVENTIONS:
            raise ValueError(f"conventions {name!r}: use {', '.join(map(repr, CONVENTIONS))}")
    sampler = ALIASES.get(sampler, sampler)
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler {sampler!r}: use {', '.join(SAMPLERS)}")
    pipe = pipe or Pipeline.from_pretrained()
    function = getattr(SAMPLERS[sampler], "func", SAMPLERS[sampler])
    values = [dict(described(pipe, CONVENTIONS[name], function, steps)) for name in (first, second)]
    calls = dict(examples(pipe, CONVENTIONS[first], sampler, steps))
    differences = []
    for name in ENTRIES:
        pair = values[0][name], values[1][name]
        if pair[0] != pair[1]:
            one = with_one(CONVENTIONS[first], CONVENTIONS[second], name, function)
            moved: tuple[float, int] | tuple[None, None] = None, None
            with suppress(ValueError):
                moved = apart(run(pipe, calls[name], CONVENTIONS[first]), run(pipe, calls[name], one))
            differences.append(
                Difference(name, pair, (proof(first, name, sampler), proof(second, name, sampler)), *moved)
            )
    return Explanation((first, second), sampler, pipe.name, tuple(differences))


def described(pipe: "Pipeline", c: Conventions, sampler: Sampler, steps: int) -> Iterator[tuple[str, str]]:
    """Each entry in words; what concerns sigmas in numbers, as it is with this model."""
    from ldm import levels
    from ldm.settings import Settings

    s, theirs = Settings(sampler=sampler, steps=steps, conventions=c), c.reference_of(sampler)
    sigmas = levels.sigmas(s, pipe.schedule)
    between = pipe.schedule.sigma(torch.tensor([10.5]), theirs.log)
    std, at = float(levels.first_std(s, pipe.schedule, sigmas[0])), float(sigmas[0])
    numbers = {
        "spacing": f"{levels.spacing(s, pipe.schedule)}, from {at:.4f}",
        "log": f"linear in {'log ' * theirs.log}sigma, {float(between):.5f} at t = 10.5",
        "start": f"{'sigma' if std == at else 'sqrt(1 + sigma^2)'} = {std:.4f}",
        "end": f"{float(sigmas[-1]):.4f}",
        "strength_rule": f"{levels.plan(replace(s, steps=100, strength=0.29), pipe.schedule).evaluations}",
    }
    for name, (_, words) in ENTRIES.items():
        value = getattr(theirs if name in Reference._fields else c, name)
        yield name, numbers.get(name, words.get(value, str(value)))


def with_one(c: Conventions, other: Conventions, name: str, sampler: Sampler) -> Conventions:
    """The row with one entry of the other."""
    if name not in Reference._fields:
        return replace(c, **{name: getattr(other, name)})
    names = ("spacing", "firm") if name == "spacing" else (name,)
    new = c.reference_of(sampler)._replace(**{n: getattr(other.reference_of(sampler), n) for n in names})
    return replace(c, references={**c.references, sampler: new})


def examples(pipe: "Pipeline", c: Conventions, sampler: str, steps: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """For each entry a call that shows it."""
    plain = {"prompt": "red heart, twemoji style", "sampler": sampler, "steps": steps}
    picture = run(pipe, plain | {"prompt": "slice of pizza, twemoji style", "seed": 1}, CONVENTIONS["ldm"]).images[0]
    width, height = picture.size
    mask = Image.new("L", picture.size)
    ImageDraw.Draw(mask).ellipse((width // 4, height // 4, 3 * width // 4, 3 * height // 4), fill=255)
    masked = {"image": picture, "mask": mask.filter(ImageFilter.GaussianBlur(width // 16)), "strength": 0.9}
    churn = {"sampler": "euler", "sampler_options": {"s_churn": 10.0, "s_tmax": 3.0}}
    second = c.last_layer + (-1 if c.last_layer < 0 else 1)
    own: dict[str, dict[str, Any]] = {
        "strength_rule": {"image": picture, "strength": 0.29, "steps": 100},
        "samples_posterior": {"image": picture, "strength": 0.5},
        "shares": {"batch_size": 2},
        "loop_seed": {"sampler": "euler_ancestral"},
        "idle_draws": masked | churn,
        "blend": masked,
        "paste_back": masked,
        "emphasis": {"prompt": "(red:1.3) heart, twemoji style"},
        "last_layer": {"clip_skip": second},
        "cuts_negative": {"clip_skip": second, "negative_prompt": "blue"},
    }
    for name in ENTRIES:
        yield name, plain | own.get(name, {})


def run(pipe: "Pipeline", call: Mapping[str, Any], how: Conventions) -> "Output":
    return pipe(**call, conventions=how, progress=False)


def apart(a: "Output", b: "Output") -> tuple[float, int]:
    """The largest difference of latents, and of pixels."""
    assert a.latents is not None and b.latents is not None, "of one run each"
    pixels = (np.asarray(one, int) - np.asarray(other, int) for one, other in zip(a.images, b.images, strict=True))
    return float((a.latents - b.latents).abs().max()), max(int(np.abs(difference).max()) for difference in pixels)
