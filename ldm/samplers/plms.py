"""Pseudo linear multistep (Liu et al. 2022) in the scale x = x0 + sigma eps, where its transfer is Euler's step."""

from torch import Tensor

from ldm.samplers.denoiser import Denoiser
from ldm.samplers.step import Noise, Step, Steps, after, intervals

# The Adams-Bashforth weights of eps, the newest first (eq. 12 and its lower orders).
WEIGHTS = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))


def plms(denoise: Denoiser, x: Tensor, sigmas: Tensor, noise: Noise) -> Steps:
    """Algorithm 2 as CompVis begins it, with one improved Euler step: n steps are n + 1 evaluations; one step is one.

    Of order 2: the weights are those of steps of equal length in sigma, which a schedule's are not.
    """
    past: list[Tensor] = []
    for i, (sigma, sigma_next) in intervals(sigmas):
        prediction = denoise(x, sigma)
        past = [prediction.eps, *past][:4]
        eps = sum(w * e for w, e in zip(WEIGHTS[len(past) - 1], past, strict=True))
        if i == 0 and len(sigmas) > 2:
            ahead = denoise(x + (sigma_next - sigma) * eps, sigma_next)
            eps = (eps + ahead.eps) / 2
        x = x + (sigma_next - sigma) * eps
        step = Step(i, sigma, sigma_next, x, *prediction)
        x = after(step, (yield step)).x
