"""The tiny autoencoder, TAESD (Ollin Boer Bohan 2023): Stable Diffusion's latents in a sixtieth of the work, nearly.

An approximation, to be asked for: `Pipeline.from_pretrained(model, vae="taesd.safetensors")`. Its latents have the
UNet's scale, its pictures lack some detail. Module names are those of diffusers' AutoencoderTiny.
"""

import torch
from torch import Tensor, nn

from ldm.vae.config import TinyConfig
from ldm.vae.vae import VAE, Gaussian

ENCODER, DECODER = (1, 3, 3, 3), (3, 3, 3, 1)  # blocks of a level


def conv(inp: int, out: int, bias: bool = True, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inp, out, 3, stride=stride, padding=1, bias=bias)


class Block(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Sequential(conv(width, width), nn.ReLU(), conv(width, width), nn.ReLU(), conv(width, width))

    def forward(self, x: Tensor) -> Tensor:
        return (self.conv(x) + x).relu()


def encoder(width: int, latents: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for level, blocks in enumerate(ENCODER):
        layers.append(conv(width, width, bias=False, stride=2) if level else conv(3, width))
        layers += [Block(width) for _ in range(blocks)]
    return nn.Sequential(*layers, conv(width, latents))


def decoder(width: int, latents: int) -> nn.Sequential:
    layers: list[nn.Module] = [conv(latents, width), nn.ReLU()]
    for level, blocks in enumerate(DECODER):
        if level:
            layers += [nn.Upsample(scale_factor=2), conv(width, width, bias=False)]
        layers += [Block(width) for _ in range(blocks)]
    return nn.Sequential(*layers, conv(width, 3))


class Layers(nn.Module):
    def __init__(self, layers: nn.Sequential):
        super().__init__()
        self.layers = layers

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class TinyVAE(VAE):
    """In the place of a `VAE`: the same methods, other halves, and nothing between them."""

    def __init__(self, config: TinyConfig):
        nn.Module.__init__(self)
        self.config = config
        width, latents = config.channels[0], config.latent_channels
        self.encoder = Layers(encoder(width, latents))  # type: ignore[assignment]
        self.decoder = Layers(decoder(width, latents))  # type: ignore[assignment]

    def encode(self, image: Tensor) -> Gaussian:
        """image (B,3,h,w) in [-1,1], h and w multiples of 8 -> (B,4,h/8,w/8) in the UNet's scale, certain: std is 0."""
        mean = self.encoder((image + 1) / 2)  # (B,4,h/8,w/8)
        return Gaussian(mean, torch.zeros_like(mean))

    def decode(self, z: Tensor) -> Tensor:
        """z (B,4,h,w) in the UNet's scale -> (B,3,8h,8w), about [-1,1]."""
        z = 3 * (z / 3).tanh()  # what is far off is led back
        return 2 * self.decoder(z) - 1  # (B,3,8h,8w)

    def in_strips(self, height: int, width: int) -> bool:
        """Never: without attention and norms little memory is needed."""
        return False
