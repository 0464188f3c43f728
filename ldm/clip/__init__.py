"""The text side: tokenizer and text encoder."""

from ldm.clip.config import TextConfig
from ldm.clip.text_encoder import TextEncoder, TextEncoding

__all__ = ["TextConfig", "TextEncoder", "TextEncoding"]
