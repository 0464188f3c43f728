"""What the nets spend their time on, each with the plain way, which is to be read, and a faster one on CPUs.

The faster ones are no other formulas: only sums are taken in another order. The plain way is taken wherever gradients
are wanted, on other devices, under torch.compile, and for small products.
"""

import functools
import math
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Limits are of one row of a batch, so that a picture is computed in the same way whatever the batch.
LARGE = 2**22  # multiplications; below that, calling oneDNN costs more than it saves
SCORES = 2**20  # of one head that stand in memory at a time: 4 MB, which stay in the cache
FEW_PIXELS = 1 / 4  # of the channels out: a convolution then takes longer to rearrange its weights than to compute

# Products by oneDNN, as torch.compile calls them, of (x, weight, bias, ...), and of (x, other, weight, bias, ...).
# (Without oneDNN, as on ARM, PyTorch does not have them.)
PRODUCT = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
GATED = getattr(PRODUCT, "binary", None)


def fits(x: Tensor, weight: Tensor, multiplications: int) -> bool:
    """Whether oneDNN is to be called for so many multiplications a row. One of the two dtypes that it computes in, and
    not as another one."""
    return (
        multiplications >= LARGE
        and x.device.type == "cpu"
        and x.dtype == weight.dtype
        and x.dtype in (torch.float32, torch.bfloat16)
        and not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad))
        and not torch.compiler.is_compiling()
        and onednn_is_faster()
    )


@functools.cache
def onednn_is_faster() -> bool:
    """Than the library that PyTorch takes for products of float32 matrices, which on some processors uses half of what
    they can do: told by trying both once, for some hundredths of a second."""
    if PRODUCT is None:
        return False
    x, weight = torch.ones(512, 1024), torch.ones(1024, 1024)

    def seconds(function: Callable[..., Tensor]) -> float:
        start = time.perf_counter()
        function(x, weight, None)
        return time.perf_counter() - start

    rounds = [(seconds(F.linear), seconds(product)) for _ in range(6)][1:]  # the first one warms up
    plain, onednn = (min(column) for column in zip(*rounds, strict=True))
    return onednn < 0.8 * plain


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
    if x.dtype == torch.float32 and fits(x, weight, x[0].numel() * len(weight)):
        return product(x, weight, bias)
    return F.linear(x, weight, bias)


def norm_silu(norm: nn.Module, x: Tensor) -> Tensor:
    """silu(norm(x)), in the memory of norm(x) unless gradients are wanted or somebody watches the norm."""
    y = norm(x)
    return F.silu(y, inplace=not y.requires_grad and not watched(norm))


def geglu(x: Tensor, proj: nn.Linear) -> Tensor:
    """a * gelu(b), [a, b] = proj(x), with the exact (erf) gelu (Shazeer 2020)."""
    if not watched(proj) and fits(x, proj.weight, x[0].numel() * len(proj.weight)):
        (weight_a, weight_b), (bias_a, bias_b) = proj.weight.chunk(2), proj.bias.chunk(2)
        gate = product(x, weight_b, bias_b, "gelu")
        assert GATED is not None
        return GATED(x, gate, weight_a, bias_a, "mul")
    a, b = proj(x).chunk(2, dim=-1)
    return a * F.gelu(b)


def watched(module: nn.Module) -> bool:
    """Whether it must be called as a module, and its output left as it is: hooks read it, or add to it as LoRA does."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(d)) v of q (B,heads,N,d), k and v (B,heads,M,d) -> (B,heads,N,d); the mask as in
    `ldm.attention`.

    Large ones head by head, in blocks of queries; scores and their softmax are float32 whatever the dtype.
    """
    (batch, heads, n, d), m = q.shape, k.shape[2]
    if mask is not None or n < 1024 or not fits(q, k, n * m * d):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    out = torch.empty(batch, n, heads, d, dtype=q.dtype)
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
        if pixels > FEW_PIXELS * self.out_channels or not fits(x, self.weight, pixels * self.weight.numel()):
            return super().forward(x)
        patches = F.pad(x, (1, 1, 1, 1)).unfold(2, 3, 1).unfold(3, 3, 1).permute(0, 2, 3, 1, 4, 5)  # (B,h,w,C,3,3)
        y = product(patches.flatten(3), self.weight.flatten(1), self.bias)  # (B,h,w,out)
        return y.permute(0, 3, 1, 2)  # (B,out,h,w)
