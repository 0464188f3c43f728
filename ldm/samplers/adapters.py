"""Samplers of others, as they are: a k-diffusion style function as one of ours."""

import inspect
import queue
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ldm.samplers.denoiser import Denoiser
from ldm.samplers.step import Noise, Step, Steps


class Stopped(BaseException):
    """The consumer of the steps has gone: nothing that the function catches."""


def from_k_diffusion(function: Callable[..., Tensor], **options: Any) -> Callable[..., Steps]:
    """`function(model, x, sigmas, extra_args, callback, disable, ...)` as a sampler: `pipe(..., sampler=...)`.

    It owns its loop and cannot be left in the middle, so that it runs in a thread of its own, which waits while
    somebody looks at a step. A step is known when the function shows the next one, an evaluation later, so that it can
    be watched and stopped but not changed: sending anything raises ValueError. Functions of sigma_min and sigma_max
    (dpm_fast, dpm_adaptive) are given those of the sigmas above 0. Noise that the function draws by itself (s_churn's)
    comes from torch's global generator; a noise_sampler is given ours.
    """

    def sampler(denoise: Denoiser, x: Tensor, sigmas: Tensor, noise: Noise) -> Steps:
        shown: queue.Queue[Any] = queue.Queue()
        answers: queue.Queue[Any] = queue.Queue()
        grad = torch.is_grad_enabled()

        def model(x: Tensor, sigma: Tensor, **_: Any) -> Tensor:
            return denoise(x, sigma.flatten()[0]).x0

        def callback(said: dict[str, Any]) -> None:
            shown.put(said)
            if answers.get() is Stopped:
                raise Stopped

        parameters = inspect.signature(function).parameters
        arguments: dict[str, Any] = {"callback": callback, "disable": True} | options
        if "noise_sampler" in parameters:
            arguments.setdefault("noise_sampler", noise)
        if "sigma_min" in parameters:
            positive = sigmas[sigmas > 0]
            arguments |= {"sigma_min": positive[-1], "sigma_max": positive[0]}
            arguments |= {"n": len(sigmas) - 1} if "n" in parameters else {}
        else:
            arguments["sigmas"] = sigmas.to(x)

        def run() -> None:
            try:
                with torch.set_grad_enabled(grad):
                    shown.put(function(model, x.clone(), **arguments))
            except BaseException as error:
                shown.put(error)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        try:
            said = shown.get()
            while isinstance(said, dict):
                i, sigma, x, x0 = said["i"], said["sigma"], said["x"].clone(), said["denoised"].clone()
                answers.put(None)
                said = shown.get()
                if isinstance(said, BaseException):
                    raise said
                x_next, sigma_next = (said["x"], said["sigma"]) if isinstance(said, dict) else (said, sigmas[-1])
                sent = yield Step(i, sigma, sigma_next, x_next.clone(), x0, (x - x0) / sigma)
                if sent is not None:
                    raise ValueError(
                        f"step {i} was sent something: {function.__name__} goes on by itself, send nothing"
                    )
            if isinstance(said, BaseException):
                raise said
        finally:
            answers.put(Stopped)
            thread.join()

    return sampler
