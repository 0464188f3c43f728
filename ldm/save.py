"""Writes models: safetensors, and the JSON files by which diffusers, and `folder.py`, read a folder."""

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ldm.clip import TextConfig
from ldm.clip.tokenizer import END, Tokenizer
from ldm.folder import stem_of
from ldm.models import Model
from ldm.source import LONGEST_HEADER
from ldm.unet import UNetConfig
from ldm.vae import VAEConfig

# The version of diffusers whose configs these are: without one, its pipelines for inpainting do not load.
DIFFUSERS = "0.42.1"


def write_file(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """One safetensors file, whole or not at all. Raises ValueError where its header would be too long to be loaded."""
    check_header(path, tensors, metadata)
    with TemporaryDirectory(dir=path.parent, prefix=f"{path.name}.") as folder:
        new = Path(folder) / path.name
        new.touch()
        mode = new.stat().st_mode  # that of any new file: safetensors writes one that its owner alone can read
        try:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, new, dict(metadata))
        except SafetensorError as error:
            raise OSError(f"{path} could not be written: {error}") from error
        new.chmod(mode)
        new.rename(path)


def check_header(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    end = sum(tensor.nbytes for tensor in tensors.values())  # no offset has more digits
    infos = {n: {"dtype": "F8_E8M0", "shape": [*t.shape], "data_offsets": [end, end]} for n, t in tensors.items()}
    header = json.dumps({"__metadata__": dict(metadata), **infos}, ensure_ascii=False, separators=(",", ":"))
    if (length := len(header.encode())) > LONGEST_HEADER:
        name, text = max(metadata.items(), key=lambda item: len(item[1]), default=("tensors", infos))
        raise ValueError(
            f"{path} would have a header of {length:,} bytes, and at most {LONGEST_HEADER:,} are read; the longest text"
            f" in it is {name} ({len(text):,} characters): convert to a folder, which has it as a file"
        )


def write_folder(path: Path, tensors: Mapping[str, Mapping[str, Tensor]], texts: Mapping[str, str]) -> None:
    """A diffusers folder, whole or not at all. tensors: of each part. texts: by their paths in the folder."""
    with whole_folder(path) as new:
        for name, text in texts.items():
            (new / name).parent.mkdir(exist_ok=True)
            (new / name).write_text(text, encoding="utf-8")
        for part, values in tensors.items():
            write_file(new / part / f"{stem_of(part)}.safetensors", values, {"format": "pt"})


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """All or nothing: yields an empty folder beside `folder`, whose place it takes at the end unless there is an error.

    Should the machine die between the two renames, the earlier folder still has its files, as `old` in the new folder
    beside it.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(mkdtemp(dir=folder.parent, prefix=f"{folder.name}."))
    new, old = beside / "new", beside / "old"
    new.mkdir()  # a folder of its own, with the mode of any new one: mkdtemp's only its owner can read
    try:
        yield new
        if folder.exists():
            folder.rename(old)
        new.rename(folder)
    except BaseException:
        if old.exists():
            old.rename(folder)
        shutil.rmtree(beside)
        raise
    shutil.rmtree(beside, ignore_errors=True)


# What a diffusers folder says in JSON


def as_json(fields: Mapping[str, Any]) -> str:
    return json.dumps(dict(fields), indent=2) + "\n"


def folder_texts(model: Model, tokenizers: Mapping[str, Tokenizer | None]) -> dict[str, str]:
    """The JSON and tokenizer files of a folder, by their paths."""
    xl = model.text_encoder_2 is not None
    configs: dict[str, Mapping[str, Any]] = {
        "model_index.json": index(model),
        "scheduler/scheduler_config.json": scheduler_config(model, xl),
        "unet/config.json": unet_config(model.unet, model.size // model.vae.factor),
        "vae/config.json": vae_config(model.vae, model.size),
    }
    for part in ("text_encoder", "text_encoder_2"):
        if (text := getattr(model, part)) is not None:
            configs[f"{part}/config.json"] = text_config(text)
    texts = {name: as_json(fields) for name, fields in configs.items()}
    for part, tokenizer in tokenizers.items():
        if tokenizer is not None:
            texts |= {f"{part}/{name}": text for name, text in tokenizer_texts(tokenizer).items()}
    return texts


def index(model: Model) -> dict[str, Any]:
    xl = model.text_encoder_2 is not None
    kind = "Img2Img" if model.text_encoder is None else "Inpaint" if model.unet.in_channels > 4 else ""
    fields: dict[str, Any] = {
        "_class_name": f"StableDiffusion{'XL' if xl else ''}{kind}Pipeline",
        "_diffusers_version": DIFFUSERS,
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "scheduler": ["diffusers", "EulerDiscreteScheduler" if xl else "DDIMScheduler"],
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
    }
    if not xl:
        return fields | {"safety_checker": [None, None], "requires_safety_checker": False}
    fields |= {
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
        "force_zeros_for_empty_prompt": model.zero_negative,
    }
    if model.text_encoder is None:
        fields |= {"text_encoder": [None, None], "tokenizer": [None, None], "requires_aesthetics_score": True}
    return fields


def scheduler_config(model: Model, xl: bool) -> dict[str, Any]:
    kind = {"_class_name": "EulerDiscreteScheduler" if xl else "DDIMScheduler"}
    return kind | dict(model.scheduler) | ({} if xl else {"clip_sample": False})


def unet_config(c: UNetConfig, size: int) -> dict[str, Any]:
    """size: native side in latents."""
    attends = [depth > 0 for depth in c.depth]
    fields: dict[str, Any] = dict(
        _class_name="UNet2DConditionModel",
        sample_size=size,
        in_channels=c.in_channels,
        out_channels=c.out_channels,
        down_block_types=["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attends],
        up_block_types=["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)],
        mid_block_type="UNetMidBlock2DCrossAttn",
        block_out_channels=c.channels,
        layers_per_block=c.layers,
        # A misnomer of diffusers': the number of heads.
        attention_head_dim=c.heads if c.heads is not None else [c.heads_at(width) for width in c.channels],
        cross_attention_dim=c.context_width,
        norm_num_groups=c.groups,
        norm_eps=1e-5,
        act_fn="silu",
    )
    if {*c.depth, c.mid_depth} - {0, 1}:
        fields["transformer_layers_per_block"] = [depth or c.mid_depth for depth in c.depth[:-1]] + [c.mid_depth]
    if c.linear_projection:
        fields["use_linear_projection"] = True
    if c.vector_width is not None:
        fields |= dict(
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=c.vector_width,
        )
    return fields


def vae_config(c: VAEConfig, size: int) -> dict[str, Any]:
    """size: native side in pixels."""
    fields: dict[str, Any] = dict(
        _class_name="AutoencoderKL",
        sample_size=size,
        in_channels=3,
        out_channels=3,
        down_block_types=["DownEncoderBlock2D"] * len(c.channels),
        up_block_types=["UpDecoderBlock2D"] * len(c.channels),
        block_out_channels=c.channels,
        layers_per_block=c.layers,
        latent_channels=c.latent_channels,
        norm_num_groups=c.groups,
        scaling_factor=c.scaling_factor,
        act_fn="silu",
    )
    return fields | ({"force_upcast": True} if c.upcast else {})


def text_config(c: TextConfig) -> dict[str, Any]:
    return dict(
        architectures=["CLIPTextModel" if c.projection is None else "CLIPTextModelWithProjection"],
        model_type="clip_text_model",
        vocab_size=c.vocab_size,
        max_position_embeddings=c.length,
        hidden_size=c.width,
        intermediate_size=4 * c.width,
        projection_dim=c.projection or c.width,
        num_hidden_layers=c.layers,
        num_attention_heads=c.heads,
        hidden_act=c.activation,
        layer_norm_eps=1e-5,
        bos_token_id=c.end_token - 1,
        eos_token_id=c.end_token,
        pad_token_id=c.end_token,
    )


def tokenizer_texts(tokenizer: Tokenizer) -> dict[str, str]:
    names = {i: token for token, i in tokenizer.vocab.items()}
    config = dict(
        tokenizer_class="CLIPTokenizer",
        model_max_length=tokenizer.length,
        do_lower_case=True,
        add_prefix_space=False,
        errors="replace",
        bos_token=names[tokenizer.begin],
        eos_token=names[tokenizer.end],
        pad_token=names[tokenizer.pad],
        unk_token=END,
    )
    merges = "\n".join(["#version: 0.2", *(" ".join(pair) for pair in tokenizer.merges)])
    return {
        "vocab.json": json.dumps(tokenizer.vocab, ensure_ascii=False, separators=(",", ":")) + "\n",
        "merges.txt": merges + "\n",
        "tokenizer_config.json": as_json(config),
    }
