"""One stream of noise per image."""

from collections.abc import Sequence
from contextlib import closing, suppress

import torch
from torch import Tensor

from ldm.samplers.step import Noise, Steps


class SeededNoise:
    """Standard normal noise (B,*shape) float32, drawn on the CPU from one generator per seed.

    Picture i therefore depends on its own seed and not on its batch or its device. The draws are those of diffusers
    with a list of CPU generators. shared: one generator, of the first seed, draws for all pictures at once.
    """

    def __init__(
        self, seeds: Sequence[int], shape: tuple[int, ...], device: torch.device | str = "cpu", shared: bool = False
    ):
        self.seeds = seeds
        self.generators = [torch.Generator().manual_seed(seed) for seed in (seeds[:1] if shared else seeds)]
        self.shared = shared
        self.shape = shape
        self.device = device
        self.draws = 0

    def __call__(self, sigma: Tensor | None = None, sigma_next: Tensor | None = None) -> Tensor:
        """The next draw (B,*shape), whatever the sigmas are."""
        self.draws += 1
        if self.shared:
            return torch.randn(len(self.seeds), *self.shape, generator=self.generators[0]).to(self.device)
        draws = [torch.randn(self.shape, generator=generator) for generator in self.generators]
        return torch.stack(draws).to(self.device)

    def varied(
        self, subseeds: Sequence[int] = (), strength: float = 0.0, size: tuple[int, int] | None = None
    ) -> Tensor:
        """The next draw (B,4,h,w) of webui's variations; the draws after it are what they would have been.

        subseeds, one per picture: the draw turns to theirs by `strength`, 0 to 1 (`slerp`). size: the draw is that of
        pictures of that height and width in latents, in the middle of what it would be at its own size.
        """
        full = self()
        if not strength and size is None:
            return full
        shape = (full.shape[1], *(size or full.shape[2:]))
        noise = self._last_draw(self.seeds, shape)
        if strength > 0:
            noise = slerp(strength, noise, self._last_draw(subseeds, shape))
        return in_the_middle(noise, full)

    def _last_draw(self, seeds: Sequence[int], shape: tuple[int, ...]) -> Tensor:
        """What it would have been with these seeds and this shape."""
        other = SeededNoise(seeds, shape, self.device, self.shared)
        for _ in range(self.draws - 1):
            other()
        return other()


def drawn_each_step(steps: Steps, noise: Noise) -> Steps:
    """The same steps; after one that used no noise a draw is made all the same, and dropped, so that those after it are
    what they would be in k-diffusion's samplers with churn and in CompVis' DDIM."""
    sent = None
    with closing(steps), suppress(StopIteration):
        while True:
            step = steps.send(sent)
            if step.noise is None:
                noise(step.sigma, step.sigma_next)
            sent = yield step


def slerp(strength: float, a: Tensor, b: Tensor) -> Tensor:
    """From a to b (...,h,w) along the arc between them, so that noise stays noise (Shoemake 1985).

    As in webui, each column of h values of each channel is a vector with an angle of its own; columns (nearly) parallel
    or opposite, which span no arc, are mixed on the straight line. webui does so for all columns or none.
    """
    columns = {"dim": -2, "keepdim": True}
    cosine = (a / a.norm(**columns) * (b / b.norm(**columns))).sum(**columns)  # (...,1,w)
    angle = cosine.acos()
    arc = (((1 - strength) * angle).sin() / angle.sin()) * a + ((strength * angle).sin() / angle.sin()) * b
    return torch.where(cosine.abs() > 0.9995, torch.lerp(a, b, strength), arc)


def in_the_middle(noise: Tensor, full: Tensor) -> Tensor:
    """`noise` (B,C,h,w) over the middle of `full` (B,C,H,W), or the middle of `noise` where that is the larger.

    The offsets are rounded as webui's: where noise is larger by an odd number, a last row or column of full remains.
    """
    placed = full.clone()
    (top, to_top), (left, to_left) = (overlap(full.shape[dim], noise.shape[dim]) for dim in (2, 3))
    placed[:, :, to_top, to_left] = noise[:, :, top, left]
    return placed


def overlap(full: int, size: int) -> tuple[slice, slice]:
    """The part of `size` values that is used, and its place among `full` values."""
    offset = (full - size) // 2
    length = size + 2 * min(offset, 0)
    start, place = max(-offset, 0), max(offset, 0)
    return slice(start, start + length), slice(place, place + length)
