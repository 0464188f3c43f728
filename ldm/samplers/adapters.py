"""Samplers of others, as they are: a k-diffusion style function or a scheduler of diffusers as one of ours."""

import copy
import inspect
import queue
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ldm.samplers.denoiser import Denoiser, Prediction
from ldm.samplers.schedule import Schedule
from ldm.samplers.step import Noise, Step, Steps, after, check_finite, checked


class Stopped(BaseException):
    """The consumer of the steps has gone: nothing that the function catches."""


def from_k_diffusion(function: Callable[..., Tensor], **options: Any) -> Callable[..., Steps]:
    """`function(model, x, sigmas, extra_args, callback, disable, ...)` as a sampler: `pipe(..., sampler=...)`.

    Of these and of `options` it is given what its signature names. It owns its loop and cannot be left in the middle,
    so that it runs in a thread of its own, which waits while somebody looks at a step. A step is known when the
    function shows the next one, an evaluation later, so that it can be watched and stopped but not changed: sending
    anything raises ValueError. One that shows nothing by its callback is one step. Functions of sigma_min and
    sigma_max (dpm_fast, dpm_adaptive) are given those of the sigmas above 0. A noise_sampler is given our noise, along
    a Brownian path where the function names a Brownian tree of its own; noise that it draws by itself (s_churn's) comes
    from torch's global generator. For gradients its decorators (torch.no_grad) are taken off.

    Raises ValueError for options that the function lacks, and for sigmas that do not fall.
    """
    if not callable(function):
        raise ValueError(f"{function!r} is no function: give one of k_diffusion.sampling, or of your own")
    name = getattr(function, "__name__", repr(function))
    parameters = inspect.signature(function).parameters
    takes_any = any(p.kind == p.VAR_KEYWORD for p in parameters.values())
    if lacking := [option for option in options if option not in parameters and not takes_any]:
        given = f"{lacking[0]}={options[lacking[0]]!r}"
        raise ValueError(f"{given}: {name} has no such option; it has {', '.join(parameters)}")

    def arguments(sigmas: Tensor, noise: Noise, callback: Callable[[dict], None]) -> dict[str, Any]:
        positive = sigmas[sigmas > 0]
        known = {"extra_args": {}, "callback": callback, "disable": True, "noise_sampler": noise, "sigmas": sigmas}
        if "sigma_min" in parameters:
            known |= {"sigma_min": positive[-1], "sigma_max": positive[0], "n": len(sigmas) - 1}
        return {name: value for name, value in known.items() if name in parameters} | options

    def sampler(denoise: Denoiser, x: Tensor, sigmas: Tensor, noise: Noise) -> Steps:
        if len(checked(sigmas, falling=True)) == 1:
            return
        shown: queue.Queue[Any] = queue.Queue()
        answers: queue.Queue[Any] = queue.Queue()
        grad = torch.is_grad_enabled()
        last: list[tuple[Tensor, Prediction]] = []  # the latest evaluation

        def model(x: Tensor, sigma: Tensor, **_: Any) -> Tensor:
            prediction = denoise(x, sigma.flatten()[0])
            last[:] = [(sigma.flatten()[0], prediction)]
            return prediction.x0

        def callback(said: dict[str, Any]) -> None:
            shown.put(said)
            if answers.get() is Stopped:
                raise Stopped

        def run() -> None:
            try:
                with torch.set_grad_enabled(grad):
                    plain = inspect.unwrap(function) if grad else function
                    shown.put(plain(model, x.clone(), **arguments(sigmas.to(x), noise, callback)))
            except BaseException as error:
                shown.put(error)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        try:
            said = shown.get()
            if isinstance(said, Tensor):
                sigma, prediction = last[0] if last else (sigmas[0], Prediction(said, torch.zeros_like(said)))
                yield Step(0, sigma, sigmas[-1], said, *prediction)
            while isinstance(said, dict):
                i, sigma, x, x0 = said["i"], said["sigma"], said["x"].clone(), said["denoised"].clone()
                eps = (x - x0) / said.get("sigma_hat", sigma)  # with churn, x is at sigma_hat
                answers.put(None)
                said = shown.get()
                if isinstance(said, BaseException):
                    raise said
                x_next, sigma_next = (said["x"], said["sigma"]) if isinstance(said, dict) else (said, sigmas[-1])
                step = Step(i, sigma, sigma_next, x_next.clone(), x0, eps)
                check_finite(i, sigma, step.x, x0)
                if (yield step) is not None:
                    raise ValueError(
                        f"step {i} was sent something (blend='noise' does so, too): {name} goes on by itself, send"
                        " nothing"
                    )
            if isinstance(said, BaseException):
                raise said
        finally:
            answers.put(Stopped)
            thread.join()

    sampler.__name__ = name
    code = getattr(inspect.unwrap(function), "__code__", None)
    sampler.__dict__["brownian"] = code is not None and any("Brownian" in name for name in code.co_names)
    return sampler


def from_diffusers(scheduler: Any) -> Callable[..., Steps]:
    """A scheduler object of diffusers as a sampler: `pipe(..., sampler=from_diffusers(scheduler))`.

    It decides its own levels, so that it carries them: `sampler.sigmas(steps)` (steps + 1,) float64, and the standard
    deviation `sampler.first_std(sigma)` of the noise that it begins with. A run may take the last of these sigmas, as
    image to image does, and no others (ValueError). The net is asked at the scheduler's timesteps, under the `schedule`
    of the model (default Stable Diffusion's), for what the scheduler's prediction_type says. Further arguments are
    those of its `step` (eta, s_churn, ...); eta is 0 unless given, as in diffusers' pipelines.

    Each run has a copy, `scheduler` itself is never changed. Noise that it draws is ours; DPMSolverSDEScheduler has a
    Brownian tree instead, one per picture, of noise_sampler_seed or the pictures' seeds. An interval is one Step, even
    of two evaluations (Heun, KDPM2): x0 and eps are the first one's, at its timestep, which some schedulers round.
    Another x may be sent; what a scheduler remembers of earlier steps stays: UniPC's corrector, which goes on
    from the x before, forgets most of it. PNDM, begun in the middle, evaluates its first two levels first as it does
    from the beginning, where diffusers' image to image begins a level earlier and confuses them.

    Raises ValueError for what is no scheduler, and for one that has no alphas_cumprod (flow matching, EDM, training).
    """
    check(scheduler)
    name = type(scheduler).__name__
    known = [p for p in inspect.signature(scheduler.step).parameters.values() if p.name not in STEP]
    defaults = {"eta": 0.0} if any(p.name == "eta" for p in known) else {}
    spread = copied(scheduler, 2)
    preserving = spread.init_noise_sigma == 1  # its x is x / sqrt(1 + sigma^2)
    from_sigma = not preserving and spread.init_noise_sigma == spread.sigmas.max()

    tables: dict[int, Tensor] = {}  # the levels that have been asked for, by their number of steps

    def own_sigmas(steps: int) -> Tensor:
        if steps not in tables:
            tables[steps] = levels(copied(scheduler, steps))
        return tables[steps].clone()

    def first_std(sigma: Tensor) -> Tensor:
        return sigma if from_sigma else (1 + sigma**2) ** 0.5

    def scale(sigma: Tensor) -> Tensor | float:
        return (1 + sigma**2) ** 0.5 if preserving else 1.0

    def sampler(
        denoise: Denoiser, x: Tensor, sigmas: Tensor, noise: Noise, schedule: Schedule | None = None, **options: Any
    ) -> Steps:
        schedule = schedule or Schedule()
        theirs = scheduler.alphas_cumprod.to("cpu", torch.float64)
        if theirs.shape != (1000,) or not torch.allclose(theirs, schedule.alphas_cumprod, rtol=1e-2, atol=1e-6):
            warnings.warn(
                f"{name} has other betas than the model ({len(theirs)} timesteps, alphas_cumprod to {theirs[-1]:.2g}):"
                " make it from the model's own configuration, from_config(...)",
                stacklevel=2,
            )
        own, calls = begun(scheduler, sigmas, tables)
        if getattr(own, "noise_sampler_seed", 0) is None:
            own.noise_sampler_seed = getattr(noise, "seeds", None)
        # Not by `intervals`: the sigmas are its own by now, and one Karras step of DEIS goes nowhere.
        for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
            sample, predictions, draws = x / scale(sigma), [], Draws(noise, sigma, sigma_next)
            for t in calls[i]:
                s = schedule.sigma(t.to(torch.float64))
                predictions.append(denoise(own.scale_model_input(sample, t) * (1 + s**2) ** 0.5, s))
                out = OUTPUTS[own.config.prediction_type](predictions[-1], s)
                with draws:
                    sample = own.step(out, t, sample, **defaults | options).prev_sample
            x = sample * scale(sigma_next)
            step = Step(i, sigma, sigma_next, x, *predictions[0], noise=draws.last)
            x = after(step, (yield step)).x

    sampler.__name__ = name
    first_five = list(inspect.signature(sampler).parameters.values())[:5]
    signature = inspect.Signature([*first_five, *(p.replace(kind=p.KEYWORD_ONLY) for p in known)])
    sampler.__dict__.update(sigmas=own_sigmas, first_std=first_std, __signature__=signature)
    return sampler


STEP = ("model_output", "timestep", "sample", "generator", "return_dict")  # what the adapter gives or does not


class Draws(TorchFunctionMode):
    """What is drawn inside without a generator of its own is the run's noise."""

    def __init__(self, noise: Noise, sigma: Tensor, sigma_next: Tensor):
        super().__init__()
        self.draw = lambda: noise(sigma, sigma_next)
        self.last: Tensor | None = None

    def __torch_function__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.randn and kwargs.get("generator") is None:
            self.last = self.draw()
            return self.last.to(kwargs.get("dtype"))
        return func(*args, **kwargs)


def check(scheduler: Any) -> None:
    """Raises ValueError for what from_diffusers cannot run."""
    name = scheduler.__name__ if isinstance(scheduler, type) else type(scheduler).__name__
    if isinstance(scheduler, type) or not (hasattr(scheduler, "set_timesteps") and hasattr(scheduler, "step")):
        raise ValueError(
            f"{name} is no scheduler that samples: give an object with set_timesteps and step, e.g."
            " DPMSolverMultistepScheduler.from_config(config)"
        )
    kind = scheduler.config.get("prediction_type")
    if not hasattr(scheduler, "alphas_cumprod") or scheduler.config.get("use_flow_sigmas") or kind not in OUTPUTS:
        raise ValueError(
            f"{name} with prediction_type={kind!r} is for flow matching, EDM or another kind of model: give one"
            f" that has alphas_cumprod and predicts {', '.join(OUTPUTS)}"
        )
    if hasattr(scheduler, "step_plms") and not scheduler.config.skip_prk_steps:
        raise ValueError(f"{name} with skip_prk_steps=False: give skip_prk_steps=True, as Stable Diffusion has it")


def copied(scheduler: Any, steps: int) -> Any:
    """A copy that is set to `steps`."""
    own = copy.deepcopy(scheduler)
    own.set_timesteps(steps)
    return own


def levels(own: Any) -> Tensor:
    """(n+1,) float64: where each of its steps begins, and the end. ValueError where they rise."""
    if hasattr(own, "sigmas"):
        sigmas = torch.cat([own.sigmas[: len(own.timesteps) : own.order], own.sigmas[-1:]]).to("cpu", torch.float64)
    else:
        last = float(getattr(own, "final_alpha_cumprod", 1.0))
        if (late := int(own.timesteps.max())) >= len(own.alphas_cumprod):
            raise ValueError(
                f"{type(own).__name__} in {len(own.timesteps)} steps asks for timestep {late}, and has"
                f" {len(own.alphas_cumprod)} from 0: take fewer steps, or steps_offset=0"
            )
        a = own.alphas_cumprod[own.timesteps.cpu().unique_consecutive().long()].to("cpu", torch.float64)
        a = torch.cat([a, a.new_tensor([last])]).clamp(min=2**-24)  # of a zero terminal SNR, as `Schedule` has it
        sigmas = ((1 - a) / a) ** 0.5
    if (sigmas.diff() > 0).any():
        raise ValueError(f"{type(own).__name__} goes from less noise to more: give a scheduler that denoises")
    return sigmas


def begun(scheduler: Any, sigmas: Tensor, tables: Mapping[int, Tensor]) -> tuple[Any, list[Tensor]]:
    """A copy set to the steps of which `sigmas` are the last, and the timesteps it is called with in each interval.

    Of the `tables` of levels first, by their number of steps; then of any other number."""
    sigmas = sigmas.to("cpu", torch.float64)
    steps = len(sigmas) - 1
    if (sigmas.diff() > 0).any():
        raise ValueError(
            f"{type(scheduler).__name__} with sigmas that rise: it goes from noise to picture alone; backwards go the"
            " deterministic ones of ldm.SAMPLERS"
        )
    fitting = [total for total, table in tables.items() if torch.equal(table[-len(sigmas) :], sigmas)]
    for total in [*fitting, *range(steps, 1001)]:
        try:
            own = copied(scheduler, total)
            table = levels(own)
        except ValueError:  # more than it has
            break
        begin = len(table) - len(sigmas)
        if begin >= 0 and torch.equal(table[begin:], sigmas):
            if hasattr(own, "step_plms"):  # each level once, but the run's second level twice
                plain = own.timesteps.unique_consecutive()[begin:]
                return own, [plain[:2], *plain[1:].split(1)]
            if hasattr(own, "set_begin_index"):
                own.set_begin_index(begin * own.order)
            return own, list(own.timesteps[begin * own.order :].split(own.order))
    raise ValueError(
        f"{steps + 1} sigmas from {float(sigmas[0]):.4f} to {float(sigmas[-1]):.4f} are not the last of those of"
        f" {type(scheduler).__name__}, which has its own: leave sigmas out, or take them from sampler.sigmas(steps)"
    )


# What a net would have returned at sigma, by diffusers' prediction_type.
OUTPUTS: Mapping[str, Callable[[Prediction, Tensor], Tensor]] = {
    "epsilon": lambda p, sigma: p.eps,
    "v_prediction": lambda p, sigma: (p.eps - sigma * p.x0) / (1 + sigma**2) ** 0.5,
    "sample": lambda p, sigma: p.x0,
}
