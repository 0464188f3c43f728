"""Where weights come from: safetensors files, memory-mapped. What is not one is refused with what to do about it."""

import json
import re
import shlex
from collections import Counter
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

LONGEST_HEADER = 8_000_000  # bytes; SDXL's is 0.3 million, and reading one takes several times its size in memory
# In a header; a tensor takes 10 of each: SDXL has 2,515, SD 1.5 with EMA about 2,000.
MOST_QUOTES = MOST_COMMAS = 150_000
FLOATS = ("F64", "F32", "F16", "BF16")  # the dtypes that weights may have
PICKLES = (".ckpt", ".pt", ".pth", ".bin")
# Tensors that no net needs: EMA copies, the noise schedule (computed again in float64), losses, CLIP's image side.
IGNORED = re.compile(
    r"model_ema\..*|betas|(\w+_)?alphas_cumprod(_prev)?|posterior_\w+|scale_factor|denoiser\.sigmas|loss\..*"
    r"|(.*\.)?(position_ids|logit_scale)"
)


class CanBeFile(Protocol):
    """A pathlib.Path, or what stands for one."""

    def is_file(self) -> bool: ...


class CheckpointError(ValueError):
    """A file or folder that cannot be loaded: says what was found, what was looked for, and what to do."""


class Source:
    """The tensors of a model, or of a part, by name. `shapes` and `dtypes` (safetensors' names: "F16") of those that
    matter: what is on the list of known leftovers is not there. `stored`: dtype and shape of all, as in the headers.

    A tensor is a view of the mapped file: no memory of its own, read when it is first used. The file must not be
    written over as long as its tensors are alive. OpenCLIP's tensors are shown as the parts and the way round that our
    nets have them: `in_proj_weight` as `in_proj_weight.q`, `.k` and `.v`, `text_projection` as `text_projection.T`.
    """

    def __init__(self, where: Path, files: list[Path]):
        self.where = where
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        self.metadata: dict[str, str] = {}
        self.stored: dict[str, tuple[str, tuple[int, ...]]] = {}
        self._opened: dict[Path, safe_open] = {}
        self._places: dict[str, tuple[Path, str]] = {}  # the file and the name of the tensor to look in
        self.files: dict[str, Path] = {}  # that each tensor is stored in
        for path in files:
            file = self._opened[path] = open_safetensors(path)
            self.metadata |= file.metadata() or {}
            for name in file.keys():  # noqa: SIM118 (a file is not a mapping)
                if name in self.files:
                    raise CheckpointError(
                        f"{path} has {name}, and so has {self.files[name]}: which of them is meant is not said;"
                        " download or copy the files again"
                    )
                self.files[name] = path
                tensor = file.get_slice(name)
                self.stored[name] = dtype, shape = tensor.get_dtype(), tuple(tensor.get_shape())
                if not IGNORED.fullmatch(name):
                    for view, view_shape in views(name, shape).items():
                        self._places[view] = path, name
                        self.shapes[view] = view_shape
                        self.dtypes[view] = dtype

    def drop(self, prefix: str) -> None:
        """Forget the tensors under a prefix: they are not wanted."""
        self.shapes = {name: shape for name, shape in self.shapes.items() if not name.startswith(prefix)}

    def release(self) -> None:
        """Map the files anew: what was read of them leaves the memory with the last of its tensors."""
        self._opened = {path: open_safetensors(path) for path in self._opened}

    def __getitem__(self, name: str) -> Tensor:
        path, stored = self._places[name]
        tensor = self._opened[path].get_tensor(stored)
        match name.removeprefix(stored):
            case ".q" | ".k" | ".v" as part:
                return tensor.chunk(3)["qkv".index(part[1])]
            case ".T":
                return tensor.T.contiguous()
        return tensor


def all_finite(tensor: Tensor) -> bool:
    """As isfinite().all(), but faster: a finite sum has finite summands; one that is not may have overflowed."""
    return bool(tensor.sum().isfinite()) or bool(torch.isfinite(torch.stack(tensor.aminmax())).all())


def in_dtype(tensor: Tensor, dtype: torch.dtype | None, name: str, where: Path) -> Tensor:
    """The tensor of that name in `dtype`, None for its own. Raises CheckpointError for a value that is no number, or
    none in that dtype."""
    tensor = tensor.to(dtype or tensor.dtype)
    if not all_finite(tensor):
        raise CheckpointError(
            f"{where}: {name} has values that are NaN, infinite, or too large for {tensor.dtype}: download or copy the"
            " file again, or take dtype=torch.float32"
        )
    return tensor


def views(name: str, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """A stored tensor under the names, and with the shapes, in which it is asked for."""
    if name.endswith((".attn.in_proj_weight", ".attn.in_proj_bias")) and shape and shape[0] % 3 == 0:
        return {f"{name}.{part}": (shape[0] // 3, *shape[1:]) for part in "qkv"}
    if name.endswith(".text_projection") and len(shape) == 2:
        return {f"{name}.T": (shape[1], shape[0])}
    return {name: shape}


def open_safetensors(path: Path) -> safe_open:
    """Map a file whose header is in order. Raises CheckpointError for any other."""
    try:
        return mapped(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error


def is_file(path: CanBeFile) -> bool:
    """Raises CheckpointError where a folder on the way may not be looked into."""
    try:
        return path.is_file()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error


def mapped(path: Path) -> safe_open:
    if not path.is_file():
        raise CheckpointError(f"{path} {'is no file' if path.exists() else 'does not exist'}")
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(9)
        length = int.from_bytes(head[:8], "little")
        text = file.read(length - 1) if length <= LONGEST_HEADER else b""
    if size == 0:
        raise CheckpointError(f"{path} is empty (0 bytes): download or copy it again")
    if is_pickle(path):
        raise CheckpointError(
            f"{path} is a pickle, which may run any code when it is opened: only safetensors files are loaded."
            f" To convert it, without running any:\n{conversion(path, path.with_suffix('.safetensors'))}"
        )
    if head.startswith(b"version "):
        raise CheckpointError(f"{path} is a Git LFS pointer ({size} bytes), not the weights: run `git lfs pull` there")
    if head[8:] != b"{":  # eight bytes of length, then JSON
        raise CheckpointError(f"{path} ({size:,} bytes) is not a safetensors file: it starts with {head!r}")
    if length > LONGEST_HEADER:
        raise CheckpointError(
            f"{path} ({size:,} bytes) is damaged: it claims a header of {length:,} bytes, and no model needs more than"
            f" {LONGEST_HEADER:,}; download or copy it again"
        )
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise CheckpointError(
            f"{path} has a name that is not UTF-8, which safetensors cannot open: rename it"
        ) from error
    check_count(path, text)
    try:
        opened = safe_open(path, "pt")
    except SafetensorError as error:
        raise CheckpointError(
            f"{path} ({size:,} bytes) is truncated or damaged: {error}; download or copy it again"
        ) from error
    # Of two tensors of one name safetensors lets one win.
    names = json.loads(head[8:] + text, object_pairs_hook=lambda pairs: [name for name, _ in pairs])
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise CheckpointError(f"{path} is damaged: it has {twice[0]} more than once; download or copy it again")
    return opened


def check_count(path: Path, header: bytes) -> None:
    """Raises CheckpointError for a header that would make so many objects that they fill the memory."""
    bare = header.replace(rb"\\", b"").replace(rb"\"", b"")
    quotes = bare.count(b'"')
    commas = sum(outside.count(b",") for outside in bare.split(b'"')[::2]) if quotes <= MOST_QUOTES else 0
    if quotes > MOST_QUOTES or commas > MOST_COMMAS:
        raise CheckpointError(
            f"{path} is damaged: its header lists far more than the some thousand tensors of the largest models, or far"
            " more metadata; download or copy it again"
        )


def is_pickle(path: Path) -> bool:
    """Whether a file is one of PyTorch's own, by its first bytes, or by its name where those say nothing."""
    with path.open("rb") as file:
        head = file.read(9)
    if head[8:] == b"{" or head.startswith(b"version "):
        return False
    return head.startswith((b"PK", b"\x80")) or path.suffix in PICKLES


def conversion(pickle: Path, target: Path) -> str:
    """The shell command that writes a pickle's tensors, and runs no code of it, to a safetensors file."""
    return f"ldm convert {shlex.quote(str(pickle))} {shlex.quote(str(target))}"
