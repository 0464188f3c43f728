"""Recorded runs: what is in them, that they change nothing, their files, and where two of them part."""

import json
import math
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import ldm
from ldm.__main__ import main
from ldm.parameters import parse
from ldm.samplers import Step
from ldm.trace import Trace
from ldm.trace.compare import Difference, difference
from ldm.trace.file import Growing, Opened
from ldm.unet import UNet

HOW = {"steps": 4, "seed": 1, "progress": False}
PROMPT = "(red:1.2) heart, twemoji style"


@pytest.fixture(scope="module")
def pipe():
    return ldm.Pipeline.from_pretrained()


@pytest.fixture(scope="module")
def trace(pipe):
    return pipe.trace(PROMPT, **HOW)


def made(**changed):
    """A trace of two steps by hand: one picture, latents (1,1,1,2), guidance of 3."""
    tensors = {"start": torch.tensor([[[[7.0, 1.0]]]])}
    for i, (sigma, sigma_next) in enumerate([(2.0, 1.0), (1.0, 0.0)]):
        step = {"sigma": sigma, "sigma_next": sigma_next}
        tensors |= {f"{i:04}.{name}": torch.tensor(value, dtype=torch.float64) for name, value in step.items()}
        vectors = {"eps_uncond": [1.0, 0.0], "eps_cond": [1.0, 1.0], "eps": [1.0, 3.0], "x0": [5.0, 12.0], "x": [3, 4]}
        tensors |= {f"{i:04}.{name}": torch.tensor([[[value]]]).float() for name, value in vectors.items()}
    text = "a\nSteps: 2, Sampler: euler, CFG scale: 3, Seed: 0"
    return Trace(tensors | changed, [text], [[]], 2)


class TestRecord:
    def test_bitwise_the_steps_of_the_call(self, pipe, trace):
        steps = list(pipe.stream(PROMPT, steps=4, seed=1))
        assert len(trace) == 4 and torch.equal(trace[-1].x, pipe(PROMPT, **HOW).latents)
        for got, step in zip(trace, steps, strict=True):
            for name, a, b in zip(Step._fields, got, step, strict=True):
                assert a is b is None or a == b if name in ("i", "noise") else torch.equal(a, b), name

    def test_the_start(self, pipe, trace):
        """x = x0 + sigma eps, before the first step."""
        first = trace[0]
        assert torch.allclose(trace.start, first.x0 + first.sigma.float() * first.eps, atol=1e-4)

    def test_settings(self, pipe, trace):
        assert trace.texts == pipe(PROMPT, **HOW).texts()
        assert trace.words == [["red", "heart", ",", "twemoji", "style"]]

    def test_attention_is_that_of_the_run(self, pipe, trace):
        with ldm.capture(pipe.unet) as maps:
            pipe(PROMPT, **HOW)
        got = trace.attention()  # (n,words,h,w)
        for (word, heat), mean in zip(maps.words(pipe.plan(PROMPT)), got.mean(dim=0), strict=True):
            assert torch.allclose(heat, mean, atol=1e-6), word
        assert (got[0] - got[-1]).abs().max() > 1e-3

    def test_what_others_change_later_is_not_in_it(self, pipe):
        def spoiling(denoise, x, sigmas, noise):
            for i in range(len(sigmas) - 1):
                prediction = denoise(x, sigmas[i])
                step = Step(i, sigmas[i], sigmas[i + 1], x + 1, *prediction)
                yield step
                step.x.zero_()

        assert pipe.trace("", sampler=spoiling, **HOW)[0].x.abs().max() > 0

    @pytest.mark.parametrize(
        "settings",
        [
            {"prompt": ["red heart", "a"], "sampler": "dpm_2_ancestral"},
            {"guidance_scale": 1},
            {"guidance_interval": (0.5, 5)},
            {"tiling": "x"},
            {"guidance": "perp_neg", "negative_prompt": "blue"},
        ],
    )
    def test_kinds(self, pipe, settings):
        settings = {"prompt": "red heart"} | settings | HOW
        got, plain = pipe.trace(**settings), pipe(**settings)
        assert torch.equal(got[-1].x, plain.latents) and got.texts == plain.texts()
        guided = ~got.curves()["cosine"].isnan()
        assert guided.all() == ("interval" not in str(settings) and "scale" not in settings) or not guided.all()
        for i, words in enumerate(got.words):
            assert got.attention(i).shape == (4, len(words), 8, 8) and not got.attention(i).isnan().any()

    def test_a_refiner_has_no_maps(self, pipe):
        got = pipe.trace("red heart", refiner=pipe.from_pretrained(), refiner_start=0.5, **HOW)
        assert got.attention().isnan().all(dim=(1, 2, 3)).tolist() == [False, False, True, True]

    def test_what_is_several_runs_or_none(self, pipe, tmp_path):
        with pytest.raises(ValueError, match="enlarge=2: a trace shows one run"):
            pipe.trace("", enlarge=2)
        with pytest.raises(ValueError, match="strength=0 makes no step"):
            pipe.trace("", latents=torch.zeros(1, 4, 16, 16), strength=0)
        with pytest.raises(TypeError, match="sede= is no setting"):
            pipe.trace("", sede=1)
        for name in ("run.pt", "none/run.safetensors"):
            with pytest.raises(ValueError, match=r"give a name that ends in \.safetensors, in a folder that exists"):
                pipe.trace("", file=tmp_path / name)


class TestCurves:
    def test_on_paper(self):
        curves = made().curves()
        assert curves["sigma"].tolist() == [2, 1] and curves["scale"].tolist() == [[3]] * 2
        assert curves["eps"][0, 0] == pytest.approx(math.sqrt(5)) and curves["x0"][0, 0] == pytest.approx(13 / 2**0.5)
        assert curves["cosine"][0, 0] == pytest.approx(2**-0.5)

    def test_of_a_run(self, trace):
        curves = trace.curves()
        assert all(values.shape == ((4,) if name == "sigma" else (4, 1)) for name, values in curves.items())
        assert curves["scale"].flatten().tolist() == pytest.approx([7.5] * 4, rel=1e-5)
        step = trace[2]
        cosine = torch.cosine_similarity(step.eps_cond.flatten(), step.eps_uncond.flatten(), dim=0)
        assert float(curves["cosine"][2]) == pytest.approx(float(cosine), abs=1e-6)

    def test_rescaled_guidance_is_seen(self, pipe):
        got = pipe.trace("red heart", guidance_rescale=0.7, **HOW).curves()["scale"]
        assert (got < 7.4).any()


class TestPictures:
    def test_x_and_x0(self, pipe, trace):
        assert [image.size for image in trace.pictures()] == [(16, 16)] * 4
        final = pipe(PROMPT, **HOW).images[0]
        assert trace.pictures("x", decode=pipe.decode)[-1].tobytes() == final.tobytes()
        assert trace.pictures("x0", decode=pipe.decode)[-1].size == (64, 64)

    def test_x_is_brought_to_the_scale_of_the_vae(self):
        """At sigma 1, x = (3, 4) is shown as (3, 4) / sqrt(2)."""
        given = []
        made().pictures("x", decode=lambda z: given.append(z) or torch.zeros(1, 3, 1, 1))
        assert torch.allclose(torch.cat(given).flatten(), torch.tensor([3 / 2**0.5, 4 / 2**0.5, 3, 4]))

    def test_plot(self, trace, pipe, tmp_path):
        figure = trace.plot()
        sheet, curves, maps = figure.subfigs
        assert [len(part.axes) for part in (sheet, curves, maps)] == [10, 4, 10]
        assert [axes.get_title().split("\n")[0] for axes in maps.axes[:4]] == ["red", "heart", "twemoji", "style"]
        assert [len(axes.get_images()) for axes in maps.axes] == [1] * 4 + [0] * 6
        assert curves.axes[0].lines[0].get_ydata().tolist() == trace.curves()["sigma"].tolist()
        figure.savefig(tmp_path / "run.png")
        pipe.trace("$\\alpha^", **(HOW | {"steps": 1})).plot().savefig(tmp_path / "signs.png")
        assert len(pipe.trace("", **(HOW | {"steps": 1, "guidance_scale": 1})).plot().subfigs) == 2


class TestFiles:
    def test_streamed_and_saved_are_the_same(self, pipe, trace, tmp_path):
        streamed = pipe.trace(PROMPT, file=tmp_path / "run.safetensors", **HOW)
        saved = trace.save(tmp_path / "run.safetensors")
        assert streamed.file == tmp_path / "run.safetensors" and saved == tmp_path / "run-2.safetensors"
        for file in (streamed.file, saved):
            loaded = Trace.load(file)
            assert loaded.texts == trace.texts and loaded.words == trace.words and loaded.compare(trace).equal
            assert set(loaded.tensors) == set(trace.tensors) == set(load_file(file))
            assert all(torch.equal(loaded.tensors[name], value) for name, value in trace.tensors.items())
        assert sorted(path.name for path in tmp_path.iterdir()) == ["run-2.safetensors", "run.safetensors"]

    def test_any_dtype_and_shape(self, tmp_path):
        tensors = {
            "a": torch.arange(3.0),
            "b": torch.tensor(2.5, dtype=torch.float64),
            "c": torch.zeros(0, 4),
            "d": torch.randn(3, 5).T.bfloat16(),
            "é": torch.randn(1, 2, 3, dtype=torch.float16),
        }
        growing = Growing(tmp_path)
        for name, value in tensors.items():
            growing[name] = value
        file = growing.save(tmp_path / "x.safetensors", {"said": "ü"})
        read = Opened(file)
        assert read.metadata == {"said": "ü"} and len(read) == 5 and set(read) == set(tensors)
        for values in (read, load_file(file)):
            assert all(torch.equal(values[name], t) and values[name].dtype == t.dtype for name, t in tensors.items())
        assert read.get("none") is None

    def test_no_trace(self, tmp_path):
        other, broken = tmp_path / "other.safetensors", tmp_path / "broken.safetensors"
        save_file({"a": torch.zeros(1)}, other)
        broken.write_bytes(other.read_bytes()[:-1])
        for file, why in ((other, "no trace; give"), (broken, "give a safetensors"), (tmp_path / "no", "No such")):
            with pytest.raises(ValueError, match=why):
                Trace.load(file)
        save_file({"a": torch.zeros(1)}, other, {"trace": json.dumps({"texts": []})})
        with pytest.raises(ValueError, match="no trace; give"):
            Trace.load(other)

    def test_an_error_leaves_nothing(self, pipe, tmp_path):
        def failing(denoise, x, sigmas, noise):
            yield Step(0, sigmas[0], sigmas[1], x, *denoise(x, sigmas[0]))
            raise FloatingPointError("on purpose")

        with pytest.raises(FloatingPointError, match="on purpose"):
            pipe.trace("", sampler=failing, file=tmp_path / "run.safetensors", **HOW)
        assert not list(tmp_path.iterdir())

    def test_a_killed_run_leaves_nothing(self, tmp_path):
        """SIGKILL once steps have been written: the file that has them has no name."""
        program = (
            "import ldm, pathlib, torch\n"
            "def slow(denoise, x, sigmas, noise):\n"
            "    for i in range(len(sigmas) - 1):\n"
            "        if i == 3: pathlib.Path('../now').touch(); import time; time.sleep(600)\n"
            "        yield ldm.samplers.Step(i, sigmas[i], sigmas[i + 1], x, *denoise(x, sigmas[i]))\n"
            "ldm.Pipeline.from_pretrained().trace('', sampler=slow, file='run.safetensors', progress=False)\n"
        )
        folder = tmp_path / "empty"
        folder.mkdir()
        process = subprocess.Popen([sys.executable, "-c", program], cwd=folder)
        while not (tmp_path / "now").exists():
            assert process.poll() is None
            time.sleep(0.02)
        assert any("(deleted)" in str(link.readlink()) for link in Path(f"/proc/{process.pid}/fd").iterdir())
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not list(folder.iterdir())

    def test_flat_memory(self, tmp_path):
        """200 MB through a file: memory grows by less than a tenth of that, on the way in and out."""
        growing, value = Growing(tmp_path), torch.zeros(1 << 20)
        growing["first"] = value
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for i in range(50):
            growing[f"{i}"] = value
        file = growing.save(tmp_path / "x.safetensors", {})
        assert file.stat().st_size > 200 << 20
        assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < 20 << 20


class TestCompare:
    def test_equal(self, trace, pipe):
        found = trace.compare(pipe.trace(PROMPT, **HOW))
        assert found.equal and not found.first and not found.settings
        assert str(found) == "the same settings\n\nthe same to the bit in all 4 steps that both have"

    @pytest.mark.parametrize(
        ("name", "step", "sigma"),
        [("start", None, 2), ("0000.eps_cond", 0, 2), ("0001.eps", 1, 1), ("0001.x", 1, 1), ("0000.sigma_next", 0, 2)],
    )
    def test_the_first_difference(self, name, step, sigma):
        """One number of one quantity, moved by 2^-20 of 4 units: everything else stays."""
        value = made().tensors[name].clone()
        value.view(-1)[-1] += 0.5
        found = made().compare(made(**{name: value}))
        (first,) = found.first
        assert (first.quantity, first.step, first.sigma) == (name[5:] if "." in name else name, step, sigma)
        assert first.largest == 0.5 and not found.equal and str(first) in str(found)
        assert [last.quantity for last in found.last] == ([first.quantity] if step == 1 else [])

    def test_order_within_a_step(self):
        """The net's noises before what is made of them."""
        changes = {f"0001.{name}": made().tensors[f"0001.{name}"] + 1 for name in ("x", "x0", "eps", "eps_cond")}
        found = made().compare(made(**changes, **{"0000.x": made().tensors["0000.x"] * 2}))
        assert [(d.step, d.quantity) for d in found.first] == [(0, "x"), (1, "eps_cond"), (1, "eps"), (1, "x0")]

    def test_how_much(self):
        a, b = torch.tensor([1.0, -8.0, 4.0]), torch.tensor([1.0, -8.0, 4.0 + 3 * 2**-21])
        found = difference("x", 3, 0.5, a, b)
        assert found == Difference("x", 3, 0.5, 3 * 2**-21, 3 * 2**-24, 1.5)  # an ulp of 8 is 2^-20
        assert (difference("x", 3, 0.5, a, 2 * a).relative, difference("x", 3, 0.5, 2 * a, a).relative) == (1, 0.5)
        assert difference("x", 3, 0.5, a, a.clone()) is None and difference("x", 3, 0.5, None, None) is None
        assert difference("x", 3, 0.5, a, None).why == "(3,) and nothing"
        assert difference("x", 3, 0.5, a, a[:2]).why == "(3,) and (2,)"

    def test_settings(self, trace, pipe):
        other = pipe.trace("red heart", negative_prompt="blue", **(HOW | {"steps": 3, "seed": 2}))
        found = trace.compare(other)
        assert found.settings == {
            "Prompt": (PROMPT, "red heart"),
            "Negative prompt": ("(default)", "blue"),
            "Steps": ("4", "3"),
            "Seed": ("1", "2"),
        }
        assert found.steps == (4, 3) and found.first[0].quantity == "start"
        for said in ("Seed", "(default)", "steps recorded", "first difference\nstart      before the first step"):
            assert said in str(found)

    def test_what_else_decided_them(self, pipe, trace, tmp_path):
        """Nets and machine are named, and make no other runs of the same; of an earlier trace they are not known."""
        out = pipe("", steps=1, progress=False)
        ran = out.settings.ran
        assert trace.ran == {"model": ran.hash, **ran.nets, **{n: ran.machine[n] for n in ("processor", "threads")}}
        for kept in (trace.only(0), Trace.load(trace.save(tmp_path / "run.safetensors"))):
            assert kept.ran == trace.ran
        other = replace(trace, ran=trace.ran | {"model": "another", "threads": "64"})
        found = trace.compare(other)
        assert found.ran == {"model": (ran.hash, "another"), "threads": (trace.ran["threads"], "64")} and found.equal
        assert f"the same settings\nmodel                   {ran.hash}   another\nthreads" in str(found)
        assert trace.compare(replace(trace, ran={})).ran == {}

    def test_batches_of_different_size(self, trace, pipe):
        """Only what they were asked for is another: none of the settings of the picture that one of them lacks."""
        found = trace.compare(pipe.trace([PROMPT, "a"], **HOW))
        assert set(found.settings) == {"Batch pos", "Prompts", "Negative prompts"} and not found.equal
        assert found.first[0].why == "(1, 4, 16, 16) and (2, 4, 16, 16)"

    def test_another_number_of_steps_is_a_difference(self):
        longer, tensors = made(), dict(made().tensors)
        shorter = Trace(tensors, longer.texts, longer.words, 1)
        assert not longer.compare(shorter).equal and not longer.compare(shorter).first


class TestCommandLine:
    @pytest.fixture(autouse=True)
    def folder(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)

    def trace(self, *argv):
        main(["trace", *argv, "--steps", "2", "--quiet"])

    def show(self, *argv):
        main(["trace", *argv, "--quiet"])

    def compare(self, *argv):
        try:
            main(["compare", *argv, "--quiet"])
        except SystemExit as stop:
            return stop.code
        return 0

    def test_traces(self, capsys):
        for name, seed in (("a", "0"), ("b", "0"), ("c", "1")):
            self.trace("red heart", "-o", f"{name}.safetensors", "--seed", seed)
        capsys.readouterr()
        assert self.compare("a.safetensors", "b.safetensors") == 0
        assert "the same to the bit" in capsys.readouterr().out
        assert self.compare("a.safetensors", "c.safetensors") == 1
        assert "first difference\nstart" in capsys.readouterr().out
        assert self.compare("a.safetensors", "none.safetensors") == 2
        assert "none.safetensors" in capsys.readouterr().err

    def test_pictures_are_run_again(self, capsys):
        for name, sampler in (("a", "euler"), ("b", "heun")):
            main(["red heart", "-o", f"{name}.png", "--steps", "2", "--sampler", sampler, "--quiet"])
        self.trace("red heart", "-o", "a.safetensors")
        assert self.compare("a.png", "a.safetensors") == 0
        assert self.compare("a.png", "b.png") == 1
        assert "Sampler                 euler   heun" in capsys.readouterr().out

    def test_pictures_of_one_batch(self, capsys):
        """Each by its own place in the batch."""
        main(["red heart", "-o", "pair.png", "-n", "2", "--steps", "2", "--quiet"])
        capsys.readouterr()
        assert self.compare("pair.png", "pair-2.png") == 1
        said = capsys.readouterr().out
        assert "Seed" in said and "start      before the first step" in said
        assert self.compare("pair-2.png", "pair-2.png") == 0

    def test_what_is_not_what_ran(self, pipe, capsys, monkeypatch):
        """One picture by other weights, and one that was painted on, with the settings and the record of another."""
        out = pipe("red heart", steps=2, progress=False)
        out.save("clean.png")
        out.images[0].paste("black", (0, 0, 32, 32))
        out.save("painted.png")
        assert self.compare("clean.png", "painted.png") == 1
        assert "of the pixels' values, by up to" in capsys.readouterr().out
        forward = UNet.forward
        with monkeypatch.context() as changed:
            changed.setattr(UNet, "forward", lambda self, *args: 1.01 * forward(self, *args))
            pipe("red heart", steps=2, progress=False).save("other.png")
        assert self.compare("clean.png", "other.png") == 2
        assert "leaves the run that it is from at step 1" in capsys.readouterr().err

    def test_outputs(self, capsys):
        self.trace("red heart")
        self.trace("red heart", "-o", "a.safetensors", "--seed", "1")
        self.show("a.safetensors")
        self.show("a.safetensors", "--beside", "a.safetensors", "--force")
        self.show("a.safetensors", "-o", "a.svg")
        self.show("a.safetensors", "-o", "a.safetensors")
        said = "run.html a.safetensors run-2.html run.html a.svg a-2.safetensors"
        assert capsys.readouterr().out.split() == said.split()
        assert Trace.load("a-2.safetensors").compare(Trace.load("a.safetensors")).equal
        assert "<svg" in Path("a.svg").read_text() and Path("run.html").read_text().count('"prompt":') == 2
        assert parse(Trace.load("a.safetensors").texts[0])["seed"] == 1

    def test_of_a_picture(self, pipe, capsys):
        """How it was made is shown, its own place in the batch; what nobody would look at is refused."""
        pipe("red heart", steps=2, seed=[3, 8], progress=False).save("pair.png")
        self.show("pair-2.png", "-o", "run.safetensors")
        self.show("pair-2.png", "--beside", "pair.png", "-o", "run.html")
        alone = pipe.trace("red heart", steps=2, seed=8, progress=False)
        got = Trace.load("run.safetensors")
        assert torch.allclose(got[-1].x, alone[-1].x, atol=1e-4) and parse(got.texts[0])["seed"] == (3, 8)
        assert Path("run.html").read_text().count('"prompt":') == 2
        for file in ("pair.png", "run.safetensors"):
            with pytest.raises(SystemExit) as stop:
                self.show(file, "--steps", "3", "-n", "2", "-o", "no.html")
            assert f"{file} says itself how it was made: leave out n, steps" in stop.value.code
        assert not Path("no.html").exists()

    @pytest.mark.parametrize(
        ("argv", "why"),
        [
            (["x", "-o", "a.gif"], "give a name that ends in .html"),
            (["x", "-o", "none/a.html"], "does not exist"),
            (["x", "-o", "a.png", "--beside", "a.safetensors"], "give a name in .html"),
            (["x", "--beside", "a.safetensors"], "a.safetensors"),
            (["none.safetensors"], "none.safetensors"),
            (["none.png"], "none.png: No such file"),
        ],
    )
    def test_refusals(self, argv, why):
        with pytest.raises(SystemExit) as stop:
            self.show(*argv)
        assert why in stop.value.code and not list(Path().iterdir())


@pytest.mark.parametrize("ask", ["pictures", "attention", "plot", "to_html"])
def test_a_picture_that_is_not_there(trace, ask, tmp_path):
    given = {"file": tmp_path / "run.html"} if ask == "to_html" else {}
    for picture in (-1, len(trace.texts)):
        with pytest.raises(ValueError, match=f"picture={picture}: the run made"):
            getattr(trace, ask)(picture=picture, **given)
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_shown(trace, tmp_path):
    with pytest.raises(ValueError, match="pictures of 'eps': there are those of 'x0' and 'x'"):
        trace.pictures("eps")
    with pytest.raises(FileNotFoundError, match=r"the folder .* does not exist, make it first"):
        trace.to_html(tmp_path / "none" / "run.html")
