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

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from ldm.image import save, to_images
from ldm.pipeline import Pipeline
from ldm.train import data
from ldm.train.captions import caption
from ldm.train.judge import Judge, squared_distances, thumbnails
from ldm.vae import VAE

PROMPTS = {"seen pairs": "train", "held-out pairs": "test_pair", "held-out attributes": "test_attribute"}  # -> split
COPIES = (0.0007, 0.002)  # 1 % and 5 % of real held-out pictures are this near to a training picture
BATCH = 32


def evaluate(
    model_folder: Path | None,
    data_file: Path,
    *,
    count: int = 400,
    steps: int = 20,
    guidance_scale: float = 7.5,
    seed: int = 0,
) -> dict:
    """Print a Markdown report; return {"vae_psnr": {split: dB}, kind of prompts: {pictures: {score: fraction}}}.

    model_folder: as in `Pipeline.from_pretrained`. count: at most so many rows of each kind, drawn by a hash of the
    seed (the splits test_pair and test_attribute have 392 and 50). Picture i of a kind has the seed `seed + i`.
    """
    rgba, meta = data.load(data_file)
    images = data.composite(rgba)
    judge = Judge(data_file)
    train = [i for i, m in enumerate(meta) if m["split"] == "train"]
    nearest = thumbnails(images[train])
    pipe = Pipeline.from_pretrained(model_folder)
    random = np.random.default_rng(seed)

    def measure(pictures: np.ndarray, rows: list[int]) -> dict[str, float]:
        mse = squared_distances(thumbnails(pictures), nearest).min(1) / nearest.shape[1]
        scores = judge.score(pictures, [(meta[i]["hex"], meta[i]["style"]) for i in rows])
        return scores | {f"nearer_than_{limit}": float((mse < limit).mean()) for limit in COPIES}

    held_out = sorted({m["split"] for m in meta} - {"train"})
    report: dict = {
        "vae_psnr": {
            split: psnr(pipe.vae, images[[i for i, m in enumerate(meta) if m["split"] == split]]) for split in held_out
        }
    }
    for kind, split in PROMPTS.items():
        rows = draw([i for i, m in enumerate(meta) if m["split"] == split], meta, count, seed)
        copies = [[k for k in train if meta[k]["hex"] == meta[i]["hex"] and k != i] for i in rows]
        same_style = [[k for k in train if meta[k]["style"] == meta[i]["style"] and k != i] for i in rows]
        report[kind] = {
            "the model": measure(generate(pipe, [meta[i] for i in rows], steps, guidance_scale, seed), rows)
        }
        report[kind]["real pictures (ceiling)"] = measure(images[rows], rows)
        if copied := [row for row, c in zip(rows, copies, strict=True) if c]:
            pictures = images[[random.choice(c) for c in copies if c]]
            report[kind]["the concept in another style"] = measure(pictures, copied)
        report[kind]["any picture in the style"] = measure(images[[random.choice(s) for s in same_style]], rows)
        top5 = 5 / len(judge.concepts)
        report[kind]["chance"] = {
            "concept_top1": 1 / len(judge.concepts),
            "concept_top5": top5,
            "style": 1 / len(judge.styles),
            "both": top5 / len(judge.styles),
        }
        report[kind]["count"] = len(rows)
    print(markdown(report))
    return report


def draw(rows: list[int], meta: list[dict], count: int, seed: int) -> list[int]:
    """`count` of the rows, the same ones on every machine."""
    return sorted(rows, key=lambda i: hashlib.sha1(f"{seed} {caption(meta[i])}".encode()).digest())[:count]


def generate(pipe: Pipeline, meta: list[dict], steps: int, guidance_scale: float, seed: int) -> np.ndarray:
    """A picture for each caption -> (n,64,64,3) uint8."""
    prompts = [caption(m) for m in meta]
    images: list[Image.Image] = []
    for i in range(0, len(prompts), BATCH):
        batch = prompts[i : i + BATCH]
        seeds = [seed + i + k for k in range(len(batch))]
        images += pipe(batch, seed=seeds, steps=steps, guidance_scale=guidance_scale, progress=False).images
    return np.stack([np.asarray(image) for image in images])


@torch.no_grad()
def psnr(vae: VAE, images: np.ndarray) -> float:
    """Mean over (n,64,64,3) uint8 of each picture's PSNR in dB, through the posterior's mean and 8 bits."""
    ratios = []
    weight = vae.post_quant_conv.weight
    for i in range(0, len(images), BATCH):
        real = images[i : i + BATCH]
        out = vae.decode(vae.encode(data.to_tensor(real).to(weight)).mean)
        pixels = np.stack([np.asarray(image) for image in to_images(out)])
        mse = ((pixels.astype(np.float32) - real) ** 2).mean((1, 2, 3))
        ratios += (10 * np.log10(255**2 / mse)).tolist()
    return float(np.mean(ratios))


def markdown(report: dict) -> str:
    columns = ["concept_top1", "concept_top5", "style", "both", *(f"nearer_than_{limit}" for limit in COPIES)]
    lines = [f"VAE, PSNR on real pictures of {s}: {value:.1f} dB" for s, value in report["vae_psnr"].items()]
    lines += ["", "| prompts | pictures | concept top-1 | top-5 | style | top-5 and style | MSE < .0007 | MSE < .002 |"]
    lines += ["|---|---|---:|---:|---:|---:|---:|---:|"]
    for kind in PROMPTS:
        for pictures, scores in report[kind].items():
            if pictures != "count":
                cells = [f"{100 * scores[c]:.1f} %" if c in scores else "" for c in columns]
                lines.append("| " + " | ".join([f"{kind} ({report[kind]['count']})", pictures, *cells]) + " |")
    lines += [
        "",
        "MSE: to the nearest training picture at 16x16, in [0,1]. The judges were fitted on the training pictures, seen"
        " pairs among them, but none is compared to the real picture of its own pair. A copy in another style is one of"
        " those that it is compared to, hence its 100 %.",
    ]
    return "\n".join(lines)


def sheet_prompts(data_file: Path, count: int = 64) -> list[str]:
    """Captions of the training split that nobody picked: the first ones by their sha1."""
    captions = [caption(m) for m in data.load(data_file)[1] if m["split"] == "train"]
    return sorted(captions, key=lambda c: hashlib.sha1(c.encode()).digest())[:count]


def contact_sheet(pipe: Pipeline, prompts: list[str], file: Path) -> None:
    """A PNG of eight pictures in a row, twice as large, each above its prompt; picture i has seed i, 20 steps."""
    side, text, gap = 128, 26, 8
    images = pipe(prompts, seed=list(range(len(prompts))), steps=20, progress=False).images
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
