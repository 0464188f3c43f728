"""What tells one official VAE from another; the defaults are SD 1's."""

from dataclasses import dataclass


@dataclass(frozen=True)
class VAEConfig:
    """`scaling_factor` brings the latents to about unit variance: the UNet works on scaling_factor * z. `upcast`: this
    VAE overflows in float16, and runs in float32 where the UNet runs in that."""

    channels: tuple[int, ...] = (128, 256, 512, 512)
    layers: int = 2
    latent_channels: int = 4
    scaling_factor: float = 0.18215
    groups: int = 32
    upcast: bool = False

    @property
    def factor(self) -> int:
        """Pixels along the side of one latent."""
        return 2 ** (len(self.channels) - 1)


@dataclass(frozen=True)
class TinyConfig(VAEConfig):
    """TAESD's: one width at every level, latents as the UNet has them."""

    channels: tuple[int, ...] = (64, 64, 64, 64)
    scaling_factor: float = 1.0
