"""CLIP's tokenizer: lower-cased byte-level BPE (Radford et al. 2021, section 2.4).

A text is cleaned, split into pieces (contractions, runs of letters, single digits, runs of other signs), every piece is
written as its UTF-8 bytes, one printable character per byte, the last with the suffix </w>, and its neighbours are
merged in the order of the merge list.
"""

import gzip
import json
import re
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from tokenizers import Regex
from tokenizers.decoders import ByteLevel as FromBytes
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split
from torch import Tensor

from ldm.clip.cleanup import clean

MOST = 100_000  # tokens, and merges; CLIP has 49,408
BEGIN, END = "<|startoftext|>", "<|endoftext|>"
OFFICIAL = Path(__file__).parent / "vocab" / "bpe_simple_vocab_16e6.txt.gz"
# OpenAI's pattern ignores case. In lower-cased text that still lets the long s stand for s, and drops U+0345, a mark
# whose capital is a letter.
PIECE = Regex(r"<\|[sſ]tartoftext\|>|<\|endoftext\|>|'[sſ]|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}\x{345}]+")


def byte_alphabet() -> list[str]:
    """The characters that stand for bytes, in the order of the official ids: printable Latin-1 first, as itself."""
    printable = [chr(b) for b in range(256) if 0x21 <= b <= 0x7E or (0xA1 <= b <= 0xFF and b != 0xAD)]
    return printable + [chr(256 + i) for i in range(256 - len(printable))]


def pairs(lines: Iterable[str]) -> list[tuple[str, str]]:
    return [(left, right) for left, right in map(str.split, lines)]


class Tokenizer:
    """Text to ids, and to the (B,length) int64 tensor that the text encoder reads.

    `length` tokens per prompt; `begin`, `end`, `pad` are ids; `words` are those that were added, cleaned, with the ids
    that each stands for. Raises ValueError for a special token that `vocab` lacks, and for more than MOST tokens or
    merges.
    """

    def __init__(self, vocab: dict[str, int], merges: list[tuple[str, str]], length: int = 77, pad_token: str = END):
        for token in (BEGIN, END, pad_token):
            if token not in vocab:
                raise ValueError(f"the vocabulary ({len(vocab)} tokens) has no {token!r}; name a token that it has")
        if max(len(vocab), len(merges)) > MOST:
            raise ValueError(f"{len(vocab):,} tokens and {len(merges):,} merges; give at most {MOST:,} of each")
        self.vocab = vocab
        self.merges = merges
        self.words: dict[str, list[int]] = {}
        self.length = length
        self.begin, self.end, self.pad = vocab[BEGIN], vocab[END], vocab[pad_token]
        self.split = Sequence(
            [Split(PIECE, "removed", invert=True), ByteLevel(add_prefix_space=False, use_regex=False)]
        )
        self.bpe = BPE(vocab, merges, end_of_word_suffix="</w>", unk_token=END)

    @classmethod
    def official(cls, pad_token: str = END) -> "Tokenizer":
        """CLIP's own 49,408 tokens. SD 1 and SDXL's first encoder pad with END, SD 2 and SDXL's second with "!" (0)."""
        with gzip.open(OFFICIAL, "rt", encoding="utf-8") as file:
            lines = file.read().split("\n")
        merges = pairs(lines[1 : 49408 - 2 - 512 + 1])
        alphabet = byte_alphabet()
        tokens = alphabet + [c + "</w>" for c in alphabet] + ["".join(pair) for pair in merges] + [BEGIN, END]
        return cls({token: i for i, token in enumerate(tokens)}, merges, pad_token=pad_token)

    @classmethod
    def from_files(cls, vocab: Path, merges: Path, length: int = 77, pad_token: str = END) -> "Tokenizer":
        """A diffusers folder's tokenizer/vocab.json and tokenizer/merges.txt."""
        return cls.from_texts(vocab.read_text("utf-8"), merges.read_text("utf-8"), length, pad_token)

    @classmethod
    def from_texts(cls, vocab: str, merges: str, length: int = 77, pad_token: str = END) -> "Tokenizer":
        """What stands in these two files."""
        if merges.count("\n") > MOST:
            raise ValueError(f"{merges.count(chr(10)):,} lines of merges; give at most {MOST:,}")
        merge_list = pairs(line for line in merges.split("\n") if line and not line.startswith("#version"))
        return cls(json.loads(vocab), merge_list, length, pad_token)

    @classmethod
    def from_json(cls, text: str, length: int = 77, pad_token: str = END) -> "Tokenizer":
        """What stands in a tokenizer.json, transformers' file of both."""
        model = json.loads(text)["model"]
        merges = [tuple(pair.split() if isinstance(pair, str) else pair) for pair in model["merges"]]
        return cls(model["vocab"], merges, length, pad_token)

    def add(self, word: str, ids: list[int]) -> None:
        """Let a word stand for ids of its own wherever it is not a part of a longer one, in any case."""
        self.words[clean(word)] = ids

    def units(self, text: str) -> list[list[int]]:
        """The ids of a text, without begin, end and padding, in groups that stay together: an added word, or a token.

        No letter or digit of an added word touches another one.
        """
        return [unit for _, _, units in self.pieces(text) for unit in units]

    def pieces(self, text: str) -> Iterator[tuple[str, int, list[list[int]]]]:
        """The pieces of a cleaned text: each as it stands there, where it begins, and its units."""
        words = [
            r"(?<![^\W_])" * word[0].isalnum() + re.escape(word) + r"(?![^\W_])" * word[-1].isalnum()
            for word in sorted(self.words, key=len, reverse=True)
        ]
        start = 0
        for part in re.split(f"({'|'.join(words)})", clean(text)) if words else [clean(text)]:
            if part in self.words:
                yield part, start, [self.words[part]]
            else:
                for piece, (begin, end) in self.split.pre_tokenize_str(part):
                    special = piece in (BEGIN, END)
                    units = [[self.vocab[piece]]] if special else [[token.id] for token in self.bpe.tokenize(piece)]
                    yield part[begin:end], start + begin, units
            start += len(part)

    def spelled(self, text: str) -> list[tuple[str, int]]:
        """The words of a cleaned text, and how many ids each has: what stands between white space, without the signs
        at its ends, which are listed by themselves."""
        runs: list[list[tuple[str, int]]] = []  # of pieces that touch
        end = -1
        for piece, start, units in self.pieces(text):
            if start != end:
                runs.append([])
            runs[-1].append((piece, sum(map(len, units))))
            end = start + len(piece)
        words = []
        for run in runs:
            wordy = [i for i, (piece, _) in enumerate(run) if any(map(str.isalnum, piece))]
            first, last = (wordy[0], wordy[-1] + 1) if wordy else (0, 0)
            pieces, counts = zip(*run, strict=True)
            middle = [("".join(pieces[first:last]), sum(counts[first:last]))] if wordy else []
            words += [*run[:first], *middle, *run[last:]]
        return words

    def ids(self, text: str) -> list[int]:
        """The ids of a text, without begin, end and padding."""
        return [i for unit in self.units(text) for i in unit]

    def names(self) -> dict[int, str]:
        """The tokens by their ids; an added word's are word[0], word[1], ..."""
        added = {i: f"{word}[{k}]" for word, ids in self.words.items() for k, i in enumerate(ids)}
        return {i: token for token, i in self.vocab.items()} | added

    def __call__(self, texts: str | list[str]) -> Tensor:
        """(B,length) int64: begin, ids, end, padding. Warns with the text that did not fit."""
        rows = []
        for text in [texts] if isinstance(texts, str) else texts:
            ids, room = self.ids(text), self.length - 2
            ids, cut = ids[:room], ids[room:]
            if cut:
                names = self.names()
                lost = FromBytes().decode([names[i] for i in cut]).replace("</w>", " ").strip()
                warnings.warn(
                    f"the prompt has {len(ids) + len(cut)} tokens, {len(ids)} fit; cut: {lost!r}", stacklevel=2
                )
            rows.append(ids)
        return self.rows(rows)

    def rows(self, ids: list[list[int]]) -> Tensor:
        """At most length - 2 ids each -> (B,length) int64: begin, ids, end, padding."""
        framed = [[self.begin, *row, self.end] for row in ids]
        return torch.tensor([row + [self.pad] * (self.length - len(row)) for row in framed])
