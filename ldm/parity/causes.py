"""Why a layer is wrong: alternatives to what it does are tried on recorded values until one gives the recorded result.

A cause is named only where an alternative comes as near to the recording as a right layer would.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ldm.parity.difference import laid_out, measure, terms_of


class Known(NamedTuple):
    """A recorded tensor, and of which module it is the output or the input."""

    name: str
    value: Tensor


Alternatives = Iterator[tuple[str, Tensor]]  # what else may be done, and what comes of it

EPS = (1e-5, 1e-6, 1e-12, 1e-8, 1e-4, 1e-3, 0.0)
HALF = {"bfloat16": torch.bfloat16, "float16": torch.float16}
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "{} as it is": lambda x: x,
    "silu({})": F.silu,
    "gelu({})": F.gelu,
    "gelu({}) by tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu({})": lambda x: x * torch.sigmoid(1.702 * x),
    "relu({})": F.relu,
}
PADS = ((0, 1, 0, 1), (1, 0, 1, 0), (1, 1, 1, 1))  # left, right, top, bottom


def fitting(alternatives: Alternatives, wanted: Tensor, terms: int | None = None) -> str:
    """Those that give what is wanted, empty if none: the nearest, and with it all that cannot be told from it."""
    found = ((text, measure(value, wanted, terms)) for text, value in alternatives if value.shape == wanted.shape)
    fits = {text: difference.ulp for text, difference in found if difference.ok}
    return " or ".join(text for text, ulp in fits.items() if ulp <= 2 * min(fits.values()) + 1)


# A layer


def cause_in_layer(module: nn.Module, x: Tensor, got: Tensor, wanted: Tensor, net: nn.Module) -> str:
    """Why the module makes `got` of x where `wanted` was recorded, empty if nothing that is tried gives that."""
    same = laid_out(wanted.to(got.dtype), got.shape)
    if same is None:
        return ""
    terms = terms_of(module)
    there = (
        fitting(instead_of(module, x, net), same, terms)
        or fitting(nearby(got, same, []), same, terms)
        or unrounded(module)
    )
    return there and f"{there}; here {module!r}"


def instead_of(module: nn.Module, x: Tensor, net: nn.Module) -> Alternatives:
    """What other layers of its kind make of x."""
    match module:
        case nn.GroupNorm():
            divisors = [n for n in range(1, module.num_channels + 1) if module.num_channels % n == 0]
            for groups, eps in product(divisors, EPS):
                text = f"eps {eps:g}" if groups == module.num_groups else f"{groups} groups, eps {eps:g}"
                yield text, F.group_norm(x, groups, module.weight, module.bias, eps)
        case nn.LayerNorm():
            for eps in EPS:
                yield f"eps {eps:g}", F.layer_norm(x, module.normalized_shape, module.weight, module.bias, eps)
        case nn.Linear() | nn.Conv2d() | nn.Embedding():
            yield from other_weights(module, x, net)
        case _ if next(module.parameters(), None) is None:
            yield from ((text.format("its input"), f(x)) for text, f in ACTIVATIONS.items())
    if isinstance(module, nn.Conv2d):
        yield from other_padding(module, x)


def other_weights(module: nn.Linear | nn.Conv2d | nn.Embedding, x: Tensor, net: nn.Module) -> Alternatives:
    weight, bias = module.weight, getattr(module, "bias", None)

    def made(weight: Tensor, bias: Tensor | None) -> Tensor:  # to call a module would call its hooks
        match module:
            case nn.Linear():
                return F.linear(x, weight, bias)
            case nn.Conv2d():
                return module._conv_forward(x, weight, bias)
        return F.embedding(x, weight)

    if bias is not None:
        yield "no bias", made(weight, None)
    if weight.shape[0] == weight.shape[1]:
        yield "the weight transposed", made(weight.transpose(0, 1), bias)
    if weight.ndim == 4 and weight.shape[2:] != (1, 1):
        yield "the kernel's height and width exchanged", made(weight.transpose(2, 3), bias)
        yield "the kernel turned half round", made(weight.flip(2, 3), bias)
    for name, dtype in HALF.items():
        yield f"weights rounded to {name}", made(rounded(weight, dtype), None if bias is None else rounded(bias, dtype))
    for name, other in net.named_modules():
        if other is not module and type(other) is type(module) and other.weight.shape == weight.shape:
            yield f"the weights of {name}", made(other.weight, getattr(other, "bias", None))


def rounded(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype).to(tensor.dtype)


def other_padding(module: nn.Conv2d, x: Tensor) -> Alternatives:
    def made(pad: tuple[int, ...], mode: str = "constant") -> Tensor:
        padded = F.pad(x, pad, mode)
        return F.conv2d(padded, module.weight, module.bias, module.stride, 0, module.dilation, module.groups)

    yield from ((f"padding {pad}", made(pad)) for pad in PADS)
    height, width = (k // 2 for k in module.kernel_size)
    if 0 < height < x.shape[-2] and 0 < width < x.shape[-1]:
        for mode in ("constant", "reflect", "replicate", "circular"):
            yield f"padding_mode {mode}", made((width, width, height, height), mode)


def unrounded(module: nn.Module) -> str:
    """What the weights here alone tell: that they had less precision once."""
    weights = [p for p in module.parameters(recurse=False) if p.dtype == torch.float32]
    for name, dtype in HALF.items():
        if weights and all(torch.equal(p, rounded(p, dtype)) for p in weights):
            return f"weights that were not rounded to {name}, as those here are"
    return ""


# The code between layers


def cause_between(got: Tensor, wanted: Tensor, known: Sequence[Known]) -> str:
    """Why `got` comes of what is known where `wanted` was recorded, empty if nothing that is tried gives that."""
    if there := fitting(made_of(known, wanted), wanted):
        here = fitting(made_of(known, got), got)
        return f"{there}; here {here}" if here else there
    same = laid_out(wanted.to(got.dtype), got.shape)
    return "" if same is None else fitting(nearby(got, same, known), same)


def made_of(known: Sequence[Known], wanted: Tensor) -> Alternatives:
    """What modules make of what their layers put out, in the shape that is wanted."""
    for name, x in known:
        if x.ndim <= 1 and wanted.ndim == 2 and wanted.shape[1] % 2 == 0:
            yield from embeddings(name, x, wanted)
        if not x.is_floating_point():
            continue
        if (same := laid_out(x, wanted.shape)) is not None:
            yield from ((text.format(name), f(same)) for text, f in ACTIVATIONS.items())
        if x.ndim == wanted.ndim == 4 and x.shape[2:] != wanted.shape[2:] and x.shape[:2] == wanted.shape[:2]:
            yield from ((f"{name} padded by {pad}", F.pad(x, pad)) for pad in PADS)
            for mode in ("nearest", "bilinear", "bicubic"):
                yield f"{name} enlarged by {mode}", F.interpolate(x, size=wanted.shape[2:], mode=mode)
        if x.ndim > 1 and x.shape[-1] == 2 * wanted.shape[-1]:
            a, b = x.chunk(2, dim=-1)
            for text, f in ACTIVATIONS.items():
                yield f"a {text.format('b')}, [a, b] = {name}", a * f(b)
                yield f"b {text.format('a')}, [a, b] = {name}", b * f(a)
    yield from attentions(known, wanted)


def embeddings(name: str, t: Tensor, wanted: Tensor) -> Alternatives:
    """Of timesteps (Vaswani et al. 2017), in the orders and with the frequencies that are in use."""
    half = wanted.shape[1] // 2
    i = torch.arange(half, dtype=torch.float32, device=t.device)
    for last, whole in product((0, 1), (False, True)):
        angle = (t.long() if whole else t).float().expand(len(wanted))[:, None] * torch.exp(
            -math.log(10000) * i / max(half - last, 1)
        )
        how = f"{name}{' in whole numbers' * whole}, frequencies 10000^(-i/{'(half - 1)' if last else 'half'})"
        yield f"[cos, sin] of {how}", torch.cat([angle.cos(), angle.sin()], dim=1).to(wanted.dtype)
        yield f"[sin, cos] of {how}", torch.cat([angle.sin(), angle.cos()], dim=1).to(wanted.dtype)


def attentions(known: Sequence[Known], wanted: Tensor) -> Alternatives:
    """Of the latest q, k and v, known by their names: to_q, q_proj, query."""
    latest = {k.name.rpartition(".")[2].removeprefix("to_")[:1]: k.value for k in reversed(known)}
    q, k, v = (latest.get(part) for part in "qkv")
    if q is None or k is None or v is None or q.shape != wanted.shape or q.ndim != 3 or k.shape != v.shape:
        return
    width, mask = q.shape[2], torch.ones(q.shape[1], k.shape[1], dtype=torch.bool, device=q.device).tril()
    outer, inner = ("b n (h d)", ""), ("b n (d h)", " innermost")
    for heads in [n for n in range(1, min(width, 64) + 1) if width % n == 0]:
        for (before, place), (after, _) in ((outer, outer), (inner, outer), (inner, inner)):
            qh, kh, vh = (rearrange(x, f"{before} -> b h n d", h=heads) for x in (q, k, v))
            d = width // heads
            scales = {"1/sqrt(d)": d**-0.5, "1/sqrt(width)": width**-0.5, "1": 1.0, "1/d": 1 / d}
            for (scale, factor), causal in product(scales.items(), (False, True)):
                out = F.scaled_dot_product_attention(qh, kh, vh, mask if causal else None, scale=factor)
                text = f"attention of {heads} heads{place}, scale {scale}, {'a causal' if causal else 'no'} mask"
                yield text, rearrange(out, f"b h n d -> {after}")


def nearby(got: Tensor, wanted: Tensor, known: Sequence[Known]) -> Alternatives:
    """What is only a term, a factor, an order or a precision from `got`."""
    for name, x in known:
        same = x[..., None, None] if x.ndim == 2 and got.ndim == 4 else laid_out(x, got.shape)
        if same is not None and x.is_floating_point() and same.shape[:2] == got.shape[:2]:
            yield f"{name} is added", got + same
            yield f"{name} is not added", got - same
    channel = 1 if got.ndim == 4 else got.ndim - 1
    others = [i for i in range(got.ndim) if i != channel]
    if got.numel() > got.shape[channel]:
        yield "another bias", got + (wanted - got).mean(others, keepdim=True)
    if squares := got.double().square().sum().item():
        factor = (got.double() * wanted.double()).sum().item() / squares
        if abs(factor - 1) > 1e-5:
            yield f"{factor:.6g} times as much", factor * got
    first = wanted.narrow(channel, 0, 1)
    for k in (got == first).movedim(channel, 0).flatten(1).all(1).nonzero().flatten().tolist():
        yield f"its first {k} channels come last", got.roll(-k, channel)
    if got.ndim > 2 and got.shape[-1] == got.shape[-2]:
        yield "the last two dimensions are exchanged", got.transpose(-1, -2)
    if got.dtype == torch.float32:
        yield from ((f"it was rounded to {name}", rounded(got, dtype)) for name, dtype in HALF.items())
