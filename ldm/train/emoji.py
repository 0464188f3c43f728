"""Rebuild the data set of the default model bit for bit: 8,750 emoji of 64x64 in eight styles.

    python -m ldm.train data

downloads 25 MB from the npm registry into runs/packages (--runs), renders for 70 s on one core and writes
runs/emoji64.npz (--data), unless that is there. The file has `images` (8750,64,64,4) uint8,
straight alpha, white where alpha is 0, and `captions`, a JSON list of one object a picture.

Which icon stands for which concept, its words and its split were chosen with Unicode's names (emojibase-data 17.0.0,
emojilib 4.0.3), tables made by hand and a look at the pictures. Those choices are data, not rules: they are the
manifest `emoji.json.gz` beside this file, a list of concepts in the order of the data set:

    {"hex", "label", "tags", "kw", "group", "subgroup", "pictures": {style: {"icon", "colors", "split"}}}

The pictures' licences allow training and redistribution with credit; see NOTICE.
"""

import base64
import gzip
import hashlib
import io
import json
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

MANIFEST = Path(__file__).with_name("emoji.json.gz")
CAPTIONS_SHA256 = "6345bb66c3c274c1a5ab02685baffee37f0b4a3ae31f5c1bdca8b62ef1e5f4cb"  # of the UTF-8 text
IMAGES_SHA256 = "b9817f6a879fd8060b3e43c41be2527209f0e7cad01feffc2a3ba7a7307b43e3"  # of the bytes in C order
RENDERERS = {"resvg_py": "0.5.0", "pillow": "13.0.0"}  # the versions that gave this sum

# style -> npm package and its sha512, as `npm view NAME@VERSION dist.integrity` prints it
SOURCES = {
    "noto": (
        "@iconify-json/noto@1.2.9",
        "DQiuXENbun41ch+XPSV55H9FaWKpHTyz46YIKtSaKYD4fIDDzL1tR6H4np/T38jfrTAeI3rcKF0mqHYeZVAuaw==",
    ),
    "twemoji": (
        "@iconify-json/twemoji@1.2.5",
        "uKpuIEV0v6K5BW3Mjdyl+XKFVAbbcPxAgifKvEMtZoUZB5+YiY5zaMm2uNNCxyXzAWU9yNLlj41WU6/mvgALsw==",
    ),
    "fluent 3d": (
        "@lobehub/fluent-emoji-3d@1.1.0",
        "Wlq2lVStTnr8BDpIJ0pEnTKO4LuDxxqTEhTvRtD1DLRF0me7ogeRQjKoehDHXuVJ2Qaecgl5wRBv60lUAG3h7g==",
    ),
    "fluent flat": (
        "@iconify-json/fluent-emoji-flat@1.2.6",
        "RY47RgPb47fYUiyrA64sIOL0+UU02s29sXpNBbIQRBUlPlfNFTKUmZDERGuxDs/7yNGWqQYvuaSYM1M4fRXlUw==",
    ),
    "blob": (
        "@iconify-json/noto-v1@1.2.5",
        "/DsVMius69Q0fRS53z7QK1TROSuar606jiIx+laXtdsYGMXpf6LtHBx6CGfoo3UHHb/XpBsw+1L1x3eyPqMuVA==",
    ),
    "emojione": (
        "@iconify-json/emojione@1.2.3",
        "T9+T3HIbJNLKKsmxYKlaYhvnHYkz/HNYTV7SHCXVZPfeUi4FqskY70YeN8yYAZT8cCv7w5vJxS4Q1m8zb9CMMg==",
    ),
    "firefox": (
        "@iconify-json/fxemoji@1.2.2",
        "UAasRaxzFUKfIGSmLwnoarsssA4LX0VLLuEmplIqM6ZNQqIQRtav8tZ4H1neTlBreXuMQyAifr5jP4kn78DpiQ==",
    ),
    "streamline": (
        "@iconify-json/streamline-emojis@1.2.4",
        "iNr9T9XuZVTyQPJO8ZlLxBzPkpi7qMl+z1l0C31vpEMqhPMelth3n7CeWQYtixdetDPdI81yeG4ROqjWpYJE6A==",
    ),
}


def build(out: Path, cache: Path) -> None:
    """Write the data set to `out`; `cache` keeps the npm tarballs, and those it already has are not fetched again.

    Nothing is left at `out` unless captions and pictures have the pinned sha256.

    Raises:
        RuntimeError: npm is missing or could not fetch a package.
        ValueError: a tarball, the captions or the pictures are not the pinned ones.
    """
    manifest = json.loads(gzip.decompress(MANIFEST.read_bytes()))
    text = captions(manifest)
    check("the captions", text.encode(), CAPTIONS_SHA256, f"restore {MANIFEST.name} from the repository")
    icons = {style: read_icons(fetch(*source, cache)) for style, source in SOURCES.items()}
    rows = [(style, picture["icon"]) for concept in manifest for style, picture in concept["pictures"].items()]
    images = np.stack([icons[style](name) for style, name in tqdm(rows, "render", mininterval=5)])
    pinned = ", ".join(f"{name} {number} (here {version(name)})" for name, number in RENDERERS.items())
    check("the rendered pictures", images.tobytes(), IMAGES_SHA256, f"install the pinned versions: {pinned}")
    write(out, images, text)


def captions(manifest: list[dict]) -> str:
    """The JSON list of one object a picture, in the order of the pictures."""
    rows = [
        {"style": style}
        | {k: concept[k] for k in ("hex", "label", "tags", "kw", "group", "subgroup")}
        | {"colors": picture["colors"], "caption": f"{concept['label']}, {style} style", "split": picture["split"]}
        for concept in manifest
        for style, picture in concept["pictures"].items()
    ]
    return json.dumps(rows, ensure_ascii=False)


def check(what: str, content: bytes, expected: str, remedy: str) -> None:
    found = hashlib.sha256(content).hexdigest()
    if found != expected:
        raise ValueError(f"{what} have sha256 {found}, expected {expected}; {remedy}")


def write(out: Path, images: np.ndarray, text: str) -> None:
    """All or nothing: written beside `out`, then renamed."""
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(out.name + ".part")
    try:
        with temporary.open("wb") as f:
            np.savez_compressed(f, images=images, captions=np.array(text))
        temporary.replace(out)
    finally:
        temporary.unlink(missing_ok=True)


def fetch(package: str, sha512: str, cache: Path) -> Path:
    """The tarball of `package` (NAME@VERSION) in `cache`, by `npm pack` if it is not there; its sha512 is checked."""
    name, number = package.rsplit("@", 1)
    tarball = cache / f"{name.lstrip('@').replace('/', '-')}-{number}.tgz"
    if not tarball.exists():
        if (npm := shutil.which("npm")) is None:
            raise RuntimeError(
                f"npm, which fetches {package}, was not found; install Node.js, or put {tarball} in place"
            )
        cache.mkdir(parents=True, exist_ok=True)
        run = subprocess.run([npm, "pack", package], cwd=cache, capture_output=True, text=True)
        if run.returncode:
            raise RuntimeError(f"`npm pack {package}` failed:\n{run.stderr}")
    found = base64.b64encode(hashlib.sha512(tarball.read_bytes()).digest()).decode()
    if found != sha512:
        raise ValueError(f"{tarball} has sha512 {found}, expected {sha512}; delete it and run again")
    return tarball


def read_icons(tarball: Path) -> Callable[[str], np.ndarray]:
    """A function from an icon's name to its picture (64,64,4) uint8: SVG bodies in one JSON, or WebP of 256x256."""
    with tarfile.open(tarball) as archive:
        wanted = [member for member in archive if member.name.endswith((".webp", "/icons.json"))]
        files = {member.name: file.read() for member in wanted if (file := archive.extractfile(member))}
    if "package/icons.json" not in files:
        return lambda name: shrink(Image.open(io.BytesIO(files[f"package/assets/{name}.webp"])))
    sheet = json.loads(files["package/icons.json"])
    size = {"width": sheet["width"], "height": sheet["height"]}
    return lambda name: shrink(rasterise(size | sheet["icons"][name]))


def rasterise(icon: dict) -> Image.Image:
    """An icon's SVG body, its longer side 240 pixels: 16 samples for each pixel of the result."""
    import resvg_py  # of the extra `train`

    width, height = icon["width"], icon["height"]
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'width="{width}" height="{height}" viewBox="0 0 {width} {height}">{icon["body"]}</svg>'
    )
    return Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg, width=240, height=240))))


def shrink(image: Image.Image) -> np.ndarray:
    """To 60x60 with a margin of 2, filtered with premultiplied alpha -> straight alpha (64,64,4) uint8."""
    kernel = Image.Resampling.BOX if image.width % 60 == 0 else Image.Resampling.LANCZOS
    rgba = np.asarray(image.convert("RGBA")).astype(np.float32) / np.float32(255)
    rgba[..., :3] *= rgba[..., 3:]
    planes = [
        Image.fromarray(np.ascontiguousarray(plane)).resize((60, 60), kernel) for plane in np.moveaxis(rgba, 2, 0)
    ]
    small = np.stack([np.asarray(plane) for plane in planes], axis=2).clip(0, 1)  # Lanczos overshoots
    alpha = small[..., 3:]
    ink = alpha > 1 / 512  # else alpha rounds to 0, and the colour is white
    small[..., :3] = np.where(ink, small[..., :3] / np.where(ink, alpha, 1), 1).clip(0, 1)
    picture = np.full((64, 64, 4), (255, 255, 255, 0), dtype=np.uint8)
    picture[2:-2, 2:-2] = np.round(small * np.float32(255))
    return picture
