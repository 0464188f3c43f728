"""How many pictures a second a list gives, beside diffusers: the default model, the same settings, in one run.

    python -m benchmarks.many          some minutes

Both make 32 pictures of 64x64 with DDIM, 20 steps and guidance, and save them as PNG: diffusers eager, ours as
`ldm generate --prompts` does, whose pictures are the same bit for bit at every batch. Alternating, medians of the
rounds, for each batch, with one thread and with as many as there are cores. The last column is the processor's time for
a picture, which other work on the machine changes less.
"""

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline

import ldm
from ldm.many import Task, make
from ldm.pipeline import DEFAULT_MODEL

ROUNDS, PICTURES, BATCHES, STEPS = 3, 32, (1, 4, 8, 16), 20


def ours(pipe: ldm.Pipeline, folder: Path, batch: int) -> None:
    how = {"steps": STEPS, "sampler": "ddim", "negative_prompt": ""}
    tasks = [Task(f"{i}.png", i, how | {"prompt": f"a red heart {i}", "seed": i}) for i in range(PICTURES)]
    assert make(pipe, tasks, folder, batch, progress=False).made == PICTURES


def theirs(pipe: StableDiffusionPipeline, folder: Path, batch: int) -> None:
    for start in range(0, PICTURES, batch):
        numbers = range(start, min(start + batch, PICTURES))
        images = pipe(
            [f"a red heart {i}" for i in numbers],
            num_inference_steps=STEPS,
            generator=[torch.Generator().manual_seed(i) for i in numbers],
        ).images
        for i, image in zip(numbers, images, strict=True):
            image.save(folder / f"{i}.png")


def measure(run: Callable[[Path], None]) -> tuple[float, float]:
    """Seconds and processor seconds a picture."""
    with tempfile.TemporaryDirectory() as folder:
        start, busy = time.perf_counter(), time.process_time()
        run(Path(folder))
        return (time.perf_counter() - start) / PICTURES, (time.process_time() - busy) / PICTURES


def main() -> None:
    pipe = ldm.Pipeline.from_pretrained(device="cpu")
    peer = StableDiffusionPipeline.from_pretrained(DEFAULT_MODEL, torch_dtype=torch.float32, local_files_only=True)
    peer.scheduler = DDIMScheduler.from_config(peer.scheduler.config)
    peer.set_progress_bar_config(disable=True)
    print(f"{PICTURES} pictures, DDIM, {STEPS} steps, medians of {ROUNDS} rounds")
    print("| threads | batch | ldm | diffusers | ratio | processor, ratio |\n|---|---|---|---|---|---|")
    for threads in sorted({1, os.cpu_count() or 1}):
        torch.set_num_threads(threads)
        for batch in BATCHES:
            rounds = []
            for _ in range(1 + ROUNDS):  # the first warms up
                mine = measure(lambda folder, batch=batch: ours(pipe, folder, batch))
                other = measure(lambda folder, batch=batch: theirs(peer, folder, batch))
                rounds.append((*mine, *other))
            own, own_busy, his, his_busy = (median(column) for column in zip(*rounds[1:], strict=True))
            ratios = f"{his / own:.2f} | {his_busy / own_busy:.2f}"
            print(f"| {threads} | {batch} | {1 / own:.2f}/s | {1 / his:.2f}/s | {ratios} |", flush=True)


if __name__ == "__main__":
    main()
