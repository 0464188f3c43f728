"""The training loop that everything shares: rates, accumulation, EMA, several processes, resumable at any moment.

On a CPU, threads that each take a part of the batch are nearly twice as fast for small nets as threads that share every
product.

Every random number of step k is drawn from a generator seeded by (seed, k), so that the step number is the whole state
of the data and the noise: a run that was stopped and resumed, on as many threads, is the run that was not stopped. On
another number of threads, processes or parts of a batch it differs by rounding.
"""

import json
import math
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from tqdm import tqdm

from ldm.train import processes, state
from ldm.train.gradients import Gradients

Objective = TypeVar("Objective", bound=nn.Module)


def step_generator(seed: int, step: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


def batch_indices(count: int, batch: int, seed: int, step: int) -> Tensor:
    """The rows of step `step`: each epoch visits the rows once, in an order of its own, and drops an unfull batch."""
    if batch > count:
        raise ValueError(f"a batch of {batch} out of {count} pictures: take a batch of at most {count}")
    per_epoch = count // batch
    order = torch.randperm(count, generator=step_generator(seed + 1, step // per_epoch))
    start = step % per_epoch * batch
    return order[start : start + batch]


def linear(done: float) -> float:
    """Level, then straight down to 0 in the last quarter. The level part does not depend on the number of steps: a run
    may be made longer or shorter until its last quarter begins. (diffusers' `linear` falls from the start.)"""
    return min(1.0, (1 - done) / 0.25)


def cosine(done: float) -> float:
    """Half a wave from 1 to 0 (Loshchilov & Hutter 2017, without restarts)."""
    return 0.5 + 0.5 * math.cos(math.pi * done)


SCHEDULES: dict[str, Callable[[float], float]] = {"constant": lambda done: 1.0, "linear": linear, "cosine": cosine}


def learning_rate(step: int, steps: int, warmup: int, schedule: str = "linear") -> float:
    """A fraction of the full rate: up for `warmup` steps, then as the schedule has it for the part that is done.

    The cosine's wave begins after the warm-up, as in diffusers; linear counts from the start.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule {schedule!r}: there are {', '.join(SCHEDULES)}")
    start = warmup if schedule == "cosine" else 0
    done = max(0, step - start) / max(1, steps - start)
    return min((step + 1) / max(1, warmup), SCHEDULES[schedule](done))


def muon(weights: list[Tensor], lr: float) -> Optimizer:
    """torch's Muon, for convolutions too: a kernel (O,I,h,w) counts as the matrix (O,I*h*w), whose memory it shares."""
    matrices = [weight.detach().flatten(1) for weight in weights]
    optimizer = torch.optim.Muon(matrices, lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")

    def take_gradients(*_: Any) -> None:
        for matrix, weight in zip(matrices, weights, strict=True):
            assert weight.grad is not None
            matrix.grad = weight.grad.flatten(1)

    optimizer.register_step_pre_hook(take_gradients)
    return optimizer


def adamw(parameters: list[Tensor], lr: float) -> Optimizer:
    return AdamW(parameters, lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True)


def muon_and_adamw(net: nn.Module, lr: float) -> list[Optimizer]:
    """Muon (Jordan 2024; steps as large as AdamW's by Liu et al. 2025, so that both take the same `lr`) for the weights
    of linear layers and convolutions, AdamW for embeddings, norms and biases.

    AdamW alone needs three times the steps: what only a few captions speak of, as here most words, it learns last.
    """
    weights = [module.weight for module in net.modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    taken = {id(weight) for weight in weights}
    parts = [weights[i::8] for i in range(min(8, len(weights)))]  # for the threads to share
    return [muon(part, lr) for part in parts] + [adamw([p for p in net.parameters() if id(p) not in taken], lr)]


def forget_after(step: int, log: Path) -> None:
    """Takes from the log what a killed run wrote after its last state: those steps will be run, and logged, again."""
    lines = log.read_text().splitlines(keepends=True) if log.exists() else []
    kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
    if kept != lines:
        temporary = log.with_suffix(".part")
        temporary.write_text("".join(kept))
        temporary.replace(log)


class Log:
    """A line of JSON for each step, at once: a killed run keeps its log. What a full disk refuses waits for room."""

    def __init__(self, path: Path):
        self.file = path.open("ab", buffering=0)
        self.waiting = b""

    def write(self, row: Mapping[str, float]) -> None:
        self.waiting += json.dumps(row).encode() + b"\n"
        with suppress(OSError):
            while self.waiting:
                self.waiting = self.waiting[self.file.write(self.waiting) :]


class Stderr:
    """For a training whose stderr is a file on a full disk."""

    def write(self, text: str) -> None:
        with suppress(OSError):
            sys.stderr.write(text)

    def flush(self) -> None:
        with suppress(OSError):
            sys.stderr.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.stderr, name)


def say(text: str) -> None:
    tqdm.write(text, file=Stderr())


@contextmanager
def signals() -> Iterator[list[int]]:
    """Yields a list that gets the number of each SIGTERM and SIGINT (Ctrl-C) that comes, instead of their usual effect.

    SIGINT too is set, not left to Python: a shell that starts this in the background has it ignored.
    """
    came: list[int] = []
    handlers = {s: signal.signal(s, lambda number, _: came.append(number)) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield came
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


class Run:
    """All that a state has: the trainable parameters, their EMA, the optimizers, and how many steps and seconds."""

    def __init__(self, objective: nn.Module, optimizers: list[Optimizer], folder: Path, ema_decay: float | None):
        self.parameters = {name: p for name, p in objective.named_parameters() if p.requires_grad}
        self.ema_decay = ema_decay
        self.ema = {} if ema_decay is None else {name: p.detach().clone() for name, p in self.parameters.items()}
        self.optimizers = optimizers
        self.peaks = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]
        self.folder = folder
        self.path: Path | None = None  # of the last state
        self.step, self.seconds = 0, 0.0

    def settings(self) -> dict[str, Any]:
        """What must be the same in the run that goes on."""
        groups = [
            {"kind": type(optimizer).__name__} | group | {"params": len(group["params"])}
            for optimizer in self.optimizers
            for group in optimizer.param_groups
        ]
        groups = [group | {"lr": peak} for group, peak in zip(groups, self.peaks, strict=True)]
        return dict(
            parameters={name: f"{[*p.shape]} {p.dtype}" for name, p in self.parameters.items()},
            optimizer=dict(enumerate(groups)),
            ema_decay=self.ema_decay,
        )

    def take_step(self, batch: Sequence[Any], gradients: Gradients, fraction: float) -> tuple[float, float]:
        """At that fraction of the full rates. Returns the loss and the norm of its gradient."""
        groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        for group, peak in zip(groups, self.peaks, strict=True):
            group["lr"] = fraction * peak
        device = next(iter(self.parameters.values())).device
        rows = [item.to(device) for item in batch if isinstance(item, Tensor)]
        (loss,) = processes.total(gradients(rows))
        norm = processes.whole(nn.utils.clip_grad_norm_([*self.parameters.values()], 1.0)).item()
        if not math.isfinite(loss) or not math.isfinite(norm):
            lists = [item for item in batch if not isinstance(item, Tensor)]
            names = "".join(f" Its rows: {', '.join(map(str, names))}." for names in lists)
            raise FloatingPointError(
                f"step {self.step + 1}: the loss is {loss}, the norm of its gradient {norm}.{names} This step was not"
                f" taken; the last state is {self.path}. Mend the data or the loss, or begin anew in another folder"
                " with a lower learning rate"
            )
        gradients.step(self.optimizers)
        self.step += 1
        self.update_ema()
        return loss, norm

    @torch.no_grad()
    def update_ema(self) -> None:
        """The decay rises: the first weights are forgotten soon."""
        if self.ema_decay is not None:
            decay = min(self.ema_decay, self.step / (9 + self.step))
            torch._foreach_lerp_([*self.ema.values()], [p.detach() for p in self.parameters.values()], 1 - decay)

    @torch.no_grad()
    def finish(self) -> None:
        for name, average in self.ema.items():
            self.parameters[name].copy_(average)

    def values(self) -> dict[str, Any]:
        values = {f"net.{name}": p.detach() for name, p in self.parameters.items()}
        values |= {f"ema.{name}": p for name, p in self.ema.items()}
        for i, optimizer in enumerate(self.optimizers):
            for j, own in optimizer.state_dict()["state"].items():
                values |= {f"optimizer.{i}.{j}.{name}": value for name, value in own.items()}
        return values

    def save(self, config: Mapping[str, Any], keep: int) -> None:
        """By the first process. A full disk is said, and the training goes on."""
        tensors, scalars = {}, {}
        for name, value in self.values().items():
            if isinstance(value, Tensor):
                tensor = processes.whole(value)
                if processes.rank() == 0:
                    tensors[name] = tensor.cpu()
            else:
                scalars[name] = value
        if processes.rank() == 0:
            facts = dict(step=self.step, seconds=self.seconds, scalars=scalars, config=config)
            try:
                self.path = state.write(self.folder, self.step, tensors, facts, keep)
            except OSError as error:
                say(f"step {self.step}: no state was saved ({error}), the last is {self.path}. The training goes on")

    @torch.no_grad()
    def load(self, path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        self.path, self.step, self.seconds = path, facts["step"], facts["seconds"]
        for kind, ours in (("net", self.parameters), ("ema", self.ema)):
            for name, value in state.part(tensors, kind).items():
                ours[name].copy_(processes.like(value, ours[name]))
        for i, optimizer in enumerate(self.optimizers):
            values: dict[int, dict[str, Any]] = {}
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            for name, value in state.part({**tensors, **facts["scalars"]}, f"optimizer.{i}").items():
                j, key = name.split(".", 1)
                same = isinstance(value, Tensor) and value.shape == parameters[int(j)].shape
                values.setdefault(int(j), {})[key] = processes.like(value, parameters[int(j)]) if same else value
            optimizer.load_state_dict({"state": values, "param_groups": optimizer.state_dict()["param_groups"]})


def same_rates(theirs: Mapping[str, Any], ours: Mapping[str, Any], step: int) -> bool:
    """Whether a run of `ours` would be at `step` where one of `theirs` is: one may be made longer or shorter so."""
    return step <= ours["steps"] and all(learning_rate(k, **theirs) == learning_rate(k, **ours) for k in range(step))


def resume(run: Run, config: Mapping[str, Any]) -> None:
    """From the newest whole state in the run's folder, if there is one: the same for all processes."""
    if processes.rank() == 0:
        run.folder.mkdir(parents=True, exist_ok=True)
        state.clean(run.folder)
    path = processes.told(state.newest(run.folder) if processes.rank() == 0 else None)
    if path is not None:
        tensors, facts = state.read(path)
        theirs, ours = facts["config"], dict(config)
        if theirs["rate"] != ours["rate"] and same_rates(theirs["rate"], ours["rate"], facts["step"]):
            ours["rate"] = theirs["rate"]
        state.refuse_other(path, theirs, ours)
        run.load(path, tensors, facts)
    if processes.rank() == 0:
        forget_after(run.step, run.folder / "log.jsonl")


def watch(on_step: Callable[[int, dict[str, float]], None], line: dict[str, float], came: list[int]) -> None:
    """A signal ends it at once, as it may draw for minutes while the step is not saved yet."""

    def stop(number: int, _: Any) -> None:
        came.append(number)
        raise KeyboardInterrupt

    handlers = {s: signal.signal(s, stop) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        if not came:
            on_step(int(line["step"]), line)
    except KeyboardInterrupt:
        if not came:
            raise
    except OSError as error:
        say(f"step {line['step']}: {error}. The training goes on")
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def train(
    objective: Objective,
    batch_of: Callable[[int], Sequence[Any]],
    optimizers: list[Optimizer],
    folder: Path,
    *,
    steps: int,
    schedule: str = "linear",
    warmup: int = 200,
    accumulate: int = 1,
    workers: int = 0,
    ema_decay: float | None = 0.999,
    settings: Mapping[str, Any] | None = None,
    save_minutes: float = 3.0,
    save_steps: int | None = None,
    keep: int = 3,
    on_step: Callable[[int, dict[str, float]], None] | None = None,
) -> Objective:
    """Minimise `objective(*batch_of(step))` over its trainable parameters; returns it with their EMA.

    `batch_of(step)`, step from 0: the tensors of the whole batch, of one length, then, if there is one, a list of names
    of its rows for errors. `objective(*tensors)`: the mean loss over the rows that it is given. Both must draw their
    random numbers from `step_generator` alone, and the objective's buffers must not change.

    Under torchrun each process takes its share of the rows. A process takes them in `accumulate` parts, one after the
    other. Of each part, `workers` threads take a share, and then some of the `optimizers`; 0 is as many as torch has.
    Each of them holds a gradient: for large nets take 1, as torchrun's processes do; its products use all cores.

    The rates of the optimizers rise for `warmup` steps and follow the `schedule` (constant, linear or cosine). The norm
    of the gradient is clipped at 1. `ema_decay` None: no EMA.

    The run goes on from the newest state in `folder`; one is written every `save_minutes`, every `save_steps` and at
    the end, and the last `keep` are kept. A state of other parameters, optimizers, rates up to now or `settings` (JSON:
    what else makes the run what it is) raises ValueError. `folder/log.jsonl` gets a line for each step: step (the first
    is 1), loss, norm (before clipping), lr (of the first group), seconds. The same goes to `on_step(step, line)`, in
    the first process; its OSErrors (a full disk) are said, and the training goes on.

    SIGINT (Ctrl-C) and SIGTERM let the step end but not `on_step`, save and raise KeyboardInterrupt. A loss or gradient
    that is not finite raises FloatingPointError before it gets into the weights; after that, and after any other error,
    the last state that was saved stands. Only the main thread can be told of signals, so only it can train.
    """
    processes.join()
    shared = processes.share(objective)
    run = Run(objective, optimizers, folder, ema_decay)
    rate: dict[str, Any] = dict(steps=steps, warmup=warmup, schedule=schedule)
    config = dict(rate=rate, settings=dict(settings or {}), **run.settings())
    resume(run, config)
    first, start = processes.rank() == 0, run.step
    log = Log(folder / "log.jsonl" if first else Path(os.devnull))
    gradients = Gradients(shared, run.parameters, accumulate, workers)
    recent: deque[float] = deque(maxlen=20)
    bar = tqdm(range(start, steps), initial=start, total=steps, mininterval=5, disable=not first, file=Stderr())
    saved = last = time.monotonic()
    try:
        with signals() as came:
            for step in bar:
                fraction = learning_rate(step, **rate)
                loss, norm = run.take_step(batch_of(step), gradients, fraction)

                now = time.monotonic()
                run.seconds, last = run.seconds + now - last, now
                lr = fraction * run.peaks[0]
                line = dict(step=run.step, loss=loss, norm=norm, lr=lr, seconds=round(run.seconds))
                log.write(line)
                recent.append(loss)
                bar.set_postfix(loss=f"{sum(recent) / len(recent):.4f}", lr=f"{lr:.1e}", refresh=False)
                if on_step is not None and first:
                    watch(on_step, line, came)
                due = now - saved > 60 * save_minutes or (save_steps is not None and run.step % save_steps == 0)
                asked, due_of_first = processes.total(len(came), due and first)
                if asked:
                    break
                if due_of_first and run.step < steps:
                    run.save(config, keep)
                    saved = now
            if start < run.step:
                run.save(config, keep)
            if processes.total(len(came))[0]:
                raise KeyboardInterrupt(f"stopped after step {run.step} of {steps}; the last state is {run.path}")
    finally:
        gradients.close()
        log.file.close()
    run.finish()
    return objective
