"""Heun, DPM-Solver-2, linear multistep, restart, and Euler with noise: beside the references, and on paper."""

import re
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch
from diffusers import (
    EulerAncestralDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2AncestralDiscreteScheduler,
    KDPM2DiscreteScheduler,
    LMSDiscreteScheduler,
    SchedulerMixin,
)
from samplers.reference import (
    ALPHAS_CUMPROD,
    SD1,
    TABLE,
    MixtureNet,
    diffusers_euler,
    float64,
    gaussian,
    k_model,
    k_sampling,
)
from samplers.test_analytic import END, MEAN, SIGMAS, STD, assert_distributed, begin, flow, mixture_denoiser, normal
from samplers.test_parity import CONTEXT, SHAPE, assert_equal, draw, schedule
from torch import Tensor

from ldm.samplers import (
    PREDICTION_TYPES,
    Sampler,
    Step,
    dpm_2,
    dpm_2_ancestral,
    euler,
    euler_ancestral,
    heun,
    lms,
    net_denoiser,
    restart,
)
from ldm.samplers.lms import coefficients

COUNTS = (1, 2, 3, 10, 25, 50)

CHURN = {"s_churn": 5.0, "s_noise": 1.003}
WINDOW = {"s_churn": 40.0, "s_tmin": 0.1, "s_tmax": 3.0}
HALF = {"eta": 0.5, "s_noise": 1.1}
K_DIFFUSION = [
    *((euler, CHURN), (euler, WINDOW), (euler_ancestral, {}), (euler_ancestral, HALF)),
    *((heun, {}), (heun, CHURN), (heun, WINDOW)),
    *((dpm_2, {}), (dpm_2, CHURN), (dpm_2, WINDOW), (dpm_2_ancestral, {}), (dpm_2_ancestral, HALF)),
    *((lms, {}), (lms, {"order": 2})),
]

DIFFUSERS = {
    euler_ancestral: EulerAncestralDiscreteScheduler,
    heun: HeunDiscreteScheduler,
    dpm_2: KDPM2DiscreteScheduler,
    dpm_2_ancestral: KDPM2AncestralDiscreteScheduler,
    lms: LMSDiscreteScheduler,
}


def fresh(seed: int = 4) -> Callable[..., Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda *_: torch.randn(SHAPE, generator=generator, dtype=torch.float64)


def sample(
    sampler: Sampler,
    net: MixtureNet,
    x: Tensor,
    sigmas: Tensor,
    noise: Callable[..., Tensor] | None,
    log: bool = True,
    **options: float,
) -> list[Step]:
    return list(sampler(net_denoiser(net, CONTEXT, schedule, net.prediction_type, log), x, sigmas, noise, **options))


def k_sigmas(spacing: str, steps: int, net: MixtureNet) -> Tensor:
    with float64():
        if spacing == "karras":
            return k_sampling.get_sigmas_karras(steps, TABLE[0], TABLE[-1])
        return k_model(net).get_sigmas(steps)


@pytest.mark.parametrize("steps", COUNTS)
@pytest.mark.parametrize(("spacing", "prediction_type"), [("linspace", "epsilon"), ("karras", "v_prediction")])
@pytest.mark.parametrize(("sampler", "options"), K_DIFFUSION)
def test_k_diffusion(sampler, options, spacing, prediction_type, steps):
    """At every step the x that was denoised, which with churn is the x after it, and x0; then the last x.

    k-diffusion draws at every step, whether it adds the noise or not: ours is given the draw of the same step.
    """
    (noise,) = draw(1)
    their_net, net = MixtureNet(prediction_type), MixtureNet(prediction_type)
    their_sigmas, sigmas = k_sigmas(spacing, steps, their_net), schedule.sigmas(steps, spacing, log=True)
    seen = []
    torch.manual_seed(5)
    last = getattr(k_sampling, f"sample_{sampler.__name__}")(
        k_model(their_net), noise * their_sigmas[0], their_sigmas, callback=seen.append, disable=True, **options
    )

    torch.manual_seed(5)
    draws = {float(sigma): torch.randn_like(noise) for sigma in sigmas[:-1]}
    made = sample(sampler, net, noise * sigmas[0], sigmas, lambda sigma, _: draws[float(sigma)], **options)
    denoised = [step.x0 + their["sigma_hat"] * step.eps for step, their in zip(made, seen, strict=True)]
    assert_equal([*denoised, made[-1].x], [*(their["x"] for their in seen), last])
    assert_equal([step.x0 for step in made], [their["denoised"] for their in seen])
    assert net.ts == pytest.approx(their_net.ts, rel=1e-6, abs=1e-9)


def diffusers_scheduler(kind: type[SchedulerMixin], spacing: str, steps: int, prediction_type: str) -> SchedulerMixin:
    """As SD 1 configures it, with its table in float64: in float32 sigma at t = 0 keeps four digits.

    Linspace at 1 would start at t = 0: it is trailing's 999.
    """
    spacing = "trailing" if steps == 1 and spacing == "linspace" else spacing
    scheduler = kind(**SD1, timestep_spacing=spacing, prediction_type=prediction_type)
    scheduler.alphas_cumprod = torch.from_numpy(ALPHAS_CUMPROD)
    scheduler.set_timesteps(steps)
    if kind is KDPM2AncestralDiscreteScheduler:
        with_exact_tables(scheduler)
    return scheduler


def with_exact_tables(scheduler: KDPM2AncestralDiscreteScheduler) -> None:
    """Its sigma_down, the root of a difference of squares, without the cancellation of float32.

    On paper, for its eta of 1, sigma_down is sigma_next^2 / sigma, and half way to it in log sigma is sigma_next.
    """
    sigmas = scheduler.sigmas[::2].double()
    for name, table in {"sigmas_down": sigmas[1:] ** 2 / sigmas[:-1], "sigmas_interpol": sigmas[1:]}.items():
        setattr(scheduler, name, torch.cat([table.repeat_interleave(2)[1:], torch.zeros(3, dtype=torch.float64)]))
    scheduler.timesteps[1::2] = scheduler.timesteps[2::2]


def test_diffusers_loses_sigma_down_to_float32():
    scheduler = KDPM2AncestralDiscreteScheduler(**SD1)
    scheduler.set_timesteps(2)
    sigma, sigma_next = scheduler.sigmas[:2]
    exact = sigma_next**2 / sigma
    assert abs(scheduler.sigmas_down[0] - exact) > 0.001 * exact
    with_exact_tables(scheduler)
    assert abs(scheduler.sigmas_down[0] - exact) < 1e-6 * exact


def by_diffusers(scheduler: SchedulerMixin, net: MixtureNet, noise: Tensor, steps: int) -> list[Tensor]:
    """x at every sigma, also where every second of its steps is one on the way."""
    generator = torch.Generator().manual_seed(4)
    draws = {"generator": generator} if "Ancestral" in type(scheduler).__name__ else {}
    xs = [noise * scheduler.init_noise_sigma]
    for t in scheduler.timesteps:
        out = net(scheduler.scale_model_input(xs[-1], t), t)
        xs.append(scheduler.step(out, t, xs[-1], **draws).prev_sample)
    return xs if len(xs) == steps + 1 else [*xs[:-1:2], xs[-1]]


@pytest.mark.parametrize("steps", COUNTS)
@pytest.mark.parametrize(
    ("spacing", "prediction_type"), [("leading", "epsilon"), ("trailing", "v_prediction"), ("linspace", "epsilon")]
)
@pytest.mark.parametrize("sampler", DIFFUSERS)
def test_diffusers(sampler, spacing, prediction_type, steps):
    (noise,) = draw(1)
    scheduler = diffusers_scheduler(DIFFUSERS[sampler], spacing, steps, prediction_type)
    log = "KDPM2" in type(scheduler).__name__
    their_net, net = MixtureNet(prediction_type, log), MixtureNet(prediction_type, log)
    theirs = by_diffusers(scheduler, their_net, noise, steps)
    sigmas = schedule.sigmas(steps, spacing)
    start = (1 + sigmas[0] ** 2) ** 0.5 if spacing == "leading" else sigmas[0]
    made = sample(sampler, net, noise * start, sigmas, fresh(), log)
    assert_equal([noise * start, *(step.x for step in made)], theirs)
    assert len(net.ts) == len(their_net.ts)


def test_diffusers_euler_with_churn_is_not_algorithm_2():
    """Its net is called before the noise is added, at sigma, and its eps taken for that of x_hat at sigma_hat."""
    (noise,) = draw(1)
    scheduler = diffusers_euler("trailing", 10)
    net = MixtureNet("epsilon")
    t, x = scheduler.timesteps[0], noise * scheduler.init_noise_sigma
    eps = net(scheduler.scale_model_input(x, t), t)
    generator = torch.Generator().manual_seed(4)
    theirs = scheduler.step(eps, t, x, s_churn=4.0, generator=generator).prev_sample

    sigmas = schedule.sigmas(10, "trailing")
    sigma_hat = 1.4 * sigmas[0]
    x_hat = x + (sigma_hat**2 - sigmas[0] ** 2) ** 0.5 * fresh()()
    assert_equal([x_hat + (sigmas[1] - sigma_hat) * eps], [theirs])
    step = sample(euler, net, noise * sigmas[0], sigmas, fresh(), s_churn=4.0)[0]
    torch.testing.assert_close(step.x0 + sigma_hat * step.eps, x_hat, rtol=1e-5, atol=1e-4)
    assert (step.x - theirs).abs().max() > 0.05 * theirs.abs().max()


def test_diffusers_rounds_the_timesteps_of_karras():
    """KDPM2 alone, and only those of the sigmas: half way it keeps the fraction. Hence no karras beside it above."""
    schedulers = [kind(**SD1, use_karras_sigmas=True) for kind in (KDPM2DiscreteScheduler, LMSDiscreteScheduler)]
    for scheduler in schedulers:
        scheduler.set_timesteps(10)
    rounded, kept = schedulers[0].timesteps, schedulers[1].timesteps
    assert rounded[2::2].tolist() == kept[1:].round().tolist() != kept[1:].tolist()
    assert rounded[1::2].tolist() != rounded[1::2].round().tolist()


def test_k_diffusion_forgets_the_noise_where_sigma_down_is_0():
    """With an eta that asks for more noise than sigma_next, all of x is fresh noise around x0."""
    (x,) = draw(1)
    sigmas = torch.tensor([2.0, 1.0], dtype=torch.float64)
    net = MixtureNet("epsilon")
    theirs = k_sampling.sample_dpm_2_ancestral(k_model(net), 2 * x, sigmas, eta=2.0, disable=True)
    (step,) = sample(dpm_2_ancestral, net, 2 * x, sigmas, fresh(), eta=2.0)
    assert_equal([step.x0, step.x], [theirs, theirs + fresh()()])


# What webui does with a number of steps: N_restart and K.
WEBUI = {
    1: (0, 0),
    2: (0, 0),
    3: (0, 0),
    10: (0, 0),
    19: (0, 0),
    20: (9, 1),
    25: (9, 1),
    35: (9, 1),
    36: (9, 2),
    50: (12, 2),
}


@pytest.mark.parametrize(("steps", "n", "k"), [(steps, *segment) for steps, segment in WEBUI.items()])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_restart_webui(prediction_type, steps, n, k):
    """webui's sigmas and segment for so many steps; the pieces between two draws are k-diffusion's Heun."""
    (noise,) = draw(1)
    their_net, net = MixtureNet(prediction_type), MixtureNet(prediction_type)
    model, draws, theirs = k_model(their_net), fresh(), []

    def down(x: Tensor, sigmas: Tensor) -> Tensor:
        return k_sampling.sample_heun(model, x, sigmas, callback=lambda s: theirs.append(s["x"]), disable=True)

    their_sigmas = k_sigmas("karras", steps - k * n, their_net)
    low, high = (int((their_sigmas - sigma).abs().argmin()) for sigma in (0.1, 2.0))
    x = noise * their_sigmas[0]
    if k:
        with float64():
            again = k_sampling.get_sigmas_karras(n + 1, their_sigmas[low], their_sigmas[high])[:-1]
        x = down(x, their_sigmas[: low + 1])
        for _ in range(k):
            x = down(x + (their_sigmas[high] ** 2 - their_sigmas[low] ** 2) ** 0.5 * draws(), again)
    last = down(x, their_sigmas[low if k else 0 :])

    sigmas = schedule.sigmas(steps, "linspace", log=True) if k else schedule.sigmas(steps, "karras")
    made = sample(restart, net, noise * sigmas[0], sigmas, fresh())
    assert len(made) == steps
    assert_equal([*(step.x0 + step.sigma * step.eps for step in made), made[-1].x], [*theirs, last])
    assert net.ts == pytest.approx(their_net.ts, rel=1e-6, abs=1e-9)


def test_diffusers_lms_begun_in_the_middle():
    """As image to image begins: of order 2 from its first step on, with the newest weight for want of the others."""
    (x,) = draw(1)
    scheduler = diffusers_scheduler(LMSDiscreteScheduler, "linspace", 3, "epsilon")
    scheduler.set_begin_index(1)
    net, t, (_, *sigmas) = MixtureNet("epsilon", log=False), scheduler.timesteps[1], schedule.sigmas(3)
    sigmas = torch.stack(sigmas)
    eps = net(scheduler.scale_model_input(x, t), t)
    theirs = scheduler.step(eps, t, x).prev_sample
    weight = coefficients(schedule.sigmas(3)[:2], sigmas[1])[-1]
    assert_equal([x + weight * eps], [theirs])
    step = sample(lms, net, x, sigmas, None, log=False)[0]
    assert_equal([step.x], [x + (sigmas[1] - sigmas[0]) * eps])
    assert (step.x - theirs).abs().max() > 0.01 * theirs.abs().max()


def slope(sampler: Sampler, exact: int = 0, **options: float) -> float:
    """The order of convergence to sigma_min, as in test_analytic; the first `exact` steps are sent the solution."""
    counts, errors = np.array([80, 160, 320, 640]), []
    for count in counts:
        sigmas = schedule.sigmas(count + 1, "karras")[:-1]
        x = MEAN + normal(100) * sigmas[0]
        steps = sampler(gaussian(MEAN, STD), x, sigmas, None, **options)
        step = next(steps)
        for i in range(count - 1):
            step = steps.send(flow(x, sigmas[0], step.sigma_next) if i < exact else None)
        errors.append(float((step.x - flow(x, sigmas[0], sigmas[-1])).abs().max()))
    return -float(np.polyfit(np.log(counts), np.log(errors), 1)[0])


@pytest.mark.parametrize(("sampler", "options"), [(heun, {}), (dpm_2, {}), (dpm_2_ancestral, {"eta": 0.0})])
def test_converges_with_order_2(sampler, options):
    assert 1.95 < slope(sampler, **options) < 2.05


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_lms_converges_with_its_order(order):
    """From exact first steps. By itself the first is Euler's, whose error is of order 2 and never mends."""
    assert order - 0.1 < slope(lms, exact=order - 1, order=order) < order + 0.1


def test_lms_coefficients():
    """Adams and Bashforth's on equal steps; and on any steps exact for cubics."""
    published = [[1], [-1, 3], [5, -16, 23], [-9, 37, -59, 55]]
    for numerators, denominator in zip(published, [1, 2, 12, 24], strict=True):
        past = torch.arange(len(numerators), 0, -1, dtype=torch.float64)
        expected = [-n / denominator for n in numerators]
        assert coefficients(past, torch.tensor(0.0)) == pytest.approx(expected, rel=1e-12)
    past, end = torch.tensor([9.0, 7.0, 3.0, 2.5]), torch.tensor(0.25)
    cubes = sum(c * float(p) ** 3 for c, p in zip(coefficients(past, end), past, strict=True))
    assert cubes == pytest.approx((0.25**4 - 2.5**4) / 4)


@pytest.mark.parametrize("order", [0, -1, 5, 15])
def test_lms_order_refused(order):
    with pytest.raises(ValueError, match=f"order={order}: give 1, 2, 3 or 4"):
        next(lms(gaussian(MEAN, STD), normal(4), SIGMAS, None, order=order))


def final(sampler: Sampler, std: float, x: Tensor, sigmas: Tensor, **options: float) -> Tensor:
    generator = torch.Generator().manual_seed(3)

    def noise(*_: Tensor) -> Tensor:
        return torch.randn(len(x), generator=generator, dtype=torch.float64)

    *_, last = sampler(gaussian(MEAN, std), x, sigmas, noise, **options)
    return last.x


@pytest.mark.parametrize(
    ("sampler", "options"),
    [
        *((euler, {"s_churn": 10.0}), (euler_ancestral, {}), (euler_ancestral, {"eta": 0.5})),
        *((heun, {"s_churn": 40.0}), (heun, WINDOW), (dpm_2, {"s_churn": 40.0})),
        *((dpm_2_ancestral, {}), (dpm_2_ancestral, {"eta": 0.5}), (lms, {}), (restart, {})),
        (restart, {"segments": [(3, 2, 0.1, 0.3), (10, 2, 1.0, 5.0)]}),
    ],
)
def test_distribution(sampler, options):
    """With 999 steps Euler's own error in the variance is a fifth of what is allowed under this churn, and grows with
    it: at 40 it is 2.3 %, and halves with twice the steps. Those of order 2 are right under that, too."""
    assert_distributed(final(sampler, STD, begin(SIGMAS[0]), SIGMAS, **options), MEAN, END)


@pytest.mark.parametrize(
    ("sampler", "options"),
    [
        *((euler, {"s_churn": 2.0}), (euler_ancestral, {}), (euler_ancestral, {"eta": 0.5})),
        *((heun, {"s_churn": 2.0}), (dpm_2, {"s_churn": 2.0}), (dpm_2_ancestral, {}), (dpm_2_ancestral, {"eta": 0.5})),
        *((lms, {}), (restart, {"segments": [(2, 2, 0.5, 3.0)]})),
    ],
)
def test_variance_on_the_way(sampler, options):
    """For data that is one point the steps are exact however few: x is that point + sigma * noise at every sigma."""
    sigmas = schedule.sigmas(4, "trailing", end=schedule.sigma_min)
    x = MEAN + sigmas[0] * normal(20_000)
    for i, sigma in enumerate(sigmas[1:].tolist(), 2):
        assert_distributed(final(sampler, 0.0, x, sigmas[:i], **options), MEAN, sigma)


@pytest.mark.parametrize("sampler", [heun, dpm_2, dpm_2_ancestral, lms, euler_ancestral, restart])
def test_steps_show_what_happened(sampler):
    """The prediction splits the x that the step started from: the last one, and in a restart the noise on it."""
    sigmas = schedule.sigmas(22, "karras")
    x, sigma_now = normal(100) * sigmas[0], sigmas[0]
    for step in sampler(mixture_denoiser, x, sigmas, lambda *_: torch.ones(100, dtype=torch.float64)):
        if sampler is restart and step.noise is not None:
            assert step.sigma > sigma_now
            x = x + (step.sigma**2 - sigma_now**2) ** 0.5 * step.noise
        torch.testing.assert_close(step.x0 + step.sigma * step.eps, x, rtol=1e-12, atol=1e-12)
        x, sigma_now = step.x, step.sigma_next
    assert step.sigma_next == 0


def test_eta_0_draws_nothing():
    sigmas = schedule.sigmas(7)
    x = normal(100) * sigmas[0]
    for a, b in ((euler_ancestral, euler), (dpm_2_ancestral, dpm_2)):
        pairs = zip(a(mixture_denoiser, x, sigmas, None, eta=0.0), b(mixture_denoiser, x, sigmas, None), strict=True)
        for ours, same in pairs:
            torch.testing.assert_close(ours.x, same.x, rtol=1e-12, atol=1e-12)


def test_restart_segments():
    """K times N_restart steps from the sigma nearest to t_max to that nearest to t_min; none where those are one."""
    sigmas = torch.tensor([10.0, 5.0, 2.0, 1.0, 0.5, 0.0], dtype=torch.float64)
    segments = [(3, 1, 0.45, 2.2), (2, 2, 2.1, 9.0), (1, 1, 4.9, 5.1), (4, 0, 1.0, 2.0)]
    steps = list(restart(gaussian(MEAN, STD), normal(4), sigmas, lambda *_: normal(4), segments))
    half = ((10 ** (1 / 7) + 2 ** (1 / 7)) / 2) ** 7
    a, b = (((2 ** (1 / 7) * (3 - j) + 0.5 ** (1 / 7) * j) / 3) ** 7 for j in (1, 2))
    path = [[10, 5, 2], [10, half, 2], [10, half, 2, 1, 0.5], [2, a, b, 0.5, 0]]
    expected = [pair for piece in path for pair in pairwise(piece)]
    assert [step.i for step in steps] == list(range(len(expected)))
    assert [(float(step.sigma), float(step.sigma_next)) for step in steps] == [pytest.approx(p) for p in expected]
    assert [step.i for step in steps if step.noise is not None] == [2, 4, 8]
    assert {float(s) for step in steps for s in step[1:3]} >= {10.0, 5.0, 2.0, 1.0, 0.5, 0.0}


@pytest.mark.parametrize("segment", [(0, 1, 0.1, 2.0), (3, -1, 0.1, 2.0), (3, 1, 2.0, 0.1), (3, 1, 2.0, 2.0)])
def test_restart_segment_refused(segment):
    with pytest.raises(ValueError, match=re.escape(f"segment {segment}: give (N_restart, K, t_min, t_max)")):
        next(restart(gaussian(MEAN, STD), normal(4), SIGMAS, None, [segment]))


def test_churn_holds_at_both_ends_of_its_window():
    """Algorithm 2: S_tmin <= sigma <= S_tmax."""
    sigmas = torch.tensor([3.0, 2.0, 1.0, 0.5], dtype=torch.float64)
    steps = sample(
        euler,
        MixtureNet("epsilon"),
        normal(4),
        sigmas,
        lambda *_: torch.ones(4).double(),
        s_churn=1.0,
        s_tmin=1.0,
        s_tmax=2.0,
    )
    assert [step.noise is not None for step in steps] == [False, True, True]
