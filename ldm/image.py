"""Pictures: PIL images to tensors and back, and PNG files that carry their settings."""

import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFilter, ImageOps, PngImagePlugin
from torch import Tensor


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode as 8-bit RGB, upright as its EXIF says: transparency falls on white, 16 bits are scaled, not clipped."""
    image = ImageOps.exif_transpose(image)
    if image.mode in ("I;16", "I;16L", "I;16B", "I;16N", "I"):
        return Image.fromarray(
            (np.asarray(image).astype(np.int64).clip(0, 65535) / 257).round().astype(np.uint8)
        ).convert("RGB")
    if image.mode == "F":
        raise ValueError("an image of mode F (floating point) has no agreed range: convert it to mode L or RGB first")
    if image.mode == "La":  # L with premultiplied alpha, which converts to LA alone
        image = image.convert("LA")
    if image.mode in ("RGBA", "LA", "PA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Width and height as `to_rgb` will have them, without decoding the picture."""
    turned = image.getexif().get(0x0112, 1) >= 5  # orientations 5 to 8 lie on their side
    return image.size[::-1] if turned else image.size


def to_tensor(image: Image.Image) -> Tensor:
    """Image of any mode -> (1,3,h,w) float32 in [-1,1], contiguous."""
    pixels = torch.from_numpy(np.array(to_rgb(image)))  # (h,w,3)
    return (pixels.permute(2, 0, 1)[None].float() / 127.5 - 1).contiguous()


def to_images(pixels: Tensor) -> list[Image.Image]:
    """(B,3,h,w) in [-1,1] (clipped) -> B images, rounded as diffusers does."""
    scaled = ((pixels.float() / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
    return [Image.fromarray(p) for p in scaled.permute(0, 2, 3, 1).cpu().numpy()]


def to_mask(mask: Image.Image, blur: float = 0.0) -> Image.Image:
    """A mask of any mode as L, white where the picture is repainted, grey where the two are blended.

    blur: the standard deviation, in pixels, by which its edges are softened.
    """
    mask = to_rgb(mask).convert("L")
    return mask.filter(ImageFilter.GaussianBlur(blur)) if blur else mask


def latent_mask(mask: Image.Image, height: int, width: int) -> Tensor:
    """A mask of mode L -> (1,1,height,width) in [0,1], at the size of latents: nearest, as in diffusers."""
    values = torch.from_numpy(np.array(mask))[None, None].float() / 255  # (1,1,H,W)
    return torch.nn.functional.interpolate(values, size=(height, width), mode="nearest")


def save_png(image: Image.Image, file: Path, parameters: str) -> None:
    """Write `image` with the text chunk "parameters", over what `file` was. It appears whole or not at all."""
    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", parameters)
    part = file.with_name(f".{file.name}.{os.getpid()}.part")
    try:
        image.save(part, format="PNG", pnginfo=info)
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)
