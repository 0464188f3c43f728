"""The fast way against the plain one, where it is taken and where it must not be."""

import pytest
import torch
import torch.nn.functional as F
from parity import randomise
from torch import nn

from ldm import kernels
from ldm.attention import attention
from ldm.unet.transformer import GEGLU

DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def calls(monkeypatch):
    """How often oneDNN was called. It counts as faster here, whatever this machine says."""
    counts = {"calls": 0}

    def counting(operator):
        def call(*args):
            counts["calls"] += 1
            return operator(*args)

        return call

    monkeypatch.setattr(kernels, "PRODUCT", counting(kernels.PRODUCT))
    monkeypatch.setattr(kernels, "GATED", counting(kernels.GATED))
    monkeypatch.setattr(kernels, "onednn_is_faster", lambda: True)
    with torch.no_grad():
        yield counts


def assert_close(fast, plain, dtype):
    """`plain` is float32: as near as sums in another order are, or as the dtype's rounding of input and output is."""
    assert fast.dtype == dtype and fast.shape == plain.shape
    off = (fast.float() - plain).abs().max() / plain.abs().max()
    assert off <= (3e-6 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
def test_linear(dtype, bias, calls):
    layer = randomise(kernels.Linear(256, 640, bias=bias)).to(dtype)
    x = torch.randn(2, 300, 256).to(dtype)
    fast = layer(x)
    assert calls["calls"] == (dtype == torch.float32)  # PyTorch's own calls oneDNN in bfloat16
    assert_close(fast, F.linear(x.float(), layer.weight.float(), layer.bias.float() if bias else None), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_geglu(dtype, calls):
    layer = randomise(GEGLU(128, 512)).to(dtype)
    x = torch.randn(2, 300, 128).to(dtype)
    fast = layer(x)
    assert calls["calls"] == 2
    a, b = F.linear(x.float(), layer.proj.weight.float(), layer.proj.bias.float()).chunk(2, dim=-1)
    assert_close(fast, a * F.gelu(b), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "m", "heads", "width"), [(1024, 1024, 2, 40), (1100, 2500, 3, 64), (4096, 77, 8, 40)])
def test_attention(dtype, n, m, heads, width, calls):
    q, k, v = (torch.randn(2, length, heads * width).to(dtype) for length in (n, m, m))
    q = 3 * q  # scores up to 15 or so: some places look at few
    fast = attention(q, k, v, heads)
    assert calls["calls"] >= 2 * 2 * heads
    split = [t.double().unflatten(2, (heads, width)).transpose(1, 2) for t in (q, k, v)]
    plain = F.scaled_dot_product_attention(*split).transpose(1, 2).flatten(2)
    assert_close(fast, plain.float(), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(8, 8), (5, 7), (16, 16)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_conv2d(dtype, size, layout, calls):
    layer = randomise(kernels.Conv2d(128, 1024)).to(dtype)
    x = torch.randn(3, 128, *size).to(dtype).to(memory_format=layout)
    fast = layer(x)
    assert calls["calls"] == 1
    assert_close(fast, F.conv2d(x.float(), layer.weight.float(), layer.bias.float(), padding=1), dtype)


def small():
    return kernels.Linear(64, 64)(torch.randn(2, 16, 64))


def with_gradients():
    with torch.enable_grad():
        assert kernels.Linear(256, 256)(torch.randn(2, 300, 256)).requires_grad
        attention(torch.randn(1, 1024, 80, requires_grad=True), *torch.randn(2, 1, 1024, 80), 2).sum().backward()


def in_float64():
    return kernels.Linear(256, 256).double()(torch.randn(2, 300, 256, dtype=torch.float64))


def masked():
    q = torch.randn(1, 1024, 80)
    return attention(q, q, q, 2, torch.ones(1024, 1024, dtype=torch.bool))


def many_pixels():
    return kernels.Conv2d(64, 1024)(torch.randn(1, 64, 17, 16))


@pytest.mark.parametrize("case", [small, with_gradients, in_float64, masked, many_pixels])
def test_plain(case, calls):
    case()
    assert calls["calls"] == 0


def test_plain_where_onednn_is_not_faster(calls, monkeypatch):
    monkeypatch.setattr(kernels, "onednn_is_faster", lambda: False)
    kernels.Linear(256, 256)(torch.randn(2, 300, 256))
    GEGLU(128, 512)(torch.randn(2, 300, 128))
    assert calls["calls"] == 0


def test_plain_without_onednn(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(kernels, "PRODUCT", None)
    assert not kernels.onednn_is_faster.__wrapped__()


@pytest.mark.parametrize("faster", [True, False])
def test_measuring(faster, monkeypatch):
    """By a clock that runs with the calls: 2 a product of PyTorch's, 1 or 3 of oneDNN's."""
    now = 0.0

    def taking(seconds):
        def call(x, weight, bias):
            nonlocal now
            now += seconds
            return x

        return call

    monkeypatch.undo()
    monkeypatch.setattr(kernels.time, "perf_counter", lambda: now)
    monkeypatch.setattr(kernels.F, "linear", taking(2))
    monkeypatch.setattr(kernels, "product", taking(1 if faster else 3))
    assert kernels.onednn_is_faster.__wrapped__() is faster


def test_hooks_of_the_projection_are_called():
    """LoRA adds to a layer by them while it is trained."""
    layer, x = GEGLU(128, 512), torch.randn(2, 300, 128)
    layer.proj.register_forward_hook(lambda module, inputs, y: torch.zeros_like(y))
    assert not layer(x).any()


def test_what_a_hook_has_kept_stays():
    norm, x, kept = nn.GroupNorm(2, 4), torch.randn(1, 4, 8, 8), []
    plain = norm(x)
    norm.register_forward_hook(lambda module, inputs, y: kept.append(y))
    assert torch.equal(kernels.norm_silu(norm, x), F.silu(plain))
    assert torch.equal(kept[0], plain)


def test_gradients_of_norm_and_silu():
    norm, x = nn.GroupNorm(2, 4), torch.randn(1, 4, 8, 8, requires_grad=True)
    with torch.enable_grad():
        (ours,) = torch.autograd.grad(kernels.norm_silu(norm, x).sum(), x)
        (plain,) = torch.autograd.grad(F.silu(norm(x)).sum(), x)
    assert torch.equal(ours, plain)
