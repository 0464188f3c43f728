from fractions import Fraction

import pytest
import torch

from ldm.img2img import keep_outside, steps_at
from ldm.samplers import Prediction, Schedule, ddim, euler

schedule = Schedule()


def test_steps_at_every_strength():
    for steps in range(1, 201):
        for percent in range(101):
            exact = steps * Fraction(percent, 100)
            expected = max(1, exact.numerator // exact.denominator) if percent else 0
            assert steps_at(percent / 100, steps) == expected, (percent, steps)


@pytest.mark.parametrize("steps", [1, 20, 1000])
def test_steps_at_the_ends(steps):
    assert steps_at(0, steps) == steps_at(0.0, steps) == 0
    assert steps_at(1e-9, steps) == 1
    assert steps_at(1, steps) == steps_at(1.0, steps) == steps


def test_difference_diffusers_count():
    """min(int(steps * strength), steps) slips below whole numbers, and leaves nothing to run where it is below 1."""
    others = {
        (percent, steps)
        for steps in range(1, 201)
        for percent in range(1, 101)
        if steps_at(percent / 100, steps) != min(int(steps * (percent / 100)), steps)
    }
    assert (29, 100) in others and steps_at(0.29, 100) == 29
    for percent, steps in others:
        assert percent * steps < 100 or percent * steps % 100 == 0


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5))


LATENTS, NOISE = normal(2, 2, 4, 8, 6)
MASK = torch.zeros(1, 1, 8, 6)
MASK[..., 2:5, 1:4] = 1
OUTSIDE = (1 - MASK).bool().expand_as(LATENTS)


def dream(x: torch.Tensor, sigma: torch.Tensor) -> Prediction:
    """Wants something else than the latents everywhere."""
    x0 = torch.cos(3 * x / (1 + sigma**2) ** 0.5)
    return Prediction(x0, (x - x0) / sigma, eps_cond=x, eps_uncond=-x)


@pytest.mark.parametrize("sampler", [ddim, euler])
def test_outside_stays_on_its_path(sampler):
    """latents + sigma * noise at every sigma, and the latents in the end; inside, what the denoiser makes of it."""
    sigmas = schedule.sigmas(20)
    x = LATENTS + sigmas[0] * NOISE
    steps = list(sampler(keep_outside(dream, LATENTS, MASK), x, sigmas, None))
    for step, free in zip(steps, sampler(dream, x, sigmas, None), strict=True):
        path = LATENTS + step.sigma_next * NOISE
        largest = path.abs().max()
        assert (step.x - path)[OUTSIDE].abs().max() <= 1e-6 * max(largest, sigmas[0])
        assert torch.equal(step.x0[OUTSIDE], LATENTS[OUTSIDE])
        torch.testing.assert_close(step.x[~OUTSIDE], free.x[~OUTSIDE], rtol=0, atol=1e-5)
    if sampler is ddim:
        assert torch.equal(steps[-1].x[OUTSIDE], LATENTS[OUTSIDE])
    assert not torch.allclose(steps[-1].x[~OUTSIDE], LATENTS[~OUTSIDE], atol=0.1)


def test_outside_with_fresh_noise():
    sigmas = schedule.sigmas(20, "leading")
    steps = list(ddim(keep_outside(dream, LATENTS, MASK), LATENTS + sigmas[0] * NOISE, sigmas, lambda: NOISE, eta=1.0))
    assert torch.equal(steps[-1].x[OUTSIDE], LATENTS[OUTSIDE])


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_mask_blends(share):
    sigma = torch.tensor(2.0)
    free = dream(NOISE, sigma)
    kept = keep_outside(dream, LATENTS, torch.full((1, 1, 8, 6), share))(NOISE, sigma)
    torch.testing.assert_close(kept.x0, share * free.x0 + (1 - share) * LATENTS)
    torch.testing.assert_close(kept.x0 + sigma * kept.eps, NOISE)
    assert torch.equal(kept.eps_cond, free.eps_cond) and torch.equal(kept.eps_uncond, free.eps_uncond)
