"""The training loop that the default model's nets share: warm-up and linear decay, EMA, resumable at any moment.

On a CPU, threads that each take a part of the batch are nearly twice as fast here as threads that share every product.

Every random number of step k is drawn from a generator seeded by (seed, k), so that the step number is the whole state
of the data and the noise: a run that was stopped and resumed, on as many threads, is the run that was not stopped.
"""

import json
import math
import os
import signal
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from tqdm import tqdm

Net = TypeVar("Net", bound=nn.Module)


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


def learning_rate(step: int, steps: int, warmup: int) -> float:
    """A fraction of the full rate: up for `warmup` steps, level, then straight down to 0 in the last quarter.

    The level part does not depend on `steps`: a run may be made longer or shorter until its last quarter begins.
    """
    return min(1.0, (step + 1) / warmup, (steps - step) / (0.25 * steps))


def save_state(path: Path, state: dict) -> None:
    """All or nothing: written beside `path`, flushed to the disk, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".part")
    with temporary.open("wb") as f:
        torch.save(state, f)
        f.flush()
        os.fsync(f.fileno())
    temporary.replace(path)


def forget_after(step: int, log: Path) -> None:
    """Takes from the log what a killed run wrote after its last state: those steps will be run, and logged, again."""
    lines = log.read_text().splitlines(keepends=True) if log.exists() else []
    kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
    if kept != lines:
        temporary = log.with_suffix(".part")
        temporary.write_text("".join(kept))
        temporary.replace(log)


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


def train(
    net: Net,
    batch_of: Callable[[int], tuple[Tensor, ...]],
    loss_of: Callable[..., Tensor],
    optimizers: list[Optimizer],
    folder: Path,
    *,
    steps: int,
    warmup: int = 200,
    ema_decay: float = 0.999,
    save_minutes: float = 3.0,
) -> Net:
    """Minimise `loss_of(*batch_of(step))` over the parameters of `net`; returns `net` with its EMA weights.

    `batch_of` gives tensors of one length, `loss_of` the mean over their rows. There are as many threads as torch has;
    each takes some of the rows, then some of the `optimizers`, whose rates rise and fall by `learning_rate`.
    `folder/state.pt` is read when it exists and written every `save_minutes` and at the end; `folder/log.jsonl` gets a
    line for each step: step (the first is 1), loss, lr, seconds. SIGINT (Ctrl-C) and SIGTERM let the step end, save and
    raise KeyboardInterrupt. A loss or gradient that is not finite raises FloatingPointError before it gets into the
    weights; after that, and after any other error, the last state that was saved stands.
    Only the main thread can be told of signals, so only it can train.
    """
    parameters = list(net.parameters())
    peaks = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]
    ema = {k: v.clone() for k, v in net.state_dict().items()}
    start, seconds = 0, 0.0
    state_file = folder / "state.pt"
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        net.load_state_dict(state["net"])
        for optimizer, values in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(values)
        ema, start, seconds = state["ema"], state["step"], state["seconds"]
    folder.mkdir(parents=True, exist_ok=True)
    forget_after(start, folder / "log.jsonl")

    def save(step: int) -> None:
        rest = dict(optimizers=[o.state_dict() for o in optimizers], ema=ema, step=step, seconds=seconds)
        save_state(state_file, dict(net=net.state_dict(), **rest))

    stop = False

    def ask_to_stop(*_: Any) -> None:
        nonlocal stop
        stop = True

    # SIGINT too: a shell that starts this in the background has it ignored.
    handlers = {s: signal.signal(s, ask_to_stop) for s in (signal.SIGTERM, signal.SIGINT)}
    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))

    def gradients(share: float, *rows: Tensor) -> tuple[float, tuple[Tensor, ...]]:
        loss = share * loss_of(*rows)
        return loss.item(), torch.autograd.grad(loss, parameters)

    recent: deque[float] = deque(maxlen=20)
    saved = last = time.monotonic()
    try:
        with (folder / "log.jsonl").open("a", buffering=1) as log:  # line by line: a killed run keeps its log
            for step in (bar := tqdm(range(start, steps), initial=start, total=steps, mininterval=5)):
                rate = learning_rate(step, steps, warmup)
                groups = [group for optimizer in optimizers for group in optimizer.param_groups]
                for group, peak in zip(groups, peaks, strict=True):
                    group["lr"] = rate * peak
                batch = batch_of(step)
                parts = list(zip(*(rows.chunk(threads) for rows in batch), strict=True))
                shares = [len(part[0]) / len(batch[0]) for part in parts]
                losses, grads = zip(*pool.map(gradients, shares, *zip(*parts, strict=True)), strict=True)
                loss = sum(losses)
                for parameter, *summands in zip(parameters, *grads, strict=True):
                    parameter.grad = sum(summands[1:], summands[0])
                norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0).item()
                if not math.isfinite(loss) or not math.isfinite(norm):
                    raise FloatingPointError(
                        f"step {step}: the loss is {loss}, the norm of its gradient {norm}. The weights are still those"
                        f" before this step, {state_file} (if it is there) is older: mend the data or the loss, or"
                        " lower the learning rate, and start again"
                    )
                list(pool.map(lambda optimizer: optimizer.step(), optimizers))
                decay = min(ema_decay, (1 + step) / (10 + step))
                with torch.no_grad():
                    values = net.state_dict()
                    torch._foreach_lerp_([ema[k] for k in values], list(values.values()), 1 - decay)

                now = time.monotonic()
                seconds, last = seconds + now - last, now
                row = dict(step=step + 1, loss=loss, lr=groups[0]["lr"], seconds=round(seconds))
                log.write(json.dumps(row) + "\n")
                recent.append(loss)
                bar.set_postfix(loss=f"{sum(recent) / len(recent):.4f}", refresh=False)
                if stop:
                    break
                if now - saved > 60 * save_minutes:
                    save(step + 1)
                    saved = now
        if start < steps:
            save(step + 1)
        if stop:
            raise KeyboardInterrupt(f"stopped; the state is in {state_file}")
    finally:
        pool.shutdown()
        torch.set_num_threads(threads)  # the pool's 1 would be that of every thread to come
        for number, handler in handlers.items():
            signal.signal(number, handler)
    net.load_state_dict(ema)
    return net
