"""The table of all samplers, in Markdown:  python -m ldm.proof  (about a minute on one core)."""

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ldm.proof import (
    MIXTURE,
    Distribution,
    Mixture,
    distances,
    distribution,
    in_use,
    order,
    schedule,
    sliced_wasserstein,
    window,
)
from ldm.samplers import (
    SAMPLERS,
    Denoiser,
    Noise,
    Prediction,
    Sampler,
    Steps,
    dpm_adaptive,
    dpmpp_sde,
    lms,
    plms,
    unipc,
)

BUDGETS = (5, 10, 20, 50)


def tolerant(denoise: Denoiser, x: Tensor, sigmas: Tensor, noise: Noise) -> Steps:
    """dpm_adaptive, which chooses its steps: n are taken for a tolerance, as n^-3; the two in their usual ratio."""
    rtol = 20 / (len(sigmas) - 1) ** 3
    return dpm_adaptive(denoise, x, sigmas, noise, rtol=rtol, atol=0.156 * rtol)


def to_sigma_min(steps: int) -> Tensor:
    return in_use(steps + 1)[:-1]


def even(steps: int) -> Tensor:
    """In equal parts of sigma, between the same ends."""
    high, low = window(1).tolist()
    return torch.linspace(high, low, steps + 1, dtype=torch.float64)


def still(steps: int) -> Tensor:
    """With a last step of no length."""
    *most, last = window(steps)
    return torch.stack([*most, last * (1 + 1e-9), last])


def student(data: Mixture, reach: Callable[[Tensor], Tensor | float]) -> Denoiser:
    """What a distilled model has learnt, exactly: from sigma along the flow to reach(sigma), told as x0 and eps."""

    def denoise(x: Tensor, sigma: Tensor) -> Prediction:
        s = reach(sigma)
        length = float(torch.asinh(2 * sigma) - torch.asinh(2 * torch.as_tensor(s)))
        eps = (x - data.flow(x, sigma, s, steps=int(3 * length) + 1)) / (sigma - s)
        return Prediction(x - sigma * eps, eps)

    return denoise


def lcm_student(sigmas: Tensor, data: Mixture = MIXTURE) -> Denoiser:
    """A consistency function (Song et al. 2023): it leads to sigma 0."""
    return student(data, lambda sigma: 0.0)


def tcd_student(sigmas: Tensor, data: Mixture = MIXTURE) -> Denoiser:
    """A trajectory consistency function (Zheng et al. 2024): it leads to the sigma of s = 0.7 t_next, rounded down."""
    s = schedule.sigma((0.7 * schedule.t(sigmas[1:]) + 1e-3).floor())
    reached = dict(zip(sigmas[:-1].tolist(), torch.minimum(s, sigmas[1:]), strict=True))
    return student(data, lambda sigma: reached[float(sigma)])


class Row(NamedTuple):
    """published: the order, None where none is. again: the experiment whose result stands in `why`."""

    published: int | None
    why: str = ""
    again: Callable[[], float] | None = None
    sampler: Sampler | None = None
    options: dict[str, Any] | None = None  # of `distribution`


ANCESTRAL = "of the step to sigma_down; the noise after it adds no error to the distribution"

ROWS = {
    "ddim": Row(1),
    "ddpm": Row(1),
    "euler": Row(1),
    "euler_ancestral": Row(1),
    "euler_cfg_pp": Row(1, "without guidance it is euler"),
    "heun": Row(2),
    "dpm_2": Row(2),
    "dpm_2_ancestral": Row(2, ANCESTRAL),
    "lms": Row(
        4,
        "the first step is Euler's, and its error of order 2 remains; after three exact first steps it is {:.2f}",
        lambda: order(lms, exact=3).slope,
    ),
    "plms": Row(
        4,
        "its weights are those of steps of equal length in sigma; on such steps it is {:.2f}",
        lambda: order(plms, even).slope,
    ),
    "dpmpp_2s_ancestral": Row(2, ANCESTRAL),
    "dpmpp_sde": Row(
        None,
        "k-diffusion's own, with no order published; it needs the noise of both evaluations along one path:"
        " with independent draws it is {:.2f}",
        lambda: order(dpmpp_sde, brownian=False).slope,
    ),
    "dpmpp_2m": Row(2),
    "dpmpp_2m_sde": Row(2),
    "dpmpp_2m_sde_heun": Row(2),
    "dpmpp_3m_sde": Row(
        3,
        "it counts half of D2, as in both references; with all of it and two exact first steps it is 3 for eta 0, but"
        " for eta 1 still 2: 3 again once the noise is left out",
    ),
    "dpm_adaptive": Row(
        3, "against evaluations, as the tolerance falls", sampler=tolerant, options={"sigmas": lambda n: in_use(n + 1)}
    ),
    "unipc": Row(
        3,
        "the last step is not corrected, and its error of order 2 remains; with a further step of no length, which"
        " corrects it, it is {:.2f}",
        lambda: order(unipc, still).slope,
    ),
    "deis": Row(2),
    "lcm": Row(
        None,
        "solves no equation: it wants a consistency function; given the exact one, the error of mean and covariance on"
        " the Gaussian is below 1e-9 in any number of steps",
        options={"denoiser": lcm_student},
    ),
    "tcd": Row(
        None,
        "solves no equation: it wants a trajectory consistency function; given the exact one, that error is below"
        " 1e-9 (given a denoiser, gamma 0 is ddim)",
        options={"denoiser": tcd_student},
    ),
    "restart": Row(2, "below 20 steps it is heun; from 36 on half of the steps are restarts"),
}


def cells(name: str) -> list[str]:
    """One row: the order, published, measured and on the sigmas in use, the evaluations used, the errors, why."""
    row = ROWS[name]
    sampler = row.sampler or SAMPLERS[name]
    why = row.why.format(row.again()) if row.again else row.why
    slopes = ["", ""]
    if name not in ("lcm", "tcd"):
        found = order(sampler)
        slopes = [f"{found.slope:.2f}{' weak' * found.weak}", f"{order(sampler, to_sigma_min).slope:.2f}"]
    ends = [end(name, budget) for budget in BUDGETS]
    used = " ".join(str(e.evaluations) if e else "-" for e in ends)
    errors = [" ".join(f"{e[i]:.3f}" if e else "-" for e in ends) for i in (2, 3, 4)]  # mean, covariance, sliced
    return [name, str(row.published or "none"), *slopes, used, *errors, why]


@cache
def end(name: str, evaluations: int) -> Distribution | None:
    row = ROWS[name]
    return distribution(row.sampler or SAMPLERS[name], evaluations, **(row.options or {}))


def floor() -> list[str]:
    """The row of what no sampler can go below: 20,000 other points of the data."""
    data = MIXTURE.sample(20_000, seed=7)
    errors = *distances(data.mean(0), data.T.cov(), MIXTURE), sliced_wasserstein(data)
    return ["the data", *[""] * 4, *(f"{error:.3f}" for error in errors), "20,000 points of it"]


def table() -> Iterator[str]:
    heads = ["sampler", "order", "measured", "in use", "evaluations", "mean", "covariance", "sliced W2", "why"]
    yield line(heads)
    yield line(["---"] * len(heads))
    for name in SAMPLERS:
        yield line(cells(name))
    yield line(floor())


def line(texts: list[str]) -> str:
    return f"| {' | '.join(texts)} |"


if __name__ == "__main__":
    for text in table():
        print(text, flush=True)
