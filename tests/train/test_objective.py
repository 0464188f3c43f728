"""The loss of training: against diffusers' functions, and against what can be worked out on paper."""

import copy
import math
import weakref

import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr
from family import SD1, SD2_V, XL, ZERO_SNR, scheduler
from parity import randomise
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from ldm.clip import TextEncoder
from ldm.samplers.schedule import Schedule
from ldm.train.loop import step_generator
from ldm.train.objective import (
    Diffusion,
    Draws,
    Objective,
    draw,
    min_snr_weight,
    noised,
    prior_weights,
    signal,
    target,
)
from ldm.unet import UNet

SHAPE = (4, 4, 6, 8)
EVERY_T = torch.arange(1000)
PLAIN, ZERO = Schedule(), Schedule(zero_snr=True)
SCHEDULES = [(PLAIN, "epsilon"), (PLAIN, "v_prediction"), (ZERO, "v_prediction")]
IDS = ["epsilon", "v", "v, zero terminal SNR"]


def random(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# Noise and target


@pytest.mark.parametrize("model", [SD1, ZERO_SNR], ids=["SD 1", "zero terminal SNR"])
def test_noise_and_velocity_are_diffusers_at_every_timestep(model):
    """To 6e-7 of the largest value: diffusers' table is float32, which tells on the small sqrt(1 - a)."""

    def off(ours, theirs):
        return (ours - theirs).abs().max() / theirs.abs().max()

    z, noise = random((1000, 4, 2, 2), 1), random((1000, 4, 2, 2), 2)
    theirs, ours = scheduler(DDPMScheduler, model), Schedule.from_config(model.scheduler)
    assert (signal(ours, EVERY_T).sqrt() - theirs.alphas_cumprod.double().sqrt()).abs().max() < 1e-6
    assert off(noised(z, noise, EVERY_T, ours), theirs.add_noise(z, noise, EVERY_T)) < 1e-6
    assert off(target(z, noise, EVERY_T, ours, "v_prediction"), theirs.get_velocity(z, noise, EVERY_T)) < 1e-6
    assert target(z, noise, EVERY_T, PLAIN, "epsilon") is noise


def test_zero_terminal_snr_ends_in_noise_alone():
    z, noise, t = random(SHAPE, 1), random(SHAPE, 2), torch.tensor([999, 999, 998, 0])
    x, v = noised(z, noise, t, ZERO), target(z, noise, t, ZERO, "v_prediction")
    assert torch.equal(x[:2], noise[:2]) and torch.equal(v[:2], -z[:2])
    assert not torch.equal(x[2], noise[2])
    assert torch.equal(signal(ZERO, EVERY_T)[:-1], ZERO.alphas_cumprod[:-1])


class Ideal(nn.Module):
    """The best a net can say of x = sqrt(a) z + sqrt(1 - a) noise if each number of z is N(mean, std^2)."""

    def __init__(self, schedule, prediction_type, mean, std):
        super().__init__()
        self.schedule, self.v = schedule, prediction_type == "v_prediction"
        self.mean, self.var = mean, std**2

    def forward(self, x, t, context, vector):
        a = signal(self.schedule, t)[:, None, None, None].to(x.dtype)
        excess = (x - a.sqrt() * self.mean) / (a * self.var + 1 - a)
        noise, z = (1 - a).sqrt() * excess, self.mean + a.sqrt() * self.var * excess
        return a.sqrt() * noise - (1 - a).sqrt() * z if self.v else noise


@pytest.mark.parametrize(("schedule", "prediction_type"), SCHEDULES, ids=IDS)
def test_data_that_are_one_point_have_no_loss(schedule, prediction_type):
    mean = random((1000, 4, 2, 2)).double()
    draws = Draws(EVERY_T, *draw(mean.shape, step_generator(0, 0))[1:])._replace(noise=random(mean.shape, 1).double())
    rows = Objective().rows(mean, torch.zeros_like(mean), draws, schedule, prediction_type)
    assert Diffusion(Ideal(schedule, prediction_type, mean, 0.0))(*rows, torch.zeros(1000)) < 1e-20
    assert Diffusion(Ideal(schedule, prediction_type, mean + 0.01, 0.0))(*rows, torch.zeros(1000)) > 1e-6


@pytest.mark.parametrize(("schedule", "prediction_type"), SCHEDULES, ids=IDS)
def test_least_loss_on_gaussian_data(schedule, prediction_type):
    """z ~ N(m, s^2): of epsilon a s^2 / (a s^2 + 1 - a) cannot be told from x, of v s^2 / (a s^2 + 1 - a).

    The mean over all t, with weights that differ, to 3 digits by 4 million numbers, whose own standard error is 8e-4 at
    most (2 / 3.6e6 of the square, if all t were alike).
    """
    m, s, count = 0.3, 0.7, 100
    a = signal(schedule, EVERY_T)
    least = (s**2 if prediction_type == "v_prediction" else a * s**2) / (a * s**2 + 1 - a)
    weight = 0.5 + EVERY_T / 1000
    net = Diffusion(Ideal(schedule, prediction_type, m, s))
    worse = Diffusion(Ideal(schedule, prediction_type, m, 1.1 * s))
    losses, worse_losses = [], []
    for step in range(count):
        draws = draw((1000, 4, 3, 3), step_generator(5, step))._replace(t=EVERY_T)
        mean = torch.full((1000, 4, 3, 3), m)
        x, t, answer, ones = Objective().rows(mean, torch.full_like(mean, s), draws, schedule, prediction_type)
        assert torch.equal(ones, torch.ones(1000))
        losses.append(net(x, t, answer, weight, ones))
        worse_losses.append(worse(x, t, answer, weight, ones))
    expected = (weight * least).mean()
    assert sum(losses) / count == pytest.approx(float(expected), rel=1e-3)
    assert sum(worse_losses) / count > 1.003 * expected


# Weights


@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_min_snr_is_diffusers(gamma):
    """To the digits that 1 - a has in diffusers' float32 table: five at t = 0, six at t = 100."""
    theirs = compute_snr(scheduler(DDPMScheduler, SD1), EVERY_T)
    a = signal(PLAIN, EVERY_T)
    snr, cut = a / (1 - a), torch.minimum(theirs, torch.full_like(theirs, gamma))
    for prediction_type, expected in (("epsilon", cut / theirs), ("v_prediction", cut / (theirs + 1))):
        off = (min_snr_weight(snr, gamma, prediction_type) / expected - 1).abs()
        assert off.max() < 1e-4 and off[100:].max() < 1e-5


def test_min_snr_at_both_ends():
    """An error e of z is one of sqrt(snr) e of epsilon, and of sqrt(snr + 1) e of v: both weigh it min(snr, gamma)."""
    snr, gamma = torch.tensor([0, 1e-9, 1.0, 4.9, 5.1, 1e9], dtype=torch.float64), 5.0
    epsilon, v = (min_snr_weight(snr, gamma, p) for p in ("epsilon", "v_prediction"))
    assert torch.allclose(epsilon[1:] * snr[1:], snr[1:].clamp(max=gamma), rtol=1e-12)
    assert torch.allclose(v * (snr + 1), snr.clamp(max=gamma), rtol=1e-12)
    assert epsilon[0] == epsilon[1] == epsilon[3] == 1
    assert v[0] == 0 and v[-1] == pytest.approx(5e-9) and epsilon[-1] == pytest.approx(5e-9)


@pytest.mark.parametrize("classes", [(0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 1), (1, 1, 0, 1), (1, 1, 1, 1)])
def test_prior_weights_are_two_means(classes):
    of_class, loss = torch.tensor(classes).bool(), torch.tensor([1.0, 2.0, 4.0, 8.0], dtype=torch.float64)
    subject, prior = loss[~of_class], loss[of_class]
    expected = (subject.mean() if len(subject) else 0) + 0.3 * (prior.mean() if len(prior) else 0)
    assert (prior_weights(of_class, 0.3) * loss).mean() == pytest.approx(float(expected), rel=1e-12)


def test_weights_multiply():
    mean, of_class = random(SHAPE), torch.tensor([True, False, False, True])
    draws = draw(SHAPE, step_generator(0, 1))
    weigh = {"schedule": PLAIN, "prediction_type": "epsilon"}
    *_, snr = Objective(min_snr=5).rows(mean, mean, draws, **weigh)
    *_, prior = Objective(prior_weight=0.5).rows(mean, mean, draws, **weigh, of_class=of_class)
    *_, both = Objective(min_snr=5, prior_weight=0.5).rows(mean, mean, draws, **weigh, of_class=of_class)
    assert both.dtype == torch.float32 and torch.allclose(both, snr * prior)
    assert prior.tolist() == [1, 2, 2, 1] and (snr < 1).any()


# Random numbers


def test_draws_come_in_the_order_of_their_fields():
    generator = step_generator(3, 7)
    t, sample, noise, offset, perturbation, dropout = draw(SHAPE, step_generator(3, 7))
    assert torch.equal(t, torch.randint(1000, (4,), generator=generator))
    for drawn, shape in ((sample, SHAPE), (noise, SHAPE), (offset, (4, 4, 1, 1)), (perturbation, SHAPE)):
        assert torch.equal(drawn, torch.randn(shape, generator=generator))
    assert torch.equal(dropout, torch.rand(4, generator=generator))
    assert not torch.equal(noise, draw(SHAPE, step_generator(3, 8)).noise)


def test_timesteps_are_uniform_with_both_ends():
    t = draw((100_000, 1, 1, 1), step_generator(0, 0)).t
    counts = t.bincount(minlength=1000)
    assert len(counts) == 1000 and counts.min() > 50 and counts.max() < 160


def test_noise_and_its_options():
    """x and target, of statistics of 100,000 numbers at least, to 3 %."""
    mean, std = random((400, 4, 16, 16), 1), torch.full((400, 4, 16, 16), 0.5)
    draws = draw(mean.shape, step_generator(0, 0))
    a = signal(PLAIN, draws.t)[:, None, None, None].float()

    def noise_of(**options):
        x, _, answer, _ = Objective(**options).rows(mean, std, draws, PLAIN, "epsilon")
        return (x - a.sqrt() * (mean + std * draws.sample)) / (1 - a).sqrt(), answer

    noise, answer = noise_of()
    assert torch.allclose(noise, draws.noise, atol=1e-4) and torch.equal(answer, draws.noise)

    noise, answer = noise_of(offset_noise=0.5)
    assert torch.allclose(noise, answer, atol=1e-4)
    assert noise.mean(dim=(2, 3)).var() == pytest.approx(0.5**2 + 1 / 256, rel=0.1)
    assert (noise - noise.mean(dim=(2, 3), keepdim=True)).var() == pytest.approx(255 / 256, rel=0.01)

    noise, answer = noise_of(input_noise=0.5)
    assert torch.equal(answer, draws.noise)
    assert (noise - answer).var() == pytest.approx(0.25, rel=0.03)
    assert ((noise - answer) * answer).mean().abs() < 0.01


def test_latents_of_half_precision_are_noised_in_float32():
    mean, std = random(SHAPE).half(), random(SHAPE).abs().half()
    x, _, answer, weight = Objective().rows(mean, std, draw(SHAPE, step_generator(0, 0)), PLAIN, "v_prediction")
    assert x.dtype == answer.dtype == weight.dtype == torch.float32


def test_caption_dropout():
    ids, context, pooled = torch.arange(4000 * 3).view(4000, 3), random((4000, 3, 2)), random((4000, 2))
    draws = draw((4000, 1, 1, 1), step_generator(0, 0))
    empty = torch.tensor([-1, -2, -3])
    assert torch.equal(Objective().with_dropout(ids, empty, draws), ids)
    assert torch.equal(Objective(caption_dropout=1).with_dropout(ids, empty, draws), empty.expand(4000, 3))
    some = Objective(caption_dropout=0.3)
    new = some.with_dropout(ids, empty, draws)
    dropped = (new == empty).all(1)
    assert torch.equal(new[~dropped], ids[~dropped]) and 0.27 < dropped.float().mean() < 0.33
    for rows in (context, pooled):
        new = some.with_dropout(rows, torch.zeros_like(rows[0]), draws)
        assert torch.equal(new.flatten(1).any(1), ~dropped) and torch.equal(new[~dropped], rows[~dropped])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"min_snr": 0.0}, "min_snr=0.0"),
        ({"min_snr": math.nan}, "min_snr=nan"),
        ({"offset_noise": -0.1}, "offset_noise=-0.1"),
        ({"input_noise": math.inf}, "input_noise=inf"),
        ({"prior_weight": -1.0}, "prior_weight=-1.0"),
        ({"caption_dropout": 10.0}, "caption_dropout=10.0: give a share"),
    ],
)
def test_options_that_cannot_be(options, said):
    with pytest.raises(ValueError, match=said):
        Objective(**options)


def test_targets_that_cannot_be():
    z, t = random(SHAPE), torch.zeros(4, dtype=torch.long)
    with pytest.raises(ValueError, match="'sample': use one of epsilon, v_prediction"):
        target(z, z, t, PLAIN, "sample")
    with pytest.raises(ValueError, match="use v_prediction"):
        target(z, z, t, ZERO, "epsilon")


# The nets


def nets_of(model):
    nets = [UNet(model.unet), *(TextEncoder(c) for c in (model.text_encoder, model.text_encoder_2) if c)]
    return [randomise(net, seed=seed) for seed, net in enumerate(nets)]


def rows_of(model, count=4):
    """What `Diffusion` takes for a model with its text encoders."""
    shape = (count, 4, 8, 8)
    schedule, prediction = Schedule.from_config(model.scheduler), model.scheduler["prediction_type"]
    rows = Objective().rows(random(shape), torch.ones(shape), draw(shape, step_generator(0, 0)), schedule, prediction)
    ids = torch.randint(500, (count, 9), generator=step_generator(0, 1))
    ids[:, -1] = 519
    return (*rows, *([ids, ids, 8.0 * torch.ones(count, 6)] if model.text_encoder_2 else [ids]))


def gradients(diffusion, rows):
    diffusion.zero_grad()
    diffusion(*rows).backward()
    return {name: p.grad for name, p in diffusion.named_parameters()}


@pytest.mark.parametrize(("model", "clip_skip"), [(SD1, 1), (SD1, 2), (SD2_V, 3), (XL, 1), (XL, 2)])
def test_every_weight_but_the_frozen_gets_a_gradient(model, clip_skip):
    """Of SD 1's three layers of text the last clip_skip - 1 are not read; of SDXL's encoders one more, with the final
    LayerNorm, but the second is read to its end by the pooled token."""
    unet, *encoders = nets_of(model)
    diffusion = Diffusion(unet, encoders, clip_skip=clip_skip)
    frozen = {name for name, p in diffusion.named_parameters() if not p.requires_grad}
    layers = range(3 - (clip_skip - 1) - (model is XL), 3)
    assert {int(name.split(".")[5]) for name in frozen if "layers" in name} == set(layers)
    assert any("final_layer_norm" in name for name in frozen) == (model is XL)
    assert all(name.startswith("text_encoders.0.text_model.") for name in frozen)
    assert {name for name, grad in gradients(diffusion, rows_of(model)).items() if grad is None} == frozen


def test_clip_skip_is_the_text_encoders():
    unet, encoder = nets_of(SD1)
    x, t, answer, weight, ids = rows_of(SD1)
    given = Diffusion(unet)(x, t, answer, weight, encoder(ids, 2).context)
    assert torch.equal(Diffusion(unet, [encoder], clip_skip=2)(x, t, answer, weight, ids), given)
    assert not torch.equal(Diffusion(unet, [encoder])(x, t, answer, weight, ids), given)


@pytest.mark.parametrize("model", [SD1, XL], ids=["SD 1", "SDXL"])
def test_frozen_nets_are_left_alone(model):
    unet, *encoders = nets_of(model)
    diffusion = Diffusion(unet.requires_grad_(False), encoders)
    grads = gradients(diffusion, rows_of(model))
    assert {name.split(".")[0] for name, grad in grads.items() if grad is not None} == {"text_encoders"}


def test_parts_of_a_batch_by_their_share_are_the_batch():
    unet, *encoders = nets_of(XL)
    diffusion = Diffusion(unet, encoders)
    x, t, answer, weight, *condition = rows_of(XL, 5)
    rows = (x, t, answer, weight * prior_weights(torch.tensor([True, False, False, True, True]), 0.4), *condition)
    whole = gradients(diffusion, rows)
    diffusion.zero_grad()
    for part in (slice(0, 1), slice(1, 5)):
        share = len(x[part]) / 5
        (share * diffusion(*(r[part] for r in rows))).backward()
    for name, p in diffusion.named_parameters():
        if p.grad is not None:
            assert (p.grad - whole[name]).abs().max() <= 1e-5 * whole[name].abs().max() + 1e-7, name


# Checkpointing


class Peak(TorchDispatchMode):
    """The most bytes alive at once of what was made under it."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0
        self.seen = set()

    def free(self, key, size):
        self.now -= size
        self.seen.remove(key)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_iter((args, kwargs)) if isinstance(t, torch.Tensor)}
        for tensor in tree_iter(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.seen | given:
                    self.seen.add(storage._cdata)
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self.free, storage._cdata, storage.nbytes())
        self.most = max(self.most, self.now)
        return out


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("model", [SD1, XL], ids=["SD 1", "SDXL"])
def test_checkpointing_has_the_same_gradients_in_less_memory(model, autocast):
    """A sixth is kept (of SD 1 in float32 1.9 of 11 MiB) and, gradients included, the peak is a third."""
    nets, rows, found = nets_of(model), rows_of(model, 16), []
    for checkpointing in (False, True):
        unet, *encoders = copy.deepcopy(nets)
        diffusion = Diffusion(unet, encoders, autocast=autocast, checkpointing=checkpointing)
        assert diffusion.state_dict().keys() == Diffusion(nets[0], nets[1:]).state_dict().keys()
        with Peak() as peak:
            loss = diffusion(*rows)
            kept = peak.now
            loss.backward()
        found.append((loss, {n: p.grad for n, p in diffusion.named_parameters() if p.requires_grad}, kept, peak.most))
    (loss, grads, kept, most), (again, grads_again, kept_again, most_again) = found
    assert torch.equal(loss, again)
    assert all(torch.equal(grad, grads_again[name]) for name, grad in grads.items())
    assert all(grad.dtype == torch.float32 for grad in grads.values())
    assert kept_again < 0.25 * kept and most_again < 0.5 * most


def test_checkpointing_twice_costs_no_more_and_copies_stand_alone():
    nets, rows, runs = nets_of(SD1), rows_of(SD1), []
    for _ in range(2):
        diffusion = Diffusion(nets[0], nets[1:], checkpointing=True)
    other = copy.deepcopy(diffusion)
    nets[0].mid_block.resnets[0].norm1.register_forward_hook(lambda *_: runs.append(1))
    diffusion(*rows).backward()
    assert len(runs) == 2  # on the way forth, and once more on the way back
    other(*rows).backward()
    assert len(runs) == 2
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(diffusion.parameters(), other.parameters(), strict=True))
