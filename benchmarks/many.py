"""How many pictures a second a list gives, beside diffusers: the default model, the same settings, in one run.

    python -m benchmarks.many          some ten minutes

Both make 32 pictures of 64x64 with DDIM, 20 steps and guidance, and save them as PNG: diffusers eager, ours as
`ldm generate --prompts` does, whose pictures are the same bit for bit at every batch. One process that uses all cores,
then one of one thread for each core, which share the list as under torchrun. Alternating, medians of the rounds.
"""

import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from multiprocessing.synchronize import Barrier
from pathlib import Path
from statistics import median

import torch

ROUNDS, PICTURES, BATCHES, STEPS = 3, 32, (1, 4, 8, 16), 20


class Ours:
    def __init__(self) -> None:
        import ldm

        self.pipe = ldm.Pipeline.from_pretrained(device="cpu")

    def make(self, numbers: range, folder: Path, batch: int) -> None:
        from ldm.many import Task, make

        how = {"steps": STEPS, "sampler": "ddim", "negative_prompt": ""}
        tasks = [Task(f"{i}.png", i, how | {"prompt": f"a red heart {i}", "seed": i}) for i in numbers]
        assert make(self.pipe, tasks, folder, batch, progress=False).made == len(numbers)


class Diffusers:
    def __init__(self) -> None:
        from diffusers import DDIMScheduler, StableDiffusionPipeline

        from ldm.pipeline import DEFAULT_MODEL

        self.pipe = StableDiffusionPipeline.from_pretrained(DEFAULT_MODEL, dtype=torch.float32, local_files_only=True)
        self.pipe.scheduler = DDIMScheduler.from_config(self.pipe.scheduler.config)
        self.pipe.set_progress_bar_config(disable=True)

    def make(self, numbers: range, folder: Path, batch: int) -> None:
        for start in range(0, len(numbers), batch):
            some = numbers[start : start + batch]
            images = self.pipe(
                [f"a red heart {i}" for i in some],
                num_inference_steps=STEPS,
                generator=[torch.Generator().manual_seed(i) for i in some],
            ).images
            for i, image in zip(some, images, strict=True):
                image.save(folder / f"{i}.png")


worker: Ours | Diffusers  # of this process
together: Barrier


def begin(kind: Callable[[], Ours | Diffusers], threads: int, barrier: Barrier) -> None:
    global worker, together
    torch.set_num_threads(threads)
    worker, together = kind(), barrier


def share(numbers: range, batch: int) -> float:
    """Seconds that this process takes for its part of the list, beside the others."""
    with tempfile.TemporaryDirectory() as folder:
        together.wait()
        start = time.perf_counter()
        worker.make(numbers, Path(folder), batch)
        return time.perf_counter() - start


def measure(pool: ProcessPoolExecutor, processes: int, batch: int) -> float:
    """Seconds a picture, until the last of the processes is done."""
    parts = [range(i, PICTURES, processes) for i in range(processes)]
    return max(pool.map(partial(share, batch=batch), parts)) / PICTURES


def main() -> None:
    cores, spawn = os.cpu_count() or 1, get_context("spawn")
    print(f"{PICTURES} pictures, DDIM, {STEPS} steps, medians of {ROUNDS} rounds")
    print("| processes x threads | batch | ldm | diffusers | ratio |\n|---|---|---|---|---|")
    for processes in sorted({1, cores}):
        how = processes, spawn
        with (
            ProcessPoolExecutor(*how, begin, (Ours, cores // processes, spawn.Barrier(processes))) as mine,
            ProcessPoolExecutor(*how, begin, (Diffusers, cores // processes, spawn.Barrier(processes))) as his,
        ):
            for batch in BATCHES:
                rounds = [(measure(mine, processes, batch), measure(his, processes, batch)) for _ in range(1 + ROUNDS)][
                    1:
                ]  # the first warms up
                own, other = (median(column) for column in zip(*rounds, strict=True))
                case = f"{processes} x {cores // processes} | {batch}"
                print(f"| {case} | {1 / own:.2f}/s | {1 / other:.2f}/s | {other / own:.2f} |", flush=True)


if __name__ == "__main__":
    main()
