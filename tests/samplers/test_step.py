"""The loop is open: what a consumer sends back is what a sampler goes on from."""

import inspect

import pytest
import torch
from samplers.reference import mixture

from ldm.samplers import SAMPLERS, Prediction, Schedule, Step, after

SIGMAS = Schedule().sigmas(6)
ALL = pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)


def denoise(x, sigma):
    x0 = mixture(x, sigma)
    return Prediction(x0, (x - x0) / sigma, x - x0, x0)


def draws():
    generator = torch.Generator().manual_seed(3)
    return lambda *_: torch.randn(2, 4, 4, 4, generator=generator, dtype=torch.float64)


def run(sampler, change=None, at=2):
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


@ALL
def test_another_x0(sampler):
    """x is moved by what x0 is moved."""
    by_x0 = run(sampler, lambda steps, step: steps.send(step._replace(x0=step.x0 + 1)))
    by_x = run(sampler, lambda steps, step: steps.send(step.x + 1))
    for a, b in zip(by_x0, by_x, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


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
    assert after(step, None) is x and (after(step, x + 1) == 6).all()
    assert (after(step, step._replace(x0=x0 + 3)) == 8).all()
    assert (after(step, step._replace(x=x - 1, x0=x0 + 3)) == 7).all()
