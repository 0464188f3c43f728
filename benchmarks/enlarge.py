"""How the memory of tiled image to image grows with the picture, beside the same picture in one run.

python -m benchmarks.enlarge    # about five minutes on two cores

The default model enlarges a picture of 64 pixels, in tiles of 128 with one evaluation each, and in one run. Each figure
is taken in a fresh process: the peak memory above what is in use when the call begins, and what each further pixel of
the result adds to it, in bytes. A picture in memory is 3 bytes a pixel, and there are two: the enlarged one and the
result. The noise is 1 byte a pixel here (4 floats for 16 pixels) and a quarter of one in the official models.
"""

import subprocess
import sys

MEASURE = """
import sys
from pathlib import Path
import torch
import ldm
from PIL import Image

def memory(kind):  # of this process, in bytes
    return 1024 * int(Path("/proc/self/status").read_text().split(kind)[1].split()[0])

side, tile = int(sys.argv[1]), int(sys.argv[2]) or None
pipe = ldm.Pipeline.from_pretrained()
image = Image.effect_noise((64, 64), 50)
settings = {"steps": 4, "strength": 0.25, "guidance_scale": 1, "progress": False}
pipe("a heart", image=image, width=128, height=128, **settings)  # once, for what the first call keeps
before = memory("VmRSS:")
pipe("a heart", image=image, width=side, height=side, tile=tile, **settings)
print(memory("VmHWM:") - before)
"""


def measure(side: int, tile: int) -> float:
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, str(side), str(tile)], stdout=subprocess.PIPE, text=True, check=True
    )
    return float(run.stdout)


def main() -> None:
    for name, tile, sides in (("in tiles of 128", 128, (512, 1024, 2048, 4096)), ("in one run", 0, (256, 512, 1024))):
        last = None
        for side in sides:
            peak = measure(side, tile)
            further = (
                "" if last is None else f"{(peak - last[1]) / (side**2 - last[0] ** 2):10.1f} bytes a further pixel"
            )
            print(f"{name:16}{side:6} x {side:<6}{peak / 1e6:10.0f} MB{further}", flush=True)
            last = side, peak


if __name__ == "__main__":
    main()
