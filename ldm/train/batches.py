"""The batches of a training on folders of pictures: latents and texts computed once, noised anew at every step."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.pipeline import Pipeline
from ldm.train import processes
from ldm.train.caches import Cache, cache_latents, cache_texts, fingerprint
from ldm.train.loop import step_generator
from ldm.train.objective import draw, encode
from ldm.train.pictures import Folder
from ldm.train.training import Training


class Batches:
    """batch(step) of one or two folders, subject and class: what `train` passes to `Diffusion`, and the files."""

    def __init__(self, pipe: Pipeline, folders: Sequence[Folder], work: Path, training: Training):
        self.pipe, self.folders, self.training = pipe, folders, training
        self.encoders = " ".join(fingerprint(encoder) for _, encoder in pipe._encoders())
        with processes.first():
            self.latents = [cache_latents(folder, pipe.vae, work / "latents") for folder in folders]
            self.texts = [] if training.text_encoder else [self.encoded(folder.captions, work) for folder in folders]
            self.empty = {} if training.text_encoder else self.encoded([""], work)([0])
        if pipe.zero_negative:  # what guidance leads away from, where nobody says from what
            self.empty = {name: torch.zeros_like(value) for name, value in self.empty.items()}

    def encoded(self, texts: Sequence[str], work: Path) -> Cache:
        """As in a training of the text encoders: what a text has beyond their length is cut off."""
        tokenizers, encoders = zip(*self.pipe._encoders(), strict=True)

        def encoding(text: str) -> Any:
            ids = [tokenizer([text]).to(self.pipe.device) for tokenizer in tokenizers]
            return encode(encoders, ids, self.training.clip_skip)

        return cache_texts(texts, encoding, f"{self.encoders} {self.training.clip_skip}", work / "texts")

    def facts(self) -> list[dict[str, str]]:
        """What the pictures and their captions are, of each folder, to notice another one: {name: digests}."""
        return [
            {
                picture.file.relative_to(folder.path).as_posix(): f"{file.stem[:16]}, {picture.caption!r}"
                for picture, file in zip(folder.pictures, latents.files, strict=True)
            }
            for folder, latents in zip(self.folders, self.latents, strict=True)
        ]

    def __call__(self, step: int) -> list[Any]:
        how, pipe = self.training, self.pipe
        generator = step_generator(how.seed, step)
        rows = [folder.rows(step, how.batch, how.seed + i) for i, folder in enumerate(self.folders)]
        found = [latents(own) for latents, own in zip(self.latents, rows, strict=True)]
        mean, std = (pipe.vae.config.scaling_factor * torch.cat([f[name] for f in found]) for name in ("mean", "std"))
        draws = draw(mean.shape, generator)
        of_class = torch.arange(len(mean)) >= how.batch if len(self.folders) > 1 else None
        noised = how.objective.rows(mean, std, draws, pipe.schedule, pipe.prediction_type, of_class)
        pictures = [picture for folder, own in zip(self.folders, rows, strict=True) for picture in folder.at(own)]
        return [*noised, *self.condition(rows, draws, pictures), [str(picture.file) for picture in pictures]]

    def condition(self, rows: Sequence[Tensor], draws: Any, pictures: Sequence[Any]) -> list[Tensor]:
        """ids of each text encoder, or context and SDXL's pooled; then SDXL's size conditioning."""
        how, pipe, xl = self.training, self.pipe, self.pipe.unet.config.vector_width is not None
        if how.text_encoder:
            tokenizers = [tokenizer for tokenizer, _ in pipe._encoders()]
            texts = [picture.caption for picture in pictures]
            values = [how.objective.with_dropout(t(texts), t([""])[0], draws) for t in tokenizers]
        else:
            found = [texts(own) for texts, own in zip(self.texts, rows, strict=True)]
            names = ["context", "pooled"] if xl else ["context"]
            both = [(torch.cat([f[name] for f in found]), self.empty[name][0]) for name in names]
            values = [how.objective.with_dropout(value, empty, draws) for value, empty in both]
        return values + ([torch.tensor([picture.size_numbers() for picture in pictures])] if xl else [])
