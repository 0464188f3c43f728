"""Many pictures from a list, into a folder: in batches, by several processes, and on from where they stopped.

A picture has the name of its line in the list, 000012.png (000012-2.png, ... where a line makes several), carries its
settings as any picture of ldm does, and gets that name when all of it is on the disk. `pictures.jsonl` beside them has
a line about each: file, line, prompt, seed, the settings that are not at their defaults, the sha256 of its RGB values,
the seconds it took (null where it was found without such a line); or, where it could not be made, the error.
"""

import hashlib
import json
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

from ldm.canvas import checked_size
from ldm.conditioning import chunks
from ldm.image import encode, open_picture, read_text, take
from ldm.parameters import parameters, plain, split, unwrap
from ldm.pipeline import Pipeline
from ldm.record import Record
from ldm.replay import with_files
from ldm.samplers import dpm_adaptive
from ldm.settings import Settings, check_names
from ldm.together import Alone

LOG = "pictures.jsonl"
PYTHON = ("latents", "noise", "refiner")  # settings that no line can hold
FAILURES = (ValueError, FloatingPointError, RuntimeError, MemoryError)  # of a picture; on a full disk all of them end
HOW = {"Version", "Torch", "Threads", "Device"}  # fields of a picture's text that say how, not what


@dataclass(frozen=True)
class Task:
    """One picture. file: its name. line: in the list, from 1. values: of `Settings`, but image and mask may be files,
    and sigmas a list."""

    file: str
    line: int
    values: Mapping[str, Any]

    def settings(self) -> Settings:
        """Raises ValueError that names the line."""
        values = dict(self.values)
        try:
            for name in ("image", "mask"):
                if isinstance(values.get(name), (str, Path)):
                    values[name] = open_picture(Path(values[name]))
            if isinstance(values.get("sigmas"), tuple):
                values["sigmas"] = torch.tensor(values["sigmas"], dtype=torch.float64)
            return Settings(**values)
        except (TypeError, ValueError) as error:
            raise ValueError(f"line {self.line}: {error}") from error


@dataclass(frozen=True)
class Made:
    """there: pictures that were there already. made: by this call. failed: what could not be made, and why."""

    there: int
    made: int
    failed: list[str]


# ------------------------------------------------------------------------------------------------ the list


def read(file: Path, defaults: Mapping[str, Any]) -> list[Task]:
    """The pictures of a list, all of them checked. `defaults`: values for what a line does not say.

    .txt: a prompt on each line, as it stands (a prompt with a line break needs the other). .jsonl: on each line an
    object whose keys are fields of `ldm.Settings`; image and mask are names of files, sigmas may be a list. Empty lines
    are left out. The seed counts up from picture to picture, as over several prompts of one call, where a line has none
    of its own and the default is no list: under subseed_strength the subseed does. Raises ValueError that names the
    line.
    """
    tasks: list[Task] = []
    for line, own in objects(file):
        values = dict(defaults) | own
        counted = "subseed" if values.get("subseed_strength") else "seed"
        if counted not in own and isinstance(values.get(counted), int):
            values[counted] += len(tasks)
        try:
            check_names(own)
            if given := [name for name in PYTHON if name in own]:
                raise ValueError(f"{given[0]} is nothing that a line can hold: call the pipeline from Python for it")
            for i, s in enumerate(Task("", line, values).settings().each()):
                single = {name: getattr(s, name) for name in ("prompt", "negative_prompt", "seed", "subseed")}
                name = f"{line:06}.png" if i == 0 else f"{line:06}-{i + 1}.png"
                tasks.append(Task(name, line, values | single | {"batch_size": 1}))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{file}, line {line}: {str(error).removeprefix(f'line {line}: ')}") from error
    if not tasks:
        raise ValueError(f"{file} has no prompt in it: give one on each line")
    return tasks


def objects(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """What the lines of a list say, by their numbers."""
    if file.suffix not in (".txt", ".jsonl"):
        raise ValueError(f"{file}: a list of prompts has a name that ends in .txt or .jsonl")
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not in UTF-8: {error}") from error
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        if file.suffix == ".txt":
            yield number, {"prompt": line}
            continue
        try:
            values = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{file}, line {number}: not JSON ({error})") from error
        if not isinstance(values, dict) or "prompt" not in values:
            raise ValueError(f'{file}, line {number}: give an object with a prompt, {{"prompt": "a red heart"}}')
        texts = {name: values.pop(name) for name in ("prompt", "negative_prompt") if name in values}
        yield number, {name: unwrap(value) for name, value in values.items()} | texts


# ------------------------------------------------------------------------------------------------ the folder


class Folder:
    """Where the pictures go. text: what a picture of these settings and (width, height) says."""

    def __init__(self, path: Path, text: Callable[[Task, Settings, tuple[int, int]], str]):
        path.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.text = text
        self.log = path / LOG
        self.known: dict[str, set[str]] = defaultdict(set)  # the sha256 of each file
        for line in self.log.read_bytes().splitlines() if self.log.exists() else []:
            try:
                row = json.loads(line)
                name, sha256 = row["file"], row["sha256"]
            except (ValueError, KeyError, TypeError):  # of a machine that died while it wrote, and failures
                continue
            self.known[name].add(sha256)
        self.damaged: set[str] = set()

    def has(self, task: Task, s: Settings) -> bool:
        """Whether the picture is there, and whole. Raises ValueError for another thing of that name."""
        path = self.path / task.file
        self.part(task).unlink(missing_ok=True)
        if not os.path.lexists(path):
            return False
        try:
            image = open_picture(path)
        except ValueError as error:
            if path.is_file() and task.file in self.known:
                self.damaged.add(task.file)
                return False
            raise ValueError(f"{path} is none of these pictures ({error}): move it, or give another folder") from error
        here, asked = (said(text) for text in (read_text(image), self.text(task, s, image.size)))
        if differing := [name for name in here | asked if here.get(name) != asked.get(name)]:
            name = differing[0]
            raise ValueError(
                f"{path} is not the picture of line {task.line}, {name}: {here.get(name)} there, {asked.get(name)}"
                " asked for; it is not written over: move it, or give another folder"
            )
        if not self.known[task.file]:  # whoever made it died before its line was written
            self.note(task, sha256=digest(image), seconds=None)
        if digest(image) not in self.known[task.file]:
            self.damaged.add(task.file)
        return task.file not in self.damaged

    def save(self, task: Task, s: Settings, image: Image.Image, record: Record, seconds: float) -> None:
        """Raises OSError, with nothing changed, on a full disk, or if somebody else took the name since `has`."""
        path, part = self.path / task.file, self.part(task)
        try:
            with part.open("wb") as f:
                f.write(encode(image, "PNG", self.text(task, s, image.size), record=record.text()))
                f.flush()
                os.fsync(f.fileno())
            if task.file in self.damaged:
                part.replace(path)
            else:
                take(part, path)
        finally:
            part.unlink(missing_ok=True)
        self.note(task, sha256=digest(image), seconds=round(seconds, 3))

    def part(self, task: Task) -> Path:
        return self.path / f".{task.file}.part"

    def note(self, task: Task, **facts: Any) -> None:
        """Adds a line, in one write at the end of the file, wherever other processes have moved that to. (A network
        file system may lose lines of machines that write at the same time: the next run adds them.)"""
        default = {field.name: field.default for field in fields(Settings)}
        rest = {k: v for k, v in task.values.items() if k not in ("prompt", "seed") and v != default[k]}
        row = {"file": task.file, "line": task.line, "prompt": task.values["prompt"], "seed": task.values["seed"]}
        line = json.dumps(row | {"settings": rest} | facts, ensure_ascii=False, default=plain) + "\n"
        with self.log.open("ab+", buffering=0) as f:
            if f.seek(0, os.SEEK_END) and (f.seek(-1, os.SEEK_END), f.read(1))[1] != b"\n":
                line = "\n" + line  # after one that was cut off
            data = line.encode()
            if f.write(data) != len(data):
                raise OSError(f"{self.log} cannot be written to: the disk is full")
        if "sha256" in facts:
            self.known[task.file].add(facts["sha256"])


def said(text: str | None) -> dict[str, str | None]:
    """What a picture's text says of its settings."""
    prompt, negative, listed = split(text or "")
    return {"Prompt": prompt, "Negative prompt": negative} | {k: v for k, v in listed.items() if k not in HOW}


def digest(image: Image.Image) -> str:
    return hashlib.sha256(image.convert("RGB").tobytes()).hexdigest()


# ------------------------------------------------------------------------------------------------ the work


def make(
    pipe: Pipeline,
    tasks: Sequence[Task],
    folder: Path,
    batch: int = 1,
    options: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> Made:
    """The pictures of a list (`read`) that `folder` does not have yet.

    batch: up to so many at a time, of equal settings but prompt and seeds; whatever it is, each is bit for bit the one
    that `pipe` makes alone with as many threads. options: of what the pipeline was made, by the names of the command
    line's options; else the pipeline's own. A picture that fails is tried again at the end, alone. Raises ValueError,
    before any is made, for settings that this model cannot run and for files in `folder` that are not its pictures;
    OSError where nothing can be written.
    """
    own: dict[tuple[Any, ...], dict[str, Any]] = {}

    def text(task: Task, s: Settings, size: tuple[int, int]) -> str:
        inputs = {name: task.values[name] for name in ("image", "mask") if task.values.get(name) is not None}
        key = tuple(map(str, inputs.items()))
        if key not in own:  # files are hashed once
            base = pipe.made_of(s) if options is None else options
            base = {name: value for name, value in base.items() if name not in ("image", "mask")}
            own[key] = with_files(base | inputs | {"threads": torch.get_num_threads()})
        return parameters(s, 0, size, pipe.name, own[key])

    there = 0
    groups: dict[str, list[Task]] = defaultdict(list)
    out = Folder(folder, text)
    for task in tasks:
        s = task.settings()
        try:
            checked_size(s, pipe.size, pipe.vae.config.factor)
            alike = like(task, s, chunks(pipe, s))
        except ValueError as error:
            raise ValueError(f"line {task.line}: {error}") from error
        if out.has(task, s):
            there += 1
        else:
            groups[alike].append(task)

    made: set[str] = set()
    alone = Alone()
    bar = tqdm(total=sum(map(len, groups.values())), unit="picture", disable=not progress)

    def draw(tasks: list[Task]) -> None:
        start, settings = time.perf_counter(), [task.settings() for task in tasks]
        alone.count = len(tasks)
        with alone if len(tasks) > 1 else nullcontext():  # it costs a fifth of the time of one
            drawn = pipe.run(together(settings), progress=False)
        seconds = (time.perf_counter() - start) / len(tasks)
        for task, s, image, record in zip(tasks, settings, drawn.images, drawn.records(), strict=True):
            out.save(task, s, image, record, seconds)
            made.add(task.file)
            bar.update()

    again: list[Task] = []
    for group in groups.values():
        for i in range(0, len(group), batch):
            try:
                draw(group[i : i + batch])
            except FAILURES:
                again += [task for task in group[i : i + batch] if task.file not in made]
    failed = []
    for task in again:
        try:
            draw([task])
        except FAILURES as error:
            failed.append(f"{task.file}, line {task.line}: {str(error) or 'out of memory'}")
            out.note(task, error=str(error) or "out of memory")
    bar.close()
    return Made(there, len(made), failed)


def like(task: Task, s: Settings, chunks: int) -> str:
    """What pictures of one batch have in common: all but prompt and seeds, and how many chunks of text there are, to
    which the shorter of a batch would be filled up."""
    same = {**task.values, "prompt": chunks, "seed": 0, "subseed": s.subseed is None}
    if s.sampler_function is dpm_adaptive:  # its steps depend on the batch
        same["prompt"] = task.file
    return json.dumps(same, sort_keys=True, default=str)


def together(settings: Sequence[Settings]) -> Settings:
    """One call for pictures that differ in prompt and seeds."""
    first = settings[0]
    if len(settings) == 1:
        return first
    subseeds = None if first.subseed is None else [s.subseeds[0] for s in settings]
    return replace(first, prompt=[s.texts[0] for s in settings], seed=[s.seeds[0] for s in settings], subseed=subseeds)
