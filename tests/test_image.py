"""Pictures in and out: what a viewer shows of a file is what the net gets."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.image import latent_mask, save_png, to_images, to_mask, to_rgb, to_tensor, upright_size


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
    ],
    ids=["RGB", "L", "1", "RGBA", "LA", "P", "P-index", "P-alphas", "CMYK", "I;16", "I;16B", "I"],
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


def test_mask_is_nearest_at_latent_size():
    mask = Image.new("L", (16, 8), 0)
    mask.paste(255, (8, 0, 16, 4))
    assert latent_mask(mask, 2, 4).tolist() == [[[[0, 0, 1, 1], [0, 0, 0, 0]]]]
    mask.putpixel((0, 0), 51)
    assert latent_mask(mask, 2, 4)[0, 0, 0, 0] == 0.2


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


def test_save(tmp_path):
    image = Image.new("RGB", (2, 2), RED)
    save_png(image, tmp_path / "a.png", "a heart ♥\nSteps: 20")
    with Image.open(tmp_path / "a.png") as read:
        assert read.format == "PNG" and read.text == {"parameters": "a heart ♥\nSteps: 20"}
        assert np.array_equal(read, image)
    assert [file.name for file in tmp_path.iterdir()] == ["a.png"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError("disk full")])
def test_save_that_is_interrupted(tmp_path, monkeypatch, error):
    """Half of the file was written: neither it nor its temporary name stays, and what was there before does."""
    kept = tmp_path / "a.png"
    kept.write_bytes(b"old")

    def half(image, file, **options):
        file.write_bytes(b"\x89PNG")
        raise error

    monkeypatch.setattr(Image.Image, "save", half)
    with pytest.raises(type(error) if isinstance(error, Exception) else error):
        save_png(Image.new("RGB", (2, 2)), kept, "")
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("a.png", b"old")]
