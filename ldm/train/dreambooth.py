"""DreamBooth (Ruiz et al. 2023), fine-tuning on a folder, their LoRA kinds, textual inversion: from a model and
pictures to a file.

    dreambooth("sd15.safetensors", "my-dog", "a photo of sks dog", "sks.safetensors", class_prompt="a photo of a dog")
    finetune("sd15.safetensors", "pictures-with-captions", "mine.safetensors", Training(steps=5000, rank=16))

A folder beside the result, its name with `.run`, has the states, the log and what was computed beforehand: the same
call goes on where it was stopped. Whole nets are saved in the dtype that the model's file has.
"""

import itertools
import os
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.optim import AdamW
from tqdm import tqdm

from ldm import hub
from ldm.clip import TextEncoder
from ldm.convert import convert
from ldm.image import save
from ldm.pipeline import DEFAULT_MODEL, Pipeline
from ldm.train import processes
from ldm.train.adapters import add_lora, save_lora
from ldm.train.batches import Batches
from ldm.train.caches import digest, fingerprint
from ldm.train.embedding import Embedding, save_embedding
from ldm.train.loop import train
from ldm.train.objective import Diffusion, blocks, check_target, unread
from ldm.train.pictures import Folder, open_folder
from ldm.train.training import Training
from ldm.train.watch import both, grids, tensorboard
from ldm.unet import UNet

SUBJECT, WORD = Training(), Training(steps=3000)
ENCODERS = ("text_encoder", "text_encoder_2")
LAYOUTS = {"whole nets": ("kohya",), "a LoRA": ("kohya", "peft"), "an embedding": ("diffusers", "webui")}
RATES = {"whole nets": 2e-6, "a LoRA": 1e-4, "an embedding": 5e-4}
ZERO_SNR = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
# What may be another when a run goes on: the loop has its own rule for the rates.
FREE = (
    *("steps", "schedule", "warmup", "sample_prompts", "sample_every", "tensorboard", "checkpointing", "shard"),
    *("save_minutes", "save_steps", "keep"),
)


def dreambooth(
    model: str | Path | None,
    instance_images: str | Path,
    instance_prompt: str,
    out: str | Path,
    training: Training = SUBJECT,
    *,
    class_prompt: str | None = None,
    class_images: str | Path | None = None,
    class_count: int = 200,
    layout: Literal["kohya", "peft"] = "kohya",
) -> None:
    """Teach `model` (as in `Pipeline.from_pretrained`) the subject of some five pictures, under the instance prompt.

    class_prompt: what it is one of. Then as many pictures of the class as of the subject are in each batch, so that the
    class is not forgotten (prior preservation); the folder class_images is filled up to `class_count` with pictures
    that the model makes of it, which are kept. Without it: the subject alone.
    out: a name that ends in .safetensors is a single file, any other a diffusers folder; with `rank` a LoRA, in kohya's
    or PEFT's `layout`. Raises ValueError for folders without pictures and options that cannot be, FileExistsError where
    `out` is.
    """
    if not instance_prompt.strip():
        raise ValueError(
            "the instance prompt is empty: give the words that shall mean the subject, 'a photo of sks dog'"
        )
    if class_prompt is None and class_images is not None:
        raise ValueError(f"class_images={str(class_images)!r} without a class_prompt: say what they show")
    if class_prompt is not None and training.bucketed:
        raise ValueError("bucketed with a class_prompt: subject and class share their batches, leave one of them out")
    if class_count < 1:
        raise ValueError(f"class_count={class_count}: give at least 1")
    run = Run(model, out, training, layout)
    folders = [run.open(instance_images, instance_prompt)]
    if class_prompt is not None:
        words = digest(class_prompt, str(run.side), run.fingerprints["unet"])[:8]  # another class, another folder
        folder = Path(class_images or run.folder / f"class-{words}")
        with processes.first():
            fill(run, folder, class_prompt, class_count)
        folders.append(run.open(folder, class_prompt))
    run.train(folders)


def finetune(
    model: str | Path | None,
    images: str | Path,
    out: str | Path,
    training: Training = SUBJECT,
    *,
    caption: str | None = None,
    layout: Literal["kohya", "peft"] = "kohya",
) -> None:
    """Train `model` on a folder of pictures and captions (`ldm.train.pictures.open_folder`). Else as `dreambooth`."""
    run = Run(model, out, training, layout)
    run.train([run.open(images, caption)])


def embedding(
    model: str | Path | None,
    images: str | Path,
    word: str,
    out: str | Path,
    training: Training = WORD,
    *,
    caption: str = "a photo of {word}",
    vectors: int = 1,
    init_word: str | None = None,
    layout: Literal["diffusers", "webui"] = "diffusers",
) -> None:
    """Textual inversion (Gal et al. 2022, who take some 5,000 steps): find the vectors of a new word, nothing else.

    caption: what the pictures are, with {word} or the word itself in it; those of the folder's own, if they have any,
    likewise. vectors, init_word: as in `ldm.train.embedding.Embedding`; layout: as in `save_embedding`. Else as
    `dreambooth`; the text encoders are always run, and never changed.
    """
    if training.rank is not None or training.shard or training.zero_snr:
        raise ValueError("rank, shard and zero_snr are of nets: a word has vectors alone, leave them out")
    run = Run(model, out, replace(training, text_encoder=True), layout, (word, vectors, init_word))
    folder = run.open(images, caption)
    pictures = [picture._replace(caption=picture.caption.replace("{word}", word)) for picture in folder.pictures]
    if silent := [picture for picture in pictures if word not in picture.caption]:
        raise ValueError(
            f"{len(silent)} captions do not have the word: write {{word}} where it stands, 'a photo of {{word}}'. The"
            f" first: {silent[0].file.name}, {silent[0].caption!r}"
        )
    run.train([replace(folder, pictures=pictures)])


class Run:
    """One training: a model, what is trained of it, and where the result goes."""

    def __init__(
        self,
        model: str | Path | None,
        out: str | Path,
        training: Training,
        layout: str,
        word: tuple[str, int, str | None] | None = None,
    ):
        processes.join()
        if training.shard and processes.count() == 1:
            raise ValueError("shard=True divides the weights among processes: start it with torchrun, or leave it out")
        self.training, self.layout, self.word = training, layout, word
        kind = "whole nets" if word is None and training.rank is None else "a LoRA" if word is None else "an embedding"
        layouts = LAYOUTS[kind]
        if layout not in layouts:
            raise ValueError(f"layout={layout!r}: that of {kind} is {' or '.join(map(repr, layouts))}")
        self.out = free(Path(out), kind)
        self.folder = self.out.with_name(f"{self.out.name}.run")
        self.source = DEFAULT_MODEL if model is None else Path(model)
        if model is not None and hub.is_name(model):
            self.source = hub.fetch_model(model, None, None, True)
        self.pipe = pipe = Pipeline.from_pretrained(self.source, prediction_type=training.prediction_type)
        self.side = training.resolution or pipe.size
        check_trainable(pipe, model)
        if training.zero_snr:
            pipe.schedule = pipe.schedule.to_zero_snr()
        check_target(pipe.schedule, pipe.prediction_type)
        self.nets: dict[str, UNet | TextEncoder] = {"unet": pipe.unet}
        self.nets |= {name: net for name in ENCODERS if (net := getattr(pipe, name)) is not None}
        self.fingerprints = {name: fingerprint(net) for name, net in self.nets.items()}
        if not training.text_encoder:
            self.nets = {"unet": pipe.unet}
        self.beside: nn.Module = self.add_trainable()
        self.rate = training.learning_rate or RATES[kind]
        self.watches = [tensorboard(self.folder / "tensorboard")] if training.tensorboard else []

    def add_trainable(self) -> nn.Module:
        """Asks for gradients where something is to learn; returns what learns beside the nets."""
        how, encoders = self.training, [encoder for _, encoder in self.pipe._encoders()]
        if self.word is not None:
            name, vectors, init_word = self.word
            return Embedding(name, self.pipe._encoders(), vectors, init_word)
        if how.rank is None:
            for net in self.nets.values():
                net.requires_grad_(True)
            return nn.Module()
        generator = torch.Generator().manual_seed(how.seed)
        without = unread(self.pipe.unet, encoders, how.clip_skip)
        return nn.ModuleDict(
            {
                name: add_lora(net, how.rank, how.alpha, how.targets, generator, without=without)
                for name, net in self.nets.items()
            }
        )

    def open(self, path: str | Path, caption: str | None, least: int = 1) -> Folder:
        """The pictures, with a line on what is used and what is not."""
        folder = open_folder(
            path,
            resolution=self.side,
            caption=caption,
            bucketed=self.training.bucketed,
            multiple=self.pipe.vae.config.factor * 2 ** (len(self.pipe.unet.config.channels) - 1),
            least=least,
        )
        if processes.rank() == 0:
            print(folder, flush=True)
        return folder

    def train(self, folders: Sequence[Folder]) -> None:
        """Train and save."""
        how, pipe = self.training, self.pipe
        batches = Batches(pipe, folders, self.folder, how)
        objective = Diffusion(
            pipe.unet,
            [encoder for _, encoder in pipe._encoders()] if how.text_encoder else (),
            clip_skip=how.clip_skip,
            autocast=how.autocast,
            checkpointing=how.checkpointing,
        )
        objective.beside = self.beside
        if how.shard:
            processes.shard(objective, blocks(objective))
        watches = [*self.watches]
        if how.sample_prompts:
            folder = self.folder / "samples"
            watches.append(
                grids(pipe, how.sample_prompts, how.sample_every, folder, self.side, clip_skip=how.clip_skip)
            )
        settings = {name: value for name, value in asdict(how).items() if name not in FREE}
        settings |= {"pictures": batches.facts(), "model": self.fingerprints, "word": self.word}
        parameters = [p for p in objective.parameters() if p.requires_grad]
        train(
            objective,
            batches,
            [AdamW(parameters, self.rate, weight_decay=0.01, fused=True)],
            self.folder,
            steps=how.steps,
            schedule=how.schedule,
            warmup=how.warmup,
            accumulate=how.accumulate,
            workers=1,
            ema_decay=how.ema_decay,
            settings=settings,
            save_minutes=how.save_minutes,
            save_steps=how.save_steps,
            keep=how.keep,
            on_step=both(watches),
        )
        self.save()

    def save(self) -> None:
        if isinstance(self.beside, Embedding):
            if processes.rank() == 0:
                save_embedding(self.out, self.beside, self.layout)  # type: ignore[arg-type]
        elif isinstance(self.beside, nn.ModuleDict):
            if processes.rank() == 0:
                save_lora(self.out, self.beside, self.layout)  # type: ignore[arg-type]
        else:
            values: dict[str, dict[str, Tensor]] = {}
            for part, net in self.nets.items():
                whole = ((name, processes.whole(value)) for name, value in net.state_dict().items())  # by all processes
                values[part] = {name: value.cpu() for name, value in whole if processes.rank() == 0}
            if processes.rank() == 0:
                how = self.training
                scheduler = ZERO_SNR if how.zero_snr else {}
                convert(self.source, self.out, None, how.prediction_type, nets=values, scheduler=scheduler)


def free(out: Path, kind: str) -> Path:
    """The place of the result, if it can be there."""
    if kind != "whole nets" and out.suffix != ".safetensors":
        raise ValueError(f"{out}: {kind} is a file, give it a name that ends in .safetensors")
    if out.suffix != ".safetensors" and out.suffix[1:].isalpha():  # .ckpt, .png; but not my-dog-1.5
        raise ValueError(f"{out}: give a name that ends in .safetensors, or that of a folder")
    if out.exists():
        raise FileExistsError(f"{out} exists: remove it, or give another name")
    parent = out.resolve().parent
    if not parent.is_dir():
        raise FileNotFoundError(f"{out}: the folder {parent} does not exist, make it first")
    if not os.access(parent, os.W_OK):
        raise PermissionError(f"{out}: nothing can be written into {parent}, give another place")
    return out


def check_trainable(pipe: Pipeline, model: str | Path | None) -> None:
    if pipe.unet.config.in_channels != pipe.vae.config.latent_channels:
        raise ValueError(f"{model} is an inpainting model: train the one that it was made of")
    if pipe.text_encoder is None:
        raise ValueError(f"{model} is SDXL's refiner, which no text alone conditions: train the base model")


def fill(run: Run, folder: Path, prompt: str, count: int) -> None:
    """Pictures of the prompt until there are `count`, by the seeds 0, 1, ... of their names; what is there is kept."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"class_images={str(folder)!r} is a file: give a folder")
    folder.mkdir(parents=True, exist_ok=True)
    missing = count - len(run.open(folder, prompt, least=0))
    unused = (seed for seed in itertools.count() if not (folder / f"class-{seed:05}.png").exists())
    seeds = list(itertools.islice(unused, max(0, missing)))
    for start in tqdm(range(0, len(seeds), 4), f"drawing {prompt!r} into {folder}", disable=not seeds):
        some = seeds[start : start + 4]
        side, skip = run.side, run.training.clip_skip
        made = run.pipe(prompt, seed=some, width=side, height=side, clip_skip=skip, progress=False)
        for seed, image in zip(some, made.images, strict=True):
            save(image, folder / f"class-{seed:05}.png", prompt)
