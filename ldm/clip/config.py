"""What tells one text encoder from another; the defaults are SD 1's."""

from dataclasses import dataclass


@dataclass(frozen=True)
class TextConfig:
    vocab_size: int = 49408
    length: int = 77
    width: int = 768
    layers: int = 12
    heads: int = 12
    activation: str = "quick_gelu"  # or "gelu" (OpenCLIP)
    end_token: int = 49407
