"""The text in a picture's file: what is written comes back, and what webui and others wrote is understood."""

import argparse
import re
import shlex
import subprocess
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

import ldm
from ldm import SAMPLERS, Settings
from ldm import parameters as module
from ldm.arguments import generate_parser
from ldm.guidance import GUIDANCES
from ldm.image import save
from ldm.parameters import parameters, parse, read, split
from ldm.replay import fingerprint, options_of, recipe, shell_quote, with_files
from ldm.samplers import SPACINGS, euler
from ldm.settings import CHOICES

PICTURE = Image.new("RGB", (8, 8))
MADE_WITH = f"Version: ldm {ldm.__version__}, Torch: {torch.__version__}"


def written(settings, index=0, size=(64, 64), options=None):
    return parameters(settings, index, size, "m", options)


def read_back(text):
    """The settings, and whatever else the text says."""
    values, names = parse(text), {field.name for field in fields(Settings)}
    return {k: v for k, v in values.items() if k in names}, {k: v for k, v in values.items() if k not in names}


def test_as_webui_writes_it():
    s = Settings("a\nb, c", negative_prompt="d", steps=5, sampler="ddim", sigmas="trailing", seed=2, eta=0.5)
    assert parameters(s, 0, (64, 48), "my, model") == (
        "a\nb, c\n"
        "Negative prompt: d\n"
        'Steps: 5, Sampler: ddim, CFG scale: 7.5, Seed: 2, Size: 64x48, Model: "my, model", Eta: 0.5,'
        f" Schedule type: trailing, {MADE_WITH}"
    )


def test_defaults_are_not_written():
    line = "Steps: 20, Sampler: euler, CFG scale: 7.5, Seed: 0, Size: 64x64, Model: m"
    assert written(Settings("a")) == f"a\n{line}, {MADE_WITH}"
    assert written(Settings("a", clip_skip=2)) == f"a\n{line}, Clip skip: 2, {MADE_WITH}"
    assert written(Settings("a", emphasis=None)) == f"a\n{line}, Emphasis: None, {MADE_WITH}"
    assert written(Settings("a", negative_prompt="")) == f"a\nNegative prompt: \n{line}, {MADE_WITH}"


def test_the_strength_is_written_where_it_means_something():
    assert "Denoising strength: 0.75" in written(Settings("a", image=PICTURE))
    assert "Denoising strength" not in written(Settings("a"))


def test_batches():
    s = Settings("a", batch_size=3, seed=7)
    texts = [written(s, i) for i in range(3)]
    assert [re.search(r"Seed: (\d+), .*Batch size: 3, Batch pos: (\d)", text).groups() for text in texts] == [
        ("7", "0"),
        ("8", "1"),
        ("9", "2"),
    ]
    assert [read_back(text)[0]["seed"] for text in texts] == [7, 7, 7]


def test_lists():
    """What only Python can ask for: each picture says its own, and what the whole call was."""
    s = Settings(["a", "b, c"], negative_prompt=["", "x"], seed=[4, 2], sigmas=torch.tensor([0.1, 0.01, 0.0]))
    text = written(s, 1)
    assert text.startswith("b, c\nNegative prompt: x\nSteps: 2, ") and "Seed: 2, " in text
    back, other = read_back(text)
    assert (back["prompt"], back["negative_prompt"], back["seed"]) == (("a", "b, c"), ("", "x"), (4, 2))
    assert torch.equal(back["sigmas"], s.sigmas.double()) and other["batch_pos"] == 1
    assert Settings(**back).seeds == s.seeds and Settings(**back).texts == s.texts
    made = recipe(text, generate_parser())
    assert made.problems == ["Negative prompt: ('', 'x') (a list, which only Python can give)"]
    again = generate_parser().parse_args(made.argv)
    assert again.sigmas == tuple(s.sigmas.double().tolist())


def test_what_no_text_holds_is_named():
    s = Settings("a", latents=torch.zeros(1, 4, 8, 8), noise=torch.zeros(1, 4, 8, 8))
    assert "Latents: <Tensor>" in written(s) and "Noise: <Tensor>" in written(s)
    made = recipe(written(s), generate_parser())
    assert [line.partition(":")[0] for line in made.problems] == ["Latents", "Noise"]
    assert recipe(written(Settings("a", image=PICTURE)), generate_parser()).problems
    own = recipe(written(Settings("a", sampler=lambda *_: iter(()))), generate_parser())
    assert own.problems == ["Sampler: <lambda> (given from Python, which no text holds)"]
    assert not recipe(written(Settings("a", sampler=euler)), generate_parser()).problems


def test_only_the_guidances_that_ship_are_named():
    """A function of the same name is another."""

    def apg(eps_cond, eps_uncond, sigma):
        return eps_cond

    for function, said in ((apg, "<apg>"), (lambda a, b, sigma: a, "<lambda>")):
        own = recipe(written(Settings("a", guidance=function)), generate_parser())
        assert own.problems == [f"Guidance: {said} (given from Python, which no text holds)"]
    for guidance in ("apg", GUIDANCES["apg"]):
        made = recipe(written(Settings("a", guidance=guidance)), generate_parser())
        assert not made.problems and made.argv == ["a", "--guidance", "apg"]
    text = written(Settings("a")).replace("Sampler: euler", "Sampler: euler, Guidance: cads")
    assert recipe(text, generate_parser()).problems == [f"Guidance: cads (not among {', '.join(GUIDANCES)})"]


@dataclass(frozen=True, eq=False)
class Later(Settings):
    """With settings that are not there yet, of every kind."""

    some_number: float = 0.0
    some_words: str = "original"
    some_pixels: int | None = None
    some_switch: bool = True
    some_sides: tuple[int, int, int, int] | None = None


def test_settings_that_are_added_later():
    own = {"some_number": 0.1, "some_words": "latent noise", "some_switch": False, "some_sides": (0, 8, 0, 8)}
    text = written(Later("a", **own))
    assert 'Some sides: "[0, 8, 0, 8]"' in text and "Some switch: false" in text
    assert "Some pixels" not in text and "Some number: 0.1" in text and "Some words: latent noise" in text
    values = parse(text)
    assert {key: values[key] for key in own} == own


def test_variations():
    s = Settings("a", batch_size=2, seed=3, subseed=8, subseed_strength=0.25, seed_resize_from=(48, 64), tiling="both")
    text = written(s, 1)
    assert "Seed: 3, " in text and "Variation seed: 9, Variation seed strength: 0.25, " in text
    assert "Seed resize from: 48x64, " in text and "Tiling: True, " in text
    back, _ = read_back(text)
    assert (back["seed"], back["subseed"], back["tiling"]) == (3, 8, "both")
    assert "Tiling: x, " in written(Settings("a", tiling="x"))


def test_a_list_of_seeds():
    """One prompt, a picture for each: the command line can say it."""
    text = written(Settings("a", seed=[4, 2, 9]), 1)
    assert "Seed: 2, " in text and 'Seeds: "[4, 2, 9]"' in text
    made = recipe(text, generate_parser())
    assert (made.argv, made.index, made.count, made.problems) == (["a", "--seed", "4,2,9"], 1, 3, [])


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=30) | st.sampled_from(
    ["Negative prompt: a", "a\nNegative prompt:", "\n", " a ", "Steps: 1, Sampler: b, Seed: 3", '"', "null", "\r\n"]
)
SHARES = st.floats(0, 1)
PAIRS = st.tuples(st.integers(1, 10**6), st.integers(1, 10**6))
NUMBERS = st.floats(allow_nan=False, allow_infinity=False)
SIDES = st.tuples(*[st.integers(1, 999)] * 4)
IMAGE = {"image": st.just(PICTURE)}
EDITS = st.one_of(
    st.just({}),
    st.fixed_dictionaries(
        IMAGE
        | {"mask": st.just(PICTURE), "mask_blur": st.floats(0, 99), "padding_mask_crop": st.none() | st.integers(0)}
    ),
    st.fixed_dictionaries(IMAGE | {"extend": SIDES, "tile_overlap": st.none() | st.integers(0, 99)}),
    st.fixed_dictionaries(IMAGE | {"tile": st.none() | st.integers(1, 999)}),
    st.fixed_dictionaries({"enlarge": st.floats(1, 9), "enlarge_filter": st.sampled_from(CHOICES["enlarge_filter"])}),
    st.fixed_dictionaries({"tiling": st.sampled_from(["x", "y", "both"])}),
)
VARIED = st.fixed_dictionaries(
    {"subseed": st.integers(0, 2**63), "subseed_strength": SHARES, "seed_resize_from": st.none() | PAIRS}
)


def later(prompt, edits, varied, **others):
    if others["sampler"] == "euler_cfg_pp":
        others["guidance"] = "cfg"
    if others["sampler"] == "euler_cfg_pp" or others["guidance"] == "cfg_pp":
        others["guidance_scale"] = others["strength"]  # from 0 to 1 as well
    return Later(prompt, **others, **edits, **varied)


SINGLE = st.builds(
    later,
    TEXTS,
    EDITS,
    VARIED | st.just({}),
    negative_prompt=st.none() | TEXTS,
    steps=st.integers(1, 1000),
    guidance_scale=NUMBERS | st.integers(-5, 50),
    sampler=st.sampled_from(sorted(SAMPLERS)),
    sigmas=st.none() | st.sampled_from(sorted(SPACINGS)),
    seed=st.integers(0, 2**63),
    batch_size=st.integers(1, 4),
    width=st.none() | st.integers(1, 5000),
    height=st.none() | st.integers(1, 5000),
    clip_skip=st.integers(1, 12),
    strength=SHARES,
    guidance=st.sampled_from(sorted(GUIDANCES)),
    guidance_interval=st.none() | st.tuples(SHARES, st.floats(1.5, 99)),
    guidance_rescale=SHARES,
    deep_cache=st.integers(1, 9),
    token_merging=st.floats(0, 0.75),
    original_size=st.none() | PAIRS,
    crops_coords_top_left=PAIRS,
    target_size=st.none() | PAIRS,
    aesthetic_score=NUMBERS,
    negative_aesthetic_score=NUMBERS,
    refiner_start=SHARES,
    emphasis=st.sampled_from(["mean", "none", None]),
    strength_rule=st.sampled_from(CHOICES["strength_rule"]),
    masked_content=st.sampled_from(CHOICES["masked_content"]),
    blend=st.sampled_from(CHOICES["blend"]),
    extend_fill=st.sampled_from(CHOICES["extend_fill"]),
    paste_back=st.booleans(),
    some_number=NUMBERS,
    some_words=TEXTS,
    some_pixels=st.none() | st.integers(),
    some_switch=st.booleans(),
    some_sides=st.none() | st.tuples(*[st.integers(0, 999)] * 4),
)


@given(SINGLE, st.integers(0, 3), st.sampled_from([".png", ".jpg", ".webp", ".avif"]))
@example(Later("null", some_words="1e5"), 0, ".png")
@hypothesis_settings(deadline=None, max_examples=150)
def test_any_settings_come_back(tmp_path_factory, s, index, suffix):
    index %= s.batch_size
    text = written(s, index)
    file = tmp_path_factory.getbasetemp() / f"x{suffix}"
    save(PICTURE, file, text, force=True)
    assert read(file) == text
    values, defaults = parse(text), {field.name: field.default for field in fields(Later)}
    for name in ("image", "mask"):  # their files are the command line's to name
        defaults.pop(name)
    back = {name: values.get(name, default) for name, default in defaults.items()}
    if s.image is None and s.enlarge == 1:  # it means nothing there, and is not written
        s = replace(s, strength=Settings.strength)
    assert back == {name: getattr(s, name) for name in defaults}
    assert [type(v) for v in back.values()] == [type(getattr(s, name)) for name in defaults]
    assert values.get("batch_pos", 0) == index


@given(st.lists(TEXTS, min_size=1, max_size=3), st.data())
@hypothesis_settings(deadline=None, max_examples=50)
def test_any_lists_come_back(prompts, data):
    n = len(prompts)
    negative = data.draw(st.none() | TEXTS | st.lists(TEXTS, min_size=n, max_size=n))
    seed = data.draw(st.integers(0, 2**63) | st.lists(st.integers(0, 2**63), min_size=n, max_size=n))
    s, index = Settings(prompts, negative_prompt=negative, seed=seed), data.draw(st.integers(0, n - 1))
    back = Settings(**read_back(written(s, index))[0])
    assert (back.texts, back.negative_texts, back.seeds) == (s.texts, s.negative_texts, s.seeds)
    assert (back.negative_prompt is None) == (negative is None)


def test_numbers_of_numpy():
    s = Settings("a", steps=np.int64(3), guidance_scale=np.float32(0.1), seed=np.array([np.int64(5)]))
    back, _ = read_back(written(s))
    assert (back["steps"], back["guidance_scale"], back["seed"]) == (3, float(np.float32(0.1)), 5)


@given(st.text() | st.from_regex(module.FIELD))
@hypothesis_settings(deadline=None, max_examples=150)
@example("a\nSteps: 1, Seed: 2, Schedule type: {}, Sampler: []")
@example("a\nSteps: x, Seed: null, Size: 3, Lora: 5, TI: [], Files: 3, Version: ldm 9")
@example("a\nSteps: 1, Seed: 2, Prompts: 3, Negative prompts: {}")
@example("a\nSteps: 1, Seed: 2, Batch pos: 3, Batch size: x")
@example("a\nSteps: 1, Seed: 2, Batch pos: 3")
@example("a\nSteps: 1, Seed: 2, x1: " + "[" * 100000)
def test_any_text_is_read(text):
    made = recipe(text, generate_parser())
    assert 0 <= made.index < made.count
    generate_parser().parse_args(made.argv)


WEBUI = """\
masterpiece, (a cat:1.2) <lora:add_detail:0.5>
second line
Negative prompt: EasyNegative, blurry
worse
Steps: 25, Sampler: Euler, Schedule type: Karras, CFG scale: 7, Seed: 965400086, Size: 512x768, \
Model hash: c0d1994c73, Model: realistic, VAE: kl-f8.ckpt, Denoising strength: 0.4, Clip skip: 2, ENSD: 31337, \
Batch size: 2, Batch pos: 1, Lora hashes: "add_detail: 7c6bad76eb54, x: y", \
Hashes: {"model": "c0d1994c73", "vae": "735e4c3a44"}, Version: v1.10.1"""


def test_a_picture_of_webui():
    prompt, negative, listed = split(WEBUI)
    assert prompt == "masterpiece, (a cat:1.2) <lora:add_detail:0.5>\nsecond line"
    assert negative == "EasyNegative, blurry\nworse"
    assert listed["Lora hashes"] == "add_detail: 7c6bad76eb54, x: y" and listed["Version"] == "v1.10.1"
    back, _ = read_back(WEBUI)
    assert back == {
        "prompt": prompt,
        "negative_prompt": negative,
        "steps": 25,
        "sampler": "euler",
        "sigmas": "karras",
        "guidance_scale": 7,
        "seed": 965400085,
        "batch_size": 2,
        "width": 512,
        "height": 768,
        "strength": 0.4,
        "clip_skip": 2,
    }
    made = recipe(WEBUI, generate_parser())
    assert made.made_with is None and (made.index, made.count) == (1, 2)
    assert made.problems == [
        "VAE: kl-f8.ckpt (where it is here is for you to say, --vae FILE)",
        "ENSD: 31337 (this version has no such option)",
        "Model: realistic (where it is here is for you to say, --model FILE)",
        "the picture it started from (not in the text, --image FILE)",
        "<lora:...> in the prompt (given here as --lora FILE:SCALE)",
    ]
    a = generate_parser().parse_args(made.argv)
    assert (a.prompt, a.negative_prompt, a.steps, a.sampler, a.sigmas) == ([prompt], negative, 25, "euler", "karras")
    assert (a.seed, a.n, a.width, a.height, a.strength, a.clip_skip) == (965400085, 2, 512, 768, 0.4, 2)


def test_what_webui_can_and_this_version_cannot():
    line = "Steps: 5, Sampler: DPM fast, Schedule type: Turbo, CFG scale: 7, Seed: 1, Size: 8x8, Emphasis: Original"
    assert recipe(f"a\n{line}", generate_parser()).problems == [
        f"Sampler: DPM fast (not among {', '.join(SAMPLERS)})",
        "Emphasis: Original (not among mean, none, off)",
        f"Sigmas: Turbo ('Turbo' is not among {', '.join(SPACINGS)}, and no list of sigmas, 14,5,1,0)",
    ]
    old = parse("a\nSteps: 5, Sampler: Euler Karras, CFG scale: 7, Seed: 1, Size: 8x8")
    assert (old["sampler"], old["sigmas"]) == ("euler", "karras")
    assert parse("a\nSteps: 5, Sampler: Euler, Schedule type: Automatic, Seed: 1")["sigmas"] is None


def test_pictures_that_webui_enlarged_or_inpainted():
    line = "Steps: 5, Sampler: Euler, CFG scale: 7, Seed: 1, Size: 8x8, Denoising strength: 0.7"
    made = recipe(f"a\n{line}, Hires upscale: 2, Hires upscaler: Latent (bicubic)", generate_parser())
    assert not made.problems  # it began with text
    a = generate_parser().parse_args(made.argv)
    assert (a.enlarge, a.enlarge_filter, a.strength, a.width, a.height) == (2, "latent-bicubic", 0.7, 8, 8)
    area = "Masked content: latent noise, Inpaint area: Only masked, Masked area padding: 32, Mask blur: 4"
    made = recipe(f"a\n{line}, {area}", generate_parser())
    assert made.problems == [
        "the picture it started from (not in the text, --image FILE)",
        "its mask (not in the text, --mask FILE)",
    ]
    a = generate_parser().parse_args(made.argv)
    assert (a.mask_blur, a.masked_content, a.padding_mask_crop) == (4, "noise", 32)


@pytest.mark.parametrize("prompts", [["a", "b, c"], ["-a", "b"], ["--steps", "Negative prompt: x", "a\nb"]])
def test_prompts(prompts):
    """Several on the command line: a picture of each."""
    s = Settings(prompts, batch_size=2, seed=3)
    for index in range(2 * len(prompts)):
        made = recipe(written(s, index), generate_parser())
        assert not made.problems and (made.index, made.count) == (index, 2 * len(prompts))
        a = generate_parser().parse_args(made.argv)
        assert (a.prompt, a.n, a.seed) == (prompts, 2, 3)


def test_a_prompt_alone():
    assert split("a cat: black, Steps: 3\nand white") == ("a cat: black, Steps: 3\nand white", None, {})
    assert split("a\nthe cat: black, Steps: 3") == ("a\nthe cat: black, Steps: 3", None, {})
    assert recipe("a cat", generate_parser()).argv == ["a cat"]


# An example of every option of `ldm generate` that makes a picture what it is.
OPTIONS = {
    "negative_prompt": ["--negative-prompt", "-1 \"x\" 'y'"],
    "steps": ["--steps", "7"],
    "guidance_scale": ["--guidance-scale=-1e-05"],
    "sampler": ["--sampler", "ddim"],
    "sigmas": ["--sigmas", "karras"],
    "eta": ["--sampler", "ddim", "--eta", "0.1"],
    "sampler_options": ["--sampler-options", "s_churn=10", "s_noise=0.30000000000000004"],
    "guidance": ["--guidance", "perp_neg"],
    "guidance_options": ["--guidance", "apg", "--guidance-options", "norm_threshold=15", "eta=0.30000000000000004"],
    "guidance_interval": ["--guidance-interval", "0.30000000000000004", "inf"],
    "guidance_rescale": ["--guidance-rescale", "0.30000000000000004"],
    "deep_cache": ["--deep-cache", "3"],
    "token_merging": ["--token-merging", "0.30000000000000004"],
    "seed": ["--seed", "18446744073709551610,3"],
    "n": ["-n", "3"],
    "subseed": ["-n", "2", "--seed", "5", "--subseed", "7,3"],
    "subseed_strength": ["-n", "2", "--seed", "5", "--subseed", "7", "--subseed-strength", "0.1"],
    "seed_resize_from": ["--seed-resize-from", "48", "64"],
    "tiling": ["--tiling", "both"],
    "width": ["--width", "48"],
    "height": ["--height", "40"],
    "clip_skip": ["--clip-skip", "2"],
    "emphasis": ["--emphasis", "off"],
    "conventions": ["--conventions", "webui"],
    "image": ["--image", "in put.png"],
    "strength": ["--image", "in put.png", "--strength", "0.1"],
    "strength_rule": ["--image", "in put.png", "--strength-rule", "webui"],
    "mask": ["--image", "in put.png", "--mask", "in put.png"],
    "mask_blur": ["--image", "in put.png", "--mask", "in put.png", "--mask-blur", "0.1"],
    "masked_content": ["--masked-content", "nothing"],
    "blend": ["--blend", "noise"],
    "paste_back": ["--no-paste-back"],
    "padding_mask_crop": ["--image", "in put.png", "--mask", "in put.png", "--padding-mask-crop", "0"],
    "extend": ["--image", "in put.png", "--extend", "0", "8", "0", "0"],
    "extend_fill": ["--extend-fill", "mirror"],
    "enlarge": ["--enlarge", "1.7"],
    "enlarge_filter": ["--enlarge-filter", "lanczos"],
    "tile": ["--image", "in put.png", "--tile", "64"],
    "tile_overlap": ["--tile-overlap", "16"],
    "model": ["--model", "a, b: c.safetensors"],
    "revision": ["--model", "owner/name", "--revision", "main"],
    "vae": ["--vae", "7"],
    "lora": ["--lora", "a, b: c.safetensors:0.30000000000000004", "--lora", "b:2", "--lora", "7:-1"],
    "embedding": ["--embedding", "word=7", "--embedding", "a, b: c.safetensors"],
    "refiner": ["--refiner", "a, b: c.safetensors"],
    "refiner_start": ["--refiner", "7", "--refiner-start", "0.1"],
    "original_size": ["--original-size", "3", "4"],
    "crops_coords_top_left": ["--crops-coords-top-left", "0", "4"],
    "target_size": ["--target-size", "3", "4"],
    "aesthetic_score": ["--aesthetic-score", "1"],
    "negative_aesthetic_score": ["--negative-aesthetic-score=-1"],
    "dtype": ["--dtype", "bfloat16"],
    "vae_dtype": ["--vae-dtype", "bfloat16"],
    "device": ["--device", "cpu"],
    "prediction_type": ["--prediction-type", "epsilon"],
    "threads": ["--threads", "3"],
    "quality": ["--quality", "33"],
    "max_bytes": ["--max-bytes", "1.5k"],
}


@pytest.fixture
def inputs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    PICTURE.save("in put.png")
    for name in ("a, b: c.safetensors", "b:2", "7"):
        Path(name).write_text(name)


def test_no_option_is_forgotten():
    options = {action.dest for action in generate_parser()._actions}
    about = {"prompt", "prompts", "out", "batch", "help", "output", "force", "quiet", "plan"}
    assert options - set(OPTIONS) == about
    assert not set(OPTIONS) - options


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("prompt", ["a", "--steps", 'it\'s\n\t\\ "$HOME" `x` !\x07'])
def test_every_option_comes_back(inputs, option, prompt, monkeypatch):
    """Command -> settings -> text -> command, through a shell -> the same arguments."""
    a = generate_parser().parse_args([*OPTIONS[option], "--", prompt])
    assert getattr(a, option) != generate_parser().get_default(option)
    names = {field.name for field in fields(Settings)}
    arguments = {k: v for k, v in vars(a).items() if k in names - {"image", "mask", "refiner"}}
    arguments |= {"batch_size": a.n, "emphasis": None if a.emphasis == "off" else a.emphasis}
    for name in ("sampler_options", "guidance_options"):
        arguments[name] = getattr(a, name) and dict(getattr(a, name))
    arguments |= {k: PICTURE for k in ("image", "mask") if getattr(a, k) is not None}
    if a.refiner is not None:
        arguments["refiner"] = argparse.Namespace(name="r")
    s = Settings(**arguments)
    options = with_files(options_of(a, generate_parser().parse_args([""])))
    for index in range(s.count):
        made = recipe(written(s, index, options=options), generate_parser())
        assert not made.problems and (made.index, made.count) == (index, s.count)
        made.check_files()
        assert generate_parser().parse_args(made.argv) == a
    command = made.command(Path("x y.png"))
    assert command.isprintable()
    words = subprocess.run(["bash", "-c", f"printf '%s\\0' {command}"], capture_output=True, text=True).stdout
    ldm_, verb, output, *argv = words.split("\0")[:-1]
    assert (ldm_, verb, output, argv) == ("ldm", "generate", "--output=x y.png", made.argv)


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")))
@hypothesis_settings(deadline=None)
def test_words_for_a_shell(word):
    if shell_quote(word).startswith("$'"):
        body = shell_quote(word)[2:-1]
        assert "\n" not in body and re.fullmatch(r"(\\.|[^\\'])*", body)
    else:
        assert shlex.split(shell_quote(word)) == [word]


def test_files_that_changed(inputs):
    a = generate_parser().parse_args(["a", "--image", "in put.png", "--lora", "7:0.5"])
    options = with_files(options_of(a, generate_parser().parse_args([""])))
    made = recipe(written(Settings("a", image=PICTURE), options=options), generate_parser())
    assert set(made.files) == {"in put.png", "7"}
    made.check_files()
    Path("7").write_text("8")
    with pytest.raises(ValueError, match=r"7 has changed since the picture was made from it: sha256 \w{10} then"):
        made.check_files()
    Path("7").unlink()
    with pytest.raises(ValueError, match="7 does not exist here: the picture was made from it"):
        made.check_files()


def test_fingerprints(tmp_path, monkeypatch):
    file, folder = tmp_path / "a.safetensors", tmp_path / "model"
    file.write_bytes(b"abc")
    assert fingerprint(file) == "7b0393befd"  # sha256 of "3abc", the size and the bytes
    (folder / "unet").mkdir(parents=True)
    (folder / "unet" / "a.safetensors").write_bytes(b"abc")
    assert fingerprint(folder) == fingerprint(file)
    monkeypatch.setattr("ldm.replay.WHOLE", 1 << 20)
    data = bytearray(np.random.default_rng(0).bytes(8 << 20))
    file.write_bytes(data)
    first = fingerprint(file)
    for place in (0, -1, 3 * ((8 << 20) - (1 << 16)) // 63):  # sampled
        changed = bytearray(data)
        changed[place] ^= 1
        file.write_bytes(changed)
        assert fingerprint(file) != first
    file.write_bytes(data + b"x")
    assert fingerprint(file) != first


def test_a_picture_without_settings(tmp_path):
    PICTURE.save(tmp_path / "x.png")
    with pytest.raises(ValueError, match=r"x.png: the picture carries no settings"):
        read(tmp_path / "x.png")
    info = PngImagePlugin.PngInfo()
    info.add_text("Comment", "a")
    PICTURE.save(tmp_path / "x.png", pnginfo=info)
    with pytest.raises(ValueError, match=r"x.png: the picture carries no settings"):
        read(tmp_path / "x.png")
