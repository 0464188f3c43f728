"""Convolutions on CPUs: weights packed once, large pictures in strips, and doubling without the doubled picture.

As in `ldm.kernels`, these are no other formulas, and the plain way is taken wherever the fast one is not for it.
"""

import math
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.kernels import LARGE, has_bfloat16, norm_silu, numbers, on_cpu, watched
from ldm.packed import packed
from ldm.winograd import by_taps, transformed, winograd

LARGE_PICTURE = 2**22  # numbers in a picture's activation: 16 MB, half of a usual cache
STRIP = 2**20  # of them are at work at a time
WINOGRAD_WIDTH, WINOGRAD_CHANNELS = 64, 320**2  # of a picture; in times out: where fewer multiplications save time


def operator(name: str) -> Any:
    """Of oneDNN, as torch.compile calls it; nothing where PyTorch comes without."""
    return getattr(torch.ops.mkldnn, name, None)


# Of (weight, padding, ...), of (x, packed weight, bias, padding, ...), and of (x, what to add, packed weight, ...).
PACK, CONVOLUTION = operator("_reorder_convolution_weight"), operator("_convolution_pointwise")
ADDED: Any = getattr(CONVOLUTION, "binary", None)
PACK_TRANSPOSED = operator("_reorder_convolution_transpose_weight")
TRANSPOSED = operator("_convolution_transpose_pointwise")


class Conv2d(nn.Conv2d):
    """PyTorch's own, by oneDNN on packed weights where it is a plain one."""

    def forward(self, x: Tensor) -> Tensor:
        return conv2d(self, x) if plain(self) else super().forward(x)


def added(start: Tensor, conv: nn.Module, x: Tensor) -> Tensor:
    """start + conv(x), both of one shape. oneDNN adds before it rounds, which shows in bfloat16."""
    return conv2d(conv, x, start=start) if plain(conv) and not watched(conv) else start + conv(x)


def conv2d(conv: nn.Conv2d, x: Tensor, padding: tuple[int, int] | None = None, start: Tensor | None = None) -> Tensor:
    """conv(x), or with another padding, or start + that, of a plain convolution, without its hooks."""
    sides = conv.padding if padding is None else padding
    assert isinstance(sides, tuple), "a plain one's"
    pixels = x.shape[2] * x.shape[3] // math.prod(conv.stride)
    if not packs(x, pixels * conv.weight.numel(), conv.weight, conv.bias, start):
        y = F.conv2d(x, conv.weight, conv.bias, conv.stride, sides)
        return y if start is None else start + y
    if by_winograd(conv, x):
        taps = packed(conv.weight, ("winograd",), lambda: by_taps(conv.weight))
        weight = packed(taps, (), lambda: transformed(taps), keep=False)
        y = winograd(x, weight, conv.bias, sides)
        return y if start is None else y.add_(start)
    how = list(sides), list(conv.stride), [1, 1], 1
    # For a number of rows it is hardly ever another layout; if so, oneDNN sees to it.
    purpose = (len(x), x.shape[3], sides)
    weight = packed(conv.weight, purpose, lambda: PACK(conv.weight, *how, list(x.shape)))
    if start is None:
        return CONVOLUTION(x, weight, conv.bias, *how, "none", [], "")
    return ADDED(x, start, weight, conv.bias, *how, "add", 1.0, None, [], None)


def by_winograd(conv: nn.Conv2d, x: Tensor) -> bool:
    """Whether it is one of large pictures and many channels, where that is up to twice as fast as oneDNN."""
    return (
        x.dtype == torch.float32
        and (conv.kernel_size, conv.stride) == ((3, 3), (1, 1))
        and x.shape[3] >= WINOGRAD_WIDTH
        and conv.in_channels * conv.out_channels >= WINOGRAD_CHANNELS
    )


def packs(x: Tensor, multiplications: int, *others: Tensor | None) -> bool:
    """Whether a convolution of so many multiplications a row of x is to be computed with packed weights."""
    return (
        CONVOLUTION is not None
        and multiplications >= LARGE
        and len(x) > 0
        and on_cpu(x, *others)
        and (x.dtype == torch.float32 or has_bfloat16())
        and torch.backends.mkldnn.is_available()
        and torch._C._get_mkldnn_enabled()
    )


def three_by_three(conv: nn.Module) -> bool:
    """Whether it is a 3x3 convolution that leaves the size."""
    return plain(conv) and (conv.kernel_size, conv.padding, conv.stride) == ((3, 3), (1, 1), (1, 1))


def plain(conv: nn.Module) -> TypeGuard[nn.Conv2d]:
    """Whether it is a convolution with zeros around the picture, and nobody has changed what it does."""
    return (
        isinstance(conv, nn.Conv2d)
        and type(conv) in (nn.Conv2d, Conv2d)
        and conv.groups == 1
        and conv.dilation == (1, 1)
        and conv.padding_mode == "zeros"
        and not isinstance(conv.padding, str)
        and not {"forward", "_conv_forward"} & set(vars(conv))
    )


def doubled(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """conv of x (B,C,h,w) with each pixel doubled in both directions, a 3x3 convolution -> (B,D,2h,2w).

    Of three neighbours in the doubled picture two are the same pixel, so that their weights can be added first. Each
    pixel then goes to 4x4 of the result: a transposed convolution, with 4/9 of the multiplications.
    """
    weight, bias = conv.weight, conv.bias
    if not three_by_three(conv) or watched(conv) or not packs(x, 16 * numbers(x) * len(weight), weight, bias):
        return conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
    how = [1, 1], [0, 0], [2, 2], [1, 1], 1

    def pack() -> Tensor:
        return PACK_TRANSPOSED(taps(weight), *how, list(x.shape))

    return TRANSPOSED(x, packed(weight, ("doubled", len(x), x.shape[3]), pack), bias, *how, "none", [], "")


def taps(weight: Tensor) -> Tensor:
    """weight (D,C,3,3) -> (C,D,4,4): what each pixel gives to 4x4 of the doubled picture."""
    ends = weight.new_tensor([[0, 0, 1], [0, 1, 1], [1, 1, 0], [1, 0, 0]])
    return (weight.flatten(2) @ torch.kron(ends, ends).T).unflatten(2, (4, 4)).transpose(0, 1)


def norm_conv(
    norm: nn.Module, conv: nn.Module, x: Tensor, skip: nn.Module | None = None, start: Tensor | None = None
) -> Tensor:
    """conv(silu(norm(x))), or skip(start) + that, of a GroupNorm and a 3x3 convolution; skip looks at single pixels.

    x (B,C,h,w), start (B,D,h,w) -> (B,E,h,w). Large pictures are taken in strips of rows: what stands between the norm
    and the end stays in the cache, and never is in memory as a whole.
    """
    if not (len(x) > 0 and numbers(x) >= LARGE_PICTURE and in_strips(norm, conv, skip, x, start)):
        h = norm_silu(norm, x)
        return conv(h) if skip is None or start is None else added(skip(start), conv, h)
    assert isinstance(norm, nn.GroupNorm) and isinstance(conv, nn.Conv2d)
    height, width = x.shape[2:]
    rows = max(STRIP // (width * max(conv.in_channels, conv.out_channels)), 1)
    shape = (len(x), conv.out_channels, height, width)
    out = torch.empty(shape, dtype=x.dtype, device="cpu", memory_format=torch.channels_last)
    for i, (factor, bias) in enumerate(zip(*affine(norm, x, rows), strict=True)):
        for top in range(0, height, rows):
            end = min(top + rows, height)
            above, below = max(top - 1, 0), min(end + 1, height)  # a 3x3 convolution sees a row more on either side
            h = torch.addcmul(bias, x[i : i + 1, :, above:below].float(), factor)
            h = F.silu(h, inplace=True).to(x.dtype)  # rounded but once
            if end - top + 2 > below - above:  # at the picture's edges
                h = F.pad(h, (0, 0, int(above == top), int(below == end)))  # (1,C,rows + 2,w)
            strip = None if skip is None or start is None else skip(start[i : i + 1, :, top:end])
            out[i : i + 1, :, top:end] = conv2d(conv, h, (0, 1), strip)
    return out


def in_strips(norm: nn.Module, conv: nn.Module, skip: nn.Module | None, *tensors: Tensor | None) -> bool:
    """Whether `norm_conv` may compute by itself what these would."""
    modules = [module for module in (norm, conv, skip) if module is not None]
    return (
        type(norm) is nn.GroupNorm
        and norm.affine
        and "forward" not in vars(norm)
        and three_by_three(conv)
        and not any(map(watched, modules))
        and on_cpu(*tensors, *(parameter for module in modules for parameter in module.parameters()))
    )


def affine(norm: nn.GroupNorm, x: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """norm(x) is bias + x * factor: (B,C,1,1) float32 each, from the moments of strips of so many rows (law of total
    variance, in float64)."""
    pictures = [torch.stack([moments(strip) for strip in picture.split(rows, dim=2)]) for picture in x.split(1)]
    strips = torch.stack(pictures).unflatten(3, (norm.num_groups, -1))  # (B,strips,2,G,C/G)
    share = strips.new_tensor([strip.shape[2] / x.shape[2] for strip in x.split(rows, dim=2)])[:, None, None]
    mean, var = strips[:, :, 0], strips[:, :, 1]
    whole = (share * mean).sum(1).mean(2)  # (B,G)
    return factor_and_bias(norm, whole, (share * (var + (mean - whole[:, None, :, None]) ** 2)).sum(1).mean(2))


def moments(x: Tensor) -> Tensor:
    """Mean and variance of each channel of x (1,C,h,w): (2,C) float64, of sums in float32."""
    unused = torch.zeros(2, x.shape[1], dtype=torch.float32, device="cpu")  # whose dtype is that of the sums
    return torch.stack(torch.batch_norm_update_stats(x, unused[0], unused[1], 0.0)).double()


def factor_and_bias(norm: nn.GroupNorm, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
    """The same from mean and variance (B,G), float64 on the CPU."""
    weight, shift = norm.weight.cpu().double(), norm.bias.cpu().double()
    mean, rstd = (v.repeat_interleave(len(weight) // norm.num_groups, 1) for v in (mean, (var + norm.eps) ** -0.5))
    factor = rstd * weight  # (B,C)
    bias = shift - mean * factor
    factor, bias = (v[:, :, None, None].to(norm.weight.device, torch.float32) for v in (factor, bias))
    return factor, bias
