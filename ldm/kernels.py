"""What the nets spend their time on, each with the plain way, which is to be read, and a faster one on CPUs.

The faster ones are no other formulas: only sums are taken in another order. The plain way is taken wherever gradients
are wanted, on other devices, under torch.compile, and for small products.
"""

import functools
import math
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.module import _global_forward_hooks

# Limits are of one row of a batch, so that a picture is computed in the same way whatever the batch.
LARGE = 2**22  # multiplications; below that, calling oneDNN costs more than it saves
SCORES = 2**20  # of one head that stand in memory at a time: 4 MB, which stay in the cache
ROWS = 1024  # of a feed-forward layer

# Products by oneDNN of (x, weight, bias, ...), as torch.compile calls them. (PyTorch without oneDNN has none.)
PRODUCT = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
COMBINED: Any = getattr(PRODUCT, "binary", None)  # of (x, what to add or multiply by, weight, bias, which of the two)


def fits(x: Tensor, multiplications: int, *others: Tensor | None) -> bool:
    """Whether oneDNN's product is to be called for so many multiplications a row of x, with these others."""
    return (
        PRODUCT is not None
        and multiplications >= LARGE
        and on_cpu(x, *others)
        and (has_avx() if x.dtype == torch.float32 else has_bfloat16())
    )


@functools.cache
def has_avx() -> bool:
    """Whether oneDNN has float32 products of its own that are as fast as those of the library PyTorch takes, or, on
    processors that this one does not know, twice as fast: from AVX2 on. Not measured: near 1 each process would find
    something else, and the pictures of a list would depend on who makes them."""
    return torch.backends.cpu.get_cpu_capability().startswith("AVX")


@functools.cache
def has_bfloat16() -> bool:
    """Whether oneDNN computes in bfloat16 here."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def on_cpu(*tensors: Tensor | None) -> bool:
    """Whether the ways of this file are for these: see its head. One of the two dtypes that oneDNN computes in, and no
    other one by autocast; values in memory, and no stand-ins for them; no gradients, of either mode, for any."""
    given = [tensor for tensor in tensors if tensor is not None]
    return (
        all(tensor.device.type == "cpu" and tensor.dtype == given[0].dtype for tensor in given)
        and all(type(tensor) in (Tensor, nn.Parameter) for tensor in given)
        and given[0].dtype in (torch.float32, torch.bfloat16)
        and not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given))
        and forward_ad._current_level < 0
        and torch._C._functorch.maybe_current_level() is None
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )


def numbers(x: Tensor) -> int:
    """In each row of a batch."""
    return x.shape[1:].numel()


@functools.cache
def blocks_are_faster(dtype: torch.dtype) -> bool:
    """Than PyTorch's attention, in which products of few columns are slow on some processors; with AMX they are not."""
    if PRODUCT is None or torch.cpu._is_amx_tile_supported() or (dtype == torch.bfloat16 and not has_bfloat16()):
        return False
    q, k = ones(1, 2, 1024, 40).to(dtype), ones(1, 2, 4096, 40).to(dtype)
    return faster(lambda: attention_in_blocks(q, k, k), lambda: F.scaled_dot_product_attention(q, k, k))


def ones(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.float32, device="cpu")


@torch.no_grad()
def faster(function: Callable[[], Tensor], plain: Callable[[], Tensor]) -> bool:
    """Clearly faster than the plain one: told by trying both, for some tenths of a second at most. In time of the
    processor, which what else runs on the machine does not take."""

    def seconds(function: Callable[[], Tensor]) -> float:
        start = time.process_time()
        function()
        return time.process_time() - start

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


def geglu(x: Tensor, proj: nn.Linear) -> Tensor:
    """a * gelu(b), [a, b] = proj(x), with the exact (erf) gelu (Shazeer 2020)."""
    if not watched(proj) and fits(x, numbers(x) * len(proj.weight), proj.weight, proj.bias):
        (weight_a, weight_b), (bias_a, bias_b) = proj.weight.chunk(2), proj.bias.chunk(2)
        return COMBINED(x, product(x, weight_b, bias_b, "gelu"), weight_a, bias_a, "mul")
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
    `ldm.attention`. Large ones in blocks where that is faster."""
    (n, d), m = q.shape[2:], k.shape[2]
    if mask is None and n >= 1024 and n * m * d >= LARGE and on_cpu(q, k, v) and blocks_are_faster(q.dtype):
        return attention_in_blocks(q, k, v)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def attention_in_blocks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Head by head, in blocks of queries; scores and their softmax are float32 whatever the dtype."""
    (batch, heads, n, d), m = q.shape, k.shape[2]
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
