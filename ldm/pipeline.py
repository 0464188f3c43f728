"""Text to image and image to image: the parts put together."""

import copy
import sys
import warnings
from collections.abc import Callable, Generator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ldm import canvas, checkpoint, conditioning, hub, levels
from ldm.clip import TextEncoder, TextEncoding
from ldm.clip.embedding import load_embedding
from ldm.clip.prompt import PromptPlan, encode, plan
from ldm.clip.tokenizer import Tokenizer
from ldm.edit import enlarged, in_tiles, only_masked, outpainted
from ldm.guidance import asked, handed_over
from ldm.image import latent_mask, to_images, to_mask, to_rgb, to_tensor
from ldm.img2img import StrengthPlan, fill, fit, keep_outside, paste, renoise_outside
from ldm.noise import SeededNoise
from ldm.output import Output
from ldm.samplers import (
    PREDICTION_TYPES,
    Brownian,
    Denoiser,
    Noise,
    Schedule,
    Step,
    Steps,
    checkpointed,
    is_brownian,
)
from ldm.seamless import seamless
from ldm.settings import Settings, check_mask, check_names
from ldm.unet import UNet
from ldm.vae import VAE, strips

if TYPE_CHECKING:
    from ldm.lora import Lora

DEFAULT_MODEL = Path(__file__).parent.parent / "weights" / "emoji-64"


class Run(NamedTuple):
    """One run that has not begun: x at the first sigma, the sigmas, the loop; the (width, height) of the pictures, the
    one it started from and its mask, both padded; and of the kept part latents (B,4,h,w) and mask (1,1,h,w)."""

    x: Tensor
    sigmas: Tensor
    steps: Steps
    size: tuple[int, int]
    picture: Image.Image | None = None
    mask: Image.Image | None = None
    kept: tuple[Tensor, Tensor] | None = None


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

        vae: a VAE file, folder or hub name that replaces the built-in one. dtype: of the nets, float32 unless given;
        the loop itself always runs in float32. device: a GPU where there is one, unless given. prediction_type:
        "epsilon" or "v_prediction", where the file does not say or says it wrong. vae_dtype: as dtype unless given, but
        SDXL's VAE, which overflows in float16, then runs in float32. revision: of a model on the hub, its branch, tag
        or commit.
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
        return self.unet.conv_in.weight.device

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
        made = self._edited(settings, progress, callback)
        options = self.options_for(settings)
        return replace(made, settings=settings, seeds=settings.seeds, model=self.name, options=options)

    def options_for(self, settings: Settings) -> dict[str, Any]:
        """What the pipeline is made of, by the names of the command line's options."""
        options = dict(self._options)
        if self.loras:
            options["lora"] = [(lora.path, lora.scale) for lora in self.loras]
        if self._embeddings:
            options["embedding"] = self._embeddings
        if settings.refiner is not None:
            options["refiner"] = settings.refiner._options.get("model", DEFAULT_MODEL)
        return options

    def _edited(self, s: Settings, progress: bool, callback: Callable[[Step], None] | None) -> Output:
        """One run, or those of an edit that is several."""

        def make(s: Settings) -> Output:
            return self._edited(s, progress, callback)

        def draw(s: Settings, size: tuple[int, int]) -> Tensor:
            return self._first_noise(s, self._noise(s, size))

        factor = self.vae.config.factor
        size, grid = canvas.checked_size(s, self.size, factor), canvas.grid(s, self.size, factor)
        if s.enlarge > 1:
            return enlarged(make, s, size, factor)
        if s.extend is not None:
            return outpainted(make, draw, s, size, grid, soft=not self._inpaints)
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
            run = pipe._begin(settings)
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
        images = to_images(pipe.decode(latents))
        if run.picture is not None and run.mask is not None and settings.paste_back:
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
            return self._tiled(s.tiling)._begin(s).steps

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
        start, noise = s.latents if picture is None else picture, pipe._noise(s, size)
        assert start is not None, "checked above"
        with torch.no_grad():
            # The call that starts from noise alone never encodes: the mean will do. Else its z, from the same draw.
            z = pipe._start_latents(s, start, noise.shape, None if plan.replaces else noise)  # (B,4,h,w)
            seen = pipe._masked(s, picture, None, noise) if self._inpaints else None
            sigmas = plan.sigmas.flip(0)
            guide, log = conditioning.guide_of(s, sigmas), levels.in_log(s, self.schedule)
            denoise = conditioning.denoiser(pipe, s, size, log, guide, seen)
            x = z * (1 + sigmas[0] ** 2) ** 0.5  # from the VAE's scale to that of the last sigma
            steps = self._steps(s, denoise, x, sigmas, no_noise)
        for step in tqdm(steps, total=plan.evaluations, disable=not progress):
            x = step.x
            if callback is not None:
                callback(step)
        return x / levels.first_std(s, self.schedule, sigmas[-1]) if plan.replaces else (x - z) / sigmas[-1]

    def plan_strength(self, **settings: Any) -> StrengthPlan:
        """What a strength means for the settings of a call (steps, strength, strength_rule, sigmas, ...), to print."""
        check_names(settings)
        return levels.plan(Settings(**settings), self.schedule)

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
        dtype = self.vae.post_quant_conv.weight.dtype
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

    def _begin(self, s: Settings) -> Run:
        """The run of the settings, with gradients or without as they are now, whatever its consumer does later."""
        factor = self.vae.config.factor
        size = canvas.checked_size(s, self.size, factor)
        picture = None if s.image is None else fit(to_rgb(s.image), size, factor)
        mask = None if s.mask is None else fit(self._mask(s), size, factor)
        start = s.latents if picture is None else picture
        if picture is not None and mask is not None and s.masked_content != "original":
            start = fill(picture, mask)
        noise = self._noise(s, size)
        sigmas = levels.sigmas(s, self.schedule)
        replaces = True
        if start is not None:
            plan = levels.plan(s, self.schedule)
            sigmas, replaces = plan.sigmas, plan.replaces
        blends = mask is not None and not self._inpaints
        z = torch.zeros(())
        if start is not None and (not replaces or blends):
            # Where nothing is run, the picture comes back: no noise of any kind. Else, as in diffusers, the first draw.
            z = self._start_latents(s, start, noise.shape, noise if len(sigmas) else None)
        if not len(sigmas):
            return Run(z, sigmas, nothing(), size, picture, mask)
        first = self._first_noise(s, noise) if s.noise is None else s.noise.to(self.device, torch.float32)  # (B,4,h,w)
        if tuple(first.shape) != (s.count, *noise.shape):
            raise ValueError(f"noise has shape {tuple(first.shape)}: these settings need {(s.count, *noise.shape)}")
        if replaces:
            x = first * levels.first_std(s, self.schedule, sigmas[0])
        else:
            if mask is not None and s.masked_content in ("noise", "nothing"):
                m = self._latent_mask(s, mask, noise.shape)
                z = (1 - m) * z + (m * noise() if s.masked_content == "noise" else 0)
            x = z + sigmas[0] * first

        seen = self._masked(s, picture, mask, noise) if self._inpaints else None
        guide, log = conditioning.guide_of(s, sigmas), levels.in_log(s, self.schedule)
        denoise = conditioning.denoiser(self, s, size, log, guide, seen)
        if s.refiner is not None:
            if not isinstance(s.refiner, Pipeline):
                raise ValueError(
                    f"refiner is a {type(s.refiner).__name__}: give a Pipeline, Pipeline.from_pretrained(path)"
                )
            conditioning.check_refiner(self, s.refiner, s.mask is not None)
            refine = conditioning.denoiser(s.refiner._tiled(s.tiling), s, size, log, guide)
            denoise = handed_over(denoise, refine, self.schedule, s.refiner_start)
        kept = None
        if mask is not None and blends:
            kept = z, self._latent_mask(s, mask, noise.shape)
            if s.blend == "x0":
                denoise = keep_outside(denoise, *kept)
        fresh: Noise = noise
        if is_brownian(s.sampler_function):
            fresh = Brownian(s.seeds, noise.shape, sigmas[0], sigmas[sigmas > 0][-1], self.device)
        steps = self._steps(s, denoise, x, sigmas, fresh)
        if kept is not None and s.blend == "noise":
            steps = renoise_outside(steps, kept[0], first, kept[1])
        return Run(x, sigmas, steps, size, picture, mask, kept)

    def _steps(self, s: Settings, denoise: Denoiser, x: Tensor, sigmas: Tensor, noise: Noise) -> Steps:
        """The sampler's loop, with gradients or without as they are now, whatever its consumer does later."""
        grad = torch.is_grad_enabled()
        if grad and "memory" not in asked(s.guidance_function):  # what remembers its calls must not be called again
            denoise = checkpointed(denoise)
        steps = s.sampler_function(denoise, x, sigmas, noise, **levels.options(s, self.schedule))
        if not isinstance(steps, Generator):
            raise ValueError(
                f"the sampler {s.sampler_name!r} returned a {type(steps).__name__}: a sampler yields a Step for each"
                " interval (`yield Step(i, sigma, sigma_next, x, x0, eps)`), see ldm.samplers.euler"
            )
        return torch.set_grad_enabled(grad)(named)(steps, x.shape)

    def _masked(self, s: Settings, picture: Image.Image | None, mask: Image.Image | None, noise: SeededNoise) -> Tensor:
        """(B,5,h,w): what an inpainting model is shown, the mask and the latents of the picture without what it hides.

        Without a mask everything is hidden. Half hidden is hidden: these models have learnt from hard masks.
        """
        if picture is None and mask is not None:
            raise ValueError("mask with latents=: an inpainting model looks at the picture itself, give it as image=")
        height, width = (side * self.vae.config.factor for side in noise.shape[1:])
        hidden, visible = torch.ones(1, 1, *noise.shape[1:]), torch.zeros(1, 3, height, width)
        if mask is not None and picture is not None:
            mask = mask.point(lambda value: 255 * (value >= 128))
            hidden = latent_mask(mask, noise.shape[1:], nearest=True)
            visible = to_tensor(picture) * (1 - latent_mask(mask, (height, width), nearest=True))
        z = self._encode(visible, noise)
        return torch.cat([hidden.to(self.device).expand(len(z), -1, -1, -1), z], dim=1)

    def _encode(self, pixels: Tensor, noise: SeededNoise | None) -> Tensor:
        """pixels (1,3,H,W) -> their latents, drawn for each picture (B,4,h,w), or without noise the mean (1,4,h,w)."""
        mean, std = self.vae.encode(pixels.to(self.device, self.vae.quant_conv.weight.dtype))
        z = finite(mean, "encoder").float()
        if noise is not None:
            z = z + std.float() * noise()
        return self.vae.config.scaling_factor * z

    @property
    def _inpaints(self) -> bool:
        """Whether the UNet is shown a mask and the picture without what it hides."""
        return self.unet.config.in_channels > self.unet.config.out_channels

    def _noise(self, s: Settings, size: tuple[int, int]) -> SeededNoise:
        """The stream of each picture of a size (width, height) in pixels."""
        factor = self.vae.config.factor
        shape = (self.vae.config.latent_channels, -(-size[1] // factor), -(-size[0] // factor))
        return SeededNoise(s.seeds, shape, self.device)

    def _first_noise(self, s: Settings, noise: SeededNoise) -> Tensor:
        """The next draw (B,4,h,w) of each picture, varied as the settings say."""
        factor, (width, height) = self.vae.config.factor, s.seed_resize_from or (0, 0)
        if width % factor or height % factor:
            raise ValueError(
                f"seed_resize_from {width}x{height}: width and height must be multiples of {factor} for this model"
            )
        size = (height // factor, width // factor) if s.seed_resize_from else None
        return noise.varied(s.subseeds, s.subseed_strength, size)

    def _mask(self, s: Settings) -> Image.Image:
        """The mask in mode L, at the size of the picture."""
        assert s.mask is not None
        mask = to_mask(s.mask, s.mask_blur)
        if s.image is None:
            check_mask(mask.size, canvas.size(s, self.size, self.vae.config.factor))
        if mask.getbbox() is None:
            warnings.warn("the mask is black everywhere: nothing is repainted; white is what is", stacklevel=2)
        return mask

    def _latent_mask(self, s: Settings, mask: Image.Image, shape: tuple[int, ...]) -> Tensor:
        """(1,1,h,w): whatever a mask touches is repainted; but as diffusers has it, with its blending."""
        return latent_mask(mask, shape[1:], nearest=s.blend == "noise").to(self.device)

    def _start_latents(
        self, s: Settings, start: Image.Image | Tensor, shape: tuple[int, ...], noise: SeededNoise | None
    ) -> Tensor:
        """The picture to start from, as latents (B,*shape) in the VAE's scale."""
        if isinstance(start, Tensor):
            if tuple(start.shape) not in [(count, *shape) for count in (1, s.count)]:
                raise ValueError(
                    f"latents have shape {tuple(start.shape)}: these settings need {(s.count, *shape)},"
                    " or one picture for all"
                )
            return start.to(self.device, torch.float32).expand(s.count, -1, -1, -1)
        return self._encode(to_tensor(start), noise).expand(s.count, -1, -1, -1)


def no_noise(sigma: Tensor, sigma_next: Tensor) -> Tensor:
    raise ValueError(
        f"the sampler drew noise from sigma {float(sigma):.4f} to {float(sigma_next):.4f}, which no way leads back"
        " from: invert with a deterministic one (ddim, euler, heun, dpmpp_2m, ...), or with eta=0"
    )


def one_run(s: Settings, why: str) -> None:
    """Raises ValueError for settings that make several runs."""
    several = [name for name in ("extend", "tile", "padding_mask_crop") if getattr(s, name) is not None]
    if several := several + ["enlarge"] * (s.enlarge > 1):
        raise ValueError(f"{several[0]}={getattr(s, several[0])}: {why}; call the pipeline for this")


def named(steps: Steps, shape: torch.Size) -> Steps:
    """The same steps; what is no Step of that shape, NaN or infinity is an error, before anybody sees it."""
    i, sent = 0, None
    try:
        while True:
            step = steps.send(sent)
            if not isinstance(step, Step) or step.x.shape != shape:
                got = f"x {tuple(step.x.shape)}" if isinstance(step, Step) else f"a {type(step).__name__}"
                raise ValueError(
                    f"the sampler yielded {got}: yield a Step, with x in the shape {tuple(shape)} it is given"
                )
            if not torch.isfinite(step.x).all():
                raise FloatingPointError(f"x has NaN or infinity in it after sigma={float(step.sigma):.4f}")
            i, sent = step.i + 1, (yield step)
    except StopIteration:
        return
    except FloatingPointError as error:
        raise FloatingPointError(f"step {i}: {error}") from error
    finally:
        steps.close()


def nothing() -> Steps:
    yield from ()


def finite(values: Tensor, part: str) -> Tensor:
    """`values` as they are, if they are numbers."""
    if not torch.isfinite(values).all():
        cure = "the latents or the VAE itself are at fault: give other settings, or another vae="
        if values.dtype != torch.float32:
            cure = "load the model with vae_dtype=torch.float32, or give another vae="
        raise FloatingPointError(f"the VAE's {part} returned NaN or infinity, running in {values.dtype}: {cure}")
    return values
