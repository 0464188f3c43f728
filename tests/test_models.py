"""The other models of the family: their files' layouts at full size, and whole runs of tiny ones beside diffusers."""

import json
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionInpaintPipeline,
    StableDiffusionXLImg2ImgPipeline,
)
from family import (
    REFINER,
    SD1_INPAINT,
    SD2,
    SD2_V,
    XL,
    ZERO_SNR,
    assert_close,
    official_tensors,
    ours,
    saved,
    sd,
    theirs,
    xl,
)
from PIL import Image
from safetensors.torch import save_file
from synthetic import BUFFERS, LAYOUTS, OTHERS, UNUSED, sparse

import ldm
from ldm import checkpoint, models
from ldm.checkpoint import load
from ldm.samplers.schedule import Schedule
from ldm.source import IGNORED

KEYS = Path(__file__).parent / "keys"


# The numbers of the official models


CLIP_L = (768, 12, 12, "quick_gelu", 0, True, None, 49407)
OPEN_CLIP_H = (1024, 23, 16, "gelu", 0, True, None, 0)
CLIP_L_XL = (768, 12, 12, "quick_gelu", 1, False, None, 49407)
OPEN_CLIP_BIG_G = (1280, 32, 20, "gelu", 1, False, 1280, 0)
# Of the UNet: channels, heads at each level, depths, depth in the middle, widths of context and vector, whether the
# projection is linear. Of the texts: width, layers, heads, activation, skip, final_norm, projection, pad token. Of the
# VAE: scaling, upcast. Of the model: size, prediction, spacing, zero_negative.
OFFICIAL_NUMBERS = {
    "SD1": (
        ((320, 640, 1280, 1280), (8, 8, 8, 8), (1, 1, 1, 0), 1, 768, None, False),
        (CLIP_L, None),
        (0.18215, False),
        (512, "epsilon", None, False),
    ),
    "SD2": (
        ((320, 640, 1280, 1280), (5, 10, 20, 20), (1, 1, 1, 0), 1, 1024, None, True),
        (OPEN_CLIP_H, None),
        (0.18215, False),
        (512, "epsilon", None, False),
    ),
    "SDXL": (
        ((320, 640, 1280), (5, 10, 20), (0, 2, 10), 10, 2048, 2816, True),
        (CLIP_L_XL, OPEN_CLIP_BIG_G),
        (0.13025, True),
        (1024, "epsilon", "leading", True),
    ),
    "REFINER": (
        ((384, 768, 1536, 1536), (6, 12, 24, 24), (0, 4, 4, 0), 4, 1280, 2560, True),
        (None, OPEN_CLIP_BIG_G),
        (0.13025, True),
        (1024, "epsilon", "leading", False),
    ),
}


@pytest.mark.parametrize("row", OFFICIAL_NUMBERS)
def test_official_numbers(row):
    model, (unet, texts, vae, rest) = getattr(models, row), OFFICIAL_NUMBERS[row]
    u, v, s = model.unet, model.vae, model.scheduler
    heads = tuple(u.heads_at(channels) for channels in u.channels)
    assert (u.channels, heads, u.depth, u.mid_depth, u.context_width, u.vector_width, u.linear_projection) == unet
    assert (u.in_channels, u.out_channels, u.layers, u.groups) == (4, 4, 2, 32)
    for text, told in zip((model.text_encoder, model.text_encoder_2), texts, strict=True):
        assert (text and numbers(text)) == told
        assert text is None or (text.vocab_size, text.length, text.end_token) == (49408, 77, 49407)
    assert (v.scaling_factor, v.upcast) == vae
    assert (v.channels, v.layers, v.latent_channels, v.groups) == ((128, 256, 512, 512), 2, 4, 32)
    assert (model.size, s["prediction_type"], s.get("timestep_spacing"), model.zero_negative) == rest
    assert (s["steps_offset"], s["set_alpha_to_one"]) == (1, False)
    ends = Schedule.from_config(s).alphas_cumprod[[0, 999]].tolist()
    assert ends == pytest.approx([0.99915, 0.0046600985], rel=1e-7)


def numbers(text):
    pad = checkpoint.official_tokenizer(text).pad
    return text.width, text.layers, text.heads, text.activation, text.skip, text.final_norm, text.projection, pad


def test_inpainting_rows():
    """Nine channels in, and else the same numbers."""
    rows = {name: model for name, _, model in models.OFFICIAL}
    for name, model in {"SD 1.x": models.SD1, "SD 2.x": models.SD2, "SDXL": models.SDXL}.items():
        assert rows[f"{name} inpainting"].unet == replace(model.unet, in_channels=9)
        assert replace(rows[f"{name} inpainting"], unet=model.unet) == model


# Layouts of the official files


@pytest.mark.filterwarnings("ignore:.*does not say whether it predicts")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_tables_are_a_bijection(layout, tmp_path, monkeypatch):
    shapes = json.loads((KEYS / f"{layout}.json").read_text())
    file = sparse(tmp_path / "model.safetensors", shapes)
    name, count = LAYOUTS[layout]
    model = next(model for row, _, model in models.OFFICIAL if row == name)
    opened = checkpoint.open_model(file)
    assert opened.name == name
    plans = checkpoint.make_plans(opened.model, opened.sources)
    checkpoint.check(plans, file)
    for part in checkpoint.NETS:
        config = getattr(model, part)
        assert (part in plans) == (config is not None)
        assert config is None or plans[part].net.config == config
    asked = [theirs for plan in plans.values() for theirs in plan.theirs.values()]
    assert len(asked) == len(set(asked)) == count
    source = next(iter(plans.values())).source
    left = set(shapes) - {source._places[theirs][1] for theirs in asked}
    assert left == {name for name in shapes if IGNORED.fullmatch(name)} | UNUSED.get(layout, set())
    assert {name for name in left if "." not in name} == (set() if "xl" in layout else BUFFERS)
    assert {name for name in left if "." in name} == OTHERS[layout] | UNUSED.get(layout, set())


@pytest.mark.parametrize("kind", ["SD 2", "SDXL", "refiner"])
def test_single_file(kind, tmp_path, monkeypatch, base, refiner, sd2_v):
    """The same nets as in the folder, bit for bit: stacked q, k, v and the projection are found and turned."""
    pipe, model = {"SD 2": (sd2_v[0], SD2), "SDXL": (base[0], XL), "refiner": (refiner[0], REFINER)}[kind]
    tensors = official_tensors(pipe)
    shape = tuple(tensors["model.diffusion_model.input_blocks.0.0.weight"].shape)
    width = model.unet.context_width
    to_k = next(name for name in tensors if name.endswith("attn2.to_k.weight"))
    row = ("tiny", {"model.diffusion_model.input_blocks.0.0.weight": shape, to_k: (None, width)}, model)
    monkeypatch.setattr(models, "OFFICIAL", (row,))
    save_file({name: p.contiguous() for name, p in tensors.items()}, tmp_path / "tiny.safetensors")
    parts = load(tmp_path / "tiny.safetensors")
    for part in checkpoint.NETS:
        ours, theirs = getattr(parts, part), getattr(pipe, part)
        assert (ours is None) == (theirs is None)
        if ours is not None:
            assert ours.config == theirs.config
            for name, p in theirs.state_dict().items():
                assert torch.equal(ours.state_dict()[name], p), name
    pads = [None if t is None else t.pad for t in (parts.tokenizer, parts.tokenizer_2)]
    assert pads == {"SD 2": [0, None], "SDXL": [49407, 0], "refiner": [None, 0]}[kind]


@pytest.mark.parametrize(("spread", "guess"), [(0.05, "epsilon"), (0.12, "v_prediction")])
def test_the_prediction_of_sd2_is_a_guess_and_said_to_be_one(spread, guess, tmp_path, monkeypatch, sd2_v):
    tensors = official_tensors(sd2_v[0])
    bias = spread * torch.tensor([1.0, -1.0]).repeat(16) * (31 / 32) ** 0.5
    # The tiny net has no such tensor: any other takes its place.
    name = next(n for n, p in tensors.items() if n.startswith("model.diffusion_model.output") and p.shape == (32,))
    monkeypatch.setattr(checkpoint, "TELLS_V", name)
    row = ("SD 2.x", {"model.diffusion_model.input_blocks.0.0.weight": (16, 4, 3, 3)}, SD2)
    monkeypatch.setattr(models, "OFFICIAL", (row,))
    file = tmp_path / "tiny.safetensors"
    save_file({n: p.contiguous() for n, p in (tensors | {name: bias}).items()}, file)
    with pytest.warns(UserWarning, match=rf"taken for {guess}: a guess, .* spreads by {spread:.3f}"):
        parts = load(file)
    assert parts.scheduler["prediction_type"] == guess
    assert parts.size == (768 if guess == "v_prediction" else SD2.size)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for sure in ("epsilon", "v_prediction"):
            parts = load(file, prediction_type=sure)
            assert (parts.scheduler["prediction_type"], parts.size) == (sure, 768 if sure == "v_prediction" else 64)


# Whole runs beside diffusers


CAT, RED = "a cat", "the red"


@pytest.fixture(scope="module")
def sd2_v(tmp_path_factory):
    reference = sd(SD2_V)
    return saved(reference, tmp_path_factory.mktemp("sd2") / "model"), reference


class TestSD2:
    @pytest.mark.parametrize("rescale", [0.0, 0.7])
    @pytest.mark.parametrize("model", [SD2, SD2_V], ids=["epsilon", "v"])
    def test_guidance_rescale(self, model, rescale, tmp_path):
        reference = sd(model)
        pipe = saved(reference, tmp_path)
        assert pipe.prediction_type == model.scheduler["prediction_type"]
        assert pipe.tokenizer.pad == pipe.tokenizer.vocab["!"]
        common = {"prompt": CAT, "negative_prompt": RED, "guidance_rescale": rescale}
        assert_close(ours(pipe, sampler="ddim", **common), theirs(reference, **common))

    def test_clip_skip(self, sd2_v):
        pipe, reference = sd2_v
        a = ours(pipe, sampler="ddim", prompt=CAT, clip_skip=2, guidance_scale=1)
        assert_close(a, theirs(reference, prompt=CAT, clip_skip=1, guidance_scale=1))

    @pytest.mark.parametrize("sampler", [DDIMScheduler, EulerDiscreteScheduler])
    def test_zero_terminal_snr(self, sampler, tmp_path):
        """DDIM there has no noise scale but infinity; ours begins at sigma 4096, a 2.4e-4th of x0 away."""
        reference = sd(ZERO_SNR, sampler=sampler)
        pipe = saved(reference, tmp_path)
        assert pipe.schedule.sigma_max == pytest.approx(4096, rel=1e-4)
        name = "ddim" if sampler is DDIMScheduler else "euler"
        for rescale in (0.0, 0.7):
            common = {"prompt": CAT, "negative_prompt": RED, "guidance_rescale": rescale}
            assert_close(ours(pipe, sampler=name, **common), theirs(reference, **common))


class TestInpainting:
    @pytest.mark.parametrize("strength", [1.0, 0.6])
    def test_nine_channels(self, strength, tmp_path):
        reference = sd(SD1_INPAINT, StableDiffusionInpaintPipeline)
        pipe = saved(reference, tmp_path)
        assert pipe.unet.config.in_channels == 9
        x, y = np.meshgrid(np.linspace(0, 255, 64), np.linspace(0, 255, 64))
        image = Image.fromarray(np.stack([x, y, 255 - x], -1).astype(np.uint8))
        mask = Image.new("L", (64, 64))
        mask.paste(255, (16, 8, 50, 40))
        a = ours(pipe, prompt=CAT, negative_prompt=RED, sampler="ddim", image=image, mask=mask, strength=strength)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].contiguous() / 127.5 - 1
        inputs = {"image": pixels, "mask_image": mask, "height": 64, "width": 64, "strength": strength}
        assert_close(a, theirs(reference, prompt=CAT, negative_prompt=RED, **inputs))

    def test_without_a_mask_everything_is_hidden(self, tmp_path):
        pipe = saved(sd(SD1_INPAINT), tmp_path)
        white = Image.new("L", (64, 64), 255)
        a = ours(pipe, prompt=CAT, image=Image.new("RGB", (64, 64), "red"), mask=white, strength=1)
        assert torch.equal(ours(pipe, prompt=CAT), a)
        with pytest.raises(ValueError, match=r"mask with latents=: .* give it as image="):
            ours(pipe, prompt=CAT, latents=torch.zeros(1, 4, 32, 32), mask=white)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    reference = xl(XL)
    return saved(reference, tmp_path_factory.mktemp("xl") / "base"), reference


@pytest.fixture(scope="module")
def refiner(tmp_path_factory):
    reference = xl(REFINER, StableDiffusionXLImg2ImgPipeline)
    return saved(reference, tmp_path_factory.mktemp("xl") / "refiner"), reference


class TestXL:
    @pytest.mark.parametrize("negative", [None, "", RED])
    def test_negative_prompt(self, base, negative):
        pipe, reference = base
        assert pipe.zero_negative
        common = {"prompt": CAT, "negative_prompt": negative}
        assert_close(ours(pipe, **common), theirs(reference, **common))
        if negative is not None:
            assert (ours(pipe, **common) - ours(pipe, prompt=CAT)).abs().max() > 0.01

    def test_sizes(self, base):
        pipe, reference = base
        sizes = {"original_size": (100, 90), "crops_coords_top_left": (5, 10), "target_size": (70, 60)}
        common = {"prompt": CAT, "width": 48, "height": 32}
        a = ours(pipe, **common, **sizes)
        assert_close(a, theirs(reference, **common, **sizes))
        for name in sizes:
            assert (ours(pipe, **common, **(sizes | {name: (1, 2)})) - a).abs().max() > 1e-2

    def test_clip_skip(self, base):
        pipe, reference = base
        a = ours(pipe, prompt=CAT, guidance_scale=1, clip_skip=2)
        assert_close(a, theirs(reference, prompt=CAT, guidance_scale=1, clip_skip=1))
        with pytest.raises(ValueError, match=r"clip_skip=3: .* 2 layers"):
            ours(pipe, prompt=CAT, clip_skip=3)

    def test_guidance_rescale_and_a_batch(self, base):
        pipe, reference = base
        a = ours(pipe, prompt=[CAT, RED], seed=[3, 4], guidance_rescale=0.5)
        for i, prompt in enumerate([CAT, RED]):
            assert_close(a[i : i + 1], theirs(reference, 3 + i, prompt=prompt, guidance_rescale=0.5))

    def test_image_to_image(self, base):
        pipe, reference = base
        reference = StableDiffusionXLImg2ImgPipeline(**reference.components)
        reference.set_progress_bar_config(disable=True)
        image = Image.effect_noise((64, 64), 80).convert("RGB")
        a = ours(pipe, prompt=CAT, image=image, strength=0.5, steps=10)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].contiguous() / 127.5 - 1
        assert_close(a, theirs(reference, prompt=CAT, image=pixels, strength=0.5, steps=10))

    def test_hand_over_at_a_whole_timestep(self, base, refiner):
        """t = 200 is the base's, as in diffusers, though the sigma of 200 comes back as 199.9999..."""
        seen = []
        pipe, second = base[0], refiner[0]
        for name, net in (("base", pipe.unet), ("refiner", second.unet)):
            net.register_forward_pre_hook(lambda net, args, name=name: seen.append((name, round(float(args[1]), 3))))
        sigmas = pipe.schedule.sigma(torch.tensor([600.0, 200.0, 199.0, 50.0], dtype=torch.float64))
        ours(pipe, prompt=CAT, sigmas=torch.cat([sigmas, torch.zeros(1)]), refiner=second, refiner_start=0.8)
        assert seen == [("base", 600), ("base", 200), ("refiner", 199), ("refiner", 50)]

    @pytest.mark.parametrize("start", [0.8, 0.55, 0.3])
    def test_hand_over(self, base, refiner, start):
        (pipe, reference), (second, reference_2) = base, refiner
        assert second.text_encoder is None and not second.zero_negative
        common = {"prompt": CAT, "negative_prompt": RED, "steps": 10}
        latents = theirs(reference, **common, denoising_end=start)
        scores = {"aesthetic_score": 5.5, "negative_aesthetic_score": 1.5}
        b = theirs(reference_2, image=latents, **common, **scores, denoising_start=start)
        assert_close(ours(pipe, **common, **scores, refiner=second, refiner_start=start), b)

    def test_refiner_alone(self, refiner):
        pipe, reference = refiner
        image = Image.effect_noise((64, 64), 80).convert("RGB")
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].contiguous() / 127.5 - 1
        a = ours(pipe, prompt=CAT, image=image, strength=0.5, steps=10)
        assert_close(a, theirs(reference, prompt=CAT, image=pixels, strength=0.5, steps=10))


# Precision of SDXL's VAE


def test_the_vae_that_overflows_stays_in_float32(base, tmp_path):
    folder = tmp_path / "xl"
    base[1].save_pretrained(folder)
    half = load(folder, dtype=torch.float16)
    assert half.unet.conv_in.weight.dtype == torch.float16
    assert half.vae.quant_conv.weight.dtype == torch.float32
    assert load(folder, dtype=torch.bfloat16).vae.quant_conv.weight.dtype == torch.bfloat16
    assert load(folder, dtype=torch.float16, vae_dtype=torch.float16).vae.quant_conv.weight.dtype == torch.float16
    config = folder / "vae" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"force_upcast": False}))
    assert load(folder, dtype=torch.float16).vae.quant_conv.weight.dtype == torch.float16


def test_an_overflow_is_decoded_again_in_float32(base, tmp_path):
    base[1].save_pretrained(tmp_path)
    pipe = ldm.Pipeline.from_pretrained(tmp_path, vae_dtype=torch.bfloat16)
    z = torch.randn(1, 4, 32, 32)
    decoder = type(pipe.vae.decoder).forward

    def overflowing(self, z):
        return decoder(self, z) * (torch.inf if z.dtype == torch.bfloat16 else 1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(pipe.vae.decoder), "forward", overflowing)
        with pytest.warns(UserWarning, match="NaN or infinity in torch.bfloat16; it is run again in float32"):
            pixels = pipe.decode(z)
    assert pipe.vae.quant_conv.weight.dtype == torch.bfloat16
    pipe.vae.float()
    assert torch.equal(pixels, pipe.decode(z))
    assert not torch.equal(pixels, pipe.decode(z.bfloat16().float()))  # nor were the latents rounded on the way


def test_refiners_that_do_not_fit(base, tmp_path):
    with pytest.raises(ValueError, match="refiner is a str: give a Pipeline"):
        ours(base[0], prompt=CAT, refiner="refiner")
    paints = saved(sd(SD1_INPAINT), tmp_path)
    with pytest.raises(ValueError, match=r"refiner .* takes 9 channels, .* this model makes 4 channels"):
        ours(base[0], prompt=CAT, refiner=paints)
    image, mask = Image.new("RGB", (64, 64)), Image.new("L", (64, 64))
    other = saved(sd(SD2), tmp_path / "other")
    other.vae.config = replace(other.vae.config, scaling_factor=0.25)
    with pytest.raises(ValueError, match=r"refiner 'other' has latents of another kind: .* by 0.25, .* by 0.5"):
        ours(base[0], prompt=CAT, refiner=other)
    with pytest.raises(ValueError, match="refiner with mask=: after an inpainting model"):
        ours(paints, prompt=CAT, image=image, mask=mask, refiner=base[0])
