"""Convolutions with a quarter of the multiplications: the formula in float64, its rounding, and where it is taken."""

import gc

import pytest
import torch
import torch.nn.functional as F
from parity import randomise
from torch import nn

from ldm import convolutions, packed, winograd
from ldm.convolutions import Conv2d, added, norm_conv
from ldm.unet.blocks import ResnetBlock
from ldm.winograd import by_taps, transformed

SIZES = [(4, 4), (16, 64), (9, 67), (3, 5), (30, 6)]


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


@pytest.fixture
def taken(monkeypatch):
    """The shapes for which it was, by nets of any width and any picture."""
    shapes = []

    def counting(x, *others):
        shapes.append(tuple(x.shape))
        return winograd.winograd(x, *others)

    monkeypatch.setattr(convolutions, "winograd", counting)
    monkeypatch.setattr(convolutions, "LARGE", 1)
    monkeypatch.setattr(convolutions, "WINOGRAD_WIDTH", 8)
    monkeypatch.setattr(convolutions, "WINOGRAD_CHANNELS", 32**2)
    return shapes


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("padding", [(1, 1), (0, 1), (0, 0), (2, 1)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("block", [1, winograd.BLOCK])
def test_formula(size, padding, bias, block, monkeypatch):
    monkeypatch.setattr(winograd, "BLOCK", block)
    x = torch.randn(2, 5, *size, dtype=torch.float64)
    weight, b = torch.randn(7, 5, 3, 3, dtype=torch.float64), torch.randn(7, dtype=torch.float64) if bias else None
    for layout in (torch.contiguous_format, torch.channels_last):
        y = winograd.winograd(x.to(memory_format=layout), transformed(by_taps(weight)), b, padding)
        assert y.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(y, F.conv2d(x, weight, b, padding=padding), rtol=0, atol=1e-12)


def test_rounding():
    """As the docstring says; a plain one is beside it, so that a larger error of all is not taken for its own."""
    conv, x = Conv2d(320, 320, 3, padding=1), torch.randn(1, 320, 64, 64)
    exact = F.conv2d(x.double(), conv.weight.double(), conv.bias.double(), padding=1)
    off = [
        (y - exact).abs().max() / exact.abs().max() for y in (conv(x), F.conv2d(x, conv.weight, conv.bias, padding=1))
    ]
    assert 5e-6 < off[0] < 3e-5
    assert off[1] < 5e-6


@pytest.mark.parametrize("size", [(16, 64), (9, 67)])
def test_each_picture_is_what_it_is_alone(size, taken):
    conv, x = randomise(Conv2d(64, 64, 3, padding=1)), torch.randn(5, 64, *size)
    y = conv(x)
    assert all(torch.equal(conv(x[i : i + 1]), y[i : i + 1]) for i in range(5))
    assert len(taken) == 6


def test_added(taken):
    conv, x, start = randomise(Conv2d(64, 32, 3, padding=1)), torch.randn(2, 64, 12, 16), torch.randn(2, 32, 12, 16)
    before = start.clone()
    assert torch.equal(added(start, conv, x), conv(x) + start)
    assert torch.equal(start, before)
    assert len(taken) == 2


def test_changed_weights(taken):
    conv, x = randomise(Conv2d(64, 32, 3, padding=1)), torch.randn(2, 64, 12, 16)
    before = conv(x)
    conv.weight *= 2
    conv.bias *= 2
    torch.testing.assert_close(conv(x), 2 * before, rtol=1e-6, atol=1e-6)
    assert len(taken) == 2


def narrow():
    Conv2d(64, 64, 3, padding=1)(torch.randn(1, 64, 32, 7))


def few_channels():
    Conv2d(31, 33, 3, padding=1)(torch.randn(1, 31, 32, 32))


def stride():
    Conv2d(64, 64, 3, stride=2, padding=1)(torch.randn(1, 64, 32, 32))


def single_pixels():
    Conv2d(64, 64, 1)(torch.randn(1, 64, 32, 32))


def bfloat16():
    Conv2d(64, 64, 3, padding=1).bfloat16()(torch.randn(1, 64, 32, 32).bfloat16())


def float64():
    Conv2d(64, 64, 3, padding=1).double()(torch.randn(1, 64, 32, 32).double())


def gradients():
    with torch.enable_grad():
        assert Conv2d(64, 64, 3, padding=1)(torch.randn(1, 64, 32, 32)).requires_grad


def circular():
    Conv2d(64, 64, 3, padding=1, padding_mode="circular")(torch.randn(1, 64, 32, 32))


@pytest.mark.parametrize("case", [narrow, few_channels, stride, single_pixels, bfloat16, float64, gradients, circular])
def test_not_taken(case, taken):
    case()
    assert taken == []


def test_by_default_where_the_nets_are_wide():
    def is_taken(inp, out, width):
        return convolutions.by_winograd(Conv2d(inp, out, 3, padding=1), torch.randn(1, inp, 4, width))

    assert is_taken(320, 320, 64) and is_taken(512, 256, 256) and is_taken(512, 512, 64)
    assert not (is_taken(320, 320, 32) or is_taken(1280, 1280, 32) or is_taken(256, 256, 256) or is_taken(4, 320, 64))


@pytest.fixture
def laid_out(monkeypatch):
    """Of which weights."""
    shapes = []

    def counting(taps):
        shapes.append(tuple(taps.shape))
        return transformed(taps)

    monkeypatch.setattr(convolutions, "transformed", counting)
    return shapes


def test_large_weights_are_kept_for_one_layer_at_a_time(taken, laid_out):
    a, b = (Conv2d(64, out, 3, padding=1) for out in (32, 64))
    x, before = torch.randn(1, 64, 12, 16), sum(kept.tensor.numel() for kept in packed.KEPT.values())
    for conv in (a, a, b, b, a):
        conv(x)
    assert laid_out == [(9, 64, 32), (9, 64, 64), (9, 64, 32)]
    assert [kept.tensor.shape for kept in packed.LAST.values()] == [(36, 64, 32)]
    assert sum(kept.tensor.numel() for kept in packed.KEPT.values()) == before + 9 * 64 * (32 + 64)
    del a, conv
    gc.collect()
    assert not packed.LAST


@pytest.mark.parametrize("height", [16, 23])
def test_in_strips(height, taken, laid_out, monkeypatch):
    monkeypatch.setattr(convolutions, "LARGE_PICTURE", 1000)
    monkeypatch.setattr(convolutions, "STRIP", 8 * 20 * 48)
    norm, conv = randomise(nn.GroupNorm(8, 48)), randomise(Conv2d(48, 32, 3, padding=1))
    skip, x = randomise(Conv2d(48, 32, 1)), torch.randn(2, 48, height, 20)
    plain = F.conv2d(F.silu(norm(x)), conv.weight, conv.bias, padding=1) + skip(x)
    torch.testing.assert_close(norm_conv(norm, conv, x, skip, x), plain, rtol=0, atol=3e-5 * plain.abs().max())
    assert len(taken) == 2 * len(range(0, height, 8))
    assert len(laid_out) == 1


def test_in_a_block_of_the_unet(taken):
    block = randomise(ResnetBlock(64, 32, 16, 8))
    x, temb = torch.randn(2, 64, 12, 16), torch.randn(2, 16)
    fast = block(x, temb)
    assert [shape[1] for shape in taken] == [64, 32]
    with torch.enable_grad():
        plain = block(x, temb)
    torch.testing.assert_close(fast, plain.detach(), rtol=0, atol=3e-5 * plain.abs().max())
    assert len(taken) == 2
