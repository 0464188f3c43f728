import pytest
import torch

from ldm.guidance import guided
from ldm.samplers import Prediction, Schedule, euler, net_denoiser
from ldm.samplers.denoiser import PREDICTION_TYPES

schedule = Schedule()
SIGMA = torch.tensor(3.0, dtype=torch.float64)


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(4))


X, EPS_UNCOND, EPS_COND = normal(3, 2, 4, 8, 6)


class TwoTexts:
    """A denoiser of one batch [unconditional, conditional]; `batches` are the x it was given."""

    def __init__(self):
        self.batches = []

    def __call__(self, x, sigma):
        self.batches.append(x)
        eps = torch.cat([EPS_UNCOND, EPS_COND])
        return Prediction(x - sigma * eps, eps)


@pytest.mark.parametrize("scale", [-1.0, 0.0, 0.5, 1.0, 7.5, 30.0])
def test_formula(scale):
    denoise = TwoTexts()
    prediction = guided(denoise, scale)(X, SIGMA)
    assert torch.equal(torch.stack(denoise.batches), torch.cat([X, X])[None])  # once, both halves in one batch
    expected = (1 - scale) * EPS_UNCOND.double() + scale * EPS_COND.double()
    assert (prediction.eps - expected).abs().max() <= 1e-6 * expected.abs().max()
    assert torch.equal(prediction.x0, X - SIGMA * prediction.eps)
    assert torch.equal(prediction.eps_uncond, EPS_UNCOND) and torch.equal(prediction.eps_cond, EPS_COND)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_on_a_net(prediction_type):
    """The negative texts' half comes first; and guiding eps is guiding whatever the net predicts."""
    uncond, cond = normal(2, 2, 5, 4)
    t = schedule.t(SIGMA)

    def net(x, t, context):
        return torch.tanh(x + context.mean((1, 2))[:, None, None, None] + t / 1000)

    def denoiser(net, context):
        return net_denoiser(net, context, schedule, prediction_type)

    prediction = guided(denoiser(net, torch.cat([uncond, cond])), 7.5)(X, SIGMA)
    alone = {name: denoiser(net, text)(X, SIGMA) for name, text in (("cond", cond), ("uncond", uncond))}
    torch.testing.assert_close(prediction.eps_cond, alone["cond"].eps, rtol=0, atol=1e-6)
    torch.testing.assert_close(prediction.eps_uncond, alone["uncond"].eps, rtol=0, atol=1e-6)

    out_uncond, out_cond = (net(X / (1 + SIGMA**2) ** 0.5, t, text) for text in (uncond, cond))
    combined = denoiser(lambda *_: out_uncond + 7.5 * (out_cond - out_uncond), cond)(X, SIGMA)
    torch.testing.assert_close(prediction.eps, combined.eps, rtol=0, atol=1e-5)
    torch.testing.assert_close(prediction.x0, combined.x0, rtol=0, atol=1e-5)


@pytest.mark.parametrize("rescale", [0.0, 0.7])
def test_v_at_the_sigma_of_a_zero_terminal_snr(rescale):
    """x0 is as exact there as elsewhere, though x is 4096 times as large."""
    sigma, v = torch.tensor(4096.0, dtype=torch.float64), torch.cat([EPS_UNCOND, EPS_COND])

    def guide(x, v):
        denoise = net_denoiser(lambda *_: v, torch.zeros(1, dtype=v.dtype), schedule, "v_prediction")
        return guided(denoise, 7.5, rescale, v=True)(x, sigma)

    single, double = guide(4096 * X, v), guide(4096 * X.double(), v.double())
    for ours, exact in zip(single, double, strict=True):
        assert (ours - exact).abs().max() <= 1e-6 * exact.abs().max()


def test_steps_show_both_noises():
    denoise = TwoTexts()
    steps = list(euler(guided(denoise, 7.5), X, schedule.sigmas(3), None))
    assert len(denoise.batches) == 3
    for step in steps:
        assert torch.equal(step.eps_cond, EPS_COND) and torch.equal(step.eps_uncond, EPS_UNCOND)
