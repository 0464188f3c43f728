"""Textual inversion in training, beside transformers' text encoders whose whole table is trained, and then put back."""

import copy

import family
import pytest
import torch
from diffusers import StableDiffusionXLImg2ImgPipeline
from parity import randomise, text_prefix, transformers_text, twin
from safetensors.torch import load_file
from synthetic import vocabulary

import ldm
from ldm.clip import TextEncoder, Tokenizer
from ldm.clip.embedding import token_table
from ldm.train.embedding import Embedding, save_embedding

STEPS, TOLERANCE = 20, 1e-5
WORD = "<cat-toy>"


def tokenizer():
    vocab, merges = vocabulary()
    return Tokenizer(vocab, merges)


def trained(net, parameters, ids, config, decay, restore=lambda: None):
    """The losses of a loop without any of ours; `restore` follows each step."""
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=decay)
    losses = []
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        target = torch.randn(len(ids), 77, config.width, generator=generator)
        if isinstance(net, TextEncoder):
            context = net(ids).context
        else:
            out = net(ids, output_hidden_states=True)
            context = out.hidden_states[-2] if config.skip else out.last_hidden_state
        loss = torch.nn.functional.mse_loss(context, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        restore()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("recipe", ["gradient masked", "table put back"])
@pytest.mark.parametrize("vectors", [1, 3])
@pytest.mark.parametrize("config", [family.SD1.text_encoder, family.XL.text_encoder_2])
def test_training_beside_the_whole_table(config, vectors, recipe):
    """From the same rows, on the same texts: every loss, and the vectors at the end."""
    reference = randomise(transformers_text(config))
    net = twin(TextEncoder, config, copy.deepcopy(reference), text_prefix(reference))
    own = tokenizer()
    embedding = Embedding(WORD, [(own, net)], vectors)
    ids = own([f"a {WORD} cat", f"{WORD}, the {WORD} on red", "a cat"])
    assert [row.count(520) for row in ids.tolist()] == [1, 2, 0]
    start = embedding.rows[0].vectors.detach().clone()

    table = reference.resize_token_embeddings(520 + vectors, mean_resizing=False)
    reference.requires_grad_(False)
    table.weight.requires_grad_(True)
    with torch.no_grad():
        table.weight[520:] = start
    others = table.weight[:520].detach().clone()

    @torch.no_grad()
    def put_back():
        table.weight[:520] = others

    if recipe == "gradient masked":  # weight decay would still reach the other rows
        new = torch.arange(520 + vectors)[:, None] >= 520
        table.weight.register_hook(lambda gradient: gradient * new)
        decay, restore = 0.0, lambda: None
    else:  # as diffusers' script
        decay, restore = 1e-2, put_back
    ours = trained(net, embedding.parameters(), ids, config, decay)
    theirs = trained(reference, [table.weight], ids, config, decay, restore)
    assert ours == pytest.approx(theirs, rel=TOLERANCE)
    end, learned = embedding.rows[0].vectors.detach(), table.weight[520:].detach()
    assert (end - learned).abs().max() <= TOLERANCE * learned.abs().max()
    assert (end - start).abs().max() > 0.1
    assert torch.equal(token_table(net).weight[:520], others) and torch.equal(table.weight[:520], others)


def test_only_the_vectors_learn():
    pipe = pipeline("SDXL")
    for _, encoder in encoders(pipe):
        encoder.requires_grad_(True)
    embedding = Embedding(WORD, encoders(pipe), 2)
    optimizer = torch.optim.AdamW(embedding.parameters())
    context = torch.cat([encoder(own([f"a {WORD}"])).context for own, encoder in encoders(pipe)], dim=2)
    context.square().mean().backward()
    optimizer.step()
    assert [tuple(p.shape) for p in embedding.parameters()] == [(2, 24), (2, 32)]
    assert all(p.grad.any() for p in embedding.parameters())
    for _, encoder in encoders(pipe):
        assert all(not p.requires_grad and p.grad is None for p in encoder.parameters())
    moments = [x for state in optimizer.state.values() for x in state.values() if x.ndim]
    assert sum(x.numel() for x in moments) == 2 * 2 * (24 + 32)


REFERENCES = {
    "SD 1": lambda: family.sd(family.SD1),
    "SDXL": lambda: family.xl(family.XL),
    "refiner": lambda: family.xl(family.REFINER, StableDiffusionXLImg2ImgPipeline),
}
FOLDERS = {}


@pytest.fixture(scope="module", autouse=True)
def folders(tmp_path_factory):
    for model, made in REFERENCES.items():
        FOLDERS[model] = tmp_path_factory.mktemp("model")
        made().save_pretrained(FOLDERS[model])


def pipeline(model, **options):
    return ldm.Pipeline.from_pretrained(FOLDERS[model], **options)


def encoders(pipe):
    both = (pipe.tokenizer, pipe.text_encoder), (pipe.tokenizer_2, pipe.text_encoder_2)
    return [pair for pair in both if pair[1] is not None]


# Starts


@pytest.mark.parametrize(
    ("init_word", "vectors", "tokens"),
    [("cat", 1, [0]), ("cat", 3, [0, 0, 0]), ("the cat", 2, [0, 1]), ("the cat", 5, [0, 0, 0, 1, 1])],
)
def test_starts_as_a_word(init_word, vectors, tokens):
    pipe = pipeline("SDXL")
    embedding = Embedding(WORD, encoders(pipe), vectors, init_word)
    for (own, encoder), rows in zip(encoders(pipe), embedding.rows, strict=True):
        ids = own.ids(init_word)
        assert torch.equal(rows.vectors, token_table(encoder).weight[[ids[i] for i in tokens]])
    same = [pipe.encode_text([f"a {text} on red"]) for text in (WORD, init_word)]
    assert torch.equal(same[0].context, same[1].context) == (len(pipe.tokenizer.ids(init_word)) == vectors)


def test_starts_as_the_mean():
    pipe = pipeline("SD 1")
    mean = token_table(pipe.text_encoder).weight.mean(dim=0)
    embedding = Embedding(WORD, encoders(pipe), 2)
    assert torch.equal(embedding.rows[0].vectors, mean.repeat(2, 1))


@pytest.mark.parametrize("model", ["SD 1", "SDXL"])
def test_other_words_mean_what_they_meant(model):
    pipe = pipeline(model)
    texts = ["a cat", "the (red:1.3) cat, on a mat", ""]
    before = pipe.encode_text(texts)
    embedding = Embedding(WORD, encoders(pipe), 3)
    with torch.no_grad():
        for p in embedding.parameters():
            p.normal_()
    after = pipe.encode_text(texts)
    assert torch.equal(before.context, after.context) and torch.equal(before.pooled, after.pooled)


def test_two_words_and_half_precision():
    """Vectors learn in float32 and are read in the encoder's dtype; each word has its own."""
    pipe = pipeline("SD 1", dtype=torch.bfloat16)
    words = {word: Embedding(word, encoders(pipe), n, "cat") for word, n in ((WORD, 2), ("<dog>", 1))}
    alike = pipe.encode_text([WORD, "<dog>"]).context
    for embedding in words.values():
        with torch.no_grad():
            embedding.rows[0].vectors.normal_()
        assert embedding.rows[0].vectors.dtype == torch.float32
    table, ids = token_table(pipe.text_encoder), torch.tensor([[5, 520, 521, 522]])
    expected = torch.cat([table.weight[[5]], *(words[w].rows[0].vectors.bfloat16() for w in words)])[None]
    assert torch.equal(table(ids), expected)
    assert pipe.plan(f"<dog> {WORD}").chunks[0][0] == [522, 520, 521]
    assert not torch.equal(pipe.encode_text([WORD, "<dog>"]).context, alike)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("cat",), "the word 'cat' is taken: it is one whole token of the vocabulary; give another one"),
        (("(a)",), r"the word '\(a\)' is empty, or has one of"),
        (("taken",), "the word 'taken' is taken by an embedding"),
        ((WORD, 0), "vectors=0: use 1 to 75, which fit in a chunk of a prompt"),
        ((WORD, 76), "vectors=76: use 1 to 75"),
        ((WORD, 2, ""), "init_word='' has 0 tokens: use one of 1 to 2"),
        ((WORD, 2, "a red cat"), "init_word='a red cat' has 3 tokens: use one of 1 to 2, as many as there are vectors"),
    ],
)
def test_what_cannot_be(arguments, message):
    pipe = pipeline("SDXL")
    Embedding("taken", encoders(pipe))
    word, *rest = arguments
    with pytest.raises(ValueError, match=message):
        Embedding(word, encoders(pipe), *rest)
    assert [own.words for own, _ in encoders(pipe)] == [{"taken": [520]}] * 2
    assert [len(token_table(encoder).weight) for _, encoder in encoders(pipe)] == [521] * 2


# Files

PROMPT = {"prompt": f"a cat, {WORD}", "negative_prompt": "red", "steps": 2}


def learned(model):
    """A pipeline and a word whose vectors look as if they had been trained."""
    pipe = pipeline(model)
    embedding = Embedding(WORD, encoders(pipe), 3)
    with torch.no_grad():
        for p in embedding.parameters():
            p.normal_(std=0.5)
    return pipe, embedding


@pytest.mark.parametrize("layout", ["diffusers", "webui"])
@pytest.mark.parametrize("model", ["SD 1", "SDXL"])
def test_what_is_saved_is_what_was_trained(model, layout, tmp_path):
    """Loaded here and by diffusers, whole runs end in the latents of the training's own pipeline."""
    pipe, embedding = learned(model)
    sampler = "ddim" if model == "SD 1" else "euler"
    file = tmp_path / f"{WORD}.safetensors"
    save_embedding(file, embedding, layout)
    wanted = family.ours(pipe, sampler=sampler, **PROMPT)
    pipe = pipeline(model)
    without = family.ours(pipe, sampler=sampler, **PROMPT)
    assert pipe.load_embedding(file) == WORD
    assert torch.equal(family.ours(pipe, sampler=sampler, **PROMPT), wanted)
    assert (without - wanted).abs().max() > 0.1 * wanted.abs().max()

    reference = REFERENCES[model]()
    reference.set_progress_bar_config(disable=True)
    pair = load_file(file) if model == "SDXL" else {}
    if not pair:
        reference.load_textual_inversion(str(file), token=WORD if layout == "webui" else None)
    for part, name in zip(("", "_2"), sorted(pair, reverse=True), strict=False):
        assert name == ("clip_g" if part else "clip_l")
        modules = {kind: getattr(reference, kind + part) for kind in ("text_encoder", "tokenizer")}
        reference.load_textual_inversion({WORD: pair[name]}, token=WORD, **modules)
    theirs = family.theirs(reference, **PROMPT)
    assert (theirs - wanted).abs().max() <= TOLERANCE * wanted.abs().max()


@pytest.mark.parametrize(
    ("model", "layout", "names"),
    [
        ("SD 1", "diffusers", {WORD: (3, 24)}),
        ("SD 1", "webui", {"emb_params": (3, 24)}),
        ("SDXL", "diffusers", {"clip_l": (3, 24), "clip_g": (3, 32)}),
        ("SDXL", "webui", {"clip_l": (3, 24), "clip_g": (3, 32)}),
        ("refiner", "webui", {"emb_params": (3, 32)}),
    ],
)
def test_names(model, layout, names, tmp_path):
    _, embedding = learned(model)
    save_embedding(tmp_path / "word.safetensors", embedding, layout)
    tensors = load_file(tmp_path / "word.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == names
    for name, vectors in zip(names, embedding.parameters(), strict=True):
        assert torch.equal(tensors[name], vectors)


def test_files_that_cannot_be(tmp_path):
    """The file that was there stays, and nothing beside it."""
    _, embedding = learned("SD 1")
    file = tmp_path / "word.safetensors"
    save_embedding(file, embedding)
    before = file.read_bytes()
    with pytest.raises(ValueError, match="layout='kohya': use 'diffusers' or 'webui'"):
        save_embedding(file, embedding, "kohya")
    with torch.no_grad():
        embedding.rows[0].vectors[1, 2] = torch.nan
    with pytest.raises(ValueError, match="the vectors of '<cat-toy>' have NaN or infinity: train them again"):
        save_embedding(file, embedding)
    assert file.read_bytes() == before and list(tmp_path.iterdir()) == [file]
