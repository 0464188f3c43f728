"""The noise schedule, as data.

A training timestep t = 0..999 has a signal share a_t (alphas_cumprod). The samplers work in Karras' scale,
x = x0 + sigma * eps with sigma_t = sqrt((1 - a_t) / a_t): Karras et al. 2022, table 1, "VP".
"""

import math
from collections.abc import Callable, Mapping
from copy import copy
from numbers import Integral
from typing import Any

import torch
from torch import Tensor


def leading(steps: int, offset: int = 1) -> Tensor:
    """t = k * (1000 // steps) + offset, as CompVis' DDIM; of the offset as much as the table has room for."""
    t = torch.arange(steps - 1, -1, -1, dtype=torch.float64) * (1000 // steps)
    return t + min(offset, 999 - int(t[0]))


def trailing(steps: int) -> Tensor:
    """t = round(1000 - k * 1000 / steps) - 1: ends on whole strides, starts at 999 (Lin et al. 2023, table 2)."""
    return (1000 - torch.arange(steps, dtype=torch.float64) * 1000 / steps).round() - 1


def linspace(steps: int) -> Tensor:
    """From 999 to 0 in equal parts, fractions kept, as k-diffusion's get_sigmas."""
    return torch.linspace(999, 0, steps, dtype=torch.float64)


def sgm_uniform(steps: int) -> Tensor:
    """From 999 towards 0 in equal parts, without the 0 itself, as ComfyUI and webui."""
    return torch.linspace(999, 0, steps + 1, dtype=torch.float64)[:-1]


def simple(steps: int) -> Tensor:
    """t = 999 - floor(k * 1000 / steps), as ComfyUI."""
    return 999 - torch.arange(steps, dtype=torch.float64) * 1000 // steps


def dpm_solver(steps: int) -> Tensor:
    """sgm_uniform's, rounded to whole timesteps, as diffusers' multistep solvers (DPM-Solver, UniPC, DEIS).

    Only for 1000 steps two of them round to one timestep (`apart`). (For "leading" these classes take a stride of
    1000 // (steps + 1) timesteps; ours is the same for all samplers.)
    """
    return apart((torch.arange(steps, 0, -1, dtype=torch.float64) * (999 / steps)).round())  # np.linspace's arithmetic


def lcm(steps: int) -> Tensor:
    """Evenly among the 50 timesteps 19, 39, ... 999 that latent consistency models are trained on (Luo et al. 2023), as
    diffusers; above 50 steps simple."""
    if steps > 50:
        return simple(steps)
    return 999 - 20 * (torch.arange(steps, dtype=torch.float64) * 50 // steps)


def beta(steps: int) -> Tensor:
    """t = round(999 q), q the quantiles 1 - k / steps of Beta(0.6, 0.6), dense at both ends (Lee et al. 2024; ComfyUI).

    From 139 steps on neighbours can round to one timestep (`apart`).
    """
    k = torch.arange(steps, dtype=torch.float64)
    return apart((999 * beta_quantile(1 - k / steps)).round())


def apart(t: Tensor) -> Tensor:
    """Whole timesteps (n,) that fall: of two that are the same the later goes on to the next that is free."""
    k = torch.arange(len(t), dtype=torch.float64)
    return (t + k).cummin(0).values.clamp(min=len(t) - 1) - k


def beta_quantile(p: Tensor, a: float = 0.6) -> Tensor:
    """The x (n,) under which Beta(a, a) has the share p (n,) float64: Newton's method on y = x^a, below p = 1/2.

    There the integral of (t (1 - t))^(a - 1) from 0 to x is y sum c_n x^n (DLMF 8.17.7), nearly linear in y.
    """
    n = torch.arange(1, 60, dtype=torch.float64)
    c = torch.cat([torch.ones_like(n[:1]), ((n - a) / n).cumprod(0)]) / torch.cat([n[:1] - 1 + a, n + a])

    def integral(x: Tensor) -> Tensor:
        return x**a * (x[:, None] ** torch.arange(60) * c).sum(1)

    share = 2 * torch.minimum(p, 1 - p) * integral(p.new_tensor([0.5]))
    y = a * share
    for _ in range(6):
        x = y ** (1 / a)
        y = y - (integral(x) - share) * a * (1 - x) ** (1 - a)
    x = y ** (1 / a)
    return torch.where(p < 0.5, x, 1 - x)


def karras(steps: int, low: float, high: float, rho: float = 7.0) -> Tensor:
    """Equal parts of sigma^(1 / rho): Karras et al. 2022, eq. 5."""
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    high, low = high ** (1 / rho), low ** (1 / rho)
    return (high + ramp * (low - high)) ** rho


def exponential(steps: int, low: float, high: float) -> Tensor:
    """Equal parts of log sigma, as k-diffusion."""
    return polyexponential(steps, low, high)


def polyexponential(steps: int, low: float, high: float, rho: float = 1.0) -> Tensor:
    """log sigma falls as a power of the steps that are left, as in k-diffusion; rho 1 is exponential."""
    ramp = torch.linspace(1, 0, steps, dtype=torch.float64) ** rho
    return (math.log(low) + ramp * (math.log(high) - math.log(low))).exp()


def kl_optimal(steps: int, low: float, high: float) -> Tensor:
    """Equal parts of arctan sigma, best for Gaussian data: Sabour et al. 2024 (Align Your Steps)."""
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    return (math.atan(high) + ramp * (math.atan(low) - math.atan(high))).tan()


def align_your_steps(steps: int, low: float, high: float) -> Tensor:
    """The ten steps found for SD 1 (Sabour et al. 2024): sigma of the timesteps published, and the level after them."""
    levels = (14.6146412293, 6.4745760956, 3.8636745985, 2.6946151520, 1.8841921177, 1.3943805092)
    return log_interpolated((*levels, 0.9642583904, 0.6523686016, 0.3977456272, 0.1515232662, 0.0291671582), steps)


def align_your_steps_xl(steps: int, low: float, high: float) -> Tensor:
    """The same for SDXL."""
    levels = (14.6146412293, 6.3184485287, 3.7681790315, 2.1811480769, 1.3405244945, 0.8620721141)
    return log_interpolated((*levels, 0.5550693289, 0.3798540708, 0.2332364134, 0.1114188177, 0.0291671582), steps)


def log_interpolated(levels: tuple[float, ...], steps: int) -> Tensor:
    """The levels read at steps + 1 places, linearly in log sigma, without the last."""
    table = torch.tensor(levels, dtype=torch.float64).log()
    place = torch.arange(steps, dtype=torch.float64) * (len(table) - 1) / steps
    low = place.long()
    return torch.lerp(table[low], table[low + 1], place - low).exp()


def zero_terminal_snr(alphas_cumprod: Tensor) -> Tensor:
    """Lin et al. 2023, algorithm 1: sqrt(a) shifted to end at 0 and scaled to begin where it did.

    The last a is then held at 2^-24, as in diffusers' Euler, for a finite sigma of 4096: next to it x0 is nothing.
    """
    root = alphas_cumprod.sqrt()
    scaled = (root - root[-1]) * root[0] / (root[0] - root[-1])
    return (scaled**2).clamp(min=2**-24)


# Spaced in timesteps, f(steps) -> t; and in sigma whatever t that is, f(steps, sigma_min, sigma_max) -> sigmas.
TIMESTEPS: dict[str, Callable[..., Tensor]] = {
    **{"leading": leading, "trailing": trailing, "linspace": linspace},
    **{"sgm_uniform": sgm_uniform, "simple": simple, "beta": beta},
    **{"dpm_solver": dpm_solver, "lcm": lcm},
}
SIGMAS: dict[str, Callable[..., Tensor]] = {
    **{"karras": karras, "exponential": exponential, "polyexponential": polyexponential, "kl_optimal": kl_optimal},
    **{"align_your_steps": align_your_steps, "align_your_steps_xl": align_your_steps_xl},
}
SPACINGS = (*TIMESTEPS, *SIGMAS)
WHOLE = ("leading", "trailing", "simple", "beta", "dpm_solver", "lcm")  # timesteps

# The fields of a scheduler_config.json: those without which it would mean another schedule, by diffusers' own defaults;
# those of a few accepted values; those that are not the schedule's, or do nothing in DDIM and Euler. The betas and
# steps_offset are numbers. Any other field must be off: null, false or 0.
NEEDED = ("beta_schedule", "beta_start", "beta_end")
CHOICES: dict[str, tuple] = {
    "beta_schedule": ("scaled_linear",),
    "num_train_timesteps": (1000,),
    "timestep_spacing": ("leading", "trailing", "linspace", None),
    "timestep_type": ("discrete",),
    "use_karras_sigmas": (True, False, None),
    "interpolation_type": ("linear",),
    "sigma_min": (None,),
    "sigma_max": (None,),
    "use_exponential_sigmas": (True, False, None),
    "final_sigmas_type": ("zero", "sigma_min"),
    "set_alpha_to_one": (True, False),
    "rescale_betas_zero_snr": (True, False),
    "variance_type": ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", None),
}
FREE = {
    *("prediction_type", "skip_prk_steps", "original_inference_steps", "timestep_scaling", "noise_sampler_seed"),
    *("solver_order", "solver_type", "algorithm_type", "lower_order_final", "euler_at_final", "lambda_min_clipped"),
    *("predict_x0", "disable_corrector", "solver_p", "flow_shift", "time_shift_type"),
    *("clip_sample_range", "sample_max_value", "dynamic_thresholding_ratio"),
}


class Schedule:
    """`alphas_cumprod` (1000,) float64 and what follows from it.

    `spacing` is the one that the model's own configuration asks for, None if it leaves that to the sampler.
    `steps_offset` and `set_alpha_to_one` are diffusers' names for "leading" + 1 and for a last sigma of 0 in DDIM.
    `zero_snr`: the last timestep is pure noise, as models are trained whose scheduler_config.json has
    rescale_betas_zero_snr. They want the spacing "trailing", which starts there. `final_sigmas_type` is diffusers' name
    for the last sigma of the other samplers, "zero" or "sigma_min", that of t = 0.
    """

    def __init__(
        self,
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        spacing: str | None = None,
        steps_offset: int = 1,
        set_alpha_to_one: bool = False,
        zero_snr: bool = False,
        final_sigmas_type: str = "zero",
    ):
        betas = torch.linspace(beta_start**0.5, beta_end**0.5, 1000, dtype=torch.float64) ** 2
        self.alphas_cumprod = (1 - betas).cumprod(0)
        if zero_snr:
            self.alphas_cumprod = zero_terminal_snr(self.alphas_cumprod)
        self.spacing = spacing
        self.steps_offset = steps_offset
        self.set_alpha_to_one = set_alpha_to_one
        self.final_sigmas_type = final_sigmas_type
        self._sigmas = ((1 - self.alphas_cumprod) / self.alphas_cumprod).sqrt()

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "Schedule":
        """From a diffusers scheduler_config.json; ValueError for a field that asks for what is not done here.

        A missing set_alpha_to_one is False and a missing steps_offset 1, as in every official folder of Stable
        Diffusion, not True and 0 as in diffusers' DDIM.
        """
        if missing := [field for field in NEEDED if field not in config]:
            raise ValueError(f"{', '.join(missing)} missing: a scheduler_config.json must have {', '.join(NEEDED)}")
        for field, value in config.items():
            if field in CHOICES:
                good, accepted = value in CHOICES[field], " or ".join(map(repr, CHOICES[field]))
            elif field in ("beta_start", "beta_end"):
                good, accepted = isinstance(value, float) and 0 < value < 1, "a number between 0 and 1"
            elif field == "steps_offset":
                good, accepted = type(value) is int and 0 <= value < 1000, "a whole number from 0 to 999"
            else:
                good, accepted = field in FREE or field.startswith("_") or not value, "null or false"
            if not good:
                raise ValueError(f"{field} is {value!r}, but this version only does {accepted}")
        named = [name for name in ("karras", "exponential") if config.get(f"use_{name}_sigmas")]
        if len(named) > 1:
            raise ValueError("use_karras_sigmas and use_exponential_sigmas both say how to space: set one of them")
        return cls(
            config["beta_start"],
            config["beta_end"],
            named[0] if named else config.get("timestep_spacing"),
            config.get("steps_offset", 1),
            config.get("set_alpha_to_one", False),
            config.get("rescale_betas_zero_snr", False),
            config.get("final_sigmas_type", "zero"),
        )

    def to_zero_snr(self) -> "Schedule":
        """The same, ending in noise alone (`zero_terminal_snr`), which samplers then start from."""
        other = copy(self)
        other.alphas_cumprod = zero_terminal_snr(self.alphas_cumprod)
        other._sigmas = ((1 - other.alphas_cumprod) / other.alphas_cumprod).sqrt()
        other.spacing = "trailing"
        return other

    @property
    def sigma_min(self) -> float:
        return self._sigmas[0].item()

    @property
    def sigma_max(self) -> float:
        return self._sigmas[-1].item()

    def sigma(self, t: Tensor, log: bool = False) -> Tensor:
        """sigma of timesteps 0..999; between two of them linear in sigma (diffusers) or in log sigma (k-diffusion)."""
        table = self._sigmas.log() if log else self._sigmas
        low = t.floor().long().clamp(0, 998)
        value = torch.lerp(table[low], table[low + 1], (t - low).to(table.dtype))
        return value.exp() if log else value

    def t(self, sigma: Tensor | float, log: bool = False) -> Tensor:
        """The inverse of `sigma` with the same `log`: a timestep with its fraction, held at both ends of the table."""
        table = self._sigmas.log() if log else self._sigmas
        value = torch.as_tensor(sigma, dtype=torch.float64, device="cpu")
        value = value.log() if log else value
        low = (torch.searchsorted(table, value) - 1).clamp(0, 998)
        return (low + (value - table[low]) / (table[low + 1] - table[low])).clamp(0, 999)

    def sigmas(
        self, steps: int, spacing: str | None = None, *, log: bool = False, rho: float | None = None, end: float = 0.0
    ) -> Tensor:
        """(steps + 1,) float64, strictly decreasing: where each of `steps` steps starts, and `end`.

        spacing: one of SPACINGS (default linspace), explained at the functions of these names. `log` interpolates
        log sigma instead of sigma, as k-diffusion's get_sigmas does; it matters for linspace and sgm_uniform alone.
        `rho` is that of karras (default 7) and polyexponential (1). Where the last step already starts at sigma_min,
        the end is 0 whatever was asked for. Raises ValueError for less than 1 step, and for more than 1000 of those
        whose timesteps are whole numbers.
        """
        spacing = spacing or self.spacing or "linspace"
        most = 1000 if spacing in WHOLE else math.inf
        if not isinstance(steps, Integral) or not 1 <= steps <= most:
            raise ValueError(f"steps={steps}: the schedule has 1000 timesteps, so {spacing} goes from 1 to 1000 steps")
        if spacing not in SPACINGS:
            raise ValueError(
                f"unknown spacing {spacing!r}: use one of {', '.join(SPACINGS)}, or pass a tensor of sigmas"
            )
        if rho is not None and spacing not in ("karras", "polyexponential"):
            raise ValueError(f"rho={rho}: {spacing} has none, leave it out or use karras or polyexponential")
        if spacing in SIGMAS:
            options = {} if rho is None else {"rho": rho}
            sigmas = SIGMAS[spacing](steps, self.sigma_min, self.sigma_max, **options)
        else:
            options = {"offset": self.steps_offset} if spacing == "leading" else {}
            sigmas = self.sigma(TIMESTEPS[spacing](steps, **options), log)
        last = sigmas[-1].item()
        if math.isclose(last, self.sigma_min, rel_tol=1e-9):
            end = 0.0
        if not 0 <= end < last:
            raise ValueError(f"end={end}: give a sigma of 0 or more, below that of the last step, {last:.6f}")
        return torch.cat([sigmas, torch.tensor([end], dtype=torch.float64)])
