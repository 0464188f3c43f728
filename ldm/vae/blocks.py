"""The VAE's blocks. All of its norms have eps 1e-6, and its downsampling pads on the right and at the bottom alone."""

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ldm.attention import attention
from ldm.convolutions import Conv2d, doubled, norm_conv
from ldm.kernels import Linear


class ResnetBlock(nn.Module):
    def __init__(self, inp: int, out: int, groups: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, inp, eps=1e-6)
        self.conv1 = Conv2d(inp, out, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, out, eps=1e-6)
        self.conv2 = Conv2d(out, out, 3, padding=1)
        self.conv_shortcut = Conv2d(inp, out, 1) if inp != out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = norm_conv(self.norm1, self.conv1, x)  # (B,out,h,w)
        return norm_conv(self.norm2, self.conv2, h, self.conv_shortcut, x)


class AttentionBlock(nn.Module):
    """One head over all pixels, with biases (the UNet's has none)."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.to_q = Linear(channels, channels)
        self.to_k = Linear(channels, channels)
        self.to_v = Linear(channels, channels)
        self.to_out = nn.Sequential(Linear(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        h = rearrange(self.group_norm(x), "b c h w -> b (h w) c")  # (B,hw,C)
        h = self.to_out(attention(self.to_q(h), self.to_k(h), self.to_v(h), heads=1))
        return x + rearrange(h, "b (h w) c -> b c h w", h=x.shape[2])


class MidBlock(nn.Module):
    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(channels, channels, groups) for _ in range(2))
        self.attentions = nn.ModuleList([AttentionBlock(channels, groups)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.resnets[0](x)
        x = self.attentions[0](x)
        return self.resnets[1](x)


class Downsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # (B,C,h/2,w/2)


class Upsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return doubled(self.conv, x)  # (B,C,2h,2w)


class Block(nn.Module):
    def __init__(self, inp: int, out: int, layers: int, groups: int):
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(inp if i == 0 else out, out, groups) for i in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for resnet in self.resnets:
            x = resnet(x)
        return x


class DownBlock(Block):
    def __init__(self, inp: int, out: int, layers: int, groups: int, last: bool):
        super().__init__(inp, out, layers, groups)
        self.downsamplers = nn.ModuleList([] if last else [Downsample(out)])

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        for down in self.downsamplers:
            x = down(x)
        return x


class UpBlock(Block):
    def __init__(self, inp: int, out: int, layers: int, groups: int, last: bool):
        super().__init__(inp, out, layers, groups)
        self.upsamplers = nn.ModuleList([] if last else [Upsample(out)])

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        for up in self.upsamplers:
            x = up(x)
        return x
