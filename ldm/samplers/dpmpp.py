"""DPM-Solver++ (Lu et al. 2022, arXiv 2211.01095) and its stochastic kinds, in the scale x = x0 + sigma eps.

There lambda = -log sigma, h = lambda_next - lambda and q = exp(-h) = sigma_next / sigma. If x0 were the same all the
way, x_next = q x + (1 - q) x0 would be exact; each solver puts a better D in the place of x0. With D = x0 it reads
x_next = x0 + sigma_next eps, which is how all of them go to sigma 0 and from it, where h is infinite.
"""

from torch import Tensor

from ldm.samplers.denoiser import Denoiser, Prediction
from ldm.samplers.euler import ancestral, noised
from ldm.samplers.step import Noise, Step, Steps, after, intervals


def dpmpp_2s_ancestral(
    denoise: Denoiser, x: Tensor, sigmas: Tensor, noise: Noise, eta: float = 1.0, s_noise: float = 1.0
) -> Steps:
    """DPM-Solver++(2S), algorithm 1 with r = 1/2, to sigma_down, then noise of standard deviation sigma_up.

    Two evaluations a step, the second in the middle of lambda to lambda_down; one where sigma or sigma_down is 0.
    """
    for i, (sigma, sigma_next) in intervals(sigmas):
        sigma_down, sigma_up = ancestral(sigma, sigma_next, eta)
        prediction = denoise(x, sigma)
        if sigma * sigma_down > 0:
            sigma_s = (sigma * sigma_down) ** 0.5
            D = denoise(prediction.x0 + sigma_s * prediction.eps, sigma_s).x0
            q = sigma_down / sigma
            x = q * x + (1 - q) * D
        else:
            x = prediction.x0 + sigma_down * prediction.eps
        x, fresh = noised(x, sigma_up * s_noise, noise, sigma, sigma_next)
        step = Step(i, sigma, sigma_next, x, *prediction, noise=fresh)
        x = after(step, (yield step)).x


def dpmpp_sde(
    denoise: Denoiser,
    x: Tensor,
    sigmas: Tensor,
    noise: Noise,
    eta: float = 1.0,
    s_noise: float = 1.0,
    r: float = 0.5,
) -> Steps:
    """k-diffusion's DPM++ SDE: algorithm 1's two evaluations, at lambda and lambda + r h, each step ancestral.

    The noise of the second evaluation is that of the path from sigma to sigma_s, a part of the step's own on a Brownian
    path (`ldm.samplers.brownian`); the Step shows the step's own.
    """
    for i, (sigma, sigma_next) in intervals(sigmas):
        sigma_down, sigma_up = ancestral(sigma, sigma_next, eta)
        prediction = denoise(x, sigma)
        x = prediction.x0 + sigma_down * prediction.eps
        if sigma * sigma_next > 0:
            sigma_s = sigma ** (1 - r) * sigma_next**r
            s_down, s_up = ancestral(sigma, sigma_s, eta)
            u, _ = noised(prediction.x0 + s_down * prediction.eps, s_up * s_noise, noise, sigma, sigma_s)
            x = x + (1 - sigma_down / sigma) * (denoise(u, sigma_s).x0 - prediction.x0) / (2 * r)
        x, fresh = noised(x, sigma_up * s_noise, noise, sigma, sigma_next)
        step = Step(i, sigma, sigma_next, x, *prediction, noise=fresh)
        x = after(step, (yield step)).x


def dpmpp_2m(denoise: Denoiser, x: Tensor, sigmas: Tensor, noise: Noise) -> Steps:
    """DPM-Solver++(2M), algorithm 2: one evaluation a step, used again in the next; the first step is of order 1."""
    last: tuple[Tensor, Tensor] | None = None  # x0 and h
    for i, (sigma, sigma_next) in intervals(sigmas):
        prediction = denoise(x, sigma)
        x = prediction.x0 + sigma_next * prediction.eps
        q = sigma_next / sigma
        h = -q.log()
        if last and sigma_next > 0:
            x0_last, h_last = last
            r = h_last / h
            x = x + (1 - q) * (prediction.x0 - x0_last) / (2 * r)  # (1 - q) (D - x0)
        step = Step(i, sigma, sigma_next, x, *prediction)
        step = after(step, (yield step))
        x, last = step.x, (step.x0, h)


def dpmpp_2m_sde(
    denoise: Denoiser,
    x: Tensor,
    sigmas: Tensor,
    noise: Noise,
    eta: float = 1.0,
    s_noise: float = 1.0,
    solver_type: str = "midpoint",
) -> Steps:
    """SDE-DPM-Solver++(2M) for eta 1, DPM-Solver++(2M) for 0 and, as in k-diffusion, what is between.

    solver_type: how the slope of x0 is weighed, "midpoint" (as in `dpmpp_2m`) or "heun" (its exact integral, as in
    `dpmpp_3m_sde`). Raises ValueError for another.
    """
    if solver_type not in ("midpoint", "heun"):
        raise ValueError(f"solver_type={solver_type!r}: use midpoint or heun")
    last: tuple[Tensor, Tensor] | None = None  # x0 and h
    for i, (sigma, sigma_next) in intervals(sigmas, falling=eta > 0):
        prediction = denoise(x, sigma)
        x, h = first_order(prediction, sigma, sigma_next, eta)
        if last and sigma_next > 0:
            x0_last, h_last = last
            D1 = (prediction.x0 - x0_last) * h / h_last
            h_eta = (1 + eta) * h
            x = x + (phi_2(h_eta) if solver_type == "heun" else -(-h_eta).expm1() / 2) * D1
        x, fresh = noised(x, sde_std(sigma, sigma_next, eta) * s_noise, noise, sigma, sigma_next)
        step = Step(i, sigma, sigma_next, x, *prediction, noise=fresh)
        step = after(step, (yield step))
        x, last = step.x, (step.x0, h)


def dpmpp_3m_sde(
    denoise: Denoiser, x: Tensor, sigmas: Tensor, noise: Noise, eta: float = 1.0, s_noise: float = 1.0
) -> Steps:
    """k-diffusion's DPM++ 3M SDE: x0 along a parabola through the last three. For eta 0 DPM-Solver++(3M).

    The first step is of order 1, the second of order 2: that of `dpmpp_2m_sde` with solver_type "heun". D1 and D2 are
    h x0' and h^2 x0'' / 2, and phi_3 is the weight of h^2 x0'': as in both references D2 counts half of what it should,
    and the order is 2. With 2 phi_3 it would be 3 for eta 0, and 2 still where there is noise.
    """
    x0s: list[Tensor] = []  # the last two, the latest first, and so their steps
    hs: list[Tensor] = []
    for i, (sigma, sigma_next) in intervals(sigmas, falling=eta > 0):
        prediction = denoise(x, sigma)
        x, h = first_order(prediction, sigma, sigma_next, eta)
        if i > 0 and sigma_next > 0:
            h_eta = (1 + eta) * h
            D1 = (prediction.x0 - x0s[0]) * h / hs[0]
            if i > 1:
                r_0, r_1 = hs[0] / h, hs[1] / h
                D1_1 = (x0s[0] - x0s[1]) / r_1
                D2 = (D1 - D1_1) / (r_0 + r_1)
                D1 = D1 + r_0 * D2
                phi_3 = phi_2(h_eta) / h_eta - 0.5
                x = x - phi_3 * D2
            x = x + phi_2(h_eta) * D1
        x, fresh = noised(x, sde_std(sigma, sigma_next, eta) * s_noise, noise, sigma, sigma_next)
        step = Step(i, sigma, sigma_next, x, *prediction, noise=fresh)
        step = after(step, (yield step))
        x, x0s, hs = step.x, [step.x0, *x0s[:1]], [h, *hs[:1]]


def first_order(prediction: Prediction, sigma: Tensor, sigma_next: Tensor, eta: float) -> tuple[Tensor, Tensor]:
    """The diffusion SDE with x0 held fast, without its noise: SDE-DPM-Solver++(1) for eta 1, DDIM for 0; and h."""
    x = prediction.x0 + sigma_next * (sigma_next / sigma) ** eta * prediction.eps
    return x, (sigma / sigma_next).log()


def sde_std(sigma: Tensor, sigma_next: Tensor, eta: float) -> Tensor:
    """The standard deviation of its noise."""
    return sigma_next * (1 - (sigma_next / sigma) ** (2 * eta)) ** 0.5


def phi_2(h: Tensor) -> Tensor:
    """1 - (1 - exp(-h)) / h: the weight of a slope of x0 that is 1 over a step h."""
    return (-h).expm1() / h + 1
