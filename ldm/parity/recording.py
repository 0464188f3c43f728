"""What every module of a net is given and puts out, in one safetensors file."""

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from ldm.parity.names import other_names
from ldm.save import write_file
from ldm.source import CheckpointError, open_safetensors

METADATA = "ldm.parity"

Inputs = Tensor | Sequence[Any] | Mapping[str, Any]


class Call(NamedTuple):
    """One call of a module. inputs, outputs: the names in the file of the tensors among them."""

    key: str  # the module's name, and at its second call name#2; empty for the model itself
    kind: str
    weights: bool  # whether it has some of its own
    aliases: list[str]  # its names in the layouts of the key tables
    inputs: list[str]
    outputs: list[str]


def name_of(key: str) -> str:
    return key.partition("#")[0]


@torch.no_grad()
def record(model: nn.Module, inputs: Inputs, file: str | Path, method: str | None = None) -> None:
    """Run the model, and keep the inputs and outputs of all its modules in a safetensors file.

    inputs: of the call, a tensor, a tuple, or a dict by the arguments' names: tensors, numbers and texts, in tuples,
    lists and dicts. method: None calls the model itself, "decode" calls model.decode. All tensors are in memory until
    they are written, each once: small inputs, latents of 16x16, tell as much as large ones.
    Raises ValueError for no module, for a model in training mode, for inputs of other types, and for an existing file
    that is no recording; a recording is replaced.
    """
    file = Path(file)
    check_model(model)
    check_target(file)
    args, kwargs = arguments(inputs)
    keep, aliases, calls = Kept(), other_names(model), []
    given: dict[str, list[str]] = {}

    def as_json(value: Any) -> Any:
        if isinstance(value, Tensor):
            return {"tensor": keep(f"argument {len(keep.tensors)}", [value])[0]}
        if value is None or isinstance(value, str | int | float):
            return value
        raise ValueError(f"inputs: {type(value).__name__} cannot be kept, give tensors, numbers and texts")

    def enter(key: str, module: nn.Module, values: Any) -> None:
        given[key] = keep(f"{key or 'model'} given", tensors_of(values))

    def leave(key: str, module: nn.Module, output: Any) -> None:
        weights = next(module.parameters(recurse=False), None) is not None
        outputs = keep(f"{key or 'model'}", tensors_of(output))
        calls.append(Call(key, type(module).__name__, weights, aliases.get(name_of(key), []), given[key], outputs))

    said = tree_map(as_json, (list(args), dict(kwargs)))
    run(model, args, kwargs, method, enter, leave)
    write_file(file, keep.tensors, {METADATA: json.dumps({"method": method, "inputs": said, "calls": calls})})


def check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise ValueError(f"{type(model).__name__} is no torch.nn.Module: give a net, as pipe.unet")
    if model.training:
        raise ValueError(f"{type(model).__name__} is in training mode, in which two runs may differ: call its .eval()")


def check_target(file: Path) -> None:
    if not file.parent.is_dir():
        raise ValueError(f"{file}: the folder {file.parent} does not exist, make it first")
    if file.exists():
        try:
            Recording(file)
        except CheckpointError as error:
            raise ValueError(f"{file} exists and is no recording: give another name") from error


def arguments(inputs: Inputs) -> tuple[Sequence[Any], Mapping[str, Any]]:
    match inputs:
        case Tensor():
            return (inputs,), {}
        case tuple() | list():
            return inputs, {}
        case Mapping():
            return (), inputs
    raise ValueError(f"inputs: {type(inputs).__name__}, give a tensor, a tuple, or a dict by the arguments' names")


class Kept:
    """Tensors by name, each of them once: what one layer puts out is mostly what the next is given."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._names: dict[bytes, str] = {}

    def __call__(self, name: str, tensors: Sequence[Tensor]) -> list[str]:
        """The names under which they are kept."""
        return [self._keep(f"{name}.{i}", tensor) for i, tensor in enumerate(tensors)]

    def _keep(self, name: str, tensor: Tensor) -> str:
        copy = tensor.detach().to("cpu", copy=True).contiguous()
        digest = blake2b(f"{copy.dtype} {copy.shape}".encode())
        digest.update(copy.flatten().view(torch.uint8).numpy().data)
        name = self._names.setdefault(digest.digest(), name)
        self.tensors.setdefault(name, copy)
        return name


class Recording:
    """A file that `record` wrote, memory-mapped. Raises CheckpointError, a ValueError, for any other."""

    def __init__(self, file: str | Path):
        self._file = open_safetensors(Path(file))
        text = (self._file.metadata() or {}).get(METADATA)
        if text is None:
            raise CheckpointError(f"{file} is no recording: make one with ldm.parity.record(model, inputs, file)")
        said = json.loads(text)
        self.method: str | None = said["method"]
        self.calls = {key: Call(key, *rest) for key, *rest in said["calls"]}
        self._inputs = said["inputs"]

    def tensors(self, names: Sequence[str]) -> list[Tensor]:
        """Copies, as nets may write to what they are given."""
        return [self._file.get_tensor(name).clone() for name in names]

    def inputs(self, device: torch.device, dtype: torch.dtype | None) -> tuple[Sequence[Any], Mapping[str, Any]]:
        """Positional and by name; in the net's dtype, but those of one dimension: it would round timesteps. dtype: None
        for a net without weights, which takes them as they are."""

        def read(value: Any) -> Any:
            match value:
                case {"tensor": str(name)}:
                    tensor = self.tensors([name])[0].to(device)
                    return tensor.to(dtype) if tensor.is_floating_point() and tensor.ndim > 1 else tensor
                case dict():
                    return {name: read(part) for name, part in value.items()}
                case list():
                    return [read(part) for part in value]
            return value

        args, kwargs = read(self._inputs)
        return args, kwargs


# Watching a net


def run(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    method: str | None,
    enter: Callable[[str, nn.Module, Any], Any],
    leave: Callable[[str, nn.Module, Any], Any],
) -> None:
    """Call the model. What `enter(key, module, (args, kwargs))` and `leave(key, module, output)` return, if it is not
    None, takes the place of what a module is given and puts out."""
    counts: Counter[str] = Counter()

    def pre_hook(name: str) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> Any:
            counts[name] += 1
            return enter(key(name), module, (args, kwargs))

        return hook

    def key(name: str) -> str:
        return name if counts[name] == 1 else f"{name}#{counts[name]}"

    with ExitStack() as stack:
        for name, module in model.named_modules():
            if name:
                stack.enter_context(module.register_forward_pre_hook(pre_hook(name), with_kwargs=True))
                hook = lambda module, _, output, name=name: leave(key(name), module, output)  # noqa: E731
                stack.enter_context(module.register_forward_hook(hook))
        enter("", model, (args, kwargs))
        result = (model if method is None else getattr(model, method))(*args, **kwargs)
        leave("", model, tree_map(mean_and_std, result))


def mean_and_std(value: Any) -> Any:
    """Of diffusers' posterior, in the order of ours."""
    return [value.mean, value.std] if hasattr(value, "std") and not isinstance(value, Tensor) else value


def tensors_of(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_flatten(value)[0] if isinstance(leaf, Tensor)]


def with_tensors(value: Any, tensors: Sequence[Tensor]) -> Any:
    """The same tuple, dict or output class around other tensors."""
    leaves, structure = tree_flatten(value)
    rest = iter(tensors)
    return tree_unflatten([next(rest) if isinstance(leaf, Tensor) else leaf for leaf in leaves], structure)
