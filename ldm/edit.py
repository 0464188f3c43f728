"""Edits that are a call on another picture, or several calls: each changes the settings and calls `make` again."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ldm.image import to_mask, to_rgb
from ldm.img2img import Box, crop_box, extended, feathered, fit, new_part, paste, ramp, tiles
from ldm.output import Output
from ldm.settings import Settings

Make = Callable[[Settings], Output]
Draw = Callable[[Settings, tuple[int, int]], Tensor]  # the initial noise (B,4,h,w) of a picture (width, height)


class Grid(NamedTuple):
    """Tiles of `side` pixels of which neighbours share `overlap`; `factor` pixels to a latent."""

    side: int
    overlap: int
    factor: int

    def boxes(self, size: tuple[int, int]) -> list[Box]:
        return tiles(size, self.side, self.overlap)

    def noise(self, draw: Draw, s: Settings, size: tuple[int, int]) -> Tensor:
        """The initial noise of the whole canvas."""
        shape = (size[1] // self.factor, size[0] // self.factor)
        if s.noise is not None and tuple(s.noise.shape[2:]) != shape:
            raise ValueError(
                f"noise has shape {tuple(s.noise.shape)}: a canvas of {size} pixels needs (B,4,{shape[0]},{shape[1]})"
            )
        return draw(s, size) if s.noise is None else s.noise

    def start(self, noise: Tensor, box: Box, seed: int) -> dict[str, Any]:
        """The settings of a tile: its part of the whole noise, which is varied already. Later draws are its own: no
        two tiles, and no two pictures of a batch, have the same seed."""
        left, top, right, bottom = (side // self.factor for side in box)
        seed = (seed + (top * 2**16 + left) * 0x9E3779B97F4A7C15) % 2**63 if left or top else seed
        varied = {"subseed": None, "subseed_strength": 0.0, "seed_resize_from": None, "seed": seed}
        return {"noise": noise[..., top:bottom, left:right], "tile": None, "width": None, "height": None} | varied


# How `enlarge` resizes: latents with torch, or pictures with Pillow.
LATENT_FILTERS = {"latent": "bilinear", "latent-nearest": "nearest-exact", "latent-bicubic": "bicubic"}
PICTURE_FILTERS = {name.lower(): Image.Resampling[name] for name in ("NEAREST", "BILINEAR", "BICUBIC", "LANCZOS")}


def enlarged(make: Make, s: Settings, size: tuple[int, int], factor: int) -> Output:
    """The hires pass: a small picture first (unless there is one), made larger, then image to image at `strength`.

    size: (width, height) of the small one. Latents are resized as they are; pictures go through the VAE once more.
    """
    width, height = (round(side * s.enlarge) for side in size)
    given = s.image is not None or s.latents is not None
    # The noise that somebody gives is that of the first run; of the second if there is no other.
    second = replace(s, enlarge=1.0, noise=s.noise if given else None, tile=None, width=width, height=height)
    if s.image is not None and s.enlarge_filter in PICTURE_FILTERS:
        image = fit(to_rgb(s.image), size, 1)
        image = image.resize((width, height), PICTURE_FILTERS[s.enlarge_filter])
        return make(replace(second, image=image, tile=s.tile))
    # At strength 0 a given picture comes back as its latents, without a call of the UNet.
    plain: dict[str, Any] = {"strength": 0.0, "strength_rule": "floor", "noise": None} if given else {}
    first = make(replace(s, enlarge=1.0, tile=None, **plain))
    if s.enlarge_filter in LATENT_FILTERS:
        assert first.latents is not None, "of one run"
        z = F.interpolate(
            first.latents, (-(-height // factor), -(-width // factor)), mode=LATENT_FILTERS[s.enlarge_filter]
        )
        return make(replace(second, image=None, latents=z))
    # Each picture has a start of its own now, so that each is a call of its own.
    pictures = [image.resize((width, height), PICTURE_FILTERS[s.enlarge_filter]) for image in first.images]
    pairs = zip(second.each(), pictures, strict=True)
    return joined(s, (make(replace(one, image=image, latents=None, tile=s.tile)) for one, image in pairs))


def only_masked(make: Make, s: Settings, size: tuple[int, int]) -> Output:
    """Inpaint a box around the mask at the full size (width, height) of the model, and put it back into the picture."""
    assert s.image is not None and s.mask is not None and s.padding_mask_crop is not None
    image, mask = to_rgb(s.image), to_mask(s.mask, s.mask_blur)
    box = crop_box(mask, s.padding_mask_crop, size[0] / size[1])
    inside = replace(s, image=image.crop(box), mask=mask.crop(box), mask_blur=0.0, padding_mask_crop=None)
    made = make(replace(inside, width=size[0], height=size[1], paste_back=False))
    whole = []
    for new in made.images:
        new = new.resize((box[2] - box[0], box[3] - box[1]), Image.Resampling.LANCZOS)
        canvas = image.copy()
        whole_box = s.paste_back is False  # else by the mask, as in diffusers and webui
        canvas.paste(new if whole_box else paste(new, image.crop(box), mask.crop(box)), box[:2])
        whole.append(canvas)
    return replace(made, images=whole)


def outpainted(make: Make, draw: Draw, s: Settings, size: tuple[int, int], grid: Grid, soft: bool) -> Output:
    """Paint the canvas that `extend` adds to a picture of `size`, tile by tile, the best known tile first.

    What was known of a tile stays bit for bit; where the two meet, the new part takes over its colour.
    soft: let the new part grow out of what the canvas is filled with; not for inpainting models, which take that for
    the picture.
    """
    assert s.image is not None and s.extend is not None
    image = extended(fit(to_rgb(s.image), size, 1), s.extend, s.extend_fill)
    new, fade = new_part(size, s.extend), 4 * grid.factor

    def painted(one: Settings) -> Output:
        canvas, unknown = fit(image, image.size, grid.factor), fit(new, new.size, grid.factor)
        noise = grid.noise(draw, one, canvas.size)
        boxes, made = grid.boxes(canvas.size), []
        while boxes := [box for box in boxes if unknown.crop(box).getbbox()]:
            box = min(boxes, key=lambda box: sum(unknown.crop(box).histogram()[1:]))
            known, part = canvas.crop(box), unknown.crop(box)
            # At its edge the new part goes on as the canvas was filled, and is free of that only `fade` pixels away.
            mask = feathered(part, fade) if soft else part
            inside = replace(
                one, image=known, mask=mask, **grid.start(noise, box, one.seeds[0]), extend=None, paste_back=False
            )
            made.append(make(inside))
            canvas.paste(paste(made[-1].images[0], known, part, fade), box[:2])
            unknown.paste(0, box)
        return Output([cut(canvas, image.size)], made[0].latents if len(made) == 1 else None, one.seeds, one)

    return joined(s, map(painted, s.each()))


def in_tiles(make: Make, draw: Draw, s: Settings, size: tuple[int, int], grid: Grid) -> Output:
    """Image to image of a large picture, tile by tile; each tile fades in over those on its left and above it.

    Beside the picture and the result there is one tile at a time, and the noise: 4 floats a latent.
    """
    assert s.image is not None and s.tile is not None
    source = fit(to_rgb(s.image), size, grid.factor)
    mask = None if s.mask is None else fit(to_mask(s.mask, s.mask_blur), size, grid.factor)

    def painted(one: Settings) -> Output:
        result = source.copy()
        noise = grid.noise(draw, one, source.size)
        for box in grid.boxes(source.size):
            part = None if mask is None else mask.crop(box)
            if part is not None and not part.getbbox():
                continue
            inside = replace(
                one, image=source.crop(box), mask=part, mask_blur=0.0, **grid.start(noise, box, one.seeds[0])
            )
            result.paste(make(inside).images[0], box[:2], ramp(box, grid.overlap))
        return Output([cut(result, size)], None, one.seeds, one)

    return joined(s, map(painted, s.each()))


def cut(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Without what `fit` has padded."""
    return image if image.size == size else image.crop((0, 0, *size))


def joined(s: Settings, outputs: Iterable[Output]) -> Output:
    parts = list(outputs)
    latents = [part.latents for part in parts if part.latents is not None]
    return Output(
        [image for part in parts for image in part.images],
        torch.cat(latents) if len(latents) == len(parts) else None,
        s.seeds,
        s,
    )
