"""SD 1.5 at its full size, on random weights: parameters against the official file's, outputs against the references.

pytest -m full tests/test_full_size.py    # one net at a time: at most 10 GB of memory, minutes on one core
"""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from parity import (
    UNetInputs,
    assert_equal,
    diffusers_unet,
    diffusers_vae,
    randomise,
    reference_pipeline,
    text_differences,
    text_reference,
    transformers_text,
    twin,
    unet_differences,
    unet_reference,
    vae_differences,
    vae_reference,
)
from synthetic import SD15_SHAPES, TINY_NETS, TINY_ROW, single_file, write
from torch import Tensor

import ldm
from ldm import models
from ldm.clip import TextEncoder
from ldm.models import SD1, Model
from ldm.unet import UNet
from ldm.vae import VAE

TOLERANCE = 1e-4


def without_1x1(shape: list[int]) -> tuple[int, ...]:
    """A 1x1 convolution is a Linear with two more dimensions; the official file and diffusers choose differently."""
    return tuple(shape[:2] if shape[2:] == [1, 1] else shape)


@pytest.mark.parametrize(
    ("net_class", "config", "prefix", "count"),
    [
        (UNet, SD1.unet, "model.diffusion_model.", 859_520_964),
        (VAE, SD1.vae, "first_stage_model.", 83_653_863),
        (TextEncoder, SD1.text_encoder, "cond_stage_model.transformer.", 123_060_480),
    ],
)
def test_parameters_have_the_official_shapes(net_class, config, prefix, count):
    with torch.device("meta"):
        net = net_class(config)
    official = [
        shape for name, shape in SD15_SHAPES.items() if name.startswith(prefix) and not name.endswith("position_ids")
    ]
    ours = [list(tensor.shape) for tensor in net.state_dict().values()]
    assert sum(p.numel() for p in net.parameters()) == count
    assert Counter(map(without_1x1, ours)) == Counter(map(without_1x1, official))


def report(differences: dict[str, float]) -> None:
    worst = max(differences, key=differences.get)
    print(f"{len(differences)} outputs, worst {differences[worst]:.1e} in {worst}")


@pytest.mark.full
def test_unet():
    t = torch.tensor([481.5])
    inputs = UNetInputs(torch.randn(1, SD1.unet.in_channels, 64, 64), t, torch.randn(1, 77, SD1.unet.context_width))
    found = unet_differences(UNet, SD1.unet, unet_reference(randomise(diffusers_unet(SD1.unet)), inputs), inputs)
    report(found)
    assert_equal(found, 525 + len(["output"]), TOLERANCE)


@pytest.mark.full
def test_vae():
    image, z = torch.rand(1, 3, 256, 256) * 2 - 1, torch.randn(1, 4, 32, 32)
    found = vae_differences(VAE, SD1.vae, vae_reference(randomise(diffusers_vae(SD1.vae)), image, z), image, z)
    report(found)
    assert_equal(found, 168 + len(["mean", "std", "log std", "image"]), TOLERANCE)


@pytest.mark.full
def test_text_encoder():
    ids = torch.randint(0, 49406, (2, SD1.text_encoder.length))
    ids[0, 9:], ids[1, -1] = SD1.text_encoder.end_token, SD1.text_encoder.end_token
    reference = text_reference(randomise(transformers_text(SD1.text_encoder)), SD1.text_encoder, ids)
    found = text_differences(TextEncoder, SD1.text_encoder, reference, ids)
    report(found)
    assert_equal(found, 135 + len(["pooled"]) + SD1.text_encoder.layers, TOLERANCE)


# From a single file to a picture

TEXTS = {"prompt": "a red heart, oil on canvas", "negative_prompt": "blue, blurry"}


@pytest.fixture
def tiny_row(monkeypatch):
    monkeypatch.setattr(models, "OFFICIAL", (*models.OFFICIAL, (*TINY_ROW[:2], TINY_NETS)))


def write_single_file(path: Path, model: Model, reference: StableDiffusionPipeline) -> dict[str, list[int]]:
    """With the official names, from the key table. Returns the shapes."""
    unet, vae = twin(UNet, model.unet, reference.unet), twin(VAE, model.vae, reference.vae)
    text = twin(TextEncoder, model.text_encoder, reference.text_encoder, "text_model.")
    tensors = single_file((unet, vae, text), buffers=True)
    write(path, tensors)
    return {name: list(tensor.shape) for name, tensor in tensors.items()}


def reference_picture(reference: StableDiffusionPipeline, side: int) -> tuple[Tensor, np.ndarray]:
    """Of 2 steps in float32: latents, and pixels."""
    latents = []
    reference.to(torch.float32).set_progress_bar_config(disable=True)
    images = reference(
        **TEXTS,
        num_inference_steps=2,
        width=side,
        height=side,
        generator=torch.Generator().manual_seed(0),
        callback_on_step_end=lambda pipe, i, t, now: latents.append(now["latents"]) or {},
    ).images
    return latents[-1], np.asarray(images[0]).astype(int)


def assert_same_picture(path: Path, latents: Tensor, pixels: np.ndarray) -> ldm.Output:
    side = len(pixels)
    pipe = ldm.Pipeline.from_pretrained(path, dtype=torch.float32, device="cpu")
    made = pipe(**TEXTS, steps=2, sampler="ddim", width=side, height=side, seed=0, progress=False)
    off = float((made.latents - latents).abs().max() / latents.abs().max())
    pixels_off = np.abs(np.asarray(made.images[0]).astype(int) - pixels).max()
    print(f"latents {off:.1e} of their largest, pixels {pixels_off} of 255, which span {pixels.min()}..{pixels.max()}")
    assert ((pixels > 0) & (pixels < 255)).mean() > 0.5  # not clipped: a difference would show
    assert off <= 1e-3 and pixels_off <= 2
    return made


def test_tiny_single_file_and_folder_make_the_same_picture(tiny_row, tmp_path):
    reference = reference_pipeline(TINY_NETS)
    write_single_file(tmp_path / "tiny.safetensors", TINY_NETS, reference)
    reference.save_pretrained(tmp_path / "folder")
    expected = reference_picture(reference, side=64)
    from_file, from_folder = (
        assert_same_picture(tmp_path / name, *expected) for name in ("tiny.safetensors", "folder")
    )
    assert torch.equal(from_file.latents, from_folder.latents)
    assert from_file.images[0].tobytes() == from_folder.images[0].tobytes()


@pytest.mark.full
def test_single_file_makes_the_picture_that_diffusers_makes(tmp_path):
    path = tmp_path / "v1-5.safetensors"
    reference = reference_pipeline(SD1)
    assert write_single_file(path, SD1, reference) == SD15_SHAPES
    expected = reference_picture(reference, side=128)
    del reference  # its 4 GB
    assert_same_picture(path, *expected)
    path.unlink()  # pytest would keep the gigabytes of its last three runs
