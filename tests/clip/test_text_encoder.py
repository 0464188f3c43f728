"""The text encoder against transformers' CLIPTextModel on tiny random nets, and every number that ports get wrong."""

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
    text_reference,
    transformers_text,
    twin,
)
from torch import Tensor

from ldm import clip
from ldm.clip import TextConfig, text_encoder

BEGIN, END = 98, 99
CONFIGS = {
    "quick_gelu": TextConfig(vocab_size=100, length=16, width=32, layers=3, heads=4, end_token=END),
    "gelu": TextConfig(vocab_size=100, length=16, width=48, layers=4, heads=3, activation="gelu", end_token=END),
}
MODULES = {"quick_gelu": 36, "gelu": 47}


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
def case(activation: str, length: int, gain: float = 1.0) -> tuple[Reference, Tensor]:
    torch.manual_seed(1)
    ids = prompts(length)
    return text_reference(randomise(transformers_text(CONFIGS[activation]), gain), ids), ids


def check(activation: str, length: int = 16, gain: float = 1.0) -> dict[str, float]:
    return text_differences(clip.TextEncoder, CONFIGS[activation], *case(activation, length, gain))


@pytest.mark.parametrize("gain", [1.0, QUIET])
@pytest.mark.parametrize("length", [16, 11])
@pytest.mark.parametrize("activation", CONFIGS)
def test_every_module_and_every_clip_skip_equal_transformers(activation, length, gain):
    results = CONFIGS[activation].layers + len(["pooled"])
    assert_equal(check(activation, length, gain), MODULES[activation] + results)


def encoder(activation: str = "quick_gelu") -> clip.TextEncoder:
    return twin(clip.TextEncoder, CONFIGS[activation], case(activation, 16)[0].net, "text_model.")


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
    cases = product(CONFIGS, (1.0, QUIET))
    assert any(max(check(activation, gain=gain).values()) > TOLERANCE for activation, gain in cases)


@pytest.mark.parametrize("name", ["q_proj", "k_proj", "v_proj", "out_proj"])
def test_attention_has_every_bias(name, monkeypatch):
    old = f"self.{name} = nn.Linear(c.width, c.width)"
    rewrite(monkeypatch, text_encoder, {old: old.replace("c.width)", "c.width, bias=False)")})
    with pytest.raises(RuntimeError, match=f"{name}.bias"):
        check("gelu")
