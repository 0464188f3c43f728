"""A pipeline whose nets are on its device one at a time, and wait on the CPU: for a GPU that cannot hold them all."""

from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from ldm.pipeline import Pipeline


def at_work(pipe: "Pipeline", net: nn.Module) -> None:
    """Called before `net` computes: with `pipe.offload` it comes to the device, and the one before it leaves."""
    if pipe.offloaded is None:
        return
    for other in (pipe.text_encoder, pipe.text_encoder_2, pipe.unet, pipe.vae):
        if other is not None and other is not net and on(other).type == pipe.offloaded.type:
            other.to("cpu")
    if on(net).type != pipe.offloaded.type:
        net.to(pipe.offloaded)


def on(net: nn.Module) -> torch.device:
    return next(net.parameters()).device
