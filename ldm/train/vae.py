"""Train the default model's VAE: 20 epochs over the training pictures, an hour on two cores.

python -m ldm.train vae

reads runs/emoji64.npz (--data) and writes into runs/vae (--runs).
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.train import data
from ldm.train.loop import batch_indices, muon_and_adamw, step_generator, train
from ldm.vae import VAE, VAEConfig

CONFIG = VAEConfig(channels=(32, 64, 128), layers=1, groups=8, scaling_factor=1.0)  # the factor is measured afterwards


def cut_at_white(out: Tensor, image: Tensor) -> Tensor:
    """Beyond white is white: where a picture is at an end of the range, the net may be past it."""
    return torch.where(image.abs() == 1, out.clamp(-1, 1), out)


def reconstruction(out: Tensor, image: Tensor) -> Tensor:
    """L1 + 2 MSE + 2 L1 of the differences between neighbours.

    The differences keep flat areas flat (after Mathieu et al. 2016): the eye, and the judge of styles, see a texture of
    one grey level.
    """
    out = cut_at_white(out, image)
    differences = sum(F.l1_loss(out.diff(dim=axis), image.diff(dim=axis)) for axis in (2, 3))
    return F.l1_loss(out, image) + 2 * F.mse_loss(out, image) + 2 * differences


class Objective(nn.Module):
    """The reconstruction's loss + 1e-4 KL per latent value."""

    def __init__(self, vae: VAE):
        super().__init__()
        self.vae = vae

    def forward(self, image: Tensor, noise: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            mean, std = self.vae.encode(image)
            mean, std = mean.float(), std.float()
            out = self.vae.decode(mean + std * noise).float()
        kl = 0.5 * (mean**2 + std**2 - 1).mean() - std.log().mean()
        return reconstruction(out, image) + 1e-4 * kl


def train_vae(file: Path, folder: Path, *, steps: int = 4000, batch: int = 32, lr: float = 2e-3, seed: int = 0) -> VAE:
    """A third of the pictures stands on a coloured ground, the rest on white."""
    rgba, meta = data.load(file)
    rgba = rgba[[m["split"] == "train" for m in meta]]
    colours = list(data.BACKGROUNDS.values())

    def batch_of(step: int) -> tuple[Tensor, Tensor]:
        generator = step_generator(seed, step)
        rows = rgba[batch_indices(len(rgba), batch, seed, step).numpy()]
        third = batch // 3
        colour = colours[int(torch.randint(len(colours), (), generator=generator))]
        pixels = np.concatenate([data.composite(rows[:third], colour), data.composite(rows[third:])])
        image = data.to_tensor(pixels)
        side = image.shape[-1] // CONFIG.factor
        return image, torch.randn(batch, CONFIG.latent_channels, side, side, generator=generator)

    torch.manual_seed(seed)
    objective, settings = Objective(VAE(CONFIG)), dict(batch=batch, seed=seed)
    return train(objective, batch_of, muon_and_adamw(objective, lr), folder, steps=steps, settings=settings).vae
