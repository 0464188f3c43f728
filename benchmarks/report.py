"""Rows of results: medians, spread, ratios and targets, as JSON and as Markdown tables."""

from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

OURS, THEIRS = "ldm", "diffusers"
BOTH = ("float32", "bfloat16")

# How many times faster, or smaller, than the better of diffusers'.
TARGETS: dict[tuple[str, str], float] = {
    ("import beyond torch", ""): 10,
    **{("load, warm", dtype): 5 for dtype in BOTH},
    **{("UNet, batch 2, 512x512", dtype): 1.8 for dtype in BOTH},
    **{("UNet, batch 2, 512x512, compiled", dtype): 1 for dtype in BOTH},
    **{("decode, 512x512", dtype): 1.5 for dtype in BOTH},
    **{("picture, 20 steps", dtype): 1.8 for dtype in BOTH},
    **{("peak memory, 20 steps", dtype): 1 / 0.8 for dtype in BOTH},
}
SHARES = {"float32": 0.75, "bfloat16": 0.60}  # of the machine's largest rate, that the UNet is to reach


@dataclass
class Row:
    """values: each contender's, a number a round, in seconds ("s") or bytes ("B"). off: how far its result is from that
    of diffusers in float32, as `Stages.off` has it. tolerance: what ours may be off."""

    stage: str
    dtype: str
    unit: str
    values: dict[str, list[float]]
    off: dict[str, float] = field(default_factory=dict)
    tolerance: float = 0.0

    @property
    def medians(self) -> dict[str, float]:
        return {name: median(values) for name, values in self.values.items()}

    @property
    def ratio(self) -> float:
        """The better of diffusers' to ours."""
        return min(of(THEIRS, self.medians)) / self.medians[OURS]

    @property
    def agrees(self) -> bool:
        return all(off <= self.tolerance for off in of(OURS, self.off))


def of(whose: str, numbers: dict[str, float]) -> list[float]:
    """Eager, in either memory format, or compiled."""
    return [number for name, number in numbers.items() if name.startswith(whose)]


def row_json(row: Row, target: float | None) -> dict[str, Any]:
    return asdict(row) | {"medians": row.medians, "ratio": row.ratio, "target": target, "agrees": row.agrees}


def amount(value: float, unit: str) -> str:
    if unit == "B":
        return f"{value / 1e9:.2f} GB"
    return f"{1000 * value:.3g} ms" if value < 1 else f"{value:.3g} s"


def against(reached: float, target: float | None, shown: str) -> str:
    return "" if target is None else f"{shown} {'met' if reached >= target else 'missed'}"


def header(peers: list[str]) -> str:
    names = ["stage", "dtype", f"{OURS} (spread)", *peers, "ratio", "target", "difference (allowed)"]
    return f"| {' | '.join(names)} |\n|{'---|' * len(names)}"


def line(row: Row, peers: list[str], target: float | None) -> str:
    own, medians = row.values[OURS], {name: amount(value, row.unit) for name, value in row.medians.items()}
    cells = [
        row.stage,
        row.dtype,
        f"{medians[OURS]} ({amount(min(own), row.unit)} to {amount(max(own), row.unit)})",
        *(medians.get(peer, "") for peer in peers),
        f"{row.ratio:.2f}x",
        against(row.ratio, target, f"{target}x"),
        f"{row.off[OURS]:.1e} ({row.tolerance:.1e}){'' if row.agrees else ' DIFFERS'}" if row.off else "",
    ]
    return f"| {' | '.join(cells)} |"


def shares(row: Row, limits: dict[str, dict[str, float]], gigaflop: float) -> dict[str, float]:
    """What part of the machine's largest rate each contender reaches, by its median of a UNet evaluation."""
    largest = max(limits[row.dtype].values())
    return {name: gigaflop / seconds / largest for name, seconds in row.medians.items()}


def limits_table(limits: dict[str, dict[str, float]], reached: dict[str, dict[str, float]], full: bool) -> str:
    """limits: GFLOP/s by dtype and kind. reached: `shares` by dtype, {} if the UNet was not measured."""
    names = list(dict.fromkeys(name for shares in reached.values() for name in shares))
    titles = ["dtype", *limits["float32"], *(f"{name}'s UNet" for name in names), "target"]
    lines = [titles, ["---"] * len(titles)]
    for dtype, kinds in limits.items():
        found = reached.get(dtype, {})
        cells = [dtype, *(f"{rate:.0f} GFLOP/s" for rate in kinds.values())]
        cells += [f"{found[name]:.0%}" if name in found else "" for name in names]
        target = SHARES[dtype] if full and found else None
        lines.append([*cells, against(found.get(OURS, 0), target, f"{SHARES[dtype]:.0%}")])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
