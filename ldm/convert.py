"""Writes a model in the other layout, or in another dtype: official single file and diffusers folder, both ways.

A single file that is written here has the folder's JSON and tokenizer files in its metadata, under their paths: so it
loads as what the folder was, though its tensors do not say how the model predicts, or which tokenizer it wants.
"""

import json
import pickle
import re
import zipfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm import folder
from ldm.checkpoint import NETS, Plan, check, check_widths, existing, make_plans, open_model, warn_of_guess
from ldm.clip.tokenizer import Tokenizer
from ldm.models import Model
from ldm.save import as_json, folder_texts, tokenizer_texts, write_file, write_folder
from ldm.source import IGNORED, LONGEST_HEADER, CheckpointError, Source, in_dtype, is_pickle

# The text files of a diffusers folder that matter here.
TEXTS = re.compile(
    r"model_index\.json|(unet|vae|text_encoder|text_encoder_2)/config\.json|scheduler/scheduler_config\.json"
    r"|tokenizer(_2)?/(vocab\.json|merges\.txt|tokenizer\.json|tokenizer_config\.json|special_tokens_map\.json)"
)
# What PyTorch Lightning left in official .ckpt files beside the tensors: read as something empty instead.
LEFT_BEHIND = (
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    "numpy.dtype",
)
# What safetensors has.
DTYPES = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
)


def convert(
    source: str | Path,
    target: str | Path,
    dtype: torch.dtype | None = None,
    prediction_type: str | None = None,
    nets: Mapping[str, Mapping[str, Tensor]] | None = None,
    scheduler: Mapping[str, Any] | None = None,
) -> None:
    """Write `source`, an official single file or a diffusers folder, to `target`: a name that ends in .safetensors is a
    single file, any other a folder. The nets' tensors alone: EMA copies and buffers are left out.

    dtype: of the weights, None keeps every tensor's own and its bits. prediction_type: as in `from_pretrained`.
    nets: tensors of unet, vae, text_encoder or text_encoder_2 by our names, which take the place of the source's in
    `dtype`, else in the dtype of the source's. scheduler: fields of scheduler_config.json that become others.
    A pickle becomes a safetensors file of all its tensors; it is read by `torch.load(weights_only=True)`, which runs no
    code of the file's. `target` must not exist, and is there as a whole or not at all. Raises CheckpointError for a
    source that is no model, FileExistsError.
    """
    source, target = existing(source), Path(target)
    if target.exists():
        raise FileExistsError(f"{target} exists: remove it, or give another name")
    if not target.resolve().parent.is_dir():
        raise FileNotFoundError(f"{target}: the folder {target.resolve().parent} does not exist, make it first")
    single = target.suffix == ".safetensors"
    if source.is_file() and is_pickle(source):
        if not single:
            raise ValueError(f"{target}: {source} is a pickle, convert it to a name that ends in .safetensors first")
        tensors = unpickle(source)
        if dtype is not None:
            tensors = {name: cast(name, tensor, dtype, source) for name, tensor in tensors.items()}
        write_file(target, tensors, {"format": "pt"})
        return
    opened = open_model(source, prediction_type=prediction_type)
    warn_of_guess(opened, source)
    fields = scheduler or {}
    model = replace(opened.model, scheduler={**opened.model.scheduler, **fields})
    check_widths(model, source)
    plans = make_plans(model, opened.sources)
    check(plans, source)
    values = {part: plan.tensors(dtype) for part, plan in plans.items()}
    for part, net in (nets or {}).items():
        values[part] = {name: net[name].to("cpu", tensor.dtype) for name, tensor in values[part].items()}
    metadata = {} if source.is_dir() else opened.sources["unet"].metadata
    texts = texts_of(source, metadata)
    tokenizers = opened.tokenizers()
    if "model_index.json" not in texts:
        texts = folder_texts(model, tokenizers)
    else:
        texts["model_index.json"] = index_of_carried(texts["model_index.json"])
        if prediction_type is not None:
            texts["scheduler/scheduler_config.json"] = as_json(model.scheduler)
        elif fields:
            own = json.loads(texts["scheduler/scheduler_config.json"])
            texts["scheduler/scheduler_config.json"] = as_json(own | fields)
    if single:
        named = [official(plans[part], tensors) for part, tensors in values.items()]
        others = {name: text for name, text in metadata.items() if not TEXTS.fullmatch(name)}
        write_file(
            target,
            {name: tensor for part in named for name, tensor in part.items()} | flags(model, opened.sources["unet"]),
            {"format": "pt", **others, **single_texts(texts, tokenizers)},
        )
    else:
        write_folder(target, values, texts)


def texts_of(source: Path, metadata: Mapping[str, str]) -> dict[str, str]:
    """The text files of a folder, or of the folder that a single file once was, by their paths."""
    files = {file.relative_to(source).as_posix(): file for file in source.glob("*/*") if file.is_file()}
    files |= {file.name: file for file in source.glob("model_index.json")}
    texts = {name: folder.read_text(file) for name, file in files.items() if TEXTS.fullmatch(name)}
    return texts | {name: text for name, text in metadata.items() if TEXTS.fullmatch(name)}


def index_of_carried(text: str) -> str:
    """A model_index.json that names no part which is left behind: diffusers would look for it."""
    index = json.loads(text)
    carried = (*NETS, "tokenizer", "tokenizer_2", "scheduler")
    left = [part for part, kind in index.items() if isinstance(kind, list) and any(kind) and part not in carried]
    index |= {part: [None, None] for part in left}
    if "safety_checker" in left:
        index["requires_safety_checker"] = False
    return as_json(index) if left else text


def single_texts(texts: Mapping[str, str], tokenizers: Mapping[str, Tokenizer | None]) -> dict[str, str]:
    """The texts that fit in a header: without tokenizer.json, of 3.6 MB with CLIP's own tokens, for which vocab.json
    and merges.txt stand; and with these as short as they can be where the folder's own do not fit."""
    short = {
        f"{part}/{name}": text
        for part, tokenizer in tokenizers.items()
        if tokenizer is not None
        for name, text in tokenizer_texts(tokenizer).items()
        if name in ("vocab.json", "merges.txt")
    }
    kept = {name: text for name, text in texts.items() if not name.endswith("tokenizer.json")}
    length = len(json.dumps(kept, ensure_ascii=False).encode())
    fits = short.keys() <= kept.keys() and length < LONGEST_HEADER - 1_000_000  # SDXL's tensors take 0.3 million
    return kept if fits else kept | short


def flags(model: Model, source: Source) -> dict[str, Tensor]:
    """The empty tensors by which other programs know how a model predicts, and on which schedule.

    They know SD 2 by a guess from its weights, and its files have no v_pred unless they came with one.
    """
    sd2 = model.text_encoder_2 is None and model.text_encoder is not None and model.text_encoder.activation == "gelu"
    says = {
        "v_pred": model.scheduler["prediction_type"] == "v_prediction" and (not sd2 or "v_pred" in source.stored),
        "ztsnr": model.scheduler.get("rescale_betas_zero_snr"),
    }
    return {name: torch.zeros(0) for name, said in says.items() if said}


def official(plan: Plan, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors under the names, and in the shapes, of the official single files."""
    named = {}
    for tensor, layout in zip(tensors.values(), plan.official, strict=True):
        # The VAE's attention is made of 1x1 convolutions there.
        named[layout] = tensor[..., None, None] if ".mid.attn_1." in layout and tensor.ndim == 2 else tensor
    for name in [name for name in named if name.endswith(".q")]:
        stacked = name.removesuffix(".q")
        named[stacked] = torch.cat([named.pop(f"{stacked}.{part}") for part in "qkv"])
    for name in [name for name in named if name.endswith(".text_projection.T")]:
        named[name.removesuffix(".T")] = named.pop(name).T
    return named


# Pickles


class Empty:
    """Stands for `LEFT_BEHIND`: takes what it is given, and keeps and does nothing."""

    def __init__(self, *arguments: object):
        pass

    def __setstate__(self, state: object) -> None:
        pass


def unpickle(path: Path) -> dict[str, Tensor]:
    """The tensors of a .ckpt, .pt or .bin file, by name; those of a textual inversion as webui's safetensors has them.

    Raises CheckpointError for a file with anything but data in it, or with tensors that safetensors does not have.
    """
    if path.stat().st_size == 0:
        raise CheckpointError(f"{path} is empty (0 bytes): download or copy it again")
    try:
        with torch.serialization.safe_globals([(Empty, name) for name in LEFT_BEHIND]):
            loaded = torch.load(path, "cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))  # torch's sentence goes on with how to run it all the same
        why = f"it asks for {found[1]}" if found else "it is damaged, or asks for more"
        raise CheckpointError(
            f"{path} is no pickle of tensors alone: {why}."
            " Nothing of it was run, and it is not converted: get the model as a safetensors file"
        ) from error
    except Exception as error:  # of a damaged pickle anything can come, from RuntimeError to KeyError
        why = re.split(r"\. |\n", str(error))[0].rstrip(".") or "it ends too early"
        raise CheckpointError(
            f"{path} is damaged, or no pickle of PyTorch's: {why}; download or copy it again"
        ) from error
    if isinstance(loaded, Mapping):
        loaded = loaded.get("state_dict", loaded)
    if isinstance(loaded, Mapping) and isinstance(words := loaded.get("string_to_param"), Mapping):
        loaded = dict(zip(["emb_params"], words.values(), strict=False))
    tensors, seen = {}, set()
    for name, value in loaded.items() if isinstance(loaded, Mapping) else []:
        if isinstance(name, str) and isinstance(value, Tensor):
            check_storable(name, value, path)
            shared = value.untyped_storage().data_ptr() in seen  # safetensors has no tensors that share memory
            tensors[name] = value.detach().clone() if shared else value.detach()
            seen.add(value.untyped_storage().data_ptr())
    if not tensors:
        raise CheckpointError(f"{path} has no tensors by name in it: accepted are state dicts and textual inversions")
    return tensors


def check_storable(name: str, tensor: Tensor, path: Path) -> None:
    """Raises CheckpointError for what safetensors cannot hold."""
    if name == "__metadata__" or name.encode(errors="replace").decode() != name:
        raise CheckpointError(f"{path}: a tensor has the name {name!r}, which no safetensors file can have")
    dense = tensor.layout is torch.strided and not tensor.is_nested and tensor.device.type == "cpu"
    if not dense or tensor.dtype not in DTYPES:
        raise CheckpointError(
            f"{path}: {name} is {tensor.dtype}, {tensor.layout} on {tensor.device}; accepted are dense tensors with"
            f" values, of {', '.join(str(dtype).removeprefix('torch.') for dtype in DTYPES)}"
        )


def cast(name: str, tensor: Tensor, dtype: torch.dtype, path: Path) -> Tensor:
    """Floats in another dtype; the buffers that no net needs may overflow in it."""
    if not tensor.is_floating_point():
        return tensor
    return tensor.to(dtype) if IGNORED.fullmatch(name) else in_dtype(tensor, dtype, name, path)
