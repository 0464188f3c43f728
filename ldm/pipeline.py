"""Text to image and image to image: the parts put together."""

import copy
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm

from ldm import canvas, checkpoint, conditioning, hub, levels
from ldm.clip import TextEncoder, TextEncoding
from ldm.clip.embedding import load_embedding
from ldm.clip.prompt import PromptPlan, encode, plan
from ldm.clip.tokenizer import Tokenizer
from ldm.edit import enlarged, in_tiles, only_masked, outpainted
from ldm.image import to_images, to_rgb
from ldm.img2img import StrengthPlan, fit, paste
from ldm.mapped import hand_back_all
from ldm.offload import at_work
from ldm.output import Output
from ldm.record import Ran, Recorder
from ldm.run import begin, finite, first_noise, inpaints, loop, no_noise, noise_of, one_run, shown, start_latents
from ldm.samplers import (
    PREDICTION_TYPES,
    Schedule,
    Step,
    Steps,
)
from ldm.seamless import seamless
from ldm.settings import FAST, Settings, check_names
from ldm.unet import UNet
from ldm.vae import VAE, strips

if TYPE_CHECKING:
    from ldm.lora import Lora
    from ldm.trace import Trace

DEFAULT_MODEL = Path(__file__).parent.parent / "weights" / "emoji-64"


class Pipeline:
    """The parts are public and may be replaced: `unet`, `vae`, `text_encoder`, `tokenizer`, `schedule`, and in SDXL
    `text_encoder_2` and `tokenizer_2`. (Its refiner has no first ones.)"""

    def __init__(
        self,
        unet: UNet,
        vae: VAE,
        text_encoder: TextEncoder | None,
        tokenizer: Tokenizer | None,
        schedule: Schedule,
        prediction_type: str = "epsilon",
        size: int = 512,
        name: str = "",
        text_encoder_2: TextEncoder | None = None,
        tokenizer_2: Tokenizer | None = None,
        zero_negative: bool = False,
    ):
        """`size`: the side in pixels of a picture when nobody says. `name`: the model's, for the record.

        `zero_negative`: no negative prompt means a context of zeros (SDXL), not the encoding of an empty text.
        """
        if prediction_type not in PREDICTION_TYPES:
            raise ValueError(f"prediction_type={prediction_type!r}: use {' or '.join(PREDICTION_TYPES)}")
        self.unet = unet
        self.vae = vae
        self.text_encoder = text_encoder
        self.tokenizer = tokenizer
        self.schedule = schedule
        self.prediction_type = prediction_type
        self.size = size
        self.name = name
        self.text_encoder_2 = text_encoder_2
        self.tokenizer_2 = tokenizer_2
        self.zero_negative = zero_negative
        self.offloaded: torch.device | None = None  # where the nets come to work, see `offload`
        self._loras: list[Lora] = []
        self._embeddings: list[tuple[str, Path]] = []
        # Of from_pretrained, by the names of the command line's options.
        self._options: dict[str, Any] = {"model": "<Pipeline>"}

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path | None = None,
        *,
        vae: str | Path | None = None,
        dtype: torch.dtype | None = None,
        device: str | torch.device | None = None,
        prediction_type: str | None = None,
        vae_dtype: torch.dtype | None = None,
        revision: str | None = None,
    ) -> "Pipeline":
        """An official single file, a diffusers folder, or "owner/name" of a diffusers model on the Hugging Face hub;
        None is the default model that ships with the project.

        vae: a VAE file, folder or hub name that replaces the built-in one; a TAESD is faster, and an approximation.
        dtype: of the nets, float32 unless given; the loop itself always runs in float32. device: a GPU where there is
        one, unless given. prediction_type: "epsilon" or "v_prediction", where the file does not say or says it wrong.
        vae_dtype: as dtype unless given, but SDXL's VAE, which overflows in float16, then runs in float32. revision: of
        a model on the hub, its branch, tag or commit.
        Nothing but what has a hub name is ever downloaded, with huggingface_hub and into its cache.
        """
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if device.type == "cuda" and not torch.cuda.is_available():
            raise ValueError(f"device={str(device)!r}: PyTorch {torch.__version__} sees no GPU here, use device='cpu'")
        dtype = dtype or torch.float32
        allowed = [torch.float32, torch.bfloat16] + [torch.float16] * (device.type != "cpu")
        for name, value in {"dtype": dtype, "vae_dtype": vae_dtype or dtype}.items():
            if value not in allowed:
                raise ValueError(f"{name}={value} on {device.type}: use {' or '.join(map(str, allowed))}")
        if path is None and not DEFAULT_MODEL.exists():
            raise FileNotFoundError(
                f"the default model is not at {DEFAULT_MODEL}: it is part of a checkout of ldm. Install from one, with"
                " `pip install -e .`, or give the path of a model"
            )
        path = DEFAULT_MODEL if path is None else path
        if prediction_type not in (None, *PREDICTION_TYPES):
            raise ValueError(f"prediction_type={prediction_type!r}: use {' or '.join(PREDICTION_TYPES)}")
        parts = checkpoint.load(path, vae, dtype, device, vae_dtype, prediction_type, revision)
        local = Path(path)
        pipe = cls(
            parts.unet,
            parts.vae,
            parts.text_encoder,
            parts.tokenizer,
            Schedule.from_config(parts.scheduler),
            parts.scheduler["prediction_type"],
            parts.size,
            path if hub.is_name(path) else local.stem if local.is_file() else local.resolve().name,
            parts.text_encoder_2,
            parts.tokenizer_2,
            parts.zero_negative,
        )
        given = {"model": None if path == DEFAULT_MODEL else path, "vae": vae, "revision": revision}
        types = {"dtype": dtype if dtype != torch.float32 else None, "vae_dtype": vae_dtype}
        given |= {name: str(value).removeprefix("torch.") for name, value in types.items() if value is not None}
        given |= {"prediction_type": prediction_type}
        pipe._options = {name: value for name, value in given.items() if value is not None}
        return pipe

    @property
    def device(self) -> torch.device:
        return self.offloaded or self.unet.conv_in.weight.device

    def load_lora(self, path: str | Path, scale: float = 1.0) -> "Lora":
        """Merge a LoRA (safetensors: kohya's, LyCORIS', diffusers' or PEFT's) into the UNet and the text encoders.

        The `Lora` that it returns joins `pipe.loras`: set its `scale` to merge it anew, `remove()` it to have the
        weights as they were, bitwise: the originals of changed weights are kept beside them. Raises CheckpointError if
        anything in the file does not fit this model, and ValueError for a scale that is not a finite number; nothing
        has changed then.
        """
        from ldm.lora import load

        nets = {"unet": self.unet, "text_encoder": self.text_encoder, "text_encoder_2": self.text_encoder_2}
        lora = load(path, scale, {part: net for part, net in nets.items() if net is not None})
        self._loras.append(lora)
        return lora

    @property
    def loras(self) -> "tuple[Lora, ...]":
        """Those that were loaded with `load_lora` and not removed, the first loaded first."""
        return tuple(lora for lora in self._loras if not lora.removed)

    def __call__(
        self,
        prompt: str | list[str] = "",
        *,
        progress: bool = True,
        callback: Callable[[Step], None] | None = None,
        **settings: Any,
    ) -> Output:
        """Make pictures. `settings` are the fields of `ldm.Settings`: steps, guidance_scale, sampler, seed, image, ...

        progress: show a bar on stderr. callback: is shown every `Step`. Raises ValueError for settings that cannot be
        run, TypeError for a name that is no setting, FloatingPointError when a net returns NaN or infinity.
        """
        check_names(settings)
        return self.run(Settings(prompt, **settings), progress, callback)

    def run(self, settings: Settings, progress: bool = True, callback: Callable[[Step], None] | None = None) -> Output:
        """`__call__` with settings that are already made."""
        recorder = Recorder(self.about(settings), callback)
        made = self._edited(settings, progress, recorder)
        about: dict[str, Any] = {"model": self.name, "options": recorder.ran.options, "recorder": recorder}
        return replace(made, settings=settings.after(recorder.ran), seeds=settings.seeds, **about)

    def about(self, settings: Settings) -> Ran:
        """What decides a run of the settings beside them."""
        parts = {"dtype": self.unet.conv_in.weight, "VAE dtype": next(self.vae.parameters())}
        nets = {name: str(weight.dtype).removeprefix("torch.") for name, weight in parts.items()}
        nets |= {"device": self.device.type, "prediction": self.prediction_type}
        nets |= {"spacing": levels.spacing(settings, self.schedule) or "given"}
        model = Path(self._options.get("model", DEFAULT_MODEL))
        return Ran(self.name, model, self.made_of(settings), nets)

    def made_of(self, settings: Settings) -> dict[str, Any]:
        """What a run has beside its settings, by the names of the command line's options."""
        options = dict(self._options)
        if self.loras:
            options["lora"] = [(lora.path, lora.scale) for lora in self.loras]
        if self._embeddings:
            options["embedding"] = self._embeddings
        if isinstance(settings.refiner, Pipeline):
            options["refiner"] = settings.refiner._options.get("model", DEFAULT_MODEL)
        return options

    def _edited(self, s: Settings, progress: bool, callback: Callable[[Step], None] | None) -> Output:
        """One run, or those of an edit that is several."""

        def make(s: Settings) -> Output:
            return self._edited(s, progress, callback)

        def draw(s: Settings, size: tuple[int, int]) -> Tensor:
            return first_noise(self, s, noise_of(self, s, size))

        factor = self.vae.config.factor
        size, grid = canvas.checked_size(s, self.size, factor), canvas.grid(s, self.size, factor)
        if s.enlarge > 1:
            return enlarged(make, s, size, factor)
        if s.extend is not None:
            return outpainted(make, draw, s, size, grid, soft=not inpaints(self))
        if s.padding_mask_crop is not None:
            return only_masked(make, s, (s.width or self.size, s.height or self.size))
        if s.tile is not None and max(size) > grid.side:
            return in_tiles(make, draw, s, size, grid)
        return self._run(s, progress, callback)

    def _run(self, settings: Settings, progress: bool, callback: Callable[[Step], None] | None) -> Output:
        width, height = canvas.size(settings, self.size, self.vae.config.factor)
        if progress and self.vae.in_strips(height, width):
            said = f"{width}x{height} is more than {strips.WHOLE_UP_TO:,} pixels: the VAE works in strips"
            tqdm.write(said, file=sys.stderr)
        pipe = self._tiled(settings.tiling)
        with torch.no_grad():
            run = begin(pipe, settings)
        for encoder in (self.text_encoder, self.text_encoder_2):
            hand_back_all(encoder)
        x, step = run.x, None
        for step in tqdm(run.steps, total=max(len(run.sigmas) - 1, 0), disable=not progress):
            x = step.x
            if callback is not None:
                callback(step)
        if step is None and len(run.sigmas) > 1:
            raise ValueError(
                f"the sampler {settings.sampler_name!r} ended without a step: it has {len(run.sigmas) - 1}"
            )
        end = run.sigmas[-1] if len(run.sigmas) else 0.0
        latents = x / (1 + end**2) ** 0.5  # from the last sigma's scale to the VAE's
        if run.kept is not None:  # without the noise that DDIM's last sigma leaves
            z, mask = run.kept
            latents = torch.where(mask > 0, latents, z)
        hand_back_all(self.unet)
        images = to_images(pipe.decode(latents), settings.how.truncates)
        if run.picture is not None and run.mask is not None and settings.how.paste_back:
            images = [paste(image, run.picture, run.mask) for image in images]
        return Output([image.crop((0, 0, *run.size)) for image in images], latents, settings.seeds, settings)

    def stream(self, prompt: str | list[str] = "", *, grad: bool = False, **settings: Any) -> Steps:
        """The same call as the sampler's own loop: lazily what `__call__` would have shown its callback.

        `settings` as for `__call__`, without progress and callback: whoever looks at the steps is both. The loop goes
        on from the step's x, or from what is sent back (`ldm.samplers.after`).

        grad: keep the graph of the run, for gradients with respect to noise=, latents= and whatever weights require
        them. Activations are not kept but computed anew on the way back, so that a step costs the memory of one
        latent (of two where a sampler evaluates twice; of all activations under a guidance that remembers, apg).
        Raises ValueError for what is several runs: extend, enlarge, tile, padding_mask_crop.
        """
        check_names(settings)
        s = Settings(prompt, **settings)
        one_run(s, "a stream shows one run")
        with torch.set_grad_enabled(grad):
            return begin(self._tiled(s.tiling), s).steps

    def trace(
        self, prompt: str | list[str] = "", *, file: str | Path | None = None, progress: bool = True, **settings: Any
    ) -> "Trace":
        """The same call, recorded step by step, to be looked at, plotted and compared: see `ldm.trace.Trace`.

        file: a .safetensors that the steps are written to instead of being kept in memory. Raises ValueError as
        `stream`.
        """
        from ldm.trace import record

        check_names(settings)
        return record(self, Settings(prompt, **settings), file, progress)

    def invert(
        self,
        prompt: str | list[str] = "",
        *,
        progress: bool = True,
        callback: Callable[[Step], None] | None = None,
        **settings: Any,
    ) -> Tensor:
        """The noise (B,4,h,w) from which the same call makes the picture again: the sampler, run backwards.

            how = {"image": cat, "strength": 1, "sampler": "ddim", "steps": 50, "guidance_scale": 1}
            noise = pipe.invert("a cat", **how)
            dog = pipe("a dog", **how, noise=noise)

        `settings`, `progress` and `callback` as for `__call__`; strength says how far up it goes, latents= may take the
        place of the image. The way there and back has the sampler's own error, which more steps make smaller; guidance
        makes it larger. Raises ValueError for a sampler that draws noise, and for masks, refiners and edits of several
        runs. Source: Song et al. 2021, section 5.4, for any sampler.
        """
        check_names(settings)
        s = Settings(prompt, **settings)
        one_run(s, "one run is inverted")
        given = [name for name in ("mask", "noise", "refiner") if getattr(s, name) is not None]
        if given or (s.image is None and s.latents is None):
            how = f"with {given[0]}=" if given else "without image= or latents="
            raise ValueError(f"invert {how}: it takes a whole picture, and gives back its noise")
        plan, factor = levels.plan(s, self.schedule), self.vae.config.factor
        if not plan.evaluations:
            raise ValueError(f"strength={s.strength} makes no step that could be inverted: give more, up to 1")
        pipe, size = self._tiled(s.tiling), canvas.checked_size(s, self.size, factor)
        picture = None if s.image is None else fit(to_rgb(s.image), size, factor)
        start, noise = s.latents if picture is None else picture, noise_of(pipe, s, size)
        assert start is not None, "checked above"
        with torch.no_grad():
            # The call that starts from noise alone never encodes: the mean will do. Else its z, from the same draw.
            z = start_latents(pipe, s, start, noise.shape, None if plan.replaces else noise)  # (B,4,h,w)
            seen = shown(pipe, s, picture, None, noise) if inpaints(self) else None
            sigmas = plan.sigmas.flip(0)
            guide, reading = conditioning.guide_of(s, sigmas), levels.reading(s, self.schedule)
            denoise = conditioning.denoiser(pipe, s, size, reading, guide, seen)
            x = z * (1 + sigmas[0] ** 2) ** 0.5  # from the VAE's scale to that of the last sigma
            steps = loop(pipe, s, denoise, x, sigmas, no_noise)
        for step in tqdm(steps, total=plan.evaluations, disable=not progress):
            x = step.x
            if callback is not None:
                callback(step)
        return x / levels.first_std(s, self.schedule, sigmas[-1]) if plan.replaces else (x - z) / sigmas[-1]

    def plan_strength(self, **settings: Any) -> StrengthPlan:
        """What a strength means for the settings of a call (steps, strength, strength_rule, sigmas, ...), to print."""
        check_names(settings)
        return levels.plan(Settings(**settings), self.schedule)

    def offload(self, device: str | torch.device = "cuda") -> None:
        """Keep the nets of a pipeline on the CPU, and bring each to `device` when its turn comes.

        The device's memory then holds one of them, not all: of SDXL in bfloat16 5.1 GB at most, not 6.9. Each picture
        waits until they have come and gone. Load the pipeline with device="cpu" (and bfloat16: there is no float16 on
        CPUs). Not run on a GPU by us. Raises ValueError for nets that are on another device.
        """
        if self.unet.conv_in.weight.device.type != "cpu":
            raise ValueError(f"offload: the nets are on {self.device}; load the pipeline with device='cpu'")
        self.offloaded = torch.device(device)

    def compile(self) -> None:
        """Let `torch.compile` translate the UNet, in minutes, at its first call and for each new shape.

        Results differ by rounding. Not for `tiling` and `token_merging`, which run copies of it. On CPUs it needs a C++
        compiler and was not faster than the net as it is (README); it is meant for GPUs, where it was not run.
        """
        self.unet.compile()

    @staticmethod
    def fast(name: str) -> dict[str, Any]:
        """Settings that trade exactness for time, to be given to a call: `pipe(prompt, **pipe.fast("balanced"))`.

        "balanced": pictures hardly worse, with 54 % of the multiplications. "draft": to find seeds and prompts. What
        each costs stands in the README. Raises ValueError for another name.
        """
        if name not in FAST:
            raise ValueError(f"fast({name!r}): use {' or '.join(map(repr, FAST))}")
        return dict(FAST[name])

    def _tiled(self, tiling: str | None) -> "Pipeline":
        """This pipeline, on the same weights, with nets that wrap around."""
        if tiling is None:
            return self
        pipe = copy.copy(self)
        pipe.unet, pipe.vae = seamless(self.unet, tiling), seamless(self.vae, tiling)
        return pipe

    def load_embedding(self, path: str | Path, word: str | None = None) -> str:
        """Load a textual inversion (.safetensors); the word that means it in prompts is returned.

        word: the file's own unless given. Raises `ldm.checkpoint.CheckpointError`, a ValueError, for a file that is no
        embedding for this model, or a word that is taken; nothing is changed then.
        """
        word = load_embedding(Path(path), word, self._encoders())
        self._embeddings.append((word, Path(path)))
        return word

    def _encoders(self) -> list[tuple[Tokenizer, TextEncoder]]:
        both = (self.tokenizer, self.text_encoder), (self.tokenizer_2, self.text_encoder_2)
        return [(tokenizer, encoder) for tokenizer, encoder in both if tokenizer is not None and encoder is not None]

    @torch.no_grad()
    def encode_text(
        self, texts: list[str], clip_skip: int = 1, emphasis: str | None = "mean", chunks: int = 1
    ) -> TextEncoding:
        """context (B,77n,width) in the nets' dtype: the encoders' side by side. pooled (B,width): the last one's.

        emphasis: as in `Settings`. chunks: n is at least so many.
        """
        encodings = []
        for tokenizer, encoder in self._encoders():
            at_work(self, encoder)
            plans = [plan(text, tokenizer, emphasis is not None) for text in texts]
            count = max(chunks, *(len(p.chunks) for p in plans))
            encodings.append(encode(plans, count, tokenizer, encoder, clip_skip, emphasis == "mean"))
        return TextEncoding(torch.cat([e.context for e in encodings], dim=-1), encodings[-1].pooled)

    def plan(self, text: str, emphasis: str | None = "mean") -> PromptPlan:
        """What becomes of a prompt: its chunks, tokens and weights, to print."""
        tokenizer = self.tokenizer or self.tokenizer_2
        assert tokenizer is not None, "a pipeline has one of the two"
        return plan(text, tokenizer, emphasis is not None)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """latents (B,4,h,w) in the VAE's scale -> (B,3,H,W) float32, about [-1,1].

        Should the VAE overflow in half precision, it is run once more in float32, with a warning.
        """
        at_work(self, self.vae)
        dtype = next(self.vae.parameters()).dtype
        z = latents / self.vae.config.scaling_factor
        pixels = self.vae.decode(z.to(dtype))
        if dtype != torch.float32 and not torch.isfinite(pixels).all():
            warnings.warn(
                f"the VAE's decoder returned NaN or infinity in {dtype}; it is run again in float32. To have that from"
                " the start, load the model with vae_dtype=torch.float32",
                stacklevel=2,
            )
            pixels = copy.deepcopy(self.vae).float().decode(z.float())
        return finite(pixels, "decoder").float()
