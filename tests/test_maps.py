"""What the cross-attentions look at: against arithmetic, against diffusers, and word by word."""

import math

import numpy as np
import pytest
import torch
from synthetic import diffusers_pipeline, tiny_nets

import ldm
from ldm.clip import Tokenizer
from ldm.clip.prompt import plan
from ldm.maps import Maps, shares, weights

MID = "mid_block.attentions.0.transformer_blocks.0.attn2"


@pytest.fixture(scope="module")
def pipe():
    return ldm.Pipeline.from_pretrained()


def inputs(rows=2, tokens=5, side=6):
    generator = torch.Generator().manual_seed(3)
    x, context = (torch.randn(shape, generator=generator) for shape in ((rows, 4, side, side), (rows, tokens, 24)))
    return x, 500, context


def hooks(net):
    """Of all modules, and of the net's."""
    every = len(torch.nn.modules.module._global_forward_pre_hooks)
    return every + sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in net.modules())


def test_weights_on_paper():
    """Two heads of width 1, one place, two tokens: softmax(0, ln 3) = (1/4, 3/4) and softmax(ln 4, 0) = (4/5, 1/5)."""
    q, k = torch.tensor([[[1.0, 2.0]]]), torch.tensor([[[0.0, math.log(2)], [math.log(3), 0.0]]])
    got = weights(q, k, 2, torch.Size([1, 1]))
    assert got.shape == (1, 2, 2, 1, 1)
    assert torch.allclose(got.flatten(), torch.tensor([1 / 4, 3 / 4, 4 / 5, 1 / 5]))
    wide = weights(torch.ones(1, 1, 4), torch.tensor([[[0.0] * 4, [math.log(3) / 2] * 4]]), 1, torch.Size([1, 1]))
    assert torch.allclose(wide.flatten(), torch.tensor([1 / 4, 3 / 4]))  # 4 ln 3 / 2 / sqrt(4)


def test_equal_to_plain_arithmetic():
    """Every layer, head, place and token, in float64 and with loops; two evaluations are averaged."""
    unet, _, _ = tiny_nets()
    x, t, context = inputs()
    with torch.no_grad(), ldm.capture(unet) as maps:
        unet(x, t, context)
        unet(x, t / 2, context)
    unet.double()
    seen: dict[str, list] = {}
    for name, module in unet.named_modules():
        if name.endswith("attn2"):
            module.register_forward_pre_hook(lambda m, args, name=name: seen.setdefault(name, []).append((m, *args)))
    with torch.no_grad():
        for time in (t, t / 2):
            unet(x.double(), time, context.double())
    assert list(maps) == list(seen) and len(maps) == 4  # two on the way up
    for name, calls in seen.items():
        total = 0
        for module, hidden, text in calls:
            q, k = (hidden @ module.to_q.weight.T).numpy(), (text @ module.to_k.weight.T).numpy()
            d = q.shape[-1] // module.heads
            e = np.zeros((len(q), module.heads, k.shape[1], q.shape[1]))
            for head in range(module.heads):
                cut = slice(head * d, (head + 1) * d)
                for row in range(len(q)):
                    e[row, head] = np.exp(k[row][:, cut] @ q[row][:, cut].T / math.sqrt(d))
            total = total + e / e.sum(axis=2, keepdims=True) / len(calls)
        got = maps[name].flatten(3).numpy()
        assert got.shape == total.shape and np.abs(got - total).max() < 1e-6, name


def test_equal_to_diffusers(tmp_path):
    """The probabilities that diffusers' own attention works out, handed out by a processor."""
    theirs = diffusers_pipeline()
    theirs.save_pretrained(tmp_path)
    ours = ldm.Pipeline.from_pretrained(tmp_path, device="cpu")
    found = {}

    class Shown:
        def __init__(self, name):
            self.name = name

        def __call__(self, attn, hidden, encoder_hidden_states=None, **kwargs):
            text = hidden if encoder_hidden_states is None else encoder_hidden_states
            q, k, v = (attn.head_to_batch_dim(t) for t in (attn.to_q(hidden), attn.to_k(text), attn.to_v(text)))
            scores = attn.get_attention_scores(q, k)
            found[self.name] = scores.unflatten(0, (-1, attn.heads))  # (rows,heads,hw,tokens)
            return attn.to_out[0](attn.batch_to_head_dim(scores @ v))

    theirs.unet.set_attn_processor({n: Shown(n.removesuffix(".processor")) for n in theirs.unet.attn_processors})
    x, t, context = inputs(tokens=77)
    with torch.no_grad(), ldm.capture(ours.unet) as maps:
        ours.unet(x, t, context)
        theirs.unet(x, t, context)
    assert set(maps) == {name for name in found if name.endswith("attn2")}
    for name, got in maps.items():
        assert torch.allclose(got.flatten(3).mT, found[name], rtol=0, atol=1e-6), name


def test_rows_sum_to_one(pipe):
    with ldm.capture(pipe.unet) as maps:
        pipe("red heart", steps=2, batch_size=2, progress=False)
    assert len(maps) == sum(name.endswith("attn2") for name, _ in pipe.unet.named_modules())
    for layer in maps.values():
        assert layer.shape[:3] == (4, 4, 32) and layer.min() >= 0
        assert torch.allclose(layer.sum(dim=2), torch.ones(()), atol=1e-5)
    assert torch.allclose(maps.heat(2).sum(dim=1), torch.ones(()), atol=1e-5) and maps.heat(2).shape[-1] == 8


@pytest.mark.parametrize("settings", [{}, {"tiling": "x"}, {"guidance_scale": 1}, {"guidance_interval": (0.5, 5)}])
def test_the_picture_is_the_same_to_the_bit(pipe, settings):
    before = hooks(pipe.unet)
    settings = {"steps": 4, "progress": False} | settings
    plain = pipe("red heart", **settings).latents
    with ldm.capture(pipe.unet) as maps:
        assert torch.equal(pipe("red heart", **settings).latents, plain)
    assert len(maps) == 7 and hooks(pipe.unet) == before


def test_no_hook_stays_after_an_error():
    unet, _, _ = tiny_nets()
    x, t, context = inputs()
    with pytest.raises(RuntimeError), ldm.capture(unet):
        unet(x, t, context[..., 1:])
    assert hooks(unet) == 0
    with pytest.raises(ZeroDivisionError), ldm.capture(unet):
        raise ZeroDivisionError
    assert hooks(unet) == 0


def test_rows_are_told_from_their_end(pipe):
    """Prompt and negative prompt are what they are alone; where only the prompts ran they alone are counted."""
    unet, _, _ = tiny_nets()
    x, t, context = inputs()
    with torch.no_grad():
        with ldm.capture(unet) as both:
            unet(x, t, context)
        with ldm.capture(unet) as alone:
            unet(x[1:], t, context[1:])
        with ldm.capture(unet) as mixed:
            unet(x[1:], t, context[1:])
            unet(x, t, context)
            unet(x[1:], t, context[1:])
    assert torch.allclose(both.heat()[0], alone.heat()[0], atol=1e-6)
    assert not torch.allclose(both.heat(negative=True), both.heat(), atol=1e-3)
    for layer in both:
        assert torch.allclose(mixed[layer], both[layer], atol=1e-6)
    with pytest.raises(ValueError, match="maps of 1 rows: no 1 of negative prompts, which only a guided run has"):
        alone.heat(negative=True)
    with pytest.raises(ValueError, match="maps of 0 rows"):
        Maps().heat()


def test_batches_are_pictures_by_themselves(pipe):
    how = {"steps": 2, "progress": False}
    with ldm.capture(pipe.unet) as maps:
        pipe(["red heart", "pizza"], seed=[1, 2], **how)
    for i, (prompt, seed) in enumerate([("red heart", 1), ("pizza", 2)]):
        with ldm.capture(pipe.unet) as alone:
            pipe(prompt, seed=seed, **how)
        words = maps.words(pipe.plan(prompt), picture=i, count=2)
        assert [word for word, _ in words] == prompt.split()
        for (_, got), (_, expected) in zip(words, alone.words(pipe.plan(prompt)), strict=True):
            assert torch.allclose(got, expected, atol=1e-4)


def test_of_a_unet_alone(pipe):
    with pytest.raises(ValueError, match=r"capture of a Pipeline: give .*pipe.unet"), ldm.capture(pipe):
        pass


def test_one_run_to_a_block(pipe):
    with pytest.raises(ValueError, match="texts of 32 tokens, then of 64"), ldm.capture(pipe.unet):
        pipe("", guidance_scale=1, steps=1, progress=False)
        pipe("red BREAK heart", guidance_scale=1, steps=1, progress=False)


def test_of_an_enlargement_its_last_pass(pipe):
    with ldm.capture(pipe.unet) as maps:
        pipe("red heart", enlarge=1.5, strength=0.9, steps=2, progress=False)
    assert maps.heat().shape[-2:] == (12, 12)
    assert {float(count) for counts in maps._counts.values() for count in counts} == {1.0}  # .9 of two steps is one


def test_the_mean_of_layers_of_different_sizes():
    """A layer of one place and a layer of two, by hand; the heads count alike."""
    maps = Maps()
    maps.add("low", torch.tensor([0.2, 0.8]).view(1, 1, 2, 1, 1))
    maps.add("high", torch.tensor([[0.0, 0.4, 1.0, 0.6], [0.0, 0.0, 1.0, 1.0]]).view(1, 2, 2, 1, 2))
    assert torch.allclose(maps.heat(), torch.tensor([0.1, 0.2, 0.9, 0.8]).view(1, 2, 1, 2))


PLACES = {  # of the words' tokens; begin is 0
    "a red heart": [("a", [1]), ("red", [2]), ("heart", [3])],
    "(red:1.3) heart": [("red", [1]), ("heart", [2])],
    "red, [heart]!": [("red", [1]), (",", [2]), ("heart", [3]), ("!", [4])],
    "don't  T-shirt": [("don't", [1, 2]), ("t-shirt", [3, 4, 5])],
    "in 1990": [("in", [1]), ("1990", [2, 3, 4, 5])],
    "red BREAK heart": [("red", [1]), ("heart", [78])],
    "(red BREAK blue:0.5) heart": [("red", [1]), ("blue", [78]), ("heart", [79])],
    "she(ep)": [("she", [1]), ("ep", [2])],
    "": [],
    " ,, ": [(",,", [1])],
}


class TestWords:
    @pytest.mark.parametrize("prompt", PLACES)
    def test_places(self, prompt):
        assert plan(prompt, Tokenizer.official()).words == PLACES[prompt]

    def test_brackets_that_are_text(self):
        assert [word for word, _ in plan("(red:1.3)", Tokenizer.official(), False).words] == ["(", "red:1.3", ")"]

    @pytest.mark.parametrize("prompt", ["antidisestablishmentarianism, " * 20, "word " * 80, "é ❤️ İ &amp; 中文 x͟y'll"])
    def test_every_token_has_one_word(self, prompt):
        """Where words move to the next chunk too: the tokens of a word, joined, are the word."""
        tokenizer = Tokenizer.official()
        made = plan(prompt, tokenizer)
        names = {77 * c + 1 + i: name for c, chunk in enumerate(made.tokens) for i, name in enumerate(chunk)}
        assert [place for _, places in made.words for place in places] == list(names)
        ids = [i for word, _ in made.words for i in tokenizer.ids(word)]
        assert ids == [i for chunk, _ in made.chunks for i in chunk]

    def test_added_words(self):
        tokenizer = Tokenizer.official()
        tokenizer.add("<cat-toy>", [49408, 49409])
        tokenizer.add("old master", [49410])
        words = plan("a <cat-toy>, old master's", tokenizer).words
        assert words == [("a", [1]), ("<cat-toy>", [2, 3]), (",", [4]), ("old master's", [5, 6])]

    def test_shares(self):
        """The tokens of a word are added up; begin and end are nobody's."""
        heat = torch.arange(6.0)[:, None, None]
        made = plan("don't go", Tokenizer.official())
        assert [(word, float(share)) for word, share in shares(heat, made)] == [("don't", 3.0), ("go", 3.0)]
        with pytest.raises(ValueError, match=r"reach to token 78, the maps have 77"):
            shares(torch.zeros(77, 1, 1), plan("a BREAK b", Tokenizer.official()))

    def test_the_word_that_is_there(self, pipe):
        """Another word's map is another: the maps are not all alike, nor in the wrong place of the context."""
        with ldm.capture(pipe.unet) as maps:
            pipe("red heart, (twemoji:1.1) style", steps=4, progress=False)
        words = dict(maps.words(pipe.plan("red heart, (twemoji:1.1) style")))
        assert list(words) == ["red", "heart", ",", "twemoji", "style"]
        total = sum(words.values()) + maps.heat()[0, 0] + maps.heat()[0, 6:].sum(dim=0)
        assert torch.allclose(total, torch.ones(()), atol=1e-5)

    def test_the_plan_of_another_text(self, pipe):
        """Told where the text was encoded inside the block, tokens, order and brackets alike; else not."""
        with ldm.capture(pipe.unet) as maps:
            pipe(["red heart", "a (blue:1.2) BREAK pizza"], negative_prompt="grey", steps=1, progress=False)
        for prompt in ("red heart", "a (blue:1.2) BREAK pizza", "a (blue:0.3) BREAK pizza", "grey"):
            assert [word for word, _ in maps.words(pipe.plan(prompt), count=2)] == [
                w for w, _ in pipe.plan(prompt).words
            ]
        for prompt in ("blue heart", "heart red", "red", "red heart.", "red heart BREAK pizzas"):
            with pytest.raises(ValueError, match="the run had no text of the plan's tokens"):
                maps.words(pipe.plan(prompt), count=2)
        steps = pipe.stream("red heart", steps=2)
        with ldm.capture(pipe.unet) as maps:
            next(steps)
        assert len(maps.words(pipe.plan("blue heart"))) == 2

    def test_what_is_no_picture_or_no_plan(self, pipe):
        with ldm.capture(pipe.unet) as maps:
            pipe("red heart", steps=1, progress=False)
        for picture in (-1, 1):
            with pytest.raises(ValueError, match=f"picture={picture} of count=1: give one from 0 to 0"):
                maps.words(pipe.plan("red heart"), picture)
        with pytest.raises(ValueError, match=r"plan is a str: give pipe.plan\(prompt\)"):
            maps.words("red heart")

    def test_the_emphasis_of_the_run(self, pipe):
        with ldm.capture(pipe.unet) as maps:
            pipe("(red:1.3) heart", conventions="diffusers", steps=1, progress=False)
        with pytest.raises(ValueError, match=r"pipe.plan\(prompt, emphasis\)"):
            maps.words(pipe.plan("(red:1.3) heart"))
        assert [word for word, _ in maps.words(pipe.plan("(red:1.3) heart", None))] == ["(", "red:1.3", ")", "heart"]
