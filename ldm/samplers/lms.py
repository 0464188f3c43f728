"""Linear multistep: Adams and Bashforth's method on the probability flow ODE dx/dsigma = (x - x0) / sigma = eps."""

from collections import deque

import torch
from torch import Tensor

from ldm.samplers.denoiser import Denoiser
from ldm.samplers.step import Noise, Step, Steps, after, intervals


def lms(denoise: Denoiser, x: Tensor, sigmas: Tensor, noise: Noise, order: int = 4) -> Steps:
    """The polynomial through the last `order` eps, integrated from sigma to sigma_next; the first steps have as many as
    there are. One evaluation a step, draws nothing. In float32 a last step that is much longer than those before, as to
    0 after hundreds of karras steps, costs two digits. Raises ValueError for an order outside 1..4.
    """
    if order not in (1, 2, 3, 4):
        raise ValueError(f"order={order}: give 1, 2, 3 or 4; higher ones blow up on uneven steps")
    history: deque[Tensor] = deque(maxlen=order)
    for i, (sigma, sigma_next) in intervals(sigmas):
        prediction = denoise(x, sigma)
        history.append(prediction.eps)
        past = sigmas[i + 1 - len(history) : i + 1]
        x = x + sum(c * eps for c, eps in zip(coefficients(past, sigma_next), history, strict=True))
        step = Step(i, sigma, sigma_next, x, *prediction)
        x = after(step, (yield step)).x


def coefficients(past: Tensor, sigma_next: Tensor) -> list[float]:
    """c (n,) with sum c_j p(past_j) equal to the integral of p from past_n to sigma_next for polynomials p below degree
    n, by the n powers of tau = (sigma - past_n) / (sigma_next - past_n), whose integrals over 0..1 are 1, 1/2, ... 1/n.
    """
    past = past.double()
    h = sigma_next - past[-1]
    powers = torch.vander((past - past[-1]) / h, increasing=True).T
    integrals = 1 / torch.arange(1, len(past) + 1, dtype=past.dtype, device=past.device)
    return (h * torch.linalg.solve(powers, integrals)).tolist()
