"""The step-by-step comparisons with k-diffusion and diffusers once more, on the default model in the mixture's place.

On latents of 4 x 4, in float64, under the text "red heart, twemoji style". Few steps here; the others, some minutes:
pytest -m full tests/samplers/test_default_model.py
"""

import inspect
from functools import cache
from itertools import pairwise

import pytest
import torch
from samplers import reference, test_classic, test_dpmpp, test_others, test_parity
from torch import Tensor

import ldm
from ldm.samplers import (
    PREDICTION_TYPES,
    Schedule,
    dpm_2,
    dpm_2_ancestral,
    dpm_adaptive,
    dpmpp_2m,
    dpmpp_2m_sde,
    dpmpp_2s_ancestral,
    dpmpp_3m_sde,
    dpmpp_sde,
    euler,
    euler_ancestral,
    heun,
    lms,
    net_denoiser,
)

MODULES = (test_parity, test_classic, test_dpmpp, test_others)
STEPS = [1, 2, 3, 10, *(pytest.param(steps, marks=pytest.mark.full) for steps in (25, 50))]
HEUN = {"solver_type": "heun"}

# Name: the comparison and its arguments, but for steps, prediction_type and monkeypatch.
CASES = {
    "euler, diffusers": (test_parity.test_euler_diffusers, {"spacing": "leading"}),
    "euler, k-diffusion": (test_parity.test_euler_k_diffusion, {"spacing": "karras"}),
    "ddim, diffusers": (test_parity.test_ddim_diffusers, {"spacing": "leading", "eta": 0.0}),
    "ddim with noise, diffusers": (test_parity.test_ddim_diffusers, {"spacing": "leading", "eta": 0.5}),
    "ddpm, diffusers": (test_others.test_ddpm_diffusers, {}),
    "plms, diffusers": (test_others.test_plms_diffusers, {}),
    "unipc, diffusers": (test_others.test_unipc_diffusers, {"solver_type": "bh2", "order": 2}),
    "deis, diffusers": (test_others.test_deis_diffusers, {"order": 2}),
    "lcm, diffusers": (test_others.test_lcm_diffusers, {}),
    "tcd, diffusers": (test_others.test_tcd_diffusers, {"gamma": 0.3}),
    "2S, diffusers": (test_dpmpp.test_diffusers_singlestep, {}),
    "SDE, diffusers": (test_dpmpp.test_diffusers_sde, {}),
}
for sampler, options in [
    *((euler, test_classic.CHURN), (euler_ancestral, {}), (heun, {}), (heun, test_classic.CHURN)),
    *((dpm_2, {}), (dpm_2_ancestral, {}), (lms, {})),
]:
    name = f"{sampler.__name__}{' with churn' * bool(options)}, k-diffusion"
    CASES[name] = (test_classic.test_k_diffusion, {"sampler": sampler, "options": options, "spacing": "karras"})
for sampler in test_classic.DIFFUSERS:
    CASES[f"{sampler.__name__}, diffusers"] = (test_classic.test_diffusers, {"sampler": sampler, "spacing": "leading"})
for sampler, options in [
    *((dpmpp_2s_ancestral, {}), (dpmpp_sde, {}), (dpmpp_2m, {}), (dpmpp_2m_sde, {}), (dpmpp_2m_sde, HEUN)),
    (dpmpp_3m_sde, {}),
]:
    name = f"{sampler.__name__}{' heun' * bool(options)}, k-diffusion"
    CASES[name] = (test_dpmpp.test_k_diffusion, {"sampler": sampler, "options": options, "spacing": "karras"})
for sampler, options, config in test_dpmpp.MULTISTEP:
    name = f"{sampler.__name__} {' '.join(map(str, (options | config).values()))}, diffusers"
    arguments = {"sampler": sampler, "options": options, "config": config, "spacing": "karras"}
    CASES[name] = (test_dpmpp.test_diffusers_multistep, arguments)


@cache
def default_model() -> tuple[ldm.Pipeline, Tensor]:
    pipe = ldm.Pipeline.from_pretrained()
    context = pipe.encode_text(["red heart, twemoji style"]).context
    pipe.unet.double()
    return pipe, context.double()


class ModelNet(reference.MixtureNet):
    """The default model as `MixtureNet` is used; v is made of its epsilon."""

    @torch.no_grad()
    def __call__(self, x: Tensor, t: Tensor, context: Tensor | None = None) -> Tensor:
        pipe, text = default_model()
        t = float(t.flatten()[0])
        self.ts.append(t)
        eps = pipe.unet(x, torch.tensor(t, dtype=torch.float64), text.expand(len(x), -1, -1))
        if self.prediction_type == "epsilon":
            return eps
        sigma = pipe.schedule.sigma(torch.tensor(t, dtype=torch.float64), self.log)
        scale = (1 + sigma**2) ** 0.5
        return eps * scale - sigma * x  # v = (eps - sigma x0) / scale, where x0 = scale x - sigma eps


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("case", CASES)
def test_default_model(case, steps, monkeypatch):
    comparison, arguments = CASES[case]
    for module in MODULES:
        monkeypatch.setattr(module, "MixtureNet", ModelNet, raising=False)
    names = inspect.signature(comparison).parameters
    given = {"steps": steps, "prediction_type": PREDICTION_TYPES[steps % 2], "monkeypatch": monkeypatch} | arguments
    comparison(**{name: value for name, value in given.items() if name in names})


@pytest.mark.parametrize(("steps", "n", "k"), [(3, 0, 0), pytest.param(25, 9, 1, marks=pytest.mark.full)])
def test_restart(steps, n, k, monkeypatch):
    monkeypatch.setattr(test_classic, "MixtureNet", ModelNet)
    test_classic.test_restart_webui("epsilon", steps, n, k)


@pytest.mark.parametrize("options", [{}, {"order": 2, "rtol": 0.2}])
def test_adaptive(options):
    """Both ask the same denoiser: small differences choose the steps, and timesteps in float32 would move them."""
    denoise = net_denoiser(ModelNet("epsilon"), test_parity.CONTEXT, Schedule(), log=True)
    x, sigmas, theirs = test_parity.draw(1)[0][:1] * 3, torch.tensor([3.0, 0.3], dtype=torch.float64), []
    with reference.float64():
        last = reference.k_sampling.sample_dpm_adaptive(
            lambda x, sigma: denoise(x, sigma[0]).x0, x, 0.3, 3.0, callback=theirs.append, disable=True, **options
        )
    taken = [b["x"] for a, b in pairwise([{"n_accept": 0}, *theirs]) if b["n_accept"] > a["n_accept"]]
    test_parity.assert_equal([step.x for step in dpm_adaptive(denoise, x, sigmas, None, **options)], taken)
    assert torch.equal(taken[-1], last) and len(taken) > 2


def test_every_reference_has_its_case():
    """All of k-diffusion's functions that the library has; dpm_adaptive has the one above."""
    names = {name.removeprefix("sample_") for name in dir(reference.k_sampling) if name.startswith("sample_")}
    ours = names & set(ldm.SAMPLERS) - {"dpm_adaptive"}
    assert ours == {case.split(",")[0].split(" ")[0] for case in CASES if case.endswith("k-diffusion")}
