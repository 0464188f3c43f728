"""What each approximation costs and gains: pictures of the default model beside the exact ones, and the time on SD 1.5.

    python -m ldm.train data && python -m benchmarks.approximations       half an hour on two cores; 12 GB of memory

Needs the extra `train`. Quality: 256 prompts of seen pairs by their hash, 20 Euler steps, scale 2, picture i with seed
i; the judges of `ldm train evaluate`, and PSNR to the exact picture of the same seed. Time: seconds of STEPS Euler
steps with guidance at 512x512 (random weights, which change no time), each beside the exact one run just before it;
ratio is exact float32 / approximation. The decoders: seconds of one decoding.
"""

import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

import ldm
from ldm.settings import FAST
from ldm.train import data, metrics
from ldm.train.evaluate import draw, generate
from ldm.train.judge import Judge
from ldm.vae import TinyConfig, TinyVAE
from tests.synthetic import full_size, write

DATA = Path("runs/emoji64.npz")
PROMPTS, STEPS, ROUNDS = 256, 12, 2
SETTINGS: dict[str, Any] = {"steps": 20, "guidance_scale": 2.0}
BF16 = torch.bfloat16
# Of SD 1.5's sigmas 14.6 to 0.03; the default model's go on to 4096.
INTERVAL: dict[str, Any] = {"guidance_interval": (0.28, 5.42)}
VARIANTS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "bfloat16": (BF16, {}),
    "guidance_interval=(0.28, 5.42)": (torch.float32, INTERVAL),
    "token_merging=0.5": (torch.float32, {"token_merging": 0.5}),
    "deep_cache=2": (torch.float32, {"deep_cache": 2}),
    "deep_cache=3": (torch.float32, {"deep_cache": 3}),
    "deep_cache=5": (torch.float32, {"deep_cache": 5}),
    '**pipe.fast("balanced")': (torch.float32, FAST["balanced"]),
    "the same, bfloat16": (BF16, FAST["balanced"]),
    '**pipe.fast("draft"), bfloat16': (BF16, FAST["draft"]),
}


def both(model: Path | None) -> dict[torch.dtype, ldm.Pipeline]:
    return {dtype: ldm.Pipeline.from_pretrained(model, dtype=dtype, device="cpu") for dtype in (torch.float32, BF16)}


def quality() -> dict[str, str]:
    _, meta = data.load(DATA)
    rows = draw([i for i, m in enumerate(meta) if m["split"] == "train"], meta, PROMPTS, 0)
    chosen, told = [meta[i] for i in rows], [(meta[i]["hex"], meta[i]["style"]) for i in rows]
    judge = Judge(DATA)
    pipes = both(None)
    exact = generate(pipes[torch.float32], chosen, **SETTINGS)
    cells = {}
    for name, (dtype, settings) in {"exact": (torch.float32, {}), **VARIANTS}.items():
        made = generate(pipes[dtype], chosen, **SETTINGS, **settings)
        scores = judge.score(made, told)
        near = f"{metrics.psnr(made, exact):.1f} dB" if name != "exact" else ""
        cells[name] = f"{100 * scores['concept_top5']:.1f} % | {100 * scores['style']:.1f} % | {near}"
    return cells


def seconds(pipe: ldm.Pipeline, settings: dict[str, Any]) -> float:
    start = time.perf_counter()
    for _ in pipe.stream("a photograph of an astronaut", steps=STEPS, **settings):
        pass
    return time.perf_counter() - start


def speed() -> dict[str, str]:
    with tempfile.TemporaryDirectory() as folder:
        file = write(Path(folder) / "v1-5.safetensors", full_size())
        pipes = {
            dtype: ldm.Pipeline.from_pretrained(file, dtype=dtype, device="cpu") for dtype in (torch.float32, BF16)
        }
        cells = {}
        for name, (dtype, settings) in VARIANTS.items():
            pairs = [(seconds(pipes[torch.float32], {}), seconds(pipes[dtype], settings)) for _ in range(ROUNDS)]
            exact, took = (median(column) for column in zip(*pairs, strict=True))
            cells[name] = f"{took / STEPS:.2f} s | {exact / took:.2f}"
            cells.setdefault("exact", f"{exact / STEPS:.2f} s | 1")
            print(name, cells[name], flush=True)
        z, vae = torch.randn(1, 4, 64, 64), pipes[torch.float32].vae
    tiny = TinyVAE(TinyConfig()).eval()
    times: list[list[float]] = [[], []]
    with torch.no_grad():
        for _ in range(ROUNDS + 1):
            for net, column in zip((vae, tiny), times, strict=True):
                start = time.perf_counter()
                net.decode(z)
                column.append(time.perf_counter() - start)
    whole, small = (median(column[1:]) for column in times)
    cells["vae= a TAESD (decoding)"] = f"{small:.2f} s | {whole / small:.1f}"
    return cells


def main() -> None:
    times, scores = speed(), quality()
    print("| | a step of SD 1.5 | exact / this | top-5 | style | PSNR to exact |\n|---|---:|---:|---:|---:|---:|")
    for name in ["exact", *VARIANTS, "vae= a TAESD (decoding)"]:
        print(f"| {name} | {times[name]} | {scores.get(name, ' | | ')} |")


if __name__ == "__main__":
    main()
