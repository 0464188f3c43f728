"""Measure a model that was trained on the emoji: every score between its floor and its ceiling.

    python -m ldm.train evaluate

measures the model in weights/emoji-64 (--model) on the pictures of runs/emoji64.npz (--data).

Prompts are "{label}, {style} style" of three kinds: pairs of concept and style that were trained on; pairs that were
held out, where both were seen apart; and attributes that were held out, such as "purple square", whose words were seen
apart. Beside the model's pictures the judges see the real ones (the ceiling: the judges are no better), and two ways to
cheat: the same concept copied from the training pictures in another style (the rows that have one), and any training
picture in the right style. The VAE is measured on all splits that were held out, those without prompts among them.
"""

import hashlib
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from ldm.image import save
from ldm.pipeline import Pipeline
from ldm.train import data, metrics
from ldm.train.captions import caption
from ldm.train.judge import Judge

PROMPTS = {"seen pairs": "train", "held-out pairs": "test_pair", "held-out attributes": "test_attribute"}  # -> split
COPIES = (0.0007, 0.002)  # 1 % and 5 % of real held-out pictures are this near to a training picture
BATCH = 64
APART = ("two seeds of a prompt", "two prompts", "two real drawings of a concept")
DIVERSE = 128  # so many prompts are drawn with a second seed


def evaluate(
    model_folder: Path | None,
    data_file: Path,
    *,
    count: int | None = None,
    steps: int = 30,
    guidance_scale: float = 2.0,
    seed: int = 0,
) -> dict:
    """Print a Markdown report; return {"vae": {split: {"psnr", "ssim"}}, "kid": {pictures: number},
    "apart": {pictures: {kind of prompts: number}}, kind of prompts: {pictures: {score: fraction}, "count": number}}.

    model_folder: as in `Pipeline.from_pretrained`. count: at most so many rows of each kind, drawn by a hash of the
    seed (None: all of the split). Picture i of a kind has the seed `seed + i`.
    """
    rgba, meta = data.load(data_file)
    images = data.composite(rgba)
    judge = Judge(data_file)
    train = [i for i, m in enumerate(meta) if m["split"] == "train"]
    pipe = Pipeline.from_pretrained(model_folder)
    random = np.random.default_rng(seed)
    settings = {"steps": steps, "guidance_scale": guidance_scale}

    def measure(pictures: np.ndarray, rows: list[int]) -> dict[str, float]:
        mse = metrics.copies(pictures, images[train])
        scores = judge.score(pictures, [(meta[i]["hex"], meta[i]["style"]) for i in rows])
        return scores | {f"nearer_than_{limit}": float((mse < limit).mean()) for limit in COPIES}

    report: dict = {"vae": {}, "kid": {}, "apart": {name: {} for name in APART}}
    for split in sorted({m["split"] for m in meta} - {"train"}):
        real = images[[i for i, m in enumerate(meta) if m["split"] == split]]
        out = metrics.through(pipe.vae, real)
        report["vae"][split] = {"psnr": metrics.psnr(out, real), "ssim": metrics.ssim(out, real)}
    for kind, split in PROMPTS.items():
        rows = draw([i for i, m in enumerate(meta) if m["split"] == split], meta, count, seed)
        copies = [[k for k in train if meta[k]["hex"] == meta[i]["hex"] and k != i] for i in rows]
        same_style = [[k for k in train if meta[k]["style"] == meta[i]["style"] and k != i] for i in rows]
        drawn = generate(pipe, [meta[i] for i in rows], seed, **settings)
        strays = images[[random.choice(s) for s in same_style]]
        report[kind] = {
            "the model": measure(drawn, rows),
            "real pictures (ceiling)": measure(images[rows], rows),
            "real pictures through the VAE": measure(metrics.through(pipe.vae, images[rows]), rows),
        }
        if copied := [row for row, c in zip(rows, copies, strict=True) if c]:
            pictures = images[[random.choice(c) for c in copies if c]]
            report[kind]["the concept in another style"] = measure(pictures, copied)
        report[kind]["any picture in the style"] = measure(strays, rows)
        top5 = 5 / len(judge.concepts)
        report[kind]["chance"] = {
            "concept_top1": 1 / len(judge.concepts),
            "concept_top5": top5,
            "others_top5": top5,
            "style": 1 / len(judge.styles),
            "both": top5 / len(judge.styles),
        }
        first = drawn[:DIVERSE]
        again = generate(pipe, [meta[i] for i in rows[:DIVERSE]], seed + len(rows), **settings)
        values = [metrics.apart(first, again), metrics.apart(first, np.roll(first, 1, axis=0))]
        if copied:
            values.append(metrics.apart(pictures[:DIVERSE], images[copied[:DIVERSE]]))
        for name, value in zip(APART, values, strict=False):
            report["apart"][name][kind] = value
        report[kind]["count"] = len(rows)
        if kind == "held-out pairs":
            for name, pictures in (("the model", drawn), ("training pictures in the same styles (floor)", strays)):
                report["kid"][name] = metrics.kid(pictures, images[rows])
    print(markdown(report))
    return report


def draw(rows: list[int], meta: list[dict], count: int | None, seed: int) -> list[int]:
    """`count` of the rows (None: all), the same ones on every machine."""
    return sorted(rows, key=lambda i: hashlib.sha1(f"{seed} {caption(meta[i])}".encode()).digest())[:count]


def generate(pipe: Pipeline, meta: list[dict], seed: int = 0, **settings: Any) -> np.ndarray:
    """A picture for each caption -> (n,64,64,3) uint8."""
    prompts = [caption(m) for m in meta]
    images: list[Image.Image] = []
    for i in tqdm(range(0, len(prompts), BATCH), leave=False):
        batch = prompts[i : i + BATCH]
        images += pipe(batch, seed=[seed + i + k for k in range(len(batch))], progress=False, **settings).images
    return np.stack([np.asarray(image) for image in images])


def markdown(report: dict) -> str:
    columns = ["concept_top1", "concept_top5", "others_top5", "style", "both"]
    columns += [f"nearer_than_{limit}" for limit in COPIES]
    lines = ["| VAE, real pictures of | PSNR | SSIM |", "|---|---:|---:|"]
    lines += [f"| {split} | {value['psnr']:.1f} dB | {value['ssim']:.3f} |" for split, value in report["vae"].items()]
    lines += [
        "",
        "| prompts | pictures | top-1 | top-5 | of other styles | style | top-5 and style | < .0007 | < .002 |",
    ]
    lines += ["|---|---|---:|---:|---:|---:|---:|---:|---:|"]
    for kind in PROMPTS:
        for pictures, scores in report[kind].items():
            if pictures != "count":
                cells = [f"{100 * scores[c]:.1f} %" if c in scores else "" for c in columns]
                lines.append("| " + " | ".join([f"{kind} ({report[kind]['count']})", pictures, *cells]) + " |")
    lines += [
        "",
        "top-1, top-5: the concept is among so many nearest of all. The mean drawing of a concept has the training"
        " picture of the pair itself in it, if there is one; *of other styles* leaves it out. both: top-5 and style."
        " Last two columns: share of pictures whose nearest training picture is nearer than that, as mean squared error"
        " at 16x16 in [0,1].",
        "",
        "| how far apart, in the same measure | " + " | ".join(PROMPTS) + " |",
        "|---|" + "---:|" * len(PROMPTS),
    ]
    for name, values in report["apart"].items():
        lines.append("| " + " | ".join([name, *(f"{values[k]:.4f}" if k in values else "" for k in PROMPTS)]) + " |")
    lines += ["", "Kernel distance (x 1000) to the real pictures of the held-out pairs:"]
    lines += [", ".join(f"{name} {1000 * value:.1f}" for name, value in report["kid"].items())]
    return "\n".join(lines)


def sheet_prompts(data_file: Path, count: int = 64) -> list[str]:
    """Captions of the training split that nobody picked: the first ones by their sha1."""
    captions = [caption(m) for m in data.load(data_file)[1] if m["split"] == "train"]
    return sorted(captions, key=lambda c: hashlib.sha1(c.encode()).digest())[:count]


def contact_sheet(pipe: Pipeline, prompts: list[str], file: Path, guidance_scale: float = 2.0) -> None:
    """A PNG of eight pictures in a row, twice as large, each above its prompt; picture i has seed i, 30 steps."""
    side, text, gap = 128, 26, 8
    settings: dict[str, Any] = {"steps": 30, "guidance_scale": guidance_scale, "progress": False}
    images = pipe(prompts, seed=list(range(len(prompts))), **settings).images
    sheet = Image.new("RGB", (8 * (side + gap) + gap, -(-len(prompts) // 8) * (side + text + gap) + gap), "white")
    write = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(10)
    for i, (image, prompt) in enumerate(zip(images, prompts, strict=True)):
        x, y = gap + i % 8 * (side + gap), gap + i // 8 * (side + text + gap)
        sheet.paste(image.resize((side, side), Image.Resampling.NEAREST), (x, y))
        lines = textwrap.wrap(prompt, 26, max_lines=2, placeholder="...")
        write.multiline_text(
            (x + side // 2, y + side), "\n".join(lines), "black", font, "ma", spacing=1, align="center"
        )
    save(sheet, file, "\n".join(prompts), force=True)
