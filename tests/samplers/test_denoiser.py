"""The net as a denoiser: what it is given, what is made of its epsilon or v, and what is refused."""

import pytest
import torch

from ldm.samplers import Schedule, net_denoiser
from ldm.samplers.denoiser import PREDICTION_TYPES

schedule = Schedule()
X0, EPS = torch.randn(2, 2, 4, 8, 6, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("t", [0, 1, 500, 999])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_returns_the_parts_that_x_is_made_of(prediction_type, t):
    a = schedule.alphas_cumprod[t]
    out = {"epsilon": EPS, "v_prediction": a.sqrt() * EPS - (1 - a).sqrt() * X0}[prediction_type]
    given = []

    def net(x, t, context):
        given.append((x, t, context))
        return out

    context = torch.zeros(2, 77, 8)
    sigma = ((1 - a) / a).sqrt()
    prediction = net_denoiser(net, context, schedule, prediction_type)(X0 + sigma * EPS, sigma)
    ((x, asked, text),) = given
    torch.testing.assert_close(x, a.sqrt() * X0 + (1 - a).sqrt() * EPS, rtol=0, atol=2e-6)
    assert asked.dtype == torch.float32 and asked == t and text is context
    torch.testing.assert_close(prediction.x0, X0, rtol=0, atol=1e-5)  # 14.6 is taken from 14.6 in float32
    torch.testing.assert_close(prediction.eps, EPS, rtol=0, atol=1e-5)
    assert prediction.eps_cond is prediction.eps_uncond is None


def test_net_runs_in_the_dtype_of_the_context():
    def net(x, t, context):
        assert (x.dtype, t.dtype, context.dtype) == (torch.bfloat16, torch.float32, torch.bfloat16)
        return x

    prediction = net_denoiser(net, torch.zeros(2, 77, 8, dtype=torch.bfloat16), schedule)(X0, torch.tensor(1.0))
    assert prediction.x0.dtype == prediction.eps.dtype == torch.float32


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_finite(value):
    def net(x, t, context):
        out = x.clone()
        out[1, 2, 3, 4] = value
        return out

    denoise = net_denoiser(net, torch.zeros(2, 77, 8), schedule)
    with pytest.raises(FloatingPointError, match=r"the UNet returned NaN or infinity at sigma=1\.5000.*float32"):
        denoise(X0, torch.tensor(1.5))


def test_unknown_prediction_type():
    with pytest.raises(ValueError, match=r"prediction_type='sample'.*epsilon, v_prediction"):
        net_denoiser(lambda x, t, context: x, torch.zeros(1), schedule, "sample")
