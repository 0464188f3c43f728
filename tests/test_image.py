"""Pictures in and out: what a viewer shows of a file is what the net gets."""

import io
import os
import resource
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, JpegImagePlugin, features

import ldm.image
from ldm.image import (
    check_format,
    encode,
    encode_within,
    latent_mask,
    open_picture,
    read_text,
    save,
    save_all,
    to_images,
    to_mask,
    to_rgb,
    to_tensor,
    upright_size,
)


def pixels(image):
    """The RGB values of a picture one pixel high."""
    assert image.mode == "RGB" and image.height == 1
    return [image.getpixel((x, 0)) for x in range(image.width)]


def raw(mode, *values):
    return Image.frombytes(mode, (len(values), 1), b"".join(values))


def palette(**info):
    image = Image.new("P", (3, 1))
    image.putpalette([255, 0, 0, 0, 255, 0, 10, 20, 30])
    image.putdata([0, 1, 2])
    image.info |= info
    return image


RED, WHITE = (255, 0, 0), (255, 255, 255)


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (raw("RGB", b"\1\2\3", b"\377\0\0"), [(1, 2, 3), RED]),
        (raw("L", b"\0", b"\200", b"\377"), [(0,) * 3, (128,) * 3, WHITE]),
        (Image.frombytes("1", (2, 1), b"\x80"), [WHITE, (0, 0, 0)]),
        # What is transparent shows the white page, not the colour that is stored under it.
        (raw("RGBA", b"\377\0\0\377", b"\0\0\0\0", b"\0\0\0\200"), [RED, WHITE, (127,) * 3]),
        (raw("LA", b"\7\377", b"\0\0", b"\0\200"), [(7,) * 3, WHITE, (127,) * 3]),
        (palette(), [RED, (0, 255, 0), (10, 20, 30)]),
        (palette(transparency=1), [RED, WHITE, (10, 20, 30)]),
        (palette(transparency=b"\377\0\200"), [RED, WHITE, (132, 137, 142)]),
        (raw("CMYK", b"\0\377\377\0", b"\0\0\0\377", b"\0\0\0\0"), [RED, (0, 0, 0), WHITE]),
        # 65535 / 257 = 255: scaled, not cut to their first or last eight bits.
        (raw("I;16", b"\0\0", b"\0\200", b"\377\377", b"\1\1"), [(0,) * 3, (128,) * 3, WHITE, (1,) * 3]),
        (raw("I;16B", b"\0\0", b"\200\0", b"\377\377", b"\0\200"), [(0,) * 3, (128,) * 3, WHITE, (0,) * 3]),
        (Image.fromarray(np.array([[0, 32768, 65535]], np.int32)), [(0,) * 3, (128,) * 3, WHITE]),
        # Hue in 255ths of the circle; BT.601: R = Y + 1.402 (Cr - 128), G = Y - 0.714 (Cr - 128).
        (raw("HSV", b"\0\377\377", b"\125\377\377", b"\7\0\200"), [RED, (0, 255, 0), (128,) * 3]),
        (raw("YCbCr", b"\200\200\200", b"\200\200\205"), [(128,) * 3, (135, 124, 128)]),
    ],
    ids=[
        "RGB",
        "L",
        "1",
        "RGBA",
        "LA",
        "P",
        "P-index",
        "P-alphas",
        "CMYK",
        "I;16",
        "I;16B",
        "I",
        "HSV",
        "YCbCr",
    ],
)
def test_modes(image, expected):
    assert pixels(to_rgb(image)) == expected
    as_tensor = torch.tensor(expected, dtype=torch.float32).T[None, :, None] / 127.5 - 1
    assert torch.equal(to_tensor(image), as_tensor)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "L", "P", "I;16", "1"])
def test_modes_of_a_file(mode):
    """As PIL opens it: with a file's own info."""
    file, grey = io.BytesIO(), Image.new("L", (1, 1), 255 if mode == "1" else 200)
    image = Image.fromarray(np.array(grey, np.uint16) * 257) if mode == "I;16" else grey.convert(mode)
    assert image.mode == mode
    image.save(file, "PNG")
    assert pixels(to_rgb(Image.open(file))) == [(grey.getpixel((0, 0)),) * 3]


def test_16_bit_tiff_of_either_order():
    for order, mode in (("<u2", "I;16"), (">u2", "I;16B")):
        file = io.BytesIO()
        Image.frombytes(mode, (2, 1), np.array([1000, 40000], order).tobytes()).save(file, "TIFF")
        assert pixels(to_rgb(Image.open(file))) == [(4,) * 3, (156,) * 3]


def test_lab():
    """L* in 255ths of 100, a* and b* signed; grey of L* 50.2 is Y = ((50.2 + 16) / 116)^3 = .186, in sRGB 119.

    sRGB's red is (54.3, 80.8, 69.9) under D50, for which Pillow's table of eight bits is coarser.
    """
    image = raw("LAB", b"\0\0\0", b"\200\0\0", b"\377\0\0", bytes([138, 81, 70]))
    errors = np.abs(np.array(pixels(to_rgb(image))) - [(0,) * 3, (119,) * 3, WHITE, RED]).max(1)
    assert errors[:3].max() <= 1 and errors[3] <= 5


def test_mode_without_a_range_is_refused():
    with pytest.raises(ValueError, match=r"mode F .* convert it to mode L or RGB"):
        to_rgb(Image.new("F", (1, 1)))


@pytest.mark.parametrize(
    ("orientation", "operation"),
    [
        (1, None),
        (2, Image.Transpose.FLIP_LEFT_RIGHT),
        (3, Image.Transpose.ROTATE_180),
        (4, Image.Transpose.FLIP_TOP_BOTTOM),
        (5, Image.Transpose.TRANSPOSE),
        (6, Image.Transpose.ROTATE_270),
        (7, Image.Transpose.TRANSVERSE),
        (8, Image.Transpose.ROTATE_90),
    ],
)
def test_orientation(orientation, operation):
    """A phone stores the sensor's rows and says in the EXIF how to hold them."""
    stored = Image.fromarray(np.arange(18, dtype=np.uint8).reshape(2, 3, 3) * 10)
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    stored.save(file, "PNG", exif=exif)
    upright = stored if operation is None else stored.transpose(operation)
    assert np.array_equal(to_rgb(Image.open(file)), upright)
    assert np.array_equal(to_rgb(to_rgb(Image.open(file))), upright)  # turned once
    assert np.array_equal(to_mask(Image.open(file)), upright.convert("L"))
    assert upright_size(Image.open(file)) == upright.size


def test_the_callers_image_is_left_alone():
    image = Image.new("RGBA", (2, 1), (1, 2, 3, 0))
    to_tensor(image)
    assert image.mode == "RGBA" and image.getpixel((0, 0)) == (1, 2, 3, 0)


def test_tensor_layout():
    image = Image.fromarray(np.arange(18, dtype=np.uint8).reshape(2, 3, 3))
    tensor = to_tensor(image)
    assert tensor.shape == (1, 3, 2, 3) and tensor.dtype == torch.float32 and tensor.is_contiguous()
    assert tensor[0, 2, 1, 0] == 11 / 127.5 - 1


def test_there_and_back():
    every = torch.arange(256).reshape(1, 1, 16, 16).expand(1, 3, -1, -1).float() / 127.5 - 1
    (image,) = to_images(every)
    assert np.array_equal(np.asarray(image)[..., 1].ravel(), np.arange(256))
    assert torch.equal(to_tensor(image), every)


def test_to_images_rounds_and_clips():
    values = torch.tensor([-9.0, -1.0, -0.999, 0.0, 0.9, 1.0, 9.0])
    expected = np.clip((values.double().numpy() + 1) * 127.5, 0, 255).round()
    images = to_images(values.reshape(1, 1, 1, -1).expand(2, 3, -1, -1))
    assert len(images) == 2
    assert [r for r, _, _ in pixels(images[1])] == expected.tolist() == [0, 0, 0, 128, 242, 255, 255]


def test_mask_at_latent_size():
    mask = Image.new("L", (16, 8), 0)
    mask.paste(255, (8, 0, 16, 4))
    assert latent_mask(mask, (2, 4)).tolist() == [[[[0, 0, 1, 1], [0, 0, 0, 0]]]]
    mask.putpixel((2, 1), 51)  # not the first of its latent's pixels
    assert latent_mask(mask, (2, 4))[0, 0, 0, 0] == 0.2
    assert latent_mask(mask, (2, 4), nearest=True)[0, 0, 0, 0] == 0


def test_thin_masks():
    """A line of one pixel is repainted; where diffusers' way loses it there is a warning."""
    mask = Image.new("L", (16, 8), 0)
    mask.paste(255, (0, 3, 16, 4))
    assert latent_mask(mask, (2, 4)).tolist() == [[[[1, 1, 1, 1], [0, 0, 0, 0]]]]
    with pytest.warns(UserWarning, match="so thin that diffusers' way to shrink it loses it: nothing is repainted"):
        assert latent_mask(mask, (2, 4), nearest=True).max() == 0


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        (raw("L", b"\0", b"\177", b"\200", b"\377"), [0, 127, 128, 255]),
        (raw("I;16", b"\0\0", b"\0\1", b"\0\200", b"\377\377"), [0, 1, 128, 255]),
        (Image.frombytes("1", (4, 1), b"\x40"), [0, 255, 0, 0]),
        (raw("RGBA", b"\0\0\0\377", b"\377\377\377\377", b"\0\0\0\0", b"\0\0\0\377"), [0, 255, 255, 0]),
    ],
    ids=["L", "I;16", "1", "RGBA"],
)
def test_mask_modes(mask, expected):
    assert np.asarray(to_mask(mask)).ravel().tolist() == expected


def test_mask_blur():
    """A step becomes the integral of a normal distribution of that width."""
    mask = Image.new("L", (80, 3))
    mask.paste(255, (40, 0, 80, 3))
    row = np.asarray(to_mask(mask, 6.0))[1].astype(float)
    erf = torch.erf((torch.arange(80) - 39.5) / 6 / 2**0.5).numpy()
    assert np.abs(row - 255 * (1 + erf) / 2).max() < 4
    assert np.array_equal(to_mask(mask), mask)


def photograph(side=48):
    """A picture of which a format can lose something."""
    x, y = np.meshgrid(np.arange(side), np.arange(side))
    noise = np.random.default_rng(0).integers(0, 60, (side, side))
    return Image.fromarray(np.stack([4 * x, 4 * y, noise + x + y], -1).clip(0, 255).astype(np.uint8))


SUFFIXES = [".png", ".PNG", ".jpg", ".jpeg", ".webp", ".avif"]
TEXT = "a heart ♥ 猫 😀\nNegative prompt: ü\nSteps: 20"


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_save(tmp_path, suffix):
    image, file = photograph(), tmp_path / f"a{suffix}"
    save(image, file, TEXT, force=True)
    with Image.open(file) as read:
        assert read.format == {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG"}.get(suffix.lower(), suffix[1:].upper())
        assert read_text(read) == TEXT
        error = np.abs(np.asarray(read).astype(int) - np.asarray(image))
    assert error.max() == 0 if suffix.lower() == ".png" else 0 < error.mean() < 10
    assert [file.name for file in tmp_path.iterdir()] == [f"a{suffix}"]
    before = file.read_bytes()
    save(image, file, TEXT, force=True)
    assert file.read_bytes() == before  # the same picture is the same file


def test_text_lies_where_webuis_readers_look(tmp_path):
    """EXIF 2.32, 4.6.5: UserComment is 8 bytes that name the code, then the text, in webui big-endian UTF-16."""
    for suffix in SUFFIXES[2:]:
        save(photograph(), tmp_path / f"a{suffix}", "é猫")
        with Image.open(tmp_path / f"a{suffix}") as read:
            assert read.getexif().get_ifd(0x8769)[0x9286] == b"UNICODE\0\0\xe9\x73\x2b"
    save(photograph(), tmp_path / "a.png", "é猫")
    assert Image.open(tmp_path / "a.png").text["parameters"] == "é猫"


@pytest.mark.parametrize(
    "comment",
    [
        b"UNICODE\0" + "Steps: 猫".encode("utf-16-le"),
        b"UNICODE\0" + "Steps: 猫".encode("utf-16-be"),
        b"UNICODE\0" + "\ufeffSteps: 猫".encode("utf-16-le"),
        b"UNICODE\0" + "\ufeffSteps: 猫".encode("utf-16-be"),
        b"UNICODE\0" + "Steps: 猫\0".encode("utf-16-be"),
        b"ASCII\0\0\0" + "Steps: 猫".encode(),
        bytes(8) + "Steps: 猫\0".encode(),
        "Steps: 猫".encode(),
    ],
)
def test_comments_of_other_programs(comment):
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x8769] = {0x9286: comment}
    photograph().save(file, "JPEG", exif=exif)
    assert read_text(Image.open(file)) == "Steps: 猫"


def test_pictures_without_text():
    assert read_text(photograph()) is None
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x8769] = {0x9286: b"ASCII\0\0\0"}
    photograph().save(file, "JPEG", exif=exif)
    assert read_text(Image.open(file)) is None


@pytest.mark.parametrize("suffix", [".jpg", ".webp", ".avif"])
def test_quality(tmp_path, suffix):
    image, file = photograph(), tmp_path / f"a{suffix}"
    sizes, errors = [], []
    for quality in (1, 50, 90, 100):
        save(image, file, "", quality, force=True)
        sizes.append(file.stat().st_size)
        errors.append(np.abs(np.asarray(Image.open(file)).astype(int) - np.asarray(image)).mean())
    assert sizes == sorted(set(sizes)) and errors == sorted(errors, reverse=True)
    save(image, file, "", force=True)
    assert file.stat().st_size == sizes[2]  # 90 is the default


def test_the_colour_of_a_jpeg(tmp_path):
    for quality, sampling in ((89, 2), (90, 0), (None, 0)):  # 4:2:0 and 4:4:4
        save(photograph(), tmp_path / "a.jpg", "", quality, force=True)
        with Image.open(tmp_path / "a.jpg") as read:
            assert JpegImagePlugin.get_sampling(read) == sampling


@pytest.mark.parametrize("suffix", [".jpg", ".webp", ".avif"])
def test_the_best_quality_that_fits(tmp_path, suffix):
    """Beside all hundred of them: what is returned fits, and the quality above it does not."""
    image, file, side = photograph(), tmp_path / f"a{suffix}", 1000
    format = check_format(file)
    every = [encode(image, format, "x" * side, quality) for quality in range(1, 101)]
    sizes = [len(data) for data in every]
    assert min(sizes) > 2 * side  # the text counts
    for budget in (sizes[0], sizes[0] + 1, sizes[30], sizes[60] - 1, sizes[98], max(sizes), 10**9):
        save(image, file, "x" * side, max_bytes=budget, force=True)
        data = file.read_bytes()
        assert len(data) <= budget and data in every
        best = max(quality for quality, other in enumerate(every) if other == data)
        assert best == 99 or sizes[best + 1] > budget
    file.unlink()
    with pytest.raises(ValueError, match=rf"max_bytes={sizes[0] - 1}: .* take {sizes[0]} bytes at the lowest quality"):
        save(image, file, "x" * side, max_bytes=sizes[0] - 1)
    assert not [*tmp_path.iterdir()]


def test_size_that_falls_while_the_quality_grows(monkeypatch):
    """As JPEG's sometimes does by a few bytes. What is returned fits all the same."""
    sizes = np.random.default_rng(0).permutation(np.arange(1, 101))
    sizes[0] = 1
    monkeypatch.setattr(ldm.image, "encode", lambda image, format, text, quality=90: bytes(int(sizes[quality - 1])))
    for budget in range(1, 120):
        assert len(encode_within(photograph(), "JPEG", "", budget)) <= budget


def test_a_png_fits_or_does_not(tmp_path):
    file = tmp_path / "a.png"
    save(photograph(), file, TEXT)
    size = file.stat().st_size
    save(photograph(), file, TEXT, max_bytes=size, force=True)
    with pytest.raises(ValueError, match=rf"max_bytes={size - 1}: .* take {size} bytes as PNG"):
        save(photograph(), file, TEXT, max_bytes=size - 1)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("a.gif", {}, r"output .*a.gif: give a name that ends in .png, .jpg, .jpeg, .webp, .avif"),
        ("a", {}, "give a name that ends in .png"),
        ("a.png", {"quality": 90}, "quality=90: PNG has none"),
        ("a.jpg", {"quality": 0}, "quality=0: give a whole number from 1 to 100"),
        ("a.jpg", {"quality": 101}, "quality=101: "),
        ("a.jpg", {"quality": 85.5}, "quality=85.5: "),
        ("a.jpg", {"max_bytes": 1e4}, "max_bytes=10000.0: "),
        ("a.jpg", {"max_bytes": 0}, "max_bytes=0: "),
        ("a.jpg", {"quality": 90, "max_bytes": 1000}, "quality=90 with max_bytes=1000, .* give one of them"),
        ("a.jpg", {"parameters": "x" * 40000}, r"JPEG cannot hold 48x48 pixels .* with 40000 characters .*too long"),
        ("a.webp", {"image": Image.new("RGB", (17000, 1))}, "WEBP cannot hold 17000x1 .*16383"),
        ("a.jpg", {"image": Image.new("RGBA", (1, 1))}, "JPEG cannot hold 1x1 pixels of mode RGBA"),
    ],
)
def test_what_a_format_cannot_do(tmp_path, name, options, message):
    with pytest.raises(ValueError, match=message):
        save(**({"image": photograph(), "file": tmp_path / name, "parameters": ""} | options))
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("format", ["avif", "webp"])
def test_a_pillow_without_the_format(tmp_path, monkeypatch, format):
    monkeypatch.setattr(features, "check", lambda name: name != format)
    with pytest.raises(ValueError, match=rf"a.{format}: this Pillow was built without {format}"):
        save(photograph(), tmp_path / f"a.{format}", "")
    save(photograph(), tmp_path / "a.png", "")


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".avif"])
@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_save_that_is_interrupted(tmp_path, monkeypatch, error, there, suffix):
    """Half of the file was written: neither it nor its temporary name stays, and what was there before does."""
    kept, write = tmp_path / f"a{suffix}", Path.write_bytes
    if there:
        kept.write_bytes(b"old")

    def half(file, data):
        write(file, data[: len(data) // 2])
        raise error

    monkeypatch.setattr(Path, "write_bytes", half)
    with pytest.raises(type(error)):
        save(photograph(), kept, "", force=True)
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [(kept.name, b"old")] * there


def test_a_disk_that_takes_only_so_much(tmp_path):
    """The operating system itself stops in the middle of a file."""
    kept = tmp_path / "a.png"
    kept.write_bytes(b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, hard))
    try:
        with pytest.raises(OSError):
            save(photograph(), kept, "", force=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("a.png", b"old")]


def test_a_place_that_cannot_be_written(tmp_path):
    with pytest.raises(FileNotFoundError):
        save(photograph(), tmp_path / "none" / "a.png", "")
    (tmp_path / "a.png").mkdir()
    with pytest.raises(OSError):
        save(photograph(), tmp_path / "a.png", "", force=True)
    assert [file.name for file in tmp_path.iterdir()] == ["a.png"]


def test_names(tmp_path):
    """Nothing is written over without being told; several pictures are numbered either way; links are followed."""
    file, names = tmp_path / "a.png", ["a.png", "a-2.png", "a-3.png", "a-4.png"]
    assert [save(photograph(), file, str(i)).name for i in range(2)] == names[:2]
    two = [photograph()] * 2
    assert [name.name for name in save_all(two, ["2", "3"], [None] * 2, file)] == names[2:]
    assert [name.name for name in save_all(two, ["4", "5"], [None] * 2, file, force=True)] == names[:2]
    assert [read_text(Image.open(tmp_path / name)) for name in names] == ["4", "5", "2", "3"]
    (tmp_path / "link.png").symlink_to("a.png")
    assert save(photograph(), tmp_path / "link.png", "6", force=True).is_symlink()
    assert read_text(Image.open(file)) == "6" and len(list(tmp_path.iterdir())) == 5


def test_without_hard_links(tmp_path, monkeypatch):
    """As on a memory card."""

    def link(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "link", link)
    assert [save(photograph(), tmp_path / "a.png", TEXT).name for _ in range(2)] == ["a.png", "a-2.png"]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a-2.png", "a.png"]
    assert read_text(Image.open(tmp_path / "a-2.png")) == TEXT


def test_nothing_has_the_name_before_it_is_whole(tmp_path, monkeypatch):
    """However the process ends while it works or writes."""
    seen = []
    write = Path.write_bytes

    def watched(path, data):
        seen.append(sorted(file.name for file in tmp_path.iterdir()))
        return write(path, data)

    monkeypatch.setattr(Path, "write_bytes", watched)
    save(photograph(), tmp_path / "a.webp", TEXT, max_bytes=2000)
    assert seen == [[]]


def saved(tmp_path, image, format, **options):
    file = tmp_path / f"in.{format}"
    image.save(file, format, **options)
    return file


def png(width, height, data, depth=8, colour=2):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, "in.png: No such file or directory"),
        (b"", "in.png: not an image that Pillow can read"),
        (b"# Title", "in.png: not an image that Pillow can read"),
        (png(0, 5, b""), "in.png: not an image that Pillow can read"),
        (b"GIF89a" + bytes(7) + b"," + bytes(9) + b"\2\2\x4c\1\0;", "in.png: not an image that Pillow can read"),
        (png(20000, 10000, b""), "in.png: more than 178956970 pixels"),
        (png(4, 4, bytes(52))[:-25], r"in.png: the image is damaged or cut off \(image file is truncated"),
    ],
    ids=["missing", "empty", "text", "no width", "no size", "bomb", "cut"],
)
def test_what_is_no_picture(tmp_path, data, message):
    if data is not None:
        (tmp_path / "in.png").write_bytes(data)
    with pytest.raises(ValueError, match=message):
        open_picture(tmp_path / "in.png")
    with pytest.raises(ValueError, match="Is a directory"):
        open_picture(tmp_path)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "AVIF", "GIF", "TIFF", "BMP"])
def test_damaged_files(tmp_path, format):
    """Cut anywhere, or with bytes changed: a picture or a message, and never later than here."""
    exif = Image.Exif()
    exif[0x0112] = 6
    if format != "TIFF":
        exif[0x8769] = {0x9286: b"UNICODE\0" + TEXT.encode("utf-16-be")}
    data = saved(tmp_path, photograph(), format, exif=exif).read_bytes()
    random, refused = np.random.default_rng(0), 0
    for n in range(120):
        changed = bytearray(data[: random.integers(1, len(data))] if n % 2 else data)
        for _ in range(0 if n % 2 else random.integers(1, 5)):
            changed[random.integers(0, min(len(changed), 1 + n * len(data) // 100))] = random.integers(0, 256)
        (tmp_path / "x").write_bytes(changed)
        try:
            image = open_picture(tmp_path / "x")
            to_rgb(image)
            read_text(image)
        except ValueError:
            refused += 1
    assert refused >= 50  # all of the shorter ones, but for ends that do not matter


def test_damaged_exif(tmp_path):
    file = saved(tmp_path, photograph(), "PNG", exif=b"Exif\0\0XX\0*\0\0\0\x08")
    with pytest.raises(ValueError, match=r"in.PNG: the image is damaged or cut off"):
        open_picture(file)


def test_1_pixel(tmp_path):
    assert pixels(to_rgb(open_picture(saved(tmp_path, Image.new("RGB", (1, 1), RED), "PNG")))) == [RED]


def test_large_pictures_are_taken(tmp_path, monkeypatch, recwarn):
    """Pillow warns of what is above its limit and refuses from twice of it."""
    file = saved(tmp_path, Image.new("RGB", (10, 15)), "PNG")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert open_picture(file).size == (10, 15) and not recwarn.list
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 74)
    with pytest.raises(ValueError, match="more than 148 pixels"):
        open_picture(file)


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP", "AVIF", "TIFF"])
def test_the_first_frame_of_an_animation(tmp_path, format):
    frames = [Image.new("RGB", (2, 1), colour) for colour in ("red", "blue", "white")]
    options = {"lossless": True} if format == "WEBP" else {"quality": 100} if format == "AVIF" else {}
    file = saved(tmp_path, frames[0], format, save_all=True, append_images=frames[1:], **options)
    with pytest.warns(UserWarning, match=r"in\..* has 3 frames: the first is used"):
        image = open_picture(file)
    assert np.abs(np.array(pixels(to_rgb(image))) - RED).max() <= (format == "AVIF")


def test_the_previews_of_a_camera_are_no_frames(tmp_path, recwarn):
    photo = photograph()
    assert open_picture(saved(tmp_path, photo, "MPO", save_all=True, append_images=[photo])).size == photo.size
    assert not recwarn.list


def test_an_inverted_cmyk_jpeg(tmp_path):
    """Adobe writes CMYK with 255 for no ink, which the marker says; so does Pillow."""
    image = Image.new("CMYK", (16, 1), (0, 255, 255, 0))
    read = open_picture(saved(tmp_path, image, "JPEG", quality=100))
    assert b"Adobe" in (tmp_path / "in.JPEG").read_bytes() and read.mode == "CMYK"
    assert np.abs(np.array(pixels(to_rgb(read))) - RED).max() <= 2


def test_16_bit_rgb_png(tmp_path):
    """Pillow keeps the first eight of the bits."""
    (tmp_path / "in.png").write_bytes(png(2, 1, b"\0" + struct.pack(">6H", 0, 0x80FF, 0xFFFF, 0x0100, 0x7F00, 1), 16))
    assert pixels(to_rgb(open_picture(tmp_path / "in.png"))) == [(0, 128, 255), (1, 127, 0)]


def test_a_turned_photograph(tmp_path):
    exif, stored = Image.Exif(), photograph().crop((0, 0, 32, 16))
    exif[0x0112] = 6
    for format in ("TIFF", "PNG"):
        opened = open_picture(saved(tmp_path, stored, format, exif=exif))
        assert opened.size == (16, 32)  # which is asked before the pixels are
        read = to_rgb(opened)
        assert np.array_equal(read, stored.transpose(Image.Transpose.ROTATE_270))
