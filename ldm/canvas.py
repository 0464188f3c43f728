"""The sizes of a call: of its pictures and of the tiles in which they are made, in pixels."""

from ldm.edit import Grid
from ldm.image import upright_size
from ldm.settings import Settings

LARGEST = 4096**2  # pixels in one run: attention grows with their square
LARGEST_CANVAS = 2**28  # pixels of a picture that is made in parts: 0.8 GB each time it is in memory


def size(s: Settings, native: int, factor: int) -> tuple[int, int]:
    """Width and height of the pictures; before `enlarge` and `extend`. `native` is the model's own side."""
    width, height = native, native
    if s.image is not None:
        width, height = upright_size(s.image)
    elif s.latents is not None:
        height, width = (side * factor for side in s.latents.shape[-2:])
    return (width if s.width is None else s.width), (height if s.height is None else s.height)


def checked_size(s: Settings, native: int, factor: int) -> tuple[int, int]:
    """`size`, if the pictures that it leads to can be made."""
    start = size(s, native, factor)
    left, top, right, bottom = s.extend or (0, 0, 0, 0)
    width, height = round(start[0] * s.enlarge) + left + right, round(start[1] * s.enlarge) + top + bottom
    parts = s.tile is not None or s.extend is not None or s.padding_mask_crop is not None
    if width * height > (limit := LARGEST_CANVAS if parts else LARGEST):
        how = "pixels" if parts else "pixels in one run"
        raise ValueError(
            f"{width}x{height} {how}: up to {limit:,} are made; give width= and height=, or, with an image, tile="
            " (the model's native size is good)"
        )
    if s.tiling is not None and (width % factor or height % factor):
        raise ValueError(
            f"tiling={s.tiling!r} at {width}x{height}: the edges would not join after the cut to that size;"
            f" give a size in multiples of {factor}"
        )
    return start


def grid(s: Settings, native: int, factor: int) -> Grid:
    tile = s.tile or native
    overlap = tile // 4 // factor * factor if s.tile_overlap is None else s.tile_overlap
    if tile % factor or overlap % factor or not overlap < tile:
        raise ValueError(
            f"tile={tile}, tile_overlap={overlap}: give multiples of {factor}, the overlap less than the tile"
        )
    return Grid(tile, overlap, factor)
