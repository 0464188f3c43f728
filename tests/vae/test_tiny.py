"""The tiny autoencoder against diffusers', and in the place of a model's own VAE."""

import json

import pytest
import torch
from diffusers import AutoencoderTiny, StableDiffusionImg2ImgPipeline
from parity import TOLERANCE, max_difference, randomise
from PIL import Image
from safetensors.torch import load_file, save_file
from synthetic import diffusers_pipeline

import ldm
from ldm.checkpoint import CheckpointError
from ldm.vae import TinyConfig, TinyVAE

WIDTHS = {"encoder_block_out_channels": (8,) * 4, "decoder_block_out_channels": (8,) * 4}


@pytest.fixture
def theirs():
    return randomise(AutoencoderTiny(**WIDTHS)).eval().requires_grad_(False)


@pytest.fixture
def model(tmp_path):
    diffusers_pipeline().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_equal_to_diffusers(theirs):
    ours = TinyVAE(TinyConfig(channels=(8,) * 4))
    ours.load_state_dict(theirs.requires_grad_(False).state_dict())
    ours.requires_grad_(False)
    image, z = torch.rand(2, 3, 40, 24) * 2 - 1, 5 * torch.randn(2, 4, 5, 3)
    mean, std = ours.encode(image)
    found, expected = [mean, ours.decode(z)], [theirs.encode(image).latents, theirs.decode(z).sample]
    assert max_difference(found, expected) <= TOLERANCE and not std.any()
    assert max_difference([ours.decode(z[:, :, 1:])], [expected[1][:, :, 8:]]) > 0.01


def test_official_sizes():
    """The tensors of taesd's and taesdxl's files: 2 x 1.2 million parameters."""
    shapes = {name: tuple(p.shape) for name, p in AutoencoderTiny().state_dict().items()}
    assert {name: tuple(p.shape) for name, p in TinyVAE(TinyConfig()).state_dict().items()} == shapes
    assert sum(p.numel() for p in TinyVAE(TinyConfig()).parameters()) == 2_445_063


@pytest.mark.parametrize("single", [False, True])
def test_in_the_place_of_the_vae(theirs, model, tmp_path, single):
    """Whole runs, from a text and from a picture, against diffusers' pipelines with this autoencoder."""
    theirs.save_pretrained(tmp_path / "taesd")
    path = tmp_path / "taesd" / "diffusion_pytorch_model.safetensors" if single else tmp_path / "taesd"
    pipe = ldm.Pipeline.from_pretrained(model, vae=path, device="cpu")
    assert isinstance(pipe.vae, TinyVAE)
    reference = diffusers_pipeline()
    reference.vae, reference.vae_scale_factor = theirs, 8
    reference.image_processor.config.vae_scale_factor = 8
    reference.scheduler = ldm_scheduler(reference)
    reference.set_progress_bar_config(disable=True)
    how = {"guidance_scale": 3, "num_inference_steps": 4, "output_type": "pt"}
    expected = reference("a", width=64, height=64, generator=torch.Generator().manual_seed(3), **how).images
    out = pipe("a", width=64, height=64, steps=4, guidance_scale=3, seed=3, sampler="ddim", progress=False)
    assert ((pipe.decode(out.latents) / 2 + 0.5).clamp(0, 1) - expected).abs().max() < 1e-4
    image = Image.effect_noise((64, 64), 60).convert("RGB")
    second = StableDiffusionImg2ImgPipeline(**reference.components, requires_safety_checker=False)
    second.vae_scale_factor = 8
    second.set_progress_bar_config(disable=True)
    expected = second("a", image=image, strength=0.5, generator=torch.Generator().manual_seed(3), **how).images
    how = {"steps": 4, "guidance_scale": 3, "seed": 3, "sampler": "ddim", "progress": False}
    out = pipe("a", image=image, strength=0.5, **how)
    assert ((pipe.decode(out.latents) / 2 + 0.5).clamp(0, 1) - expected).abs().max() < 1e-4


def ldm_scheduler(reference):
    from diffusers import DDIMScheduler

    return DDIMScheduler.from_config(reference.scheduler.config, clip_sample=False, set_alpha_to_one=False)


def test_what_does_not_fit(theirs, model, tmp_path):
    """A file that lacks a tensor; a folder whose config is of another net."""
    theirs.save_pretrained(tmp_path / "taesd")
    tensors = load_file(tmp_path / "taesd" / "diffusion_pytorch_model.safetensors")
    tensors.pop("encoder.layers.0.bias")
    save_file(tensors, tmp_path / "cut.safetensors")
    with pytest.raises(CheckpointError, match=r"1 missing:\n  vae encoder.layers.0.bias \(8,\): no "):
        ldm.Pipeline.from_pretrained(model, vae=tmp_path / "cut.safetensors")
    save_file({"decoder.layers.0.weight": tensors["encoder.layers.1.conv.0.bias"]}, tmp_path / "flat.safetensors")
    with pytest.raises(CheckpointError, match=r"there is no vae at all|does not fit"):
        ldm.Pipeline.from_pretrained(model, vae=tmp_path / "flat.safetensors")
    config = tmp_path / "taesd" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"upsample_fn": "bilinear"}))
    with pytest.raises(CheckpointError, match="upsample_fn"):
        ldm.Pipeline.from_pretrained(model, vae=tmp_path / "taesd")


def test_inspect(tmp_path):
    AutoencoderTiny().half().save_pretrained(tmp_path)
    for path in (tmp_path, tmp_path / "diffusion_pytorch_model.safetensors"):
        report = ldm.inspect(path)
        assert (report.kind, report.name) == ("VAE", "TAESD, of 4 latent channels, for SD 1.x, SD 2.x or SDXL")
        assert report.parts == {"vae": 134} and not report.problem
        assert report.python == f"pipe = ldm.Pipeline.from_pretrained(MODEL, vae={str(path)!r})"
    AutoencoderTiny(latent_channels=16).save_pretrained(tmp_path / "flux")
    report = ldm.inspect(tmp_path / "flux")
    assert report.name == "TAESD, of 16 latent channels" and "4 latent channels" in report.problem


def test_tiling(theirs, model, tmp_path):
    """Rolled latents decode to the rolled picture."""
    theirs.save_pretrained(tmp_path)
    pipe = ldm.Pipeline.from_pretrained(model, vae=tmp_path, device="cpu")
    z = torch.randn(1, 4, 6, 6)
    with torch.no_grad():
        plain, wrapping = pipe.vae, ldm.seamless.seamless(pipe.vae, "both")
        for vae, same in ((plain, False), (wrapping, True)):
            off = (vae.decode(z.roll((2, 3), (2, 3))) - vae.decode(z).roll((16, 24), (2, 3))).abs().max()
            assert (off < 1e-5) == same
