"""CLIP's text transformer (Radford et al. 2021, section 2.4). Module names are those of transformers' CLIPTextModel."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.attention import attention
from ldm.clip.config import TextConfig
from ldm.kernels import Linear


class TextEncoding(NamedTuple):
    """context (B,length,width): what the UNet's cross-attention reads. pooled (B,width): the last layer's end token,
    (B,projection) where the config has a projection."""

    context: Tensor
    pooled: Tensor


def quick_gelu(x: Tensor) -> Tensor:
    """OpenAI's x * sigmoid(1.702 x); it is off the exact gelu by up to 0.02."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"quick_gelu": quick_gelu, "gelu": F.gelu}


class Embeddings(nn.Module):
    def __init__(self, c: TextConfig):
        super().__init__()
        self.token_embedding = nn.Embedding(c.vocab_size, c.width)
        self.position_embedding = nn.Embedding(c.length, c.width)

    def forward(self, ids: Tensor) -> Tensor:
        return self.token_embedding(ids) + self.position_embedding.weight[: ids.shape[1]]  # (B,N,C)


class SelfAttention(nn.Module):
    def __init__(self, c: TextConfig):
        super().__init__()
        self.heads = c.heads
        self.q_proj = Linear(c.width, c.width)
        self.k_proj = Linear(c.width, c.width)
        self.v_proj = Linear(c.width, c.width)
        self.out_proj = Linear(c.width, c.width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.out_proj(attention(self.q_proj(x), self.k_proj(x), self.v_proj(x), self.heads, mask))


class MLP(nn.Module):
    def __init__(self, c: TextConfig):
        super().__init__()
        self.activation = ACTIVATIONS[c.activation]
        self.fc1 = Linear(c.width, 4 * c.width)
        self.fc2 = Linear(4 * c.width, c.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))


class Layer(nn.Module):
    def __init__(self, c: TextConfig):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(c.width)
        self.self_attn = SelfAttention(c)
        self.layer_norm2 = nn.LayerNorm(c.width)
        self.mlp = MLP(c)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x), mask)
        return x + self.mlp(self.layer_norm2(x))


class Layers(nn.Module):
    def __init__(self, c: TextConfig):
        super().__init__()
        self.layers = nn.ModuleList(Layer(c) for _ in range(c.layers))

    def forward(self, x: Tensor) -> list[Tensor]:
        """The output of every layer."""
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()  # a token sees its past
        outputs = []
        for layer in self.layers:
            x = layer(x, mask)
            outputs.append(x)
        return outputs


class TextModel(nn.Module):
    def __init__(self, c: TextConfig):
        super().__init__()
        self.embeddings = Embeddings(c)
        self.encoder = Layers(c)
        self.final_layer_norm = nn.LayerNorm(c.width)


class TextEncoder(nn.Module):
    def __init__(self, config: TextConfig):
        super().__init__()
        self.config = config
        self.text_model = TextModel(config)
        if config.projection is not None:
            self.text_projection = nn.Linear(config.width, config.projection, bias=False)

    def forward(self, ids: Tensor, clip_skip: int = 1) -> TextEncoding:
        """ids (B,N) int64 with N up to the config's length.

        `clip_skip` counts as webui does: 1 takes the last layer that the model was trained with, 2 the one before it,
        and so on; the final LayerNorm, if the config has it, follows whichever was taken. The pooled token is of the
        last layer of all, always with LayerNorm. Raises ValueError outside 1..layers - skip.
        """
        c, model = self.config, self.text_model
        if not 1 <= clip_skip <= c.layers - c.skip:
            raise ValueError(
                f"clip_skip={clip_skip}: this text encoder has {c.layers - c.skip} layers to take, so clip_skip goes"
                f" from 1 (the last of them, no cut) to {c.layers - c.skip}"
            )
        outputs = model.encoder(model.embeddings(ids))
        context = outputs[-clip_skip - c.skip]  # (B,N,C)
        if c.final_norm:
            context = model.final_layer_norm(context)
        at_end = c.final_norm and clip_skip + c.skip == 1
        last = context if at_end else model.final_layer_norm(outputs[-1])
        end = (ids == c.end_token).int().argmax(dim=1)  # the first end token: padding may repeat it
        pooled = last[torch.arange(len(ids), device=ids.device), end]  # (B,C)
        if c.projection is not None:
            pooled = self.text_projection(pooled)  # (B,projection)
        return TextEncoding(context, pooled)
