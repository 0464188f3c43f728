"""The UNet in less time and not equal: for sampling, where nobody asks for its exact numbers."""

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.unet.transformer import SpatialTransformer, TransformerBlock
from ldm.unet.unet import Deep, UNet


class DeepCache:
    """The UNet of one run, of whose evaluations every `interval`-th is whole (Ma et al. 2023, with a uniform interval).

    Those between take over what the deep layers made of the last whole one, and run the last stage of the finest level
    alone, between the first and the last convolution.
    """

    def __init__(self, unet: UNet, interval: int):
        self.unet, self.interval = unet, interval
        self.count, self.deep = 0, Deep()

    def __call__(self, x: Tensor, t: Tensor, context: Tensor, vector: Tensor | None = None) -> Tensor:
        if self.count % self.interval == 0:
            self.deep = Deep()
        self.count += 1
        return self.unet(x, t, context, vector, self.deep)


class MergingTransformer(SpatialTransformer):
    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        for block in self.transformer_blocks:
            vars(block).update(size=x.shape[-2:])
        return super().forward(x, context)


class MergingBlock(TransformerBlock):
    """Self-attention on fewer tokens (Bolya & Hoffman 2023, ToMe for Stable Diffusion).

    The upper left token of each 2x2 stays. Of the others the share `ratio` of all, those most like one that stays, are
    averaged into it, and share what attention makes of it.
    """

    ratio: float
    size: torch.Size

    def attend(self, x: Tensor) -> Tensor:
        merge, unmerge = merging(x, self.size, self.ratio)
        h = merge(x)
        return unmerge(self.attn1(h, h))


def merging(x: Tensor, size: torch.Size, ratio: float) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """x (B,hw,C) -> merge and unmerge: (B,hw,C') to (B,n,C') and back."""
    place = torch.arange(size[0] * size[1], device=x.device).view(*size)
    stays = place[::2, ::2].flatten()
    goes = torch.ones_like(place, dtype=torch.bool)
    goes[::2, ::2] = False
    goes = place[goes]
    count = min(int(ratio * place.numel()), len(goes))
    unit = F.normalize(x.float(), dim=-1)
    likeness, target = (unit[:, goes] @ unit[:, stays].mT).max(dim=-1)  # (B,goes) each
    order = likeness.argsort(dim=-1, descending=True)
    merged, alone = order[:, :count], order[:, count:]
    target = target.gather(1, merged)  # (B,count)

    def pick(t: Tensor, index: Tensor) -> Tensor:
        return t.gather(1, index[..., None].expand(-1, -1, t.shape[-1]))

    def merge(t: Tensor) -> Tensor:
        others = t[:, goes]
        index = target[..., None].expand(-1, -1, t.shape[-1])
        means = t[:, stays].scatter_reduce(1, index, pick(others, merged), "mean")
        return torch.cat([means, pick(others, alone)], dim=1)  # (B,n,C')

    def unmerge(t: Tensor) -> Tensor:
        means, rest = t.split([len(stays), len(goes) - count], dim=1)
        out = t.new_empty(len(t), place.numel(), t.shape[-1])
        out[:, stays] = means
        for index, values in ((merged, pick(means, target)), (alone, rest)):
            out.scatter_(1, goes[index][..., None].expand(-1, -1, t.shape[-1]), values)
        return out

    return merge, unmerge


def merged(unet: UNet, ratio: float) -> UNet:
    """A copy on the same parameters that merges tokens at the finest level that has attention, where there are most."""
    twin = copy.deepcopy(unet, {id(parameter): parameter for parameter in unet.parameters()})
    finest = next((level for level, depth in enumerate(twin.config.depth) if depth), len(twin.config.depth))
    blocks = [*twin.down_blocks[finest : finest + 1], *twin.up_blocks[::-1][finest : finest + 1]]
    for module in nn.ModuleList(blocks).modules():
        if isinstance(module, SpatialTransformer):
            module.__class__ = MergingTransformer
        elif isinstance(module, TransformerBlock):
            module.__class__ = MergingBlock
            vars(module).update(ratio=ratio)
    return twin
