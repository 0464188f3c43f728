"""Official single file and diffusers folder, both ways and bitwise; pickles, of which nothing runs."""

import json
import os
import pickle
import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, EulerDiscreteScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline
from family import MODELS, XL, assert_close, official_tensors, ours, reference, saved, theirs
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from synthetic import BUFFERS, LAYOUTS, OTHERS, UNUSED, sparse, vocabulary
from transformers import CLIPImageProcessor, CLIPTokenizer

import ldm
from ldm import models, save
from ldm.checkpoint import CheckpointError, load, make_plans, open_model
from ldm.clip.tokenizer import Tokenizer
from ldm.convert import convert, official
from ldm.source import LONGEST_HEADER

KEYS = Path(__file__).parent / "keys"
UNET_FILE = "diffusion_pytorch_model.safetensors"
EMOJI = Path(ldm.__file__).parent.parent / "weights" / "emoji-64"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """made(kind): a folder that diffusers wrote, its pipeline, and ours from it."""

    @cache
    def make(kind):
        folder = tmp_path_factory.mktemp("convert") / "model"
        pipe = reference(MODELS[kind], EulerDiscreteScheduler)
        return folder, pipe, saved(pipe, folder)

    return make


def single_file(kind, pipe, folder, monkeypatch, name="tiny"):
    """The model as an official single file, and the row by which such a tiny one is detected."""
    tensors = {name: tensor.contiguous() for name, tensor in official_tensors(pipe).items()}
    to_k = next(name for name in tensors if name.endswith("attn2.to_k.weight"))
    tells = {name: tuple(tensors[name].shape) for name in (models.CONV_IN, to_k)}
    monkeypatch.setattr(models, "OFFICIAL", ((name, tells, MODELS[kind]),))
    monkeypatch.setattr(ldm.checkpoint, "official_tokenizer", small_tokenizer)
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "official.safetensors")
    return folder / "official.safetensors"


def small_tokenizer(text):
    """In the place of the official one, whose ids the tiny encoders do not have."""
    return text and Tokenizer(*vocabulary(), pad_token="<|endoftext|>" if text.activation == "quick_gelu" else "!")


def assert_bitwise(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert (ours[name].dtype, ours[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(ours[name], tensor), name


def contents(folder):
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("kind", MODELS)
def test_file_to_folder_and_back(kind, made, tmp_path, monkeypatch):
    _, _, pipe = made(kind)
    file = single_file(kind, pipe, tmp_path, monkeypatch)
    convert(file, tmp_path / "folder")
    convert(tmp_path / "folder", tmp_path / "back.safetensors")
    assert_bitwise(load_file(tmp_path / "back.safetensors"), load_file(file))
    # And it needs no row to be known any more.
    monkeypatch.setattr(models, "OFFICIAL", ())
    convert(tmp_path / "back.safetensors", tmp_path / "folder again")
    assert contents(tmp_path / "folder again") == contents(tmp_path / "folder")


@pytest.mark.parametrize("kind", MODELS)
def test_folder_to_file_and_back(kind, made, tmp_path):
    """The folder is another program's: all text files that matter come back as they were, but for tokenizer.json,
    which becomes the two that say the same."""
    folder, _, pipe = made(kind)
    convert(folder, tmp_path / "single.safetensors")
    assert_bitwise(load_file(tmp_path / "single.safetensors"), official_tensors(pipe))
    convert(tmp_path / "single.safetensors", tmp_path / "back")
    before, after = contents(folder), contents(tmp_path / "back")
    lost = before.keys() - after.keys()
    assert all(Path(name).name in ("preprocessor_config.json", "tokenizer.json") for name in lost), lost
    for name in after:
        if name.endswith(("vocab.json", "merges.txt")):
            assert name not in before
        elif name.endswith(".safetensors"):  # transformers writes its names with text_model. or without
            mine, other = (load_file(path / name) for path in (tmp_path / "back", folder))
            assert_bitwise(*({k.removeprefix("text_model."): v for k, v in t.items()} for t in (mine, other)))
        else:
            assert before[name] == after[name], name


@pytest.mark.parametrize("kind", ["SD 1", "SD 2 v", "SDXL", "refiner"])
def test_the_converted_draw_the_same(kind, made, tmp_path, monkeypatch):
    folder, _, pipe = made(kind)
    file = single_file(kind, pipe, tmp_path, monkeypatch)
    expected = ours(pipe, prompt="a cat")
    convert(folder, tmp_path / "single.safetensors")
    convert(tmp_path / "single.safetensors", tmp_path / "folder")
    for path in ("single.safetensors", "folder"):
        assert torch.equal(ours(ldm.Pipeline.from_pretrained(tmp_path / path), prompt="a cat"), expected)
    assert file.is_file()


@pytest.fixture(scope="module")
def official_vocabulary(tmp_path_factory):
    """SDXL in tiny, but with encoders of CLIP's own 49,408 tokens."""
    texts = {p: replace(getattr(XL, p), vocab_size=49408, end_token=49407) for p in ("text_encoder", "text_encoder_2")}
    pipe = reference(replace(XL, **texts), EulerDiscreteScheduler)
    for name, pad in (("tokenizer", "<|endoftext|>"), ("tokenizer_2", "!")):
        tokenizer = Tokenizer.official(pad)
        setattr(pipe, name, CLIPTokenizer(tokenizer.vocab, tokenizer.merges, model_max_length=77, pad_token=pad))
    folder = tmp_path_factory.mktemp("official") / "model"
    return folder, saved(pipe, folder)


@pytest.mark.parametrize("files", ["tokenizer.json", "two", "all", "long"])
def test_official_tokenizers_fit_in_a_header(files, official_vocabulary, tmp_path):
    made, pipe = official_vocabulary
    shutil.copytree(made, folder := tmp_path / "folder")
    two = {}
    for part, tokenizer in (("tokenizer", pipe.tokenizer), ("tokenizer_2", pipe.tokenizer_2)):
        assert (folder / part / "tokenizer.json").stat().st_size > 3_000_000
        if files != "tokenizer.json":
            merges = save.tokenizer_texts(tokenizer)["merges.txt"]
            vocab = json.dumps(tokenizer.vocab, indent=60 if files == "long" else 2)
            for name, text in (("vocab.json", vocab), ("merges.txt", merges)):
                (folder / part / name).write_text(text, encoding="utf-8")
                two[f"{part}/{name}"] = text.encode()
        if files == "two":
            (folder / part / "tokenizer.json").unlink()
    convert(folder, tmp_path / "single.safetensors")
    with (tmp_path / "single.safetensors").open("rb") as file:
        assert 3_000_000 < int.from_bytes(file.read(8), "little") <= LONGEST_HEADER
    convert(tmp_path / "single.safetensors", tmp_path / "back")
    back = contents(tmp_path / "back")
    assert not any(name.endswith("tokenizer.json") for name in back)
    assert all(back[name] == text for name, text in two.items()) == (files != "long")
    prompt = "a photo of a cat"
    expected = ours(pipe, prompt=prompt, steps=2)
    for path in ("single.safetensors", "back"):
        other = ldm.Pipeline.from_pretrained(tmp_path / path)
        for part in ("tokenizer", "tokenizer_2"):
            assert torch.equal(getattr(other, part)(prompt), getattr(pipe, part)(prompt))
        # Not bitwise: a tensor's place in memory, which follows the header's length, tells in the last digits.
        assert_close(ours(other, prompt=prompt, steps=2), expected)


def test_too_long_a_header(made, tmp_path):
    """What ldm would not read again it does not write."""
    folder, _, _ = made("SD 1")
    convert(folder, tmp_path / "a.safetensors")
    tensors = load_file(tmp_path / "a.safetensors")
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        texts = file.metadata()

    def length(notes):
        save.write_file(tmp_path / "b.safetensors", tensors, texts | {"notes": notes})
        return int.from_bytes((tmp_path / "b.safetensors").read_bytes()[:8], "little")

    room = LONGEST_HEADER - length("")
    assert LONGEST_HEADER - 10_000 < length("é" * (room // 2 - 4_000)) <= LONGEST_HEADER
    convert(tmp_path / "b.safetensors", tmp_path / "c.safetensors")
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(
        ValueError, match=r"b.safetensors would have a header of 8,\d+,\d+ bytes, and at most 8,000,000"
    ):
        length("é" * (room // 2 + 1))
    assert not (tmp_path / "b.safetensors").exists()


@pytest.mark.parametrize("kind", MODELS)
def test_diffusers_loads_the_folder(kind, made, tmp_path, monkeypatch):
    """The folder whose JSON files are ours, written from an official file."""
    _, reference, pipe = made(kind)
    file = single_file(kind, pipe, tmp_path, monkeypatch)
    prediction_type = MODELS[kind].scheduler["prediction_type"]
    convert(file, tmp_path / "folder", prediction_type=prediction_type)
    other = DiffusionPipeline.from_pretrained(tmp_path / "folder", local_files_only=True)
    assert type(other) is type(reference)
    other.set_progress_bar_config(disable=True)
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        if net := getattr(reference, part, None):
            assert_bitwise(getattr(other, part).state_dict(), net.state_dict())
            if part.startswith("text"):
                fields = ["hidden_act", "num_hidden_layers", "hidden_size", "eos_token_id"]
                fields += ["projection_dim"] * (part == "text_encoder_2")
                config = getattr(other, part).config
                assert [getattr(config, f) for f in fields] == [getattr(net.config, f) for f in fields]
    for part in ("tokenizer", "tokenizer_2"):
        if tokenizer := getattr(reference, part, None):
            ids = [t("a cat, the red", padding="max_length").input_ids for t in (getattr(other, part), tokenizer)]
            assert ids[0] == ids[1]
    assert other.scheduler.config.prediction_type == prediction_type
    if hasattr(reference, "safety_checker"):
        object.__setattr__(other.text_encoder, "text_model", other.text_encoder)
    arguments = {"prompt": "a cat", "negative_prompt": "the red"}
    xl = hasattr(reference, "tokenizer_2")
    shown = {}
    if "inpainting" in kind or kind == "refiner":
        image, mask = torch.rand(1, 3, 64, 64), torch.zeros(1, 1, 64, 64)
        mask[..., 32:] = 1
        shown = {"image": image} if kind == "refiner" else {"image": image, "mask_image": mask}
    a, b = (theirs(p, **arguments, **shown) for p in (other, reference))
    assert (a - b).abs().max() == 0 or not xl  # the folder names the sampler of the official ones
    if shown:
        return
    mine = ldm.Pipeline.from_pretrained(file, prediction_type=prediction_type)
    mine = ours(mine, **arguments, sampler="euler" if xl else "ddim")
    assert (a - mine).abs().max() <= 1e-3


@pytest.mark.parametrize("target", ["folder", "single.safetensors"])
def test_parts_that_are_left_behind(target, tmp_path):
    """A usual folder of SD 1 names a filter and what prepares pictures for it: diffusers would look for their files."""
    pipe = reference(MODELS["SD 1"], EulerDiscreteScheduler)
    pipe.register_modules(feature_extractor=CLIPImageProcessor())
    saved(pipe, tmp_path / "made")
    index = json.loads((tmp_path / "made" / "model_index.json").read_text())
    index |= {
        "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
        "requires_safety_checker": True,
        "_name_or_path": "me/mine",
    }
    assert index["feature_extractor"][1].startswith("CLIPImageProcessor")
    (tmp_path / "made" / "model_index.json").write_text(json.dumps(index))
    convert(tmp_path / "made", tmp_path / target)
    if target != "folder":
        convert(tmp_path / target, tmp_path / "folder")
    nothing = {"safety_checker": [None, None], "feature_extractor": [None, None], "requires_safety_checker": False}
    assert json.loads((tmp_path / "folder" / "model_index.json").read_text()) == index | nothing
    other = DiffusionPipeline.from_pretrained(tmp_path / "folder", local_files_only=True)
    assert_bitwise(other.unet.state_dict(), pipe.unet.state_dict())


@pytest.mark.parametrize("kind", ["SD 1", "SDXL"])
def test_diffusers_loads_the_file(kind, made, tmp_path):
    folder, reference, _ = made(kind)
    convert(folder, tmp_path / "single.safetensors")
    cls = StableDiffusionXLPipeline if kind == "SDXL" else StableDiffusionPipeline
    other = cls.from_single_file(tmp_path / "single.safetensors", config=str(folder), local_files_only=True)
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        if net := getattr(reference, part, None):
            assert_bitwise(getattr(other, part).state_dict(), net.state_dict())


V = {"prediction_type": "v_prediction"}
ZERO_SNR = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}


@pytest.mark.parametrize(
    ("kind", "fields", "expected"),
    [
        ("SD 1", {}, set()),
        ("SD 1", V, {"v_pred"}),
        ("SD 1", V | ZERO_SNR, {"v_pred", "ztsnr"}),
        ("SD 2", V, set()),
        ("SD 2", V | ZERO_SNR, {"ztsnr"}),
        ("SDXL", V, {"v_pred"}),
        ("SDXL", V | ZERO_SNR, {"v_pred", "ztsnr"}),
    ],
)
def test_flags(kind, fields, expected, made, tmp_path, monkeypatch):
    """webui and ComfyUI ask the tensors alone."""
    folder, _, pipe = made(kind)
    shutil.copytree(folder, tmp_path / "folder")
    config = tmp_path / "folder" / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | fields))
    convert(tmp_path / "folder", tmp_path / "a.safetensors")
    convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", torch.float16)
    convert(tmp_path / "b.safetensors", tmp_path / "back")
    for path in ("a.safetensors", "b.safetensors"):
        tensors = load_file(tmp_path / path)
        assert {name for name in tensors if "." not in name} == expected
        assert all(tensors[name].shape == (0,) and tensors[name].dtype == torch.float32 for name in expected)
        assert fields.items() <= load(tmp_path / path).scheduler.items()
    assert not {"v_pred", "ztsnr"} & load_file(tmp_path / "back" / "unet" / UNET_FILE).keys()
    # And a file with nothing but its tensors:
    single_file(kind, pipe, tmp_path, monkeypatch)
    save_file(load_file(tmp_path / "a.safetensors"), tmp_path / "official.safetensors")
    convert(tmp_path / "official.safetensors", tmp_path / "c.safetensors", torch.bfloat16)
    assert {name for name in load_file(tmp_path / "c.safetensors") if "." not in name} == expected
    told = {"prediction_type": "epsilon"}
    convert(tmp_path / "official.safetensors", tmp_path / "d.safetensors", **told)
    assert {name for name in load_file(tmp_path / "d.safetensors") if "." not in name} == expected - {"v_pred"}


def test_a_flag_of_sd2_stays(made, tmp_path, monkeypatch):
    _, _, pipe = made("SD 2 v")
    file = single_file("SD 2 v", pipe, tmp_path, monkeypatch)
    save_file(load_file(file) | {"v_pred": torch.zeros(0)}, file)
    convert(file, tmp_path / "a.safetensors", torch.float16)
    assert "v_pred" in load_file(tmp_path / "a.safetensors")


@pytest.mark.filterwarnings("ignore:.*does not say whether it predicts")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_official_names_at_full_size(layout, tmp_path):
    """What is written is the official list of names and shapes, without those that no net asks for."""
    shapes = {name: tuple(shape) for name, shape in json.loads((KEYS / f"{layout}.json").read_text()).items()}
    opened = open_model(sparse(tmp_path / "model.safetensors", shapes))
    plans = make_plans(opened.model, opened.sources)
    named = {}
    for plan in plans.values():
        meta = {name: torch.empty(shape, device="meta") for name, shape in plan.shapes.items()}
        named |= {name: tuple(tensor.shape) for name, tensor in official(plan, meta).items()}
    left = OTHERS[layout] | UNUSED.get(layout, set()) | BUFFERS
    assert named == {name: shape for name, shape in shapes.items() if name not in left}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dtype(dtype, made, tmp_path):
    folder, _, pipe = made("SD 1")
    convert(folder, tmp_path / "half.safetensors", dtype)
    assert_bitwise(
        load_file(tmp_path / "half.safetensors"), {k: v.to(dtype) for k, v in official_tensors(pipe).items()}
    )
    convert(folder, tmp_path / "half", dtype)
    tensors = load_file(tmp_path / "half" / "unet" / "diffusion_pytorch_model.safetensors")
    assert_bitwise(tensors, {k: v.to(dtype) for k, v in pipe.unet.state_dict().items()})


def test_overflow_is_refused(made, tmp_path):
    """float16 ends at 65,504."""
    folder, _, _ = made("SD 1")
    convert(folder, tmp_path / "large.safetensors")
    tensors = load_file(tmp_path / "large.safetensors")
    tensors[models.CONV_IN][0, 0, 0, 0] = 1e5
    with safe_open(tmp_path / "large.safetensors", "pt") as file:
        metadata = file.metadata()
    save_file(tensors, tmp_path / "large.safetensors", metadata)
    with pytest.raises(CheckpointError, match=rf"{models.CONV_IN} has values that are NaN, infinite, or too large for"):
        convert(tmp_path / "large.safetensors", tmp_path / "half", torch.float16)
    assert [file.name for file in tmp_path.iterdir()] == ["large.safetensors"]
    convert(tmp_path / "large.safetensors", tmp_path / "bf16.safetensors", torch.bfloat16)


def test_default_model(tmp_path):
    convert(EMOJI, tmp_path / "emoji.safetensors")
    convert(tmp_path / "emoji.safetensors", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(EMOJI)
    expected = ldm.Pipeline.from_pretrained()("a red heart", steps=4, progress=False).images[0]
    pipe = ldm.Pipeline.from_pretrained(tmp_path / "emoji.safetensors")
    assert pipe("a red heart", steps=4, progress=False).images[0].tobytes() == expected.tobytes()


def test_prediction_type(made, tmp_path, monkeypatch):
    """A guess is said to be one; what the caller says stands in the folder, and is no guess from then on."""
    _, _, pipe = made("SD 2 v")
    file = single_file("SD 2 v", pipe, tmp_path, monkeypatch, name="SD 2.x")
    bias = next(n for n, p in load_file(file).items() if n.startswith("model.diffusion_model.output") and p.ndim == 1)
    monkeypatch.setattr(ldm.checkpoint, "TELLS_V", bias)
    with pytest.warns(UserWarning, match="a guess"):
        convert(file, tmp_path / "guessed")
    convert(file, tmp_path / "told", prediction_type="epsilon")
    fields = json.loads((tmp_path / "told" / "scheduler" / "scheduler_config.json").read_text())
    assert fields["prediction_type"] == "epsilon"
    convert(tmp_path / "told", tmp_path / "told.safetensors", prediction_type="v_prediction")
    with safe_open(tmp_path / "told.safetensors", "pt") as single:
        fields = json.loads(single.metadata()["scheduler/scheduler_config.json"])
    assert fields["prediction_type"] == "v_prediction"


def test_other_metadata_stays(made, tmp_path):
    folder, _, _ = made("SD 1")
    convert(folder, tmp_path / "a.safetensors")
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        metadata = file.metadata()
    save_file(load_file(tmp_path / "a.safetensors"), tmp_path / "b.safetensors", metadata | {"author": "me"})
    convert(tmp_path / "b.safetensors", tmp_path / "c.safetensors", torch.bfloat16)
    with safe_open(tmp_path / "c.safetensors", "pt") as file:
        assert file.metadata() == metadata | {"author": "me"}


def test_paths_in_the_metadata_lead_nowhere_else(made, tmp_path):
    folder, _, _ = made("SD 1")
    convert(folder, tmp_path / "a.safetensors")
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        metadata = file.metadata()
    metadata |= {
        "../escaped.json": "{}",
        "/tmp/escaped.json": "{}",
        "unet/../../escaped.json": "{}",
        "unet/run.py": "1",
    }
    save_file(load_file(tmp_path / "a.safetensors"), tmp_path / "b.safetensors", metadata)
    convert(tmp_path / "b.safetensors", tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors", "out"]
    assert not (tmp_path / "out" / "unet" / "run.py").exists()


def test_nothing_is_written_over(made, tmp_path):
    folder, _, _ = made("SD 1")
    for name in ("there.safetensors", "there"):
        (tmp_path / name).write_text("mine")
        with pytest.raises(FileExistsError, match=f"{name} exists: remove it, or give another name"):
            convert(folder, tmp_path / name)
        assert (tmp_path / name).read_text() == "mine"
    with pytest.raises(FileNotFoundError, match="does not exist, make it first"):
        convert(folder, tmp_path / "no" / "folder")


@pytest.mark.parametrize("target", ["out", "out.safetensors"])
def test_all_or_nothing(target, made, tmp_path, monkeypatch):
    folder, _, _ = made("SD 1")

    def fail(tensors, file, metadata):
        Path(file).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(save, "save_file", fail)
    with pytest.raises(KeyboardInterrupt):
        convert(folder, tmp_path / target)
    assert list(tmp_path.iterdir()) == []


def test_files_can_be_read_by_others(made, tmp_path):
    folder, _, _ = made("SD 1")
    before = os.umask(0o022)
    try:
        convert(folder, tmp_path / "a.safetensors")
    finally:
        os.umask(before)
    assert (tmp_path / "a.safetensors").stat().st_mode & 0o777 == 0o644


# Pickles


class Evil:
    """A pickle of it makes a file."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return open, (str(self.trace), "w")


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("place", ["beside", "inside", "alone", "as a name"])
def test_a_malicious_pickle_runs_nothing(place, zipped, tmp_path):
    trace, file = tmp_path / "trace", tmp_path / "model.ckpt"
    evil, tensors = Evil(trace), {"a": torch.ones(2)}
    payload = {
        "beside": {"state_dict": tensors, "callbacks": evil},
        "inside": {"state_dict": tensors | {"b": evil}},
        "alone": evil,
        "as a name": {"state_dict": tensors, "x": {evil: 1}},
    }[place]
    torch.save(payload, file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(
        CheckpointError, match=r"model.ckpt is no pickle of tensors alone: .*open.*Nothing of it was run"
    ):
        convert(file, tmp_path / "model.safetensors")
    assert not trace.exists() and sorted(f.name for f in tmp_path.iterdir()) == ["model.ckpt"]
    with pytest.raises(CheckpointError, match="is a pickle, which may run any code"):
        ldm.Pipeline.from_pretrained(file)
    assert not trace.exists()
    # That the payload would have left one:
    torch.load(file, weights_only=False)
    assert trace.exists()


class ModelCheckpoint:
    """As PyTorch Lightning left in official files: the class is a key of the callbacks' states."""


ModelCheckpoint.__module__ = "pytorch_lightning.callbacks.model_checkpoint"


@pytest.mark.parametrize("zipped", [True, False])
def test_what_lightning_left_in_official_files_is_passed_over(zipped, tmp_path, monkeypatch):
    import sys
    import types

    module = types.ModuleType(ModelCheckpoint.__module__)
    module.ModelCheckpoint = ModelCheckpoint
    tensors = {"model.a": torch.randn(3), "model.b": torch.ones(2, dtype=torch.int64)}
    with monkeypatch.context() as patch:
        for name in ("pytorch_lightning", "pytorch_lightning.callbacks", ModelCheckpoint.__module__):
            patch.setitem(sys.modules, name, module)
        state = {"state_dict": tensors, "global_step": 470000, "callbacks": {ModelCheckpoint: {"best": "x.ckpt"}}}
        torch.save(state, tmp_path / "sd.ckpt", _use_new_zipfile_serialization=zipped)
    convert(tmp_path / "sd.ckpt", tmp_path / "sd.safetensors")
    assert_bitwise(load_file(tmp_path / "sd.safetensors"), tensors)
    convert(tmp_path / "sd.ckpt", tmp_path / "half.safetensors", torch.float16)
    half = tensors | {"model.a": tensors["model.a"].half()}
    assert_bitwise(load_file(tmp_path / "half.safetensors"), half)


def test_tensors_that_share_memory(tmp_path):
    a = torch.randn(4, 4)
    torch.save({"a": a, "tied": a, "part": a[1:3], "turned": a.T}, tmp_path / "shared.pt")
    convert(tmp_path / "shared.pt", tmp_path / "shared.safetensors")
    assert_bitwise(load_file(tmp_path / "shared.safetensors"), {"a": a, "tied": a, "part": a[1:3], "turned": a.T})


def test_textual_inversion_of_webui(tmp_path):
    vectors = torch.randn(3, 24)
    torch.save({"string_to_token": {"*": 265}, "string_to_param": {"*": vectors}, "name": "me"}, tmp_path / "me.pt")
    convert(tmp_path / "me.pt", tmp_path / "me.safetensors")
    assert_bitwise(load_file(tmp_path / "me.safetensors"), {"emb_params": vectors})


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda f: f.write_bytes(b"PK\x03\x04 nothing"), "is damaged, or no pickle of PyTorch's"),
        (lambda f: f.write_bytes(b"\x80\x02."), "is "),
        (lambda f: f.write_bytes(pickle.dumps({"a": 1}, protocol=4)), "is no pickle of tensors alone"),
        (lambda f: torch.save({"step": 1}, f), "has no tensors by name in it"),
        (lambda f: torch.save([torch.ones(1)], f), "has no tensors by name in it"),
        (lambda f: torch.save(torch.ones(1), f), "has no tensors by name in it"),
    ],
)
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_pickles_that_cannot_be_converted(write, message, tmp_path):
    write(tmp_path / "x.ckpt")
    with pytest.raises(CheckpointError, match=f"x.ckpt {message}"):
        convert(tmp_path / "x.ckpt", tmp_path / "x.safetensors")
    assert [f.name for f in tmp_path.iterdir()] == ["x.ckpt"]


def test_a_pickle_becomes_no_folder(tmp_path):
    torch.save({"a": torch.ones(1)}, tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match=r"is a pickle, convert it to a name that ends in .safetensors first"):
        convert(tmp_path / "x.ckpt", tmp_path / "folder")


@pytest.mark.parametrize("value", [1e5, float("inf"), float("nan")])
def test_overflow_in_a_pickle_is_refused(value, tmp_path):
    torch.save({"a": torch.tensor([1, value]), "sqrt_recip_alphas_cumprod": torch.tensor([1e5])}, tmp_path / "x.ckpt")
    with pytest.raises(CheckpointError, match=r"x.ckpt: a has values that are NaN, infinite, or too large for"):
        convert(tmp_path / "x.ckpt", tmp_path / "x.safetensors", torch.float16)
    assert [f.name for f in tmp_path.iterdir()] == ["x.ckpt"]
    convert(tmp_path / "x.ckpt", tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("a", torch.eye(3).to_sparse(), "a is torch.float32, torch.sparse_coo"),
        ("a", torch.ones(2, device="meta"), "a is torch.float32, torch.strided on meta"),
        ("a", torch.ones(2, dtype=torch.complex128), "a is torch.complex128"),
        ("a", torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8), "a is torch.qint8"),
        ("__metadata__", torch.ones(2), "a tensor has the name '__metadata__'"),
        ("\udc80", torch.ones(2), r"a tensor has the name '.udc80'"),
    ],
    ids=["sparse", "meta", "complex", "quantized", "metadata", "no UTF-8"],
)
@pytest.mark.filterwarnings("ignore")
def test_tensors_that_safetensors_has_not(name, tensor, message, tmp_path):
    torch.save({"b": torch.ones(1), name: tensor}, tmp_path / "x.ckpt")
    with pytest.raises(CheckpointError, match=f"x.ckpt: {message}"):
        convert(tmp_path / "x.ckpt", tmp_path / "x.safetensors")
    assert [f.name for f in tmp_path.iterdir()] == ["x.ckpt"]


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("module", [b"numpy._core.multiarray", b"numpy.core.multiarray"])
def test_numbers_of_numpy_beside_the_tensors(module, zipped, tmp_path):
    tensors, file = {"a": torch.ones(2)}, tmp_path / "x.ckpt"
    state = {"state_dict": tensors, "callbacks": {"best": np.float64(0.5), "step": np.int64(3)}}
    torch.save(state, file, _use_new_zipfile_serialization=zipped)
    if not zipped:
        file.write_bytes(file.read_bytes().replace(b"numpy._core.multiarray", module))
    convert(file, tmp_path / "x.safetensors")
    assert_bitwise(load_file(tmp_path / "x.safetensors"), tensors)


def test_what_a_refused_pickle_is_said_to_hold(tmp_path):
    torch.save({"a": torch.ones(1), "b": Evil(tmp_path / "trace")}, tmp_path / "x.ckpt")
    with pytest.raises(CheckpointError) as raised:
        convert(tmp_path / "x.ckpt", tmp_path / "x.safetensors")
    assert "it asks for io.open. Nothing of it was run" in str(raised.value)
    assert not any(word in str(raised.value) for word in ("safe_globals", "weights_only", "allowlist", "\n"))


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("length", [0, 1, 5, 100, 0.5, 0.9])
def test_pickles_that_were_cut(length, zipped, tmp_path):
    torch.save({"a": torch.ones(1000)}, tmp_path / "x.ckpt", _use_new_zipfile_serialization=zipped)
    whole = (tmp_path / "x.ckpt").read_bytes()
    (tmp_path / "x.ckpt").write_bytes(whole[: int(length * len(whole)) if isinstance(length, float) else length])
    with pytest.raises(CheckpointError, match=r"x.ckpt is (empty|damaged.*; download|.* it is damaged)") as raised:
        convert(tmp_path / "x.ckpt", tmp_path / "x.safetensors")
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 300 + len(str(tmp_path))


@pytest.mark.parametrize("target", ["out", "out.safetensors"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a\xff": 1}', "vocab.json"),
        (b"{", "vocab.json"),
        (b'{"a": 0}', "vocab.json with merges.txt is no tokenizer"),
    ],
)
def test_broken_tokenizers(content, message, target, made, tmp_path):
    folder, _, _ = made("SD 1")
    shutil.copytree(folder, tmp_path / "folder")
    (tmp_path / "folder" / "tokenizer" / "vocab.json").write_bytes(content)
    (tmp_path / "folder" / "tokenizer" / "merges.txt").write_text("#version: 0.2\n")
    with pytest.raises(CheckpointError, match=f"tokenizer/{message}"):
        convert(tmp_path / "folder", tmp_path / target)
    assert [f.name for f in tmp_path.iterdir()] == ["folder"]
