"""What a call of the pipeline gives back."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from ldm.image import save_all
from ldm.parameters import parameters
from ldm.record import Record, Recorder
from ldm.replay import with_files
from ldm.settings import Settings


@dataclass(frozen=True, eq=False)
class Output:
    """images: PIL, RGB. latents (B,4,h,w) float32 in the VAE's scale (scaling_factor * z); None where the pictures are
    put together of several runs, as in tiles. settings: the call's, to be run again; settings.ran is what else decided
    the pictures.

    model: its name. options: what the pipeline was made of, by the names of the command line's options. recorder: what
    its steps were, for `records`.
    """

    images: list[Image.Image]
    latents: Tensor | None
    seeds: list[int]
    settings: Settings
    model: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    recorder: Recorder | None = field(default=None, repr=False)

    def texts(self) -> list[str]:
        """How each picture was made, as webui writes it."""
        options = with_files(self.options)
        return [parameters(self.settings, i, image.size, self.model, options) for i, image in enumerate(self.images)]

    def records(self) -> list[Record]:
        """What really ran for each picture: sigmas, a mark of each step, nets, machine. `ldm replay` compares them."""
        return [] if self.recorder is None else self.recorder.records(len(self.images))

    def save(
        self, file: str | Path, quality: int | None = None, max_bytes: int | None = None, force: bool = False
    ) -> list[Path]:
        """Save the pictures as heart.png, heart-2.png, ... with their settings, for `ldm info`, and records, for `ldm
        replay`; the names are returned.

        quality, max_bytes and errors: as in `ldm.image.save`. force: write over what has these names; else each picture
        takes the next one that is free.
        """
        records: list[str | None] = [record.text() for record in self.records()]
        records += [None] * (len(self.images) - len(records))
        return save_all(self.images, self.texts(), records, Path(file), quality, max_bytes, force)
