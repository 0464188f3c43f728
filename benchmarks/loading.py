"""How long a model takes to load, and how much memory, beside diffusers.

python -m benchmarks.loading    # a minute or two; 5 GB of disk in the temporary directory and 5 GB of memory

Writes an SD 1.5 in float16 (random weights, 2.1 GB) as a single file and as a folder, and loads them in turns,
each in a fresh process, from a warm page cache: the time of the call and the processor's share in it (what it takes if
nothing else runs), the time until every weight has been read once (memory-mapped weights are read when they are used),
and the peak memory above that of the imports.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

import torch
from transformers import CLIPTokenizer

from ldm.checkpoint import NETS
from ldm.clip.tokenizer import Tokenizer
from ldm.models import SD1
from tests.synthetic import full_size, write

ROUNDS = 3

CONFIGS = {
    "model_index.json": {
        "_class_name": "StableDiffusionPipeline",
        "scheduler": ["diffusers", "PNDMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "safety_checker": [None, None],
        "feature_extractor": [None, None],
        "requires_safety_checker": False,
    },
    "unet/config.json": {"_class_name": "UNet2DConditionModel", "cross_attention_dim": 768, "sample_size": 64},
    "vae/config.json": {
        "_class_name": "AutoencoderKL",
        "block_out_channels": [128, 256, 512, 512],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "layers_per_block": 2,
    },
    "text_encoder/config.json": {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_attention_heads": 12,
        "num_hidden_layers": 12,
    },
    "scheduler/scheduler_config.json": {"_class_name": "PNDMScheduler", "skip_prk_steps": True, **SD1.scheduler},
}

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


def write_folder(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    for name, config in CONFIGS.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(json.dumps(config))
    official = Tokenizer.official()
    merges = [tuple(pair) for pair in json.loads(official.bpe.__getstate__())["merges"]]
    CLIPTokenizer(vocab=official.vocab, merges=merges, model_max_length=77).save_pretrained(path / "tokenizer")
    for part, (net, spellings) in NETS.items():
        with torch.device("meta"):
            shapes = {name: p.shape for name, p in net(getattr(SD1, part)).state_dict().items()}
        named = {name: tensors[spellings(getattr(SD1, part), name)[0]].view(shape) for name, shape in shapes.items()}
        stem = "model" if part == "text_encoder" else "diffusion_pytorch_model"
        write(path / part / f"{stem}.safetensors", {k.removeprefix("text_model."): v for k, v in named.items()})


def measure(code: str, path: Path) -> list[float]:
    run = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True)
    return [float(number) for number in run.stdout.split()]


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        file, folder = Path(temporary) / "v1-5.safetensors", Path(temporary) / "v1-5"
        tensors = full_size()
        write(file, tensors)
        write_folder(folder, tensors)
        del tensors
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


if __name__ == "__main__":
    main()
