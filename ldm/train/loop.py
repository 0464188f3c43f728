"""The training loop that the default model's nets share: AdamW, warm-up and linear decay, EMA, resumable at any moment.

Every random number of step k is drawn from a generator seeded by (seed, k), so that the step number is the whole state
of the data and the noise: a run that was stopped and resumed is the run that was not stopped.
"""

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

Net = TypeVar("Net", bound=nn.Module)


def step_generator(seed: int, step: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


def batch_indices(count: int, batch: int, seed: int, step: int) -> Tensor:
    """The rows of step `step`: each epoch visits all `count` rows once, in an order of its own."""
    per_epoch = count // batch
    order = torch.randperm(count, generator=step_generator(seed + 1, step // per_epoch))
    start = step % per_epoch * batch
    return order[start : start + batch]


def learning_rate(step: int, steps: int, peak: float, warmup: int) -> float:
    """Up for `warmup` steps, level, then straight down to 0 in the last quarter.

    The level part does not depend on `steps`: a run may be made longer or shorter until its last quarter begins.
    """
    return peak * min(1.0, (step + 1) / warmup, (steps - step) / (0.25 * steps))


def save_state(path: Path, state: dict) -> None:
    """All or nothing: written beside `path`, flushed to the disk, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".part")
    with temporary.open("wb") as f:
        torch.save(state, f)
        f.flush()
        os.fsync(f.fileno())
    temporary.replace(path)


def train(
    net: Net,
    loss_of: Callable[[int], Tensor],
    folder: Path,
    *,
    steps: int,
    lr: float,
    warmup: int = 200,
    ema_decay: float = 0.999,
    weight_decay: float = 0.01,
    save_minutes: float = 3.0,
) -> Net:
    """Minimise `loss_of(step)` over the parameters of `net`; returns `net` with its EMA weights.

    `folder/state.pt` is read when it exists and written every `save_minutes` and at the end (and on Ctrl-C);
    `folder/log.jsonl` gets a line every 20 steps: step, loss (mean over the 20), lr, seconds.
    """
    optimizer = torch.optim.AdamW(net.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=weight_decay)
    ema = {k: v.clone() for k, v in net.state_dict().items()}
    start, seconds = 0, 0.0
    state_file = folder / "state.pt"
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        net.load_state_dict(state["net"])
        optimizer.load_state_dict(state["optimizer"])
        ema, start, seconds = state["ema"], state["step"], state["seconds"]
    folder.mkdir(parents=True, exist_ok=True)

    def save(step: int) -> None:
        save_state(
            state_file,
            dict(net=net.state_dict(), optimizer=optimizer.state_dict(), ema=ema, step=step, seconds=seconds),
        )

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # to be told to stop is to save and stop
    signal.signal(signal.SIGINT, signal.default_int_handler)  # also where a shell started this in the background
    losses: list[float] = []
    saved = last = time.monotonic()
    step = start
    try:
        for step in (bar := tqdm(range(start, steps), initial=start, total=steps, mininterval=5)):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps, lr, warmup)
            loss = loss_of(step)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            decay = min(ema_decay, (1 + step) / (10 + step))
            with torch.no_grad():
                values = net.state_dict()
                torch._foreach_lerp_([ema[k] for k in values], list(values.values()), 1 - decay)
            losses.append(loss.item())

            now = time.monotonic()
            seconds, last = seconds + now - last, now
            if len(losses) == 20:
                row = dict(
                    step=step + 1, loss=sum(losses) / 20, lr=optimizer.param_groups[0]["lr"], seconds=round(seconds)
                )
                with (folder / "log.jsonl").open("a") as f:
                    f.write(json.dumps(row) + "\n")
                bar.set_postfix(loss=f"{row['loss']:.4f}")
                losses.clear()
            if now - saved > 60 * save_minutes:
                save(step + 1)
                saved = now
    except KeyboardInterrupt:
        save(step)
        raise
    save(steps)
    net.load_state_dict(ema)
    return net
