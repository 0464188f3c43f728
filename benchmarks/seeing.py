"""What it costs to look: at the default model, and at the UNet of SD 1.5 in full size.

python -m benchmarks.seeing          # half a minute: preview, capture and trace beside a step of the default model
python -m benchmarks.seeing full     # 7 GB of memory, 3 of disk in the temporary directory, three minutes

All times are those of the processor, which other work of the machine changes least; of the default model the best of
the rounds. In full size, random weights in float32, one evaluation each; the peak is that above what is in use before
it (weights, inputs), and a recording's includes all that it keeps.
"""

import ctypes
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

import ldm
from ldm.models import SD1
from ldm.parity import check, record
from ldm.preview import fit
from ldm.unet import UNet
from tests.parity import randomise

ROUNDS, STEPS = 5, 10


def default_model() -> None:
    pipe = ldm.Pipeline.from_pretrained()
    preview, latents = fit(pipe), torch.randn(1, 4, 16, 16)

    def run(inside, work):
        start = time.process_time()
        with inside():
            work()
        return (time.process_time() - start) / STEPS

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


def memory(kind: str) -> int:
    """Of this process, in bytes."""
    return 1024 * int(Path("/proc/self/status").read_text().split(kind)[1].split()[0])


def measured(work: Callable[..., Any], *given: Any) -> tuple[float, int, Any]:
    """Processor seconds, peak memory above what is in use now, and the result."""
    ctypes.CDLL(None).malloc_trim(0)  # what was freed before would be taken again, and not counted
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before, start = memory("VmRSS:"), time.process_time()
    result = work(*given)
    return time.process_time() - start, memory("VmHWM:") - before, result


def inputs(batch: int, side: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.randn(batch, 4, side, side), torch.tensor(500.0), torch.randn(batch, 77, SD1.unet.context_width)


@torch.no_grad()
def full_size() -> None:
    unet = randomise(UNet(SD1.unet)).eval()
    x, t, context = inputs(2, 64)
    unet(x, t, context)  # sets up what is set up once
    print("| UNet of SD 1.5 | processor | peak | kept |\n|---|---|---|---|")

    def show(name: str, seconds: float, peak: int, kept: str = "") -> None:
        print(f"| {name} | {seconds:.1f} s | {peak / 1e9:.2f} GB | {kept} |", flush=True)

    seconds, peak, plain = measured(unet, x, t, context)
    show("an evaluation, batch 2, latents of 64x64", seconds, peak)
    with ldm.capture(unet) as maps:
        seconds, peak, seen = measured(unet, x, t, context)
    assert torch.equal(seen, plain)
    show("the same under capture", seconds, peak, f"{sum(maps[layer].nbytes for layer in maps) / 1e9:.2f} GB")
    del maps
    with tempfile.TemporaryDirectory() as temporary:
        for side in (16, 64):
            file, given = Path(temporary) / f"{side}.safetensors", inputs(1, side)
            show(f"an evaluation, batch 1, latents of {side}x{side}", *measured(unet, *given)[:2])
            seconds, peak, _ = measured(record, unet, given, file)
            show("the same, recorded", seconds, peak, f"{file.stat().st_size / 1e9:.2f} GB")
            if side == 16:
                show("the same, checked", *measured(check, unet, file)[:2])


if __name__ == "__main__":
    full_size() if sys.argv[1:] == ["full"] else default_model()
