"""The UNet's convolutional blocks. (The VAE has twins of them with other eps, other padding and no time.)"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.convolutions import Conv2d, added, doubled
from ldm.kernels import norm_silu


def timestep_embedding(t: Tensor, width: int) -> Tensor:
    """[cos(t w_i), sin(t w_i)], w_i = 10000^(-i / half), float32 (Vaswani et al. 2017; cos first, as CompVis has it).

    t (B,), fractions allowed -> (B,width)
    """
    half = width // 2
    w = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angle = t.float()[:, None] * w
    return torch.cat([angle.cos(), angle.sin()], dim=1)


# How many numbers SDXL's vector speaks of. 6: original height and width, crop's top and left, target height and width;
# 5 (refiner): original height and width, crop's top and left, aesthetic score.
VECTOR_NUMBERS = (6, 5)


def vector_embedding(pooled: Tensor, numbers: Tensor) -> Tensor:
    """SDXL's size conditioning (Podell et al. 2023, section 2.2): each number is embedded as a timestep is.

    pooled (B,projection), numbers (B,n) float32 -> (B,projection + 256 n) in the dtype of pooled
    """
    embedded = timestep_embedding(numbers.flatten(), 256).view(len(numbers), -1)  # (B,256n)
    return torch.cat([pooled, embedded.to(pooled.dtype)], dim=1)


class TimestepEmbedding(nn.Module):
    def __init__(self, width: int, out: int):
        super().__init__()
        self.linear_1 = nn.Linear(width, out)
        self.linear_2 = nn.Linear(out, out)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))


class ResnetBlock(nn.Module):
    def __init__(self, inp: int, out: int, time: int, groups: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, inp, eps=1e-5)
        self.conv1 = Conv2d(inp, out, 3, padding=1)
        self.time_emb_proj = nn.Linear(time, out)
        self.norm2 = nn.GroupNorm(groups, out, eps=1e-5)
        self.conv2 = Conv2d(out, out, 3, padding=1)
        self.conv_shortcut = Conv2d(inp, out, 1) if inp != out else nn.Identity()

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        h = self.conv1(norm_silu(self.norm1, x))  # (B,out,h,w)
        h = h + self.time_emb_proj(F.silu(temb))[:, :, None, None]
        return added(self.conv_shortcut(x), self.conv2, norm_silu(self.norm2, h))


class Downsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)  # (B,C,ceil(h/2),ceil(w/2))


class Upsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """`size` is that of the skip connection to come: twice x, less one where the way down rounded up."""
        # In bfloat16 the sums of weights would be rounded once more, and the net be less exact than its references.
        if size == (2 * x.shape[2], 2 * x.shape[3]) and x.dtype == torch.float32:
            return doubled(self.conv, x)
        return self.conv(F.interpolate(x, size=size, mode="nearest"))  # (B,C,*size)
