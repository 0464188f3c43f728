"""`ldm verify`: the default model's recorded outputs, damaged copies of it, and tiny models under official names."""

import json
import re
import shutil
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from family import SD1, SD1_INPAINT, SD2, SD2_V, XL, reference
from golden.record_emoji import dumps, emoji, expected
from PIL import Image
from safetensors.torch import load_file, save_file
from synthetic import sparse

import ldm
import ldm.models
from ldm.__main__ import main
from ldm.pipeline import DEFAULT_MODEL, Pipeline
from ldm.samplers import ALIASES, SAMPLERS
from ldm.settings import Settings
from ldm.verify import HEADER, KINDS, REFERENCES, groups_for, matches, run, verify

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
    assert lines[0].split() == list(HEADER)
    assert len(lines) == 12 and all(line.endswith(" pass") for line in lines[1:10])
    assert lines[10] == "emoji-64: 9 passed, 0 failed, 0 not run"
    assert lines[11] == "these weights give the outputs recorded from emoji-64"


def test_the_nets_give_the_record_in_float64():
    """Whatever the machine rounds to in float32."""
    pipe = Pipeline.from_pretrained(device="cpu")
    for net in (pipe.text_encoder, pipe.unet, pipe.vae):
        net.double()
    groups = json.loads(REFERENCES.read_text())["groups"]
    [recorded] = [group["rows"] for group in groups if group["weights"] == "emoji-64"]
    rows = [row for row in recorded if row["kind"] != "generate"]
    assert len(rows) == 6
    for row in rows:
        size = max(map(abs, row["expected"]))  # of which six digits are recorded
        assert run(pipe, "emoji-64", row, None).difference <= 5e-6 * size


def test_the_default_model_gives_the_record_in_float32():
    for result in verify():
        assert result.difference < (1e-5 if "steps" in result.case else 2e-5 * max(map(abs, result.expected)))


def test_another_file_of_the_same_weights(tmp_path):
    main(["convert", str(DEFAULT_MODEL), str(tmp_path / "emoji.safetensors")])
    assert_passed(list(verify(tmp_path / "emoji.safetensors")), 9)


CASES = [row["case"] for row in GROUPS["emoji-64"]["rows"]]
IMAGE_TO_IMAGE = ["image to image, 3 of 5 steps"]
RUNS = [*["text to image, 5 steps"] * 2, *IMAGE_TO_IMAGE]


def louder(tensors):
    tensors["conv_in.weight"] *= 1.02


def swapped(tensors):
    k, v = (f"up_blocks.0.attentions.0.transformer_blocks.0.attn2.to_{x}.weight" for x in "kv")
    tensors[k], tensors[v] = tensors[v], tensors[k]


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


def test_damaged_copy_that_does_not_load(copy):
    change(copy / UNET, infinite)
    with pytest.raises(SystemExit, match=r"unet: conv_out.bias has values that are NaN, infinite, or too large"):
        main(["verify", str(copy)])


@pytest.mark.parametrize(
    ("file", "edit", "cases"),
    [
        (UNET, louder, ["UNet, t = 20", "UNet, t = 999", *RUNS]),
        (UNET, swapped, ["UNet, t = 20", "UNet, t = 999", *RUNS]),
        (VAE, moved, ["VAE, decoder", "VAE, there and back", *RUNS]),
        (VAE, noisy, ["VAE, encoder", "VAE, there and back", *IMAGE_TO_IMAGE]),
        (TEXT, forgotten, ["text encoder", *RUNS]),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_damaged_copy(copy, file, edit, cases, capsys):
    change(copy / file, edit)
    with pytest.raises(SystemExit, match="of no weights could rows be run and all passed"):
        main(["verify", str(copy)])
    *shown, summary = [re.split("  +", line) for line in capsys.readouterr().out.splitlines()[1:]]
    assert len(shown) == 9 and summary == [f"emoji-64: {9 - len(cases)} passed, {len(cases)} failed, 0 not run"]
    assert [cells[0] for cells in shown if cells[-1].startswith("FAIL")] == cases
    assert [cells[0] for cells in shown if cells[-1] == "pass"] == [name for name in CASES if name not in cases]


def test_missing_tensor(copy):
    change(copy / UNET, lambda tensors: tensors.pop("conv_out.bias"))
    with pytest.raises(SystemExit, match="ldm: error: "):
        main(["verify", str(copy)])


def test_a_model_without_outputs(tmp_path, capsys):
    reference(SD2_V, DDIMScheduler).save_pretrained(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(["verify", str(tmp_path)])
    assert "there are no published outputs for this model, but for SD 1.1, SD 1.4" in stop.value.code


# The official rows


OFFICIAL = [(g, row) for w, g in GROUPS.items() if w != "emoji-64" for row in g["rows"]]


@pytest.mark.parametrize(
    ("layout", "weights"),
    [
        ("sd15", ["SD 1.1", "SD 1.4", "SD 1.5"]),
        ("sd15_inpaint", ["SD 1.5 inpainting"]),
        ("sd2", ["SD 2.0 base"]),  # a file full of zeros is taken for one with epsilon
        ("sdxl_base", ["SDXL base 1.0"]),
        ("sdxl_refiner", []),
    ],
)
def test_which_groups_are_for_a_file(layout, weights, tmp_path):
    shapes = json.loads((Path(__file__).parent / "keys" / f"{layout}.json").read_text())
    file = sparse(tmp_path / "model.safetensors", shapes)
    if weights:
        assert [group["weights"] for group in groups_for(file)] == weights
    else:
        with pytest.raises(ValueError, match="no published outputs for this model"):
            groups_for(file)


def shape_of(given):
    if isinstance(given, str):
        return [int(n) for n in given.rpartition("shape=")[2].removesuffix(".npy").split("_")]
    return given["shape"]


def test_rows_are_whole():
    """Of every row: the index picks as many values as are expected, and the settings are such as can be run."""
    names = {name for name, _, model in ldm.models.OFFICIAL if model}
    for group, row in OFFICIAL:
        assert group["model"]["name"] in names and row["tolerance"] < 0.1
        match row["kind"]:
            case "generate":
                s = Settings(**row["settings"])
                shape = [1, 3, s.height, s.width]
                assert issubclass(getattr(diffusers, row["sampler"]), diffusers.SchedulerMixin)
                if "noise" in row:
                    assert shape_of(row["noise"]) == [1, 4, s.height // 8, s.width // 8]
            case "unet":
                (b, _, h, w), (texts, length, width) = shape_of(row["x"]), shape_of(row["context"])
                assert (texts, length, width) == (b, 77, 1024 if "SD 2" in group["weights"] else 768)
                shape = [b, 4, h, w]
            case "decode":
                shape = [3, 3, 512, 512]
            case "encode":
                shape = [row["batch"], 4, 64, 64]
            case "autoencode":
                shape = shape_of(row["pixels"])
        index = tuple(slice(*i) if isinstance(i, list) else i for i in row["at"])
        assert np.empty(shape, np.uint8)[index].size == len(row["expected"]) in (8, 9)


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
    euler = {**ddim, "sampler": "EulerDiscreteScheduler", "settings": {**PROMPT, "sigmas": "linspace"}}
    if channels == 4:
        yield {"case": "ddim", **ddim, "noise": {"seed": 5, "shape": [1, 4, 12, 16]}}
        yield {"case": "euler", **euler}
        strength = {**ddim["settings"], "strength": 0.75}
        yield {"case": "img2img", **ddim, "image": f"{HUB}picture.png", "settings": strength}
    else:
        strength = {**ddim["settings"], "strength": 1.0}
        yield {"case": "inpaint", **ddim, "image": f"{HUB}picture.png", "mask": f"{HUB}mask.png", "settings": strength}


@pytest.fixture
def tiny(tmp_path):
    """Saves diffusers' pipeline of a tiny model, and a verify.json whose groups {weights: rows} are for it."""

    def made(pipe, groups):
        path, file = tmp_path / "model", tmp_path / "verify.json"
        if not path.exists():
            pipe.save_pretrained(path)
        report = ldm.inspect(path)
        header = {"kind": "model", "name": report.name, "prediction_type": report.prediction_type}
        file.write_text(json.dumps({"groups": [{"weights": w, "model": header, "rows": r} for w, r in groups.items()]}))
        return path, file

    return made


def recorded(pipe, rows, inputs):
    return [{**row, "expected": expected(pipe, row, inputs)} for row in rows]


def assert_passed(results, count):
    assert len(results) == count and all(result.passed for result in results), "\n".join(map(str, results))


@pytest.mark.parametrize("model", [SD2_V, SD1_INPAINT], ids=["SD 2 v", "inpainting"])
def test_every_kind_of_row(model, inputs, tiny):
    pipe = reference(model, DDIMScheduler)
    made = recorded(pipe, rows(model.unet.in_channels), inputs)
    path, file = tiny(pipe, {"tiny": made})
    results = list(verify(path, inputs, references=file))
    assert {row["kind"] for row in made} == set(KINDS)
    assert_passed(results, len(made))
    assert matches(results) == ["tiny"]


@pytest.mark.parametrize("folder", [None, "empty", "broken"])
def test_a_missing_file_is_said(folder, inputs, tiny, tmp_path):
    pipe = reference(SD2_V, DDIMScheduler)
    made = recorded(pipe, rows(4), inputs)
    path, file = tiny(pipe, {"tiny": made})
    (tmp_path / "empty").mkdir()
    shutil.copytree(inputs, tmp_path / "broken")
    for broken in (tmp_path / "broken").iterdir():
        broken.write_bytes(b"not an array and not a picture")
    results = list(verify(path, folder and tmp_path / folder, references=file))
    for result in results:
        row = next(row for row in made if row["case"] == result.case)
        needed = [value for value in row.values() if str(value).startswith(HUB)]
        assert result.passed is (None if needed else True)
        first = needed[0].rpartition("/")[2] if needed else ""
        assert first in result.why and (not needed or folder == "broken" or HUB + first in result.why)


def test_groups_of_the_same_header(inputs, tiny, capsys, monkeypatch):
    """The weights are those of the group of which all rows pass, others notwithstanding; rows that were not run are
    neither for nor against."""
    pipe = reference(SD2_V, DDIMScheduler)
    text, unet, *_, ddim, _, _ = recorded(pipe, rows(4), inputs)
    other = {**unet, "expected": [x + 2e-4 for x in unet["expected"]]}
    later = {**ddim, "sampler": "SomeOtherScheduler"}
    unable = {**ddim, "unable": "its noise is lost"}
    path, file = tiny(pipe, {"A": [text, other], "B": [later, unet, unable], "C": [later]})
    results = list(verify(path, inputs, references=file))
    assert [(r.weights, r.case, r.passed, r.why) for r in results] == [
        ("A", "text", True, ""),
        ("A", "unet", False, ""),
        ("B", "unet", True, ""),
        ("B", "ddim", None, "this version has no SomeOther"),
        ("B", "ddim", None, "its noise is lost"),
        ("C", "ddim", None, "this version has no SomeOther"),
    ]
    assert results[1].difference == pytest.approx(2e-4, rel=0.05)
    assert matches(results) == ["B"]
    monkeypatch.setattr(verify, "__defaults__", (*verify.__defaults__[:-1], file))
    main(["verify", str(path), "--inputs", str(inputs)])
    assert capsys.readouterr().out.splitlines()[-4:] == [
        "A: 1 passed, 1 failed, 0 not run",
        "B: 1 passed, 0 failed, 2 not run",
        "C: 0 passed, 0 failed, 1 not run",
        "these weights give the outputs recorded from B",
    ]
    tiny(pipe, {"C": [later]})
    with pytest.raises(SystemExit, match="of no weights could rows be run and all passed"):
        main(["verify", str(path)])
    assert "not run: this version has no SomeOther" in capsys.readouterr().out


def test_timesteps(inputs, tiny):
    """Those of "leading", written out."""
    pipe = reference(SD2_V, DDIMScheduler)
    ddim = next(row for row in recorded(pipe, rows(4), inputs) if row["case"] == "ddim")
    explicit = {**ddim, "settings": PROMPT, "timesteps": [751, 501, 251, 1, 0]}
    other = {**ddim, "settings": PROMPT, "timesteps": [751, 501, 250, 1, 0]}
    path, file = tiny(pipe, {"tiny": [explicit, other]})
    assert [result.passed for result in verify(path, inputs, references=file)] == [True, False]


def test_recorded_in_float16(inputs, tiny):
    """The inputs are rounded as they were, the net is not."""
    pipe = reference(SD2_V, DDIMScheduler)
    row = next(row for row in rows(4) if row["kind"] == "unet")
    half = inputs.parent / "half"
    shutil.copytree(inputs, half)
    for file in half.glob("*.npy"):
        np.save(file, np.load(file).astype(np.float16))
    made = {**row, "tolerance": 1e-6, "expected": expected(pipe, row, half)}
    path, file = tiny(pipe, {"A": [{**made, "recorded": "float16"}], "B": [made]})
    assert [result.passed for result in verify(path, inputs, references=file)] == [True, False]


def test_lora(inputs, tiny):
    """Is there for its own row and gone for the next; and the cosine distance forgives a factor."""
    pipe = reference(XL, diffusers.EulerDiscreteScheduler)
    row = {"kind": "generate", "sampler": "EulerDiscreteScheduler", "settings": {**PROMPT, "sigmas": "leading"}, **RUN}
    plain = {"case": "plain", **row, "expected": expected(pipe, row)}
    name, draw = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q", torch.Generator().manual_seed(1)
    down, up = torch.randn(2, 32, generator=draw), torch.randn(32, 2, generator=draw)
    save_file({f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}, inputs / "some-lora.safetensors")
    path, _ = tiny(pipe, {"tiny": [plain]})
    pipe.load_lora_weights(inputs / "some-lora.safetensors")
    lora = {"case": "LoRA", **row, "lora": f"{HUB}some-lora.safetensors", "expected": expected(pipe, row)}
    cosine = {**lora, "measure": "cosine", "tolerance": 1e-6, "expected": [2 * x for x in lora["expected"]]}
    without = {**cosine, "expected": plain["expected"]}
    _, file = tiny(pipe, {"tiny": [lora, plain, cosine, without]})
    results = list(verify(path, inputs, references=file))
    assert [result.passed for result in results] == [True, True, True, False]
    assert next(verify(path, None, references=file)).passed is None


TINY = {"SD 1.x": SD1, "SD 1.x inpainting": SD1_INPAINT, "SD 2.x": SD2, "SDXL base": XL}
RUNS_HERE = [(g, r) for g, r in OFFICIAL if r["kind"] == "generate" and "unable" not in r]
RUNS_HERE = [(g, r) for g, r in RUNS_HERE if ALIASES.get(r["sampler"], r["sampler"]) in SAMPLERS]
NAMES = [f"{g['weights']} {r['case']} {r['sampler']}" for g, r in RUNS_HERE]


@pytest.mark.parametrize(("group", "row"), RUNS_HERE, ids=NAMES)
def test_official_runs_in_tiny(group, row, inputs, tiny):
    """Every official run that this version can do, with its own prompt, schedule, scale, strength and seed, through
    diffusers and through verify: a tiny model, picture and mask stand in for the official ones."""
    model = SD2_V if group["model"]["prediction_type"] == "v_prediction" else TINY[group["model"]["name"]]
    pipe = reference(model, getattr(diffusers, row["sampler"]))
    files = {name: f"{HUB}{file}.png" for name, file in {"image": "picture", "mask": "mask"}.items() if name in row}
    noise = {"noise": {**row["noise"], "shape": [1, 4, 12, 16]}} if "noise" in row else {}
    size = {"settings": {**row["settings"], "width": 32, "height": 24}}
    small = {**row, **files, **noise, **size, "at": [0, [0, 3], [-3, None], -3], "tolerance": 1e-3}
    small = {name: value for name, value in small.items() if name not in ("lora", "measure")}
    path, file = tiny(pipe, {"tiny": recorded(pipe, [small], inputs)})
    assert_passed(list(verify(path, inputs, references=file)), 1)
