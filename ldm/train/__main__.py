"""Train: a subject, a word, a folder of pictures, or the default model from scratch.

    ldm train dreambooth --instance-images DIR --instance-prompt "a photo of sks dog" --out dog.safetensors
    ldm train finetune   --images DIR --out mine.safetensors             pictures with captions
    ldm train embedding  --images DIR --word sks --out sks.safetensors   textual inversion
    ldm train plot RUN ...                                               the loss and the rate of runs, as a picture

    ldm train emoji      the default model, emoji-64: all of the following, in their order; needs npm, the extra "train"
    ldm train data       rebuild the pictures from their npm packages
    ldm train vae        train the VAE
    ldm train diffusion  train the UNet and the text encoder on the VAE's latents
    ldm train decoder    train the VAE's decoder on what a sampler leaves in the latents
    ldm train export     write what has been learnt so far as a diffusers folder
    ldm train evaluate   measure a model; draw its contact sheet and, where the logs are, the loss curves
    ldm train curves     the same scores by guidance, steps and clip skip, as a picture; not part of `emoji`

A training that was stopped (Ctrl-C, SIGTERM, or worse) goes on where it was when the same command is given again.
`torchrun --nproc-per-node 2 -m ldm.train ...` is the same command for two processes.
"""

import argparse
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_args

import torch

from ldm.pipeline import Pipeline
from ldm.samplers.schedule import Schedule
from ldm.train import processes, state
from ldm.train.curves import curves
from ldm.train.decoder import train_decoder
from ldm.train.diffusion import Nets, train_diffusion, vocabulary
from ldm.train.dreambooth import dreambooth, embedding, finetune
from ldm.train.emoji import build
from ldm.train.evaluate import contact_sheet, evaluate, sheet_prompts
from ldm.train.export import export
from ldm.train.objective import Objective
from ldm.train.plot import plot
from ldm.train.training import Training
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


def trained_pipeline(a: argparse.Namespace) -> Pipeline:
    """The nets with the averages of their weights, and the VAE as it was trained on pictures."""
    folder, vae = a.runs / "diffusion", vae_verb(a)
    vae.config = replace(CONFIG, scaling_factor=torch.load(folder / "latents.pt", weights_only=True)["scaling_factor"])
    nets = Nets()
    if (path := state.newest(folder)) is None:
        raise FileNotFoundError(f"{folder} has no state of a training: run `diffusion` first")
    nets.load_state_dict(state.part(state.read(path)[0], "ema"))
    nets.eval().requires_grad_(False)
    return Pipeline(nets.unet, vae, nets.text_encoder, vocabulary(folder), Schedule(), "v_prediction", size=64)


def decoder_verb(a: argparse.Namespace) -> Pipeline:
    """With the trained decoder; where its training has ended, that is only to load it."""
    pipe = trained_pipeline(a)
    train_decoder(a.data, pipe, a.runs / "decoder")
    return pipe


def export_verb(a: argparse.Namespace) -> None:
    pipe = decoder_verb(a)
    assert pipe.text_encoder is not None
    if processes.rank() == 0:
        export(pipe.unet, pipe.vae, pipe.text_encoder, a.runs / "diffusion" / "tokenizer", a.model)


def evaluate_verb(a: argparse.Namespace) -> None:
    processes.join()
    if processes.rank() > 0:
        return
    evaluate(a.model, a.data, count=a.count, guidance_scale=a.guidance_scale)
    sheet = a.model.parent / "sheet.png"
    contact_sheet(Pipeline.from_pretrained(a.model), sheet_prompts(a.data), sheet, a.guidance_scale)
    runs = {name: a.runs / name for name in ("vae", "diffusion", "decoder")}
    if all((run / "log.jsonl").exists() for run in runs.values()):
        plot(runs, a.model.parent / "loss.png")


def curves_verb(a: argparse.Namespace) -> None:
    curves(a.model, a.data, a.model.parent / "curves.png", guidance_scale=a.guidance_scale, steps=30)


PARTS: dict[str, Callable[[argparse.Namespace], Any]] = {
    "data": data_verb,
    "vae": vae_verb,
    "diffusion": diffusion_verb,
    "decoder": decoder_verb,
    "export": export_verb,
    "evaluate": evaluate_verb,
}


def trained(a: argparse.Namespace) -> Training:
    own = {name: getattr(a, name) for name in HELP if hasattr(a, name)}
    objective = Objective(**{f.name: own.pop(f.name) for f in fields(Objective) if f.name in own})
    if "," in own.get("targets", ""):
        own["targets"] = own["targets"].split(",")
    return Training(**own, sample_prompts=tuple(a.sample_prompts), objective=objective)


def dreambooth_verb(a: argparse.Namespace) -> None:
    dreambooth(
        a.model,
        a.instance_images,
        a.instance_prompt,
        a.out,
        trained(a),
        class_prompt=a.class_prompt,
        class_images=a.class_images,
        class_count=a.class_count,
        layout=a.layout,
    )


def finetune_verb(a: argparse.Namespace) -> None:
    finetune(a.model, a.images, a.out, trained(a), caption=a.caption, layout=a.layout)


def embedding_verb(a: argparse.Namespace) -> None:
    words = {"caption": a.caption, "vectors": a.vectors, "init_word": a.init_word}
    embedding(a.model, a.images, a.word, a.out, trained(a), **words, layout=a.layout)


def plot_verb(a: argparse.Namespace) -> None:
    names = [run.resolve().name for run in a.run]
    plot({name if names.count(name) == 1 else str(run): run for name, run in zip(names, a.run, strict=True)}, a.out)
    print(a.out)


# The options of `Training` and `Objective`, by their names.
HELP = {
    "steps": "of the training",
    "batch": "pictures a step (of the class as many more)",
    "accumulate": "take the batch in so many parts, one after the other",
    "learning_rate": "default 2e-6 for whole nets, 1e-4 for LoRA, 5e-4 for a word",
    "schedule": "of the rate: constant, linear, cosine",
    "warmup": "steps in which the rate rises",
    "rank": "train a LoRA of this rank",
    "alpha": "of the LoRA (default: its rank)",
    "targets": "its modules: attention, all-linear, conv, or ends of names: to_q,to_k",
    "text_encoder": "train the text encoder, too",
    "resolution": "side in pixels (default: the model's own)",
    "bucketed": "keep the pictures' shapes, about (aspect-ratio buckets)",
    "clip_skip": "as in generate",
    "prediction_type": "epsilon or v_prediction, where the model does not say",
    "zero_snr": "a schedule that ends in noise alone, for v prediction",
    "ema_decay": "save an average of the weights, 0.999",
    "autocast": "bfloat16 where that is safe",
    "checkpointing": "less memory, a third more time",
    "shard": "divide the weights among torchrun's processes (FSDP)",
    "seed": "of all random numbers",
    "sample_every": "draw --sample-prompt every so many steps",
    "tensorboard": "write its curves, too (pip install tensorboard)",
    "save_minutes": "between states",
    "save_steps": "between states, too",
    "keep": "so many states",
    "min_snr": "gamma of min-SNR weighting, 5",
    "offset_noise": "0.1 for dark and bright pictures",
    "input_noise": "perturb what the net is shown, 0.1",
    "prior_weight": "of the class's pictures",
    "caption_dropout": "share of captions that are left out",
}


OF_NETS = ("rank", "alpha", "targets", "text_encoder", "zero_snr", "shard")


def training_arguments(p: argparse.ArgumentParser, without: Sequence[str] = (), **defaults: Any) -> None:
    """All of HELP but some."""
    p.add_argument("--model", help="as in generate (default: the model that ships with ldm)")
    p.add_argument("--out", type=Path, required=True, help="a .safetensors file, or a diffusers folder")
    p.add_argument("--sample-prompt", dest="sample_prompts", nargs="+", default=(), metavar="TEXT", help="to draw")
    for option in (f for kind in (Training, Objective) for f in fields(kind) if f.name in HELP):
        if option.name in without:
            continue
        flag, text = f"--{option.name.replace('_', '-')}", HELP[option.name]
        default = defaults.get(option.name, option.default)
        if isinstance(default, bool):
            p.add_argument(flag, action=argparse.BooleanOptionalAction, default=default, help=text)
            continue
        kinds = [kind for kind in (int, float, str) if kind in (option.type, *get_args(option.type))]
        shown = "" if default is None else f" (default {default})"
        p.add_argument(flag, type=kinds[0], default=default, metavar=flag[2].upper(), help=text + shown)


def parser() -> argparse.ArgumentParser:
    about = {"description": __doc__, "formatter_class": argparse.RawDescriptionHelpFormatter}
    p = argparse.ArgumentParser(prog="ldm train", **about)  # type: ignore[arg-type]
    verbs = p.add_subparsers(metavar="VERB", required=True, dest="verb")

    one = verbs.add_parser("dreambooth", help="teach a model a subject from some five pictures of it")
    one.add_argument("--instance-images", type=Path, required=True, metavar="DIR", help="some five pictures")
    one.add_argument("--instance-prompt", required=True, metavar="TEXT", help='"a photo of sks dog"')
    one.add_argument("--class-prompt", metavar="TEXT", help='"a photo of a dog": do not forget the others')
    one.add_argument("--class-images", type=Path, metavar="DIR", help="pictures of them; filled up by the model")
    one.add_argument("--class-count", type=int, default=200, metavar="N", help="how many (default %(default)s)")
    one.add_argument("--layout", choices=["kohya", "peft"], default="kohya", help="of a LoRA (default %(default)s)")
    training_arguments(one)
    one.set_defaults(function=dreambooth_verb)

    many = verbs.add_parser("finetune", help="train a model on a folder of pictures with captions")
    many.add_argument("--images", type=Path, required=True, metavar="DIR", help="with .txt files or metadata.jsonl")
    many.add_argument("--caption", metavar="TEXT", help="of pictures without one")
    many.add_argument("--layout", choices=["kohya", "peft"], default="kohya", help="of a LoRA (default %(default)s)")
    training_arguments(many, without=["prior_weight"])
    many.set_defaults(function=finetune_verb)

    word = verbs.add_parser("embedding", help="find the vectors of a new word (textual inversion)")
    word.add_argument("--images", type=Path, required=True, metavar="DIR", help="some five pictures")
    word.add_argument("--word", required=True, help="that shall mean them")
    word.add_argument("--caption", default="a photo of {word}", metavar="TEXT", help="default %(default)s")
    word.add_argument("--vectors", type=int, default=1, metavar="N", help="tokens of the word (default %(default)s)")
    word.add_argument("--init-word", metavar="WORD", help="a word that comes near")
    word.add_argument("--layout", choices=["diffusers", "webui"], default="diffusers", help="default %(default)s")
    training_arguments(word, without=["prior_weight", *OF_NETS], steps=3000)
    word.set_defaults(function=embedding_verb)

    logs = verbs.add_parser("plot", help="draw the logs and the newest samples of runs")
    logs.add_argument("run", type=Path, nargs="+", metavar="RUN", help="folders with a log.jsonl")
    logs.add_argument("--out", type=Path, default=Path("runs.png"), help="default %(default)s")
    logs.set_defaults(function=plot_verb)

    for verb in ["emoji", *PARTS, "curves"]:
        part = verbs.add_parser(verb, help="of the default model, see above")
        part.add_argument("--data", type=Path, default=Path("runs/emoji64.npz"), help="default %(default)s")
        part.add_argument("--runs", type=Path, default=Path("runs"), help="states and logs (default %(default)s)")
        part.add_argument("--model", type=Path, default=Path("weights/emoji-64"), help="default %(default)s")
        part.add_argument("--steps", type=int, default=16_000, help="of the diffusion, 64 pictures each")
        part.add_argument("--count", type=int, help="prompts of each kind to measure (default: all)")
        part.add_argument("--guidance-scale", type=float, default=2.0, help="to measure with (default %(default)s)")
        part.set_defaults(function=curves_verb if verb == "curves" else emoji_verb)
    return p


def emoji_verb(a: argparse.Namespace) -> None:
    for verb in PARTS if a.verb == "emoji" else [a.verb]:
        PARTS[verb](a)


def interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def main(argv: list[str] | None = None) -> None:
    a = parser().parse_args(argv)
    # Loading, drawing and writing end at once; the steps of a training have handlers of their own.
    handlers = {s: signal.signal(s, interrupt) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        a.function(a)
    except KeyboardInterrupt as stop:
        if processes.rank() == 0:
            print(str(stop) or "stopped; what was computed is kept, the same command goes on", file=sys.stderr)
        sys.exit(130)
    except (ValueError, FloatingPointError, OSError) as error:
        sys.exit(f"ldm train: error: {error}")
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    main()
