"""The UNet against diffusers' UNet2DConditionModel on tiny random nets, and every number that ports get wrong."""

from functools import cache

import pytest
import torch
from parity import (
    QUIET,
    TOLERANCE,
    Reference,
    UNetInputs,
    assert_equal,
    diffusers_unet,
    randomise,
    rewrite,
    twin,
    unet_differences,
    unet_reference,
)

import ldm.attention
from ldm import kernels, unet
from ldm.unet import UNetConfig, blocks, transformer
from ldm.unet import unet as unet_module

POOLED, TIME_ID = 24, 8

CONFIGS = {
    "SD 1": UNetConfig(channels=(32, 64, 64, 64), heads=4, context_width=24, groups=8),
    "SD 2, inpainting": UNetConfig(
        in_channels=9,
        channels=(32, 64, 96, 96),
        heads=None,
        head_width=16,
        context_width=40,
        linear_projection=True,
        groups=16,
    ),
    "SDXL": UNetConfig(
        channels=(32, 64, 96),
        depth=(0, 1, 2),
        mid_depth=2,
        heads=None,
        head_width=16,
        context_width=48,
        linear_projection=True,
        vector_width=POOLED + 6 * TIME_ID,
    ),
    "small": UNetConfig(channels=(32, 64, 64), layers=1, depth=(0, 1, 1), heads=4, context_width=24),
}
MODULES = {"SD 1": 524, "SD 2, inpainting": 525, "SDXL": 487, "small": 248}


@cache
def case(name: str, size: tuple[int, int], gain: float = 1.0) -> tuple[Reference, UNetInputs]:
    c = CONFIGS[name]
    torch.manual_seed(1)
    sdxl = {}
    if c.vector_width is not None:
        time_ids = torch.tensor([[64.0, 48, 0, 3, 64, 64], [1024, 768, 17, 0, 512, 512]])
        sdxl = {"pooled": torch.randn(2, POOLED), "time_ids": time_ids, "time_id_width": TIME_ID}
    t = torch.tensor([12.25, 731.5])
    inputs = UNetInputs(torch.randn(2, c.in_channels, *size), t, torch.randn(2, 7, c.context_width), **sdxl)
    return unet_reference(randomise(diffusers_unet(c, TIME_ID), gain), inputs), inputs


def check(name: str, size: tuple[int, int] = (8, 8), gain: float = 1.0) -> dict[str, float]:
    reference, inputs = case(name, size, gain)
    return unet_differences(unet.UNet, CONFIGS[name], reference, inputs)


@pytest.mark.parametrize("gain", [1.0, QUIET])
@pytest.mark.parametrize("size", [(8, 8), (7, 9), (5, 12)])
@pytest.mark.parametrize("name", CONFIGS)
def test_every_module_equals_diffusers(name, size, gain):
    assert_equal(check(name, size, gain), MODULES[name] + len(["output"]))


def test_t_may_be_a_number_or_a_tensor_for_each_sample():
    c = CONFIGS["small"]
    reference = randomise(diffusers_unet(c))
    net = twin(unet.UNet, c, reference)
    x, context = torch.randn(2, 4, 8, 8), torch.randn(2, 7, c.context_width)
    for t in (0, 37.5, 999, torch.tensor(500), torch.tensor([3, 999])):
        with torch.no_grad():
            ours, theirs = net(x, t, context), reference(x, t, context).sample
        assert (ours - theirs).abs().max() <= TOLERANCE * theirs.abs().max()


TRAPS = {
    "eps of a resnet's norm1": (blocks, {"GroupNorm(groups, inp, eps=1e-5)": "GroupNorm(groups, inp, eps=1e-6)"}),
    "eps of a resnet's norm2": (blocks, {"GroupNorm(groups, out, eps=1e-5)": "GroupNorm(groups, out, eps=1e-6)"}),
    "eps of the transformer's norm": (transformer, {"eps=1e-6": "eps=1e-5"}),
    "eps of conv_norm_out": (unet_module, {"eps=1e-5": "eps=1e-6"}),
    **{
        f"eps of the LayerNorm {norm}": (
            transformer,
            {f"self.{norm} = nn.LayerNorm(width)": f"self.{norm} = nn.LayerNorm(width, eps=1e-6)"},
        )
        for norm in ("norm1", "norm2", "norm3")
    },
    "downsampling pads on the right and at the bottom alone": (
        blocks,
        {
            "3, stride=2, padding=1)": "3, stride=2)",
            "return self.conv(x)  #": "return self.conv(F.pad(x, (0, 1, 0, 1)))  #",
        },
    ),
    "GEGLU's halves": (kernels, {"a, b = proj(x)": "b, a = proj(x)"}),
    "GEGLU's gelu by tanh": (kernels, {"F.gelu(b)": "F.gelu(b, approximate='tanh')"}),
    "sine before cosine": (blocks, {"[angle.cos(), angle.sin()]": "[angle.sin(), angle.cos()]"}),
    "largest period of the time embedding": (blocks, {"math.log(10000)": "math.log(9999)"}),
    "last frequency of the time embedding": (blocks, {"device=t.device) / half": "device=t.device) / (half - 1)"}),
    "fraction of t": (blocks, {"t.float()": "t.long().float()"}),
    "SiLU in the time embedding": (blocks, {"F.silu(self.linear_1(x))": "F.gelu(self.linear_1(x))"}),
    "SiLU before a resnet's time_emb_proj": (blocks, {"F.silu(temb)": "temb"}),
    "split into heads": (ldm.attention, {"b n (h d) -> b h n d": "b n (d h) -> b h n d"}),
}


@pytest.mark.parametrize("trap", TRAPS)
def test_parity_is_lost_when_a_number_is_changed(trap, monkeypatch):
    module, edits = TRAPS[trap]
    rewrite(monkeypatch, module, edits)
    assert any(max(check("SD 1", gain=gain).values()) > TOLERANCE for gain in (1.0, QUIET))


@pytest.mark.parametrize(
    ("old", "new", "name"),
    [
        ("self.to_q = Linear(width, width, bias=False)", "self.to_q = Linear(width, width)", "to_q.bias"),
        (
            "self.to_k = Linear(context_width, width, bias=False)",
            "self.to_k = Linear(context_width, width)",
            "to_k.bias",
        ),
        (
            "self.to_v = Linear(context_width, width, bias=False)",
            "self.to_v = Linear(context_width, width)",
            "to_v.bias",
        ),
        (
            "nn.Sequential(Linear(width, width))",
            "nn.Sequential(Linear(width, width, bias=False))",
            "to_out.0.bias",
        ),
    ],
)
def test_attention_has_a_bias_on_the_way_out_alone(old, new, name, monkeypatch):
    rewrite(monkeypatch, transformer, {old: new})
    with pytest.raises(RuntimeError, match=f"attn1.{name}"):
        check("small")
