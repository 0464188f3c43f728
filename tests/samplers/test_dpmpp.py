"""DPM-Solver++ and its stochastic kinds beside k-diffusion's and diffusers', and on paper."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, DPMSolverSDEScheduler, DPMSolverSinglestepScheduler
from samplers.reference import SD1, TABLE, MixtureNet, gaussian, k_model, k_sampling, mixture
from samplers.test_analytic import MEAN, SIGMAS, STD, assert_distributed, begin, flow, mixture_denoiser, normal
from samplers.test_parity import assert_equal, draw, run
from torch import Tensor

from ldm.samplers import (
    PREDICTION_TYPES,
    Noise,
    Prediction,
    Sampler,
    Schedule,
    dpmpp_2m,
    dpmpp_2m_sde,
    dpmpp_2s_ancestral,
    dpmpp_3m_sde,
    dpmpp_sde,
)

STEPS = (1, 2, 3, 10, 25, 50)

schedule = Schedule()

Scheduler = DPMSolverMultistepScheduler | DPMSolverSinglestepScheduler

heun = {"solver_type": "heun"}
ALL = [
    (dpmpp_2s_ancestral, {}),
    (dpmpp_2s_ancestral, {"eta": 0.0}),
    (dpmpp_2s_ancestral, {"eta": 0.6, "s_noise": 1.1}),
    (dpmpp_sde, {}),
    (dpmpp_sde, {"eta": 0.0}),
    (dpmpp_sde, {"eta": 0.6, "s_noise": 1.1, "r": 0.3}),
    (dpmpp_2m, {}),
    (dpmpp_2m_sde, {}),
    (dpmpp_2m_sde, {"eta": 0.0}),
    (dpmpp_2m_sde, {"eta": 0.6, "s_noise": 1.1}),
    (dpmpp_2m_sde, heun),
    (dpmpp_2m_sde, heun | {"eta": 0.6, "s_noise": 1.1}),
    (dpmpp_3m_sde, {}),
    (dpmpp_3m_sde, {"eta": 0.0}),
    (dpmpp_3m_sde, {"eta": 0.6, "s_noise": 1.1}),
]


class Drawn:
    """The given draws one by one, and the sigmas for which they were asked."""

    def __init__(self, draws: list[Tensor]):
        self.draws = iter(draws)
        self.asked: list[tuple[float, float]] = []

    def __call__(self, sigma: Tensor | float, sigma_next: Tensor | float) -> Tensor:
        self.asked.append((float(sigma), float(sigma_next)))
        return next(self.draws)


def k_diffusion(name: str, net: MixtureNet, x: Tensor, sigmas: Tensor, options: dict, draws: list[Tensor]) -> tuple:
    """x at every sigma, and the sigmas between which noise was drawn."""
    function, noise, xs = getattr(k_sampling, f"sample_{name}"), Drawn(draws), []
    if name != "dpmpp_2m":
        options = options | {"noise_sampler": noise}
    last = function(k_model(net), x, sigmas, callback=lambda s: xs.append(s["x"]), disable=True, **options)
    return [*xs, last], noise.asked


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("spacing", ["linspace", "karras", "karras, not to 0"])
@pytest.mark.parametrize(("sampler", "options"), ALL)
def test_k_diffusion(sampler, options, spacing, steps):
    """The net is called at the same sigmas, the noise asked for between the same.

    Where it would be scaled by 0 we draw none. For one step to 0: `test_k_diffusion_breaks_at_one_step`.
    """
    spacing, _, above_0 = spacing.partition(", ")
    multistep_sde = sampler in (dpmpp_2m_sde, dpmpp_3m_sde)
    if above_0 or (steps == 1 and multistep_sde):
        sigmas = schedule.sigmas(steps + 1, spacing, log=True)[:-1]
    else:
        sigmas = schedule.sigmas(steps, spacing, log=True)
    prediction_type = PREDICTION_TYPES[steps % 2]
    first, *draws = draw(2 * steps + 1)
    x = first * sigmas[0]
    their_net, net, noise = MixtureNet(prediction_type), MixtureNet(prediction_type), Drawn(draws)
    theirs, asked = k_diffusion(sampler.__name__, their_net, x, sigmas, options, draws)
    assert_equal(run(sampler, net, x, sigmas, noise, log=True, **options), theirs)
    assert net.ts == pytest.approx(their_net.ts, rel=1e-6, abs=1e-9)
    expected = [] if options.get("eta") == 0 else asked
    assert np.array(noise.asked) == pytest.approx(np.array(expected), rel=1e-9)


@pytest.mark.parametrize("sampler", [dpmpp_2m_sde, dpmpp_3m_sde])
def test_k_diffusion_breaks_at_one_step(sampler):
    """To 0 in one step: it stores an h that it has not set. Ours gives x0."""
    (x,) = draw(1)
    sigmas = schedule.sigmas(1)
    with pytest.raises(UnboundLocalError):
        k_diffusion(sampler.__name__, MixtureNet("epsilon"), x, sigmas, {}, [])
    (step,) = sampler(gaussian(MEAN, STD), x, sigmas, None)
    assert torch.equal(step.x, step.x0)


def set_to(scheduler: Scheduler, sigmas: Tensor) -> Scheduler:
    """A scheduler that was set to as many steps, at sigmas of ours and their timesteps with a fraction."""
    scheduler.sigmas, scheduler.timesteps = sigmas, schedule.t(sigmas[:-1], log=True)
    scheduler.set_begin_index(0)
    return scheduler


def run_diffusers(scheduler: Scheduler, net: MixtureNet, x: Tensor, draws: list[Tensor]) -> list[Tensor]:
    xs = [x]
    for t, noise in zip(scheduler.timesteps, draws, strict=False):
        fresh = {"variance_noise": noise} if isinstance(scheduler, DPMSolverMultistepScheduler) else {}
        x = scheduler.step(net(x, t), t, x, **fresh).prev_sample
        xs.append(x)
    return xs


def run_vp(
    sampler: Sampler, net: MixtureNet, x: Tensor, sigmas: Tensor, draws: list[Tensor], **options
) -> list[Tensor]:
    """Ours from a variance-preserving x, as variance-preserving ones."""
    scales = (1 + sigmas**2) ** 0.5
    xs = run(sampler, net, x * scales[0], sigmas, Drawn(draws), log=True, **options)
    return [x / scale for x, scale in zip(xs, scales, strict=True)]


SDE = {"algorithm_type": "sde-dpmsolver++"}
# To the last but one step of less than 15 diffusers gives order 2 where it could be 3, unless lower_order_final is off.
THIRD = {"solver_order": 3, "lower_order_final": False}
MULTISTEP = [
    (dpmpp_2m, {}, {}),
    (dpmpp_2m_sde, {"eta": 0.0} | heun, heun),
    (dpmpp_2m_sde, {}, SDE),
    (dpmpp_2m_sde, heun, SDE | heun),
    (dpmpp_3m_sde, {"eta": 0.0}, THIRD | heun),
]


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("spacing", ["diffusers' linspace", "karras"])
@pytest.mark.parametrize(("sampler", "options", "config"), MULTISTEP)
def test_diffusers_multistep(sampler, options, config, spacing, steps):
    """On the timesteps of its own, and on Karras' sigmas: there it would round the timesteps, see below."""
    prediction_type = PREDICTION_TYPES[steps % 2]
    scheduler = DPMSolverMultistepScheduler(**SD1, prediction_type=prediction_type, **config)
    scheduler.set_timesteps(steps)
    if spacing == "karras":
        sigmas = schedule.sigmas(steps, spacing)
        set_to(scheduler, sigmas)
    else:
        sigmas = torch.cat([schedule.sigma(scheduler.timesteps.double()), torch.zeros(1, dtype=torch.float64)])
    x, *draws = draw(steps + 1)
    their_net, net = MixtureNet(prediction_type), MixtureNet(prediction_type)
    theirs = run_diffusers(scheduler, their_net, x, draws)
    assert_equal(run_vp(sampler, net, x, sigmas, draws, **options), theirs)
    assert net.ts == pytest.approx(their_net.ts, rel=1e-6, abs=1e-9)


def test_diffusers_rounds_karras_timesteps():
    scheduler = DPMSolverMultistepScheduler(**SD1, use_karras_sigmas=True)
    scheduler.set_timesteps(20)
    sigmas = schedule.sigmas(20, "karras")
    torch.testing.assert_close(scheduler.sigmas.double(), sigmas, rtol=1e-4, atol=0)
    t = schedule.t(sigmas[:-1], log=True)
    assert torch.equal(scheduler.timesteps, t.round().long()) and (t - t.round()).abs().max() > 0.3


def test_diffusers_third_order_of_the_sde():
    """It adds 1/2 where the integral of the parabola, which vanishes with the step, takes it away: off by D2."""
    sigmas = schedule.sigmas(4, "karras")
    scheduler = DPMSolverMultistepScheduler(**SD1, **SDE, **THIRD, **heun)
    scheduler.set_timesteps(4)
    x, *draws = draw(5)
    theirs = run_diffusers(set_to(scheduler, sigmas), MixtureNet("epsilon"), x, draws)
    ours = run_vp(dpmpp_3m_sde, MixtureNet("epsilon"), x, sigmas, draws)
    assert_equal(ours[:3], theirs[:3])

    x0 = [mixture(x * (1 + sigma**2) ** 0.5, sigma) for x, sigma in zip(ours, sigmas[:3], strict=False)]
    h = -sigmas[:4].log().diff()
    slopes = [(x0[1] - x0[0]) / h[0], (x0[2] - x0[1]) / h[1]]
    D2 = (slopes[1] - slopes[0]) / (h[0] + h[1]) * h[2] ** 2
    assert_equal([ours[3] - D2 / (1 + sigmas[3] ** 2) ** 0.5], theirs[3:4])


@pytest.mark.parametrize("steps", STEPS)
def test_diffusers_singlestep(steps):
    """2S without noise, on a grid that has the middles of log sigma: a step of ours is two of theirs, the last one."""
    prediction_type = PREDICTION_TYPES[steps % 2]
    sigmas = schedule.sigmas(steps, "karras")
    grid = torch.empty(2 * steps, dtype=torch.float64)
    grid[::2], grid[1:-1:2], grid[-1] = sigmas[:-1], (sigmas[:-2] * sigmas[1:-1]) ** 0.5, 0.0
    scheduler = DPMSolverSinglestepScheduler(
        **{key: SD1[key] for key in SD1 if key != "steps_offset"}, prediction_type=prediction_type
    )
    scheduler.set_timesteps(len(grid) - 1)
    x, *draws = draw(len(grid))
    their_net, net = MixtureNet(prediction_type), MixtureNet(prediction_type)
    theirs = run_diffusers(set_to(scheduler, grid), their_net, x, draws)
    ours = run_vp(dpmpp_2s_ancestral, net, x, sigmas, [], eta=0.0)
    assert_equal(ours, [*theirs[:-1:2], theirs[-1]])
    assert net.ts == pytest.approx(their_net.ts, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("steps", STEPS)
def test_diffusers_sde(steps):
    """Its one step starts, and ends, at the sigma of t = 0."""
    prediction_type = PREDICTION_TYPES[steps % 2]
    scheduler = DPMSolverSDEScheduler(**SD1, prediction_type=prediction_type, use_karras_sigmas=True)
    scheduler.set_timesteps(steps)
    first, *draws = draw(2 * steps + 1)
    scheduler.noise_sampler = their_noise = Drawn(draws)
    their_net, net, noise = MixtureNet(prediction_type), MixtureNet(prediction_type), Drawn(draws)
    sigmas = schedule.sigmas(steps, "karras") if steps > 1 else torch.tensor([TABLE[0], 0])
    x = first * sigmas[0]
    theirs = [x]
    for t in scheduler.timesteps:
        out = their_net(scheduler.scale_model_input(x, t), t)
        x = scheduler.step(out, t, x).prev_sample
        if scheduler.state_in_first_order:
            theirs.append(x)
    assert_equal(run(dpmpp_sde, net, theirs[0], sigmas, noise, log=True), theirs)
    assert np.array(noise.asked) == pytest.approx(np.array(their_noise.asked), rel=1e-4)


ODES = [
    (dpmpp_2s_ancestral, {"eta": 0.0}, 2),
    (dpmpp_sde, {"eta": 0.0}, 2),
    (dpmpp_2m, {}, 2),
    (dpmpp_2m_sde, {"eta": 0.0} | heun, 2),
    (dpmpp_3m_sde, {"eta": 0.0}, 2),  # see the next test
]


@pytest.mark.parametrize(("sampler", "options", "order"), ODES)
def test_order(sampler, options, order):
    counts = np.array([80, 160, 320, 640])
    errors = []
    for count in counts:
        sigmas = schedule.sigmas(count + 1, "karras")[:-1]
        x = MEAN + normal(100) * sigmas[0]
        *_, last = sampler(gaussian(MEAN, STD), x, sigmas, None, **options)
        errors.append(float((last.x - flow(x, sigmas[0], sigmas[-1])).abs().max()))
    slope, _ = np.polyfit(np.log(counts), np.log(errors), 1)
    assert order - 0.1 < -slope < order + 0.1


def test_3m_takes_half_of_the_curvature():
    """x0 = lambda^2, whose integral is known: what is missing is the term with D2 = h^2 once more."""
    sigmas = torch.tensor([2.0, 1.1, 0.7, 0.3], dtype=torch.float64)
    lambdas = -sigmas.log()

    def denoise(x: Tensor, sigma: Tensor) -> Prediction:
        x0 = sigma.log().square().expand(1)
        return Prediction(x0, (x - x0) / sigma)

    def integral(i: int) -> Tensor:
        return lambdas[i] ** 2 - 2 * lambdas[i] + 2

    x, step = [step.x for step in dpmpp_3m_sde(denoise, torch.zeros(1), sigmas, None, eta=0.0)][1:]
    q, h = sigmas[3] / sigmas[2], lambdas[3] - lambdas[2]
    exact = q * x + integral(3) - q * integral(2)
    phi_3 = (q - 1 + h) / h**2 - 0.5
    torch.testing.assert_close(step - phi_3 * h**2, exact)


STOCHASTIC = [dpmpp_2s_ancestral, dpmpp_sde, dpmpp_2m_sde, partial(dpmpp_2m_sde, **heun), dpmpp_3m_sde]


def fresh_noise(seed: int) -> Noise:
    generator = torch.Generator().manual_seed(seed)
    return lambda *_: torch.randn(20_000, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("eta", [0.5, 1.0])
@pytest.mark.parametrize("sampler", STOCHASTIC)
def test_distribution(sampler, eta):
    *_, last = sampler(gaussian(MEAN, STD), begin(SIGMAS[0]), SIGMAS[::4], fresh_noise(3), eta=eta)
    assert_distributed(last.x, MEAN, math.hypot(STD, float(SIGMAS[::4][-1])))


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("sampler", STOCHASTIC)
def test_variance_on_the_way(sampler, eta):
    """For data that is one point the steps are exact however few."""
    sigmas = schedule.sigmas(5, "karras")[:-1]
    x = MEAN + sigmas[0] * normal(20_000)
    for step in sampler(gaussian(MEAN, 0.0), x, sigmas, fresh_noise(3), eta=eta):
        assert_distributed(step.x, MEAN, float(step.sigma_next))
        assert (step.noise is None) == (eta == 0)


def test_2m_is_2m_sde_without_noise():
    sigmas = schedule.sigmas(20)
    x = normal(100) * sigmas[0]
    for a, b in zip(
        dpmpp_2m(mixture_denoiser, x, sigmas, None),
        dpmpp_2m_sde(mixture_denoiser, x, sigmas, None, eta=0.0),
        strict=True,
    ):
        torch.testing.assert_close(a.x, b.x, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("sampler", "options"), ALL)
def test_steps_show_what_happened(sampler, options):
    """The prediction splits the x that the step started from: the one that the last step had, or the one sent."""
    sigmas = schedule.sigmas(7, "karras")
    x = normal(20_000) * sigmas[0]
    steps = sampler(mixture_denoiser, x, sigmas, fresh_noise(3), **options)
    sent = None
    for i in range(7):
        step = steps.send(sent)
        assert (step.i, step.sigma, step.sigma_next) == (i, sigmas[i], sigmas[i + 1])
        torch.testing.assert_close(step.x0 + step.sigma * step.eps, x, rtol=1e-12, atol=1e-12)
        sent = step.x + 1 if i == 3 else None
        x = step.x if sent is None else sent
    assert torch.equal(step.x, step.x0)


def test_unknown_solver_type():
    with pytest.raises(ValueError, match="solver_type='euler': use midpoint or heun"):
        next(dpmpp_2m_sde(gaussian(0, 1), torch.zeros(1), schedule.sigmas(2), None, solver_type="euler"))
