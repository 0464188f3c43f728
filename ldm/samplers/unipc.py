"""UniPC, a unified predictor-corrector (Zhao et al. 2023) on x0, in the scale x = x0 + sigma eps: h = -d log sigma."""

import math

import torch
from torch import Tensor

from ldm.samplers.denoiser import Denoiser
from ldm.samplers.step import Noise, Step, Steps, after, intervals

Past = list[tuple[float, Tensor]]  # (sigma, x0) of the evaluations that count, the oldest first


def unipc(
    denoise: Denoiser, x: Tensor, sigmas: Tensor, noise: Noise, order: int = 2, solver_type: str = "bh2"
) -> Steps:
    """UniP-p then UniC-p in the multistep form, p = order: one evaluation a step, of order p + 1 where it is corrected.

    solver_type: B(h) = h ("bh1") or e^h - 1 ("bh2"). The evaluation at sigma_next also corrects the x that it was made
    at. The order grows from 1 and falls to 1 again at the end, as in diffusers: the last step, of local order 2, is
    never corrected. Raises ValueError for another solver_type, or an order outside 1..3.
    """
    if solver_type not in ("bh1", "bh2") or order not in (1, 2, 3):
        raise ValueError(f"order={order}, solver_type={solver_type!r}: give 1, 2 or 3, and bh1 or bh2")
    past: Past = []
    start, p = x, 1
    for i, (sigma, sigma_next) in intervals(sigmas):
        prediction = denoise(x, sigma)
        past = [(s, x0) for s, x0 in past if s > 0]  # log 0: no correction of the step from there
        if past:
            predicted = unified(start, past[-p:], float(sigma), solver_type)
            x = x + unified(start, past[-p:], float(sigma), solver_type, prediction.x0) - predicted
        past = [*past, (float(sigma), prediction.x0)][-order:]
        p = min(len(past), len(sigmas) - 1 - i)
        start = x
        x = prediction.x0 + sigma_next * prediction.eps  # the step from 0
        if sigma > 0:
            x = unified(start, past[-p:], float(sigma_next), solver_type)
        step = Step(i, sigma, sigma_next, x, *prediction)
        step = after(step, (yield step))
        x, past[-1] = step.x, (float(sigma), step.x0)


def unified(x: Tensor, past: Past, sigma_next: float, solver_type: str, x0_next: Tensor | None = None) -> Tensor:
    """x from the sigma of the last evaluation to sigma_next: UniP or, with x0 at sigma_next, UniC."""
    *earlier, (sigma, x0) = past
    h = math.log(sigma / sigma_next) if sigma_next > 0 else math.inf
    points = [(math.log(sigma / s) / h, m - x0) for s, m in earlier]  # r_m, D_m
    if x0_next is not None:
        points.append((1.0, x0_next - x0))
    b_h = -h if solver_type == "bh1" else math.expm1(-h)
    x = sigma_next / sigma * x - math.expm1(-h) * x0
    for rho, (r, d) in zip(weights([r for r, _ in points], h, b_h), points, strict=True):
        x = x - b_h * rho / r * d
    return x


def weights(r: list[float], h: float, b_h: float) -> list[float]:
    """rho of sum rho_m r_m^(k-1) = k! h phi_(k+1)(h) / B(h), k = 1, 2, ...; a single one is held at 1/2."""
    if len(r) == 1:
        return [0.5]
    phi, b = math.expm1(-h) / -h, []
    for k in range(1, len(r) + 1):
        phi = (phi - 1 / math.factorial(k)) / -h
        b.append(math.factorial(k) * phi * -h / b_h)
    powers = torch.tensor(r, dtype=torch.float64) ** torch.arange(len(r))[:, None]
    return torch.linalg.solve(powers, torch.tensor(b, dtype=torch.float64)).tolist() if r else []
