"""Weights as oneDNN's convolutions want them, laid out once and not at each call.

A layer's own weight stays what and where it is. The other copy takes memory beside it, but for weights that are views
of a mapped file: their pages are handed back to the system, which reads them again should anybody look.
"""

import ctypes
import mmap
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

FILE, SWAPPED, PRESENT = 1 << 61, 1 << 62, 1 << 63  # of a page in Linux' /proc/self/pagemap
SPOTS = 4


class Packed(NamedTuple):
    """tensor: opaque. state and spots: of the weight from which it was made, and what for."""

    state: tuple[object, ...]
    spots: Tensor
    tensor: Tensor


KEPT = WeakTensorKeyDictionary()  # of each weight its Packed; copies of nets on the same parameters share it


def packed(weight: Tensor, purpose: tuple[object, ...], pack: Callable[[], Tensor]) -> Tensor:
    """pack(), which lays out `weight` for some purpose, or what it returned for that before.

    Noticed are a weight with other values by its version, as autograd does, by its place in memory and by a few of its
    values, since changes of `weight.data` have no version. (A change of single values of `.data` alone goes unnoticed.)
    """
    state = (weight.data_ptr(), weight._version, *purpose)
    spots = weight.detach()[:: max(len(weight) // SPOTS, 1), 0].flatten(1)[:, 0]
    kept = KEPT.get(weight)
    if kept is None or kept.state != state or not torch.equal(kept.spots, spots):
        KEPT.pop(weight, None)  # its memory first
        kept = KEPT[weight] = Packed(state, spots.clone(), pack())
        hand_back(weight)
    return kept.tensor


def hand_back(tensor: Tensor) -> None:
    """Give the tensor's memory back to the system if it is nothing but a file that is mapped, on Linux. Its values stay
    what they are."""
    if not tensor.is_contiguous():
        return
    page = mmap.PAGESIZE
    first = -(-tensor.data_ptr() // page)  # of the pages that are the tensor's alone
    count = (tensor.data_ptr() + tensor.nbytes) // page - first
    try:
        with Path("/proc/self/pagemap").open("rb") as pagemap:
            pagemap.seek(8 * first)
            pages = np.frombuffer(pagemap.read(8 * max(count, 0)), dtype=np.uint64)
    except OSError:
        return
    # A page that was written to is no longer the file's.
    held = pages[(pages & np.uint64(PRESENT | SWAPPED)) != 0]
    if count > 0 and len(pages) == count and ((held & np.uint64(FILE | SWAPPED)) == FILE).all():
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first * page), ctypes.c_size_t(count * page), mmap.MADV_DONTNEED)
