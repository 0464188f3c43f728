"""Samplers on data of which the answer is known: their order of convergence, and what distribution they end in.

    python -m ldm.proof                 # the table of all samplers, in Markdown
    order(my_sampler).slope             # of yours, a generator function as in ldm.samplers: 1 for Euler, 2 for Heun
    distribution(my_sampler, 20)        # how far from the data it ends after at most 20 evaluations

For a mixture of Gaussians the denoiser E[x0 | x] has a closed form, for one Gaussian the flow has one too. Everything
is float64, x is (B,d) and x = x0 + sigma eps; evaluations are counted where the denoiser is called.
"""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ldm.samplers import Brownian, Denoiser, Noise, Prediction, Sampler, Schedule, is_brownian
from ldm.samplers.schedule import exponential

schedule = Schedule()


class Mixture:
    """Data from Gaussians: weights (k,), means (k,d), covariances (k,d,d)."""

    def __init__(self, weights: Sequence[float], means: Sequence, covariances: Sequence):
        self.weights, self.means, self.covariances = (
            torch.tensor(a, dtype=torch.float64) for a in (weights, means, covariances)
        )
        self.variances, self.axes = torch.linalg.eigh(self.covariances)  # (k,d), (k,d,d): an axis is a column
        self.rotation = self.axes.transpose(0, 1).flatten(1)  # (d,k*d), onto the axes of all
        self.centres = torch.einsum("kd,kde->ke", self.means, self.axes)  # (k,d), the means there
        self.mean = self.weights @ self.means
        apart = self.means - self.mean
        self.covariance = torch.einsum("k,kde->de", self.weights, self.covariances + apart[:, :, None] * apart[:, None])

    def denoise(self, x: Tensor, sigma: Tensor | float) -> Prediction:
        """eps = -sigma grad log p(x), p the data with noise of sigma; x0 = E[x0 | x] = x - sigma eps."""
        y = (x @ self.rotation).unflatten(1, self.means.shape) - self.centres  # (B,k,d)
        variances = self.variances + sigma**2
        z = y / variances
        share = (self.weights.log() - variances.log().sum(-1) / 2 - (y * z).sum(-1) / 2).softmax(-1)  # (B,k)
        eps = sigma * (share[..., None] * z).flatten(1) @ self.rotation.T  # (B,d)
        return Prediction(x - sigma * eps, eps)

    def sample(self, count: int, sigma: Tensor | float = 0.0, seed: int = 0) -> Tensor:
        """(count,d) of the data with noise of sigma."""
        random = torch.Generator().manual_seed(seed)
        k = torch.multinomial(self.weights, count, replacement=True, generator=random)
        z = torch.randn(count, len(self.mean), generator=random, dtype=torch.float64)
        z *= (self.variances[k] + sigma**2).sqrt()
        return self.means[k] + torch.einsum("bde,be->bd", self.axes[k], z)

    def noised(self, sigma: Tensor | float) -> Tensor:
        """(d,d), the covariance with noise of sigma."""
        return self.covariance + sigma**2 * torch.eye(len(self.mean), dtype=torch.float64)

    def flow(self, x: Tensor, sigma: Tensor | float, sigma_end: Tensor | float, steps: int = 10_000) -> Tensor:
        """x at sigma_end of the probability flow dx/dsigma = eps that is x at sigma.

        Along the axes of a single Gaussian it grows as the standard deviation. For a mixture: `runge_kutta`.
        """
        if len(self.weights) > 1:
            return runge_kutta(self.denoise, x, float(sigma), float(sigma_end), steps)
        growth = ((self.variances[0] + sigma_end**2) / (self.variances[0] + sigma**2)).sqrt()
        return self.mean + (x - self.mean) @ self.axes[0] * growth @ self.axes[0].T


def runge_kutta(
    denoise: Callable[[Tensor, float], Prediction], x: Tensor, sigma: float, sigma_end: float, steps: int
) -> Tensor:
    """dx/dsigma = eps by the classical method of order 4, in equal parts of arsinh 2 sigma: these are even in log sigma
    above 1/2 and in sigma below."""
    places = np.linspace(math.asinh(2 * sigma), math.asinh(2 * sigma_end), steps + 1).tolist()

    def slope(x: Tensor, place: float) -> Tensor:
        return denoise(x, math.sinh(place) / 2).eps * math.cosh(place) / 2

    for a, b in pairwise(places):
        h, middle = b - a, (a + b) / 2
        k_1 = slope(x, a)
        k_2 = slope(x + h / 2 * k_1, middle)
        k_3 = slope(x + h / 2 * k_2, middle)
        k_4 = slope(x + h * k_3, b)
        x = x + h / 6 * (k_1 + 2 * k_2 + 2 * k_3 + k_4)
    return x


def turned(angle: float, major: float, minor: float) -> list[list[float]]:
    """The covariance with these standard deviations, the major one at that angle."""
    c, s = math.cos(angle), math.sin(angle)
    axes = np.array([[c, -s], [s, c]])
    return (axes * [major**2, minor**2] @ axes.T).tolist()


GAUSSIAN = Mixture([1.0], [[0.7, -0.4]], [turned(0.5, 1.0, 0.4)])
MIXTURE = Mixture(
    [0.3, 0.5, 0.2],
    [[-1.2, 0.4], [1.0, 0.9], [0.3, -1.3]],
    [turned(0.3, 0.5, 0.25), turned(1.2, 0.35, 0.35), turned(2.4, 0.7, 0.3)],
)


def window(steps: int) -> Tensor:
    """(steps + 1,) from 3 to 0.3, where the data takes shape, in equal parts of log sigma: an order soon shows there.

    They end above 0: the step to 0 never gets smaller.
    """
    return exponential(steps + 1, 0.3, 3.0)


def in_use(steps: int) -> Tensor:
    """(steps + 1,) from Stable Diffusion's 14.6 to 0.029 in karras spacing, then 0."""
    return schedule.sigmas(steps, "karras")


def run(
    sampler: Sampler, denoise: Denoiser, x: Tensor, sigmas: Tensor, noise: Noise, sent: Sequence[Tensor] = ()
) -> tuple[Tensor, int]:
    """The final x, and how often the denoiser was called. The first steps are sent what is in `sent`."""
    evaluations = 0

    def counted(x: Tensor, sigma: Tensor) -> Prediction:
        nonlocal evaluations
        evaluations += 1
        return denoise(x, sigma)

    steps = sampler(counted, x, sigmas, noise)
    waiting, answer = list(sent), None
    try:
        while True:
            x = steps.send(answer).x
            answer = waiting.pop(0) if waiting else None
    except StopIteration:
        return x, evaluations


class Order(NamedTuple):
    """slope: of -log error against log evaluations. weak: the error is that of the mean and covariance."""

    slope: float
    evaluations: list[int]
    errors: list[float]
    weak: bool


def order(
    sampler: Sampler,
    sigmas: Callable[[int], Tensor] = window,
    counts: Sequence[int] = (40, 80, 160, 320),
    exact: int = 0,
    brownian: bool | None = None,
) -> Order:
    """The order of convergence over these counts of steps, sigmas(count) being those of each.

    A sampler that draws no noise: the largest error of x at the end, on MIXTURE, from 64 points of data with noise,
    against 10,000 steps of the classical Runge-Kutta method. `exact`: as many first steps are sent the true x, by which
    the start of a multistep method is told from what follows.
    One that does: its weak order, the error of the mean and covariance on GAUSSIAN (`moments`), no random numbers used.
    brownian: its noise is taken along one Brownian path; by default for those of ldm's that are so run.
    """
    weak = bool(draws(sampler, sigmas(counts[-1])))
    brownian = is_brownian(sampler) if brownian is None else brownian
    used, errors = [], []
    for count in counts:
        s = sigmas(count)
        if weak:
            mean, covariance, evaluations = moments(sampler, s, brownian)
            errors.append(max(distances(mean, covariance, GAUSSIAN, float(s[-1]))))
        else:
            x = MIXTURE.sample(64, s[0], seed=1)
            true = [MIXTURE.flow(x, s[0], sigma, steps=100) for sigma in s[1 : exact + 1]]
            got, evaluations = run(sampler, MIXTURE.denoise, x, s, fresh(x.shape), true)
            errors.append(float((got - solution(float(s[0]), float(s[-1]))).abs().max()))
        used.append(evaluations)
    slope = -float(np.polyfit(np.log(used), np.log(errors), 1)[0])
    return Order(slope, used, errors, weak)


def draws(sampler: Sampler, sigmas: Tensor) -> list[tuple[float, float]]:
    """(low, high): between which sigmas each draw of noise is."""
    spans: list[tuple[float, float]] = []

    def noise(a: Tensor, b: Tensor) -> Tensor:
        spans.append((min(float(a), float(b)), max(float(a), float(b))))
        return nothing

    nothing = torch.zeros(1, len(GAUSSIAN.mean), dtype=torch.float64)
    run(sampler, GAUSSIAN.denoise, nothing, sigmas, noise)
    return spans


@lru_cache
def solution(sigma: float, sigma_end: float) -> Tensor:
    return MIXTURE.flow(MIXTURE.sample(64, sigma, seed=1), sigma, sigma_end)


def moments(
    sampler: Sampler, sigmas: Tensor, brownian: bool = False, denoise: Denoiser = GAUSSIAN.denoise
) -> tuple[Tensor, Tensor, int]:
    """Mean (d,) and covariance (d,d) of the final x on GAUSSIAN data with noise of sigmas[0], exactly; evaluations.

    There x is affine in the x at the start and in every draw of noise, so one run with unit vectors in their places
    gives all coefficients. Draws are independent, or those along one Brownian path: normalized increments, correlated
    as the overlap of their intervals. Raises ValueError for a sampler that is not affine.
    """
    d, spans = len(GAUSSIAN.mean), draws(sampler, sigmas)
    units = torch.eye((len(spans) + 1) * d, dtype=torch.float64)
    random = torch.randn(1, len(units), generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    given = torch.cat([torch.zeros_like(units[:1]), random, units]).unflatten(1, (-1, d))  # (rows,1+draws,d)
    each = iter(given.unbind(1))
    x, evaluations = run(sampler, denoise, next(each), sigmas, lambda *_: next(each))
    still, check, coefficients = x[0], x[1], x[2:] - x[0]
    if not torch.allclose(check, still + random[0] @ coefficients, rtol=1e-9, atol=1e-9):
        raise ValueError("this sampler is not affine in x and in its noise on Gaussian data: use `distribution`")
    start = GAUSSIAN.noised(sigmas[0])
    first, later = coefficients[:d], coefficients[d:].unflatten(0, (-1, d))  # (d,d), (draws,d,d): from, to
    low, high = torch.tensor(spans, dtype=torch.float64).reshape(-1, 2).T
    overlap = (torch.minimum(high[:, None], high) - torch.maximum(low[:, None], low)).clamp(min=0)
    together = (
        overlap / ((high - low)[:, None] * (high - low)).sqrt()
        if brownian
        else torch.eye(len(spans), dtype=torch.float64)
    )
    covariance = first.T @ start @ first + torch.einsum("ij,ikm,jkn->mn", together, later, later)
    return still + GAUSSIAN.mean @ first, covariance, evaluations


def distances(mean: Tensor, covariance: Tensor, data: Mixture, sigma: float = 0.0) -> tuple[float, float]:
    """Error of the mean, in standard deviations of the data with noise of sigma, and of the covariance, relative
    Frobenius norm."""
    true = data.noised(sigma)
    return float((mean - data.mean).norm() / true.trace().sqrt()), float((covariance - true).norm() / true.norm())


class Distribution(NamedTuple):
    """Errors as in `distances`, and the sliced Wasserstein distance, of as many points as were asked for."""

    steps: int
    evaluations: int
    mean: float
    covariance: float
    sliced: float


def distribution(
    sampler: Sampler,
    evaluations: int,
    sigmas: Callable[[int], Tensor] = in_use,
    denoiser: Callable[[Tensor], Denoiser] = lambda sigmas: MIXTURE.denoise,
    points: int = 20_000,
    brownian: bool | None = None,
) -> Distribution | None:
    """How far from MIXTURE it ends, in the largest number of steps that needs no more evaluations; None if none does.

    It starts from data with noise of sigmas[0] that is exact, so that the errors are the sampler's. `denoiser` makes
    the denoiser from the sigmas, `brownian` is that of `order`.
    """
    brownian = is_brownian(sampler) if brownian is None else brownian
    for steps in range(evaluations, 0, -1):
        s = sigmas(steps)
        for count in (200, points):  # a few first, to see how many evaluations it needs
            x = MIXTURE.sample(count, s[0], seed=3)
            noise = path(x.shape, s) if brownian and count == points else fresh(x.shape)
            x, used = run(sampler, denoiser(s), x, s, noise)
            if used > evaluations:
                break
        else:
            return Distribution(steps, used, *distances(x.mean(0), x.T.cov(), MIXTURE), sliced_wasserstein(x))
    return None


def fresh(shape: Sequence[int]) -> Noise:
    random = torch.Generator().manual_seed(4)
    return lambda *_: torch.randn(shape, generator=random, dtype=torch.float64)


def path(shape: Sequence[int], sigmas: Tensor) -> Noise:
    brownian = Brownian([4], tuple(shape), sigmas[0], sigmas[-1])
    return lambda a, b: brownian(a, b)[0].double()


def sliced_wasserstein(x: Tensor, seed: int = 5) -> float:
    """The root mean square, over 128 directions, of the W2 distance to as many points of MIXTURE, both projected."""
    return float((projected(x) - truth(len(x), seed)).square().mean().sqrt())


def projected(x: Tensor) -> Tensor:
    """(128,B), sorted."""
    directions = torch.randn(128, x.shape[1], generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    return (directions / directions.norm(dim=1, keepdim=True) @ x.T).sort().values


@lru_cache
def truth(points: int, seed: int) -> Tensor:
    return projected(MIXTURE.sample(points, seed=seed))
