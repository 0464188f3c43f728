"""Noise along one Brownian path per picture: W(sigma), of which each step takes the increment that falls to it."""

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

# Halvings: below 2^-32 of the whole the path is a straight line. From sigma 0.03 to 14.6 that changes the variance of
# an increment over 1e-4, a short step of a thousand, by 4e-5 of it at most.
DEPTH = 32


class Brownian:
    """Standard normal noise (B,*shape) float32: (W(sigma) - W(sigma_next)) / sqrt(|sigma - sigma_next|).

    W is one fixed path per seed over sigma_min..sigma_max, so that more steps take the same noise in smaller parts, and
    a picture depends on its own seed and not on its batch. The path is Lévy's: at the middle of an interval it is the
    mean of the two ends and normal noise of variance width / 4. Each middle has a draw of its own, made anew from the
    seed and the number of the middle, so what was asked before is of no account. Of the same law as k-diffusion's
    BrownianTreeNoiseSampler, not of its draws.
    """

    def __init__(
        self,
        seeds: Sequence[int],
        shape: tuple[int, ...],
        sigma_max: float | Tensor,
        sigma_min: float | Tensor,
        device: torch.device | str = "cpu",
    ):
        self.seeds = seeds
        self.shape = shape
        self.sigma_max, self.sigma_min = float(sigma_max), float(sigma_min)
        self.device = device
        self.w = lru_cache(maxsize=4)(self._w)  # a step starts where the last one ended

    def __call__(self, sigma: float | Tensor, sigma_next: float | Tensor) -> Tensor:
        """Raises ValueError for a sigma outside of sigma_min..sigma_max, and where the two are the same."""
        a, b = float(sigma), float(sigma_next)
        if a == b or not all(self.sigma_min <= s <= self.sigma_max for s in (a, b)):
            raise ValueError(
                f"noise from sigma={a} to {b}: give two different ones between {self.sigma_min} and {self.sigma_max}"
            )
        increment = (self.w(a) - self.w(b)) / math.sqrt(abs(a - b))
        return torch.from_numpy(increment).to(self.device, torch.float32)

    def _w(self, sigma: float) -> np.ndarray:
        """W(sigma), (B,*shape) float64, 0 at sigma_min: found by halving the interval around sigma."""
        width = self.sigma_max - self.sigma_min
        place = (sigma - self.sigma_min) / width  # in the interval, from 0 to 1
        left, right = np.zeros(self.shape), math.sqrt(width) * self._normal(0)
        node = 1
        for _ in range(DEPTH):
            middle = (left + right) / 2 + math.sqrt(width) / 2 * self._normal(node)
            upper = place >= 0.5
            left, right = (middle, right) if upper else (left, middle)
            place, node, width = 2 * place - upper, 2 * node + upper, width / 2
        return left + place * (right - left)

    def _normal(self, node: int) -> np.ndarray:
        """(B,*shape) float32: of Philox (Salmon et al. 2011), which has a stream for each pair of seed and node."""
        keys = [np.array([seed, node], np.uint64) for seed in self.seeds]
        streams = [np.random.Generator(np.random.Philox(key=key)) for key in keys]
        return np.stack([stream.standard_normal(self.shape, np.float32) for stream in streams])
