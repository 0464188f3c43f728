"""The approximations: equal where they must be, and less work."""

import pytest
import torch
from parity import randomise
from torch import nn

import ldm
from ldm.settings import FAST
from ldm.unet import UNet, UNetConfig
from ldm.unet.approximate import DeepCache, merged, merging
from ldm.unet.transformer import Attention

CONFIG = UNetConfig(channels=(32, 64), layers=1, depth=(1, 1), heads=4, context_width=24, groups=8)


@pytest.fixture(scope="module")
def unet():
    return randomise(UNet(CONFIG)).eval().requires_grad_(False)


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, *shape, generator=generator) for shape in ((4, 8, 6), (7, 24))]


def evaluations(net, module: nn.Module) -> list[int]:
    calls = []
    module.register_forward_hook(lambda *_: calls.append(1))
    return calls


class TestDeepCache:
    def test_what_did_not_change_is_equal(self, unet, inputs):
        x, context = inputs
        cached = DeepCache(unet, 3)
        whole = unet(x, 500, context)
        assert all(torch.equal(cached(x, 500, context), whole) for _ in range(4))

    def test_which_evaluations_are_whole(self, unet, inputs):
        """Of those between, x and the time still go through the first and the last layers."""
        x, context = inputs
        cached, calls = DeepCache(unet, 3), evaluations(unet, unet.mid_block)
        outs, counts = [], []
        for i in range(7):
            outs.append(cached(x + i, 500 - 10 * i, context))
            counts.append(len(calls))
        assert counts == [1, 1, 1, 2, 2, 2, 3]
        for i, out in enumerate(outs):
            whole = unet(x + i, 500 - 10 * i, context)
            assert torch.equal(out, whole) == (i % 3 == 0)
            assert (out - outs[i - i % 3]).abs().max() > 0.01 or i % 3 == 0

    def test_features_are_those_of_the_last_whole_one(self, unet, inputs):
        """By hand: what the last stage makes of the old features and the new x."""
        x, context = inputs
        kept = []
        hook = unet.up_blocks[-1].resnets[-1].register_forward_pre_hook(lambda _, args: kept.append(args[0]))
        cached = DeepCache(unet, 2)
        cached(x, 500, context)
        cached(2 * x, 400, context)
        hook.remove()
        features, first = kept[1].split([kept[1].shape[1] - 32, 32], dim=1)
        assert torch.equal(features, kept[0][:, :-32])
        assert torch.equal(first, unet.conv_in(2 * x))

    def test_a_run(self):
        """Nothing is left from one run to the next, and the first evaluation is whole."""
        pipe = ldm.Pipeline.from_pretrained(device="cpu")
        calls = evaluations(pipe, pipe.unet.mid_block)
        runs = [pipe("a red heart", steps=4, deep_cache=2, progress=False) for _ in range(2)]
        assert len(calls) == 4
        assert torch.equal(runs[0].latents, runs[1].latents)
        exact = pipe("a red heart", steps=4, progress=False).latents
        assert 0.01 < (runs[0].latents - exact).abs().max() < exact.abs().max()

    def test_gradients(self):
        """Those of a run with gradients are of the very evaluations that it made."""
        pipe = ldm.Pipeline.from_pretrained(device="cpu")
        settings = {"steps": 3, "deep_cache": 2, "guidance_scale": 1, "width": 32, "height": 32}
        noise = torch.randn(1, 4, 32 // pipe.vae.config.factor, 32 // pipe.vae.config.factor).double()

        def end(noise):
            *_, last = pipe.stream("a red heart", noise=noise.float(), grad=True, **settings)
            return last.x.double().sum()

        at = noise.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(end(at), at)
        along = gradient / gradient.norm()
        with torch.no_grad():
            slope = (end(noise + 1e-2 * along) - end(noise - 1e-2 * along)) / 2e-2
        assert slope == pytest.approx(float(gradient.norm()), rel=0.02)


class TestTokenMerging:
    def test_nothing_merged(self, unet, inputs):
        x, context = inputs
        assert (merged(unet, 0.0)(x, 500, context) - unet(x, 500, context)).abs().max() < 1e-5

    def test_equal_tokens(self):
        """A picture whose 2x2 blocks are of one colour: a quarter of the tokens say all, and attention is the same."""
        attn = randomise(Attention(32, 32, 4))
        coarse = torch.randn(2, 32, 3, 4)
        x = coarse.repeat_interleave(2, 2).repeat_interleave(2, 3).flatten(2).mT  # (2,48,32)
        merge, unmerge = merging(x, torch.Size((6, 8)), 0.75)
        few = merge(x)
        assert few.shape == (2, 12, 32)
        assert (unmerge(attn(few, few)) - attn(x, x)).abs().max() < 1e-5

    @pytest.mark.parametrize("size", [(6, 8), (5, 7)])
    @pytest.mark.parametrize("ratio", [0.0, 0.3, 0.5, 0.75])
    def test_by_hand(self, size, ratio):
        torch.manual_seed(0)
        height, width = size
        x = torch.randn(2, height * width, 16)
        merge, unmerge = merging(x, torch.Size(size), ratio)
        back = unmerge(merge(x))
        places = [(i, j) for i in range(height) for j in range(width)]
        stays = [n for n, (i, j) in enumerate(places) if i % 2 == j % 2 == 0]
        goes = [n for n in range(height * width) if n not in stays]
        count = min(int(ratio * height * width), len(goes))
        for tokens, result in zip(x, back, strict=True):
            unit = tokens / tokens.norm(dim=1, keepdim=True)
            best = {n: max((float(unit[n] @ unit[m]), m) for m in stays) for n in goes}
            gone = sorted(goes, key=lambda n: -best[n][0])[:count]
            groups = {m: [m, *[n for n in gone if best[n][1] == m]] for m in stays}
            expected = tokens.clone()
            for group in groups.values():
                expected[group] = tokens[group].mean(dim=0)
            assert (result - expected).abs().max() < 1e-5

    def test_less_is_attended_at_the_finest_level_alone(self, unet, inputs):
        x, context = inputs
        seen = {}
        twin = merged(unet, 0.5)
        for name, module in twin.named_modules():
            if name.endswith("attn1.to_q"):
                module.register_forward_hook(
                    lambda _, args, y, name=name: seen.update({name.split(".tr")[0]: y.shape[1]})
                )
        twin(x, 500, context)
        assert {name: count for name, count in seen.items() if count == 24} == {
            "down_blocks.0.attentions.0": 24,
            "up_blocks.1.attentions.0": 24,
            "up_blocks.1.attentions.1": 24,
        }
        assert set(seen.values()) == {24, 12}

    def test_a_run(self):
        pipe = ldm.Pipeline.from_pretrained(device="cpu")
        runs = [pipe("a red heart", steps=3, token_merging=0.5, progress=False).latents for _ in range(2)]
        exact = pipe("a red heart", steps=3, progress=False).latents
        assert torch.equal(*runs)
        assert 0.001 < (runs[0] - exact).abs().max() < exact.abs().max()


@pytest.mark.parametrize(
    ("name", "value"),
    [("deep_cache", 0), ("deep_cache", 1.5), ("deep_cache", True), ("token_merging", 0.8), ("token_merging", "a")],
)
def test_input(name, value):
    with pytest.raises(ValueError, match=f"{name}="):
        ldm.Settings("", **{name: value})


def test_documented_sets():
    for name, settings in FAST.items():
        assert ldm.Pipeline.fast(name) == settings
        assert ldm.Settings("", **settings)
        ldm.Pipeline.fast(name).clear()
        assert ldm.Pipeline.fast(name) == settings != {}
    with pytest.raises(ValueError, match=r"fast\('fastest'\): use 'balanced' or 'draft'"):
        ldm.Pipeline.fast("fastest")
