"""The denoising UNet of Stable Diffusion (Rombach et al. 2022, appendix E), for any UNetConfig.

Module names are those of diffusers' UNet2DConditionModel.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ldm.convolutions import Conv2d
from ldm.kernels import channels_last, norm_silu
from ldm.unet.blocks import Downsample, ResnetBlock, TimestepEmbedding, Upsample, timestep_embedding
from ldm.unet.config import UNetConfig
from ldm.unet.transformer import SpatialTransformer


@dataclass
class Deep:
    """What the deep layers made of an evaluation, (B,C,h,w) at the finest level, to be used again (see `DeepCache`)."""

    features: Tensor | None = None


class DownBlock(nn.Module):
    def __init__(self, c: UNetConfig, level: int):
        super().__init__()
        time, inp, out = 4 * c.channels[0], c.channels[max(level - 1, 0)], c.channels[level]
        self.resnets = nn.ModuleList(ResnetBlock(inp if i == 0 else out, out, time, c.groups) for i in range(c.layers))
        self.attentions = transformers(c, out, c.depth[level], c.layers)
        self.downsamplers = nn.ModuleList([Downsample(out)] if level < len(c.channels) - 1 else [])

    def forward(self, x: Tensor, temb: Tensor, context: Tensor) -> list[Tensor]:
        """Everything that the way up will want, finest last."""
        skips = []
        for i, resnet in enumerate(self.resnets):
            x = resnet(x, temb)
            if self.attentions:
                x = self.attentions[i](x, context)
            skips.append(x)
        for down in self.downsamplers:
            skips.append(down(x))
        return skips


class MidBlock(nn.Module):
    def __init__(self, c: UNetConfig):
        super().__init__()
        time, width = 4 * c.channels[0], c.channels[-1]
        self.resnets = nn.ModuleList(ResnetBlock(width, width, time, c.groups) for _ in range(2))
        self.attentions = transformers(c, width, c.mid_depth, 1)

    def forward(self, x: Tensor, temb: Tensor, context: Tensor) -> Tensor:
        x = self.resnets[0](x, temb)
        for transformer in self.attentions:
            x = transformer(x, context)
        return self.resnets[1](x, temb)


class UpBlock(nn.Module):
    def __init__(self, c: UNetConfig, level: int):
        super().__init__()
        last, time, out = len(c.channels) - 1, 4 * c.channels[0], c.channels[level]
        below, above = c.channels[min(level + 1, last)], c.channels[max(level - 1, 0)]
        resnets = []
        for i in range(c.layers + 1):
            skip = above if i == c.layers else out
            resnets.append(ResnetBlock((below if i == 0 else out) + skip, out, time, c.groups))
        self.resnets = nn.ModuleList(resnets)
        self.attentions = transformers(c, out, c.depth[level], c.layers + 1)
        self.upsamplers = nn.ModuleList([Upsample(out)] if level > 0 else [])

    def forward(
        self, x: Tensor, skips: list[Tensor], temb: Tensor, context: Tensor, deep: Deep | None = None
    ) -> Tensor:
        """deep: x of the last stage, if it has been computed, or where it is to be kept."""
        last = len(self.resnets) - 1
        for i in range(0 if deep is None or deep.features is None else last, last + 1):
            if deep is not None and i == last:
                x = deep.features = x if deep.features is None else deep.features
            x = self.resnets[i](torch.cat([x, skips.pop()], dim=1), temb)
            if self.attentions:
                x = self.attentions[i](x, context)
        for up in self.upsamplers:
            x = up(x, skips[-1].shape[-2:])
        return x


def transformers(c: UNetConfig, channels: int, depth: int, count: int) -> nn.ModuleList:
    if depth == 0:
        return nn.ModuleList()
    heads, linear = c.heads_at(channels), c.linear_projection
    return nn.ModuleList(
        SpatialTransformer(channels, c.context_width, heads, depth, linear, c.groups) for _ in range(count)
    )


class UNet(nn.Module):
    """`unet(x, t, context, vector=None)`: what the net makes of the noisy latents: epsilon or v, as it was trained."""

    def __init__(self, config: UNetConfig):
        super().__init__()
        c = self.config = config
        levels, width = range(len(c.channels)), c.channels[0]
        self.conv_in = Conv2d(c.in_channels, width, 3, padding=1)
        self.time_embedding = TimestepEmbedding(width, 4 * width)
        if c.vector_width is not None:
            self.add_embedding = TimestepEmbedding(c.vector_width, 4 * width)
        self.down_blocks = nn.ModuleList(DownBlock(c, level) for level in levels)
        self.mid_block = MidBlock(c)
        self.up_blocks = nn.ModuleList(UpBlock(c, level) for level in reversed(levels))
        self.conv_norm_out = nn.GroupNorm(c.groups, width, eps=1e-5)
        self.conv_out = Conv2d(width, c.out_channels, 3, padding=1)

    def forward(
        self,
        x: Tensor,
        t: Tensor | float,
        context: Tensor,
        vector: Tensor | None = None,
        deep: Deep | None = None,
    ) -> Tensor:
        """x (B,in_channels,h,w) in the net's dtype, already scaled by 1/sqrt(1 + sigma^2); h and w may be any size.

        t: timestep 0..999, fractions allowed, a number or (B,). context (B,n,context_width): the text.
        vector (B,vector_width): SDXL's size conditioning. deep: features to start from instead of the deep layers; has
        the new ones afterwards if it had none. Returns (B,out_channels,h,w).
        """
        t = torch.as_tensor(t, device=x.device).expand(len(x))
        temb = self.time_embedding(timestep_embedding(t, self.config.channels[0]).to(x.dtype))  # (B,4C)
        if self.config.vector_width is not None:
            temb = temb + self.add_embedding(vector)

        skips = [self.conv_in(channels_last(x))]  # (B,C,h,w)
        *coarser, finest = self.up_blocks
        if deep is None or deep.features is None:
            for down in self.down_blocks:
                skips += down(skips[-1], temb, context)  # (B,mC,h/2^k,w/2^k)
            x = self.mid_block(skips[-1], temb, context)
            for up in coarser:
                x = up(x, skips, temb, context)  # (B,mC,h/2^k,w/2^k)
        x = finest(x, skips, temb, context, deep)
        return self.conv_out(norm_silu(self.conv_norm_out, x))  # (B,out,h,w)
