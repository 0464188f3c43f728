"""How much memory the fine-tuning of SD 1.5 takes, from the file to the file, in a process of its own.

pytest -m full tests/train/test_memory.py    # 18 GB of memory, 16 of disk, some four minutes on two cores
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from synthetic import full_size, write

MEASURE = """
import sys
from pathlib import Path
from ldm.train.dreambooth import finetune
from ldm.train.training import Training

model, images, out = sys.argv[1:]
finetune(model, images, out, Training(steps=2, checkpointing=True, {how}), caption="a heart")
print(1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]))
"""
PARAMETERS = 859_520_964


@pytest.fixture
def folder():
    """pytest would keep the gigabytes of its last three runs."""
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


# Of the whole UNet 16 bytes a parameter: weight, gradient and two moments in float32. One copy more would not fit, nor
# would one beside LoRA.
@pytest.mark.full
@pytest.mark.parametrize(
    ("how", "most"), [("rank=4", 8e9), ("autocast=True", 20 * PARAMETERS)], ids=["LoRA", "whole UNet"]
)
def test_full_size(folder, how, most):
    write(folder / "v1-5.safetensors", full_size())
    pixels = np.random.default_rng(0).integers(0, 255, (512, 512, 3), dtype=np.uint8)
    (folder / "pictures").mkdir()
    Image.fromarray(pixels).save(folder / "pictures" / "0.png")
    out = folder / "out.safetensors"
    args = [sys.executable, "-c", MEASURE.format(how=how), folder / "v1-5.safetensors", folder / "pictures", out]
    run = subprocess.run(args, stdout=subprocess.PIPE, text=True, check=True)
    peak = int(run.stdout.split()[-1])
    lines = [json.loads(line) for line in (folder / "out.safetensors.run" / "log.jsonl").open()]
    print(f"{how}: peak {peak / 1e9:.2f} GB, {lines[1]['seconds'] - lines[0]['seconds']} s a step")
    assert [line["step"] for line in lines] == [1, 2] and out.exists()
    assert peak < most
