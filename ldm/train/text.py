"""The text encoder's first lesson, before it is trained on with the UNet: what the words look like.

The official models start from a text encoder that has seen 400 million pictures (CLIP). Ours starts by predicting the
latents of the captioned picture from the mean of its context by one linear map, which is the mean picture that fits the
words: what a denoiser predicts when there is nothing but noise. It takes minutes.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.clip import TextEncoder
from ldm.clip.tokenizer import Tokenizer
from ldm.train import captions
from ldm.train.loop import batch_indices, muon_and_adamw, step_generator, train


class Reader(nn.Module):
    def __init__(self, text_encoder: TextEncoder, values: int):
        super().__init__()
        self.text_encoder = text_encoder
        self.head = nn.Linear(text_encoder.config.width, values)

    def forward(self, ids: Tensor, picture: Tensor) -> Tensor:
        """The mean squared error of the prediction of `picture` (B,values)."""
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            out = self.head(self.text_encoder(ids).context.mean(dim=1))  # (B,values)
        return F.mse_loss(out.float(), picture)


def train_text(
    text_encoder: TextEncoder,
    tokenizer: Tokenizer,
    meta: list[dict],
    latents: Tensor,
    folder: Path,
    *,
    steps: int = 1500,
    batch: int = 128,
    lr: float = 2e-3,
    seed: int = 0,
) -> TextEncoder:
    """`latents` (n,4,16,16), scaled, one for each of the n descriptions. Returns the text encoder with EMA weights."""

    def batch_of(step: int) -> tuple[Tensor, Tensor]:
        generator = step_generator(seed, step)
        rows = batch_indices(len(meta), batch, seed, step)
        texts = [captions.draw_caption(meta[row], generator) for row in rows.tolist()]
        return tokenizer(texts), latents[rows].flatten(1)

    reader = Reader(text_encoder, latents[0].numel())
    settings = dict(batch=batch, seed=seed)
    return train(reader, batch_of, muon_and_adamw(reader, lr), folder, steps=steps, settings=settings).text_encoder
