"""Textual inversion (Gal et al. 2022): words of a prompt that stand for vectors which were learned from pictures.

    webui's file    emb_params (n,width)                   the word is the file's name
    diffusers'      one tensor, (width,) or (n,width)      the word is the tensor's name, as <cat-toy>
    SDXL's pair     clip_l (n,768) and clip_g (n,1280)     the word is the file's name
    or, diffusers'  two files, the second named *_2        the word is the tensors' name

Each vector becomes a row at the end of the encoder's token table, with an id of its own.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from ldm.clip.cleanup import clean
from ldm.clip.text_encoder import TextEncoder
from ldm.clip.tokenizer import Tokenizer
from ldm.source import FLOATS, CheckpointError, Source, all_finite

FAMILIES = {(768,): "SD 1", (1024,): "SD 2", (768, 1280): "SDXL", (1280,): "SDXL's second encoder alone"}
SYNTAX = "()[]\\"  # of weights

Encoders = list[tuple[Tokenizer, TextEncoder]]


def load_embedding(path: Path, word: str | None, encoders: Encoders) -> str:
    """Teach the tokenizers the word, and the text encoders its vectors, in their dtype. The word is returned.

    word: None takes the file's. SDXL's refiner, which has the second encoder alone, takes that one's half of a pair.
    Raises CheckpointError for a file that is no embedding, or one for other encoders, and for a word that cannot be
    had; nothing is changed then.
    """
    source = Source(path, [path])
    match sorted(source.shapes):
        case ["clip_g", "clip_l"]:
            names, own = ["clip_l", "clip_g"], path.stem
        case ["clip_g" | "clip_l" | "emb_params" as name]:
            names, own = [name], path.stem
        case [name]:
            names, own = [name], name
        case found:
            listed = f" ({', '.join(found[:3])}{', ...' * (len(found) > 3)})" if found else ""
            raise CheckpointError(
                f"{path} has {len(found)} tensors{listed}. An embedding has one, emb_params or one named by its word,"
                " or SDXL's two, clip_l and clip_g: give a file for each word"
            )
    places = [(source, name) for name in names]
    second = path.with_name(f"{path.stem}_2{path.suffix}")
    if len(encoders) == 2 and len(names) == 1 and second.is_file():
        other = Source(second, [second])
        places += [(other, name) for name in other.shapes]
    check_tensors(places, encoders)
    word = own if word is None else word
    if problem := word_problem(word, encoders):
        raise CheckpointError(f"{path}: the word {word!r} {problem}; give another one with word=")

    learned = []
    for (source, name), (_, encoder) in zip(places[-len(encoders) :], encoders, strict=True):
        table = token_table(encoder).weight
        vectors = source[name].to(table).reshape(-1, table.shape[1])  # (n,width)
        if not all_finite(vectors):
            raise CheckpointError(f"{path}: {name} has NaN or infinity in {table.dtype}: download or train it again")
        learned.append(vectors)
    add_word(word, learned, encoders)
    return word


def add_word(word: str, vectors: list[Tensor], encoders: Encoders) -> None:
    """Teach the tokenizers the word, and the text encoders its vectors (n,width), as new rows, in their dtype."""
    embeddings = [token_table(encoder) for _, encoder in encoders]
    tables = [torch.cat([e.weight.detach(), rows.to(e.weight)]) for e, rows in zip(embeddings, vectors, strict=True)]
    for (tokenizer, _), embedding, table in zip(encoders, embeddings, tables, strict=True):
        tokenizer.add(word, list(range(embedding.num_embeddings, len(table))))
        embedding.weight = nn.Parameter(table, requires_grad=embedding.weight.requires_grad)
        embedding.num_embeddings = len(table)


def token_table(encoder: TextEncoder) -> nn.Embedding:
    return encoder.text_model.embeddings.token_embedding


def check_tensors(places: list[tuple[Source, str]], encoders: Encoders) -> None:
    for source, name in places:
        shape, dtype = source.shapes[name], source.dtypes[name]
        if len(shape) not in (1, 2) or 0 in shape:
            raise CheckpointError(f"{source.where}: {name} is {shape}: accepted are (width,) and (vectors,width)")
        if dtype not in FLOATS:
            raise CheckpointError(f"{source.where}: {name} is {dtype}: accepted are {', '.join(FLOATS)}")
    source, shapes = places[0][0], [(1, *source.shapes[name])[-2:] for source, name in places]
    theirs, ours = tuple(width for _, width in shapes), tuple(encoder.config.width for _, encoder in encoders)
    if theirs[-len(ours) :] != ours:
        raise CheckpointError(
            f"{source.where} has vectors of width {family(theirs)}; this model's text encoders have {family(ours)}:"
            " give an embedding that was trained for such a model (SDXL's has clip_l and clip_g)"
        )
    counts = [count for count, _ in shapes]
    room = min(tokenizer.length for tokenizer, _ in encoders) - 2
    if len(set(counts)) > 1 or counts[0] > room:
        raise CheckpointError(
            f"{source.where} has {' and '.join(map(str, counts))} vectors: accepted are 1 to {room}, which fit in a"
            " chunk of a prompt, as many for the one encoder as for the other"
        )


def family(widths: tuple[int, ...]) -> str:
    return " + ".join(map(str, widths)) + (f" ({FAMILIES[widths]})" if widths in FAMILIES else "")


def word_problem(word: str, encoders: Encoders) -> str | None:
    """Why the word cannot be had, as the end of a sentence that begins with it."""
    if not clean(word) or set(word) & set(SYNTAX):
        return f"is empty, or has one of {' '.join(SYNTAX)}, which a prompt has for its weights"
    if any(clean(word) in tokenizer.words for tokenizer, _ in encoders):
        return "is taken by an embedding that was loaded before"
    if any(len(tokenizer.ids(word)) == 1 for tokenizer, _ in encoders):
        return "is taken: it is one whole token of the vocabulary"
    return None
