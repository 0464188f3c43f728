"""What it costs to look: a preview, and the capture of the cross-attention, beside a step of the default model.

    python -m benchmarks.seeing          half a minute

The best of the rounds: the rest is other work of the machine.
"""

import time
from contextlib import nullcontext

import torch

import ldm
from ldm.preview import fit

ROUNDS, STEPS = 5, 10


def main() -> None:
    pipe = ldm.Pipeline.from_pretrained()
    preview, latents = fit(pipe), torch.randn(1, 4, 16, 16)

    def run(inside, work):
        start = time.perf_counter()
        with inside():
            work()
        return (time.perf_counter() - start) / STEPS

    how = {"steps": STEPS, "progress": False}
    kinds = {
        "a step": (nullcontext, lambda: list(pipe.stream("red heart", steps=STEPS))),
        "a step under capture": (lambda: ldm.capture(pipe.unet), lambda: list(pipe.stream("red heart", steps=STEPS))),
        "a step of a trace": (nullcontext, lambda: pipe.trace("red heart", **how)),
        "a preview": (nullcontext, lambda: [preview(latents) for _ in range(STEPS)]),
    }
    best = {name: min(run(*kind) for _ in range(ROUNDS)) for name, kind in kinds.items()}
    print("| | best | of a step |\n|---|---|---|")
    for name, seconds in best.items():
        print(f"| {name} | {1000 * seconds:.2f} ms | {100 * seconds / best['a step']:.2f} % |")


if __name__ == "__main__":
    main()
