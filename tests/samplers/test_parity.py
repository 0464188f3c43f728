"""Our samplers beside diffusers' and k-diffusion's, step by step, from the same noise and with the same net."""

from collections.abc import Callable
from fractions import Fraction

import pytest
import torch
from diffusers import DDIMScheduler
from samplers.reference import (
    COUNTS,
    EULER_SPACINGS,
    TABLE,
    MixtureNet,
    diffusers_ddim,
    diffusers_euler,
    float64,
    k_model,
    k_sampling,
)
from torch import Tensor

from ldm.samplers import Sampler, Schedule, ddim, euler, net_denoiser
from ldm.samplers.denoiser import PREDICTION_TYPES

TOLERANCE = 1e-5  # of the largest value at the step

# A thousand steps take a second: they run with one kind of prediction each.
CASES = [
    (steps, prediction_type)
    for steps in COUNTS
    for prediction_type in PREDICTION_TYPES
    if steps <= 50 or prediction_type == {999: "v_prediction", 1000: "epsilon"}[steps]
]

SHAPE = (2, 4, 4, 4)
CONTEXT = torch.zeros(1, dtype=torch.float64)  # its dtype is the net's

schedule = Schedule()


def draw(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(SHAPE, generator=generator, dtype=torch.float64) for _ in range(count)]


def run(
    sampler: Sampler,
    net: MixtureNet,
    x: Tensor,
    sigmas: Tensor,
    noise: Callable[..., Tensor] | None = None,
    log: bool = False,
    **options: float,
) -> list[Tensor]:
    """x at every sigma."""
    denoise = net_denoiser(net, CONTEXT, schedule, net.prediction_type, log)
    return [x] + [step.x for step in sampler(denoise, x, sigmas, noise, **options)]


def assert_equal(ours: list[Tensor], theirs: list[Tensor]) -> None:
    off = [float((a - b).abs().max() / b.abs().max()) for a, b in zip(ours, theirs, strict=True)]
    assert max(off) <= TOLERANCE, f"off by {max(off):.1e} at sigma number {off.index(max(off))}"


@pytest.mark.parametrize(("steps", "prediction_type"), CASES)
@pytest.mark.parametrize("spacing", EULER_SPACINGS)
def test_euler_diffusers(spacing, steps, prediction_type):
    (noise,) = draw(1)
    scheduler = diffusers_euler(spacing, steps, prediction_type)
    log = spacing == "karras"
    their_net = MixtureNet(prediction_type, log)
    x = noise * scheduler.init_noise_sigma
    theirs = [x]
    for t in scheduler.timesteps:
        out = their_net(scheduler.scale_model_input(x, t), t)
        x = scheduler.step(out, t, x).prev_sample
        theirs.append(x)

    net = MixtureNet(prediction_type, log)
    sigmas = schedule.sigmas(steps, spacing)
    start = (1 + sigmas[0] ** 2) ** 0.5 if spacing == "leading" else sigmas[0]
    assert_equal(run(euler, net, noise * start, sigmas, log=log), theirs)
    exact = diffusers_euler(spacing, steps, prediction_type, table64=True).timesteps.tolist()
    assert net.ts == pytest.approx(exact, rel=1e-6, abs=1e-9)


def ddim_diffusers(scheduler: DDIMScheduler, net: MixtureNet, draws: list[Tensor], eta: float) -> list[Tensor]:
    x = draws[0] * scheduler.init_noise_sigma
    xs = [x]
    timesteps = scheduler.timesteps
    for t, t_next, noise in zip(timesteps, [*timesteps[1:].tolist(), -1], draws[1:], strict=True):
        if scheduler.config.timestep_spacing == "trailing":  # make its t - 1000 // n the next timestep: it is beside it
            scheduler.num_inference_steps = Fraction(1000, int(t) - t_next)
        x = scheduler.step(net(x, t), t, x, eta=eta, variance_noise=noise).prev_sample
        xs.append(x)
    return xs


@pytest.mark.parametrize(("steps", "prediction_type"), CASES)
@pytest.mark.parametrize(("spacing", "eta"), [("leading", 0.0), ("leading", 0.5), ("leading", 1.0), ("trailing", 0.5)])
def test_ddim_diffusers(spacing, eta, steps, prediction_type):
    """diffusers' x is variance-preserving: x / sqrt(1 + sigma^2), from the unit noise to the latents for the VAE.

    The noise of hundreds of steps rests on 1 - a / a_next, of which float32 keeps three digits: there the reference
    is given its table in float64.
    """
    draws = draw(steps + 1)
    their_net = MixtureNet(prediction_type)
    scheduler = diffusers_ddim(spacing, steps, prediction_type, table64=steps > 50)
    theirs = ddim_diffusers(scheduler, their_net, draws, eta)

    net = MixtureNet(prediction_type)
    sigmas = schedule.sigmas(steps, spacing, end=schedule.sigma_min)
    scales = (1 + sigmas**2) ** 0.5
    fresh = iter(draws[1:])
    noise = (lambda *_: next(fresh)) if eta > 0 else None  # eta 0 draws nothing
    xs = run(ddim, net, draws[0] * scales[0], sigmas, noise, eta=eta)
    assert_equal([x / scale for x, scale in zip(xs, scales, strict=True)], theirs)
    assert net.ts == their_net.ts


@pytest.mark.parametrize(("steps", "prediction_type"), CASES)
@pytest.mark.parametrize("spacing", ["linspace", "karras"])
def test_euler_k_diffusion(spacing, steps, prediction_type):
    (noise,) = draw(1)
    their_net = MixtureNet(prediction_type)
    model = k_model(their_net)
    with float64():
        their_sigmas = (
            k_sampling.get_sigmas_karras(steps, TABLE[0], TABLE[-1]) if spacing == "karras" else model.get_sigmas(steps)
        )
    theirs = []
    last = k_sampling.sample_euler(
        model, noise * their_sigmas[0], their_sigmas, callback=lambda step: theirs.append(step["x"]), disable=True
    )

    net = MixtureNet(prediction_type)
    sigmas = schedule.sigmas(steps, spacing, log=True)
    assert_equal(run(euler, net, noise * sigmas[0], sigmas, log=True), [*theirs, last])
    assert net.ts == pytest.approx(their_net.ts, rel=1e-6, abs=1e-9)
