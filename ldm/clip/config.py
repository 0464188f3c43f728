"""What tells one text encoder from another; the defaults are SD 1's."""

from dataclasses import dataclass


@dataclass(frozen=True)
class TextConfig:
    """`skip`: layers at the end that the context always leaves out, and `final_norm`: whether it then passes the final
    LayerNorm (SDXL: 1 and no). `projection`: the width that the pooled token is projected to, None for its own."""

    vocab_size: int = 49408
    length: int = 77
    width: int = 768
    layers: int = 12
    heads: int = 12
    activation: str = "quick_gelu"  # or "gelu" (OpenCLIP)
    end_token: int = 49407
    skip: int = 0
    final_norm: bool = True
    projection: int | None = None
