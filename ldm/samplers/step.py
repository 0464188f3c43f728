"""What a sampler shows of its loop."""

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import NamedTuple

from torch import Tensor

Noise = Callable[[], Tensor]  # standard normal noise in the shape of x, a new draw at each call


class Step(NamedTuple):
    """One step from sigma to sigma_next: x (B,4,h,w) as it is at sigma_next, and the prediction made at sigma.

    The sampler goes on from this very x: whoever looks at a step may change it in place.
    """

    i: int
    sigma: Tensor
    sigma_next: Tensor
    x: Tensor
    x0: Tensor
    eps: Tensor
    eps_cond: Tensor | None = None
    eps_uncond: Tensor | None = None


def intervals(sigmas: Tensor) -> Iterator[tuple[int, tuple[Tensor, Tensor]]]:
    """i, (sigma_i, sigma_{i+1})"""
    return enumerate(pairwise(sigmas))
