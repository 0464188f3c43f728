"""An interrupted training is the uninterrupted one, bit for bit. As a script, this file trains and kills itself."""

import copy
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from ldm.save import whole_folder
from ldm.train import loop
from ldm.train.loop import (
    adamw,
    batch_indices,
    learning_rate,
    muon,
    muon_and_adamw,
    save_state,
    step_generator,
    train,
)

STEPS, BATCH = 26, 4
DATA = torch.randn(22, 3, generator=torch.Generator().manual_seed(1))


def tiny():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1))


def batch_of(step):
    x = DATA[batch_indices(len(DATA), BATCH, 0, step)]
    noise = torch.randn(x.shape, generator=step_generator(0, step))
    return x + 0.1 * noise, x.sum(1, keepdim=True)


def run(folder, before=lambda step: None, net=None, save_minutes=3.0):
    """Train, and call `before` in each step."""
    net = net or tiny()

    def draw(step):
        before(step)
        return batch_of(step)

    def loss_of(x, y):
        return (net(x) - y).square().mean()

    optimizers = muon_and_adamw(net, 0.2)
    return train(net, draw, loss_of, optimizers, folder, steps=STEPS, warmup=5, save_minutes=save_minutes)


@pytest.fixture(autouse=True, scope="module")
def two_threads():
    """Each takes half of a batch, whatever the machine has."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def state(folder):
    return torch.load(folder / "state.pt", weights_only=True)


def log(folder):
    """All but the wall time."""
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


def assert_same(folder, whole):
    ours, theirs = state(folder), state(whole)
    assert ours["step"] == theirs["step"] == STEPS
    for part in ("net", "ema"):
        assert ours[part].keys() == theirs[part].keys()
        assert all(torch.equal(v, theirs[part][k]) for k, v in ours[part].items())
    for mine, other in zip(ours["optimizers"], theirs["optimizers"], strict=True):
        assert mine["state"].keys() == other["state"].keys() != set()
        for i, moments in other["state"].items():
            assert all(torch.equal(v, mine["state"][i][k]) for k, v in moments.items())
    assert log(folder) == log(whole)


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
    net, before = run(tmp_path), tiny().state_dict()
    assert_same(tmp_path, whole)
    end = state(whole)
    assert end.keys() == {"net", "optimizers", "ema", "step", "seconds"}
    assert [row["step"] for row in log(whole)] == list(range(1, STEPS + 1))
    losses = [row["loss"] for row in log(whole)]
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    for name, value in net.state_dict().items():
        assert torch.equal(value, end["ema"][name])
        assert not torch.equal(value, end["net"][name])
        assert not torch.equal(value, before[name])


def test_ema_and_learning_rate_are_those_of_each_step(tmp_path):
    """By hand, with torch.optim alone."""
    net, seen = tiny(), []
    run(tmp_path, lambda step: seen.append({k: v.clone() for k, v in net.state_dict().items()}), net)
    ema, end = seen[0], state(tmp_path)
    for step, values in enumerate([*seen[1:], end["net"]]):
        decay = min(0.999, (1 + step) / (10 + step))
        ema = {k: decay * ema[k] + (1 - decay) * values[k] for k in ema}
    for name, value in ema.items():
        torch.testing.assert_close(end["ema"][name], value, rtol=1e-6, atol=1e-6)
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
        net, by_hand = tiny(), tiny()
        values = copy.deepcopy(net.state_dict())

        def loss_of(x, y):
            assert torch.get_num_threads() == 1
            lengths.append(len(x))
            return (net(x) - y).square().mean()

        lengths = []
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            optimizers = [torch.optim.SGD(net.parameters(), lr=0.1)]
            train(net, batch_of, loss_of, optimizers, tmp_path, steps=1, warmup=1)
            assert torch.get_num_threads() == threads
        finally:
            torch.set_num_threads(before)
        assert sorted(lengths) == {1: [4], 2: [2, 2], 3: [2, 2], 5: [1, 1, 1, 1]}[threads]

        by_hand.load_state_dict(values)
        x, y = batch_of(0)
        loss = (by_hand(x) - y).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(by_hand.parameters(), 1.0)
        torch.optim.SGD(by_hand.parameters(), lr=0.1).step()
        after = state(tmp_path)["net"]
        for name, value in by_hand.state_dict().items():
            torch.testing.assert_close(after[name], value, rtol=1e-6, atol=1e-7)
        assert log(tmp_path) == [{"step": 1, "loss": pytest.approx(loss.item(), rel=1e-6), "lr": 0.1}]

    def test_uneven_shares(self, tmp_path):
        """Seven rows on two threads: each row counts the same."""
        rows, net = torch.arange(7.0), nn.Linear(1, 1, bias=False)
        weight = net.weight.item()
        train(net, lambda _: (rows,), lambda x: (net.weight * x).mean(), [adamw([net.weight], 0.1)], tmp_path, steps=1)
        assert log(tmp_path)[0]["loss"] == pytest.approx(3 * weight, rel=1e-6)


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
            with pytest.raises(KeyboardInterrupt, match=r"state\.pt"):
                run(tmp_path, lambda step, stop=stop: os.kill(os.getpid(), number) if step == stop else None)
            assert state(tmp_path)["step"] == stop + 1
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
        assert state(tmp_path)["step"] == 10
        run(tmp_path)
        assert_same(tmp_path, whole)

    @pytest.mark.parametrize(("nth", "step"), [(1, 8), (4, STEPS)])  # saves are at 7, 14, 21 and at the end, 26
    def test_in_a_save(self, nth, step, whole, tmp_path, monkeypatch):
        saves, clock = [], Clock()

        def save(path, content):
            saves.append(content["step"])
            if len(saves) == nth:
                os.kill(os.getpid(), signal.SIGINT)
            save_state(path, content)

        monkeypatch.setattr(loop, "save_state", save)
        monkeypatch.setattr(loop.time, "monotonic", clock.monotonic)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, save_minutes=0.1)
        assert saves == ([7, 8] if nth == 1 else [7, 14, 21, 26])
        assert state(tmp_path)["step"] == step
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
        assert state(tmp_path)["step"] == 7  # the last of the periodic ones
        with pytest.raises(ZeroDivisionError):
            run(tmp_path / "new", lambda step: 1 / (3 - step))
        assert not (tmp_path / "new" / "state.pt").exists()

    @pytest.mark.parametrize("bad", [lambda x: x / 0, lambda x: x * float("nan"), lambda x: (x - x).sqrt().sum()])
    def test_not_finite(self, bad, tmp_path):
        """The third has a loss of 0 and no finite gradient."""
        net = tiny()
        values = []

        def draw(step):
            values[:] = [p.detach().clone() for p in net.parameters()]
            return DATA, torch.full((len(DATA),), step)

        def loss_of(x, step):
            loss = net(x).square().mean()
            return bad(loss) if step[0] == 5 else loss

        with pytest.raises(FloatingPointError, match=r"step 5: .* (inf|nan)"):
            train(net, draw, loss_of, muon_and_adamw(net, 0.05), tmp_path, steps=STEPS)
        assert all(torch.equal(a, b) for a, b in zip(net.parameters(), values, strict=True))
        assert not (tmp_path / "state.pt").exists()
        assert [row["step"] for row in log(tmp_path)] == [1, 2, 3, 4, 5]


MOMENTS = ("loss", "optimizer", "writing", "before the rename", "after the rename")


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def run_and_die(folder, moment):
    """Saves at 7 and 14, and dies in step 10, or in or after the second save."""
    loop.time.monotonic = Clock().monotonic
    saves = []

    def at_second_save(then):
        saves.append(None)
        if len(saves) == 2:
            then()
            die()

    def before(step):
        if (moment, step) == ("loss", 10):
            die()

    if moment == "optimizer":
        steps = iter(range(3 * STEPS))  # of any of the three optimizers: this is the first one's eleventh
        register_optimizer_step_post_hook(lambda *_: die() if next(steps) == 30 else None)
    if moment == "writing":
        whole_save = torch.save

        def save(content, f):
            at_second_save(lambda: (f.write(b"half"), f.flush()))
            whole_save(content, f)

        loop.torch.save = save
    if moment == "before the rename":
        fsync = loop.os.fsync
        loop.os.fsync = lambda f: (at_second_save(lambda: None), fsync(f))
    if moment == "after the rename":
        loop.save_state = lambda path, content: (save_state(path, content), at_second_save(lambda: None))
    run(folder, before, save_minutes=0.1)


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("killed")
    environment = os.environ | {"PYTHONPATH": str(Path(loop.__file__).parents[2])}
    out = subprocess.run(
        [sys.executable, __file__, folder], env=environment, check=True, capture_output=True, text=True
    ).stdout
    assert out.split() == [str(-signal.SIGKILL)] * len(MOMENTS)
    return folder


class TestKill:
    @pytest.mark.parametrize("moment", MOMENTS)
    def test_resumes(self, moment, killed, whole):
        folder = killed / moment
        assert state(folder)["step"] == (14 if moment == "after the rename" else 7)
        assert (folder / "state.part").exists() == (moment in ("writing", "before the rename"))
        logged = {"loss": 10, "optimizer": 10}.get(moment, 14)
        assert [row["step"] for row in log(folder)] == list(range(1, logged + 1))
        with (folder / "log.jsonl").open("a") as f:
            f.write('{"step": 1')  # half a line
        run(folder)
        assert_same(folder, whole)

    def test_before_the_first_state(self, whole, tmp_path):
        (tmp_path / "log.jsonl").write_text('{"step": 1, "loss": 5.0, "lr": 1.0, "seconds": 0}\n')
        (tmp_path / "state.part").write_bytes(b"half")
        run(tmp_path)
        assert_same(tmp_path, whole)


class TestSaving:
    def test_a_failure_leaves_the_old_state(self, tmp_path, monkeypatch):
        file = tmp_path / "state.pt"
        save_state(file, {"step": 1})
        old = file.read_bytes()

        def fail(content, f):
            f.write(b"half")
            raise OSError("disk full")

        monkeypatch.setattr(torch, "save", fail)
        with pytest.raises(OSError, match="disk full"):
            save_state(file, {"step": 2})
        assert file.read_bytes() == old

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


if __name__ == "__main__":
    torch.set_num_threads(2)
    for moment in MOMENTS:
        if (child := os.fork()) == 0:
            run_and_die(Path(sys.argv[1]) / moment, moment)
            os._exit(0)  # only if it did not die
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
