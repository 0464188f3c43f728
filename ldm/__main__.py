"""The command line: `ldm "a red heart" -o heart.png` is short for `ldm generate "a red heart" -o heart.png`."""

import argparse
import sys
from collections import Counter
from dataclasses import fields, replace
from itertools import chain, count
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ldm.checkpoint import CheckpointError
from ldm.convert import convert
from ldm.image import save_png
from ldm.inspection import inspect
from ldm.parameters import parameters
from ldm.pipeline import Pipeline
from ldm.samplers import PREDICTION_TYPES, SAMPLERS, SPACINGS
from ldm.settings import CHOICES, Settings
from ldm.verify import HEADER, line, matches, verify

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def save(image: Image.Image, file: Path, text: str) -> Path:
    """Save as `file` if that is free, else as heart-2.png, heart-3.png, ...: nobody's picture is written over."""
    for name in chain([file], (file.with_stem(f"{file.stem}-{i}") for i in count(2))):
        try:
            name.touch(exist_ok=False)  # ours from here on, whoever else looks for a name
            break
        except FileExistsError:
            continue
    try:
        save_png(image, name, text)
    except BaseException:
        name.unlink()
        raise
    return name


def open_image(option: str, file: Path | None) -> Image.Image | None:
    try:
        return None if file is None else Image.open(file)
    except OSError as error:
        raise ValueError(f"{option} {file}: {error.strerror or 'not an image that Pillow can read'}") from error


def scaled(text: str) -> tuple[Path, float]:
    """FILE or FILE:SCALE. A file whose own name ends like a scale is one."""
    file, _, scale = text.rpartition(":")
    try:
        return (Path(file), float(scale)) if file and not Path(text).exists() else (Path(text), 1.0)
    except ValueError:
        return Path(text), 1.0


def worded(text: str) -> tuple[str | None, Path]:
    """FILE or WORD=FILE."""
    word, _, file = text.rpartition("=")
    return (word, Path(file)) if word and not Path(text).exists() else (None, Path(text))


def seeds(text: str) -> int | list[int]:
    """N or N,N,..."""
    numbers = [int(number) for number in text.split(",")]
    return numbers if "," in text else numbers[0]


def generate(a: argparse.Namespace) -> None:
    """Make pictures from a prompt, and perhaps from a picture."""
    if a.output.suffix.lower() != ".png":
        raise ValueError(f"output {a.output}: give a name that ends in .png")
    if not a.output.resolve().parent.is_dir():
        raise ValueError(f"output {a.output}: the folder {a.output.resolve().parent} does not exist, make it first")
    settings = Settings(
        a.prompt,
        negative_prompt=a.negative_prompt,
        steps=a.steps,
        guidance_scale=a.guidance_scale,
        sampler=a.sampler,
        sigmas=a.sigmas,
        seed=a.seed,
        subseed=a.subseed,
        subseed_strength=a.subseed_strength,
        seed_resize_from=a.seed_resize_from,
        batch_size=a.n,
        width=a.width,
        height=a.height,
        tiling=a.tiling,
        clip_skip=a.clip_skip,
        image=open_image("--image", a.image),
        strength=a.strength,
        strength_rule=a.strength_rule,
        mask=open_image("--mask", a.mask),
        mask_blur=a.mask_blur,
        masked_content=a.masked_content,
        blend=a.blend,
        paste_back=a.paste_back,
        padding_mask_crop=a.padding_mask_crop,
        extend=a.extend,
        extend_fill=a.extend_fill,
        enlarge=a.enlarge,
        enlarge_filter=a.enlarge_filter,
        tile=a.tile,
        tile_overlap=a.tile_overlap,
        eta=a.eta,
        guidance_rescale=a.guidance_rescale,
        original_size=a.original_size,
        crops_coords_top_left=a.crops_coords_top_left,
        target_size=a.target_size,
        aesthetic_score=a.aesthetic_score,
        negative_aesthetic_score=a.negative_aesthetic_score,
        refiner_start=a.refiner_start,
        emphasis=None if a.emphasis == "off" else a.emphasis,
    )
    where: dict[str, Any] = {"dtype": DTYPES[a.dtype], "device": a.device}
    if a.vae_dtype is not None:
        where["vae_dtype"] = DTYPES[a.vae_dtype]
    own: dict[str, Any] = {"vae": a.vae, "prediction_type": a.prediction_type, "revision": a.revision}
    pipe = Pipeline.from_pretrained(a.model, **own, **where)
    for file, scale in a.lora:
        pipe.load_lora(file, scale)
    if a.refiner is not None:
        settings = replace(settings, refiner=Pipeline.from_pretrained(a.refiner, **where))
    for word, file in a.embedding:
        for reader in (pipe, settings.refiner):
            if reader is not None:
                reader.load_embedding(file, word)
    extra = {} if a.dtype == "float32" else {"Precision": a.dtype}
    files = {"VAE": a.vae, "Init image": a.image, "Mask": a.mask}
    extra |= {key: Path(file).name for key, file in files.items() if file}
    extra |= {"Lora": ", ".join(f"{file.stem}: {scale:g}" for file, scale in a.lora)} if a.lora else {}
    extra |= {"TI": ", ".join(word or file.stem for word, file in a.embedding)} if a.embedding else {}
    extra |= {"Revision": a.revision} if a.revision else {}
    extra |= {"Prediction type": a.prediction_type} if a.prediction_type else {}
    out = pipe.run(settings, progress=not a.quiet)
    for i, image in enumerate(out.images):
        print(save(image, a.output, parameters(settings, i, image.size, pipe.name, extra)))


def inspect_(a: argparse.Namespace) -> None:
    """Say what a file or folder is, without loading it: a model, a VAE, a LoRA, an embedding, ..."""
    bad = False
    for i, path in enumerate(a.paths):
        try:
            said = str(inspect(path))
        except CheckpointError as error:
            bad, said = True, f"{'path':<12}{path}\n{'problem':<12}{error}"
        print("\n" * (i > 0) + said)
    if bad:
        sys.exit(1)


def convert_(a: argparse.Namespace) -> None:
    """Write a model as a single file (a name that ends in .safetensors) or as a diffusers folder (any other name), or
    a pickle's tensors as a safetensors file."""
    convert(a.source, a.target, None if a.dtype is None else DTYPES[a.dtype], a.prediction_type)
    print(a.target)


def verify_(a: argparse.Namespace) -> None:
    """Rerun published reference outputs on a model's own weights, and say whose outputs they give."""
    rows, results = verify(a.model, a.inputs, a.device), []
    print(line(*HEADER))
    for result in rows:
        print(result, flush=True)
        results.append(result)
    for weights in dict.fromkeys(result.weights for result in results):
        count = Counter(result.passed for result in results if result.weights == weights)
        print(f"{weights}: {count[True]} passed, {count[False]} failed, {count[None]} not run")
    names = matches(results)
    if not names:
        sys.exit("ldm: of no weights could rows be run and all passed")
    print(f"these weights give the outputs recorded from {' and '.join(names)}")


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="ldm", description=__doc__, epilog="`ldm VERB --help` lists a verb's arguments")
    verbs = top.add_subparsers(dest="verb", required=True)
    for function, arguments in VERBS.items():
        p = verbs.add_parser(function.__name__.rstrip("_"), description=function.__doc__, help=function.__doc__)
        p.set_defaults(function=function)
        arguments(p)
    return top


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


def choice(name: str) -> dict[str, Any]:
    """argparse's options for a setting that is one of a few words."""
    default = {field.name: field.default for field in fields(Settings)}[name]
    return {"choices": CHOICES[name], "default": default}


def generate_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("prompt", help="what to draw")
    p.add_argument(
        "-o", "--output", type=Path, default=Path("out.png"), help="PNG file; a number is added if it exists"
    )
    p.add_argument("-n", type=int, default=1, metavar="COUNT", help="pictures, with seeds SEED, SEED+1, ...")
    p.add_argument("--negative-prompt", metavar="TEXT", help="what to keep away from")
    p.add_argument("--steps", type=int, default=20, help="evaluations of the net, 1 to 1000 (default 20)")
    p.add_argument("--guidance-scale", type=float, default=7.5, metavar="S", help="1 is no guidance (default 7.5)")
    p.add_argument("--sampler", default="euler", metavar="NAME", help=f"{', '.join(SAMPLERS)} (default euler)")
    p.add_argument("--sigmas", choices=SPACINGS, help="how the steps are spaced (default: as the sampler's reference)")
    p.add_argument("--eta", type=float, default=0.0, help="share of fresh noise in ddim, 0 to 1 (default 0)")
    p.add_argument(
        "--guidance-rescale", type=float, default=0.0, metavar="R", help="tame strong guidance, 0 to 1 (default 0)"
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
    p.add_argument("--clip-skip", type=int, default=1, metavar="N", help="1 is the last layer, no cut (default 1)")
    p.add_argument(
        "--emphasis", choices=["mean", "none", "off"], default="mean", help="of (word:1.3); off: brackets are text"
    )
    p.add_argument("--image", type=Path, metavar="FILE", help="the picture to start from")
    p.add_argument("--strength", type=float, default=0.75, help="0 keeps the image, 1 replaces it (default 0.75)")
    p.add_argument("--strength-rule", **choice("strength_rule"), help="how steps are counted (default floor)")
    p.add_argument("--mask", type=Path, metavar="FILE", help="white where the image is to be repainted")
    p.add_argument("--mask-blur", type=float, default=0.0, metavar="PIXELS", help="soften its edges (default 0)")
    p.add_argument("--masked-content", **choice("masked_content"), help="what the run starts from under the mask")
    p.add_argument("--blend", **choice("blend"), help="how the kept part enters the loop: webui's x0, diffusers' noise")
    p.add_argument(
        "--paste-back", action=argparse.BooleanOptionalAction, default=True, help="keep the image bit for bit outside"
    )
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
    p.add_argument("--quiet", action="store_true", help="no progress bar")


VERBS = {
    generate: generate_arguments,
    inspect_: inspect_arguments,
    convert_: convert_arguments,
    verify_: verify_arguments,
}


def main(argv: list[str] | None = None) -> None:
    argv = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if argv[0] not in {function.__name__.rstrip("_") for function in VERBS} | {"-h", "--help"}:
        argv = ["generate", *argv]
    a = parser().parse_args(argv)
    try:
        a.function(a)
    except (ValueError, FloatingPointError, OSError, RuntimeError) as error:
        sys.exit(f"ldm: error: {error}")
    except KeyboardInterrupt:
        sys.exit("ldm: stopped, nothing more was written")


if __name__ == "__main__":
    main()
