"""The record of a run: marks of steps whose distance is known, and pictures that are replayed."""

import json
import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import ldm
from ldm import record
from ldm.__main__ import main
from ldm.image import read_record
from ldm.parameters import parse, read
from ldm.pipeline import DEFAULT_MODEL
from ldm.record import Left, Record, directions, machine, mark, projections
from ldm.replay import fingerprint
from ldm.samplers.euler import euler
from ldm.unet import UNet


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def pipe():
    return ldm.Pipeline.from_pretrained()


def generator(seed):
    return torch.Generator().manual_seed(seed)


class TestMark:
    def test_distance(self):
        """The mean square of the projections is that of x; over many x within 5 standard errors."""
        ratios = []
        for seed in range(100):
            x, d = torch.randn(2, 4, 8, 8, generator=generator(seed))
            told = projections(mark(x + 1e-3 * d)) - projections(mark(x))
            ratios.append((told**2).mean() / float((1e-6 * d**2).mean()))
        # A mean of 8 squares of normal variables has a variance of 2 / 8.
        assert abs(np.mean(ratios) - 1) < 5 * math.sqrt(2 / 8 / 100)

    def test_on_paper(self):
        x = torch.zeros(1, 2, 2)
        x[0, 0, 1] = 3.0
        assert projections(mark(x)).tolist() == (directions(4)[:, 1] * 3 / 2).tolist()
        assert set(directions(4).ravel()) == {-1, 1}

    def test_as_in_files_that_exist(self):
        """Marks of other versions are compared with these: 6 bytes of sha256 and 8 float32."""
        pinned = "58dda328598e00000841000080c10000b0c00000c0400000c0400000a0400000c03f00002041"
        assert mark(torch.arange(16.0).view(4, 2, 2)).hex() == pinned

    def test_one_bit(self):
        x = torch.randn(4, 8, 8, generator=generator(0))
        other = x.clone()
        other[3, 7, 7] = torch.nextafter(other[3, 7, 7], torch.tensor(9.0))
        assert mark(x) == mark(x.clone()) != mark(other)


def made(sigmas, xs, nets=None, machine=None, changes=0):
    return Record([*map(list, sigmas)], [mark(x) for x in xs], nets or {}, machine or {}, changes)


class TestRecord:
    xs = torch.randn(3, 4, 8, 8, generator=generator(1))
    sigmas = ((3.0, 2.0, 1.0, 0.0),)

    def test_to_text_and_back(self):
        one = made(self.sigmas, self.xs, {"dtype": "bfloat16"}, {"torch": "2"}, 4)
        assert Record.parse(one.text()) == one
        later = json.loads(one.text()) | {"a field": "of a later version"}
        assert Record.parse(json.dumps(later)) == one

    @pytest.mark.parametrize("field", ["sigmas", "marks", "nets", "machine", "changes"])
    def test_damaged(self, field):
        values = json.loads(made(self.sigmas, self.xs).text())
        del values[field]
        for text in (json.dumps(values), json.dumps(values | {field: 7.5 if field != "changes" else "x"}), "{", "[]"):
            with pytest.raises(ValueError, match="the record of the run is damaged"):
                Record.parse(text)
        with pytest.raises(ValueError, match="marks and sigmas differ in number"):
            made([[3.0, 2.0]], self.xs).parse(made([[3.0, 2.0]], self.xs).text())

    def test_left(self):
        one = made(self.sigmas, self.xs)
        assert one.left_by(made(self.sigmas, self.xs)) is None
        moved = self.xs.clone()
        moved[1:] *= 1 + 1e-3
        left = one.left_by(made(self.sigmas, moved))
        assert left == Left(1, 2.0, pytest.approx(1e-3, rel=1e-3))
        assert str(left) == "step 2, from sigma 2.0000, by 1.0e-03 of x"
        near = self.xs.clone()
        near[2, 0, 0, 0] = torch.nextafter(near[2, 0, 0, 0], torch.tensor(9.0))
        assert str(one.left_by(made(self.sigmas, near))) == "step 3, from sigma 1.0000, by less than 1e-6 of x"

    def test_left_in_a_second_run(self):
        """Steps are counted over both runs of an edit, sigmas are each run's own."""
        moved = self.xs.clone()
        moved[2] += 1
        sigmas = [[3.0, 2.0, 0.0], [0.5, 0.0]]
        left = made(sigmas, self.xs).left_by(made(sigmas, moved))
        assert (left.step, left.sigma) == (2, 0.5)

    def test_differences(self, monkeypatch):
        monkeypatch.setattr(record, "numerics", lambda: ["first", "second", "third"])
        one = made(self.sigmas, self.xs, {"dtype": "float32"}, {"torch": "1", "threads": "2"}, 1)
        other = made([[3.0, 2.5, 1.0, 0.0]], self.xs, {"dtype": "float32"}, {"torch": "2", "threads": "2"}, 3)
        assert one.differences(other) == [
            "torch: 1 then, 2 now",
            "sigmas: others between the first and the last",
            "second",
            "third",
        ]
        earlier = made(other.sigmas, self.xs, changes=3)
        assert earlier.differences(other) == []  # what a version did not record
        ahead = made(self.sigmas, self.xs, changes=4)
        (said,) = ahead.differences(made(self.sigmas, self.xs, changes=3))
        assert said == "made by a later version: it knows 4 changes of numbers, this one 3"
        unknown = made(self.sigmas, self.xs, changes=None)
        assert Record.parse(unknown.text()) == unknown
        (said,) = unknown.differences(ahead)
        assert said.startswith("which changes of numbers lie between them is not known")


def test_numerics(tmp_path, monkeypatch):
    """The oldest first, whatever the order of versions; an entry is one line."""
    file = tmp_path / "CHANGELOG.md"
    monkeypatch.setattr(record, "CHANGELOG", file)
    assert record.numerics() is None
    file.write_text(
        "# Changelog\n\nAbout **numerics**.\n\n## 0.2.0\n\n- **numerics**: c\n- plain\n\n## 0.1.0\n\n"
        "- **numerics**: a\n  goes on\n- plain **numerics**\n- **numerics**: b\n"
    )
    assert record.numerics() == ["**numerics**: a goes on", "**numerics**: b", "**numerics**: c"]


def test_of_this_version():
    assert len(record.numerics()) >= 10


class TestReplay:
    @pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "avif"])
    def test_the_same(self, pipe, suffix, capsys):
        """Every format carries the record: the second of two pictures, by Euler with noise of its own."""
        out = pipe("red heart", steps=4, seed=3, batch_size=2, sampler="euler_ancestral", progress=False)
        out.save(f"heart.{suffix}")
        ((first, *_, last),) = out.records()[1].sigmas
        main(["replay", f"heart-2.{suffix}", "-o", f"again.{suffix}", "--quiet"])
        assert capsys.readouterr().out.splitlines()[-1] == "bitwise the same, in each of 4 steps"
        main(["info", f"again.{suffix}"])
        said = capsys.readouterr().out
        assert f"4 steps from {first:.4f} to {last:.4f}" in said and "float32" in said and torch.__version__ in said

    def test_sigmas_of_ones_own(self, pipe, capsys):
        pipe("red heart", sigmas=torch.tensor([10.1, 3.0, 1 / 3, 0.0]), progress=False).save("heart.png")
        main(["replay", "heart.png", "-o", "again.png", "--quiet"])
        assert "bitwise the same, in each of 3 steps" in capsys.readouterr().out

    def test_another(self, pipe, capsys, monkeypatch):
        """A net that is a thousandth off from the third evaluation on."""
        pipe("red heart", steps=4, progress=False).save("heart.png")
        forward, calls = UNet.forward, []

        def off(self, *args):
            calls.append(0)
            return forward(self, *args) * (1.001 if len(calls) > 2 else 1)

        monkeypatch.setattr(UNet, "forward", off)
        monkeypatch.setattr(record, "machine", lambda: {"torch": "of the future"})
        with pytest.raises(SystemExit) as stop:
            main(["replay", "heart.png", "-o", "again.png", "--quiet"])
        assert stop.value.code == 1
        said = capsys.readouterr().err
        assert "of the pixels' values, by up to" in said
        assert "the run left it         step 3, from sigma " in said
        assert f"torch: {torch.__version__} then, of the future now" in said

    def test_the_picture_alone(self, pipe, capsys):
        """The run was the same, the file was not: somebody has painted on it."""
        pipe("red heart", steps=2, progress=False).save("heart.png")
        image = Image.open("heart.png")
        text, ran = image.info["parameters"], read_record(image)
        image.putpixel((3, 4), (1, 2, 3))
        ldm.image.save(image, ldm.output.Path("heart.png"), text, force=True, record=ran)
        with pytest.raises(SystemExit):
            main(["replay", "heart.png", "-o", "again.png", "--quiet"])
        assert "the run left it         after the last step" in capsys.readouterr().err

    def test_an_edit(self, pipe, capsys):
        """Of two runs: 64 and 128 pixels."""
        pipe("red heart", steps=3, enlarge=2, strength=0.7, progress=False).save("heart.png")
        assert [len(run) for run in Record.parse(read_record(Image.open("heart.png"))).sigmas] == [4, 3]
        main(["replay", "heart.png", "-o", "again.png", "--quiet"])
        assert "bitwise the same, in each of 5 steps" in capsys.readouterr().out

    def test_without_a_record(self, pipe, capsys):
        """Where bytes are counted it is left out, as in pictures of earlier versions."""
        pipe("red heart", steps=2, progress=False).save("heart.png", max_bytes=20_000)
        assert read_record(Image.open("heart.png")) is None
        main(["replay", "heart.png", "-o", "again.png", "--quiet"])
        assert capsys.readouterr().out.splitlines()[-1] == "bitwise the same"


def test_what_a_callback_changes(pipe):
    """The marks are of x as the run went on from it."""
    plain = pipe("red heart", steps=2, progress=False)
    moved = pipe("red heart", steps=2, progress=False, callback=lambda step: step.x.mul_(1.5))
    (one,), (other,) = plain.records(), moved.records()
    assert one.left_by(other).step == 0 and one.left_by(other).relative == pytest.approx(0.5, rel=1e-3)


def test_a_sampler_that_counts_from_one(pipe):
    def from_one(denoise, x, sigmas, noise):
        for step in euler(denoise, x, sigmas, noise):
            yield step._replace(i=step.i + 1)

    (own,) = pipe("red heart", steps=2, sampler=from_one, progress=False).records()
    (known,) = pipe("red heart", steps=2, sampler="euler", progress=False).records()
    assert own.sigmas == known.sigmas and own.left_by(known) is None


class TestSettingsThatRan:
    """`out.settings`: everything that decides the pictures, which is what their files say."""

    def test_all_of_it_is_in_the_file(self, pipe):
        sigmas = pipe.schedule.sigmas(3, "karras")
        out = pipe("red heart", steps=3, sigmas="karras", seed=5, conventions="webui", eta=0.0, progress=False)
        (saved,) = out.save("heart.png")
        ran, (record,), said = out.settings.ran, out.records(), parse(read(saved))
        assert Record.parse(read_record(Image.open(saved))) == record
        assert ran.hash == record.nets["model"] == fingerprint(DEFAULT_MODEL) and len(ran.hash) == 10
        assert ran.sigmas == record.sigmas == [pytest.approx(sigmas.tolist())]
        assert ran.nets == {
            "dtype": "float32",
            "VAE dtype": "float32",
            "device": pipe.device.type,
            "prediction": pipe.prediction_type,
            "spacing": "karras",
        }
        assert record.nets == {"model": ran.hash, **ran.nets} and ran.machine == record.machine == machine()
        assert ran.machine["torch"] == torch.__version__ == said["torch"] and ran.machine["ldm"] == ldm.__version__
        s = out.settings
        wanted = ran.model, s.seeds[0], s.sampler_name, s.conventions, s.eta
        assert tuple(said[key] for key in ("model_name", "seed", "sampler", "conventions", "eta")) == wanted

    @pytest.mark.parametrize(("sampler", "spacing"), [("euler", "linspace"), ("ddim", "leading")])
    def test_what_nobody_said(self, pipe, sampler, spacing):
        ran = pipe("", steps=2, sampler=sampler, progress=False).settings.ran
        end = {"euler": 0.0, "ddim": pipe.schedule.sigma_min}[sampler]
        assert ran.nets["spacing"] == spacing and ran.sigmas == [pipe.schedule.sigmas(2, spacing, end=end).tolist()]

    def test_sigmas_of_ones_own(self, pipe):
        ran = pipe("", sigmas=torch.tensor([3.0, 1.0, 0.0]), progress=False).settings.ran
        assert ran.nets["spacing"] == "given" and ran.sigmas == [[3.0, 1.0, 0.0]]

    def test_files(self, tmp_path):
        model, vae = tmp_path / "model", tmp_path / "vae"
        shutil.copytree(DEFAULT_MODEL / "vae", vae)
        model.symlink_to(DEFAULT_MODEL)
        pipe = ldm.Pipeline.from_pretrained(model, vae=vae, dtype=torch.bfloat16)
        to_q = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
        width = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q.in_features
        parts = {f"{to_q}.lora_down.weight": torch.randn(4, width), f"{to_q}.lora_up.weight": torch.randn(width, 4)}
        save_file(parts, tmp_path / "style.safetensors")
        pipe.load_lora(tmp_path / "style.safetensors", 0.5)
        out = pipe("", steps=1, progress=False)
        ran, (text,) = out.settings.ran, out.texts()
        assert ran.options["lora"] == [(tmp_path / "style.safetensors", 0.5)] and ran.nets["dtype"] == "bfloat16"
        assert ran.files == {str(path): fingerprint(path) for path in (vae, tmp_path / "style.safetensors")}
        assert parse(text)["files"] == {str(model): ran.hash, **ran.files}

    def test_run_again(self, pipe):
        """They are the settings of the call; changed ones have not run."""
        out = pipe("red heart", steps=2, seed=3, progress=False)
        again = pipe.run(out.settings, progress=False)
        assert torch.equal(again.latents, out.latents) and again.settings.ran == out.settings.ran
        assert replace(out.settings, seed=4).ran is None and ldm.Settings().ran is None
        asked = ldm.Settings("red heart", steps=2)
        assert pipe.run(asked, progress=False).settings.ran is not None and asked.ran is None

    def test_nothing_is_read_before_it_is_looked_at(self, pipe, monkeypatch):
        read = []
        monkeypatch.setattr(record, "known", lambda *model: read.append(model) or "hash")
        ran = pipe("", steps=1, progress=False).settings.ran
        assert not read and ran.hash == "hash" and len(read) == 1

    def test_another_file_has_another_hash(self, tmp_path):
        shutil.copytree(DEFAULT_MODEL, tmp_path / "model")
        pipe = ldm.Pipeline.from_pretrained(tmp_path / "model")
        first = pipe("", steps=1, progress=False).settings.ran.hash
        assert first == fingerprint(DEFAULT_MODEL)
        file = tmp_path / "model/text_encoder/model.safetensors"
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
        assert pipe("", steps=1, progress=False).settings.ran.hash != first

    def test_a_pipeline_of_ones_own(self, pipe):
        parts = (pipe.unet, pipe.vae, pipe.text_encoder, pipe.tokenizer, pipe.schedule)
        out = ldm.Pipeline(*parts, name="mine", size=64)("", steps=1, progress=False)
        assert (out.settings.ran.model, out.settings.ran.hash) == ("mine", None)
        assert "model" not in out.records()[0].nets
