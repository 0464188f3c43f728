"""Pictures that join themselves at opposite edges: nothing in such a net knows where an axis begins."""

import numpy as np
import pytest
import torch
from family import SD1, VAE_
from parity import TOLERANCE, diffusers_unet, diffusers_vae, max_difference, randomise, twin
from PIL import Image
from safetensors.torch import save_file
from torch import nn

import ldm
from ldm.pipeline import DEFAULT_MODEL
from ldm.seamless import seamless
from ldm.unet import UNet
from ldm.vae import VAE, strips

AXES = {"x": [3], "y": [2], "both": [2, 3]}
PROMPT = "a red heart, noto style"


@pytest.fixture(scope="module")
def pipe():
    return ldm.Pipeline.from_pretrained()


@pytest.fixture(scope="module")
def unet():
    return twin(UNet, SD1.unet, randomise(diffusers_unet(SD1.unet))).requires_grad_(False)


@pytest.fixture(scope="module")
def vae():
    return twin(VAE, VAE_, randomise(diffusers_vae(VAE_))).requires_grad_(False)


def off(ours, theirs):
    return max_difference([ours], [theirs])


def circular(net):
    """webui's way, and everybody's: both axes of every convolution."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            module.padding_mode = "circular"
    return net


@pytest.mark.parametrize("size", [(8, 12), (7, 9)])
@torch.no_grad()
def test_diffusers_unet_with_circular_padding(unet, size):
    reference = randomise(diffusers_unet(SD1.unet))
    x, context = torch.randn(2, 4, *size), torch.randn(2, 77, SD1.unet.context_width)
    t = torch.tensor([481.5, 20.0])
    plain = reference(x, t, context).sample
    expected = circular(reference)(x, t, context).sample
    assert off(seamless(unet, "both")(x, t, context), expected) <= TOLERANCE
    assert off(plain, expected) > 0.01


@torch.no_grad()
def test_diffusers_decoder_with_circular_padding(vae):
    reference, z = circular(randomise(diffusers_vae(VAE_))), torch.randn(2, 4, 6, 10)
    expected = reference.decode(z).sample
    assert off(seamless(vae, "both").decode(z), expected) <= TOLERANCE
    assert off(vae.decode(z), expected) > 0.01


@pytest.mark.parametrize("tiling", AXES)
@pytest.mark.parametrize("axis", [2, 3])
@pytest.mark.parametrize("by", [2, 6])
def test_nets_roll(unet, vae, tiling, axis, by):
    """Along a tiled axis, by a multiple of their strides, and along no other."""
    net, coder, factor = seamless(unet, tiling), seamless(vae, tiling), vae.config.factor
    x, image = torch.randn(1, 4, 8, 8), torch.randn(1, 3, 16, 16)
    t, context = torch.tensor([500.0]), torch.randn(1, 77, SD1.unet.context_width)
    differences = {
        "unet": off(net(x.roll(by, axis), t, context), net(x, t, context).roll(by, axis)),
        "decoder": off(coder.decode(x.roll(by, axis)), coder.decode(x).roll(by * factor, axis)),
        "encoder": off(coder.encode(image.roll(by * factor, axis)).mean, coder.encode(image).mean.roll(by, axis)),
    }
    for difference in differences.values():
        assert difference <= TOLERANCE if axis in AXES[tiling] else difference > 0.01


@pytest.mark.parametrize("sampler", ["ddim", "euler"])  # without fresh noise, which would not roll
@pytest.mark.parametrize("tiling", [*AXES, None])
def test_pictures_roll(pipe, sampler, tiling):
    """With the initial noise, of which nothing else is a place."""
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    settings = {"steps": 4, "tiling": tiling, "sampler": sampler, "progress": False}
    out = pipe(PROMPT, noise=noise, **settings)
    for axis in (2, 3):
        rolled = pipe(PROMPT, noise=noise.roll(8, axis), **settings)
        difference = (rolled.latents - out.latents.roll(8, axis)).abs().max()
        a, b = (np.asarray(picture.images[0]).astype(int) for picture in (out, rolled))
        levels = np.abs(np.roll(a, 8 * pipe.vae.config.factor, axis - 2) - b).max()
        if tiling is not None and axis in AXES[tiling]:
            assert difference <= 1e-3 and levels <= 1
        else:
            assert difference > 1 and levels > 100


@pytest.mark.parametrize("tiling", [*AXES, None])
def test_opposite_edges_match(pipe, tiling):
    """Over many pictures the step from the last row or column to the first is one like any other.

    The pictures are what one evaluation makes of little noise: areas up to every edge, not a thing on white.
    """
    how = {"sigmas": torch.tensor([2.0, 0.0]), "guidance_scale": 1}
    out = pipe("", batch_size=16, **how, tiling=tiling, progress=False)
    pixels = np.stack([np.asarray(image) for image in out.images]).astype(float)  # (B,h,w,3)
    for axis in (2, 3):
        steps = np.abs(pixels - np.roll(pixels, 1, axis - 1))
        seam, *inside = steps.mean(tuple({0, 1, 2, 3} - {axis - 1}))
        if tiling is not None and axis in AXES[tiling]:
            assert seam <= max(inside) and seam < 1.25 * np.mean(inside)
        else:
            assert seam > 1.5 * np.mean(inside)


def test_the_encoder_wraps_too(pipe):
    """The picture to start from, rolled, gives the rolled picture."""
    picture = pipe(PROMPT, steps=2, progress=False).images[0]
    rolled = Image.fromarray(np.roll(np.asarray(picture), 8 * pipe.vae.config.factor, axis=1))
    for tiling in ("x", None):
        a, b = (pipe(image=i, strength=0, tiling=tiling, progress=False).latents for i in (picture, rolled))
        difference = (a.roll(8, 3) - b).abs().max()
        assert difference <= 1e-5 if tiling else difference > 0.1


def test_shares_all_tensors(unet, vae):
    for net in (unet, vae):
        copy = seamless(net, "x")
        ours, theirs = copy.state_dict(keep_vars=True), net.state_dict(keep_vars=True)
        assert list(ours) == list(theirs) and all(ours[name] is theirs[name] for name in theirs)


def test_wraps_rows(unet, vae):
    for net in (unet, vae, vae.decoder):
        assert [strips.wraps_rows(seamless(net, tiling)) for tiling in AXES] == [False, True, True]
        assert not strips.wraps_rows(net)


@pytest.mark.parametrize("tiling", AXES)
def test_in_strips(vae, tiling, monkeypatch):
    """A large picture is cut into strips, of which the first and the last are neighbours."""
    tiled = seamless(vae, tiling)
    image, z = torch.randn(1, 3, 96, 40), torch.randn(1, 4, 48, 20)
    whole = tiled.encode(image).mean, tiled.decode(z)
    monkeypatch.setattr(strips, "WHOLE_UP_TO", 0)
    monkeypatch.setattr(strips, "STRIP", 2**12)
    cut = tiled.encode(image).mean, tiled.decode(z)
    for a, b in zip(whole, cut, strict=True):
        assert 0 < (a - b).abs().max() <= 1e-5 * a.abs().max()


def test_the_pipeline_is_left_alone(pipe, monkeypatch):
    """Bitwise, and after an exception too; a stream that is not read to its end wraps nothing but itself."""
    settings = {"steps": 2, "progress": False}
    before = pipe(PROMPT, **settings)
    nets = pipe.unet, pipe.vae
    pipe(PROMPT, tiling="both", **settings)
    stream = pipe.stream(PROMPT, tiling="both", steps=2)
    next(stream)

    def stop(step):
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        pipe(PROMPT, tiling="both", callback=stop, **settings)
    assert (pipe.unet, pipe.vae) == nets
    after = pipe(PROMPT, **settings)
    assert torch.equal(before.latents, after.latents) and before.images == after.images


def test_stream_is_the_same(pipe):
    out = pipe(PROMPT, steps=2, tiling="x", seed=4, progress=False)
    *_, last = pipe.stream(PROMPT, steps=2, tiling="x", seed=4)
    assert torch.equal(out.latents, last.x) and out.settings.tiling == "x"
    assert not torch.allclose(out.latents, pipe(PROMPT, steps=2, seed=4, progress=False).latents, atol=0.1)


def test_the_refiner_wraps_too(pipe):
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    settings = {"steps": 4, "tiling": "x", "refiner": ldm.Pipeline.from_pretrained(), "refiner_start": 0.5}
    a, b = (pipe(PROMPT, noise=n, progress=False, **settings).latents for n in (noise, noise.roll(8, 3)))
    assert (a.roll(8, 3) - b).abs().max() <= 1e-3


def test_lora(tmp_path):
    """Weights that are merged or set back are those of the tiled nets as well."""
    pipe = ldm.Pipeline.from_pretrained(DEFAULT_MODEL)
    name = "lora_unet_mid_block_resnets_0_conv1"
    channels = pipe.unet.config.channels[-1]
    tensors = {"lora_down.weight": torch.randn(2, channels, 3, 3), "lora_up.weight": torch.randn(channels, 2, 1, 1)}
    save_file({f"{name}.{part}": tensor for part, tensor in tensors.items()}, tmp_path / "a.safetensors")
    settings = {"steps": 2, "tiling": "both", "progress": False}
    before = pipe(PROMPT, **settings).latents
    lora = pipe.load_lora(tmp_path / "a.safetensors")
    assert not torch.allclose(pipe(PROMPT, **settings).latents, before, atol=0.01)
    lora.remove()
    assert torch.equal(pipe(PROMPT, **settings).latents, before)
