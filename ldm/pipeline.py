"""Text to image and image to image: the parts put together."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ldm import checkpoint
from ldm.clip import TextEncoder
from ldm.clip.tokenizer import Tokenizer
from ldm.guidance import guided
from ldm.image import to_images, to_mask, to_rgb, to_tensor
from ldm.img2img import keep_outside, steps_at
from ldm.noise import SeededNoise
from ldm.samplers import PREDICTION_TYPES, VARIANCE_PRESERVING, Schedule, Step, net_denoiser
from ldm.settings import Settings
from ldm.unet import UNet
from ldm.vae import VAE

DEFAULT_MODEL = Path(__file__).parent.parent / "weights" / "emoji-64"


@dataclass(frozen=True)
class Output:
    """images: PIL, RGB. latents (B,4,h,w) float32 in the VAE's scale (scaling_factor * z)."""

    images: list[Image.Image]
    latents: Tensor
    seeds: list[int]
    settings: Settings


class Pipeline:
    """The parts are public and may be replaced: `unet`, `vae`, `text_encoder`, `tokenizer`, `schedule`."""

    def __init__(
        self,
        unet: UNet,
        vae: VAE,
        text_encoder: TextEncoder,
        tokenizer: Tokenizer,
        schedule: Schedule,
        prediction_type: str = "epsilon",
        size: int = 512,
        name: str = "",
    ):
        """`size`: the side in pixels of a picture when nobody says. `name`: the model's, for the record."""
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

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path | None = None,
        *,
        vae: str | Path | None = None,
        dtype: torch.dtype | None = None,
        device: str | torch.device | None = None,
        prediction_type: str | None = None,
    ) -> "Pipeline":
        """An official single file or a diffusers folder; None is the default model that ships with the project.

        vae: a VAE file or folder that replaces the built-in one. dtype: of the nets, float32 unless given; the loop
        itself always runs in float32. device: a GPU where there is one, unless given. prediction_type: "epsilon" or
        "v_prediction", where the file does not say or says it wrong. Nothing is downloaded.
        """
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if device.type == "cuda" and not torch.cuda.is_available():
            raise ValueError(f"device={str(device)!r}: PyTorch {torch.__version__} sees no GPU here, use device='cpu'")
        dtype = dtype or torch.float32
        allowed = [torch.float32, torch.bfloat16] + [torch.float16] * (device.type != "cpu")
        if dtype not in allowed:
            raise ValueError(f"dtype={dtype} on {device.type}: use {' or '.join(map(str, allowed))}")
        if path is None and not DEFAULT_MODEL.exists():
            raise FileNotFoundError(
                f"the default model is not at {DEFAULT_MODEL}: it is part of a checkout of ldm. Install from one, with"
                " `pip install -e .`, or give the path of a model"
            )
        path = DEFAULT_MODEL if path is None else Path(path)
        parts = checkpoint.load(path, vae=vae, dtype=dtype, device=device)
        return cls(
            parts.unet,
            parts.vae,
            parts.text_encoder,
            parts.tokenizer,
            Schedule.from_config(parts.scheduler),
            prediction_type or parts.scheduler.get("prediction_type", "epsilon"),
            parts.size,
            path.stem if path.is_file() else path.resolve().name,
        )

    @property
    def device(self) -> torch.device:
        return self.unet.conv_in.weight.device

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
        run, FloatingPointError when a net returns NaN or infinity.
        """
        return self.run(Settings(prompt, **settings), progress, callback)

    def run(self, settings: Settings, progress: bool = True, callback: Callable[[Step], None] | None = None) -> Output:
        """`__call__` with settings that are already made."""
        x, sigmas, steps, kept = self._begin(settings)
        for step in tqdm(steps, total=len(sigmas) - 1, disable=not progress):
            x = step.x
            if callback is not None:
                callback(step)
        latents = x / (1 + sigmas[-1] ** 2) ** 0.5  # from the last sigma's scale to the VAE's
        if kept is not None:  # without the noise that DDIM's last sigma leaves
            z, mask = kept
            latents = mask * latents + (1 - mask) * z
        return Output(to_images(self.decode(latents)), latents, settings.seeds, settings)

    def stream(self, prompt: str | list[str] = "", **settings: Any) -> Iterator[Step]:
        """The same call as the sampler's own loop: lazily what `__call__` would have shown its callback.

        `settings` as for `__call__`, without progress and callback: whoever looks at the steps is both.
        """
        return self._begin(Settings(prompt, **settings))[2]

    @torch.no_grad()
    def encode_text(self, texts: list[str], clip_skip: int = 1) -> Tensor:
        """The context (B,77,width) in the nets' dtype."""
        return self.text_encoder(self.tokenizer(texts).to(self.device), clip_skip).context

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """latents (B,4,h,w) in the VAE's scale -> (B,3,H,W) float32, about [-1,1]."""
        dtype = self.vae.post_quant_conv.weight.dtype
        pixels = self.vae.decode(latents.to(dtype) / self.vae.config.scaling_factor)
        return finite(pixels, "decoder").float()

    @torch.no_grad()
    def _begin(self, s: Settings) -> tuple[Tensor, Tensor, Iterator[Step], tuple[Tensor, Tensor] | None]:
        """x at the first sigma, the sigmas to run, the loop that has not begun, what a mask keeps: (latents, mask)."""
        start = s.latents if s.image is None else to_rgb(s.image)
        width, height = self._size(s, start)
        factor = self.vae.config.factor
        noise = SeededNoise(s.seeds, (self.vae.config.latent_channels, height // factor, width // factor), self.device)
        sampler = s.sampler_function
        # A functools.partial of a sampler counts as that sampler.
        variance_preserving = getattr(sampler, "func", sampler) in VARIANCE_PRESERVING

        sigmas, spacing = self._sigmas(s, variance_preserving)
        starts_anew = start is None or s.strength == 1
        z = torch.zeros(())
        if start is not None and (s.strength < 1 or s.mask is not None):
            z = self._start_latents(s, start, (width, height), noise)
        if not starts_anew:
            count = steps_at(s.strength, len(sigmas) - 1)
            if count == 0:
                return z, torch.zeros(1), iter(()), None
            sigmas = sigmas[-count - 1 :]
        first = s.noise.to(self.device, torch.float32) if s.noise is not None else noise()  # (B,4,h,w)
        if tuple(first.shape) != (s.count, *noise.shape):
            raise ValueError(f"noise has shape {tuple(first.shape)}: these settings need {(s.count, *noise.shape)}")
        if starts_anew:
            x = first * ((1 + sigmas[0] ** 2) ** 0.5 if variance_preserving or spacing == "leading" else sigmas[0])
        else:
            x = z + sigmas[0] * first

        context = self.encode_text(s.texts, s.clip_skip)
        if s.guidance_scale == 1:
            denoise = net_denoiser(self.unet, context, self.schedule, self.prediction_type, spacing == "karras")
        else:
            context = torch.cat([self.encode_text(s.negative_texts, s.clip_skip), context])
            both = net_denoiser(self.unet, context, self.schedule, self.prediction_type, spacing == "karras")
            denoise = guided(both, s.guidance_scale)
        kept = None if s.mask is None else (z, to_mask(s.mask, *noise.shape[1:]).to(self.device))
        if kept is not None:
            denoise = keep_outside(denoise, *kept)
        options = {"eta": s.eta} if s.eta else {}
        return x, sigmas, without_grad(sampler(denoise, x, sigmas, noise, **options)), kept

    def _sigmas(self, s: Settings, variance_preserving: bool) -> tuple[Tensor, str | None]:
        """The whole schedule of the call, and the name of its spacing if it has one."""
        if isinstance(s.sigmas, Tensor):
            return s.sigmas.to("cpu", torch.float64), None
        spacing = s.sigmas or self.schedule.spacing or ("leading" if variance_preserving else "linspace")
        end = self.schedule.sigma_min if variance_preserving and not self.schedule.set_alpha_to_one else 0.0
        return self.schedule.sigmas(s.steps, spacing, end=end), spacing

    def _size(self, s: Settings, start: Image.Image | Tensor | None) -> tuple[int, int]:
        """Width and height in pixels."""
        factor, width, height = self.vae.config.factor, self.size, self.size
        if isinstance(start, Image.Image):
            width, height = (max(side // factor * factor, factor) for side in start.size)
        elif start is not None:
            height, width = (side * factor for side in start.shape[-2:])
        width = width if s.width is None else s.width
        height = height if s.height is None else s.height
        if width % factor or height % factor:
            raise ValueError(f"size {width}x{height}: width and height must be multiples of {factor} for this model")
        return width, height

    def _start_latents(
        self, s: Settings, start: Image.Image | Tensor, size: tuple[int, int], noise: SeededNoise
    ) -> Tensor:
        """The picture to start from, as latents (B,4,h,w) in the VAE's scale. size: (width, height) in pixels."""
        if isinstance(start, Tensor):
            if tuple(start.shape) not in [(count, *noise.shape) for count in (1, s.count)]:
                raise ValueError(
                    f"latents have shape {tuple(start.shape)}: these settings need {(s.count, *noise.shape)},"
                    " or one picture for all"
                )
            return start.to(self.device, torch.float32).expand(s.count, -1, -1, -1)
        if start.size != size:
            start = start.resize(size, Image.Resampling.LANCZOS)
        mean, std = self.vae.encode(to_tensor(start).to(self.device, self.vae.quant_conv.weight.dtype))
        z = finite(mean, "encoder").float()
        if s.strength > 0:  # 0 returns the picture: no noise of any kind. Else, as in diffusers, the first draw.
            z = z + std.float() * noise()
        return (self.vae.config.scaling_factor * z).expand(s.count, -1, -1, -1)


@torch.no_grad()
def without_grad(steps: Iterator[Step]) -> Iterator[Step]:
    """The sampler's loop runs without gradients, its consumer as it likes."""
    yield from steps


def finite(values: Tensor, part: str) -> Tensor:
    """`values` as they are, if they are numbers."""
    if not torch.isfinite(values).all():
        raise FloatingPointError(
            f"the VAE's {part} returned NaN or infinity, running in {values.dtype}: load the model with"
            " dtype=torch.float32 or torch.bfloat16, or give another vae="
        )
    return values
