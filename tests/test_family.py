"""Whole runs of every model of the family beside diffusers: each argument where diffusers' pipelines have it.

What is here is what tests/test_models.py and tests/test_diffusers_pipeline.py (SD 1) leave open.
"""

from functools import cache

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
)
from family import MODELS, assert_close, contiguous, ours, photo, reference, saved, theirs
from PIL import Image, ImageFilter

SAMPLERS = {"ddim": DDIMScheduler, "euler": EulerDiscreteScheduler}
CAT, RED = "a cat", "the red"
NEGATIVES = ({}, {"negative_prompt": ""}, {"negative_prompt": RED})
SIZES = {"original_size": (100, 90), "crops_coords_top_left": (5, 10), "target_size": (70, 60)}
# In diffusers' pipelines that start from an image the crop of the negative half is (0, 0) unless it is given.
THEIR_SIZES = {f"negative_{name}": value for name, value in SIZES.items()} | SIZES
SMALL = {"width": 40, "height": 24}
TOLERANCE = 1e-3


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """made(kind, sampler): our pipeline, from the folder that diffusers wrote, and diffusers'."""

    @cache
    def make(kind, sampler):
        pipe = reference(MODELS[kind], SAMPLERS[sampler])
        return saved(pipe, tmp_path_factory.mktemp("family") / "model"), pipe

    return make


def from_image(pipe):
    """diffusers' image to image with the same parts."""
    xl = "text_encoder_2" in pipe.components
    other = (StableDiffusionXLImg2ImgPipeline if xl else StableDiffusionImg2ImgPipeline)(**pipe.components)
    other.set_progress_bar_config(disable=True)
    return other


def texts_cut(pipe, clip_skip):
    """Both texts as diffusers takes them ready-made: of the negative prompt its `clip_skip` would cut nothing."""
    arguments = {}
    for prefix, text in (("", CAT), ("negative_", RED)):
        options = {"num_images_per_prompt": 1, "do_classifier_free_guidance": False, "clip_skip": clip_skip - 1}
        encoded = pipe.encode_prompt(text, device="cpu", **options)
        arguments[f"{prefix}prompt_embeds"] = encoded[0]
        if len(encoded) == 4:  # SDXL's: context, negative context, pooled, negative pooled
            arguments[f"{prefix}pooled_prompt_embeds"] = encoded[2]
    return arguments


def assert_sees(pipe, settings, changes):
    """Each argument moves the latents by far more than the tolerance: the weights are such that it shows."""
    plain = ours(pipe, **settings)
    for change in changes:
        moved = (ours(pipe, **(settings | change)) - plain).abs().max()
        assert moved > 10 * TOLERANCE, change


@pytest.mark.parametrize("kind", ["SD 2", "SD 2 v", "SDXL"])
class TestTextToImage:
    @pytest.mark.parametrize("sampler", SAMPLERS)
    def test_negative_prompt(self, made, kind, sampler):
        pipe, reference = made(kind, sampler)
        for negative in NEGATIVES:
            common = {"prompt": CAT, **SMALL, **negative}
            assert_close(ours(pipe, 5, sampler=sampler, **common), theirs(reference, 5, **common))

    def test_clip_skip(self, made, kind):
        pipe, reference = made(kind, "euler")
        a = ours(pipe, prompt=CAT, negative_prompt=RED, clip_skip=2, **SMALL)
        assert_close(a, theirs(reference, **texts_cut(reference, 2), **SMALL))

    def test_batch(self, made, kind):
        pipe, reference = made(kind, "euler")
        a = ours(pipe, [3, 0], prompt=[CAT, RED], negative_prompt=[RED, ""], **SMALL)
        for row, seed, text, negative in zip(a, (3, 0), (CAT, RED), (RED, ""), strict=True):
            assert_close(row[None], theirs(reference, seed, prompt=text, negative_prompt=negative, **SMALL))

    def test_the_comparison_would_see_it(self, made, kind):
        changes = [{"prompt": RED}, {"negative_prompt": CAT}, {"clip_skip": 2}, {"seed": 6}, {"guidance_scale": 7.4}]
        changes += [{name: (1, 2)} for name in SIZES] if kind == "SDXL" else []
        settings = {"prompt": CAT, "negative_prompt": RED, **SMALL}
        assert_sees(made(kind, "euler")[0], settings, changes)


@pytest.mark.parametrize("kind", ["SD 2", "SD 2 v", "SDXL", "refiner"])
class TestImageToImage:
    def pair(self, made, kind, sampler):
        pipe, reference = made(kind, sampler)
        return pipe, reference if kind == "refiner" else from_image(reference)

    @pytest.mark.parametrize(("sampler", "strength"), [("ddim", 0.3), ("euler", 0.75)])
    def test_negative_prompt(self, made, kind, sampler, strength):
        pipe, reference = self.pair(made, kind, sampler)
        for negative in NEGATIVES:
            common = {"prompt": CAT, "strength": strength, **negative}
            a = ours(pipe, 2, 7, sampler=sampler, image=photo(), **common)
            assert_close(a, theirs(reference, 2, 7, image=contiguous(photo()), **common))

    def test_clip_skip(self, made, kind):
        pipe, reference = self.pair(made, kind, "euler")
        a = ours(pipe, prompt=CAT, negative_prompt=RED, clip_skip=2, image=photo(), strength=0.6)
        assert_close(a, theirs(reference, image=contiguous(photo()), strength=0.6, **texts_cut(reference, 2)))

    def test_batch(self, made, kind):
        pipe, reference = self.pair(made, kind, "euler")
        common = {"strength": 0.6, "negative_prompt": ""}
        a = ours(pipe, [3, 0], prompt=[CAT, RED], image=photo(), **common)
        for row, seed, text in zip(a, (3, 0), (CAT, RED), strict=True):
            assert_close(row[None], theirs(reference, seed, prompt=text, image=contiguous(photo()), **common))

    def test_the_comparison_would_see_it(self, made, kind):
        changes = [{"prompt": RED}, {"negative_prompt": CAT}, {"clip_skip": 2}, {"seed": 6}, {"strength": 0.8}]
        changes += [{"image": Image.new("RGB", (40, 24), "blue")}]
        settings = {"prompt": CAT, "negative_prompt": RED, "image": photo(), "strength": 0.6}
        assert_sees(made(kind, "euler")[0], settings, changes)


class TestSizesFromAnImage:
    def test_base(self, made):
        pipe, reference = made("SDXL", "euler")
        common = {"prompt": CAT, "negative_prompt": RED, "strength": 0.6}
        b = theirs(from_image(reference), image=contiguous(photo()), **common, **THEIR_SIZES)
        assert_close(ours(pipe, image=photo(), **common, **SIZES), b)
        assert_sees(pipe, {"image": photo(), **common, **SIZES}, [{name: (1, 2)} for name in SIZES])

    def test_refiner(self, made):
        """It is not told the target's size."""
        pipe, reference = made("refiner", "euler")
        common = {"prompt": CAT, "negative_prompt": RED, "strength": 0.6}
        scores = {"aesthetic_score": 5.5, "negative_aesthetic_score": 1.5}
        b = theirs(reference, image=contiguous(photo()), **common, **scores, **THEIR_SIZES)
        assert_close(ours(pipe, image=photo(), **common, **scores, **SIZES), b)
        changes = [{"original_size": (1, 2)}, {"crops_coords_top_left": (1, 2)}, *({name: 3.0} for name in scores)]
        assert_sees(pipe, {"image": photo(), **common, **scores, **SIZES}, changes)


@pytest.mark.parametrize(("sampler", "start"), [("ddim", 0.45), ("euler", 0.8)])
def test_hand_over_from_an_image(made, sampler, start):
    """The base begins at its strength, and both count the hand-over from the schedule's noisy end."""
    (pipe, reference), (second, reference_2) = made("SDXL", sampler), made("refiner", sampler)
    common = {"prompt": CAT, "negative_prompt": RED, "steps": 10}
    scores = {"aesthetic_score": 5.5, "negative_aesthetic_score": 1.5}
    image = {"image": contiguous(photo()), "strength": 0.75}
    latents = theirs(from_image(reference), **common, **image, denoising_end=start)
    b = theirs(reference_2, **common, **scores, image=latents, denoising_start=start)
    image = {"image": photo(), "strength": 0.75}
    settings = {"sampler": sampler, "refiner": second, "refiner_start": start, **common, **scores, **image}
    assert_close(ours(pipe, **settings), b)
    assert_sees(pipe, settings, [{"refiner": None}, {"refiner_start": start - 0.11}, {"aesthetic_score": 3.0}])


def masked():
    """A picture and its mask, for ours and for diffusers."""
    image = photo()
    mask = Image.new("L", image.size)
    mask.paste(255, (8, 4, 28, 18))
    return {"image": image, "mask": mask}, {"image": contiguous(image), "mask_image": mask, **SMALL}


def shown(unet, run):
    """The latents that the net is called with."""
    inputs = []
    hook = unet.register_forward_pre_hook(lambda net, arguments: inputs.append(arguments[0]))
    run()
    hook.remove()
    return inputs


@pytest.mark.parametrize("kind", ["SD 1 inpainting", "SD 2 inpainting", "SDXL inpainting"])
class TestInpainting:
    """Models with nine channels, which see the mask and the picture without what it hides."""

    @pytest.mark.parametrize("strength", [0.6, 1.0])
    @pytest.mark.parametrize("sampler", SAMPLERS)
    def test_negative_prompt(self, made, kind, sampler, strength):
        (pipe, reference), (mine, others) = made(kind, sampler), masked()
        for negative in NEGATIVES:
            common = {"prompt": CAT, "strength": strength, **negative}
            a = ours(pipe, 2, sampler=sampler, **mine, **common)
            assert_close(a, theirs(reference, 2, **others, **common))

    def test_clip_skip(self, made, kind):
        (pipe, reference), (mine, others) = made(kind, "euler"), masked()
        a = ours(pipe, prompt=CAT, negative_prompt=RED, clip_skip=2, strength=1.0, **mine)
        assert_close(a, theirs(reference, strength=1.0, **others, **texts_cut(reference, 2)))

    @pytest.mark.parametrize("strength", [0.6, 1.0])
    @pytest.mark.parametrize("sampler", SAMPLERS)
    def test_batch(self, made, kind, sampler, strength):
        (pipe, reference), (mine, others) = made(kind, sampler), masked()
        common = {"strength": strength, "negative_prompt": ""}
        a = ours(pipe, [3, 0], prompt=[CAT, RED], sampler=sampler, **mine, **common)
        for row, seed, text in zip(a, (3, 0), (CAT, RED), strict=True):
            assert_close(row[None], theirs(reference, seed, prompt=text, **others, **common))

    @pytest.mark.parametrize("strength", [0.6, 1.0])
    def test_what_the_net_is_shown(self, made, kind, strength):
        """The official order: 4 channels of noisy latents, the mask, 4 of the picture without what it hides. The noises
        in the first and the last are of one generator: their draws come in the reference's order."""
        (pipe, reference), (mine, others) = made(kind, "euler"), masked()
        common = {"prompt": CAT, "strength": strength}
        a = shown(pipe.unet, lambda: ours(pipe, 2, **mine, **common))
        b = shown(reference.unet, lambda: theirs(reference, 2, **others, **common))
        assert len(a) == len(b) == int(5 * strength)
        for x, y in zip(a, b, strict=True):
            assert x.shape == (2, 9, 12, 20) and torch.equal(x[:, 4], y[:, 4])
            assert_close(x, y)
        mask = a[0][:, 4]
        assert (mask[:, 2:9, 4:14] == 1).all() and mask.sum() == 2 * 7 * 10  # half of (8, 4, 28, 18)
        assert all(torch.equal(x[:, 4:], a[0][:, 4:]) for x in a)

    def test_the_comparison_would_see_it(self, made, kind):
        mine, _ = masked()
        changes = [{"prompt": RED}, {"negative_prompt": CAT}, {"clip_skip": 2}, {"seed": 6}, {"strength": 0.8}]
        changes += [{"image": Image.new("RGB", (40, 24), "blue")}, {"mask": Image.new("L", (40, 24))}]
        settings = {"prompt": CAT, "negative_prompt": RED, "strength": 1.0, **mine}
        assert_sees(made(kind, "euler")[0], settings, changes)


def inpainter(pipe):
    """diffusers' inpainting with a model of four channels and the same parts."""
    xl = "text_encoder_2" in pipe.components
    other = (StableDiffusionXLInpaintPipeline if xl else StableDiffusionInpaintPipeline)(**pipe.components)
    other.set_progress_bar_config(disable=True)
    return other


@pytest.mark.parametrize("kind", ["SD 1", "SD 2 v", "SDXL"])
class TestInpaintingWithAnyModel:
    """Four channels: diffusers lays the same noise on what is kept again after every step."""

    @pytest.mark.parametrize("sampler", SAMPLERS)
    @pytest.mark.parametrize("strength", [0.3, 0.6, 1.0])
    def test_renoised(self, made, kind, sampler, strength):
        (pipe, reference), (mine, others) = made(kind, sampler), masked()
        common = {"prompt": CAT, "negative_prompt": RED, "strength": strength}
        b = theirs(inpainter(reference), 2, 7, **others, **common)
        own = {"sampler": sampler, "blend": "noise", "strength_rule": "diffusers"}
        assert_close(ours(pipe, 2, 7, **mine, **common, **own), b)
        if strength < 1:  # of a hard mask and without fresh noise, x0 is blended to the same
            assert_close(ours(pipe, 2, 7, **mine, **common, **(own | {"blend": "x0"})), b)

    def test_batch(self, made, kind):
        (pipe, reference), (mine, others) = made(kind, "euler"), masked()
        common = {"strength": 0.6, "negative_prompt": ""}
        a = ours(pipe, [3, 0], prompt=[CAT, RED], blend="noise", **mine, **common)
        for row, seed, text in zip(a, (3, 0), (CAT, RED), strict=True):
            assert_close(row[None], theirs(inpainter(reference), seed, prompt=text, **others, **common))

    def test_the_comparison_would_see_it(self, made, kind):
        mine, _ = masked()
        changes = [{"seed": 6}, {"strength": 0.8}, {"image": Image.new("RGB", (40, 24), "blue")}]
        changes += [{"mask": Image.new("L", (40, 24), 255)}, {"masked_content": "nothing"}, {"masked_content": "fill"}]
        changes += [{"mask": mine["mask"].filter(ImageFilter.GaussianBlur(2))}]
        settings = {"prompt": CAT, "negative_prompt": RED, "strength": 0.6, "blend": "noise", **mine}
        assert_sees(made(kind, "euler")[0], settings, changes)


@pytest.mark.parametrize("kind", ["SD 1", "SD 1 inpainting"])
def test_only_masked(made, kind):
    """diffusers' padding_mask_crop, to the pixel: the box is cut out, inpainted at the model's size and put back."""
    pipe, reference = made(kind, "ddim")
    image = photo(96, 80)
    mask = Image.new("L", image.size)
    mask.paste(255, (30, 20, 60, 45))
    common = {"prompt": CAT, "negative_prompt": RED, "strength": 0.6, "padding_mask_crop": 6}
    other = inpainter(reference)
    generator = torch.Generator().manual_seed(2)
    sizes = {"width": 64, "height": 64, "num_inference_steps": 5}
    b = other(generator=generator, image=image, mask_image=mask, **common, **sizes).images[0]
    a = pipe(seed=2, steps=5, image=image, mask=mask, blend="noise", sampler="ddim", progress=False, **common).images[0]
    difference = np.abs(np.asarray(a).astype(int) - np.asarray(b).astype(int))
    assert a.size == b.size == image.size and (np.asarray(a) != np.asarray(image)).any()
    assert difference.max() <= 2


@pytest.mark.parametrize("kind", ["SD 1", "SD 1 inpainting", "SDXL inpainting", "SD 2 v"])
def test_outpainting(made, kind, monkeypatch):
    """The picture stays, in every kind. An inpainting model is shown the hard mask, any other grows the new part out of
    what the canvas was filled with."""
    pipe, image, masks = made(kind, "ddim")[0], photo(50, 44), []
    real = pipe._run
    monkeypatch.setattr(pipe, "_run", lambda s, *rest: masks.append(np.asarray(s.mask)) or real(s, *rest))
    out = pipe(CAT, image=image, extend=(40, 7, 3, 0), strength=1.0, steps=2, progress=False).images[0]
    assert out.size == (93, 51) and np.array_equal(out.crop((40, 7, 90, 51)), image)
    levels = set(np.unique(np.concatenate([mask.ravel() for mask in masks])))
    assert (levels == {0, 255}) == (pipe.unet.config.in_channels == 9) and len(masks) == 2


def test_sizes_of_inpainting(made):
    pipe, reference = made("SDXL inpainting", "euler")
    common = {"prompt": CAT, "negative_prompt": RED, "strength": 0.6}
    mine, others = masked()
    assert_close(ours(pipe, **mine, **common, **SIZES), theirs(reference, **others, **common, **THEIR_SIZES))
    assert_sees(pipe, {**mine, **common, **SIZES}, [{name: (1, 2)} for name in SIZES])
