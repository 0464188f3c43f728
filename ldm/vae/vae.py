"""The autoencoder between pixels and latents (Rombach et al. 2022, appendix G; Kingma & Welling 2014).

Module names are those of diffusers' AutoencoderKL.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ldm.convolutions import Conv2d, norm_conv
from ldm.kernels import channels_last
from ldm.vae import strips
from ldm.vae.blocks import DownBlock, MidBlock, UpBlock
from ldm.vae.config import VAEConfig


class Gaussian(NamedTuple):
    """The posterior q(z | image): independent normals. mean and std (B,latent_channels,h/f,w/f), not scaled."""

    mean: Tensor
    std: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        return self.mean + self.std * noise


class Encoder(nn.Module):
    def __init__(self, c: VAEConfig):
        super().__init__()
        ch, last = c.channels, len(c.channels) - 1
        self.conv_in = Conv2d(3, ch[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            DownBlock(ch[max(i - 1, 0)], ch[i], c.layers, c.groups, last=i == last) for i in range(len(ch))
        )
        self.mid_block = MidBlock(ch[-1], c.groups)
        self.conv_norm_out = nn.GroupNorm(c.groups, ch[-1], eps=1e-6)
        self.conv_out = Conv2d(ch[-1], 2 * c.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(channels_last(x))
        for block in self.down_blocks:
            h = block(h)
        h = self.mid_block(h)
        return norm_conv(self.conv_norm_out, self.conv_out, h)


class Decoder(nn.Module):
    def __init__(self, c: VAEConfig):
        super().__init__()
        ch, last = c.channels[::-1], len(c.channels) - 1
        self.conv_in = Conv2d(c.latent_channels, ch[0], 3, padding=1)
        self.mid_block = MidBlock(ch[0], c.groups)
        self.up_blocks = nn.ModuleList(
            UpBlock(ch[max(i - 1, 0)], ch[i], c.layers + 1, c.groups, last=i == last) for i in range(len(ch))
        )
        self.conv_norm_out = nn.GroupNorm(c.groups, ch[-1], eps=1e-6)
        self.conv_out = Conv2d(ch[-1], 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.mid_block(self.conv_in(channels_last(z)))
        for block in self.up_blocks:
            h = block(h)
        return norm_conv(self.conv_norm_out, self.conv_out, h)


class VAE(nn.Module):
    def __init__(self, config: VAEConfig):
        super().__init__()
        self.config = config
        latents = config.latent_channels
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = Conv2d(2 * latents, 2 * latents, 1)
        self.post_quant_conv = Conv2d(latents, latents, 1)

    def encode(self, image: Tensor) -> Gaussian:
        """image (B,3,h,w) in [-1,1], h and w multiples of the factor -> Gaussian of (B,4,h/f,w/f), not scaled.

        Pictures of more than `strips.WHOLE_UP_TO` pixels are encoded in strips: equal up to rounding, in less memory.
        Not where gradients are taken, which need all activations.
        """
        in_strips = self.in_strips(*image.shape[-2:]) and not self._takes_gradients(image)
        h = strips.encode(self.encoder, image, strips.wraps_rows(self)) if in_strips else self.encoder(image)
        mean, logvar = self.quant_conv(h).chunk(2, dim=1)  # (B,4,h/f,w/f) each
        return Gaussian(mean, (0.5 * logvar.clamp(-30.0, 20.0)).exp())

    def decode(self, z: Tensor) -> Tensor:
        """z (B,4,h,w), not scaled: the sampler's latents / `config.scaling_factor` -> (B,3,fh,fw), about [-1,1].

        In strips like `encode`.
        """
        height, width = (side * self.config.factor for side in z.shape[-2:])
        h = self.post_quant_conv(z)
        in_strips = self.in_strips(height, width) and not self._takes_gradients(z)
        return strips.decode(self.decoder, h, strips.wraps_rows(self)) if in_strips else self.decoder(h)

    def in_strips(self, height: int, width: int) -> bool:
        """Whether a picture of so many pixels is encoded and decoded in strips (unless gradients are taken)."""
        return height * width > strips.WHOLE_UP_TO

    def _takes_gradients(self, x: Tensor) -> bool:
        return torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in self.parameters()))
