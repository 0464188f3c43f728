"""Makes docs/editing.md and its pictures:  .venv/bin/python docs/editing.py  (about three minutes on two cores).

Each row is the same call with seeds 0, 1, 2 and 3; nothing is chosen by hand.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageFilter

import ldm

PAGE = Path(__file__).with_suffix(".md")
PICTURES = Path(__file__).with_suffix("")
SEEDS = range(4)
RED, BLUE = "red heart, twemoji style", "blue heart, twemoji style"

pipe = ldm.Pipeline.from_pretrained()


def made(prompt: str, seed: int, **settings: Any) -> Image.Image:
    return pipe(prompt, seed=seed, progress=False, **settings).images[0]


def mask_of(image: Image.Image) -> Image.Image:
    """What is not near to white, and two pixels around it."""
    coloured = np.asarray(image).min(-1) < 160
    return Image.fromarray((255 * coloured).astype(np.uint8)).filter(ImageFilter.MaxFilter(5))


def strip(name: str, pictures: Iterable[Image.Image], scale: int = 1) -> str:
    """Pictures side by side as a file; the line of Markdown that shows it."""
    pictures = list(pictures)
    sheet = Image.new("RGB", (sum(p.width + 8 for p in pictures) - 8, max(p.height for p in pictures)), "#808080")
    x = 0
    for picture in pictures:
        sheet.paste(picture, (x, 0))
        x += picture.width + 8
    PICTURES.mkdir(exist_ok=True)
    sheet.save(PICTURES / f"{name}.webp", quality=90)
    return f'<img src="{PICTURES.name}/{name}.webp" width="{sheet.width * scale}" alt="{name}">'


def table(head: str, rows: dict[str, str]) -> str:
    return "\n".join(
        [f"| {head} | seeds 0, 1, 2, 3 |", "|---|---|", *(f"| {name} | {show} |" for name, show in rows.items())]
    )


def sections() -> Iterable[str]:
    hearts = [made(RED, seed) for seed in SEEDS]

    yield f"""## Image to image

`pipe("{BLUE}", image=heart, strength=0.5)`, or `--image heart.png --strength 0.5`. Strength 0 returns the picture
as the VAE has it, 1 replaces it. `print(pipe.plan_strength(steps=20, strength=0.5))` says what is run:

```
{pipe.plan_strength(steps=20, strength=0.5)}
```
"""
    rows = {"the start": strip("start", hearts, 2)}
    for strength in (0, 0.25, 0.5, 0.75, 1):
        made_so = [made(BLUE, seed, image=hearts[seed], strength=strength) for seed in SEEDS]
        rows[f"strength {strength}"] = strip(f"strength-{strength}", made_so, 2)
    yield table("", rows)

    yield f"""
## Inpainting: another colour

`pipe("{BLUE}", image=heart, mask=mask, strength=1.0)`, or `--mask mask.png --strength 1`: white is repainted, and what
is black comes back bit for bit. The mask is what is not near to white, and two pixels around it; `mask_blur` softens
it, so that less of it is quite black.
"""
    masks = [mask_of(heart) for heart in hearts]
    painted = [made(BLUE, seed, image=hearts[seed], mask=masks[seed], strength=1.0) for seed in SEEDS]
    blurred = [made(BLUE, seed, image=hearts[seed], mask=masks[seed], mask_blur=2, strength=1.0) for seed in SEEDS]
    yield table(
        "",
        {
            "mask": strip("mask", masks, 2),
            "inpainted": strip("inpaint", painted, 2),
            "`mask_blur=2`": strip("inpaint-blur", blurred, 2),
        },
    )

    yield f"""
## Outpainting

`pipe("{RED}", image=heart, extend=(16, 0, 48, 0), strength=1.0)`, or `--extend 16 0 48 0`: pixels to the left, top,
right and bottom. The picture stays bit for bit. The new part goes on as the canvas was filled and then as the model
likes; this model has seen one thing in the middle of a white square, so it starts another one.
"""
    rows = {}
    for how in ("edge", "mirror", "noise"):
        edit = {"extend": (16, 0, 48, 0), "extend_fill": how, "strength": 1.0}
        rows[f"`{how}`"] = strip(f"outpaint-{how}", [made(RED, s, image=hearts[s], **edit) for s in SEEDS], 1)
    yield table("`extend_fill`", rows)

    yield f"""
## Enlarging

`pipe("{RED}", enlarge=2, enlarge_filter="latent", strength=0.2)`, or `--enlarge 2 --strength 0.2`: a small picture,
twice as large, then image to image. This model has learnt pictures of 64 pixels alone and redraws larger ones worse
than Pillow enlarges them; the pass is for models that know the larger size.
"""
    rows = {
        "64 pixels, enlarged by Pillow": strip(
            "small", [h.resize((128, 128), Image.Resampling.LANCZOS) for h in hearts]
        )
    }
    for how in ("latent", "lanczos"):
        edit = {"enlarge": 2, "enlarge_filter": how, "strength": 0.2}
        rows[f"`{how}`"] = strip(f"enlarge-{how}", [made(RED, seed, **edit) for seed in SEEDS])
    yield table("`enlarge_filter`", rows)

    yield """
## Seamless tiling

`pipe("a red flower", tiling="both")`, or `--tiling both`: each picture is shown twice in each direction. No step shows
at the edges; what this model makes of a square without a middle is a pattern, and no flower.
"""
    rows = {}
    for tiling in (None, "both"):
        doubled = [
            Image.fromarray(np.tile(np.asarray(made("a red flower", s, tiling=tiling)), (2, 2, 1))) for s in SEEDS
        ]
        rows[f"`{tiling}`"] = strip(f"tiling-{tiling}", doubled)
    yield table("`tiling`", rows)

    yield """
## Clip skip

`pipe("grinning cat, twemoji style", clip_skip=2)`, or `--clip-skip 2`. This model was trained with 1.
"""
    cat = "grinning cat, twemoji style"
    rows = {str(n): strip(f"clip-skip-{n}", [made(cat, s, clip_skip=n) for s in SEEDS], 2) for n in range(1, 5)}
    yield table("`clip_skip`", rows)

    yield """
## Guidance

`pipe("grinning cat, twemoji style", guidance_scale=7.5)`, or `--guidance-scale 7.5`; 1 is none.
"""
    scales = (1, 2, 3, 5, 7.5, 10, 15)
    rows = {str(n): strip(f"guidance-{n}", [made(cat, s, guidance_scale=n) for s in SEEDS], 2) for n in scales}
    yield table("`guidance_scale`", rows)


if __name__ == "__main__":
    head = f"""# Editing, shown on the default model

Made by `.venv/bin/python docs/editing.py`: each row is the same with seeds 0 to 3, and no picture was chosen by hand.
The model is `{pipe.name}`, 64 pixels, which draws emoji; what is not named is at its default. What these edits do
stands in `ldm/img2img.py` (the arithmetic) and `ldm/edit.py` (what is several runs).
"""
    PAGE.write_text("\n".join([head, *sections()]) + "\n")
