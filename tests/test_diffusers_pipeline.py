"""Whole runs beside diffusers' pipelines, from prompt and seed to pixels: both load the default model's folder."""

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, StableDiffusionImg2ImgPipeline, StableDiffusionPipeline
from PIL import Image, ImageDraw

import ldm
from ldm.pipeline import DEFAULT_MODEL

SCHEDULERS = {"ddim": DDIMScheduler, "euler": EulerDiscreteScheduler}
HEART, CAT, FIRE, BAD = "a red heart, noto style", "grinning cat, twemoji style", "fire", "blue, blurry"


@pytest.fixture(scope="module")
def pipe():
    return ldm.Pipeline.from_pretrained()


@pytest.fixture(scope="module")
def reference():
    reference = StableDiffusionPipeline.from_pretrained(DEFAULT_MODEL, dtype=torch.float32, local_files_only=True)
    # transformers 5 took `text_model` away, diffusers still looks for it at clip_skip; as a plain attribute, no module.
    object.__setattr__(reference.text_encoder, "text_model", reference.text_encoder)
    reference.set_progress_bar_config(disable=True)
    return reference


def theirs(reference, sampler, seeds=(0,), steps=20, **arguments):
    """diffusers' images and last latents; the scheduler is made as SD 1 users make it."""
    reference.scheduler = SCHEDULERS[sampler].from_config(reference.scheduler.config)
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    latents = []
    images = reference(
        generator=generators if len(generators) > 1 else generators[0],
        num_inference_steps=steps,
        callback_on_step_end=lambda pipe, i, t, now: latents.append(now["latents"]) or {},
        **arguments,
    ).images
    return images, latents[-1]


def assert_same(ours, theirs):
    images, latents = theirs
    assert ours.latents.shape == latents.shape
    assert (ours.latents - latents).abs().max() <= 1e-3
    assert len(ours.images) == len(images)
    for a, b in zip(ours.images, images, strict=True):
        assert (a.mode, a.size) == (b.mode, b.size)
        difference = np.abs(np.asarray(a).astype(int) - np.asarray(b).astype(int))
        assert difference.max() <= 2 and difference.mean() < 0.1


@pytest.mark.parametrize(
    "texts", [[HEART, CAT, FIRE, BAD], ["", "red", "Two  Hearts!", "man: medium-dark skin tone, #1"], ["heart " * 100]]
)
@pytest.mark.filterwarnings("ignore:the prompt has .* tokens")
def test_ids(pipe, reference, texts):
    ids = reference.tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
    assert torch.equal(pipe.tokenizer(texts), ids)


@pytest.mark.parametrize("sampler", SCHEDULERS)
class TestTextToImage:
    def test_negative_prompt(self, pipe, reference, sampler):
        ours = pipe(HEART, negative_prompt=BAD, sampler=sampler, steps=20, seed=5, progress=False)
        assert_same(ours, theirs(reference, sampler, [5], 20, prompt=HEART, negative_prompt=BAD))

    def test_7_steps(self, pipe, reference, sampler):
        """1000 / 7 is no whole number."""
        ours = pipe(CAT, sampler=sampler, steps=7, guidance_scale=3, progress=False)
        assert_same(ours, theirs(reference, sampler, [0], 7, prompt=CAT, guidance_scale=3))

    def test_batch(self, pipe, reference, sampler):
        ours = pipe([HEART, CAT], negative_prompt=[BAD, FIRE], sampler=sampler, steps=7, seed=[3, 0], progress=False)
        arguments = {"prompt": [HEART, CAT], "negative_prompt": [BAD, FIRE]}
        assert_same(ours, theirs(reference, sampler, [3, 0], 7, **arguments))

    def test_batch_size(self, pipe, reference, sampler):
        ours = pipe([HEART, CAT], sampler=sampler, steps=4, seed=8, batch_size=2, progress=False)
        arguments = {"prompt": [HEART, CAT], "num_images_per_prompt": 2}
        assert_same(ours, theirs(reference, sampler, [8, 9, 10, 11], 4, **arguments))

    def test_without_guidance(self, pipe, reference, sampler):
        ours = pipe(FIRE, sampler=sampler, steps=7, guidance_scale=1, progress=False)
        assert_same(ours, theirs(reference, sampler, [0], 7, prompt=FIRE, guidance_scale=1))

    def test_not_square(self, pipe, reference, sampler):
        """And of an odd extent at the UNet's middle level."""
        size = {"width": 80, "height": 56}
        ours = pipe(FIRE, sampler=sampler, steps=7, **size, progress=False)
        assert_same(ours, theirs(reference, sampler, [0], 7, prompt=FIRE, **size))

    def test_clip_skip_without_guidance(self, pipe, reference, sampler):
        """diffusers counts the layers that are left out, we (as webui) from the end: 1 there is 2 here."""
        ours = pipe(HEART, sampler=sampler, steps=4, guidance_scale=1, clip_skip=2, progress=False)
        assert_same(ours, theirs(reference, sampler, [0], 4, prompt=HEART, guidance_scale=1, clip_skip=1))

    def test_clip_skip(self, pipe, reference, sampler):
        """We cut the negative prompt too; diffusers does if it is given as the embedding of a prompt."""
        ours = pipe(HEART, negative_prompt=BAD, sampler=sampler, steps=7, clip_skip=3, progress=False)
        cond, uncond = (reference.encode_prompt(text, "cpu", 1, False, clip_skip=2)[0] for text in (HEART, BAD))
        embeddings = {"prompt_embeds": cond, "negative_prompt_embeds": uncond}
        assert_same(ours, theirs(reference, sampler, [0], 7, **embeddings))


def test_eta(pipe, reference):
    """Fresh noise comes from the picture's own generator, after the initial noise."""
    ours = pipe([HEART, CAT], sampler="ddim", steps=7, seed=[3, 0], eta=0.7, progress=False)
    assert_same(ours, theirs(reference, "ddim", [3, 0], 7, prompt=[HEART, CAT], eta=0.7))


@pytest.fixture(scope="module")
def photo():
    """A picture with edges and gradients, and neither square nor of a multiple of 16."""
    x, y = np.meshgrid(np.linspace(0, 255, 72), np.linspace(0, 255, 56))
    image = Image.fromarray(np.stack([x, y, 255 - x], -1).astype(np.uint8))
    ImageDraw.Draw(image).ellipse((20, 10, 50, 45), fill=(250, 220, 30), outline="black", width=3)
    return image


@pytest.fixture(scope="module")
def reference_img2img(reference):
    image_to_image = StableDiffusionImg2ImgPipeline(**reference.components)
    image_to_image.set_progress_bar_config(disable=True)
    return image_to_image


def contiguous(image):
    """(1,3,h,w) in [0,1]. Of a PIL image diffusers makes a channels-last view, whose norms are less exact."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].contiguous() / 255


@pytest.mark.parametrize("sampler", SCHEDULERS)
class TestImageToImage:
    """The noise is the same because the order of the draws is: the VAE posterior's first, then the latents'."""

    @pytest.mark.parametrize("strength", [0.3, 0.5, 0.75])
    def test_strength(self, pipe, reference_img2img, photo, sampler, strength):
        settings = {"prompt": CAT, "negative_prompt": BAD, "strength": strength}
        ours = pipe(**settings, image=photo, sampler=sampler, steps=10, seed=2, progress=False)
        assert_same(ours, theirs(reference_img2img, sampler, [2], 10, **settings, image=contiguous(photo)))

    def test_batch(self, pipe, reference_img2img, photo, sampler):
        settings = {"prompt": [CAT, FIRE], "strength": 0.5}
        ours = pipe(**settings, image=photo, sampler=sampler, steps=7, seed=4, progress=False)
        assert_same(ours, theirs(reference_img2img, sampler, [4, 5], 7, **settings, image=contiguous(photo)))


@pytest.mark.parametrize(
    "change",
    [
        {"prompt": CAT},
        {"negative_prompt": ""},
        {"seed": 1},
        {"steps": 8},
        {"guidance_scale": 7.0},
        {"sampler": "euler"},
        {"sigmas": "trailing"},
        {"clip_skip": 2},
        {"eta": 0.1},
        {"strength": 0.8},
        {"image": Image.new("RGB", (72, 56), "blue")},
    ],
    ids=lambda change: next(iter(change)),
)
def test_the_comparison_would_see_it(pipe, photo, change):
    """Each argument moves the latents by far more than the tolerance: the weights are such that it shows."""
    settings = {"prompt": HEART, "negative_prompt": BAD, "sampler": "ddim", "steps": 7, "image": photo, "strength": 0.6}
    plain, other = (pipe(**s, progress=False) for s in (settings, settings | change))
    assert (plain.latents - other.latents).abs().max() > 0.01
