"""Prompts as webui's users write them: weights, BREAK, and as many chunks of 75 tokens as the text needs.

    (word) 1.1   (word:1.3) 1.3   [word] 1 / 1.1   ((word)) 1.21   \\( and \\), \\[, \\], \\\\ stand for themselves

Brackets that never close reach to the end of the text; closing ones that nothing opened are text.
"""

import math
import re
import warnings
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from ldm.clip.text_encoder import TextEncoder, TextEncoding
from ldm.clip.tokenizer import Tokenizer

TOKEN = re.compile(r"\\[()\[\]\\]?|[(\[]|:\s*([+-]?[.\d]+)\s*\)|[)\]]|[^\\()\[\]:]+|:", re.DOTALL)
BREAK = re.compile(r"\bBREAK\b")
NETWORK = re.compile(r"<(lora|lyco|hypernet):[^<>]*>")  # webui's
BACKTRACK = 20  # a chunk rather ends at a comma if one is among its last 20 tokens


def parse(prompt: str) -> list[tuple[str, float]]:
    """The pieces of a prompt and their weights, neighbours of one weight joined. BREAK is the piece ("BREAK", nan).

    Raises ValueError for a weight beyond 10,000, which no precision can hold.
    """
    pieces: list[list] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}

    def close(bracket: str, weight: float, start: int | None = None) -> None:
        start = opened[bracket].pop() if start is None else start
        for piece in pieces[start:]:
            piece[1] *= weight

    for match in TOKEN.finditer(prompt):
        text, weight = match.group(0), number(match.group(1))
        if text.startswith("\\"):
            pieces.append([text[1:], 1.0])
        elif text in opened:
            opened[text].append(len(pieces))
        elif weight is not None and opened["("]:
            close("(", weight)
        elif text == ")" and opened["("]:
            close("(", 1.1)
        elif text == "]" and opened["["]:
            close("[", 1 / 1.1)
        else:
            first, *others = BREAK.split(text)
            pieces.append([first.rstrip() if others else first, 1.0])
            for i, part in enumerate(others, start=1):
                part = part.lstrip() if i == len(others) else part.strip()
                pieces += [["BREAK", math.nan], [part, 1.0]]
    for bracket, weight in (("(", 1.1), ("[", 1 / 1.1)):
        for start in opened[bracket]:
            close(bracket, weight, start)
    joined: list[tuple[str, float]] = []
    for text, weight in pieces:
        if abs(weight) > 1e4:
            raise ValueError(f"prompt: {text!r} has the weight {weight:.3g}; give one from -10,000 to 10,000")
        if joined and weight == joined[-1][1]:
            joined[-1] = joined[-1][0] + text, weight
        elif text:
            joined.append((text, weight))
    return joined or [("", 1.0)]


def number(text: str | None) -> float | None:
    try:
        return None if text is None else float(text)
    except ValueError:  # "1.2.3"
        return None


@dataclass(frozen=True)
class PromptPlan:
    """What becomes of a prompt: `chunks` of token ids with their weights, each of at most 75. Print it to see them.

    words: each with the places of its tokens in the context (B,77n,width); brackets, weights and BREAK are none.
    """

    pieces: list[tuple[str, float]]
    chunks: list[tuple[list[int], list[float]]]
    tokens: list[list[str]]
    words: list[tuple[str, list[int]]]

    def __str__(self) -> str:
        lines = []
        for i, ((ids, weights), tokens) in enumerate(zip(self.chunks, self.tokens, strict=True)):
            lines.append(f"chunk {i + 1} of {len(self.chunks)}, {len(ids)} tokens")
            rows = zip(ids, tokens, weights, strict=True)
            lines += [f"{index:>7}  {token:<20} {weight:.4g}" for index, token, weight in rows]
        return "\n".join(lines)


def plan(prompt: str, tokenizer: Tokenizer, weighted: bool = True) -> PromptPlan:
    """weighted=False takes brackets and BREAK as text."""
    if network := NETWORK.search(prompt):
        warnings.warn(
            f"the prompt has {network.group()}, which is text here: load such a file with pipe.load_lora(path, scale)",
            stacklevel=2,
        )
    pieces = parse(prompt) if weighted else [(prompt, 1.0)]
    size = tokenizer.length - 2
    names = tokenizer.names()
    comma = tokenizer.vocab.get(",</w>")
    chunks: list[tuple[list[int], list[float]]] = [([], [])]
    for text, weight in pieces:
        if math.isnan(weight):
            chunks.append(([], []))
            continue
        for unit in tokenizer.units(text):
            ids, weights = chunks[-1]
            if len(ids) == size:
                chunks.append(([], []))
                if unit != [comma] and comma in ids[-BACKTRACK:]:
                    cut = len(ids) - ids[::-1].index(comma)
                    chunks[-1] = ids[cut:], weights[cut:]
                    del ids[cut:], weights[cut:]
            if len(chunks[-1][0]) + len(unit) > size:  # an added word is not split
                chunks.append(([], []))
            chunks[-1][0].extend(unit)
            chunks[-1][1].extend([weight] * len(unit))
    if len(chunks) > 1 and not chunks[-1][0]:  # nothing follows the last BREAK
        chunks.pop()
    places = iter(tokenizer.length * i + 1 + j for i, (ids, _) in enumerate(chunks) for j in range(len(ids)))
    spelled = [word for text, weight in pieces if not math.isnan(weight) for word in tokenizer.spelled(text)]
    words = [(word, list(islice(places, count))) for word, count in spelled]
    return PromptPlan(pieces, chunks, [[names[i] for i in ids] for ids, _ in chunks], words)


def encode(
    plans: list[PromptPlan], count: int, tokenizer: Tokenizer, encoder: TextEncoder, clip_skip: int, norm: bool
) -> TextEncoding:
    """context (B,77 count,width), chunk after chunk, and pooled (B,width) of the first; too short prompts get empty
    chunks. norm: bring the mean of a weighted context back to what it was, as webui does for a whole batch at once, but
    for each picture by itself, which then does not depend on its batch.
    """
    device = encoder.text_model.embeddings.token_embedding.weight.device
    contexts, pooled = [], None
    for i in range(count):
        rows = [p.chunks[i] if i < len(p.chunks) else ([], []) for p in plans]
        encoding = encoder(tokenizer.rows([ids for ids, _ in rows]).to(device), clip_skip)
        contexts.append(weigh(encoding.context, [weights for _, weights in rows], norm))
        pooled = encoding.pooled if pooled is None else pooled
    assert pooled is not None
    return TextEncoding(torch.cat(contexts, dim=1), pooled)


def weigh(context: Tensor, weights: list[list[float]], norm: bool) -> Tensor:
    """Each token's vector times its weight; a prompt all of whose weights are 1 stays as it is, to the bit."""
    rows = []
    for row, values in zip(context, weights, strict=True):
        if any(value != 1 for value in values):
            factor = torch.ones(len(row), device=row.device, dtype=row.dtype)
            factor[1 : 1 + len(values)] = torch.tensor(values, device=row.device, dtype=row.dtype)
            weighted = row * factor[:, None]  # (77,width)
            row = weighted * (row.mean() / weighted.mean()) if norm else weighted
        rows.append(row)
    return torch.stack(rows)
