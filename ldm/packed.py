"""Weights as oneDNN's convolutions want them, laid out once and not at each call.

A layer's own weight stays what and where it is. The other copy takes memory beside it, but for weights that are views
of a mapped file, which are handed back (`ldm.mapped`).
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ldm.mapped import hand_back


class Packed(NamedTuple):
    """tensor: opaque. state and first row: of the weight from which it was made, and what for."""

    state: tuple[object, ...]
    first: Tensor
    tensor: Tensor


# Of each weight its Packed, as long as there is the weight; copies of nets on the same parameters share it.
KEPT = WeakTensorKeyDictionary()
LAST = WeakTensorKeyDictionary()  # the same of the last weight alone, for what is quickly laid out, and large


def packed(weight: Tensor, purpose: tuple[object, ...], pack: Callable[[], Tensor], keep: bool = True) -> Tensor:
    """pack(), which lays out `weight` for some purpose, or what it returned for that before; unless it is not to be
    kept, and was not the last one.

    Other values of the weight are noticed by its version, as autograd does, by its place in memory and, since changes
    of `weight.data` and fused optimizers make no version, by its first row. Whoever changes other rows alone in such a
    way calls `torch.autograd.graph.increment_version`.
    """
    version = None if weight.is_inference() else weight._version
    state = (weight.data_ptr(), weight.dtype, version, *purpose)
    first = weight.detach()[0]
    kept = KEPT.get(weight) if keep else LAST.get(weight)
    if kept is not None and kept.state == state and torch.equal(kept.first, first):
        return kept.tensor
    if keep:
        KEPT.pop(weight, None)  # its memory first
        kept = KEPT[weight] = Packed(state, first.clone(), pack())
        hand_back(weight)
    else:
        LAST.clear()
        kept = LAST[weight] = Packed(state, first.clone(), pack())
    return kept.tensor
