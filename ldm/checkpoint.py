"""Opens a model: an official single file or a diffusers folder, strictly, offline and without a copy of the weights.

Every parameter of ours asks for exactly one tensor. What is missing, has another shape, or is left over is an error.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ldm import folder
from ldm.clip import TextConfig, TextEncoder
from ldm.clip.keys import spellings as text_spellings
from ldm.clip.tokenizer import Tokenizer
from ldm.source import CheckpointError, Source
from ldm.unet import UNet, UNetConfig
from ldm.unet.keys import PREFIX as UNET
from ldm.unet.keys import spellings as unet_spellings
from ldm.vae import VAE, VAEConfig
from ldm.vae.keys import PREFIX as BUILT_IN_VAE
from ldm.vae.keys import spellings as vae_spellings

__all__ = ["CheckpointError", "Parts", "load"]


class Parts(NamedTuple):
    """What a pipeline is made of. The nets are in eval mode and want no gradients."""

    unet: UNet
    vae: VAE
    text_encoder: TextEncoder
    tokenizer: Tokenizer
    scheduler: dict[str, Any]  # as in scheduler_config.json
    size: int  # native side of a picture, in pixels


SD1_SCHEDULER = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
    "steps_offset": 1,
    "set_alpha_to_one": False,
}


@dataclass(frozen=True)
class Model:
    """A row of the table of official models. A file is this model if it has the telling tensors, in these shapes (None
    is any extent). A row without configs is known by name and not yet loaded."""

    name: str
    tells: Mapping[str, tuple[int | None, ...]]
    unet: UNetConfig | None = None
    vae: VAEConfig | None = None
    text: TextConfig | None = None
    scheduler: Mapping[str, Any] = field(default_factory=dict)
    size: int = 512


CONV_IN = UNET + "input_blocks.0.0.weight"
CONTEXT = UNET + "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
POOLED = UNET + "label_emb.0.0.weight"
OPEN_CLIP_1, OPEN_CLIP_2 = (f"conditioner.embedders.{i}.model.ln_final.weight" for i in (0, 1))

MODELS = (
    Model("SDXL base", {OPEN_CLIP_2: (1280,)}),
    Model("SDXL refiner", {OPEN_CLIP_1: (1280,), CONV_IN: (384, None, None, None)}),
    Model("SD 2.x unCLIP", {CONTEXT: (320, 1024), POOLED: (None, None)}),
    Model("SD 2.x inpainting", {CONTEXT: (320, 1024), CONV_IN: (320, 9, 3, 3)}),
    Model("SD 2.x depth", {CONTEXT: (320, 1024), CONV_IN: (320, 5, 3, 3)}),
    Model("SD 2.x x4 upscaler", {CONV_IN: (None, 7, 3, 3)}),
    Model("SD 2.x", {CONTEXT: (320, 1024), CONV_IN: (320, 4, 3, 3)}),
    Model("SD 1.x inpainting", {CONTEXT: (320, 768), CONV_IN: (320, 9, 3, 3)}),
    Model("SD 1.x InstructPix2Pix", {CONTEXT: (320, 768), CONV_IN: (320, 8, 3, 3)}),
    Model(
        "SD 1.x",
        {CONTEXT: (320, 768), CONV_IN: (320, 4, 3, 3)},
        UNetConfig(),
        VAEConfig(),
        TextConfig(),
        SD1_SCHEDULER,
    ),
)

NOT_MODELS = {
    r".*lora_.*|.*\.lora\..*": "a LoRA, a change to a model: load the model that it was trained on",
    r"control_model\..*|controlnet_.*": "a ControlNet, an addition to a model: load the model that it was trained on",
    r"(first_stage_model\.)?decoder\.conv_in\.weight": "a VAE alone: load a model, with this file as vae=",
    r"(unet\.)?down_blocks\.0\.resnets\..*|(text_model\.)?embeddings\.token_embedding\.weight": (
        "one part of a diffusers folder: give the folder that has model_index.json"
    ),
}


def load(
    path: str | Path,
    vae: str | Path | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> Parts:
    """Load an official single file (.safetensors) or a diffusers folder. Nothing is ever downloaded.

    vae: a VAE file or folder that takes the place of the built-in one, which then need not be there.
    dtype: None keeps the file's own, and then the weights are the mapped file itself.
    Raises CheckpointError, a ValueError, for anything that is not exactly a model that this version knows.
    """
    path, vae = Path(path), None if vae is None else Path(vae)
    for given in (path, vae):
        if given is not None and not given.exists():
            raise CheckpointError(
                f"{given} does not exist. Nothing is downloaded: a model of the Hugging Face hub must be fetched first,"
                " `huggingface-cli download OWNER/NAME --local-dir FOLDER`, and FOLDER given here"
            )
    plans, parts = from_folder(path, vae, dtype) if path.is_dir() else from_file(path, vae, dtype)
    check(plans, path)
    nets = {name: plan.fill(dtype, torch.device(device)) for name, plan in plans.items()}
    return Parts(**nets, **parts)


class Plan:
    """A net, still without values, and the tensor that each of its parameters will be."""

    def __init__(self, net: type[nn.Module], config: Any, spellings: Callable[..., tuple[str, ...]], source: Source):
        with NoValues(), torch.device("meta"):
            self.net = net(config)
        self.source = source
        self.shapes = {name: tuple(p.shape) for name, p in self.net.state_dict().items()}
        layouts = zip(*(spellings(config, name) for name in self.shapes), strict=True)
        layout = max(layouts, key=lambda theirs: sum(name in source.shapes for name in theirs))
        self.theirs = dict(zip(self.shapes, layout, strict=True))

    def fill(self, dtype: torch.dtype | None, device: torch.device) -> nn.Module:
        """The net with its values. Without a dtype it keeps that of its tensors, or of the widest if they differ."""
        tensors = {ours: self.source[theirs] for ours, theirs in self.theirs.items()}
        dtype = dtype or reduce(torch.promote_types, {tensor.dtype for tensor in tensors.values()})
        for ours, tensor in tensors.items():
            tensors[ours] = tensor.to(device, dtype).reshape(self.shapes[ours])
        self.net.load_state_dict(tensors, assign=True)
        return self.net.eval().requires_grad_(False)


class NoValues(TorchFunctionMode):
    """Skips torch.nn.init. (There is nothing to fill on the meta device, but trying to costs a second of imports.)"""

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func.__module__ == "torch.nn.init":
            return kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def from_file(path: Path, vae: Path | None, dtype: torch.dtype | None) -> tuple[dict[str, Plan], dict[str, Any]]:
    source = Source(path, [path])
    model = detect(source)
    scheduler = dict(model.scheduler)
    if source.shapes.pop("v_pred", None) is not None:  # a flag that fine-tuners add
        scheduler["prediction_type"] = "v_prediction"
    if vae is not None:
        source.drop(BUILT_IN_VAE)
    plans = {
        "unet": Plan(UNet, model.unet, unet_spellings, source),
        "vae": separate_vae(vae, model.vae, dtype) if vae else Plan(VAE, model.vae, vae_spellings, source),
        "text_encoder": Plan(TextEncoder, model.text, text_spellings, source),
    }
    return plans, {"tokenizer": Tokenizer.official(), "scheduler": scheduler, "size": model.size}


def detect(source: Source) -> Model:
    for model in MODELS:
        if all(fits(source.shapes.get(name), shape) for name, shape in model.tells.items()):
            break
    else:
        for pattern, what in NOT_MODELS.items():
            if any(re.fullmatch(pattern, name) for name in source.shapes):
                raise CheckpointError(f"{source.where} is {what}")
        found = [f"{name} {source.shapes.get(name, 'missing')}" for name in (CONV_IN, CONTEXT)]
        raise CheckpointError(
            f"{source.where} is no model that is known here: {', '.join(found)}; known: {names(MODELS)}"
        )
    if model.unet is None:
        loaded = names(m for m in MODELS if m.unet is not None)
        raise CheckpointError(
            f"{source.where} is {model.name}, not supported yet by this version, which loads {loaded}"
        )
    return model


def fits(shape: tuple[int, ...] | None, telling: tuple[int | None, ...]) -> bool:
    return shape is not None and len(shape) == len(telling) and all(t in (None, n) for n, t in zip(shape, telling))


def names(models: Any) -> str:
    return ", ".join(model.name for model in models)


def from_folder(path: Path, vae: Path | None, dtype: torch.dtype | None) -> tuple[dict[str, Plan], dict[str, Any]]:
    if not (path / "model_index.json").is_file():
        files = ", ".join(sorted(file.name for file in path.glob("*.safetensors")))
        hint = f"; it has {files}: give one of them" if files else ""
        raise CheckpointError(f"{path} is not a diffusers folder: it has no model_index.json{hint}")
    ...
