"""DEIS (Zhang & Chen 2023) in the scale x = x0 + sigma eps, where its rho is sigma: dx/dsigma = eps."""

import math

import torch
from torch import Tensor

from ldm.samplers.denoiser import Denoiser
from ldm.samplers.step import Noise, Step, Steps, after, intervals


def deis(denoise: Denoiser, x: Tensor, sigmas: Tensor, noise: Noise, order: int = 2) -> Steps:
    """tAB-DEIS in log rho: eps, as the polynomial in log sigma through the last `order` ones, is integrated exactly.

    The order grows from 1, so that the first step limits the whole to 2. It is 1 to sigma 0 and from it, where
    log sigma has no value, and with less than 15 steps it falls to 1 at the end, as in diffusers. Raises ValueError for
    order outside 1..3.
    """
    if order not in (1, 2, 3):
        raise ValueError(f"order={order}: give 1, 2 or 3")
    past: list[tuple[float, Tensor]] = []
    for i, (sigma, sigma_next) in intervals(sigmas):
        prediction = denoise(x, sigma)
        past = [(s, eps) for s, eps in past if s > 0]
        past = [*past, (float(sigma), prediction.eps)][-order:]
        p = min(len(past), len(sigmas) - 1 - i) if len(sigmas) <= 15 else len(past)
        past = past[-p:] if sigma_next > 0 else past[-1:]
        for c, (_, eps) in zip(coefficients([s for s, _ in past], float(sigma_next)), past, strict=True):
            x = x + c * eps
        step = Step(i, sigma, sigma_next, x, *prediction)
        x = after(step, (yield step)).x


def coefficients(sigmas: list[float], sigma_next: float) -> list[float]:
    """The integrals from the last of the sigmas to sigma_next of the Lagrange polynomials in log sigma.

    With u = log(s / sigma), they solve sum C_j u_j^k = integral of u^k ds, which by parts is s u^k - k times the
    integral of u^(k-1).
    """
    sigma = sigmas[-1]
    moments = [sigma_next - sigma]
    for k in range(1, len(sigmas)):
        moments.append(sigma_next * math.log(sigma_next / sigma) ** k - k * moments[-1])
    u = torch.tensor([*(math.log(s / sigma) for s in sigmas[:-1]), 0.0], dtype=torch.float64)
    powers = u ** torch.arange(len(sigmas))[:, None]
    return torch.linalg.solve(powers, torch.tensor(moments, dtype=torch.float64)).tolist()
