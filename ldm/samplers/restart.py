"""Restart sampling (Xu et al. 2023): go back up with fresh noise, come down again by the ODE, so that the noise
contracts the errors made so far."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from ldm.samplers.denoiser import Denoiser
from ldm.samplers.euler import noised
from ldm.samplers.heun import heun_step
from ldm.samplers.schedule import karras
from ldm.samplers.step import Noise, Step, Steps, after, checked

Segment = tuple[int, int, float, float]  # N_restart, K, t_min, t_max


def restart(
    denoise: Denoiser,
    x: Tensor,
    sigmas: Tensor,
    noise: Noise,
    segments: Sequence[Segment] | None = None,
    s_noise: float = 1.0,
) -> Steps:
    """Algorithm 1 with Heun's steps, as in webui: two evaluations a step and one for the step to 0.

    Steps show the prediction of the first, and the noise that x was given before it.
    segments: (N_restart, K, t_min, t_max) as in the paper's tables, K times N_restart steps from t_max to t_min on top
    of those of `sigmas`; both ends are taken to the nearest of `sigmas`. None is webui's choice, which keeps to the
    number of steps: from 20 on, (9, 1, 0.1, 2), from 36 on (steps // 4, 2, 0.1, 2), and karras spacing for the rest.
    Raises ValueError for a segment of no steps or that does not go up.
    """
    sigmas = checked(sigmas, falling=True)
    if segments is None:
        sigmas, segments = within(sigmas)
    for n, k, t_min, t_max in segments:
        if n < 1 or k < 0 or not t_min < t_max:
            raise ValueError(
                f"segment {(n, k, t_min, t_max)}: give (N_restart, K, t_min, t_max), N_restart 1 or more steps,"
                " K 0 or more times, and t_min below t_max"
            )
    sigma_now = sigmas[0]
    for i, (sigma, sigma_next) in enumerate(restarted(sigmas, segments)):
        x, fresh = noised(x, s_noise * (sigma**2 - sigma_now**2) ** 0.5, noise, sigma_now, sigma)
        x, prediction = heun_step(denoise, x, sigma, sigma_next)
        step = Step(i, sigma, sigma_next, x, *prediction, noise=fresh)
        x = after(step, (yield step)).x
        sigma_now = sigma_next


def within(sigmas: Tensor) -> tuple[Tensor, list[Segment]]:
    """webui's segment for as many steps, and fewer sigmas of the same ends: together they are as many as before."""
    steps = len(sigmas) - 1
    if steps < 20:
        return sigmas, []
    n, k = (9, 1) if steps < 36 else (steps // 4, 2)
    return torch.cat([joined(steps - k * n, sigmas[0], sigmas[-2]), sigmas[-1:]]), [(n, k, 0.1, 2.0)]


def restarted(sigmas: Tensor, segments: Sequence[Segment]) -> list[tuple[Tensor, Tensor]]:
    """(sigma, sigma_next) of each step, restarts where they belong."""
    pairs: list[tuple[Tensor, Tensor]] = []
    for i, pair in enumerate(pairwise(sigmas), 1):
        pairs.append(pair)
        for n, k, t_min, t_max in segments:
            low, high = nearest(sigmas, t_min), nearest(sigmas, t_max)
            if high < low == i:
                pairs += k * list(pairwise(joined(n + 1, sigmas[high], sigmas[low])))
    return pairs


def joined(count: int, high: Tensor, low: Tensor) -> Tensor:
    """`count` sigmas, 2 or more, in karras spacing; the ends to the last bit, to join the others."""
    sigmas = karras(count, float(low), float(high)).to(high)
    sigmas[0], sigmas[-1] = high, low
    return sigmas


def nearest(sigmas: Tensor, t: float) -> int:
    return int((sigmas - t).abs().argmin())
