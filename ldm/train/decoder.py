"""Teach the default model's decoder what a sampler leaves in its latents.

`python -m ldm.train decoder`, after `diffusion`. The VAE was trained on latents of pictures. Those that come out of a
sampler are a little beside: where a picture is flat, they are not. So pictures are noised in part and drawn to their
end again under their own captions, and the decoder learns to make the pictures of what comes back. The encoder, and
with it what latents mean, stays; some of each batch are latents of pictures, as before.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from ldm.conditioning import denoiser
from ldm.pipeline import Pipeline
from ldm.run import no_noise
from ldm.samplers.euler import euler
from ldm.settings import Settings
from ldm.train import captions, data, processes
from ldm.train.diffusion import save_whole
from ldm.train.loop import batch_indices, muon_and_adamw, step_generator, train
from ldm.train.vae import cut_at_white, reconstruction
from ldm.vae import VAE

STEPS = 12
LAST = (2, 4, 6, 8)  # of these, in turn, a batch each: from t = 84 to 584
COLOURED = 8  # every so many batches one is on a coloured ground
LEVEL = 2 / 255  # a grey level of pictures in [-1,1]


@torch.no_grad()
def drawn_again(pipe: Pipeline, file: Path, guidance_scale: float, batch: int = 64) -> dict[str, Tensor]:
    """The training pictures' latents in the VAE's own scale: `mean` and `std` of each, and `drawn` (n,4,16,16); and the
    `ground` (n,1,1,3) that each stood on."""
    rgba, meta = data.load(file)
    train = [i for i, m in enumerate(meta) if m["split"] == "train"]
    names = [name for name in data.BACKGROUNDS if name != "white"]
    found: dict[str, list[Tensor]] = {"mean": [], "std": [], "drawn": [], "ground": []}
    for number, start in enumerate(range(0, len(train), batch)):
        rows = train[start : start + batch]
        count, rest = divmod(number, COLOURED)
        colour = "white" if rest < COLOURED - 1 else names[count % len(names)]
        mean, std = pipe.vae.encode(data.to_tensor(data.composite(rgba[rows], data.BACKGROUNDS[colour])))
        z = pipe.vae.config.scaling_factor * mean  # (B,4,16,16)
        sigmas = pipe.schedule.sigmas(STEPS, "leading")[-1 - LAST[number % len(LAST)] :]
        x = z + sigmas[0] * torch.randn(z.shape, generator=step_generator(0, number))
        texts = [captions.on_background(captions.caption(meta[i]), colour) for i in rows]
        words = Settings(texts, guidance_scale=guidance_scale)
        denoise = denoiser(pipe, words, (pipe.size, pipe.size), (False, False), None)
        for step in euler(denoise, x, sigmas, no_noise):
            x = step.x
        for name, value in (("mean", mean), ("std", std), ("drawn", x / pipe.vae.config.scaling_factor)):
            found[name].append(value.half())
        found["ground"].append(torch.tensor(data.BACKGROUNDS[colour], dtype=torch.uint8).expand(len(rows), 1, 1, 3))
    return {name: torch.cat(values) for name, values in found.items()}


def sparse(out: Tensor, image: Tensor) -> Tensor:
    """The mean of log(1 + |error| / LEVEL) over pixels, and three times that over differences between neighbours.

    A log-sum (Candes, Wakin & Boyd 2008) would rather have most errors at 0 and a few large than all of them small: of
    latents that leave it open, the decoder makes one colour or the other and not their mean, an area that is flat to
    the grey level, an edge here or there but sharp.
    """
    out = cut_at_white(out, image)
    errors = [(3.0, out.diff(dim=axis) - image.diff(dim=axis)) for axis in (2, 3)]
    losses = [weight * torch.log1p(error.abs() / LEVEL).mean() for weight, error in [(1.0, out - image), *errors]]
    return torch.stack(losses).sum()


class Objective(nn.Module):
    """The reconstruction's loss, and a tenth of `sparse`."""

    def __init__(self, vae: VAE):
        super().__init__()
        self.post_quant_conv, self.decoder = vae.post_quant_conv, vae.decoder

    def forward(self, z: Tensor, image: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            out = self.decoder(self.post_quant_conv(z)).float()
        return reconstruction(out, image) + 0.1 * sparse(out, image)


def train_decoder(
    file: Path,
    pipe: Pipeline,
    folder: Path,
    *,
    guidance_scale: float = 3.0,
    steps: int = 2000,
    batch: int = 32,
    lr: float = 1e-3,
    seed: int = 0,
) -> VAE:
    """`pipe`'s VAE with another decoder. `folder` keeps the latents from an earlier start."""
    with processes.first():
        if not (folder / "latents.pt").exists():
            folder.mkdir(parents=True, exist_ok=True)
            save_whole(folder / "latents.pt", drawn_again(pipe, file, guidance_scale))
    found = torch.load(folder / "latents.pt", weights_only=True)
    rgba, meta = data.load(file)
    rgba = rgba[[m["split"] == "train" for m in meta]]

    def batch_of(step: int) -> tuple[Tensor, Tensor]:
        generator = step_generator(seed, step)
        rows = batch_indices(len(rgba), batch, seed, step)
        own = found["mean"][rows].float()
        own = own + found["std"][rows].float() * torch.randn(own.shape, generator=generator)
        drawn = torch.rand(batch, 1, 1, 1, generator=generator) < 0.7
        z = torch.where(drawn, found["drawn"][rows].float(), own)
        return z, data.to_tensor(data.composite(rgba[rows.numpy()], found["ground"][rows].numpy()))

    pipe.vae.decoder.requires_grad_(True)
    pipe.vae.post_quant_conv.requires_grad_(True)
    torch.manual_seed(seed)
    objective = Objective(pipe.vae)
    settings = dict(batch=batch, seed=seed, guidance_scale=guidance_scale)
    train(objective, batch_of, muon_and_adamw(objective, lr), folder, steps=steps, settings=settings)
    return pipe.vae.requires_grad_(False)
