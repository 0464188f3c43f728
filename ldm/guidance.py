"""Guidance: how the noises under the prompt and under the negative prompt become one; and the change of model within a
run.

A guidance function takes eps_cond, eps_uncond (B,4,h,w), sigma (), and returns eps (B,4,h,w). By naming a further
parameter it is given more (`GIVEN`); its other parameters are options. All noises are in x = x0 + sigma eps.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ldm.samplers.denoiser import Denoiser, Prediction
from ldm.samplers.schedule import Schedule

Guidance = Callable[..., Tensor]
Guide = Callable[[Prediction, Tensor, Tensor, float], Tensor]  # of one run, see `bound`

# What a guidance function may ask for.
GIVEN = {
    "x": "the noisy latents (B,4,h,w) of this evaluation",
    "scale": "guidance_scale",
    "eps_empty": "the noise (B,4,h,w) without a negative prompt: one more row of the batch, where there is one",
    "sigma_next": "the run's next sigma () after this one",
    "sigmas": "all of the run's (n+1,)",
    "memory": "a dictionary that lives for one run",
}


# ------------------------------------------------------------------------------------------------ functions


def cfg(eps_cond: Tensor, eps_uncond: Tensor, sigma: Tensor, *, scale: float | Tensor) -> Tensor:
    """Classifier-free guidance (Ho & Salimans 2022, eq. 6, with scale = 1 + w)."""
    return eps_uncond + scale * (eps_cond - eps_uncond)


def cfg_pp(eps_cond: Tensor, eps_uncond: Tensor, sigma: Tensor, *, scale: float, sigma_next: Tensor) -> Tensor:
    """CFG++ (Chung et al. 2024, algorithm 2) for samplers that know nothing of it; scale is its lambda, 0 to 1.

    CFG of the scale lambda sigma / (sigma - sigma_next): under Euler's or DDIM's step the guided x0 then goes on with
    the unconditional noise, as in the sampler `euler_cfg_pp`. So it is with the samplers that go from each of the run's
    sigmas straight to the next, without noise (no s_churn, no eta).
    """
    return cfg(eps_cond, eps_uncond, sigma, scale=scale * sigma / (sigma - sigma_next))


def dynamic_thresholding(
    eps_cond: Tensor,
    eps_uncond: Tensor,
    sigma: Tensor,
    *,
    x: Tensor,
    scale: float,
    percentile: float = 0.995,
    limit: float | None = None,
) -> Tensor:
    """CFG, of which x0 is clipped to [-s, s] and multiplied by limit / s (Saharia et al. 2022, section 2.3).

    s is this percentile of the picture's |x0|, or the limit where that is more. For the pixels of Imagen the limit is
    1. Latents know no such bound, and no grey that is 0: None takes x0 from the mean of each channel, which stays, and
    for the limit the farthest from there that the picture has under the prompt alone. Raises ValueError for a
    percentile outside 0..1 or a limit that is not above 0.
    """
    if not 0 <= percentile <= 1:
        raise ValueError(f"percentile={percentile}: give a number from 0 to 1")
    if limit is not None and not limit > 0:
        raise ValueError(f"limit={limit}: give a number above 0, or None for that of the prompt alone")
    eps = cfg(eps_cond, eps_uncond, sigma, scale=scale)
    if sigma == 0:  # x is x0, which no guidance moves
        return eps
    x0 = x - sigma * eps
    if limit is None:
        x0, x0_cond = centred(x0), centred(x - sigma * eps_cond)
        limits = x0_cond.abs().amax((1, 2, 3))  # (B,)
    else:
        limits = x0.new_full(x0.shape[:1], limit)
    # Row by row: torch.quantile takes no more than 2^24 values.
    s = torch.stack([torch.quantile(row, percentile) for row in x0.abs().flatten(1)]).maximum(limits)
    s, limits = s[:, None, None, None], limits[:, None, None, None]  # (B,1,1,1)
    return eps + (x0 - x0.clamp(-s, s) * (limits / s)) / sigma


def centred(z: Tensor) -> Tensor:
    """z (B,4,h,w) without the mean of each channel."""
    return z - z.mean((2, 3), keepdim=True)


def perp_neg(
    eps_cond: Tensor,
    eps_uncond: Tensor,
    sigma: Tensor,
    *,
    scale: float,
    eps_empty: Tensor,
    negative_scale: float = 1.0,
) -> Tensor:
    """Perp-Neg (Armandpour et al. 2023): of the negative prompt only what is perpendicular to the prompt.

    Picture by picture, as in the paper; ComfyUI's PerpNeg projects a whole batch at once. Without a negative prompt it
    is CFG.
    """
    positive, negative = eps_cond - eps_empty, eps_uncond - eps_empty
    perpendicular = negative - projection(negative, positive)
    return eps_empty + scale * (positive - negative_scale * perpendicular)


def apg(
    eps_cond: Tensor,
    eps_uncond: Tensor,
    sigma: Tensor,
    *,
    x: Tensor,
    scale: float,
    memory: dict[str, Any],
    eta: float = 0.0,
    norm_threshold: float = 0.0,
    momentum: float = 0.0,
) -> Tensor:
    """Adaptive projected guidance (Sadat et al. 2024, algorithm 1), on x0: against the burnt colours of high scales.

    eta: the share of the update's part parallel to x0 under the prompt. norm_threshold: the longest update that a
    picture gets, usually 2.5 to 15; 0 is any. momentum: the share of the updates before, usually -0.75 to -0.25. With
    eta 1 and neither of these it is CFG.
    """
    if not norm_threshold >= 0 or not -1 < momentum < 1:
        raise ValueError(
            f"norm_threshold={norm_threshold}, momentum={momentum}: give 0 or more, and a number between -1 and 1"
        )
    if sigma == 0:  # nothing of x0 is moved there, by whatever eps
        return cfg(eps_cond, eps_uncond, sigma, scale=scale)
    update = sigma * (eps_uncond - eps_cond) + momentum * memory.get("update", 0.0)  # x0_cond - x0_uncond, averaged
    memory["update"] = update
    if norm_threshold > 0:
        norm = torch.linalg.vector_norm(update, dim=(1, 2, 3), keepdim=True)
        update = update * (norm_threshold / norm).clamp(max=1)
    parallel = projection(update, x - sigma * eps_cond)
    return eps_cond - (scale - 1) / sigma * (update - parallel + eta * parallel)


def projection(v: Tensor, direction: Tensor) -> Tensor:
    """The part of v (B,4,h,w) parallel to `direction`, picture by picture; 0 where that is 0."""
    dims = (1, 2, 3)
    norm = torch.linalg.vector_norm(direction, dim=dims, keepdim=True)
    unit = direction / norm.clamp(min=torch.finfo(norm.dtype).tiny)
    return (v * unit).sum(dims, keepdim=True) * unit


GUIDANCES: dict[str, Guidance] = {
    function.__name__: function for function in (cfg, cfg_pp, perp_neg, apg, dynamic_thresholding)
}


# ------------------------------------------------------------------------------------------------ a function's own


def name_of(function: Callable) -> str:
    return getattr(function, "__name__", repr(function))


def named(function: Guidance) -> list[inspect.Parameter]:
    """The parameters beside the first three."""
    parameters = list(inspect.signature(function).parameters.values())
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)][:3]
    return [p for p in parameters if p not in positional and p.kind != p.VAR_POSITIONAL]


def asked(function: Guidance) -> list[str]:
    """What it wants to be given; not what a functools.partial has settled."""
    settled = getattr(function, "keywords", {})
    return [p.name for p in named(function) if p.name in GIVEN and p.name not in settled]


def accepted(function: Guidance) -> list[str] | None:
    """The names of its own options; None: any."""
    if any(p.kind == p.VAR_KEYWORD for p in named(function)):
        return None
    return [p.name for p in named(function) if p.name not in asked(function)]


def bound(function: Guidance, options: Mapping[str, Any], sigmas: Tensor) -> Guide:
    """`function` for one run through `sigmas`, as guide(both, x, sigma, scale) -> eps (B,4,h,w).

    both.eps (2B,4,h,w) or (3B,4,h,w): [without a negative prompt,] negative prompts, prompts.
    guide raises ValueError where the function does not return a tensor of the shape of x, FloatingPointError where it
    returns NaN or infinity.
    """
    memory: dict[str, Any] = {}
    wants = asked(function)

    def guide(both: Prediction, x: Tensor, sigma: Tensor, scale: float) -> Tensor:
        *empty, eps_uncond, eps_cond = both.eps.split(len(x))
        given = {
            "x": x,
            "scale": scale,
            "eps_empty": empty[0] if empty else eps_uncond,
            "sigma_next": next_of(sigma, sigmas),
            "sigmas": sigmas,
            "memory": memory,
        }
        eps = function(eps_cond, eps_uncond, sigma, **{name: given[name] for name in wants}, **options)
        if not isinstance(eps, Tensor) or eps.shape != x.shape:
            got = f"shape {tuple(eps.shape)}" if isinstance(eps, Tensor) else f"a {type(eps).__name__}"
            raise ValueError(
                f"guidance {name_of(function)!r} returned {got} at sigma={float(sigma):.4f}: return the noise, a tensor"
                f" of the shape of eps_cond, {tuple(x.shape)}"
            )
        if not torch.isfinite(eps).all():
            raise FloatingPointError(
                f"guidance {name_of(function)!r} returned NaN or infinity at sigma={float(sigma):.4f}:"
                " see where it divides, or give a lower guidance_scale"
            )
        return eps.to(x)

    return guide


def next_of(sigma: Tensor, sigmas: Tensor) -> Tensor:
    """The first of the sigmas () past `sigma` in their direction; 0 past the last. What a sampler has computed may be a
    hair off the sigma that it means."""
    past = sigmas < sigma * (1 - 1e-6) if sigmas[0] > sigmas[-1] else sigmas > sigma * (1 + 1e-6)
    return sigmas[past][0] if past.any() else torch.zeros_like(sigma)


# ------------------------------------------------------------------------------------------------ denoisers


def guided(
    denoise: Denoiser,
    scale: float,
    rescale: float = 0.0,
    v: bool = False,
    guide: Guide | None = None,
    parts: int = 2,
) -> Denoiser:
    """Classifier-free guidance, eps = eps_uncond + scale (eps_cond - eps_uncond), or that of a `bound` function.

    `denoise` runs one batch (2B,4,h,w), the unconditional half first: its texts are [negative prompts, prompts]; or, of
    3 `parts`, (3B,4,h,w) with [no negative prompts, negative prompts, prompts].
    Scale 1 is no guidance: use the denoiser of the prompts alone and save half of the work.

    rescale: 0 to 1, how far the net's guided output is brought back to the standard deviation that it has for the
    prompt alone (Lin et al. 2023, eq. 14 to 16). That is of epsilon, or of v if the net predicts `v`.
    """

    def denoise_guided(x: Tensor, sigma: Tensor) -> Prediction:
        both = denoise(torch.cat([x] * parts), sigma)
        eps_uncond, eps_cond = both.eps.chunk(parts)[-2:]  # (B,4,h,w) each
        # The net's own output, epsilon or v = sqrt(a) eps - sqrt(1 - a) x0 with a = 1 / (1 + sigma^2), is c eps - d x0.
        c, d = (1 / (1 + sigma**2) ** 0.5, sigma / (1 + sigma**2) ** 0.5) if v else (1.0, 0.0)
        out_uncond, out_cond = (c * both.eps - d * both.x0).chunk(parts)[-2:]
        if guide is None:
            out = out_uncond + scale * (out_cond - out_uncond)
        else:
            out = guide(both, x, sigma, scale) / c - d * x
        if rescale:
            ratio = out_cond.std(dim=(1, 2, 3), keepdim=True) / out.std(dim=(1, 2, 3), keepdim=True)  # (B,1,1,1)
            out = (rescale * ratio + 1 - rescale) * out
        eps = c * out + c * d * x
        # Of v directly: at the sigma of 4096 of a zero terminal SNR, x - sigma eps would leave three digits.
        x0 = c**2 * x - d * out if v else x - sigma * eps
        return Prediction(x0, eps, eps_cond, eps_uncond)

    return denoise_guided


def only_between(guided: Denoiser, alone: Denoiser, low: float, high: float) -> Denoiser:
    """Guided where low < sigma <= high, elsewhere the prompts `alone` (Kynkäänniemi et al. 2024)."""

    def denoise(x: Tensor, sigma: Tensor) -> Prediction:
        return (guided if low < sigma <= high else alone)(x, sigma)

    return denoise


def handed_over(base: Denoiser, refiner: Denoiser, schedule: Schedule, start: float) -> Denoiser:
    """`base` for the first `start` (0 to 1) of the 1000 timesteps, counted from the noisy end, then `refiner`.

    The boundary is that of diffusers' denoising_end and denoising_start.
    """
    boundary = round(1000 - start * 1000)

    def denoise(x: Tensor, sigma: Tensor) -> Prediction:
        # A hair below: the sigma of a whole timestep may come back as 199.9999...
        return (base if schedule.t(sigma) >= boundary - 1e-6 else refiner)(x, sigma)

    return denoise
