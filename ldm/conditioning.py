"""From the texts, sizes and guidance of a call to the denoiser that its sampler is given."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ldm.clip import TextEncoding
from ldm.guidance import Guide, asked, bound, cfg, guided, only_between
from ldm.offload import at_work
from ldm.samplers import Denoiser, net_denoiser
from ldm.settings import Settings
from ldm.unet import vector_embedding
from ldm.unet.approximate import DeepCache, merged

if TYPE_CHECKING:
    from ldm.pipeline import Pipeline


def denoiser(
    pipe: "Pipeline",
    s: Settings,
    size: tuple[int, int],
    reading: tuple[bool, bool],
    guide: Guide | None,
    seen: Tensor | None = None,
) -> Denoiser:
    """The UNet under the texts of the call, guided, by CFG unless there is a `guide`. size: (width, height) in
    pixels. reading: log and whole, as in `net_denoiser`. seen (B,5,h,w): what an inpainting model is shown beside x."""
    parts = texts(pipe, s)
    context, pooled = (torch.cat(both) for both in zip(*parts, strict=True))  # (B,...) for each part
    scores = [s.negative_aesthetic_score] * s.count * (len(parts) - 1) + [s.aesthetic_score] * s.count
    vector = None if pipe.unet.config.vector_width is None else size_vector(pipe, s, pooled, size, scores)

    unet = pipe.unet if s.token_merging == 0 else merged(pipe.unet, s.token_merging)

    def under(rows: slice) -> Denoiser:
        own = None if vector is None else vector[rows]
        cached = unet if s.deep_cache == 1 else DeepCache(unet, s.deep_cache)

        def net(x: Tensor, t: Tensor, context: Tensor) -> Tensor:
            at_work(pipe, pipe.unet)
            if seen is not None:
                x = torch.cat([x, seen.to(x.dtype).repeat(len(x) // len(seen), 1, 1, 1)], dim=1)  # (B,9,h,w)
            return cached(x, t, context, own)

        return net_denoiser(net, context[rows], pipe.schedule, pipe.prediction_type, *reading)

    denoise = under(slice(None))
    if not s.guides:
        return denoise
    v = pipe.prediction_type == "v_prediction"
    denoise = guided(denoise, s.guidance_scale, s.guidance_rescale, v, guide, len(parts))
    if s.guidance_interval is None:
        return denoise
    return only_between(denoise, under(slice(-s.count, None)), *s.guidance_interval)


def texts(pipe: "Pipeline", s: Settings) -> list[TextEncoding]:
    """Of the prompts; before them, to guide, of the negative prompts; and before these, where the guidance asks for
    it and it is not the same, of no negative prompt."""
    how, count = s.how, chunks(pipe, s)

    def encoded(texts: list[str], none: bool, cut: bool = how.cuts_negative) -> TextEncoding:
        encoding = pipe.encode_text(texts, s.layer if cut else 1, how.emphasis, count)
        return TextEncoding(*map(torch.zeros_like, encoding)) if none and pipe.zero_negative else encoding

    parts = [encoded(s.texts, none=False, cut=True)]
    if s.guides:
        parts.insert(0, encoded(s.negative_texts, none=s.negative_prompt is None))
    if "eps_empty" in asked(s.guidance_function):
        empty = encoded([""] * s.count, none=True)
        if not all(map(torch.equal, empty, parts[0])):
            parts.insert(0, empty)
    return parts


def chunks(pipe: "Pipeline", s: Settings) -> int:
    """Of the longest of the texts: all of a call are filled up to it."""
    every = s.texts + (s.negative_texts if s.guides else [])
    return max(len(pipe.plan(text, s.how.emphasis).chunks) for text in every)


def size_vector(pipe: "Pipeline", s: Settings, pooled: Tensor, size: tuple[int, int], scores: list[float]) -> Tensor:
    """SDXL's size conditioning (B,vector_width), of pooled (B,projection) and as many aesthetic scores."""
    sizes = [*(s.original_size or size[::-1]), *s.crops_coords_top_left]
    with_score = pipe.unet.config.vector_width == pooled.shape[1] + 5 * 256
    target = [*(s.target_size or size[::-1])]
    rows = [[*sizes, score] if with_score else sizes + target for score in scores]
    return vector_embedding(pooled, torch.tensor(rows, dtype=torch.float32, device=pooled.device))


def guide_of(s: Settings, sigmas: Tensor) -> Guide | None:
    """The guidance function for one run; None is plain CFG."""
    if s.guidance_function is cfg:
        return None
    return bound(s.guidance_function, s.guidance_options or {}, sigmas)


def check_refiner(pipe: "Pipeline", refiner: "Pipeline", masked: bool) -> None:
    """Raises ValueError for a refiner that cannot go on from the latents of this model."""
    theirs, ours = refiner.unet.config, pipe.unet.config
    factors = refiner.vae.config.factor, pipe.vae.config.factor
    if factors[0] != factors[1] or theirs.in_channels != ours.out_channels:
        raise ValueError(
            f"refiner {refiner.name!r} takes {theirs.in_channels} channels, {factors[0]} pixels to a latent;"
            f" this model makes {ours.out_channels} channels, {factors[1]} pixels to a latent"
        )
    scales = refiner.vae.config.scaling_factor, pipe.vae.config.scaling_factor
    if scales[0] != scales[1]:
        raise ValueError(
            f"refiner {refiner.name!r} has latents of another kind: its VAE scales them by {scales[0]}, this"
            f" model's by {scales[1]}; give a refiner of the same family"
        )
    if masked and ours.in_channels > ours.out_channels:
        raise ValueError(
            "refiner with mask=: after an inpainting model, the refiner would redraw what the mask protects;"
            " leave the refiner out, or use a model without the extra channels"
        )
