"""From the text in a picture's file back to the command that makes the picture."""

import argparse
import hashlib
import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import ldm
from ldm.parameters import is_ours, name_of, parse, split
from ldm.samplers import SAMPLERS

WHOLE = 1 << 26  # bytes: larger files are models, of which a fingerprint takes samples
INPUTS = ("image", "mask", "model", "vae", "refiner")
REPEATED = ("lora", "embedding")
# Fields that tell about the picture and are no options.
TOLD = {"size", "model_name", "refiner_name", "version", "torch", "files", "batch_pos"}
TOLD |= {"inpaint_area", "model_hash", "vae_hash", "lora_hashes", "ti_hashes", "hashes"}  # webui's


def fingerprint(path: Path) -> str:
    """The first 10 hexadecimal digits of a sha256 of the file; of a folder, of its safetensors files.

    From 64 MB on, of 64 pieces of 64 kB at even distances and of the size: milliseconds instead of seconds, and
    another model still differs in nearly every piece.
    """
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*.safetensors")) if path.is_dir() else [path]:
        size = file.stat().st_size
        digest.update(str(size).encode())
        with file.open("rb") as f:
            if size < WHOLE:
                digest.update(f.read())
            else:
                for i in range(64):
                    f.seek(i * (size - (1 << 16)) // 63)
                    digest.update(f.read(1 << 16))
    return digest.hexdigest()[:10]


def options_of(a: argparse.Namespace, default: argparse.Namespace) -> dict[str, Any]:
    """What a picture's text has to say beside `ldm.Settings`: options that are not at their default."""
    told = set(ldm.Settings.__dataclass_fields__) - set(INPUTS)
    told |= {"n", "prompt", "prompts", "out", "batch", "output", "force", "quiet", "plan"}
    return {
        key: getattr(a, key) for key, value in vars(default).items() if getattr(a, key) != value and key not in told
    }


def with_files(options: Mapping[str, Any]) -> dict[str, Any]:
    """And what the files among them are now."""
    paths = [options[key] for key in INPUTS if key in options]
    paths += [path for path, _ in options.get("lora", [])] + [path for _, path in options.get("embedding", [])]
    files = {str(path): fingerprint(Path(path)) for path in paths if Path(path).exists()}  # not those on the hub
    return dict(options) | ({"files": files} if files else {})


@dataclass(frozen=True)
class Recipe:
    """argv: of `ldm generate`, without the output. index: which of its `count` pictures. files: {path: fingerprint}.

    made_with: the versions of ldm and torch, None if another program made it. problems: what the picture's text says
    and argv does not.
    """

    argv: list[str]
    index: int
    count: int
    files: dict[str, str]
    made_with: str | None
    problems: list[str]

    def command(self, output: Path) -> str:
        """For a shell, on one line."""
        return " ".join(map(shell_quote, ["ldm", "generate", f"--output={output}", *self.argv]))

    def check_files(self) -> None:
        """Raises ValueError for an input file that is gone, or not what it was."""
        for path, was in self.files.items():
            if not Path(path).exists():
                raise ValueError(
                    f"{path} does not exist here: the picture was made from it; put it back, or go to the folder from"
                    " which that name leads to it"
                )
            if (now := fingerprint(Path(path))) != was:
                raise ValueError(f"{path} has changed since the picture was made from it: sha256 {was} then, {now} now")


def made_with(version: object, torch_version: object) -> str:
    return f"{version}, torch {torch_version}"


def here() -> str:
    return made_with(f"ldm {ldm.__version__}", torch.__version__)


def shell_quote(word: str) -> str:
    """As shlex, but line breaks and the like as bash and zsh write them, $'\\n'."""
    if not any(ord(c) < 32 or ord(c) == 127 for c in word):
        return shlex.quote(word)
    escapes = {"\\": "\\\\", "'": "\\'", "\n": "\\n", "\t": "\\t", "\r": "\\r"}
    return (
        "$'"
        + "".join(escapes.get(c) or (f"\\x{ord(c):02x}" if ord(c) < 32 or ord(c) == 127 else c) for c in word)
        + "'"
    )


def spelled(key: str, value: Any, action: argparse.Action) -> list[str]:
    """A value as words of the command line. Raises ValueError for one that the option does not take."""
    if isinstance(action, argparse.BooleanOptionalAction):
        return [option for option in action.option_strings if option.startswith("--no-") != value][:1]
    if action.nargs == 0:
        return [action.option_strings[0]] if value == action.const else []
    if isinstance(value, Tensor):  # sigmas
        value = ",".join(map(repr, value.tolist()))
    if isinstance(value, tuple) and key in ("seed", "subseed"):
        value = ",".join(map(str, value))
    if isinstance(value, tuple) and action.nargs is None and key not in REPEATED:
        raise ValueError("a list, which only Python can give")
    option = max(action.option_strings, key=len)
    if key == "lora":
        words = [[f"{path}:{scale!r}"] for path, scale in value]
    elif key == "embedding":
        words = [[path if word is None else f"{word}={path}"] for word, path in value]
    elif key in ("sampler_options", "guidance_options") and isinstance(value, dict) and value:
        words = [[f"{name}={json.dumps(part)}" for name, part in value.items()]]
    elif action.nargs is None:
        words = [["off" if value is None else str(value)]]
    else:
        words = [[str(part) for part in value]]
    for word in chain(*words):
        if action.choices is not None and word not in action.choices:
            raise ValueError(f"not among {', '.join(action.choices)}")
        if callable(action.type):
            action.type(word)
    # A word that begins with a hyphen would be taken for an option.
    return [*chain(*([f"{option}={w[0]}"] if len(w) == 1 and w[0].startswith("-") else [option, *w] for w in words))]


def is_texts(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) > 0 and all(isinstance(text, str) for text in value)


def recipe(text: str, parser: argparse.ArgumentParser) -> Recipe:
    """What makes a picture again. parser: of `ldm generate`'s arguments."""
    values, listed = parse(text), split(text)[2]
    ours, problems, argv = is_ours(listed), [], []
    actions = {action.dest: action for action in parser._actions}
    actions["batch_size"] = actions["n"]
    for key, value in values.items():
        name = name_of(key)
        said = listed.get(name, value)
        if key in TOLD or key == "prompt" or (key in actions and value == actions[key].default):
            continue
        if key not in actions:
            problems.append(f"{name}: {said} (this version has no such option)")
        elif isinstance(value, str) and value.startswith("<") and value.endswith(">"):
            problems.append(f"{name}: {said} (given from Python, which no text holds)")
        elif key == "sampler" and value not in SAMPLERS:
            problems.append(f"{name}: {said} (not among {', '.join(SAMPLERS)})")
        elif not ours and key in INPUTS:
            problems.append(f"{name}: {said} (where it is here is for you to say, --{key} FILE)")
        else:
            try:
                argv += spelled(key, value, actions[key])
            except (TypeError, ValueError, argparse.ArgumentTypeError) as error:
                problems.append(f"{name}: {said} ({error})")
    prompt, index, count = values["prompt"], values.get("batch_pos", 0), values.get("batch_size", 1)
    if isinstance(values.get("seed"), tuple) and count == 1:  # a picture for each
        count = len(values["seed"])
    prompts = [prompt] if isinstance(prompt, str) else list(prompt) if is_texts(prompt) else [split(text)[0]]
    count = count * len(prompts) if isinstance(count, int) else count
    if not (isinstance(index, int) and isinstance(count, int) and 0 <= index < count):
        problems.append(f"Batch pos: {index} (not in a batch of {count})")
        index, count = 0, 1
    if not ours:
        if "Model" in listed:
            problems.append(f"Model: {listed['Model']} (where it is here is for you to say, --model FILE)")
        if "strength" in values and "enlarge" not in values:
            problems.append("the picture it started from (not in the text, --image FILE)")
        if any(key in values for key in ("mask_blur", "masked_content", "padding_mask_crop")):
            problems.append("its mask (not in the text, --mask FILE)")
        if "<lora:" in prompts[0]:
            problems.append("<lora:...> in the prompt (given here as --lora FILE:SCALE)")
    files = values.get("files")
    return Recipe(
        [*argv, "--", *prompts] if any(prompt.startswith("-") for prompt in prompts) else [*prompts, *argv],
        index,
        count,
        files if isinstance(files, dict) else {},
        made_with(values["version"], values.get("torch")) if ours else None,
        problems,
    )
