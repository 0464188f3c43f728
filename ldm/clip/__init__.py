"""The text side: tokenizer and text encoder."""

from ldm.clip.config import TextConfig
from ldm.clip.text_encoder import TextEncoder, TextEncoding
from ldm.clip.tokenizer import Tokenizer

__all__ = ["TextConfig", "TextEncoder", "TextEncoding", "Tokenizer"]
