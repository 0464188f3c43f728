"""How far two tensors are apart."""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

# How many ulp of its largest value a layer alone may be off: what another kernel, or another layout of memory, makes of
# a right one. Half precision sums in float32 and rounds once, the code around layers a few times. To this comes the
# order of summation: sqrt(K) ulp for sums of K products (Higham and Mary 2019). Measured: two kernels for a convolution
# with K = 11,520 were up to 66 ulp apart, for attention over 1,024 tokens 13; norms at most 3.
TOLERANCE = {torch.float64: 16, torch.float32: 16, torch.bfloat16: 4, torch.float16: 4}


class Difference(NamedTuple):
    """The largest one of all values: absolute, relative to the largest recorded value, and in ulp of that value, in the
    coarser of the two dtypes. Infinite where the shapes do not fit, or one of two values is no number."""

    absolute: float
    relative: float
    ulp: float
    ok: bool = True


def measure(ours: Tensor, theirs: Tensor, terms: int | None = None) -> Difference:
    """terms: how many products are summed up in each value; None: as many as there are tokens, as in attention."""
    if terms is None:
        terms = ours.shape[1] if ours.ndim == 3 else 0
    same = laid_out(theirs.to(ours.device), ours.shape)
    if same is None:
        return Difference(math.inf, math.inf, math.inf, False)
    a, b = ours.double(), same.double()
    equal = (a == b) | (a.isnan() & b.isnan())
    absolute = (a - b).abs().masked_fill(equal, 0.0).nan_to_num(math.inf).max().item() if a.numel() else 0.0
    if absolute == 0.0:
        return Difference(0.0, 0.0, 0.0)
    if not (ours.is_floating_point() and theirs.is_floating_point()):  # token numbers
        return Difference(absolute, math.inf, math.inf, False)
    dtype = max(ours.dtype, theirs.dtype, key=lambda d: torch.finfo(d).eps)
    largest = max(b.abs().nan_to_num(0.0, posinf=0.0).max().item(), torch.finfo(dtype).tiny)
    ulp = absolute / (torch.finfo(dtype).eps * 2.0 ** math.floor(math.log2(largest)))
    summed = torch.finfo(torch.promote_types(dtype, torch.float32)).eps / torch.finfo(dtype).eps  # an ulp of the sums
    return Difference(absolute, absolute / largest, ulp, ulp <= TOLERANCE[dtype] + math.sqrt(terms) * summed)


def terms_of(module: nn.Module) -> int:
    """How many products a linear layer or a convolution sums up."""
    weight = getattr(module, "weight", None)
    return weight[0].numel() if isinstance(weight, Tensor) and weight.ndim > 1 else 0


def laid_out(tensor: Tensor, shape: torch.Size) -> Tensor | None:
    """The same numbers in another implementation's shape, None where it holds others.

    (B,C,h,w) is (B,C,hw) to some norms and (B,hw,C) to a linear layer in the place of a 1x1 convolution.
    """
    if tensor.shape == shape:
        return tensor
    if tensor.numel() != math.prod(shape) or tensor.ndim < 3 or len(shape) < 3 or tensor.ndim == len(shape):
        return None
    if tensor.shape[:2] == shape[:2]:
        return tensor.reshape(shape)
    if tensor.ndim == 4 and tensor.shape[1] == shape[-1]:
        return tensor.flatten(2).transpose(1, 2)
    if len(shape) == 4 and tensor.shape[-1] == shape[1]:
        return tensor.transpose(1, 2).reshape(shape)
    return None
