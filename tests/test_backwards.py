"""From a picture to its noise and back; and gradients through the loop."""

import math

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from torch import Tensor

import ldm
from ldm.samplers import Prediction, Step

HEART = "red heart, twemoji style"


@pytest.fixture(scope="module")
def pipe():
    return ldm.Pipeline.from_pretrained()


@pytest.fixture(scope="module")
def picture(pipe):
    image = Image.new("RGB", (32, 32), "white")
    ImageDraw.Draw(image).ellipse((6, 4, 25, 22), fill="crimson", outline="black")
    return image


def above_0(pipe, steps: int) -> Tensor:
    """The step between sigma_min and 0 never gets smaller: without it."""
    return pipe.schedule.sigmas(steps + 1, "karras")[:-1]


ORDERS = {"ddim": 1, "heun": 2, "dpmpp_2m": 2, "unipc": 2}


@pytest.mark.parametrize("sampler", ORDERS)
def test_there_and_back_shrinks_with_the_order(pipe, picture, sampler):
    """The relative error of the latents on the model, against the steps: a slope of -1 for order 1, -2 for order 2.

    What is of even order may lose its first error on the way back, and be better.
    """
    errors = []
    counts = (20, 40, 80) if ORDERS[sampler] == 1 else (8, 16, 32)
    z = pipe("", image=picture, strength=0, progress=False).latents
    for steps in counts:
        how = {"image": picture, "strength": 1, "sampler": sampler, "sigmas": above_0(pipe, steps), "guidance_scale": 1}
        noise = pipe.invert(HEART, **how, progress=False)
        out = pipe(HEART, **how, noise=noise, progress=False)
        errors.append(float((out.latents - z).norm() / z.norm()))
    slope = -np.polyfit(np.log(counts), np.log(errors), 1)[0]
    print(f"{sampler}: {errors}, order {slope:.2f}")
    assert slope > ORDERS[sampler] - 0.25
    assert errors[-1] < (0.05 if ORDERS[sampler] == 1 else 0.002)


def test_the_error_at_every_step(pipe, picture):
    """x on the way up beside x on the way down: equal where they turn, apart the more the nearer to the picture."""
    how = {"image": picture, "strength": 1, "sampler": "ddim", "steps": 20, "guidance_scale": 1}
    up: list[Step] = []
    noise = pipe.invert(HEART, **how, callback=up.append, progress=False)
    down = list(pipe.stream(HEART, **how, noise=noise))
    there = {float(step.sigma_next): step.x for step in up}
    errors = [float((step.x - there[float(step.sigma_next)]).norm()) for step in down[:-1]]
    assert len(errors) == 19
    assert max(errors[:3]) < min(errors[8:]) and errors[0] < errors[-1] / 5
    assert [float(s.sigma) for s in up] == [float(s.sigma_next) for s in reversed(down)]


@pytest.mark.parametrize("strength", [0.3, 0.6])
@pytest.mark.parametrize("sampler", ["euler", "ddim"])
def test_part_of_the_way(pipe, picture, sampler, strength):
    """The same call with the noise starts from the very x at which the inversion ended."""
    how = {"image": picture, "strength": strength, "sampler": sampler, "steps": 20, "guidance_scale": 1, "seed": 3}
    up: list[Step] = []
    noise = pipe.invert(HEART, **how, callback=up.append, progress=False)
    plan = pipe.plan_strength(image=picture, strength=strength, sampler=sampler, steps=20)
    assert len(up) == plan.evaluations and float(up[-1].sigma_next) == plan.start
    first = next(pipe.stream(HEART, **how, noise=noise))
    torch.testing.assert_close(first.x0 + first.sigma * first.eps, up[-1].x, rtol=0, atol=1e-4)


def test_batches_and_guidance(pipe, picture):
    """Pictures of a batch are inverted as they are by themselves; guidance is that of the call."""
    how = {"image": picture, "strength": 1, "sampler": "ddim", "steps": 6, "guidance_scale": 2.0, "progress": False}
    both = pipe.invert([HEART, "a slice of pizza"], **how)
    alone = pipe.invert("a slice of pizza", seed=1, **how)
    assert both.shape[0] == 2
    torch.testing.assert_close(both[1:], alone, rtol=0, atol=1e-4)
    assert (both[1:] - pipe.invert("a slice of pizza", **how | {"guidance_scale": 1})).abs().max() > 1e-2


def test_latents_take_the_place_of_the_picture(pipe, picture):
    how = {"strength": 1, "sampler": "euler", "steps": 5, "guidance_scale": 1, "progress": False}
    z = pipe("", image=picture, strength=0, progress=False).latents
    a, b = pipe.invert(HEART, latents=z, **how), pipe.invert(HEART, image=picture, **how)
    torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "without image= or latents="),
        ({"sampler": "euler_ancestral"}, "eta=0"),
        ({"sampler": "dpmpp_sde"}, "eta=0"),
        ({"sampler": "lcm"}, "fresh noise|deterministic"),
        ({"sampler": "euler", "sampler_options": {"s_churn": 10.0}}, "fresh noise|deterministic"),
        ({"strength": 0}, "strength=0 makes no step"),
        ({"mask": True}, "with mask="),
        ({"noise": torch.zeros(1, 4, 8, 8)}, "with noise="),
        ({"enlarge": 2}, "enlarge=2"),
        ({"extend": (8, 0, 0, 0)}, "extend="),
    ],
)
def test_errors(pipe, picture, settings, message):
    if settings:
        settings = {"image": picture, "strength": 1} | settings
    if "mask" in settings:
        settings["mask"] = Image.new("L", picture.size, 255)
    with pytest.raises(ValueError, match=message):
        pipe.invert(HEART, steps=4, progress=False, **settings)


# ------------------------------------------------------------------------------------------------ gradients


def last(steps):
    *_, step = steps
    return step


APG = {"guidance": "apg", "guidance_options": {"momentum": -0.5}}


@pytest.mark.parametrize(
    "settings",
    [*({"sampler": name, "guidance_scale": 3.0} for name in ("euler", "dpmpp_2m", "heun", "euler_ancestral")), APG],
    ids=lambda settings: settings.get("sampler", "apg"),
)
def test_gradients_flow_through_the_pipeline(pipe, settings):
    """Along the gradient, against the difference of two runs. APG averages its updates: were its steps computed anew
    on the way back, they would be averaged twice."""
    generator = torch.Generator().manual_seed(7)
    noise, weight = (torch.randn(1, 4, 8, 8, generator=generator) for _ in range(2))
    how = {"steps": 4, "width": 32, "height": 32} | settings

    def loss(noise: Tensor, grad: bool) -> Tensor:
        return (last(pipe.stream(HEART, noise=noise, grad=grad, **how)).x * weight).sum()

    noise.requires_grad_()
    (gradient,) = torch.autograd.grad(loss(noise, grad=True), noise)
    with torch.no_grad():
        h, direction = 0.01, gradient / gradient.norm()
        difference = float(loss(noise + h * direction, False) - loss(noise - h * direction, False)) / (2 * h)
    assert float(gradient.norm()) == pytest.approx(difference, rel=2e-3)


def test_without_asking_there_is_no_graph(pipe):
    noise = torch.randn(1, 4, 16, 16, requires_grad=True)
    assert not last(pipe.stream(HEART, noise=noise, steps=2)).x.requires_grad
    assert torch.is_grad_enabled()
    steps = pipe.stream(HEART, noise=noise, steps=2, grad=True)
    with torch.no_grad():  # the consumer's affair
        assert next(steps).x.requires_grad and not torch.is_grad_enabled()


def saved(steps) -> int:
    """Bytes that autograd keeps for a run, each storage once; the weights are there anyway."""
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        last(steps)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("sampler", ["ddim", "euler", "dpmpp_2m", "euler_ancestral"])
def test_a_step_costs_one_latent(pipe, sampler):
    noise = torch.randn(1, 4, 16, 16, requires_grad=True)
    few, more = (
        saved(pipe.stream(HEART, noise=noise, steps=n, sampler=sampler, grad=True, guidance_scale=3.0)) for n in (4, 14)
    )
    assert more - few <= 10 * noise.nbytes * 1.01  # and a few numbers


def test_nan_is_named_by_its_step(pipe):
    def poisoned(denoise, x, sigmas, noise):
        def bad(x: Tensor, sigma: Tensor) -> Prediction:
            prediction = denoise(x, sigma)
            return prediction._replace(eps=prediction.eps * math.nan) if sigma < 5 else prediction

        yield from ldm.SAMPLERS["euler"](bad, x, sigmas, noise)

    with pytest.raises(FloatingPointError, match=r"step \d.* sigma=[0-4]\.\d"):
        pipe(HEART, sampler=poisoned, steps=6, progress=False)
