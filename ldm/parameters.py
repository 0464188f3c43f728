"""The text in a picture's file that says how it was made, laid out as webui does for its many readers.

    a red heart
    Negative prompt: blurry
    Steps: 20, Sampler: euler, CFG scale: 7.5, Seed: 0, Size: 64x64, Model: emoji-64, Version: ldm 0.1.0, Torch: 2.13.0

Whatever is not at its default has a field there: a setting of `ldm.Settings`, or an option of the command line that is
none. webui's names and values where it has one, else the key's own name, and values that are no plain words as JSON, in
which a float comes back as it was. So `parse` gives back what `parameters` wrote.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from types import NoneType
from typing import Any

import numpy as np
import torch
from torch import Tensor

import ldm
from ldm.guidance import GUIDANCES
from ldm.image import open_picture, read_text
from ldm.samplers import ALIASES, SPACED
from ldm.settings import LISTS, Settings

# Our keys under webui's names. Any other key is written with spaces and a capital.
NAMES = {
    "guidance_scale": "CFG scale",
    "guidance_rescale": "CFG rescale",
    "token_merging": "Token merging ratio",
    "strength": "Denoising strength",
    "subseed": "Variation seed",
    "subseed_strength": "Variation seed strength",
    "refiner_start": "Refiner switch at",
    "image": "Init image",
    "vae": "VAE",
    "embedding": "TI",
    "dtype": "Precision",
    "vae_dtype": "VAE precision",
    # The name is for readers of all kinds, the path for us.
    "model_name": "Model",
    "model": "Model path",
    "refiner_name": "Refiner",
    "refiner": "Refiner path",
    # The spacing's name; sigmas that are a tensor are written as Sigmas.
    "spacing": "Schedule type",
}
KEYS = {name: key for key, name in NAMES.items()}
# webui's words for ours
VALUES: dict[str, dict[Any, str]] = {"emphasis": {"none": "No norm", None: "None"}, "tiling": {"both": "True"}}
# What webui's pictures say.
SPACINGS = {"Automatic": None, "Uniform": "linspace", "KL Optimal": "kl_optimal", "SGM Uniform": "sgm_uniform"}
SPACINGS |= {name.capitalize(): name for name in ("karras", "exponential", "polyexponential", "simple", "beta")}
# webui's keys of what has another name here, and its words.
UPSCALERS = {"Latent": "latent", "Latent (nearest-exact)": "latent-nearest", "Latent (bicubic)": "latent-bicubic"}
CONTENTS = {"latent noise": "noise", "latent nothing": "nothing"}
WEBUI: dict[str, tuple[str, dict[str, str]]] = {
    "hires_upscale": ("enlarge", {}),
    "hires_upscaler": ("enlarge_filter", UPSCALERS | {"Lanczos": "lanczos", "Nearest": "nearest"}),
    "masked_area_padding": ("padding_mask_crop", {}),
    "masked_content": ("masked_content", CONTENTS),
}
FIELD = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])*"|[^,]*)(?:,|$)')


def name_of(key: str) -> str:
    return NAMES.get(key, key[:1].upper() + key[1:].replace("_", " "))


def key_of(name: str) -> str:
    return KEYS.get(name, name[:1].lower() + name[1:].replace(" ", "_"))


def is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def plain(value: Any) -> Any:
    """What JSON has no form for: numpy's numbers as Python's, paths as texts. What no text holds is named only."""
    if isinstance(value, Path):
        return str(value)
    return value.item() if isinstance(value, np.generic) else f"<{type(value).__name__}>"


def quote(text: str) -> str:
    """webui's rule, a value that holds a separator is written as a JSON string; and one that would be trimmed."""
    needed = any(c in text for c in ',:\n"') or text != text.strip() or not text
    return json.dumps(text, ensure_ascii=False) if needed else text


def write(key: str, value: Any) -> str:
    """A value as it stands after its name."""
    if key in VALUES and value in VALUES[key]:
        return VALUES[key][value]
    if key == "seed_resize_from":  # as webui's sizes
        return "{}x{}".format(*value)
    if not isinstance(value, (str, int, float, tuple, list, dict, NoneType)):
        value = plain(value)
    if isinstance(value, str) and not is_json(value):
        return quote(value)
    return quote(json.dumps(value, ensure_ascii=False, default=plain))


def unwrap(value: Any) -> Any:
    return tuple(map(unwrap, value)) if isinstance(value, list) else value


def read_value(key: str, text: str) -> Any:
    """The inverse of `write`, of a text without webui's quotes. JSON's arrays are tuples."""
    for value, word in VALUES.get(key, {}).items():
        if text == word:
            return value
    if key == "seed_resize_from" and (side := re.fullmatch(r"(\d+)x(\d+)", text)):
        return tuple(map(int, side.groups()))
    return unwrap(json.loads(text)) if is_json(text) else text


def parameters(
    settings: Settings, index: int, size: tuple[int, int], model: str, options: Mapping[str, Any] | None = None
) -> str:
    """What picture `index` of a call was made from. size: its (width, height) in pixels. model: the name of the model.

    options: what else the call was given, by the names of the command line's options; paths take the place of pictures
    and pipelines.
    """
    s = settings
    values = {
        "steps": len(s.sigmas) - 1 if isinstance(s.sigmas, Tensor) else s.steps,
        "sampler": s.sampler_name,
        "guidance_scale": s.guidance_scale,
        "seed": s.seeds[index],
        "size": f"{size[0]}x{size[1]}",
        "model_name": model,
    }
    for field in fields(s):
        value = getattr(s, field.name)
        default = value is field.default or (isinstance(value, (str, int, float, tuple)) and value == field.default)
        if not default and field.name not in (*values, "prompt", "negative_prompt"):
            values[field.name] = value
    if "guidance" in values:  # of a function that is not ours the name alone would be taken for ours
        name = s.guidance_name
        values["guidance"] = name if GUIDANCES.get(name) is s.guidance_function else f"<{name.strip('<>')}>"
    if isinstance(s.sigmas, str):
        values["spacing"] = values.pop("sigmas")
    elif s.sigmas is not None:
        values["sigmas"] = s.sigmas.tolist()
    values.pop("strength", None)
    if s.image is not None or s.latents is not None or s.enlarge > 1:
        values["strength"] = s.strength
    if s.refiner is not None:
        values |= {"refiner_name": s.refiner.name, "refiner_start": s.refiner_start}
    if s.count > 1:
        values["batch_pos"] = index
    if isinstance(s.seed, LISTS) and s.count > 1:
        values["seeds"] = s.seeds
    if s.subseed is not None:
        values["subseed"] = s.subseeds[index]
    if isinstance(s.subseed, LISTS) and s.count > 1:
        values["subseeds"] = s.subseeds
    head = s.texts[index]
    if s.negative_prompt is not None:
        head += f"\nNegative prompt: {s.negative_texts[index]}"
    if split_head(head) != (s.prompt, s.negative_prompt):  # lists, and texts that look like a negative prompt
        values |= {"prompts": s.prompt, "negative_prompts": s.negative_prompt}
    values |= options or {}
    values |= {"version": f"ldm {ldm.__version__}", "torch": torch.__version__}
    return f"{head}\n" + ", ".join(f"{name_of(key)}: {write(key, value)}" for key, value in values.items())


def split_head(head: str) -> tuple[str, str | None]:
    """The prompt and the negative prompt."""
    prompt, found, negative = f"\n{head}".partition("\nNegative prompt:")
    return prompt[1:], negative.removeprefix(" ") if found else None


def split(text: str) -> tuple[str, str | None, dict[str, str]]:
    """Prompt, negative prompt and fields as they stand, without their quotes. By webui's rule the last line has fields
    if it has at least three."""
    head, _, last = text.rstrip().rpartition("\n")
    found = FIELD.findall(last)
    if len(found) < 3:
        return *split_head(text), {}
    quoted = {name: value for name, value in found if value[:1] == '"' and is_json(value)}
    return *split_head(head), {name: json.loads(value) if name in quoted else value for name, value in found}


def is_ours(listed: Mapping[str, str]) -> bool:
    return listed.get("Version", "").startswith("ldm ")


def parse(text: str) -> dict[str, Any]:
    """The settings by their names in `ldm.Settings`, and every other field by its key.

    Of a picture of webui, or another program that writes like it, the size of the picture is the one asked for.
    """
    prompt, negative, listed = split(text)
    values = {key_of(name): read_value(key_of(name), value) for name, value in listed.items()}
    values["prompt"] = values.pop("prompts", prompt)
    negative = values.pop("negative_prompts", negative)
    if negative is not None:
        values["negative_prompt"] = negative
    for key in ("seed", "subseed"):  # the text has the picture's own, the call counts them up, or lists them
        counts = key == "subseed" or not values.get("subseed_strength")
        if f"{key}s" in values:
            values[key] = values.pop(f"{key}s")
        elif counts and isinstance(values.get(key), int) and isinstance(values.get("batch_pos", 0), int):
            values[key] -= values.get("batch_pos", 0)
    if isinstance(values.get("sigmas"), tuple):
        values["sigmas"] = torch.tensor(values["sigmas"], dtype=torch.float64)
    if not is_ours(listed):
        if side := re.fullmatch(r"(\d+)x(\d+)", str(values.get("size"))):
            values["width"], values["height"] = map(int, side.groups())
        name = str(values.get("sampler", ""))
        if name in SPACED:  # as webui wrote it before it had schedule types
            values["sampler"], values["spacing"] = SPACED[name]
        for theirs, (key, words) in WEBUI.items():
            if theirs in values:
                value = values.pop(theirs)
                values[key] = words.get(str(value), value)
    if "spacing" in values:
        spacing = values.pop("spacing")
        values["sigmas"] = SPACINGS.get(str(spacing), spacing)
    if "sampler" in values:
        values["sampler"] = ALIASES.get(str(values["sampler"]), values["sampler"])
    return values


def read(file: Path) -> str:
    """The text that a picture carries. Raises ValueError for a file that is no picture, or a picture without one."""
    text = read_text(open_picture(file))
    if text is None:
        raise ValueError(f"{file}: the picture carries no settings, neither a PNG text nor an EXIF comment")
    return text
