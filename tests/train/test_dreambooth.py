"""From a folder of pictures to a file that this library and diffusers load: on tiny models of each kind."""

import json
import signal
from dataclasses import replace

import diffusers
import numpy as np
import pytest
import torch
from family import SD1, SD2_V, XL, assert_close, ours, reference, saved, theirs
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import ldm
from ldm.train.__main__ import main, parser, trained
from ldm.train.dreambooth import Training, dreambooth, embedding, finetune
from ldm.train.objective import Objective

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
    """The UNet alone is another; what diffusers loads from the folder makes the same picture."""
    out = tmp_path / ("mine.safetensors" if single else "mine")
    dreambooth(models[kind], pictures, "a cat", out, FAST, class_prompt="the red", class_count=3)
    assert changed(weights(models[kind]), weights(out)) == {"unet"}
    assert len(list((tmp_path / f"{out.name}.run" / "class").glob("class-*.png"))) == 3
    if not single:
        other = type(reference(KINDS[kind], SAMPLERS[kind])).from_pretrained(out)
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


def test_embedding(models, pictures, tmp_path):
    out = tmp_path / "sks.safetensors"
    embedding(models["SD 1"], pictures, "sks", out, replace(FAST, learning_rate=0.5), init_word="cat")
    assert changed(weights(models["SD 1"]), weights(models["SD 1"])) == set()
    pipe = ldm.Pipeline.from_pretrained(models["SD 1"])
    assert pipe.load_embedding(out) == "sks"
    assert (ours(pipe, 3, prompt="sks") - ours(pipe, 3, prompt="cat")).abs().max() > 1e-3
    with pytest.raises(ValueError, match=r"write \{word\} where the word stands"):
        embedding(models["SD 1"], pictures, "sks", tmp_path / "other.safetensors", caption="a photo")


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
    from ldm.train import dreambooth as module

    calls = []
    batch = module.Batches.__call__

    def stopping(self, step):
        calls.append(step)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGTERM)
        return batch(self, step)

    monkeypatch.setattr(module.Batches, "__call__", stopping)
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


def test_class_pictures_are_kept_and_filled_up(models, pictures, tmp_path):
    folder = tmp_path / "class"
    folder.mkdir()
    Image.new("RGB", (32, 32), "red").save(folder / "own.png")
    how = {"class_prompt": "the red", "class_images": folder}
    dreambooth(models["SD 1"], pictures, "a cat", tmp_path / "a.safetensors", FAST, **how, class_count=3)
    made = {file.name: file.read_bytes() for file in folder.iterdir()}
    assert set(made) == {"own.png", "class-00000.png", "class-00001.png"}
    dreambooth(models["SD 1"], pictures, "a cat", tmp_path / "b.safetensors", FAST, **how, class_count=4)
    assert set(made.items()) < {(file.name, file.read_bytes()) for file in folder.iterdir()}
    assert len(list(folder.iterdir())) == 4


def test_nothing_is_overwritten(models, pictures, tmp_path):
    (tmp_path / "mine.safetensors").write_text("mine")
    with pytest.raises(FileExistsError, match="remove it, or give another name"):
        dreambooth(models["SD 1"], pictures, "a cat", tmp_path / "mine.safetensors", FAST)
    with pytest.raises(FileNotFoundError, match="make it first"):
        finetune(models["SD 1"], pictures, tmp_path / "no" / "mine.safetensors", FAST, caption="a cat")
    assert (tmp_path / "mine.safetensors").read_text() == "mine"


def test_command_line(models, pictures, tmp_path, capsys):
    out = tmp_path / "lora.safetensors"
    common = f"--model {models['SD 1']} --out {out} --steps 2 --resolution 32 --rank 2 --min-snr 5"
    main(["dreambooth", "--instance-images", str(pictures), "--instance-prompt", "a cat", *common.split()])
    assert out.exists() and "3 pictures of 32x32; 0 refused" in capsys.readouterr().out
    main(["plot", f"{out}.run", "--out", str(tmp_path / "loss.png")])
    assert Image.open(tmp_path / "loss.png").size[0] > 100
    with pytest.raises(SystemExit, match=r"ldm train: error: .*remove it, or give another name"):
        main(["dreambooth", "--instance-images", str(pictures), "--instance-prompt", "a cat", *common.split()])


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
