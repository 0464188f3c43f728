"""Strips against the whole at every pixel: tiny nets in many cuts, the shipped VAE, and SD's at full size."""

import copy
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from parity import TOLERANCE, diffusers_vae, max_difference, randomise, twin
from torch import Tensor, nn

import ldm
from ldm.models import SD1
from ldm.pipeline import DEFAULT_MODEL
from ldm.vae import VAE, VAEConfig, strips

CONFIGS = {
    "4 levels": VAEConfig(channels=(16, 32, 32, 64), groups=8),
    "2 levels": VAEConfig(channels=(8, 16), layers=1, groups=4),
    "1 level": VAEConfig(channels=(8,), layers=1, groups=4),
}
SIZES = [(5, 7), (1, 24), (33, 3), (13, 11)]  # of latents


@cache
def tiny(name: str) -> VAE:
    return randomise(VAE(CONFIGS[name])).requires_grad_(False)


def inputs(c: VAEConfig, size: tuple[int, int], count: int = 1) -> tuple[Tensor, Tensor]:
    """An image, and latents of `size`."""
    image = torch.rand(count, 3, *(c.factor * side for side in size)) * 2 - 1
    return image, torch.randn(count, c.latent_channels, *size)


def results(net: VAE, image: Tensor, z: Tensor, in_strips: bool) -> list[Tensor]:
    """Mean and std of the image, the picture of the latents."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(strips, "WHOLE_UP_TO", 0 if in_strips else float("inf"))
        return [*net.encode(image), net.decode(z)]


def difference(net: VAE, image: Tensor, z: Tensor) -> float:
    """At the worst pixel, of the largest value."""
    return max_difference(*(results(net, image, z, in_strips) for in_strips in (True, False)))


@pytest.mark.parametrize("strip", [1, 3_000, 20_000, 2**24])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", CONFIGS)
def test_strips_equal_the_whole(name, size, strip, monkeypatch):
    monkeypatch.setattr(strips, "STRIP", strip)
    assert difference(tiny(name), *inputs(CONFIGS[name], size)) <= TOLERANCE


def test_a_batch_and_a_height_that_is_no_multiple(monkeypatch):
    monkeypatch.setattr(strips, "STRIP", 3_000)
    _, z = inputs(CONFIGS["4 levels"], (7, 6), count=3)
    assert difference(tiny("4 levels"), torch.rand(3, 3, 77, 51) * 2 - 1, z) <= TOLERANCE


@pytest.mark.parametrize("strip", [3_000, 20_000, 200_000])
def test_the_shipped_vae(strip, monkeypatch):
    monkeypatch.setattr(strips, "STRIP", strip)
    net = ldm.Pipeline.from_pretrained(DEFAULT_MODEL).vae
    assert difference(net, *inputs(net.config, (24, 37))) <= TOLERANCE


class WrappedDownsample(nn.Module):
    def __init__(self, conv: nn.Conv2d):
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1), mode="circular"))


@pytest.fixture
def wrapped() -> VAE:
    net = copy.deepcopy(tiny("4 levels"))
    for module in net.modules():
        if isinstance(module, nn.Conv2d) and module.padding == (1, 1):
            module.padding_mode = "circular"
    for block in net.encoder.down_blocks[:-1]:
        block.downsamplers[0] = WrappedDownsample(block.downsamplers[0].conv)
    return net


@pytest.mark.parametrize("strip", [1, 3_000, 20_000])
@pytest.mark.parametrize("size", SIZES)
def test_rows_that_wrap_around(size, strip, wrapped, monkeypatch):
    monkeypatch.setattr(strips, "STRIP", strip)
    image, z = inputs(wrapped.config, size)
    whole = wrapped.encoder(image), wrapped.decoder(z)
    cut = [strips.encode(wrapped.encoder, image, wrap=True), strips.decode(wrapped.decoder, z, wrap=True)]
    assert max_difference(cut, whole) <= TOLERANCE
    cut = [strips.encode(wrapped.encoder, image), strips.decode(wrapped.decoder, z)]
    assert max_difference(cut, whole) > 1e-2


def test_bfloat16_within_its_rounding(monkeypatch):
    monkeypatch.setattr(strips, "STRIP", 20_000)
    image, z = inputs(CONFIGS["4 levels"], (9, 7))
    net = copy.deepcopy(tiny("4 levels")).bfloat16()
    exact = results(tiny("4 levels"), image.bfloat16().float(), z.bfloat16().float(), in_strips=False)
    cut, whole = (results(net, image.bfloat16(), z.bfloat16(), in_strips) for in_strips in (True, False))
    assert {t.dtype for t in cut} == {torch.bfloat16}
    assert max_difference(cut, exact) <= 1.5 * max_difference(whole, exact)


# What would be seen


def own_statistics(module: nn.Module) -> tuple[nn.Module, list[strips.WholeNorm]]:
    return module, []


class HaloInTheStatistics(strips.WholeNorm):
    def forward(self, x: Tensor) -> Tensor:
        self.own = slice(None)
        return super().forward(x)


MUTATIONS = {
    "a halo one row too small": ("HALO", 1),
    "statistics of each strip": ("with_whole_norms", own_statistics),
    "statistics with the halo": ("WholeNorm", HaloInTheStatistics),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_mistake_shows(mutation, monkeypatch):
    monkeypatch.setattr(strips, "STRIP", 20_000)
    monkeypatch.setattr(strips, *MUTATIONS[mutation])
    _, z = inputs(CONFIGS["4 levels"], (24, 16))
    cut, whole = (results(tiny("4 levels"), torch.zeros(1, 3, 64, 64), z, n)[2] for n in (True, False))
    assert (cut - whole).abs().max() > 1 / 255


def test_strips_are_freed_when_no_later_one_looks_at_them():
    parts = list(torch.arange(40.0).view(1, 1, 40, 1).split(5, dim=2))
    left = []
    for window, above, below in strips.windows(parts, 10, wrap=False):
        assert window[:, :, above:below].flatten().tolist() == list(range(10 * len(left), 10 * len(left) + 10))
        left.append(len(parts))
    assert left == [8, 7, 5, 3]  # of 8 strips: all, from row 5, from row 15, from row 25


# The user's module, and when it is used


def state(net: VAE) -> list[tuple]:
    modules = [(name, id(m), type(m), m.training) for name, m in net.named_modules()]
    return modules + [(name, id(p), p.data_ptr(), p._version) for name, p in net.named_parameters()]


def test_the_module_is_left_as_it_was_and_its_parameters_are_shared(monkeypatch):
    monkeypatch.setattr(strips, "STRIP", 3_000)
    net = copy.deepcopy(tiny("4 levels"))
    before, values = state(net), copy.deepcopy(net.state_dict())
    image, z = inputs(net.config, (9, 7))
    expected = results(net, image, z, in_strips=True)
    copied, norms = strips.with_whole_norms(net.decoder)
    assert [id(p) for p in copied.parameters()] == [id(p) for p in net.decoder.parameters()]
    assert len(norms) == 30

    def fail(module, inputs):
        raise RuntimeError("in the middle")

    hook = net.decoder.up_blocks[2].resnets[1].conv2.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="in the middle"):
        results(net, image, z, in_strips=True)
    hook.remove()
    assert state(net) == before and all(torch.equal(values[name], v) for name, v in net.state_dict().items())
    assert max_difference(results(net, image, z, in_strips=True), expected) == 0


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    made = []
    for name in ("encode", "decode"):
        function = getattr(strips, name)
        monkeypatch.setattr(strips, name, lambda *a, name=name, f=function: made.append(name) or f(*a))
    return made


def test_strips_are_chosen_above_the_limit_and_not_below(calls, monkeypatch):
    net = tiny("2 levels")
    assert not net.in_strips(1024, 1024) and net.in_strips(1026, 1024)
    monkeypatch.setattr(strips, "WHOLE_UP_TO", 32 * 48)
    net.decode(torch.zeros(2, 4, 16, 24)), net.encode(torch.zeros(2, 3, 32, 48))
    assert calls == []
    net.decode(torch.zeros(2, 4, 16, 25)), net.encode(torch.zeros(2, 3, 34, 48))
    assert calls == ["decode", "encode"]


def test_not_where_gradients_are_taken(calls, monkeypatch):
    monkeypatch.setattr(strips, "WHOLE_UP_TO", 0)
    net = copy.deepcopy(tiny("2 levels")).requires_grad_(True)
    image, z = inputs(net.config, (4, 4))
    assert net.decode(z).requires_grad and net.encode(image).mean.requires_grad
    assert tiny("2 levels").decode(z.requires_grad_(True)).requires_grad
    assert calls == []
    with torch.no_grad():
        net.decode(z), net.encode(image)
    assert calls == ["decode", "encode"]


def test_the_pipeline_says_so(capsys, monkeypatch):
    pipe = ldm.Pipeline.from_pretrained(DEFAULT_MODEL)
    pipe(steps=1)
    assert "strips" not in capsys.readouterr().err
    monkeypatch.setattr(strips, "WHOLE_UP_TO", 4000)
    pipe(steps=1, progress=False)
    assert capsys.readouterr().err == ""
    pipe(steps=1)
    assert "64x64 is more than 4,000 pixels: the VAE works in strips" in capsys.readouterr().err


@pytest.mark.full
def test_full_size():
    theirs = randomise(diffusers_vae(SD1.vae)).requires_grad_(False)
    net = twin(VAE, SD1.vae, theirs).requires_grad_(False)
    image, z = inputs(SD1.vae, (64, 96))
    posterior = theirs.encode(image).latent_dist
    reference = [posterior.mean, posterior.std, theirs.decode(z).sample]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(strips, "STRIP", 2**21)  # 21 rows at 768x512
        cut = results(net, image, z, in_strips=True)
    whole = results(net, image, z, in_strips=False)
    found = {"diffusers": max_difference(cut, reference), "whole": max_difference(cut, whole)}
    pixels = float((cut[2] - whole[2]).abs().max() * 127.5)
    print(f"of the largest value, from {found}; {pixels:.1e} / 255 at the worst pixel")
    assert max(found.values()) <= 1e-4 and pixels < 0.1
