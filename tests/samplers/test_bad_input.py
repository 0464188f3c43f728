"""What every sampler refuses, and how: sigmas, what the denoiser returns, what the consumer sends."""

import inspect
import math
import re

import numpy as np
import pytest
import torch
from samplers.test_step import ALL, SIGMAS, denoise, draws

from ldm.samplers import SAMPLERS, Prediction, Schedule, net_denoiser
from ldm.samplers.euler import ancestral

SHAPE = (2, 4, 4, 4)
CHURN = [(SAMPLERS[name], {"s_churn": 1.0}) for name in ("euler", "heun", "dpm_2")]
FROM_X0 = ("ddim", "euler_cfg_pp", "dpmpp_2m")
TWICE = ("heun", "dpm_2", "dpm_2_ancestral", "plms", "dpmpp_2s_ancestral", "dpmpp_sde", "restart", "dpm_adaptive")


class Watched:
    """The denoiser of test_step, and how often it was asked; `result` changes what it returns from call `at` on."""

    def __init__(self, result=lambda prediction: prediction, at=0):
        self.result = result
        self.at = at
        self.calls = 0

    def __call__(self, x, sigma):
        self.calls += 1
        prediction = denoise(x, sigma)
        return self.result(prediction) if self.calls > self.at else prediction


def begun(sampler, sigmas=SIGMAS, watched=None, **options):
    noise = draws()
    return sampler(watched or denoise, noise() * 14.6, sigmas, noise, **options)


# ------------------------------------------------------------------------------------------------ sigmas

BAD_SIGMAS = {
    "none": ([], "sigmas of shape (0,): give those of the steps and the last, (steps + 1,)"),
    "two rows": (
        [[3.0, 1.0], [3.0, 0.0]],
        "sigmas of shape (2, 2): give those of the steps and the last, (steps + 1,)",
    ),
    "no dimension": (3.0, "sigmas of shape (): give those of the steps and the last, (steps + 1,)"),
    "NaN": ([3.0, math.nan, 0.0], "sigmas[1] is nan: give finite ones of 0 or more"),
    "NaN alone": ([math.nan], "sigmas[0] is nan: give finite ones of 0 or more"),
    "infinite": ([math.inf, 1.0, 0.0], "sigmas[0] is inf: give finite ones of 0 or more"),
    "negative": ([3.0, 1.0, -0.5], "sigmas[2] is -0.5: give finite ones of 0 or more"),
    "repeated": ([3.0, 1.0, 1.0, 0.0], "sigmas[1] and [2] are 1.0 and 1.0: sigmas must fall"),
    "repeated at first": ([3.0, 3.0, 1.0, 0.0], "sigmas[0] and [1] are 3.0 and 3.0: sigmas must fall"),
    "0 twice": ([3.0, 1.0, 0.0, 0.0], "sigmas[2] and [3] are 0.0 and 0.0: sigmas must fall"),
    "down and up": ([3.0, 1.0, 2.0, 0.0], "sigmas[1] and [2] are 1.0 and 2.0: sigmas must fall"),
}


@ALL
@pytest.mark.parametrize(("sigmas", "message"), BAD_SIGMAS.values(), ids=BAD_SIGMAS)
def test_sigmas(sampler, sigmas, message):
    watched = Watched()
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        next(begun(sampler, torch.tensor(sigmas, dtype=torch.float64), watched))
    assert watched.calls == 0


@pytest.mark.parametrize("sampler", [SAMPLERS[name] for name in ("ddim", "euler", "dpmpp_2m", "dpm_adaptive")])
def test_up_and_down(sampler):
    message = r"^sigmas\[1\] and \[2\] are 3.0 and 2.0: sigmas must fall from step to step, or rise from step to step"
    with pytest.raises(ValueError, match=message):
        next(begun(sampler, torch.tensor([1.0, 3.0, 2.0])))


@pytest.mark.parametrize(
    ("sampler", "options"),
    [
        *[(SAMPLERS[name], {}) for name in ("restart", "lcm", "tcd", "dpmpp_2m_sde", "dpmpp_3m_sde")],
        *((SAMPLERS["dpm_adaptive"], {"eta": 1.0}), *CHURN),
    ],
)
def test_only_down(sampler, options):
    watched = Watched()
    message = r"^sigmas\[0\] and \[1\] are 1.0 and 2.0: sigmas must fall here, since fresh noise cannot be taken out"
    with pytest.raises(ValueError, match=message):
        next(begun(sampler, torch.tensor([1.0, 2.0, 3.0]), watched, **options))
    assert watched.calls == 0


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *(("ddpm", {}), ("ddim", {"eta": 0.5}), ("euler_ancestral", {}), ("dpm_2_ancestral", {})),
        *(("dpmpp_2s_ancestral", {}), ("dpmpp_sde", {})),
    ],
)
def test_no_noise_upwards(name, options):
    watched = Watched()
    with pytest.raises(ValueError, match=r"^eta=.* with sigma rising from 1.0000 to 2.0000: fresh noise cannot be"):
        next(begun(SAMPLERS[name], torch.tensor([1.0, 2.0, 3.0]), watched, **options))
    assert watched.calls == 0


def test_adaptive_ends_where_no_step_is_short_enough():
    """For float32 x a tolerance under its own digits."""
    x = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0)) * 3

    def rough(x, sigma):
        x0 = (x * 1e4).round() / 2e4
        return Prediction(x0, (x - x0) / sigma)

    with pytest.raises(
        FloatingPointError, match=r"no step is short enough for rtol=1e-09 and atol=1e-09 in torch.float32"
    ):
        list(SAMPLERS["dpm_adaptive"](rough, x, torch.tensor([3.0, 0.1]), None, rtol=1e-9, atol=1e-9))


@ALL
@pytest.mark.parametrize("sigma", [3.0, 0.0])
def test_one_sigma_is_no_step(sampler, sigma):
    watched = Watched()
    assert list(begun(sampler, torch.tensor([sigma]), watched)) == []
    assert watched.calls == 0


@ALL
@pytest.mark.parametrize(("steps", "end"), [(1, 0.0), (1, 0.01), (2, 0.0), (2, 0.01), (1000, 0.0)])
def test_any_count_to_0_or_above(sampler, steps, end):
    """None needs a last sigma of 0, and none must not have it."""
    sigmas = torch.cat([Schedule().sigmas(steps, "karras")[:-1], torch.tensor([end], dtype=torch.float64)])
    made = list(begun(sampler, sigmas))
    if sampler is not SAMPLERS["dpm_adaptive"]:
        assert [step.i for step in made] == list(range(steps))
    assert made[0].sigma == sigmas[0] and made[-1].sigma_next == sigmas[-1]
    assert all(torch.isfinite(step.x).all() for step in made)


def test_ancestral_parts():
    """sigma_down of distant sigmas, all of whose digits the difference of two squares would lose to float32."""
    sigma, sigma_next = torch.tensor(14.6), torch.tensor(0.005)
    assert ancestral(sigma, sigma_next, 1.0)[0].item() == pytest.approx(0.005**2 / 14.6, rel=1e-6)
    for eta in (0.3, 1.0, 2.0):
        down, up = ancestral(sigma.double(), sigma.double() / 2, eta)
        assert (down**2 + up**2).item() == pytest.approx(sigma.item() ** 2 / 4, rel=1e-12)
    assert [s.item() for s in ancestral(sigma_next, sigma, 0.0)] == [sigma.item(), 0.0]


# ------------------------------------------------------------------------------------------------ the denoiser


@ALL
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("field", ["x0", "eps"])
@pytest.mark.parametrize("at", [0, 5])
def test_denoiser_not_finite(sampler, at, field, value):
    """The loop ends with the step in which it happened."""

    def broken(prediction):
        tensor = getattr(prediction, field).clone()
        tensor[1, 2, 3, 3] = value
        return prediction._replace(**{field: tensor})

    watched, steps = Watched(broken, at), []
    with pytest.raises(FloatingPointError) as error:
        for step in begun(sampler, watched=watched):
            steps.append((step, watched.calls))
    shown = sampler is not SAMPLERS["dpm_adaptive"] or field == "x0"  # its eps are looked at before a step is taken
    i = len(steps) - shown
    found = re.match(
        r"NaN or infinity in step (\d+), at sigma=([\d.]+): look at what the denoiser returns", str(error.value)
    )
    assert int(found[1]) == i
    if shown:
        step, calls = steps[-1]
        assert float(found[2]) == pytest.approx(float(step.sigma), abs=1e-4) and watched.calls == calls
        assert all(torch.isfinite(step.x).all() for step, _ in steps[:-1])


@ALL
def test_last_step_not_finite(sampler):
    """Also where nothing comes after it."""
    watched = Watched()
    list(begun(sampler, watched=watched))
    watched = Watched(lambda prediction: Prediction(prediction.x0 * math.nan, prediction.eps), watched.calls - 1)
    with pytest.raises(FloatingPointError, match=r"NaN or infinity in step \d+, at sigma=0.0292"):
        list(begun(sampler, watched=watched))


@ALL
def test_net_of_another_shape(sampler):
    """One picture for two."""
    net_denoise = net_denoiser(lambda x, t, context: x[:1], torch.zeros(1), Schedule())
    with pytest.raises(
        ValueError, match=r"^the UNet returned \(1, 4, 4, 4\) for x \(2, 4, 4, 4\): it must keep the shape"
    ):
        list(begun(sampler, watched=net_denoise))


@pytest.mark.parametrize("sampler", [SAMPLERS[name] for name in SAMPLERS if name not in FROM_X0])
def test_denoiser_of_another_shape(sampler):
    """Where torch would spread one picture over two. Those that make x of x0 and eps alone go on in the new shape."""
    watched = Watched(lambda prediction: Prediction(*(part[:1] for part in prediction)))
    message = r"^step 0 predicted x0 \(1, 4, 4, 4\) and eps \(1, 4, 4, 4\): a denoiser returns the shape of x, \(2, 4,"
    with pytest.raises(ValueError, match=message):
        list(begun(sampler, watched=watched))
    assert watched.calls <= (3 if sampler in [SAMPLERS[name] for name in TWICE] else 1)


# ------------------------------------------------------------------------------------------------ the consumer

BAD_SENT = {
    "shape": (torch.zeros(1, 4, 4, 4), "x (1, 4, 4, 4) torch.float32 on cpu"),
    "array": (np.zeros(SHAPE), "a ndarray: send an x as a tensor, or a Step"),
    "text": ("stop", "a str: send an x as a tensor, or a Step"),
    "NaN": (torch.full(SHAPE, math.nan), "x with NaN or infinity"),
    "infinite": (torch.full(SHAPE, math.inf), "x with NaN or infinity"),
    "whole numbers": (torch.zeros(SHAPE, dtype=torch.int64), "x (2, 4, 4, 4) torch.int64 on cpu"),
    "complex": (torch.zeros(SHAPE, dtype=torch.complex64), "x (2, 4, 4, 4) torch.complex64 on cpu"),
    "device": (torch.zeros(SHAPE, device="meta"), "x (2, 4, 4, 4) torch.float32 on meta"),
}
STEP_SENT = [name for name in BAD_SENT if name != "text"]


@ALL
@pytest.mark.parametrize(("sent", "said"), BAD_SENT.values(), ids=BAD_SENT)
def test_bad_x(sampler, sent, said):
    watched = Watched()
    steps = begun(sampler, watched=watched)
    next(steps)
    calls = watched.calls
    with pytest.raises(ValueError, match=f"^step 0 was sent {re.escape(said)}"):
        steps.send(sent)
    assert watched.calls == calls and inspect.getgeneratorstate(steps) == inspect.GEN_CLOSED


@ALL
@pytest.mark.parametrize("name", STEP_SENT)
def test_bad_x0(sampler, name):
    sent, said = BAD_SENT[name]
    said = "x0 a ndarray: send what" if name == "array" else said.replace("x ", "x0 ", 1)
    steps = begun(sampler)
    step = next(steps)
    with pytest.raises(ValueError, match=f"^step 0 was sent {re.escape(said)}"):
        steps.send(step._replace(x0=sent))


@ALL
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_another_dtype_is_converted(sampler, dtype):
    steps, same = begun(sampler), begun(sampler)
    x = next(steps).x.to(dtype)
    next(same)
    a, b = steps.send(x), same.send(x.double())
    assert a.x.dtype == torch.float64 and torch.equal(a.x, b.x)


@ALL
def test_stopped_half_way(sampler):
    """Nothing is evaluated any more, nothing drawn, and nothing waits."""
    watched = Watched()
    steps = begun(sampler, watched=watched)
    next(steps)
    calls = watched.calls
    steps.close()
    assert inspect.getgeneratorstate(steps) == inspect.GEN_CLOSED and list(steps) == []
    assert watched.calls == calls
