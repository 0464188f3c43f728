"""What the nets spend their time on, each with the plain way, which is to be read, and a faster one on CPUs.

The faster ones are no other formulas: only sums are taken in another order. The plain way is taken wherever gradients
are wanted, on other devices, under torch.compile, and for small products.
"""

import functools
import math
import time
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.module import _global_forward_hooks

# Limits are of one row of a batch, so that a picture is computed in the same way whatever the batch.
LARGE = 2**22  # multiplications; below that, calling oneDNN costs more than it saves
SCORES = 2**20  # of one head that stand in memory at a time: 4 MB, which stay in the cache
FEW_PIXELS = 1 / 4  # of the channels out: a convolution then takes longer to rearrange its weights than to compute
LARGE_PICTURE = 2**22  # numbers in a picture's activation: 16 MB, half of a usual cache
STRIP = 2**20  # of them are at work at a time
ROWS = 1024  # of a feed-forward layer

# Products by oneDNN of (x, weight, bias, ...), as torch.compile calls them. (Without oneDNN, as on ARM, PyTorch does
# not have them.)
PRODUCT = getattr(torch.ops.mkldnn, "_linear_pointwise", None)


def fits(x: Tensor, multiplications: int, *others: Tensor | None) -> bool:
    """Whether oneDNN is to be called for so many multiplications a row of x, with these others."""
    return multiplications >= LARGE and on_cpu(x, *others) and onednn_is_faster()


def on_cpu(*tensors: Tensor | None) -> bool:
    """Whether the ways of this file are for these: see its head. One of the two dtypes that oneDNN computes in, and no
    other one by autocast; no gradients, of either mode, for any of them."""
    given = [tensor for tensor in tensors if tensor is not None]
    return (
        all(tensor.device.type == "cpu" and tensor.dtype == given[0].dtype for tensor in given)
        and given[0].dtype in (torch.float32, torch.bfloat16)
        and not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given))
        and forward_ad._current_level < 0
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )


def numbers(x: Tensor) -> int:
    """In each row of a batch."""
    return x.shape[1:].numel()


@functools.cache
def onednn_is_faster() -> bool:
    """Than the library that PyTorch takes for products of float32 matrices, which on some processors uses half of what
    they can do."""
    return PRODUCT is not None and faster(product, F.linear, (512, 1024), (1024, 1024))


@functools.cache
def transposed_is_faster() -> bool:
    """Than a convolution of the doubled picture: it multiplies less, but some processors lack good code for it."""
    return faster(transposed, doubled, (1, 256, 64, 64), (256, 256, 3, 3))


@torch.no_grad()
def faster(
    function: Callable[..., Tensor], plain: Callable[..., Tensor], shape: Sequence[int], weight: Sequence[int]
) -> bool:
    """Clearly faster than the plain one: told by trying both, for some tenths of a second at most."""
    ones = functools.partial(torch.ones, dtype=torch.float32, device="cpu")
    x, w = ones(shape), ones(weight)
    if x.ndim == 4:
        x = channels_last(x)

    def seconds(function: Callable[..., Tensor]) -> float:
        start = time.perf_counter()
        function(x, w, None)
        return time.perf_counter() - start

    rounds = [(seconds(plain), seconds(function)) for _ in range(6)][1:]  # the first one warms up
    before, after = (min(column) for column in zip(*rounds, strict=True))
    return after < 0.8 * before


def channels_last(x: Tensor) -> Tensor:
    """x (B,C,h,w) laid out as oneDNN and cuDNN compute and as attention wants it; unless gradients may be wanted, which
    round as those of nets that leave it."""
    return x if torch.is_grad_enabled() else x.contiguous(memory_format=torch.channels_last)


def product(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str = "none") -> Tensor:
    """activation(F.linear(x, weight, bias)) by oneDNN."""
    assert PRODUCT is not None
    return PRODUCT(x, weight, bias, activation, [], "none")


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (...,n), weight (m,n), bias (m,) -> (...,m)"""
    if x.dtype == torch.float32 and fits(x, numbers(x) * len(weight), weight, bias):
        return product(x, weight, bias)
    return F.linear(x, weight, bias)


def norm_silu(norm: nn.Module, x: Tensor) -> Tensor:
    """silu(norm(x)), in the memory of norm(x) unless gradients are wanted or somebody watches the norm."""
    y = norm(x)
    return F.silu(y, inplace=y is not x and not y.requires_grad and not watched(norm))


def norm_conv(
    norm: nn.Module, conv: nn.Module, x: Tensor, skip: nn.Module | None = None, start: Tensor | None = None
) -> Tensor:
    """conv(silu(norm(x))), or skip(start) + that, of a GroupNorm and a 3x3 convolution; skip looks at single pixels.

    x (B,C,h,w), start (B,D,h,w) -> (B,E,h,w). Large pictures are taken in strips of rows: what stands between the norm
    and the end stays in the cache, and never is in memory as a whole.
    """
    if not (numbers(x) >= LARGE_PICTURE and in_strips(norm, conv, skip, x, start)):
        y = conv(norm_silu(norm, x))
        return y if skip is None or start is None else skip(start) + y
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
            h = F.silu(h, inplace=True).to(x.dtype)
            if end - top + 2 > below - above:  # at the picture's edges
                h = F.pad(h, (0, 0, int(above == top), int(below == end)))  # (1,C,rows + 2,w)
            h = F.conv2d(h, conv.weight, conv.bias, padding=(0, 1))
            to = out[i : i + 1, :, top:end]
            if skip is None or start is None:
                to.copy_(h)
            else:
                torch.add(skip(start[i : i + 1, :, top:end]), h, out=to)
    return out


def in_strips(norm: nn.Module, conv: nn.Module, skip: nn.Module | None, *tensors: Tensor | None) -> bool:
    """Whether `norm_conv` may compute by itself what these would."""
    modules = [module for module in (norm, conv, skip) if module is not None]
    return (
        type(norm) is nn.GroupNorm
        and norm.affine
        and "forward" not in vars(norm)
        and plain_3x3(conv)
        and not any(map(watched, modules))
        and on_cpu(*tensors, *(parameter for module in modules for parameter in module.parameters()))
    )


def plain_3x3(conv: nn.Module) -> bool:
    """Whether it is PyTorch's own 3x3 convolution, zeros around the picture, and nobody has changed what it does."""
    return (
        type(conv) is nn.Conv2d
        and (conv.kernel_size, conv.padding, conv.stride, conv.dilation) == ((3, 3), (1, 1), (1, 1), (1, 1))
        and conv.groups == 1
        and conv.padding_mode == "zeros"
        and not {"forward", "_conv_forward"} & set(vars(conv))
    )


def affine(norm: nn.GroupNorm, x: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """norm(x) is bias + x * factor: (B,C,1,1) float32 each, from sums over strips of so many rows."""
    count, each = numbers(x) // norm.num_groups, norm.num_channels // norm.num_groups
    near = x[:, :, 0, 0].float()  # (B,C), about the means: what is summed is small, and little of it cancels out
    sums = torch.zeros(2, *near.shape, dtype=torch.float64, device="cpu")
    for strip in x.split(rows, dim=2):
        values = strip.permute(0, 2, 3, 1).flatten(1, 2) - near[:, None]  # (B,pixels,C)
        sums += torch.stack([values.sum(1), values.square().sum(1)])
    near, pixels = near.double(), numbers(x) // norm.num_channels
    of_channels = torch.stack([sums[0] + pixels * near, sums[1] + 2 * near * sums[0] + pixels * near**2])
    mean, square = of_channels.unflatten(2, (-1, each)).sum(3) / count  # (B,G) each
    return factor_and_bias(norm, mean, (square - mean**2).clamp(min=0))


def factor_and_bias(norm: nn.GroupNorm, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
    """The same from mean and variance (B,G), float64 on the CPU."""
    weight, shift = norm.weight.cpu().double(), norm.bias.cpu().double()
    mean, rstd = (v.repeat_interleave(len(weight) // norm.num_groups, 1) for v in (mean, (var + norm.eps) ** -0.5))
    factor = rstd * weight  # (B,C)
    bias = shift - mean * factor
    factor, bias = (v[:, :, None, None].to(norm.weight.device, torch.float32) for v in (factor, bias))
    return factor, bias


def transposes(conv: nn.Conv2d, x: Tensor) -> bool:
    """Whether `transposed` is to be called for conv of x with each pixel doubled in both directions."""
    if numbers(x) < LARGE_PICTURE // 2 or not plain_3x3(conv) or watched(conv):
        return False
    return on_cpu(x, conv.weight, conv.bias) and transposed_is_faster()


def doubled(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """conv of x (B,C,h,w) with each pixel doubled in both directions, a 3x3 convolution -> (B,D,2h,2w)."""
    return F.conv2d(F.interpolate(x, scale_factor=2.0, mode="nearest"), weight, bias, padding=1)


def transposed(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The same with 4/9 of the multiplications: of three neighbours in the doubled picture two are the same pixel, so
    that their weights are added first. Each pixel then goes to 4x4 of the result: a transposed convolution."""
    ends = weight.new_tensor([[0, 0, 1], [0, 1, 1], [1, 1, 0], [1, 0, 0]])
    taps = (weight.flatten(2) @ torch.kron(ends, ends).T).unflatten(2, (4, 4))  # (D,C,4,4)
    return F.conv_transpose2d(x, taps.transpose(0, 1), bias, stride=2, padding=1)


def geglu(x: Tensor, proj: nn.Linear) -> Tensor:
    """a * gelu(b), [a, b] = proj(x), with the exact (erf) gelu (Shazeer 2020)."""
    if not watched(proj) and fits(x, numbers(x) * len(proj.weight), proj.weight, proj.bias):
        (weight_a, weight_b), (bias_a, bias_b) = proj.weight.chunk(2), proj.bias.chunk(2)
        return product(x, weight_a, bias_a).mul_(product(x, weight_b, bias_b, "gelu"))
    a, b = proj(x).chunk(2, dim=-1)
    return a * F.gelu(b)


def by_rows(net: nn.Module, x: Tensor) -> Tensor:
    """net(x), x (B,N,C), of a net that looks at each of the N rows alone and leaves the shape: in blocks of rows, so
    that what is computed in between stays in the cache."""
    if x.shape[1] < 2 * ROWS or not on_cpu(x, *net.parameters()) or any(map(watched, net.modules())):
        return net(x)
    out = torch.empty_like(x)
    for block, to in zip(x.split(1), out.split(1), strict=True):
        for rows, place in zip(block.split(ROWS, dim=1), to.split(ROWS, dim=1), strict=True):
            place.copy_(net(rows))
    return out


def watched(module: nn.Module) -> bool:
    """Whether it must be called as a module, and its output left as it is: hooks read it, or add to it as LoRA does."""
    return bool(module._forward_hooks or module._forward_pre_hooks or _global_forward_hooks)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(d)) v of q (B,heads,N,d), k and v (B,heads,M,d) -> (B,heads,N,d); the mask as in
    `ldm.attention`.

    Large ones head by head, in blocks of queries; scores and their softmax are float32 whatever the dtype.
    """
    (batch, heads, n, d), m = q.shape, k.shape[2]
    if mask is not None or n < 1024 or not fits(q, n * m * d, k, v):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    out = torch.empty(batch, n, heads, d, dtype=q.dtype, device="cpu")
    rows = max(SCORES // m, 128)
    for i in range(batch):
        for head in range(heads):
            queries = q[i, head].float() / math.sqrt(d)  # (N,d)
            keys, values = k[i, head].float().contiguous(), v[i, head].T.contiguous()  # (M,d), (d,M)
            for block, to in zip(queries.split(rows), out[i, :, head].split(rows), strict=True):
                weights = product(block, keys, None).softmax(dim=-1).to(v.dtype)  # (rows,M)
                to.copy_(product(weights, values, None))
    return out.transpose(1, 2)


class Linear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class Conv2d(nn.Conv2d):
    """With a kernel of 3x3, padding 1 and stride 1."""

    def __init__(self, inp: int, out: int):
        super().__init__(inp, out, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        pixels = x.shape[2] * x.shape[3]
        few = pixels <= FEW_PIXELS * self.out_channels
        if not few or not fits(x, pixels * self.weight.numel(), self.weight, self.bias):
            return super().forward(x)
        patches = F.pad(x, (1, 1, 1, 1)).unfold(2, 3, 1).unfold(3, 3, 1).permute(0, 2, 3, 1, 4, 5)  # (B,h,w,C,3,3)
        y = product(patches.flatten(3), self.weight.flatten(1), self.bias)  # (B,h,w,out)
        return y.permute(0, 3, 1, 2)  # (B,out,h,w)
