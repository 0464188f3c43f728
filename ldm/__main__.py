"""The command line: `ldm "a red heart" -o heart.png` is short for `ldm generate "a red heart" -o heart.png`."""

import argparse
import os
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ldm.arguments import (
    DTYPES,
    TRACES,
    compare_arguments,
    convert_arguments,
    generate_arguments,
    generate_parser,
    info_arguments,
    inspect_arguments,
    replay_arguments,
    trace_arguments,
    verify_arguments,
)
from ldm.checkpoint import CheckpointError
from ldm.convert import convert
from ldm.image import FORMATS, check_format, encode, open_picture, place, read_record, save, to_rgb
from ldm.inspection import inspect
from ldm.output import Output
from ldm.parameters import read, split
from ldm.pipeline import Pipeline
from ldm.record import Record, mark
from ldm.replay import here, options_of, recipe
from ldm.settings import Settings
from ldm.trace import Trace, record
from ldm.verify import HEADER, line, matches, verify

ABOUT_FILES = ("prompt", "output", "force", "quiet")  # options of `ldm trace` that say nothing about the picture


def open_image(option: str, file: Path | None) -> Image.Image | None:
    try:
        return None if file is None else open_picture(file)
    except ValueError as error:
        raise ValueError(f"{option} {error}") from error


def check_output(a: argparse.Namespace) -> None:
    """What can be known before the work of drawing."""
    format = check_format(a.output, a.quality, a.max_bytes)
    encode(Image.new("RGB", (1, 1)), format, "\n".join([*a.prompt, a.negative_prompt or ""]))  # texts may be too long
    folder = a.output.resolve().parent
    if not folder.is_dir():
        raise ValueError(f"output {a.output}: the folder {folder} does not exist, make it first")
    if not os.access(folder, os.W_OK):
        raise ValueError(f"output {a.output}: the folder {folder} cannot be written to, give another")
    if a.force and a.output.is_dir():
        raise ValueError(f"output {a.output}: it is a folder, give another name")


def given(a: argparse.Namespace) -> dict[str, Any]:
    """The values of `Settings`, but image and mask, which are files, and without refiner."""
    names = {field.name for field in fields(Settings)} & set(vars(a)) - {"prompt", "refiner"}
    values = {name: getattr(a, name) for name in names} | {"batch_size": a.n}
    for name in ("sampler_options", "guidance_options"):
        values[name] = None if values[name] is None else dict(values[name])
    return values | {"emphasis": None if a.emphasis == "off" else a.emphasis}


def prepared(a: argparse.Namespace) -> tuple[Pipeline, Settings]:
    """What `ldm generate` shall run."""
    values = given(a) | {"prompt": a.prompt[0] if len(a.prompt) == 1 else a.prompt}
    values |= {name: open_image(f"--{name}", values[name]) for name in ("image", "mask")}
    if isinstance(values["sigmas"], tuple):
        values["sigmas"] = torch.tensor(values["sigmas"], dtype=torch.float64)
    settings = Settings(**values)
    pipe, refiner = loaded(a)
    return pipe, settings if refiner is None else replace(settings, refiner=refiner)


def loaded(a: argparse.Namespace) -> tuple[Pipeline, Pipeline | None]:
    """The pipeline and the refiner."""
    where: dict[str, Any] = {"dtype": DTYPES[a.dtype], "device": a.device}
    if a.vae_dtype is not None:
        where["vae_dtype"] = DTYPES[a.vae_dtype]
    own: dict[str, Any] = {"vae": a.vae, "prediction_type": a.prediction_type, "revision": a.revision}
    pipe = Pipeline.from_pretrained(a.model, **own, **where)
    for file, scale in a.lora:
        pipe.load_lora(file, scale)
    refiner = None if a.refiner is None else Pipeline.from_pretrained(a.refiner, **where)
    for word, file in a.embedding:
        for reader in (pipe, refiner):
            if reader is not None:
                reader.load_embedding(file, word)
    return pipe, refiner


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """So many for torch; None leaves them as they are."""
    before = torch.get_num_threads()
    torch.set_num_threads(before if count is None else count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def draw(a: argparse.Namespace) -> Output:
    """The pictures of `ldm generate`, which know its options."""
    pipe, settings = prepared(a)
    with threads(a.threads):
        out = pipe.run(settings, progress=not a.quiet)
    return replace(out, options=options_of(a, generate_parser().parse_args([""])))


def generate(a: argparse.Namespace) -> None:
    """Make pictures from a prompt, and perhaps from a picture; or many from a list of prompts."""
    if a.prompts is not None:
        many(a)
        return
    if not a.prompt:
        raise ValueError("no prompt: give one, in quotes, or a list of them with --prompts")
    if a.out is not None or a.batch != 1:
        raise ValueError(
            f"--{'batch' if a.out is None else 'out'} is about a list of --prompts: give one, or leave it out"
        )
    if a.plan:
        pipe, settings = prepared(a)
        print(pipe.plan_strength(**{field.name: getattr(settings, field.name) for field in fields(Settings)}))
        return
    check_output(a)
    for name in draw(a).save(a.output, a.quality, a.max_bytes, a.force):
        print(name)


def many(a: argparse.Namespace) -> None:
    """The pictures of a list. Under torchrun each process makes its share."""
    from ldm.many import LOG, make, read
    from ldm.train import processes

    default = generate_parser().parse_args([])
    single = ("prompt", "output", "force", "quality", "max_bytes", "plan")
    if clash := [name for name in single if getattr(a, name) != getattr(default, name)]:
        raise ValueError(f"--prompts with {clash[0]}, which is about single pictures: leave one of them out")
    if a.out is None:
        raise ValueError("--prompts without --out: give the folder for the pictures")
    if a.prompts.resolve() == (a.out / LOG).resolve():
        raise ValueError(f"{a.prompts}: the record of the pictures has that name, give the list another")
    tasks = read(a.prompts, given(a))
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if torch.cuda.is_available() and a.device is None:  # not run yet: no machine with GPUs was at hand
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    a.threads = a.threads or 1
    pipe, refiner = loaded(a)
    mine = [replace(task, values={**task.values, "refiner": refiner}) for task in tasks[rank::world]]
    idle = (os.cpu_count() or 1) // (a.threads * int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    if pipe.device.type == "cpu" and idle > 1 and rank == 0 and not a.quiet:
        print(
            f"ldm: this leaves cores idle: torchrun --nproc-per-node {os.cpu_count()} -m ldm generate ...",
            file=sys.stderr,
        )
    with threads(a.threads):
        done = make(pipe, mine, a.out, a.batch, options_of(a, default), progress=not a.quiet and rank == 0)
    for failure in done.failed:
        print(f"ldm: failed: {failure}", file=sys.stderr)
    processes.join()  # so that no process ends with an error, by which torchrun ends all, while others are at work
    there, made, failed = map(int, processes.total(done.there, done.made, len(done.failed)))
    if rank == 0:
        print(f"{a.out}: {there} of {len(tasks)} pictures were there, {made} made, {failed} failed")
    if failed:
        sys.exit(1)


def info(a: argparse.Namespace) -> None:
    """Say how a picture was made, of ldm's and of webui's, and the command that makes it again."""
    image, text = open_picture(a.file), read(a.file)
    prompt, negative, listed = split(text)
    made = recipe(text, generate_parser())
    rows = {"file": a.file, "format": f"{image.format}, {image.width}x{image.height}", "prompt": prompt}
    rows |= {"negative prompt": negative} if negative is not None else {}
    for name, value in (rows | listed).items():
        print(f"{name:<24}" + str(value).replace("\n", "\n" + 24 * " "))
    if (ran := read_record(image)) is not None:
        for name, value in Record.parse(ran).rows().items():
            print(f"{name:<24}{value}")
    problems = made.problems
    try:
        made.check_files()
    except ValueError as error:
        problems = [*problems, str(error)]
    for problem in problems:
        print(f"{'not in the command':<24}{problem}")
    if made.count > 1:
        print(f"{'picture':<24}{made.index + 1} of the {made.count} that the command makes")
    output = a.file if a.file.suffix.lower() in FORMATS else Path("out.png")
    print(f"{'command':<24}{made.command(output)}")


def replay(a: argparse.Namespace) -> None:
    """Make a picture again from the settings in its file, bitwise the same on the same machine and versions. Exit code
    1: it is not the same."""
    made = recipe(read(a.file), generate_parser())
    if made.made_with is None:
        raise ValueError(f"{a.file}: not made by ldm; `ldm info {a.file}` prints the command that comes nearest")
    if made.problems:
        raise ValueError(f"{a.file}: no command makes it again: {'; '.join(made.problems)}")
    if made.made_with != here():
        print(f"ldm: warning: made with {made.made_with}, this is {here()}: pixels may differ", file=sys.stderr)
    made.check_files()
    again = generate_parser().parse_args(made.argv)
    again.output, again.force, again.quiet = a.output or a.file, a.force, a.quiet
    if again.output.suffix.lower() != a.file.suffix.lower():  # another format has its own
        again.quality = again.max_bytes = None
    if a.force and again.output.resolve() == a.file.resolve():
        raise ValueError(f"output {again.output}: it is the picture to replay, give another name")
    check_output(again)
    out = draw(again)
    ran = out.records()[made.index]
    how = (again.quality, again.max_bytes, again.force, ran.text())
    saved = save(out.images[made.index], again.output, out.texts()[made.index], *how)
    print(saved)
    pixels, same = to_rgb(open_picture(saved)), to_rgb(open_picture(a.file))
    text = read_record(open_picture(a.file))
    was = None if text is None else Record.parse(text)
    left = None if was is None else was.left_by(ran)
    in_steps = "" if was is None else f", in each of {len(was.marks)} steps"
    if pixels.tobytes() == same.tobytes() and left is None:
        print(f"bitwise the same{in_steps}")
        return
    if was is not None and left is None and saved.suffix.lower() != a.file.suffix.lower():
        print(f"bitwise the same{in_steps}; the pixels of {saved.suffix} and {a.file.suffix} are not compared")
        return
    print(f"ldm: warning: {apart(pixels, same)} of {a.file}", file=sys.stderr)
    if was is not None:
        print(f"{'the run left it':<24}{left or 'after the last step'}", file=sys.stderr)
        for difference in was.differences(ran):
            print(f"{'':<24}{difference}", file=sys.stderr)
    sys.exit(1)


def apart(image: Image.Image, other: Image.Image) -> str:
    """How two pictures differ, in words."""
    if image.size != other.size:
        return "the size is not that"
    values, were = (np.asarray(picture, int) for picture in (image, other))
    distance = np.abs(values - were)
    if not distance.any():
        return "the pixels are, the steps are not those"
    return f"{(distance > 0).mean():.2%} of the pixels' values, by up to {distance.max()} of 255, are not those"


def trace(a: argparse.Namespace) -> None:
    """Make pictures and record how, step by step: as a page, a plot, or a trace to compare. Of such a trace, or of a
    picture that ldm made, show how it was made."""
    kind = a.output.suffix.lower()
    if kind not in TRACES:
        raise ValueError(f"output {a.output}: give a name that ends in {', '.join(TRACES)}")
    if not a.output.resolve().parent.is_dir():
        raise ValueError(f"output {a.output}: the folder {a.output.resolve().parent} does not exist, make it first")
    if a.beside is not None and kind != ".html":
        raise ValueError(f"--beside with the output {a.output}: two traces stand on a page, give a name in .html")
    beside = None if a.beside is None else traced(a.beside, a.quiet)
    decode = None
    if len(a.prompt) == 1 and Path(a.prompt[0]).suffix.lower() in (".safetensors", *FORMATS):
        default = vars(generate_parser().parse_args([])) | {name: getattr(a, name) for name in ABOUT_FILES}
        if said := [name for name in vars(a).keys() & default if vars(a)[name] != default[name]]:
            raise ValueError(f"{a.prompt[0]} says itself how it was made: leave out {', '.join(sorted(said))}")
        made = traced(Path(a.prompt[0]), a.quiet)
    else:
        pipe, settings = prepared(a)
        decode = pipe.decode
        made = record(pipe, settings, a.output if kind == ".safetensors" else None, not a.quiet, a.force)
    if kind == ".html":
        saved = made.to_html(a.output, beside, decode=decode, force=a.force)
    elif kind == ".safetensors":
        saved = made.save(a.output, a.force) if decode is None or made.file is None else made.file
    else:
        figure = made.plot(decode=decode)
        saved = place(a.output, lambda part: figure.savefig(part, format=kind[1:], dpi=110), a.force)
    print(saved)


def traced(file: Path, quiet: bool) -> Trace:
    """A trace, or that of the run which a picture is from. Raises ValueError where its record says it ran otherwise."""
    if file.suffix == ".safetensors":
        return Trace.load(file)
    made = recipe(read(file), generate_parser())
    if made.problems:
        raise ValueError(f"{file}: no command makes it again: {'; '.join(made.problems)}")
    made.check_files()
    again = record(*prepared(generate_parser().parse_args(made.argv)), progress=not quiet).only(made.index)
    text = read_record(open_picture(file))
    was = None if text is None else Record.parse(text)
    for i, step in enumerate(again if was is not None else ()):
        if was is not None and was.marks[i : i + 1] != [mark(step.x[0])]:
            raise ValueError(
                f"{file}: what its settings give here leaves the run that it is from at step {i + 1}; `ldm replay`"
                " says by how much. To compare such runs, trace them: ldm trace ... -o run.safetensors"
            )
    return again


def compare(a: argparse.Namespace) -> None:
    """Say where two runs part, by how much, and which settings differ; of two pictures of the same run, whether their
    pixels are the same. Exit code 0: the same, 1: not, 2: an error."""
    found = traced(a.a, a.quiet).compare(traced(a.b, a.quiet))
    print(found)
    pictures = [to_rgb(open_picture(file)) for file in (a.a, a.b) if file.suffix != ".safetensors"]
    painted = found.equal and len(pictures) == 2 and pictures[0].tobytes() != pictures[1].tobytes()
    if painted:
        print(f"but {apart(*pictures)} of {a.b}")
    if painted or not found.equal:
        sys.exit(1)


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


VERBS = {
    generate: generate_arguments,
    info: info_arguments,
    replay: replay_arguments,
    trace: trace_arguments,
    compare: compare_arguments,
    inspect_: inspect_arguments,
    convert_: convert_arguments,
    verify_: verify_arguments,
}


def main(argv: list[str] | None = None) -> None:
    argv = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if argv[0] == "train":
        from ldm.train.__main__ import main as train  # which needs the extra "train" for some of its verbs

        train(argv[1:])
        return
    if argv[0] not in {function.__name__.rstrip("_") for function in VERBS} | {"-h", "--help"}:
        argv = ["generate", *argv]
    a = parser().parse_args(argv)
    try:
        a.function(a)
    except (ValueError, FloatingPointError, OSError, RuntimeError, MemoryError) as error:
        said = f"ldm: error: {error or 'out of memory: make a smaller picture, or give --tile'}"
        if a.function in (compare, replay):  # where 1 is an answer
            print(said, file=sys.stderr)
            sys.exit(2)
        sys.exit(said)
    except KeyboardInterrupt:
        sys.exit("ldm: stopped, nothing more was written")


if __name__ == "__main__":
    main()
