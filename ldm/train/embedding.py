"""Textual inversion in training (Gal et al. 2022): a new word whose vectors are all that learns.

The word's rows at the end of each text encoder's token table are not read: a forward hook on the table puts the
trained vectors in their place, so that neither gradients nor weight decay nor the optimiser's state know the table.
"""

from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.clip.embedding import Encoders, add_word, token_table, word_problem
from ldm.save import write_file
from ldm.source import all_finite


class Rows(nn.Module):
    """A word's vectors (n,width) for one text encoder, and the hook that puts them into its token table's output."""

    def __init__(self, vectors: Tensor, first: int):
        super().__init__()
        self.vectors = nn.Parameter(vectors)
        self.first = first  # id of the first vector

    def forward(self, table: nn.Embedding, inputs: tuple[Tensor], y: Tensor) -> Tensor:
        row = inputs[0] - self.first  # (B,N)
        own = (row >= 0) & (row < len(self.vectors))
        return torch.where(own[..., None], F.embedding(row * own, self.vectors).to(y.dtype), y)  # (B,N,width)


class Embedding(nn.Module):
    """A word in training: `parameters()` are its vectors, (n,width) for each text encoder, at least float32.

    The word is added to the tokenizers as `pipe.load_embedding` adds one, and means its vectors from now on.
    """

    def __init__(self, word: str, encoders: Encoders, vectors: int = 1, init_word: str | None = None):
        """vectors: n, how many tokens the word stands for. They start as the vectors of init_word (as webui spreads
        them: all alike where it is one token), or else as the mean of the table. Freezes the text encoders.

        Raises ValueError for words and numbers that cannot be; nothing is changed then.
        """
        super().__init__()
        if problem := word_problem(word, encoders):
            raise ValueError(f"the word {word!r} {problem}; give another one")
        room = min(tokenizer.length for tokenizer, _ in encoders) - 2
        if not 1 <= vectors <= room:
            raise ValueError(f"vectors={vectors}: use 1 to {room}, which fit in a chunk of a prompt")
        self.word = word
        starts = []
        for tokenizer, encoder in encoders:
            weight = token_table(encoder).weight.detach()
            weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
            if init_word is None:
                start = weight.mean(dim=0).expand(vectors, -1).clone()
            else:
                ids = tokenizer.ids(init_word)
                if not 1 <= len(ids) <= vectors:
                    raise ValueError(
                        f"init_word={init_word!r} has {len(ids)} tokens: use one of 1 to {vectors}, as many as there"
                        " are vectors, or more vectors"
                    )
                start = weight[[ids[i * len(ids) // vectors] for i in range(vectors)]]
            starts.append(start)  # (n,width)
        add_word(word, starts, encoders)
        self.rows = nn.ModuleList()
        for (_, encoder), start in zip(encoders, starts, strict=True):
            encoder.requires_grad_(False)
            table = token_table(encoder)
            rows = Rows(start, table.num_embeddings - vectors)
            table.register_forward_hook(rows)
            self.rows.append(rows)


def save_embedding(path: str | Path, embedding: Embedding, layout: Literal["diffusers", "webui"] = "diffusers") -> None:
    """Write the vectors in float32, whole or not at all; `pipe.load_embedding` reads what this writes.

    layout: "diffusers" has them under the word, "webui" as emb_params, whose word is the file's name; diffusers' method
    load_textual_inversion, webui and ComfyUI read both. Of SDXL's two encoders it is clip_l and clip_g in both layouts.
    Raises ValueError for another layout, and for vectors that are not finite.
    """
    vectors = [parameter.detach().to("cpu", torch.float32) for parameter in embedding.parameters()]
    if layout not in ("diffusers", "webui"):
        raise ValueError(f"layout={layout!r}: use 'diffusers' or 'webui'")
    if not all(map(all_finite, vectors)):
        raise ValueError(f"the vectors of {embedding.word!r} have NaN or infinity: train them again")
    names = [embedding.word if layout == "diffusers" else "emb_params"] if len(vectors) == 1 else ["clip_l", "clip_g"]
    write_file(Path(path), dict(zip(names, vectors, strict=True)), {"format": "pt"})
