"""Textual inversion: contexts and whole runs beside diffusers, where words are met, chunks, and every way to fail."""

import pytest
import torch
from diffusers import StableDiffusionXLImg2ImgPipeline
from family import REFINER, SD2, XL, ours, sd, theirs, xl
from safetensors.torch import load_file, save_file

import ldm
from ldm.clip import Tokenizer
from ldm.clip.prompt import plan
from ldm.source import CheckpointError

PLAIN = ["a cat", "the (red:1.3) cat, on a mat", "", "EASYNEG", "<cat toy>"]
CONTEXT = 1e-5  # of the largest value: float32 rounding in nets of a few layers


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    references = {
        "SD": sd(SD2),
        "XL": xl(XL),
        "refiner": xl(REFINER, StableDiffusionXLImg2ImgPipeline),
    }
    path = tmp_path_factory.mktemp("models")
    for name, reference in references.items():
        reference.save_pretrained(path / name)
    return path


def pipeline(folder, **options):
    return ldm.Pipeline.from_pretrained(folder, **options)


def vectors(*shape):
    return 0.5 * torch.randn(shape)


@pytest.fixture
def file(tmp_path):
    def write(name="easyneg", **tensors):
        save_file(tensors, tmp_path / f"{name}.safetensors")
        return tmp_path / f"{name}.safetensors"

    return write


class TestParity:
    """With diffusers, which writes the further tokens of a word into the prompt itself."""

    @pytest.mark.parametrize(
        ("tensors", "word"),
        [
            ({"<cat-toy>": (24,)}, "<cat-toy>"),
            ({"<cat-toy>": (1, 24)}, "<cat-toy>"),
            ({"<cat-toy>": (4, 24)}, "<cat-toy>"),
            ({"emb_params": (1, 24)}, "easyneg"),
            ({"emb_params": (3, 24)}, "easyneg"),
        ],
        ids=str,
    )
    def test_context(self, tensors, word, folders, file):
        path = file(**{name: vectors(*shape) for name, shape in tensors.items()})
        pipe, reference = pipeline(folders / "SD"), sd(SD2)
        assert pipe.load_embedding(path) == word
        reference.load_textual_inversion(str(path), token=word)
        for text in (word, f"a {word} cat", f"the {word}, red {word}", f"cat {word}."):
            context = reference.encode_prompt(text, "cpu", 1, False)[0]
            difference = (pipe.encode_text([text]).context - context).abs().max()
            assert difference <= CONTEXT * context.abs().max()
            assert (pipe.encode_text([text.replace(word, "on")]).context - context).abs().max() > 0.1

    @pytest.mark.parametrize("count", [1, 3])
    def test_context_of_sdxl(self, count, folders, file):
        path = file(clip_l=vectors(count, 24), clip_g=vectors(count, 32))
        pipe, reference = pipeline(folders / "XL"), xl(XL)
        assert pipe.load_embedding(path) == "easyneg"
        for part, name in (("", "clip_l"), ("_2", "clip_g")):
            modules = {kind: getattr(reference, kind + part) for kind in ("text_encoder", "tokenizer")}
            reference.load_textual_inversion({"easyneg": load_file(path)[name]}, **modules)
        for text in ("easyneg", "the easyneg, red easyneg"):
            context, _, pooled, _ = reference.encode_prompt(text, device="cpu", do_classifier_free_guidance=False)
            encoding = pipe.encode_text([text])
            assert (encoding.context - context).abs().max() <= CONTEXT * context.abs().max()
            assert (encoding.pooled - pooled).abs().max() <= CONTEXT * pooled.abs().max()

    def test_pair_of_files_as_diffusers_writes_it(self, folders, file):
        first, second = vectors(2, 24), vectors(2, 32)
        pair = file(clip_l=first, clip_g=second)
        file("learned_embeds_2", **{"<cat-toy>": second})
        path = file("learned_embeds", **{"<cat-toy>": first})
        pipe, other = pipeline(folders / "XL"), pipeline(folders / "XL")
        assert pipe.load_embedding(path) == "<cat-toy>"
        other.load_embedding(pair, word="<cat-toy>")
        ours, theirs = (p.encode_text(["a <cat-toy>"]) for p in (pipe, other))
        assert torch.equal(ours.context, theirs.context) and torch.equal(ours.pooled, theirs.pooled)
        file("learned_embeds_2", **{"<cat-toy>": second, "b": second.clone()})
        with pytest.raises(CheckpointError, match="has vectors of width 24 \\+ 32 \\+ 32"):
            pipeline(folders / "XL").load_embedding(path)

    def test_whole_run(self, folders, file):
        style, negative = file("my-style", emb_params=vectors(2, 24)), file(**{"<bad>": vectors(3, 24)})
        pipe, reference = pipeline(folders / "SD"), sd(SD2)
        reference.set_progress_bar_config(disable=True)
        for path, word in ((style, "my-style"), (negative, "<bad>")):
            pipe.load_embedding(path)
            reference.load_textual_inversion(str(path), token=word)
        common = {"prompt": "a cat, my-style", "negative_prompt": "<bad>, red", "guidance_scale": 60.0}
        unknown = ours(pipeline(folders / "SD"), sampler="ddim", **common)
        for net in (pipe.unet, pipe.text_encoder, reference):
            net.to(torch.float64)  # scale 60 magnifies what float32 rounds
        noise = torch.randn(unknown.shape, generator=torch.Generator().manual_seed(0)).double()
        latents = ours(pipe, sampler="ddim", **common)
        assert (latents - theirs(reference, latents=noise, **common)).abs().max() <= 1e-4
        assert (latents - unknown).abs().max() > 0.01


def test_the_refiner_takes_its_half_of_a_pair(folders, file):
    pipe = pipeline(folders / "refiner")
    clip_g = vectors(2, 32)
    pipe.load_embedding(file(clip_l=vectors(2, 24), clip_g=clip_g))
    assert torch.equal(pipe.text_encoder_2.text_model.embeddings.token_embedding.weight[-2:], clip_g)
    assert pipe.plan("easyneg").chunks[0][0] == [520, 521]


@pytest.mark.parametrize("model", ["SD", "XL"])
def test_plain_prompts_give_what_they_gave_to_the_bit(model, folders, file):
    pipe, tensors = pipeline(folders / model), {"clip_l": vectors(3, 24), "clip_g": vectors(3, 32)}
    before, run = pipe.encode_text(PLAIN), ours(pipe, prompt="a cat", steps=2)
    pipe.load_embedding(file(**(tensors if model == "XL" else {"emb_params": tensors["clip_l"]})), "<other>")
    after = pipe.encode_text(PLAIN)
    assert torch.equal(after.context, before.context) and torch.equal(after.pooled, before.pooled)
    assert torch.equal(ours(pipe, prompt="a cat", steps=2), run)
    assert (pipe.encode_text(["<other>"] * 5).context - before.context).abs().amax(dim=(1, 2)).min() > 0.1


def test_two_words_keep_their_own_vectors(folders, file):
    pipe = pipeline(folders / "SD")
    first, second = vectors(2, 24), vectors(3, 24)
    assert pipe.load_embedding(file(emb_params=first)) == "easyneg"
    assert pipe.load_embedding(str(file(emb_params=second)), word="Other Word") == "Other Word"
    table = pipe.text_encoder.text_model.embeddings.token_embedding.weight
    assert table.shape == (525, 24) and pipe.text_encoder.config.vocab_size == 520
    ids = pipe.plan("other word easyneg").chunks[0][0]
    assert torch.equal(table[ids], torch.cat([second, first]))


def test_weights(folders, file):
    pipe = pipeline(folders / "SD")
    pipe.load_embedding(file(emb_params=vectors(2, 24)))
    plain = pipe.encode_text(["a easyneg cat"], emphasis="none").context[0]
    weighted = pipe.encode_text(["a (easyneg:1.5) cat"], emphasis="none").context[0]
    expected = plain.clone()
    expected[2:4] *= 1.5  # after the begin token and "a"
    assert torch.equal(weighted, expected)


@pytest.mark.parametrize("stored", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_vectors_get_the_dtype_of_the_encoder(stored, dtype, folders, file):
    pipe = pipeline(folders / "SD", dtype=dtype)
    rows = vectors(2, 24).to(stored)
    pipe.load_embedding(file(emb_params=rows))
    table = pipe.text_encoder.text_model.embeddings.token_embedding.weight
    assert table.dtype == dtype and not table.requires_grad
    assert torch.equal(table[-2:], rows.to(dtype))
    assert pipe.encode_text(["easyneg"]).context.dtype == dtype
    assert torch.isfinite(ours(pipe, prompt="easyneg", steps=1)).all()


# Where a word is met

WORD, TOY = [49408, 49409, 49410], [49411]


@pytest.fixture
def tokenizer():
    tokenizer = Tokenizer.official()
    tokenizer.add("EasyNeg", WORD)
    tokenizer.add("<cat-toy>", TOY)
    return tokenizer


class TestWords:
    @pytest.mark.parametrize(
        "text",
        [
            "a |easyneg| cat",
            "|EASYNEG|",
            "a, |easyneg|, |easyneg|",
            "a-|easyneg|_b",
            "|easyneg|'s cat",
            "|easyneg|!",
            "|<cat-toy>|",
            "a|<Cat-Toy>|cat",
            "|<cat-toy>||<cat-toy>|",
            "|<cat-toy>| &amp; |easyneg|",
            "猫 |easyneg|",
        ],
    )
    def test_met(self, text, tokenizer):
        """The text between two bars is an added word; what is not goes the old way."""
        added = {"easyneg": WORD, "<cat-toy>": TOY}
        parts = [part for part in text.split("|") if part]
        expected = [i for part in parts for i in added.get(part.lower()) or Tokenizer.official().ids(part)]
        assert tokenizer.ids(text.replace("|", "")) == expected

    @pytest.mark.parametrize("text", ["easynegs", "uneasyneg", "easyneg2", "2easyneg", "éeasyneg", "easy neg", "<cat>"])
    def test_not_inside_longer_words(self, text, tokenizer):
        assert tokenizer.ids(text) == Tokenizer.official().ids(text)

    def test_the_longest_word_first(self, tokenizer):
        tokenizer.add("easyneg-xl", [49412])
        assert tokenizer.ids("easyneg-xl easyneg") == [49412, *WORD]

    def test_words_are_cleaned_as_texts_are(self, tokenizer):
        tokenizer.add(" My  Ｓtyle’s", [49412])
        assert tokenizer.ids("a my\nstyle's") == [*tokenizer.ids("a"), 49412]

    def test_print(self, tokenizer):
        assert str(plan("a (easyneg:1.2)", tokenizer)).splitlines() == [
            "chunk 1 of 1, 4 tokens",
            "    320  a</w>                1",
            "  49408  easyneg[0]           1.2",
            "  49409  easyneg[1]           1.2",
            "  49410  easyneg[2]           1.2",
        ]

    def test_what_is_cut_has_a_name(self, tokenizer):
        with pytest.warns(UserWarning, match=r"77 tokens, 75 fit; cut: 'easyneg\[1\]easyneg\[2\]'"):
            tokenizer("cat " * 74 + "easyneg")


@pytest.mark.parametrize(
    ("text", "lengths"),
    [
        ("cat " * 72 + "easyneg", [75]),
        ("cat " * 73 + "easyneg", [73, 3]),
        ("cat " * 75 + "easyneg", [75, 3]),
        ("easyneg " * 26, [75, 3]),
        ("easyneg " * 25 + "cat", [75, 1]),
        ("cat " * 60 + ", " + "dog " * 14 + "easyneg", [61, 17]),  # as for any token: a full chunk, a comma near
        ("cat " * 60 + ", " + "dog " * 13 + "easyneg", [74, 3]),  # as webui: not full, and no look for a comma
        ("cat " * 60 + ", " + "dog " * 14 + "full", [61, 14, 75]),
        ("a full cat", [1, 75, 1]),
        ("(a full:1.5) cat", [1, 75, 1]),
    ],
)
def test_the_vectors_of_a_word_stay_in_one_chunk(text, lengths, tokenizer):
    full = list(range(49500, 49575))
    tokenizer.add("full", full)
    chunks = plan(text, tokenizer).chunks
    assert [len(ids) for ids, _ in chunks] == lengths
    assert [len(weights) for _, weights in chunks] == lengths
    assert [i for ids, _ in chunks for i in ids] == tokenizer.ids(text.replace("(", "").replace(":1.5)", ""))
    assert all(i in ids for ids, _ in chunks for word in (WORD, full) if word[0] in ids for i in word)


# Errors

PAIR = {"clip_l": (2, 24), "clip_g": (2, 32)}
ERRORS = [
    ("SD", {"emb_params": (2, 32)}, {}, r"vectors of width 32; this model's text encoders have 24: give an embedding"),
    ("SD", {"emb_params": (2, 768)}, {}, r"width 768 \(SD 1\); .* have 24:"),
    ("SD", {"<toy>": (1024,)}, {}, r"width 1024 \(SD 2\);"),
    ("SD", {"clip_l": (2, 768), "clip_g": (2, 1280)}, {}, r"width 768 \+ 1280 \(SDXL\);"),
    ("SD", PAIR, {}, r"width 24 \+ 32; this model's text encoders have 24:"),
    ("SD", {"clip_g": (2, 32)}, {}, r"width 32; this model's text encoders have 24:"),
    ("XL", {"clip_l": (2, 24)}, {}, r"width 24; this model's text encoders have 24 \+ 32: .* has clip_l and clip_g"),
    ("XL", {"clip_g": (2, 32)}, {}, r"width 32; this model's text encoders have 24 \+ 32:"),
    ("XL", {"emb_params": (2, 768)}, {}, r"width 768 \(SD 1\);"),
    ("XL", {"clip_l": (2, 32), "clip_g": (2, 24)}, {}, r"width 32 \+ 24; "),
    ("XL", {"clip_l": (2, 24), "clip_g": (3, 32)}, {}, r"has 2 and 3 vectors: accepted are 1 to 75"),
    ("XL", PAIR | {"more": (2, 24)}, {}, r"has 3 tensors \(clip_g, clip_l, more\). An embedding has one"),
    ("SD", {"emb_params": (76, 24)}, {}, r"has 76 vectors: accepted are 1 to 75"),
    ("SD", {"emb_params": (2, 2, 24)}, {}, r"emb_params is \(2, 2, 24\): accepted are \(width,\) and"),
    ("SD", {"emb_params": ()}, {}, r"emb_params is \(\): accepted are"),
    ("SD", {"emb_params": (0, 24)}, {}, r"emb_params is \(0, 24\): accepted are"),
    ("SD", {"<a>": (24,), "<b>": (24,)}, {}, r"has 2 tensors \(<a>, <b>\)\. .* give a file for each word"),
    ("SD", {name: (24,) for name in "abcde"}, {}, r"has 5 tensors \(a, b, c, \.\.\.\)"),
    ("SD", {}, {}, r"has 0 tensors\. An embedding has one"),
    ("SD", {"style (v2)": (24,)}, {}, r"the word 'style \(v2\)' is empty, or has one of .* with word="),
    ("SD", {"emb_params": (24,)}, {"word": "a\\b"}, r"the word 'a\\\\b' is empty, or has one of"),
    ("SD", {"emb_params": (24,)}, {"word": "[a"}, r"the word '\[a' is empty, or has one of"),
    ("SD", {"emb_params": (24,)}, {"word": " \n"}, r"the word ' \\n' is empty"),
    ("SD", {"emb_params": (24,)}, {"word": "Taken"}, r"the word 'Taken' is taken by an embedding that was loaded"),
    ("SD", {"emb_params": (24,)}, {"word": "Cat"}, r"the word 'Cat' is taken: it is one whole token of the vocabulary"),
    ("XL", PAIR, {"word": "cat"}, r"the word 'cat' is taken: it is one whole token"),
    ("XL", PAIR, {"word": "taken"}, r"the word 'taken' is taken by"),
]


def refused(pipe, message, path, **arguments):
    """A CheckpointError with the file's name, after which all is as it was."""

    def state():
        tables = [e.text_model.embeddings.token_embedding for _, e in pipe._encoders()]
        words = [dict(t.words) for t, _ in pipe._encoders()]
        return words, [(id(t.weight), t.weight._version, t.num_embeddings) for t in tables]

    before = state()
    with pytest.raises(CheckpointError, match=message) as error:
        pipe.load_embedding(path, **arguments)
    assert path.name in str(error.value)
    assert state() == before


@pytest.mark.parametrize(("model", "tensors", "arguments", "message"), ERRORS, ids=lambda value: str(value)[:60])
def test_errors(model, tensors, arguments, message, folders, file):
    pipe = pipeline(folders / model)
    pair = {"clip_l": vectors(24), "clip_g": vectors(32)}
    pipe.load_embedding(file("taken", **(pair if model == "XL" else {"emb_params": pair["clip_l"]})))
    refused(pipe, message, file(**{name: vectors(*shape) for name, shape in tensors.items()}), **arguments)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_values_that_are_no_numbers(value, folders, file):
    """In the second tensor too, when the first is good."""
    clip_g = vectors(2, 32)
    clip_g[1, 5] = value
    pipe = pipeline(folders / "XL")
    refused(pipe, "clip_g has NaN or infinity in torch.float32", file(clip_l=vectors(2, 24), clip_g=clip_g))


def test_values_beyond_half_precision(folders, file):
    pipe = pipeline(folders / "SD")
    pipe.text_encoder.half()
    refused(pipe, "emb_params has NaN or infinity in torch.float16", file(emb_params=torch.full((1, 24), 1e5)))


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.float8_e4m3fn, torch.complex64])
def test_other_dtypes(dtype, folders, file):
    path = file(emb_params=torch.ones(1, 24).to(dtype))
    refused(pipeline(folders / "SD"), r"emb_params is \w+: accepted are F64, F32, F16, BF16", path)


def test_files_that_are_none(folders, tmp_path):
    pipe = pipeline(folders / "SD")
    torch.save({"<toy>": vectors(24)}, tmp_path / "learned_embeds.bin")
    refused(pipe, "is a pickle", tmp_path / "learned_embeds.bin")
    refused(pipe, "does not exist", tmp_path / "none.safetensors")
    (tmp_path / "empty.safetensors").touch()
    refused(pipe, "is empty", tmp_path / "empty.safetensors")
    (tmp_path / "text.safetensors").write_text("<html>404: not found</html>")
    refused(pipe, "is not a safetensors file", tmp_path / "text.safetensors")
