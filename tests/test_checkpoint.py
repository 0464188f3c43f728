"""Loading: official single files, diffusers folders, separate VAEs; memory, network, and every way to get it wrong."""

import json
import re
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from synthetic import (
    TINY,
    TINY_ROW,
    diffusers_pipeline,
    full_size,
    official,
    shift,
    single_file,
    tiny_nets,
    vocabulary,
    write,
)

from ldm import checkpoint, models
from ldm.__main__ import main
from ldm.checkpoint import CheckpointError, Plan, check, load
from ldm.clip.tokenizer import Tokenizer
from ldm.models import CONV_IN, OFFICIAL
from ldm.source import Source
from ldm.vae import VAE

PARTS = ("unet", "vae", "text_encoder")


@pytest.fixture(autouse=True)
def tiny_row(monkeypatch):
    monkeypatch.setattr(models, "OFFICIAL", (*OFFICIAL, TINY_ROW))


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", refuse)


@pytest.fixture(scope="session")
def reference():
    return diffusers_pipeline()


@pytest.fixture(scope="session")
def saved(reference, tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "model"
    reference.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def half_reference():
    """Of another seed, so that it shows whose weights were read."""
    return diffusers_pipeline(seed=1).to(torch.float16)


@pytest.fixture(scope="session")
def both(reference, half_reference, tmp_path_factory):
    """Folders with both variants, in whole files and in shards."""
    paths = {sharded: tmp_path_factory.mktemp("both") for sharded in (False, True)}
    for sharded, path in paths.items():
        size = {"max_shard_size": "40KB"} if sharded else {}
        reference.save_pretrained(path, **size)
        half_reference.save_pretrained(path, variant="fp16", **size)
        assert len(list((path / "unet").glob("*.safetensors"))) > 2 or not sharded
    return paths


@pytest.fixture
def model(saved, tmp_path):
    """A diffusers folder that a test may spoil."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


@pytest.fixture
def nets():
    return tiny_nets()


@pytest.fixture
def file(nets, tmp_path):
    return write(tmp_path / "model.safetensors", single_file(nets))


def assert_same(net, state):
    """Bitwise, names and dtypes too, and ready to use."""
    ours = net.state_dict()
    assert ours.keys() == state.keys()
    for name, p in ours.items():
        assert p.device.type == "cpu" and p.dtype == state[name].dtype, name
        assert torch.equal(p, state[name]), name
    assert not net.training and not any(p.requires_grad for p in net.parameters())


def diffusers_state(reference, part):
    state = getattr(reference, part).state_dict()
    prefix = "text_model." if part == "text_encoder" else ""  # transformers 5 has dropped it
    return {prefix + name: p for name, p in state.items()}


def edit_json(path, **fields):
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def edit_tensors(path, change):
    save_file(change(load_file(path)), path)


# Folders


def test_folder_has_diffusers_weights_and_outputs(saved, reference):
    parts = load(saved)
    for part in PARTS:
        assert_same(getattr(parts, part), diffusers_state(reference, part))
    assert parts.vae.config.scaling_factor == 0.5
    assert parts.size == 64  # 32 latents, factor 2
    assert parts.scheduler["beta_end"] == 0.012 and parts.scheduler["steps_offset"] == 1
    assert parts.scheduler["prediction_type"] == "epsilon"

    ids = parts.tokenizer(["the red cat"])
    assert torch.equal(ids, reference.tokenizer(["the red cat"], padding="max_length", return_tensors="pt").input_ids)
    with torch.no_grad():
        context = reference.text_encoder(ids)[0]
        x, z, t = torch.randn(1, 4, 8, 8), torch.randn(1, 4, 8, 8), torch.tensor([500])
        for ours, theirs in (
            (parts.text_encoder(ids).context, context),
            (parts.unet(x, t, context), reference.unet(x, t, context).sample),
            (parts.vae.decode(z), reference.vae.decode(z).sample),
        ):
            assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@pytest.mark.parametrize(
    ("stored", "dtype", "taken", "result"),
    [
        ("both", None, "full", torch.float32),
        ("both", torch.float32, "full", torch.float32),
        ("both", torch.bfloat16, "full", torch.bfloat16),
        ("both", torch.float16, "fp16", torch.float16),
        ("fp16", None, "fp16", torch.float16),
        ("fp16", torch.float32, "fp16", torch.float32),
        ("full", torch.float16, "full", torch.float16),
    ],
)
@pytest.mark.parametrize("sharded", [False, True], ids=["whole", "sharded"])
def test_variants(stored, dtype, taken, result, sharded, reference, half_reference, both, tmp_path):
    path = shutil.copytree(both[sharded], tmp_path / "model")
    for weights in [*path.rglob("*.safetensors"), *path.rglob("*.index*.json")]:
        if stored == ("full" if "fp16" in weights.name else "fp16"):
            weights.unlink()
    parts = load(path, dtype=dtype)
    for part in PARTS:
        state = diffusers_state(reference if taken == "full" else half_reference, part)
        assert_same(getattr(parts, part), {name: p.to(result) for name, p in state.items()})


def test_text_encoder_as_transformers_4_names_it(model, reference):
    def prefix(tensors):
        ids = {"text_model.embeddings.position_ids": torch.arange(77)[None]}
        return {f"text_model.{name}": p for name, p in tensors.items()} | ids

    edit_tensors(model / "text_encoder" / "model.safetensors", prefix)
    assert_same(load(model).text_encoder, diffusers_state(reference, "text_encoder"))


def test_vae_as_old_diffusers_names_it(model, reference):
    from diffusers import AutoencoderKL

    old = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}

    def rename(tensors):
        for new, former in old.items():
            tensors = {name.replace(new, former): p for name, p in tensors.items()}
        return tensors

    edit_tensors(model / "vae" / "diffusion_pytorch_model.safetensors", rename)
    assert_same(load(model).vae, diffusers_state(reference, "vae"))
    assert_same(load(model).vae, AutoencoderKL.from_pretrained(model / "vae").state_dict())


def test_tokenizer_of_transformers_4(model, reference):
    vocab, merges = vocabulary()
    part = model / "tokenizer"
    (part / "tokenizer.json").unlink()
    (part / "vocab.json").write_text(json.dumps(vocab))
    (part / "merges.txt").write_text("\n".join(["#version: 0.2", *(" ".join(pair) for pair in merges)]))
    (part / "special_tokens_map.json").write_text(json.dumps({"pad_token": {"content": "!"}}))
    edit_json(part / "tokenizer_config.json", model_max_length=9)
    ids = [vocab[token] for token in ("<|startoftext|>", "red</w>", "cat</w>", "<|endoftext|>")]
    assert load(model).tokenizer(["red cat"]).tolist() == [ids + [vocab["!"]] * 5]


def test_scheduler_config_is_honoured(model):
    edit_json(
        model / "scheduler" / "scheduler_config.json", prediction_type="v_prediction", timestep_spacing="trailing"
    )
    scheduler = load(model).scheduler
    assert (scheduler["prediction_type"], scheduler["timestep_spacing"]) == ("v_prediction", "trailing")


def test_config_of_the_official_folders(model):
    """Lists of heads of one width (SD 2, SDXL), and the end token 2 of SD 1."""
    edit_json(model / "unet" / "config.json", attention_head_dim=[2, 4], sample_size=None)
    edit_json(model / "text_encoder" / "config.json", eos_token_id=2)
    parts = load(model)
    assert (parts.unet.config.heads, parts.unet.config.head_width) == (None, 8)
    assert parts.text_encoder.config.end_token == 519
    assert parts.size == 128


# Single files


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("ema", [False, True], ids=["", "ema"])
@pytest.mark.parametrize("text_layout", [0, 1], ids=["text_model", "no text_model"])
def test_single_file(dtype, ema, text_layout, tmp_path):
    nets = tiny_nets(dtype=dtype)
    path = write(tmp_path / "model.safetensors", single_file(nets, ema, ema, text_layout))
    parts = load(path)
    for part, net in zip(PARTS, nets, strict=True):
        assert_same(getattr(parts, part), net.state_dict())
        assert getattr(parts, part).config == getattr(TINY, part)
    assert parts.size == TINY.size and parts.scheduler == TINY.scheduler
    assert parts.tokenizer.vocab == Tokenizer.official().vocab


def test_dtype(file, nets):
    parts = load(file, dtype=torch.bfloat16)
    for part, net in zip(PARTS, nets, strict=True):
        assert_same(getattr(parts, part), {name: p.bfloat16() for name, p in net.state_dict().items()})


def test_a_net_stored_in_two_dtypes_takes_the_wider(nets, tmp_path):
    tensors = single_file(nets)
    half = {name: p.half() for name, p in tensors.items() if "attn2" in name}
    parts = load(write(tmp_path / "model.safetensors", tensors | half))
    assert {p.dtype for p in parts.unet.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("edm_mean", "has the flag edm_mean: it was trained on EDM's noise levels"),
        ("edm_vpred.sigma_max", "has the flag edm_vpred.sigma_max: it was trained on EDM's noise levels"),
    ],
)
def test_flags_of_other_schedules(flag, message, nets, tmp_path):
    tensors = single_file(nets) | {"v_pred": torch.zeros(0), flag: torch.zeros(0)}
    assert_refused(message, write(tmp_path / "model.safetensors", tensors))


def test_zero_terminal_snr_flag(nets, tmp_path):
    path = write(tmp_path / "model.safetensors", single_file(nets) | {"ztsnr": torch.zeros(0)})
    changes = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    assert load(path).scheduler == {**TINY.scheduler, **changes}


def test_v_prediction_flag(nets, tmp_path):
    path = write(tmp_path / "model.safetensors", single_file(nets) | {"v_pred": torch.zeros(0)})
    assert load(path).scheduler == {**TINY.scheduler, "prediction_type": "v_prediction"}


@pytest.mark.parametrize("by", [1, 2, 3])
def test_unaligned_tensors(by, file, nets):
    """The format promises no alignment: nets on such a mapping must still compute the same."""
    parts = load(shift(file, by))
    assert parts.unet.conv_in.weight.data_ptr() % 4 == by
    x, t, context = torch.randn(2, 4, 8, 8), torch.tensor([500, 7]), torch.randn(2, 7, 24)
    image, ids = torch.randn(1, 3, 16, 16), torch.arange(4)[None]
    for computed, expected in (
        (parts.unet(x, t, context), nets[0](x, t, context)),
        (parts.vae.encode(image).mean, nets[1].encode(image).mean),
        (parts.vae.decode(x), nets[1].decode(x)),
        (parts.text_encoder(ids).context, nets[2](ids).context),
    ):
        assert (computed - expected).abs().max() <= 1e-6 * expected.abs().max()


def test_weights_are_the_mapped_file(file):
    """No copy: every parameter lies in a mapping of the file."""
    parts = load(file)
    mappings = [
        line.split()[0] for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(str(file))
    ]
    ranges = [tuple(int(end, 16) for end in mapping.split("-")) for mapping in mappings]
    for part in PARTS:
        for p in getattr(parts, part).parameters():
            assert any(start <= p.data_ptr() < end for start, end in ranges)


# A separate VAE

LAYOUTS = {"first_stage_model": 0, "official": 1, "diffusers": 2, "old diffusers": 3}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("base", ["file", "file without vae", "folder without vae"])
def test_separate_vae(layout, base, nets, model, tmp_path):
    vae = tiny_nets(seed=1)[1]
    given = write(tmp_path / "vae.safetensors", official(vae, layout) | {"loss.logvar": torch.zeros(1)})
    tensors = single_file(nets)
    if base == "file without vae":
        tensors = {name: p for name, p in tensors.items() if not name.startswith("first_stage_model.")}
    path = write(tmp_path / "model.safetensors", tensors)
    if base == "folder without vae":
        path = model
        (path / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    parts = load(path, vae=given)
    assert_same(parts.vae, vae.state_dict())
    assert parts.vae.config.scaling_factor == (0.5 if path == model else 0.18215)


def test_separate_vae_folder_brings_its_config(file, saved, reference):
    parts = load(file, vae=saved / "vae")
    assert_same(parts.vae, diffusers_state(reference, "vae"))
    assert parts.vae.config.scaling_factor == 0.5


# Errors: what is wrong with a file


def assert_refused(message, path, **options):
    with pytest.raises(CheckpointError, match=message):
        load(path, **options)


def test_error_lists_every_tensor_that_does_not_fit(nets, tmp_path):
    tensors = single_file(nets)
    prefix = "model.diffusion_model."
    gone = [name for name in tensors if name.startswith(prefix + "output_blocks.")][:7]
    for name in gone:
        del tensors[name]
    tensors[prefix + "out.2.bias"] = torch.zeros(3)
    tensors[prefix + "time_embed.0.bias"] = torch.zeros(64, dtype=torch.int8)
    tensors["first_stage_model.decoder.extra"] = torch.zeros(2, 3)
    path = write(tmp_path / "model.safetensors", tensors)
    with pytest.raises(CheckpointError) as caught:
        load(path)
    report = str(caught.value)
    assert f"unet up_blocks.0.resnets.0.norm1.weight (64,): no {prefix}output_blocks.0.0.in_layers.0.weight" in report
    assert "7 missing:" in report and "and 2 more" in report
    assert f"1 of another shape:\n  unet conv_out.bias (4,): {prefix}out.2.bias is (3,)" in report
    assert f"1 of a type other than F64, F32, F16, BF16:\n  {prefix}time_embed.0.bias is I8" in report
    assert "1 unknown:\n  first_stage_model.decoder.extra (2, 3)" in report


def test_every_single_tensor_is_needed(file):
    """Nothing is left at a random value: without any one tensor there is an error that names it."""
    source = Source(file, [file])
    nets = {part: checkpoint.NETS[part] for part in ("unet", "vae", "text_encoder")}
    plans = {
        part: Plan(net, getattr(TINY, part), source, keys, TINY.prefixes[part]) for part, (net, keys) in nets.items()
    }
    check(plans, file)
    assert len(source.shapes) == sum(len(plan.shapes) for plan in plans.values())
    for part, plan in plans.items():
        for ours, theirs in plan.theirs.items():
            shape = source.shapes.pop(theirs)
            with pytest.raises(CheckpointError, match=rf"1 missing:\n  {part} {ours} .*: no {re.escape(theirs)} in"):
                check(plans, file)
            source.shapes[theirs] = shape


def test_damaged_model_is_not_taken_for_a_vae(nets, tmp_path):
    tensors = single_file(nets)
    del tensors[CONV_IN]
    assert_refused(f"is no known model: {CONV_IN} is missing", write(tmp_path / "model.safetensors", tensors))


@pytest.mark.parametrize(
    ("prefix", "message"),
    [
        ("first_stage_model.", "there is no vae at all in .*: give one with vae="),
        ("cond_stage_model.", "there is no text_encoder at all in "),
    ],
)
def test_single_file_without_a_part(prefix, message, nets, tmp_path):
    tensors = {name: p for name, p in single_file(nets).items() if not name.startswith(prefix)}
    assert_refused(message, write(tmp_path / "model.safetensors", tensors))


def test_path_that_does_not_exist(file):
    message = r"none/sd/unet does not exist\. \(A model of the Hugging Face hub is the str owner/name\)"
    assert_refused(message, "none/sd/unet")
    assert_refused(message, file, vae="none/sd/unet")
    assert_refused("none/sd does not exist", Path("none/sd"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: b"", r"model.safetensors is empty \(0 bytes\)"),
        (lambda data: data[:-100], "is truncated or damaged: .*not fully covered"),
        (lambda data: data[:5000], r"\(5,000 bytes\) is truncated or damaged"),
        (lambda data: b"<!DOCTYPE html><html>", "is not a safetensors file: it starts with b'<!DOCTYP"),
        (lambda data: b"short", "is not a safetensors file"),
        (lambda data: b"PK\x03\x04" + data, "is a pickle"),
        (lambda data: b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer .* `git lfs pull`"),
    ],
)
def test_file_that_is_not_safetensors(change, message, file):
    file.write_bytes(change(file.read_bytes()))
    assert_refused(message, file)


def run_shown(error):
    """Run the command in an error's last line, taken apart as a shell does."""
    program, *arguments = shlex.split(str(error).splitlines()[-1])
    assert program == "ldm"
    main(arguments)


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".bin"])
def test_pickle_is_refused_and_the_way_to_convert_it_works(suffix, nets, tmp_path):
    tensors = single_file(nets)
    path = tmp_path / f'it\'s $HOME, "mine"{suffix}'
    torch.save({"state_dict": tensors, "global_step": 1}, path)
    with pytest.raises(CheckpointError, match="is a pickle, which may run any code") as caught:
        load(path)
    run_shown(caught.value)
    assert_same(load(path.with_suffix(".safetensors")).unet, nets[0].state_dict())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lora_unet_mid_block_attentions_0_proj_in.lora_down.weight", "is a LoRA"),
        ("unet.mid_block.attentions.0.proj_in.lora_A.weight", "is a LoRA"),
        ("control_model.input_blocks.0.0.weight", "is a ControlNet"),
        ("decoder.conv_in.weight", "is a VAE alone .*: load a model, with this file as vae="),
        ("down_blocks.0.resnets.0.conv1.weight", "is a UNet alone .*: give the folder that has model_index.json"),
        (
            "text_model.embeddings.token_embedding.weight",
            "is a text encoder alone .*: give the file or folder that has",
        ),
        ("something.else", "is no known model: .*input_blocks.0.0.weight is missing.* Known are SDXL base, .*SD 1.x"),
    ],
)
def test_file_that_is_not_a_model(name, message, tmp_path):
    assert_refused(message, write(tmp_path / "model.safetensors", {name: torch.zeros(1)}))


@pytest.mark.parametrize("row", [row for row in OFFICIAL if row[2] is None], ids=lambda row: row[0])
def test_other_official_models_are_known_by_name(row, tmp_path):
    name, tells, _ = row
    tensors = {tensor: torch.zeros([extent or 1 for extent in shape]) for tensor, shape in tells.items() if shape}
    message = rf"is {re.escape(name)} \(model\..*\): this version loads SDXL base, .*SD 1.x alone"
    assert_refused(message, write(tmp_path / "model.safetensors", tensors))


# Errors: what is wrong with a folder


@pytest.mark.parametrize(
    ("gone", "message"),
    [
        ("model_index.json", "is not a diffusers folder: it has no model_index.json"),
        ("unet", r"model/unet has no config.json"),
        ("unet/config.json", r"model/unet has no config.json"),
        ("vae", r"model/vae has no config.json"),
        ("text_encoder", r"model/text_encoder has no config.json"),
        ("scheduler", r"model/scheduler has no scheduler_config.json"),
        ("tokenizer", r"no tokenizer in .*: looked for vocab.json with merges.txt, and for tokenizer.json"),
        (
            "unet/diffusion_pytorch_model.safetensors",
            r"no weights in .*unet: looked for diffusion_pytorch_model.safetensors, "
            r"diffusion_pytorch_model.safetensors.index.json, diffusion_pytorch_model.fp16.safetensors, ",
        ),
        ("text_encoder/model.safetensors", r"no weights in .*text_encoder: looked for model.safetensors, "),
    ],
)
def test_folder_without_a_part(gone, message, model):
    path = model / gone
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert_refused(message, model)


def test_folder_with_a_single_file_in_it(file):
    assert_refused("it has model.safetensors: a single file is given by its own path", file.parent)


def test_separate_vae_that_is_the_current_folder(file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert_refused(r"^\. has no config.json", file, vae=".")


@pytest.mark.parametrize(
    ("part", "pickle", "wanted"),
    [
        ("text_encoder", "pytorch_model.bin", "model.safetensors"),
        ("unet", "diffusion_pytorch_model.fp16.bin", "diffusion_pytorch_model.safetensors"),
    ],
)
def test_folder_with_pickles(part, pickle, wanted, model, reference):
    """The shown command writes what the loader looks for, which is not always the pickle's own name."""
    torch.save(load_file(model / part / wanted), model / part / pickle)
    (model / part / wanted).unlink()
    model = model.rename(model.with_name("it's $HOME"))
    with pytest.raises(CheckpointError, match=rf"no weights in .*\n{pickle} is a pickle. To convert it:\n") as caught:
        load(model)
    run_shown(caught.value)
    assert_same(getattr(load(model), part), diffusers_state(reference, part))


def test_folder_without_a_shard(both, tmp_path):
    path = shutil.copytree(both[True], tmp_path / "model")
    shard = sorted((path / "unet").glob("*model-*.safetensors"))[1]
    shard.unlink()
    assert_refused(f"{shard.name} does not exist", path)


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("unet/config.json", "{", "unet/config.json is not JSON"),
        ("unet/config.json", "[]", r"unet/config.json is \[\]: accepted is a JSON object"),
        ("vae/config.json", "null", "vae/config.json is None: accepted is a JSON object"),
        ("model_index.json", '"model"', "model_index.json is model: accepted is a JSON object"),
        ("unet/diffusion_pytorch_model.safetensors.index.json", "{}", "weight_map is None, but .* an object of"),
        ("unet/diffusion_pytorch_model.safetensors.index.json", '{"weight_map": {"a": 1}}', "weight_map is .*'a': 1"),
    ],
)
def test_folder_with_broken_json(file, text, message, model):
    if file.endswith(".safetensors.index.json"):
        (model / file.removesuffix(".index.json")).unlink()
    (model / file).write_text(text)
    assert_refused(message, model)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"tokenizer.json": "{}"}, "tokenizer.json is no tokenizer: KeyError.'model'.. Accepted is a vocab of tokens"),
        ({"tokenizer.json": '{"model": {"vocab": [], "merges": []}}'}, "tokenizer.json is no tokenizer: .*Accepted is"),
        ({"vocab.json": "[", "merges.txt": ""}, "vocab.json with merges.txt is no tokenizer: JSONDecodeError"),
        ({"vocab.json": "[]", "merges.txt": ""}, "vocab.json with merges.txt is no tokenizer: .*Accepted is"),
        ({"vocab.json": None, "merges.txt": "c a t"}, "vocab.json with merges.txt is no tokenizer: ValueError"),
        ({"vocab.json": None, "merges.txt": "c zz"}, "vocab.json with merges.txt is no tokenizer: .*zz.* of vocab"),
        ({"tokenizer_config.json": '{"model_max_length": null}'}, "model_max_length is None, but .* a number above 2"),
        ({"tokenizer_config.json": '{"model_max_length": 2}'}, "model_max_length is 2, but .* a number above 2"),
        ({"tokenizer_config.json": '{"pad_token": null}'}, "pad_token is None, but .* a token, or an object with its"),
        ({"tokenizer_config.json": '{"pad_token": "[PAD]"}'}, r"has no '\[PAD\]'; name a token that it has"),
    ],
)
def test_folder_with_a_broken_tokenizer(files, message, model):
    for name, text in files.items():
        (model / "tokenizer" / name).write_text(json.dumps(vocabulary()[0]) if text is None else text)
    assert_refused(message, model)


def test_folder_whose_tokenizer_is_not_the_text_encoders(model):
    edit_json(model / "text_encoder" / "config.json", vocab_size=519, eos_token_id=518)
    assert_refused("tokenizer.json: its highest id is 519, but the text encoder's vocab_size is 519", model)


@pytest.mark.parametrize(
    ("file", "field", "value"),
    [
        ("model_index.json", "_class_name", "StableDiffusion3Pipeline"),
        ("unet/config.json", "class_embed_type", "projection"),
        ("unet/config.json", "act_fn", "gelu"),
        ("unet/config.json", "only_cross_attention", [True, False]),
        ("unet/config.json", "mid_block_type", "UNetMidBlock2DSimpleCrossAttn"),
        ("unet/config.json", "down_block_types", ["CrossAttnDownBlock2D", "AttnDownBlock2D"]),
        ("unet/config.json", "up_block_types", ["CrossAttnUpBlock2D", "UpBlock2D"]),
        ("unet/config.json", "layers_per_block", [1, 2]),
        ("unet/config.json", "transformer_layers_per_block", [[1], 1]),
        ("unet/config.json", "attention_head_dim", [4, 4, 4]),
        ("unet/config.json", "attention_head_dim", [4, 2]),
        ("unet/config.json", "attention_head_dim", 0),
        ("unet/config.json", "attention_head_dim", 5),
        ("unet/config.json", "attention_head_dim", None),
        ("unet/config.json", "block_out_channels", None),
        ("unet/config.json", "block_out_channels", []),
        ("unet/config.json", "down_block_types", None),
        ("unet/config.json", "in_channels", "4"),
        ("unet/config.json", "use_linear_projection", 1),
        ("unet/config.json", "norm_num_groups", 5),
        ("unet/config.json", "norm_eps", 1e-6),
        ("unet/config.json", "time_cond_proj_dim", 256),
        ("unet/config.json", "freq_shift", 1),
        ("unet/config.json", "a_field_of_next_year", "on"),
        ("unet/config.json", "sample_size", [32, 64]),
        ("unet/config.json", "sample_size", 0),
        ("vae/config.json", "block_out_channels", [8, None]),
        ("vae/config.json", "norm_num_groups", 3),
        ("vae/config.json", "scaling_factor", True),
        ("vae/config.json", "down_block_types", ["DownEncoderBlock2D", "AttnDownEncoderBlock2D"]),
        ("vae/config.json", "use_quant_conv", False),
        ("vae/config.json", "shift_factor", 0.1),
        ("text_encoder/config.json", "hidden_act", "relu"),
        ("text_encoder/config.json", "intermediate_size", 100),
        ("text_encoder/config.json", "layer_norm_eps", 1e-6),
        ("text_encoder/config.json", "num_attention_heads", 5),
        ("text_encoder/config.json", "num_attention_heads", 0),
        ("text_encoder/config.json", "hidden_size", None),
        ("scheduler/scheduler_config.json", "prediction_type", "sample"),
        ("scheduler/scheduler_config.json", "trained_betas", [0.1]),
        ("scheduler/scheduler_config.json", "rescale_betas_zero_snr", "yes"),
        ("scheduler/scheduler_config.json", "timestep_spacing", "sideways"),
    ],
)
def test_config_that_asks_for_what_the_nets_do_not_do(file, field, value, model):
    edit_json(model / file, **{field: value})
    assert_refused(rf"{file}: {field} is {re.escape(repr(value))}, but this version only does ", model)


def test_scheduler_without_betas(model):
    (model / "scheduler" / "scheduler_config.json").write_text('{"beta_start": 0.1, "num_train_timesteps": 1000}')
    assert_refused("scheduler_config.json: beta_schedule, beta_end missing", model)


def test_folder_with_other_channels(model):
    edit_json(model / "unet" / "config.json", in_channels=8)
    assert_refused("the UNet has 8 channels in, 4 out .* only does the VAE's 4 in and out, 9 in for inpainting", model)


# Cost


def test_loading_imports_no_hub_client_and_no_compiler(saved):
    """In a process of its own: what `ldm` drags in. torch._dynamo alone would take a second."""
    code = (
        "import sys, ldm.checkpoint; ldm.checkpoint.load(sys.argv[1]);"
        "print([m for m in ('huggingface_hub', 'requests', 'httpx', 'urllib3', 'transformers', 'diffusers',"
        " 'torch._dynamo') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code, saved], capture_output=True, text=True, check=True)
    assert run.stdout == "[]\n"


def test_a_file_that_is_converted_is_mapped_anew(saved, both, monkeypatch):
    """As often as may be here: the values are the same, and at the end nothing of it is mapped."""

    def counted(source):
        counts.append(1)
        before = dict(source._opened)
        release(source)
        assert before and all(source._opened[file] is not opened for file, opened in before.items())

    release, counts = Source.release, []
    monkeypatch.setattr(checkpoint, "COPIED", 0)
    monkeypatch.setattr(Source, "release", counted)
    for path in (saved, both[True]):
        before = maps_of(path)
        plain = load(path)
        assert not counts and maps_of(path) > before
        halves = load(path, dtype=torch.bfloat16)
        names = [(part, name) for part in PARTS for name in getattr(plain, part).state_dict()]
        assert len(counts) == len(names)
        for part, name in names:
            expected, half = (getattr(parts, part).state_dict()[name] for parts in (plain, halves))
            assert torch.equal(expected.to(torch.bfloat16), half)
        del plain, expected
        counts.clear()
        assert maps_of(path) == before


def maps_of(path):
    return Path("/proc/self/maps").read_text().count(str(path))


MEASURE = """
import sys, time
from pathlib import Path
import torch
from ldm import checkpoint, models

def peak():  # of this process since it began, in bytes
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])

before, loads = peak(), []
for _ in range(3):  # the best counts: others use the machine, too
    start, busy = time.perf_counter(), time.process_time()
    parts = None
    parts = checkpoint.load(sys.argv[1], dtype=getattr(torch, sys.argv[2], None))
    loads.append((time.perf_counter() - start, time.process_time() - busy))
total = sum(p.sum() for net in parts[:3] for p in net.parameters())  # pages that nobody has read are not resident
assert total == total
print(*min(loads), peak() - before)
"""


@pytest.fixture
def full_file(tmp_path):
    path = write(tmp_path / "v1-5.safetensors", full_size())
    yield path
    path.unlink()  # pytest would keep the gigabytes of its last three runs


def measured(file, dtype):
    run = subprocess.run([sys.executable, "-c", MEASURE, file, dtype], capture_output=True, text=True, check=True)
    return map(float, run.stdout.split())


@pytest.mark.full
def test_in_another_dtype_the_file_is_not_in_memory_beside_its_copy(full_file):
    size = full_file.stat().st_size
    *_, added = measured(full_file, "bfloat16")
    print(f"peak memory {added / size:.3f} x the file")
    assert added <= 1.3 * size


@pytest.mark.full
def test_two_gigabytes_take_one_times_their_size_and_under_three_seconds(full_file):
    size = full_file.stat().st_size
    assert size > 2e9
    seconds, busy, added = measured(full_file, "its own")
    print(f"{seconds:.2f} s, of which computing {busy:.2f} s, peak memory {added / size:.3f} x the file")
    assert added <= 1.15 * size
    assert seconds < 3 and busy < 3  # from a warm cache


@pytest.mark.full
def test_full_size_weights_are_those_of_the_file(full_file):
    tensors = full_size()
    parts = load(full_file)
    for part, net in zip(PARTS, parts[:3], strict=True):
        for ours, p in net.state_dict().items():
            keys = checkpoint.NETS[part][1](net.config, ours)
            assert torch.equal(p, tensors[keys[0]].view(p.shape)), ours
    assert isinstance(parts.vae, VAE) and parts.size == 512
