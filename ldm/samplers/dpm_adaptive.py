"""DPM-Solver-12 and -23, which choose their own steps (Lu et al. 2022, arXiv 2206.00927), as k-diffusion has them.

In the scale x = x0 + sigma eps, with lambda = -log sigma and h = lambda_next - lambda.
"""

import math

import torch
from torch import Tensor

from ldm.samplers.denoiser import Denoiser
from ldm.samplers.euler import ancestral, noised
from ldm.samplers.step import Noise, Step, Steps, after, check_finite, checked

SHORTEST = 1e-6  # h of a step that is worth taking: below, x0 and x differ by rounding


def dpm_adaptive(
    denoise: Denoiser,
    x: Tensor,
    sigmas: Tensor,
    noise: Noise,
    order: int = 3,
    rtol: float = 0.05,
    atol: float = 0.0078,
    h_init: float = 0.05,
    pcoeff: float = 0.0,
    icoeff: float = 1.0,
    dcoeff: float = 0.0,
    accept_safety: float = 0.81,
    eta: float = 0.0,
    s_noise: float = 1.0,
) -> Steps:
    """From the first of the sigmas to the last, in steps of its own: those between are left aside, but for the one
    before a last of 0, or after a first, since log 0 is not to be reached. From there, or to there, it is one step.

    A try of order 3 (2) costs 2 (1) evaluations over the one at sigma. It is taken if the solutions of the two orders
    differ by little: the root mean square, over the whole batch, of the difference over max(atol, rtol |x|). Only steps
    that are taken are yielded. The steps thus depend on the batch: for a picture that does not, make it alone.

    Raises ValueError for another order, options out of their range, and eta above 0 where sigma rises;
    FloatingPointError where no step is short enough: the denoiser returns NaN or infinity, or the tolerances are finer
    than x's own digits.
    """
    if order not in (2, 3):
        raise ValueError(f"order={order}: use 2 or 3")
    if not min(rtol, atol, h_init) > 0 or not 0 < accept_safety <= 1:
        raise ValueError(
            f"rtol={rtol}, atol={atol}, h_init={h_init}, accept_safety={accept_safety}: give numbers above 0, the last"
            " up to 1"
        )
    if len(checked(sigmas, falling=eta > 0)) == 1:
        return
    i = 0
    if sigmas[0] == 0:
        prediction = denoise(x, sigmas[0])
        step = Step(i, sigmas[0], sigmas[1], prediction.x0 + sigmas[1] * prediction.eps, *prediction)
        x, sigmas, i = after(step, (yield step)).x, sigmas[1:], 1
    sigma, sigma_end = sigmas[0], sigmas[-1] if sigmas[-1] > 0 else sigmas[-2]
    pid = PID(h_init, pcoeff, icoeff, dcoeff, 1.5 if eta else order, accept_safety)
    x_prev = x
    while sigma != sigma_end:
        prediction = denoise(x, sigma)
        accepted = False
        while not accepted:
            left = (sigma / sigma_end).log()
            sigma_next = sigma_end if pid.h >= left.abs() else sigma * (-left.sign() * pid.h).exp()
            if sigma_next != sigma_end and pid.h < SHORTEST:
                raise FloatingPointError(
                    f"step {i}, at sigma={float(sigma):.4f}: no step is short enough for rtol={rtol} and atol={atol} in"
                    f" {x.dtype}; give larger ones"
                )
            sigma_down = sigma_next
            if eta:
                sigma_down = torch.maximum(sigma_end, ancestral(sigma, sigma_next, eta)[0])
            x_low, x_high = (second_order if order == 2 else third_order)(denoise, x, sigma, sigma_down, prediction.eps)
            delta = (rtol * torch.maximum(x_low.abs(), x_prev.abs())).clamp(min=atol)
            error = ((x_low - x_high) / delta).square().mean().sqrt()
            check_finite(i, sigma, error)
            accepted = pid.accepts(error.item())
        x_prev = x_low
        sigma_up = (sigma_next**2 - sigma_down**2) ** 0.5
        x, fresh = noised(x_high, sigma_up * s_noise, noise, sigma, sigma_next)
        step = Step(i, sigma, sigma_next, x, *prediction, noise=fresh)
        x = after(step, (yield step)).x
        sigma = sigma_next
        i += 1
    if sigmas[-1] == 0:
        prediction = denoise(x, sigma)
        step = Step(i, sigma, sigmas[-1], prediction.x0.clone(), *prediction)
        after(step, (yield step))


def second_order(denoise: Denoiser, x: Tensor, s: Tensor, t: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
    """From sigma s to t with eps at s: DPM-Solver-1 (Euler's step in this scale) and DPM-Solver-2, r_1 = 1/2."""
    s_1 = (s * t) ** 0.5
    eps_1 = denoise(x + (s_1 - s) * eps, s_1).eps
    return x + (t - s) * eps, x + (t - s) * eps_1


def third_order(denoise: Denoiser, x: Tensor, s: Tensor, t: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
    """From sigma s to t with eps at s: DPM-Solver-2 with r_1 = 1/3, and DPM-Solver-3 with r_2 = 2/3."""
    s_1, s_2 = s ** (2 / 3) * t ** (1 / 3), s ** (1 / 3) * t ** (2 / 3)
    D_1 = denoise(x + (s_1 - s) * eps, s_1).eps - eps
    D_2 = denoise(x + (s_2 - s) * eps + 2 * slope(s, s_2) * D_1, s_2).eps - eps
    return x + (t - s) * (eps + 1.5 * D_1), x + (t - s) * eps + 1.5 * slope(s, t) * D_2


def slope(s: Tensor, t: Tensor) -> Tensor:
    """By how much x moves if eps grows by 1 from sigma s to t, evenly in lambda: -t ((e^h - 1) / h - 1)."""
    return t - (s - t) / (s / t).log()


class PID:
    """k-diffusion's control of the step h in lambda: the next is h times a factor made of the last three errors."""

    def __init__(self, h: float, pcoeff: float, icoeff: float, dcoeff: float, order: float, accept_safety: float):
        self.h = h
        self.powers = (pcoeff + icoeff + dcoeff) / order, -(pcoeff + 2 * dcoeff) / order, dcoeff / order
        self.accept_safety = accept_safety
        self.inverses: list[float] = []  # 1 / error: of this try, and of the last two steps taken

    def accepts(self, error: float) -> bool:
        """Whether a step with this error is to be taken, and in either case the next h."""
        inverse = 1 / (error + 1e-8)
        self.inverses = [inverse, *(self.inverses[1:] or [inverse, inverse])]
        factor = math.prod(e**power for e, power in zip(self.inverses, self.powers, strict=True))
        factor = 1 + math.atan(factor - 1)
        self.h *= factor
        if factor < self.accept_safety:
            return False
        self.inverses[1:] = self.inverses[:2]
        return True
