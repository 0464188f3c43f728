"""The command line, run in this process; once as a command of its own."""

import os
import socket
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from sd_parsers import ParserManager

import ldm
from ldm.__main__ import main, parser
from ldm.image import save
from ldm.parameters import parameters, parse, read
from ldm.pipeline import DEFAULT_MODEL
from ldm.unet import UNet

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a socket was opened")

    for name in ("socket", "create_connection", "getaddrinfo"):
        monkeypatch.setattr(socket, name, refuse)


@pytest.fixture(scope="module")
def pipe():
    return ldm.Pipeline.from_pretrained()


def files():
    return sorted(path.name for path in Path().iterdir())


def pixels(image):
    return np.asarray(Image.open(image) if isinstance(image, str) else image).tolist()


def fails(capsys, *argv):
    """What it says on stderr when it gives up: one line and no traceback, and no file is left."""
    before = files()
    with pytest.raises(SystemExit) as stop:
        main([*argv, "--quiet"])
    assert stop.value.code not in (0, None) and files() == before
    said = capsys.readouterr().err if isinstance(stop.value.code, int) else stop.value.code  # 1 and a message, or 2
    assert "Traceback" not in said
    return said


@pytest.mark.parametrize("verb", [[], ["generate"]])
def test_prompt_to_file(verb, pipe, capsys):
    main([*verb, "a red heart", "-o", "x.png", "--steps", "3", "--seed", "1"])
    out, err = capsys.readouterr()
    assert out == "x.png\n" and "3/3" in err and files() == ["x.png"]
    assert pixels("x.png") == pixels(pipe("a red heart", steps=3, seed=1, progress=False).images[0])


def test_options_before_the_prompt(capsys):
    main(["--steps", "1", "--quiet", "-o", "x.png", "a red heart"])
    assert files() == ["x.png"]
    assert capsys.readouterr() == ("x.png\n", "")


def test_several(pipe, capsys):
    main(["fire", "-o", "x.png", "-n", "2", "--steps", "1", "--seed", "4"])
    assert capsys.readouterr().out == "x.png\nx-2.png\n" and files() == ["x-2.png", "x.png"]
    out = pipe("fire", batch_size=2, steps=1, seed=4, progress=False)
    assert pixels("x.png") == pixels(out.images[0]) and pixels("x-2.png") == pixels(out.images[1])
    assert [Image.open(name).text["parameters"].partition("Seed: ")[2][0] for name in ("x.png", "x-2.png")] == [
        "4",
        "5",
    ]


def test_a_list_of_seeds(pipe, capsys):
    main(["--seed", "4,1", "fire", "-o", "x.png", "--steps", "1", "--quiet"])
    assert capsys.readouterr().out == "x.png\nx-2.png\n"
    out = pipe("fire", seed=[4, 1], steps=1, progress=False)
    for name, image, seed in zip(("x.png", "x-2.png"), out.images, "41", strict=True):
        assert pixels(name) == pixels(image) and f"Seed: {seed}," in Image.open(name).text["parameters"]
    main(["fire", "-o", "y.png", "--steps", "1", "--subseed", "7,7", "--subseed-strength", "1", "-n", "2"])
    assert pixels("y.png") == pixels("y-2.png")


def test_lora_and_embedding(pipe, tmp_path):
    to_q = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    width = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q.in_features
    loras = [str(tmp_path / "a.safetensors"), str(tmp_path / "b:2")]  # the second is a file whose name ends so
    for file in loras:
        down, up = torch.randn(4, width), torch.randn(width, 4)
        save_file({f"{to_q}.lora_down.weight": down, f"{to_q}.lora_up.weight": up}, file)
    word = str(tmp_path / "wowza.safetensors")
    save_file({"emb_params": torch.randn(2, pipe.text_encoder.config.width)}, word)
    options = ["--lora", f"{loras[0]}:0.5", "--lora", loras[1], "--embedding", word]
    main(["wowza", "-o", "x.png", "--steps", "2", *options])
    other = ldm.Pipeline.from_pretrained()
    assert other.load_embedding(word) == "wowza"
    other.load_lora(loras[0], 0.5)
    other.load_lora(loras[1])
    assert pixels("x.png") == pixels(other("wowza", steps=2, progress=False).images[0])
    assert pixels("x.png") != pixels(pipe("wowza", steps=2, progress=False).images[0])
    values = parse(read(Path("x.png")))
    assert values["lora"] == ((loras[0], 0.5), (loras[1], 1.0)) and values["embedding"] == ((None, word),)
    main(["replay", "x.png", "-o", "z.png"])
    assert Path("z.png").read_bytes() == Path("x.png").read_bytes()
    main(["a brightly", "-o", "y.png", "--steps", "2", "--embedding", f"brightly={word}", "--vae-dtype", "bfloat16"])
    half = ldm.Pipeline.from_pretrained(vae_dtype=torch.bfloat16)
    assert half.load_embedding(word, "brightly") == "brightly"
    assert pixels("y.png") == pixels(half("a brightly", steps=2, progress=False).images[0])
    with pytest.raises(SystemExit, match=r"ldm: error: none.safetensors does not exist"):
        main(["wowza", "--lora", "none.safetensors:0.5"])


def test_convert(capsys, tmp_path):
    main(["convert", str(DEFAULT_MODEL), "x.safetensors", "--dtype", "bfloat16"])
    assert capsys.readouterr().out == "x.safetensors\n"
    assert ldm.inspect("x.safetensors").dtypes == {"BF16": 550, "F32": 1}  # the one is v_pred, a flag
    with pytest.raises(SystemExit, match=r"ldm: error: x.safetensors exists: remove it, or give another name"):
        main(["convert", str(DEFAULT_MODEL), "x.safetensors"])


def test_nothing_is_written_over(capsys):
    Path("x.png").write_text("mine")
    Path("x-2.png").mkdir()
    main(["fire", "-o", "x.png", "--steps", "1", "-n", "2"])
    assert capsys.readouterr().out == "x-3.png\nx-4.png\n"
    assert Path("x.png").read_text() == "mine" and files() == ["x-2.png", "x-3.png", "x-4.png", "x.png"]


def options(settings):
    """Those of the command line for settings; pictures and models stand for files of a fixed name."""
    argv = []
    for name, value in settings.items():
        option = "--" + name.replace("_", "-")
        files = {"image": "in.png", "mask": "mask.png", "refiner": str(DEFAULT_MODEL)}
        if isinstance(value, dict):
            values = [f"{key}={part}" for key, part in value.items()]
        else:
            values = value if isinstance(value, tuple) else [files.get(name, value)]
        argv += [option.replace("--", "--no-")] if value is False else [option, *map(str, values)]
    return argv


def test_every_setting(pipe, capsys):
    x, y = np.meshgrid(np.arange(40), np.arange(32))
    Image.fromarray(np.stack([6 * x, 8 * y, 3 * x], -1).astype(np.uint8)).save("in.png")
    mask = Image.new("L", (40, 32))
    mask.paste(255, (0, 0, 20, 32))
    mask.save("mask.png")
    settings = {
        "negative_prompt": "blue",
        "steps": 4,
        "guidance_scale": 3.5,
        "sampler": "ddim",
        "sigmas": "trailing",
        "seed": 9,
        "subseed": 5,
        "subseed_strength": 0.3,
        "seed_resize_from": (32, 64),
        "width": 48,
        "height": 40,
        "tiling": "both",
        "clip_skip": 2,
        "image": Image.open("in.png"),
        "strength": 0.5,
        "strength_rule": "webui",
        "mask": Image.open("mask.png"),
        "mask_blur": 1.5,
        "masked_content": "fill",
        "blend": "noise",
        "paste_back": False,
        "eta": 0.25,
        "guidance_rescale": 0.5,
        "original_size": (64, 48),  # what SDXL alone looks at, like the next four
        "crops_coords_top_left": (1, 2),
        "target_size": (40, 48),
        "aesthetic_score": 5.0,
        "negative_aesthetic_score": 3.0,
        "refiner": ldm.Pipeline.from_pretrained(DEFAULT_MODEL),
        "refiner_start": 0.6,
        "emphasis": "none",
        "conventions": "compvis",
    }
    main(["(fire:1.4)", "-o", "x.png", "--quiet", *options(settings)])
    assert pixels("x.png") == pixels(pipe("(fire:1.4)", **settings, progress=False).images[0])
    # What is several runs, and each kind by itself.
    common = {"image": settings["image"], "steps": 2, "strength": 0.5}
    others = [
        {"sampler": "euler", "sampler_options": {"s_churn": 1.5, "s_noise": 1}},
        {"guidance": "apg", "guidance_options": {"eta": 0.5, "momentum": -0.5}, "guidance_interval": (0.3, 5.4)},
        {"deep_cache": 2, "token_merging": 0.5},
        {"mask": settings["mask"], "padding_mask_crop": 4},
        {"extend": (0, 8, 16, 0), "extend_fill": "mirror"},
        {"enlarge": 1.5, "enlarge_filter": "lanczos", "tile": 32, "tile_overlap": 16},
    ]
    for i, other in enumerate(others):
        main(["fire", "-o", f"{i}.png", "--quiet", *options(common | other)])
        assert pixels(f"{i}.png") == pixels(pipe("fire", **common, **other, progress=False).images[0])
    settings |= {name: value for other in others for name, value in other.items()}
    written = Image.open("x.png").text["parameters"]
    for line in ("Emphasis: No norm", 'Original size: "[64, 48]"', 'Crops coords top left: "[1, 2]"', "Clip skip: 2"):
        assert line in written
    for line in (
        'Target size: "[40, 48]"',
        "Aesthetic score: 5.0",
        "Negative aesthetic score: 3.0",
        "Refiner switch at: 0.6",
    ):
        assert line in written
    main(["replay", "x.png", "--quiet"])
    assert Path("x-2.png").read_bytes() == Path("x.png").read_bytes()
    main(["replay", "1.png", "--quiet"])
    assert Path("1-2.png").read_bytes() == Path("1.png").read_bytes()
    named = {field.name for field in fields(ldm.Settings)}
    assert named - set(settings) == {"prompt", "batch_size", "latents", "noise"}  # -n; tensors have no spelling


def test_defaults_are_the_pipelines():
    args = vars(parser().parse_args(["generate", "fire"]))
    args["batch_size"] = args["n"]
    for field in fields(ldm.Settings):
        if field.name not in ("prompt", "latents", "noise"):
            assert args[field.name] == field.default


def test_model_vae_and_dtype(pipe, capsys):
    argv = ["--model", str(DEFAULT_MODEL), "--vae", str(DEFAULT_MODEL / "vae"), "--device", "cpu"]
    main(["fire", "-o", "x.png", "--steps", "1", "--dtype", "bfloat16", *argv])
    half = ldm.Pipeline.from_pretrained(DEFAULT_MODEL, dtype=torch.bfloat16)
    assert pixels("x.png") == pixels(half("fire", steps=1, progress=False).images[0])
    other = {"v_prediction": "epsilon", "epsilon": "v_prediction"}[pipe.prediction_type]
    main(["fire", "-o", "y.png", "--steps", "1", "--prediction-type", other])
    assert pixels("y.png") != pixels(pipe("fire", steps=1, progress=False).images[0])


def test_help(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["generate", "--help"])
    said = capsys.readouterr().out
    assert stop.value.code == 0
    for field in fields(ldm.Settings):
        if field.name not in ("prompt", "batch_size", "latents", "noise"):
            assert f"--{field.name.replace('_', '-')} " in said
    for option in ("prompt", "-n COUNT", "--output", "--model", "--vae", "--dtype", "--device", "--prediction-type"):
        assert option in said
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0 and "generate" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--steps", "0"], "ldm: error: steps=0: give a whole number from 1 to 1000"),
        (["--steps", "many"], "argument --steps: invalid int value: 'many'"),
        (["--sampler", "eular"], "ldm: error: unknown sampler 'eular': use ddim, ddpm, euler"),
        (["--sigmas", "karas"], "argument --sigmas: 'karas' is not among leading, "),
        (["--strength", "2"], "ldm: error: strength=2.0: give a number from 0"),
        (["--guidance-scale", "nan"], "ldm: error: guidance_scale=nan"),
        (["--width", "0"], "ldm: error: width=0"),
        (["--clip-skip", "99"], "ldm: error: clip_skip=99"),
        (["--seed", "-1"], "ldm: error: seed=-1: give a whole number of 0 or more"),
        (["--seed", "4,,1"], "argument --seed: invalid seeds value: '4,,1'"),
        (["--tiling", "z"], "argument --tiling: invalid choice: 'z'"),
        (["-n", "0"], "ldm: error: batch_size=0"),
        (["--image", "none.png"], "ldm: error: --image none.png: No such file or directory"),
        (["--image", __file__], "ldm: error: --image "),
        (["--mask", str(ROOT / "in.png")], "ldm: error: --mask "),
        (["--model", "none.safetensors"], "ldm: error: none.safetensors does not exist"),
        (["--model", "."], "ldm: error: . is not a diffusers folder"),
        (["--vae", "none.safetensors"], "ldm: error: none.safetensors does not exist"),
        (["--dtype", "float16", "--device", "cpu"], "ldm: error: dtype=torch.float16 on cpu"),
        (["--device", "toaster"], "ldm: error: Expected one of cpu, cuda"),
        (["-o", "x.gif"], "ldm: error: output x.gif: give a name that ends in .png, .jpg, .jpeg, .webp, .avif"),
        (["--quality", "80"], "ldm: error: quality=80: PNG has none"),
        (["--quality", "101", "-o", "x.jpg"], "ldm: error: quality=101: give a whole number from 1 to 100"),
        (["--quality", "80", "--max-bytes", "1k", "-o", "x.jpg"], "ldm: error: quality=80 with max_bytes=1000"),
        (["--max-bytes", "1G"], "argument --max-bytes: '1G' is no number of bytes: give 200000, 200k or 0.2M"),
        (["--max-bytes", "100", "--steps", "1"], "ldm: error: output out.png cannot be written: max_bytes=100: the"),
        (["--force", "-o", "/"], "ldm: error: output /: give a name that ends in"),
        (["-o", "none/x.png"], "ldm: error: output none/x.png: the folder "),
        (["--num-inference-steps", "3"], "unrecognized arguments: --num-inference-steps 3"),
    ],
    ids=lambda value: value[0] + value[1][-4:] if isinstance(value, list) else "",
)
def test_errors(argv, message, capsys):
    assert message in fails(capsys, "fire", *argv)


def test_nothing_to_draw(capsys):
    assert "no prompt: give one" in fails(capsys)


def test_nan_in_the_unet(capsys, monkeypatch):
    monkeypatch.setattr(UNet, "forward", lambda self, x, *_: x * torch.nan)
    assert "ldm: error: step 0: the UNet returned NaN" in fails(capsys, "fire")


def interrupt(*args, **kwargs):
    raise KeyboardInterrupt


def test_stopped_while_drawing(capsys, monkeypatch):
    monkeypatch.setattr(UNet, "forward", interrupt)
    assert fails(capsys, "fire", "-o", "x.png") == "ldm: stopped, nothing more was written"


def stop_writing(monkeypatch, error, after=0):
    """Half of a file is written, then comes `error`; `after` files are written as they should."""
    write, left = Path.write_bytes, [after]

    def half(file, data):
        if left[0] == 0:
            write(file, data[: len(data) // 2])
            raise error
        left[0] -= 1
        return write(file, data)

    monkeypatch.setattr(Path, "write_bytes", half)


def test_stopped_while_saving(capsys, monkeypatch):
    stop_writing(monkeypatch, KeyboardInterrupt())
    assert fails(capsys, "fire", "-o", "x.png", "--steps", "1") == "ldm: stopped, nothing more was written"


@pytest.mark.parametrize("force", [[], ["--force"]])
def test_disk_full(capsys, monkeypatch, force):
    stop_writing(monkeypatch, OSError(28, "No space left on device"))
    Path("x.png").write_text("mine")
    said = fails(capsys, "fire", "-o", "x.png", "--steps", "1", *force)
    assert said == "ldm: error: output x.png cannot be written: No space left on device"
    assert Path("x.png").read_text() == "mine"


def test_disk_full_after_some_pictures(capsys, monkeypatch):
    stop_writing(monkeypatch, OSError(28, "No space left on device"), after=2)
    with pytest.raises(SystemExit) as stop:
        main(["fire", "-o", "x.jpg", "--steps", "1", "-n", "3", "--quiet"])
    assert stop.value.code == (
        "ldm: error: output x.jpg cannot be written: No space left on device; saved before it: x.jpg, x-2.jpg"
    )
    assert files() == ["x-2.jpg", "x.jpg"]
    for name in files():
        Image.open(name).load()


def test_unwritable_folder(capsys, monkeypatch):
    with monkeypatch.context() as m:  # known before the work
        m.setattr(os, "access", lambda path, mode: mode != os.W_OK)
        m.setattr(UNet, "forward", None)
        assert "ldm: error: output x.png: the folder " in fails(capsys, "fire", "-o", "x.png")

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "write_bytes", refuse)  # only while saving
    said = fails(capsys, "fire", "-o", "x.png", "--steps", "1")
    assert said == "ldm: error: output x.png cannot be written: Permission denied"


def test_force(capsys):
    Path("x.png").write_text("mine")
    Path("x-2.png").write_text("mine too")
    main(["fire", "-o", "x.png", "--force", "--steps", "1", "-n", "2", "--quiet"])
    assert capsys.readouterr().out == "x.png\nx-2.png\n" and files() == ["x-2.png", "x.png"]
    assert "Seed: 0" in read(Path("x.png")) and "Seed: 1" in read(Path("x-2.png"))
    Path("y.png").mkdir()
    assert "output y.png: it is a folder" in fails(capsys, "fire", "-o", "y.png", "--force")


def test_quality_and_size():
    main(["fire", "-o", "a.jpg", "--steps", "1", "--quality", "20", "--quiet"])
    main(["fire", "-o", "b.jpg", "--steps", "1", "--quality", "95", "--quiet"])
    main(["fire", "-o", "c.webp", "--steps", "1", "--max-bytes", "1.5k", "--quiet"])
    main(["fire", "-o", "d.png", "--steps", "1", "--max-bytes", "0.1M", "--quiet"])
    sizes = {name: Path(name).stat().st_size for name in files()}
    assert sizes["a.jpg"] < sizes["b.jpg"] and sizes["c.webp"] <= 1500 and sizes["d.png"] <= 100000


@pytest.fixture
def picture():
    main(["a red heart", "-o", "x.png", "--steps", "2", "--seed", "3", "--quiet"])


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".avif"])
def test_info_and_replay(suffix, capsys):
    """The pictures of a batch, of which each is made again: the same file to the last byte."""
    options = ["--quality", "40"] if suffix == ".jpg" else ["--max-bytes", "5k"] if suffix == ".webp" else []
    prompt = "it's a\nred $HEART"
    main([prompt, "-o", f"x{suffix}", "--steps", "2", "-n", "2", "--seed", "5", *options, "--quiet"])
    capsys.readouterr()
    for name in (f"x{suffix}", f"x-2{suffix}"):
        main(["replay", name, "-o", f"again{suffix}", "--force", "--quiet"])
        assert Path(f"again{suffix}").read_bytes() == Path(name).read_bytes()
        in_steps = "" if suffix == ".webp" else ", in each of 2 steps"  # where bytes are counted there is no record
        assert capsys.readouterr() == (f"again{suffix}\nbitwise the same{in_steps}\n", "")
        main(["info", name])
        *lines, command = capsys.readouterr().out.splitlines()
        assert lines[0].split() == ["file", name] and lines[1].split()[-1] == "64x64"
        assert lines[2:4] == [f"{'prompt':<24}it's a", f"{'':<24}red $HEART"]
        assert any(line.split() == ["Steps", "2"] for line in lines)
        assert lines[-1] == f"{'picture':<24}{1 if name == f'x{suffix}' else 2} of the 2 that the command makes"
        command = command.removeprefix(f"{'command':<24}")
        printed = subprocess.run(["bash", "-c", f"printf '%s\\0' {command}"], capture_output=True, text=True).stdout
        _, *argv, _ = printed.split("\0")
        main([*argv, "--quiet"])
        made = capsys.readouterr().out.split()[int(name != f"x{suffix}")]
        assert Path(made).read_bytes() == Path(name).read_bytes()
    before = files()
    main(["replay", f"x{suffix}", "--quiet"])
    (new,) = set(files()) - set(before)
    assert new.startswith("x-") and Path(new).read_bytes() == Path(f"x{suffix}").read_bytes()


def test_replay_never_writes_over_its_source(picture, capsys):
    before = Path("x.png").read_bytes()
    assert "it is the picture to replay" in fails(capsys, "replay", "x.png", "--force")
    assert "it is the picture to replay" in fails(
        capsys, "replay", "x.png", "-o", str(Path("x.png").resolve()), "--force"
    )
    Path("y.png").write_text("mine")
    main(["replay", "x.png", "-o", "y.png", "--quiet"])
    assert "y-2.png\n" in capsys.readouterr().out
    assert Path("x.png").read_bytes() == before and Path("y.png").read_text() == "mine"


def test_replay_needs_the_same_inputs(capsys):
    Image.new("RGB", (64, 64), "red").save("in.png")
    main(["fire", "-o", "x.png", "--image", "in.png", "--steps", "4", "--quiet"])
    main(["replay", "x.png", "--quiet"])
    assert Path("x-2.png").read_bytes() == Path("x.png").read_bytes()
    Image.new("RGB", (64, 64), "blue").save("in.png")
    assert "ldm: error: in.png has changed since the picture was made" in fails(capsys, "replay", "x.png")
    Path("in.png").unlink()
    assert "ldm: error: in.png does not exist here: the picture was made from it" in fails(capsys, "replay", "x.png")


def test_info_tells_what_has_changed(capsys):
    Image.new("RGB", (16, 16), "red").save("in.png")
    main(["fire", "--image", "in.png", "-o", "in.png", "--force", "--steps", "1", "--quiet"])
    main(["info", "in.png"])
    assert f"{'not in the command':<24}in.png has changed since" in capsys.readouterr().out


def test_prompts(pipe, capsys):
    main(["fire", "a red heart", "-o", "x.png", "--steps", "1", "--seed", "4", "--quiet"])
    out = pipe(["fire", "a red heart"], steps=1, seed=4, progress=False)
    assert [pixels("x.png"), pixels("x-2.png")] == [pixels(image) for image in out.images]
    main(["replay", "x-2.png", "-o", "y.png", "--quiet"])
    assert pixels("y.png") == pixels("x-2.png")


def test_plan(pipe, capsys):
    Image.new("RGB", (16, 16), "red").save("in.png")
    main(["fire", "--image", "in.png", "--strength", "0.5", "--strength-rule", "webui", "--steps", "4", "--plan"])
    wanted = pipe.plan_strength(strength=0.5, strength_rule="webui", steps=4)
    assert capsys.readouterr().out == f"{wanted}\n" and wanted.evaluations == 3 and files() == ["in.png"]


def test_from_python(pipe, tmp_path, capsys):
    """`Output.save` writes what the command line does, and both are replayed."""
    main(["fire", "-o", "x.webp", "--steps", "2", "-n", "2", "--quality", "80", "--quiet"])
    out = ldm.Pipeline.from_pretrained()("fire", steps=2, batch_size=2, progress=False)
    assert [str(name) for name in out.save("y.webp", quality=80)] == ["y.webp", "y-2.webp"]
    assert read(Path("y-2.webp")) == read(Path("x-2.webp")).replace(", Quality: 80", "")
    main(["replay", "y-2.webp", "-o", "z.png", "--quiet"])
    assert pixels("z.png") == pixels(out.images[1])

    to_q = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    width = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q.in_features
    weights = {f"{to_q}.lora_down.weight": torch.randn(4, width), f"{to_q}.lora_up.weight": torch.randn(width, 4)}
    save_file(weights, "a.safetensors")
    save_file({"emb_params": torch.randn(2, pipe.text_encoder.config.width)}, "wowza.safetensors")
    other = ldm.Pipeline.from_pretrained(DEFAULT_MODEL, vae=DEFAULT_MODEL / "vae", dtype=torch.bfloat16)
    other.load_lora("a.safetensors", 0.5)
    refiner = ldm.Pipeline.from_pretrained(dtype=torch.bfloat16)
    for reader in (other, refiner):  # as the command line does
        reader.load_embedding("wowza.safetensors")
    out = other("wowza", steps=2, enlarge=1.5, seed=[4, 2], refiner=refiner, refiner_start=0.5, progress=False)
    out.save("b.png")
    capsys.readouterr()
    main(["replay", "b-2.png", "-o", "c.png", "--quiet"])
    assert capsys.readouterr() == ("c.png\nbitwise the same, in each of 3 steps\n", "")
    assert pixels("c.png") == pixels(out.images[1])

    made = ldm.Pipeline(
        **{name: getattr(pipe, name) for name in ("unet", "vae", "text_encoder", "tokenizer", "schedule")}
    )
    made("fire", steps=1, progress=False).save("d.png")
    assert "Model path: <Pipeline> (given from Python" in fails(capsys, "replay", "d.png")


def test_replay_warns(picture, capsys):
    image, text = Image.open("x.png"), read(Path("x.png"))
    image.putpixel((0, 0), (1, 2, 3))
    save(image, Path("y.png"), text.replace("Version: ldm 0", "Version: ldm 9"))
    with pytest.raises(SystemExit) as stop:
        main(["replay", "y.png", "--quiet"])
    assert stop.value.code == 1
    assert pixels("y-2.png") == pixels("x.png")
    other, differs = capsys.readouterr().err.splitlines()
    assert other.startswith("ldm: warning: made with ldm 9.") and other.endswith(": pixels may differ")
    assert differs.startswith("ldm: warning: 0.02% of the pixels' values, by up to ") and differs.endswith(" of y.png")


def test_replay_of_what_cannot_be(capsys):
    image, line = Image.new("RGB", (8, 8)), "Steps: 5, Sampler: DPM fast, CFG scale: 7, Seed: 1, Size: 8x8"
    save(image, Path("webui.jpg"), f"a\n{line}, Version: v1.10.1")
    assert "ldm: error: webui.jpg: not made by ldm; `ldm info webui.jpg`" in fails(capsys, "replay", "webui.jpg")
    main(["info", "webui.jpg"])
    said = capsys.readouterr().out
    assert f"{'not in the command':<24}Sampler: DPM fast (not among ddim, ddpm" in said
    assert "ldm generate --output=webui.jpg a --steps 5 --guidance-scale 7 --seed 1 --width 8 --height 8" in said
    both = ldm.Settings(["a", "b"], negative_prompt=["x", "y"])
    save(image, Path("python.png"), parameters(both, 1, (8, 8), "m"))
    assert "no command makes it again: Negative prompt: ('x', 'y') (a list" in fails(capsys, "replay", "python.png")
    image.save("plain.png")
    Path("text.png").write_text("no picture")
    why = {
        "plain.png": "the picture carries no settings",
        "text.png": "not an image that Pillow can read",
        "none.png": "No such file or directory",
    }
    for name, said in why.items():
        with pytest.raises(SystemExit, match=f"ldm: error: {name}: {said}"):
            main(["info", name])
        with pytest.raises(SystemExit) as stop:  # 1 would be the answer that it is not the same
            main(["replay", name])
        assert stop.value.code == 2 and f"ldm: error: {name}: {said}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("prompt", "negative"),
    [
        ("a red heart", ""),
        ("a red heart", "blue, blurry"),
        ("first line\nsecond line\n\nlast", "one\ntwo"),
        ("red, green, blue: three", "x: 1, y: 2"),
        ("the \"best\" 'cat'", '"'),
        ("ein Äpfel ♥ 猫 😀 e\u0301", "çirkin ☠"),
        ("{a} [b] (c:1.2) <d> \\ /", "(bad:1.3)"),
        ("Steps: 9, Sampler: none, CFG scale: 1, Seed: 77", "Steps: 8"),
    ],
)
def test_readers_of_webuis_pictures(prompt, negative):
    main([prompt, "--negative-prompt", negative, "-o", "x.png", "--steps", "2", "--seed", "123", "--sampler", "ddim"])
    for file in ("x.jpg", "x.webp"):
        save(Image.open("x.png"), Path(file), read(Path("x.png")))
    for file in files():
        as_sd_parsers_reads_it(file, prompt, negative)


def as_sd_parsers_reads_it(file, prompt, negative):
    info = ParserManager().parse(file)
    assert info.generator == "AUTOMATIC1111"
    assert info.full_prompt == prompt and info.full_negative_prompt == negative
    (sampler,) = info.samplers
    assert sampler.name == "ddim" and sampler.model.name == DEFAULT_MODEL.resolve().name
    read = sampler.parameters
    assert (read["steps"], read["seed"], read["cfg_scale"]) == ("2", "123", "7.5")
    side = Image.open(file).width
    made_with = {"Version": f"ldm {ldm.__version__}", "Torch": torch.__version__}
    assert info.metadata == {"Size": f"{side}x{side}"} | made_with


def test_as_a_command(folder):
    """In another process and folder."""
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "ldm", "fire", "-o", "x.png", "--steps"]
    done = subprocess.run([*command, "2"], env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "x.png\n") and "2/2" in done.stderr
    Image.open("x.png").verify()


def test_files_beside_are_left_alone():
    Path("x.png.part").write_text("mine")
    main(["a red heart", "-o", "x.png", "--steps", "1", "--quiet"])
    assert Path("x.png.part").read_text() == "mine"
    assert files() == ["x.png", "x.png.part"]
