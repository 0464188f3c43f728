"""DPM-Solver++ and its stochastic kinds beside k-diffusion's and diffusers', and on paper."""

import numpy as np
import pytest
import torch
from samplers.reference import MixtureNet, gaussian, k_model, k_sampling
from samplers.test_analytic import MEAN, STD
from samplers.test_parity import assert_equal, draw, run
from torch import Tensor

from ldm.samplers import (
    PREDICTION_TYPES,
    Schedule,
    dpmpp_2m,
    dpmpp_2m_sde,
    dpmpp_2s_ancestral,
    dpmpp_3m_sde,
    dpmpp_sde,
)

STEPS = (1, 2, 3, 10, 25, 50)

schedule = Schedule()

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
