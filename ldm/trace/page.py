"""A trace as one HTML page: `page.html` beside this file, and what it shows as JSON, with pictures as data URIs."""

import base64
import html
import io
import json
import math
import re
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ldm.trace import Decode, Trace, shown
from ldm.trace.compare import listed

TEMPLATE = Path(__file__).with_name("page.html")
FINEST = 32  # the side of the words' maps
SMALL = 128  # up to this side pictures keep every pixel, as PNG


def page(traces: list[Trace], picture: int, decode: Decode | None) -> str:
    """The whole text. Raises ValueError for a picture that a trace has not."""
    for trace in traces:
        trace.check(picture)
    data = json.dumps([run(trace, picture, decode) for trace in traces], ensure_ascii=False, allow_nan=False)
    titles = dict.fromkeys(listed(trace.texts[picture])["Prompt"] for trace in traces)
    parts = {"TITLE": html.escape(" / ".join(titles)), "DATA": data.replace("<", "\\u003c")}
    return re.sub("@(TITLE|DATA)@", lambda found: parts[found[1]], TEMPLATE.read_text(encoding="utf-8"))


def run(trace: Trace, picture: int, decode: Decode | None) -> dict[str, Any]:
    """What the page knows of a trace."""
    told = listed(trace.texts[picture])
    curves = {name: values if name == "sigma" else values[:, picture] for name, values in trace.curves().items()}
    words = shown(trace.words[picture])
    frames = heat(trace, picture, [i for i, _ in words]) if words else torch.zeros(0, 0, 1, 1, dtype=torch.uint8)
    return {
        "prompt": told.pop("Prompt"),
        "settings": list(told.items()),
        "sigmas": [[float(step.sigma), float(step.sigma_next)] for step in trace],
        "curves": {name: list(map(number, values.tolist())) for name, values in curves.items()},
        "x0": [uri(image) for image in trace.pictures("x0", picture, decode)],
        "x": [uri(image) for image in trace.pictures("x", picture, decode)],
        "words": [word for _, word in words],
        "grid": list(frames.shape[2:]),
        "heat": base64.b64encode(frames.numpy().tobytes()).decode(),
    }


def heat(trace: Trace, picture: int, chosen: list[int]) -> Tensor:
    """(n+1,words,h,w) uint8: of each step, then of the whole run; each word's largest value is 255, in both."""
    steps = trace.attention(picture)[:, chosen]  # (n,words,h,w)
    shrink = math.ceil(max(steps.shape[2:]) / FINEST)
    steps = F.avg_pool2d(steps, shrink, ceil_mode=True).nan_to_num()
    whole = steps.mean(dim=0, keepdim=True)
    scaled = [t / t.amax((0, 2, 3), keepdim=True).clamp(min=1e-12) for t in (steps, whole)]
    return (255 * torch.cat(scaled)).round().to(torch.uint8)


def number(value: float) -> float | None:
    """For JSON, which has no NaN."""
    return float(f"{value:.6g}") if math.isfinite(value) else None


def uri(image: Image.Image) -> str:
    file, small = io.BytesIO(), max(image.size) <= SMALL
    image.save(file, "PNG" if small else "JPEG", quality=88)
    return f"data:image/{'png' if small else 'jpeg'};base64,{base64.b64encode(file.getvalue()).decode()}"
