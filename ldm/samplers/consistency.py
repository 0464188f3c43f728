"""Samplers of consistency models, which jump to x0 from any sigma: in the scale x = x0 + sigma eps.

Their few steps begin at t = 999 and none is lost at t = 0 where the sigmas are spaced "trailing" or "simple".
"""

from torch import Tensor

from ldm.samplers.denoiser import Denoiser
from ldm.samplers.euler import noised
from ldm.samplers.schedule import Schedule
from ldm.samplers.step import Noise, Step, Steps, after, intervals


def lcm(denoise: Denoiser, x: Tensor, sigmas: Tensor, noise: Noise) -> Steps:
    """Multistep consistency sampling (Song et al. 2023, algorithm 1; Luo et al. 2023): x0, then noise of sigma_next.

    The c_skip and c_out of latent consistency models differ from 0 and 1 by 7e-6 and less at the timesteps that these
    are trained on, 19 and up: left out, as in ComfyUI.
    """
    for i, (sigma, sigma_next) in intervals(sigmas, falling=True):
        prediction = denoise(x, sigma)
        x, fresh = noised(prediction.x0.clone(), sigma_next, noise, sigma, sigma_next)
        step = Step(i, sigma, sigma_next, x, *prediction, noise=fresh)
        x = after(step, (yield step)).x


def tcd(
    denoise: Denoiser,
    x: Tensor,
    sigmas: Tensor,
    noise: Noise,
    gamma: float = 0.3,
    schedule: Schedule | None = None,
) -> Steps:
    """Strategic stochastic sampling (Zheng et al. 2024): along eps to the sigma of s = (1 - gamma) t_next, then noise.

    gamma 0 is deterministic and draws nothing, gamma 1 nearly lcm. `schedule` (default Stable Diffusion's) says which
    sigma a t has. s is rounded down to a whole timestep, as diffusers does. Raises ValueError for gamma outside 0..1.
    """
    if not 0 <= gamma <= 1:
        raise ValueError(f"gamma={gamma}: give a number from 0 (deterministic) to 1 (all noise is fresh)")
    schedule = schedule or Schedule()
    for i, (sigma, sigma_next) in intervals(sigmas, falling=gamma > 0):
        prediction = denoise(x, sigma)
        s = ((1 - gamma) * schedule.t(sigma_next) + 1e-3).floor()  # the sigma of a whole t may read a little less
        sigma_s = min(sigma_next, schedule.sigma(s).to(sigma_next)) if gamma > 0 else sigma_next
        x = prediction.x0 + sigma_s * prediction.eps
        x, fresh = noised(x, (sigma_next**2 - sigma_s**2) ** 0.5, noise, sigma, sigma_next)
        step = Step(i, sigma, sigma_next, x, *prediction, noise=fresh)
        x = after(step, (yield step)).x
