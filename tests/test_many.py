"""Lists of prompts into folders, in this process; and under torchrun, whose processes are killed."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import ldm
from ldm.__main__ import main
from ldm.image import encode
from ldm.many import LOG, Task, make, read
from ldm.parameters import parse
from ldm.parameters import read as text_of

ROOT = Path(__file__).parent.parent
FAST = {"steps": 1, "guidance_scale": 1.0}
NONE = {"negative_prompt": None, "subseed": None}
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def pipe():
    return ldm.Pipeline.from_pretrained(device="cpu")


def tasks(*prompts, **values):
    Path("list.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    return read(Path("list.jsonl"), FAST | {"seed": 0} | values)


def done(pipe, tasks, batch=1, out="out"):
    made = make(pipe, tasks, Path(out), batch, progress=False)
    return made.there, made.made, made.failed


def rows(out="out"):
    return [json.loads(line) for line in (Path(out) / LOG).read_text().splitlines()]


def pixels(out="out"):
    return {path.name: Image.open(path).tobytes() for path in sorted(Path(out).glob("*.png"))}


def files(out="out"):
    return sorted(path.name for path in Path(out).iterdir())


# ------------------------------------------------------------------------------------------------ the list


def test_a_text_has_a_prompt_on_each_line():
    Path("list.txt").write_text("\ufeffa red heart\r\n\n  \n(star:1.2), \\(blue\\) \u2028 # and more\n", "utf-8")
    assert read(Path("list.txt"), {"seed": 7, "steps": 3, "batch_size": 2}) == [
        Task(name, line, {"prompt": prompt, "seed": seed, "steps": 3, "batch_size": 1} | NONE)
        for name, line, prompt, seed in [
            ("000001.png", 1, "a red heart", 7),
            ("000001-2.png", 1, "a red heart", 8),
            ("000004.png", 4, "(star:1.2), \\(blue\\) \u2028 # and more", 9),
            ("000004-2.png", 4, "(star:1.2), \\(blue\\) \u2028 # and more", 10),
        ]
    ]


def test_lines_of_settings():
    own = [
        {"prompt": "a\nb"},
        {"prompt": "c", "seed": 5, "steps": 4, "crops_coords_top_left": [0, 8], "sigmas": [2, 1, 0]},
        {"prompt": ["d", "e"], "negative_prompt": ["x", "y"]},
        {"prompt": "f", "seed": [3, 1]},
        {"prompt": "g", "subseed": 2, "subseed_strength": 0.5},
        {"prompt": "h"},
    ]
    Path("list.jsonl").write_text("\n".join(map(json.dumps, own)))
    found = read(Path("list.jsonl"), {"seed": 100})
    names = ("prompt", "negative_prompt", "seed", "subseed")
    assert [tuple(getattr(task.settings(), name) for name in names) for task in found] == [
        ("a\nb", None, 100, None),
        ("c", None, 5, None),
        ("d", "x", 102, None),
        ("e", "y", 103, None),
        ("f", None, 3, None),
        ("f", None, 1, None),
        ("g", None, 100, 2),
        ("h", None, 107, None),
    ]
    second = found[1].settings()
    assert second.steps == 4 and second.sigmas.tolist() == [2, 1, 0] and second.crops_coords_top_left == (0, 8)
    assert [task.line for task in found] == [1, 2, 3, 3, 4, 4, 5, 6]
    assert [task.settings().seed for task in read(Path("list.jsonl"), {"seed": [8, 9]})][:2] == [8, 9]  # for each
    varied = read(Path("list.jsonl"), {"subseed": 50, "subseed_strength": 0.1})
    assert [task.settings().subseed for task in varied] == [50, 51, 52, 53, 54, 55, 2, 57]


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.csv", "a", r"a.csv: a list of prompts has a name that ends in .txt or .jsonl"),
        ("a.txt", "\n \n", r"a.txt has no prompt in it: give one on each line"),
        ("a.txt", b"\xff\xfe", r"a.txt is not in UTF-8"),
        ("a.jsonl", '{"prompt": "a"}\n{"prompt": ', r"a.jsonl, line 2: not JSON \(Expecting value"),
        ("a.jsonl", "[" * 100000, r"a.jsonl, line 1: not JSON"),
        ("a.jsonl", '\n"a"', r'a.jsonl, line 2: give an object with a prompt, \{"prompt": "a red heart"\}'),
        ("a.jsonl", '{"steps": 1}', r"a.jsonl, line 1: give an object with a prompt"),
        ("a.jsonl", '{"prompt": "a", "step": 1}', r"a.jsonl, line 1: step= is no setting: did you mean steps="),
        ("a.jsonl", '{"prompt": "a", "steps": "7"}', r"a.jsonl, line 1: steps='7': give a whole number"),
        ("a.jsonl", '{"prompt": "a", "latents": [1]}', r"a.jsonl, line 1: latents is nothing that a line can hold"),
        ("a.jsonl", '{"prompt": "a", "image": "b.png"}', r"a.jsonl, line 1: b.png: No such file"),
        ("a.jsonl", '{"prompt": "a", "sigmas": ["x"]}', r"a.jsonl, line 1: "),
    ],
)
def test_errors_name_the_line(name, text, said):
    Path(name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=said):
        read(Path(name), {})


@pytest.mark.parametrize("name", sorted(set(ldm.Settings.__dataclass_fields__)))
def test_any_value_is_taken_or_refused(name):
    """By a ValueError: no kind of JSON in any setting is another."""
    for value in (None, True, 1, -1, 0.5, "a", [], [1], ["a"], [[1]], {}, {"a": 1}):
        Path("list.jsonl").write_text(json.dumps({"prompt": "a"} | {name: value}))
        try:
            read(Path("list.jsonl"), {"seed": 0})
        except ValueError as error:
            assert "list.jsonl, line 1: " in str(error)


# ------------------------------------------------------------------------------------------------ the folder


def test_the_same_pictures_whatever_the_batch(pipe):
    """Three and five at a time, each is the one that is made alone; the record says how, and makes it again."""
    own = [{"prompt": "heart"}, {"prompt": "star", "seed": 9}, {"prompt": "fire", "steps": 2}]
    own += [{"prompt": f"cat {'red ' * n}", "negative_prompt": "blue"} for n in (0, 1, 80)]
    Path("list.jsonl").write_text("\n".join(map(json.dumps, own)))
    listed = read(Path("list.jsonl"), {"steps": 1, "seed": 0})
    for batch in (3, 5):
        assert done(pipe, listed, batch, f"out{batch}") == (0, 6, [])
        for task in listed:
            picture = pipe.run(task.settings(), progress=False).images[0].tobytes()
            assert pixels(f"out{batch}")[task.file] == picture
    assert len({json.dumps(row | {"seconds": 0}, sort_keys=True) for out in ("out3", "out5") for row in rows(out)}) == 6
    values = parse(text_of(Path("out3/000002.png")))
    assert (values["prompt"], values["seed"], values["threads"]) == ("star", 9, 1) and "batch_size" not in values
    (row,) = (row for row in rows("out3") if row["line"] == 3)
    assert row.pop("seconds") > 0 and len(row.pop("sha256")) == 64
    assert row == {"file": "000003.png", "line": 3, "prompt": "fire", "seed": 2, "settings": {"steps": 2}}
    main(["replay", "out5/000002.png", "-o", "again.png", "--quiet"])
    assert Path("again.png").read_bytes() == Path("out5/000002.png").read_bytes()


def test_a_sampler_that_looks_at_its_batch_is_not_given_one(pipe):
    own = {"sampler": "dpm_adaptive", "sampler_options": {"rtol": 0.3}, "steps": 2}
    listed = tasks("heart", "star", **own)
    assert done(pipe, listed, 2) == (0, 2, [])
    for task in listed:
        assert pixels()[task.file] == pipe.run(task.settings(), progress=False).images[0].tobytes()


def test_what_is_there_is_not_made(pipe, monkeypatch):
    listed = tasks("a", "b", "c")
    assert done(pipe, listed[:2]) == (0, 2, [])
    before = {path: path.stat().st_mtime_ns for path in Path("out").glob("*.png")}
    assert done(pipe, listed) == (2, 1, [])
    monkeypatch.setattr(ldm.Pipeline, "run", None)
    assert done(pipe, listed) == (3, 0, [])
    assert len(before) == 2 and all(path.stat().st_mtime_ns == time for path, time in before.items())
    assert [row["file"] for row in rows()] == ["000001.png", "000002.png", "000003.png"]


def test_damaged_pictures_are_made_again(pipe):
    listed = tasks("a", "b", "c", "d")
    done(pipe, listed)
    whole = pixels()
    cut, other, empty = (Path("out") / task.file for task in listed[:3])
    cut.write_bytes(cut.read_bytes()[:-300])
    image = Image.open(other)
    image.putpixel((5, 5), (1, 2, 3))
    info = PngInfo()
    info.add_text("parameters", image.text["parameters"])
    image.save(other, pnginfo=info)
    empty.write_bytes(b"")
    assert pixels_of(other) != whole[other.name]
    assert done(pipe, listed) == (1, 3, [])
    assert pixels() == whole and done(pipe, listed) == (4, 0, [])


def pixels_of(path):
    return Image.open(path).tobytes()


@pytest.mark.parametrize("kind", ["photo", "text", "folder", "other settings", "link"])
def test_files_of_others_stay(pipe, kind):
    """Nothing is made then, and nothing changes."""
    Path("out").mkdir()
    path = Path("out/000002.png")
    said = r"000002.png is not the picture of line 2, Prompt:  there, b asked for; it is not written over"
    if kind == "photo":
        Image.new("RGB", (9, 9)).save(path)
    elif kind == "other settings":
        done(pipe, tasks("a", "b", steps=2)[1:])
        said = r"000002.png is not the picture of line 2, Steps: 2 there, 1 asked for; it is not written over: move"
    else:
        said = r"000002.png is none of these pictures \(.*\): move it, or give another folder"
        {"text": lambda: path.write_text("mine"), "folder": path.mkdir, "link": lambda: path.symlink_to("x")}[kind]()
    before = files(), pixels() if kind in ("photo", "other settings") else None
    with pytest.raises(ValueError, match=said):
        done(pipe, tasks("a", "b"))
    assert before == (files(), pixels() if before[1] else None)


def test_a_file_that_appears_meanwhile_stays(pipe, monkeypatch):
    listed, run = tasks("a"), ldm.Pipeline.run

    def slow(*args, **options):
        Path("out/000001.png").write_text("mine")
        return run(*args, **options)

    monkeypatch.setattr(ldm.Pipeline, "run", slow)
    with pytest.raises(FileExistsError):
        done(pipe, listed)
    assert Path("out/000001.png").read_text() == "mine" and files() == ["000001.png"]


def test_what_a_killed_process_leaves(pipe):
    """A half of a picture, a picture without its line, and a half of a line."""
    listed = tasks("a", "b", "c")
    done(pipe, listed)
    whole, said = pixels(), rows()
    for name in ("000001.png", "000002.png"):
        (Path("out") / f".{name}.part").write_bytes((Path("out") / name).read_bytes()[:500])
    (Path("out") / "000001.png").unlink()
    (Path("out") / LOG).write_text(f"{json.dumps(said[2])}\n{json.dumps(said[1])[:60]}")
    assert done(pipe, listed) == (2, 1, [])
    assert pixels() == whole and files() == ["000001.png", "000002.png", "000003.png", LOG]
    lines = (Path("out") / LOG).read_text().splitlines()
    assert len(lines) == 4 and json.loads(lines[2]) == said[1] | {"seconds": None}
    assert done(pipe, listed) == (3, 0, []) and len((Path("out") / LOG).read_text().splitlines()) == 4


def test_a_full_disk_ends_it(pipe, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    listed = tasks("a", "b")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        done(pipe, listed)
    assert files() == []


def test_failures_are_tried_once_more_and_listed(pipe, monkeypatch):
    """In a batch of four: one that always fails, alone too, and one that does so once."""
    listed, run, tries = tasks("a", "bad", "c", "flaky", "e"), ldm.Pipeline.run, Counter()

    def failing(self, settings, **options):
        tries.update(settings.texts)
        if "bad" in settings.texts:
            raise FloatingPointError("x has NaN or infinity in it")
        if "flaky" in settings.texts and tries["flaky"] == 1:
            raise MemoryError
        return run(self, settings, **options)

    monkeypatch.setattr(ldm.Pipeline, "run", failing)
    for batch in (4, 1):
        tries.clear()
        failure = "000002.png, line 2: x has NaN or infinity in it"
        assert done(pipe, listed, batch, f"out{batch}") == (0, 4, [failure])
        assert tries["bad"] == tries["flaky"] == 2 and tries["e"] == 1
        assert [row["line"] for row in rows(f"out{batch}") if "error" in row] == [2]
    monkeypatch.setattr(ldm.Pipeline, "run", run)
    assert done(pipe, listed, out="out4") == (4, 1, []) and done(pipe, listed, out="out4") == (5, 0, [])
    Path("out1/000002.png").write_text("mine")  # its line in the record is a failure: nothing of ours had that name
    with pytest.raises(ValueError, match="none of these pictures"):
        done(pipe, listed, out="out1")


def test_of_a_batch_that_fails_late_the_rest_is_made(pipe, monkeypatch):
    """The second of three cannot be written, once."""
    listed, tries = tasks("a", "b", "c"), []

    def failing(image, format, text, **record):
        tries.append(text[0])
        if tries == ["a", "b"]:
            raise ValueError("PNG cannot hold it")
        return encode(image, format, text, **record)

    monkeypatch.setattr("ldm.many.encode", failing)
    assert done(pipe, listed, 3) == (0, 3, []) and tries == ["a", "b", "b", "c"]


def test_settings_are_checked_before_any_work(pipe, monkeypatch):
    monkeypatch.setattr(ldm.Pipeline, "run", None)
    with pytest.raises(ValueError, match=r"line 1: 8192x8192 pixels in one run: up to"):
        done(pipe, tasks("a", width=8192, height=8192))
    with pytest.raises(ValueError, match=r"line 1: prompt: .* has the weight"):
        done(pipe, tasks("(a:99999)"))
    assert files() == []


# ------------------------------------------------------------------------------------------------ the command


def test_the_command(pipe, capsys):
    Image.radial_gradient("L").convert("RGB").resize((64, 64)).save("in.png")
    own = [{"prompt": "heart"}, {"prompt": "cat", "image": "in.png", "strength": 0.5, "emphasis": None}]
    Path("list.jsonl").write_text("\n".join(map(json.dumps, own)))
    command = ["generate", "--prompts", "list.jsonl", "--out", "new/out", "--steps", "2", "--seed", "3", "--batch", "2"]
    main(command)
    out, err = capsys.readouterr()
    assert out == "new/out: 0 of 2 pictures were there, 2 made, 0 failed\n" and "2/2" in err
    main([*command, "--quiet"])
    assert capsys.readouterr() == ("new/out: 2 of 2 pictures were there, 0 made, 0 failed\n", "")
    for i, prompt in enumerate(own):
        settings = {"steps": 2, "seed": 3 + i} | prompt | ({"image": Image.open("in.png")} if i else {})
        picture = pipe(**settings, progress=False).images[0]
        assert pixels_of(f"new/out/00000{i + 1}.png") == picture.tobytes()
    main(["replay", "new/out/000002.png", "-o", "again.png", "--quiet"])
    assert Path("again.png").read_bytes() == Path("new/out/000002.png").read_bytes()


def test_a_failure_is_the_exit_code(monkeypatch, capsys):
    def failing(self, settings, **options):
        raise FloatingPointError("NaN")

    monkeypatch.setattr(ldm.Pipeline, "run", failing)
    Path("a.txt").write_text("heart")
    with pytest.raises(SystemExit) as stop:
        main(["--prompts", "a.txt", "--out", "out", "--quiet"])
    assert stop.value.code == 1
    out, err = capsys.readouterr()
    assert out == "out: 0 of 1 pictures were there, 0 made, 1 failed\n"
    assert err == "ldm: failed: 000001.png, line 1: NaN\n"


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["generate"], "no prompt: give one, in quotes, or a list of them with --prompts"),
        (["a", "--out", "x"], "--out is about a list of --prompts"),
        (["a", "--batch", "2"], "--batch is about a list of --prompts"),
        (["--prompts", "a.txt"], "--prompts without --out: give the folder"),
        (["--prompts", "a.txt", "--out", "x", "-o", "y.png"], "--prompts with output, which is about single pictures"),
        (["a", "--prompts", "a.txt", "--out", "x"], "--prompts with prompt"),
        (["--prompts", "a.txt", "--out", "x", "--steps", "0"], "a.txt, line 1: steps=0: give a whole number"),
        (["--prompts", "x/pictures.jsonl", "--out", "x"], "the record of the pictures has that name"),
        (["--prompts", "none.txt", "--out", "x"], "No such file"),
    ],
)
def test_what_the_command_refuses(argv, said):
    Path("a.txt").write_text("a")
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert said in str(stop.value.code) and not Path("x").exists()


# ------------------------------------------------------------------------------------------------ processes


def start(count, out, pictures, steps):
    """torchrun with `count` processes, without it for none."""
    Path("list.txt").write_text("".join(f"red heart {i}\n" for i in range(pictures)))
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count), "--max-restarts", "9"]
    command = [sys.executable, *(torchrun if count else []), "-m", "ldm", "generate", "--prompts", "list.txt"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command += ["--out", out, "--steps", str(steps), "--batch", "2", "--quiet", "--device", "cpu"]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def until(process, out, count):
    """The record has so many lines; or the process has ended."""
    log, end = Path(out) / LOG, time.monotonic() + 500
    while process.poll() is None and time.monotonic() < end:
        if log.exists() and log.read_bytes().count(b"\n") >= count:
            return
        time.sleep(0.005)
    assert process.poll() is not None, "nothing happens"


def children(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def kill_workers(out, pictures, steps, kills, seed):
    """Two processes, one of which is killed now and then. Returns how often."""
    process, moments, killed = start(2, out, pictures, steps), random.Random(seed), 0
    for count in sorted(moments.sample(range(1, pictures - 2), kills)):
        until(process, out, count)
        time.sleep(moments.uniform(0, 0.1))
        if workers := process.poll() is None and children(process.pid):
            os.kill(moments.choice(workers), signal.SIGKILL)
            killed += 1
    said, errors = process.communicate(timeout=500)
    assert process.returncode == 0, errors
    assert said.rstrip().endswith("made, 0 failed")
    return killed


def assert_whole(pipe, out, pictures, steps):
    """All are there, as in a run that nobody disturbed, which finds nothing to do; each was recorded once."""
    listed = read(Path("list.txt"), {"steps": steps, "seed": 0})
    for task in listed:
        assert pixels_of(Path(out) / task.file) == pipe.run(task.settings(), progress=False).images[0].tobytes()
    assert files(out) == [*sorted(task.file for task in listed), LOG]
    assert Counter(row["file"] for row in rows(out)) == Counter(task.file for task in listed)
    assert done(pipe, listed, out=out) == (pictures, 0, [])


def test_killed_workers_lose_nothing_but_what_they_were_at(pipe):
    assert kill_workers("out", 12, 2, 1, seed=0) == 1
    assert_whole(pipe, "out", 12, 2)


@pytest.mark.full
def test_a_killed_run_goes_on(pipe):
    process = start(0, "out", 6, 2)
    until(process, "out", 2)
    process.kill()
    process.communicate()
    listed = read(Path("list.txt"), {"steps": 2, "seed": 0})
    there = len(list(Path("out").glob("*.png")))
    assert 2 <= there < 6
    assert done(pipe, listed, 3) == (there, 6 - there, [])
    assert_whole(pipe, "out", 6, 2)


@pytest.mark.full
@pytest.mark.parametrize("seed", range(3))
def test_many_kills(pipe, seed):
    """At random moments, of workers and then of all of them at once."""
    assert kill_workers("out", 60, 4, 4, seed) >= 2
    assert_whole(pipe, "out", 60, 4)
    process = start(2, "all", 60, 4)
    until(process, "all", random.Random(seed).randrange(5, 40))
    for pid in [process.pid, *children(process.pid)]:
        os.kill(pid, signal.SIGKILL)
    process.communicate()
    kill_workers("all", 60, 4, 1, seed)
    assert_whole(pipe, "all", 60, 4)


@pytest.mark.full
@pytest.mark.parametrize("batch", [1, 8])
def test_memory_stays_flat(pipe, monkeypatch, batch):
    """A thousand pictures: after the first hundred the memory grows by less than 1 %."""

    def resident():
        return 4096 * int(Path("/proc/self/statm").read_text().split()[1])

    sizes, save = [], Image.Image.save

    def measured(*args, **options):
        sizes.append(resident())
        return save(*args, **options)

    monkeypatch.setattr(Image.Image, "save", measured)
    assert done(pipe, tasks(*(f"red heart {i}" for i in range(1000))), batch) == (0, 1000, [])
    early, late = max(sizes[50:100]), max(sizes[900:])
    print(f"batch {batch}: {early / 2**20:.1f} MB after 100 pictures, {late / 2**20:.1f} MB after 1,000")
    assert late < 1.01 * early
