"""What a sampler shows of its loop, and what it takes back."""

from collections.abc import Generator, Iterator
from itertools import pairwise
from typing import NamedTuple, Protocol

from torch import Tensor


class Noise(Protocol):
    """Standard normal noise in the shape of x, a new draw at each call. Samplers say from which sigma to which they go:
    noise along one Brownian path depends on it (`ldm.samplers.brownian`), a stream of independent draws does not."""

    def __call__(self, sigma: Tensor, sigma_next: Tensor, /) -> Tensor: ...


class Step(NamedTuple):
    """One step from sigma to sigma_next: x (B,4,h,w) as it is at sigma_next, and the prediction made at sigma.

    noise: the fresh standard normal noise that x has got in this step, if any.
    The sampler goes on from this very x: whoever looks at a step may change it in place, or send another (`after`).
    """

    i: int
    sigma: Tensor
    sigma_next: Tensor
    x: Tensor
    x0: Tensor
    eps: Tensor
    eps_cond: Tensor | None = None
    eps_uncond: Tensor | None = None
    noise: Tensor | None = None


# What a sampler is: it yields steps, and is sent nothing, an x, or a changed step.
Steps = Generator[Step, Tensor | Step | None, None]


def after(step: Step, sent: Tensor | Step | None) -> Tensor:
    """x from which the loop goes on, after `sent = yield step`.

    sent: None for step.x; another x; or the step with another x or x0, `step._replace(x0=...)`: x is moved by what x0
    is moved, and keeps its noise. Raises ValueError for another shape.
    """
    if sent is None:
        return step.x
    if isinstance(sent, Tensor):
        sent = step._replace(x=sent)
    if sent.x.shape != step.x.shape or sent.x0.shape != step.x0.shape:
        shapes = f"x {tuple(sent.x.shape)} and x0 {tuple(sent.x0.shape)}"
        raise ValueError(f"step {step.i} was sent {shapes}: send what has the shape of x, {tuple(step.x.shape)}")
    return sent.x if sent.x0 is step.x0 else sent.x + (sent.x0 - step.x0)


def intervals(sigmas: Tensor) -> Iterator[tuple[int, tuple[Tensor, Tensor]]]:
    """i, (sigma_i, sigma_{i+1})"""
    return enumerate(pairwise(sigmas))
