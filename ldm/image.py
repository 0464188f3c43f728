"""Pictures: PIL images to tensors and back, and PNG files that carry their settings."""

import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, PngImagePlugin
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


def to_tensor(image: Image.Image) -> Tensor:
    """Image of any mode -> (1,3,h,w) float32 in [-1,1], contiguous."""
    pixels = torch.from_numpy(np.array(to_rgb(image)))  # (h,w,3)
    return (pixels.permute(2, 0, 1)[None].float() / 127.5 - 1).contiguous()


def to_images(pixels: Tensor) -> list[Image.Image]:
    """(B,3,h,w) in [-1,1] (clipped) -> B images, rounded as diffusers does."""
    scaled = ((pixels.float() / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
    return [Image.fromarray(p) for p in scaled.permute(0, 2, 3, 1).cpu().numpy()]


def to_mask(mask: Image.Image, height: int, width: int) -> Tensor:
    """A mask, white where the picture is repainted -> (1,1,height,width) in {0,1}: nearest, at latent size."""
    values = torch.from_numpy(np.array(to_rgb(mask).convert("L")))[None, None].float() / 255
    return (torch.nn.functional.interpolate(values, size=(height, width), mode="nearest") >= 0.5).float()


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
