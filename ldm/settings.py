"""The arguments of one call, checked before any work is done."""

import difflib
import inspect
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, fields, replace
from numbers import Integral, Real
from types import NoneType
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ldm.conventions import CONVENTIONS, Conventions
from ldm.functions import check_guidance, check_options, check_sampler, check_sigmas
from ldm.guidance import GUIDANCES, Guidance, cfg, name_of
from ldm.image import upright_size
from ldm.img2img import CANVAS_FILLS, STRENGTH_RULES
from ldm.samplers import ALIASES, SAMPLERS, SPACED, Sampler

if TYPE_CHECKING:
    from ldm.pipeline import Pipeline
    from ldm.record import Ran


CHOICES = {
    "strength_rule": STRENGTH_RULES,
    "masked_content": ("original", "fill", "noise", "nothing"),
    "blend": ("x0", "noise"),
    "extend_fill": CANVAS_FILLS,
    "enlarge_filter": ("latent", "latent-nearest", "latent-bicubic", "nearest", "bilinear", "bicubic", "lanczos"),
}

# Sets of approximations, from the table in the README: `pipe.fast(name)`.
FAST: dict[str, dict[str, Any]] = {
    "balanced": {"deep_cache": 2},
    "draft": {"deep_cache": 4, "token_merging": 0.5},
}


def is_utf8(text: str) -> bool:
    return not any(0xD800 <= ord(character) < 0xE000 for character in text)


def is_whole(value: Any, low: float, high: float = math.inf) -> bool:
    """A whole number, Python's or numpy's, from `low` to `high`; True and False are none."""
    return isinstance(value, Integral) and not isinstance(value, bool) and low <= int(value) <= high


LISTS = (Sequence, np.ndarray)


def counted(seed: int | Sequence[int], count: int) -> list[int]:
    """The seeds that are listed, or `count` from `seed` up."""
    return [int(s) for s in seed] if isinstance(seed, LISTS) else [int(seed) + i for i in range(count)]


# What others call our settings.
PEERS = {
    "num_inference_steps": "steps",
    "num_images_per_prompt": "batch_size",
    "cfg_scale": "guidance_scale",
    "denoising_strength": "strength",
    "mask_image": "mask",
    "generator": "seed",
    "scheduler": "sampler",
    "sampler_name": "sampler",
}


def check_names(given: Iterable[str]) -> None:
    """Raises TypeError for a name that is no setting, with the one that was probably meant."""
    names = [field.name for field in fields(Settings)]
    for name in given:
        if name not in names:
            close = [PEERS[name]] if name in PEERS else difflib.get_close_matches(name, names, 1)
            meant = f"did you mean {close[0]}=? " if close else ""
            raise TypeError(f"{name}= is no setting: {meant}There are {', '.join(names)}")


def check_mask(mask: tuple[int, int], picture: tuple[int, int]) -> None:
    if mask != picture:
        raise ValueError(
            f"mask of {mask[0]}x{mask[1]} pixels for a picture of {picture[0]}x{picture[1]}: give a mask of the"
            " picture's size, e.g. mask.resize(image.size)"
        )


@dataclass(frozen=True, eq=False)
class Settings:
    """What `Pipeline.__call__` and `Pipeline.stream` take. Raises ValueError for what cannot be run.

    prompt, negative_prompt: a text, or a list of texts: one picture each. Without a negative prompt (None) guidance
        leads away from the empty text, or from zeros in SDXL.
    steps: evaluations of the net, 1 to 1000. guidance_scale: 1 is no guidance, and half of the work; below 1 leans to
        the negative prompt (in diffusers everything up to 1 is no guidance).
    sampler: a name of `ldm.SAMPLERS`, webui's or diffusers' name ("DPM++ 2M Karras" sets sigmas as well), or a function
        `(denoise, x, sigmas, noise, **options)` that yields `Step`s; its option `schedule`, if any, is the model's.
    sigmas: a spacing ("leading", "trailing", "linspace", "karras", and the others of `ldm.samplers.SPACINGS`), or a
        decreasing tensor (n+1,) that ends at or above 0, used as it is instead of `steps`. None: the spacing of the
        model, else that of the sampler's reference, which also says from what noise a run begins and where it ends
        (`ldm.samplers.REFERENCES`): ddim ends at the sigma of t = 0, "leading" starts from noise of variance
        1 + sigma^2. A tensor says where to begin and end by itself, and euler starts it at sigma * noise.
    seed: of the first picture, picture i has seed + i; or a list of seeds, one each; with one prompt and batch_size 1
        as many pictures as seeds. batch_size: pictures per prompt.
    subseed, subseed_strength: the initial noise turns from the seed's (0) to the subseed's (1), as webui's variations
        do. Picture i has subseed + i then, and all of them the one seed; or give lists.
    seed_resize_from: (width, height) in pixels. The initial noise is that of a picture of this size in the middle, as
        webui's "resize seed", so that another size shows much of the same picture.
    width, height: in pixels. None: the picture's, or the model's native size. What is no multiple of the VAE's factor
        (8 in the official models) is padded, and cut off again.
    tiling: "x", "y" or "both". The picture joins itself at its left and right edge, top and bottom, or all: what comes
        next to an edge is the opposite one, in every convolution. (Exact where sides are multiples of 64 pixels.)
    emphasis: weights in prompts as in webui, (word:1.3), [word], BREAK (see ldm/clip/prompt.py): "mean" keeps the mean
        of the text's context, as webui does (and "default"), "none" does not; None takes brackets as text.
    conventions: "diffusers", "webui", "comfy" or "compvis": what these do differently where the call does not say, all
        together: how a run starts and ends, draws noise, counts strength and clip_skip, and rounds pixels
        (`ldm.conventions`). What the call gives itself goes before it. None: each sampler as its own reference does.
    clip_skip: 1 is the last layer of the text encoder, 2 the one before it, as webui counts; the conventions may count
        in another way. None: the last.
    image: the picture to start from. strength: 0 returns it, 1 replaces it by noise. strength_rule: how many of the
        steps that makes, and from which sigma: "floor" (None), "diffusers", "webui", "comfy" or "continuous"
        (`print(pipe.plan_strength(strength=0.3))`, and `ldm.img2img`).
    latents: (B,4,h,w) in the VAE's scale (as `Output.latents`), takes the place of the encoded image.
    noise: (B,4,h,w) standard normal, takes the place of the initial noise.
    mask: of the image's size, white where to repaint, black where to keep, grey to blend. mask_blur: softens its edges,
        a standard deviation in pixels. masked_content: what a run that starts from the image finds under the mask:
        "original", the colours around it ("fill"), other "noise" or "nothing" (zeros) in the latents, as in webui.
        blend: how the kept part enters the loop: "x0" (webui; None), or re-"noise"d after each step (diffusers).
        paste_back: outside of the mask the result is the image bit for bit (None), not what the VAE makes of it.
        padding_mask_crop: inpaint only a box around the mask with so many pixels around it, at width x height (the
        model's native size), and put it back.
    extend: (left, top, right, bottom) in pixels: more canvas around the image, painted to go on from it. extend_fill:
        what is painted over: the image's "edge" or "mirror" image, or "noise" of its colours.
    enlarge: the hires pass: the picture (made first, if no image is given) is made so many times as wide and high by
        enlarge_filter, "latent", "latent-nearest", "latent-bicubic", or of the decoded picture "nearest", "bilinear",
        "bicubic", "lanczos", and goes through image to image at `strength`.
    tile: the side in pixels of the tiles in which an image is done that is larger than one, and the canvas of `extend`
        (there, None is the model's native size). tile_overlap: pixels that neighbours share; None: a quarter.
    eta: the share of fresh noise, 0 to 1; None: the sampler's own, 0 in ddim and 1 in the ancestral ones.
    sampler_options: further arguments of the sampler, {"s_churn": 10}.
    guidance: how the prompt's noise and the negative prompt's become one: a name of `ldm.guidance.GUIDANCES`, or a
        function of (eps_cond, eps_uncond, sigma) that returns eps; by naming more parameters it gets more (see there).
        "cfg"; "cfg_pp", whose guidance_scale is 0 to 1; "perp_neg", for a negative prompt that overlaps the prompt;
        "apg" and "dynamic_thresholding", for high scales. Any but "cfg" guides at guidance_scale 1 too.
    guidance_options: its further arguments, {"norm_threshold": 15}.
    guidance_interval: (low, high), guide where low < sigma <= high, elsewhere run the prompt alone, which is half of
        the work (Kynkäänniemi et al. 2024 take 0.28 and 5.42 for SDXL).
    guidance_rescale: 0 to 1, tames strong guidance, of any kind, with v prediction (Lin et al. 2023 take 0.7).
    deep_cache: an approximation: of so many evaluations of the net the first is whole, the others reuse what its deep
        layers made of that one (DeepCache, Ma et al. 2023). 1: all are whole.
    token_merging: an approximation: the share, 0 to 0.75, of the finest tokens that self-attention does not see, being
        merged into others (ToMe, Bolya & Hoffman 2023).
    original_size, crops_coords_top_left, target_size: SDXL's size conditioning, (height, width) and (top, left) in
        pixels, as in diffusers; sizes of None are the picture's own. aesthetic_score, negative_aesthetic_score: its
        refiner's.
    refiner: a pipeline, of which the UNet and the text encoder do the rest after the share `refiner_start` of the
        noise levels.

    Of a call that has run, as `out.settings`, `ran` is what else decided its pictures: the model and its hash, the
    sigmas that it went through, files, dtypes, device, versions (`ldm.record.Ran`); of all others it is None.
    """

    prompt: str | Sequence[str] = ""
    negative_prompt: str | Sequence[str] | None = None
    steps: int = 20
    guidance_scale: float = 7.5
    sampler: str | Sampler = "euler"
    sigmas: str | Tensor | None = None
    seed: int | Sequence[int] = 0
    subseed: int | Sequence[int] | None = None
    subseed_strength: float = 0.0
    seed_resize_from: tuple[int, int] | None = None
    batch_size: int = 1
    width: int | None = None
    height: int | None = None
    tiling: str | None = None
    clip_skip: int | None = None
    image: Image.Image | None = field(default=None, repr=False)
    strength: float = 0.75
    strength_rule: str | None = None
    mask: Image.Image | None = field(default=None, repr=False)
    mask_blur: float = 0.0
    masked_content: str = "original"
    blend: str | None = None
    paste_back: bool | None = None
    padding_mask_crop: int | None = None
    extend: tuple[int, int, int, int] | None = None
    extend_fill: str = "edge"
    enlarge: float = 1.0
    enlarge_filter: str = "latent"
    tile: int | None = None
    tile_overlap: int | None = None
    latents: Tensor | None = field(default=None, repr=False)
    noise: Tensor | None = field(default=None, repr=False)
    eta: float | None = None
    sampler_options: Mapping[str, Any] | None = None
    guidance: str | Guidance = "cfg"
    guidance_options: Mapping[str, Any] | None = None
    guidance_interval: tuple[float, float] | None = None
    guidance_rescale: float = 0.0
    deep_cache: int = 1
    token_merging: float = 0.0
    original_size: tuple[int, int] | None = None
    crops_coords_top_left: tuple[int, int] = (0, 0)
    target_size: tuple[int, int] | None = None
    aesthetic_score: float = 6.0
    negative_aesthetic_score: float = 2.5
    refiner: "Pipeline | None" = field(default=None, repr=False)
    refiner_start: float = 0.8
    emphasis: str | None = "default"
    conventions: str | Conventions | None = None
    ran: ClassVar["Ran | None"] = None  # no field: nobody asks for it, and settings that are changed have not run

    def __post_init__(self):
        for name in ("prompt", "negative_prompt"):
            texts = getattr(self, name)
            if name == "negative_prompt" and texts is None:
                continue
            if not isinstance(texts, (str, list, tuple)) or not all(isinstance(text, str) for text in texts):
                raise ValueError(f"{name}={texts!r}: give a text, or a list of texts")
            if not all(is_utf8(text) for text in texts):
                raise ValueError(f"{name}={texts!r}: it has halves of surrogate pairs, which no file can hold")
        if not is_whole(self.steps, 1, 1000):
            raise ValueError(f"steps={self.steps!r}: give a whole number from 1 to 1000")
        shares = ("guidance_rescale", "refiner_start", "subseed_strength")
        scores = ("aesthetic_score", "negative_aesthetic_score")
        for name in ("strength", "guidance_scale", "mask_blur", "enlarge", "token_merging", *shares, *scores):
            if isinstance(getattr(self, name), bool) or not isinstance(getattr(self, name), Real):
                raise ValueError(f"{name}={getattr(self, name)!r}: give a number")
        if not 0 <= self.strength <= 1:
            raise ValueError(f"strength={self.strength}: give a number from 0 (the image) to 1 (all new)")
        if not 0 <= self.token_merging <= 0.75:
            raise ValueError(f"token_merging={self.token_merging}: give a number from 0 (exact) to 0.75")
        if not is_whole(self.deep_cache, 1):
            raise ValueError(f"deep_cache={self.deep_cache!r}: give a whole number of evaluations from 1 (exact)")
        eta = self.eta
        if eta is not None and (isinstance(eta, bool) or not isinstance(eta, Real) or not 0 <= eta <= 1):
            raise ValueError(f"eta={eta!r}: give a number from 0 (DDIM) to 1 (DDPM)")
        if not math.isfinite(self.guidance_scale):
            raise ValueError(f"guidance_scale={self.guidance_scale}: give a number; 1 is no guidance")
        for name in shares:
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)}: give a number from 0 to 1")
        lows = {"original_size": 1, "crops_coords_top_left": 0, "target_size": 1, "seed_resize_from": 1}
        for name, low in lows.items():
            value = getattr(self, name)
            pair = isinstance(value, (list, tuple)) and len(value) == 2 and all(is_whole(n, low) for n in value)
            if not pair and (value is not None or name == "crops_coords_top_left"):
                raise ValueError(f"{name}={value!r}: give two whole numbers of pixels, from {low}")
        for name, low in {"width": 1, "height": 1, "padding_mask_crop": 0, "tile": 1, "tile_overlap": 0}.items():
            if getattr(self, name) is not None and not is_whole(getattr(self, name), low):
                raise ValueError(f"{name}={getattr(self, name)!r}: give a whole number of pixels from {low}, or None")
        if not isinstance(self.conventions, (Conventions, NoneType)) and self.conventions not in tuple(CONVENTIONS):
            raise ValueError(
                f"conventions={self.conventions!r}: use {', '.join(map(repr, CONVENTIONS))}, or give your own"
                " ldm.conventions.Conventions"
            )
        how = self.how
        for name, words in CHOICES.items():
            if (value := getattr(how, name, None) or getattr(self, name)) not in words:
                raise ValueError(f"{name}={value!r}: use {', '.join(map(repr, words))}")
        if not isinstance(self.paste_back, (bool, NoneType)):
            raise ValueError(f"paste_back={self.paste_back!r}: give True or False")
        if not 0 <= self.mask_blur < math.inf:
            raise ValueError(f"mask_blur={self.mask_blur}: give a number of pixels, 0 or more")
        if not 1 <= self.enlarge < math.inf:
            raise ValueError(f"enlarge={self.enlarge}: give a factor of 1 (no change) or more")
        if self.extend is not None:
            sides = self.extend
            if not isinstance(sides, (list, tuple)) or len(sides) != 4 or not all(is_whole(n, 0) for n in sides):
                raise ValueError(f"extend={sides!r}: give four whole numbers of pixels, (left, top, right, bottom)")
            if not any(sides):
                raise ValueError(f"extend={sides!r}: nothing to extend by, give a number above 0 or leave it out")
        if self.tiling not in ("x", "y", "both", None):
            raise ValueError(f"tiling={self.tiling!r}: use 'x', 'y', 'both', or None for none")
        if self.emphasis not in ("default", "mean", "none", None):
            raise ValueError(f"emphasis={self.emphasis!r}: use 'mean', 'none', or None for brackets that are text")
        if self.clip_skip is not None and not (is_whole(self.clip_skip, -math.inf) and self.layer > 0):
            last = f"{how.last_layer} (the last layer, no cut) {'down' if how.last_layer < 0 else 'up'}"
            raise ValueError(f"clip_skip={self.clip_skip!r}: give a whole number from {last}")
        if not is_whole(self.batch_size, 1):
            raise ValueError(f"batch_size={self.batch_size!r}: give a whole number of at least 1")
        if isinstance(self.sampler, str) and self.sampler in SPACED:
            name, spacing = SPACED[self.sampler]
            object.__setattr__(self, "sampler", name)
            object.__setattr__(self, "sigmas", spacing if self.sigmas is None else self.sigmas)
        check_sampler(self)
        check_sigmas(self)
        for name in ("image", "mask"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, Image.Image):
                raise ValueError(f"{name} is a {type(value).__name__}: give a PIL image, e.g. PIL.Image.open(file)")
            try:
                if value is not None:
                    value.load()  # which Image.open leaves for later
            except Exception as error:  # Pillow's decoders raise nearly anything for damaged files
                raise ValueError(f"{name} is damaged or cut off ({error}): give a picture that can be read") from error
        for name in ("latents", "noise"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, Tensor) and value.ndim == 4):
                given = (
                    f"has shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"is a {type(value).__name__}"
                )
                raise ValueError(f"{name} {given}: give a tensor (B,4,h,w)")
            if value is not None and not torch.isfinite(value).all():
                raise ValueError(f"{name} of shape {tuple(value.shape)} has NaN or infinity in it")
        if self.image is not None and self.latents is not None:
            raise ValueError("image and latents both say where to start: give one of them")
        if self.mask is not None and self.image is None and self.latents is None:
            raise ValueError("mask without image: give the picture that the mask belongs to as image=")
        if self.mask is not None and self.image is not None:
            check_mask(upright_size(self.mask), upright_size(self.image))
        self._check_edits()
        if not self.prompts:
            raise ValueError("prompt is an empty list: give at least one text")
        negative = self.negative_prompt
        if negative is not None and not isinstance(negative, str) and len(negative) != len(self.prompts):
            raise ValueError(
                f"{len(negative)} negative prompts for {len(self.prompts)} prompts: give one text, or as many"
            )
        for name in ("seed",) if self.subseed is None else ("seed", "subseed"):
            value = getattr(self, name)
            each = value if isinstance(value, LISTS) else [value]
            if not all(is_whole(seed, 0, 2**64 - self.count) for seed in each):
                raise ValueError(f"{name}={value!r}: give a whole number of 0 or more, below 2**64, or a list of them")
            listed = len(getattr(self, f"{name}s"))
            if listed != self.count:
                raise ValueError(f"{listed} {name}s for {self.count} pictures: give a number, or one {name} each")
        if self.subseed_strength and self.subseed is None:
            raise ValueError(f"subseed_strength={self.subseed_strength} without a subseed: give subseed= as well")
        if self.noise is not None and (self.subseed_strength or self.seed_resize_from is not None):
            raise ValueError("noise takes the place of what subseed_strength and seed_resize_from vary: leave it out")
        check_options(self)
        check_guidance(self)

    def _check_edits(self) -> None:
        """Raises ValueError for edits that lack what they edit, or that cannot be one call together."""
        needs = {"extend": "image", "tile": "image", "padding_mask_crop": "mask", "mask_blur": "mask"}
        for name, other in needs.items():
            if getattr(self, name) and getattr(self, other) is None and not (name == "tile" and self.enlarge > 1):
                raise ValueError(f"{name}={getattr(self, name)!r} without {other}: give the {other} that it is about")
        if self.padding_mask_crop is not None and self.image is None:
            raise ValueError("padding_mask_crop with latents=: the box is cut out of a picture, give it as image=")
        given = [name for name in ("extend", "mask", "enlarge") if getattr(self, name) not in (None, 1.0)]
        if len(given) > 1:
            raise ValueError(f"{' with '.join(given)}: one after the other, with the result of the first as image=")
        if self.tile is not None and self.enlarge > 1 and self.enlarge_filter.startswith("latent"):
            raise ValueError(
                f"tile with enlarge_filter={self.enlarge_filter!r}: tiles are cut out of a picture, use 'lanczos'"
            )
        parts = [name for name in ("extend", "tile", "padding_mask_crop") if getattr(self, name) is not None]
        if self.tiling is not None and parts:
            raise ValueError(
                f"tiling with {parts[0]}: only a whole picture joins itself at its edges, give one of them"
            )
        if self.tile is not None and self.padding_mask_crop is not None:
            raise ValueError("tile with padding_mask_crop: the box around the mask is one run, give one of them")

    def after(self, ran: "Ran") -> "Settings":
        """The same settings, of a call that has run."""
        settings = copy(self)
        object.__setattr__(settings, "ran", ran)
        return settings

    def each(self) -> "Iterator[Settings]":
        """The settings of each picture by itself."""
        for i, (prompt, negative, seed) in enumerate(zip(self.texts, self.negative_texts, self.seeds, strict=True)):
            own: dict[str, Any] = {"prompt": prompt, "seed": seed, "batch_size": 1}
            own |= {"negative_prompt": None if self.negative_prompt is None else negative}
            own |= {"subseed": None if self.subseed is None else self.subseeds[i]}
            for name in ("noise", "latents"):
                if (value := getattr(self, name)) is not None and len(value) == self.count:
                    own[name] = value[i : i + 1]
            yield replace(self, **own)

    @property
    def how(self) -> Conventions:
        """The conventions of the call, with what it says itself in their place."""
        of = self.conventions if isinstance(self.conventions, Conventions) else CONVENTIONS[self.conventions or "ldm"]
        names = ("strength_rule", "blend", "paste_back")
        said = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        if self.emphasis != "default":
            said["emphasis"] = self.emphasis
        return replace(of, **said)

    @property
    def layer(self) -> int:
        """clip_skip as webui counts: 1 is the last layer."""
        return 1 if self.clip_skip is None else self.how.layer(self.clip_skip)

    @property
    def prompts(self) -> list[str]:
        return [self.prompt] if isinstance(self.prompt, str) else list(self.prompt)

    @property
    def texts(self) -> list[str]:
        """A text for each picture."""
        return [p for p in self.prompts for _ in range(self.count // len(self.prompts))]

    @property
    def negative_texts(self) -> list[str]:
        """Those of the pictures; empty texts without a negative prompt."""
        if self.negative_prompt is None or isinstance(self.negative_prompt, str):
            return [self.negative_prompt or ""] * self.count
        return [p for p in self.negative_prompt for _ in range(self.count // len(self.prompts))]

    @property
    def count(self) -> int:
        """Pictures in all."""
        if len(self.prompts) == self.batch_size == 1 and isinstance(self.seed, LISTS):
            return max(1, len(self.seed))
        return len(self.prompts) * self.batch_size

    @property
    def seeds(self) -> list[int]:
        """A seed for each picture. Variations of one picture have one."""
        if self.subseed_strength and not isinstance(self.seed, LISTS):
            return [int(self.seed)] * self.count
        return counted(self.seed, self.count)

    @property
    def subseeds(self) -> list[int]:
        """A subseed for each picture; none without `subseed`."""
        return [] if self.subseed is None else counted(self.subseed, self.count)

    @property
    def options(self) -> dict[str, Any]:
        """What the sampler is given beside its four arguments. eta 0 is nothing to a sampler without fresh noise."""
        eta = {} if self.eta is None else {"eta": self.eta}
        if self.eta == 0 and "eta" not in (self.accepted_options or ["eta"]):
            eta = {}
        return dict(self.sampler_options or {}) | eta

    @property
    def accepted_options(self) -> list[str] | None:
        """The names of the sampler's own options; None: any."""
        parameters = list(inspect.signature(self.sampler_function).parameters.values())[4:]
        if any(p.kind == p.VAR_KEYWORD for p in parameters):
            return None
        return [p.name for p in parameters]

    @property
    def sampler_function(self) -> Sampler:
        return SAMPLERS[self.sampler_name] if isinstance(self.sampler, str) else self.sampler

    @property
    def sampler_name(self) -> str:
        return ALIASES.get(self.sampler, self.sampler) if isinstance(self.sampler, str) else name_of(self.sampler)

    @property
    def guides(self) -> bool:
        """Whether the net runs under more than the prompts."""
        return self.guidance_scale != 1 or self.guidance_function is not cfg

    @property
    def guidance_function(self) -> Guidance:
        return GUIDANCES[self.guidance] if isinstance(self.guidance, str) else self.guidance

    @property
    def guidance_name(self) -> str:
        return self.guidance if isinstance(self.guidance, str) else name_of(self.guidance)
