"""A state is read only if it is, bit for bit, what was written."""

import errno
import os

import pytest
import torch
from safetensors.torch import load_file

from ldm import save
from ldm.source import CheckpointError
from ldm.train import state

TENSORS = {
    "net.a": torch.arange(6.0).reshape(2, 3),
    "net.b.weight": torch.randn(4, generator=torch.Generator().manual_seed(0)).bfloat16(),
    "netting": torch.tensor(7, dtype=torch.int64),
}
FACTS = {"step": 3, "seconds": 1.5, "config": {"a": [1, None, "ä"], "b": {}}}


def write(folder, *steps, keep=3):
    return [state.write(folder, step, TENSORS, FACTS, keep) for step in steps][-1]


def steps(folder):
    return [state.step_of(path) for path in state.paths(folder)]


def said(capsys):
    return capsys.readouterr().err.splitlines()


@pytest.fixture(scope="module")
def content(tmp_path_factory):
    return write(tmp_path_factory.mktemp("content"), 3).read_bytes()


def test_what_was_written_is_read(tmp_path):
    path = write(tmp_path / "deep" / "folder", 3)
    tensors, facts = state.read(path)
    assert facts == FACTS
    assert tensors.keys() == TENSORS.keys() == load_file(path).keys()  # any reader of safetensors reads it
    for name, tensor in TENSORS.items():
        assert tensors[name].dtype == tensor.dtype
        assert torch.equal(tensors[name], tensor)
    assert state.part(tensors, "net").keys() == {"a", "b.weight"}
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    assert path.name.startswith("step-0000003-")
    assert state.newest(path.parent) == path


def test_the_last_ones_are_kept(tmp_path):
    for keep, kept in [(1, [5]), (2, [4, 5]), (3, [3, 4, 5]), (9, [1, 2, 3, 4, 5])]:
        write(tmp_path / str(keep), 1, 2, 3, 4, 5, keep=keep)
        assert steps(tmp_path / str(keep)) == kept
    write(tmp_path, 9, 99_999_999, 100_000_000, keep=2)  # longer numbers than the names have room for
    assert steps(tmp_path) == [99_999_999, 100_000_000]


def test_the_new_one_stands_before_an_old_one_goes(tmp_path, monkeypatch):
    first = write(tmp_path, 1, keep=1)

    def unlink(path):
        assert path == first
        assert steps(tmp_path) == [1, 2]
        assert state.is_whole(state.paths(tmp_path)[1])

    monkeypatch.setattr(state.Path, "unlink", unlink)
    write(tmp_path, 2, keep=1)


class TestBroken:
    def test_every_bit_and_every_cut_is_noticed(self, content, tmp_path):
        path = write(tmp_path, 3)
        for i in range(len(content)):
            path.write_bytes(content[:i] + bytes([content[i] ^ 1 << i % 8]) + content[i + 1 :])
            assert not state.is_whole(path)
            path.write_bytes(content[:i])
            assert not state.is_whole(path)
        path.write_bytes(content + b"\0")
        assert not state.is_whole(path)
        path.write_bytes(content)
        assert state.is_whole(path)

    def test_the_one_before_is_taken(self, content, tmp_path, capsys):
        write(tmp_path, 1, 2, 3)
        first, second, third = state.paths(tmp_path)
        assert state.newest(tmp_path) == third
        assert said(capsys) == []
        broken = "is broken: its content is not that of its checksum"
        third.write_bytes(b"")
        assert state.newest(tmp_path) == second
        assert said(capsys) == [f"{third} {broken}", f"The state before it is taken: {second}"]
        second.write_bytes(content[:-1])
        assert state.newest(tmp_path) == first
        assert said(capsys) == [f"{third} {broken}", f"{second} {broken}", f"The state before it is taken: {first}"]
        first.write_bytes(content[1:])
        with pytest.raises(CheckpointError, match=r"each of the 3 states in .* is broken"):
            state.newest(tmp_path)
        assert said(capsys) == [f"{path} {broken}" for path in (third, second, first)]

    def test_what_the_disk_cannot_read(self, tmp_path, monkeypatch):
        write(tmp_path, 1, 2)
        first, second = state.paths(tmp_path)
        digest = state.digest

        def fail(path):
            if path == second:
                raise OSError(errno.EIO, "Input/output error")
            return digest(path)

        monkeypatch.setattr(state, "digest", fail)
        assert state.newest(tmp_path) == first

    def test_a_run_that_falls_back_takes_the_broken_ones_away(self, tmp_path):
        """They count for none of those that are kept."""
        write(tmp_path, 1, 2, 3, 4, keep=4)
        for path in state.paths(tmp_path)[1:]:
            path.write_bytes(b"broken")
        path = write(tmp_path, 2, keep=2)
        assert steps(tmp_path) == [1, 2]
        assert state.newest(tmp_path) == path

    def test_none_at_all(self, tmp_path):
        (tmp_path / "step-0000001.part").write_bytes(b"half")
        assert state.newest(tmp_path) is None
        assert state.newest(tmp_path / "nowhere") is None


class TestFailures:
    @pytest.fixture(params=["in the file", "in the rename", "in the disk", "interrupted"])
    def fail(self, request, monkeypatch):
        error = (
            KeyboardInterrupt() if request.param == "interrupted" else OSError(errno.ENOSPC, "No space left on device")
        )

        def fail(*_):
            raise error

        if request.param == "in the rename":
            monkeypatch.setattr(state.Path, "rename", fail)
        elif request.param == "in the disk":
            monkeypatch.setattr(os, "fsync", fail)
        else:
            monkeypatch.setattr(save, "save_file", fail)
        return type(error)

    @pytest.fixture
    def before(self, tmp_path):
        write(tmp_path, 1, 2)
        return {file: file.read_bytes() for file in tmp_path.iterdir()}

    def test_nothing_is_changed(self, before, fail, tmp_path):
        with pytest.raises(fail):
            write(tmp_path, 3, keep=1)
        assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before

    def test_a_full_device(self, tmp_path, monkeypatch):
        """The kernel's own error: each new file is /dev/full."""
        save_file = save.save_file

        def write_to_full(tensors, path, metadata):
            save_file(tensors, path, metadata)
            with open("/dev/full", "wb", buffering=0) as f:  # noqa: PTH123
                f.write(path.read_bytes())

        write(tmp_path, 1)
        monkeypatch.setattr(save, "save_file", write_to_full)
        with pytest.raises(OSError) as error:
            write(tmp_path, 2)
        assert error.value.errno == errno.ENOSPC
        assert steps(tmp_path) == [1]
        assert len([*tmp_path.iterdir()]) == 1

    def test_what_a_killed_run_left(self, tmp_path):
        path = write(tmp_path, 2)
        (tmp_path / "step-0000003.part").write_bytes(b"half")
        (tmp_path / "step-0000003.part.x1y2").mkdir()
        (tmp_path / "step-0000003.part.x1y2" / "step-0000003.part").write_bytes(b"half")
        (tmp_path / "notes.part").write_text("mine")
        state.clean(tmp_path)
        assert {file.name for file in tmp_path.iterdir()} == {path.name, "notes.part"}


def test_differences(tmp_path):
    before = {"a": {"b": 1, "c": [1, 2]}, "d": None}
    state.refuse_other(tmp_path, before, {"a": {"b": 1, "c": (1, 2)}, "d": None})
    with pytest.raises(ValueError) as error:
        state.refuse_other(tmp_path, before, {"a": {"b": 2, "c": [1, 2]}, "e": 5})
    first, *lines = str(error.value).splitlines()
    assert first.endswith("2 differ:")
    assert lines == ["    a.b: 1 there, 2 here", "    e: None there, 5 here"]


def test_differences_of_settings(tmp_path):
    """They are shown alone: of what follows from them there is more than is shown at all."""
    shapes = {f"net.{i}": [4, 4] for i in range(20)}
    before = {"rate": {"steps": 9}, "parameters": shapes, "settings": {"rank": 4, "pictures": {"count": 5}, "seed": 0}}
    now = {"rate": {"steps": 9}, "parameters": {}, "settings": {"rank": 8, "pictures": {"count": 6}, "seed": 0}}
    with pytest.raises(ValueError) as error:
        state.refuse_other(tmp_path, before, now)
    first, *lines = str(error.value).splitlines()
    assert first.endswith("2 differ:")
    assert lines == ["    settings.rank: 4 there, 8 here", "    settings.pictures.count: 5 there, 6 here"]
    with pytest.raises(ValueError, match=r"20 differ:\n    parameters\.net\.0: \[4, 4\] there, None here"):
        state.refuse_other(tmp_path, before, now | {"settings": before["settings"]})
