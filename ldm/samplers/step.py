"""What a sampler shows of its loop, and what it takes back."""

from collections.abc import Generator, Iterator
from itertools import pairwise
from typing import Any, NamedTuple, Protocol

import torch
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


def after(step: Step, sent: Tensor | Step | None) -> Step:
    """The step as the loop goes on from it, after `sent = yield step`.

    sent: None for the step as it is; another x; or the step with another x or x0, `step._replace(x0=...)`: x is moved
    by what x0 is moved, and keeps its noise: x = x0 + sigma_next eps + noise. eps stays. Multistep samplers remember
    the x0 that was sent; those that remember eps have nothing to change. Another floating dtype is converted to x's.
    Raises FloatingPointError where the step holds NaN or infinity, ValueError for what cannot be gone on from: another
    type, shape or device, whole or complex numbers, NaN or infinity.
    """
    check_finite(step.i, step.sigma, step.x, step.x0, step.eps)
    if not step.x.shape == step.x0.shape == step.eps.shape:
        shapes = f"x0 {tuple(step.x0.shape)} and eps {tuple(step.eps.shape)}"
        raise ValueError(f"step {step.i} predicted {shapes}: a denoiser returns the shape of x, {tuple(step.x.shape)}")
    if sent is None:
        return step
    if isinstance(sent, Tensor):
        sent = step._replace(x=sent)
    if not isinstance(sent, Step):
        raise ValueError(f"step {step.i} was sent a {type(sent).__name__}: send an x as a tensor, or a Step")
    x, x0 = accepted(step, "x", sent.x), accepted(step, "x0", sent.x0)
    return step._replace(x=x if sent.x0 is step.x0 else x + (x0 - step.x0), x0=x0)


def accepted(step: Step, name: str, value: Any) -> Tensor:
    """What was sent for x or x0, in the dtype of x."""
    if not isinstance(value, Tensor):
        given = f"a {type(value).__name__}"
    elif value.shape != step.x.shape or value.device != step.x.device or not value.is_floating_point():
        given = f"{tuple(value.shape)} {value.dtype} on {value.device}"
    elif not torch.isfinite(value.detach().to(step.x.dtype)).all():
        given = "with NaN or infinity"
    else:
        return value.to(step.x.dtype)
    raise ValueError(
        f"step {step.i} was sent {name} {given}: send what has the shape of x, {tuple(step.x.shape)},"
        f" in finite floating numbers, on {step.x.device}"
    )


def check_finite(i: int, sigma: Tensor, *values: Tensor) -> None:
    if not all(torch.isfinite(value.detach()).all() for value in values):
        raise FloatingPointError(
            f"NaN or infinity in step {i}, at sigma={float(sigma):.4f}: look at what the denoiser returns there"
            " (its dtype, its weights), and at x if somebody changed it in place"
        )


def intervals(sigmas: Tensor, falling: bool = False) -> Iterator[tuple[int, tuple[Tensor, Tensor]]]:
    """i, (sigma_i, sigma_{i+1}) of `checked` sigmas."""
    return enumerate(pairwise(checked(sigmas, falling)))


def checked(sigmas: Tensor, falling: bool = False) -> Tensor:
    """The sigmas (steps + 1,) again. Raises ValueError unless they are finite, 0 or more, and all fall or all rise.

    falling: they must fall, as for whoever adds fresh noise on the way.
    """
    if sigmas.ndim != 1 or len(sigmas) == 0:
        raise ValueError(f"sigmas of shape {tuple(sigmas.shape)}: give those of the steps and the last, (steps + 1,)")
    good = torch.isfinite(sigmas) & (sigmas >= 0)
    if not good.all():
        i = int((~good).nonzero()[0])
        raise ValueError(f"sigmas[{i}] is {float(sigmas[i])}: give finite ones of 0 or more")
    down = sigmas.diff() < 0
    up = sigmas.diff() > 0
    good = down if falling or (len(down) and down[0]) else up
    if not good.all():
        i = int((~good).nonzero()[0])
        pair = f"sigmas[{i}] and [{i + 1}] are {float(sigmas[i])} and {float(sigmas[i + 1])}"
        must = "fall from step to step, or rise from step to step (backwards, from picture to noise)"
        if falling and up.all():
            must = "fall here, since fresh noise cannot be taken out: ddim, euler, ... rise (eta=0, s_churn=0)"
        raise ValueError(f"{pair}: sigmas must {must}")
    return sigmas
