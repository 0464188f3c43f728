"""Noise along one Brownian path per seed."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from samplers.reference import gaussian, k_sampling
from torch import Tensor

from ldm.noise import SeededNoise
from ldm.samplers import Noise, dpmpp_2m_sde
from ldm.samplers.brownian import Brownian

LOW, HIGH = 0.03, 14.6
COUNT = 20_000
MIDDLE = (LOW + HIGH) / 2


def brownian(*seeds: int) -> Brownian:
    return Brownian(seeds, (COUNT,), HIGH, LOW)


def increment(noise: Brownian, a: float, b: float) -> Tensor:
    """W(a) - W(b)"""
    return noise(a, b).double() * math.sqrt(abs(a - b))


def correlation(a: Tensor, b: Tensor) -> float:
    return float((a * b).mean() / (a.square().mean() * b.square().mean()).sqrt())


# The whole, both ends, over the middle, at odd places, at a dyadic one, and the least step of a thousand.
PARTS = [(HIGH, LOW), (HIGH, 14.5), (0.031, LOW), (7.4, 7.2), (9.87, 1.23), (MIDDLE, 3.0), (0.0301, 0.03)]


@pytest.mark.parametrize(("a", "b"), PARTS)
def test_standard_normal(a, b):
    """Mean, variance and fourth moment, within 4 standard errors."""
    z = brownian(0)(a, b)
    assert z.dtype == torch.float32 and z.shape == (1, COUNT)
    assert abs(float(z.mean())) < 4 / math.sqrt(COUNT)
    assert abs(float((z**2).mean()) - 1) < 4 * math.sqrt(2 / COUNT)
    assert abs(float((z**4).mean()) - 3) < 4 * math.sqrt(96 / COUNT)


def test_increments_are_independent():
    """Of each other where they do not overlap; else they share what they overlap in."""
    noise = brownian(0)
    ends = np.geomspace(HIGH, LOW, 9)
    parts = [noise(a, b) for a, b in pairwise(ends)]
    for i, a in enumerate(parts):
        for b in parts[:i]:
            assert abs(correlation(a, b)) < 4 / math.sqrt(COUNT)
    assert abs(correlation(noise(9, 4), noise(6, 1)) - 2 / 5) < 4 / math.sqrt(COUNT)


@pytest.mark.parametrize(("a", "b", "c"), [(HIGH, 3.3, LOW), (2.0, 1.999, 1.0), (8, MIDDLE, 5), (0.05, 0.04, 0.03)])
def test_additive(a, b, c):
    noise = brownian(0)
    total = increment(noise, a, b) + increment(noise, b, c)
    torch.testing.assert_close(total, increment(noise, a, c), rtol=0, atol=1e-6 * math.sqrt(a - c))


def test_the_same_path_at_any_refinement():
    """Whatever was asked before, and in whatever order."""
    coarse, fine, backwards = brownian(0), brownian(0), brownian(0)
    ends = np.linspace(HIGH, LOW, 65)
    parts = [increment(fine, a, b) for a, b in pairwise(ends)]
    for i, (a, b) in enumerate(pairwise(ends[::8])):
        torch.testing.assert_close(sum(parts[8 * i : 8 * i + 8]), increment(coarse, a, b), rtol=0, atol=1e-6)
    for i in range(63, 0, -9):
        assert torch.equal(increment(backwards, ends[i], ends[i + 1]), parts[i])
    assert torch.equal(fine(3, 5), -fine(5, 3))


def test_continuous():
    """No jump where the tree of middles branches, at the middle of the whole or at that of a half."""
    noise = brownian(0)
    for middle in (MIDDLE, (LOW + MIDDLE) / 2, (LOW + HIGH) / 3):
        step = 1e-6
        assert noise(middle + step / 2, middle - step / 2).square().mean() < 1.1


def test_a_path_of_its_own_for_each_seed():
    batch = Brownian([7, 8, 2**63 - 1, 2**64 - 1], (COUNT,), HIGH, LOW)
    z = batch(5, 2)
    for i, seed in enumerate(batch.seeds):
        assert torch.equal(z[i : i + 1], brownian(seed)(5, 2))
        for other in z[:i]:
            assert abs(correlation(z[i], other)) < 4 / math.sqrt(COUNT)
    assert not torch.equal(brownian(0)(5, 2), brownian(2**32)(5, 2))


def test_by_hand():
    """The whole, and the two halves: the draws of nodes 0 and 1, by another way to the same streams."""
    whole, half = (
        np.random.Generator(np.random.Philox(key=3 + (node << 64))).standard_normal((4, 2, 2), np.float32)
        for node in (0, 1)
    )
    noise = Brownian([3], (4, 2, 2), torch.tensor(4.0), torch.tensor(0.0))
    torch.testing.assert_close(noise(torch.tensor(4.0), torch.tensor(0.0))[0], torch.from_numpy(whole))
    # W(4) = 2 whole; W(2) is the half of it and a bridge of variance 4 / 4
    torch.testing.assert_close(noise(2, 0)[0], torch.from_numpy((whole + half) / 2**0.5))
    torch.testing.assert_close(noise(4, 2)[0], torch.from_numpy((whole - half) / 2**0.5))


def test_global_generators_are_left_alone():
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    brownian(0)(5, 2)
    assert torch.equal(torch.get_rng_state(), before[0]) and np.random.get_state()[1].tolist() == before[1]


@pytest.mark.parametrize(("a", "b"), [(HIGH + 0.1, 1), (1, 0), (2, 2), (math.nan, 1)])
def test_bad_sigmas(a, b):
    with pytest.raises(ValueError, match=r"between 0\.03 and 14\.6"):
        brownian(0)(a, b)


def test_the_same_law_as_k_diffusion():
    """Of their tree and ours: the covariance of two increments that overlap."""
    theirs = k_sampling.BrownianTreeNoiseSampler(torch.zeros(1, COUNT), LOW, HIGH, seed=[0])
    sigmas = [torch.tensor(s) for s in (9.0, 4.0, 6.0, 1.0)]
    a, b = (correlation(n(*sigmas[:2]), n(*sigmas[2:])) for n in (brownian(0), theirs))
    assert abs(a - b) < 4 * math.sqrt(2 / COUNT)


def test_results_do_not_depend_on_the_step_count():
    """Along one path more steps come nearer to one picture, by order 1; fresh draws lead to another each time."""
    count = 5000
    x = HIGH * torch.randn(1, count, generator=torch.Generator().manual_seed(1))

    def last(steps: int, noise: Noise) -> Tensor:
        sigmas = torch.from_numpy(np.geomspace(HIGH, LOW, steps + 1)).clamp(LOW, HIGH)
        *_, step = dpmpp_2m_sde(gaussian(0.7, 0.8), x, sigmas, noise)
        return step.x

    def apart(a: Tensor, b: Tensor) -> float:
        return float((a - b).square().mean().sqrt())

    fresh = [last(steps, SeededNoise([seed], (count,))) for seed, steps in enumerate((20, 80))]
    path = [last(steps, Brownian([0], (count,), HIGH, LOW)) for steps in (20, 80, 320)]
    assert apart(*fresh) > 1
    assert apart(*path[:2]) < 0.1
    assert apart(*path[1:]) < apart(*path[:2]) / 3
