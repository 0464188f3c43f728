"""Pictures to learn from: a folder checked once, its captions, crops, aspect-ratio buckets and batches.

    folder = open_folder("dog", resolution=512, caption="a photo of sks dog")
    print(folder)                                    # dog: 5 pictures of 512x512; 1 refused: ...
    rows = folder.rows(step, batch=2, seed=0)        # (2,) which pictures, all of one size
    pixels = folder.pixels(rows)                     # (2,3,512,512) in [-1,1]
    sizes = [picture.size_numbers() for picture in folder.at(rows)]

Nothing is kept open, and a picture is decoded when it is asked for. It is never flipped: a face or a text would not
bear it, and of five pictures each counts.
"""

import csv
import io
import json
import math
import re
import unicodedata
import warnings
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ldm.image import open_picture, to_rgb, to_tensor
from ldm.train.loop import step_generator

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".avif", ".bmp", ".gif", ".tif", ".tiff")
METADATA = ("metadata.jsonl", "metadata.csv")
SHOWN = 10  # of a long list of files

Size = tuple[int, int]  # width, height


class Picture(NamedTuple):
    """A file that was read to its end. size: as it is seen, upright. target: the size that it is trained at."""

    file: Path
    caption: str
    size: Size
    target: Size

    def size_numbers(self) -> list[float]:
        """SDXL's size conditioning (Podell et al. 2023, section 2.2), in pixels and in its order: height and width of
        the original, top and left of the crop in the resized picture, height and width now."""
        (width, height), (w, h) = self.size, self.target
        top, left = centre(cover(self.size, self.target), self.target)
        return [float(n) for n in (height, width, top, left, h, w)]


class Refusal(NamedTuple):
    name: str  # in the folder
    reason: str


# ------------------------------------------------------------------------------------------------ geometry


def buckets(resolution: int, multiple: int) -> list[Size]:
    """The sizes of NovelAI's aspect-ratio bucketing (2022): as many pixels as fit into resolution x resolution.

    Sides are multiples of `multiple`, from half of `resolution` to twice it; to each width the largest height, and to
    each height the largest width.
    """
    sides = range(math.ceil(resolution / 2 / multiple) * multiple, 2 * resolution + 1, multiple)
    tallest = [(w, min(resolution**2 // w, 2 * resolution) // multiple * multiple) for w in sides]
    return sorted({size for w, h in tallest if h in sides for size in ((w, h), (h, w))})


def nearest_bucket(size: Size, sizes: Sequence[Size]) -> Size:
    """That of the nearest ratio of width to height, by the logarithm: 2:1 is as far from 1:1 as 1:2 is."""
    width, height = size
    return min(sizes, key=lambda s: abs(math.log(width * s[1] / (height * s[0]))))


def cover(size: Size, target: Size) -> Size:
    """What to resize to, so that it covers `target` and no more: one side is equal, the other is cut.

    Rounded down, as torchvision's Resize does.
    """
    (width, height), (w, h) = size, target
    return (width * h // height, h) if width * h >= w * height else (w, height * w // width)


def centre(size: Size, target: Size) -> tuple[int, int]:
    """Top and left of the middle part of that size."""
    (width, height), (w, h) = size, target
    return round((height - h) / 2), round((width - w) / 2)


def crop(image: Image.Image, target: Size) -> Image.Image:
    """The middle of the picture at the size `target`.

    Lanczos, as diffusers' scripts for SDXL and this library's own image to image; those for SD 1 take bilinear, which
    is softer, and what a model is shown of five pictures it will draw.
    """
    w, h = target
    resized = image.resize(cover(image.size, target), Image.Resampling.LANCZOS)
    top, left = centre(resized.size, target)
    return resized.crop((left, top, left + w, top + h))


# ------------------------------------------------------------------------------------------------ batches


def batch_rows(kinds: Tensor, batch: int, seed: int, step: int) -> Tensor:
    """The rows (batch,) of step `step`, all of one kind. kinds (n,) int64: of each row 0, 1, ...; all as often.

    Each epoch calls every row once, in an order of its own; called rows wait with those of their kind until there are
    `batch` of them. So all batches are full, none is dropped, and who waits at the end of an epoch goes first in the
    next; a kind of fewer rows than a batch repeats them. With one kind and n a multiple of `batch` the rows are those
    of `batch_indices`.
    """
    if batch < 1:
        raise ValueError(f"a batch of {batch} pictures: give at least 1")
    counts = kinds.bincount()

    def called(epoch: int) -> Tensor:
        """Every row, in the order of the epoch."""
        return torch.randperm(len(kinds), generator=step_generator(seed + 1, epoch))

    def full(epoch: int) -> int:
        """How many batches are full before the epoch begins."""
        return int((epoch * counts // batch).sum())

    latest = (step + 1 + len(counts)) * batch // len(kinds) + 1  # by then, were each kind to leave a batch unfull
    epoch = bisect_right(range(latest + 1), step, key=full) - 1
    order = called(epoch)
    place = torch.empty_like(order)  # (n,) of each call in its kind's endless queue, from 1
    for kind, count in enumerate(counts.tolist()):
        place[kinds[order] == kind] = torch.arange(1, count + 1) + epoch * count
    last = int((place % batch == 0).nonzero()[step - full(epoch)])  # the call that makes the batch full
    kind, end = int(kinds[order[last]]), int(place[last])
    count = int(counts[kind])
    queue = [rows[kinds[rows] == kind] for rows in map(called, range((end - batch) // count, math.ceil(end / count)))]
    first = (end - batch) % count
    return torch.cat(queue)[first : first + batch]


@dataclass(frozen=True)
class Folder:
    """What `open_folder` found. pictures: in natural order. refused: what is in the folder and not used, and why."""

    path: Path
    pictures: list[Picture]
    refused: list[Refusal]

    def __len__(self) -> int:
        return len(self.pictures)

    def __str__(self) -> str:
        sizes = Counter(picture.target for picture in self.pictures)
        of = ", ".join(f"{n} of {w}x{h}" if len(sizes) > 1 else f"of {w}x{h}" for (w, h), n in sorted(sizes.items()))
        line = f"{self.path}: {len(self)} picture{'' if len(self) == 1 else 's'}{': ' if len(sizes) > 1 else ' '}{of}"
        return f"{line.strip()}; {len(self.refused)} refused" + listing(f"{r.name}: {r.reason}" for r in self.refused)

    def rows(self, step: int, batch: int, seed: int) -> Tensor:
        """Which pictures (batch,) step `step` takes, all of one size: see `batch_rows`. Five make a batch of eight."""
        return batch_rows(self.kinds, batch, seed, step)

    @cached_property
    def kinds(self) -> Tensor:
        """(n,) int64: of each picture the number of its size."""
        numbers = {size: i for i, size in enumerate(sorted({picture.target for picture in self.pictures}))}
        return torch.tensor([numbers[picture.target] for picture in self.pictures], dtype=torch.int64)

    def pixels(self, rows: Iterable[int] | Tensor) -> Tensor:
        """Pictures of one size, cropped from the centre: (B,3,h,w) float32 in [-1,1].

        Raises ValueError for a file that is no longer the picture it was.
        """
        images = []
        for picture in self.at(rows):
            width, height = picture.size
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # was said when the folder was opened
                image = to_rgb(open_picture(picture.file))
            if image.size != picture.size:
                raise ValueError(
                    f"{picture.file} was {width}x{height} when the folder was opened and is {image.width}x"
                    f"{image.height} now: leave the pictures alone while they are trained on, and start again"
                )
            images.append(to_tensor(crop(image, picture.target)))
        return torch.cat(images)

    @property
    def captions(self) -> list[str]:
        """Of all pictures, in their order."""
        return [picture.caption for picture in self.pictures]

    def at(self, rows: Iterable[int] | Tensor) -> list[Picture]:
        return [self.pictures[int(row)] for row in rows]


def listing(lines: Iterable[str]) -> str:
    lines = list(lines)
    rest = [f"and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
    return "".join(f"\n  {line}" for line in lines[:SHOWN] + rest)


# ------------------------------------------------------------------------------------------------ a folder


def open_folder(
    path: str | Path,
    *,
    resolution: int,
    caption: str | None = None,
    bucketed: bool = False,
    multiple: int = 64,
    least: int = 1,
) -> Folder:
    """Every picture below `path`, with its caption, each read to its end once so that training meets no surprise.

    Pictures are the files that end in `SUFFIXES`, in folders too, as in Hugging Face's imagefolder, in the order of
    their names with numbers as numbers (2 before 10), which no file system changes. What is hidden (.name) is left out.
    Pixels are those of `ldm.image.to_rgb`: upright by EXIF, transparency on white, 16 bits scaled, the first frame of
    an animation, with a warning.

    A caption is, the first that there is: "text" beside "file_name" (relative to itself) in a folder's metadata.jsonl
    or metadata.csv; the file name.txt beside name.png, in UTF-8; `caption`, as DreamBooth's instance prompt.

    resolution: the side of the square that pictures are cut to. bucketed: instead, each is assigned to that of the
    `buckets` whose sides are nearest to its own in ratio. multiple: of what these sides are; at least a latent's pixels
    times what the UNet halves: 64 for Stable Diffusion.

    Refused, by name and reason, are files that are damaged, no picture, listed but missing, listed twice, with an
    empty caption, without a use, or so small that they would be enlarged more than twice: they would teach blur.
    Raises ValueError with that list where fewer than `least` pictures are left (0: a folder may be empty), and for
    pictures without any caption.
    """
    path = Path(path)
    if resolution < multiple or resolution % multiple:
        raise ValueError(f"resolution={resolution}: give a multiple of {multiple}")
    if not path.is_dir():
        raise ValueError(f"{path} is not a folder" if path.exists() else f"{path} does not exist: give a folder")
    files, refused = find_files(path)
    captions = find_captions(path, files, caption, refused)
    sizes = buckets(resolution, multiple) if bucketed else [(resolution, resolution)]
    pictures = []
    for name, text in tqdm(captions.items(), "checking pictures", leave=False, delay=2):
        file = files[name]
        try:
            size = to_rgb(open_picture(file)).size
            target = nearest_bucket(size, sizes)
            if max(target[0] / size[0], target[1] / size[1]) > 2:
                given, wanted = (f"{w}x{h}" for w, h in (size, target))
                raise ValueError(f"too small: {given} would have to be enlarged more than twice for {wanted}")
            pictures.append(Picture(file, text, size, target))
        except ValueError as error:
            refused.append(Refusal(name, str(error).removeprefix(f"{file}: ")))
    folder = Folder(path, pictures, sorted(refused, key=lambda refusal: natural(refusal.name)))
    if len(pictures) < least:
        raise ValueError(f"too few pictures, at least {least} are needed. {folder}")
    return folder


def natural(name: str) -> tuple:
    """The key of an order: numbers as numbers, letters without their case, then whatever tells two names apart."""
    name = unicodedata.normalize("NFC", name)  # which of é's spellings a name has depends on the file system
    return [int(part) if i % 2 else part.casefold() for i, part in enumerate(re.split(r"(\d+)", name))], name


def find_files(path: Path) -> tuple[dict[str, Path], list[Refusal]]:
    """What is below `path` and not hidden, by its name (NFC, with /) in natural order; and what has no usable name."""
    files, refused = {}, []
    for file in sorted(path.rglob("*")):
        name = unicodedata.normalize("NFC", file.relative_to(path).as_posix())
        if any(part.startswith(".") for part in name.split("/")) or file.is_dir():
            continue
        shown = name.encode(errors="backslashreplace").decode()
        if shown != name:
            refused.append(Refusal(shown, "its name is not UTF-8: rename it"))
        elif not file.is_file():
            refused.append(Refusal(name, "a link to nothing, or no file at all"))
        elif name in files:
            refused.append(Refusal(name, "there are two files of this name, spelt in Unicode in two ways: rename one"))
        else:
            files[name] = file
    return dict(sorted(files.items(), key=lambda item: natural(item[0]))), refused


def find_captions(path: Path, files: dict[str, Path], caption: str | None, refused: list[Refusal]) -> dict[str, str]:
    """The captions of the pictures by name; what cannot be used is added to `refused`. For the rest see `open_folder`.

    Raises ValueError where a picture has none.
    """
    listed: dict[str, list[str]] = {}
    for name in files:
        if Path(name).name in METADATA:
            read_metadata(files[name], name, listed, refused)
    refused += [Refusal(name, "listed in the metadata, but there is no such file") for name in listed.keys() - files]
    captions: dict[str, str] = {}
    without, used = [], set()
    for name, file in files.items():
        if file.suffix.lower() not in SUFFIXES:
            continue
        sidecar = name.removesuffix(file.suffix) + ".txt"
        used.add(sidecar)
        texts = listed.get(name, [])
        try:
            if not texts and sidecar in files:
                texts = [read_text(files[sidecar])]
            if len(texts) > 1:
                raise ValueError("listed twice in the metadata")
            if texts and not texts[0].strip():
                raise ValueError("its caption is empty")
        except ValueError as error:
            refused.append(Refusal(name, str(error)))
            continue
        if texts:
            captions[name] = texts[0].strip()
        elif caption is not None:
            captions[name] = caption
        else:
            without.append(name)
    for name, file in files.items():
        if file.suffix.lower() == ".txt" and name not in used:
            refused.append(Refusal(name, "a caption to no picture"))
        elif file.suffix.lower() not in (*SUFFIXES, ".txt") and file.name not in METADATA:
            refused.append(Refusal(name, f"not a picture by its name: these end in {', '.join(SUFFIXES)}"))
    if without:
        raise ValueError(
            f"{path}: {len(without)} of {len(without) + len(captions)} pictures have no caption. Write name.txt beside"
            ' name.png, or metadata.jsonl with "file_name" and "text", or give one caption for all:' + listing(without)
        )
    return captions


def read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file.name} is not UTF-8: save it as that") from error
    except OSError as error:
        raise ValueError(f"{file.name}: {error.strerror}") from error


def read_metadata(file: Path, name: str, listed: dict[str, list[str]], refused: list[Refusal]) -> None:
    """Adds what a metadata file says: to names in the folder their texts. An entry of a .jsonl is a line."""
    try:
        text = read_text(file)
        is_csv = file.suffix == ".csv"
        entries = [json.dumps(row) for row in csv.DictReader(io.StringIO(text))] if is_csv else text.split("\n")
    except (ValueError, csv.Error) as error:
        refused.append(Refusal(name, str(error)))
        return
    for i, entry in enumerate(entries, 1):
        if not entry.strip():
            continue
        try:
            row = json.loads(entry)
            target, caption = row["file_name"], row["text"]
            if not isinstance(target, str) or not isinstance(caption, str):
                raise TypeError
            (target + caption).encode()  # JSON can hold half a character, which no tokenizer takes
        except (ValueError, KeyError, TypeError):
            refused.append(Refusal(f"{name}, entry {i}", 'not like {"file_name": "name.png", "text": "a caption"}'))
            continue
        target = unicodedata.normalize("NFC", (Path(name).parent / target).as_posix())
        listed.setdefault(target, []).append(caption)
