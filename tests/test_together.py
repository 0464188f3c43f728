"""Pictures of a batch are bit for bit what they are alone."""

import pytest
import torch
from PIL import Image

import ldm
from ldm import together
from ldm.__main__ import threads
from ldm.convolutions import ADDED, CONVOLUTION, TRANSPOSED, Conv2d, added
from ldm.kernels import COMBINED, PRODUCT
from ldm.settings import Settings
from ldm.together import Alone
from ldm.unet.transformer import GEGLU
from ldm.vae.blocks import Upsample

PICTURE = Image.radial_gradient("L").convert("RGB").resize((64, 64))
CASES = {
    "cfg": {},
    "no guidance": {"guidance_scale": 1},
    "fresh noise": {"sampler": "dpmpp_sde"},
    "three rows a picture": {"guidance": "perp_neg", "negative_prompt": "blue"},
    "guidance that remembers": {"guidance": "apg", "guidance_options": {"momentum": -0.5}, "steps": 2},
    "long": {"prompt": " ".join(["red"] * 80)},
    "another size": {"width": 40, "height": 24},
    "seamless": {"tiling": "both", "width": 32, "height": 32},
    "a picture": {"image": PICTURE, "strength": 0.5},
}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def pipe():
    return ldm.Pipeline.from_pretrained(device="cpu")


def test_what_mixes_rows_is_called_picture_by_picture(monkeypatch):
    """Sums over the rows of three pictures, of which each has two; a product keeps rows apart."""
    monkeypatch.setattr(together, "MIXING", {torch.cumsum: 1, torch.mul: 1})
    alone, x = Alone(), torch.tensor([1, 10, 100, 2, 20, 200])
    alone.count = 3
    with alone:
        for _ in range(2):
            assert torch.cumsum(x, 0).tolist() == [1, 10, 100, 3, 30, 300]
            assert torch.mul(x, 2).tolist() == [2, 20, 200, 4, 40, 400]
            assert torch.cumsum(x[:4], 0).tolist() == [1, 11, 111, 113]  # nothing that each of the three has
    assert list(alone.same.values()) == [False, True]


def test_layouts_stay():
    """Whatever its layout in memory, a layer sees of one picture what it sees when that is alone."""
    conv, linear, alone = torch.nn.Conv2d(8, 8, 1), torch.nn.Linear(8, 8), Alone()
    alone.count = 3
    x = torch.randn(6, 8, 5, 5)
    for net, y in ((conv, x), (conv, x.to(memory_format=torch.channels_last)), (linear, x.flatten(2).mT)):
        each = [net(y[i::3].clone()) for i in range(3)]
        with alone:
            both = net(y)
        assert all(torch.equal(both[i::3], each[i]) for i in range(3))
        assert y.ndim < 4 or both.stride() == net(y).stride()


def test_packed_convolutions_are_tried():
    """And are what they are alone, whether or not a batch is packed in another layout."""
    conv, up, alone = Conv2d(128, 128, 3, padding=1), Upsample(128), Alone()
    alone.count = 3
    x = torch.randn(6, 128, 16, 16)
    with torch.no_grad():
        for net in (conv, up, lambda x: added(x + 1, conv, x)):
            each = [net(x[i::3].clone()) for i in range(3)]
            for _ in range(2):
                with alone:
                    both = net(x)
                assert all(torch.equal(both[i::3], each[i]) for i in range(3))
    assert [case[0] for case in alone.same] == [CONVOLUTION, TRANSPOSED, ADDED]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_feed_forward_is_tried(dtype):
    net, alone, x = GEGLU(320, 1280).to(dtype), Alone(), torch.randn(6, 64, 320).to(dtype)
    alone.count = 3
    with torch.no_grad():
        each = [net(x[i::3].clone()) for i in range(3)]
        for _ in range(2):
            with alone:
                both = net(x)
            assert all(torch.equal(both[i::3], each[i]) for i in range(3))
    assert [case[0] for case in alone.same] == [PRODUCT, COMBINED]


def same_pictures(pipe, own):
    prompt = own.get("prompt", "")
    options = {"steps": 1} | {name: value for name, value in own.items() if name != "prompt"}
    s = Settings([f"heart {prompt}", f"star {prompt}", f"star {prompt}"], seed=[3, 1, 2], **options)
    each = [pipe.run(single, progress=False) for single in s.each()]
    alone = Alone()
    alone.count = 3
    tried = []
    for _ in range(2):  # the trial, and what follows from it
        with alone:
            out = pipe.run(s, progress=False)
        tried.append(len(alone.same))
        assert [a.tobytes() for a in out.images] == [single.images[0].tobytes() for single in each]
        assert torch.equal(out.latents, torch.cat([single.latents for single in each]))
    assert tried[0] == tried[1]  # though layers make views of their weights at each call
    assert sum(alone.same.values()) > len(alone.same) / 2  # or batches would be no faster


@pytest.mark.parametrize("case", CASES)
def test_pictures(case, pipe):
    same_pictures(pipe, CASES[case])


def test_with_threads(pipe):
    """Three pictures, six rows, two threads: kernels have odd parts, and rows of one batch differ by their place."""
    with threads(2):
        same_pictures(pipe, {})
