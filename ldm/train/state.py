"""The states of a training on disk, from which it goes on as if nothing had happened.

    step-0000123-5f0c1a9b3d7e2f48.safetensors

is the state after 123 steps: one safetensors file, whose metadata has what is not a tensor as JSON. The name ends with
the first 16 digits of the file's SHA-256, by which a flipped bit or a cut is noticed. A file gets that name when all of
it is on the disk, and the older ones go after that, so that at each moment there is a whole one.
"""

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from ldm.save import write_file
from ldm.source import CheckpointError


def step_of(path: Path) -> int:
    return int(path.name.split("-")[1])


def paths(folder: Path) -> list[Path]:
    """The states in `folder`, whole or not, the oldest first."""
    return sorted(folder.glob("step-*-*.safetensors"), key=step_of)


def write(folder: Path, step: int, tensors: Mapping[str, Tensor], facts: Mapping[str, Any], keep: int) -> Path:
    """All or nothing, then all states but the last `keep` go. Raises OSError, with nothing changed, on a full disk.

    facts: anything that is JSON.
    """
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f"step-{step:07}.part"
    try:
        write_file(part, tensors, {"facts": json.dumps(facts)})
        with part.open("r+b") as f:
            name = f"step-{step:07}-{digest(part)}.safetensors"
            os.fsync(f.fileno())
        path = part.rename(folder / name)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    sync(folder)
    earlier = [other for other in paths(folder) if step_of(other) < step]
    for other in {*paths(folder)} - {path, *earlier[::-1][: keep - 1]}:  # a later one is broken: the run was not there
        other.unlink()
    return path


def is_whole(path: Path) -> bool:
    try:
        return path.stem.endswith(digest(path))
    except OSError:  # of a disk that cannot read it
        return False


def digest(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()[:16]


def sync(folder: Path) -> None:
    """A name is on the disk when its folder is."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def clean(folder: Path) -> None:
    """Takes away what a killed run had half written."""
    for part in folder.glob("step-*.part*"):
        if part.is_dir():
            shutil.rmtree(part)
        else:
            part.unlink()


def newest(folder: Path) -> Path | None:
    """The last state that is whole, None where there is none at all; the broken ones after it are named on stderr.

    Raises CheckpointError where all are broken.
    """
    states = paths(folder)
    for path in reversed(states):
        if is_whole(path):
            if path != states[-1]:
                print(f"The state before it is taken: {path}", file=sys.stderr)
            return path
        print(f"{path} is broken: its content is not that of its checksum", file=sys.stderr)
    if states:
        raise CheckpointError(
            f"each of the {len(states)} states in {folder} is broken: put back a copy of one, or remove them to start"
            " from the beginning"
        )
    return None


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the facts that were written."""
    with safe_open(path, "pt") as f:
        return {name: f.get_tensor(name) for name in f.keys()}, json.loads(f.metadata()["facts"])  # noqa: SIM118


def part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Those whose names begin with `prefix` and a dot, by the rest of their names."""
    return {name.removeprefix(f"{prefix}."): t for name, t in tensors.items() if name.startswith(f"{prefix}.")}


def refuse_other(path: Path, theirs: Any, ours: Any) -> None:
    """Raises ValueError with what differs between the settings of a state and those of the run that would go on.

    Where any of `settings` do, which are what was chosen, those alone: parameters and optimizers follow from them.
    """
    before, now = flat(theirs), flat(json.loads(json.dumps(ours)))
    names = [name for name in before | now if before.get(name) != now.get(name)]
    names = [name for name in names if name.startswith("settings.")] or names
    if names:
        lines = [f"    {name}: {before.get(name)} there, {now.get(name)} here" for name in names[:8]]
        raise ValueError(
            "\n".join(
                [f"{path} is of another run: take another folder, or the same settings. {len(names)} differ:", *lines]
            )
        )


def flat(value: Any, name: str = "") -> dict[str, Any]:
    """Nested objects by the path of their keys: {"a": {"b": 1}} -> {"a.b": 1}."""
    if not isinstance(value, dict):
        return {name: value}
    return {k: v for key, inner in value.items() for k, v in flat(inner, f"{name}.{key}".lstrip(".")).items()}
