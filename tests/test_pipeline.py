"""What is called how often and with what, and what comes out. The numbers are test_diffusers_pipeline's."""

import functools
import io

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

import ldm
from ldm.pipeline import DEFAULT_MODEL
from ldm.samplers import SAMPLERS, Brownian, Schedule, ddim, dpmpp_sde, euler

HEART, CAT = "a red heart, noto style", "grinning cat, twemoji style"


@pytest.fixture(scope="module")
def pipe():
    return ldm.Pipeline.from_pretrained()


@pytest.fixture(scope="module")
def picture(pipe):
    side = pipe.size
    x, y = np.meshgrid(np.linspace(0, 255, side), np.linspace(0, 255, side))
    image = Image.fromarray(np.stack([x, y, 255 - x], -1).astype(np.uint8))
    ImageDraw.Draw(image).ellipse((side // 4, side // 8, side // 2, side // 2), fill="yellow", outline="black")
    return image


@pytest.fixture
def calls(pipe):
    """The number of rows of each batch that the UNet is given."""
    rows = []
    hook = pipe.unet.register_forward_pre_hook(lambda net, inputs: rows.append(len(inputs[0])))
    yield rows
    hook.remove()


def difference(a, b):
    """The largest difference of two pictures, in 1/255."""
    return np.abs(np.asarray(a).astype(int) - np.asarray(b).astype(int)).max()


def scale_of(sampler):
    """CFG++'s goes from 0 to 1."""
    return 0.6 if sampler == "euler_cfg_pp" else 7.5


def start(pipe, **settings):
    """What a sampler is given to start from: x and the sigmas."""
    given = []

    def sampler(denoise, x, sigmas, noise):
        given.extend([x, sigmas])
        yield from ()

    assert list(pipe.stream("", sampler=sampler, **settings)) == []
    return given


def assert_identical(a, b):
    assert torch.equal(a.latents, b.latents)
    assert [np.asarray(image).tolist() for image in a.images] == [np.asarray(image).tolist() for image in b.images]


class TestEvaluations:
    @pytest.mark.parametrize("sampler", SAMPLERS)
    @pytest.mark.parametrize("steps", [1, 2, 7])
    def test_exactly_the_steps(self, pipe, calls, sampler, steps):
        """Samplers of two evaluations make one of the step to 0."""
        pipe("", sampler=sampler, steps=steps, guidance_scale=scale_of(sampler), progress=False)
        if sampler == "dpm_adaptive":  # which sees for itself
            assert set(calls) == {2}
            return
        twice = sampler in ("heun", "dpm_2", "dpm_2_ancestral", "restart", "dpmpp_2s_ancestral", "dpmpp_sde")
        more = sampler == "plms" and steps > 1  # which begins with one more
        assert calls == [2] * (2 * steps - 1 if twice else steps + more)

    def test_a_tensor_of_sigmas_sets_the_steps(self, pipe, calls):
        pipe("", sigmas=torch.tensor([14.0, 3.0, 1.0, 0.0]), steps=20, progress=False)
        assert calls == [2] * 3

    @pytest.mark.parametrize("scale", [1, 1.0])
    def test_scale_1_has_no_unconditional_half(self, pipe, calls, scale):
        pipe([HEART, CAT, ""], guidance_scale=scale, steps=2, progress=False)
        assert calls == [3, 3]

    @pytest.mark.parametrize("scale", [0.0, 0.99, 7.5])
    def test_other_scales_have(self, pipe, calls, scale):
        pipe([HEART, CAT, ""], guidance_scale=scale, steps=2, progress=False)
        assert calls == [6, 6]

    def test_scale_1_ignores_the_negative_prompt(self, pipe):
        a, b = (pipe(HEART, negative_prompt=n, guidance_scale=1, steps=2, progress=False) for n in ("", CAT))
        assert_identical(a, b)

    @pytest.mark.parametrize(
        ("steps", "strength", "count"),
        [(10, 0.3, 3), (10, 0.75, 7), (3, 0.99, 2), (7, 1, 7), (3, 0.01, 1), (3, 0, 0), (100, 0.02, 2)],
    )
    def test_strength(self, pipe, calls, picture, steps, strength, count):
        pipe("", image=picture, steps=steps, strength=strength, guidance_scale=1, progress=False)
        assert len(calls) == count


class TestImageToImage:
    def test_strength_0_returns_the_picture_through_the_vae(self, pipe, picture):
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].contiguous() / 127.5 - 1
        z = pipe.vae.encode(pixels).mean
        expected = (pipe.vae.decode(z).clamp(-1, 1)[0] + 1) * 127.5
        out = pipe(HEART, image=picture, strength=0, progress=False)
        torch.testing.assert_close(out.latents, pipe.vae.config.scaling_factor * z)
        assert difference(out.images[0], expected.round().permute(1, 2, 0)) <= 1

    def test_strength_0_of_latents(self, pipe):
        latents = torch.randn(1, 4, 5, 6)
        assert torch.equal(pipe("", latents=latents, strength=0, progress=False).latents, latents)

    @pytest.mark.parametrize("sampler", SAMPLERS)
    def test_strength_1_ignores_the_picture(self, pipe, picture, sampler):
        settings = {"sampler": sampler, "steps": 2, "seed": 3, "progress": False, "guidance_scale": scale_of(sampler)}
        assert_identical(pipe(HEART, image=picture, strength=1, **settings), pipe(HEART, **settings))

    def test_below_1_the_picture_counts(self, pipe, picture):
        outs = [
            pipe(HEART, image=image, strength=0.9, steps=2, progress=False)
            for image in (picture, Image.new("RGB", picture.size))
        ]
        assert not torch.allclose(outs[0].latents, outs[1].latents, atol=0.01)

    def test_the_size_is_the_pictures(self, pipe):
        """Padded to whole latents and cropped; if a size is given, the picture is resized."""
        factor = pipe.vae.config.factor
        image = Image.new("RGB", (12 * factor + 1, 8 * factor - 1))
        out = pipe(image=image, steps=1, progress=False)
        assert out.images[0].size == image.size and out.latents.shape[-2:] == (8, 13)
        out = pipe(image=image, steps=1, width=10 * factor, progress=False)
        assert out.images[0].size == (10 * factor, image.height)

    def test_padding_is_cut_off(self, pipe, picture):
        """The picture with its last row and column repeated gives the same, but for what is cut off."""
        factor = pipe.vae.config.factor
        odd = picture.crop((0, 0, 8 * factor - 3, 6 * factor - 1))
        even = Image.fromarray(np.pad(np.asarray(odd), ((0, 1), (0, 3), (0, 0)), mode="edge"))
        a, b = (pipe(HEART, image=image, steps=2, progress=False).images[0] for image in (odd, even))
        assert a.size == odd.size and np.array_equal(a, b.crop((0, 0, *odd.size)))

    def test_a_photo_is_held_upright(self, pipe, picture):
        """The same picture, stored lying on its side."""
        upright = picture.crop((0, 0, 48, 32))
        exif, file = Image.Exif(), io.BytesIO()
        exif[0x0112] = 8  # to be turned left
        upright.transpose(Image.Transpose.ROTATE_270).save(file, "PNG", exif=exif)
        settings = {"steps": 2, "strength": 0.5, "progress": False}
        assert_identical(pipe(HEART, image=Image.open(file), **settings), pipe(HEART, image=upright, **settings))

    @pytest.mark.parametrize("mode", ["P", "I;16", "1", "RGBA"])
    def test_resized_as_a_picture(self, pipe, mode):
        """Smoothly, whatever the mode: a palette's numbers and 16 bits cannot be averaged as they are."""
        grey = Image.linear_gradient("L").resize((64, 64)).point(lambda v: 255 * (v > 99))
        image = Image.fromarray(np.array(grey, np.uint16) * 257) if mode == "I;16" else grey.convert(mode)
        assert image.mode == mode
        settings = {"width": 48, "height": 32, "strength": 0, "progress": False}
        assert_identical(pipe(image=image, **settings), pipe(image=grey.convert("RGB"), **settings))

    def test_latents_take_the_place_of_the_picture(self, pipe, picture):
        latents = pipe("", image=picture, strength=0, progress=False).latents
        out = pipe([HEART, CAT], latents=latents, strength=0.5, steps=4, seed=6, progress=False)
        one = pipe(CAT, latents=latents, strength=0.5, steps=4, seed=7, progress=False)
        assert difference(out.images[1], one.images[0]) <= 1

    def test_start(self, pipe):
        """latents + sigma * noise at the first of the steps that run."""
        latents, noise = torch.randn(2, 1, 4, 8, 8)
        x, sigmas = start(pipe, latents=latents, noise=noise, strength=0.5, steps=4)
        assert torch.equal(sigmas, pipe.schedule.sigmas(4)[2:])
        assert torch.equal(x, latents + sigmas[0] * noise)


class TestSeeds:
    # dpm_adaptive has one step size for all of a batch, and says so.
    @pytest.mark.parametrize("sampler", sorted(set(SAMPLERS) - {"dpm_adaptive"}))
    def test_a_picture_does_not_depend_on_its_batch(self, pipe, sampler):
        settings = {"sampler": sampler, "steps": 3, "progress": False, "guidance_scale": scale_of(sampler)}
        batch = pipe([HEART, CAT], batch_size=2, seed=0, **settings)
        assert batch.seeds == [0, 1, 2, 3] and len(batch.images) == 4
        for i, prompt in enumerate([HEART, HEART, CAT, CAT]):
            alone = pipe(prompt, seed=i, **settings)
            assert alone.seeds == [i]
            assert difference(alone.images[0], batch.images[i]) <= 1

    def test_the_noise_is_the_seeds_bitwise(self, pipe):
        for seed, count in ((0, 3), (2, 1)):
            x, sigmas = start(pipe, seed=seed, batch_size=count)
            for i in range(count):
                alone = torch.randn(x.shape[1:], generator=torch.Generator().manual_seed(seed + i))
                assert torch.equal(x[i], alone * sigmas[0])

    def test_seeds_differ_and_0_is_one(self, pipe):
        zero, one, none = (pipe("", steps=1, progress=False, **s) for s in ({"seed": 0}, {"seed": 1}, {}))
        assert not torch.allclose(zero.latents, one.latents, atol=0.1)
        assert_identical(zero, none)

    def test_a_list_of_seeds(self, pipe):
        out = pipe("", batch_size=3, seed=[5, 0, 5], steps=2, progress=False)
        assert out.seeds == [5, 0, 5]
        torch.testing.assert_close(out.latents[0], out.latents[2], rtol=0, atol=1e-4)
        assert not torch.allclose(out.latents[0], out.latents[1], atol=0.1)

    @pytest.mark.parametrize("settings", [{}, {"sampler": "ddim", "eta": 1.0}, {"strength": 0.6}])
    def test_the_same_call_twice(self, pipe, picture, settings):
        if "strength" in settings:
            settings = settings | {"image": picture}
        outs = []
        for i in range(2):
            torch.manual_seed(i)  # nothing is drawn from the global generator
            outs.append(pipe([HEART, CAT], steps=3, seed=4, progress=False, **settings))
        assert_identical(*outs)

    def test_the_global_generator_is_left_alone(self, pipe):
        before = torch.get_rng_state()
        pipe(HEART, steps=1, sampler="ddim", eta=1.0, progress=False)
        assert torch.equal(torch.get_rng_state(), before)

    @pytest.mark.parametrize(
        "sampler", ["dpmpp_sde", "dpmpp_2m_sde", "dpmpp_3m_sde", functools.partial(dpmpp_sde, r=0.3)]
    )
    @pytest.mark.parametrize("steps", [3, 7])
    def test_the_noise_of_sdes_is_one_path(self, pipe, picture, sampler, steps):
        settings = {"sampler": sampler, "steps": steps, "seed": 4, "batch_size": 2, "image": picture, "strength": 0.7}
        *loop, last = pipe.stream(HEART, **settings)
        assert loop and last.noise is None
        path = Brownian([4, 5], loop[0].x.shape[1:], loop[0].sigma, last.sigma)
        for step in loop:
            assert torch.equal(step.noise, path(step.sigma, step.sigma_next))


class TestVariations:
    """The numbers are test_noise's: here, that they arrive, and that nothing else changes."""

    @pytest.mark.parametrize("settings", [{}, {"sampler": "ddim", "eta": 1.0}, {"strength": 0.6}])
    def test_strength_0_is_no_variation(self, pipe, picture, settings):
        settings = {"steps": 3, "batch_size": 2, "progress": False} | settings
        if "strength" in settings:
            settings["image"] = picture
        same = {"subseed": 7, "seed_resize_from": (pipe.size, pipe.size)}
        assert_identical(pipe(HEART, **settings, **same), pipe(HEART, **settings))

    @pytest.mark.parametrize("sampler", ["ddim", "euler"])  # draws after the first are the seed's own
    def test_strength_1_is_the_subseeds_picture(self, pipe, sampler):
        settings = {"sampler": sampler, "steps": 3, "batch_size": 2, "progress": False}
        a = pipe(HEART, seed=3, subseed=7, subseed_strength=1, **settings)
        assert a.seeds == [3, 3]
        assert_identical(a, pipe(HEART, seed=7, **settings))

    def test_on_the_way(self, pipe):
        """From one to the other, each nearer to what it turns to."""
        xs = [start(pipe, seed=3, subseed=7, subseed_strength=s)[0] for s in (0, 0.2, 0.4, 0.6, 0.8, 1)]
        distances = [float((x - xs[-1]).norm()) for x in xs]
        assert distances == sorted(distances, reverse=True) and distances[0] > distances[1] > distances[-1] == 0

    def test_from_an_image(self, pipe, picture):
        """The same draw of either seed is mixed: the seed itself as the subseed changes nothing."""
        settings = {"image": picture, "strength": 0.6, "steps": 3, "seed": 3}
        (plain, sigmas), (same, _) = start(pipe, **settings), start(pipe, subseed=3, subseed_strength=0.5, **settings)
        assert torch.equal(same, plain)
        other, _ = start(pipe, subseed=4, subseed_strength=1, **settings)
        moved = ((other - plain) / sigmas[0]).var()  # of the difference of two independent noises
        assert abs(moved - 2) < 0.3

    def test_seed_resize(self, pipe):
        """The small picture's noise in the middle of the large one's, and the other way round."""
        factor = pipe.vae.config.factor
        small, large = {"width": 12 * factor, "height": 8 * factor}, {"width": 16 * factor, "height": 18 * factor}
        (a, _), (b, _) = start(pipe, seed=5, **small), start(pipe, seed=5, **large)
        (x, _) = start(pipe, seed=5, seed_resize_from=(12 * factor, 8 * factor), **large)
        assert torch.equal(x[:, :, 5:13, 2:14], a)
        x[:, :, 5:13, 2:14] = b[:, :, 5:13, 2:14]
        assert torch.equal(x, b)
        (x, _) = start(pipe, seed=5, seed_resize_from=(16 * factor, 18 * factor), **small)
        assert torch.equal(x, b[:, :, 5:13, 2:14])

    def test_seed_resize_refused(self, pipe):
        with pytest.raises(ValueError, match=f"seed_resize_from 65x64: .* multiples of {pipe.vae.config.factor}"):
            pipe("", seed_resize_from=(65, 64))


def test_given_noise(pipe):
    """Instead of the seed's; the same noise is the same picture."""
    noise = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(9))
    outs = [pipe("", batch_size=2, steps=2, noise=noise, seed=s, width=64, height=64, progress=False) for s in (0, 1)]
    assert_identical(*outs)
    seeded = pipe("", steps=2, seed=9, width=64, height=64, progress=False)
    first = torch.randn(1, *seeded.latents.shape[1:], generator=torch.Generator().manual_seed(9))
    assert_identical(seeded, pipe("", steps=2, noise=first, width=64, height=64, progress=False))


class TestStream:
    def test_callback_sees_what_stream_yields(self, pipe):
        seen, settings = [], {"steps": 3, "sampler": "ddim", "eta": 0.5, "seed": 2}
        out = pipe(HEART, **settings, progress=False, callback=seen.append)
        steps = list(pipe.stream(HEART, **settings))
        assert [step.i for step in seen] == [step.i for step in steps] == [0, 1, 2]
        for a, b in zip(seen, steps, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(a[1:], b[1:], strict=True))
        end = steps[-1]
        assert torch.equal(out.latents, end.x / (1 + end.sigma_next**2) ** 0.5)
        assert end.eps_cond.shape == end.eps_uncond.shape == end.x.shape

    def test_lazy(self, pipe, calls):
        steps = pipe.stream("", steps=3)
        assert calls == []
        next(steps)
        assert calls == [2]
        steps.close()
        assert calls == [2]

    def test_refuses_at_the_call(self, pipe):
        with pytest.raises(ValueError, match="clip_skip"):
            pipe.stream("", clip_skip=99)

    @pytest.mark.parametrize("enabled", [True, False])
    def test_grad_mode_is_the_consumers(self, pipe, enabled):
        """Neither in the loop's body nor after it; and no graph is built inside."""
        with torch.set_grad_enabled(enabled):
            for step in pipe.stream("", steps=2):
                assert torch.is_grad_enabled() == enabled
                assert not step.x.requires_grad
            assert torch.is_grad_enabled() == enabled
            next(pipe.stream("", steps=2))
            assert torch.is_grad_enabled() == enabled

    def test_no_graph_of_nets_that_are_trained(self, pipe):
        pipe.unet.conv_out.requires_grad_(True)
        try:
            assert not any(step.x.requires_grad for step in pipe.stream("", steps=2))
        finally:
            pipe.unet.conv_out.requires_grad_(False)

    def test_progress(self, pipe, capfd):
        pipe("", steps=2, progress=False)
        assert capfd.readouterr() == ("", "")
        pipe("", steps=2)
        out, err = capfd.readouterr()
        assert out == "" and "2/2" in err

    def test_a_function_is_a_sampler(self, pipe):
        outs = [pipe("", steps=2, sampler=sampler, progress=False) for sampler in (euler, "euler", "Euler")]
        assert_identical(outs[0], outs[1])
        assert_identical(outs[0], outs[2])

    def test_a_users_sampler(self, pipe):
        def lazy_euler(denoise, x, sigmas, noise):
            """Takes its first step and no other."""
            yield next(euler(denoise, x, sigmas[[0, -1]], noise))

        step = next(pipe.stream(HEART, steps=5, sampler=lazy_euler))
        out = pipe(HEART, steps=5, sampler=lazy_euler, progress=False)
        assert torch.equal(out.latents, step.x)


def test_clip_skip_cuts_both_prompts(pipe):
    step = next(pipe.stream(HEART, negative_prompt=CAT, steps=1, clip_skip=2))
    swapped = next(pipe.stream(CAT, negative_prompt=HEART, steps=1, clip_skip=2))
    plain = next(pipe.stream(HEART, negative_prompt=CAT, steps=1))
    torch.testing.assert_close(step.eps_uncond, swapped.eps_cond, rtol=0, atol=1e-5)
    for eps in ("eps_cond", "eps_uncond"):
        assert not torch.allclose(getattr(step, eps), getattr(plain, eps), atol=1e-4)


def test_output(pipe):
    out = pipe([HEART, ""], steps=1, seed=4, progress=False)
    side = pipe.size // pipe.vae.config.factor
    assert out.latents.shape == (2, 4, side, side) and out.latents.dtype == torch.float32
    assert [(image.mode, image.size) for image in out.images] == [("RGB", (pipe.size, pipe.size))] * 2
    assert out.seeds == [4, 5]
    assert (out.settings.prompt, out.settings.steps, out.settings.seed) == ([HEART, ""], 1, 4)


def test_from_pretrained():
    """The default model is a folder like any other; prediction_type overrides what it says."""
    a = ldm.Pipeline.from_pretrained(DEFAULT_MODEL, prediction_type="epsilon")
    b = ldm.Pipeline.from_pretrained(prediction_type="v_prediction", vae=DEFAULT_MODEL / "vae")
    assert (a.prediction_type, b.prediction_type) == ("epsilon", "v_prediction")
    assert a.name == b.name == DEFAULT_MODEL.resolve().name
    a, b = (pipe(HEART, steps=1, progress=False) for pipe in (a, b))
    assert not torch.allclose(a.latents, b.latents, atol=0.1)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("strength", [0.6, 1])
def test_mask(pipe, picture, sampler, strength):
    """What is outside of the mask comes out as it went in; what is inside is new."""
    latents = pipe("", image=picture, strength=0, progress=False).latents
    mask = Image.new("L", picture.size)
    mask.paste(255, (0, 0, pipe.size // 2, pipe.size))
    settings = {"strength": strength, "mask": mask, "sampler": sampler, "steps": 4, "progress": False}
    settings |= {"guidance_scale": scale_of(sampler)}
    out = pipe([HEART, CAT], latents=latents, **settings)
    half = latents.shape[-1] // 2
    for z in out.latents:
        assert (z - latents[0])[..., half:].abs().max() <= 1e-5
        assert (z - latents[0])[..., :half].abs().mean() > 0.05
    assert not torch.allclose(out.latents[0], out.latents[1], atol=0.01)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_mask_of_everything_is_no_mask(pipe, picture, sampler):
    settings = {"image": picture, "strength": 0.5, "sampler": sampler, "steps": 4, "progress": False}
    settings |= {"guidance_scale": scale_of(sampler)}
    masked = pipe(HEART, mask=Image.new("L", picture.size, 255), **settings)
    torch.testing.assert_close(masked.latents, pipe(HEART, **settings).latents, rtol=0, atol=1e-4)


class TestBadInput:
    @pytest.mark.parametrize("size", [(66, 64), (64, 2), (1, 1), (65, 65)])
    def test_size(self, pipe, size):
        """Any is made: padded to whole latents, and cropped."""
        factor, (width, height) = pipe.vae.config.factor, size
        out = pipe("", width=width, height=height, steps=1, progress=False)
        assert out.images[0].size == size
        assert out.latents.shape[-2:] == (-(-height // factor), -(-width // factor))

    def test_clip_skip(self, pipe):
        layers = pipe.text_encoder.config.layers
        pipe("", clip_skip=layers, steps=1, progress=False)
        for clip_skip in (0, layers + 1):
            with pytest.raises(ValueError, match=f"clip_skip={clip_skip}.* from 1"):
                pipe("", clip_skip=clip_skip, progress=False)

    @pytest.mark.parametrize("shape", [(1, 4, 8, 8), (2, 4, 16, 16), (1, 3, 16, 16)])
    def test_noise(self, pipe, shape):
        with pytest.raises(ValueError, match=r"noise has shape \(.*\): these settings need \(1, 4, 16, 16\)"):
            pipe("", noise=torch.zeros(shape), width=64, height=64, progress=False)

    @pytest.mark.parametrize("shape", [(2, 4, 16, 16), (4, 4, 16, 16), (1, 3, 16, 16), (1, 4, 8, 16)])
    def test_latents(self, pipe, shape):
        with pytest.raises(ValueError, match=r"latents have shape \(.*\): these settings need \(3, 4, 16, 16\)"):
            pipe("", batch_size=3, latents=torch.zeros(shape), width=64, height=64, progress=False)

    def test_settings_are_checked(self, pipe):
        for call in (pipe, pipe.stream):
            with pytest.raises(ValueError, match="steps=0"):
                call("", steps=0)
            with pytest.raises(TypeError, match="step_count"):
                call("", step_count=1)

    def test_dtype(self):
        with pytest.raises(ValueError, match=r"dtype=torch.float16 on cpu: use torch.float32 or torch.bfloat16"):
            ldm.Pipeline.from_pretrained(dtype=torch.float16, device="cpu")

    def test_device(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        with pytest.raises(ValueError, match=r"device='cuda:0': PyTorch .* no GPU here, use device='cpu'"):
            ldm.Pipeline.from_pretrained(device="cuda:0")

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_unet_returns_nan(self, pipe, monkeypatch, value):
        net = pipe.unet.forward

        def broken(x, *others):
            out = net(x, *others)
            out[-1, 0, 0, 0] = value
            return out

        monkeypatch.setattr(pipe.unet, "forward", broken)
        with pytest.raises(FloatingPointError, match=r"UNet returned NaN .* torch.float32: load it with dtype="):
            pipe(HEART, steps=2, progress=False)

    @pytest.mark.parametrize("half", ["encoder", "decoder"])
    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_vae_returns_nan(self, pipe, picture, monkeypatch, half, value):
        net = getattr(pipe.vae, half)
        monkeypatch.setattr(net, "forward", lambda x: type(net).forward(net, x).index_fill(3, torch.tensor(0), value))
        with pytest.raises(FloatingPointError, match=rf"VAE's {half} returned NaN .* torch.float32: .* vae="):
            pipe(HEART, image=picture, steps=1, progress=False)


def test_empty_prompt(pipe):
    """Is a prompt; and against itself as the negative prompt guidance does nothing."""
    outs = [pipe("", guidance_scale=scale, steps=2, progress=False) for scale in (7.5, 1)]
    torch.testing.assert_close(outs[0].latents, outs[1].latents, rtol=0, atol=1e-4)


@pytest.fixture(scope="module")
def half():
    return ldm.Pipeline.from_pretrained(dtype=torch.bfloat16)


class TestBfloat16:
    def test_dtypes(self, half):
        for net in (half.unet, half.vae, half.text_encoder):
            assert {p.dtype for p in net.parameters()} == {torch.bfloat16}
        for step in half.stream(HEART, steps=1):
            assert step.x.dtype == step.x0.dtype == torch.float32  # the loop's own arithmetic

    @pytest.mark.parametrize("sampler", ["ddim", "euler"])
    def test_the_picture_is_close(self, pipe, half, picture, sampler):
        """bfloat16's values are 1/128 apart above 1, the levels of a picture 2/255: rounding moves it by about one."""
        for settings in ({"steps": 5}, {"steps": 5, "image": picture, "strength": 0.5}):
            full, rounded = (p(HEART, sampler=sampler, **settings, progress=False).images[0] for p in (pipe, half))
            difference = np.abs(np.asarray(full).astype(float) - np.asarray(rounded))
            assert 0 < difference.mean() < 3

    def test_names_its_dtype(self, half, monkeypatch):
        monkeypatch.setattr(half.vae.decoder, "forward", lambda z: torch.full((1, 3, 8, 8), torch.nan).bfloat16())
        with pytest.raises(FloatingPointError, match=r"VAE's decoder .* torch\.bfloat16"):
            half(HEART, steps=1, progress=False)


@pytest.mark.parametrize(
    ("sampler", "sigmas", "extra"), [(ddim, None, 1), (euler, None, 0), (euler, "leading", 1), (ddim, "linspace", 1)]
)
def test_start_of_the_references(pipe, sampler, sigmas, extra):
    """DDIM starts from unit variance in the net's scale, sqrt(1 + sigma^2) in ours; Euler's reference from sigma alone,
    but where it spaces "leading"."""
    noise = torch.ones(1, 4, 8, 8)
    step = next(pipe.stream("", steps=2, noise=noise, sampler=sampler, sigmas=sigmas, width=32, height=32))
    x = step.x0 + step.sigma * step.eps
    torch.testing.assert_close(x, noise * (step.sigma**2 + extra).sqrt().float())


def test_a_partial_of_a_sampler_keeps_its_schedule(pipe):
    part = functools.partial(ddim, eta=0.5)
    assert_identical(pipe(HEART, steps=3, sampler=part), pipe(HEART, steps=3, sampler="ddim", eta=0.5))


@pytest.mark.parametrize(
    ("schedule", "sampler", "spacing", "end"),
    [
        (Schedule(spacing="leading"), "euler", "leading", 0.0),
        (Schedule(spacing="trailing"), "ddim", "trailing", Schedule().sigma_min),
        (Schedule(set_alpha_to_one=True), "ddim", "leading", 0.0),
    ],
)
def test_the_models_schedule_decides(pipe, monkeypatch, schedule, sampler, spacing, end):
    monkeypatch.setattr(pipe, "schedule", schedule)
    sigmas = [float(step.sigma) for step in pipe.stream(HEART, steps=4, sampler=sampler)]
    assert sigmas == schedule.sigmas(4, spacing)[:-1].tolist()
    assert float(list(pipe.stream(HEART, steps=4, sampler=sampler))[-1].sigma_next) == end


def test_unknown_prediction_type():
    with pytest.raises(ValueError, match="prediction_type='v': use epsilon or v_prediction"):
        ldm.Pipeline.from_pretrained(prediction_type="v")


def test_no_default_model(monkeypatch, tmp_path):
    monkeypatch.setattr("ldm.pipeline.DEFAULT_MODEL", tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="part of a checkout of ldm"):
        ldm.Pipeline.from_pretrained()


@pytest.mark.parametrize(("sigmas", "log"), [("linspace", False), ("karras", True), ("exponential", True)])
def test_the_timesteps_are_read_off_sigma_or_its_logarithm(pipe, sigmas, log):
    """As diffusers: linearly where the sigmas are those of timesteps, off the logarithm where they are not."""
    seen = []
    hook = pipe.unet.register_forward_pre_hook(lambda net, inputs: seen.append(float(inputs[1].flatten()[0])))
    pipe("", steps=6, sigmas=sigmas, progress=False)
    hook.remove()
    expected = pipe.schedule.t(pipe.schedule.sigmas(6, sigmas)[:-1], log)
    assert seen == pytest.approx(expected.tolist(), rel=1e-6, abs=1e-6)


def test_compiled(monkeypatch):
    """Traced as a whole, without the compiler that follows: the same pictures up to rounding."""
    pipe = ldm.Pipeline.from_pretrained(device="cpu")
    plain = pipe(HEART, steps=2, seed=0).latents
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    pipe.compile()
    compiled = pipe(HEART, steps=2, seed=0).latents
    assert len(graphs) == 1
    assert (compiled - plain).abs().max() <= 1e-4 * plain.abs().max()
