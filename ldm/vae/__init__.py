"""The autoencoder between pixels and latents."""

from ldm.vae.config import TinyConfig, VAEConfig
from ldm.vae.tiny import TinyVAE
from ldm.vae.vae import VAE, Gaussian

__all__ = ["VAE", "Gaussian", "TinyConfig", "TinyVAE", "VAEConfig"]
