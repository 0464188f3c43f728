"""k-diffusion's own functions, unchanged, as our samplers."""

import inspect
import itertools
import threading

import pytest
import torch
from samplers.reference import k_sampling, mixture

from ldm.samplers import Prediction, Schedule, euler, is_brownian
from ldm.samplers.adapters import from_k_diffusion
from ldm.settings import Settings

NAN = float("nan")
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
    with pytest.raises(ValueError, match=r"step 0 was sent something .*: sample_euler goes on by itself, send nothing"):
        steps.send(next(steps).x)
    assert threading.active_count() == before


def euler_of(parameters, shows=True):
    """Euler's method as people write it, with these parameters; in place, as some do."""
    names = {}
    exec(
        f"""
def sample_mine({parameters}):
    extra_args = locals().get("extra_args") or {{}}
    for i in range(len(sigmas) - 1):
        denoised = model(x, sigmas[i] * x.new_ones([x.shape[0]]), **dict(extra_args))
        d = (x - denoised) / sigmas[i]
        if {shows} and locals().get("callback"):
            callback({{"x": x, "i": i, "sigma": sigmas[i], "denoised": denoised}})
        x += d * (sigmas[i + 1] - sigmas[i])
    return x
""",
        names,
    )
    return names["sample_mine"]


@pytest.mark.parametrize(
    "parameters",
    [
        "model, x, sigmas, extra_args, callback",
        "model, x, sigmas, extra_args=None, callback=None",
        "model, x, sigmas, extra_args=None, callback=None, disable=None, *, something=3",
        "model, x, sigmas, callback=None, **others",
    ],
)
def test_any_signature(parameters):
    x = start()
    before = x.clone()
    steps = list(from_k_diffusion(euler_of(parameters))(denoise, x, SIGMAS, draws()))
    assert torch.equal(x, before)  # whatever the function does to its own
    assert len(steps) == 8
    torch.testing.assert_close(steps[-1].x, list(euler(denoise, start(), SIGMAS, draws()))[-1].x)


@pytest.mark.parametrize("parameters", ["model, x, sigmas", "model, x, sigmas, extra_args=None, callback=None"])
def test_a_function_that_shows_nothing_is_one_step(parameters):
    (step,) = from_k_diffusion(euler_of(parameters, shows=False))(denoise, start(), SIGMAS, draws())
    torch.testing.assert_close(step.x, list(euler(denoise, start(), SIGMAS, draws()))[-1].x)
    assert step.sigma_next == SIGMAS[-1]


def test_eps_with_churn():
    """At sigma_hat, where k-diffusion's x is."""
    asked = []

    def watched(x, sigma):
        asked.append(denoise(x, sigma))
        return asked[-1]

    steps = list(from_k_diffusion(k_sampling.sample_euler, s_churn=4.0)(watched, start(), SIGMAS, draws()))
    for step, prediction in zip(steps, asked, strict=True):
        torch.testing.assert_close(step.eps, prediction.eps)


def test_gradients():
    x = start().requires_grad_()
    *_, last = from_k_diffusion(k_sampling.sample_heun)(denoise, x, SIGMAS, draws())
    (gradient,) = torch.autograd.grad(last.x.sum(), x)
    h = 1e-5
    ends = [
        list(from_k_diffusion(k_sampling.sample_heun)(denoise, start() + s * h * gradient, SIGMAS, draws()))[-1].x.sum()
        for s in (1, -1)
    ]
    assert float((ends[0] - ends[1]).detach() / (2 * h)) == pytest.approx(float(gradient.square().sum()), rel=1e-6)


@pytest.mark.parametrize("name", ["sample_dpmpp_sde", "sample_dpmpp_2m_sde", "sample_dpmpp_3m_sde"])
def test_a_brownian_tree_stays_one(name):
    """The noise is asked for between the sigmas it is used between, and the pipeline gives such functions a path."""
    asked = []

    def noise(sigma, sigma_next):
        asked.append((round(float(sigma), 4), round(float(sigma_next), 4)))
        return torch.zeros(2, 4, 4, 4, dtype=torch.float64)

    sampler = from_k_diffusion(getattr(k_sampling, name))
    assert is_brownian(sampler) and not is_brownian(from_k_diffusion(k_sampling.sample_euler_ancestral))
    list(sampler(denoise, start(), SIGMAS, noise))
    for a, b in itertools.pairwise(SIGMAS[:-1].tolist()):
        assert (round(a, 4), round(b, 4)) in asked


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: from_k_diffusion("euler"), "'euler' is no function: give one of k_diffusion.sampling"),
        (
            lambda: from_k_diffusion(k_sampling.sample_euler, s_chrun=3),
            "s_chrun=3: sample_euler has no such option; it has",
        ),
        (
            lambda: list(from_k_diffusion(k_sampling.sample_euler)(denoise, start(), SIGMAS.flip(0), None)),
            "must fall here",
        ),
        (lambda: list(from_k_diffusion(k_sampling.sample_euler)(denoise, start(), SIGMAS * NAN, None)), "is nan: give"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_nan():
    def broken(x, sigma):
        return Prediction(x * NAN, x)

    with pytest.raises(FloatingPointError, match=r"NaN or infinity in step 0, at sigma=14\.61"):
        list(from_k_diffusion(k_sampling.sample_euler)(broken, start(), SIGMAS, draws()))


def test_name():
    assert Settings(sampler=from_k_diffusion(k_sampling.sample_heun)).sampler_name == "sample_heun"
