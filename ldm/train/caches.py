"""What a training computes once and reads again, latents and texts, in checked files; and checksums of tensors."""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from tqdm import tqdm

from ldm.clip import TextEncoding
from ldm.save import write_file
from ldm.train.pictures import Folder
from ldm.vae import VAE


class Cache:
    """Tensors computed once, a file of them for each row: read when they are asked for, so memory is flat.

    A file's metadata has the checksum of its tensors, and whoever reads it checks that.
    """

    def __init__(self, folder: Path, keys: Sequence[str], compute: Callable[[int], dict[str, Tensor]], what: str):
        """keys: of each row, a name for all that its tensors depend on: whatever changes gets another file.

        What is there and whole is kept, so a computation that was stopped goes on where it was.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self.files = [folder / f"{key}.safetensors" for key in keys]
        for row, file in enumerate(tqdm(self.files, what, leave=False, delay=2)):
            try:
                read_checked(file)
            except (FileNotFoundError, ValueError):
                with torch.no_grad():
                    tensors = {name: tensor.float().cpu() for name, tensor in compute(row).items()}
                write_file(file, tensors, {"sha256": checksum(tensors)})

    def __call__(self, rows: Iterable[int] | Tensor) -> dict[str, Tensor]:
        """The tensors of these rows, float32, joined along their first dimension.

        Raises ValueError for a file that is no longer what was written, FileNotFoundError for one that is gone.
        """
        found = [read_checked(self.files[int(row)]) for row in rows]
        return {name: torch.cat([tensors[name] for tensors in found]) for name in found[0]}


def read_checked(file: Path) -> dict[str, Tensor]:
    try:
        with safe_open(file, "pt") as f:
            tensors = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118
            written = (f.metadata() or {}).get("sha256")
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged ({error}): start again, and it is computed anew") from error
    if checksum(tensors) != written:
        raise ValueError(f"{file} is damaged (its sha256 is another): start again, and it is computed anew")
    return tensors


def cache_latents(folder: Folder, vae: VAE, path: Path) -> Cache:
    """mean and std (B,4,h/f,w/f), not scaled, of pictures cropped from the centre: each is encoded once.

    Not the samples: each step draws its own. A changed picture, target size or VAE is noticed.
    """
    some = next(vae.parameters())

    def compute(row: int) -> dict[str, Tensor]:
        return vae.encode(folder.pixels([row]).to(some))._asdict()

    net = fingerprint(vae)
    keys = [digest(net, repr(p.target), p.file.read_bytes()) for p in folder.pictures]
    return Cache(path, keys, compute, "encoding pictures")


def cache_texts(texts: Sequence[str], encode: Callable[[str], TextEncoding], key: str, path: Path) -> Cache:
    """context (B,length,width) and pooled (B,width) of texts, in their order, by text encoders that are not trained.

    key: tells apart what `encode` depends on: the `fingerprint` of the encoders, the clip skip.
    """
    return Cache(path, [digest(key, t) for t in texts], lambda row: encode(texts[row])._asdict(), "encoding captions")


def fingerprint(net: nn.Module) -> str:
    """Of its parameters and buffers."""
    return checksum(net.state_dict())


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """The sha256 of names, types, shapes and values, in the order of the names."""
    own = {name: tensor.detach().cpu().contiguous() for name, tensor in sorted(tensors.items())}
    return digest(*(part for name, t in own.items() for part in (f"{name} {t.dtype} {t.shape}", raw(t))))


def raw(tensor: Tensor) -> memoryview:
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def digest(*parts: str | bytes | memoryview) -> str:
    """The sha256 of texts and bytes, where one ends and the next begins included."""
    total = hashlib.sha256()
    for part in parts:
        content = part.encode() if isinstance(part, str) else part
        total.update(f"{len(content)} ".encode())
        total.update(content)
    return total.hexdigest()
