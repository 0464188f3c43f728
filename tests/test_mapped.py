"""What of a net is but a mapped file leaves the memory, and nothing else does."""

import mmap
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import ldm
from ldm import checkpoint, convolutions, mapped, pipeline


def from_file(path, values):
    """As weights are, that come from a file."""
    save_file({"weight": values}, path)
    return safe_open(path, "pt").get_tensor("weight")


def resident(tensor):
    """The share of its pages that are in memory."""
    page = mmap.PAGESIZE
    with Path("/proc/self/pagemap").open("rb") as pagemap:
        pagemap.seek(8 * (tensor.data_ptr() // page))
        pages = np.frombuffer(pagemap.read(8 * (tensor.nbytes // page)), dtype=np.uint64)
    return float((pages >> np.uint64(63)).mean())


@pytest.mark.skipif(not Path("/proc/self/pagemap").exists(), reason="tells of Linux")
def test_files_are_handed_back(tmp_path):
    values = torch.randn(256, 256, 3, 3)
    tensor = from_file(tmp_path / "weight.safetensors", values)
    assert torch.equal(tensor, values) and resident(tensor) > 0.9
    mapped.hand_back(tensor)
    assert resident(tensor) < 0.1
    assert torch.equal(tensor, values)
    tensor[100] += 1  # a page that is no longer the file's: all of it must stay
    mapped.hand_back(tensor)
    assert resident(tensor) > 0.9
    values[100] += 1
    assert torch.equal(tensor, values)


@pytest.mark.skipif(not Path("/proc/self/pagemap").exists(), reason="tells of Linux")
def test_packed_weights_of_files_are_handed_back(tmp_path):
    layer = convolutions.Conv2d(256, 256, 3, padding=1)
    layer.weight = nn.Parameter(from_file(tmp_path / "weight.safetensors", torch.randn(256, 256, 3, 3)))
    assert layer.weight.isfinite().all() and resident(layer.weight) > 0.9
    x = torch.randn(1, 256, 16, 16)
    with torch.no_grad():
        fast = layer(x)
        assert resident(layer.weight) < 0.1
        assert torch.allclose(
            fast, F.conv2d(x, layer.weight, layer.bias, padding=1), atol=1e-5 * float(fast.abs().max())
        )
    mapped.hand_back_all(layer)
    assert resident(layer.weight) < 0.1


def test_memory_is_not_handed_back():
    tensor = torch.randn(256, 256, 3, 3)
    expected = tensor.clone()
    for part in (tensor, tensor[1:], torch.randn(3), torch.empty(0)):
        mapped.hand_back(part)
    assert torch.equal(tensor, expected)


def test_encoders_and_vae_are_handed_back_when_they_are_loaded(monkeypatch):
    handed = []
    monkeypatch.setattr(checkpoint, "hand_back_all", handed.append)
    pipe = ldm.Pipeline.from_pretrained(device="cpu")
    assert {*map(id, handed)} == {id(pipe.vae), id(pipe.text_encoder)}


def test_nets_are_handed_back_when_they_have_done_their_part(monkeypatch):
    pipe, order = ldm.Pipeline.from_pretrained(device="cpu"), []
    monkeypatch.setattr(pipeline, "hand_back_all", lambda net: order.append(("back", net)))
    for net in (pipe.text_encoder, pipe.unet, pipe.vae.decoder):
        net.register_forward_hook(lambda net, inputs, y: order.append(("used", net)))
    pipe("a red heart", steps=1, guidance_scale=1, progress=False)
    text, unet, decoder = pipe.text_encoder, pipe.unet, pipe.vae.decoder
    ends = [("used", text), ("back", text), ("back", None), ("used", unet), ("back", unet), ("used", decoder)]
    assert order == ends
