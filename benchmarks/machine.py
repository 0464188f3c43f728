"""What the machine is, and the most that it does: against these limits the nets' own rates are read."""

import os
import platform
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils import mkldnn

PACKAGES = ("torch", "diffusers", "transformers", "openvino", "stable_diffusion_cpp_python")
FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
CALLS = 5  # of which the fastest counts


def about() -> dict[str, object]:
    """Of this machine, from /proc (Linux)."""
    lines = (line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines())
    cpu = {name.strip(): value.strip() for name, _, value in lines}
    return {
        "processor": cpu.get("model name", platform.processor()),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "flags": [flag for flag in FLAGS if flag in cpu.get("flags", "").split()],
        "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "python": platform.python_version(),
        **{name: installed(name) for name in PACKAGES},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def products(dtype: torch.dtype) -> Iterator[tuple[Callable[[], object], float]]:
    """Matrix products, and what each is worth in operations: by torch's default library, and by oneDNN on packed
    weights."""
    for n, inner, out in ((2048, 2048, 2048), (4096, 1280, 1280), (4096, 320, 2560)):
        a, b = torch.randn(n, inner, dtype=dtype), torch.randn(inner, out, dtype=dtype)
        packed, given = mkldnn.to_mkldnn(nn.Linear(inner, out).eval(), dtype), a.to_mkldnn()
        for call in (lambda a=a, b=b: a @ b, lambda packed=packed, given=given: packed(given)):
            yield call, 2 * n * inner * out


def convolutions(dtype: torch.dtype) -> Iterator[tuple[Callable[[], object], float]]:
    """Convolutions of batch 2 in both memory formats, in sizes that the UNet has."""
    for channels, side in ((320, 64), (640, 32), (1280, 16)):
        for kernel in (1, 3):
            for layout in (torch.contiguous_format, torch.channels_last):
                x = torch.randn(2, channels, side, side, dtype=dtype).to(memory_format=layout)
                w = torch.randn(channels, channels, kernel, kernel, dtype=dtype).to(memory_format=layout)
                work = 2 * 2 * side**2 * (channels * kernel) ** 2
                yield lambda x=x, w=w, kernel=kernel: F.conv2d(x, w, padding=kernel // 2), work


@torch.no_grad()
def limits(dtype: str) -> dict[str, float]:
    """The largest rates in GFLOP/s, of any shape and memory format that is tried."""
    kinds = {"matrix product": products, "convolution": convolutions}
    return {
        name: max(work / fastest(call) for call, work in kind(getattr(torch, dtype))) / 1e9
        for name, kind in kinds.items()
    }


def fastest(call: Callable[[], object]) -> float:
    """Seconds of the fastest of a few calls, after one that is not counted."""

    def seconds() -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    return min([seconds() for _ in range(1 + CALLS)][1:])
