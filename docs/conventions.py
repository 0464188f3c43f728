"""Makes what docs/conventions.md shows, output and pictures, from its own code:  .venv/bin/python docs/conventions.py

Half a minute on two cores. After each block of Python that prints, the block of text is what it printed.
"""

import io
import re
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from PIL import Image

PAGE = Path(__file__).with_suffix(".md")
PICTURES = Path(__file__).with_suffix("")
BLOCKS = re.compile(r"^```python\n(.*?)^```$|^```text\n(.*?)^```$", re.M | re.S)

if __name__ == "__main__":
    names: dict[str, Any] = {}
    printed = ""

    def filled(block: re.Match) -> str:
        """The block as it is, run; or what the one before it has printed."""
        global printed
        if block[1] is None:
            return f"```text\n{printed}```"
        with redirect_stdout(io.StringIO()) as out:
            exec(block[1], names)
        printed = out.getvalue()
        return block[0]

    page = BLOCKS.sub(filled, PAGE.read_text("utf-8"))
    PICTURES.mkdir(exist_ok=True)
    sheet = Image.new("RGB", (136 * len(names["pictures"]) - 8, 128), "#808080")
    for i, picture in enumerate(names["pictures"]):
        sheet.paste(picture.resize((128, 128), Image.Resampling.NEAREST), (136 * i, 0))
    sheet.save(PICTURES / "draw.webp", quality=90)
    PAGE.write_text(page, "utf-8")
