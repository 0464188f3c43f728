"""From a folder of pictures to a file that this library and diffusers load: on tiny models of each kind."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from family import REFINER, SD1, SD1_INPAINT, SD2_V, XL, assert_close, ours, reference, saved, theirs
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import ldm
from ldm import hub, image
from ldm.convert import convert
from ldm.image import to_tensor
from ldm.train.__main__ import main, parser, trained
from ldm.train.batches import Batches
from ldm.train.dreambooth import Run, dreambooth, embedding, finetune
from ldm.train.loop import step_generator
from ldm.train.objective import Objective, draw
from ldm.train.objective import signal as signal_at
from ldm.train.pictures import open_folder
from ldm.train.training import Training

KINDS = {"SD 1": SD1, "SD 2 v": SD2_V, "SDXL": XL}
SAMPLERS = dict.fromkeys(KINDS, diffusers.DDIMScheduler) | {"SDXL": diffusers.EulerDiscreteScheduler}
FAST = Training(steps=3, batch=2, learning_rate=1e-3, resolution=32)
SMALL = {"width": 32, "height": 32, "guidance_scale": 3.0}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """models[kind]: the folder of a tiny model."""
    made = {}
    for kind, model in KINDS.items():
        made[kind] = tmp_path_factory.mktemp("models") / kind.replace(" ", "")
        saved(reference(model, SAMPLERS[kind]), made[kind])
    return made


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    random = np.random.default_rng(0)
    for i in range(3):
        Image.fromarray(random.integers(0, 255, (40, 36 + i, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return folder


def weights(path):
    pipe = ldm.Pipeline.from_pretrained(path)
    nets = {name: net for name in ("unet", "text_encoder", "text_encoder_2", "vae") if (net := getattr(pipe, name))}
    return {f"{name}.{key}": value for name, net in nets.items() for key, value in net.state_dict().items()}


def changed(before, after):
    """The nets of which a weight is another."""
    return {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("single", [True, False])
def test_whole_nets(models, pictures, tmp_path, kind, single):
    """The UNet alone is another; what diffusers loads makes the same picture."""
    out = tmp_path / ("mine.safetensors" if single else "mine")
    dreambooth(models[kind], pictures, "a cat", out, FAST, class_prompt="the red", class_count=3)
    assert changed(weights(models[kind]), weights(out)) == {"unet"}
    assert len(list((tmp_path / f"{out.name}.run").glob("class-*/class-*.png"))) == 3
    cls = type(reference(KINDS[kind], SAMPLERS[kind]))
    if single:
        other = cls.from_single_file(out, config=str(models[kind]), local_files_only=True)
    else:
        other = cls.from_pretrained(out)
    other.set_progress_bar_config(disable=True)
    mine = ldm.Pipeline.from_pretrained(out)
    sampler = SAMPLERS[kind].__name__
    assert_close(ours(mine, 3, sampler=sampler, prompt="a cat", **SMALL), theirs(other, 3, prompt="a cat", **SMALL))


@pytest.mark.parametrize("kind", ["SD 1", "SDXL"])
def test_with_the_text_encoders(models, pictures, tmp_path, kind):
    out = tmp_path / "mine.safetensors"
    dreambooth(models[kind], pictures, "a cat", out, replace(FAST, text_encoder=True))
    expected = {"unet", "text_encoder"} | ({"text_encoder_2"} if kind == "SDXL" else set())
    assert changed(weights(models[kind]), weights(out)) == expected


@pytest.mark.parametrize("layout", ["kohya", "peft"])
def test_lora(models, pictures, tmp_path, layout):
    """It changes the picture, and diffusers changes it alike."""
    out = tmp_path / "lora.safetensors"
    dreambooth(models["SD 1"], pictures, "a cat", out, replace(FAST, rank=2, learning_rate=0.05), layout=layout)
    pipe = ldm.Pipeline.from_pretrained(models["SD 1"])
    before = ours(pipe, 3, prompt="a cat", sampler="ddim", **SMALL)
    pipe.load_lora(out)
    after = ours(pipe, 3, prompt="a cat", sampler="ddim", **SMALL)
    assert (after - before).abs().max() > 1e-2
    other = diffusers.StableDiffusionPipeline.from_pretrained(models["SD 1"], safety_checker=None)
    other.set_progress_bar_config(disable=True)
    other.load_lora_weights(out)
    assert_close(after, theirs(other, 3, prompt="a cat", **SMALL))


@pytest.mark.parametrize(("kind", "clip_skip", "untouched"), [("SD 1", 2, "text_encoder"), ("SDXL", 1, "text_encoder")])
def test_lora_of_text_encoders(models, pictures, tmp_path, kind, clip_skip, untouched):
    """Every path learns; layers that nobody reads, the last of this encoder, have none."""
    out = tmp_path / "lora.safetensors"
    how = replace(FAST, rank=2, text_encoder=True, clip_skip=clip_skip)
    dreambooth(models[kind], pictures, "a cat", out, how, layout="peft")
    ups = {name: tensor for name, tensor in load_file(out).items() if "lora_B" in name}
    assert all(tensor.abs().max() > 0 for tensor in ups.values())
    layers = ldm.Pipeline.from_pretrained(models[kind]).text_encoder.config.layers
    own = {int(re.search(r"layers\.(\d+)", name)[1]) for name in ups if name.startswith(f"{untouched}.")}
    assert own == set(range(layers - 1))
    pipe = ldm.Pipeline.from_pretrained(models[kind])
    before = weights(models[kind])
    pipe.load_lora(out)
    nets = {name for name in ("unet", "text_encoder", "text_encoder_2") if getattr(pipe, name) is not None}
    after = {f"{n}.{key}": value for n in nets for key, value in getattr(pipe, n).state_dict().items()}
    assert changed({name: value for name, value in before.items() if name in after}, after) == nets


def test_embedding(models, pictures, tmp_path):
    out = tmp_path / "sks.safetensors"
    embedding(models["SD 1"], pictures, "sks", out, replace(FAST, learning_rate=0.5), init_word="cat")
    assert changed(weights(models["SD 1"]), weights(models["SD 1"])) == set()
    pipe = ldm.Pipeline.from_pretrained(models["SD 1"])
    assert pipe.load_embedding(out) == "sks"
    assert (ours(pipe, 3, prompt="sks") - ours(pipe, 3, prompt="cat")).abs().max() > 1e-3
    with pytest.raises(ValueError, match=r"3 captions do not have the word: write \{word\} where it stands"):
        embedding(models["SD 1"], pictures, "sks", tmp_path / "other.safetensors", FAST, caption="a photo")


def test_finetune_in_buckets(models, pictures, tmp_path):
    """Captions of the pictures' own; the loss falls on pictures that are seen again and again."""
    folder = tmp_path / "captioned"
    folder.mkdir()
    for i, size in enumerate([(64, 32), (32, 64), (40, 40), (64, 30)]):
        Image.new("RGB", size, (60 * i, 0, 255 - 60 * i)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(["a cat", "the red", "a dog", "in"][i])
    out = tmp_path / "mine.safetensors"
    finetune(models["SD 1"], folder, out, replace(FAST, steps=60, batch=4, bucketed=True))
    log = [json.loads(line) for line in (tmp_path / "mine.safetensors.run" / "log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in log]
    assert len(losses) == 60 and np.mean(losses[-15:]) < 0.9 * np.mean(losses[:15])


@pytest.mark.parametrize("rank", [None, 2])
def test_stopped_and_gone_on_with(models, pictures, tmp_path, monkeypatch, rank):
    """The tensors are the same to the last bit. What was computed beforehand is not computed again."""
    how = replace(FAST, steps=6, rank=rank, objective=Objective(caption_dropout=0.3, offset_noise=0.1))
    dreambooth(models["SD 1"], pictures, "a cat", tmp_path / "whole.safetensors", how)
    calls = []
    batch = Batches.__call__

    def stopping(self, step):
        calls.append(step)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGTERM)
        return batch(self, step)

    monkeypatch.setattr(Batches, "__call__", stopping)
    with pytest.raises(KeyboardInterrupt, match="stopped after step 3 of 6"):
        dreambooth(models["SD 1"], pictures, "a cat", tmp_path / "parts.safetensors", how)
    assert not (tmp_path / "parts.safetensors").exists()
    dreambooth(models["SD 1"], pictures, "a cat", tmp_path / "parts.safetensors", how)
    assert calls == [0, 1, 2, 3, 4, 5]
    a, b = (load_file(tmp_path / f"{name}.safetensors") for name in ("whole", "parts"))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_made_longer(models, pictures, tmp_path):
    """Another three steps of a run that has ended are those of a run of six."""
    a, b = tmp_path / "six.safetensors", tmp_path / "three.safetensors"
    dreambooth(models["SD 1"], pictures, "a cat", a, replace(FAST, steps=6))
    dreambooth(models["SD 1"], pictures, "a cat", b, FAST)
    b.unlink()
    dreambooth(models["SD 1"], pictures, "a cat", b, replace(FAST, steps=6))
    six, three = load_file(a), load_file(b)
    assert six.keys() == three.keys() and all(torch.equal(six[name], three[name]) for name in six)


@pytest.mark.parametrize("other", ["prompt", "model", "picture", "word"])
def test_another_run_is_refused(models, pictures, tmp_path, other):
    """What would go on as something else is named; the same pictures by another path are the same."""
    out, folder = tmp_path / "mine.safetensors", tmp_path / "pictures"
    shutil.copytree(pictures, folder)
    learn = partial(embedding, word="sks", caption="{word}") if other == "word" else dreambooth
    prompt = () if other == "word" else ("a cat",)

    def start(model=models["SD 1"], folder=folder, prompt=prompt, **words):
        out.unlink(missing_ok=True)
        learn(model, folder, *prompt, out=out, training=replace(FAST, steps=2), **words)

    start()
    start(folder=tmp_path / "x" / ".." / "pictures" if (tmp_path / "x").mkdir() is None else None)
    if other == "prompt":
        named, again = "pictures", partial(start, prompt=("a dog",))
    elif other == "word":
        named, again = "word", partial(start, init_word="cat")
    elif other == "picture":
        Image.new("RGB", (40, 40)).save(folder / "0.png")
        named, again = "pictures", start
    else:
        halved = tmp_path / "halved"
        nets = {"unet": {k: v / 2 for k, v in ldm.Pipeline.from_pretrained(models["SD 1"]).unet.state_dict().items()}}
        convert(models["SD 1"], halved, nets=nets)
        named, again = "model.unet", partial(start, model=halved)
    with pytest.raises(ValueError, match=rf"is of another run[^\n]*\n    settings\.{named}"):
        again()


def test_class_pictures_are_kept_and_filled_up(models, pictures, tmp_path):
    folder = tmp_path / "class"
    folder.mkdir()
    Image.new("RGB", (32, 32), "red").save(folder / "own.png")
    (folder / "notes.md").write_text("no picture")
    how = {"class_prompt": "the red", "class_images": folder}
    dreambooth(models["SD 1"], pictures, "a cat", tmp_path / "a.safetensors", FAST, **how, class_count=3)
    made = {file.name: file.read_bytes() for file in folder.iterdir()}
    assert set(made) == {"own.png", "notes.md", "class-00000.png", "class-00001.png"}
    dreambooth(models["SD 1"], pictures, "a cat", tmp_path / "b.safetensors", FAST, **how, class_count=4)
    assert set(made.items()) < {(file.name, file.read_bytes()) for file in folder.iterdir()}
    assert len(list(folder.iterdir())) == 5
    (folder / "class-00000.png").write_bytes(b"broken")
    dreambooth(models["SD 1"], pictures, "a cat", tmp_path / "c.safetensors", FAST, **how, class_count=4)
    assert sum(file.suffix == ".png" for file in folder.iterdir()) == 5
    pipe = ldm.Pipeline.from_pretrained(models["SD 1"])
    alone = pipe("the red", seed=2, width=32, height=32, progress=False).images[0]
    assert np.array_equal(np.asarray(Image.open(folder / "class-00002.png")), np.asarray(alone))


def test_another_class_has_pictures_of_its_own(models, pictures, tmp_path):
    for name in ("the red", "a dog"):
        out = tmp_path / "mine.safetensors"
        dreambooth(
            models["SD 1"], pictures, "a cat", out, replace(FAST, seed=len(name)), class_prompt=name, class_count=2
        )
        out.rename(tmp_path / f"{name}.safetensors")
        for state in (tmp_path / "mine.safetensors.run").glob("step-*"):
            state.unlink()
    assert len(list((tmp_path / "mine.safetensors.run").glob("class-*"))) == 2


def test_nothing_is_overwritten(models, pictures, tmp_path):
    (tmp_path / "mine.safetensors").write_text("mine")
    with pytest.raises(FileExistsError, match="remove it, or give another name"):
        dreambooth(models["SD 1"], pictures, "a cat", tmp_path / "mine.safetensors", FAST)
    with pytest.raises(FileNotFoundError, match="make it first"):
        finetune(models["SD 1"], pictures, tmp_path / "no" / "mine.safetensors", FAST, caption="a cat")
    assert (tmp_path / "mine.safetensors").read_text() == "mine"


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"steps": 0}, "steps=0: give a whole number from 1"),
        ({"accumulate": 0}, "accumulate=0: give a whole number from 1"),
        ({"accumulate": 4}, "accumulate=4: give at most the batch, 1, which it divides"),
        ({"rank": 0}, "rank=0: give a whole number from 1"),
        ({"resolution": 0}, "resolution=0: give a whole number from 1"),
        ({"save_steps": 0}, "save_steps=0: give a whole number from 1"),
        ({"sample_every": 0}, "sample_every=0: give a whole number from 1"),
        ({"warmup": -1}, "warmup=-1: give a whole number of steps from 0"),
        ({"seed": 2**32}, "seed=4294967296: give a whole number from 0"),
        ({"learning_rate": 0.0}, "learning_rate=0.0: give a finite number above 0"),
        ({"ema_decay": float("nan")}, "ema_decay=nan: give a number between 0 and 1"),
        ({"ema_decay": 1.0}, "ema_decay=1.0: give a number between 0 and 1"),
        ({"schedule": "poly"}, "schedule='poly': give one of constant, linear, cosine"),
        ({"prediction_type": "x0"}, "prediction_type='x0': give one of epsilon, v_prediction"),
        ({"alpha": 4.0}, "alpha=4.0: give a rank, too, or leave it out"),
        ({"targets": "conv"}, "targets='conv': give a rank, too, or leave it out"),
        ({"rank": 4, "shard": True}, "shard=True: give it for whole nets, or leave out the rank"),
        ({"rank": 4, "zero_snr": True}, "zero_snr=True: give it for whole nets, or leave out the rank"),
        ({"shard": True, "sample_prompts": ("x",)}, "give none where the weights are divided"),
    ],
)
def test_what_cannot_be(how, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Training(**how)


def test_what_cannot_be_is_said_at_the_start(models, pictures, tmp_path):
    """Before a picture of the class is drawn or a text encoded."""
    cases = [
        (dict(instance_prompt=" "), "the instance prompt is empty"),
        (dict(class_images="x"), "class_images='x' without a class_prompt: say what they show"),
        (dict(class_prompt="the red", class_count=0), "class_count=0: give at least 1"),
        (dict(class_prompt="the red", training=replace(FAST, bucketed=True)), "bucketed with a class_prompt"),
        (dict(layout="diffusers"), "layout='diffusers': that of whole nets is 'kohya'"),
        (dict(training=replace(FAST, rank=2), layout="webui"), "that of a LoRA is 'kohya' or 'peft'"),
        (
            dict(training=replace(FAST, rank=2), out="mine"),
            "mine: a LoRA is a file, give it a name that ends in .safet",
        ),
        (dict(out="mine.png"), "mine.png: give a name that ends in .safetensors, or that of a folder"),
        (dict(out="mine.ckpt"), "mine.ckpt: give a name that ends in .safetensors, or that of a folder"),
        (dict(training=replace(FAST, shard=True)), "start it with torchrun, or leave it out"),
        (dict(training=replace(FAST, zero_snr=True)), "prediction_type='epsilon' with zero terminal SNR"),
        (dict(training=replace(FAST, rank=2, targets="bogus"), class_prompt="the red"), "targets='bogus'"),
    ]
    for words, message in cases:
        words = dict(instance_prompt="a cat", training=FAST) | words
        words["out"] = tmp_path / words.get("out", "mine.safetensors")
        with pytest.raises(ValueError, match=re.escape(message)):
            dreambooth(models["SD 1"], pictures, **words)
    with pytest.raises(ValueError, match="rank, shard and zero_snr are of nets"):
        embedding(models["SD 1"], pictures, "sks", tmp_path / "sks.safetensors", replace(FAST, rank=2))
    with pytest.raises(ValueError, match="an embedding is a file"):
        embedding(models["SD 1"], pictures, "sks", tmp_path / "sks.pt", FAST)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("kind", "message"), [("inpainting", "is an inpainting model"), ("refiner", "is SDXL's refiner")]
)
def test_models_that_are_not_trained(pictures, tmp_path, kind, message):
    model = SD1_INPAINT if kind == "inpainting" else REFINER
    saved(reference(model, diffusers.EulerDiscreteScheduler), tmp_path / "model")
    with pytest.raises(ValueError, match=message):
        finetune(tmp_path / "model", pictures, tmp_path / "mine.safetensors", FAST, caption="a cat")


def test_a_model_of_the_hub(models, pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "fetch_model", lambda name, *_: models["SD 1"])
    finetune("owner/tiny", pictures, tmp_path / "mine.safetensors", FAST, caption="a cat")
    assert changed(weights(models["SD 1"]), weights(tmp_path / "mine.safetensors")) == {"unet"}


@pytest.mark.parametrize("single", [True, False])
def test_zero_snr(models, pictures, tmp_path, single):
    """The net is shown noise alone at t = 999, and the result says so, to diffusers as well."""
    out = tmp_path / ("mine.safetensors" if single else "mine")
    finetune(models["SD 2 v"], pictures, out, replace(FAST, zero_snr=True), caption="a cat")
    run = Run(models["SD 2 v"], tmp_path / "other", replace(FAST, zero_snr=True), "kohya")
    assert signal_at(run.pipe.schedule, torch.tensor([999])) == 0
    pipe = ldm.Pipeline.from_pretrained(out)
    assert pipe.prediction_type == "v_prediction"
    torch.testing.assert_close(pipe.schedule.alphas_cumprod, run.pipe.schedule.alphas_cumprod)
    assert pipe.schedule.spacing == "trailing"
    if not single:
        other = diffusers.StableDiffusionPipeline.from_pretrained(out)
        assert other.scheduler.config.rescale_betas_zero_snr and other.scheduler.config.timestep_spacing == "trailing"


def test_every_option_reaches_the_loop(models, pictures, tmp_path, monkeypatch):
    """None of these values is a default."""
    seen = {}

    def spy(objective, batches, optimizers, folder, **options):
        seen.update(options, objective=objective, batches=batches, optimizers=optimizers)
        return objective

    monkeypatch.setattr("ldm.train.dreambooth.train", spy)
    how = Training(
        steps=7,
        batch=4,
        accumulate=2,
        learning_rate=3e-3,
        schedule="cosine",
        warmup=3,
        rank=3,
        alpha=6.0,
        targets="all-linear",
        text_encoder=True,
        resolution=48,
        clip_skip=2,
        ema_decay=0.9,
        autocast=True,
        checkpointing=True,
        seed=5,
        save_minutes=1.5,
        save_steps=9,
        keep=4,
        objective=Objective(prior_weight=0.5),
    )
    out = tmp_path / "lora.safetensors"
    dreambooth(models["SD 1"], pictures, "a cat", out, how, class_prompt="the red", class_count=2)
    loop = dict(
        steps=7, accumulate=2, schedule="cosine", warmup=3, ema_decay=0.9, save_minutes=1.5, save_steps=9, keep=4
    )
    assert {name: seen[name] for name in loop} == loop and seen["workers"] == 1
    objective = seen["objective"]
    assert (objective.clip_skip, objective.autocast, len(objective.text_encoders)) == (2, True, 1)
    assert any("checkpoint" in repr(getattr(m, "forward", "")) for m in objective.modules())
    (group,) = seen["optimizers"][0].param_groups
    assert (group["lr"], group["weight_decay"]) == (3e-3, 0.01)
    lora = objective.beside["unet"]
    assert (lora.rank, lora.alpha) == (3, 6.0) and any("ff" in path for path in lora.paths)
    assert seen["settings"]["seed"] == 5 and seen["settings"]["objective"]["prior_weight"] == 0.5
    x, _, _, weight, ids, files = seen["batches"](0)
    assert x.shape == (8, 4, 24, 24) and ids.shape[0] == len(files) == 8
    assert weight.tolist() == [2.0] * 4 + [1.0] * 4  # of eight: 8/4, and half of 8/4
    first = torch.Generator().manual_seed(5)
    down = torch.empty_like(next(iter(lora.layers.values())).down)
    torch.nn.init.kaiming_uniform_(down, a=5**0.5, generator=first)
    assert torch.equal(next(iter(lora.layers.values())).down, down)
    for rank, word, rate in ((None, None, 2e-6), (2, None, 1e-4), (None, ("sks", 1, None), 5e-4)):
        run = Run(models["SD 1"], tmp_path / "x.safetensors", replace(FAST, learning_rate=None, rank=rank),
                  "kohya" if word is None else "webui", word)  # fmt: skip
        assert run.rate == rate


def test_a_batch_of_sdxl(models, pictures, tmp_path, monkeypatch):
    """Latents, noise, texts and sizes of subject and class, put together here from the parts."""
    seen = []
    monkeypatch.setattr("ldm.train.dreambooth.train", lambda objective, batches, *_, **__: seen.append(batches))
    how = replace(FAST, objective=Objective(prior_weight=0.25, caption_dropout=0.5), seed=3)
    folder = tmp_path / "class"
    folder.mkdir()
    for i, size in enumerate([(40, 60), (64, 36)]):
        Image.new("RGB", size, (0, 90 * i, 200)).save(folder / f"{i}.png")
    words = dict(class_prompt="the red", class_images=folder, class_count=2)
    dreambooth(models["SDXL"], pictures, "a cat", tmp_path / "mine", how, **words)
    (batches,) = seen
    x, t, target, weight, context, pooled, sizes, files = batches(4)
    assert [Path(file).parent.name for file in files] == [pictures.name] * 2 + ["class"] * 2
    pipe = ldm.Pipeline.from_pretrained(models["SDXL"])
    draws = draw(x.shape, step_generator(3, 4))
    with torch.no_grad():  # and one by one, as the cache has it: else it is rounded otherwise
        encoded = [pipe.vae.encode(to_tensor(crop_of(Image.open(file)))) for file in files]
    mean, std = (torch.cat(column) for column in zip(*encoded, strict=True))
    z = pipe.vae.config.scaling_factor * (mean + std * draws.sample)
    a = pipe.schedule.alphas_cumprod[draws.t][:, None, None, None]
    torch.testing.assert_close(x, (a.sqrt() * z + (1 - a).sqrt() * draws.noise).float(), rtol=1e-5, atol=1e-5)
    assert torch.equal(t, draws.t) and torch.equal(target, draws.noise)
    assert weight.tolist() == [2, 2, 0.5, 0.5]
    texts = [pipe.encode_text([text]) for text in ["a cat", "a cat", "the red", "the red"]]
    kept = (draws.dropout >= 0.5).float()
    assert 0 < kept.sum() < 4
    empty = 0 if pipe.zero_negative else pipe.encode_text([""]).context
    expected = torch.cat(
        [text.context if keep else 0 * text.context + empty for text, keep in zip(texts, kept, strict=True)]
    )
    torch.testing.assert_close(context, expected, rtol=1e-5, atol=1e-5)
    assert pooled.shape == (4, texts[0].pooled.shape[1])
    originals = [Image.open(file).size for file in files]
    for (width, height), row in zip(originals, sizes.tolist(), strict=True):
        scaled = (32 * width // height, 32) if width > height else (32, 32 * height // width)
        top, left = round((scaled[1] - 32) / 2), round((scaled[0] - 32) / 2)
        assert row == [height, width, top, left, 32, 32]


def crop_of(image):
    width, height = image.size
    scaled = (32 * width // height, 32) if width > height else (32, 32 * height // width)
    top, left = round((scaled[1] - 32) / 2), round((scaled[0] - 32) / 2)
    return image.resize(scaled, Image.Resampling.LANCZOS).crop((left, top, left + 32, top + 32))


def test_long_captions_are_cut(models, tmp_path):
    """Whether the text encoder is trained or not; else the texts of a batch would have two lengths."""
    folder = tmp_path / "captioned"
    folder.mkdir()
    for i, text in enumerate(["a cat", "a cat " * 60]):
        Image.new("RGB", (32, 32), (100 * i, 0, 0)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(text)
    finetune(models["SD 1"], folder, tmp_path / "mine.safetensors", FAST)
    batch = Batches(ldm.Pipeline.from_pretrained(models["SD 1"]), [open_folder(folder, resolution=32, multiple=2)],
                    tmp_path / "work", FAST)(0)  # fmt: skip
    assert batch[4].shape[1] == 77


def test_the_word_in_captions_of_the_folder(models, pictures, tmp_path):
    folder = tmp_path / "captioned"
    shutil.copytree(pictures, folder)
    (folder / "1.txt").write_text("the red {word}")
    embedding(models["SD 1"], folder, "sks", tmp_path / "a.safetensors", FAST)
    norms = [
        json.loads(line)["norm"] for line in (tmp_path / "a.safetensors.run" / "log.jsonl").read_text().splitlines()
    ]
    assert min(norms) > 0
    (folder / "1.txt").write_text("the red cat")
    with pytest.raises(ValueError, match=r"1 captions do not have the word: write \{word\}.*1\.png, 'the red cat'"):
        embedding(models["SD 1"], folder, "sks", tmp_path / "b.safetensors", FAST)


def test_command_line(models, pictures, tmp_path, capsys):
    out = tmp_path / "lora.safetensors"
    common = f"--model {models['SD 1']} --out {out} --steps 2 --resolution 32 --rank 2 --min-snr 5"
    main(["dreambooth", "--instance-images", str(pictures), "--instance-prompt", "a cat", *common.split()])
    assert out.exists() and "3 pictures of 32x32; 0 refused" in capsys.readouterr().out
    main(["plot", f"{out}.run", "--out", str(tmp_path / "loss.png")])
    assert Image.open(tmp_path / "loss.png").size[0] > 100
    with pytest.raises(SystemExit, match=r"ldm train: error: .*remove it, or give another name"):
        main(["dreambooth", "--instance-images", str(pictures), "--instance-prompt", "a cat", *common.split()])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize(
    ("module", "place", "now", "drawn"),
    [(image, "take", 3, 2), (Path, "rename", 1, 6)],
    ids=["a picture", "the result"],
)
def test_ended_while_it_draws_or_writes(
    models, pictures, tmp_path, capsys, monkeypatch, number, module, place, now, drawn
):
    """When all is written but not yet in its place: one line, no remains, and the same command goes on to its end."""

    def command(out):
        line = ["dreambooth", "--instance-images", str(pictures), "--instance-prompt", "a cat"]
        line += ["--class-prompt", "the red", "--class-count", "6", "--model", str(models["SD 1"])]
        return [*line, *f"--out {out} --steps 2 --resolution 32 --rank 2".split()]

    def files():
        return {file.name: file.read_bytes() for file in tmp_path.rglob("*.*") if file.is_file()}

    def ending(*arguments):
        written.append(arguments[-1].suffix in (".png", ".safetensors") and arguments[-1].parent != run)
        if sum(written) == now and written[-1]:
            signal.raise_signal(number)
        return put(*arguments)

    handler, written, run = signal.getsignal(number), [], tmp_path / "a.safetensors.run"  # where the states are
    put = getattr(module, place)
    with monkeypatch.context() as patch:
        patch.setattr(module, place, ending)
        with pytest.raises(SystemExit) as end:
            main(command(tmp_path / "a.safetensors"))
    assert end.value.code == 130 and signal.getsignal(number) is handler
    assert capsys.readouterr().err.endswith("stopped; what was computed is kept, the same command goes on\n")
    kept = files()
    assert sum(name.startswith("class-") and name.endswith(".png") for name in kept) == drawn
    assert "a.safetensors" not in kept and not [name for name in kept if "part" in name or "tmp" in name]
    main(command(tmp_path / "a.safetensors"))
    after = files()
    assert all(after[name] == data for name, data in kept.items() if name.endswith(".png"))
    main(command(tmp_path / "b.safetensors"))
    gone_on, at_once = (load_file(tmp_path / f"{name}.safetensors") for name in "ab")
    assert gone_on.keys() == at_once.keys()
    assert all(torch.equal(value, at_once[name]) for name, value in gone_on.items())


def test_command_line_of_a_word(models, pictures, tmp_path):
    out = tmp_path / "sks.safetensors"
    words = ["--word", "sks", "--caption", "a {word} cat", "--init-word", "cat", "--vectors", "2", "--layout", "webui"]
    common = f"--model {models['SD 1']} --images {pictures} --out {out} --steps 2 --resolution 32"
    main(["embedding", *words, *common.split()])
    pipe = ldm.Pipeline.from_pretrained(models["SD 1"])
    assert pipe.load_embedding(out) == "sks"
    first = json.loads((tmp_path / "sks.safetensors.run" / "log.jsonl").read_text().splitlines()[0])
    assert first["lr"] == 5e-4 and load_file(out)["emb_params"].shape[0] == 2


def test_what_is_seen_of_it(models, pictures, tmp_path):
    """Grids of the prompts, a row each, and TensorBoard's events; what is seen changes nothing that is learnt."""
    watched = replace(FAST, sample_prompts=("a cat", "the red"), sample_every=2, tensorboard=True)
    for name, how in (("plain", FAST), ("watched", watched)):
        dreambooth(models["SD 1"], pictures, "a cat", tmp_path / f"{name}.safetensors", how)
    run = tmp_path / "watched.safetensors.run"
    assert [file.name for file in (run / "samples").iterdir()] == ["step-0000002.png"]
    assert Image.open(run / "samples" / "step-0000002.png").size == (4 * 32, 2 * 32)
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    logged = [json.loads(line)["loss"] for line in (run / "log.jsonl").read_text().splitlines()]
    assert [event.value for event in events.Scalars("loss")] == pytest.approx(logged)
    a, b = (load_file(tmp_path / f"{name}.safetensors") for name in ("plain", "watched"))
    assert all(torch.equal(a[name], b[name]) for name in a)
    main(["plot", str(run), "--out", str(tmp_path / "run.png")])
    assert Image.open(tmp_path / "run.png").size[1] > 900  # with the grid below


def test_every_option_has_its_flag():
    """And, left out, its default."""
    a = parser().parse_args(["finetune", "--images", "x", "--out", "y"])
    assert trained(a) == Training()
    flags = "--steps 5 --batch 2 --rank 4 --targets conv --bucketed --autocast --min-snr 5 --input-noise 0.1"
    a = parser().parse_args(["finetune", "--images", "x", "--out", "y", *flags.split()])
    objective = Objective(min_snr=5.0, input_noise=0.1)
    assert trained(a) == Training(5, 2, rank=4, targets="conv", bucketed=True, autocast=True, objective=objective)


@pytest.mark.parametrize(
    "how", ["--shard --checkpointing --text-encoder --learning-rate 1e-3", "--rank 2 --learning-rate 1e-3"]
)
def test_two_processes(models, pictures, tmp_path, how):
    """The command line under torchrun: whole nets divided, and a LoRA; the losses are those of one process."""
    command = f"finetune --model {models['SD 1']} --images {pictures} --resolution 32 --batch 3 --steps 4 {how}".split()
    command += ["--caption", "a cat"]
    environment = os.environ | {"PYTHONPATH": str(Path(ldm.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "ldm.train",
    ]
    two, one = tmp_path / "two.safetensors", tmp_path / "one.safetensors"
    done = subprocess.run(
        [*torchrun, *command, "--out", two], env=environment, check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("3 pictures of 32x32") == 1  # said by one of them
    main([*(word for word in command if word != "--shard"), "--out", str(one)])
    logs = [
        [json.loads(line) for line in (tmp_path / f"{o.name}.run/log.jsonl").read_text().splitlines()]
        for o in (one, two)
    ]
    for mine, other in zip(*logs, strict=True):
        assert (mine["loss"], mine["norm"]) == pytest.approx((other["loss"], other["norm"]), rel=1e-5)
    a, b = load_file(one), load_file(two)
    assert a.keys() == b.keys()
    apart = sum((a[name].float() - b[name].float()).abs().sum() for name in a) / sum(a[name].numel() for name in a)
    assert apart < 1e-5  # of 4e-3 that four steps can move a weight
