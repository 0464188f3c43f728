"""The autoencoder between pixels and latents."""

from ldm.vae.config import VAEConfig
from ldm.vae.vae import VAE, Gaussian

__all__ = ["VAE", "Gaussian", "VAEConfig"]
