"""Train the default model, emoji-64. `emoji` does all of it; the other verbs are its parts, in their order.

    python -m ldm.train emoji       everything below, two and a half hours on two cores; needs npm, the extra "train"
    python -m ldm.train data        rebuild the pictures from their npm packages
    python -m ldm.train vae         train the VAE
    python -m ldm.train diffusion   train the UNet and the text encoder on the VAE's latents
    python -m ldm.train export      write what has been learnt so far as a diffusers folder
    python -m ldm.train evaluate    measure a model; draw its contact sheet and, where the logs are, the loss curves

A training that was stopped (Ctrl-C, SIGTERM, or worse) goes on where it was when the same command is given again.
`torchrun --nproc-per-node 2 -m ldm.train ...` is the same command for two processes.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import torch

from ldm.pipeline import Pipeline
from ldm.train import processes, state
from ldm.train.diffusion import Nets, train_diffusion
from ldm.train.emoji import build
from ldm.train.evaluate import contact_sheet, evaluate, plot_loss, sheet_prompts
from ldm.train.export import export
from ldm.train.vae import CONFIG, train_vae
from ldm.vae import VAE


def data_verb(a: argparse.Namespace) -> None:
    with processes.first():
        if not a.data.exists():
            build(a.data, a.runs / "packages")


def vae_verb(a: argparse.Namespace) -> VAE:
    """The trained VAE; where its training has ended, that is only to load it."""
    return train_vae(a.data, a.runs / "vae").eval().requires_grad_(False)


def diffusion_verb(a: argparse.Namespace) -> None:
    train_diffusion(a.data, vae_verb(a), a.runs / "diffusion", steps=a.steps)


def export_verb(a: argparse.Namespace) -> None:
    folder, vae = a.runs / "diffusion", vae_verb(a)
    vae.config = replace(CONFIG, scaling_factor=torch.load(folder / "latents.pt", weights_only=True)["scaling_factor"])
    nets = Nets()
    if (path := state.newest(folder)) is None:
        raise FileNotFoundError(f"{folder} has no state of a training: run `diffusion` first")
    nets.load_state_dict(state.part(state.read(path)[0], "ema"))
    if processes.rank() == 0:
        export(nets.unet, vae, nets.text_encoder, folder / "tokenizer", a.model)


def evaluate_verb(a: argparse.Namespace) -> None:
    processes.join()
    if processes.rank() > 0:
        return
    evaluate(a.model, a.data)
    contact_sheet(Pipeline.from_pretrained(a.model), sheet_prompts(a.data), a.model.parent / "sheet.png")
    logs = {name: a.runs / name / "log.jsonl" for name in ("vae", "diffusion")}
    if all(log.exists() for log in logs.values()):
        plot_loss(logs, a.model.parent / "loss.png")


PARTS = {
    "data": data_verb,
    "vae": vae_verb,
    "diffusion": diffusion_verb,
    "export": export_verb,
    "evaluate": evaluate_verb,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m ldm.train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("verb", choices=["emoji", *PARTS])
    parser.add_argument("--data", type=Path, default=Path("runs/emoji64.npz"), help="default %(default)s")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="states and logs (default %(default)s)")
    parser.add_argument("--model", type=Path, default=Path("weights/emoji-64"), help="default %(default)s")
    parser.add_argument("--steps", type=int, default=7_000, help="of the diffusion, 64 pictures each")
    a = parser.parse_args()
    try:
        for verb in PARTS if a.verb == "emoji" else [a.verb]:
            PARTS[verb](a)
    except KeyboardInterrupt as stop:
        if processes.rank() == 0:
            print(stop, file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
