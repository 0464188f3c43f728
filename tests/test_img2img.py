"""Strengths, masks and canvases by themselves; whole edits are in test_edit.py."""

from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, StableDiffusionImg2ImgPipeline
from diffusers.image_processor import VaeImageProcessor
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from ldm.img2img import (
    STRENGTH_RULES,
    crop_box,
    extended,
    feathered,
    fill,
    fit,
    keep_outside,
    led_on,
    new_part,
    paste,
    ramp,
    renoise_outside,
    strength_plan,
    tiles,
)
from ldm.samplers import Prediction, Schedule, ddim, euler

schedule = Schedule()
PERCENTS = range(101)
SCHEDULES = [schedule.sigmas(max(steps, 1)) for steps in range(201)]


def count(percent, steps, rule):
    """The rules once more, in whole numbers."""
    whole, rest = divmod(steps * percent, 100)
    if rule == "floor":
        return max(1, whole) if percent else 0
    if rule == "diffusers":  # with its slips of floating point, which are the rule
        return min(int(steps * (percent / 100)), steps)
    if rule == "webui":
        return int(min(percent / 100, 0.999) * steps) + 1
    if rule == "comfy":
        return steps if percent else 0
    return whole + (rest > 0)


@pytest.mark.parametrize("rule", STRENGTH_RULES)
def test_plan_of_every_strength(rule):
    longer = {}

    def sigmas_of(n):
        return SCHEDULES[n] if n <= 200 else longer.setdefault(n, schedule.sigmas(n))

    for steps in range(1, 201):
        before = 0.0
        for percent in PERCENTS:
            plan = strength_plan(percent / 100, steps, sigmas_of, rule)
            sigmas = plan.sigmas
            assert plan.evaluations == count(percent, steps, rule), (percent, steps)
            assert len(sigmas) == (plan.evaluations + 1 if plan.evaluations else 0)
            assert plan.start >= before  # more strength, never less noise
            before = plan.start
            if plan.evaluations:
                assert (sigmas[1:] < sigmas[:-1]).all() and sigmas[-1] == 0
                if rule in ("floor", "diffusers", "webui"):
                    assert torch.equal(sigmas, SCHEDULES[steps][-len(sigmas) :])
        assert plan.start == schedule.sigma_max


def test_whole_strengths_agree():
    """Where steps * strength is a whole number, "floor", "diffusers" and "continuous" are the same plan."""
    for steps in range(1, 201):
        for percent in PERCENTS:
            if steps * percent % 100 == 0 and count(percent, steps, "diffusers") == steps * percent // 100:
                plans = [
                    strength_plan(percent / 100, steps, SCHEDULES.__getitem__, rule)
                    for rule in ("floor", "diffusers", "continuous")
                ]
                assert torch.equal(plans[0].sigmas, plans[1].sigmas)
                assert torch.equal(plans[0].sigmas, plans[2].sigmas)


@settings(deadline=None)
@given(st.floats(0, 1), st.integers(1, 200))
def test_any_strength(strength, steps):
    for rule in ("floor", "diffusers", "webui", "continuous"):
        plan = strength_plan(strength, steps, SCHEDULES.__getitem__, rule)
        assert 0 <= plan.evaluations <= steps and (plan.sigmas[1:] < plan.sigmas[:-1]).all()
    start = steps * (1 - Fraction(strength))  # continuous: in proportion between two sigmas
    i = min(int(start), steps - 1)
    expected = torch.lerp(SCHEDULES[steps][i], SCHEDULES[steps][i + 1], float(start - i))
    assert plan.start == pytest.approx(float(expected), abs=1e-6)


def test_comfys_schedule_is_longer():
    """20 steps at 0.4 are the last 20 of 50; at 1 they are all."""
    plan = strength_plan(0.4, 20, schedule.sigmas, "comfy")
    assert torch.equal(plan.sigmas, schedule.sigmas(50)[-21:])
    assert torch.equal(strength_plan(1, 20, schedule.sigmas, "comfy").sigmas, schedule.sigmas(20))


@pytest.mark.parametrize("steps", [1, 20, 200])
def test_the_ends(steps):
    for rule in STRENGTH_RULES:
        nothing = strength_plan(0, steps, SCHEDULES.__getitem__, rule)
        assert (nothing.evaluations, nothing.replaces) == (int(rule == "webui"), False)
        plans = [strength_plan(1.0, steps, SCHEDULES.__getitem__, rule, masked) for masked in (False, True)]
        assert plans[0].evaluations == steps
        from_noise = {"floor": (True, True), "continuous": (True, True), "diffusers": (False, True)}
        assert tuple(plan.replaces for plan in plans) == from_noise.get(rule, (False, False))
    assert strength_plan(1e-9, steps, SCHEDULES.__getitem__).evaluations == 1


def test_difference_diffusers_slips():
    """int(100 * 0.29) is 28."""
    plans = [strength_plan(0.29, 100, SCHEDULES.__getitem__, rule) for rule in ("floor", "diffusers", "continuous")]
    assert [plan.evaluations for plan in plans] == [29, 28, 29]


@pytest.mark.parametrize("cls", [DDIMScheduler, EulerDiscreteScheduler])
def test_diffusers_timesteps(cls):
    """Those of its image to image pipeline, for every count and strength."""
    pipe = object.__new__(StableDiffusionImg2ImgPipeline)
    scheduler = cls(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, steps_offset=1)
    object.__setattr__(pipe, "scheduler", scheduler)
    spacing = "leading" if cls is DDIMScheduler else "linspace"
    for steps in range(1, 201):
        scheduler.set_timesteps(steps)
        ours = schedule.sigmas(steps, spacing)
        for percent in PERCENTS:
            timesteps, evaluations = pipe.get_timesteps(steps, percent / 100, "cpu")
            plan = strength_plan(percent / 100, steps, lambda n, ours=ours: ours, "diffusers")
            assert plan.evaluations == evaluations == len(timesteps)
        if (steps, spacing) != (1, "linspace"):  # diffusers' linspace of one step is t = 0: see the schedule's tests
            assert (schedule.t(ours[:-1]) - scheduler.timesteps.double()).abs().max() < 1e-3


def test_print():
    said = str(strength_plan(0.5, 4, schedule.sigmas, "floor"))
    assert said.splitlines() == [
        "strength  0.5, counted as 'floor'",
        "steps     4 requested, 2 evaluations",
        "start     the picture with noise, sigma 0.9324",
        "sigmas    0.9324 0.0292 0.0000",
    ]
    assert "the picture, sigma 0.0000\nsigmas    none" in str(strength_plan(0, 4, schedule.sigmas))
    assert "noise alone, sigma 14.6146" in str(strength_plan(1, 4, schedule.sigmas))


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5))


LATENTS, NOISE = normal(2, 2, 4, 8, 6)
MASK = torch.zeros(1, 1, 8, 6)
MASK[..., 2:5, 1:4] = 1
OUTSIDE = (1 - MASK).bool().expand_as(LATENTS)


def dream(x: torch.Tensor, sigma: torch.Tensor) -> Prediction:
    """Wants something else than the latents everywhere."""
    x0 = torch.cos(3 * x / (1 + sigma**2) ** 0.5)
    return Prediction(x0, (x - x0) / sigma, eps_cond=x, eps_uncond=-x)


@pytest.mark.parametrize("sampler", [ddim, euler])
def test_outside_stays_on_its_path(sampler):
    """latents + sigma * noise at every sigma, and the latents in the end; inside, what the denoiser makes of it."""
    sigmas = schedule.sigmas(20)
    x = LATENTS + sigmas[0] * NOISE
    steps = list(sampler(keep_outside(dream, LATENTS, MASK), x, sigmas, None))
    for step, free in zip(steps, sampler(dream, x, sigmas, None), strict=True):
        path = LATENTS + step.sigma_next * NOISE
        largest = path.abs().max()
        assert (step.x - path)[OUTSIDE].abs().max() <= 1e-6 * max(largest, sigmas[0])
        assert torch.equal(step.x0[OUTSIDE], LATENTS[OUTSIDE])
        torch.testing.assert_close(step.x[~OUTSIDE], free.x[~OUTSIDE], rtol=0, atol=1e-5)
    if sampler is ddim:
        assert torch.equal(steps[-1].x[OUTSIDE], LATENTS[OUTSIDE])
    assert not torch.allclose(steps[-1].x[~OUTSIDE], LATENTS[~OUTSIDE], atol=0.1)


def test_outside_with_fresh_noise():
    sigmas = schedule.sigmas(20, "leading")
    steps = list(
        ddim(keep_outside(dream, LATENTS, MASK), LATENTS + sigmas[0] * NOISE, sigmas, lambda *_: NOISE, eta=1.0)
    )
    assert torch.equal(steps[-1].x[OUTSIDE], LATENTS[OUTSIDE])


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_mask_blends(share):
    sigma = torch.tensor(2.0)
    free = dream(NOISE, sigma)
    kept = keep_outside(dream, LATENTS, torch.full((1, 1, 8, 6), share))(NOISE, sigma)
    torch.testing.assert_close(kept.x0, share * free.x0 + (1 - share) * LATENTS)
    torch.testing.assert_close(kept.x0 + sigma * kept.eps, NOISE)
    assert torch.equal(kept.eps_cond, free.eps_cond) and torch.equal(kept.eps_uncond, free.eps_uncond)


@pytest.mark.parametrize("sampler", [ddim, euler])
def test_renoised_is_the_same_for_a_hard_mask(sampler):
    """Both ways keep latents + sigma * noise outside, so that the inside sees the same."""
    sigmas = schedule.sigmas(20)
    x = LATENTS + sigmas[0] * NOISE
    known = list(sampler(keep_outside(dream, LATENTS, MASK), x, sigmas, None))
    noised = list(renoise_outside(sampler(dream, x.clone(), sigmas, None), LATENTS, NOISE, MASK))
    for a, b in zip(known, noised, strict=True):
        torch.testing.assert_close(a.x, b.x, rtol=1e-5, atol=1e-4)
    assert torch.equal(noised[-1].x[OUTSIDE], LATENTS[OUTSIDE])


def test_renoised_softly():
    """By hand: x after a step is the blend, and the sampler goes on from it."""
    seen = []

    def watched(x, sigma):
        seen.append(x.clone())
        return dream(x, sigma)

    sigmas, half = schedule.sigmas(3), torch.full((1, 1, 8, 6), 0.25)
    steps = list(renoise_outside(euler(watched, LATENTS + sigmas[0] * NOISE, sigmas, None), LATENTS, NOISE, half))
    x = LATENTS + sigmas[0] * NOISE
    for i in range(3):
        torch.testing.assert_close(seen[i], x, rtol=1e-5, atol=1e-5)
        x = x + (sigmas[i + 1] - sigmas[i]) * dream(x, sigmas[i]).eps
        x = 0.25 * x + 0.75 * (LATENTS + sigmas[i + 1] * NOISE)
    torch.testing.assert_close(steps[-1].x, x, rtol=1e-5, atol=1e-5)


def test_renoised_and_sent_x0():
    """x0 that is sent through it moves x once, and what comes back is renoised no more."""
    seen = []

    def watched(x, sigma):
        seen.append(x.clone())
        return dream(x, sigma)

    sigmas = schedule.sigmas(3)
    steps = renoise_outside(euler(watched, LATENTS + sigmas[0] * NOISE, sigmas, None), LATENTS, NOISE, MASK)
    step = next(steps)
    steps.send(step._replace(x0=step.x0 + 1))
    torch.testing.assert_close(seen[1], step.x + 1)


def colours(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def test_paste():
    old, new = colours(7, 5), colours(7, 5, 1)
    mask = Image.fromarray(np.random.default_rng(2).choice(np.array([0, 51, 255], np.uint8), (5, 7)))
    for fade in (0, 3):
        out, inside = np.asarray(paste(new, old, mask, fade)), np.asarray(mask)
        assert np.array_equal(out[inside == 0], np.asarray(old)[inside == 0])
    a, b = (np.asarray(paste(new, old, mask)).astype(int), np.asarray(old).astype(int))
    blend = (0.2 * np.asarray(new) + 0.8 * np.asarray(old)).round()
    assert np.array_equal(a[inside == 255], np.asarray(new)[inside == 255])
    assert np.array_equal(a[inside == 51], blend[inside == 51]) and not np.array_equal(a, b)


def test_paste_without_a_seam():
    """A grey 40 darker than the picture it goes on from: it takes over its colour and comes back to its own."""
    old, new = Image.new("RGB", (64, 4), (140,) * 3), Image.new("RGB", (64, 4), (100,) * 3)
    mask = new_part((32, 4), (0, 0, 32, 0))
    row = np.asarray(paste(new, old, mask, fade=16))[1, :, 0].astype(int)
    assert (row[:32] == 140).all() and (row[48:] == 100).all()
    assert abs(np.diff(row)).max() <= 3  # 40 / 16, rounded up; 40 without fading
    assert (np.diff(row) <= 0).all()


def test_led_on():
    values = np.zeros((5, 9, 1), np.float32)
    values[:, :2] = 7
    known = np.zeros((5, 9, 1), bool)
    known[:, :2] = True
    values[:, 5:] = 99  # unknown, and not to be read
    filled, distance = led_on(values, known, 4)
    assert (distance[2, :, 0] == [0, 0, 0.25, 0.5, 0.75, 1, 1, 1, 1]).all()
    assert filled[2, :6, 0] == pytest.approx(7) and (filled[:, 6:] == 0).all()
    assert (led_on(values, np.zeros_like(known), 4)[1] == 1).all()


def test_feathered():
    mask = new_part((8, 4), (0, 0, 8, 0))
    assert list(np.asarray(feathered(mask, 4))[0]) == [0] * 8 + [64, 128, 191, 255, 255, 255, 255, 255]


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_crop_box_is_diffusers(data):
    width, height = data.draw(st.integers(8, 90)), data.draw(st.integers(8, 90))
    left, top = data.draw(st.integers(0, width - 1)), data.draw(st.integers(0, height - 1))
    box = (left, top, data.draw(st.integers(left + 1, width)), data.draw(st.integers(top + 1, height)))
    mask, padding = Image.new("L", (width, height)), data.draw(st.integers(0, 40))
    mask.paste(255, box)
    size = data.draw(st.sampled_from([(64, 64), (128, 64), (64, 128)]))
    ours = crop_box(mask, padding, size[0] / size[1])
    theirs = VaeImageProcessor().get_crop_region(mask, *size, pad=padding)
    assert ours == tuple(theirs)
    assert 0 <= ours[0] < ours[2] <= width and 0 <= ours[1] < ours[3] <= height


@pytest.mark.parametrize("how", ["edge", "mirror", "noise"])
def test_extended(how):
    image, sides = colours(5, 4), (3, 1, 9, 2)
    out, part = extended(image, sides, how), new_part((5, 4), sides)
    assert out.size == part.size == (17, 7)
    assert np.array_equal(out.crop((3, 1, 8, 5)), image)
    assert not np.asarray(part.crop((3, 1, 8, 5))).any() and np.asarray(part).sum() == 255 * (17 * 7 - 20)
    row, source = np.asarray(out)[2], np.asarray(image)[1]
    if how == "edge":
        assert (row[:3] == source[0]).all() and (row[8:] == source[-1]).all()
    if how == "mirror":
        assert np.array_equal(row, np.concatenate([source[2::-1], source, source[::-1], source[:4]]))
    if how == "noise":
        known = {tuple(colour) for colour in np.asarray(image).reshape(-1, 3)}
        assert {tuple(colour) for colour in np.asarray(out)[:, -1]} <= known  # at the end nothing but noise
        assert np.abs(row[8].astype(int) - source[-1]).max() <= 255 / 9 + 1  # beside the picture a ninth of it
        assert np.array_equal(out, extended(image, sides, how)) and not (row[8:] == source[-1]).all()


def test_one_pixel_is_extended():
    for how in ("edge", "mirror", "noise"):
        assert (np.asarray(extended(Image.new("RGB", (1, 1), "red"), (2, 2, 2, 2), how)) == (255, 0, 0)).all()


@pytest.mark.parametrize("size", [(1, 1), (7, 9), (8, 16), (17, 8)])
def test_fit_pads(size):
    image = colours(*size)
    out = fit(image, size, 8)
    assert all(side % 8 == 0 and 0 <= side - was < 8 for side, was in zip(out.size, size, strict=True))
    assert np.array_equal(out.crop((0, 0, *size)), image)
    assert np.array_equal(np.asarray(out)[: size[1], size[0] - 1 :].max(1), np.asarray(image)[:, -1])


@settings(deadline=None)
@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 12), st.data())
def test_tiles_cover(width, height, tile, data):
    width, height, tile = 8 * width, 8 * height, 8 * tile
    overlap = 8 * data.draw(st.integers(0, tile // 8 - 1))
    seen = np.zeros((height, width), int)
    boxes = tiles((width, height), tile, overlap)
    for left, top, right, bottom in boxes:
        assert right - left == min(tile, width) and bottom - top == min(tile, height)
        assert min(left, top) >= 0 and right <= width and bottom <= height
        assert left % 8 == top % 8 == 0
        seen[top:bottom, left:right] += 1
    assert seen.all() and len(set(boxes)) == len(boxes)
    lefts = sorted({box[0] for box in boxes})
    assert all(b - a <= tile - overlap for a, b in pairwise(lefts))


def test_ramps_leave_no_gap():
    """The first tile counts in full; later ones rise over the overlap to full, where what was there is gone."""
    assert np.asarray(ramp((0, 0, 32, 32), 8)).min() == 255
    weights = np.asarray(ramp((24, 0, 56, 32), 8))
    assert list(weights[0]) == [round(255 * (i + 1) / 9) for i in range(8)] + [255] * 24
    assert np.array_equal(np.asarray(ramp((0, 24, 32, 56), 8)), weights.T)
    assert np.asarray(ramp((24, 24, 56, 56), 8))[0, 0] == round(255 / 81)


def test_fill():
    """Red on the left, blue on the right, what is hidden between them green: it takes the colour of the nearer side."""
    image = Image.new("RGB", (60, 20), "red")
    image.paste((0, 0, 255), (30, 0, 60, 20))
    mask = Image.new("L", (60, 20))
    ImageDraw.Draw(mask).rectangle((20, 5, 39, 14), fill=255)
    image.paste((0, 255, 0), (20, 5, 40, 15))
    out = np.asarray(fill(image, mask)).astype(int)
    hidden = np.asarray(mask) > 0
    assert out[hidden][:, 1].max() <= 2  # nothing of the green
    assert np.abs(out - np.asarray(image))[~hidden].max() <= 2
    assert out[10, 22, 0] > 150 > 100 > out[10, 22, 2] and out[10, 37, 2] > 150 > 100 > out[10, 37, 0]
