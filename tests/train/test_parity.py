"""Training here and training written with diffusers', transformers' and torch's modules, side by side for 20 steps.

Both sides begin with the same weights and are given the same latents, texts, timesteps and noise.

Weights are compared in float64. AdamW divides a gradient by its own size, so that where a gradient is small it makes
steps of what is rounding: in float32 the losses of 20 steps still agree to 3e-7, but single weights to 1e-3 only (and
the bias of a k_proj, which has no influence on a softmax, goes where its rounding leads it). For the same reason the
reference is given our alphas_cumprod, which diffusers has in float32; test_objective.py compares the tables.
"""

import copy
from functools import cache
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from family import SD1, SD2_V, XL, ZERO_SNR, parts_of, scheduler
from parity import text_prefix, twin

from ldm.checkpoint import NETS
from ldm.models import Model
from ldm.samplers.schedule import Schedule
from ldm.train.loop import step_generator
from ldm.train.objective import Diffusion, Draws, Objective, draw, encode, signal

STEPS, BATCH, SHAPE, LENGTH = 20, 4, (4, 4, 8, 6), 9
TEXTS = ("text_encoder", "text_encoder_2")


class Case(NamedTuple):
    """`moves`: how many tensors of the trained parts must change, and no other. All of them, but SDXL's first encoder's
    last layer (16) and final LayerNorm (2), which nothing reads."""

    model: Model
    moves: int
    objective: Objective = Objective()
    trained: tuple[str, ...] = ("unet",)
    prior: bool = False


CASES = {
    "SD 1": Case(SD1, 208),
    "SD 1 with text encoder": Case(SD1, 208 + 52, trained=("unet", "text_encoder")),
    "SD 2 v": Case(SD2_V, 208),
    "SDXL": Case(XL, 292),
    "SDXL with text encoders": Case(XL, 292 + 52 - 18 + 53, trained=("unet", *TEXTS)),
    "prior preservation": Case(SD1, 208, Objective(prior_weight=0.7), prior=True),
    "min-SNR, epsilon": Case(SD1, 208, Objective(min_snr=5)),
    "min-SNR, v": Case(SD2_V, 208, Objective(min_snr=5)),
    "offset noise, v": Case(SD2_V, 208, Objective(offset_noise=0.1)),
    "noise on the input": Case(SD1, 208, Objective(input_noise=0.1)),
    "zero terminal SNR": Case(ZERO_SNR, 208),
    "caption dropout": Case(SD1, 208 + 52, Objective(caption_dropout=0.4), trained=("unet", "text_encoder")),
}


class Batch(NamedTuple):
    mean: torch.Tensor
    std: torch.Tensor
    ids: torch.Tensor
    empty: torch.Tensor
    sizes: torch.Tensor
    of_class: torch.Tensor


def batch_of(step, dtype):
    """The same texts for both of SDXL's encoders: start, words, end and as many ends as there is room for."""
    generator = torch.Generator().manual_seed(100 + step)
    ids = torch.full((BATCH + 1, LENGTH), SD1.text_encoder.end_token)
    ids[:, 0] = 518
    for i in range(BATCH):
        words = 1 + i
        ids[i, 1 : 1 + words] = torch.randint(500, (words,), generator=generator)
    mean = torch.randn(SHAPE, generator=generator).to(dtype)
    std = 0.1 * torch.rand(SHAPE, generator=generator).to(dtype)
    sizes = torch.randint(8, 90, (BATCH, 6), generator=generator).float()
    return Batch(mean, std, ids[:-1], ids[-1], sizes, torch.arange(BATCH) >= BATCH // 2)


def pair(model, dtype):
    """diffusers' nets and ours, on the same values in memory of their own."""
    theirs = {part: net for part, net in parts_of(model).items() if part in ("unet", *TEXTS)}
    ours = {}
    for part, net in theirs.items():
        net.to(dtype).requires_grad_(True)
        prefix = text_prefix(net) if part in TEXTS else ""
        ours[part] = twin(NETS[part][0], getattr(model, part), copy.deepcopy(net), prefix)
    return theirs, ours


def optimise(case, nets, loss_of):
    """The losses, and the weights of every net before and after."""
    for part, net in nets.items():
        if part not in case.trained:
            net.requires_grad_(False)
    optimizer = torch.optim.AdamW([p for part in case.trained for p in nets[part].parameters()], 1e-3, fused=True)
    before, losses = copy.deepcopy(weights(nets)), []
    for step in range(STEPS):
        loss = loss_of(step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return torch.tensor(losses, dtype=torch.float64), before, weights(nets)


def draws_of(step, dtype):
    t, *others = draw(SHAPE, step_generator(3, step))
    return Draws(t, *(numbers.to(dtype) for numbers in others))


def weights(nets):
    return {
        f"{part}.{name.removeprefix('text_model.')}": p.detach()
        for part, net in nets.items()
        for name, p in net.named_parameters()
    }


def train_theirs(case, nets, dtype, autocast=False):
    model, options = case.model, case.objective
    noising = scheduler(DDPMScheduler, model)
    if dtype == torch.float64:
        noising.alphas_cumprod = signal(Schedule.from_config(model.scheduler), torch.arange(1000))

    def texts_of(ids):
        if model.text_encoder_2 is None:
            return nets["text_encoder"](ids)[0], {}
        hidden = [nets[part](ids, output_hidden_states=True) for part in TEXTS]
        return torch.cat([h.hidden_states[-2] for h in hidden], dim=-1), {"text_embeds": hidden[1].text_embeds}

    def loss_of(step):
        batch, draws = batch_of(step, dtype), draws_of(step, dtype)
        z, t = batch.mean + batch.std * draws.sample, draws.t
        noise = draws.noise + options.offset_noise * draws.offset
        x = noising.add_noise(z, noise + options.input_noise * draws.perturbation, t)
        epsilon = noising.config.prediction_type == "epsilon"
        target = noise if epsilon else noising.get_velocity(z, noise, t)
        ids = batch.ids.clone()
        ids[draws.dropout < options.caption_dropout] = batch.empty
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            context, added = texts_of(ids)
            added = added | {"time_ids": batch.sizes} if added else None
            out = nets["unet"](x, t, context, added_cond_kwargs=added).sample.to(dtype)
        if case.prior:
            subject, prior = (F.mse_loss(*both) for both in zip(out.chunk(2), target.chunk(2), strict=True))
            return subject + options.prior_weight * prior
        if options.min_snr is None:
            return F.mse_loss(out, target)
        snr = noising.alphas_cumprod[t] / (1 - noising.alphas_cumprod[t])
        weight = torch.minimum(snr, torch.full_like(snr, options.min_snr)) / (snr if epsilon else snr + 1)
        return (weight * F.mse_loss(out, target, reduction="none").mean(dim=[1, 2, 3])).mean()

    return optimise(case, nets, loss_of)


def train_ours(case, nets, dtype, autocast=False):
    model, options = case.model, case.objective
    schedule, prediction = Schedule.from_config(model.scheduler), model.scheduler["prediction_type"]
    encoders = [nets[part] for part in TEXTS if part in nets]
    teaches = "text_encoder" in case.trained
    diffusion = Diffusion(nets["unet"], encoders if teaches else (), autocast=autocast)

    def condition_of(ids):
        """Without an encoder to train: encoded beforehand."""
        texts = (ids,) * len(encoders)
        if not teaches:
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                texts = encode(encoders, texts)[: len(encoders)]
        return texts

    def loss_of(step):
        batch, draws = batch_of(step, dtype), draws_of(step, dtype)
        of_class = batch.of_class if case.prior else None
        rows = options.rows(batch.mean, batch.std, draws, schedule, prediction, of_class)
        condition = condition_of(options.with_dropout(batch.ids, batch.empty, draws))
        return diffusion(*rows, *condition, *([batch.sizes] if len(encoders) == 2 else []))

    return optimise(case, nets, loss_of)


def off(ours, theirs):
    """Largest difference, of the largest value."""
    return float((ours - theirs).abs().max() / theirs.abs().max())


def off_each(ours, theirs):
    return float((ours / theirs - 1).abs().max())


@cache
def both(name, dtype, autocast=False):
    case = CASES[name]
    theirs, ours = pair(case.model, dtype)
    return train_ours(case, ours, dtype, autocast), train_theirs(case, theirs, dtype, autocast)


@pytest.mark.parametrize("name", CASES)
def test_losses_and_weights_are_diffusers(name):
    (losses, start, end), (their_losses, their_start, their_end) = both(name, torch.float64)
    assert end.keys() == their_end.keys()
    assert off_each(losses, their_losses) < 1e-10
    moved = 0
    for tensor, theirs in their_end.items():
        assert torch.equal(start[tensor], their_start[tensor]), tensor
        if torch.equal(theirs, their_start[tensor]):
            assert torch.equal(end[tensor], start[tensor]), tensor
        else:
            moved += 1
            assert off(end[tensor], theirs) < 1e-9, tensor
            assert off(end[tensor] - start[tensor], theirs - their_start[tensor]) < 1e-6, tensor
    assert moved == CASES[name].moves


@pytest.mark.parametrize("name", ["SD 1 with text encoder", "SDXL with text encoders", "min-SNR, v"])
def test_losses_in_float32_are_those_of_diffusers_untouched(name):
    (losses, *_), (theirs, *_) = both(name, torch.float32)
    assert off_each(losses, theirs) < 1e-5


@pytest.mark.parametrize("name", ["SD 1 with text encoder", "SDXL with text encoders"])
def test_bfloat16_is_as_under_diffusers(name):
    """The first losses are the same. Later ones part by what bfloat16 makes of another rounding, up to 7e-4, where
    diffusers in bfloat16 is 1e-3 (SD 1) and 2e-2 (SDXL) beside itself in float32. The weights stay float32."""
    ours, theirs = both(name, torch.float32, autocast=True)
    _, full = both(name, torch.float32)
    assert off_each(ours[0][:1], theirs[0][:1]) < 1e-6
    assert off_each(theirs[0], full[0]) > 5e-4
    assert off_each(ours[0], theirs[0]) < 2e-3
    assert {p.dtype for p in ours[2].values()} == {torch.float32}
