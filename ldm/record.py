"""What a run really did, beside the settings that asked for it: sigmas, nets, machine, and a mark of every step.

`Output.save` writes it into each picture's file, `ldm replay` runs the settings again and says at which step the new
run left the old one, and by how much. Of x itself a step keeps 38 bytes: the beginning of its sha256, and 8 random
projections, whose differences tell how far two x are apart (Johnson & Lindenstrauss 1984).
"""

import base64
import hashlib
import json
import math
import platform
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import ldm
from ldm.replay import fingerprint, with_files
from ldm.samplers import Step

CHANGELOG = Path(__file__).parent.parent / "CHANGELOG.md"
DIGEST, PROJECTIONS = 6, 8  # bytes; float32 values


def numerics() -> list[str] | None:
    """The changes of numbers in the library's history, the oldest first; None where its changelog is not beside it."""
    if not CHANGELOG.exists():
        return None
    text = CHANGELOG.read_text(encoding="utf-8")
    versions = re.split(r"^## ", text, flags=re.MULTILINE)[:0:-1]
    entries = [entry for version in versions for entry in re.split(r"^- ", version, flags=re.MULTILINE)[1:]]
    return [" ".join(entry.split()) for entry in entries if entry.startswith("**numerics**")]


def machine() -> dict[str, str]:
    """What rounding depends on, beside the nets' dtype and device."""
    capability = torch.backends.cpu.get_cpu_capability()
    return {
        "ldm": ldm.__version__,
        "torch": torch.__version__,
        "processor": f"{platform.machine()}, {capability}",
        "threads": str(torch.get_num_threads()),
    }


@cache
def known(model: Path, changed: int) -> str:
    """The fingerprint of a model that was last `changed` then."""
    return fingerprint(model)


def newest(model: Path) -> int:
    """When a file, or one in a folder, was last changed, in nanoseconds."""
    return max(file.stat().st_mtime_ns for file in [model, *model.rglob("*")])


@cache
def directions(count: int) -> np.ndarray:
    """(PROJECTIONS,count) of -1 and 1, the same everywhere."""
    bits = np.random.Generator(np.random.PCG64(0)).integers(0, 2, (PROJECTIONS, count), dtype=np.int8)
    return 2 * bits - 1


def mark(x: Tensor) -> bytes:
    """x (4,h,w) float32 -> the beginning of its sha256 and its PROJECTIONS, each with the root mean square of x."""
    values = x.detach().float().cpu().numpy().ravel()
    projected = directions(values.size) @ values.astype(np.float64) / math.sqrt(values.size)
    return hashlib.sha256(values.tobytes()).digest()[:DIGEST] + projected.astype("<f4").tobytes()


def projections(mark: bytes) -> np.ndarray:
    return np.frombuffer(mark[DIGEST:], "<f4").astype(np.float64)


@dataclass(frozen=True)
class Left:
    """Where one run leaves another. step: from 0, over all runs of an edit. relative: root mean square of the
    difference of x over that of x, told from the projections to some 25 %; 0 where it is below their own rounding."""

    step: int
    sigma: float
    relative: float

    def __str__(self) -> str:
        far = f"by {self.relative:.1e} of x" if self.relative else "by less than 1e-6 of x"
        return f"step {self.step + 1}, from sigma {self.sigma:.4f}, {far}"


@dataclass(frozen=True)
class Record:
    """Of one picture. sigmas: of its steps and the last, a list for each run. marks: of x after each step.

    nets: what they are, {"model": fingerprint, "dtype": ..., ...}. machine: see `machine`. changes: how many entries
    `numerics` had, None where it is not known.
    """

    sigmas: list[list[float]]
    marks: list[bytes]
    nets: Mapping[str, str]
    machine: Mapping[str, str]
    changes: int | None

    def text(self) -> str:
        marks = base64.b64encode(b"".join(self.marks)).decode()
        return json.dumps(vars(self) | {"marks": marks}, separators=(",", ":"))

    @classmethod
    def parse(cls, text: str) -> "Record":
        """Raises ValueError for what `text` did not write; more fields than are known here are passed over."""
        try:
            values = json.loads(text)
            data = base64.b64decode(values["marks"], validate=True)
            size = DIGEST + 4 * PROJECTIONS
            marks = [data[i : i + size] for i in range(0, len(data), size)]
            sigmas = [[float(sigma) for sigma in run] for run in values["sigmas"]]
            if len(data) % size or len(marks) != sum(max(len(run) - 1, 0) for run in sigmas):
                raise ValueError("marks and sigmas differ in number")
            changes = None if values["changes"] is None else int(values["changes"])
            return cls(sigmas, marks, dict(values["nets"]), dict(values["machine"]), changes)
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"the record of the run is damaged ({error})") from error

    def rows(self) -> dict[str, str]:
        """What can be read of it."""
        runs = [f"{len(run) - 1} steps from {run[0]:.4f} to {run[-1]:.4f}" for run in self.sigmas]
        return {"sigmas": "; ".join(runs) or "none", **self.nets, **self.machine}

    def left_by(self, other: "Record") -> Left | None:
        """The first step after which x is another one; None if there is none, as far as both go."""
        starts = [sigma for run in self.sigmas for sigma in run[:-1]]
        for i, (a, b) in enumerate(zip(self.marks, other.marks, strict=False)):
            if a[:DIGEST] != b[:DIGEST]:
                was, now = projections(a), projections(b)
                size = np.sqrt((was**2).mean())
                relative = float(np.sqrt(((was - now) ** 2).mean()) / size) if size else math.inf
                return Left(i, starts[i], relative if relative > 1e-6 else 0.0)
        return None

    def differences(self, other: "Record") -> list[str]:
        """What is otherwise here and there, in words; and which changes of numbers lie between them."""
        was, now = self.rows(), other.rows()
        # What is not in it was not recorded by its version.
        found = [
            f"{name}: {then} then, {now.get(name, 'none')} now" for name, then in was.items() if then != now.get(name)
        ]
        if self.sigmas != other.sigmas and was["sigmas"] == now["sigmas"]:
            found.append("sigmas: others between the first and the last")
        known = numerics()
        if known is None or self.changes is None:
            return [*found, "which changes of numbers lie between them is not known: there is no CHANGELOG.md"]
        if self.changes > len(known):
            found.append(f"made by a later version: it knows {self.changes} changes of numbers, this one {len(known)}")
        return found + known[self.changes :]


@dataclass(frozen=True)
class Ran:
    """What decided the pictures of a call beside its settings. All of it is in the pictures' files, too.

    model: its name. path: its file or folder, or its name on the hub. options: what else the pipeline was made of (VAE,
    LoRAs with their scales, embeddings, refiner, ...), by the names of the command line's options. sigmas: of the steps
    and the last, a list for each run of the call. nets: the spacing's name, what the net predicts, dtypes and device.
    machine: versions, processor and threads.
    """

    model: str
    path: Path
    options: Mapping[str, Any]
    nets: Mapping[str, str]
    sigmas: list[list[float]] = field(default_factory=list)
    machine: Mapping[str, str] = field(default_factory=lambda: machine())

    @property
    def hash(self) -> str | None:
        """Of the model's file or folder as it is now: `ldm.replay.fingerprint`. None where it is none, as on the hub.

        It is not of the weights in memory, which a LoRA or the caller may have changed.
        """
        return known(self.path, newest(self.path)) if self.path.exists() else None

    @property
    def files(self) -> dict[str, str]:
        """By path the fingerprints of the other files: VAE, LoRAs, embeddings, refiner."""
        options = {name: value for name, value in self.options.items() if name != "model"}
        return with_files(options).get("files", {})

    def known_nets(self) -> dict[str, str]:
        """`nets`, after the model's hash if there is one."""
        return ({"model": self.hash} if self.hash else {}) | dict(self.nets)


class Recorder:
    """A consumer of a call's steps that keeps what a `Record` needs, and shows them to another consumer, if any."""

    def __init__(self, ran: Ran, callback: Callable[[Step], None] | None = None):
        self.ran = ran
        self.callback = callback
        self.marks: list[list[bytes]] = []  # steps, pictures

    def __call__(self, step: Step) -> None:
        if self.callback is not None:
            self.callback(step)  # which may change x in place
        sigmas = self.ran.sigmas
        if step.i == 0 or not sigmas:  # a sampler of the caller's may count from another number
            sigmas.append([float(step.sigma)])
        sigmas[-1].append(float(step.sigma_next))
        self.marks.append([mark(x) for x in step.x])

    def records(self, count: int) -> list[Record]:
        """One for each of `count` pictures."""
        ran, nets = self.ran, self.ran.known_nets()
        # Of an edit that makes its pictures one by one each has the steps of all.
        marks = [[row[i % len(row)] for row in self.marks] for i in range(count)]
        entries = numerics()
        changes = None if entries is None else len(entries)
        return [Record(ran.sigmas, own, nets, ran.machine, changes) for own in marks]
