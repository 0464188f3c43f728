"""Encoding and decoding a large picture in strips of rows, with the result of the whole one.

An activation is a list of strips, (B,C,rows,w) each, top to bottom. The nets' own modules run on one strip after the
other, with a halo of its neighbours' rows: as many as their convolutions look at, so that the zero padding at a cut
spoils rows of the halo alone, which are cut off. A strip is freed when the last strip that looks at it has been made:
about one activation lives at a time. The one thing that looks further is GroupNorm, whose mean and variance are the
whole picture's. They are found first: a segment of the net with k norms runs k + 1 times over the strips, each of the
first k times up to the next norm. Tiles that are blended at their seams, as elsewhere, are faster and not equal.
"""

import copy
import itertools
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
from torch import Tensor, nn

from ldm.convolutions import factor_and_bias
from ldm.vae.blocks import DownBlock, UpBlock

if TYPE_CHECKING:
    from ldm.vae.vae import Decoder, Encoder

WHOLE_UP_TO = 1024 * 1024  # pixels of a picture: the full-size decoder takes 4 GB for so many in float32
STRIP = 2**24  # numbers in the widest activation of one strip
HALO = 2  # rows on either side: two 3x3 convolutions, or three of which two see rows that were doubled; even


class Segment(NamedTuple):
    """What runs on a strip at once; its output has up / down times the rows."""

    module: nn.Module
    up: int = 1
    down: int = 1

    def strip_rows(self, width: int) -> int:
        """How many rows of its input, `width` wide, make a strip: an even number, as downsampling needs."""
        channels = max(side for p in self.module.parameters() for side in p.shape)
        return max(STRIP // (channels * width * self.up**2) // 2 * 2, HALO)

    def own(self, above: int, below: int) -> slice:
        """The rows above..below of its input, in its output."""
        return slice(above * self.up // self.down, below * self.up // self.down)


class Unknown(Exception):
    """The statistics of a norm are not known yet: the segment goes no further on this strip."""


class WholeNorm(nn.Module):
    """`norm` with the statistics of a whole picture that comes in strips, which it is shown once to know them."""

    def __init__(self, norm: nn.GroupNorm):
        super().__init__()
        self.norm = norm
        self.own = slice(None)  # the rows of the next strip that are not its halo
        self.moments: list[tuple[int, Tensor, Tensor]] = []  # of each strip: how many rows, mean and variance (B,G)
        self.affine: tuple[Tensor, Tensor] | None = None  # factor and bias (B,C,1,1)

    def forward(self, x: Tensor) -> Tensor:
        if self.affine is None:
            groups = x[:, :, self.own].float().unflatten(1, (self.norm.num_groups, -1))  # (B,G,C/G,rows,w)
            var, mean = torch.var_mean(groups, dim=(2, 3, 4), correction=0)
            self.moments.append((groups.shape[3], mean.cpu().double(), var.cpu().double()))
            raise Unknown
        factor, bias = self.affine
        return torch.addcmul(bias, x.float(), factor).to(x.dtype)

    def know(self) -> None:
        """The strips' moments are those of the whole picture (law of total variance, in float64)."""
        rows = torch.tensor([count for count, _, _ in self.moments], dtype=torch.float64)[:, None, None]
        mean, var = (torch.stack(values) for values in list(zip(*self.moments, strict=True))[1:])  # (strips,B,G)
        share = rows / rows.sum()
        whole = (share * mean).sum(0)
        self.affine = factor_and_bias(self.norm, whole, (share * (var + (mean - whole) ** 2)).sum(0))


def with_whole_norms(module: nn.Module) -> tuple[nn.Module, list[WholeNorm]]:
    """A copy on the same parameters with its norms exchanged, and these in the order in which they run."""
    module = copy.deepcopy(module, {id(p): p for p in module.parameters()})
    norms = []
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.GroupNorm):
                norms.append(WholeNorm(child))
                setattr(parent, name, norms[-1])
    return module, norms


def read(strips: list[Tensor], start: int, stop: int) -> Tensor:
    """Rows start..stop of an activation."""
    tops = itertools.accumulate((s.shape[2] for s in strips), initial=0)
    return torch.cat([s[:, :, max(start - t, 0) : max(stop - t, 0)] for s, t in zip(strips, tops, strict=False)], dim=2)


def windows(strips: list[Tensor], rows: int, wrap: bool) -> Iterator[tuple[Tensor, int, int]]:
    """The activation anew in strips of `rows` rows: each with its halo, and where its own rows begin and end in that.

    Takes from `strips` what no later window reads.
    """
    height = sum(s.shape[2] for s in strips)
    first, last = 0, height
    if wrap:
        strips[:] = [read(strips, height - HALO, height), *strips, read(strips, 0, HALO)]
        first, last = -HALO, height + HALO
    top = first  # of strips[0]
    for start in range(0, height, rows):
        stop = min(start + rows, height)
        above, below = max(start - HALO, first), min(stop + HALO, last)
        while top + strips[0].shape[2] <= above:
            top += strips.pop(0).shape[2]
        yield read(strips, above - top, below - top), start - above, stop - above


def run(segment: Segment, strips: list[Tensor], wrap: bool) -> list[Tensor]:
    """The segment's output; `strips` are used up. wrap: the picture's last row is followed by its first."""
    rows = segment.strip_rows(strips[0].shape[3])
    if sum(s.shape[2] for s in strips) <= rows:
        return [segment.module(torch.cat(strips, dim=2))]
    module, norms = with_whole_norms(segment.module)

    def outputs(strips: list[Tensor]) -> Iterator[Tensor]:
        for window, above, below in windows(strips, rows, wrap):
            own = segment.own(above, below)
            for norm in norms:
                norm.own = own
            with suppress(Unknown):
                yield module(window)[:, :, own].clone()  # not a view, which would keep the halo

    for norm in norms:
        for _ in outputs(list(strips)):
            pass
        norm.know()
    return list(outputs(strips))


def run_all(segments: list[Segment], strips: list[Tensor], wrap: bool) -> Tensor:
    for segment in segments:
        strips = run(segment, strips, wrap)
    return torch.cat(strips, dim=2)


def wraps_rows(net: nn.Module) -> bool:
    """Whether the paddings of `net` wrap around from the last row to the first (`ldm.seamless`)."""
    return any(getattr(module, "tiling", None) in ("y", "both") for module in net.modules())


def encode(encoder: "Encoder", image: Tensor, wrap: bool = False) -> Tensor:
    """`encoder(image)`, (B,3,h,w) -> (B,2*latent_channels,h/f,w/f), one picture after the other, without gradients.

    wrap: the encoder's paddings wrap around from the last row to the first.
    """
    segments = [Segment(encoder.conv_in)]
    for block in cast(Iterable[DownBlock], encoder.down_blocks):
        segments += [Segment(resnet) for resnet in block.resnets]
        segments += [Segment(down, down=2) for down in block.downsamplers]
    rest = nn.Sequential(encoder.mid_block, encoder.conv_norm_out, nn.SiLU(), encoder.conv_out)
    with torch.no_grad():
        return torch.cat([rest(run_all(segments, [x], wrap)) for x in image.split(1)])


def decode(decoder: "Decoder", z: Tensor, wrap: bool = False) -> Tensor:
    """`decoder(z)`, (B,latent_channels,h,w) -> (B,3,fh,fw), one picture after the other, without gradients.

    wrap: the decoder's paddings wrap around from the last row to the first.
    """
    segments = []
    for block in cast(Iterable[UpBlock], decoder.up_blocks):
        segments += [Segment(resnet) for resnet in block.resnets]
        segments += [Segment(up, up=2) for up in block.upsamplers]
    for last in [i for i, segment in enumerate(segments) if segment.up == 2][-1:]:
        up, resnet = segments[last : last + 2]  # at once: what is between them is the largest activation of all
        segments[last : last + 2] = [Segment(nn.Sequential(up.module, resnet.module), up=2)]
    segments.append(Segment(nn.Sequential(decoder.conv_norm_out, nn.SiLU(), decoder.conv_out)))
    with torch.no_grad():
        return torch.cat([run_all(segments, [decoder.mid_block(decoder.conv_in(x))], wrap) for x in z.split(1)])
