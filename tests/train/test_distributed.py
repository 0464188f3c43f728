"""Processes that torchrun starts learn what one process does. As a script, this file is what torchrun starts."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from ldm.train import loop, processes, state
from ldm.train.loop import adamw, batch_indices, muon_and_adamw, step_generator, train

STEPS, BATCH = 16, 5
LONG = 100
DATA = torch.randn(22, 3, generator=torch.Generator().manual_seed(1))


class Tiny(nn.Sequential):
    """A net and its objective."""

    def __init__(self):
        super().__init__(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1))

    def forward(self, x, y):
        return (super().forward(x) - y).square().mean()


def run(folder, before=lambda step: None, *, sharded=False, muon=False, batch=BATCH, **options):
    torch.manual_seed(processes.rank())  # the first one's weights are everybody's
    net = Tiny()
    if sharded:
        torch.manual_seed(0)
        net = Tiny()
        processes.shard(net)

    def batch_of(step):
        before(step)
        x = DATA[batch_indices(len(DATA), batch, 0, step)]
        return x + 0.1 * torch.randn(x.shape, generator=step_generator(0, step)), x.sum(1, keepdim=True)

    optimizers = muon_and_adamw(net, 0.05) if muon else [adamw([*net.parameters()], 0.05)]
    return train(net, batch_of, optimizers, folder, **{"steps": STEPS, "warmup": 5, "save_steps": 4} | options)


def stop_in(step, rank, now):
    if (step, rank) == (now, processes.rank()):
        os.kill(os.getpid(), signal.SIGTERM)


def half(folder, **options):
    """The last process is told to stop in the seventh step."""
    try:
        run(folder, partial(stop_in, 6, processes.count() - 1), **options)
    except KeyboardInterrupt:
        return
    raise AssertionError("it did not stop")


def kill_once(folder, step):
    """The second process dies in the eleventh step, unless it has."""
    if (step, processes.rank()) == (10, 1) and not (mark := folder.with_suffix(".killed")).exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)


def stop_all(step):
    """The first process tells torchrun to end, in the eighth step; then there is time to."""
    if (step, processes.rank()) == (7, 0):
        os.kill(os.getppid(), signal.SIGTERM)
    if step > 7:
        time.sleep(0.1)


def torchrun(folder, verb, code):
    """Two processes run `verb` of this file. Returns what they say."""
    environment = os.environ | {"PYTHONPATH": str(Path(loop.__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["--max-restarts", "3", __file__, folder, verb]
    done = subprocess.run(command, env=environment, check=False, capture_output=True, text=True, timeout=300)
    assert done.returncode == code, done.stderr
    return done.stderr


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """What one process learns."""
    folder = tmp_path_factory.mktemp("one")
    run(folder / "adamw")
    run(folder / "muon", muon=True)
    run(folder / "long", steps=LONG)
    half(folder / "half")
    return folder


@pytest.fixture(scope="module")
def two(one, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    for name in ("from one", "sharded from one"):
        shutil.copytree(one / "half", folder / name)
    torchrun(folder, "all", 0)
    return folder


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ended")
    return folder, torchrun(folder, "killed", 1)


def tensors(folder):
    return state.read(state.newest(folder))[0]


def log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def assert_same(folder, other, steps=STEPS, parts=("net", "ema", "optimizer")):
    """To 1e-6 of each tensor's largest value; none of them is where it began."""
    ours, theirs = tensors(folder), tensors(other)
    torch.manual_seed(0)
    begin = {f"net.{name}": p.detach() for name, p in Tiny().named_parameters()}
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        if name.split(".")[0] not in parts:
            continue
        torch.testing.assert_close(ours[name], value, rtol=0, atol=1e-6 * value.abs().max().item())
        assert name not in begin or (value - begin[name]).abs().max() > 1e-2
    assert [row["step"] for row in log(folder)] == list(range(1, steps + 1))
    for mine, row in zip(log(folder), log(other), strict=True):
        assert mine == pytest.approx(row | {"seconds": mine["seconds"]}, rel=1e-5)


@pytest.mark.parametrize(("name", "like"), [
    ("plain", "adamw"), ("accumulate", "adamw"), ("muon", "muon"), ("sharded", "adamw"), ("from one", "adamw"),
    ("sharded from one", "adamw")
])  # fmt: skip
def test_two_processes_learn_what_one_does(name, like, one, two):
    """Five rows, three for one of them and two for the other."""
    assert_same(two / name, one / like)


@pytest.mark.parametrize("name", ["half", "sharded half"])
def test_one_process_goes_on_from_two(name, one, two):
    """The signal came to the second alone."""
    assert [state.step_of(path) for path in state.paths(two / name)] == [4, 7]
    run(two / name)
    assert_same(two / name, one / "adamw")


def test_the_processes_return_the_same_weights(two):
    for name in ("plain", "sharded"):
        first, second = (torch.load(two / f"{name}.{rank}.pt") for rank in (0, 1))
        average = state.part(tensors(two / name), "ema")
        assert first.keys() == second.keys() == average.keys()
        assert all(torch.equal(value, second[key]) and torch.equal(value, average[key]) for key, value in first.items())


def test_a_sharded_net_is_divided(two):
    assert [json.loads((two / f"sizes.{rank}.json").read_text()) for rank in (0, 1)] == [
        [9, 3, 5, 1],
        [6, 2, 0, 0],
    ]


def test_a_row_for_each(two):
    assert "a batch of 1 for 2 processes" in (two / "refused.txt").read_text()


def test_a_killed_process_is_started_again(two, ended):
    """By torchrun; the run goes on from the last state, which is of step 8, and is the run that was not killed."""
    folder, _ = ended
    assert (folder / "restarted.killed").exists()
    ours, theirs = tensors(folder / "restarted"), tensors(two / "plain")
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    assert [row["step"] for row in log(folder / "restarted")] == list(range(1, STEPS + 1))
    assert (folder / "starts.txt").read_text() == "0 from 0\n1 from 8\n"


def test_torchrun_is_told_to_end(one, ended):
    folder, err = ended
    (path,) = state.paths(folder / "stopped")
    step = state.step_of(path)
    assert 8 <= step < LONG
    assert len(re.findall(rf"stopped after step {step} of {LONG}; the last state is {path}", err)) == 1
    run(folder / "stopped", steps=LONG)
    assert_same(folder / "stopped", one / "long", LONG, parts=("net", "ema"))


def all_verbs(folder):
    for name, options in [
        ("plain", {}),
        ("accumulate", {"accumulate": 2}),
        ("muon", {"muon": True}),
        ("sharded", {"sharded": True}),
        ("from one", {}),
        ("sharded from one", {"sharded": True}),
    ]:
        net = run(folder / name, **options)
        weights = {key: processes.whole(p.detach()) for key, p in net.named_parameters()}
        if name == "sharded":
            sizes = [p.to_local().numel() for p in net.parameters()]
            (folder / f"sizes.{processes.rank()}.json").write_text(json.dumps(sizes))
        torch.save(weights, folder / f"{name}.{processes.rank()}.pt")
    half(folder / "half")
    half(folder / "sharded half", sharded=True)
    try:
        run(folder / "refused", batch=1)
    except ValueError as error:
        (folder / "refused.txt").write_text(str(error))


def killed(folder):
    def before(step):
        if first_call and processes.rank() == 0:
            with (folder / "starts.txt").open("a") as f:
                f.write(f"{os.environ['TORCHELASTIC_RESTART_COUNT']} from {step}\n")
        first_call.clear()
        kill_once(folder / "restarted", step)

    first_call = [True]
    run(folder / "restarted", before)
    try:
        run(folder / "stopped", stop_all, steps=LONG, save_steps=None)
    except KeyboardInterrupt as stop:
        if processes.rank() == 0:
            print(stop, file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    processes.join()
    {"all": all_verbs, "killed": killed}[sys.argv[2]](Path(sys.argv[1]))
