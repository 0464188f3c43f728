"""Reads a diffusers folder: what its JSON files say in our terms, and where its weights are.

A field that asks for something that our nets do not do is an error: nothing of a configuration is passed over.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ldm.clip import TextConfig
from ldm.clip.text_encoder import ACTIVATIONS
from ldm.clip.tokenizer import END, Tokenizer
from ldm.samplers import PREDICTION_TYPES, Schedule
from ldm.source import PICKLES, CheckpointError, Source, conversion, is_file
from ldm.unet import UNetConfig
from ldm.vae import TinyConfig, VAEConfig

SD_PIPELINES = ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline")
XL_PIPELINES = ("StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline", "StableDiffusionXLInpaintPipeline")
PIPELINES = SD_PIPELINES + XL_PIPELINES

DOWN = ("CrossAttnDownBlock2D", "DownBlock2D")

# For each net: the fields that are read, with diffusers' or transformers' defaults, whose kind a value must have; those
# that are one number, or a list with one for each level; those that have one accepted value; those that do not matter
# here. Any other field must be off: null, false or 0.
UNET_READ = {
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [320, 640, 1280, 1280],
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    "layers_per_block": 2,
    "cross_attention_dim": 1280,
    "use_linear_projection": False,
    "norm_num_groups": 32,
}
UNET_PER_LEVEL = {"transformer_layers_per_block": 1, "attention_head_dim": 8}
UNET_FIXED = {
    "act_fn": "silu",
    "attention_type": "default",
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "mid_block_scale_factor": 1,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "norm_eps": 1e-5,
    "resnet_out_scale_factor": 1,
    "resnet_time_scale_shift": "default",
    "time_embedding_type": "positional",
}
# SDXL's size conditioning: all three, or none.
UNET_VECTOR = {"addition_embed_type": "text_time", "addition_time_embed_dim": 256}
UNET_FREE = (
    *UNET_PER_LEVEL,
    *UNET_VECTOR,
    "projection_class_embeddings_input_dim",
    "sample_size",
    "dropout",
    "upcast_attention",
    "addition_embed_type_num_heads",
)

VAE_READ = {
    "block_out_channels": [64],
    "layers_per_block": 1,
    "latent_channels": 4,
    "scaling_factor": 0.18215,
    "norm_num_groups": 32,
    "down_block_types": ["DownEncoderBlock2D"],
    "up_block_types": ["UpDecoderBlock2D"],
}
VAE_FIXED = {
    "act_fn": "silu",
    "in_channels": 3,
    "out_channels": 3,
    "mid_block_add_attention": True,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
    "latents_mean": None,
    "latents_std": None,
}
VAE_FREE = ("sample_size", "force_upcast")

TINY_FIXED = {
    "act_fn": "relu",
    "upsample_fn": "nearest",
    "in_channels": 3,
    "out_channels": 3,
    "upsampling_scaling_factor": 2,
    "num_encoder_blocks": [1, 3, 3, 3],
    "num_decoder_blocks": [3, 3, 3, 1],
    "scaling_factor": 1.0,
    "shift_factor": 0.0,
}
TINY_FREE = (  # the widths are the tensors', the latents' magnitude and shift are for storing them in bytes
    *("encoder_block_out_channels", "decoder_block_out_channels", "block_out_channels", "latent_channels"),
    *("latent_magnitude", "latent_shift", "force_upcast"),
)

TEXT_READ = {
    "vocab_size": 49408,
    "max_position_embeddings": 77,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "hidden_act": "quick_gelu",
    "eos_token_id": 49407,
    "layer_norm_eps": 1e-5,
}
# For a text file: bytes, and objects that it is made of. The official tokenizer.json has 3.6 million, and 200,000.
LONGEST_TEXT = 5_000_000
MOST_ITEMS = 250_000
MOST_SHARDS = 1000
# Beyond what any model has, and few enough that a damaged config neither fills the memory nor takes for ever.
LARGE = 10**6
MOST = {"block_out_channels": 5, "layers_per_block": 3, "transformer_layers_per_block": 12, "num_hidden_layers": 64}

KINDS = {
    bool: "true or false",
    str: "text",
    int: "whole numbers from 1 to 999,999",
    float: "numbers above 0, below 1,000,000",
}


class Embedded(NamedTuple):
    """The text files of a folder in a single file's metadata, with as much of a Path as is needed."""

    files: Mapping[str, str]
    where: Path
    name: str = ""

    def __truediv__(self, name: str) -> "Embedded":
        return self._replace(name=f"{self.name}/{name}".lstrip("/"))

    def __str__(self) -> str:
        return f"{self.name} in the metadata of {self.where}"

    @property
    def parent(self) -> Path:
        return self.where

    def is_file(self) -> bool:
        return self.name in self.files


Folder = Path | Embedded


def read_index(path: Folder) -> dict[str, Any]:
    where = path / "model_index.json"
    if not is_file(where):
        files = ", ".join(sorted(file.name for file in path.glob("*.safetensors"))) if isinstance(path, Path) else ""
        hint = f"; it has {files}: a single file is given by its own path" if files else ""
        raise CheckpointError(f"{path} is not a diffusers folder: it has no model_index.json{hint}")
    index = {"_class_name": None} | read_json(where)
    accept(where, index, "_class_name", index["_class_name"] in PIPELINES, " or ".join(PIPELINES))
    return index


def unet_config(part: Folder) -> UNetConfig:
    where = part / "config.json"
    c = UNET_PER_LEVEL | read_config(where, UNET_READ, UNET_FIXED, UNET_FREE)
    channels, down = c["block_out_channels"], c["down_block_types"]
    check_groups(where, c)
    known = len(down) == len(channels) and set(down) <= set(DOWN)
    accept(where, c, "down_block_types", known, f"{' or '.join(DOWN)}, one for each level")
    mirrored = [kind.replace("Down", "Up") for kind in reversed(down)]
    accept(where, c, "up_block_types", c["up_block_types"] == mirrored, f"the mirror image of the way down, {mirrored}")

    depths = per_level(where, c, "transformer_layers_per_block", len(channels))
    counts = per_level(where, c, "attention_head_dim", len(channels))  # a misnomer of diffusers': the number of heads
    whole = all(width % count == 0 for width, count in zip(channels, counts, strict=True))
    accept(where, c, "attention_head_dim", whole, f"numbers of heads that divide block_out_channels, {channels}")
    widths = {width // count for width, count in zip(channels, counts, strict=True)}
    same = len(set(counts)) == 1
    accept(where, c, "attention_head_dim", same or len(widths) == 1, "as many heads, or heads as wide, at every level")
    vector = {"projection_class_embeddings_input_dim": None, **dict.fromkeys(UNET_VECTOR), **c}
    width = vector["projection_class_embeddings_input_dim"]
    for field, value in UNET_VECTOR.items():
        good = vector[field] == value if width is not None else field == "addition_time_embed_dim" or not vector[field]
        accept(where, vector, field, good, f"{value!r} with projection_class_embeddings_input_dim, or null without")
    accept(where, vector, "projection_class_embeddings_input_dim", width is None or like(width, 1), "a whole number")
    return UNetConfig(
        in_channels=c["in_channels"],
        out_channels=c["out_channels"],
        channels=tuple(channels),
        layers=c["layers_per_block"],
        depth=tuple(d if "CrossAttn" in kind else 0 for d, kind in zip(depths, down, strict=True)),
        mid_depth=depths[-1],
        heads=counts[0] if same else None,
        head_width=None if same else widths.pop(),
        context_width=c["cross_attention_dim"],
        linear_projection=c["use_linear_projection"],
        vector_width=width,
        groups=c["norm_num_groups"],
    )


def per_level(where: Folder, config: Mapping, field: str, levels: int) -> list[int]:
    value = config[field]
    values = value if isinstance(value, list) else [value] * levels
    most = MOST.get(field, LARGE)
    good = len(values) == levels and like(values, [1]) and max(values) <= most
    accept(where, config, field, good, f"a whole number from 1 to {most:,}, or one for each of the {levels} levels")
    return values


def check_groups(where: Folder, config: Mapping) -> None:
    channels = config["block_out_channels"]
    whole = all(width % config["norm_num_groups"] == 0 for width in channels)
    accept(where, config, "norm_num_groups", whole, f"a number that divides block_out_channels, {channels}")


def sample_size(part: Folder) -> int:
    """The native side in latents; 64, as SD 1's, where the config leaves it open."""
    where = part / "config.json"
    c = {"sample_size": None} | read_json(where)
    accept(where, c, "sample_size", c["sample_size"] is None or like(c["sample_size"], 1), "a whole number above 0")
    return c["sample_size"] or 64


def vae_config(part: Folder, xl: bool = False) -> VAEConfig:
    """xl: whether it stands in a folder of SDXL, where a missing force_upcast means yes, as in diffusers."""
    where = part / "config.json"
    c = read_config(where, VAE_READ, VAE_FIXED, VAE_FREE)
    check_groups(where, c)
    for field, kind in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
        levels = [kind] * len(c["block_out_channels"])
        accept(where, c, field, c[field] == levels, levels)
    return VAEConfig(
        channels=tuple(c["block_out_channels"]),
        layers=c["layers_per_block"],
        latent_channels=c["latent_channels"],
        scaling_factor=c["scaling_factor"],
        groups=c["norm_num_groups"],
        upcast=xl and bool(c.get("force_upcast", True)),
    )


def tiny_config(vae: Path, shape: tuple[int, ...]) -> TinyConfig:
    """Of a TAESD: its folder, or the file alone; shape: of the decoder's first convolution (width,latents,3,3)."""
    if vae.is_dir():
        read_config(vae / "config.json", {}, TINY_FIXED, TINY_FREE)
    return TinyConfig(channels=(shape[0],) * 4, latent_channels=shape[1])


def text_config(part: Folder, xl: bool = False, projects: bool = False) -> TextConfig:
    """xl: SDXL takes the layer before the last, without LayerNorm. projects: the pooled token is projected."""
    where = part / "config.json"
    read: dict[str, Any] = {**TEXT_READ, **({"projection_dim": 512} if projects else {})}
    c = read | read_json(where)
    check_kinds(where, c, read)
    accept(where, c, "hidden_act", c["hidden_act"] in ACTIVATIONS, " or ".join(ACTIVATIONS))
    accept(where, c, "layer_norm_eps", c["layer_norm_eps"] == 1e-5, 1e-5)
    accept(where, c, "intermediate_size", c["intermediate_size"] == 4 * c["hidden_size"], "4 times hidden_size")
    accept(where, c, "eos_token_id", c["eos_token_id"] < c["vocab_size"], f"an id below {c['vocab_size']}, vocab_size")
    whole = c["hidden_size"] % c["num_attention_heads"] == 0
    accept(where, c, "num_attention_heads", whole, f"a number that divides hidden_size, {c['hidden_size']}")
    return TextConfig(
        vocab_size=c["vocab_size"],
        length=c["max_position_embeddings"],
        width=c["hidden_size"],
        layers=c["num_hidden_layers"],
        heads=c["num_attention_heads"],
        activation=c["hidden_act"],
        # SD 1's own config says 2, a mistake of old versions of transformers, who took the highest id anyway.
        end_token=c["vocab_size"] - 1 if c["eos_token_id"] == 2 else c["eos_token_id"],
        skip=int(xl),
        final_norm=not xl,
        projection=c["projection_dim"] if projects else None,
    )


def scheduler(part: Folder) -> dict[str, Any]:
    where = part / "scheduler_config.json"
    c = {"prediction_type": "epsilon"} | read_json(where)
    accept(where, c, "prediction_type", c["prediction_type"] in PREDICTION_TYPES, " or ".join(PREDICTION_TYPES))
    try:
        Schedule.from_config(c)
    except ValueError as error:
        raise CheckpointError(f"{where}: {error}") from error
    return c


def tokenizer(part: Folder, text: TextConfig) -> Tokenizer:
    """Reads vocab.json and merges.txt, or tokenizer.json alone, as transformers 5 writes."""
    settings: dict[str, Any] = {"model_max_length": text.length, "pad_token": END}
    for name in ("tokenizer_config.json", "special_tokens_map.json"):  # the second overrides the first
        settings |= read_json(part / name) if is_file(part / name) else {}
    limit, pad = settings["model_max_length"], settings["pad_token"]
    pad = pad.get("content", "") if isinstance(pad, dict) else pad
    accept(part, settings, "model_max_length", type(limit) in (int, float) and limit > 2, "a number above 2")
    accept(part, settings, "pad_token", isinstance(pad, str), "a token, or an object with its content")
    length = int(min(text.length, limit))  # transformers writes 1e30 for no limit
    vocab, merges, both = part / "vocab.json", part / "merges.txt", part / "tokenizer.json"
    two = is_file(vocab) and is_file(merges)
    if not two and not is_file(both):
        raise CheckpointError(f"no tokenizer in {part}: looked for vocab.json with merges.txt, and for tokenizer.json")
    where = f"{vocab} with {merges.name}" if two else str(both)
    texts = [read_text(file) for file in ((vocab, merges) if two else (both,))]
    try:
        if two:
            made = Tokenizer.from_texts(texts[0], texts[1], length, pad)
        else:
            made = Tokenizer.from_json(texts[0], length, pad)
    except Exception as error:  # the tokenizers library raises nothing narrower
        raise CheckpointError(
            f"{where} is no tokenizer: {error!r}. Accepted is a vocab of tokens and their ids, and merges of two tokens"
            " of it each"
        ) from error
    if (highest := max(made.vocab.values())) >= text.vocab_size:
        raise CheckpointError(
            f"{where}: its highest id is {highest}, but the text encoder's vocab_size is {text.vocab_size}:"
            " give a tokenizer and a text encoder that belong together"
        )
    return made


def stem_of(part: str) -> str:
    return "model" if part.startswith("text_encoder") else "diffusion_pytorch_model"


def weight_names(stem: str, dtype: torch.dtype | None) -> list[str]:
    """The files in which a part's weights may be, those that are rather taken first."""
    full = [f"{stem}.safetensors", f"{stem}.safetensors.index.json"]
    half = [f"{stem}.fp16.safetensors", f"{stem}.safetensors.index.fp16.json"]
    return half + full if dtype == torch.float16 else full + half


def weights(part: Path, dtype: torch.dtype | None) -> Source:
    """The weights of a part. Of a full and a half precision variant the half one is taken for float16 alone."""
    stem = stem_of(part.name)
    names = weight_names(stem, dtype)
    for path in (part / name for name in names):
        if is_file(path):
            return sharded(path) if path.suffix == ".json" else Source(part, [path])
    hint = ""
    for path in sorted(path for path in part.glob(f"*{stem}*") if path.suffix in PICKLES):
        target = part / f"{stem}{path.stem.partition(stem)[2]}.safetensors"  # pytorch_model.bin, but model.safetensors
        hint += f"\n{path.name} is a pickle. To convert it:\n{conversion(path, target)}"
    raise CheckpointError(f"no weights in {part}: looked for {', '.join(names)}{hint}")


def shards_of(index: Path) -> list[str]:
    return sorted(set(weight_map(index).values()))


def weight_map(index: Path) -> dict[str, str]:
    """The file that each tensor is in."""
    c = {"weight_map": None} | read_json(index)
    homes = c["weight_map"] if isinstance(c["weight_map"], dict) else {}
    beside = like(list(homes.values()), [""]) and len(set(homes.values())) <= MOST_SHARDS
    beside = beside and all(file == Path(file).name for file in homes.values())
    good = f"an object of tensors and the files beside it that they are in, at most {MOST_SHARDS}"
    accept(index, c, "weight_map", beside, good)
    return homes


def sharded(index: Path) -> Source:
    homes = weight_map(index)
    source = Source(index.parent, [index.parent / file for file in sorted(set(homes.values()))])
    for name, file in homes.items():
        if (found := source.files.get(name)) != index.parent / file:
            raise CheckpointError(
                f"{index} says that {name} is in {file}, but it is in {found.name if found else 'none of its files'}:"
                " download or copy them again"
            )
    return source


def read_config(where: Folder, read: Mapping, fixed: Mapping, free: tuple[str, ...]) -> dict[str, Any]:
    c = read_json(where)
    for field, value in c.items():
        if field in fixed:
            accept(where, c, field, value == fixed[field], repr(fixed[field]))
        elif field not in read and field not in free and not field.startswith("_"):
            off = not any(value) if isinstance(value, list) else not value
            accept(where, c, field, off, "null or false")
    c = {**read, **c}
    check_kinds(where, c, read)
    return c


def check_kinds(where: Folder, config: Mapping, read: Mapping) -> None:
    for field, default in read.items():
        kind = f"a list of {KINDS[type(default[0])]}" if isinstance(default, list) else KINDS[type(default)]
        accept(where, config, field, like(config[field], default), kind)
        if most := MOST.get(field):
            count = len(config[field]) if isinstance(default, list) else config[field]
            accept(where, config, field, count <= most, f"at most {most}")


def like(value: Any, default: Any) -> bool:
    """Whether a value is of its default's kind, as KINDS says; a list has at least one item."""
    if isinstance(default, list):
        return isinstance(value, list) and len(value) > 0 and all(like(item, default[0]) for item in value)
    if isinstance(default, bool | str):
        return type(value) is type(default)
    return type(value) in (int, type(default)) and 0 < value < LARGE


def accept(where: Folder, config: Mapping, field: str, good: bool, accepted: Any) -> None:
    if not good:
        given = repr(config[field])
        given = given if len(given) <= 200 else f"{given[:200]}..."
        raise CheckpointError(f"{where}: {field} is {given}, but this version only does {accepted}")


def read_text(path: Folder, what: str = "text in UTF-8") -> str:
    """Raises CheckpointError for what is no text, or so long that it, or what is made of it, would fill the memory."""
    if not is_file(path):
        raise CheckpointError(f"{path.parent} has no {path.name}, and cannot be loaded without")
    try:
        if isinstance(path, Embedded):
            text = path.files[path.name]
        else:
            with path.open("rb") as file:
                text = file.read(LONGEST_TEXT + 1).decode()
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is not {what}: {error}") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    if len(text) > LONGEST_TEXT or sum(map(text.count, ",[{")) > MOST_ITEMS:
        raise CheckpointError(
            f"{path} is too long: no such file of a model needs more than {LONGEST_TEXT:,} bytes or {MOST_ITEMS:,}"
            " items; download or copy it again"
        )
    return text


def read_json(path: Folder) -> dict[str, Any]:
    try:
        value = json.loads(read_text(path, "JSON"))
    except CheckpointError:  # a ValueError too
        raise
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is {str(value)[:40]}: accepted is a JSON object, {{...}}")
    return value
