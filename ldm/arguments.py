"""The options of the command line, verb by verb, and the words that they take."""

import argparse
import json
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from ldm.conventions import CONVENTIONS
from ldm.guidance import GUIDANCES
from ldm.image import FORMATS, QUALITY
from ldm.samplers import PREDICTION_TYPES, SAMPLERS, SPACINGS
from ldm.settings import CHOICES, Settings

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TRACES = (".html", ".safetensors", ".png", ".svg", ".pdf")


def number_of_bytes(text: str) -> int:
    """200000, 200k or 0.2M: thousands and millions."""
    number = re.fullmatch(r"(\d+\.?\d*|\.\d+)([kKM]?)B?", text)
    if number is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of bytes: give 200000, 200k or 0.2M")
    return round(float(number[1]) * {"": 1, "k": 1000, "M": 1000000}[number[2].replace("K", "k")])


def scaled(text: str) -> tuple[Path, float]:
    """FILE or FILE:SCALE. A file whose own name ends like a scale is one."""
    file, _, scale = text.rpartition(":")
    try:
        return (Path(file), float(scale)) if file and not Path(text).exists() else (Path(text), 1.0)
    except ValueError:
        return Path(text), 1.0


def worded(text: str) -> tuple[str | None, Path]:
    """FILE or WORD=FILE."""
    word, _, file = text.partition("=")
    return (word, Path(file)) if word and not Path(text).exists() else (None, Path(text))


def option(text: str) -> tuple[str, Any]:
    """NAME=VALUE, a number or a word."""
    name, _, value = text.partition("=")
    if not name or not value:
        raise argparse.ArgumentTypeError(f"{text!r}: give NAME=VALUE")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text}: give a whole number from 1")
    return number


def spacing(text: str) -> str | tuple[float, ...]:
    """A name, or N,N,..."""
    if text in SPACINGS:
        return text
    try:
        return tuple(float(number) for number in text.split(","))
    except ValueError:
        names = ", ".join(SPACINGS)
        raise argparse.ArgumentTypeError(f"{text!r} is not among {names}, and no list of sigmas, 14,5,1,0") from None


def seeds(text: str) -> int | list[int]:
    """N or N,N,..."""
    numbers = [int(number) for number in text.split(",")]
    return numbers if "," in text else numbers[0]


def generate_parser() -> argparse.ArgumentParser:
    """Of what follows `ldm generate`."""
    p = argparse.ArgumentParser(prog="ldm generate")
    generate_arguments(p)
    return p


def inspect_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("paths", type=Path, nargs="+", metavar="path", help="a safetensors file or a diffusers folder")


def convert_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("source", type=Path, help="a single file, a diffusers folder, or a pickle (.ckpt, .pt, .bin)")
    p.add_argument("target", type=Path, help="what to write; it must not exist yet")
    p.add_argument("--dtype", choices=DTYPES, help="of the weights (default: as they are)")
    p.add_argument("--prediction-type", choices=PREDICTION_TYPES, help="where the model does not say")


def verify_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("model", type=Path, nargs="?", help="a .safetensors file or a folder (default: emoji-64)")
    p.add_argument("--inputs", type=Path, metavar="FOLDER", help="with the files that rows ask for, by their names")
    p.add_argument("--device", help="cpu, cuda, ... (default: a GPU where there is one)")


def info_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("file", type=Path, help="a picture")


def replay_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("file", type=Path, help="a picture that ldm made")
    p.add_argument("-o", "--output", type=Path, help="default: FILE's name with a number")
    p.add_argument("--force", action="store_true", help="write over the output if it exists, though never over FILE")
    p.add_argument("--quiet", action="store_true", help="no progress bar")


def trace_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("prompt", nargs="+", help="what to draw, as in `ldm generate`; or a file, see above")
    p.add_argument(
        "-o",
        "--output",
        type=Path,
        default=Path("run.html"),
        help=f"a name that ends in {', '.join(TRACES)} (default run.html); a number is added if it exists",
    )
    p.add_argument("--force", action="store_true", help="write over the output if it exists")
    p.add_argument(
        "--beside", type=Path, metavar="FILE", help="a second one on the page, which shows the first picture of each"
    )
    settings_arguments(p)
    p.add_argument("--quiet", action="store_true", help="no progress bar")


def compare_arguments(p: argparse.ArgumentParser) -> None:
    for name in "ab":
        p.add_argument(name, type=Path, help="a trace (.safetensors), or a picture that ldm made, which is run again")
    p.add_argument("--quiet", action="store_true", help="no progress bar")


def choice(name: str) -> dict[str, Any]:
    """argparse's options for a setting that is one of a few words."""
    default = {field.name: field.default for field in fields(Settings)}[name]
    return {"choices": CHOICES[name], "default": default}


def generate_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("prompt", nargs="*", help="what to draw; several, each in quotes: a picture for each")
    p.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help="a list of many: .txt, a prompt on each line, or .jsonl, on each line an object with a prompt and other"
        " settings by their names in Python, for which the options are the defaults",
    )
    p.add_argument("--out", type=Path, metavar="FOLDER", help="for their pictures; those that are there are not made")
    p.add_argument("--batch", type=positive, default=1, metavar="N", help="up to so many at a time (default 1)")
    p.add_argument(
        "--threads",
        type=positive,
        metavar="N",
        help="of this process; rounding depends on it (default with --prompts: 1)",
    )
    p.add_argument(
        "-o",
        "--output",
        type=Path,
        default=Path("out.png"),
        help=f"a name that ends in {', '.join(FORMATS)}; a number is added if it exists",
    )
    p.add_argument("--force", action="store_true", help="write over the output if it exists")
    p.add_argument("--quality", type=int, metavar="Q", help=f"of JPEG, WebP, AVIF: 1 to 100 (default {QUALITY})")
    p.add_argument(
        "--max-bytes", type=number_of_bytes, metavar="SIZE", help="the best quality that fits, e.g. 200k for 200,000"
    )
    settings_arguments(p)
    p.add_argument("--plan", action="store_true", help="say what --strength means here, and draw nothing")
    p.add_argument("--quiet", action="store_true", help="no progress bar")


def settings_arguments(p: argparse.ArgumentParser) -> None:
    """What a run is made of."""
    p.add_argument("-n", type=int, default=1, metavar="COUNT", help="pictures, with seeds SEED, SEED+1, ...")
    p.add_argument("--negative-prompt", metavar="TEXT", help="what to keep away from")
    p.add_argument("--steps", type=int, default=20, help="evaluations of the net, 1 to 1000 (default 20)")
    p.add_argument("--guidance-scale", type=float, default=7.5, metavar="S", help="1 is no guidance (default 7.5)")
    p.add_argument("--sampler", default="euler", metavar="NAME", help=f"{', '.join(SAMPLERS)} (default euler)")
    p.add_argument(
        "--sigmas",
        type=spacing,
        metavar="NAME",
        help=f"how the steps are spaced: {', '.join(SPACINGS)}, or the levels themselves, 14,5,1,0 (default: as the"
        " sampler's reference)",
    )
    p.add_argument("--eta", type=float, help="share of fresh noise, 0 to 1 (default: the sampler's own)")
    p.add_argument(
        "--sampler-options", type=option, nargs="+", metavar="NAME=VALUE", help="its further arguments, s_churn=10"
    )
    p.add_argument("--guidance", choices=GUIDANCES, default="cfg", help="how the two predictions become one")
    p.add_argument(
        "--guidance-options", type=option, nargs="+", metavar="NAME=VALUE", help="its further arguments, eta=0.5"
    )
    p.add_argument(
        "--guidance-interval", type=float, nargs=2, metavar=("LOW", "HIGH"), help="guide only between these sigmas"
    )
    p.add_argument(
        "--guidance-rescale", type=float, default=0.0, metavar="R", help="tame strong guidance, 0 to 1 (default 0)"
    )
    p.add_argument("--deep-cache", type=int, default=1, metavar="N", help="every Nth evaluation is whole (default 1)")
    p.add_argument(
        "--token-merging",
        type=float,
        default=0.0,
        metavar="R",
        help="share of tokens left out, 0 to 0.75 (default 0)",
    )
    p.add_argument("--seed", type=seeds, default=0, metavar="N[,N]", help="one, or one for each picture (default 0)")
    p.add_argument("--subseed", type=seeds, metavar="N[,N]", help="of the noise that the seed's is turned to")
    p.add_argument("--subseed-strength", type=float, default=0.0, metavar="S", help="how far, 0 to 1 (default 0)")
    p.add_argument(
        "--seed-resize-from", type=int, nargs=2, metavar=("W", "H"), help="noise of this size, in the middle"
    )
    p.add_argument("--width", type=int, metavar="PIXELS", help="default: the image's, or the model's own")
    p.add_argument("--height", type=int, metavar="PIXELS", help="default: the image's, or the model's own")
    p.add_argument("--tiling", choices=["x", "y", "both"], help="opposite edges match")
    p.add_argument("--clip-skip", type=int, metavar="N", help="1 is the last layer, no cut (default)")
    p.add_argument(
        "--emphasis", choices=["mean", "none", "off"], default="default", help="of (word:1.3); off: brackets are text"
    )
    p.add_argument("--conventions", choices=CONVENTIONS, help="start, draw, count and round as they do")
    p.add_argument("--image", type=Path, metavar="FILE", help="the picture to start from")
    p.add_argument("--strength", type=float, default=0.75, help="0 keeps the image, 1 replaces it (default 0.75)")
    p.add_argument("--strength-rule", **choice("strength_rule"), help="how steps are counted (default floor)")
    p.add_argument("--mask", type=Path, metavar="FILE", help="white where the image is to be repainted")
    p.add_argument("--mask-blur", type=float, default=0.0, metavar="PIXELS", help="soften its edges (default 0)")
    p.add_argument("--masked-content", **choice("masked_content"), help="what the run starts from under the mask")
    p.add_argument("--blend", **choice("blend"), help="how the kept part enters the loop: webui's x0, diffusers' noise")
    p.add_argument("--paste-back", action=argparse.BooleanOptionalAction, help="keep the image bit for bit outside")
    p.add_argument(
        "--padding-mask-crop", type=int, metavar="PIXELS", help="inpaint a box around the mask, with padding"
    )
    sides = ("LEFT", "TOP", "RIGHT", "BOTTOM")
    p.add_argument("--extend", type=int, nargs=4, metavar=sides, help="outpaint: pixels to add on each side")
    p.add_argument("--extend-fill", **choice("extend_fill"), help="what is painted over (default edge)")
    p.add_argument("--enlarge", type=float, default=1.0, metavar="FACTOR", help="then redraw it at --strength, larger")
    p.add_argument("--enlarge-filter", **choice("enlarge_filter"), help="by which it is enlarged (default latent)")
    p.add_argument("--tile", type=int, metavar="PIXELS", help="do a large image in tiles of this side")
    p.add_argument("--tile-overlap", type=int, metavar="PIXELS", help="of two tiles (default: a quarter)")
    p.add_argument("--model", help="a .safetensors file, a folder, or OWNER/NAME on the hub (default: emoji-64)")
    p.add_argument("--revision", help="of a model on the hub: a branch, tag or commit (default: main)")
    p.add_argument("--vae", metavar="MODEL", help="a VAE that replaces the model's own")
    many: dict[str, Any] = {"action": "append", "default": []}
    p.add_argument("--lora", type=scaled, **many, metavar="FILE[:SCALE]", help="change the weights by it; repeatable")
    p.add_argument(
        "--embedding",
        type=worded,
        **many,
        metavar="[WORD=]FILE",
        help="a textual inversion; repeatable",
    )
    p.add_argument("--refiner", metavar="MODEL", help="a model that does the last steps, as SDXL's refiner")
    p.add_argument("--refiner-start", type=float, default=0.8, metavar="SHARE", help="where it begins (default 0.8)")
    pair: dict[str, Any] = {"type": int, "nargs": 2}
    p.add_argument("--original-size", **pair, metavar=("H", "W"), help="SDXL's size conditioning")
    p.add_argument("--crops-coords-top-left", **pair, default=(0, 0), metavar=("TOP", "LEFT"), help="SDXL's")
    p.add_argument("--target-size", **pair, metavar=("H", "W"), help="SDXL's")
    p.add_argument("--aesthetic-score", type=float, default=6.0, metavar="S", help="SDXL refiner's (default 6)")
    p.add_argument("--negative-aesthetic-score", type=float, default=2.5, metavar="S", help="default 2.5")
    p.add_argument("--dtype", choices=DTYPES, default="float32", help="of the nets (default float32)")
    p.add_argument("--vae-dtype", choices=DTYPES, help="of the VAE (default: as --dtype, but float32 for SDXL's)")
    p.add_argument("--device", help="cpu, cuda, ... (default: a GPU where there is one)")
    p.add_argument("--prediction-type", choices=PREDICTION_TYPES, help="where the model does not say")
