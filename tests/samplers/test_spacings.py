"""The spacings of k-diffusion, ComfyUI and webui, against their formulas and the packages that can be asked."""

import math

import numpy as np
import pytest
import scipy.stats
import torch
from diffusers import EulerDiscreteScheduler
from diffusers.schedulers.scheduling_utils import AysSchedules
from samplers.reference import ALL, COUNTS, LOG_TABLE, SD1, TABLE, MixtureNet, float64, k_model, k_sampling
from torch import Tensor

from ldm.samplers import Schedule
from ldm.samplers.schedule import TIMESTEPS, beta_quantile

LOW, HIGH = TABLE[0], TABLE[-1]
EVERY = range(1, 1001)

schedule = Schedule()


def assert_near(ours: Tensor, theirs: Tensor | np.ndarray, tolerance: float = 1e-9) -> None:
    np.testing.assert_allclose(ours, theirs, rtol=tolerance, atol=0)


@pytest.mark.parametrize("steps", COUNTS)
def test_k_diffusion(steps):
    with float64():
        exponential = k_sampling.get_sigmas_exponential(steps, LOW, HIGH)
        polyexponential = {rho: k_sampling.get_sigmas_polyexponential(steps, LOW, HIGH, rho) for rho in (1.0, 0.5, 3.0)}
    assert_near(schedule.sigmas(steps, "exponential"), exponential)
    assert_near(schedule.sigmas(steps, "polyexponential"), polyexponential[1.0])
    for rho, theirs in polyexponential.items():
        assert_near(schedule.sigmas(steps, "polyexponential", rho=rho), theirs)


def diffusers_sigmas(steps: int, **config: bool) -> Tensor:
    """In float32; with its range given, for it takes that of the spaced timesteps, which for one step is one sigma."""
    scheduler = EulerDiscreteScheduler(**SD1, **config, sigma_min=LOW, sigma_max=HIGH)
    scheduler.set_timesteps(steps)
    return scheduler.sigmas


@pytest.mark.parametrize("steps", COUNTS)
def test_diffusers_exponential(steps):
    assert_near(schedule.sigmas(steps, "exponential"), diffusers_sigmas(steps, use_exponential_sigmas=True), 1e-6)


@pytest.mark.parametrize("steps", COUNTS)
def test_beta_quantile(steps):
    """To scipy's last digits; and in diffusers' "beta", which spreads sigma itself over the same distribution."""
    p = torch.linspace(1, 0, steps, dtype=torch.float64)
    assert_near(beta_quantile(p), scipy.stats.beta.ppf(p, 0.6, 0.6), 1e-13)
    theirs = diffusers_sigmas(steps, use_beta_sigmas=True)[:-1]
    assert_near(LOW + beta_quantile(p) * (HIGH - LOW), theirs, 1e-6)


def comfy_beta(steps: int) -> np.ndarray:
    t = np.rint(999 * scipy.stats.beta.ppf(1 - np.linspace(0, 1, steps, endpoint=False), 0.6, 0.6))
    return t[np.insert(np.diff(t) != 0, 0, True)]


def test_beta_is_comfy_ui():
    """ComfyUI leaves out a timestep that repeats the last one; we take as many steps as were asked for."""
    for steps in EVERY:
        ours, theirs = TIMESTEPS["beta"](steps), comfy_beta(steps)
        assert len(theirs) < steps or np.array_equal(ours, theirs)
    assert min(steps for steps in EVERY if len(comfy_beta(steps)) < steps) == 139
    ours, theirs = TIMESTEPS["beta"](200), comfy_beta(200)
    assert len(theirs) == 199 and ours[0] == 999 and ours[-1] == 0 and set(theirs) <= set(ours.tolist())


def test_simple_is_comfy_ui():
    """Its int(k * (1000 / n)) slips under whole numbers, for 70 counts by one timestep somewhere; ours is exact."""
    slipped = []
    for steps in EVERY:
        ours = TIMESTEPS["simple"](steps).tolist()
        assert ours == [999 - 1000 * k // steps for k in range(steps)]
        theirs = [999 - int(k * (1000 / steps)) for k in range(steps)]
        assert all(0 <= b - a <= 1 for a, b in zip(ours, theirs, strict=True))
        if ours != theirs:
            slipped.append(steps)
    assert len(slipped) == 70 and min(slipped) == 38


@pytest.mark.parametrize("steps", COUNTS)
def test_sgm_uniform(steps):
    """webui asks k-diffusion's schedule, log-linear between timesteps, for n + 1 of them and drops the last."""
    with float64():
        theirs = k_model(MixtureNet("epsilon")).get_sigmas(steps + 1)[:-2]
    sigmas, t = schedule.sigmas(steps, "sgm_uniform", log=True)[:-1], np.linspace(999, 0, steps + 1)[:-1]
    assert_near(sigmas, theirs, 1e-6)  # its t are float32
    assert_near(sigmas, np.exp(np.interp(t, ALL, LOG_TABLE)))
    assert_near(schedule.sigmas(steps, "sgm_uniform")[:-1], np.interp(t, ALL, TABLE))


@pytest.mark.parametrize("steps", COUNTS)
def test_kl_optimal(steps):
    """webui divides by n - 1, and so by 0 for one step."""
    part = np.arange(steps) / max(steps - 1, 1)
    theirs = np.tan(part * math.atan(LOW) + (1 - part) * math.atan(HIGH))
    assert_near(schedule.sigmas(steps, "kl_optimal")[:-1], theirs)


@pytest.mark.parametrize(
    ("spacing", "published"), [("align_your_steps", "StableDiffusion"), ("align_your_steps_xl", "StableDiffusionXL")]
)
def test_align_your_steps(spacing, published):
    """Ten steps are at the timesteps that were published; the rounded sigmas beside them, as webui has, are off by 2%.

    Between them it goes straight in log sigma, as NVIDIA's and ComfyUI's code; webui puts the last level among its n.
    """
    sigmas = schedule.sigmas(10, spacing)
    assert_near(sigmas[:-1], TABLE[AysSchedules[f"{published}Timesteps"]])
    rounded = torch.tensor(AysSchedules[f"{published}Sigmas"][:-1], dtype=torch.float64)
    assert 0.003 < float((sigmas[:-1] / rounded - 1).abs().max()) < 0.02
    assert_near(schedule.sigmas(20, spacing)[:-1:2], sigmas[:-1])
    assert_near(schedule.sigmas(20, spacing)[1:-2:2], (sigmas[:-2] * sigmas[1:-1]) ** 0.5)
    assert_near(schedule.sigmas(5, spacing)[:-1], sigmas[:-1:2])
    for steps in COUNTS:
        levels = np.log([*sigmas[:-1].tolist(), 0.0291671582])
        theirs = np.exp(np.interp(np.linspace(0, 10, steps + 1), np.arange(11), levels))[:-1]
        assert_near(schedule.sigmas(steps, spacing)[:-1], theirs)


def test_rho_is_refused_where_there_is_none():
    with pytest.raises(ValueError, match=r"^rho=3.0: kl_optimal has none, .*karras or polyexponential$"):
        schedule.sigmas(20, "kl_optimal", rho=3.0)
