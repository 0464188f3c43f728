"""Train the default model's VAE: 8 epochs over the training pictures, half an hour on two cores.

python -m ldm.train vae

reads runs/emoji64.npz (--data) and writes into runs/vae (--runs).
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from ldm.train import data
from ldm.train.loop import adamw, batch_indices, step_generator, train
from ldm.vae import VAE, VAEConfig

CONFIG = VAEConfig(channels=(32, 64, 128), layers=1, groups=8, scaling_factor=1.0)  # the factor is measured afterwards


def train_vae(file: Path, folder: Path, *, steps: int = 2000, batch: int = 32, lr: float = 2e-3, seed: int = 0) -> VAE:
    """L1 + 2 MSE + 1e-4 KL per latent value. A third of the pictures stands on a coloured ground, the rest on white."""
    rgba, meta = data.load(file)
    rgba = rgba[[m["split"] == "train" for m in meta]]
    colours = list(data.BACKGROUNDS.values())
    torch.manual_seed(seed)
    vae = VAE(CONFIG)

    def batch_of(step: int) -> tuple[torch.Tensor, torch.Tensor]:
        generator = step_generator(seed, step)
        rows = rgba[batch_indices(len(rgba), batch, seed, step).numpy()]
        third = batch // 3
        colour = colours[int(torch.randint(len(colours), (), generator=generator))]
        pixels = np.concatenate([data.composite(rows[:third], colour), data.composite(rows[third:])])
        image = data.to_tensor(pixels)
        side = image.shape[-1] // CONFIG.factor
        return image, torch.randn(batch, CONFIG.latent_channels, side, side, generator=generator)

    def loss_of(image: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            mean, std = vae.encode(image)
            mean, std = mean.float(), std.float()
            out = vae.decode(mean + std * noise).float()
        kl = 0.5 * (mean**2 + std**2 - 1).mean() - std.log().mean()
        return F.l1_loss(out, image) + 2 * F.mse_loss(out, image) + 1e-4 * kl

    return train(vae, batch_of, loss_of, [adamw(list(vae.parameters()), lr)], folder, steps=steps)
