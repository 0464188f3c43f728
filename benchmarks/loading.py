"""How long a model takes to load, and how much memory, beside diffusers.

python -m benchmarks.loading    # a minute or two; 5 GB of disk in the temporary directory and 5 GB of memory

Writes an SD 1.5 in float16 (random weights, 2.1 GB) as a single file and as a folder, and loads them in turns,
each in a fresh process, from a warm page cache: the time of the call and the processor's share in it (what it takes if
nothing else runs), the time until every weight has been read once (memory-mapped weights are read when they are used),
and the peak memory above that of the imports. Then `ldm.inspect` of an SDXL of 6.9 GB (a file whose data are a hole),
beside safetensors' own reading of all names and shapes.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

from ldm.convert import convert
from tests.synthetic import KEYS, full_size, sparse, write

ROUNDS = 3

MEASURE = """
import sys, time
from pathlib import Path
import torch

def peak():  # of this process since it began, in bytes
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])

{imports}
before, start, busy = peak(), time.perf_counter(), time.process_time()
model = {load}
loaded, busy = time.perf_counter(), time.process_time() - busy
for net in (model.unet, model.vae, model.text_encoder):
    for p in net.parameters():
        assert p.dtype == torch.float16
        p.sum()
print(loaded - start, busy, time.perf_counter() - start, peak() - before)
"""
OURS = MEASURE.format(imports="from ldm.checkpoint import load", load="load(sys.argv[1])")
THEIRS = MEASURE.format(
    imports="from diffusers import StableDiffusionPipeline, AutoencoderKL, UNet2DConditionModel, PNDMScheduler\n"
    "from transformers import CLIPTextModel, CLIPTokenizer",
    load="StableDiffusionPipeline.from_pretrained(sys.argv[1], torch_dtype=torch.float16, local_files_only=True)",
)

INSPECT = """
import sys, time
import ldm
start = time.perf_counter()
ldm.inspect(sys.argv[1])
print(time.perf_counter() - start)
"""
HEADERS = """
import sys, time
import torch
from safetensors import safe_open
start = time.perf_counter()
file = safe_open(sys.argv[1], "pt")
shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}
print(time.perf_counter() - start)
"""


def measure(code: str, path: Path) -> list[float]:
    run = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True)
    return [float(number) for number in run.stdout.split()]


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        file, folder = Path(temporary) / "v1-5.safetensors", Path(temporary) / "v1-5"
        tensors = full_size()
        write(file, tensors)
        del tensors
        convert(file, folder)
        size = file.stat().st_size
        cases = {
            "ldm, single file": (OURS, file),
            "ldm, folder": (OURS, folder),
            "diffusers, folder": (THEIRS, folder),
        }
        results: dict[str, list[list[float]]] = {name: [] for name in cases}
        for turn in range(1 + ROUNDS):
            for name, case in cases.items():
                numbers = measure(*case)
                if turn > 0:  # the first one warms the page cache
                    results[name].append(numbers)

    print(f"SD 1.5 in float16, {size / 1e9:.2f} GB, warm page cache, medians of {ROUNDS} rounds")
    print(f"{'':20}{'load':>10}{'processor':>12}{'load and read':>16}{'peak memory / size':>22}")
    medians = {name: [median(column) for column in zip(*rows, strict=True)] for name, rows in results.items()}
    for name, (load, busy, read, added) in medians.items():
        print(f"{name:20}{load:8.2f} s{busy:10.2f} s{read:14.2f} s{added / size:22.3f}")
    ours, theirs = medians["ldm, folder"], medians["diffusers, folder"]
    load, busy, read, _ = (b / a for a, b in zip(ours, theirs, strict=True))
    print(f"same folder, diffusers / ours: load {load:.1f}, processor {busy:.1f}, load and read {read:.1f}")

    with tempfile.TemporaryDirectory() as temporary:
        file = sparse(Path(temporary) / "xl.safetensors", json.loads((KEYS / "sdxl_base.json").read_text()))
        rounds = [(measure(INSPECT, file)[0], measure(HEADERS, file)[0]) for _ in range(1 + ROUNDS)][1:]
        inspected, read = (median(column) for column in zip(*rounds, strict=True))
        size = file.stat().st_size
    print(f"inspect, SDXL of {size / 1e9:.1f} GB: {inspected:.2f} s; its names and shapes alone: {read:.3f} s")


if __name__ == "__main__":
    main()
