"""`ldm.inspect`: each kind of file by its header alone, and what it says of it."""

import ast
import json
import os
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from family import MODELS, reference, saved
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from synthetic import KEYS, LAYOUTS, sparse

import ldm
from ldm import inspection, lora, models
from ldm.__main__ import main
from ldm.checkpoint import CheckpointError
from ldm.convert import convert
from ldm.models import OFFICIAL, OTHERS
from ldm.pipeline import DEFAULT_MODEL

UNET = "model.diffusion_model."


def shapes_of(layout):
    return json.loads((KEYS / f"{layout}.json").read_text())


def file_of(path, shapes):
    return ldm.inspect(sparse(path / "x.safetensors", shapes))


MODEL_LINES = {
    "sd15": "pipe = ldm.Pipeline.from_pretrained({!r})",
    "sd15_inpaint": "pipe = ldm.Pipeline.from_pretrained({!r})",
    "sd2": 'pipe = ldm.Pipeline.from_pretrained({!r}, prediction_type="epsilon")',
    "sdxl_base": "pipe = ldm.Pipeline.from_pretrained({!r})",
    "sdxl_refiner": "base(prompt, refiner=ldm.Pipeline.from_pretrained({!r}))",
}

# Tensors of the file that go into a net; OpenCLIP's q, k and v are one there.
STORED = {"sd15": 1130, "sd15_inpaint": 1130, "sd2": 1214, "sdxl_base": 2513, "sdxl_refiner": 1857}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_official_files(layout, tmp_path):
    shapes = shapes_of(layout)
    report = file_of(tmp_path, shapes)
    name, _ = LAYOUTS[layout]
    assert (report.kind, report.name, report.problem) == ("model", name, "")
    model = next(model for row, _, model in OFFICIAL if row == name)
    assert set(report.parts) == {part for part in ldm.checkpoint.NETS if getattr(model, part) is not None}
    assert sum(report.parts.values()) == STORED[layout]
    assert report.prediction_type == "epsilon"
    assert report.prediction_from.startswith("a guess, from a bias" if layout == "sd2" else f"as every {name} does")
    assert report.dtypes == {"F16": len(shapes)}
    assert report.size == (tmp_path / "x.safetensors").stat().st_size - header_length(tmp_path / "x.safetensors")
    assert (report.missing, report.unexpected, report.ema) == ((), (), 0)
    for line in report.why:
        tensor, _, shape = line.partition(" is ")
        assert shape == str(tuple(shapes[tensor]))
    assert report.python == MODEL_LINES[layout].format(str(tmp_path / "x.safetensors"))


def header_length(file):
    with file.open("rb") as opened:
        return 8 + int.from_bytes(opened.read(8), "little")


def test_seven_gigabytes_are_not_read(tmp_path):
    """Of the data nothing comes into memory. (How long it takes: benchmarks/loading.py.)"""
    file = sparse(tmp_path / "x.safetensors", shapes_of("sdxl_base"))
    assert file.stat().st_size > 6.9e9
    ldm.inspect(file)
    before = resident()
    ldm.inspect(file)
    assert resident() - before < 32e6


def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_prediction(tmp_path):
    """By a flag, by SD 2's telling bias, by the folder's scheduler."""
    shapes = shapes_of("sd15")
    assert file_of(tmp_path, shapes | {"v_pred": []}).prediction_from == "the tensor v_pred says so"
    assert file_of(tmp_path, shapes | {"v_pred": []}).prediction_type == "v_prediction"
    shapes = shapes_of("sd2")
    file = sparse(tmp_path / "x.safetensors", shapes)
    assert ldm.inspect(file).prediction_type == "epsilon"
    header = json.loads(file.open("rb").read(header_length(file))[8:])
    begin, end = header[ldm.checkpoint.TELLS_V]["data_offsets"]
    with file.open("r+b") as out:
        out.seek(header_length(file) + begin)
        out.write((torch.randn(320, generator=torch.Generator().manual_seed(0)) * 0.12).half().numpy().tobytes())
    assert end - begin == 640
    report = ldm.inspect(file)
    assert report.prediction_type == "v_prediction" and "a guess" in report.prediction_from
    assert report.python.endswith(', prediction_type="v_prediction")')
    assert ldm.inspect(DEFAULT_MODEL).prediction_from == "scheduler_config.json says so"


def test_what_else_is_in_it(tmp_path):
    """EMA copies, buffers that no net needs, a part that is not there, tensors that do not belong."""
    shapes = shapes_of("sd15")
    ema = {"model_ema." + name[6:].replace(".", ""): shape for name, shape in shapes.items() if name.startswith(UNET)}
    report = file_of(tmp_path, shapes | ema | {"model_ema.decay": []})
    assert report.ema == len(ema) + 1 and not report.problem and not report.unexpected

    report = file_of(tmp_path, {n: s for n, s in shapes.items() if not n.startswith("first_stage_model.")})
    assert report.parts.keys() == {"unet", "text_encoder"}
    assert report.missing == (f"there is no vae at all in {tmp_path / 'x.safetensors'}: give one with vae=",)
    assert report.python == f"pipe = ldm.Pipeline.from_pretrained({str(tmp_path / 'x.safetensors')!r}, vae=VAE_FILE)"

    report = file_of(tmp_path, {n: s for n, s in shapes.items() if n.startswith(UNET)})
    assert report.parts.keys() == {"unet"} and len(report.missing) == 2 and not report.python

    lost = UNET + "out.2.bias"
    changed = {n: s for n, s in shapes.items() if n != lost} | {UNET + "time_embed.0.bias": [5], "extra": [2]}
    report = file_of(tmp_path, changed)
    assert report.problem and len(report.missing) == 1 and lost in report.missing[0]
    assert any("time_embed.0.bias is (5,)" in line for line in report.unexpected) and "extra (2,)" in report.unexpected


def test_sdxl_without_its_first_encoder(tmp_path):
    """The other encoder is not taken for it."""
    shapes = {n: s for n, s in shapes_of("sdxl_base").items() if not n.startswith("conditioner.embedders.0")}
    report = file_of(tmp_path, shapes)
    assert report.missing == (f"there is no text_encoder at all in {tmp_path / 'x.safetensors'}",)


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F8_E4M3"])
def test_dtype(dtype, tmp_path):
    width = {"F32": 4, "BF16": 2, "F8_E4M3": 1}[dtype]
    header = {"emb_params": {"dtype": dtype, "shape": [2, 8], "data_offsets": [0, 16 * width]}}
    text = json.dumps(header).encode()
    (tmp_path / "x.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(16 * width))
    report = ldm.inspect(tmp_path / "x.safetensors")
    assert report.dtypes == {dtype: 1} and report.size == 16 * width


LORA_UNET = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
PEFT_UNET = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
PIECES = {
    "kohya": (
        {
            f"{LORA_UNET}.lora_down.weight": [16, 768],
            f"{LORA_UNET}.lora_up.weight": [320, 16],
            f"{LORA_UNET}.alpha": [],
            "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": [8, 768],
            "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": [3072, 8],
        },
        ("LoRA", "LoRA, rank 8, 16, for SD 1.x", {"unet": 3, "text_encoder": 2}),
    ),
    "kohya SDXL": (
        {
            f"{LORA_UNET}.lora_down.weight": [4, 2048],
            f"{LORA_UNET}.lora_up.weight": [640, 4],
            "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": [4, 768],
            "lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": [4, 1280],
        },
        ("LoRA", "LoRA, rank 4, for SDXL", {"unet": 2, "text_encoder": 1, "text_encoder_2": 1}),
    ),
    "PEFT": (
        {f"{PEFT_UNET}.lora_A.weight": [4, 1024], f"{PEFT_UNET}.lora_B.weight": [320, 4]},
        ("LoRA", "LoRA, rank 4, for SD 2.x", {"unet": 2}),
    ),
    "DoRA": (
        {
            f"{PEFT_UNET}.lora_A.weight": [4, 768],
            f"{PEFT_UNET}.lora_B.weight": [320, 4],
            f"{PEFT_UNET}.lora_magnitude_vector": [320],
        },
        ("LoRA", "LoRA and DoRA, rank 4, for SD 1.x", {"unet": 3}),
    ),
    "LoHa": (
        {
            f"{LORA_UNET}.hada_w1_a": [320, 4],
            f"{LORA_UNET}.hada_w1_b": [4, 768],
            f"{LORA_UNET}.hada_w2_a": [320, 4],
            f"{LORA_UNET}.hada_w2_b": [4, 768],
        },
        ("LoRA", "LoHa, rank 4, for SD 1.x", {"unet": 4}),
    ),
    "LoKr": (
        {f"{LORA_UNET}.lokr_w1": [8, 8], f"{LORA_UNET}.lokr_w2_a": [40, 2], f"{LORA_UNET}.lokr_w2_b": [2, 96]},
        ("LoRA", "LoKr, rank 2, for SD 1.x", {"unet": 3}),
    ),
    "webui's embedding": ({"emb_params": [3, 768]}, ("embedding", "vectors: emb_params (3, 768)", {})),
    "diffusers' embedding": ({"<cat-toy>": [768]}, ("embedding", "vectors: <cat-toy> (768,)", {})),
    "SDXL's embedding": (
        {"clip_l": [2, 768], "clip_g": [2, 1280]},
        ("embedding", "vectors: clip_g (2, 1280) and clip_l (2, 768)", {}),
    ),
    "ControlNet": ({"control_model.input_blocks.0.0.weight": [320, 4, 3, 3]}, ("ControlNet", "a ControlNet", {})),
    "a UNet": (
        {
            "down_blocks.0.resnets.0.conv1.weight": [320, 320, 3, 3],
            "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight": [320, 1024],
        },
        ("UNet", "a UNet alone, of SD 2.x", {}),
    ),
    "a text encoder": (
        {"text_model.embeddings.token_embedding.weight": [49408, 768]},
        ("text encoder", "a text encoder alone, of SD 1.x or SDXL", {}),
    ),
    "nothing known": ({"layer.weight": [2, 2]}, ("unknown", "no known model", {})),
    "nothing at all": ({}, ("unknown", "no known model", {})),
}


TE = "lora_te{}_text_model_encoder_layers_0_mlp_fc1"
MORE_LORAS = {
    "te of SD 2": ({f"{TE.format('')}.lora_down.weight": [4, 1024]}, "LoRA, rank 4, for SD 2.x"),
    "te of SDXL": ({f"{TE.format(1)}.lora_down.weight": [4, 768]}, "LoRA, rank 4, for SDXL"),
    "second te": ({f"{TE.format(2)}.lora_down.weight": [4, 1280]}, "LoRA, rank 4, for SDXL"),
    "LoKr of SDXL": (
        {f"{LORA_UNET}.lokr_w1": [16, 16], f"{LORA_UNET}.lokr_w2": [40, 128], f"{LORA_UNET}.alpha": []},
        "LoKr, for SDXL",
    ),
    "PEFT's adapter": (
        {"base_model.model.mid_block.attentions.0.transformer_blocks.0.attn2.to_k.lora_A.new.weight": [4, 768]},
        "LoRA, rank 4, for SD 1.x",
    ),
    "processors": (
        {"unet.mid_block.attentions.0.transformer_blocks.0.attn2.processor.to_k_lora.down.weight": [4, 1024]},
        "LoRA, rank 4, for SD 2.x",
    ),
    "official names": (
        {"lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k.lora_down.weight": [4, 2048]},
        "LoRA, rank 4, for SDXL",
    ),
}


@pytest.mark.parametrize("kind", MORE_LORAS)
def test_loras(kind, tmp_path):
    shapes, name = MORE_LORAS[kind]
    report = file_of(tmp_path, shapes)
    assert (report.kind, report.name, report.problem, report.unexpected) == ("LoRA", name, "", ())
    assert report.python.startswith("pipe.load_lora(")


@pytest.mark.parametrize("model", [models.SD1, models.SD2, models.SDXL], ids=["SD 1", "SD 2", "SDXL"])
def test_all_names_that_are_loaded_are_known(model, tmp_path):
    """Of every weight, by every name that it may have in a LoRA file."""
    with ldm.checkpoint.NoValues(), torch.device("meta"):
        nets = {
            part: net(config)
            for part, (net, _) in ldm.checkpoint.NETS.items()
            if part != "vae" and (config := getattr(model, part)) is not None
        }
    targets = lora.spelled(nets)
    report = file_of(tmp_path, {f"{name}.lora_down.weight": [4, 4] for name in targets})
    assert (report.unexpected, report.problem) == ((), "")
    assert report.parts == Counter(target.part for target in targets.values())
    for suffix, role in lora.ROLES.items():
        assert inspection.role_of(f"{LORA_UNET}.{suffix}") == role


DOWN, UP = {f"{LORA_UNET}.lora_down.weight": [4, 768]}, {f"{LORA_UNET}.lora_up.weight": [320, 4]}
UNFIT_LORAS = {  # the tensors that are unfit, others, and what it is called
    "OFT": ({f"{LORA_UNET}.oft_blocks": [4, 80, 80]}, {}, "OFT, for a model"),
    "PEFT's OFT": ({f"{PEFT_UNET}.oft_R.weight": [4, 80]}, {}, "OFT, for a model"),
    "IA3": ({f"{LORA_UNET}.weight": [320, 1], f"{LORA_UNET}.on_input": []}, {}, "IA3, for a model"),
    "PEFT's IA3": ({f"{PEFT_UNET}.ia3_l": [320, 1]}, {}, "IA3, for a model"),
    "full": ({f"{LORA_UNET}.diff": [320, 768]}, {}, "full differences, for a model"),
    "GLoRA": (
        {f"{LORA_UNET}.{factor}.weight": [4, 4] for factor in ("a1", "a2", "b1", "b2")},
        {},
        "GLoRA, for a model",
    ),
    "norms": (
        {
            "lora_unet_down_blocks_0_resnets_0_norm1.w_norm": [320],
            "lora_unet_down_blocks_0_resnets_0_norm1.b_norm": [320],
        },
        DOWN | UP,
        "LoRA and norms, rank 4, for SD 1.x",
    ),
    "diff_b": ({f"{LORA_UNET}.diff_b": [320]}, DOWN | UP, "LoRA and full differences, rank 4, for SD 1.x"),
    "bias": ({f"{LORA_UNET}.lora_up.bias": [320]}, DOWN | UP, "LoRA and biases, rank 4, for SD 1.x"),
    "PEFT's bias": (
        {f"{PEFT_UNET}.lora_B.bias": [320]},
        {f"{PEFT_UNET}.lora_A.weight": [4, 768], f"{PEFT_UNET}.lora_B.weight": [320, 4]},
        "LoRA and biases, rank 4, for SD 1.x",
    ),
    "embeddings": (
        {"bundle_emb.cat.string_to_param.*": [2, 768]},
        DOWN | UP,
        "LoRA and embeddings, rank 4, for SD 1.x",
    ),
    "ComfyUI": (
        {"diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.lora_down.weight": [4, 768]},
        {},
        "LoRA, rank 4, for SD 1.x",
    ),
    "Flux, kohya": (
        {"lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": [4, 3072]},
        {},
        "LoRA, rank 4, for Flux",
    ),
    "Flux, single": ({"lora_unet_single_blocks_0_linear1.lora_down.weight": [4, 3072]}, {}, "LoRA, rank 4, for Flux"),
    "Flux, diffusers": (
        {"transformer.single_transformer_blocks.0.attn.to_k.lora_A.weight": [4, 3072]},
        {},
        "LoRA, rank 4, for Flux",
    ),
    "Flux, few blocks": (
        {"transformer.transformer_blocks.0.attn.to_k.lora_A.weight": [4, 3072]},
        {},
        "LoRA, rank 4, for Flux",
    ),
    "SD 3, kohya": (
        {"lora_unet_joint_blocks_0_x_block_attn_qkv.lora_down.weight": [4, 1536]},
        {},
        "LoRA, rank 4, for SD 3",
    ),
    "SD 3, diffusers": (
        {"transformer.transformer_blocks.0.attn.to_k.lora_A.weight": [4, 1536]},
        {},
        "LoRA, rank 4, for SD 3",
    ),
}


@pytest.mark.parametrize("kind", UNFIT_LORAS)
def test_loras_that_are_not_loaded(kind, tmp_path):
    unfit, others, name = UNFIT_LORAS[kind]
    report = file_of(tmp_path, unfit | others)
    assert report.kind == "LoRA" and report.name.startswith(name)
    assert set(report.unexpected) == {f"{tensor} {tuple(shape)}" for tensor, shape in unfit.items()}
    assert f"{len(unfit)} of its {len(unfit | others)} tensors are not known" in report.problem and not report.python


MORE_PIECES = {
    "ComfyUI's UNet": (
        {
            "input_blocks.0.0.weight": [320, 4, 3, 3],
            "input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight": [640, 2048],
        },
        ("UNet", "a UNet alone, of SDXL"),
    ),
    "OpenCLIP": (
        {"token_embedding.weight": [49408, 1024], "transformer.resblocks.0.ln_1.weight": [1024]},
        ("text encoder", "a text encoder alone, of SD 2.x"),
    ),
    "prefixed CLIP": (
        {"cond_stage_model.transformer.text_model.embeddings.token_embedding.weight": [49408, 768]},
        ("text encoder", "a text encoder alone, of SD 1.x or SDXL"),
    ),
    "T5": (
        {"encoder.block.0.layer.0.SelfAttention.q.weight": [4096, 4096]},
        ("text encoder", "a T5 text encoder"),
    ),
    "Flux of diffusers": (
        {
            "single_transformer_blocks.0.attn.to_k.weight": [3072, 3072],
            "transformer_blocks.0.norm1_context.linear.weight": [18432, 3072],
        },
        ("model", "Flux"),
    ),
    "SD 3 of diffusers": (
        {"transformer_blocks.0.norm1_context.linear.weight": [9216, 1536]},
        ("model", "Stable Diffusion 3"),
    ),
    "IP-Adapter": (
        {"image_proj.proj.weight": [3072, 1024], "ip_adapter.1.to_k_ip.weight": [320, 768]},
        ("IP-Adapter", "an IP-Adapter"),
    ),
    "IP-Adapter with LoRA": (
        {"image_proj.proj.0.weight": [1024, 512], "ip_adapter.0.to_q_lora.down.weight": [128, 320]},
        ("IP-Adapter", "an IP-Adapter"),
    ),
    "AnimateDiff": (
        {"down_blocks.0.motion_modules.0.temporal_transformer.norm.weight": [320]},
        ("AnimateDiff", "AnimateDiff's motion modules"),
    ),
    "several words": ({"<cat>": [768], "<dog>": [768]}, ("embedding", "an embedding")),
    "a scalar": ({"emb_params": []}, ("embedding", "an embedding")),
    "an odd tensor": ({"weight": [7]}, ("unknown", "no known model")),
}


@pytest.mark.parametrize("piece", MORE_PIECES)
def test_pieces_that_are_not_loaded(piece, tmp_path):
    shapes, (kind, name) = MORE_PIECES[piece]
    report = file_of(tmp_path, shapes)
    assert (report.kind, report.name) == (kind, name)
    assert report.problem and not report.python
    assert all(
        len(title) < 14 and f"{title} " in str(report) for title in (report.kind, "because")[: 1 + bool(report.why)]
    )


def test_a_plain_word_is_an_embedding(tmp_path):
    for width in (768, 1024, 1280):
        report = file_of(tmp_path, {"cat": [2, width]})
        assert (report.kind, report.name, report.problem) == ("embedding", f"vectors: cat (2, {width})", "")
        assert report.python == f"pipe.load_embedding({str(tmp_path / 'x.safetensors')!r})"


def test_unknown_files_are_shown(tmp_path):
    """A file, and a folder that has nothing but weights."""
    shapes = {f"layer.{i}.weight": [i, 2] for i in range(1, 8)}
    (tmp_path / "unet").mkdir()
    sparse(tmp_path / "unet" / "diffusion_pytorch_model.safetensors", shapes)
    for report in (file_of(tmp_path, shapes), ldm.inspect(tmp_path / "unet")):
        text = str(report)
        assert "unexpected  layer.1.weight (1, 2)" in text and "layer.5.weight (5, 2)" in text and "and 2 more" in text
        assert report.problem and not report.python and report.dtypes == {"F16": 7}


@pytest.mark.parametrize("name", ['it\'s "quoted"', "back\\slash \\n", "ü 猫 🐈"])
def test_load_lines_are_python(name, tmp_path):
    path = tmp_path / f"{name}.safetensors"
    save_file({"emb_params": torch.zeros(2, 768)}, path)
    line = ldm.inspect(path).python
    [argument] = ast.parse(line).body[0].value.args
    assert ast.literal_eval(argument) == str(path)
    layout = sparse(tmp_path / "x.safetensors", shapes_of("sd15")).rename(path)
    [argument] = ast.parse(ldm.inspect(layout).python).body[0].value.args
    assert ast.literal_eval(argument) == str(path)


def test_zero_terminal_snr(tmp_path):
    report = file_of(tmp_path, shapes_of("sdxl_base") | {"v_pred": [], "ztsnr": []})
    assert report.zero_snr and "predicts    v_prediction, the tensor v_pred says so, zero terminal SNR\n" in str(report)
    report = file_of(tmp_path, shapes_of("sdxl_base") | {"v_pred": []})
    assert not report.zero_snr and "zero terminal" not in str(report)


def test_no_load_line_without_a_vae_and_more(tmp_path):
    shapes = {n: s for n, s in shapes_of("sd15").items() if not n.startswith("first_stage_model.")}
    assert not file_of(tmp_path, shapes | {"extra": [2]}).python


@pytest.mark.parametrize("piece", PIECES)
def test_pieces(piece, tmp_path):
    shapes, (kind, name, parts) = PIECES[piece]
    report = file_of(tmp_path, shapes)
    assert (report.kind, report.name, report.parts) == (kind, name, parts)
    calls = {"LoRA": "pipe.load_lora", "embedding": "pipe.load_embedding"}
    assert report.python == (f"{calls[kind]}({str(tmp_path / 'x.safetensors')!r})" if kind in calls else "")
    assert bool(report.problem) == (kind not in calls)


def test_vae(tmp_path):
    prefix = "first_stage_model."
    shapes = {n: s for n, s in shapes_of("sd15").items() if n.startswith(prefix)}
    for names in (shapes, {name.removeprefix(prefix): shape for name, shape in shapes.items()}):
        report = file_of(tmp_path, names | {"loss.logvar": []})
        assert (report.kind, report.name) == ("VAE", "of 4 latent channels, for SD 1.x, SD 2.x or SDXL")
        assert (report.parts, report.problem) == ({"vae": 248}, "")
        assert report.python == f"pipe = ldm.Pipeline.from_pretrained(MODEL, vae={str(tmp_path / 'x.safetensors')!r})"
    other = names | {"decoder.conv_in.weight": [512, 16, 3, 3]}  # as SD 3's and Flux'
    report = file_of(tmp_path, other)
    assert report.name == "of 16 latent channels" and report.problem and not report.python
    report = ldm.inspect(DEFAULT_MODEL / "vae")
    assert (report.kind, report.name, report.problem) == ("VAE", "of 4 latent channels", "")


@pytest.mark.parametrize(("tensor", "name"), [(p.replace("\\", "").replace(".*", "x"), n) for p, n in OTHERS.items()])
@pytest.mark.parametrize("prefix", ["", UNET])
def test_other_families_are_named_and_refused(prefix, tensor, name, tmp_path):
    tensor = prefix + tensor.split("|")[0]
    report = file_of(tmp_path, {tensor: [4, 4]})
    assert (report.kind, report.name, report.why) == ("model", name, (f"{tensor} is (4, 4)",))
    assert f"is {name} ({tensor} (4, 4)): this version loads SDXL base" in report.problem and not report.python
    with pytest.raises(CheckpointError, match=f"is {name} "):
        ldm.Pipeline.from_pretrained(tmp_path / "x.safetensors")


@pytest.mark.parametrize("row", [row for row in OFFICIAL if row[2] is None], ids=lambda row: row[0])
def test_known_but_not_loaded(row, tmp_path):
    name, tells, _ = row
    report = file_of(tmp_path, {tensor: [n or 1 for n in shape] for tensor, shape in tells.items() if shape})
    assert (report.kind, report.name) == ("model", name)
    assert f"is {name} (" in report.problem and not report.python


def test_models_made_of_stable_diffusion(tmp_path):
    """They have its tensors and some of their own, which tell them from models of as many channels."""
    eight = {models.CONV_IN: [320, 8, 3, 3]}
    zero = eight | {models.CONTEXT: [320, 768], "cc_projection.weight": [768, 772]}
    assert file_of(tmp_path, zero).name == "Zero123"
    del zero["cc_projection.weight"]
    assert file_of(tmp_path, zero).name == "SD 1.x InstructPix2Pix"
    video = eight | {models.CONTEXT: [320, 1024], models.VECTOR: [1280, 768], models.TIME_STACK: [320]}
    assert file_of(tmp_path, video).name == "Stable Video Diffusion"


def test_ssd_1b(tmp_path):
    """SDXL with fewer transformer blocks: told by the depth, where the refused file has all the rest of SDXL."""
    deep = ".7.1.transformer_blocks."
    shapes = {n: s for n, s in shapes_of("sdxl_base").items() if deep not in n or int(n.split(deep)[1][0]) < 4}
    assert file_of(tmp_path, shapes).name == "SSD-1B"


def test_edm_flag(tmp_path):
    report = file_of(tmp_path, shapes_of("sdxl_base") | {"edm_mean": [], "edm_std": []})
    assert "trained on EDM's noise levels" in report.problem and not report.python


@pytest.mark.parametrize("kind", MODELS)
def test_folders(kind, tmp_path):
    """What it says of a folder that diffusers wrote, and of the same as a single file."""
    saved(reference(MODELS[kind], reference_sampler()), tmp_path / "model")
    convert(tmp_path / "model", tmp_path / "model.safetensors")
    folder, file = (ldm.inspect(tmp_path / name) for name in ("model", "model.safetensors"))
    for report in (folder, file):
        assert (report.kind, report.problem, report.missing, report.unexpected) == ("model", "", (), ())
        assert report.name.startswith("StableDiffusion")
        assert report.prediction_from == "scheduler_config.json says so"
        assert set(report.parts) == {part for part in ldm.checkpoint.NETS if getattr(MODELS[kind], part) is not None}
        assert str(report.path) in report.python
        assert sum(report.parts.values()) == sum(report.dtypes.values())


def reference_sampler():
    from diffusers import DDIMScheduler

    return DDIMScheduler


def test_broken_folder(tmp_path):
    convert(DEFAULT_MODEL, tmp_path / "model")
    (tmp_path / "model" / "unet" / "config.json").write_text("{")
    report = ldm.inspect(tmp_path / "model")
    assert report.kind == "model" and "config.json is not JSON" in report.problem and not report.python


@pytest.mark.parametrize("file", ["vocab.json", "merges.txt"])
def test_broken_tokenizer(file, tmp_path):
    """What load refuses."""
    shutil.copytree(DEFAULT_MODEL, tmp_path / "model")
    assert not ldm.inspect(tmp_path / "model").problem
    (tmp_path / "model" / "tokenizer" / file).write_text("[1, 2]")
    report = ldm.inspect(tmp_path / "model")
    assert "is no tokenizer" in report.problem and not report.python
    (tmp_path / "model" / "tokenizer" / file).unlink()
    report = ldm.inspect(tmp_path / "model")
    assert "no tokenizer in" in report.problem and not report.python


def test_broken_tokenizer_in_a_file(tmp_path):
    file = tmp_path / "model.safetensors"
    convert(DEFAULT_MODEL, file)
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    assert not ldm.inspect(file).problem
    del metadata["tokenizer/vocab.json"]
    save_file(load_file(file), tmp_path / "broken.safetensors", metadata)
    report = ldm.inspect(tmp_path / "broken.safetensors")
    assert "no tokenizer in" in report.problem and not report.python


def test_command_line(tmp_path, capsys):
    save_file({"emb_params": torch.zeros(2, 768)}, tmp_path / "word.safetensors")
    main(["inspect", str(DEFAULT_MODEL), str(tmp_path / "word.safetensors")])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"path        {DEFAULT_MODEL}"
    assert "predicts    v_prediction, scheduler_config.json says so" in lines
    assert f"load it     pipe = ldm.Pipeline.from_pretrained({str(DEFAULT_MODEL)!r})" in lines
    assert lines[lines.index("") + 2] == "embedding   vectors: emb_params (2, 768)"
    with pytest.raises(SystemExit, match="1"):
        main(["inspect", str(tmp_path / "nothing.safetensors"), str(DEFAULT_MODEL)])
    out = capsys.readouterr().out
    assert "nothing.safetensors does not exist" in out and f"path        {DEFAULT_MODEL}" in out  # it went on


def test_long_lists_are_cut(tmp_path):
    shapes = shapes_of("sd15") | {f"extra.{i}": [1] for i in range(9)}
    text = str(file_of(tmp_path, shapes))
    assert "unexpected  extra.0 (1,)" in text and text.count("extra.") == 5 and "and 4 more" in text


def test_rows_are_told_apart():
    """No official file fits two rows of different models, so that their order does not matter."""
    for layout, (name, _) in LAYOUTS.items():
        shapes = {n: tuple(s) for n, s in shapes_of(layout).items()}
        fitting = [row for row, tells, _ in OFFICIAL if all(models.fits(shapes.get(t), s) for t, s in tells.items())]
        assert fitting == [name]
