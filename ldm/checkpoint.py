"""Opens a model: an official single file or a diffusers folder, strictly, offline and without a copy of the weights.

Every parameter of ours asks for exactly one tensor. What is missing, has another shape, or is left over is an error.
"""

import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import reduce
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import ldm.clip.keys
import ldm.unet.keys
import ldm.vae.keys
from ldm import folder, hub, models
from ldm.clip import TextConfig, TextEncoder
from ldm.clip.tokenizer import END, Tokenizer
from ldm.mapped import hand_back_all
from ldm.models import CONTEXT, CONV_IN, SDXL, Model, identify
from ldm.source import FLOATS, CheckpointError, Source, in_dtype, is_file
from ldm.unet import VECTOR_NUMBERS, UNet
from ldm.vae import VAE, TinyConfig, TinyVAE, VAEConfig

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


NETS: dict[str, tuple[type[nn.Module], Callable[[Any, str], tuple[str, ...]]]] = {
    "unet": (UNet, ldm.unet.keys.spellings),
    "vae": (VAE, ldm.vae.keys.spellings),
    "text_encoder": (TextEncoder, ldm.clip.keys.spellings),
    "text_encoder_2": (TextEncoder, ldm.clip.keys.spellings),
}

COPIED = 2**28  # bytes of a file that at most are held beside what was made of them

# Flags by which fine-tuned models say how they were trained; and where that is not on Stable Diffusion's own schedule.
FLAGS: dict[str, dict[str, Any]] = {
    "v_pred": {"prediction_type": "v_prediction"},
    "ztsnr": {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
}
UNFIT_FLAGS = {"edm_.*": "trained on EDM's noise levels, with a scaling of its own"}

# Tensors of which some models have no use: the projection of the pooled text, the layer that SD 2 leaves out, and flags
# beside a scheduler_config.json.
UNUSED = re.compile(
    r"v_pred|ztsnr|(.*\.)?text_projection(\.weight|\.T)?|cond_stage_model\.model\.transformer\.resblocks\.23\..*"
)

# SD 2 with epsilon and with v have the same shapes. This bias is larger in those with v (so webui tells them apart).
TELLS_V = "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias"
GUESS = "a guess"

# The first tensor of a TAESD's decoder.
TINY = "decoder.layers.0.weight"

# Where the text encoders of official files stand. Each has a place of its own, see Model.prefixes.
TEXT_PREFIXES = ("cond_stage_model.", "conditioner.")


@dataclass
class Opened:
    """A file or folder whose headers and configs were read; no weights yet."""

    name: str  # of the kind of model: "SD 1.x"
    model: Model
    sources: dict[str, Source]  # by part
    tokenizers: Callable[[], dict[str, Tokenizer | None]]
    prediction_from: str  # what says how the net predicts


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
    vae: a VAE file, folder or name that takes the place of the built-in one, which then need not be there; or a TAESD
    in diffusers' layout.
    dtype: None keeps the file's own; on the CPU the weights then are the mapped file itself.
    vae_dtype: None is `dtype`, but float32 instead of float16 for a VAE that overflows in it, as SDXL's does.
    prediction_type: None is what the file says, or a guess where it does not, with a warning.
    Raises CheckpointError, a ValueError, for anything that is not exactly a model that this version knows.
    """
    if revision is not None and not hub.is_name(path):
        raise ValueError(f"revision={revision!r}: only a model of the Hugging Face hub has one, and {path} is a path")
    for given in (path, vae):  # before anything is fetched
        if given is not None and not hub.is_name(given):
            existing(given)
    if vae is not None:
        vae = hub.fetch_vae(vae, dtype) if hub.is_name(vae) else Path(vae)
    path = hub.fetch_model(path, revision, dtype, vae is None) if hub.is_name(path) else Path(path)
    opened = open_model(path, vae is None, dtype, prediction_type)
    model, sources, tokenizers = opened.model, opened.sources, opened.tokenizers()
    warn_of_guess(opened, path)
    if vae is not None:
        if vae.is_dir():
            folder.read_json(vae / "config.json")  # what any other folder lacks is told first
        sources["vae"] = folder.weights(vae, dtype) if vae.is_dir() else Source(vae, [vae])
        model = replace(model, vae=vae_config(vae, sources["vae"], model.vae))
    check_widths(model, path)
    plans = make_plans(model, sources)
    check(plans, path)
    dtypes = dict.fromkeys(NETS, dtype)
    if vae_dtype is not None or (dtype == torch.float16 and model.vae.upcast):
        dtypes["vae"] = vae_dtype or torch.float32
    nets: dict[str, Any] = dict.fromkeys(NETS)
    for part, plan in plans.items():
        nets[part] = plan.fill(dtypes[part], torch.device(device))
        if part != "unet":  # each has its hour, while the UNet is at work most of the time
            hand_back_all(nets[part])
    return Parts(
        **(nets | tokenizers),
        scheduler=dict(model.scheduler),
        size=model.size,
        zero_negative=model.zero_negative,
    )


def vae_config(path: Path, source: Source, own: VAEConfig) -> VAEConfig:
    """Of a VAE by itself. own: the config of the one that it replaces."""
    if len(shape := source.shapes.get(TINY, ())) == 4:
        return folder.tiny_config(path, shape)
    return folder.vae_config(path, own.upcast) if path.is_dir() else own


def warn_of_guess(opened: Opened, path: Path) -> None:
    if opened.prediction_from.startswith(GUESS):
        warnings.warn(
            f"{path} does not say whether it predicts epsilon or v. It is taken for"
            f" {opened.model.scheduler['prediction_type']}: {opened.prediction_from}. To be sure, give"
            " prediction_type='epsilon' or 'v_prediction'",
            stacklevel=4,
        )


def existing(path: str | Path) -> Path:
    """Raises CheckpointError where there is nothing, or nothing that may be looked at."""
    try:
        Path(path).stat()
        (Path(path) / "model_index.json").exists()  # an error for a folder that may not be looked into
    except FileNotFoundError as error:
        what = "is a link to nothing" if Path(path).is_symlink() else "does not exist"
        raise CheckpointError(f"{path} {what}. (A model of the Hugging Face hub is the str owner/name)") from error
    except (OSError, ValueError) as error:  # ValueError: no path has a null character
        raise CheckpointError(f"{path} cannot be opened: {error}") from error
    return Path(path)


def open_model(
    path: Path,
    own_vae: bool = True,
    dtype: torch.dtype | None = None,
    prediction_type: str | None = None,
    source: Source | None = None,
) -> Opened:
    """What the headers and the configs of an existing file or folder say. For the arguments see `load`.

    source: the file's, where its header has been read already.
    """
    if path.is_dir():
        opened = open_folder(path, own_vae, lambda part: folder.weights(path / part, dtype))
    else:
        source = source or Source(path, [path])
        if "model_index.json" in source.metadata:
            opened = open_folder(folder.Embedded(source.metadata, path), own_vae, lambda part: source)
        else:
            opened = open_official(source, prediction_type)
        if not own_vae:
            source.drop(ldm.vae.keys.PREFIX)
    if prediction_type is not None:
        opened.prediction_from = "as it was asked to"
        scheduler = {**opened.model.scheduler, "prediction_type": prediction_type}
        opened.model = replace(opened.model, scheduler=scheduler)
    return opened


def open_official(source: Source, prediction_type: str | None) -> Opened:
    """A single file, of which the tensors alone say what it is."""
    finding = identify(source.shapes)
    if finding.model is None:
        loaded = ", ".join(name for name, _, model in models.OFFICIAL if model is not None)
        found = ", ".join(f"{name} {shape}" for name, shape in finding.why.items())
        if finding.kind == "model":
            raise CheckpointError(f"{source.where} is {finding.name} ({found}): this version loads {loaded} alone")
        if finding.kind != "unknown":
            raise CheckpointError(f"{source.where} is {finding.name} ({found}): {finding.advice}")
        found = ", ".join(f"{name} is {source.shapes.get(name, 'missing')}" for name in (CONV_IN, CONTEXT))
        raise CheckpointError(f"{source.where} is no known model: {found}. Known are {loaded}")
    model, said = finding.model, f"as every {finding.name} does"
    scheduler = dict(model.scheduler)
    # Fine-tuned models say by flags how they were trained.
    flags = [name for name in FLAGS if source.shapes.pop(name, None) is not None]
    for pattern, trained in UNFIT_FLAGS.items():
        if unfit := [name for name in source.shapes if re.fullmatch(pattern, name)]:
            raise CheckpointError(
                f"{source.where} has the flag {unfit[0]}: it was {trained}. This version only runs Stable Diffusion's"
                " own schedule, from which such a model makes other pictures: load a model without the flag"
            )
    for flag in flags:
        scheduler |= FLAGS[flag]
    if prediction_type is not None:
        scheduler["prediction_type"] = prediction_type
    elif "v_pred" in flags:
        said = "the tensor v_pred says so"
    elif (  # without it, or with another size or dtype, the file is damaged, and will be refused
        finding.name == "SD 2.x"
        and 1 < prod(source.shapes.get(TELLS_V, ())) <= 320
        and source.dtypes[TELLS_V] in FLOATS
    ):
        spread = source[TELLS_V].float().std().item()
        scheduler["prediction_type"] = "v_prediction" if spread > 0.09 else "epsilon"
        said = f"{GUESS}, from a bias that spreads by {spread:.3f} (v: above 0.09)"
    # Of SD 2, the models with v are those of 768 pixels.
    size = 768 if finding.name == "SD 2.x" and scheduler["prediction_type"] == "v_prediction" else model.size
    model = replace(model, scheduler=scheduler, size=size)
    parts = [part for part in NETS if getattr(model, part) is not None]

    def tokenizers() -> dict[str, Tokenizer | None]:
        first, second = official_tokenizer(model.text_encoder), official_tokenizer(model.text_encoder_2)
        return {"tokenizer": first, "tokenizer_2": second}

    return Opened(finding.name, model, dict.fromkeys(parts, source), tokenizers, said)


def official_tokenizer(text: TextConfig | None) -> Tokenizer | None:
    """OpenAI's encoders (quick_gelu) pad with the end token, OpenCLIP's with "!", the token 0."""
    return None if text is None else Tokenizer.official(END if text.activation == "quick_gelu" else "!")


def open_folder(files: Path | folder.Embedded, own_vae: bool, weights: Callable[[str], Source]) -> Opened:
    """A diffusers folder, or a single file with the JSON files of one in its metadata. weights: of a part, by name."""
    index = folder.read_index(files)
    xl = index["_class_name"] in folder.XL_PIPELINES
    has_vae = own_vae or is_file(files / "vae" / "config.json")
    vae = folder.vae_config(files / "vae", xl) if has_vae else SDXL.vae if xl else VAEConfig()
    texts = {
        part: folder.text_config(files / part, xl, projects=part == "text_encoder_2")
        for part in (["text_encoder", "text_encoder_2"] if xl else ["text_encoder"])
        if index.get(part) != [None, None]
    }
    model = Model(
        unet=folder.unet_config(files / "unet"),
        vae=vae,
        text_encoder=texts.get("text_encoder"),
        scheduler=folder.scheduler(files / "scheduler"),
        size=folder.sample_size(files / "unet") * vae.factor,
        text_encoder_2=texts.get("text_encoder_2"),
        zero_negative=xl and bool(index.get("force_zeros_for_empty_prompt", True)),
    )

    def tokenizers() -> dict[str, Tokenizer | None]:
        names = {part: part.replace("text_encoder", "tokenizer") for part in texts}
        made = {name: folder.tokenizer(files / name, texts[part]) for part, name in names.items()}
        return {"tokenizer": None, "tokenizer_2": None, **made}

    sources = {part: weights(part) for part in ["unet", *texts, *(["vae"] if own_vae else [])]}
    name = next((name for name, _, row in models.OFFICIAL if row and row.unet == model.unet), index["_class_name"])
    return Opened(name, model, sources, tokenizers, "scheduler_config.json says so")


def make_plans(model: Model, sources: Mapping[str, Source]) -> dict[str, "Plan"]:
    return {
        part: Plan(net, config, sources[part], names, model.prefixes[part])
        for part, (net, names) in NETS.items()
        if (config := getattr(model, part)) is not None
    }


class Plan:
    """A net, still without values, and the tensor that each of its parameters will be."""

    def __init__(
        self,
        net: type[nn.Module],
        config: Any,
        source: Source,
        spellings: Callable[[Any, str], tuple[str, ...]],
        prefix: str,
    ):
        with NoValues(), torch.device("meta"):
            self.net = TinyVAE(config) if isinstance(config, TinyConfig) else net(config)
        self.source = source
        self.shapes = {name: tuple(p.shape) for name, p in self.net.state_dict().items()}
        layouts = list(zip(*(spellings(config, name) for name in self.shapes), strict=True))
        self.official = next(layout for layout in layouts if layout[0].startswith(prefix))
        found = max(
            (layout for layout in layouts if layout[0].startswith(prefix) or not layout[0].startswith(TEXT_PREFIXES)),
            key=lambda layout: sum(name in source.shapes for name in layout),
        )
        self.theirs = dict(zip(self.shapes, found, strict=True))
        self.found = sum(name in source.shapes for name in found)  # tensors that are there

    def tensors(self, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """By our names, in our shapes, in `dtype` or with the bits of the file.

        Raises CheckpointError for a value that is no number, or none in that dtype.
        """
        source, tensors, copied = self.source, {}, 0
        for ours, theirs in self.theirs.items():
            stored = source[theirs]
            tensors[ours] = in_dtype(stored.reshape(self.shapes[ours]), dtype, theirs, source.where)
            copied += stored.nbytes if tensors[ours].dtype != stored.dtype else 0
            if copied > COPIED:  # else the whole file and its copy are in memory together
                source.release()
                copied = 0
        return tensors

    def fill(self, dtype: torch.dtype | None, device: torch.device) -> nn.Module:
        """The net with its values. Without a dtype it keeps that of its tensors, or of the widest if they differ."""
        tensors = self.tensors(dtype)
        widest = reduce(torch.promote_types, {tensor.dtype for tensor in tensors.values()})
        self.net.load_state_dict({name: t.to(device, widest) for name, t in tensors.items()}, assign=True)
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
    if problems := find_problems(plans):
        raise CheckpointError(f"{path} does not fit:" + "".join(listing(k, v) for k, v in problems.items()))


def find_problems(plans: Mapping[str, Plan]) -> dict[str, list[str]]:
    """What is wrong, by the kind of it."""
    missing, misshapen, unfit, unknown = [], [], [], []
    for part, plan in plans.items():
        source = plan.source
        if not plan.found:
            hint = ": give one with vae=" if part == "vae" else ""
            missing.append(f"there is no {part} at all in {source.where}{hint}")
            continue
        for ours, theirs in plan.theirs.items():
            shape, found = plan.shapes[ours], source.shapes.get(theirs)
            if found is None:
                missing.append(f"{part} {ours} {shape}: no {theirs} in {source.where}")
            elif found not in (shape, (*shape, 1, 1)):  # the official VAE writes its attention's matrices as 1x1 conv
                misshapen.append(f"{part} {ours} {shape}: {theirs} is {found}")
            elif source.dtypes[theirs] not in FLOATS:
                unfit.append(f"{theirs} is {source.dtypes[theirs]}")
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
    return {kind: lines for kind, lines in problems.items() if lines}


def listing(kind: str, lines: list[str]) -> str:
    rest = [f"and {len(lines) - 5} more"] if len(lines) > 5 else []
    return f"\n{len(lines)} {kind}:" + "".join(f"\n  {line[:500]}" for line in lines[:5] + rest)
