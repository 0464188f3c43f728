"""The stages of `python -m benchmarks`: each makes rows, the contenders taking turns."""

import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks import contenders, fresh
from benchmarks.model import PARTS, SIDES, Case
from benchmarks.report import OURS, THEIRS, Row

DTYPES = ("float32", "bfloat16")
STAGES = ("import", "load", *PARTS, "picture", "growth")
BASES = [THEIRS, "diffusers channels-last"]
EAGER = [*BASES, OURS]  # what the others are held against comes first
COMPILED = [OURS, "ldm compiled", "diffusers compiled"]
MODULES = {"OpenVINO": "openvino", "stable-diffusion.cpp": "stable_diffusion_cpp"}
NET, PIXEL = 1e-4, 2 / 255  # largest differences in float32: of a net's result, and of a picture's pixels
STEPS = 20

Runs = dict[str, list[dict[str, float]]]  # in fresh processes: each contender's, what was found in each round


def column(runs: Runs, what: str) -> dict[str, list[float]]:
    return {name: [found[what] for found in rounds] for name, rounds in runs.items()}


def process(begin: Callable | None = None, *arguments: Any) -> ProcessPoolExecutor:
    """A fresh process that first calls `begin`, then does what it is given, one after the other."""
    return ProcessPoolExecutor(1, get_context("spawn"), initializer=begin, initargs=arguments)


def alone(function: Callable, *arguments: Any) -> Any:
    """The result of a call in a fresh process, whose memory is free again afterwards."""
    with process() as pool:
        return pool.submit(function, *arguments).result()


class Stages:
    """folder: of the model. compiled: measure torch.compile too."""

    def __init__(self, folder: Path, size: str, rounds: int, compiled: bool):
        self.folder, self.rounds, self.compiled, self.side = folder, rounds, compiled, SIDES[size]
        self.installed = [name for name, module in MODULES.items() if find_spec(module)]
        self.absent = {name: "not installed" for name in MODULES if name not in self.installed}
        if not compiled:
            self.absent["torch.compile with freezing"] = "measured with --compile"
        if size == "tiny" and "stable-diffusion.cpp" in self.installed:
            self.installed.remove("stable-diffusion.cpp")
            self.absent["stable-diffusion.cpp"] = "loads nets of the official sizes alone"
        self.once: dict[str, float] = {}  # seconds before the first evaluation, of conversions and compilations
        self.references: dict[Any, np.ndarray] = {}  # diffusers' results in float32
        self.rounding: dict[Any, float] = {}  # how far its own in bfloat16 are from them

    def rows(self, stage: str) -> Iterator[Row]:
        if stage == "import":
            return self.importing()
        measures = {"load": self.loading, "unet": self.unet, "picture": self.pictures, "growth": self.growth}
        measure = measures.get(stage, lambda dtype: self.part(stage, dtype))
        return (row for dtype in DTYPES for row in measure(dtype))

    def peers(self) -> list[str]:
        return [*BASES, *self.installed, *COMPILED[1:]] if self.compiled else [*BASES, *self.installed]

    def importing(self) -> Iterator[Row]:
        names = [THEIRS, OURS]
        runs = self.fresh(names, lambda name: fresh.run("import", name))
        yield Row("import beyond torch", "", "s", column(runs, "seconds"))

    def fresh(self, names: list[str], run: Callable[[str], dict[str, float]]) -> Runs:
        runs: Runs = {name: [] for name in names}
        for _ in range(self.rounds):
            for name in names:
                runs[name].append(run(name))
        return runs

    def loading(self, dtype: str) -> Iterator[Row]:
        """Of files in that dtype; and in bfloat16 of float32 files, too, as the official ones are."""
        if dtype == "float32":
            yield from self.loading_of(self.folder, dtype, "load")
            return
        converted = self.folder.with_name(dtype)
        alone(fresh.convert, self.folder, converted, dtype)
        yield from self.loading_of(converted, dtype, "load")
        shutil.rmtree(converted)
        yield from self.loading_of(self.folder, dtype, "load float32 files")

    def loading_of(self, folder: Path, dtype: str, title: str) -> Iterator[Row]:
        names = [THEIRS, OURS]
        size = sum(file.stat().st_size for file in folder.rglob("*.safetensors"))

        def warm(name: str) -> dict[str, float]:
            return fresh.run("load", name, folder, dtype)

        def cold(name: str) -> dict[str, float]:
            fresh.forget(folder)
            return warm(name)

        for name in names:
            warm(name)  # the first fills the caches
        for cache, run in {"warm": warm, "cold": cold}.items():
            runs = self.fresh(names, run)
            if cache == "cold" and any(r["from_disk"] < size / 2 for of_one in runs.values() for r in of_one):
                self.absent["loading from a cold cache"] = "the system kept the files in memory"
                return
            for stage, what in {title: "seconds", f"{title} and read": "read"}.items():
                yield Row(f"{stage}, {cache}", dtype, "s", column(runs, what))

    def part(self, part: str, dtype: str) -> Iterator[Row]:
        case = Case(part, 2 if part == "text" else 1, self.side)
        name = "text, two prompts" if part == "text" else f"{part}, {self.side}x{self.side}"
        return self.turns(EAGER, dtype, {name: case})

    def unet(self, dtype: str) -> Iterator[Row]:
        name, case = self.unet_case(2, self.side)
        yield from self.turns([*EAGER, *self.openvino()], dtype, {name: case})
        if self.compiled:
            yield from self.turns(COMPILED, dtype, {f"{name}, compiled": case})

    def growth(self, dtype: str) -> Iterator[Row]:
        sizes = (2, self.side * 3 // 2), (2, self.side * 2), (1, self.side), (4, self.side)
        yield from self.turns([*EAGER, *self.openvino()], dtype, dict(self.unet_case(*size) for size in sizes))
        for steps in (STEPS // 4, STEPS // 2):
            yield from self.pictures(dtype, steps)

    def unet_case(self, batch: int, side: int) -> tuple[str, Case]:
        return f"UNet, batch {batch}, {side}x{side}", Case("unet", batch, side)

    def openvino(self) -> list[str]:
        if "OpenVINO" not in self.installed:
            return []
        if not contenders.openvino_file(self.folder).exists():
            self.once["OpenVINO, conversion"] = alone(contenders.to_openvino, self.folder)
        return ["OpenVINO"]

    def turns(self, names: list[str], dtype: str, cases: dict[str, Case]) -> Iterator[Row]:
        """The contenders each hold the net of the cases' one part, and measure one after the other."""
        [part] = {case.part for case in cases.values()}
        with ExitStack() as stack:
            processes = {
                name: stack.enter_context(process(contenders.load, name, self.folder, dtype, part)) for name in names
            }
            for stage, case in cases.items():
                off, values = {}, {name: [] for name in names}
                for name in names:
                    result, first = processes[name].submit(contenders.begin, self.folder, case, dtype).result()
                    off[name] = self.off(case, name, dtype, result)
                    if name not in EAGER:
                        self.once[f"{name}, first call, {stage}, {dtype}"] = first
                for _ in range(self.rounds):
                    for name in names:
                        values[name].append(processes[name].submit(contenders.measure).result())
                yield Row(stage, dtype, "s", values, off, self.tolerance(case, dtype, NET))

    def pictures(self, dtype: str, steps: int = STEPS) -> Iterator[Row]:
        names, off = list(EAGER), {}
        if "stable-diffusion.cpp" in self.installed and steps == STEPS:
            names.append("stable-diffusion.cpp")
            if not fresh.single_file(self.folder).exists():
                alone(fresh.to_single_file, self.folder)

        def run(name: str) -> dict[str, float]:
            file = self.folder.with_name(f"{name}.png")
            file.unlink(missing_ok=True)  # ours would not write over it
            result = fresh.run("picture", name, self.folder, dtype, steps, self.side, file)
            if name in EAGER:  # the other one draws other noise
                pixels = np.asarray(Image.open(file)).astype(np.float32)
                off[name] = self.off(steps, name, dtype, pixels)
            return result

        runs = self.fresh(names, run)
        tolerance = self.tolerance(steps, dtype, PIXEL)
        yield Row(f"picture, {steps} steps", dtype, "s", column(runs, "wall"), off, tolerance)
        yield Row(f"peak memory, {steps} steps", dtype, "B", column(runs, "memory"))

    def off(self, what: Any, name: str, dtype: str, result: np.ndarray) -> float:
        """How far from what diffusers makes of it in float32: at the worst as a share of the largest value, and in
        bfloat16, where the worst of so many roundings is chance, in the root of the mean square as a share of that one.
        """
        if (name, dtype) == (THEIRS, "float32"):
            self.references[what] = result
        reference = self.references[what]
        size = {"float32": lambda a: np.abs(a).max(), "bfloat16": lambda a: np.sqrt(np.square(a).mean())}[dtype]
        off = float(size(result - reference) / size(reference))
        if name in BASES and dtype == "bfloat16":
            self.rounding[what] = max(off, self.rounding.get(what, 0))
        return off

    def tolerance(self, what: Any, dtype: str, rounding: float) -> float:
        """What ours may be off: in bfloat16 as much as the worse of diffusers' memory formats."""
        return rounding if dtype == "float32" else self.rounding[what]
