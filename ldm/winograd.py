"""3x3 convolutions with a quarter of the multiplications, in float32 on CPUs.

F(4x4, 3x3) of Lavin and Gray 2015 (arXiv:1509.09308): tiles of 6x6 numbers overlap by two; of each come 4x4 of the
result, by 36 products instead of 144. In between are numbers of other sizes, so that rounding shows more: 2e-5 of a
layer's largest value, where the sums of a plain one are 3e-6 off.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 2**19  # numbers of a picture that are at work at a time: with their tiles 7 MB, which stay in the cache

# Of the paper's formula A^T [(G g G^T) * (B^T d B)] A. A and B are written out in `into_tiles` and `out_of_tiles`.
G = (
    (1 / 4, 0.0, 0.0),
    (-1 / 6, -1 / 6, -1 / 6),
    (-1 / 6, 1 / 6, -1 / 6),
    (1 / 24, 1 / 12, 1 / 6),
    (1 / 24, -1 / 12, 1 / 6),
    (0.0, 0.0, 1.0),
)


def by_taps(weight: Tensor) -> Tensor:
    """weight (D,C,3,3) -> (9,C,D), column by column as the tiles are."""
    return weight.permute(3, 2, 1, 0).flatten(0, 1)


def transformed(taps: Tensor) -> Tensor:
    """G g G^T of taps (9,C,D) -> (36,C,D). It takes a millisecond, and four times their memory."""
    g = torch.tensor(G, dtype=taps.dtype)
    return (torch.kron(g, g) @ taps.flatten(1)).view(36, *taps.shape[1:])


def winograd(x: Tensor, weight: Tensor, bias: Tensor | None, padding: tuple[int, ...]) -> Tensor:
    """x (B,C,H,W), weight as `transformed` (36,C,D), bias (D,) -> (B,D,h,w), channels last; h = H + 2 padding - 2.
    Each row of the batch is computed alone, in blocks."""
    height, width = (n + 2 * p - 2 for n, p in zip(x.shape[2:], padding, strict=True))
    down, right = -height % 4, -width % 4  # to whole tiles
    x = F.pad(x, (padding[1], padding[1] + right, padding[0], padding[0] + down))
    shape = len(x), weight.shape[2], height + down, width + right
    out = torch.empty(shape, dtype=x.dtype, device="cpu", memory_format=torch.channels_last)
    rows = max(BLOCK // (shape[3] * x.shape[1]) // 4, 1) * 4
    for picture, to in zip(x.permute(0, 2, 3, 1), out.permute(0, 2, 3, 1), strict=True):  # (h+2,w+2,C), (h,w,D)
        for top, lines in zip(range(0, shape[2], rows), to.split(rows), strict=True):
            block(picture[top : top + len(lines) + 2], weight, lines)
    out = out[:, :, :height, :width].contiguous(memory_format=torch.channels_last)
    return out if bias is None else out.add_(bias[:, None, None])


def block(x: Tensor, weight: Tensor, out: Tensor) -> None:
    """x (h+2,w+2,C) -> out (h,w,D)"""
    (height, width, d), c = out.shape, x.shape[2]
    h, w = height // 4, width // 4
    lines = x.new_empty(6, h, width + 2, c)
    into_tiles([x[i : i + height - 3 : 4] for i in range(6)], lines)
    tiles = x.new_empty(6, 6, h, w, c)
    into_tiles([lines[:, :, j : j + width - 3 : 4] for j in range(6)], tiles)
    products = torch.bmm(tiles.view(36, h * w, c), weight).view(6, 6, h, w, d)
    lines = x.new_empty(6, h, w, 4, d)
    out_of_tiles(products, lines.unbind(3))
    out_of_tiles(lines.flatten(2, 3), out.view(h, 4, width, d).unbind(1))


def into_tiles(x: list[Tensor], out: Tensor) -> None:
    """B^T x, of six tensors, one row of B^T after the other."""
    torch.add(x[4], x[0], alpha=4, out=out[0]).sub_(x[2], alpha=5)
    even, odd = torch.sub(x[4], x[2], alpha=4, out=out[1]), torch.sub(x[3], x[1], alpha=4)
    torch.sub(even, odd, out=out[2])
    even.add_(odd)
    even, odd = torch.sub(x[4], x[2], out=out[3]), torch.sub(x[3], x[1], out=odd)
    torch.sub(even, odd, alpha=2, out=out[4])
    even.add_(odd, alpha=2)
    torch.add(x[5], x[1], alpha=4, out=out[5]).sub_(x[3], alpha=5)


def out_of_tiles(x: Tensor, out: tuple[Tensor, ...]) -> None:
    """A^T x, of six tensors into four."""
    even, odd, even2, odd2 = x[1] + x[2], x[1] - x[2], x[3] + x[4], x[3] - x[4]
    torch.add(odd, odd2, alpha=2, out=out[1])
    torch.add(even, even2, alpha=4, out=out[2])
    torch.add(odd.add_(x[5]), odd2, alpha=8, out=out[3])
    torch.add(even.add_(x[0]), even2, out=out[0])
