"""Where two runs part: the first step and quantity that differ, in the order in which a step works them out."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.parameters import split
from ldm.parity.difference import measure
from ldm.trace import Trace

# The net's two noises, the guided one, what they say of x0, the noise that is drawn, x; then the next step's sigma.
QUANTITIES = ("sigma", "eps_uncond", "eps_cond", "eps", "x0", "noise", "x", "sigma_next")


@dataclass(frozen=True)
class Difference:
    """Of one quantity in one step, None before the first one.

    relative: to the first run's largest value, and in ulp of it, as `ldm.parity` counts them. Where one of the two is
    not there, or of another shape, these are infinite and `why` says so.
    """

    quantity: str
    step: int | None
    sigma: float
    largest: float
    relative: float
    ulp: float
    why: str = ""

    def __str__(self) -> str:
        where = "before the first step" if self.step is None else f"step {self.step}, sigma {self.sigma:.4f}"
        return f"{self.quantity:<11}{where:<27}" + (self.why or f"{numbers(self)}")


def numbers(d: Difference) -> str:
    return f"max abs {d.largest:<10.3g}relative {d.relative:<10.3g}{d.ulp:,.3g} ulp"


@dataclass(frozen=True)
class Comparison:
    """settings: the names of those that differ, as the two have them. ran: the same of nets and machine. first: of each
    quantity that differs, where it begins to, in the order in which they do. last: of each, where the runs end. steps:
    of each run."""

    settings: dict[str, tuple[str, str]]
    ran: dict[str, tuple[str, str]]
    first: list[Difference]
    last: list[Difference]
    steps: tuple[int, int]

    @property
    def equal(self) -> bool:
        """Bitwise, with the same settings, whatever they ran on."""
        return not self.settings and not self.first and self.steps[0] == self.steps[1]

    def __str__(self) -> str:
        both = {**self.settings, **self.ran}
        width = max([len(a) for a, _ in both.values()], default=0) + 3
        lines = [] if self.settings else ["the same settings"]
        lines += [f"{name:<24}{a:<{width}}{b}" for name, (a, b) in both.items()]
        if self.steps[0] != self.steps[1]:
            lines.append(f"{'steps recorded':<24}{self.steps[0]:<{width}}{self.steps[1]}")
        if not self.first:
            return "\n".join([*lines, "", f"the same to the bit in all {min(self.steps)} steps that both have"])
        lines += ["", "first difference", str(self.first[0])]
        if len(self.first) > 1:
            lines += ["then, of each other quantity", *map(str, self.first[1:])]
        return "\n".join([*lines, "at the end", *map(str, self.last)])


def compare(a: Trace, b: Trace) -> Comparison:
    first: dict[str, Difference] = {}
    last: dict[str, Difference] = {}
    for quantity, step, sigma, one, other in pairs(a, b):
        if (found := difference(quantity, step, sigma, one, other)) is not None:
            first.setdefault(quantity, found)
            if step == min(len(a), len(b)) - 1:
                last[quantity] = found
    both = [name for name in a.ran if name in b.ran]  # an earlier version's trace has none of them
    ran = {name: (a.ran[name], b.ran[name]) for name in both if a.ran[name] != b.ran[name]}
    return Comparison(settings(a, b), ran, list(first.values()), list(last.values()), (len(a), len(b)))


def pairs(a: Trace, b: Trace) -> Iterator[tuple[str, int | None, float, Tensor | None, Tensor | None]]:
    """Quantity, step, sigma and what the two have there."""
    yield "start", None, float(a[0].sigma), a.start, b.start
    for one, other in zip(a, b, strict=False):
        for quantity in QUANTITIES:
            yield quantity, one.i, float(one.sigma), getattr(one, quantity), getattr(other, quantity)


def difference(quantity: str, step: int | None, sigma: float, a: Tensor | None, b: Tensor | None) -> Difference | None:
    if a is None or b is None or a.shape != b.shape:
        if a is b:
            return None
        has = ["nothing" if t is None else f"{tuple(t.shape)}" for t in (a, b)]
        return Difference(quantity, step, sigma, torch.inf, torch.inf, torch.inf, f"{has[0]} and {has[1]}")
    found = measure(b, a)
    if found.absolute == 0:
        return None
    return Difference(quantity, step, sigma, found.absolute, found.relative, found.ulp)


def settings(a: Trace, b: Trace) -> dict[str, tuple[str, str]]:
    """What the pictures' texts say, by its name; of a batch, of its first picture that differs there."""
    found: dict[str, tuple[str, str]] = {}
    for texts in zip(a.texts, b.texts, strict=False):  # how many there are is a setting, too
        one, other = map(listed, texts)
        for name in [*one, *(name for name in other if name not in one)]:
            values = one.get(name, "(default)"), other.get(name, "(default)")
            if values[0] != values[1]:
                found.setdefault(name, values)
    return found


def listed(text: str) -> dict[str, str]:
    prompt, negative, values = split(text)
    return {"Prompt": prompt} | ({} if negative is None else {"Negative prompt": negative}) | values
