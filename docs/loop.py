"""Makes the pictures of docs/loop.md from its own code:  .venv/bin/python docs/loop.py  (a minute on two cores)."""

import re
from pathlib import Path
from typing import Any

from PIL import Image

PAGE = Path(__file__).with_suffix(".md")
PICTURES = Path(__file__).with_suffix("")

if __name__ == "__main__":
    names: dict[str, Any] = {}
    PICTURES.mkdir(exist_ok=True)
    for title, section in re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", "## Start\n" + PAGE.read_text(), re.M | re.S):
        names.pop("pictures", None)
        for block in re.findall(r"^```python\n(.*?)^```$", section, re.M | re.S):
            exec(block, names)
        if pictures := names.get("pictures"):
            sheet = Image.new("RGB", (136 * len(pictures) - 8, 128), "#808080")
            for i, picture in enumerate(pictures):
                sheet.paste(picture.resize((128, 128), Image.Resampling.NEAREST), (136 * i, 0))
            sheet.save(PICTURES / f"{title.lower()}.webp", quality=90)
