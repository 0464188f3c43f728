"""`ldm verify`: the default model's recorded outputs, damaged copies of it, and tiny models under official names."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from family import SD1_INPAINT, SD2_V, XL, official_tensors, sd, xl
from golden.record_emoji import dumps, emoji, expected
from PIL import Image
from safetensors.torch import load_file, save_file

import ldm
from ldm.__main__ import main
from ldm.pipeline import DEFAULT_MODEL
from ldm.samplers import ALIASES, SAMPLERS
from ldm.verify import KINDS, REFERENCES, matches, verify

GROUPS = {group["weights"]: group for group in json.loads(REFERENCES.read_text())["groups"]}
UNET = "unet/diffusion_pytorch_model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"
TEXT = "text_encoder/model.safetensors"


@pytest.fixture
def copy(tmp_path):
    return Path(shutil.copytree(DEFAULT_MODEL, tmp_path / "copy"))


def change(file, edit):
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file)


def failed(model):
    """The cases that failed, of the nine that must all have been run."""
    results = list(verify(model))
    assert len(results) == 9 and all(result.passed is not None for result in results)
    return [f"{r.case} {r.sampler}".strip() for r in results if not r.passed]


# The default model


def test_the_record_is_diffusers():
    """Recorded anew, as the script would."""
    anew = emoji()
    assert len(anew) == 9
    for row, recorded in zip(anew, GROUPS["emoji-64"]["rows"], strict=True):
        np.testing.assert_allclose(row.pop("expected"), recorded.pop("expected"), rtol=0, atol=1e-5)
        assert row == recorded


def test_the_file_is_as_the_script_writes_it():
    assert dumps(json.loads(REFERENCES.read_text())) == REFERENCES.read_text()


def test_default_model(capsys):
    main(["verify"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == "case weights sampler expected got difference tolerance result".split()
    assert len(lines) == 11 and all(line.endswith(" pass") for line in lines[1:10])
    assert lines[10] == "these weights give the outputs recorded from emoji-64"
    assert {result.difference < 1e-5 for result in verify()} == {True}


def test_another_file_of_the_same_weights(tmp_path):
    main(["convert", str(DEFAULT_MODEL), str(tmp_path / "emoji.safetensors")])
    assert not failed(tmp_path / "emoji.safetensors")


TEXT_TO_IMAGE = ["text to image, 5 steps ddim", "text to image, 5 steps euler"]
IMAGE_TO_IMAGE = ["image to image, 3 of 5 steps ddim"]
RUNS = TEXT_TO_IMAGE + IMAGE_TO_IMAGE


def brighter(tensors):
    tensors["down_blocks.1.resnets.0.conv1.weight"] *= 1.02


def swapped(tensors):
    q, k = (f"mid_block.attentions.0.transformer_blocks.0.attn1.to_{x}.weight" for x in "qk")
    tensors[q], tensors[k] = tensors[k], tensors[q]


def moved(tensors):
    tensors["decoder.up_blocks.2.resnets.0.norm1.bias"] += 0.05


def noisy(tensors):
    weight = tensors["encoder.mid_block.resnets.0.conv2.weight"]
    weight += 0.01 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)).to(weight.dtype)


def forgotten(tensors):
    name = next(name for name in tensors if name.endswith("encoder.layers.2.mlp.fc1.bias"))
    tensors[name].zero_()


def infinite(tensors):
    tensors["conv_out.bias"][0] = torch.inf


@pytest.mark.parametrize(
    ("file", "edit", "cases"),
    [
        (UNET, brighter, ["UNet, t = 20", "UNet, t = 999", *RUNS]),
        (UNET, swapped, ["UNet, t = 20", "UNet, t = 999", *RUNS]),
        (UNET, infinite, ["UNet, t = 20", "UNet, t = 999", *RUNS]),
        (VAE, moved, ["VAE, decoder", "VAE, there and back", *RUNS]),
        (VAE, noisy, ["VAE, encoder", "VAE, there and back", *IMAGE_TO_IMAGE]),
        (TEXT, forgotten, ["text encoder", *RUNS]),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_damaged_copy(copy, file, edit, cases, capsys):
    change(copy / file, edit)
    assert failed(copy) == cases
    with pytest.raises(SystemExit, match="of no weights could rows be run and all passed"):
        main(["verify", str(copy)])
    lines = capsys.readouterr().out.splitlines()
    assert sum("  FAIL" in line or " FAIL:" in line for line in lines) == len(cases)


def test_missing_tensor(copy):
    change(copy / UNET, lambda tensors: tensors.pop("conv_out.bias"))
    with pytest.raises(SystemExit, match="ldm: error: "):
        main(["verify", str(copy)])


def test_a_model_without_outputs(tmp_path, capsys):
    sd(SD2_V).save_pretrained(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(["verify", str(tmp_path)])
    assert "there are no published outputs for this model, but for SD 1.1, SD 1.4" in stop.value.code


# Official names: tiny models in their place, rows recorded with diffusers from files

HUB = "https://huggingface.co/datasets/some/where/resolve/main/"
END = [0, -1, [-3, None], [-3, None]]
PROMPT = {"prompt": "a red cat", "steps": 4, "guidance_scale": 5.0, "seed": 3, "width": 32, "height": 24}
RUN = {"kind": "generate", "tolerance": 1e-3, "at": END}


@pytest.fixture
def inputs(tmp_path):
    folder = tmp_path / "inputs"
    folder.mkdir()
    draw = np.random.RandomState(0)
    for shape in [(3, 4, 12, 16), (3, 9, 12, 16), (3, 77, 24), (3, 3, 24, 32)]:
        np.save(folder / f"noise_{'_'.join(map(str, shape))}.npy", draw.standard_normal(shape).astype(np.float32))
    Image.fromarray(draw.randint(0, 256, (24, 32, 3), np.uint8)).save(folder / "picture.png")
    Image.fromarray(np.pad(np.full((12, 16), 255, np.uint8), ((6, 6), (8, 8)))).convert("RGB").save(folder / "mask.png")
    return folder


def rows(channels):
    """Of a model of tiny SD's shapes, with `channels` into the UNet."""
    x, z, context, pixels = (
        f"{HUB}noise_{shape}.npy" for shape in (f"3_{channels}_12_16", "3_4_12_16", "3_77_24", "3_3_24_32")
    )
    nets = {"tolerance": 1e-4}
    ddim = {"sampler": "DDIMScheduler", "settings": {**PROMPT, "sigmas": "leading"}, **RUN}
    yield {"case": "text", "kind": "text", "prompt": "the red cat", "at": [0, [1, 4], [0, 3]], **nets}
    corner = [-1, [-2, None], [-2, None], [0, 2]]
    yield {"case": "unet", "kind": "unet", "t": 4, "x": x, "context": context, "at": corner, **nets}
    yield {"case": "decode", "kind": "decode", "z": z, "at": corner, **nets}
    yield {"case": "encode", "kind": "encode", "pixels": pixels, "batch": 3, "seed": 33, "at": [1, *END[1:]], **nets}
    yield {"case": "autoencode", "kind": "autoencode", "pixels": pixels, "at": corner, **nets}
    if channels == 4:
        yield {"case": "ddim", **ddim, "noise": {"seed": 5, "shape": [1, 4, 12, 16]}}
        yield {"case": "euler", **ddim, "sampler": "EulerDiscreteScheduler", "settings": {**PROMPT, "sigmas": "linspace"}}
        strength = {**ddim["settings"], "strength": 0.75}
        yield {"case": "img2img", **ddim, "image": f"{HUB}picture.png", "settings": strength}
    else:
        strength = {**ddim["settings"], "strength": 1.0}
        yield {"case": "inpaint", **ddim, "image": f"{HUB}picture.png", "mask": f"{HUB}mask.png", "settings": strength}


def references(tmp_path, model, groups):
    """A verify.json in which these groups {weights: rows} apply to the model at this path."""
    report = ldm.inspect(model)
    header = {"kind": "model", "name": report.name, "prediction_type": report.prediction_type}
    file = tmp_path / "verify.json"
    file.write_text(json.dumps({"groups": [{"weights": w, "model": header, "rows": r} for w, r in groups.items()]}))
    return file


@pytest.mark.parametrize("model", [SD2_V, SD1_INPAINT], ids=["SD 2 v", "inpainting"])
def test_every_kind_of_row(model, inputs, tmp_path):
    pipe = sd(model)
    if model is SD1_INPAINT:
        from diffusers import StableDiffusionInpaintPipeline

        pipe = sd(model, StableDiffusionInpaintPipeline)
    pipe.save_pretrained(tmp_path / "model")
    recorded = [{**row, "expected": expected(pipe, row, inputs)} for row in rows(model.unet.in_channels)]
    file = references(tmp_path, tmp_path / "model", {"tiny": recorded})
    results = list(verify(tmp_path / "model", inputs, references=file))
    assert {row["kind"] for row in recorded} == set(KINDS) and len(results) == len(recorded)
    assert all(result.passed for result in results), "\n".join(map(str, results))
    assert matches(results) == ["tiny"]
    for result in verify(tmp_path / "model", None, references=file):
        needs_file = HUB in json.dumps(next(row for row in recorded if row["case"] == result.case))
        assert (result.passed is None) == needs_file
        assert not needs_file or HUB in result.why
