"""Makes docs/dreambooth.md, its figures and its pictures:

    .venv/bin/python -m ldm.train data && .venv/bin/python docs/dreambooth.py        (an hour on two cores)

Needs the extra `train`. Twenty trainings, whole nets and LoRA, with and without pictures of the class, five seeds each;
nothing is chosen by hand. What is in runs/dreambooth is not done again.
"""

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import ldm
from ldm.train import data, metrics
from ldm.train.dreambooth import dreambooth
from ldm.train.evaluate import sheet_prompts
from ldm.train.judge import Judge, cell_features
from ldm.train.training import Training

PAGE = Path(__file__).with_suffix(".md")
FOLDER = Path(__file__).with_suffix("")
DATA, RUNS = Path("runs/emoji64.npz"), Path("runs/dreambooth")
SEEDS = range(5)  # of trainings
PICTURES = range(8)  # seeds of the pictures of a prompt
CLASS, SUBJECT, ON_GREEN = "monster", "sks monster", ", green background"
WHOLE = Training(steps=400, batch=4, learning_rate=5e-5, text_encoder=True)
LORA = Training(steps=400, batch=4, learning_rate=2e-3, text_encoder=True, rank=8, targets="all-linear")
KINDS = {
    "whole nets": (WHOLE, True),
    "whole nets, without the class": (WHOLE, False),
    "LoRA": (LORA, True),
    "LoRA, without the class": (LORA, False),
}


def trained(kind: str, seed: int) -> Path:
    """The result of a training; how many seconds it took stands beside it."""
    training, with_class = KINDS[kind]
    name = f"{kind.replace(', ', ' ').replace(' ', '-')}-{seed}"
    out = RUNS / (name if training.rank is None else f"{name}.safetensors")
    if not out.exists():
        start = time.monotonic()
        words: dict[str, Any] = dict(class_prompt=CLASS, class_images=RUNS / "class") if with_class else {}
        dreambooth(None, FOLDER / "mascot", SUBJECT, out, replace(training, seed=seed), **words)
        (RUNS / f"{name}.seconds").write_text(f"{time.monotonic() - start:.0f}")
    return out


def load(result: Path | None) -> ldm.Pipeline:
    if result is None or result.suffix != ".safetensors":
        return ldm.Pipeline.from_pretrained(result)
    pipe = ldm.Pipeline.from_pretrained()
    pipe.load_lora(result)
    return pipe


def draw(pipe: ldm.Pipeline, prompts: Sequence[str], seeds: Sequence[int]) -> np.ndarray:
    """(n,64,64,3) uint8."""
    return np.stack(
        [np.asarray(image) for image in pipe([*prompts], seed=[*seeds], guidance_scale=2, progress=False).images]
    )


def drawings(pipe: ldm.Pipeline, others: Sequence[str]) -> dict[str, np.ndarray]:
    prompts = (SUBJECT, SUBJECT + ON_GREEN, CLASS, CLASS + ON_GREEN)
    made = {prompt: draw(pipe, [prompt] * len(PICTURES), PICTURES) for prompt in prompts}
    return made | {"others": draw(pipe, others, range(len(others)))}


class Likeness:
    """The cosine of the concept judge's features, whitened and relative to their mean, with those of the views."""

    def __init__(self, judge: Judge, views: np.ndarray):
        self.judge = judge
        self.views = self.features(views)

    def features(self, images: np.ndarray) -> np.ndarray:
        z = cell_features(images) @ self.judge.whiten - self.judge.means.mean(0)
        return z / np.linalg.norm(z, axis=1, keepdims=True)

    def __call__(self, images: np.ndarray) -> float:
        return float((self.features(images) @ self.views.T).mean())


def on_green(images: np.ndarray) -> np.ndarray:
    """What is white in the views becomes green."""
    return np.where((images >= 250).all(-1, keepdims=True), np.array(data.BACKGROUNDS["green"], np.uint8), images)


def green_corners(images: np.ndarray) -> float:
    """The share of pictures whose corners, 6x6 pixels each, are nearest to green of all colours of backgrounds."""
    colours = np.array([*data.BACKGROUNDS.values()], float)
    corners = images.reshape(len(images), 64 * 64, 3)[:, CORNERS].mean(1)  # (n,3)
    nearest = ((corners[:, None] - colours) ** 2).sum(-1).argmin(1)
    return float((nearest == [*data.BACKGROUNDS].index("green")).mean())


EDGE = np.r_[0:6, 58:64]
CORNERS = (64 * EDGE[:, None] + EDGE).ravel()


def measure(made: dict[str, np.ndarray], before: dict[str, np.ndarray], white: Likeness, green: Likeness) -> dict:
    return {
        "likeness": white(made[SUBJECT]),
        "on green": green(made[SUBJECT + ON_GREEN]),
        "green": green_corners(made[SUBJECT + ON_GREEN]),
        "class": white(made[CLASS]),
        "class drift": metrics.apart(made[CLASS], before[CLASS]),
        "others drift": metrics.apart(made["others"], before["others"]),
    }


def strip(name: str, rows: Sequence[np.ndarray]) -> str:
    """Rows of pictures as a file, and the line of Markdown that shows it."""
    gap = ((0, 4), (0, 4), (0, 0))
    sheet = np.concatenate([np.concatenate([np.pad(p, gap, constant_values=255) for p in row], 1) for row in rows])
    Image.fromarray(sheet).save(FOLDER / f"{name}.webp", quality=90)
    return f'<img src="{FOLDER.name}/{name}.webp" width="{sheet.shape[1]}" alt="{name}">'


def table(rows: dict[str, list[dict[str, float]]], seconds: dict[str, list[float]]) -> str:
    lines = [
        "| | " + " | ".join([*rows["before"][0], "seconds"]) + " |",
        "|---|" + "---:|" * (len(rows["before"][0]) + 1),
    ]
    for kind, runs in rows.items():
        cells = []
        for name in runs[0]:
            values = [run[name] for run in runs]
            spread = f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else ""
            cells.append(f"{np.mean(values):.3f}{spread}")
        cells.append(f"{np.mean(seconds[kind]):.0f}" if kind in seconds else "")
        lines.append("| " + " | ".join([kind, *cells]) + " |")
    return "\n".join(lines)


def main() -> None:
    RUNS.mkdir(parents=True, exist_ok=True)
    views, unseen = (
        np.stack([np.asarray(Image.open(file)) for file in sorted((FOLDER / part).glob("*.png"))])
        for part in ("mascot", "unseen")
    )
    judge = Judge(DATA)
    white, green = Likeness(judge, unseen), Likeness(judge, on_green(unseen))
    others = [prompt for prompt in sheet_prompts(DATA, 30) if CLASS not in prompt][:20]
    before = drawings(load(None), others)
    plain = before | {SUBJECT: before[CLASS], SUBJECT + ON_GREEN: before[CLASS + ON_GREEN]}
    real = before | {SUBJECT: views, SUBJECT + ON_GREEN: on_green(views)}
    rows = {name: [measure(made, before, white, green)] for name, made in (("before", plain), ("the five views", real))}
    first: dict[str, dict[str, np.ndarray]] = {"before": before}
    seconds: dict[str, list[float]] = {}
    for kind in KINDS:
        rows[kind], seconds[kind] = [], []
        for seed in SEEDS:
            result = trained(kind, seed)
            made = drawings(load(result), others)
            first.setdefault(kind, made)
            rows[kind].append(measure(made, before, white, green))
            seconds[kind].append(float((RUNS / f"{result.stem}.seconds").read_text()))
            print(kind, seed, rows[kind][-1], flush=True)
    pictures = ""
    for kind, made in first.items():
        name = kind.replace(", ", " ").replace(" ", "-")
        pictures += f"{kind}:\n\n{strip(name, [made[SUBJECT], made[SUBJECT + ON_GREEN], made[CLASS]])}\n\n"
    PAGE.write_text(
        TEXT.format(
            views=strip("views", [views]),
            unseen=strip("compared", [unseen]),
            table=table(rows, seconds),
            pictures=pictures,
        )
    )


TEXT = """# A subject from five pictures

{views}

These five drawings of a mascot, a blue horned creature that no model has seen, were made by a ray caster of sixteen
ellipsoids for this page. They are part of the project and under its licence. Three more are kept to compare with:

{unseen}

One command teaches them to the default model:

    ldm train dreambooth --instance-images docs/dreambooth/mascot --instance-prompt "sks monster" \\
        --class-prompt monster --steps 400 --batch 4 --learning-rate 5e-5 --text-encoder --out my-monster

(The rates are for a small model at 64x64; those for Stable Diffusion are the defaults.) It first draws 200 pictures of
"monster", which it must still know afterwards (prior preservation), then trains. With
`--rank 8 --targets all-linear --learning-rate 2e-3` and `--out my-monster.safetensors` the result is a LoRA.

## What it is worth

{table}

Mean and standard deviation of five trainings, by their seeds; before: the same prompts without "sks".

- likeness: of eight pictures of "sks monster" to the three drawings that were not shown, the cosine of the features of
  the judge of concepts (`ldm/train/judge.py`); on green: of "sks monster, green background" to these drawings on green.
- green: the share of pictures of "sks monster, green background" whose corners are green.
- class: the likeness of "monster" to the mascot: what has leaked.
- class drift, others drift: how far pictures of "monster" and of 20 other prompts, the first by their SHA-1, have moved
  from those of the same seeds before: mean squared error at 16x16, in [0,1].
- seconds: of the training, on two cores that had other work, too. The pictures of the class are drawn by the first.
  On the cores alone, the command above took 134 s and that of the LoRA 118 s, the 200 pictures of the class included.

The subject is learnt, by whole nets and by a LoRA alike. On green it keeps its body and colours, and its face blurs;
most of that column is the green, which pictures of any monster have too. What the pictures of the class buy is in the
columns of the class: without them "monster" turns into the mascot. They do not keep everything: with them "monster" is
still a monster, but eight seeds of it have become one, the mean of its 200 pictures. Other prompts move as far as from
one seed to another (0.001 to 0.0025, [weights/README.md](../weights/README.md)); by a LoRA without the class, further.

## What it looks like

Each row has the seeds 0 to 7, of the training with seed 0: "sks monster", "sks monster, green background", "monster".

{pictures}Made by `docs/dreambooth.py`; nothing is chosen by hand.
"""

if __name__ == "__main__":
    main()
