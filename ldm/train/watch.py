"""What is seen of a training while it runs: pictures of it every so many steps, and its curves in TensorBoard."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ldm.image import save
from ldm.pipeline import Pipeline

Watch = Callable[[int, dict[str, float]], None]  # of the step and its line in the log

SEEDS = [0, 1, 2, 3]


def grids(pipe: Pipeline, prompts: Sequence[str], every: int, folder: Path, side: int, **settings: Any) -> Watch:
    """Every so many steps folder/step-0000100.png: a row for each prompt, seeds 0 to 3, by the weights as they are
    (not their EMA), with `settings` of `ldm.Settings`, as clip_skip, and else its defaults."""

    @torch.no_grad()
    def watch(step: int, line: dict[str, float]) -> None:
        if step % every:
            return
        sheet = Image.new("RGB", (side * len(SEEDS), side * len(prompts)))
        for row, prompt in enumerate(prompts):
            made = pipe(prompt, seed=SEEDS, width=side, height=side, progress=False, **settings)
            for column, image in enumerate(made.images):
                sheet.paste(image, (side * column, side * row))
        folder.mkdir(parents=True, exist_ok=True)
        save(sheet, folder / f"step-{step:07}.png", "\n".join(prompts), force=True)

    return watch


def tensorboard(folder: Path) -> Watch:
    """loss, norm and lr of each step, as TensorBoard reads them. Needs tensorboard (the extra of that name).

    Where the run goes on from a state, what was written after that state is not drawn.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError("tensorboard is not installed: pip install tensorboard, or leave the option out") from error
    writer: SummaryWriter | None = None  # opened when it is known where the run begins

    def watch(step: int, line: dict[str, float]) -> None:
        nonlocal writer
        if writer is None:
            writer = SummaryWriter(str(folder), purge_step=step)
        for name in ("loss", "norm", "lr"):
            writer.add_scalar(name, line[name], step)
        writer.flush()

    return watch


def both(watches: Sequence[Watch]) -> Watch:
    def watch(step: int, line: dict[str, float]) -> None:
        for one in watches:
            one(step, line)

    return watch
