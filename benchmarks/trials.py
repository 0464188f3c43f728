"""What the default model's diffusion gains by its parametrisation, weights' averages and sizes: short trainings.

    python -m benchmarks.trials            an hour, after `python -m ldm.train emoji` or at least its stage `data`

Each is the training of `ldm.train.diffusion` with one thing changed, for so many steps at the full rate, from the same
seed, on the same pictures, captions, timesteps and noise; the text encoder has had the same short lesson. Printed is
the mean squared error of x0 in scaled latents (of the mean picture: about 0.47), on captions that were trained on and
on held-out pairs: at t = 999, where words alone say what is drawn, down to t = 100, where details are. What is done
stays in --runs and is not done again.
"""

import argparse
import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ldm.pipeline import Pipeline
from ldm.samplers.schedule import Schedule, zero_terminal_snr
from ldm.train import captions, data, diffusion
from ldm.train.gradients import Gradients
from ldm.train.loop import Run, learning_rate, muon_and_adamw
from ldm.train.text import train_text

BATCH, LR, COUNT = 64, 2e-3, 256
AT = (999, 700, 400, 100)


def plain_caption(meta: dict, generator: torch.Generator) -> str:
    """One form alone, "{label}, {style} style"; "" for one in ten, as in the mix."""
    return "" if int(torch.randint(10, (), generator=generator)) == 0 else captions.caption(meta)


TRIALS: dict[str, dict[str, Any]] = {
    "as trained: v, min-SNR 5": {},
    "epsilon": {"predict": "epsilon"},
    "v, zero terminal SNR": {"zero_snr": True},
    "text encoder of 2 layers": {"text": replace(diffusion.TEXT, layers=2)},
    "UNet of 64/96/160 channels": {"unet": replace(diffusion.UNET, channels=(64, 96, 160))},
    "without min-SNR": {"gamma": 1e9},
    "captions of one form": {"draw_caption": plain_caption},
}


def x0_of(out: Tensor, x: Tensor, a: Tensor, predict: str) -> Tensor:
    return a.sqrt() * x - (1 - a).sqrt() * out if predict == "v" else (x - (1 - a).sqrt() * out) / a.sqrt()


@torch.no_grad()
def errors(nets: diffusion.Nets, rows: tuple[Tensor, Tensor], alphas: Tensor, predict: str) -> list[float]:
    """Of x0 from the same noise, at as much of it as the plain schedule has at each of AT."""
    z, ids = rows
    found = []
    noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(1))
    context = nets.text_encoder(ids).context
    for at in AT:
        t = int((alphas - Schedule().alphas_cumprod[at]).abs().argmin())
        a = alphas[t]
        x = a.sqrt() * z + (1 - a).sqrt() * noise
        parts = zip(x.split(BATCH), context.split(BATCH), strict=True)
        out = torch.cat([nets.unet(part, torch.full((len(part),), t), words) for part, words in parts])
        found.append((x0_of(out, x, a, predict) - z).square().mean().item())
    return found


def trial(
    how: Mapping[str, Any], lesson: Path, steps: int, training: tuple, kinds: Mapping[str, tuple[Tensor, Tensor]]
) -> dict[str, list[float]]:
    meta, latents, tokenizer = training
    predict, gamma = how.get("predict", "v"), how.get("gamma", 5.0)
    draw_caption = how.get("draw_caption", captions.draw_caption)
    alphas = Schedule().alphas_cumprod.float()
    if how.get("zero_snr"):
        alphas = zero_terminal_snr(alphas)
    torch.manual_seed(0)
    nets = diffusion.Nets(how.get("unet", diffusion.UNET), how.get("text", diffusion.TEXT))
    diffusion.initialise(nets)
    white = latents["scaling_factor"] * latents["mean"][: len(meta)].float()
    train_text(nets.text_encoder, tokenizer, meta, white, lesson, steps=300)
    run = Run(nets, muon_and_adamw(nets, LR), lesson, 0.999)
    gradients = Gradients(nets, run.parameters, 1, 0)
    with patch.object(captions, "draw_caption", draw_caption):
        for step in range(steps):
            z, texts, noise, t = diffusion.draw_batch(meta, latents, BATCH, 0, step)
            a = alphas[t][:, None, None, None]
            x = a.sqrt() * z + (1 - a).sqrt() * noise
            target = noise if predict == "epsilon" else a.sqrt() * noise - (1 - a).sqrt() * z
            weight = torch.ones(BATCH) if predict == "epsilon" else diffusion.loss_weight(alphas[t], gamma)
            run.take_step((x, t, tokenizer(texts), target, weight), gradients, learning_rate(step, 10**9, 200))
    gradients.close()
    found = {}
    for weights in ("raw", "averaged"):
        if weights == "averaged":
            for name, parameter in nets.named_parameters():
                parameter.data.copy_(run.ema[name])
        found |= {f"{kind}, {weights}": errors(nets, rows, alphas, predict) for kind, rows in kinds.items()}
    return found | {"parameters": [sum(p.numel() for p in nets.parameters())]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("runs/emoji64.npz"))
    parser.add_argument("--runs", type=Path, default=Path("runs/trials"))
    parser.add_argument("--steps", type=int, default=500)
    args = parser.parse_args()
    args.runs.mkdir(parents=True, exist_ok=True)
    pipe = Pipeline.from_pretrained()
    tokenizer, vae = pipe.tokenizer, pipe.vae
    if not (args.runs / "latents.pt").exists():
        diffusion.save_whole(args.runs / "latents.pt", diffusion.compute_latents(vae, args.data))
    latents = torch.load(args.runs / "latents.pt", weights_only=True)
    rgba, everything = data.load(args.data)
    meta = [m for m in everything if m["split"] == "train"]
    rows = {}
    for kind, split in (("trained on", "train"), ("held out", "test_pair")):
        own = [i for i, m in enumerate(everything) if m["split"] == split]
        own = [own[i] for i in torch.randperm(len(own), generator=torch.Generator().manual_seed(0))[:COUNT]]
        with torch.no_grad():
            z = latents["scaling_factor"] * vae.encode(data.to_tensor(data.composite(rgba[own]))).mean
        rows[kind] = z, tokenizer([captions.caption(everything[i]) for i in own])
    print(f"| {args.steps} steps | weights | parameters | " + " | ".join(f"{k}, {t}" for k in rows for t in AT) + " |")
    print("|---|---|---|" + "---|" * len(rows) * len(AT), flush=True)
    for name, how in TRIALS.items():
        file = args.runs / f"{re.sub('[^a-z0-9]+', '-', name.lower())}-{args.steps}.json"
        if not file.exists():
            with sdpa_kernel(SDPBackend.MATH):
                lesson = args.runs / ("lesson-2" if "text" in how else "lesson-4")
                file.write_text(json.dumps(trial(how, lesson, args.steps, (meta, latents, tokenizer), rows)))
        found = json.loads(file.read_text())
        for weights in ("raw", "averaged"):
            numbers = [f"{n:.4f}" for kind in rows for n in found[f"{kind}, {weights}"]]
            print(f"| {name} | {weights} | {found['parameters'][0] / 1e6:.1f} M | {' | '.join(numbers)} |", flush=True)


if __name__ == "__main__":
    main()
