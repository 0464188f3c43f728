"""Train the default model: `python -m ldm.train emoji` does all of it, the other verbs are its parts.

    python -m ldm.train data --data emoji64.npz                     rebuild the pictures from their packages
    python -m ldm.train vae --data emoji64.npz --runs runs          train the VAE
    python -m ldm.train diffusion --data emoji64.npz --runs runs    train the UNet and the text encoder
    python -m ldm.train export --runs runs --out weights/emoji-64   write what has been learnt so far
    python -m ldm.train evaluate --data emoji64.npz                 measure the default model

A training that was stopped goes on where it was when the same command is given again.
"""

import argparse
from pathlib import Path

import torch

from ldm.clip import TextEncoder
from ldm.train.diffusion import TEXT, UNET, train_diffusion
from ldm.train.export import export
from ldm.train.vae import CONFIG, train_vae
from ldm.unet import UNet
from ldm.vae import VAE


def load_vae(runs: Path) -> VAE:
    vae = VAE(CONFIG)
    vae.load_state_dict(torch.load(runs / "vae" / "state.pt", weights_only=True)["ema"])
    return vae.eval().requires_grad_(False)


def export_runs(runs: Path, out: Path) -> None:
    from dataclasses import replace

    folder = runs / "diffusion"
    vae = load_vae(runs)
    vae.config = replace(CONFIG, scaling_factor=torch.load(folder / "latents.pt", weights_only=True)["scaling_factor"])
    nets = torch.nn.ModuleDict(dict(unet=UNet(UNET), text_encoder=TextEncoder(TEXT)))
    nets.load_state_dict(torch.load(folder / "state.pt", weights_only=True)["ema"])
    export(nets["unet"], vae, nets["text_encoder"], folder / "tokenizer", out)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m ldm.train", description=__doc__)
    parser.add_argument("verb", choices=["emoji", "data", "vae", "diffusion", "export", "evaluate"])
    parser.add_argument("--data", type=Path, default=Path("runs/emoji64.npz"))
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--out", type=Path, default=Path("weights/emoji-64"))
    parser.add_argument("--steps", type=int)
    a = parser.parse_args()
    steps = {} if a.steps is None else {"steps": a.steps}
    if a.verb in ("emoji", "data") and not a.data.exists():
        from ldm.train.emoji import build

        build(a.data, a.data.parent / "packages")
    if a.verb in ("emoji", "vae"):
        train_vae(a.data, a.runs / "vae", **steps)
    if a.verb in ("emoji", "diffusion"):
        train_diffusion(a.data, load_vae(a.runs), a.runs / "diffusion", **steps)
    if a.verb in ("emoji", "export"):
        export_runs(a.runs, a.out)


if __name__ == "__main__":
    main()
