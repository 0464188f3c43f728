"""The text encoder against transformers' CLIPTextModel on tiny random nets, and every number that ports get wrong."""

from dataclasses import replace
from functools import cache
from itertools import product

import pytest
import torch
from parity import (
    QUIET,
    TOLERANCE,
    Reference,
    assert_equal,
    randomise,
    rewrite,
    text_differences,
    text_prefix,
    text_reference,
    transformers_text,
    twin,
)
from torch import Tensor

from ldm import clip
from ldm.clip import TextConfig, text_encoder

BEGIN, END = 98, 99
SD1 = TextConfig(vocab_size=100, length=16, width=32, layers=3, heads=4, end_token=END)
SD2 = TextConfig(vocab_size=100, length=16, width=48, layers=4, heads=3, activation="gelu", end_token=END)
# A square projection, as bigG's: no shape would tell that it was left out or turned.
BIG_G = replace(SD2, skip=1, final_norm=False, projection=48)
CONFIGS = {
    "SD 1": SD1,
    "SD 2": SD2,
    "SDXL, first": replace(SD1, skip=1, final_norm=False),
    "SDXL, second": BIG_G,
    "projection to another width": replace(BIG_G, width=32, heads=4, layers=2),
}
MODULES = {"SD 1": 36, "SD 2": 47, "SDXL, first": 36, "SDXL, second": 48, "projection to another width": 26}


def prompts(length: int) -> Tensor:
    """(3,length): a short prompt filled up with end tokens, one filled up with zeros, and one that fills the length."""
    ids = torch.randint(1, BEGIN, (3, length))
    ids[:, 0] = BEGIN
    ids[0, 4:] = END
    ids[1, 6:] = 0
    ids[1, 6] = END
    ids[2, -1] = END
    return ids


@cache
def case(name: str, length: int, gain: float = 1.0) -> tuple[Reference, Tensor]:
    torch.manual_seed(1)
    ids = prompts(length)
    return text_reference(randomise(transformers_text(CONFIGS[name]), gain), CONFIGS[name], ids), ids


def check(name: str, length: int = 16, gain: float = 1.0) -> dict[str, float]:
    return text_differences(clip.TextEncoder, CONFIGS[name], *case(name, length, gain))


@pytest.mark.parametrize("gain", [1.0, QUIET])
@pytest.mark.parametrize("length", [16, 11])
@pytest.mark.parametrize("name", CONFIGS)
def test_every_module_and_every_clip_skip_equal_transformers(name, length, gain):
    c = CONFIGS[name]
    assert_equal(check(name, length, gain), MODULES[name] + c.layers - c.skip + len(["pooled"]))


def encoder(name: str = "SD 1") -> clip.TextEncoder:
    net = case(name, 16)[0].net
    return twin(clip.TextEncoder, CONFIGS[name], net, text_prefix(net))


@torch.no_grad()
def test_a_token_does_not_see_those_after_it():
    net, ids = encoder(), prompts(16)
    before = net(ids).context
    for i in range(1, 16):
        changed = ids.clone()
        changed[:, i] = (ids[:, i] + 1) % BEGIN
        after = net(changed).context
        assert torch.equal(after[:, :i], before[:, :i])
        assert not torch.equal(after[:, i:], before[:, i:])


@torch.no_grad()
def test_pooled_is_the_last_layer_at_the_first_end_token_whatever_the_clip_skip():
    net, ids = encoder(), prompts(16)
    last, pooled = net(ids)
    assert torch.equal(pooled, last[torch.arange(3), torch.tensor([4, 6, 15])])
    assert torch.equal(net(ids, clip_skip=2).pooled, pooled)


@pytest.mark.parametrize("clip_skip", [0, -1, 4])
def test_clip_skip_beyond_the_layers_is_an_error_that_names_both(clip_skip):
    with pytest.raises(ValueError, match=f"clip_skip={clip_skip}: .* 3 layers to take"):
        encoder()(prompts(16), clip_skip=clip_skip)


def layer_norm_eps(name: str) -> dict[str, str]:
    return {f"self.{name} = nn.LayerNorm(c.width)": f"self.{name} = nn.LayerNorm(c.width, eps=1e-6)"}


TRAPS = {
    "eps of layer_norm1": layer_norm_eps("layer_norm1"),
    "eps of layer_norm2": layer_norm_eps("layer_norm2"),
    "eps of final_layer_norm": layer_norm_eps("final_layer_norm"),
    "slope of quick_gelu": {"1.702 * x)\n": "1.7 * x)\n"},
    "gelu for quick_gelu": {'"quick_gelu": quick_gelu': '"quick_gelu": F.gelu'},
    "quick_gelu for gelu": {'"gelu": F.gelu': '"gelu": quick_gelu'},
    "gelu by tanh": {'"gelu": F.gelu': '"gelu": lambda x: F.gelu(x, approximate="tanh")'},
    "a token sees the next one": {".tril()": ".tril(1)"},
    "no final LayerNorm after a cut": {
        "context = model.final_layer_norm(": "context = (model.final_layer_norm if clip_skip == 1 else lambda x: x)("
    },
    "clip skip counted from 0": {"outputs[-clip_skip - c.skip]": "outputs[max(-clip_skip - 1, -len(outputs))]"},
    "pooled at the last end token": {"end = (ids": "end = ids.shape[1] - 1 - (ids.flip(1)"},
    "pooled from the layer of the clip skip": {"outputs[-1])": "outputs[-2])"},
}


@pytest.mark.parametrize("trap", TRAPS)
def test_parity_is_lost_when_a_number_is_changed(trap, monkeypatch):
    rewrite(monkeypatch, text_encoder, TRAPS[trap])
    cases = product(("SD 1", "SD 2"), (1.0, QUIET))
    assert any(max(check(name, gain=gain).values()) > TOLERANCE for name, gain in cases)


FAMILY_TRAPS = {  # the encoder, the result that must be far off, the edits
    "quick_gelu in SD 2": ("SD 2", "clip skip 1", {'"gelu": F.gelu': '"gelu": quick_gelu'}),
    "quick_gelu in SDXL's second": ("SDXL, second", "pooled", {'"gelu": F.gelu': '"gelu": quick_gelu'}),
    "gelu in SDXL's first": ("SDXL, first", "clip skip 1", {'"quick_gelu": quick_gelu': '"quick_gelu": F.gelu'}),
    "no final LayerNorm in SD 2": (
        "SD 2",
        "clip skip 1",
        {"context = model.final_layer_norm(context)": "model.final_layer_norm(context)"},
    ),
    **{
        f"{what} in {name}": (name, "clip skip 1", edits)
        for name in ("SDXL, first", "SDXL, second")
        for what, edits in {
            "nothing skipped": {"outputs[-clip_skip - c.skip]": "outputs[-clip_skip]"},
            "one more skipped": {"outputs[-clip_skip - c.skip]": "outputs[max(-clip_skip - c.skip - 1, -c.layers)]"},
            "a final LayerNorm": {"if c.final_norm:": "if True:"},
        }.items()
    },
    **{
        f"{what} in {name}": (name, "pooled", edits)
        for name in ("SDXL, first", "SDXL, second")
        for what, edits in {
            "pooled from the context": {
                "model.final_layer_norm(outputs[-1])": "(model.final_layer_norm(outputs[-1]), context)[1]"
            },
            "pooled from the layer of the context": {"outputs[-1])": "outputs[-clip_skip - c.skip])"},
            "pooled without LayerNorm": {
                "model.final_layer_norm(outputs[-1])": "(model.final_layer_norm(outputs[-1]), outputs[-1])[1]"
            },
            "pooled at the last token": {"end = (ids == c.end_token).int().argmax(dim=1)": "end = [ids.shape[1] - 1]"},
        }.items()
    },
    "pooled of SD 2 from the layer of the clip skip": ("SD 2", "clip skip 2", {"outputs[-1])": "outputs[-clip_skip])"}),
    "not projected": ("SDXL, second", "pooled", {"pooled = self.text_projection(": "self.text_projection("}),
    "projection turned": (
        "SDXL, second",
        "pooled",
        {"self.text_projection(pooled)": "0 * self.text_projection(pooled) + pooled @ self.text_projection.weight"},
    ),
    "context projected": (
        "SDXL, second",
        "clip skip 1",
        {"return TextEncoding(context": "return TextEncoding(self.text_projection(context)"},
    ),
}


@pytest.mark.parametrize("trap", FAMILY_TRAPS)
def test_what_tells_the_encoders_apart_is_seen_from_afar(trap, monkeypatch):
    name, result, edits = FAMILY_TRAPS[trap]
    rewrite(monkeypatch, text_encoder, edits)
    assert check(name)[result] > 100 * TOLERANCE


@pytest.mark.parametrize("name", ["q_proj", "k_proj", "v_proj", "out_proj"])
def test_attention_has_every_bias(name, monkeypatch):
    old = f"self.{name} = Linear(c.width, c.width)"
    rewrite(monkeypatch, text_encoder, {old: old.replace("c.width)", "c.width, bias=False)")})
    with pytest.raises(RuntimeError, match=f"{name}.bias"):
        check("SD 2")
