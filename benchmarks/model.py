"""The model that is measured: SD 1.5 at its full size, or a tiny one of the same kind, with random weights."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SIDES = {"full": 512, "tiny": 64}  # of a picture, in pixels
PARTS = ("text", "unet", "encode", "decode")
TEXTS = ["a red heart, oil on canvas", "blue, blurry"]


def synthesise(folder: Path, size: str) -> None:
    """A diffusers folder in float32, whose values are what float16 can hold. size: "full" or "tiny"."""
    from ldm.models import SD1
    from tests.parity import reference_pipeline
    from tests.synthetic import TINY_NETS

    reference_pipeline({"full": SD1, "tiny": TINY_NETS}[size]).to(torch.float32).save_pretrained(folder)


def config(folder: Path, part: str) -> dict[str, Any]:
    return json.loads((folder / part / "config.json").read_text())


@dataclass(frozen=True)
class Case:
    """One measurement of one of the PARTS. side: of the picture, in pixels."""

    part: str
    batch: int
    side: int


def inputs(folder: Path, case: Case, dtype: torch.dtype) -> tuple[Any, ...]:
    """What is given to the part, the same in every process: drawn in float32, then rounded to `dtype`."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    batch, side = case.batch, case.side // 2 ** (len(config(folder, "vae")["block_out_channels"]) - 1)
    if case.part == "text":
        return (TEXTS,)
    if case.part == "unet":
        return draw(batch, 4, side, side), 481, draw(batch, 77, config(folder, "unet")["cross_attention_dim"])
    return (draw(batch, 3, case.side, case.side).clamp(-1, 1) if case.part == "encode" else draw(batch, 4, side, side),)


def gigaflop(folder: Path, case: Case) -> float:
    """Of one evaluation of diffusers' UNet, counted on the meta device: with the products of the attention."""
    from diffusers import UNet2DConditionModel
    from torch.utils.flop_counter import FlopCounterMode

    x, t, context = inputs(folder, case, torch.float32)
    with torch.device("meta"):
        net = UNet2DConditionModel.from_config(config(folder, "unet"))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(x.to("meta"), t, context.to("meta"))
    return counter.get_total_flops() / 1e9
