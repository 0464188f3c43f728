"""Backwards: a deterministic sampler on rising sigmas goes from a picture to the noise that it is made of."""

from collections.abc import Callable

import diffusers
import numpy as np
import pytest
import torch
from samplers.reference import ALPHAS_CUMPROD, SD1, MixtureNet, gaussian
from samplers.test_analytic import MEAN, STD, flow, normal
from samplers.test_parity import CONTEXT, assert_equal, draw, schedule
from torch import Tensor

from ldm.samplers import PREDICTION_TYPES, SAMPLERS, Denoiser, Prediction, Step, ddim, net_denoiser

# The orders published. On the way up the first steps, which lower that of a multistep sampler, are short: what is shown
# is often more.
ORDERS = {
    **{"ddim": 1, "euler": 1, "euler_ancestral": 1, "euler_cfg_pp": 1},
    **{"heun": 2, "dpm_2": 2, "dpm_2_ancestral": 2, "lms": 2, "plms": 2, "unipc": 2, "deis": 2},
    **{
        "dpmpp_2s_ancestral": 2,
        "dpmpp_sde": 2,
        "dpmpp_2m": 2,
        "dpmpp_2m_sde": 2,
        "dpmpp_2m_sde_heun": 2,
        "dpmpp_3m_sde": 2,
    },
}
ETA_0 = (
    "euler_ancestral",
    "dpm_2_ancestral",
    "dpmpp_2s_ancestral",
    "dpmpp_sde",
    "dpmpp_2m_sde",
    "dpmpp_2m_sde_heun",
    "dpmpp_3m_sde",
)
MULTISTEP = ("lms", "plms", "unipc", "deis", "dpmpp_2m", "dpmpp_2m_sde", "dpmpp_2m_sde_heun", "dpmpp_3m_sde")
INVERTERS = pytest.mark.parametrize("name", ORDERS)


def mixture_denoiser(x: Tensor, sigma: Tensor) -> Prediction:
    """That of samplers.reference, with an eps that does not divide by sigma: it has a value at sigma 0."""
    mean, std = torch.tensor([-0.5, 1.2, 2.0], dtype=x.dtype), torch.tensor([0.5, 0.3, 0.8], dtype=x.dtype)
    weight = torch.tensor([0.3, 0.5, 0.2], dtype=x.dtype)
    variance = std**2 + sigma**2
    off = (x[..., None] - mean) / variance
    share = (weight.log() - variance.log() / 2 - off**2 * variance / 2).softmax(-1)
    eps = sigma * (share * off).sum(-1)
    return Prediction(x - sigma * eps, eps)


def rising(steps: int) -> Tensor:
    return schedule.sigmas(steps + 1, "karras")[:-1].flip(0)


def from_clean(steps: int) -> Tensor:
    """From sigma 0, in steps that get shorter towards it, the first the most: its error then does not count."""
    return 10 * torch.linspace(0, 1, steps + 1, dtype=torch.float64) ** 3


def go(name: str, denoise: Denoiser, x: Tensor, sigmas: Tensor) -> list[Step]:
    return list(SAMPLERS[name](denoise, x, sigmas, None, **({"eta": 0.0} if name in ETA_0 else {})))


@INVERTERS
@pytest.mark.parametrize("sigmas", [rising, from_clean])
def test_converges_upwards(sigmas, name):
    """To the exact flow of Gaussian data, at the sampler's order or better, and not better where it has one step."""
    x = MEAN + STD * normal(50)

    def error(steps: int) -> float:
        s = sigmas(steps)
        return float((go(name, gaussian(MEAN, STD), x, s)[-1].x - flow(x, s[0], s[-1])).abs().max())

    order = slope(error)
    assert ORDERS[name] - 0.1 < order
    assert order < ORDERS[name] + 0.1 or name in MULTISTEP


def slope(error: Callable[[int], float]) -> float:
    """Of log error against log steps."""
    counts = [64, 128, 256]
    return -float(np.polyfit(np.log(counts), np.log([error(count) for count in counts]), 1)[0])


def round_trip(name: str, sigmas: Tensor) -> Tensor:
    """How far x on the way down is from x on the way up, at each sigma, for the nonlinear mixture."""
    x = MEAN + STD * normal(50)
    up = torch.stack([x, *(step.x for step in go(name, mixture_denoiser, x, sigmas))])
    down = torch.stack([up[-1], *(step.x for step in go(name, mixture_denoiser, up[-1], sigmas.flip(0)))])
    return (up - down.flip(0)).abs().amax(1)


@INVERTERS
@pytest.mark.parametrize("sigmas", [rising, from_clean])
def test_round_trip(sigmas, name):
    """From picture to noise to picture: back at each sigma, at the sampler's order. Those of even order lose less."""
    assert slope(lambda steps: float(round_trip(name, sigmas(steps)).max())) > ORDERS[name] - 0.1
    errors = round_trip(name, sigmas(128))
    assert errors[-1] == 0 and errors.max() < (0.1 if ORDERS[name] == 1 else 1e-3) * STD


@INVERTERS
def test_first_step_from_clean_is_euler_s(name):
    """Of the logarithm's samplers; Heun's and PLMS's have their second evaluation, which needs none."""
    x = MEAN + STD * normal(50)
    sigmas = torch.tensor([0.0, 0.5, 1.0, 2.0], dtype=torch.float64)

    asked = []

    def denoise(x: Tensor, sigma: Tensor) -> Prediction:
        asked.append(float(sigma))
        return Prediction(x - sigma * torch.cos(x), torch.cos(x))  # not 0 at sigma 0, as an untrue net's

    first = go(name, denoise, x, sigmas)[0].x
    assert asked.count(0.0) == 1
    expected = x + 0.5 * torch.cos(x)
    if name in ("heun", "plms"):
        expected = x + 0.25 * (torch.cos(x) + torch.cos(expected))
    torch.testing.assert_close(first, expected, rtol=0, atol=1e-12)


# ---------------------------------------------------------------------------------------------- diffusers' DDIMInverse


def inverse_scheduler(steps: int, clean: bool, prediction_type: str = "epsilon") -> diffusers.DDIMInverseScheduler:
    """As SD 1 configures it, its table in float64. clean: from sigma 0 and not from that of t = 0."""
    scheduler = diffusers.DDIMInverseScheduler(
        **SD1, clip_sample=False, set_alpha_to_one=clean, prediction_type=prediction_type
    )
    scheduler.alphas_cumprod = torch.from_numpy(ALPHAS_CUMPROD)
    scheduler.initial_alpha_cumprod = torch.tensor(1.0 if clean else ALPHAS_CUMPROD[0], dtype=torch.float64)
    scheduler.set_timesteps(steps)
    return scheduler


def inverse_sigmas(scheduler: diffusers.DDIMInverseScheduler) -> Tensor:
    a = torch.cat([scheduler.initial_alpha_cumprod[None], scheduler.alphas_cumprod[scheduler.timesteps]])
    return ((1 - a) / a).sqrt()


def by_diffusers(scheduler: diffusers.DDIMInverseScheduler, net: MixtureNet, x: Tensor) -> list[Tensor]:
    """x at every sigma, in its variance-preserving scale."""
    xs = [x]
    for t in scheduler.timesteps:
        xs.append(scheduler.step(net(xs[-1], t), t, xs[-1]).prev_sample)
    return xs


@pytest.mark.parametrize("steps", [1, 2, 3, 10, 25, 50])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("clean", [False, True])
def test_ddim_inverse_diffusers(clean, prediction_type, steps):
    """The same predictions to both: it asks the net at the timestep that it goes to, not at that where x is."""
    (latents,) = draw(1)
    scheduler = inverse_scheduler(steps, clean, prediction_type)
    sigmas = inverse_sigmas(scheduler)
    scales = (1 + sigmas**2) ** 0.5
    their_net, net = MixtureNet(prediction_type), MixtureNet(prediction_type)
    theirs = by_diffusers(scheduler, their_net, latents / scales[0])
    to = dict(zip(sigmas.tolist(), scheduler.timesteps, strict=False))

    def denoise(x: Tensor, sigma: Tensor) -> Prediction:
        ahead = net_denoiser(lambda x, t, context: net(x, to[float(sigma)]), CONTEXT, schedule, prediction_type)
        return ahead(x, sigma)

    ours = [latents, *(step.x for step in ddim(denoise, latents, sigmas, None))]
    assert_equal([x / scale for x, scale in zip(ours, scales, strict=True)], theirs)
    assert net.ts == their_net.ts and len(net.ts) == steps


def test_difference_ddim_inverse_asks_ahead():
    """Its net is told t = 1, 101, ..., the ends of its steps; ours the sigma of their beginnings: 0, 1, 101, ..."""
    (latents,) = draw(1)
    scheduler = inverse_scheduler(10, clean=False)
    sigmas = inverse_sigmas(scheduler)
    scales = (1 + sigmas**2) ** 0.5
    their_net, net = MixtureNet("epsilon"), MixtureNet("epsilon")
    theirs = by_diffusers(scheduler, their_net, latents / scales[0])
    *_, last = ddim(net_denoiser(net, CONTEXT, schedule), latents, sigmas, None)
    assert their_net.ts == [1, *range(101, 1000, 100)]
    assert net.ts == pytest.approx([0, *their_net.ts[:-1]], abs=1e-6)
    assert (last.x / scales[-1] - theirs[-1]).abs().max() > 0.01
    unmoved = scheduler.step(torch.zeros_like(latents), 501, latents).prev_sample
    expected = latents * (ALPHAS_CUMPROD[501] / ALPHAS_CUMPROD[401]) ** 0.5
    torch.testing.assert_close(unmoved, expected, rtol=1e-12, atol=0)  # the step given as 501 goes from 401 to 501
