"""A net beside a recording: see the package."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ldm.parity.causes import Known, cause_between, cause_in_layer
from ldm.parity.difference import Difference, laid_out, measure, terms_of
from ldm.parity.names import partners
from ldm.parity.recording import Call, Inputs, Recording, arguments, check_model, name_of, run, tensors_of, with_tensors

RECENT = 16  # tensors that the code between two layers may have used: a transformer block puts out 14


class Fault(NamedTuple):
    """What is wrong, and not because of a layer before it.

    culprit: the module whose code or weights it is, empty for the model itself. cause: empty where nothing that was
    tried gives what was recorded.
    """

    culprit: str
    what: str
    cause: str

    def __str__(self) -> str:
        return f"{self.culprit or 'the model itself'}: {self.what}; likely cause: {self.cause or 'unknown'}"


@dataclass(frozen=True)
class Layer:
    """What one call of a module has come to.

    whole: its output in the model's own run. given: what came to it, and own: what it makes of its recorded input, when
    all before it put out what was recorded. Each is None where there is nothing to compare.
    """

    key: str  # the name, and at its second call name#2; empty for what the model returns
    kind: str
    whole: Difference | None
    given: Difference | None
    own: Difference | None
    faults: tuple[Fault, ...]

    def cells(self) -> list[str]:
        figures = ["", "", ""] if self.whole is None else [f"{x:.2g}" for x in self.whole[:3]]
        alone = ["" if d is None else f"{d.ulp:.3g}" for d in (self.given, self.own)]
        marks = "; ".join(f"<- {fault.what}" for fault in self.faults)
        return [self.key or "what it returns", self.kind, *figures, *alone, marks]


@dataclass(frozen=True)
class Report:
    """`print(report)` shows a line a layer, in the order in which they end, and what is wrong.

    Columns: max abs, relative to the largest recorded value, and ulp of it, in the model's own run; then in ulp of
    each layer alone what came to it (given) and what it puts out (own).
    """

    layers: list[Layer]
    missing: list[str]  # layers with weights that only the recorded run called
    added: list[str]  # and that only this one did
    stopped: str = ""  # the error that the model's own run ended with, if not with a result

    @property
    def faults(self) -> list[Fault]:
        """In the order of execution: the first is the one to mend."""
        return [fault for layer in self.layers for fault in layer.faults]

    def __str__(self) -> str:
        rows = [["layer", "class", "max abs", "relative", "ulp", "given", "own", ""]]
        rows += [layer.cells() for layer in self.layers]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)][:-1]
        lines = ["  ".join([*map(str.ljust, row, widths), row[-1]]).rstrip() for row in rows]
        for where, names in (("the recorded run", self.missing), ("this run", self.added)):
            if names:
                rest = f" and {len(names) - 5} more" if len(names) > 5 else ""
                lines.append(f"layers with weights that only {where} called: {', '.join(names[:5])}{rest}")
        if self.stopped:
            lines.append(f"the model could not be run to its end: {self.stopped}")
        if not self.faults:
            compared = sum(layer.own is not None for layer in self.layers)
            return "\n".join([*lines, f"all {compared} outputs that can be compared agree"])
        first, *others = self.faults
        return "\n".join([*lines, f"first to diverge: {first}", *(f"then: {fault}" for fault in others)])


@torch.no_grad()
def check(model: nn.Module, file: str | Path, inputs: Inputs | None = None) -> Report:
    """Run the model on the recorded inputs, and compare it with the recording, module by module.

    Modules are paired by their names, and by the key tables where the recording or the model is one of our nets; what
    names begin with in a larger net ("model.diffusion_model.", "text_model.") is passed over. inputs: None are the
    recorded ones; give those of the model where its arguments are others. On a GPU, switch TF32 off: it shows. A run
    that ends with a RuntimeError, as where a layer has another width, is reported as far as it came.
    Raises ValueError for no module, a model in training mode, a file that is no recording, and if no layer's name
    agrees.
    """
    check_model(model)
    recording = Recording(file)
    recorded = {name_of(key): call.aliases for key, call in recording.calls.items() if key}
    partner = partners(model, recorded)
    ours = [name for name, _ in model.named_modules() if name]
    if not partner and (ours or recorded):
        raise ValueError(
            f"{file} has no module of this model's names: it has {[*recorded][:3]}, the model {ours[:3]}; if a part of"
            " the model has them, check that part"
        )
    if inputs is None:
        weight = next(model.parameters(), torch.empty(0))
        args, kwargs = recording.inputs(weight.device, weight.dtype if weight.numel() else None)
    else:
        args, kwargs = arguments(inputs)

    whole = Whole(recording, partner)
    alone, stopped = Alone(model, recording, partner, whole.differences), ""
    for watched in (whole, alone):
        try:
            run(model, args, kwargs, recording.method, watched.enter, watched.leave)
        except RuntimeError as error:
            stopped = str(error)
    called = {partner[name_of(layer.key)] for layer in alone.layers if layer.key}
    return Report(
        alone.layers,
        missing=[key for key, call in recording.calls.items() if call.weights and "#" not in key and key not in called],
        added=whole.added,
        stopped=stopped,
    )


def counterpart(key: str, recording: Recording, partner: Mapping[str, str]) -> Call | None:
    name, mark, count = key.partition("#")
    return recording.calls.get(partner.get(name, "no such") + mark + count if key else "")


class Whole:
    """The first run: every layer with all that is wrong before it."""

    def __init__(self, recording: Recording, partner: Mapping[str, str]):
        self.recording, self.partner = recording, partner
        self.differences: dict[str, Difference | None] = {}
        self.added: list[str] = []

    def enter(self, key: str, module: nn.Module, values: Any) -> None:
        pass

    def leave(self, key: str, module: nn.Module, output: Any) -> None:
        call = counterpart(key, self.recording, self.partner)
        if call is not None:
            self.differences[key] = compare(tensors_of(output), self.recording.tensors(call.outputs))
        elif "#" not in key and next(module.parameters(recurse=False), None) is not None:
            self.added.append(key)


@dataclass
class Running:
    """A module that was called and has not returned."""

    key: str
    kind: type[nn.Module]
    call: Call | None  # the recorded one
    given: Difference | None
    misled: bool  # what came to it is off, and it works on that
    x: list[Tensor]  # that it works on
    before: int  # how many faults there were
    faults: list[Fault] = field(default_factory=list)


class Alone:
    """The second run: all that a layer works with was recorded."""

    def __init__(
        self, model: nn.Module, recording: Recording, partner: Mapping[str, str], whole: Mapping[str, Difference | None]
    ):
        self.model, self.recording, self.partner, self.whole = model, recording, partner, whole
        self.layers: list[Layer] = []
        self.running: list[Running] = []
        self.known: dict[str, str] = {}  # by a recorded tensor's name what it is here; the latest are last
        self.count = 0  # of faults

    def enter(self, key: str, module: nn.Module, values: Any) -> Any:
        call = counterpart(key, self.recording, self.partner)
        ours, theirs = tensors_of(values), self.recording.tensors(call.inputs) if call else []
        given = compare(distinct(ours), distinct(theirs))
        misled = given is not None and not given.ok and key != ""  # the model itself is given what the caller says
        running = Running(key, type(module), call, given, misled, ours, self.count)
        instead = None
        if call and is_layer(module):
            if running.misled:
                at = next(m.key for m in self.running[::-1] if not m.misled and not issubclass(m.kind, nn.Sequential))
                cause = cause_between(ours[0], theirs[0].to(ours[0].device), self.at_hand(at, ours[0]))
                running.faults.append(self.fault(at, f"what comes to {short(key, at)} is off", cause))
            if (instead := replaced(values, theirs)) is not None:
                running.misled, running.x = False, tensors_of(instead)
        self.running.append(running)
        if call and not running.misled:
            self.learn(call.inputs, f"the input of {key}" if key else "the model's input")
        return instead

    def leave(self, key: str, module: nn.Module, output: Any) -> Any:
        running, call = self.running[-1], self.running[-1].call
        if call is None:
            self.running.pop()
            return None
        ours, theirs = tensors_of(output), self.recording.tensors(call.outputs)
        own = compare(ours, theirs, terms_of(module) if is_layer(module) else None)
        if running.misled and (is_layer(module) or self.count > running.before):
            own = None  # it could not be right, and the reason was found
        if own is not None and not own.ok:
            running.faults.append(self.own_fault(running, module, ours, theirs))
        self.running.pop()
        faults = tuple(running.faults)
        self.layers.append(Layer(key, type(module).__name__, self.whole.get(key), running.given, own, faults))
        self.learn(call.outputs, key)
        return replaced(output, theirs)

    def own_fault(self, running: Running, module: nn.Module, ours: list[Tensor], theirs: list[Tensor]) -> Fault:
        got, wanted = max(zip(ours, theirs, strict=True), key=lambda pair: measure(*pair).ulp)
        wanted, call, key = wanted.to(got.device), running.call, running.key
        assert call is not None
        if laid_out(wanted, got.shape) is None:
            cause = f"it is of shape {tuple(wanted.shape)}, here {tuple(got.shape)}"
            return self.fault(key, "what it makes has another shape", cause)
        if not is_layer(module):
            cause = cause_between(got, wanted, self.at_hand(key, got))
            return self.fault(key, "its layers agree, what it makes of them is off", cause)
        cause = cause_in_layer(module, running.x[0], got, wanted, self.model) if len(running.x) == 1 else ""
        if not cause and call.kind != type(module).__name__:
            cause = f"a {call.kind}, not a {type(module).__name__}"
        return self.fault(key, "what it makes of the recorded input is off", cause)

    def fault(self, culprit: str, what: str, cause: str) -> Fault:
        self.count += 1
        return Fault(name_of(culprit), what, cause and f"in the recording {cause}")

    def learn(self, names: Sequence[str], what: str) -> None:
        for name in names:
            self.known[name] = self.known.pop(name, what)

    def at_hand(self, culprit: str, like: Tensor) -> list[Known]:
        """What the code of a module works with: the latest results, and what the modules that run were given."""
        given = [name for m in self.running if m.call and not m.misled for name in m.call.inputs]
        names = [*dict.fromkeys([*list(self.known)[: -RECENT - 1 : -1], *given])]
        found = zip(names, self.recording.tensors(names), strict=True)
        dtype = like.dtype if like.is_floating_point() else None
        return [
            Known(short(self.known[name], culprit), t.to(like.device, dtype if t.is_floating_point() else None))
            for name, t in found
        ]


def compare(ours: Sequence[Tensor], theirs: Sequence[Tensor], terms: int | None = None) -> Difference | None:
    """The largest difference; None where there is nothing to compare, or several tensors in another order."""
    if len(ours) != len(theirs) or not ours:
        return None
    pairs = list(zip(ours, theirs, strict=True))
    if len(pairs) > 1 and any(laid_out(b, a.shape) is None for a, b in pairs):
        return None
    return max((measure(a, b, terms) for a, b in pairs), key=lambda difference: difference.ulp)


def replaced(value: Any, theirs: Sequence[Tensor]) -> Any:
    """The value with the recorded tensors in it, None where they do not fit."""
    ours = tensors_of(value)
    if len(ours) != len(theirs):
        return None
    same = [laid_out(b.to(a), a.shape) for a, b in zip(ours, theirs, strict=True)]
    # Of as many dimensions, a layer has another width: what comes after it goes on with what was recorded.
    wide = [b.to(a) if c is None and a.ndim == b.ndim else c for a, b, c in zip(ours, theirs, same, strict=True)]
    fitting = [b for b in wide if b is not None]
    return with_tensors(value, fitting) if len(fitting) == len(wide) else None


def is_layer(module: nn.Module) -> bool:
    return next(module.children(), None) is None


def distinct(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Each once: self-attention is given the same twice, or once."""
    return list({id(tensor): tensor for tensor in tensors}.values())


def short(what: str, culprit: str) -> str:
    return what.replace(f"{culprit}.", "") if culprit else what
