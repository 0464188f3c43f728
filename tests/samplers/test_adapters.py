"""k-diffusion's own functions, unchanged, as our samplers."""

import inspect
import threading

import pytest
import torch
from samplers.reference import k_sampling, mixture

from ldm.samplers import Prediction, Schedule, euler
from ldm.samplers.adapters import from_k_diffusion
from ldm.settings import Settings

NAMES = sorted(name for name in dir(k_sampling) if name.startswith("sample_"))
SIGMAS = Schedule().sigmas(8)
pytestmark = pytest.mark.filterwarnings("ignore:To copy construct from a tensor")


def denoise(x, sigma):
    x0 = mixture(x, sigma)
    return Prediction(x0, (x - x0) / sigma)


def draws():
    generator = torch.Generator().manual_seed(3)
    return lambda *_: torch.randn(2, 4, 4, 4, generator=generator, dtype=torch.float64)


def start():
    return draws()() * SIGMAS[0]


def direct(function):
    """Called as its authors do."""
    parameters = inspect.signature(function).parameters
    arguments = {"noise_sampler": draws()} if "noise_sampler" in parameters else {}
    if "sigma_min" in parameters:
        arguments |= {"sigma_min": SIGMAS[-2], "sigma_max": SIGMAS[0]} | ({"n": 8} if "n" in parameters else {})
    else:
        arguments["sigmas"] = SIGMAS
    return function(lambda x, sigma: mixture(x, sigma[0]), start(), disable=True, **arguments)


def test_there_are_all():
    assert len(NAMES) == 13


@pytest.mark.parametrize("name", NAMES)
def test_k_diffusion(name):
    """The same result bit for bit, and steps that lead there."""
    function = getattr(k_sampling, name)
    torch.manual_seed(0)
    steps = list(from_k_diffusion(function)(denoise, start(), SIGMAS, draws()))
    torch.manual_seed(0)
    assert torch.equal(steps[-1].x, direct(function))
    assert [step.i for step in steps] == list(range(len(steps)))
    if "sigmas" in inspect.signature(function).parameters:
        assert len(steps) == 8 and torch.equal(torch.stack([step.sigma for step in steps]), SIGMAS[:-1])
        torch.testing.assert_close(steps[0].x0 + steps[0].sigma * steps[0].eps, start())


@pytest.mark.parametrize("name", NAMES)
def test_without_the_adapter(name):
    with pytest.raises(ValueError, match=rf"^sampler '{name}' is a function .* of k-diffusion: give from_k_diffusion"):
        Settings(sampler=getattr(k_sampling, name))


def test_options():
    steps = list(from_k_diffusion(k_sampling.sample_euler_ancestral, eta=0.0)(denoise, start(), SIGMAS, draws()))
    torch.testing.assert_close(steps[-1].x, list(euler(denoise, start(), SIGMAS, draws()))[-1].x)


def test_a_consumer_that_stops_half_way():
    before = threading.active_count()
    steps = from_k_diffusion(k_sampling.sample_heun)(denoise, start(), SIGMAS, draws())
    next(steps)
    steps.close()
    assert threading.active_count() == before


def test_what_goes_wrong_inside():
    def broken(x, sigma):
        raise FloatingPointError("the UNet returned NaN")

    before = threading.active_count()
    with pytest.raises(FloatingPointError, match="the UNet returned NaN"):
        list(from_k_diffusion(k_sampling.sample_euler)(broken, start(), SIGMAS, draws()))
    assert threading.active_count() == before
    steps = from_k_diffusion(k_sampling.sample_euler)(denoise, start(), SIGMAS, draws())
    with pytest.raises(ValueError, match="step 0 was sent something: sample_euler goes on by itself, send nothing"):
        steps.send(next(steps).x)
    assert threading.active_count() == before
