"""Reads a diffusers folder: what its JSON files say in our terms, and where its weights are.

A field that asks for something that our nets do not do is an error: nothing of a configuration is passed over.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ldm.clip import TextConfig
from ldm.clip.text_encoder import ACTIVATIONS
from ldm.clip.tokenizer import END, Tokenizer
from ldm.source import PICKLES, CheckpointError, Source
from ldm.unet import UNetConfig
from ldm.vae import VAEConfig

PIPELINES = ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline")

# For each net: the fields that are read, with diffusers' or transformers' defaults; those that have one accepted value;
# those that do not matter here. Any other field must be off: null, false or 0.
UNET_READ = {
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [320, 640, 1280, 1280],
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    "layers_per_block": 2,
    "transformer_layers_per_block": 1,
    "attention_head_dim": 8,
    "cross_attention_dim": 1280,
    "use_linear_projection": False,
    "norm_num_groups": 32,
}
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
UNET_FREE = ("sample_size", "dropout", "upcast_attention", "addition_embed_type_num_heads")

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
}
VAE_FREE = ("sample_size", "force_upcast")

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

SCHEDULER_NEEDS = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule")


def unet_config(part: Path) -> UNetConfig:
    c = read_config(part, UNET_READ, UNET_FIXED, UNET_FREE)
    channels, down, up = c["block_out_channels"], c["down_block_types"], c["up_block_types"]
    heads, depth = c["attention_head_dim"], c["transformer_layers_per_block"]  # the first is a misnomer: it is a count
    depths = depth if isinstance(depth, list) else [depth] * len(channels)
    per_level = heads if isinstance(heads, list) else [heads] * len(channels)
    widths = {width // count for width, count in zip(channels, per_level, strict=True)}
    where = part / "config.json"
    for field in ("layers_per_block", "cross_attention_dim", "norm_num_groups"):
        accept(where, c, field, isinstance(c[field], int), "a single number")
    accept(where, c, "transformer_layers_per_block", all(isinstance(d, int) for d in depths), "a number for each level")
    accept(
        where,
        c,
        "down_block_types",
        set(down) <= {"CrossAttnDownBlock2D", "DownBlock2D"},
        UNET_READ["down_block_types"],
    )
    mirrored = [kind.replace("Down", "Up") for kind in reversed(down)]
    accept(where, c, "up_block_types", up == mirrored, f"{mirrored}, the mirror image of down_block_types")
    accept(
        where, c, "attention_head_dim", isinstance(heads, int) or len(widths) == 1, "heads of one width, or one count"
    )
    return UNetConfig(
        in_channels=c["in_channels"],
        out_channels=c["out_channels"],
        channels=tuple(channels),
        layers=c["layers_per_block"],
        depth=tuple(d if "CrossAttn" in kind else 0 for d, kind in zip(depths, down, strict=True)),
        mid_depth=depths[-1],
        heads=heads if isinstance(heads, int) else None,
        head_width=None if isinstance(heads, int) else widths.pop(),
        context_width=c["cross_attention_dim"],
        linear_projection=c["use_linear_projection"],
        groups=c["norm_num_groups"],
    )


def vae_config(part: Path) -> VAEConfig:
    c = read_config(part, VAE_READ, VAE_FIXED, VAE_FREE)
    for field, kind in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
        accept(part / "config.json", c, field, set(c[field]) == {kind}, f"{kind} at every level")
    return VAEConfig(
        channels=tuple(c["block_out_channels"]),
        layers=c["layers_per_block"],
        latent_channels=c["latent_channels"],
        scaling_factor=c["scaling_factor"],
        groups=c["norm_num_groups"],
    )


def text_config(part: Path) -> TextConfig:
    where = part / "config.json"
    c = TEXT_READ | read_json(where)
    accept(where, c, "hidden_act", c["hidden_act"] in ACTIVATIONS, " or ".join(ACTIVATIONS))
    accept(where, c, "layer_norm_eps", c["layer_norm_eps"] == 1e-5, 1e-5)
    accept(where, c, "intermediate_size", c["intermediate_size"] == 4 * c["hidden_size"], "4 times hidden_size")
    return TextConfig(
        vocab_size=c["vocab_size"],
        length=c["max_position_embeddings"],
        width=c["hidden_size"],
        layers=c["num_hidden_layers"],
        heads=c["num_attention_heads"],
        activation=c["hidden_act"],
        # 2 is what transformers wrote by mistake before 4.31, SD 1's folders among them: it meant the highest id.
        end_token=c["vocab_size"] - 1 if c["eos_token_id"] == 2 else c["eos_token_id"],
    )


def scheduler(part: Path) -> dict[str, Any]:
    where = part / "scheduler_config.json"
    c = {"prediction_type": "epsilon"} | read_json(where)
    if missing := [field for field in SCHEDULER_NEEDS if field not in c]:
        raise CheckpointError(f"{where} lacks {', '.join(missing)}")
    accept(where, c, "prediction_type", c["prediction_type"] in ("epsilon", "v_prediction"), "epsilon or v_prediction")
    for field in ("trained_betas", "rescale_betas_zero_snr"):
        accept(where, c, field, not c.get(field), "null or false")
    return c


def tokenizer(part: Path) -> Tokenizer:
    """vocab.json and merges.txt, or tokenizer.json alone, as transformers 5 writes."""
    settings = {"model_max_length": 77, "pad_token": END}
    for name in ("tokenizer_config.json", "special_tokens_map.json"):  # the second overrides the first
        settings |= read_json(part / name) if (part / name).is_file() else {}
    pad = settings["pad_token"]
    pad = pad["content"] if isinstance(pad, dict) else pad
    vocab, merges, both = part / "vocab.json", part / "merges.txt", part / "tokenizer.json"
    if vocab.is_file() and merges.is_file():
        return Tokenizer.from_files(vocab, merges, settings["model_max_length"], pad)
    if not both.is_file():
        raise CheckpointError(f"no tokenizer in {part}: looked for vocab.json with merges.txt, and for tokenizer.json")
    model = read_json(both)["model"]
    pairs = [tuple(pair.split() if isinstance(pair, str) else pair) for pair in model["merges"]]
    return Tokenizer(model["vocab"], pairs, settings["model_max_length"], pad)


def weights(part: Path, stem: str, dtype: torch.dtype | None) -> Source:
    """The weights of a part. Of a full and a half precision variant the half one is taken for float16 alone."""
    full = [f"{stem}.safetensors", f"{stem}.safetensors.index.json"]
    half = [f"{stem}.fp16.safetensors", f"{stem}.safetensors.index.fp16.json"]
    names = half + full if dtype == torch.float16 else full + half
    for path in (part / name for name in names):
        if path.is_file():
            index = path.suffix == ".json"
            shards = sorted(set(read_json(path)["weight_map"].values())) if index else [path.name]
            return Source(part, [part / shard for shard in shards])
    found = sorted(path.name for path in part.glob("*") if path.suffix in PICKLES)
    pickles = f"; {', '.join(found)} is a pickle: have it converted to safetensors" if found else ""
    raise CheckpointError(f"no weights in {part}: looked for {', '.join(names)}{pickles}")


def read_config(part: Path, read: Mapping, fixed: Mapping, free: tuple[str, ...]) -> dict[str, Any]:
    c = read_json(part / "config.json")
    for field, value in c.items():
        if field in fixed:
            accept(part / "config.json", c, field, value == fixed[field], fixed[field])
        elif field not in read and field not in free and not field.startswith("_"):
            off = not any(value) if isinstance(value, list) else not value
            accept(part / "config.json", c, field, off, "null or false")
    return {**read, **c}


def accept(where: Path, config: Mapping, field: str, good: bool, accepted: Any) -> None:
    if not good:
        raise CheckpointError(f"{where}: {field} is {config[field]!r}, but this version only does {accepted}")


def read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise CheckpointError(f"{path.parents[1]} has no {path.parent.name}/{path.name}, and cannot be loaded without")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
