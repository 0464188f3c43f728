"""Safetensors files that grow tensor by tensor, and that are read tensor by tensor: the memory of one is enough."""

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryFile

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ldm.image import place

NAMES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


class Growing:
    """`growing[name] = tensor`, and at the end `save`. Until then there is a file without a name, which goes with the
    process, however it ends. `save` copies it once: the header, which comes first, is known only then."""

    def __init__(self, folder: Path):
        self.data = TemporaryFile(dir=folder)  # noqa: SIM115
        self.header: dict[str, dict] = {}

    def __setitem__(self, name: str, tensor: Tensor) -> None:
        begin = self.data.tell()
        self.data.write(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
        offsets = [begin, self.data.tell()]
        self.header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}

    def save(self, file: Path, metadata: Mapping[str, str], force: bool = False) -> Path:
        header = json.dumps({"__metadata__": dict(metadata), **self.header}, ensure_ascii=False).encode()
        header += b" " * (-len(header) % 8)

        def write(part: Path) -> None:
            self.data.seek(0)
            with part.open("wb") as f:
                f.write(len(header).to_bytes(8, "little") + header)
                shutil.copyfileobj(self.data, f)

        return place(file, write, force)


class Opened(Mapping[str, Tensor]):
    """The tensors of a file, each read when it is asked for. Raises ValueError for a file that is not whole."""

    def __init__(self, file: Path):
        try:
            self.handle = safe_open(file, framework="pt")
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{file}: {error}; give a safetensors file") from error
        self.names = self.handle.keys()
        self.metadata: dict[str, str] = self.handle.metadata() or {}

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.names:
            raise KeyError(name)
        return self.handle.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)
