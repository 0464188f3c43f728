"""What is measured in fresh processes: the import, loading, and a whole picture.

Run as `python -m benchmarks.fresh import|load|picture CONTENDER ...` by the functions at the end; prints JSON. Nothing
is imported before it is known whose it is.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any


def single_file(folder: Path) -> Path:
    """What stable-diffusion.cpp reads."""
    return folder.with_name("single.safetensors")


def to_single_file(folder: Path) -> None:
    convert(folder, single_file(folder))


def convert(source: Path, target: Path, dtype: str | None = None) -> None:
    import torch

    from ldm import convert

    convert.convert(source, target, None if dtype is None else getattr(torch, dtype))


def memory() -> int:
    """The largest that this process has been, in bytes."""
    return 1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])


def bytes_read() -> int:
    """From the disk itself, by this process."""
    return int(Path("/proc/self/io").read_text().split("read_bytes:")[1].split()[0])


def importing(name: str) -> dict[str, float]:
    import torch  # noqa: F401

    start = time.perf_counter()
    if name == "ldm":
        import ldm  # noqa: F401
    else:
        from diffusers import StableDiffusionPipeline  # noqa: F401
    return {"seconds": time.perf_counter() - start}


def pipeline(name: str, folder: str, dtype: str) -> Any:
    """Loaded, and the seconds of the call, the imports not counted."""
    import torch

    kind = getattr(torch, dtype)
    if name == "ldm":
        import ldm

        start = time.perf_counter()
        return ldm.Pipeline.from_pretrained(folder, dtype=kind, device="cpu"), time.perf_counter() - start
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel  # noqa: F401
    from transformers import CLIPTextModel, CLIPTokenizer  # noqa: F401

    start = time.perf_counter()
    pipe = StableDiffusionPipeline.from_pretrained(folder, dtype=kind, local_files_only=True)
    taken = time.perf_counter() - start
    if name == "diffusers channels-last":
        pipe.unet.to(memory_format=torch.channels_last)
        pipe.vae.to(memory_format=torch.channels_last)
    return pipe, taken


def loading(name: str, folder: str, dtype: str) -> dict[str, float]:
    """`read`: until each weight has been read once, since memory-mapped ones are read when they are used."""
    pipe, loaded = pipeline(name, folder, dtype)
    start = time.perf_counter()
    for net in (pipe.unet, pipe.vae, pipe.text_encoder):
        for parameter in net.parameters():
            parameter.sum()
    return {"seconds": loaded, "read": loaded + time.perf_counter() - start, "from_disk": bytes_read()}


def picture(name: str, folder: str, dtype: str, steps: str, side: str, file: str) -> dict[str, float]:
    from benchmarks.model import TEXTS

    prompt, negative = TEXTS
    size = {"width": int(side), "height": int(side)}
    if name == "stable-diffusion.cpp":
        from stable_diffusion_cpp import StableDiffusion

        kind = {"float32": "f32", "bfloat16": "bf16"}[dtype]
        model = str(single_file(Path(folder)))
        pipe = StableDiffusion(model, wtype=kind, n_threads=os.cpu_count(), verbose=False)  # it would take half of them
        how = {"sample_method": "ddim_trailing", "sample_steps": int(steps), "cfg_scale": 7.5, "seed": 0}
        pipe.generate_image(prompt, negative, **how, **size)[0].save(file)
        return {"memory": memory()}
    pipe, _ = pipeline(name, folder, dtype)
    if name == "ldm":
        how = {"steps": int(steps), "sampler": "ddim", "guidance_scale": 7.5, "seed": 0, "progress": False}
        pipe(prompt, negative_prompt=negative, **how, **size).save(file)
    else:
        import torch

        pipe.set_progress_bar_config(disable=True)
        how = {"num_inference_steps": int(steps), "guidance_scale": 7.5, "generator": torch.Generator().manual_seed(0)}
        pipe(prompt, negative_prompt=negative, **how, **size).images[0].save(file)
    return {"memory": memory()}


STAGES = {"import": importing, "load": loading, "picture": picture}


def run(stage: str, *arguments: object) -> dict[str, float]:
    """The stage in a process of its own. `wall`: its seconds, from start to exit."""
    command = [sys.executable, "-m", "benchmarks.fresh", stage, *map(str, arguments)]
    start = time.perf_counter()
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return {"wall": time.perf_counter() - start} | json.loads(done.stdout.splitlines()[-1])


def forget(folder: Path) -> None:
    """Ask the system to drop the folder's files from its page cache: the next to read them reads the disk."""
    for file in folder.rglob("*"):
        if file.is_file():
            with file.open("rb") as open_file:
                os.fsync(open_file.fileno())
                os.posix_fadvise(open_file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


if __name__ == "__main__":
    print(json.dumps(STAGES[sys.argv[1]](*sys.argv[2:])))
