"""What the default model is told about its pictures, and the small vocabulary that says it."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from ldm.save import whole_folder
from ldm.train.data import BACKGROUNDS

VOCABULARY = 4096
LENGTH = 32


def caption(meta: dict) -> str:
    return f"{meta['label']}, {meta['style']} style"


def draw_caption(meta: dict, generator: torch.Generator) -> str:
    """One of the ways in which people ask for this picture; "" for one in ten, which guidance needs.

    Of the rest: 50 % "{label}, {style} style"; 15 % "{label}" or "a {label}"; 15 % "a {style} style emoji of {label}";
    15 % with one to three tags; 5 % with the colour, where one covers most of the ink and the label does not say it.
    Pictures without tags or such a colour get the first form instead.
    """

    def below(n: int) -> int:
        return int(torch.randint(n, (), generator=generator))

    if below(10) == 0:
        return ""
    label, style, kind = meta["label"], meta["style"], below(20)
    if kind < 3:
        return label if below(2) else f"a {label}"
    if kind < 6:
        return f"a {style} style emoji of {label}"
    if kind < 9 and meta["tags"]:
        order = torch.randperm(len(meta["tags"]), generator=generator)[: 1 + below(3)]
        return f"{label}, {', '.join(meta['tags'][i] for i in order)}, {style} style"
    if kind == 9 and meta["colors"] and meta["colors"][0][1] > 0.6 and meta["colors"][0][0] not in label:
        return f"{meta['colors'][0][0]} {label}, {style} style"
    return caption(meta)


def on_background(text: str, colour: str) -> str:
    return f"{text}, {colour} background" if text and colour != "white" else text


def corpus(metas: Iterable[dict]) -> Iterator[str]:
    for meta in metas:
        yield caption(meta)
        yield f"a {meta['style']} style emoji of {meta['label']}"
        yield ", ".join(meta["tags"])
    for colour in BACKGROUNDS:
        yield from [f"{colour} background"] * 50


def train_vocabulary(metas: Iterable[dict], folder: Path) -> None:
    """Byte-pair merges learnt on the captions. CLIP's layout: all bytes, all bytes that end a word, merges, two marks.

    Writes `vocab.json`, `merges.txt` and `tokenizer_config.json` into `folder`, which takes the place of an older one.
    Raises ValueError if the captions have too few words for VOCABULARY tokens.
    """
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    words = Regex(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
    bytes_of = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(words, "removed", invert=True), bytes_of])
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=2 * VOCABULARY, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    bpe.train_from_iterator(corpus(metas), trainer)
    merges = json.loads(bpe.to_str())["model"]["merges"][: VOCABULARY - 2 * len(alphabet) - 2]
    tokens = [*alphabet, *(a + "</w>" for a in alphabet), *("".join(m) for m in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {token: i for i, token in enumerate(tokens)}
    if len(vocab) != VOCABULARY:
        raise ValueError(f"the captions give {len(vocab)} of the {VOCABULARY} tokens: there must be more of them")
    config = dict(
        tokenizer_class="CLIPTokenizer",
        model_max_length=LENGTH,
        do_lower_case=True,
        add_prefix_space=False,
        errors="replace",
        bos_token="<|startoftext|>",
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        unk_token="<|endoftext|>",
    )
    with whole_folder(folder) as new:
        (new / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
        lines = "".join(f"{a} {b}\n" for a, b in merges)
        (new / "merges.txt").write_text("#version: 0.2\n" + lines, encoding="utf-8")
        (new / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
