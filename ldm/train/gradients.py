"""The gradient of a batch, by threads and by processes."""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from ldm.train import processes


def split(rows: Sequence[Tensor], parts: int) -> list[tuple[Tensor, ...]]:
    """The rows of a batch in at most `parts` parts, none of them empty."""
    return [part for part in zip(*(r.tensor_split(parts) for r in rows), strict=True) if len(part[0])]


class Gradients:
    """The gradient of a batch's mean loss, into the `grad` of the objective's parameters.

    Each process takes its rows, in `accumulate` parts one after the other, each of which is divided among `workers`
    threads. A part counts by its share of the rows.
    """

    def __init__(self, objective: nn.Module, parameters: Mapping[str, Tensor], accumulate: int, workers: int):
        self.objective, self.parameters, self.accumulate = objective, parameters, accumulate
        self.rows = 0  # of the whole batch
        self.threads = torch.get_num_threads()
        self.workers = 1 if processes.count() > 1 else workers or self.threads
        own = max(1, self.threads // self.workers)
        self.pool = ThreadPoolExecutor(self.workers, initializer=torch.set_num_threads, initargs=(own,))

    def close(self) -> None:
        self.pool.shutdown()
        torch.set_num_threads(self.threads)  # the pool's number would be that of every thread to come

    def __call__(self, rows: Sequence[Tensor]) -> float:
        """The part of this process's rows in the mean loss."""
        each = split(rows, processes.count())
        if len(each) < processes.count():
            raise ValueError(f"a batch of {len(rows[0])} for {processes.count()} processes: take one row each, or more")
        for parameter in self.parameters.values():
            parameter.grad = None
        parts = split(each[processes.rank()], self.accumulate)
        self.rows = len(rows[0])
        loss = self.in_threads(parts) if self.workers > 1 else self.backward(parts)
        if unused := [name for name, parameter in self.parameters.items() if parameter.grad is None]:
            raise ValueError(
                f"{len(unused)} trainable parameters take no part in the loss, {unused[0]} for one: freeze them, by"
                " requires_grad_(False)"
            )
        return loss

    def backward(self, parts: list[tuple[Tensor, ...]]) -> float:
        losses: list[float] = []
        for i, part in enumerate(parts):
            waits = isinstance(self.objective, DistributedDataParallel) and i + 1 < len(parts)
            with self.objective.no_sync() if waits else nullcontext():  # type: ignore[operator]
                loss = len(part[0]) / self.rows * self.objective(*part)
                (loss * processes.count()).backward()  # what the processes exchange is their mean
            losses.append(loss.item())
        return sum(losses)

    def in_threads(self, parts: list[tuple[Tensor, ...]]) -> float:
        losses: list[float] = []
        for part in parts:
            some, grads = zip(*self.pool.map(self.of_part, split(part, self.workers)), strict=True)
            losses += some
            for parameter, *summands in zip(self.parameters.values(), *grads, strict=True):
                if summands[0] is not None:
                    gradient = sum(summands[1:], summands[0])
                    parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
        return sum(losses)

    def of_part(self, part: tuple[Tensor, ...]) -> tuple[float, tuple[Tensor, ...]]:
        loss = len(part[0]) / self.rows * self.objective(*part)
        return loss.item(), torch.autograd.grad(loss, [*self.parameters.values()], allow_unused=True)

    def step(self, optimizers: list[Optimizer]) -> None:
        each = self.pool.map if self.workers > 1 else map
        list(each(lambda optimizer: optimizer.step(), optimizers))
        increment_version([*self.parameters.values()])  # which fused optimizers leave
