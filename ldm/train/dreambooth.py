"""DreamBooth (Ruiz et al. 2023), fine-tuning on a folder, their LoRA kinds, textual inversion: from a model and
pictures to a file.

    dreambooth("sd15.safetensors", "my-dog", "a photo of sks dog", "sks.safetensors", class_prompt="a photo of a dog")
    finetune("sd15.safetensors", "pictures-with-captions", "mine.safetensors", Training(steps=5000, rank=16))

A folder beside the result, its name with `.run`, has the states, the log and what was computed beforehand: the same
call goes on where it was stopped.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from ldm.clip import TextEncoder
from ldm.convert import convert
from ldm.image import save
from ldm.pipeline import DEFAULT_MODEL, Pipeline
from ldm.train import processes
from ldm.train.adapters import add_lora, save_lora
from ldm.train.embedding import Embedding, save_embedding
from ldm.train.loop import step_generator, train
from ldm.train.objective import Diffusion, Objective, draw
from ldm.train.pictures import Cache, Folder, cache_latents, cache_texts, centre, cover, fingerprint, open_folder
from ldm.train.watch import both, grids, tensorboard
from ldm.unet import UNet


@dataclass(frozen=True)
class Training:
    """How it is trained. The defaults are for five pictures of a subject.

    steps: 800, at batch 1, which is where the paper (1,000 at 5e-6) and diffusers' example (400 to 800) leave a subject
    known and its surroundings still free. learning_rate: None is 2e-6 for whole nets, 1e-4 for LoRA, 5e-4 for a word,
    as in diffusers' examples. schedule: "constant", so that a run may be made longer; "linear", "cosine"; warmup: in
    steps. accumulate: the batch in that many parts, one after the other, in less memory.
    rank: of LoRA, None for whole nets (Hu et al. 2021; 4 is enough for a subject); alpha (None: rank), targets: as in
    `ldm.train.adapters.add_lora`. text_encoder: train it, too: a better likeness, sooner overfitted.
    resolution: None is the model's own. bucketed: other shapes than the square, for finetune. clip_skip: as in
    `ldm.Settings`.
    ema_decay: None, an average over 800 steps lags behind. autocast: bfloat16 where that is safe, weights stay float32.
    checkpointing: less memory for more time; much less where batches or pictures are large.
    objective: the loss, see `Objective`.
    sample_prompts: drawn every `sample_every` steps into a grid in the run's folder. tensorboard: curves, too.
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
    ema_decay: float | None = None
    autocast: bool = False
    checkpointing: bool = False
    seed: int = 0
    sample_prompts: tuple[str, ...] = ()
    sample_every: int = 100
    tensorboard: bool = False
    objective: Objective = field(default_factory=Objective)


def dreambooth(
    model: str | Path | None,
    instance_images: str | Path,
    instance_prompt: str,
    out: str | Path,
    training: Training = Training(),
    *,
    class_prompt: str | None = None,
    class_images: str | Path | None = None,
    class_count: int = 200,
    layout: str = "kohya",
) -> None:
    """Teach `model` (as in `Pipeline.from_pretrained`) the subject of some five pictures, under the instance prompt.

    class_prompt: what it is one of. Then as many pictures of the class as of the subject are in each batch, so that the
    class is not forgotten (prior preservation); the folder class_images is filled up to `class_count` with pictures
    that the model makes of it, which are kept. Without it: the subject alone.
    out: a name that ends in .safetensors is a single file, any other a diffusers folder; with `rank` a LoRA, in kohya's
    or PEFT's `layout`. Raises ValueError for folders without pictures, FileExistsError where `out` is.
    """
    out = free(out)
    pipe = Pipeline.from_pretrained(model)
    side, multiple = training.resolution or pipe.size, smallest(pipe)
    folders = [open_folder(instance_images, resolution=side, multiple=multiple, caption=instance_prompt)]
    if class_prompt is not None:
        if class_images is None:
            class_images = run_folder(out) / "class"
        with processes.first():
            fill(pipe, Path(class_images), class_prompt, class_count, side)
        folders.append(open_folder(class_images, resolution=side, multiple=multiple, caption=class_prompt))
    fit(pipe, folders, out, training, *nets_or_lora(pipe, model, out, training, layout))


def finetune(
    model: str | Path | None,
    images: str | Path,
    out: str | Path,
    training: Training = Training(),
    *,
    caption: str | None = None,
    layout: str = "kohya",
) -> None:
    """Train `model` on a folder of pictures and captions (`ldm.train.pictures.open_folder`). Else as `dreambooth`."""
    out = free(out)
    pipe = Pipeline.from_pretrained(model)
    side, multiple = training.resolution or pipe.size, smallest(pipe)
    folder = open_folder(images, resolution=side, multiple=multiple, caption=caption, bucketed=training.bucketed)
    fit(pipe, [folder], out, training, *nets_or_lora(pipe, model, out, training, layout))


def embedding(
    model: str | Path | None,
    images: str | Path,
    word: str,
    out: str | Path,
    training: Training = Training(steps=3000, text_encoder=True),
    *,
    caption: str = "a photo of {word}",
    vectors: int = 1,
    init_word: str | None = None,
    layout: str = "diffusers",
) -> None:
    """Textual inversion (Gal et al. 2022, who take some 5,000 steps): find the vectors of a new word, nothing else.

    caption: what the pictures are, with {word} in it, unless they have captions of their own. vectors, init_word: as in
    `ldm.train.embedding.Embedding`; layout: as in `save_embedding`. Else as `dreambooth`; the text encoders are always
    run, and never changed.
    """
    if "{word}" not in caption:
        raise ValueError(f"caption={caption!r}: write {{word}} where the word stands, 'a photo of {{word}}'")
    out, training = free(out), replace(training, text_encoder=True, rank=None)
    pipe = Pipeline.from_pretrained(model)
    side, multiple = training.resolution or pipe.size, smallest(pipe)
    folder = open_folder(images, resolution=side, multiple=multiple, caption=caption.replace("{word}", word))
    learnt = Embedding(word, pipe._encoders(), vectors, init_word)
    fit(pipe, [folder], out, training, learnt, lambda: save_embedding(out, learnt, layout))  # type: ignore[arg-type]


def free(out: str | Path) -> Path:
    """The place of the result, if nothing is there."""
    out = Path(out)
    if out.exists():
        raise FileExistsError(f"{out} exists: remove it, or give another name")
    if not out.resolve().parent.is_dir():
        raise FileNotFoundError(f"{out}: the folder {out.resolve().parent} does not exist, make it first")
    return out


def run_folder(out: Path) -> Path:
    return out.with_name(f"{out.name}.run")


def smallest(pipe: Pipeline) -> int:
    """What sides are multiples of: the pixels of a latent times what the UNet halves."""
    return pipe.vae.config.factor * 2 ** (len(pipe.unet.config.channels) - 1)


def fill(pipe: Pipeline, folder: Path, prompt: str, count: int, side: int) -> None:
    """Pictures of the prompt until there are `count`, by the seeds 0, 1, ... of their names; what is there is kept."""
    folder.mkdir(parents=True, exist_ok=True)
    present = sum(file.is_file() and not file.name.startswith(".") for file in folder.iterdir())
    missing = [seed for seed in range(count) if not (folder / f"class-{seed:05}.png").exists()]
    for start in range(0, max(0, count - present), 4):
        seeds = missing[start : min(start + 4, count - present)]
        made = pipe(prompt, seed=seeds, width=side, height=side, progress=False)
        for seed, image in zip(seeds, made.images, strict=True):
            save(image, folder / f"class-{seed:05}.png", prompt)


class Batches:
    """batch(step) of one or two folders, subject and class: what `train` passes to `Diffusion`, and the files."""

    def __init__(self, pipe: Pipeline, folders: Sequence[Folder], work: Path, training: Training):
        self.pipe, self.folders, self.training = pipe, folders, training
        with processes.first():
            self.latents = [cache_latents(folder, pipe.vae, work / "latents") for folder in folders]
            self.texts = [] if training.text_encoder else [self.encoded(captions(folder), work) for folder in folders]
            self.empty = None if training.text_encoder else self.encoded([""], work)([0])

    def encoded(self, texts: Sequence[str], work: Path) -> Cache:
        key = " ".join(fingerprint(encoder) for _, encoder in self.pipe._encoders())

        def encode(text: str) -> Any:
            return self.pipe.encode_text([text], self.training.clip_skip, emphasis=None)

        return cache_texts(texts, encode, f"{key} {self.training.clip_skip}", work / "texts")

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
            assert self.empty is not None
            found = [texts(own) for texts, own in zip(self.texts, rows, strict=True)]
            names = ["context", "pooled"] if xl else ["context"]
            both = [(torch.cat([f[name] for f in found]), self.empty[name][0]) for name in names]
            values = [how.objective.with_dropout(value, empty, draws) for value, empty in both]
        return values + ([torch.tensor([size_numbers(picture) for picture in pictures])] if xl else [])


def captions(folder: Folder) -> list[str]:
    return [picture.caption for picture in folder.pictures]


def size_numbers(picture: Any) -> list[float]:
    """SDXL's: height and width of the original, top and left of the crop from the centre, height and width now."""
    (width, height), (w, h) = picture.size, picture.target
    top, left = centre(cover(picture.size, picture.target), picture.target)
    return [float(n) for n in (height, width, top, left, h, w)]


def nets_or_lora(
    pipe: Pipeline, model: str | Path | None, out: Path, training: Training, layout: str
) -> tuple[nn.Module, Callable[[], None]]:
    """What is trained, beside the objective's own nets, and how it is written to `out`."""
    trained: dict[str, UNet | TextEncoder] = {"unet": pipe.unet}
    if training.text_encoder:
        trained |= {name: net for name in ENCODERS if (net := getattr(pipe, name)) is not None}
    if training.rank is None:
        for net in trained.values():
            net.requires_grad_(True)

        def save_nets() -> None:
            values = {name: net.state_dict() for name, net in trained.items()}
            convert(DEFAULT_MODEL if model is None else model, out, nets=values)

        return nn.Module(), save_nets
    generator = torch.Generator().manual_seed(training.seed)
    adapters = {
        name: add_lora(net, training.rank, training.alpha, training.targets, generator) for name, net in trained.items()
    }
    return nn.ModuleDict(adapters), lambda: save_lora(out, adapters, layout)  # type: ignore[arg-type]


def fit(
    pipe: Pipeline,
    folders: Sequence[Folder],
    out: Path,
    training: Training,
    beside: nn.Module,
    save_result: Callable[[], None],
) -> None:
    """Train what requires gradients, in the pipeline's nets and `beside` them, and save it."""
    work = run_folder(out)
    if processes.rank() == 0:
        print(*folders, sep="\n")
    objective = Diffusion(
        pipe.unet,
        [encoder for _, encoder in pipe._encoders()] if training.text_encoder else (),
        clip_skip=training.clip_skip,
        autocast=training.autocast,
        checkpointing=training.checkpointing,
    )
    objective.beside = beside
    watches = [tensorboard(work / "tensorboard")] if training.tensorboard else []
    if training.sample_prompts:
        side = training.resolution or pipe.size
        watches.append(grids(pipe, training.sample_prompts, training.sample_every, work / "samples", side))
    settings = {name: value for name, value in asdict(training).items() if name not in FREE}
    settings["pictures"] = [[str(picture.file) for picture in folder.pictures] for folder in folders]
    parameters = [p for p in objective.parameters() if p.requires_grad]
    rate = training.learning_rate
    if rate is None:
        rate = RATES[type(beside)]
    train(
        objective,
        Batches(pipe, folders, work, training),
        [AdamW(parameters, rate, weight_decay=0.01, fused=True)],
        work,
        steps=training.steps,
        schedule=training.schedule,
        warmup=training.warmup,
        accumulate=training.accumulate,
        workers=1,
        ema_decay=training.ema_decay,
        settings=settings,
        on_step=both(watches),
    )
    if processes.rank() == 0:
        save_result()


ENCODERS = ("text_encoder", "text_encoder_2")
# What may be another when a run goes on: the loop has its own rule for the rates.
FREE = ("steps", "schedule", "warmup", "sample_prompts", "sample_every", "tensorboard")
RATES = {nn.Module: 2e-6, nn.ModuleDict: 1e-4, Embedding: 5e-4}  # of whole nets, LoRA, a word's vectors
