"""A picture as the start: the strength's plan, the part that a mask keeps, the canvas that is painted on."""

from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter, ImageOps
from torch import Tensor

from ldm.samplers.denoiser import Denoiser, Prediction
from ldm.samplers.step import Steps

Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels, as PIL's crop takes it


# ------------------------------------------------------------------------------------------------ strength


@dataclass(frozen=True)
class StrengthPlan:
    """What a strength means, to print: the sigmas (evaluations + 1,) that are run, empty if the picture stays as it is.

    replaces: the run starts from noise alone, and nothing of the picture is in it.
    """

    rule: str
    strength: float
    steps: int
    sigmas: Tensor
    replaces: bool

    @property
    def evaluations(self) -> int:
        return max(len(self.sigmas) - 1, 0)

    @property
    def start(self) -> float:
        """The first sigma: how much noise is laid on the picture. 0: none."""
        return float(self.sigmas[0]) if self.evaluations else 0.0

    def __str__(self) -> str:
        begins = "noise alone" if self.replaces else "the picture with noise" if self.evaluations else "the picture"
        rows = {
            "strength": f"{self.strength:g}, counted as {self.rule!r}",
            "steps": f"{self.steps} requested, {self.evaluations} evaluations",
            "start": f"{begins}, sigma {self.start:.4f}",
            "sigmas": " ".join(f"{sigma:.4f}" for sigma in self.sigmas.tolist()) or "none",
        }
        return "\n".join(f"{name:<10}{text}" for name, text in rows.items())


def floor(strength: float, sigmas: Tensor) -> Tensor:
    """The last floor(steps * strength), at least 1, and 0 at strength 0; a whole number is not missed by 1e-6."""
    steps = len(sigmas) - 1
    return last(max(1, int(steps * strength + 1e-6)) if strength else 0, sigmas)


def diffusers(strength: float, sigmas: Tensor) -> Tensor:
    """The last min(int(steps * strength), steps), with its slips: int(100 * 0.29) is 28, int(10 * 0.05) is 0."""
    steps = len(sigmas) - 1
    return last(min(int(steps * strength), steps), sigmas)


def webui(strength: float, sigmas: Tensor) -> Tensor:
    """The last int(min(strength, 0.999) * steps) + 1: one more, and one even at strength 0."""
    return last(int(min(strength, 0.999) * (len(sigmas) - 1)) + 1, sigmas)


def continuous(strength: float, sigmas: Tensor) -> Tensor:
    """ceil(steps * strength): as floor where that is whole, else it starts between two sigmas, in proportion."""
    skipped = round((len(sigmas) - 1) * (1 - strength), 9)  # 100 * (1 - 0.29) is 71.00000000000001
    i, part = int(skipped), skipped % 1
    if not part:
        return last(len(sigmas) - 1 - i, sigmas)
    return torch.cat([torch.lerp(sigmas[i], sigmas[i + 1], part)[None], sigmas[i + 1 :]])


def last(count: int, sigmas: Tensor) -> Tensor:
    return sigmas[-count - 1 :] if count else sigmas[:0]


RULES: dict[str, Callable[[float, Tensor], Tensor]] = {
    function.__name__: function for function in (floor, diffusers, webui, continuous)
}
STRENGTH_RULES = (*RULES, "comfy")


def strength_plan(
    strength: float, steps: int, schedule: Callable[[int], Tensor], rule: str = "floor", masked: bool = False
) -> StrengthPlan:
    """schedule(n): the (n + 1,) sigmas of n steps. rule: one of `STRENGTH_RULES`.

    "comfy" always makes `steps` evaluations, the last ones of a schedule of int(steps / strength).
    At strength 1, floor and continuous start from noise alone, and so does diffusers with a mask; the others lay
    noise on the picture, of which at the highest sigma a trace is left.
    """
    if rule == "comfy":
        sigmas = last(steps if strength else 0, schedule(int(steps / strength) if 0 < strength < 1 else steps))
    else:
        sigmas = RULES[rule](strength, schedule(steps))
    replaces = strength == 1 and (rule in ("floor", "continuous") or (rule == "diffusers" and masked))
    return StrengthPlan(rule, strength, steps, sigmas, replaces)


# ------------------------------------------------------------------------------------------------ masks


def keep_outside(denoise: Denoiser, latents: Tensor, mask: Tensor) -> Denoiser:
    """A denoiser that already knows x0 where the mask is 0, as webui and ComfyUI: inpainting with any model.

    latents (B,4,h,w): the picture to keep. mask (1,1,h,w): 1 to repaint, 0 to keep, in between to blend. A run that
    starts at latents + sigma * noise then keeps the outside at latents + sigma * noise for every sigma, to the end.
    """

    def denoise_inside(x: Tensor, sigma: Tensor) -> Prediction:
        prediction = denoise(x, sigma)
        x0 = mask * prediction.x0 + (1 - mask) * latents
        return prediction._replace(x0=x0, eps=(x - x0) / sigma)

    return denoise_inside


def renoise_outside(steps: Steps, latents: Tensor, noise: Tensor, mask: Tensor) -> Steps:
    """After each step, what the mask keeps is latents + sigma_next * noise again, as in diffusers."""
    sent = None
    with closing(steps), suppress(StopIteration):
        while True:
            step = steps.send(sent)
            known = latents + step.sigma_next.to(noise) * noise
            step = step._replace(x=mask * step.x + (1 - mask) * known)
            sent = yield step
            sent = step if sent is None else sent


def fill(image: Image.Image, mask: Image.Image) -> Image.Image:
    """The colours around a mask spread into it, ever more of their detail towards its edge, as webui's "fill".

    Means of what is visible, from the widest to the narrowest, laid over each other.
    """
    visible = image.convert("RGBA")
    visible.putalpha(ImageOps.invert(mask))
    visible = visible.convert("RGBa")  # premultiplied: hidden pixels weigh nothing
    filled = Image.new("RGBA", image.size)
    for radius, times in ((256, 1), (64, 1), (16, 2), (4, 4), (2, 2), (0, 1)):
        blurred = visible.filter(ImageFilter.GaussianBlur(radius)).convert("RGBA")
        for _ in range(times):
            filled.alpha_composite(blurred)
    return filled.convert("RGB")


def paste(new: Image.Image, old: Image.Image, mask: Image.Image, fade: int = 0) -> Image.Image:
    """`new` where the mask is white, `old` bit for bit where it is black.

    fade: at the mask's edge `new` takes over the colour of `old`, less and less of it over so many pixels: no seam.
    """
    inside = pixels(mask)[..., None] / 255  # (h,w,1)
    a, b = pixels(new), pixels(old)  # (h,w,3)
    if fade:
        difference, distance = led_on(b - a, inside == 0, fade)
        a = a + (1 - distance) * difference
    return Image.fromarray((b + inside * (a - b)).round().clip(0, 255).astype(np.uint8))


def feathered(mask: Image.Image, width: int) -> Image.Image:
    """A hard mask that rises from its edge inwards, over `width` pixels, from black to white."""
    known = pixels(mask)[..., None] == 0
    return Image.fromarray((255 * led_on(np.zeros_like(known), known, width)[1][..., 0]).round().astype(np.uint8))


def led_on(values: np.ndarray, known: np.ndarray, reach: int) -> tuple[np.ndarray, np.ndarray]:
    """values (h,w,c), known (h,w,1), and how far each pixel is from what is known: (h,w,c), and (h,w,1) in 0..1.

    The unknown is filled ring by ring, each pixel with the mean of its neighbours that were known before.
    """
    stack = torch.from_numpy(np.concatenate([values * known, known], -1)).permute(2, 0, 1)[None].float()  # (1,c+1,h,w)
    distance = torch.ones_like(stack[:, -1:])
    for ring in range(reach):
        there = stack[:, -1:] > 0
        distance = torch.where(there, distance.clamp(max=ring / reach), distance)
        mean = F.avg_pool2d(stack, 3, 1, 1)
        stack = torch.where(there, stack, mean / mean[:, -1:].clamp(min=0.1))  # 1/9 is the least of any
    return stack[0, :-1].permute(1, 2, 0).numpy(), distance[0].permute(1, 2, 0).numpy()


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image, dtype=np.float32)


def crop_box(mask: Image.Image, padding: int, aspect: float) -> Box:
    """What is white in a mask and `padding` pixels around it, widened to width / height = `aspect` where there is room.

    The arithmetic of webui's "only masked" and of diffusers' padding_mask_crop.
    """
    white = mask.getbbox() or (0, 0, *mask.size)
    left, top = (max(side - padding, 0) for side in white[:2])
    right, bottom = (min(side + padding, end) for side, end in zip(white[2:], mask.size, strict=True))
    if (right - left) / (bottom - top) > aspect:
        top, bottom = widened(top, bottom, int((right - left) / aspect - (bottom - top)), mask.height)
    else:
        left, right = widened(left, right, int((bottom - top) * aspect - (right - left)), mask.width)
    return left, top, right, bottom


def widened(start: int, stop: int, by: int, end: int) -> tuple[int, int]:
    """An interval widened on both sides, then moved to lie within 0..end."""
    start -= by // 2
    stop += by - by // 2
    over = max(stop - end, 0)
    start, stop = start - over, stop - over
    under = max(-start, 0)
    return start + under, min(stop + under, end)


# ------------------------------------------------------------------------------------------------ canvas


def fit(image: Image.Image, size: tuple[int, int], multiple: int) -> Image.Image:
    """A picture (or its mask, mode L) at a size, its last row and column repeated up to a multiple of the factor."""
    if image.size != size:
        image = image.resize(size, Image.Resampling.NEAREST if image.mode == "L" else Image.Resampling.LANCZOS)
    return extended(image, (0, 0, -size[0] % multiple, -size[1] % multiple), "edge")


def extended(image: Image.Image, sides: Box, how: str) -> Image.Image:
    """A picture with more canvas on its left, top, right and bottom. how: edge (its last row repeated), mirror, or
    noise (the edge, going over into random colours of the picture, by a fixed seed)."""
    left, top, right, bottom = sides
    if not any(sides):
        return image
    source = np.asarray(image)
    borders = ((top, bottom), (left, right), (0, 0))[: source.ndim]
    canvas = np.pad(source, borders, mode="symmetric" if how == "mirror" else "edge")
    if how == "noise":
        share = np.pad(np.zeros((*source.shape[:2], 1), np.float32), borders, mode="linear_ramp", end_values=1)
        colours = source.reshape(-1, source.shape[-1])
        noise = colours[np.random.default_rng(0).integers(len(colours), size=canvas.shape[:2])]
        canvas = (canvas * (1 - share) + noise * share).round().astype(np.uint8)
    return Image.fromarray(canvas)


CANVAS_FILLS = ("edge", "mirror", "noise")


def new_part(size: tuple[int, int], sides: Box) -> Image.Image:
    """The mask of `extended`: white on the new canvas, black on the picture of `size`."""
    return ImageOps.expand(Image.new("L", size), tuple(sides), fill=255)


def tiles(size: tuple[int, int], tile: int, overlap: int) -> list[Box]:
    """Boxes of at most tile x tile pixels that cover a picture (width, height), row by row; neighbours share `overlap`
    pixels or more."""

    def starts(length: int) -> list[int]:
        if length <= tile:
            return [0]
        return [*range(0, length - tile, tile - overlap), length - tile]

    width, height = size
    corners = [(x, y) for y in starts(height) for x in starts(width)]
    return [(x, y, min(x + tile, width), min(y + tile, height)) for x, y in corners]


def ramp(box: Box, overlap: int) -> Image.Image:
    """The weight (mode L) of a tile laid over those before it: rising from its left and top edge over the overlap,
    but not where those are the picture's own."""
    width, height = box[2] - box[0], box[3] - box[1]
    across, down = (
        np.minimum((np.arange(length) + 1) / (overlap + 1), 1) if start else np.ones(length)
        for start, length in zip(box[:2], (width, height), strict=True)
    )
    return Image.fromarray((255 * down[:, None] * across).round().astype(np.uint8))
