"""DPM-Solver with steps of its own choice, beside k-diffusion's and on paper."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from samplers.reference import float64, gaussian, k_sampling, mixture
from samplers.test_analytic import MEAN, STD, assert_distributed, begin, flow, mixture_denoiser, normal
from samplers.test_dpmpp import Drawn
from samplers.test_parity import assert_equal, draw
from torch import Tensor

from ldm.samplers import Denoiser, Prediction, Schedule, dpm_adaptive

schedule = Schedule()
SIGMAS = schedule.sigmas(20, "karras")  # of which the first and the last above 0 count

OPTIONS = [
    {},
    {"rtol": 0.01, "atol": 0.001},
    {"order": 2},
    {"order": 2, "rtol": 0.01, "atol": 0.001},
    {"h_init": 3.0},
    {"rtol": 0.01, "atol": 1e-4, "pcoeff": 0.3, "icoeff": 0.5, "dcoeff": 0.1, "accept_safety": 0.95},
    {"eta": 1.0},
    {"eta": 0.5, "s_noise": 1.1, "order": 2, "rtol": 0.02},
]
THROW_AWAY = ({"h_init": 3.0}, OPTIONS[5])


def counted(function: Callable, calls: list[float]) -> Callable:
    def counting(x: Tensor, sigma: Tensor):
        calls.append(float(sigma.flatten()[0]))
        return function(x, sigma)

    return counting


@pytest.mark.parametrize("options", OPTIONS)
def test_k_diffusion(options):
    """The same steps are taken, the same thrown away; each of those costs k-diffusion the evaluation at sigma anew.

    On the closed form and not on the net, whose timesteps are float32: a step is chosen by the small difference of two
    solutions, in which they move the step by 7e-6. From the sigma at which k-diffusion ends, one step leads to x0.
    """
    first, *draws = draw(200)
    x = first * SIGMAS[0]
    their_calls, calls, tries, noise = [], [], [], Drawn(draws)
    with float64():
        k_sampling.sample_dpm_adaptive(
            counted(lambda x, sigma: mixture(x, sigma[0]), their_calls), x, float(SIGMAS[-2]), float(SIGMAS[0]),
            callback=tries.append, disable=True, noise_sampler=Drawn(draws), **options
        )  # fmt: skip
    before = [0, *(step["n_accept"] for step in tries)]
    taken = [step for step, count in zip(tries, before, strict=False) if step["n_accept"] > count]

    *steps, last = dpm_adaptive(counted(mixture_denoiser, calls), x, SIGMAS, noise, **options)
    assert_equal([step.x for step in steps], [step["x"] for step in taken])
    sigmas = [float(step.sigma_next) for step in steps]
    assert sigmas == pytest.approx([float(step["sigma"]) for step in taken], rel=1e-9)
    assert [float(step.sigma) for step in steps] == [float(SIGMAS[0]), *sigmas[:-1]]
    assert [step.i for step in [*steps, last]] == list(range(len(steps) + 1))
    rejected = tries[-1]["n_reject"]
    assert rejected > 0 or options not in THROW_AWAY
    assert len(calls) - 1 == len(their_calls) - rejected
    assert len(noise.asked) == (len(steps) - 1 if options.get("eta") else 0)

    assert (last.sigma, last.sigma_next) == (SIGMAS[-2], 0)
    assert torch.equal(last.x, last.x0)


@pytest.mark.parametrize(("order", "tolerances"), [(2, [1e-3, 1e-4, 1e-5]), (3, [1e-4, 1e-5, 1e-6, 1e-7])])
def test_tolerance_sets_the_steps(order, tolerances):
    """The error of the lower order is held at the tolerance; it is of order h^order, which says how many steps."""
    counts = []
    x = MEAN + normal(100) * SIGMAS[0]
    for tolerance in tolerances:
        steps = list(dpm_adaptive(gaussian(MEAN, STD), x, SIGMAS[:-1], None, order, rtol=tolerance, atol=tolerance))
        error = float((steps[-1].x - flow(x, SIGMAS[0], SIGMAS[-2])).abs().max())
        assert error < 12 * tolerance
        counts.append(len(steps))
    slope, _ = np.polyfit(np.log(tolerances), np.log(counts), 1)
    assert -slope == pytest.approx(1 / order, abs=0.03)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_distribution(eta):
    generator = torch.Generator().manual_seed(3)
    options = {"rtol": 1e-3, "atol": 1e-3, "eta": eta}
    *_, last = dpm_adaptive(
        gaussian(MEAN, STD),
        begin(SIGMAS[0]),
        SIGMAS[:-1],
        lambda *_: torch.randn(20_000, generator=generator, dtype=torch.float64),
        **options,
    )
    assert_distributed(last.x, MEAN, math.hypot(STD, schedule.sigma_min))


def test_only_the_ends_count():
    x = normal(100) * SIGMAS[0]
    ends = SIGMAS[[0, -2, -1]]
    for a, b in zip(*(dpm_adaptive(mixture_denoiser, x, sigmas, None) for sigmas in (SIGMAS, ends)), strict=True):
        assert torch.equal(a.x, b.x)


def test_one_step_to_0():
    x = normal(100) * SIGMAS[0]
    (step,) = dpm_adaptive(mixture_denoiser, x, SIGMAS[[0, -1]], None)
    assert step.sigma_next == 0 and torch.equal(step.x, mixture(x, SIGMAS[0]))


def test_there_and_back():
    """From data to noise, where sigma rises, and back again."""
    data, there, tight = MEAN + STD * normal(100), SIGMAS[:-1].flip(0), {"rtol": 1e-4, "atol": 1e-4}
    *_, up = dpm_adaptive(gaussian(MEAN, STD), data, there, None, **tight)
    torch.testing.assert_close(up.x, flow(data, there[0], there[-1]), rtol=0, atol=0.01)
    *_, down = dpm_adaptive(gaussian(MEAN, STD), up.x, SIGMAS[:-1], None, **tight)
    torch.testing.assert_close(down.x, data, rtol=0, atol=2e-3)


def test_goes_on_from_what_is_sent():
    steps = dpm_adaptive(mixture_denoiser, normal(100) * SIGMAS[0], SIGMAS, None)
    step = next(steps)
    sent = step.x + 1
    step = steps.send(sent)
    torch.testing.assert_close(step.x0 + step.sigma * step.eps, sent, rtol=1e-12, atol=1e-12)


def broken(x: Tensor, sigma: Tensor) -> Prediction:
    return Prediction(x * math.nan, x * math.nan)


@pytest.mark.parametrize(
    ("denoise", "sigmas", "options", "error", "message"),
    [
        (mixture_denoiser, SIGMAS, {"order": 4}, ValueError, "order=4: use 2 or 3"),
        (mixture_denoiser, SIGMAS[:-1].flip(0), {"eta": 1.0}, ValueError, "fresh noise cannot be taken out"),
        (broken, SIGMAS, {}, FloatingPointError, "NaN or infinity in step 0, at sigma=14.6146"),
    ],
)
def test_errors(denoise: Denoiser, sigmas: Tensor, options: dict, error: type, message: str):
    with pytest.raises(error, match=message):
        next(dpm_adaptive(denoise, normal(10), sigmas, None, **options))
