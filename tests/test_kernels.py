"""The fast way against the plain one, where it is taken and where it must not be."""

import copy
import gc
import pickle

import pytest
import torch
import torch.nn.functional as F
from parity import randomise
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ldm import convolutions, kernels, packed
from ldm.attention import attention
from ldm.seamless import seamless
from ldm.unet.transformer import GEGLU, FeedForward
from ldm.vae import VAE, VAEConfig
from ldm.vae.blocks import Upsample

blocks_are_faster = kernels.blocks_are_faster
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def calls(monkeypatch):
    """How often oneDNN was called, and how often weights were packed. It counts as faster here, whatever this machine
    has."""
    counts = {"calls": 0, "packed": 0}

    def counting(what, operator):
        def call(*args):
            counts[what] += 1
            return operator(*args)

        return call

    for name in ("PRODUCT", "COMBINED"):
        monkeypatch.setattr(kernels, name, counting("calls", getattr(kernels, name)))
    for name in ("CONVOLUTION", "ADDED", "TRANSPOSED"):
        monkeypatch.setattr(convolutions, name, counting("calls", getattr(convolutions, name)))
    for name in ("PACK", "PACK_TRANSPOSED"):
        monkeypatch.setattr(convolutions, name, counting("packed", getattr(convolutions, name)))
    monkeypatch.setattr(kernels, "has_avx", lambda: True)
    monkeypatch.setattr(kernels, "blocks_are_faster", lambda dtype: True)
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
    a, b = F.linear(x.double(), layer.proj.weight.double(), layer.proj.bias.double()).chunk(2, dim=-1)
    exact = a * F.gelu(b)
    assert_close(fast, exact.float(), dtype)
    if dtype == torch.bfloat16:  # gelu(b) and the product are rounded, a is not
        rounded = a.to(dtype) * F.gelu(b).to(dtype)
        assert (fast - exact).norm() < 0.9 * (rounded - exact).norm()


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


CONVOLUTIONS = {"3x3": (3, 1, 1), "1x1": (1, 1, 0), "down": (3, 2, 1), "bare": (3, 2, 0)}  # kernel, stride, padding


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(16, 16), (20, 19)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_conv2d(dtype, size, layout, kind, calls):
    kernel, stride, padding = CONVOLUTIONS[kind]
    layer = randomise(convolutions.Conv2d(256, 320, kernel, stride, padding)).to(dtype)
    x = torch.randn(3, 256, *size).to(dtype).to(memory_format=layout)
    fast = layer(x), layer(x)
    assert calls == {"calls": 2, "packed": 1}
    assert torch.equal(*fast)
    assert_close(fast[0], F.conv2d(x.float(), layer.weight.float(), layer.bias.float(), stride, padding), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("kind", ["3x3", "1x1"])
def test_added(dtype, layout, kind, calls):
    """The sum is rounded once: what is left is half of a unit of the last place, and float32's own sums."""
    kernel, stride, padding = CONVOLUTIONS[kind]
    layer = randomise(convolutions.Conv2d(256, 320, kernel, stride, padding)).to(dtype)
    x = torch.randn(3, 256, 16, 20).to(dtype).to(memory_format=layout)
    start = torch.randn(3, 320, 16, 20).to(dtype).to(memory_format=layout)
    before = start.clone()
    fast = convolutions.added(start, layer, x)
    assert calls == {"calls": 1, "packed": 1}
    assert torch.equal(start, before)
    exact = start.double() + F.conv2d(x.double(), layer.weight.double(), layer.bias.double(), stride, padding)
    assert_close(fast, exact.float(), dtype)
    ulp = torch.finfo(dtype).eps * 2 ** exact.abs().log2().floor()
    if dtype == torch.bfloat16:
        assert ((fast - exact).abs() <= 0.51 * ulp + 1e-5).all()
        assert ((start + layer(x) - exact).abs() > 0.51 * ulp + 1e-5).any()


def test_added_to_what_a_hook_changes(calls):
    layer, start = randomise(convolutions.Conv2d(256, 320, 1)), torch.randn(1, 320, 16, 16)
    x = torch.randn(1, 256, 16, 16)
    layer.register_forward_hook(lambda module, args, y: 2 * y)
    assert torch.equal(convolutions.added(start, layer, x), start + layer(x))
    assert calls["calls"] == 2


def replaced(conv):
    conv.weight.data = conv.weight.data + 1


def in_place(conv):
    conv.weight += 1


def behind_its_back(conv):
    conv.weight.data += 1


def another_parameter(conv):
    conv.weight = nn.Parameter(conv.weight + 1)


def loaded(conv):
    conv.load_state_dict({name: value + 1 for name, value in conv.state_dict().items()})


def channel(conv):
    with torch.no_grad():
        conv.weight[3, 3] = 1


@pytest.mark.parametrize("change", [replaced, in_place, behind_its_back, another_parameter, loaded, channel])
def test_changed_weights_are_packed_anew(change, calls):
    layer, x = randomise(convolutions.Conv2d(128, 256, 3, padding=1)), torch.randn(2, 128, 16, 16)
    before = layer(x)
    change(layer)
    assert not torch.equal(layer(x), before)
    assert_close(layer(x), F.conv2d(x, layer.weight, layer.bias, padding=1), torch.float32)
    assert calls["packed"] == 2


def test_another_size_is_packed_anew(calls):
    """As its layout may be another; the number of rows of pixels alone does not count."""
    layer = randomise(convolutions.Conv2d(128, 256, 3, padding=1))
    for shape, packs in (((2, 16, 16), 1), ((2, 20, 16), 1), ((1, 16, 16), 2), ((1, 16, 24), 3)):
        x = torch.randn(shape[0], 128, *shape[1:])
        assert_close(layer(x), F.conv2d(x, layer.weight, layer.bias, padding=1), torch.float32)
        assert calls["packed"] == packs


def test_packed_weights_are_shared_and_end_with_the_weight(calls):
    """Copies of a net on the same parameters, as those that wrap around, do not pack them again."""
    layer, x = convolutions.Conv2d(128, 256, 3, padding=1), torch.randn(2, 128, 16, 16)
    gc.collect()
    before = len(packed.KEPT)
    copy.deepcopy(layer, {id(p): p for p in layer.parameters()})(x)
    layer(x)
    assert calls["packed"] == 1 and len(packed.KEPT) == before + 1
    assert torch.equal(pickle.loads(pickle.dumps(layer))(x), layer(x))
    del layer
    gc.collect()
    assert len(packed.KEPT) == before


def test_weights_under_inference_mode(calls):
    """Have no version."""
    with torch.inference_mode():
        layer, x = randomise(convolutions.Conv2d(128, 256, 3, padding=1)), torch.randn(2, 128, 16, 16)
        before = layer(x)
        layer.weight += 1
        assert not torch.equal(layer(x), before) and calls["packed"] == 2
        layer.half().float()
    assert_close(layer(x), F.conv2d(x, layer.weight, layer.bias, padding=1), torch.float32)


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


def small_convolution():
    return convolutions.Conv2d(16, 16, 3, padding=1)(torch.randn(1, 16, 16, 16))


def small_convolution_added():
    layer, x, start = convolutions.Conv2d(8, 8, 3, padding=1), torch.randn(2, 8, 16, 16), torch.randn(2, 8, 16, 16)
    assert torch.equal(convolutions.added(start, layer, x), start + F.conv2d(x, layer.weight, layer.bias, padding=1))


def convolution_of_none():
    assert convolutions.Conv2d(256, 256, 3, padding=1)(torch.randn(0, 256, 16, 16)).shape == (0, 256, 16, 16)


def circular_convolution():
    """As people set it for seamless pictures."""
    conv, x = convolutions.Conv2d(256, 256, 3, padding=1), torch.randn(1, 256, 16, 16)
    conv.padding_mode, conv._reversed_padding_repeated_twice = "circular", [1, 1, 1, 1]
    assert torch.equal(conv(x), F.conv2d(F.pad(x, (1, 1, 1, 1), mode="circular"), conv.weight, conv.bias))


def grouped_convolution():
    convolutions.Conv2d(256, 256, 3, padding=1, groups=2)(torch.randn(1, 256, 16, 16))


def without_onednn():
    with torch.backends.mkldnn.flags(enabled=False):
        convolutions.Conv2d(128, 128, 3, padding=1)(torch.randn(1, 128, 16, 16))


def of_fake_tensors():
    with FakeTensorMode(allow_non_fake_inputs=True):
        convolutions.Conv2d(256, 256, 3, padding=1)(torch.empty(1, 256, 16, 16))


def under_vmap():
    conv, x = convolutions.Conv2d(128, 128, 3, padding=1), torch.randn(3, 1, 128, 16, 16)
    assert torch.allclose(torch.func.vmap(conv)(x)[1], F.conv2d(x[1], conv.weight, conv.bias, padding=1), atol=1e-5)


CONVOLVED = [small_convolution, small_convolution_added, convolution_of_none, circular_convolution, grouped_convolution]
CONVOLVED += [without_onednn, of_fake_tensors, under_vmap]


@pytest.mark.parametrize("case", [small, with_gradients, in_float64, masked, *CONVOLVED])
def test_plain(case, calls):
    case()
    assert calls["calls"] == 0


def test_plain_where_onednn_is_not_faster(calls, monkeypatch):
    monkeypatch.setattr(kernels, "has_avx", lambda: False)
    monkeypatch.setattr(kernels, "blocks_are_faster", lambda dtype: False)
    kernels.Linear(256, 256)(torch.randn(2, 300, 256))
    GEGLU(128, 512)(torch.randn(2, 300, 128))
    attention(*torch.randn(3, 1, 1024, 80), 2)
    assert calls["calls"] == 0


def test_plain_without_onednn(monkeypatch):
    for name in ("PRODUCT", "COMBINED"):
        monkeypatch.setattr(kernels, name, None)
    for name in ("CONVOLUTION", "ADDED", "TRANSPOSED", "PACK", "PACK_TRANSPOSED"):
        monkeypatch.setattr(convolutions, name, None)
    monkeypatch.setattr(kernels, "blocks_are_faster", blocks_are_faster.__wrapped__)
    linear, x = kernels.Linear(256, 256), torch.randn(2, 300, 256)
    assert torch.equal(linear(x), F.linear(x, linear.weight, linear.bias))
    q, k, v = torch.randn(3, 1, 2, 1024, 40)
    assert torch.equal(kernels.attention(q, k, v), F.scaled_dot_product_attention(q, k, v))
    up, x = Upsample(256), torch.randn(1, 256, 16, 16)
    doubled = F.interpolate(x, scale_factor=2.0)
    assert torch.equal(up(x), F.conv2d(doubled, up.conv.weight, up.conv.bias, padding=1))


def test_plain_attention_where_onednn_has_no_bfloat16(calls, monkeypatch):
    monkeypatch.setattr(kernels, "blocks_are_faster", blocks_are_faster.__wrapped__)
    monkeypatch.setattr(kernels, "has_bfloat16", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(kernels, "faster", lambda function, plain: True)
    q, k, v = torch.randn(3, 1, 2, 1024, 40).bfloat16()
    assert torch.equal(kernels.attention(q, k, v), F.scaled_dot_product_attention(q, k, v))
    assert calls["calls"] == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("amx", [True, False])
def test_attention_is_measured_without_amx_alone(amx, dtype, calls, monkeypatch):
    """What is measured may come out otherwise in another process: only where it has to be."""
    monkeypatch.setattr(kernels, "blocks_are_faster", blocks_are_faster.__wrapped__)
    monkeypatch.setattr(kernels, "has_bfloat16", lambda: True)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(kernels, "faster", lambda function, plain: True)
    kernels.attention(*torch.randn(3, 1, 2, 1024, 40).to(dtype))
    assert bool(calls["calls"]) != amx


@pytest.mark.parametrize(("has", "avx"), [("AVX512", True), ("AVX2", True), ("DEFAULT", False), ("SVE256", False)])
def test_products_by_what_the_processor_has(has, avx, monkeypatch):
    """And not by a measurement, which two processes may make differently."""
    monkeypatch.undo()
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: has)
    monkeypatch.setattr(kernels.time, "process_time", lambda: pytest.fail("measured"))
    assert kernels.has_avx.__wrapped__() is avx


@pytest.mark.parametrize("seconds", [1, 3])
def test_measuring(seconds, monkeypatch):
    """By a clock of the processor that runs with the calls: 2 the plain one, 1 or 3 the other."""
    now = 0.0

    def taking(seconds):
        def call():
            nonlocal now
            now += seconds

        return call

    monkeypatch.setattr(kernels.time, "process_time", lambda: now)
    assert kernels.faster(taking(seconds), taking(2)) is (seconds == 1)


def test_what_is_measured(monkeypatch):
    """The two ways give the same, whichever this machine takes."""
    pairs = []
    monkeypatch.undo()
    monkeypatch.setattr(kernels, "faster", lambda function, plain: pairs.append((function(), plain())))
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(kernels, "has_bfloat16", lambda: True)
    for dtype in DTYPES:
        kernels.blocks_are_faster.__wrapped__(dtype)
    for fast, plain in pairs:
        assert_close(fast, plain.float(), fast.dtype)
    assert len(pairs) == 2


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


@pytest.fixture
def tiny_strips(monkeypatch):
    """Pictures are large from 1,000 numbers on, and a strip has some rows."""
    monkeypatch.setattr(convolutions, "LARGE_PICTURE", 1000)
    monkeypatch.setattr(convolutions, "STRIP", 5 * 48 * 13)


def in_float32(*modules):
    return [copy.deepcopy(module).float() for module in modules]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("inp", "out"), [(48, 32), (32, 48), (32, 32)])
@pytest.mark.parametrize("height", [1, 5, 12])
def test_norm_conv(dtype, inp, out, height, tiny_strips):
    """One strip and several, the last of them whole or of a row or two; with all kinds of what is added."""
    norm = randomise(nn.GroupNorm(8, inp, eps=1e-6)).to(dtype)
    conv = randomise(nn.Conv2d(inp, out, 3, padding=1)).to(dtype)
    skip = (nn.Identity() if inp == out else randomise(nn.Conv2d(inp, out, 1))).to(dtype)
    x = (3 + 2 * torch.randn(2, inp, height, 13 * 3)).to(dtype)
    x[:, :, : height // 2] *= 4  # strips whose moments are not alike
    norm32, conv32, skip32 = in_float32(norm, conv, skip)
    plain = conv32(F.silu(norm32(x.float())))
    assert_close(convolutions.norm_conv(norm, conv, x), plain, dtype)
    assert_close(convolutions.norm_conv(norm, conv, x, skip, x), plain + skip32(x.float()), dtype)


def test_strips_do_not_depend_on_the_batch(tiny_strips):
    norm, conv = randomise(nn.GroupNorm(8, 32)), randomise(nn.Conv2d(32, 32, 3, padding=1))
    x = torch.randn(3, 32, 12, 39)
    whole, one = (convolutions.norm_conv(norm, conv, part, nn.Identity(), part) for part in (x, x[1:2]))
    assert torch.equal(whole[1:2], one)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(1, 39), (12, 7)])
def test_upsampling(dtype, size, calls):
    up = randomise(Upsample(256)).to(dtype)
    x = torch.randn(2, 256, *size).to(dtype)
    fast = up(x)
    assert torch.equal(up(x), fast)
    assert calls == {"calls": 2, "packed": 1}
    (conv32,) = in_float32(up.conv)
    assert_close(fast, conv32(F.interpolate(x.float(), scale_factor=2.0)), dtype)


def small_picture(norm, conv, x):
    return norm, conv, x[:, :, :2, :15]


def hook_of_norm(norm, conv, x):
    norm.register_forward_hook(lambda module, inputs, y: None)
    return norm, conv, x


def hook_of_conv(norm, conv, x):
    conv.register_forward_hook(lambda module, inputs, y: None)
    return norm, conv, x


def other_norm(norm, conv, x):
    return nn.Sequential(norm), conv, x


def other_conv(norm, conv, x):
    return norm, seamless(nn.Sequential(conv), "x")[0], x


def double(norm, conv, x):
    return norm.double(), conv.double(), x.double()


def circular(norm, conv, x):
    conv.padding_mode, conv._reversed_padding_repeated_twice = "circular", [1, 1, 1, 1]
    return norm, conv, x


def other_padding(norm, conv, x):
    return norm, randomise(nn.Conv2d(32, 32, 3, padding=2, dilation=2)), x


def patched_conv(norm, conv, x):
    conv._conv_forward = lambda x, weight, bias: F.conv2d(x, 2 * weight, bias, padding=1)
    return norm, conv, x


def patched_norm(norm, conv, x):
    norm.forward = lambda x: x + 1
    return norm, conv, x


def norm_without_weights(norm, conv, x):
    return nn.GroupNorm(8, 32, affine=False), conv, x


def empty_batch(norm, conv, x):
    return norm, conv, x[:0]


CASES = [small_picture, hook_of_norm, hook_of_conv, other_norm, other_conv, double, circular, other_padding]
CASES += [patched_conv, patched_norm, norm_without_weights, empty_batch]


@pytest.mark.parametrize("case", CASES)
def test_no_strips(case, tiny_strips):
    """Bit for bit the plain way where strips must not be."""
    norm, conv = randomise(nn.GroupNorm(8, 32)), randomise(nn.Conv2d(32, 32, 3, padding=1))
    norm, conv, x = case(norm, conv, torch.randn(2, 32, 12, 39))
    assert torch.equal(
        convolutions.norm_conv(norm, conv, x, nn.Identity(), x), convolutions.added(x, conv, F.silu(norm(x)))
    )
    assert torch.equal(convolutions.norm_conv(norm, conv, x), conv(F.silu(norm(x))))


@pytest.mark.parametrize("wanted", ["x", "start", "norm.weight", "norm.bias", "conv.weight", "conv.bias", "skip.bias"])
def test_gradients_of_norm_and_conv(wanted, tiny_strips):
    """Of any one of them alone: those of the plain way."""
    net = nn.ModuleDict(
        {"norm": nn.GroupNorm(8, 32), "conv": nn.Conv2d(32, 32, 3, padding=1), "skip": nn.Conv2d(32, 32, 1)}
    )
    randomise(net).requires_grad_(False)
    values = {"x": torch.randn(1, 32, 12, 39), "start": torch.randn(1, 32, 12, 39), **dict(net.named_parameters())}
    of, up = values[wanted].requires_grad_(True), randomise(Upsample(32)).requires_grad_(False)
    x, start = values["x"], values["start"]
    with torch.enable_grad():
        y = convolutions.norm_conv(net["norm"], net["conv"], x, net["skip"], start)
        (ours,) = torch.autograd.grad(up(y).sum(), of)
        y = net["skip"](start) + net["conv"](F.silu(net["norm"](x)))
        (plain,) = torch.autograd.grad(up.conv(F.interpolate(y, scale_factor=2.0)).sum(), of)
    assert ours.any() and torch.equal(ours, plain)


def test_gradient_of_a_bias_alone():
    for layer, x in (
        (kernels.Linear(256, 640), torch.randn(1, 300, 256)),
        (convolutions.Conv2d(128, 1024, 3, padding=1), torch.randn(1, 128, 8, 8)),
    ):
        layer.weight.requires_grad_(False)
        with torch.enable_grad():
            layer(x).sum().backward()
        assert layer.bias.grad.any()


def test_gradient_of_the_values_alone():
    q, v = torch.randn(1, 1024, 80), torch.randn(1, 1024, 80, requires_grad=True)
    with torch.enable_grad():
        attention(q, q, v, 2).sum().backward()
    assert v.grad.any()


def test_tangents():
    """Forward-mode derivatives, which oneDNN's products do not know of."""
    layer, x, direction = kernels.Linear(256, 640), torch.randn(1, 300, 256), torch.randn(1, 300, 256)
    _, tangent = torch.func.jvp(layer, (x,), (direction,))
    assert torch.allclose(tangent, direction @ layer.weight.T, atol=1e-5)


def test_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        assert kernels.Linear(256, 640)(torch.randn(1, 300, 256)).dtype == torch.bfloat16


def test_hooks_of_all_modules_are_called(tiny_strips):
    norm, conv, seen = nn.GroupNorm(8, 32), nn.Conv2d(32, 32, 3, padding=1), []
    handle = nn.modules.module.register_module_forward_hook(lambda module, inputs, y: seen.append(module))
    convolutions.norm_conv(norm, conv, torch.randn(1, 32, 12, 39))
    handle.remove()
    assert seen == [norm, conv]


def test_strips_under_another_default_device(tiny_strips):
    norm, conv, x = nn.GroupNorm(8, 32), nn.Conv2d(32, 32, 3, padding=1), torch.randn(1, 32, 12, 39)
    expected = convolutions.norm_conv(norm, conv, x)
    with torch.device("meta"):
        assert torch.equal(convolutions.norm_conv(norm, conv, x), expected)


@pytest.mark.parametrize("mean", [0, 10, 100])
def test_a_norm_far_from_zero(mean, tiny_strips):
    """As exact as PyTorch's where that sums in order, in which rounding of x itself is the most."""
    x, norm = mean + torch.randn(2, 32, 60, 39), randomise(nn.GroupNorm(8, 32))
    factor, bias = convolutions.affine(norm, x, rows=7)
    exact = copy.deepcopy(norm).double()(x.double())
    off, plain = (float((y - exact).abs().max()) for y in (bias.double() + x.double() * factor, norm(x)))
    assert off <= 2 * plain


@pytest.mark.parametrize("dtype", DTYPES)
def test_by_rows(dtype, calls):
    """Blocks of 1,024 rows of each picture, and what is left; none for a net that somebody watches."""
    net = randomise(FeedForward(64)).to(dtype)
    x = torch.randn(2, 2100, 64).to(dtype)
    (net32,) = in_float32(net)
    a, b = net32.net[0].proj(x.float()).chunk(2, dim=-1)
    seen = []
    assert_close(net(x), net32.net[2](a * F.gelu(b)), dtype)
    assert torch.equal(net(x)[1:], net(x[1:]))
    net.net[2].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape))
    net(x)
    assert seen == [(2, 2100, 256)]


def test_a_vae_in_strips_of_its_activations(tiny_strips):
    """The whole net, where each resnet and upsampling takes the fast way."""
    net = randomise(VAE(VAEConfig(channels=(32, 64), layers=1)))
    z, image = torch.randn(2, 4, 16, 24), torch.randn(2, 3, 32, 48)
    fast = net.decode(z), net.encode(image).mean
    convolutions.LARGE_PICTURE = 2**60  # put back by the fixture
    for ours, plain in zip(fast, (net.decode(z), net.encode(image).mean), strict=True):
        assert not torch.equal(ours, plain)
        assert (ours - plain).abs().max() <= 1e-5 * plain.abs().max()
