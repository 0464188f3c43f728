"""Opens a model: an official single file or a diffusers folder, strictly, offline and without a copy of the weights.

Every parameter of ours asks for exactly one tensor. What is missing, has another shape, or is left over is an error.
"""

import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

import ldm.clip.keys
import ldm.unet.keys
import ldm.vae.keys
from ldm import folder, hub
from ldm.clip import TextConfig, TextEncoder
from ldm.clip.tokenizer import END, Tokenizer
from ldm.source import CheckpointError, Source
from ldm.unet import VECTOR_NUMBERS, UNet, UNetConfig
from ldm.vae import VAE, VAEConfig

__all__ = ["CheckpointError", "Parts", "load"]


class Parts(NamedTuple):
    """What a pipeline is made of. The nets are in eval mode and want no gradients."""

    unet: UNet
    vae: VAE
    text_encoder: TextEncoder | None  # SDXL's refiner has the second alone
    tokenizer: Tokenizer | None
    text_encoder_2: TextEncoder | None  # SDXL's OpenCLIP
    tokenizer_2: Tokenizer | None
    scheduler: dict[str, Any]  # the fields of a scheduler_config.json
    size: int  # native side of a picture, in pixels
    zero_negative: bool


@dataclass(frozen=True)
class Model:
    """What the weights do not say. zero_negative: no negative prompt means zeros, not the encoding of an empty text."""

    unet: UNetConfig
    vae: VAEConfig
    text_encoder: TextConfig | None
    scheduler: Mapping[str, Any]
    size: int
    text_encoder_2: TextConfig | None = None
    zero_negative: bool = False


NETS: dict[str, tuple[type[nn.Module], Callable[[Any, str], tuple[str, ...]]]] = {
    "unet": (UNet, ldm.unet.keys.spellings),
    "vae": (VAE, ldm.vae.keys.spellings),
    "text_encoder": (TextEncoder, ldm.clip.keys.spellings),
    "text_encoder_2": (TextEncoder, ldm.clip.keys.spellings),
}

SCHEDULER = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
    "steps_offset": 1,
    "set_alpha_to_one": False,
}
SD1 = Model(UNetConfig(), VAEConfig(), TextConfig(), SCHEDULER, size=512)
SD2 = Model(
    UNetConfig(heads=None, head_width=64, context_width=1024, linear_projection=True),
    VAEConfig(),
    # Of OpenCLIP's ViT-H without its 24th layer: the text is taken before it.
    TextConfig(width=1024, layers=23, heads=16, activation="gelu"),
    SCHEDULER,
    size=512,
)
BIG_G = TextConfig(width=1280, layers=32, heads=20, activation="gelu", skip=1, final_norm=False, projection=1280)
SDXL = Model(
    UNetConfig(
        channels=(320, 640, 1280),
        depth=(0, 2, 10),
        mid_depth=10,
        heads=None,
        head_width=64,
        context_width=768 + 1280,
        linear_projection=True,
        vector_width=1280 + 6 * 256,
    ),
    VAEConfig(scaling_factor=0.13025, upcast=True),
    TextConfig(skip=1, final_norm=False),
    {**SCHEDULER, "timestep_spacing": "leading"},
    size=1024,
    text_encoder_2=BIG_G,
    zero_negative=True,
)
REFINER = Model(
    UNetConfig(
        channels=(384, 768, 1536, 1536),
        depth=(0, 4, 4, 0),
        mid_depth=4,
        heads=None,
        head_width=64,
        context_width=1280,
        linear_projection=True,
        vector_width=1280 + 5 * 256,
    ),
    SDXL.vae,
    None,
    SDXL.scheduler,
    size=1024,
    text_encoder_2=BIG_G,
)


def inpainting(model: Model) -> Model:
    """The same with a UNet that is also shown the mask (1 channel) and the masked picture (4)."""
    return replace(model, unet=replace(model.unet, in_channels=2 * model.vae.latent_channels + 1))


CONV_IN = "model.diffusion_model.input_blocks.0.0.weight"
CONTEXT = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
VECTOR = "model.diffusion_model.label_emb.0.0.weight"
OPEN_CLIP = "conditioner.embedders.{}.model.ln_final.weight"

# The official single files: name, telling tensors with their shapes (None is any extent), and the model, None for one
# that is known but not loaded. The first row whose tensors are all there is it.
OFFICIAL: tuple[tuple[str, Mapping[str, tuple[int | None, ...]], Model | None], ...] = (
    ("SDXL base", {OPEN_CLIP.format(1): (1280,), CONV_IN: (320, 4, 3, 3)}, SDXL),
    ("SDXL inpainting", {OPEN_CLIP.format(1): (1280,), CONV_IN: (320, 9, 3, 3)}, inpainting(SDXL)),
    ("SDXL refiner", {OPEN_CLIP.format(0): (1280,), CONV_IN: (384, 4, 3, 3)}, REFINER),
    ("SD 2.x unCLIP", {CONTEXT: (320, 1024), VECTOR: (None, None)}, None),
    ("SD 2.x x4 upscaler", {CONV_IN: (None, 7, 3, 3)}, None),
    ("SD 2.x depth", {CONTEXT: (320, 1024), CONV_IN: (320, 5, 3, 3)}, None),
    ("SD 2.x inpainting", {CONTEXT: (320, 1024), CONV_IN: (320, 9, 3, 3)}, inpainting(SD2)),
    ("SD 2.x", {CONTEXT: (320, 1024), CONV_IN: (320, 4, 3, 3)}, SD2),
    ("SD 1.x InstructPix2Pix", {CONTEXT: (320, 768), CONV_IN: (320, 8, 3, 3)}, None),
    ("SD 1.x inpainting", {CONTEXT: (320, 768), CONV_IN: (320, 9, 3, 3)}, inpainting(SD1)),
    ("SD 1.x", {CONTEXT: (320, 768), CONV_IN: (320, 4, 3, 3)}, SD1),
)

# What else people give by mistake: a name that only such a file has, and what to do.
NOT_MODELS = {
    r".*lora_.*|.*\.lora\..*": "a LoRA, a change to a model: load the model that it was trained on",
    r"control_model\..*|controlnet_.*": "a ControlNet, an addition to a model: load the model that it was trained on",
    r"(first_stage_model\.)?decoder\.conv_in\.weight": "a VAE alone: load a model, with this file as vae=",
    r"down_blocks\.0\.resnets\..*|(text_model\.)?embeddings\.token_embedding\.weight": (
        "one part of a diffusers folder: give the folder that has model_index.json"
    ),
}

# Flags by which fine-tuned models say how they were trained, where that is not on Stable Diffusion's own schedule.
FLAGS = {"edm_.*": "trained on EDM's noise levels, with a scaling of its own"}

# Tensors of which some models have no use: the projection of the pooled text, the layer that SD 2 leaves out.
UNUSED = re.compile(r"(.*\.)?text_projection(\.weight|\.T)?|cond_stage_model\.model\.transformer\.resblocks\.23\..*")

# SD 2 with epsilon and with v have the same shapes. This bias is larger in those with v (so webui tells them apart).
TELLS_V = "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias"

FLOATS = ("F64", "F32", "F16", "BF16")


def load(
    path: str | Path,
    vae: str | Path | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    vae_dtype: torch.dtype | None = None,
    prediction_type: str | None = None,
    revision: str | None = None,
) -> Parts:
    """Load an official single file (.safetensors), a diffusers folder, or such a folder of the Hugging Face hub.

    path: a str of the form owner/name, where here is no folder owner, is fetched from the hub with huggingface_hub's
    cache; nothing else is ever downloaded. revision: a branch, tag or commit there, main unless given.
    vae: a VAE file, folder or name that takes the place of the built-in one, which then need not be there.
    dtype: None keeps the file's own; on the CPU the weights then are the mapped file itself.
    vae_dtype: None is `dtype`, but float32 instead of float16 for a VAE that overflows in it, as SDXL's does.
    prediction_type: None is what the file says, or a guess where it does not, with a warning.
    Raises CheckpointError, a ValueError, for anything that is not exactly a model that this version knows.
    """
    if revision is not None and not hub.is_name(path):
        raise ValueError(f"revision={revision!r}: only a model of the Hugging Face hub has one, and {path} is a path")
    existing(path)  # before anything is fetched
    if vae is not None:
        existing(vae)
        vae = hub.fetch_vae(vae, dtype) if hub.is_name(vae) else Path(vae)
    path = hub.fetch_model(path, revision, dtype, vae is None) if hub.is_name(path) else Path(path)
    if path.is_dir():
        model, sources, tokenizers = open_folder(path, vae is None, dtype)
    else:
        model, sources, tokenizers = open_file(path, vae is None, prediction_type)
    if vae is not None:
        if vae.is_dir():
            model = replace(model, vae=folder.vae_config(vae, model.vae.upcast))
        sources["vae"] = folder.weights(vae, "diffusion_pytorch_model", dtype) if vae.is_dir() else Source(vae, [vae])
    check_widths(model, path)
    plans = {
        part: Plan(net, config, sources[part], names)
        for part, (net, names) in NETS.items()
        if (config := getattr(model, part)) is not None
    }
    check(plans, path)
    dtypes = dict.fromkeys(NETS, dtype)
    if vae_dtype is not None or (dtype == torch.float16 and model.vae.upcast):
        dtypes["vae"] = vae_dtype or torch.float32
    nets: dict[str, Any] = dict.fromkeys(NETS)
    nets |= {part: plan.fill(dtypes[part], torch.device(device)) for part, plan in plans.items()}
    scheduler = dict(model.scheduler)
    if prediction_type is not None:
        scheduler["prediction_type"] = prediction_type
    return Parts(**(nets | tokenizers), scheduler=scheduler, size=model.size, zero_negative=model.zero_negative)


def existing(path: str | Path) -> None:
    if not hub.is_name(path) and not Path(path).exists():
        raise CheckpointError(f"{path} does not exist. (A model of the Hugging Face hub is the str owner/name)")


Opened = tuple[Model, dict[str, Source], dict[str, Tokenizer | None]]


def open_file(path: Path, own_vae: bool, prediction_type: str | None) -> Opened:
    source = Source(path, [path])
    model = detect(source)
    # Fine-tuned models say by flags how they were trained.
    says_v = source.shapes.pop("v_pred", None) is not None
    zero_snr = source.shapes.pop("ztsnr", None) is not None
    if prediction_type is None and (says_v or (model == SD2 and guess_v(source))):
        prediction_type = "v_prediction"
    if zero_snr:
        changes = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        model = replace(model, scheduler={**model.scheduler, **changes})
    if prediction_type == "v_prediction":
        size = 768 if model.unet == SD2.unet else model.size
        model = replace(model, scheduler={**model.scheduler, "prediction_type": prediction_type}, size=size)
    for pattern, trained in FLAGS.items():
        if flags := [name for name in source.shapes if re.fullmatch(pattern, name)]:
            raise CheckpointError(
                f"{path} has the flag {flags[0]}: it was {trained}. This version only runs Stable Diffusion's own"
                " schedule, from which such a model makes other pictures: load a model without the flag"
            )
    if not own_vae:
        source.drop(ldm.vae.keys.PREFIX)
    tokenizers = {"tokenizer": official_tokenizer(model.text_encoder)}
    tokenizers["tokenizer_2"] = official_tokenizer(model.text_encoder_2)
    return model, dict.fromkeys(NETS, source), tokenizers


def official_tokenizer(text: TextConfig | None) -> Tokenizer | None:
    """OpenAI's encoders (quick_gelu) pad with the end token, OpenCLIP's with "!", the token 0."""
    return None if text is None else Tokenizer.official(END if text.activation == "quick_gelu" else "!")


def guess_v(source: Source) -> bool:
    if TELLS_V not in source.shapes:
        return False  # the file is damaged, and will be refused
    spread = source[TELLS_V].float().std().item()
    v = spread > 0.09
    warnings.warn(
        f"{source.where}: an SD 2 file does not say whether it predicts epsilon or v. It is taken for"
        f" {'v_prediction' if v else 'epsilon'}: a guess, from a bias that spreads by {spread:.3f} (v: above 0.09)."
        " To be sure, give prediction_type='epsilon' or 'v_prediction'",
        stacklevel=5,
    )
    return v


def open_folder(path: Path, own_vae: bool, dtype: torch.dtype | None) -> Opened:
    index = folder.read_index(path)
    xl = index["_class_name"] in folder.XL_PIPELINES
    has_vae = own_vae or (path / "vae" / "config.json").is_file()
    vae = folder.vae_config(path / "vae", xl) if has_vae else SDXL.vae if xl else VAEConfig()
    texts = {
        part: folder.text_config(path / part, xl, projects=part == "text_encoder_2")
        for part in (["text_encoder", "text_encoder_2"] if xl else ["text_encoder"])
        if index.get(part) != [None, None]
    }
    model = Model(
        unet=folder.unet_config(path / "unet"),
        vae=vae,
        text_encoder=texts.get("text_encoder"),
        scheduler=folder.scheduler(path / "scheduler"),
        size=folder.sample_size(path / "unet") * vae.factor,
        text_encoder_2=texts.get("text_encoder_2"),
        zero_negative=xl and bool(index.get("force_zeros_for_empty_prompt", True)),
    )
    stems = {"unet": "diffusion_pytorch_model"} | dict.fromkeys(texts, "model")
    if own_vae:
        stems["vae"] = "diffusion_pytorch_model"
    sources = {part: folder.weights(path / part, stem, dtype) for part, stem in stems.items()}
    tokenizers: dict[str, Tokenizer | None] = {"tokenizer": None, "tokenizer_2": None}
    for part, text in texts.items():
        name = part.replace("text_encoder", "tokenizer")
        tokenizers[name] = folder.tokenizer(path / name, text)
    return model, sources, tokenizers


def detect(source: Source) -> Model:
    for name, tells, model in OFFICIAL:
        if all(fits(source.shapes.get(tensor), shape) for tensor, shape in tells.items()):
            if model is None:
                loaded = ", ".join(name for name, _, model in OFFICIAL if model is not None)
                raise CheckpointError(
                    f"{source.where} is {name}: not supported yet by this version, which has {loaded}"
                )
            return model
    has_unet = any(name.startswith(ldm.unet.keys.PREFIX) for name in source.shapes)
    for pattern, what in NOT_MODELS.items():
        if not has_unet and any(re.fullmatch(pattern, name) for name in source.shapes):
            raise CheckpointError(f"{source.where} is {what}")
    found = ", ".join(f"{name} is {source.shapes.get(name, 'missing')}" for name in (CONV_IN, CONTEXT))
    known = ", ".join(name for name, _, _ in OFFICIAL)
    raise CheckpointError(f"{source.where} is no known model: {found}. Known are {known}")


def fits(shape: tuple[int, ...] | None, telling: tuple[int | None, ...]) -> bool:
    if shape is None or len(shape) != len(telling):
        return False
    return all(told in (None, extent) for extent, told in zip(shape, telling, strict=True))


class Plan:
    """A net, still without values, and the tensor that each of its parameters will be."""

    def __init__(
        self, net: type[nn.Module], config: Any, source: Source, spellings: Callable[[Any, str], tuple[str, ...]]
    ):
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
        kwargs = kwargs or {}
        return kwargs["tensor"] if getattr(func, "__module__", None) == "torch.nn.init" else func(*args, **kwargs)


def check_widths(model: Model, path: Path) -> None:
    unet, latents = model.unet, model.vae.latent_channels
    width = sum(text.width for text in (model.text_encoder, model.text_encoder_2) if text is not None)
    channels = (latents, 2 * latents + 1)
    if unet.in_channels not in channels or (unet.out_channels, unet.context_width) != (latents, width):
        raise CheckpointError(
            f"{path}: the UNet has {unet.in_channels} channels in, {unet.out_channels} out and a context of width"
            f" {unet.context_width}; this version only does the VAE's {latents} in and out, {channels[1]} in for"
            f" inpainting, and the text encoders' width of {width}"
        )
    projection = None if model.text_encoder_2 is None else model.text_encoder_2.projection
    vectors = [None] if projection is None else [projection + count * 256 for count in VECTOR_NUMBERS]
    if unet.vector_width not in vectors:
        raise CheckpointError(
            f"{path}: the UNet wants a vector of width {unet.vector_width}; with these text encoders it must be"
            f" {' or '.join(map(str, vectors))}"
        )


def check(plans: Mapping[str, Plan], path: Path) -> None:
    """Raises CheckpointError, with all that is wrong, unless each parameter has its tensor and each tensor its use."""
    missing, misshapen, unfit, unknown = [], [], [], []
    for part, plan in plans.items():
        source = plan.source
        for ours, theirs in plan.theirs.items():
            shape, found = plan.shapes[ours], source.shapes.get(theirs)
            if found is None:
                missing.append(f"{part} {ours} {shape}: no {theirs} in {source.where}")
            elif found not in (shape, (*shape, 1, 1)):  # the official VAE writes its attention's matrices as 1x1 conv
                misshapen.append(f"{part} {ours} {shape}: {theirs} is {found}")
            elif source.dtypes[theirs] not in FLOATS:
                unfit.append(f"{theirs} is {source.dtypes[theirs]}")
        if not any(theirs in source.shapes for theirs in plan.theirs.values()):
            hint = ": give one with vae=" if part == "vae" else ""
            missing.insert(0, f"there is no {part} at all in {source.where}{hint}")
    for source in {plan.source for plan in plans.values()}:
        asked = {theirs for plan in plans.values() if plan.source is source for theirs in plan.theirs.values()}
        left = [name for name in source.shapes if name not in asked and not UNUSED.fullmatch(name)]
        unknown += [f"{name} {source.shapes[name]}" for name in left]
    problems = {
        "missing": missing,
        "of another shape": misshapen,
        f"of a type other than {', '.join(FLOATS)}": unfit,
        "unknown": unknown,
    }
    if any(problems.values()):
        raise CheckpointError(f"{path} does not fit:" + "".join(listing(k, v) for k, v in problems.items() if v))


def listing(kind: str, lines: list[str]) -> str:
    rest = [f"and {len(lines) - 5} more"] if len(lines) > 5 else []
    return f"\n{len(lines)} {kind}:" + "".join(f"\n  {line}" for line in lines[:5] + rest)
