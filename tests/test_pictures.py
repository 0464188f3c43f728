"""Pictures of every odd kind as image= and mask=: each is taken, or refused in words."""

import io

import numpy as np
import pytest
from PIL import Image

import ldm

QUICK = {"steps": 2, "strength": 0.5, "progress": False}


@pytest.fixture(scope="module")
def pipe():
    return ldm.Pipeline.from_pretrained()


def plain(width=24, height=16):
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, 255 - x], -1).astype(np.uint8))


def through(format, image, **options):
    """As PIL opens such a file."""
    file = io.BytesIO()
    image.save(file, format, **options)
    return Image.open(file)


def rotated():
    exif = Image.Exif()
    exif[0x0112] = 6
    return through("PNG", plain().transpose(Image.Transpose.ROTATE_90), exif=exif)


KINDS = {
    "palette": lambda: plain().quantize(16),
    "palette with transparency": lambda: through("GIF", plain().quantize(16), transparency=0),
    "CMYK": lambda: through("JPEG", plain().convert("CMYK")),
    "16 bit": lambda: through("PNG", Image.fromarray(np.asarray(plain().convert("L")).astype(np.uint16) * 257)),
    "grey with alpha": lambda: plain().convert("LA"),
    "1 bit": lambda: plain().convert("1"),
    "animated": lambda: through("GIF", plain(), save_all=True, append_images=[Image.new("RGB", (24, 16), "red")]),
    "EXIF-rotated": rotated,
}


@pytest.mark.parametrize("kind", KINDS)
def test_kinds(pipe, kind):
    """The same as its RGB pixels, upright; of an animation the frame that is shown."""
    image = KINDS[kind]()
    out = pipe(image=image, **QUICK).images[0]
    assert out.size == (24, 16) and out.mode == "RGB"
    assert np.array_equal(out, pipe(image=ldm.image.to_rgb(KINDS[kind]()), **QUICK).images[0])


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_masks(pipe, kind):
    grey = np.asarray(ldm.image.to_mask(KINDS[kind]()))
    out = pipe(image=plain(), mask=KINDS[kind](), **QUICK).images[0]
    assert np.array_equal(np.asarray(out)[grey == 0], np.asarray(plain())[grey == 0])


def test_frames_of_an_animation(pipe):
    image = KINDS["animated"]()
    image.seek(1)
    out = pipe(image=image, **QUICK).images[0]
    assert np.array_equal(out, pipe(image=Image.new("RGB", (24, 16), "red"), **QUICK).images[0])


@pytest.mark.parametrize("name", ["image", "mask"])
@pytest.mark.parametrize("keep", [0.3, 0.9])
def test_cut_off(pipe, name, keep):
    file = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(file, "PNG")
    cut = Image.open(io.BytesIO(file.getvalue()[: int(keep * len(file.getvalue()))]))
    with pytest.raises(ValueError, match=f"{name} is damaged or cut off .*: give a picture that can be read"):
        pipe(**{"image": Image.fromarray(noise)} | {name: cut}, **QUICK)


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (3, 200), (2000, 3)])
def test_tiny_and_thin(pipe, size):
    image = plain(*size)
    assert pipe(image=image, **QUICK).images[0].size == size
    mask = Image.new("L", size, 255)
    assert pipe(image=image, mask=mask, **QUICK).images[0].size == size
    assert pipe(image=image, extend=(1, 2, 3, 4), tile=64, **QUICK).images[0].size == (size[0] + 4, size[1] + 6)


def test_10000_pixels_wide(pipe):
    out = pipe(image=plain(10_000, 8), **QUICK).images[0]
    assert out.size == (10_000, 8)
    out = pipe(image=plain(10_000, 8), tile=512, **QUICK).images[0]
    assert out.size == (10_000, 8)


def test_too_large_for_one_run(pipe):
    large = Image.new("RGB", (10_000, 10_000))
    with pytest.raises(
        ValueError,
        match=r"10000x10000 pixels in one run: up to 16,777,216 .*width= and height=, or, with an image, tile=",
    ):
        pipe(image=large, **QUICK)
    with pytest.raises(ValueError, match="20000x20000 pixels in one run"):
        pipe(width=20_000, height=20_000, **QUICK)
    assert pipe(image=large, width=40, height=40, **QUICK).images[0].size == (40, 40)


def test_nothing_to_repaint(pipe):
    """A black mask: the picture, with a warning. Its inverse: everything."""
    black = Image.new("L", (24, 16))
    with pytest.warns(UserWarning, match="the mask is black everywhere"):
        out = pipe(image=plain(), mask=black, **QUICK).images[0]
    assert np.array_equal(out, plain())
    white = pipe(image=plain(), mask=Image.new("L", (24, 16), 255), **QUICK).images[0]
    assert np.array_equal(white, pipe(image=plain(), **QUICK).images[0])


@pytest.mark.parametrize("edit", [{}, {"mask": True}, {"extend": (8, 0, 0, 0)}, {"enlarge": 2}, {"tile": 16}])
def test_strength_0(pipe, edit):
    """Nothing is run, and each edit still gives its picture."""
    edit = {"mask": Image.new("L", (24, 16), 255)} if "mask" in edit else edit
    steps = []
    out = pipe(image=plain(), strength=0, progress=False, callback=steps.append, **edit)
    assert not steps and out.images[0].size == {"extend": (32, 16), "enlarge": (48, 32)}.get(
        next(iter(edit), ""), (24, 16)
    )
