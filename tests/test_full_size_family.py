"""SD 2, SDXL, its refiner and the inpainting models at full size: each net alone, on random weights that it shares with
the reference.

pytest -m full -s tests/test_full_size_family.py    # 12 GB of memory, 6 minutes on two cores
"""

import ctypes
import gc
import time
from pathlib import Path

import pytest
import torch
from parity import (
    UNetInputs,
    assert_equal,
    diffusers_unet,
    randomise,
    text_differences,
    text_reference,
    transformers_text,
    unet_differences,
    unet_reference,
)

from ldm.clip import TextEncoder
from ldm.models import BIG_G, REFINER, SD1, SD2, SDXL, inpainting
from ldm.unet import UNet

TOLERANCE = 1e-4
GIGABYTE = 2**30

UNETS = {  # the model, how many numbers its vector embeds, parameters, modules that are compared
    "SD 2": (SD2, 0, 865_910_724, 525),
    "SDXL": (SDXL, 6, 2_567_463_684, 1441),
    "refiner": (REFINER, 5, 2_259_526_660, 1012),
    "SD 1 inpainting": (inpainting(SD1), 0, 859_535_364, 525),
    "SD 2 inpainting": (inpainting(SD2), 0, 865_925_124, 525),
}
TEXTS = {  # the config, parameters, modules that are compared
    "ViT-H without its last layer": (SD2.text_encoder, 340_387_840, 256),
    "bigG with its projection": (BIG_G, 694_659_840, 356),
}


@pytest.fixture
def report(request):
    """Called with the differences, prints them with the seconds and the memory that the test took (Linux, glibc)."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # gives back what the net before has left
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak
    start = time.perf_counter()

    def show(differences):
        status = Path("/proc/self/status").read_text()
        peak = int(status.split("VmHWM:")[1].split()[0]) * 1024 / GIGABYTE
        worst = max(differences, key=differences.get)
        print(
            f"\n{request.node.name}: {len(differences)} outputs, worst {differences[worst]:.1e} in {worst},"
            f" {time.perf_counter() - start:.0f} s, peak {peak:.1f} GB"
        )
        assert peak < 14

    return show


@pytest.mark.full
@pytest.mark.parametrize("name", UNETS)
def test_unet(name, report):
    model, numbers, parameters, modules = UNETS[name]
    c = model.unet
    torch.manual_seed(0)
    vector = {}
    if numbers:
        time_ids = torch.tensor([[1024.0, 768, 17, 0, 512, 640][:numbers]])
        vector = {"pooled": torch.randn(1, BIG_G.projection), "time_ids": time_ids, "time_id_width": 256}
    inputs = UNetInputs(
        torch.randn(1, c.in_channels, 32, 32), torch.tensor([481.5]), torch.randn(1, 77, c.context_width), **vector
    )
    net = randomise(diffusers_unet(c, 256))
    assert sum(p.numel() for p in net.parameters()) == parameters
    found = unet_differences(UNet, c, unet_reference(net, inputs), inputs)
    report(found)
    assert_equal(found, modules + len(["output"]), TOLERANCE)


@pytest.mark.full
@pytest.mark.parametrize("name", TEXTS)
def test_text_encoder(name, report):
    c, parameters, modules = TEXTS[name]
    torch.manual_seed(0)
    ids = torch.randint(0, 49406, (2, c.length))
    ids[0, 9:], ids[1, -1] = 0, c.end_token
    ids[0, 9] = c.end_token
    net = randomise(transformers_text(c))
    assert sum(p.numel() for p in net.parameters()) == parameters
    found = text_differences(TextEncoder, c, text_reference(net, c, ids), ids)
    report(found)
    assert_equal(found, modules + c.layers - c.skip + len(["pooled"]), TOLERANCE)
