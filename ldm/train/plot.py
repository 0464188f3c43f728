"""What a run looks like: curves of its log, and the newest of its sample grids."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image


def plot(runs: Mapping[str, Path], file: Path) -> None:
    """A PNG with a column for each {title: folder of a run}: its loss, the mean of each 20 steps; the rate; and its
    newest grid, if it has one. Needs matplotlib (extra `train`). A run may be going on: a line that is being written is
    left out. Raises FileNotFoundError for a folder without a log, and where `file` has no folder to be in; ValueError
    for a log without steps, or with a line that is broken.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("matplotlib is not installed: pip install matplotlib") from error
    if not file.resolve().parent.is_dir():
        raise FileNotFoundError(f"{file}: the folder {file.resolve().parent} does not exist, make it first")
    logs = {title: read_log(folder) for title, folder in runs.items()}
    grids = {title: newest_grid(folder) for title, folder in runs.items()}
    heights = [3.5, 1.5, *([4.0] if any(grids.values()) else [])]
    figure = Figure(figsize=(5 * len(runs), sum(heights)), layout="constrained")
    rows = figure.subplots(len(heights), len(runs), squeeze=False, height_ratios=heights)
    for (title, log), (loss, rate, *below) in zip(logs.items(), rows.T, strict=True):
        block = 20 if len(log["step"]) > 40 else 1  # steps whose mean is a point
        blocks, which = np.unique((log["step"] - 1) // block, return_inverse=True)
        style = "-" if block > 1 else ".-"
        loss.plot(block * (blocks + 1), np.bincount(which, log["loss"]) / np.bincount(which), style, linewidth=0.8)
        loss.set(title=title, ylabel="loss", yscale="log")
        rate.plot(log["step"], log["lr"], linewidth=0.8)
        rate.set(xlabel="step", ylabel="rate")
        for axes in (loss, rate):
            axes.grid(alpha=0.3, which="both")
        for axes in below:
            axes.axis("off")
            if grid := grids[title]:
                axes.imshow(np.asarray(Image.open(grid).convert("RGB")))
                axes.set_title(grid.stem)
    figure.savefig(file, dpi=120)


COLUMNS = ("step", "loss", "lr")


def read_log(folder: Path) -> dict[str, np.ndarray]:
    """Columns of a run's log.jsonl, float64."""
    log = folder / "log.jsonl"
    if not log.exists():
        raise FileNotFoundError(f"{folder} has no log.jsonl: give the folder of a run, the result's name with .run")
    *lines, _ = log.read_bytes().split(b"\n")  # after the last newline is nothing, or what is being written
    if not lines:
        raise ValueError(f"{log} is empty: no step has been taken yet")
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            found = json.loads(line)
            rows.append([float(found[name]) for name in COLUMNS])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{log}: line {number} is broken, no step with {', '.join(COLUMNS)}: remove it") from error
    return dict(zip(COLUMNS, np.array(rows).T, strict=True))


def newest_grid(folder: Path) -> Path | None:
    return max((folder / "samples").glob("step-*.png"), default=None)
