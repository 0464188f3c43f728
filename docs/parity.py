"""Runs docs/parity.md, writes what it prints into it, and draws its picture:  .venv/bin/python docs/parity.py

(Half a minute on two cores; needs matplotlib.)
"""

import io
import os
import re
import tempfile
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

PAGE = Path(__file__).with_suffix(".md").resolve()
PICTURE = PAGE.with_suffix("") / "own.webp"
BLOCK = re.compile(r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```\n)?", re.M | re.S)


def run(names: dict[str, Any]) -> list[tuple[str, str]]:
    """What each block that is followed by its output has on the page, and prints."""
    outputs = []
    for block in BLOCK.finditer(PAGE.read_text()):
        with redirect_stdout(io.StringIO()) as printed:
            exec(block[1], names)
        if block[2] is not None:
            outputs.append((block[2], printed.getvalue()))
    return outputs


def draw(report: Any) -> None:
    import matplotlib.pyplot as plt

    layers = [layer for layer in report.layers if layer.whole and layer.own]
    figure, axes = plt.subplots(figsize=(7.5, 3))
    for name, label in (("whole", "in the port's own run"), ("own", "each layer alone")):
        axes.semilogy([getattr(layer, name).relative + 1e-8 for layer in layers], label=label, linewidth=1)
    axes.set_xlabel("layer, in the order of execution")
    axes.set_ylabel("difference / largest value")
    axes.set_ylim(5e-9, 200)
    axes.legend(loc="upper left")
    figure.tight_layout()
    PICTURE.parent.mkdir(exist_ok=True)
    figure.savefig(PICTURE, dpi=110, pil_kwargs={"quality": 90})


if __name__ == "__main__":
    names: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        printed = iter([new for _, new in run(names)])
        os.chdir(PAGE.parent)
    text = re.sub(r"(^```text\n).*?(^```$)", lambda m: m[1] + next(printed) + m[2], PAGE.read_text(), flags=re.M | re.S)
    PAGE.write_text(text)
    draw(names["report"])
