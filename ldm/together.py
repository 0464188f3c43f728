"""Pictures that are made in one batch, each of them bit for bit what it is alone.

Convolutions and products of matrices choose their kernels by the size of the batch, and kernels add up in different
orders: with float32 on a CPU latents of the default model differ by up to 7e-6 from those of the picture alone, and of
the 12,288 values of a picture now and then one by 1. Nobody promises which shapes round alike, so it is tried.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ldm import kernels
from ldm.convolutions import ADDED, CONVOLUTION, TRANSPOSED

# How many of the first arguments have the batch's rows. The rest of the nets goes row by row, whatever the batch.
MIXING = dict.fromkeys((torch.conv2d, CONVOLUTION, TRANSPOSED, F.linear, kernels.PRODUCT, F.group_norm), 1)
MIXING |= {ADDED: 2, kernels.COMBINED: 2}


class Alone(TorchFunctionMode):
    """`with alone: pipe(...)` of `count` pictures. Each layer is called picture by picture where that differs from the
    whole batch: the first time it sees a shape it is run in both ways.

    The rows of picture i are i, i + count, i + 2 count, ... as guidance lays them out. The number of threads must stay
    what it was: it changes kernels too.
    """

    def __init__(self) -> None:
        super().__init__()
        self.count = 1
        self.same: dict[tuple[Any, ...], bool] = {}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        # What is not one row or more of each picture is shared by all of them; or it is of one alone, in attention.
        if func not in MIXING or self.count == 1 or len(args[0]) % self.count or of_one_head(func, args[0]):
            return func(*args, **kwargs)
        rows, others = args[: MIXING[func]], args[MIXING[func] :]
        case = func, *map(place, others[:2]), rows[0].shape, rows[0].dtype, self.count
        if self.same.get(case):
            return func(*args, **kwargs)
        # Clones, as a view of every second row has no layout of its own, and that chooses kernels too.
        parts = [func(*(x[i :: self.count].clone() for x in rows), *others, **kwargs) for i in range(self.count)]
        y: Tensor = torch.cat(parts)  # in the memory format of the parts
        for i, part in enumerate(parts):
            y[i :: self.count] = part
        if case not in self.same:
            self.same[case] = torch.equal(func(*args, **kwargs), y)
        return y


def place(argument: Any) -> Any:
    """What tells a layer's weight and bias, or its groups, from another's: not `id`, as layers make views of weights at
    each call, and the next view may get the id of the last. (A packed weight's place may become another's: the bias is
    there.)"""
    if not isinstance(argument, Tensor):
        return argument
    if argument.is_mkldnn:
        return argument.shape
    return argument.data_ptr(), argument.shape, argument.stride()


def of_one_head(func: Callable[..., Any], x: Tensor) -> bool:
    return func is kernels.PRODUCT and x.ndim == 2
