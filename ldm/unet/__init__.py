"""The denoising UNet."""

from ldm.unet.blocks import VECTOR_NUMBERS, vector_embedding
from ldm.unet.config import UNetConfig
from ldm.unet.unet import UNet

__all__ = ["VECTOR_NUMBERS", "UNet", "UNetConfig", "vector_embedding"]
