"""What tells one official UNet from another: a row of numbers. The defaults are SD 1's."""

from dataclasses import dataclass


@dataclass(frozen=True)
class UNetConfig:
    """`depth` is the number of transformer blocks at each level, 0 for none. The official models fix either the number
    of heads (SD 1) or their width (SD 2, SDXL): the other one is None."""

    in_channels: int = 4
    out_channels: int = 4
    channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers: int = 2
    depth: tuple[int, ...] = (1, 1, 1, 0)
    mid_depth: int = 1
    heads: int | None = 8
    head_width: int | None = None
    context_width: int = 768
    linear_projection: bool = False  # proj_in and proj_out as Linear (SD 2, SDXL) or as 1x1 convolution (SD 1)
    vector_width: int | None = None  # size and crop conditioning (SDXL)
    groups: int = 32

    def heads_at(self, channels: int) -> int:
        if self.head_width is not None:
            return channels // self.head_width
        assert self.heads is not None, "one of heads and head_width"
        return self.heads
