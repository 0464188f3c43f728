"""webui's prompt syntax, piece by piece, and what the weights do to the context."""

import math

import pytest
import torch

import ldm
from ldm.clip import TextConfig, TextEncoder, Tokenizer
from ldm.clip.prompt import encode, parse, plan

A, B, N = 1.1, 1 / 1.1, 1.0  # round, square, none
BREAK = ("BREAK", math.nan)

TABLE = {
    # without brackets
    "": [("", N)],
    " ": [(" ", N)],
    "a cat": [("a cat", N)],
    "a cat, on a mat": [("a cat, on a mat", N)],
    "a: b": [("a: b", N)],
    "10:30": [("10:30", N)],
    "a:1.3": [("a:1.3", N)],
    "猫": [("猫", N)],
    "a\nb": [("a\nb", N)],
    # round
    "(a)": [("a", A)],
    "((a))": [("a", A * A)],
    "(((a)))": [("a", A * A * A)],
    "a (b) c": [("a ", N), ("b", A), (" c", N)],
    "(a b)": [("a b", A)],
    "(a)(b)": [("ab", A)],
    "(a) (b)": [("a", A), (" ", N), ("b", A)],
    "(a (b) c)": [("a ", A), ("b", A * A), (" c", A)],
    "( a )": [(" a ", A)],
    # round with a number
    "(a:1.3)": [("a", 1.3)],
    "(a:0.5)": [("a", 0.5)],
    "(a:0)": [("a", 0.0)],
    "(a:-1.5)": [("a", -1.5)],
    "(a:-1) b": [("a", -1.0), (" b", N)],
    "(a:+2)": [("a", 2.0)],
    "(a:.7)": [("a", 0.7)],
    "(a:2.)": [("a", 2.0)],
    "(a: 1.3)": [("a", 1.3)],
    "(a:1.3 )": [("a", 1.3)],
    "(a : 1.3)": [("a ", 1.3)],
    "(a b:1.2), c": [("a b", 1.2), (", c", N)],
    "((a:1.3))": [("a", 1.3 * A)],
    "((a:1.3) b:0.5)": [("a", 1.3 * 0.5), (" b", 0.5)],
    "(a:b:1.5)": [("a:b", 1.5)],
    "(10:30:1.5)": [("10:30", 1.5)],
    "(a:1)": [("a", N)],
    "a (b:1) c": [("a b c", N)],
    # square
    "[a]": [("a", B)],
    "[[a]]": [("a", B * B)],
    "a [b] c": [("a ", N), ("b", B), (" c", N)],
    "[(a)]": [("a", A * B)],
    "([a])": [("a", B * A)],
    "[(a:1.3)]": [("a", 1.3 * B)],
    "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).": [
        ("a ", N),
        ("house", 1.3 * A * A),
        (" ", A),
        ("on", N),
        (" a ", A),
        ("hill", 0.5 * A),
        (", sun, ", A),
        ("sky", A * A * A * A),
        (".", A),
    ],
    # escapes
    r"\(a\)": [("(a)", N)],
    r"\[a\]": [("[a]", N)],
    r"(\(a\):1.4)": [("(a)", 1.4)],
    r"(a\))": [("a)", A)],
    r"a\\b": [("a\\b", N)],
    r"a\b": [("ab", N)],
    r"\\(a)": [("\\", N), ("a", A)],
    r"\(a:1.3)": [("(a:1.3)", N)],
    # brackets that do not match
    "(a": [("a", A)],
    "((a": [("a", A * A)],
    "[a": [("a", B)],
    "a (b": [("a ", N), ("b", A)],
    "a)": [("a)", N)],
    "a]": [("a]", N)],
    ")a(": [(")a", N)],
    "(a]": [("a]", A)],
    "[a)": [("a)", B)],
    "(a [b)": [("a ", A), ("b", A * B)],
    "[a:1.3]": [("a:1.3", B)],
    "a:1.3)": [("a:1.3)", N)],
    "()": [("", N)],
    "[]": [("", N)],
    "(:1.3)": [("", N)],
    "(a:)": [("a:", A)],
    "(a:x)": [("a:x", A)],
    "(a:1.2.3)": [("a:1.2.3)", A)],  # webui stops with a ValueError
    # chunks
    "a BREAK b": [("a", N), BREAK, ("b", N)],
    "a\nBREAK\nb": [("a", N), BREAK, ("b", N)],
    "BREAK": [BREAK],
    "a BREAK": [("a", N), BREAK],
    "a BREAK BREAK b": [("a", N), BREAK, BREAK, ("b", N)],
    "(a) BREAK [b]": [("a", A), BREAK, ("b", B)],
    "(a BREAK b:1.4)": [("a", 1.4), BREAK, ("b", 1.4)],  # webui reads the word break there
    "BREAKING news": [("BREAKING news", N)],
    "a break b": [("a break b", N)],
}


@pytest.mark.parametrize("prompt", TABLE)
def test_syntax(prompt):
    found, expected = parse(prompt), TABLE[prompt]
    assert [text for text, _ in found] == [text for text, _ in expected]
    assert [weight for _, weight in found] == pytest.approx([weight for _, weight in expected], rel=1e-12, nan_ok=True)


@pytest.mark.parametrize("prompt", ["(a:99999)", "(a:-20000)", "(" * 400 + "a"])
def test_a_weight_that_no_precision_holds(prompt):
    with pytest.raises(ValueError, match=r"'a' has the weight .* from -10,000 to 10,000"):
        parse(prompt)


def test_blanks_take_no_time():
    assert parse(" " * 200_000 + "a") == [(" " * 200_000 + "a", 1.0)]  # minutes, if it were quadratic


def test_the_table_is_long_enough():
    assert len(TABLE) >= 60


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.official()


class TestPlan:
    def test_print(self, tokenizer):
        text = str(plan("a (red:1.5) heart BREAK fire", tokenizer))
        assert text.splitlines() == [
            "chunk 1 of 2, 3 tokens",
            "    320  a</w>                1",
            "    736  red</w>              1.5",
            "   1936  heart</w>            1",
            "chunk 2 of 2, 1 tokens",
            "   1769  fire</w>             1",
        ]

    def test_the_ids_are_those_of_the_whole_text(self, tokenizer):
        ids = plan("a (very (red:1.2)) heart", tokenizer).chunks[0][0]
        assert ids == tokenizer.ids("a very red heart")

    @pytest.mark.parametrize(("words", "lengths"), [(75, [75]), (76, [75, 1]), (150, [75, 75]), (151, [75, 75, 1])])
    def test_chunks(self, tokenizer, words, lengths):
        assert [len(ids) for ids, _ in plan("cat " * words, tokenizer).chunks] == lengths

    def test_networks_of_webui_are_said_to_be_text(self, tokenizer):
        with pytest.warns(UserWarning, match=r"has <lora:style:0.8>, which is text here: load .* with pipe.load_lora"):
            assert plan("a <lora:style:0.8> cat", tokenizer).pieces == [("a <lora:style:0.8> cat", 1.0)]

    def test_nothing_follows_the_last_break(self, tokenizer):
        """No chunk then, as in webui; between two there is an empty one."""
        for text, lengths in {"cat BREAK": [1], "cat BREAK BREAK": [1, 0], "BREAK cat": [0, 1], "BREAK": [0]}.items():
            assert [len(ids) for ids, _ in plan(text, tokenizer).chunks] == lengths

    def test_a_chunk_ends_at_a_comma_that_is_near(self, tokenizer):
        near = plan("cat " * 60 + ", " + "dog " * 30, tokenizer)
        assert [len(ids) for ids, _ in near.chunks] == [61, 30]
        far = plan("cat " * 50 + ", " + "dog " * 40, tokenizer)
        assert [len(ids) for ids, _ in far.chunks] == [75, 16]
        for after, lengths in ((19, [56, 30]), (20, [75, 11])):  # as many tokens between it and the chunk's end
            edge = plan("cat " * (74 - after) + ", " + "dog " * (after + 11), tokenizer)
            assert [len(ids) for ids, _ in edge.chunks] == lengths
        at_the_end = plan("cat " * 75 + ", dog", tokenizer)
        assert [len(ids) for ids, _ in at_the_end.chunks] == [75, 2]

    def test_weights_move_with_their_tokens(self, tokenizer):
        chunks = plan("cat " * 60 + ", (" + "dog " * 30 + ":1.5)", tokenizer).chunks
        assert [set(weights) for _, weights in chunks] == [{1.0}, {1.5}]

    def test_without_syntax(self, tokenizer):
        text = "(a:1.3) [b] BREAK"
        assert plan(text, tokenizer, weighted=False).chunks == [(tokenizer.ids(text), [1.0] * len(tokenizer.ids(text)))]


class TestContext:
    @pytest.fixture(scope="class")
    def encoder(self):
        torch.manual_seed(0)
        return TextEncoder(TextConfig(width=16, layers=2, heads=2)).requires_grad_(False)

    def test_plain_prompts_stay_as_they_were_to_the_bit(self, tokenizer, encoder):
        texts = ["a cat", "", "a (cat:1)", "two cats, one dog"]
        ours = encode([plan(t, tokenizer) for t in texts], 1, tokenizer, encoder, 1, True)
        theirs = encoder(tokenizer([t.replace("(cat:1)", "cat") for t in texts]), 1)
        assert torch.equal(ours.context, theirs.context)
        assert torch.equal(ours.pooled, theirs.pooled)

    @pytest.mark.parametrize("norm", [True, False])
    def test_weights(self, tokenizer, encoder, norm):
        """By hand: token 2 is red, after the begin token and "a"."""
        ours = encode([plan("a (red:1.5) cat", tokenizer)], 1, tokenizer, encoder, 1, norm).context[0]
        plain = encoder(tokenizer(["a red cat"])).context[0]
        weighted = plain.clone()
        weighted[2] *= 1.5
        if norm:
            weighted *= plain.mean() / weighted.mean()
            torch.testing.assert_close(ours.mean(), plain.mean())
        torch.testing.assert_close(ours, weighted)
        assert (ours - plain).abs().max() > 0.1

    def test_a_prompt_does_not_feel_the_weights_of_its_neighbour(self, tokenizer, encoder):
        plans = [plan(t, tokenizer) for t in ("a cat", "a (red:1.5) cat")]
        both = encode(plans, 1, tokenizer, encoder, 1, True).context
        assert torch.equal(both[0], encoder(tokenizer(["a cat", "a red cat"])).context[0])

    def test_chunks_stand_one_after_the_other(self, tokenizer, encoder):
        ours = encode([plan("a BREAK red cat", tokenizer)], 3, tokenizer, encoder, 1, True)
        parts = [encoder(tokenizer([text])).context for text in ("a", "red cat", "")]
        torch.testing.assert_close(ours.context, torch.cat(parts, dim=1))
        torch.testing.assert_close(ours.pooled, encoder(tokenizer(["a"])).pooled)


def test_pipeline():
    pipe = ldm.Pipeline.from_pretrained()
    settings = {"steps": 2, "progress": False}
    plain = pipe("red heart", **settings).latents
    assert torch.equal(pipe("(red:1) heart", **settings).latents, plain)
    assert (pipe("(red:1.5) heart", **settings).latents - plain).abs().max() > 0.01
    literal = pipe("(red:1.5) heart", emphasis=None, **settings).latents
    assert (literal - plain).abs().max() > 0.01
    long = pipe("heart, " * 40, negative_prompt="blue", **settings)
    assert len(pipe.plan("heart, " * 40).chunks) == 3
    assert torch.isfinite(long.latents).all()
