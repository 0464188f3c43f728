"""An interrupted training is the uninterrupted one, bit for bit. As a script, this file trains and kills itself."""

import copy
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from ldm import save
from ldm.save import whole_folder
from ldm.train import loop, state
from ldm.train.gradients import Gradients
from ldm.train.loop import (
    adamw,
    batch_indices,
    learning_rate,
    muon,
    muon_and_adamw,
    step_generator,
    train,
)

STEPS, BATCH = 26, 4
DATA = torch.randn(22, 3, generator=torch.Generator().manual_seed(1))


class Tiny(nn.Sequential):
    """A net and its objective."""

    def __init__(self):
        torch.manual_seed(0)
        super().__init__(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1))

    def forward(self, x, y):
        return (super().forward(x) - y).square().mean()


class Product(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(1))

    def forward(self, x):
        return (self.weight * x).mean()


def batch_of(step):
    x = DATA[batch_indices(len(DATA), BATCH, 0, step)]
    noise = torch.randn(x.shape, generator=step_generator(0, step))
    return x + 0.1 * noise, x.sum(1, keepdim=True)


def stop_at(step):
    return lambda now: os.kill(os.getpid(), signal.SIGTERM) if now == step else None


def run(folder, before=lambda step: None, net=None, **options):
    """Train, and call `before` in each step."""
    net = Tiny() if net is None else net

    def draw(step):
        before(step)
        return batch_of(step)

    return train(net, draw, muon_and_adamw(net, 0.2), folder, **{"steps": STEPS, "warmup": 5} | options)


@pytest.fixture(autouse=True, scope="module")
def two_threads():
    """Each takes half of a batch, whatever the machine has."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def newest(folder):
    """Its tensors, its step."""
    tensors, facts = state.read(state.newest(folder))
    return tensors, facts["step"]


def log(folder):
    """All but the wall time."""
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


def assert_same(folder, whole):
    (ours, step), (theirs, last) = newest(folder), newest(whole)
    assert step == last == STEPS
    assert log(folder) == log(whole)  # says from which step on they differ
    assert ours.keys() == theirs.keys()
    assert [name for name, value in ours.items() if not torch.equal(value, theirs[name])] == []


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    run(folder)
    return folder


class Clock:
    """A second a step: with `save_minutes=0.1` a state is saved every seven steps."""

    def __init__(self):
        self.now = 0

    def monotonic(self):
        self.now += 1
        return self.now


def test_a_whole_run(whole, tmp_path):
    net, before = run(tmp_path), Tiny().state_dict()
    assert_same(tmp_path, whole)
    end, _ = newest(whole)
    assert [file.name[:12] for file in state.paths(whole)] == ["step-0000026"]
    assert [row["step"] for row in log(whole)] == list(range(1, STEPS + 1))
    losses = [row["loss"] for row in log(whole)]
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    for name, value in net.state_dict().items():
        assert torch.equal(value, end[f"ema.{name}"])
        assert not torch.equal(value, end[f"net.{name}"])
        assert not torch.equal(value, before[name])


def test_ema_and_learning_rate_are_those_of_each_step(tmp_path):
    """By hand, with torch.optim alone."""
    net, seen = Tiny(), []
    run(tmp_path, lambda step: seen.append({k: v.clone() for k, v in net.state_dict().items()}), net)
    ema, (end, _) = seen[0], newest(tmp_path)
    for step, values in enumerate([*seen[1:], state.part(end, "net")]):
        decay = min(0.999, (1 + step) / (10 + step))
        ema = {k: decay * ema[k] + (1 - decay) * values[k] for k in ema}
    for name, value in ema.items():
        torch.testing.assert_close(end[f"ema.{name}"], value, rtol=1e-6, atol=1e-6)
    assert [row["lr"] for row in log(tmp_path)] == [0.2 * learning_rate(step, STEPS, 5) for step in range(STEPS)]


def test_a_finished_run_does_nothing_more(tmp_path):
    first = run(tmp_path)
    files = {f: (f.read_bytes(), f.stat().st_mtime_ns) for f in tmp_path.iterdir()}
    again = run(tmp_path, lambda step: pytest.fail("a step was run"))
    assert files == {f: (f.read_bytes(), f.stat().st_mtime_ns) for f in tmp_path.iterdir()}
    for a, b in zip(first.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


class TestThreads:
    """A batch may be divided among any number of threads: the gradient is that of the whole."""

    @pytest.mark.parametrize("threads", [1, 2, 3, 5])
    def test_shares(self, threads, tmp_path):
        net, by_hand = Tiny(), Tiny()
        values = copy.deepcopy(net.state_dict())

        def look(_, rows):
            assert torch.get_num_threads() == 1
            lengths.append(len(rows[0]))

        lengths = []
        net.register_forward_pre_hook(look)
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            optimizers = [torch.optim.SGD(net.parameters(), lr=0.1)]
            train(net, batch_of, optimizers, tmp_path, steps=2, schedule="constant", warmup=1)
            assert torch.get_num_threads() == threads
        finally:
            torch.set_num_threads(before)
        assert sorted(lengths) == sorted(2 * {1: [4], 2: [2, 2], 3: [1, 1, 2], 5: [1, 1, 1, 1]}[threads])

        by_hand.load_state_dict(values)
        optimizer, lines = torch.optim.SGD(by_hand.parameters(), lr=0.1), []
        for step in range(2):
            optimizer.zero_grad()
            loss = by_hand(*batch_of(step))
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(by_hand.parameters(), 1.0)
            optimizer.step()
            loss, norm = (pytest.approx(value.item(), rel=1e-6) for value in (loss, norm))
            lines.append({"step": step + 1, "loss": loss, "norm": norm, "lr": 0.1})
        after, _ = newest(tmp_path)
        for name, value in by_hand.state_dict().items():
            torch.testing.assert_close(after[f"net.{name}"], value, rtol=1e-6, atol=1e-7)
        assert log(tmp_path) == lines

    def test_uneven_shares(self, tmp_path):
        """Seven rows on two threads: each row counts the same."""
        rows, net = torch.arange(7.0), Product()
        weight = net.weight.item()
        train(net, lambda _: (rows,), [adamw([net.weight], 0.1)], tmp_path, steps=1)
        assert log(tmp_path)[0]["loss"] == pytest.approx(3 * weight, rel=1e-6)

    @pytest.mark.parametrize(("accumulate", "workers", "lengths"), [
        (1, 1, [4]), (2, 1, [2, 2]), (3, 1, [2, 1, 1]), (9, 1, [1, 1, 1, 1]), (2, 2, [1, 1, 1, 1]), (3, 2, [1, 1, 1, 1])
    ])  # fmt: skip
    def test_accumulation_changes_rounding_only(self, accumulate, workers, lengths, whole, tmp_path):
        net, seen = Tiny(), []
        net.register_forward_pre_hook(lambda _, rows: seen.append(len(rows[0])))
        run(tmp_path, net=net, accumulate=accumulate, workers=workers)
        assert seen == lengths * STEPS
        ours, theirs = newest(tmp_path)[0], newest(whole)[0]
        for name, value in theirs.items():
            torch.testing.assert_close(ours[name], value, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("workers", [1, 2])
    def test_parameters_without_a_part_in_the_loss(self, workers, tmp_path):
        net = Tiny()
        net.forgotten = nn.Linear(2, 2)
        net.forward = lambda x, y: (nn.Sequential(*list(net)[:3])(x) - y).square().mean()
        arguments = (net, batch_of, [adamw(list(net.parameters()), 0.1)], tmp_path)
        with pytest.raises(ValueError, match=r"2 trainable parameters .* forgotten\.weight for one: freeze them"):
            train(*arguments, steps=1, workers=workers)
        net.forgotten.requires_grad_(False)
        before = copy.deepcopy(net.forgotten.state_dict())
        train(*arguments, steps=1, workers=workers)
        assert all(torch.equal(value, before[name]) for name, value in net.forgotten.state_dict().items())
        assert not any("forgotten" in name for name in newest(tmp_path)[0])


class TestOptimizers:
    def test_the_weights_are_divided(self):
        net = nn.Sequential(nn.Embedding(9, 4), nn.LayerNorm(4), nn.Linear(4, 6), nn.Conv2d(2, 3, 3))
        *matrices, rest = muon_and_adamw(net, 0.1)
        assert [tuple(p.shape) for m in matrices for p in m.param_groups[0]["params"]] == [(6, 4), (3, 18)]
        assert [p.shape for p in rest.param_groups[0]["params"]] == [
            net[0].weight.shape, net[1].weight.shape, net[1].bias.shape, net[2].bias.shape, net[3].bias.shape
        ]  # fmt: skip

    @pytest.mark.parametrize("module", [nn.Linear(12, 5), nn.Conv2d(3, 5, 2), nn.Conv2d(2, 30, 3)])
    def test_a_step_of_muon_is_the_nearest_orthogonal_matrix(self, module):
        """Its first step: lr (0.2 sqrt(longer side)) U V' of the gradient U S V', but for Newton-Schulz's looseness."""
        weight = module.weight
        before = weight.detach().clone()
        weight.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(3))
        muon([weight], 0.01).step()
        step = (before * (1 - 0.01 * 0.01) - weight.detach()).flatten(1)
        u, _, v = torch.linalg.svd(weight.grad.flatten(1), full_matrices=False)
        singular = torch.linalg.svdvals(step) / (0.01 * 0.2 * max(step.shape) ** 0.5)
        assert singular.min() > 0.6
        assert singular.max() < 1.25
        assert torch.cosine_similarity(step.flatten(), (u @ v).flatten(), dim=0) > 0.97


class TestSignals:
    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    @pytest.mark.parametrize("stops", [[0], [3, 4, 19, 20], [STEPS - 1]])
    def test_in_a_step(self, stops, number, whole, tmp_path):
        for stop in stops:
            with pytest.raises(
                KeyboardInterrupt,
                match=rf"stopped after step {stop + 1} of 26; the last state is .*step-{stop + 1:07}-",
            ):
                run(tmp_path, lambda step, stop=stop: os.kill(os.getpid(), number) if step == stop else None)
            assert newest(tmp_path)[1] == stop + 1
        run(tmp_path)
        assert_same(tmp_path, whole)

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    def test_while_something_is_drawn(self, number, whole, tmp_path):
        """The drawing ends at once; and none is begun where a signal has come before."""
        drawn = []

        def draw(step, line):
            if step in (3, 5):
                os.kill(os.getpid(), number)
            drawn.append(step)

        with pytest.raises(KeyboardInterrupt, match="stopped after step 3 of 26"):
            run(tmp_path, on_step=draw)
        assert drawn == [1, 2] and newest(tmp_path)[1] == 3
        with pytest.raises(KeyboardInterrupt, match="stopped after step 4 of 26"):
            run(tmp_path, lambda step: os.kill(os.getpid(), number), on_step=draw)
        assert drawn == [1, 2] and newest(tmp_path)[1] == 4
        run(tmp_path)
        assert_same(tmp_path, whole)

    def test_between_the_weights_and_their_average(self, whole, tmp_path):
        steps = iter(range(3 * STEPS))  # of any of the three optimizers: this is the first one's tenth
        hook = register_optimizer_step_post_hook(
            lambda *_: os.kill(os.getpid(), signal.SIGTERM) if next(steps) == 27 else None
        )
        try:
            with pytest.raises(KeyboardInterrupt):
                run(tmp_path)
        finally:
            hook.remove()
        assert newest(tmp_path)[1] == 10
        run(tmp_path)
        assert_same(tmp_path, whole)

    @pytest.mark.parametrize(("nth", "step"), [(1, 8), (4, STEPS)])  # saves are at 7, 14, 21 and at the end, 26
    def test_in_a_save(self, nth, step, whole, tmp_path, monkeypatch):
        saves, clock = [], Clock()

        def save(folder, step, *rest):
            saves.append(step)
            if len(saves) == nth:
                os.kill(os.getpid(), signal.SIGINT)
            return write(folder, step, *rest)

        write = state.write
        monkeypatch.setattr(state, "write", save)
        monkeypatch.setattr(loop.time, "monotonic", clock.monotonic)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, save_minutes=0.1)
        assert saves == ([7, 8] if nth == 1 else [7, 14, 21, 26])
        assert newest(tmp_path)[1] == step
        run(tmp_path)
        assert_same(tmp_path, whole)

    def test_the_handlers_are_put_back(self, tmp_path):
        def mine(*_):
            raise AssertionError("a signal of the training came here")

        before = {number: signal.signal(number, mine) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            for name, what in [("stop", KeyboardInterrupt), ("error", ZeroDivisionError)]:
                with pytest.raises(what):
                    run(
                        tmp_path / name,
                        lambda step, name=name: os.kill(os.getpid(), signal.SIGINT) if name == "stop" else 1 / 0,
                    )
                assert signal.getsignal(signal.SIGTERM) is signal.getsignal(signal.SIGINT) is mine
            run(tmp_path / "whole")
            assert signal.getsignal(signal.SIGTERM) is signal.getsignal(signal.SIGINT) is mine
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class TestErrors:
    def test_an_error_saves_nothing(self, tmp_path, monkeypatch):
        monkeypatch.setattr(loop.time, "monotonic", Clock().monotonic)
        with pytest.raises(ZeroDivisionError):
            run(tmp_path, lambda step: 1 / (10 - step), save_minutes=0.1)
        assert newest(tmp_path)[1] == 7  # the last of the periodic ones
        with pytest.raises(ZeroDivisionError):
            run(tmp_path / "new", lambda step: 1 / (3 - step))
        assert state.newest(tmp_path / "new") is None

    @pytest.mark.parametrize("bad", [lambda x: x / 0, lambda x: x * float("nan"), lambda x: (x - x).sqrt().sum()])
    def test_not_finite(self, bad, tmp_path):
        """The third has a loss of 0 and no finite gradient."""

        class Bad(Tiny):
            def forward(self, x, step):
                loss = super().forward(x, torch.zeros(1))
                return bad(loss) if step[0] == 5 else loss

        net, values = Bad(), []

        def draw(step):
            values[:] = [p.detach().clone() for p in net.parameters()]
            return DATA, torch.full((len(DATA),), step), [f"{row}-{step}.png" for row in range(len(DATA))]

        text = r"step 6: .* (inf|nan).* rows: 0-5\.png, 1-5\.png, .*, 21-5\.png\. .* last state is .*step-0000004-"
        with pytest.raises(FloatingPointError, match=text):
            train(net, draw, muon_and_adamw(net, 0.05), tmp_path, steps=STEPS, save_steps=2)
        assert all(torch.equal(a, b) for a, b in zip(net.parameters(), values, strict=True))
        assert [state.step_of(path) for path in state.paths(tmp_path)] == [2, 4]
        assert [row["step"] for row in log(tmp_path)] == [1, 2, 3, 4, 5]


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    folder = tmp_path_factory.mktemp("half")
    with pytest.raises(KeyboardInterrupt):
        run(folder, stop_at(12), settings={"seed": 3, "data": {"files": ["a", "b"]}})
    return folder


class TestAnotherRun:
    """A state goes on only as what it is."""

    def refused(self, folder, text, **options):
        files = {file: file.read_bytes() for file in folder.iterdir()}
        with pytest.raises(ValueError, match=text):
            run(folder, lambda step: pytest.fail("a step was run"), **options)
        assert files == {file: file.read_bytes() for file in folder.iterdir()}

    @pytest.mark.parametrize(("options", "text"), [
        ({"settings": {"seed": 4, "data": {"files": ["a", "b"]}}}, r"1 differ:\n    settings\.seed: 3 there, 4 here$"),
        ({"settings": {"seed": 3, "data": {"files": ["a"]}}}, r"data\.files: \['a', 'b'\] there, \['a'\] here"),
        ({}, r"settings\.seed: 3 there, None here"),
        ({"warmup": 6}, r"rate\.warmup: 5 there, 6 here"),
        ({"schedule": "cosine"}, r"rate\.schedule: linear there, cosine here"),
        ({"steps": 12}, r"rate\.steps: 26 there, 12 here"),  # the state is of step 13
        ({"steps": 14}, r"rate\.steps: 26 there, 14 here"),  # the last quarter has begun
        ({"ema_decay": None}, r"ema_decay: 0\.999 there, None here"),
        ({"net": nn.Linear(3, 1)}, r"parameters\.0\.weight: \[5, 3\] torch\.float32 there, None here"),
    ])  # fmt: skip
    def test_is_refused(self, options, text, half):
        same = {"settings": {"seed": 3, "data": {"files": ["a", "b"]}}} if options else {}
        self.refused(half, text, **same | options)

    def test_other_optimizers(self, half):
        settings = {"seed": 3, "data": {"files": ["a", "b"]}}
        for optimizer, text in [
            (lambda p: adamw(p, 0.3), r"optimizer\.0\.lr: 0\.2 there, 0\.3 here"),
            (lambda p: torch.optim.SGD(p, 0.2), r"optimizer\.0\.kind: Muon there, SGD here"),
        ]:
            net = Tiny()
            with pytest.raises(ValueError, match=text):
                train(
                    net, batch_of, [optimizer(list(net.parameters()))], half, steps=STEPS, warmup=5, settings=settings
                )

    @pytest.mark.parametrize("steps", [18, 100])
    def test_more_or_fewer_steps_before_the_rates_differ(self, steps, half, tmp_path):
        shutil.copytree(half, tmp_path / "half")
        settings = {"seed": 3, "data": {"files": ["a", "b"]}}
        nets = [run(tmp_path / name, steps=steps, settings=settings) for name in ("half", "new")]
        assert all(torch.equal(a, b) for a, b in zip(*(net.parameters() for net in nets), strict=True))

    def test_a_finished_run_is_not_made_longer(self, whole):
        self.refused(whole, r"rate\.steps: 26 there, 27 here", steps=27)


class TestWithout:
    def test_ema(self, tmp_path):
        net = run(tmp_path, ema_decay=None)
        tensors, _ = newest(tmp_path)
        assert not any(name.startswith("ema.") for name in tensors)
        assert all(torch.equal(p, tensors[f"net.{name}"]) for name, p in net.named_parameters())

    @pytest.mark.parametrize("momentum", [0.0, 0.9])
    def test_tensors_in_the_state_of_the_optimizer(self, momentum, tmp_path):
        """SGD's state has None where it has no momentum."""
        nets = []
        for name in ("whole", "stopped", "stopped"):
            net = Tiny()
            optimizers = [torch.optim.SGD(net.parameters(), 0.1, momentum)]

            def draw(step, stop=9 if len(nets) == 1 else None):  # noqa: B008
                stop_at(stop)(step)
                return batch_of(step)

            with pytest.raises(KeyboardInterrupt) if len(nets) == 1 else nullcontext():
                train(net, draw, optimizers, tmp_path / name, steps=STEPS)
            nets.append(net)
        assert all(torch.equal(a, b) for a, b in zip(nets[0].parameters(), nets[2].parameters(), strict=True))


class TestSeen:
    def test_each_step_and_the_bar(self, tmp_path, capfd):
        lines = []
        run(tmp_path, on_step=lambda step, line: lines.append((step, dict(line))))
        rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
        assert lines == [(row["step"], row) for row in rows]
        assert [*rows[0]] == ["step", "loss", "norm", "lr", "seconds"]
        assert re.search(r"26/26 \[\d+:\d+<\d+:\d+, .*loss=\d\.\d+, lr=\d\.\de-\d+\]", capfd.readouterr().err)

    def test_an_error_of_the_one_who_looks(self, whole, tmp_path, capfd):
        def look(step, _):
            if step == 3:
                raise OSError("no room for the grid")
            if step == 9:
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            run(tmp_path, on_step=look, save_steps=4)
        assert newest(tmp_path)[1] == 8
        assert "step 3: no room for the grid. The training goes on" in capfd.readouterr().err
        run(tmp_path)
        assert_same(tmp_path, whole)


MOMENTS = ("loss", "optimizer", "writing", "before the rename", "after the rename", "before the older ones go")


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def run_and_die(folder, moment):
    """Saves at 7 and 14, and dies in step 10, or in or after the second save."""
    loop.time.monotonic = Clock().monotonic
    calls = []

    def die_at(nth):
        calls.append(None)
        if len(calls) == nth:
            die()

    def before(step):
        if (moment, step) == ("loss", 10):
            die()

    if moment == "optimizer":
        steps = iter(range(3 * STEPS))  # of any of the three optimizers: this is the first one's eleventh
        register_optimizer_step_post_hook(lambda *_: die() if next(steps) == 30 else None)
    if moment == "writing":
        whole_save = save.save_file

        def half(tensors, path, metadata):
            whole_save(tensors, path, metadata)
            with path.open("r+b") as f:
                f.truncate(1000)
            die_at(2)
            whole_save(tensors, path, metadata)

        save.save_file = half
    if moment in ("before the rename", "after the rename"):  # of a file, of its folder, of a file, of the folder
        fsync = os.fsync
        state.os.fsync = lambda f: (die_at(3 if moment == "before the rename" else 4), fsync(f))
    if moment == "before the older ones go":
        state.Path.unlink = lambda *_, **__: die()
    run(folder, before, save_minutes=0.1, keep=1 if moment == "before the older ones go" else 3)


def in_a_child(what, delay=None, err=None):
    """Its exit code. After `delay` seconds it is killed; `err` gets what it writes on stderr."""
    if (child := os.fork()) == 0:
        if err is not None:
            os.dup2(os.open(err, os.O_WRONLY | os.O_CREAT), 2)
        try:
            what()
            os._exit(0)
        except Exception:
            os._exit(1)
    if delay is not None:
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill_at_random(folder, kills):
    """How many times a run was killed. Every step is saved, so that most moments are in a save; each run is killed
    until it comes to its end."""
    start = time.monotonic()
    in_a_child(lambda: run(folder / "0", save_steps=1))
    duration = time.monotonic() - start
    chance, done, number = random.Random(0), 0, 0
    while done < kills:
        number += 1
        again = partial(run, folder / str(number), save_steps=1)
        while in_a_child(again, chance.uniform(0, duration)) != 0:
            done += 1
    return done


def run_on_a_full_disk(folder, dies):
    """From the sixth step to the fifteenth no file can grow beyond a few lines of the log; a state is longer."""

    def limit(step):
        if step in (5, 15):
            size = 700 if step == 5 else resource.RLIM_INFINITY
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
        if dies and step == 14:
            raise ZeroDivisionError

    run(folder, limit, save_steps=2)


def script(folder, *kills):
    """All that needs processes of its own, in one that has not used threads yet; and what it prints."""
    environment = os.environ | {"PYTHONPATH": str(Path(loop.__file__).parents[2])}
    command = [sys.executable, __file__, folder, *kills]
    return subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout.split()


@pytest.fixture(scope="module")
def children(tmp_path_factory):
    folder = tmp_path_factory.mktemp("children")
    *codes, kills, goes_on, dies = map(int, script(folder))
    assert codes == [-signal.SIGKILL] * len(MOMENTS)
    assert kills >= 6
    assert (goes_on, dies) == (0, 1)
    return folder


class TestKill:
    @pytest.mark.parametrize("moment", MOMENTS)
    def test_resumes(self, moment, children, whole):
        folder = children / moment
        renamed = moment in ("after the rename", "before the older ones go")
        assert [state.step_of(path) for path in state.paths(folder)] == ([7, 14] if renamed else [7])
        assert any(folder.glob("*.part*")) == (moment in ("writing", "before the rename"))
        logged = {"loss": 10, "optimizer": 10}.get(moment, 14)
        assert [row["step"] for row in log(folder)] == list(range(1, logged + 1))
        with (folder / "log.jsonl").open("a") as f:
            f.write('{"step": 1')  # half a line
        run(folder)
        assert_same(folder, whole)
        assert not any(folder.glob("*.part*"))

    def test_before_the_first_state(self, whole, tmp_path):
        (tmp_path / "log.jsonl").write_text('{"step": 1, "loss": 5.0, "lr": 1.0, "seconds": 0}\n')
        (tmp_path / "step-0000007.part").write_bytes(b"half")
        run(tmp_path)
        assert_same(tmp_path, whole)

    def at_random(self, folder, whole):
        folders = [*folder.iterdir()]
        assert len(folders) > 1
        for folder in folders:
            assert_same(folder, whole)
            assert not any(folder.glob("*.part*"))

    def test_at_random_moments(self, children, whole):
        self.at_random(children / "random", whole)

    @pytest.mark.full
    def test_at_fifty_random_moments(self, whole, tmp_path):
        assert int(*script(tmp_path, "50")) >= 50
        self.at_random(tmp_path, whole)


class TestFullDisk:
    @pytest.mark.parametrize("what", ["goes on", "dies"])
    def test_no_file_can_grow(self, what, children, whole):
        folder = children / what
        said = re.findall(
            r"step (\d+): no state was saved \((.*)\), the last is .*-(\d+)-.*\. The training goes on",
            (children / f"{what}.txt").read_text(),
        )
        step, why, last = said[0]  # the file of these lines soon has no room for more
        assert (step, last) == ("6", "0000004")
        assert "File too large" in why
        assert not any(folder.glob("*.part*"))
        if what == "dies":
            assert [state.step_of(path) for path in state.paths(folder)] == [2, 4]
            text = (folder / "log.jsonl").read_text()
            assert len(text) == 700
            assert not text.endswith("\n")
            run(folder, save_steps=2)
        assert [state.step_of(path) for path in state.paths(folder)] == [22, 24, 26]
        assert_same(folder, whole)


class TestFolder:
    def test_whole_folder(self, tmp_path):
        folder = tmp_path / "deep" / "folder"
        for name in ("first", "second"):
            with whole_folder(folder) as new:
                (new / name).write_text(name)
            assert [f.name for f in folder.iterdir()] == [name]
        with pytest.raises(KeyboardInterrupt), whole_folder(folder) as new:
            (new / "third").write_text("third")
            raise KeyboardInterrupt
        assert [f.name for f in folder.iterdir()] == ["second"]
        assert list(folder.parent.iterdir()) == [folder]

    def test_whole_folder_leaves_other_folders(self, tmp_path):
        for name in ("folder", "folder.part", "folder.old", "folder.new"):
            (tmp_path / name).mkdir()
            (tmp_path / name / "mine").write_text("mine")
        with whole_folder(tmp_path / "folder") as new:
            (new / "first").write_text("first")
        with pytest.raises(OSError), whole_folder(tmp_path / "folder"):
            raise OSError
        files = sorted(file.relative_to(tmp_path).as_posix() for file in tmp_path.rglob("*") if file.is_file())
        assert files == ["folder.new/mine", "folder.old/mine", "folder.part/mine", "folder/first"]

    def test_whole_folder_is_readable_as_any_new_one(self, tmp_path):
        (tmp_path / "other").mkdir()
        with whole_folder(tmp_path / "folder"):
            pass
        assert (tmp_path / "folder").stat().st_mode == (tmp_path / "other").stat().st_mode

    @pytest.mark.parametrize("renames", [1, 2])
    def test_whole_folder_after_a_crash(self, renames, tmp_path, monkeypatch):
        """Between the renames: the earlier folder is put back, or, where that fails too, still has its files."""
        folder, rename, done = tmp_path / "folder", Path.rename, []
        with whole_folder(folder) as new:
            (new / "first").write_text("first")

        def fail(path, target):
            done.append(path)
            if 1 < len(done) <= 1 + renames:
                raise OSError("no more")
            return rename(path, target)

        monkeypatch.setattr(Path, "rename", fail)
        with pytest.raises(OSError, match="no more"), whole_folder(folder) as new:
            (new / "second").write_text("second")
        assert [file.read_text() for file in tmp_path.rglob("first")] == ["first"]
        assert (folder / "first").exists() == (renames == 1)
        if renames == 1:
            assert list(tmp_path.iterdir()) == [folder]


class TestSchedule:
    def test_learning_rate(self):
        rate = [learning_rate(step, 1000, 100) for step in range(1001)]
        assert rate[0] == 0.01
        assert rate[49] == pytest.approx(0.5)
        assert set(rate[99:751]) == {1.0}
        assert rate[875] == pytest.approx(0.5)
        assert rate[999] == pytest.approx(1 / 250)
        assert rate[1000] == 0
        assert rate[:751] == [learning_rate(step, 5000, 100) for step in range(751)]

    def test_constant(self):
        rate = [learning_rate(step, 100, 10, "constant") for step in range(101)]
        assert rate == pytest.approx([min(1, (step + 1) / 10) for step in range(101)])

    def test_cosine(self):
        """A half wave over the steps after the warm-up."""
        rate = [learning_rate(step, 110, 10, "cosine") for step in range(111)]
        assert rate[:11] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1, 1])
        assert [rate[step] for step in (35, 60, 85, 110)] == pytest.approx([0.5 + 0.125**0.5, 0.5, 0.5 - 0.125**0.5, 0])

    @pytest.mark.parametrize("schedule", loop.SCHEDULES)
    def test_without_warm_up(self, schedule):
        assert learning_rate(0, 100, 0, schedule) == 1

    def test_no_such_schedule(self):
        with pytest.raises(ValueError, match="schedule 'poly': there are constant, linear, cosine"):
            learning_rate(0, 100, 0, "poly")

    @pytest.mark.parametrize("schedule", loop.SCHEDULES)
    def test_train_follows_it(self, schedule, tmp_path):
        run(tmp_path, schedule=schedule)
        assert [row["lr"] for row in log(tmp_path)] == [
            0.2 * learning_rate(k, STEPS, 5, schedule) for k in range(STEPS)
        ]

    @pytest.mark.parametrize(("count", "batch"), [(24, 4), (22, 4), (9, 9)])
    def test_an_epoch_visits_the_rows_once(self, count, batch):
        per_epoch = count // batch
        epochs = [
            torch.cat([batch_indices(count, batch, 3, per_epoch * epoch + i) for i in range(per_epoch)]).tolist()
            for epoch in range(3)
        ]
        for epoch in epochs:
            assert len(set(epoch)) == len(epoch) == per_epoch * batch
            assert set(epoch) <= set(range(count))
        assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
        other_seed = torch.cat([batch_indices(count, batch, 4, i) for i in range(per_epoch)]).tolist()
        assert other_seed != epochs[0]

    def test_too_large_a_batch(self):
        with pytest.raises(ValueError, match="a batch of 4 out of 3 pictures"):
            batch_indices(3, 4, 0, 0)


def test_steps_have_versions():
    """By which packed copies of a weight are known to be old; fused optimizers leave them."""
    net = nn.Linear(3, 1)
    gradients = Gradients(net, dict(net.named_parameters()), accumulate=1, workers=1)
    before = [p._version for p in net.parameters()]
    net(torch.ones(1, 3)).sum().backward()
    gradients.step([torch.optim.AdamW(net.parameters(), fused=True)])
    gradients.close()
    assert all(p._version > old for p, old in zip(net.parameters(), before, strict=True))


if __name__ == "__main__":
    torch.set_num_threads(2)
    folder = Path(sys.argv[1])
    if sys.argv[2:]:
        print(kill_at_random(folder, int(sys.argv[2])))
    else:
        for moment in MOMENTS:
            print(in_a_child(partial(run_and_die, folder / moment, moment)))
        print(kill_at_random(folder / "random", 6))
        for name in ("goes on", "dies"):
            print(in_a_child(partial(run_on_a_full_disk, folder / name, name == "dies"), err=folder / f"{name}.txt"))
