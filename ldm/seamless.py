"""Nets for pictures that join themselves at opposite edges."""

import copy
from typing import TypeVar

import torch.nn.functional as F
from torch import Tensor, nn

from ldm.vae.blocks import Downsample

Net = TypeVar("Net", bound=nn.Module)


def pad(x: Tensor, sides: tuple[int, int, int, int], tiling: str) -> Tensor:
    """x (B,C,h,w) with (left, right, top, bottom) more pixels: from the opposite edge in the tiled axes, else zeros."""
    left, right, top, bottom = sides
    x = F.pad(x, (left, right, 0, 0), mode="circular" if tiling in ("x", "both") else "constant")
    return F.pad(x, (0, 0, top, bottom), mode="circular" if tiling in ("y", "both") else "constant")


class WrappingConv2d(nn.Conv2d):
    tiling: str
    sides: tuple[int, int, int, int]

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(pad(x, self.sides, self.tiling))


class WrappingDownsample(Downsample):
    """The VAE's, which pads by itself, and not alike on all sides."""

    tiling: str

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(pad(x, (0, 1, 0, 1), self.tiling))  # (B,C,h/2,w/2)


def seamless(net: Net, tiling: str) -> Net:
    """A copy of a UNet or VAE on the same parameters and buffers, in which every convolution wraps around.

    tiling: "x" (left and right edge meet), "y" (top and bottom), "both". Rolling the input along a tiled axis then
    rolls the output, by multiples of the product of all strides. webui's option wraps both axes in the same way, but
    leaves zeros in the VAE encoder's downsampling.
    """
    twin = copy.deepcopy(net, {id(tensor): tensor for tensor in [*net.parameters(), *net.buffers()]})
    for module in twin.modules():
        if isinstance(module, Downsample):
            module.__class__ = WrappingDownsample
            vars(module).update(tiling=tiling)
        elif isinstance(module, nn.Conv2d) and isinstance(module.padding, tuple) and any(module.padding):
            y, x = module.padding
            module.__class__ = WrappingConv2d
            vars(module).update(tiling=tiling, sides=(x, x, y, y), padding=(0, 0))
    return twin
