"""The loop is open: what a consumer sends back is what a sampler goes on from."""

import inspect
from functools import partial

import pytest
import torch
from samplers.reference import mixture

from ldm.samplers import SAMPLERS, Prediction, Schedule, Step, after

SIGMAS = Schedule().sigmas(6)
REMEMBER_X0 = ("dpmpp_2m", "dpmpp_2m_sde", "dpmpp_2m_sde_heun", "dpmpp_3m_sde", "unipc")
REMEMBER_EPS = ("lms", "plms", "deis")
ALL = pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)


def denoise(x, sigma):
    x0 = mixture(x, sigma)
    return Prediction(x0, (x - x0) / sigma, x - x0, x0)


def draws():
    generator = torch.Generator().manual_seed(3)
    return lambda *_: torch.randn(2, 4, 4, 4, generator=generator, dtype=torch.float64)


def run(sampler, change=None, at=2, denoise=denoise):
    """x after every step; `change(steps, step)` at one of them returns the next."""
    noise = draws()
    steps = sampler(denoise, noise() * SIGMAS[0], SIGMAS, noise)
    step, xs = next(steps), []
    while step is not None:
        xs.append(step.x.clone())
        try:
            step = change(steps, step) if change is not None and len(xs) == at else next(steps)
        except StopIteration:
            step = None
    return xs


@ALL
def test_nothing_sent_is_the_same_sent(sampler):
    plain = run(sampler)
    assert len(plain) == 6 or sampler is SAMPLERS["dpm_adaptive"]
    for change in (
        lambda steps, step: steps.send(step.x.clone()),
        lambda steps, step: steps.send(step),
        lambda steps, step: steps.send(step._replace(x0=step.x0.clone())),
    ):
        for a, b in zip(run(sampler, change), plain, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@ALL
def test_another_x(sampler):
    """Sent or changed in place, the loop goes on from there: the next evaluation sees it."""
    plain = run(sampler)
    sent = run(sampler, lambda steps, step: steps.send(step.x + 1))
    in_place = run(sampler, lambda steps, step: (step.x.add_(1), next(steps))[1])
    for a, b in zip(sent, in_place, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert torch.equal(torch.stack(sent[:2]), torch.stack(plain[:2])) and (sent[2] - plain[2]).abs().max() > 0.1


@pytest.mark.parametrize("name", [name for name in SAMPLERS if name not in REMEMBER_X0])
def test_another_x0(name):
    """x is moved by what x0 is moved; that is all where no x0 is remembered."""
    sampler = SAMPLERS[name]
    by_x0 = run(sampler, lambda steps, step: steps.send(step._replace(x0=step.x0 + 1)))
    by_x = run(sampler, lambda steps, step: steps.send(step.x + 1))
    for a, b in zip(by_x0, by_x, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("at", [1, 2, 3])
@pytest.mark.parametrize("name", REMEMBER_X0 + REMEMBER_EPS)
def test_another_x0_is_remembered(name, at):
    """As if it had been predicted, with the same eps; to x happens what `after` says in both runs."""
    sampler = SAMPLERS[name]
    options = {"order": 3} if name in ("unipc", "deis") else {}
    sent = []

    def send_x0(steps, step):
        sent.append(step.x + 1)
        return steps.send(step._replace(x0=step.x0 + 1))

    by_x0 = run(partial(sampler, **options), send_x0, at)
    by_x = run(partial(sampler, **options), lambda steps, step: steps.send(step.x + 1), at)

    def predicts_it(x, sigma):
        prediction = denoise(x, sigma)
        return prediction._replace(x0=prediction.x0 + (sigma == SIGMAS[at - 1]))

    predicted = run(partial(sampler, **options), lambda steps, step: steps.send(sent[0]), at, predicts_it)
    for a, b in zip(by_x0[at:], predicted[at:], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert ((by_x0[at] - by_x[at]).abs().max() < 1e-9) == (name in REMEMBER_EPS)


@ALL
@pytest.mark.parametrize("wrong", [torch.zeros(2), torch.zeros(1, 4, 4, 4)])
def test_another_shape(sampler, wrong):
    with pytest.raises(ValueError, match=r"step 1 was sent x .*: send what has the shape of x, \(2, 4, 4, 4\)"):
        run(sampler, lambda steps, step: steps.send(wrong))


@ALL
def test_stopped_half_way(sampler):
    noise = draws()
    steps = sampler(denoise, noise() * SIGMAS[0], SIGMAS, noise)
    next(steps)
    steps.close()
    assert inspect.getgeneratorstate(steps) == inspect.GEN_CLOSED


@ALL
def test_the_noise_is_shown(sampler):
    """What was drawn last in a step; nothing where nothing was."""
    drawn = []
    noise = draws()

    def watched(*sigmas):
        drawn.append(noise())
        return drawn[-1]

    for step in sampler(denoise, noise() * SIGMAS[0], SIGMAS, watched):
        if drawn:
            assert step.noise is not None and torch.equal(step.noise, drawn[-1])
        else:
            assert step.noise is None
        drawn.clear()


def test_after_by_hand():
    x, x0 = torch.full((1, 1, 2, 2), 5.0), torch.full((1, 1, 2, 2), 2.0)
    step = Step(0, torch.tensor(3.0), torch.tensor(1.0), x, x0, x)
    assert after(step, None) is step and (after(step, x + 1).x == 6).all()
    moved = after(step, step._replace(x0=x0 + 3))
    assert (moved.x == 8).all() and (moved.x0 == 5).all() and moved.eps is step.eps
    both = after(step, step._replace(x=x - 1, x0=x0 + 3))
    assert (both.x == 7).all() and (both.x0 == 5).all()
    with pytest.raises(ValueError, match="step 0 was sent x with NaN or infinity"):
        after(step, x.double() * 1e300)  # more than the dtype of x holds
