"""Whole edits with the default model: inpainting, outpainting, enlarging, tiles."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFilter

import ldm
from ldm.img2img import extended, tiles
from ldm.run import first_noise, noise_of
from ldm.samplers import SAMPLERS

HEART = "a red heart"
QUICK = {"steps": 3, "progress": False}


@pytest.fixture(scope="module")
def pipe():
    return ldm.Pipeline.from_pretrained()


@pytest.fixture(scope="module")
def picture():
    """Gradients, edges and some noise, and no side a multiple of 8."""
    x, y = np.meshgrid(np.linspace(0, 255, 70), np.linspace(0, 255, 51))
    image = Image.fromarray(np.stack([x, y, 255 - x], -1).astype(np.uint8))
    ImageDraw.Draw(image).ellipse((15, 10, 50, 45), fill=(250, 220, 30), outline="black", width=3)
    noise = np.random.default_rng(0).integers(0, 9, (51, 70, 3))
    return Image.fromarray((np.asarray(image) * 0.95 + noise).astype(np.uint8))


@pytest.fixture(scope="module")
def mask(picture):
    mask = Image.new("L", picture.size)
    ImageDraw.Draw(mask).ellipse((20, 15, 45, 40), fill=255)
    return mask


def array(image):
    return np.asarray(image).astype(int)


@pytest.fixture
def evaluations(pipe, monkeypatch):
    """The shape of every call of the UNet."""
    shapes, forward = [], pipe.unet.forward
    monkeypatch.setattr(pipe.unet, "forward", lambda x, *rest: shapes.append(tuple(x.shape)) or forward(x, *rest))
    return shapes


class TestStrengthRules:
    @pytest.mark.parametrize(
        ("rule", "strength", "count"),
        [("floor", 0.5, 5), ("diffusers", 0.29, 2), ("webui", 0.5, 6), ("comfy", 0.5, 10), ("continuous", 0.55, 6)],
    )
    def test_evaluations(self, pipe, picture, evaluations, rule, strength, count):
        settings = {"strength": strength, "strength_rule": rule, "steps": 10}
        pipe(HEART, image=picture, **settings, progress=False)
        assert len(evaluations) == count == pipe.plan_strength(**settings).evaluations

    def test_start(self, pipe, picture):
        """x at the first sigma is the picture's latents with so much of the noise."""
        z = pipe(image=picture, strength=0, progress=False).latents
        for rule in ("webui", "comfy", "diffusers", "floor", "continuous"):
            plan = pipe.plan_strength(steps=8, strength=1.0, strength_rule=rule)
            step = next(
                pipe.stream(image=picture, strength=1.0, strength_rule=rule, steps=8, noise=torch.zeros_like(z))
            )
            x = step.x0 + step.sigma * step.eps  # before the step
            if plan.replaces:
                assert x.abs().max() < 1e-4
            else:  # the mean and a draw of the posterior are close
                assert (x - z).abs().mean() < 0.1 < z.abs().mean()

    def test_nothing_to_do(self, pipe, picture, evaluations):
        """diffusers counts int(10 * 0.05) = 0 steps: the picture as the VAE has it."""
        out = pipe(HEART, image=picture, strength=0.05, strength_rule="diffusers", steps=10, progress=False)
        assert not evaluations and out.images[0].size == picture.size
        assert np.array_equal(out.images[0], pipe(image=picture, strength=0, progress=False).images[0])

    def test_comfy_with_sigmas(self, pipe, picture):
        sigmas = pipe.schedule.sigmas(4)
        with pytest.raises(ValueError, match=r"strength_rule='comfy' with sigmas as a tensor: .* of 8 steps"):
            pipe(image=picture, sigmas=sigmas, strength=0.5, strength_rule="comfy", progress=False)
        out = pipe(image=picture, sigmas=sigmas, strength=0.5, progress=False)
        assert out.settings.steps == 20 and out.images[0].size == picture.size


@pytest.mark.parametrize("sampler", ["ddim", "euler"])
class TestInpaint:
    @pytest.mark.parametrize("blend", ["x0", "noise"])
    @pytest.mark.parametrize("content", ["original", "fill", "noise", "nothing"])
    def test_outside_is_the_picture(self, pipe, picture, mask, sampler, blend, content):
        edit = {"blend": blend, "masked_content": content, "sampler": sampler}
        out = pipe([HEART, "fire"], image=picture, mask=mask, **edit, **QUICK)
        keep = array(mask) == 0
        for image in out.images:
            assert np.array_equal(array(image)[keep], array(picture)[keep])
            assert np.abs(array(image) - array(picture))[~keep].mean() > 5
        other = pipe(HEART, image=picture, mask=mask, **edit, **QUICK, paste_back=False)
        assert not np.array_equal(array(other.images[0])[keep], array(picture)[keep])

    def test_soft(self, pipe, picture, mask, sampler):
        """Where a blurred mask is black the picture stays; where it is grey, both are seen."""
        out = pipe(HEART, image=picture, mask=mask, mask_blur=3.0, sampler=sampler, **QUICK).images[0]
        soft = array(mask.filter(ImageFilter.GaussianBlur(3.0)))
        assert np.array_equal(array(out)[soft == 0], array(picture)[soft == 0])
        raw = pipe(HEART, image=picture, mask=mask, mask_blur=3.0, sampler=sampler, **QUICK, paste_back=False).images[0]
        blend = soft[..., None] / 255 * (array(raw) - array(picture)) + array(picture)
        assert np.abs(array(out) - blend).max() <= 0.5

    def test_only_masked(self, pipe, picture, mask, sampler, evaluations):
        """A box around the mask, at the model's size; outside of the mask the picture bit for bit."""
        settings = {"mask": mask, "sampler": sampler, "padding_mask_crop": 4}
        out = pipe(HEART, image=picture, **settings, **QUICK, batch_size=2)
        side = pipe.size // pipe.vae.config.factor
        assert evaluations and {shape[-2:] for shape in evaluations} == {(side, side)}
        keep = array(mask) == 0
        for image in out.images:
            assert image.size == picture.size and np.array_equal(array(image)[keep], array(picture)[keep])
        whole = pipe(HEART, image=picture, **settings, **QUICK, paste_back=False).images[0]
        left, top, right, bottom = 16, 11, 50, 45  # the ellipse and 4 pixels around it
        changed = (array(whole) != array(picture)).any(-1)
        assert changed[top:bottom, left:right].mean() > 0.9
        changed[top:bottom, left:right] = False
        assert not changed.any()

    def test_contents(self, pipe, picture, mask, sampler):
        """What the run starts from: seen through a sampler that does nothing."""

        def start(denoise, x, sigmas, noise):
            yield ldm.samplers.Step(0, sigmas[0], sigmas[0], x, x, x)

        settings = {"image": picture, "strength": 0.5, "steps": 8, "seed": 3}
        settings |= {"sampler": start, "noise": torch.zeros(1, 4, 13, 18), "blend": "noise", "mask": mask}
        x = {c: next(pipe.stream(masked_content=c, **settings)).x for c in ("original", "noise", "nothing", "fill")}
        inside = torch.zeros(1, 4, 13, 18, dtype=torch.bool)
        inside[..., 5:9, 6:10] = True  # well within the ellipse
        assert (x["nothing"][inside] == 0).all()
        assert 0.7 < x["noise"][inside].std() < 1.3
        assert not torch.equal(x["fill"][inside], x["original"][inside])
        for content in ("noise", "nothing"):
            torch.testing.assert_close(x[content][..., 0], x["fill"][..., 0])


@pytest.mark.parametrize("box", [(21, 21, 23, 23), (0, 21, 70, 22), (33, 0, 34, 51)])
def test_thin_masks(pipe, picture, box):
    """Thinner than a latent, and still what is in them follows the prompt; all around stays."""
    mask = Image.new("L", picture.size)
    mask.paste(255, box)
    prompts = ("black circle, twemoji style", "red circle, twemoji style")
    a, b = (array(pipe(p, image=picture, mask=mask, strength=1, **QUICK).images[0]) for p in prompts)
    inside = array(mask) > 0
    assert np.abs(a - b)[inside].mean() > 20
    assert np.array_equal(a[~inside], array(picture)[~inside])
    with pytest.warns(UserWarning, match="so thin that diffusers' way"):
        line = Image.new("L", picture.size)
        line.paste(255, (0, 21, 70, 22))
        pipe("fire", image=picture, mask=line, blend="noise", **QUICK)


@pytest.mark.parametrize(
    "edit", [{}, {"enlarge": 1.5}, {"extend": (8, 0, 0, 0)}, {"tile": 32}, {"padding_mask_crop": 2}]
)
def test_output_knows_the_call(pipe, picture, mask, edit):
    settings = {"image": picture, "seed": 7, "batch_size": 2} | edit
    settings |= {"mask": mask} if "padding_mask_crop" in edit else {}
    out = pipe(HEART, **settings, **QUICK)
    assert out.seeds == [7, 8] and out.model == pipe.name
    assert {name: getattr(out.settings, name) for name in settings} == settings


def test_mask_of_nothing(pipe, picture):
    with pytest.warns(UserWarning, match="the mask is black everywhere: nothing is repainted; white is what is"):
        out = pipe(HEART, image=picture, mask=Image.new("L", picture.size), **QUICK)
    assert np.array_equal(out.images[0], picture)


@pytest.mark.parametrize("size", [(64, 64), (51, 70), (1, 1)])
def test_mask_of_another_size(pipe, picture, size):
    mask, said = Image.new("L", size, 255), rf"mask of {size[0]}x{size[1]} pixels for a picture of 70x51: .*resize"
    for edit in ({}, {"padding_mask_crop": 0}, {"tile": 32}):
        with pytest.raises(ValueError, match=said):
            pipe(HEART, image=picture, mask=mask, **edit, **QUICK)
    with pytest.raises(ValueError, match="for a picture of 32x64: "):
        pipe(HEART, latents=torch.zeros(1, 4, 16, 8), mask=mask, **QUICK)


def seam(row):
    """The largest step between neighbours, of a picture's columns."""
    return np.abs(np.diff(array(row), axis=1)).mean((0, 2))


class TestOutpaint:
    @pytest.mark.parametrize("sides", [(0, 0, 24, 0), (13, 0, 0, 0), (0, 9, 0, 40), (24, 24, 24, 24), (1, 0, 0, 1)])
    @pytest.mark.parametrize("how", ["edge", "mirror", "noise"])
    def test_the_picture_is_kept(self, pipe, picture, sides, how):
        out = pipe(HEART, image=picture, extend=sides, extend_fill=how, **QUICK).images[0]
        left, top, right, bottom = sides
        assert out.size == (70 + left + right, 51 + top + bottom)
        assert np.array_equal(out.crop((left, top, left + 70, top + 51)), picture)

    @pytest.mark.parametrize("how", ["edge", "mirror", "noise"])
    @pytest.mark.parametrize("strength", [0.75, 1.0])
    def test_no_seam(self, pipe, picture, how, strength):
        """Across the border the columns step no further than they do elsewhere in the two parts."""
        for seed in range(4):
            edit = {"extend": (32, 0, 32, 0), "extend_fill": how, "strength": strength, "seed": seed}
            steps = seam(pipe(HEART, image=picture, **edit, steps=8, progress=False).images[0])
            at = (31, 32 + 69)  # between columns 31 and 32, and 101 and 102
            assert max(steps[list(at)]) <= max(np.delete(steps, at)), (seed, steps)

    def test_the_seam_would_be_seen(self, pipe, picture, monkeypatch):
        monkeypatch.setattr("ldm.edit.paste", lambda new, old, mask, fade: ldm.img2img.paste(new, old, mask))
        monkeypatch.setattr("ldm.edit.feathered", lambda mask, width: mask)
        steps = seam(
            pipe("fire", image=picture, extend=(32, 0, 32, 0), strength=1.0, steps=8, progress=False).images[0]
        )
        assert max(steps[31], steps[101]) > max(np.delete(steps, (31, 101)))

    def test_large_extensions_are_tiled(self, pipe, picture, evaluations):
        """No run sees more than a tile, each run something known, and the canvas is painted to its corners."""
        out = pipe(HEART, image=picture, extend=(100, 60, 80, 70), extend_fill="noise", strength=1, **QUICK)
        side = pipe.size // pipe.vae.config.factor
        assert {shape[-2:] for shape in evaluations} == {(side, side)}
        assert out.images[0].size == (250, 181) and out.latents is None
        # Tiles that their neighbours have painted already are left out.
        assert 250 * 181 / 64**2 < len(evaluations) // 3 <= len(tiles((252, 184), 64, 16))
        canvas = extended(picture, (100, 60, 80, 70), "noise")
        painted = (array(out.images[0]) != array(canvas)).any(-1)
        assert not painted[60:111, 100:170].any() and painted.mean() > 0.9

    def test_repeated(self, pipe, picture):
        once = pipe(HEART, image=picture, extend=(0, 0, 16, 0), **QUICK).images[0]
        twice = pipe(HEART, image=once, extend=(0, 16, 0, 0), **QUICK).images[0]
        assert np.array_equal(twice.crop((0, 16, 86, 67)), once)

    def test_pictures_of_their_own(self, pipe, picture):
        """A picture does not depend on its batch."""
        both = pipe([HEART, "fire"], image=picture, extend=(0, 0, 80, 0), seed=4, **QUICK).images
        for i, prompt in enumerate((HEART, "fire")):
            alone = pipe(prompt, image=picture, extend=(0, 0, 80, 0), seed=4 + i, **QUICK).images[0]
            assert np.array_equal(alone, both[i])


class TestEnlarge:
    @pytest.mark.parametrize("how", ["latent", "latent-nearest", "latent-bicubic", "nearest", "lanczos"])
    def test_hires_pass(self, pipe, evaluations, how):
        out = pipe(HEART, enlarge=1.5, enlarge_filter=how, strength=0.5, steps=4, progress=False, batch_size=2)
        assert [image.size for image in out.images] == [(96, 96)] * 2 and out.latents.shape == (2, 4, 24, 24)
        assert [shape[-1] for shape in evaluations] == [16] * 4 + [24] * (2 if how.startswith("latent") else 4)

    @pytest.mark.parametrize("how", ["latent", "bicubic"])
    def test_is_two_calls(self, pipe, how):
        """By hand: a picture, made larger, image to image."""
        settings = {"steps": 4, "seed": 2, "progress": False}
        first = pipe(HEART, **settings)
        if how == "latent":
            z = torch.nn.functional.interpolate(first.latents, scale_factor=2, mode="bilinear")
            second = pipe(HEART, latents=z, strength=0.5, **settings)
        else:
            image = first.images[0].resize((128, 128), Image.Resampling.BICUBIC)
            second = pipe(HEART, image=image, strength=0.5, **settings)
        out = pipe(HEART, enlarge=2, enlarge_filter=how, strength=0.5, **settings)
        assert torch.equal(out.latents, second.latents) and np.array_equal(out.images[0], second.images[0])

    def test_in_tiles(self, pipe, evaluations):
        """Also of a picture that is made first."""
        edit = {"enlarge": 2, "enlarge_filter": "lanczos", "tile": 64, "strength": 0.5}
        out = pipe(HEART, batch_size=2, steps=2, progress=False, **edit)
        assert [image.size for image in out.images] == [(128, 128)] * 2 and out.latents is None
        assert len(evaluations) == 2 + 2 * len(tiles((128, 128), 64, 16))
        first = pipe(HEART, batch_size=2, steps=2, progress=False)
        again = pipe(HEART, latents=first.latents, batch_size=2, steps=2, progress=False, **edit)
        for a, b in zip(again.images, out.images, strict=True):
            assert np.array_equal(a, b)

    @pytest.mark.parametrize("rule", ["webui", "comfy", "floor"])
    def test_a_given_picture_costs_what_is_planned(self, pipe, picture, evaluations, rule):
        settings = {"strength": 0.5, "strength_rule": rule, "steps": 4}
        pipe(HEART, image=picture, enlarge=2, **settings, progress=False)
        assert len(evaluations) == pipe.plan_strength(**settings).evaluations

    def test_noise(self, pipe, picture):
        """Of the run that is there: of the larger size for a given picture, else of the first one's."""
        for how in ("latent", "lanczos"):
            edit = {"enlarge": 2, "enlarge_filter": how, "steps": 2, "progress": False}
            zero, one = (pipe(HEART, image=picture, noise=n * torch.ones(1, 4, 26, 35), **edit) for n in (0, 1))
            assert not np.array_equal(zero.images[0], one.images[0])
            zero, one = (pipe(HEART, noise=n * torch.ones(1, 4, 16, 16), **edit) for n in (0, 1))
            assert not np.array_equal(zero.images[0], one.images[0])
            with pytest.raises(ValueError, match=r"noise has shape \(1, 4, 2, 2\)"):
                pipe(HEART, image=picture, noise=torch.zeros(1, 4, 2, 2), **edit)
        for edit in ({"tile": 32}, {"extend": (9, 0, 0, 0)}):
            with pytest.raises(ValueError, match=r"noise has shape \(1, 4, 2, 2\): a canvas of "):
                pipe(HEART, image=picture, noise=torch.zeros(1, 4, 2, 2), **edit, **QUICK)

    def test_sizes_are_checked_first(self, pipe, evaluations):
        for edit in (
            {"tiling": "both", "enlarge": 1.3},
            {"enlarge": 100},
            {"enlarge": 1e30, "enlarge_filter": "lanczos"},
        ):
            with pytest.raises(
                ValueError, match=r"tiling='both' at 83x83: the edges|pixels in one run: up to 16,777,216"
            ):
                pipe(HEART, **edit, **QUICK)
        image = Image.new("RGB", (8, 8))
        for edit in ({"extend": (10**10, 0, 0, 0)}, {"tile": 64, "width": 10**5, "height": 10**5}):
            with pytest.raises(ValueError, match="pixels: up to 268,435,456 are made"):
                pipe(HEART, image=image, **edit, **QUICK)
        assert not evaluations

    def test_picture(self, pipe, picture, evaluations):
        """At strength 0 only the resizing and the VAE; any size."""
        bigger = picture.resize((119, 87), Image.Resampling.LANCZOS)
        wanted = pipe(image=bigger, strength=0, progress=False).images[0]
        a, b = (
            pipe(image=picture, enlarge=1.7, enlarge_filter=how, strength=0, progress=False).images[0]
            for how in ("lanczos", "latent")
        )
        assert np.array_equal(a, wanted) and b.size == wanted.size and not evaluations
        assert np.corrcoef(array(b).ravel(), array(wanted).ravel())[0, 1] > 0.9

    def test_tiles(self, pipe, picture, evaluations):
        """Tiles of a larger picture, at any size; at the same sigma the tiles share their noise."""
        settings = {"tile": 64, "tile_overlap": 32, "strength": 0.4, "steps": 5, "progress": False}
        out = pipe(HEART, image=picture, width=150, height=101, **settings)
        assert out.images[0].size == (150, 101) and {shape[-2:] for shape in evaluations} == {(16, 16)}
        assert len(evaluations) == 2 * len(tiles((152, 104), 64, 32))
        bigger = picture.resize((150, 101), Image.Resampling.LANCZOS)
        assert np.array_equal(pipe(HEART, image=bigger, **settings).images[0], out.images[0])
        same = pipe(HEART, image=picture, enlarge=2, enlarge_filter="lanczos", **settings)
        assert same.images[0].size == (140, 102)

    def test_tiles_share_the_noise(self, pipe, picture, monkeypatch):
        """x at the start of each tile is its latents with its part of the noise of the whole, also a varied one."""
        for vary in ({}, {"subseed": 7, "subseed_strength": 0.3}, {"seed_resize_from": (64, 64)}):
            noises = []
            real = pipe._run

            def spied(s, *rest, noises=noises, real=real):
                noises.append(s.noise)
                return real(s, *rest)

            with monkeypatch.context() as m:
                m.setattr(pipe, "_run", spied)
                edits = {"tile": 64, "tile_overlap": 32, "seed": 5, **vary}
                pipe(HEART, image=picture, width=96, height=72, **edits, **QUICK)
            s = ldm.Settings(seed=5, **vary)
            whole = first_noise(pipe, s, noise_of(pipe, s, (96, 72)))
            boxes = tiles((96, 72), 64, 32)
            assert len(noises) == len(boxes) == 4
            for noise, (left, top, right, bottom) in zip(noises, boxes, strict=True):
                assert torch.equal(noise, whole[..., top // 4 : bottom // 4, left // 4 : right // 4])

    def test_tiles_draw_on_their_own(self, pipe):
        """Fresh noise is not the same in every tile: those of a flat picture are no more alike than pictures are."""
        flat = Image.new("RGB", (192, 192), "grey")
        settings = {"tile": 64, "tile_overlap": 0, "sampler": "ddim", "eta": 1.0, "strength": 0.9, "guidance_scale": 1}
        out = array(pipe("", image=flat, steps=6, **settings, progress=False).images[0])
        parts = [out[y : y + 64, x : x + 64].ravel() for y in (0, 64, 128) for x in (0, 64, 128)]
        alike = np.corrcoef(np.stack(parts))[np.triu_indices(9, 1)]
        assert alike.mean() < 0.15  # 0.07; 0.25 if all tiles draw the same

    def test_one_tile_is_no_tile(self, pipe, picture):
        whole, tile = (pipe(HEART, image=picture, tile=side, **QUICK).images[0] for side in (None, 72))
        assert np.array_equal(whole, tile)

    def test_tiles_do_not_show(self, pipe, picture):
        """At the edges of tiles the columns step no further than elsewhere."""
        settings = {"width": 160, "height": 104, "tile": 64, "strength": 0.3, "steps": 10, "progress": False}
        steps = seam(pipe(HEART, image=picture, **settings).images[0])
        at = [47, 95]  # where the second and third tile begin
        assert max(steps[at]) <= np.percentile(np.delete(steps, at), 95)

    def test_mask_in_tiles(self, pipe, picture, mask, evaluations):
        """Tiles that the mask leaves alone are not run, and the picture stays bit for bit."""
        large, larger_mask = picture.resize((210, 153)), mask.resize((210, 153), Image.Resampling.NEAREST)
        out = pipe(HEART, image=large, mask=larger_mask, tile=64, **QUICK).images[0]
        keep = array(larger_mask) == 0
        assert np.array_equal(array(out)[keep], array(large)[keep]) and not np.array_equal(out, large)
        touched = [box for box in tiles((212, 156), 64, 16) if larger_mask.crop(box).getbbox()]
        assert len(evaluations) == 2 * len(touched) < 2 * len(tiles((212, 156), 64, 16))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"extend": (0, 0, 0, 0)}, r"extend=\(0, 0, 0, 0\): nothing to extend by"),
        ({"extend": (0, 0, 8)}, r"extend=\(0, 0, 8\): give four whole numbers"),
        ({"extend": (0, 0, 8, -8)}, "extend=.*give four whole numbers"),
        ({"extend": 8}, "extend=8: give four whole numbers"),
        ({"extend": (0, 0, 8, 0), "mask": True}, "extend with mask: one after the other"),
        ({"extend": (0, 0, 8, 0), "enlarge": 2}, "extend with enlarge: one after the other"),
        ({"extend": (0, 0, 8, 0), "image": None}, r"extend=.* without image: give the image that it is about"),
        ({"tile": 64, "image": None}, "tile=64 without image: give the image"),
        ({"tile": 64, "enlarge": 2}, "tile with enlarge_filter='latent': .* use 'lanczos'"),
        ({"tile": 30}, "tile=30, tile_overlap=4: give multiples of 4"),
        ({"tile": 32, "tile_overlap": 32}, "tile=32, tile_overlap=32: .* less than the tile"),
        ({"tile": 0}, "tile=0: give a whole number of pixels from 1"),
        ({"padding_mask_crop": 4}, "padding_mask_crop=4 without mask"),
        ({"padding_mask_crop": -1, "mask": True}, "padding_mask_crop=-1: give a whole number"),
        ({"mask_blur": 2}, "mask_blur=2 without mask"),
        ({"mask_blur": -2, "mask": True}, "mask_blur=-2: give a number of pixels, 0 or more"),
        ({"mask_blur": "2", "mask": True}, "mask_blur='2': give a number"),
        ({"enlarge": 0.5}, "enlarge=0.5: give a factor of 1"),
        ({"enlarge": float("inf")}, "enlarge=inf: give a factor"),
        ({"enlarge_filter": "best"}, "enlarge_filter='best': use 'latent', "),
        ({"extend_fill": "red"}, "extend_fill='red': use 'edge', 'mirror', 'noise'"),
        ({"masked_content": "empty"}, "masked_content='empty': use 'original', 'fill', 'noise', 'nothing'"),
        ({"blend": "x"}, "blend='x': use 'x0', 'noise'"),
        ({"strength_rule": "comfyui"}, "strength_rule='comfyui': use 'floor', 'diffusers', 'webui', "),
        ({"paste_back": 1}, "paste_back=1: give True or False"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_what_cannot_be_edited(pipe, picture, mask, settings, message):
    settings = {"image": picture, **QUICK} | settings | ({"mask": mask} if "mask" in settings else {})
    with pytest.raises(ValueError, match=message):
        pipe(HEART, **settings)


def test_a_stream_is_one_run(pipe, picture, mask):
    edits = [{"extend": (8, 0, 0, 0)}, {"enlarge": 2}, {"tile": 64}, {"mask": mask, "padding_mask_crop": 0}]
    for edit in edits:
        with pytest.raises(ValueError, match="a stream shows one run; call the pipeline"):
            pipe.stream(HEART, image=picture, **edit)


def test_a_step_may_be_changed(pipe):
    """In place: the sampler goes on from there."""
    for sampler in SAMPLERS:
        scale = 0.6 if sampler == "euler_cfg_pp" else 7.5
        for step in pipe.stream(HEART, steps=3, sampler=sampler, guidance_scale=scale):
            step.x.zero_()
            x0 = step.x0
        again = None
        for step in pipe.stream(HEART, steps=3, sampler=sampler, guidance_scale=scale):
            again = step.x0
        assert not torch.allclose(x0, again, atol=0.01)
