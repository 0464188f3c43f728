"""How guidance, steps and clip skip change what the judges say of a model: the curves of weights/README.md."""

from pathlib import Path
from typing import Any

from ldm.pipeline import Pipeline
from ldm.train import data
from ldm.train.evaluate import PROMPTS, draw, generate
from ldm.train.judge import Judge

SETTINGS = {
    "guidance_scale": (1.0, 1.5, 2.0, 3.0, 5.0, 7.5, 10.0),
    "steps": (5, 10, 15, 20, 30, 50),
    "clip_skip": (1, 2, 3),
}
KINDS = ("seen pairs", "held-out pairs")
SCORES = {"concept_top5": "concept top-5", "style": "style"}


def curves(model_folder: Path | None, data_file: Path, out: Path, *, count: int = 128, **base: Any) -> dict:
    """Draw the PNG `out`, a column for each of SETTINGS; print and return {setting: {kind: {score: [fraction, ...]}}}.

    One setting changes, the others are `base`. count: prompts of each kind, drawn by a hash. Needs matplotlib (extra
    `train`).
    """
    from matplotlib.figure import Figure

    rgba, meta = data.load(data_file)
    images, judge = data.composite(rgba), Judge(data_file)
    pipe = Pipeline.from_pretrained(model_folder)
    rows = {
        kind: draw([i for i, m in enumerate(meta) if m["split"] == PROMPTS[kind]], meta, count, 0) for kind in KINDS
    }
    wanted = {kind: [(meta[i]["hex"], meta[i]["style"]) for i in rows[kind]] for kind in KINDS}
    ceiling = {kind: judge.score(images[rows[kind]], wanted[kind]) for kind in KINDS}

    figure = Figure(figsize=(12, 4), layout="constrained")
    found: dict = {}
    for axes, (name, values) in zip(figure.subplots(1, len(SETTINGS), sharey=True), SETTINGS.items(), strict=True):
        found[name] = {kind: {score: [] for score in SCORES} for kind in KINDS}
        for value in values:
            settings: dict[str, Any] = {**base, name: value}
            for kind in KINDS:
                scores = judge.score(generate(pipe, [meta[i] for i in rows[kind]], **settings), wanted[kind])
                print(name, value, kind, *(f"{SCORES[s]} {100 * scores[s]:.1f} %" for s in SCORES), flush=True)
                for score in SCORES:
                    found[name][kind][score].append(scores[score])
        for kind, line in zip(KINDS, ("-", ":"), strict=True):
            for score, colour in zip(SCORES, ("C0", "C1"), strict=True):
                label = f"{SCORES[score]}, {kind} (real: {100 * ceiling[kind][score]:.0f} %)"
                percent = [100 * fraction for fraction in found[name][kind][score]]
                axes.plot(values, percent, line, color=colour, marker=".", label=label)
        axes.set(xlabel=name, ylim=(0, 100))
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("%")
    figure.axes[-1].legend(fontsize="small", loc="lower center")
    figure.savefig(out, dpi=120)
    return found
