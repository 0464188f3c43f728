"""UniPC, DEIS, PLMS, LCM, TCD, CFG++ and DDPM: beside diffusers' schedulers step by step, and on paper."""

import math
from collections.abc import Callable, Iterator

import diffusers
import numpy as np
import pytest
import torch
from diffusers.schedulers import scheduling_ddpm, scheduling_lcm, scheduling_tcd
from samplers.reference import ALPHAS_CUMPROD, SD1, MixtureNet, gaussian
from samplers.test_analytic import MEAN, STD, assert_distributed, flow, normal
from samplers.test_parity import assert_equal, draw, run, schedule
from torch import Tensor

from ldm.guidance import guided
from ldm.samplers import (
    Prediction,
    ddpm,
    deis,
    dpm_adaptive,
    euler,
    euler_cfg_pp,
    lcm,
    plms,
    tcd,
    unipc,
)
from ldm.samplers.denoiser import PREDICTION_TYPES

COUNTS = (1, 2, 3, 10, 25, 50)
cases = pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
counts = pytest.mark.parametrize("steps", COUNTS)


def scheduler_of(name: str, **config) -> diffusers.SchedulerMixin:
    """As SD 1 configures it, with its table in float64."""
    made = getattr(diffusers, name)(**SD1 | config)
    made.alphas_cumprod = torch.from_numpy(ALPHAS_CUMPROD)
    return made


def diffusers_run(
    scheduler: diffusers.SchedulerMixin, net: MixtureNet, x: Tensor, ts: list[float] | None = None, **options
) -> list[Tensor]:
    """x at every sigma, in diffusers' variance-preserving scale. ts: what the net is told in place of the timesteps."""
    xs = [x]
    timesteps = scheduler.timesteps
    for t, told in zip(timesteps, timesteps if ts is None else ts, strict=True):
        x = scheduler.step(net(x, torch.as_tensor(told)), t, x, **options).prev_sample
        xs.append(x)
    return xs


def preserving(xs: list[Tensor], sigmas: Tensor) -> list[Tensor]:
    return [x / (1 + sigma**2) ** 0.5 for x, sigma in zip(xs, sigmas, strict=True)]


def handed(draws: list[Tensor]) -> Callable[..., Tensor]:
    """The draws one by one, to ours and to theirs."""
    left: Iterator[Tensor] = iter(draws)
    return lambda *_, **__: next(left)


def multistep(name: str, sigmas: Tensor, **config) -> diffusers.SchedulerMixin:
    """UniPC or DEIS on our sigmas, in float64: theirs are spaced over n + 1 timesteps, rounded."""
    scheduler = scheduler_of(name, **config)
    scheduler.set_timesteps(len(sigmas) - 1)
    scheduler.timesteps = torch.arange(len(sigmas) - 1, 0, -1)  # numbers that differ: it finds its step by them
    scheduler.sigmas = sigmas
    return scheduler


@cases
@counts
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("solver_type", ["bh1", "bh2"])
def test_unipc_diffusers(solver_type, order, steps, prediction_type):
    (noise,) = draw(1)
    sigmas = schedule.sigmas(steps, "karras")
    ts = schedule.t(sigmas[:-1], log=True).tolist()
    scheduler = multistep(
        "UniPCMultistepScheduler",
        sigmas,
        solver_order=order,
        solver_type=solver_type,
        prediction_type=prediction_type,
    )
    x = noise * sigmas[0]
    theirs = diffusers_run(scheduler, MixtureNet(prediction_type), x / (1 + sigmas[0] ** 2) ** 0.5, ts)
    net = MixtureNet(prediction_type)
    ours = run(unipc, net, x, sigmas, log=True, order=order, solver_type=solver_type)
    assert_equal(preserving(ours, sigmas), theirs)
    assert len(net.ts) == steps


@cases
@pytest.mark.parametrize("steps", [*COUNTS, 14, 15])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_deis_diffusers(order, steps, prediction_type):
    """It ends at sigma_min, as theirs: the equation of order 2 and 3 has the logarithm of the last sigma."""
    (noise,) = draw(1)
    sigmas = schedule.sigmas(steps, "leading", end=schedule.sigma_min)
    ts = schedule.t(sigmas[:-1]).tolist()
    scheduler = multistep("DEISMultistepScheduler", sigmas, solver_order=order, prediction_type=prediction_type)
    x = noise * sigmas[0]
    theirs = diffusers_run(scheduler, MixtureNet(prediction_type), x / (1 + sigmas[0] ** 2) ** 0.5, ts)
    net = MixtureNet(prediction_type)
    assert_equal(preserving(run(deis, net, x, sigmas, order=order), sigmas), theirs)
    assert len(net.ts) == steps


def plms_diffusers(steps: int, net: MixtureNet, noise: Tensor) -> list[Tensor]:
    scheduler = scheduler_of("PNDMScheduler", skip_prk_steps=True, prediction_type=net.prediction_type)
    scheduler.final_alpha_cumprod = scheduler.alphas_cumprod[0]
    scheduler.set_timesteps(steps)
    first, *xs = diffusers_run(scheduler, net, noise)
    return [first, *xs[1:]] if steps > 1 else [first, *xs]  # without the one on which the second evaluation is made


@counts
def test_plms_diffusers(steps):
    (noise,) = draw(1)
    their_net, net = MixtureNet("epsilon"), MixtureNet("epsilon")
    theirs = plms_diffusers(steps, their_net, noise)
    sigmas = schedule.sigmas(steps, "leading", end=schedule.sigma_min)
    ours = run(plms, net, noise * (1 + sigmas[0] ** 2) ** 0.5, sigmas)
    assert_equal(preserving(ours, sigmas), theirs)
    assert net.ts == their_net.ts and len(net.ts) == (steps + 1 if steps > 1 else 1)


def test_difference_plms_v():
    """diffusers combines v of several timesteps and then reads it at the last: we combine eps, as CompVis."""
    (noise,) = draw(1)
    sigmas = schedule.sigmas(10, "leading", end=schedule.sigma_min)
    x = noise * (1 + sigmas[0] ** 2) ** 0.5
    ours = {kind: run(plms, MixtureNet(kind), x, sigmas) for kind in PREDICTION_TYPES}
    assert_equal(ours["v_prediction"], ours["epsilon"])
    last = preserving(ours["v_prediction"], sigmas)[-1]
    theirs = plms_diffusers(10, MixtureNet("v_prediction"), noise)[-1]
    assert (theirs - last).abs().max() > 0.01


@cases
@counts
def test_lcm_diffusers(steps, prediction_type, monkeypatch):
    noise, *fresh = draw(steps)
    monkeypatch.setattr(scheduling_lcm, "randn_tensor", handed(fresh))
    scheduler = scheduler_of("LCMScheduler", prediction_type=prediction_type)
    scheduler.set_timesteps(steps)
    theirs = diffusers_run(scheduler, MixtureNet(prediction_type), noise)
    sigmas = torch.cat([schedule.sigma(scheduler.timesteps), torch.zeros(1)])
    net = MixtureNet(prediction_type)
    ours = run(lcm, net, noise * (1 + sigmas[0] ** 2) ** 0.5, sigmas, handed(fresh))
    assert_equal(preserving(ours, sigmas), theirs)
    assert len(net.ts) == steps


def test_difference_lcm_boundary():
    """Its c_skip and c_out are 0 and 1 to 7e-6 where these models are trained, and not at the timesteps under that."""
    scheduler = scheduler_of("LCMScheduler")
    scheduler.set_timesteps(50)
    assert int(scheduler.timesteps.min()) == 19
    for t, least, most in ((999, 0, 3e-9), (19, 6e-6, 7e-6), (1, 2e-3, 3e-3), (0, 1, 1)):
        c_skip, c_out = scheduler.get_scalings_for_boundary_condition_discrete(t)
        assert least <= max(c_skip, 1 - c_out) <= most


@cases
@counts
@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0])
def test_tcd_diffusers(gamma, steps, prediction_type, monkeypatch):
    noise, *fresh = draw(steps)
    monkeypatch.setattr(scheduling_tcd, "randn_tensor", handed(fresh))
    scheduler = scheduler_of("TCDScheduler", prediction_type=prediction_type)
    scheduler.set_timesteps(steps)
    theirs = diffusers_run(scheduler, MixtureNet(prediction_type), noise, eta=gamma)
    sigmas = schedule.sigma(torch.cat([scheduler.timesteps, torch.zeros(1)]))
    net = MixtureNet(prediction_type)
    draws = handed(fresh) if gamma > 0 else None  # gamma 0 draws nothing
    ours = run(tcd, net, noise * (1 + sigmas[0] ** 2) ** 0.5, sigmas, draws, gamma=gamma)
    assert_equal(preserving(ours, sigmas), theirs)
    assert len(net.ts) == steps


@cases
@counts
def test_ddpm_diffusers(steps, prediction_type, monkeypatch):
    """To sigma 0, and not to that of t = 0 as diffusers' DDIM: its DDPM takes 1 for the last alphas_cumprod.

    There it draws once more, for a variance of 1e-20 in place of 0.
    """
    noise, *fresh = draw(steps + 1)
    monkeypatch.setattr(scheduling_ddpm, "randn_tensor", handed(fresh))
    scheduler = scheduler_of(
        "DDPMScheduler", prediction_type=prediction_type, clip_sample=False, variance_type="fixed_small"
    )
    scheduler.set_timesteps(steps)
    theirs = diffusers_run(scheduler, MixtureNet(prediction_type), noise)
    sigmas = schedule.sigmas(steps, "leading")
    net = MixtureNet(prediction_type)
    ours = run(ddpm, net, noise * (1 + sigmas[0] ** 2) ** 0.5, sigmas, handed(fresh))
    assert_equal(preserving(ours, sigmas), theirs)
    assert len(net.ts) == steps


# On paper


def cfg_pp(draws: Tensor, sigmas: Tensor, scale: float) -> Iterator[Tensor]:
    """Chung et al. 2024, algorithm 2, as it is written: in the variance-preserving scale."""
    x = draws
    for a, a_next in zip(*[(1 / (1 + s**2)).tolist() for s in (sigmas[:-1], sigmas[1:])], strict=True):
        sigma = ((1 - a) / a) ** 0.5
        eps_uncond, eps_cond = ((x / a**0.5 - mean) * sigma / (STD**2 + sigma**2) for mean in (0.0, MEAN))
        eps = eps_uncond + scale * (eps_cond - eps_uncond)
        x0 = (x - (1 - a) ** 0.5 * eps) / a**0.5
        x = a_next**0.5 * x0 + (1 - a_next) ** 0.5 * eps_uncond
        yield x


def two_texts(x: Tensor, sigma: Tensor) -> Prediction:
    """The unconditional half has its data around 0, the conditional half around MEAN."""
    halves = [gaussian(mean, STD)(half, sigma) for mean, half in zip((0.0, MEAN), x.chunk(2), strict=True)]
    return Prediction(*(torch.cat(pair) for pair in zip(*[half[:2] for half in halves], strict=True)))


@pytest.mark.parametrize("scale", [0.6, 7.5])
def test_euler_cfg_pp_is_the_paper_s(scale):
    sigmas = schedule.sigmas(10, "leading", end=schedule.sigma_min)
    x = normal(64).reshape(1, 4, 4, 4) * (1 + sigmas[0] ** 2) ** 0.5
    ours = [step.x for step in euler_cfg_pp(guided(two_texts, scale), x, sigmas, None)]
    theirs = list(cfg_pp(x / (1 + sigmas[0] ** 2) ** 0.5, sigmas, scale))
    assert_equal(preserving(ours, sigmas[1:]), theirs)
    plain = [step.x for step in euler(guided(two_texts, scale), x, sigmas, None)]
    assert (plain[-1] - ours[-1]).abs().max() > 0.01


def test_euler_cfg_pp_without_guidance_is_euler():
    sigmas = schedule.sigmas(10, "karras")
    x = normal(64) * sigmas[0]
    for a, b in zip(*(list(f(gaussian(MEAN, STD), x, sigmas, None)) for f in (euler_cfg_pp, euler)), strict=True):
        torch.testing.assert_close(a.x, b.x, rtol=0, atol=1e-12)


def assert_order(expected: float, within: float, sampler, half: bool = False, **options) -> None:
    """The slope of log error against log steps, in equal parts of log sigma from 10 to 0.1.

    half: measured in the middle of the steps, where nothing yet lowers the order for the end.
    """
    counts, errors = np.array([80, 160, 320, 640]), []
    for count in counts:
        sigmas = torch.logspace(1, -1, int(count) + 1, dtype=torch.float64)
        x = MEAN + normal(100) * sigmas[0]
        steps = list(sampler(gaussian(MEAN, STD), x, sigmas, None, **options))
        last = steps[count // 2 - 1 if half else -1]
        errors.append(float((last.x - flow(x, sigmas[0], last.sigma_next)).abs().max()))
    slope, _ = np.polyfit(np.log(counts), np.log(errors), 1)
    assert abs(-slope - expected) < within, errors


@pytest.mark.parametrize("solver_type", ["bh1", "bh2"])
def test_unipc_converges(solver_type):
    """With order p + 1 where it is corrected: 4 turns to 3 as the error of the first step shows, which is of order 1.

    The last step is not corrected: it is of order 1, its local error of order 2.
    """
    assert_order(2, 0.05, unipc, half=True, order=1, solver_type=solver_type)
    assert_order(3, 0.25, unipc, half=True, order=2, solver_type=solver_type)
    assert_order(3.5, 0.5, unipc, half=True, order=3, solver_type=solver_type)
    for order in (1, 3):
        assert_order(2, 0.05, unipc, order=order, solver_type=solver_type)


def test_deis_and_plms_converge():
    assert_order(1, 0.05, deis, order=1)
    assert_order(2, 0.05, deis, order=2)
    assert_order(2, 0.1, deis, order=3)
    assert_order(2, 0.05, plms)


def test_unipc_of_order_1_uncorrected_is_ddim():
    """One step corrects nothing."""
    sigmas = torch.tensor([3.0, 1.0], dtype=torch.float64)
    x = normal(100) * sigmas[0]
    ours, theirs = (next(iter(f(gaussian(MEAN, STD), x, sigmas, None))).x for f in (unipc, euler))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("in_place", [False, True])
def test_unipc_goes_on_from_the_x_it_is_sent(in_place):
    """To the x that it was sent it adds what the corrector adds: for data that is one point nothing."""
    sigmas = schedule.sigmas(5, "karras")
    steps = unipc(gaussian(MEAN, 0.0), MEAN + sigmas[0] * normal(10), sigmas, None)
    for _ in range(3):
        step = next(steps)
    plain = MEAN + (step.x - MEAN) * sigmas[4] / sigmas[3]
    following = steps.send(step.x.add_(1) if in_place else step.x + 1)
    torch.testing.assert_close(following.x, plain + sigmas[4] / sigmas[3], rtol=0, atol=1e-12)


def fresh_normal() -> Callable[..., Tensor]:
    generator = torch.Generator().manual_seed(3)
    return lambda *_: torch.randn(20_000, generator=generator, dtype=torch.float64)


def test_lcm_distribution():
    """With the consistency function of Gaussian data, the end of the flow, x is distributed as data + sigma noise."""

    def consistency(x: Tensor, sigma: Tensor) -> Prediction:
        x0 = flow(x, sigma, 0.0)
        return Prediction(x0, (x - x0) / sigma)

    sigmas = schedule.sigmas(4, "trailing")
    x = MEAN + math.hypot(STD, sigmas[0]) * normal(20_000)
    for step in lcm(consistency, x, sigmas, fresh_normal()):
        assert_distributed(step.x, MEAN, math.hypot(STD, step.sigma_next))


@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0])
def test_tcd_distribution(gamma):
    """For data that is one point the jumps are exact: x is that point + sigma * noise at every sigma."""
    sigmas = schedule.sigmas(4, "trailing", end=schedule.sigma_min)
    x = MEAN + sigmas[0] * normal(20_000)
    for step in tcd(gaussian(MEAN, 0.0), x, sigmas, fresh_normal(), gamma=gamma):
        assert_distributed(step.x, MEAN, float(step.sigma_next))
        assert (step.noise is None) == (gamma == 0 or step.i == 3)


def test_tcd_of_gamma_1_is_lcm():
    """But for s, which is t = 0 and not the clean picture."""
    sigmas = schedule.sigmas(4, "trailing")
    x = MEAN + sigmas[0] * normal(20_000)
    ours = next(tcd(gaussian(MEAN, STD), x, sigmas, fresh_normal(), gamma=1.0))
    theirs = next(lcm(gaussian(MEAN, STD), x, sigmas, fresh_normal()))
    low, high = schedule.sigma_min, float(sigmas[1])
    less = (high - (high**2 - low**2) ** 0.5) * theirs.noise
    torch.testing.assert_close(ours.x, theirs.x - less + low * theirs.eps, rtol=0, atol=1e-12)


@pytest.mark.parametrize("sampler", [deis, euler_cfg_pp, lcm, plms, tcd, unipc])
def test_every_count_evaluates_exactly_that_often(sampler):
    for steps in (*range(1, 40), 999, 1000):
        sigmas, asked = schedule.sigmas(steps, "simple"), []

        def denoise(x: Tensor, sigma: Tensor) -> Prediction:
            asked.append(float(sigma))  # noqa: B023
            return gaussian(MEAN, STD)(x, sigma)

        options = {"schedule": schedule} if sampler is tcd else {}
        made = list(sampler(denoise, sigmas[:1], sigmas, lambda *_: torch.zeros(1, dtype=torch.float64), **options))
        if sampler is plms and steps > 1:
            assert asked.pop(1) == sigmas[1]
        assert asked == sigmas[:-1].tolist() and [step.i for step in made] == list(range(steps))
        assert torch.stack([step.sigma_next for step in made]).equal(sigmas[1:])
        assert all(torch.isfinite(step.x).all() and step.x is not step.x0 for step in made)


@pytest.mark.parametrize(
    ("sampler", "options", "message"),
    [
        (unipc, {"order": 0}, "^order=0, solver_type='bh2': give 1, 2 or 3, and bh1 or bh2$"),
        (unipc, {"solver_type": "midpoint"}, "^order=2, solver_type='midpoint': give"),
        (deis, {"order": 0}, "^order=0: give 1, 2 or 3$"),
        (deis, {"order": 12}, "^order=12: give 1, 2 or 3$"),
        (unipc, {"order": 4}, "^order=4, solver_type='bh2': give 1, 2 or 3"),
        (euler, {"s_churn": -1.0}, r"^s_churn=-1\.0, s_noise=1\.0: give numbers of 0 or more$"),
        (
            dpm_adaptive,
            {"rtol": -1.0},
            r"^rtol=-1\.0, atol=0\.0078, h_init=0\.05, accept_safety=0\.81: give numbers above 0",
        ),
        (dpm_adaptive, {"accept_safety": 3.0}, r"accept_safety=3\.0: give numbers above 0, the last up to 1$"),
        (tcd, {"gamma": 1.1}, r"^gamma=1\.1: give a number from 0 \(deterministic\) to 1"),
    ],
)
def test_options_out_of_range(sampler, options, message):
    with pytest.raises(ValueError, match=message):
        next(sampler(gaussian(MEAN, STD), torch.ones(1), schedule.sigmas(3), None, **options))


@pytest.mark.parametrize(("t_next", "gamma", "s"), [(600, 0.3, 420), (500, 0.5, 250), (999, 0.0, 999), (90, 0.9, 9)])
def test_tcd_goes_to_a_whole_timestep(t_next, gamma, s):
    """s = (1 - gamma) t_next where that is whole, though it may read a little less off its sigma."""
    end, reached = (schedule.sigma(torch.tensor(float(t))) for t in (t_next, s))
    x = torch.ones(4).double()
    sigmas = torch.stack([end + 1, end])
    (step,) = tcd(gaussian(0.0, 0.0), sigmas[0] * x, sigmas, lambda *_: 0 * x, gamma=gamma)
    torch.testing.assert_close(step.x, reached * x, rtol=1e-9, atol=0)
