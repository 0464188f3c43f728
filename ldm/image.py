"""Pictures: PIL images to tensors and back, and files that carry their settings."""

import io
import os
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import chain, count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFilter, ImageOps, PngImagePlugin, UnidentifiedImageError, features
from torch import Tensor
from torch.nn import functional as F

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP", ".avif": "AVIF"}
QUALITY = 90  # of the formats that have one, unless somebody says
EXIF_IFD, USER_COMMENT, MAKER_NOTE = 0x8769, 0x9286, 0x927C
RECORD, MOST = "ldm", 32_000  # PNG's text chunk; characters, of EXIF's 65,535 bytes


def open_picture(file: Path) -> Image.Image:
    """A picture that is to be used, upright and read to its end: what is wrong with a file is said here, not later.

    Of an animation, or a file of several pages, it is the first frame, with a warning. Raises ValueError for what
    cannot be read, is no picture, is damaged, or has more pixels than Pillow takes for harmless: twice
    `PIL.Image.MAX_IMAGE_PIXELS`, 179 million.
    """
    try:
        data = file.read_bytes()
    except OSError as error:
        raise ValueError(f"{file}: {error.strerror}") from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # large, but within the limit
            image = Image.open(io.BytesIO(data))
            image.load()
            frames = getattr(image, "n_frames", 1)
            ImageOps.exif_transpose(image, in_place=True)
    except UnidentifiedImageError as error:
        raise ValueError(f"{file}: not an image that Pillow can read") from error
    except Image.DecompressionBombError as error:
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        raise ValueError(f"{file}: more than {limit} pixels, which is taken for an attack: make it smaller") from error
    except Exception as error:  # Pillow's decoders raise nearly anything for damaged files
        raise ValueError(f"{file}: the image is damaged or cut off ({error})") from error
    if frames > 1 and image.format != "MPO":  # which is a camera's JPEG with previews
        warnings.warn(f"{file} has {frames} frames: the first is used", stacklevel=2)
    return image


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


def to_images(pixels: Tensor, truncate: bool = False) -> list[Image.Image]:
    """(B,3,h,w) in [-1,1] (clipped) -> B images, rounded as diffusers does, or cut off as CompVis does."""
    scaled = (pixels.float() / 2 + 0.5).clamp(0, 1) * 255
    scaled = (scaled if truncate else scaled.round()).to(torch.uint8)
    return [Image.fromarray(p) for p in scaled.permute(0, 2, 3, 1).cpu().numpy()]


def to_mask(mask: Image.Image, blur: float = 0.0) -> Image.Image:
    """A mask of any mode as L, white where the picture is repainted, grey where the two are blended.

    blur: the standard deviation, in pixels, by which its edges are softened.
    """
    mask = to_rgb(mask).convert("L")
    return mask.filter(ImageFilter.GaussianBlur(blur)) if blur else mask


def latent_mask(mask: Image.Image, size: Sequence[int], nearest: bool = False) -> Tensor:
    """A mask of mode L -> (1,1,height,width) in [0,1], at the size (height, width) of latents, which divides its own.

    Of each latent's pixels the whitest, so that thin lines are not lost; nearest: the first one, as in diffusers.
    """
    values = torch.from_numpy(np.array(mask))[None, None].float() / 255  # (1,1,H,W)
    h, w = size
    small = F.interpolate(values, (h, w), mode="nearest") if nearest else F.adaptive_max_pool2d(values, (h, w))
    if small.max() == 0 < values.max():
        warnings.warn(
            "the mask is so thin that diffusers' way to shrink it loses it: nothing is repainted", stacklevel=2
        )
    return small


def read_record(image: Image.Image) -> str | None:
    """The record of its run that `save` left in an opened file."""
    text = image.info.get(RECORD)
    if isinstance(text, str):
        return text
    note = image.getexif().get_ifd(EXIF_IFD).get(MAKER_NOTE)
    return note.decode("ascii", "replace") if isinstance(note, bytes) and note.startswith(b"{") else None


def read_text(image: Image.Image) -> str | None:
    """The text that `save` or another program left in an opened file: PNG's "parameters", else EXIF's UserComment."""
    text = image.info.get("parameters")
    if isinstance(text, str):
        return text
    comment = image.getexif().get_ifd(EXIF_IFD).get(USER_COMMENT)
    if isinstance(comment, str):  # what Pillow makes of the type ASCII, which is wrong here but seen
        return comment.removeprefix("ASCII").strip("\0") or None
    if not comment:
        return None
    code, body = comment[:8], comment[8:]
    if code != b"UNICODE\0":
        return (body if code in (b"ASCII\0\0\0", bytes(8)) else comment).decode("utf-8", "replace").strip("\0") or None
    if body[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return body.decode("utf-16", "replace")
    # EXIF leaves the order open. Settings hold English words, whose zeros are the high bytes.
    little = body[1::2].count(0) > body[::2].count(0)
    return body.decode("utf-16-le" if little else "utf-16-be", "replace").rstrip("\0")


def check_format(file: Path, quality: int | None = None, max_bytes: int | None = None) -> str:
    """Pillow's name of the format that the suffix of `file` asks for. Raises ValueError as `save` does."""
    suffix = file.suffix.lower()
    if suffix not in FORMATS:
        raise ValueError(f"output {file}: give a name that ends in {', '.join(FORMATS)}")
    if suffix in (".avif", ".webp") and not features.check(suffix[1:]):
        raise ValueError(f"output {file}: this Pillow was built without {suffix[1:]}, give a name that ends in .png")
    if quality is not None and max_bytes is not None:
        raise ValueError(f"quality={quality} with max_bytes={max_bytes}, which looks for the quality: give one of them")
    if quality is not None and suffix == ".png":
        raise ValueError(f"quality={quality}: PNG has none, it keeps every pixel; give a .jpg, .webp or .avif, or none")
    if quality is not None and not (isinstance(quality, int) and 1 <= quality <= 100):
        raise ValueError(f"quality={quality}: give a whole number from 1 to 100")
    if max_bytes is not None and not (isinstance(max_bytes, int) and max_bytes >= 1):
        raise ValueError(f"max_bytes={max_bytes}: give a whole number of bytes, at least 1")
    return FORMATS[suffix]


def encode(
    image: Image.Image, format: str, parameters: str, quality: int = QUALITY, record: str | None = None
) -> bytes:
    """The bytes of a file. PNG has no quality; a record of many steps has no place in the other formats.

    JPEG keeps all of the colour (4:4:4) from quality 90 on: for the same bytes that is as close at 512 pixels and 3 dB
    closer at 64, where below it is farther at 512.
    """
    info, exif = PngImagePlugin.PngInfo(), Image.Exif()
    info.add_text("parameters", parameters)
    comments: dict[int, bytes] = {USER_COMMENT: b"UNICODE\0" + parameters.encode("utf-16-be")}  # as webui
    if record is not None:
        info.add_text(RECORD, record, zip=True)
        if len(record) < MOST:
            comments[MAKER_NOTE] = record.encode()
    exif[EXIF_IFD] = comments
    options: dict[str, Any] = {"pnginfo": info} if format == "PNG" else {"exif": exif, "quality": quality}
    if format == "JPEG" and quality >= 90:
        options["subsampling"] = "4:4:4"
    file = io.BytesIO()
    try:
        image.save(file, format, **options)
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"{format} cannot hold {image.width}x{image.height} pixels of mode {image.mode} with {len(parameters)}"
            f" characters about them ({error}): PNG can, of an RGB picture"
        ) from error
    return file.getvalue()


def encode_within(image: Image.Image, format: str, parameters: str, max_bytes: int) -> bytes:
    """The best quality, 1 to 100, that fits, by bisection: all of `max_bytes` counts, the settings too.

    Sizes do not always grow with the quality: what is returned fits, and the next quality does not, but a higher one
    still may.
    """
    fits, too_much = encode(image, format, parameters, 1), 101
    if len(fits) > max_bytes:
        least = "as PNG" if format == "PNG" else "at the lowest quality"
        raise ValueError(f"max_bytes={max_bytes}: the picture and its settings take {len(fits)} bytes {least}")
    quality = 1 if format != "PNG" else 100
    while too_much - quality > 1:
        middle = (quality + too_much) // 2
        data = encode(image, format, parameters, middle)
        if len(data) <= max_bytes:
            quality, fits = middle, data
        else:
            too_much = middle
    return fits


def save(
    image: Image.Image,
    file: Path,
    parameters: str,
    quality: int | None = None,
    max_bytes: int | None = None,
    force: bool = False,
    record: str | None = None,
) -> Path:
    """Write an RGB `image` as `file`, in the format of its suffix: .png, .jpg, .jpeg, .webp or .avif.

    It appears whole or not at all. With `force` over what has that name (or is linked from it); else, if there is
    something, as heart-2.png, heart-3.png, ...: the name that was taken is returned. parameters: the text about it, as
    webui keeps it: in PNG the text chunk "parameters", else EXIF's UserComment. quality: 1 to 100, `QUALITY` unless
    given, with Pillow's other settings. max_bytes: the best quality that fits, see `encode_within`. record: of the run,
    in PNG the text chunk "ldm", else EXIF's MakerNote; where bytes are counted it is left out. Raises ValueError for
    what the format cannot do, and OSError where the file cannot be written.
    """
    format = check_format(file, quality, max_bytes)
    if max_bytes is None:
        data = encode(image, format, parameters, QUALITY if quality is None else quality, record)
    else:
        data = encode_within(image, format, parameters, max_bytes)
    return place(file, lambda part: part.write_bytes(data), force)


def place(file: Path, write: Callable[[Path], Any], force: bool = False) -> Path:
    """What `write` writes, whole or not at all, as `file`, or under the name that is free; which is returned. `force`:
    over what has that name. Raises FileNotFoundError for a folder that is none."""
    if not file.resolve().parent.is_dir():
        raise FileNotFoundError(f"the folder {file.resolve().parent} does not exist, make it first")
    part = file.with_name(f".{os.getpid()}.part")
    try:
        write(part)
        if force:
            part.replace(file.resolve())
            return file
        for name in chain([file], (file.with_stem(f"{file.stem}-{i}") for i in count(2))):
            with suppress(FileExistsError):
                take(part, name)
                return name
        raise AssertionError("there are infinitely many names")
    finally:
        part.unlink(missing_ok=True)


def take(part: Path, name: Path) -> None:
    """Give a file a name that is free, or raise FileExistsError: whoever else looks for a name cannot get the same."""
    try:
        os.link(part, name)
    except FileExistsError:
        raise
    except OSError:  # a file system without links: for a moment there is an empty file
        name.touch(exist_ok=False)
        part.replace(name)


def save_all(
    images: list[Image.Image],
    texts: list[str],
    records: Sequence[str | None],
    file: Path,
    quality: int | None = None,
    max_bytes: int | None = None,
    force: bool = False,
) -> list[Path]:
    """`save` each; with `force` over heart.png, heart-2.png, ... Raises ValueError that names those saved before it."""
    saved: list[Path] = []
    for i, (image, text, record) in enumerate(zip(images, texts, records, strict=True)):
        name = file.with_stem(f"{file.stem}-{i + 1}") if force and i else file
        try:
            saved.append(save(image, name, text, quality, max_bytes, force, record))
        except (OSError, ValueError) as error:
            reason = (error.strerror if isinstance(error, OSError) else None) or error
            kept = f"; saved before it: {', '.join(map(str, saved))}" if saved else ""
            raise ValueError(f"output {name} cannot be written: {reason}{kept}") from error
    return saved
