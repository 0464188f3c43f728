"""A run of the pipeline before it begins: what a call's settings make of picture, mask, noise and sampler."""

import warnings
from collections.abc import Generator
from typing import TYPE_CHECKING, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from ldm import canvas, conditioning, levels
from ldm.guidance import asked, handed_over
from ldm.image import latent_mask, to_mask, to_rgb, to_tensor
from ldm.img2img import fill, fit, keep_outside, renoise_outside
from ldm.noise import SeededNoise, drawn_each_step
from ldm.offload import at_work
from ldm.samplers import Brownian, Denoiser, Noise, Step, Steps, checkpointed, is_brownian
from ldm.settings import LISTS, Settings, check_mask

if TYPE_CHECKING:
    from ldm.pipeline import Pipeline


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


def begin(pipe: "Pipeline", s: Settings) -> Run:
    """The run of the settings, with gradients or without as they are now, whatever its consumer does later."""
    factor, how = pipe.vae.config.factor, s.how
    size = canvas.checked_size(s, pipe.size, factor)
    picture = None if s.image is None else fit(to_rgb(s.image), size, factor)
    mask = None if s.mask is None else fit(mask_of(pipe, s), size, factor)
    start = s.latents if picture is None else picture
    if picture is not None and mask is not None and s.masked_content != "original":
        start = fill(picture, mask)
    noise = noise_of(pipe, s, size)
    sigmas = levels.sigmas(s, pipe.schedule)
    replaces = True
    if start is not None:
        plan = levels.plan(s, pipe.schedule)
        sigmas, replaces = plan.sigmas, plan.replaces
    blends = mask is not None and not inpaints(pipe)
    z = torch.zeros(())
    if start is not None and (not replaces or blends):
        # Where nothing is run, the picture comes back: no noise of any kind. Else, as in diffusers, the first draw.
        z = start_latents(pipe, s, start, noise.shape, noise if len(sigmas) else None)
    if not len(sigmas):
        return Run(z, sigmas, nothing(), size, picture, mask)
    first = first_noise(pipe, s, noise) if s.noise is None else s.noise.to(pipe.device, torch.float32)  # (B,4,h,w)
    if tuple(first.shape) != (s.count, *noise.shape):
        raise ValueError(f"noise has shape {tuple(first.shape)}: these settings need {(s.count, *noise.shape)}")
    if replaces:
        x = first * levels.first_std(s, pipe.schedule, sigmas[0])
    else:
        if mask is not None and s.masked_content in ("noise", "nothing"):
            m = repainted(pipe, s, mask, noise.shape)
            z = (1 - m) * z + (m * noise() if s.masked_content == "noise" else 0)
        x = z + levels.first_std(s, pipe.schedule, sigmas[0], alone=False) * first

    seen = shown(pipe, s, picture, mask, noise) if inpaints(pipe) else None
    guide, reading = conditioning.guide_of(s, sigmas), levels.reading(s, pipe.schedule)
    denoise = conditioning.denoiser(pipe, s, size, reading, guide, seen)
    if s.refiner is not None:
        from ldm.pipeline import Pipeline

        if not isinstance(s.refiner, Pipeline):
            raise ValueError(
                f"refiner is a {type(s.refiner).__name__}: give a Pipeline, Pipeline.from_pretrained(path)"
            )
        conditioning.check_refiner(pipe, s.refiner, s.mask is not None)
        refine = conditioning.denoiser(s.refiner._tiled(s.tiling), s, size, reading, guide)
        denoise = handed_over(denoise, refine, pipe.schedule, s.refiner_start)
    kept = None
    if mask is not None and blends:
        kept = z, repainted(pipe, s, mask, noise.shape)
        if how.blend == "x0":
            denoise = keep_outside(denoise, *kept)
        if how.idle_draws == "mask":
            noise()
    stream = noise if how.loop_seed is None else noise_of(pipe, s, size, how.loop_seed)
    fresh: Noise = stream
    if is_brownian(s.sampler_function):
        fresh = Brownian(s.seeds, noise.shape, sigmas[0], sigmas[sigmas > 0][-1], pipe.device)
    steps = loop(pipe, s, denoise, x, sigmas, fresh)
    if how.idle_draws == "step":
        steps = drawn_each_step(steps, stream)
    if kept is not None and how.blend == "noise":
        steps = renoise_outside(steps, kept[0], first, kept[1])
    return Run(x, sigmas, steps, size, picture, mask, kept)


def loop(pipe: "Pipeline", s: Settings, denoise: Denoiser, x: Tensor, sigmas: Tensor, noise: Noise) -> Steps:
    """The sampler's loop, with gradients or without as they are now, whatever its consumer does later."""
    grad = torch.is_grad_enabled()
    # What remembers its calls must not be called again.
    if grad and "memory" not in asked(s.guidance_function) and s.deep_cache == 1:
        denoise = checkpointed(denoise)
    steps = s.sampler_function(denoise, x, sigmas, noise, **levels.options(s, pipe.schedule))
    if not isinstance(steps, Generator):
        raise ValueError(
            f"the sampler {s.sampler_name!r} returned a {type(steps).__name__}: a sampler yields a Step for each"
            " interval (`yield Step(i, sigma, sigma_next, x, x0, eps)`), see ldm.samplers.euler"
        )
    return torch.set_grad_enabled(grad)(named)(steps, x.shape)


def shown(
    pipe: "Pipeline", s: Settings, picture: Image.Image | None, mask: Image.Image | None, noise: SeededNoise
) -> Tensor:
    """(B,5,h,w): what an inpainting model is shown, the mask and the latents of the picture without what it hides.

    Without a mask everything is hidden. Half hidden is hidden: these models have learnt from hard masks.
    """
    if picture is None and mask is not None:
        raise ValueError("mask with latents=: an inpainting model looks at the picture itself, give it as image=")
    height, width = (side * pipe.vae.config.factor for side in noise.shape[1:])
    hidden, visible = torch.ones(1, 1, *noise.shape[1:]), torch.zeros(1, 3, height, width)
    if mask is not None and picture is not None:
        mask = mask.point(lambda value: 255 * (value >= 128))
        hidden = latent_mask(mask, noise.shape[1:], nearest=True)
        visible = to_tensor(picture) * (1 - latent_mask(mask, (height, width), nearest=True))
    z = encode(pipe, visible, noise if s.how.samples_posterior else None)
    return torch.cat([hidden.to(pipe.device).expand(len(z), -1, -1, -1), z], dim=1)


def encode(pipe: "Pipeline", pixels: Tensor, noise: SeededNoise | None) -> Tensor:
    """pixels (1,3,H,W) -> their latents, drawn for each picture (B,4,h,w), or without noise the mean (1,4,h,w)."""
    at_work(pipe, pipe.vae)
    mean, std = pipe.vae.encode(pixels.to(pipe.device, next(pipe.vae.parameters()).dtype))
    z = finite(mean, "encoder").float()
    if noise is not None and std.any():  # for TAESD, which is certain, nothing is drawn, as in diffusers
        z = z + std.float() * noise()
    return pipe.vae.config.scaling_factor * z


def inpaints(pipe: "Pipeline") -> bool:
    """Whether the UNet is shown a mask and the picture without what it hides."""
    return pipe.unet.config.in_channels > pipe.unet.config.out_channels


def noise_of(pipe: "Pipeline", s: Settings, size: tuple[int, int], further: int = 0) -> SeededNoise:
    """The stream of each picture of a size (width, height) in pixels, of its seed and so many further."""
    factor = pipe.vae.config.factor
    shape = (pipe.vae.config.latent_channels, -(-size[1] // factor), -(-size[0] // factor))
    seeds = [(seed + further) % 2**64 for seed in s.seeds]
    return SeededNoise(seeds, shape, pipe.device, s.how.shares and not isinstance(s.seed, LISTS))


def first_noise(pipe: "Pipeline", s: Settings, noise: SeededNoise) -> Tensor:
    """The next draw (B,4,h,w) of each picture, varied as the settings say."""
    factor, (width, height) = pipe.vae.config.factor, s.seed_resize_from or (0, 0)
    if width % factor or height % factor:
        raise ValueError(
            f"seed_resize_from {width}x{height}: width and height must be multiples of {factor} for this model"
        )
    size = (height // factor, width // factor) if s.seed_resize_from else None
    return noise.varied(s.subseeds, s.subseed_strength, size)


def mask_of(pipe: "Pipeline", s: Settings) -> Image.Image:
    """The mask in mode L, at the size of the picture."""
    assert s.mask is not None
    mask = to_mask(s.mask, s.mask_blur)
    if s.image is None:
        check_mask(mask.size, canvas.size(s, pipe.size, pipe.vae.config.factor))
    if mask.getbbox() is None:
        warnings.warn("the mask is black everywhere: nothing is repainted; white is what is", stacklevel=2)
    return mask


def repainted(pipe: "Pipeline", s: Settings, mask: Image.Image, shape: tuple[int, ...]) -> Tensor:
    """(1,1,h,w): whatever a mask touches is repainted; but as diffusers has it, with its blending."""
    return latent_mask(mask, shape[1:], nearest=s.how.blend == "noise").to(pipe.device)


def start_latents(
    pipe: "Pipeline", s: Settings, start: Image.Image | Tensor, shape: tuple[int, ...], noise: SeededNoise | None
) -> Tensor:
    """The picture to start from, as latents (B,*shape) in the VAE's scale."""
    if isinstance(start, Tensor):
        if tuple(start.shape) not in [(count, *shape) for count in (1, s.count)]:
            raise ValueError(
                f"latents have shape {tuple(start.shape)}: these settings need {(s.count, *shape)},"
                " or one picture for all"
            )
        return start.to(pipe.device, torch.float32).expand(s.count, -1, -1, -1)
    return encode(pipe, to_tensor(start), noise if s.how.samples_posterior else None).expand(s.count, -1, -1, -1)


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
