"""SD 1.5 at its full size, on random weights: parameters against the official file's, outputs against the references.

pytest -m full tests/test_full_size.py    # one net at a time: at most 10 GB of memory, minutes on one core
"""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from parity import (
    UNetInputs,
    assert_equal,
    diffusers_unet,
    diffusers_vae,
    randomise,
    text_differences,
    text_reference,
    transformers_text,
    unet_differences,
    unet_reference,
    vae_differences,
    vae_reference,
)

from ldm.clip import TextEncoder
from ldm.clip.config import SD1 as TEXT_CONFIG
from ldm.unet import UNet
from ldm.unet.config import SD1 as UNET_CONFIG
from ldm.vae import VAE
from ldm.vae.config import SD1 as VAE_CONFIG

OFFICIAL = json.loads((Path(__file__).parent / "keys" / "sd15.json").read_text())
TOLERANCE = 1e-4


def without_1x1(shape: list[int]) -> tuple[int, ...]:
    """A 1x1 convolution is a Linear with two more dimensions; the official file and diffusers choose differently."""
    return tuple(shape[:2] if shape[2:] == [1, 1] else shape)


@pytest.mark.parametrize(
    ("net_class", "config", "prefix", "count"),
    [
        (UNet, UNET_CONFIG, "model.diffusion_model.", 859_520_964),
        (VAE, VAE_CONFIG, "first_stage_model.", 83_653_863),
        (TextEncoder, TEXT_CONFIG, "cond_stage_model.transformer.", 123_060_480),
    ],
)
def test_parameters_have_the_official_shapes(net_class, config, prefix, count):
    with torch.device("meta"):
        net = net_class(config)
    official = [
        shape for name, shape in OFFICIAL.items() if name.startswith(prefix) and not name.endswith("position_ids")
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
    inputs = UNetInputs(
        torch.randn(1, UNET_CONFIG.in_channels, 64, 64), t, torch.randn(1, 77, UNET_CONFIG.context_width)
    )
    found = unet_differences(UNet, UNET_CONFIG, unet_reference(randomise(diffusers_unet(UNET_CONFIG)), inputs), inputs)
    report(found)
    assert_equal(found, 525 + len(["output"]), TOLERANCE)


@pytest.mark.full
def test_vae():
    image, z = torch.rand(1, 3, 256, 256) * 2 - 1, torch.randn(1, 4, 32, 32)
    found = vae_differences(VAE, VAE_CONFIG, vae_reference(randomise(diffusers_vae(VAE_CONFIG)), image, z), image, z)
    report(found)
    assert_equal(found, 168 + len(["mean", "std", "log std", "image"]), TOLERANCE)


@pytest.mark.full
def test_text_encoder():
    ids = torch.randint(0, 49406, (2, TEXT_CONFIG.length))
    ids[0, 9:], ids[1, -1] = TEXT_CONFIG.end_token, TEXT_CONFIG.end_token
    found = text_differences(
        TextEncoder, TEXT_CONFIG, text_reference(randomise(transformers_text(TEXT_CONFIG)), ids), ids
    )
    report(found)
    assert_equal(found, 135 + len(["pooled"]) + TEXT_CONFIG.layers, TOLERANCE)
