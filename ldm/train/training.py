"""How a subject, a word or a folder of pictures is trained: the options, and why their defaults are what they are."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from ldm.samplers.denoiser import PREDICTION_TYPES
from ldm.train.loop import SCHEDULES
from ldm.train.objective import Objective


@dataclass(frozen=True)
class Training:
    """How it is trained. The defaults are for five pictures of a subject. Raises ValueError for what cannot be.

    steps: 800, at batch 1, which is where the paper (1,000 at 5e-6) and diffusers' example (400 to 800) leave a subject
    known and its surroundings still free. learning_rate: None is 2e-6 for whole nets, 1e-4 for LoRA, 5e-4 for a word,
    as in diffusers' examples. schedule: "constant", so that a run may be made longer; "linear", "cosine"; warmup: in
    steps. batch: of a step; accumulate: it is taken in that many parts, one after the other, in less memory (the batch
    stays what it is: diffusers' 1 with 4 accumulated is batch=4, accumulate=4).
    rank: of LoRA, None for whole nets (Hu et al. 2021; 4 is enough for a subject); alpha (None: rank), targets: as in
    `ldm.train.adapters.add_lora`. text_encoder: train it, too: a better likeness, sooner overfitted.
    resolution: in pixels, None is the model's own. bucketed: other shapes than the square (NovelAI 2022).
    clip_skip: as in `ldm.Settings`. prediction_type: where a model does not say. zero_snr: train whole nets of v
    prediction on a schedule that ends in noise alone (Lin et al. 2023); the result says so.
    ema_decay: None, an average over 800 steps lags behind. autocast: bfloat16 where that is safe, weights stay float32
    (Micikevicius et al. 2018). checkpointing: less memory for more time (Chen et al. 2016); much less where batches or
    pictures are large. shard: under torchrun the processes divide the weights (FSDP, Zhao et al. 2023), for whole nets
    that do not fit one of them.
    objective: the loss, see `Objective`.
    sample_prompts: drawn every `sample_every` steps into a grid in the run's folder. tensorboard: curves, too.
    save_minutes, save_steps: how often a state is written, the last `keep` of which stay: three times the weights each.
    """

    steps: int = 800
    batch: int = 1
    accumulate: int = 1
    learning_rate: float | None = None
    schedule: str = "constant"
    warmup: int = 0
    rank: int | None = None
    alpha: float | None = None
    targets: str | Sequence[str] = "attention"
    text_encoder: bool = False
    resolution: int | None = None
    bucketed: bool = False
    clip_skip: int = 1
    prediction_type: str | None = None
    zero_snr: bool = False
    ema_decay: float | None = None
    autocast: bool = False
    checkpointing: bool = False
    shard: bool = False
    seed: int = 0
    sample_prompts: tuple[str, ...] = ()
    sample_every: int = 100
    tensorboard: bool = False
    save_minutes: float = 10.0
    save_steps: int | None = None
    keep: int = 2
    objective: Objective = field(default_factory=Objective)

    def __post_init__(self):
        for name in ("steps", "batch", "accumulate", "sample_every", "keep", "clip_skip"):
            self.require(name, getattr(self, name) >= 1, "a whole number from 1")
        for name in ("resolution", "save_steps", "rank"):
            self.require(name, getattr(self, name) is None or getattr(self, name) >= 1, "a whole number from 1")
        self.require("warmup", self.warmup >= 0, "a whole number of steps from 0")
        self.require("seed", 0 <= self.seed < 2**32, "a whole number from 0 to 2^32 - 1")
        self.require("accumulate", self.accumulate <= self.batch, f"at most the batch, {self.batch}, which it divides")
        for name in ("learning_rate", "alpha", "save_minutes"):
            value = getattr(self, name)
            self.require(name, value is None or 0 < value < math.inf, "a finite number above 0")
        self.require("ema_decay", self.ema_decay is None or 0 < self.ema_decay < 1, "a number between 0 and 1")
        self.require("schedule", self.schedule in SCHEDULES, f"one of {', '.join(SCHEDULES)}")
        kinds = (None, *PREDICTION_TYPES)
        self.require("prediction_type", self.prediction_type in kinds, f"one of {', '.join(PREDICTION_TYPES)}")
        if self.rank is None:
            self.require("alpha", self.alpha is None, "a rank, too, or leave it out: it is of a LoRA")
            self.require("targets", self.targets == "attention", "a rank, too, or leave it out: they are of a LoRA")
        else:
            for name in ("shard", "zero_snr"):
                self.require(name, not getattr(self, name), "it for whole nets, or leave out the rank")
        self.require("sample_prompts", not (self.shard and self.sample_prompts), "none where the weights are divided")

    def require(self, name: str, holds: bool, accepted: str) -> None:
        if not holds:
            raise ValueError(f"{name}={getattr(self, name)!r}: give {accepted}")
