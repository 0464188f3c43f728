"""Makes the pictures and the printed numbers of docs/step.md from its own code:  .venv/bin/python docs/step.py

Half a minute on two cores.
"""

import io
import os
import re
from contextlib import redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from PIL import Image

PAGE = Path(__file__).resolve().with_suffix(".md")
PICTURES = PAGE.with_suffix("")

if __name__ == "__main__":
    PICTURES.mkdir(exist_ok=True)
    names: dict[str, Any] = {}

    def run(block: re.Match[str]) -> str:
        """The same block, with what its code prints under it."""
        printed = io.StringIO()
        with redirect_stdout(printed):
            exec(block[1], names)
        lines = "".join(line.rstrip() + "\n" for line in printed.getvalue().splitlines())
        return f"```python\n{block[1]}```\n" + (f"\n```text\n{lines}```\n" if lines else "")

    with TemporaryDirectory() as folder:
        os.chdir(folder)
        text = re.sub(r"^```python\n(.*?)^```\n(?:\n```text\n.*?^```\n)?", run, PAGE.read_text(), flags=re.M | re.S)
    PAGE.write_text(text)
    names["figure"].savefig(PICTURES / "run.webp", dpi=80)
    sheet = Image.new("RGB", (136 * len(names["pictures"]) - 8, 128), "#808080")
    for i, picture in enumerate(names["pictures"]):
        sheet.paste(picture.resize((128, 128), Image.Resampling.NEAREST), (136 * i, 0))
    sheet.save(PICTURES / "noise.webp", quality=90)
