"""Weights that are views of a mapped file take memory while they are used, and need not keep it."""

import ctypes
import mmap
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

FILE, SWAPPED, PRESENT = 1 << 61, 1 << 62, 1 << 63  # of a page in Linux' /proc/self/pagemap
LEAST = 2**20  # bytes of a tensor that are worth the trouble


def hand_back_all(net: nn.Module | None) -> None:
    """`hand_back` each parameter of a net that will not be used for a while."""
    for parameter in [] if net is None else net.parameters():
        hand_back(parameter)


def hand_back(tensor: Tensor) -> None:
    """Give the tensor's memory back to the system if it is nothing but a file that is mapped, on Linux.

    Its values stay what they are, unless another thread writes to them just now: the system reads them again when they
    are looked at, from its own cache if it still has them.
    """
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout != torch.strided or tensor.device.type != "cpu":
        return
    if tensor.nbytes < LEAST or not tensor.is_contiguous():
        return
    page = mmap.PAGESIZE
    first = -(-tensor.data_ptr() // page)  # of the pages that are the tensor's alone
    count = (tensor.data_ptr() + tensor.nbytes) // page - first
    try:
        with Path("/proc/self/pagemap").open("rb") as pagemap:
            pagemap.seek(8 * first)
            pages = np.frombuffer(pagemap.read(8 * count), dtype=np.uint64)
    except OSError:
        return
    # A page that was written to is no longer the file's.
    held = pages[(pages & np.uint64(PRESENT | SWAPPED)) != 0]
    if len(pages) == count and ((held & np.uint64(FILE | SWAPPED)) == FILE).all():
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first * page), ctypes.c_size_t(count * page), mmap.MADV_DONTNEED)
