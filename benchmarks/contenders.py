"""What is compared, each in a process of its own that holds its net while the contenders take turns.

`begin` and `measure` run in that process; `torch` is all that this module imports before it knows whose it is.
"""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.model import Case, inputs

SHORTEST = 0.3  # seconds: what takes less is repeated for so long, and its mean taken


class Ours:
    def __init__(self, folder: Path, dtype: torch.dtype, part: str):
        import ldm

        self.pipe = ldm.Pipeline.from_pretrained(folder, dtype=dtype, device="cpu")

    def text(self, texts: list[str]) -> Tensor:
        return self.pipe.encode_text(texts).context

    def unet(self, x: Tensor, t: int, context: Tensor) -> Tensor:
        return self.pipe.unet(x, t, context)

    def encode(self, image: Tensor) -> Tensor:
        return self.pipe.vae.encode(image).mean

    def decode(self, z: Tensor) -> Tensor:
        return self.pipe.vae.decode(z)


class Diffusers:
    """Holds only the net that is measured: three of full size fit into memory beside each other."""

    memory_format = torch.contiguous_format

    def __init__(self, folder: Path, dtype: torch.dtype, part: str):
        from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel

        if part == "text":
            self.pipe = StableDiffusionPipeline.from_pretrained(folder, unet=None, vae=None, dtype=dtype)
            return
        net_class, name = (UNet2DConditionModel, "unet") if part == "unet" else (AutoencoderKL, "vae")
        net = net_class.from_pretrained(folder / name, dtype=dtype)
        self.net = net.to(memory_format=self.memory_format)

    def text(self, texts: list[str]) -> Tensor:
        prompt, negative = texts
        return torch.cat(self.pipe.encode_prompt(prompt, "cpu", 1, True, negative))

    def unet(self, x: Tensor, t: int, context: Tensor) -> Tensor:
        return self.net(x, t, context).sample

    def encode(self, image: Tensor) -> Tensor:
        return self.net.encode(image).latent_dist.mean

    def decode(self, z: Tensor) -> Tensor:
        return self.net.decode(z).sample


class DiffusersChannelsLast(Diffusers):
    memory_format = torch.channels_last


def freeze() -> None:
    """Let torch.compile take the weights as constants: laid out anew for the kernels, the old ones dropped."""
    import torch._inductor.config as inductor

    inductor.freezing = inductor.freezing_discard_parameters = True


class OursCompiled(Ours):
    def __init__(self, folder: Path, dtype: torch.dtype, part: str):
        super().__init__(folder, dtype, part)
        freeze()
        self.pipe.compile()


class DiffusersCompiled(Diffusers):
    def __init__(self, folder: Path, dtype: torch.dtype, part: str):
        super().__init__(folder, dtype, part)
        freeze()
        self.net.compile()


class OpenVINO:
    """The UNet alone, converted by `to_openvino` and compiled for the shape at hand."""

    def __init__(self, folder: Path, dtype: torch.dtype, part: str):
        import openvino

        precision = {torch.float32: "f32", torch.bfloat16: "bf16"}[dtype]
        self.how = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": torch.get_num_threads()}
        self.core = openvino.Core()
        self.model, self.shape, self.compiled = self.core.read_model(openvino_file(folder)), None, None

    def unet(self, x: Tensor, t: int, context: Tensor) -> Tensor:
        given = [x.float().numpy(), np.array(t), context.float().numpy()]
        if x.shape != self.shape:
            self.compiled = None  # its memory first
            self.model.reshape({i: list(array.shape) for i, array in enumerate(given)})
            self.compiled = self.core.compile_model(self.model, "CPU", self.how)
            self.shape = x.shape
        return torch.from_numpy(self.compiled(given)[0])


def openvino_file(folder: Path) -> Path:
    return folder.with_name("openvino.xml")


def to_openvino(folder: Path) -> float:
    """Convert diffusers' UNet. Returns the seconds that it took."""
    import openvino
    from diffusers import UNet2DConditionModel

    start = time.perf_counter()
    net = UNet2DConditionModel.from_pretrained(folder / "unet")
    x, t, context = inputs(folder, Case("unet", 2, 64), torch.float32)
    model = openvino.convert_model(net, example_input=(x, torch.tensor(t), context))
    openvino.save_model(model, openvino_file(folder), compress_to_fp16=False)
    return time.perf_counter() - start


CONTENDERS = {
    "ldm": Ours,
    "diffusers": Diffusers,
    "diffusers channels-last": DiffusersChannelsLast,
    "OpenVINO": OpenVINO,
    "ldm compiled": OursCompiled,
    "diffusers compiled": DiffusersCompiled,
}

net: Any  # of this process
call: Callable[[], Tensor]  # what of it is measured


def load(name: str, folder: Path, dtype: str, part: str) -> None:
    global net
    net = CONTENDERS[name](folder, getattr(torch, dtype), part)


def begin(folder: Path, case: Case, dtype: str) -> tuple[np.ndarray, float]:
    """The result in float32, and the seconds of this first call, in which some compile."""
    global call
    call = partial(getattr(net, case.part), *inputs(folder, case, getattr(torch, dtype)))
    start = time.perf_counter()
    with torch.no_grad():
        result = call()
    return result.float().numpy(), time.perf_counter() - start


@torch.no_grad()
def measure() -> float:
    """Seconds of a call."""
    start, calls = time.perf_counter(), 0
    while True:
        call()
        calls += 1
        if (taken := time.perf_counter() - start) >= SHORTEST:
            return taken / calls
