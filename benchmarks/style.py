"""At how much noise the default model loses a picture's style: real pictures, noised in part and drawn to their end.

    python -m benchmarks.style          6 minutes, after `python -m ldm.train data`

Image to image under the picture's own caption, 30 Euler steps, scale 2; strength 0 is the VAE alone, 1 is noise alone.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ldm.pipeline import Pipeline
from ldm.train import data
from ldm.train.captions import caption
from ldm.train.evaluate import PROMPTS, draw
from ldm.train.judge import Judge

STRENGTHS = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("runs/emoji64.npz"))
    parser.add_argument("--count", type=int, default=128, help="prompts of each kind")
    args = parser.parse_args()
    rgba, meta = data.load(args.data)
    images, judge, pipe = data.composite(rgba), Judge(args.data), Pipeline.from_pretrained()
    print("| prompts | strength | style | concept top-5 |\n|---|---:|---:|---:|")
    for kind in ("seen pairs", "held-out pairs"):
        rows = draw([i for i, m in enumerate(meta) if m["split"] == PROMPTS[kind]], meta, args.count, seed=0)
        wanted = [(meta[i]["hex"], meta[i]["style"]) for i in rows]
        for strength in STRENGTHS:
            drawn = []
            for seed, i in enumerate(rows):
                image = Image.fromarray(images[i])
                settings: dict[str, Any] = {"steps": 30, "guidance_scale": 2.0, "seed": seed, "progress": False}
                made = pipe(caption(meta[i]), image=image, strength=strength, **settings)
                drawn.append(np.asarray(made.images[0]))
            score = judge.score(np.stack(drawn), wanted)
            print(f"| {kind} | {strength} | {score['style']:.1%} | {score['concept_top5']:.1%} |", flush=True)


if __name__ == "__main__":
    main()
