"""The default model's captions, nets, trainings and files, with made-up pictures and small nets."""

import itertools
import json
import logging
import os
import re
import signal
from collections import Counter
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file

from ldm import checkpoint, save
from ldm.clip import TextConfig, TextEncoder
from ldm.clip.tokenizer import Tokenizer, byte_alphabet
from ldm.pipeline import Pipeline
from ldm.samplers.schedule import Schedule
from ldm.train import captions, data, decoder, diffusion, emoji, evaluate, export, loop, state, text, vae
from ldm.train.plot import plot
from ldm.unet import UNetConfig
from ldm.vae import VAE, VAEConfig
from ldm.vae.vae import Gaussian

STYLES = ("noto", "blob", "fluent 3d")
CAT = {"label": "big cat", "style": "noto", "tags": ["pet", "fur", "paw", "tail"], "colors": [["orange", 0.8]]}
ARBITRARY = (
    "Café NAÏVE über Ångström e\u0301",
    "❤️ 🧑‍🚀 I'm 🎉🎉!!",
    "don't they've 12,345 o'clock... (really?)",
    "日本語 и кириллица",
    "",
    "  two   spaces\n",
)


class TestDrawCaption:
    def shares(self, meta, count=10_000):
        generator = torch.Generator().manual_seed(0)
        return {c: n / count for c, n in Counter(captions.draw_caption(meta, generator) for _ in range(count)).items()}

    def test_shares(self):
        """Each within five standard deviations, sqrt(p (1 - p) / 10,000)."""
        shares = self.shares(CAT)
        expected = {
            "": 0.1,
            "big cat, noto style": 0.45,
            "big cat": 0.0675,
            "a big cat": 0.0675,
            "a noto style emoji of big cat": 0.135,
            "orange big cat, noto style": 0.045,
        }
        some = (tags for k in (1, 2, 3) for tags in itertools.permutations(CAT["tags"], k))
        tagged = {f"big cat, {', '.join(tags)}, noto style": len(tags) for tags in some}
        assert shares.keys() == expected.keys() | tagged.keys()  # so no other style, and no style where none is said
        for k in (1, 2, 3):
            expected[k] = 0.045
            shares[k] = sum(shares[c] for c, n in tagged.items() if n == k)
        for form, share in expected.items():
            assert abs(shares[form] - share) < 5 * (share * (1 - share) / 10_000) ** 0.5, form

    @pytest.mark.parametrize(
        ("change", "share"),
        [
            ({"tags": []}, 0.585),
            ({"colors": []}, 0.495),
            ({"colors": [["orange", 0.6], ["red", 0.4]]}, 0.495),
            ({"colors": [["cat", 0.9]]}, 0.495),
        ],
    )
    def test_what_is_not_known_is_not_said(self, change, share):
        """Without tags, without a colour, without a main colour, with one that the label says."""
        shares = self.shares(CAT | change)
        assert abs(shares["big cat, noto style"] - share) < 5 * (share * (1 - share) / 10_000) ** 0.5
        assert not any(re.match("orange|cat ", c) for c in shares) or change == {"tags": []}

    def test_background(self):
        assert captions.on_background("a cat", "blue") == "a cat, blue background"
        assert captions.on_background("a cat", "white") == "a cat"
        assert captions.on_background("", "blue") == ""


def made_up_words(count):
    random = np.random.default_rng(0)
    letters = [list("bcdfghklmnprstvz"), list("aeiouäé")]
    return ["".join(str(random.choice(letters[i % 2])) for i in range(random.integers(4, 9))) for _ in range(count)]


class TestVocabulary:
    METAS = tuple(
        {"label": f"{a} {b}", "style": STYLES[i % 3], "tags": [b, c]}
        for i, (a, b, c) in enumerate(np.reshape(made_up_words(3600), (-1, 3)).tolist())
    )

    @pytest.fixture(scope="class")
    @classmethod
    def folder(cls, tmp_path_factory):
        folder = tmp_path_factory.mktemp("words") / "tokenizer"
        captions.train_vocabulary(cls.METAS, folder)
        return folder

    def test_layout(self, folder):
        vocab = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
        assert len(vocab) == captions.VOCABULARY
        assert list(vocab.values()) == list(range(captions.VOCABULARY))
        tokens = list(vocab)
        alphabet = byte_alphabet()
        assert len(alphabet) == 256
        assert set(tokens[:256]) == set(alphabet)
        assert set(tokens[256:512]) == {c + "</w>" for c in alphabet}
        assert tokens[-2:] == ["<|startoftext|>", "<|endoftext|>"]
        assert {"style</w>", "background</w>"} < set(tokens)  # it has learnt
        assert sorted(f.name for f in folder.iterdir()) == ["merges.txt", "tokenizer_config.json", "vocab.json"]

    @pytest.mark.filterwarnings("ignore:the prompt has .* tokens")
    def test_the_same_ids_as_transformers(self, folder):
        ours = Tokenizer.from_files(folder / "vocab.json", folder / "merges.txt", length=captions.LENGTH)
        theirs = transformers.CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        texts = [*ARBITRARY, *captions.corpus(self.METAS), *(captions.caption(m).title() for m in self.METAS)]
        expected = theirs(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
        assert expected.shape == (len(texts), captions.LENGTH)
        torch.testing.assert_close(ours(texts), expected, rtol=0, atol=0)
        assert (ours.begin, ours.end, ours.pad) == (4094, 4095, 4095)

    def test_too_few_words(self, tmp_path):
        with pytest.raises(ValueError, match=r"the captions give \d+ of the 4096 tokens"):
            captions.train_vocabulary(self.METAS[:10], tmp_path / "tokenizer")
        assert not list(tmp_path.iterdir())


PICTURES, BATCH = 14, 4  # the last two are not for training


@pytest.fixture
def small(monkeypatch):
    """Nets of a few thousand parameters, a vocabulary of 600."""
    monkeypatch.setattr(captions, "VOCABULARY", 600)
    monkeypatch.setattr(vae, "CONFIG", VAEConfig(channels=(8, 8, 16), layers=1, groups=4, scaling_factor=1.0))
    unet = UNetConfig(channels=(16, 32), layers=1, depth=(0, 1), heads=2, context_width=32, groups=8)
    monkeypatch.setattr(diffusion, "UNET", unet)
    words = TextConfig(vocab_size=600, length=captions.LENGTH, width=32, layers=2, heads=2, end_token=599)
    monkeypatch.setattr(diffusion, "TEXT", words)
    monkeypatch.setattr(diffusion, "train_text", partial(text.train_text, steps=4, batch=BATCH))


@pytest.fixture(scope="module")
def meta():
    splits = ["train"] * (PICTURES - 2) + ["test_pair", "test_concept"]
    words = made_up_words(PICTURES)
    return [
        {"hex": f"{i:x}", "label": words[i], "style": STYLES[i % 3], "tags": ["thing"], "colors": [], "split": split}
        for i, split in enumerate(splits)
    ]


@pytest.fixture(scope="module")
def file(meta, tmp_path_factory):
    file = tmp_path_factory.mktemp("data") / "pictures.npz"
    coarse = np.random.default_rng(0).integers(0, 256, (PICTURES, 8, 8, 4), dtype=np.uint8)
    emoji.write(file, coarse.repeat(8, axis=1).repeat(8, axis=2), json.dumps(meta))
    return file


@pytest.fixture
def tokenizer(small, meta, tmp_path):
    captions.train_vocabulary(meta, tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


def losses(folder):
    return [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]


def assert_equal(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert ours[name].dtype == value.dtype
        assert torch.equal(ours[name], value), name


@pytest.fixture
def no_step_is_run(monkeypatch):
    """A call that trains after calling this is an error."""
    return lambda: monkeypatch.setattr(loop, "learning_rate", lambda *_: pytest.fail("a step was run"))


class TestTrainings:
    def test_vae(self, small, file, tmp_path, no_step_is_run):
        train = partial(vae.train_vae, file, tmp_path, steps=24, batch=BATCH, lr=0.1)
        net = train()
        assert len(losses(tmp_path)) == 24
        assert np.mean(losses(tmp_path)[-6:]) < 0.8 * np.mean(losses(tmp_path)[:6])
        no_step_is_run()
        assert_equal(train().state_dict(), net.state_dict())
        assert len(losses(tmp_path)) == 24

    def test_text(self, small, tokenizer, meta, tmp_path, no_step_is_run):
        words = Tokenizer.from_files(tokenizer / "vocab.json", tokenizer / "merges.txt", length=captions.LENGTH)
        latents = 1 + 0.1 * torch.randn(PICTURES, 4, 2, 2)

        def train():
            net = TextEncoder(diffusion.TEXT)
            return text.train_text(net, words, meta, latents, tmp_path, steps=20, batch=BATCH, lr=0.1)

        net = train()
        assert losses(tmp_path)[-1] < 0.5 * losses(tmp_path)[0]
        no_step_is_run()
        assert_equal(train().state_dict(), net.state_dict())
        assert len(losses(tmp_path)) == 20

    def test_diffusion(self, small, file, meta, tmp_path, monkeypatch, no_step_is_run):
        torch.manual_seed(1)
        autoencoder = VAE(vae.CONFIG).requires_grad_(False)
        train = partial(diffusion.train_diffusion, file, autoencoder, steps=6, batch=BATCH)
        nets = train(tmp_path / "whole")
        names = {"tokenizer", "text", "latents.pt", state.paths(tmp_path / "whole")[-1].name, "log.jsonl"}
        assert {f.name for f in (tmp_path / "whole").iterdir()} == names
        latents = torch.load(tmp_path / "whole" / "latents.pt", weights_only=True)
        assert latents["mean"].shape == latents["std"].shape == (2 * (PICTURES - 2), 4, 16, 16)
        assert len(latents["colours"]) == PICTURES - 2
        assert latents["scaling_factor"] > 0
        assert len(losses(tmp_path / "whole" / "text")) == 4
        assert len(losses(tmp_path / "whole")) == 6

        draw, calls = captions.draw_caption, itertools.count(1)

        def draw_and_stop(*arguments):  # in the second step of the text encoder, then in the third of the diffusion
            if next(calls) in (2 * BATCH, 4 * BATCH + 3 * BATCH):
                os.kill(os.getpid(), signal.SIGTERM)
            return draw(*arguments)

        monkeypatch.setattr(captions, "draw_caption", draw_and_stop)
        for stopped, steps in (("stopped/text", 2), ("stopped", 3)):
            with pytest.raises(KeyboardInterrupt):
                train(tmp_path / "stopped")
            assert len(losses(tmp_path / stopped)) == steps
        assert_equal(train(tmp_path / "stopped").state_dict(), nets.state_dict())
        for part in (".", "text"):
            assert losses(tmp_path / "stopped" / part) == losses(tmp_path / "whole" / part)
        no_step_is_run()
        assert_equal(train(tmp_path / "whole").state_dict(), nets.state_dict())


class TestDecoder:
    @pytest.fixture
    def pipe(self, small, tokenizer):
        torch.manual_seed(3)
        nets, autoencoder = diffusion.Nets(), VAE(replace(vae.CONFIG, scaling_factor=0.7))
        words = Tokenizer.from_files(tokenizer / "vocab.json", tokenizer / "merges.txt", length=captions.LENGTH)
        parts = (nets.unet, autoencoder, nets.text_encoder, words)
        for net in (nets, autoencoder):
            net.requires_grad_(False)
        return Pipeline(*parts, Schedule(), "v_prediction", size=64)

    def test_what_it_learns_from(self, pipe, file, meta):
        """Latents that were noised by little are near to what they were; a net that says nothing leaves the noise."""
        found = decoder.drawn_again(pipe, file, 1.0, batch=4)
        rgba = np.load(file)["images"][: PICTURES - 2]
        mean, std = pipe.vae.encode(data.to_tensor(data.composite(rgba)))
        for name, value in (("mean", mean), ("std", std)):
            torch.testing.assert_close(found[name].float(), value, rtol=1e-3, atol=1e-3)
        assert found["drawn"].shape == mean.shape
        torch.nn.init.zeros_(pipe.unet.conv_out.weight)
        torch.nn.init.zeros_(pipe.unet.conv_out.bias)
        silent = decoder.drawn_again(pipe, file, 1.0, batch=4)
        sigma = pipe.schedule.sigmas(decoder.STEPS, "leading")[-1 - decoder.LAST[0]]
        # v = 0 is x0 = x / (1 + sigma^2): from sigma to 0 the ODE divides x by sqrt(1 + sigma^2); Euler nearly so.
        noise = torch.randn(4, 4, 16, 16, generator=loop.step_generator(0, 0))
        expected = (mean[:4] + sigma * noise / 0.7) / (1 + sigma**2).sqrt()
        torch.testing.assert_close(silent["drawn"][:4].float(), expected.float(), rtol=0.05, atol=0.05)

    def test_sparse(self):
        """By hand: one pixel of 4 is 3 grey levels off, and 2 of the 4 differences with it. Past white is white."""
        image = torch.tensor([[[[0.0, 0.0], [0.0, 1.0]]]])
        out = image.clone()
        out[..., 0, 0] += 3 * decoder.LEVEL
        out[..., 1, 1] += 1
        expected = np.log(4) * (1 / 4 + 3 * 1 / 2 + 3 * 1 / 2)
        assert float(decoder.sparse(out, image)) == pytest.approx(expected, rel=1e-6)

    def test_either_but_not_the_mean(self):
        """Two pictures for one latent: the squared error is least between them, this at one of the two."""
        images = torch.stack([torch.zeros(3, 4, 4), torch.full((3, 4, 4), 0.5)])
        losses = [
            float(decoder.sparse(torch.full((2, 3, 4, 4), value), images)) for value in (0.0, 0.125, 0.25, 0.375, 0.5)
        ]
        assert losses[0] == pytest.approx(losses[4], rel=1e-6) and max(losses) == losses[2]

    def test_ground(self, pipe, file, monkeypatch):
        """Every second batch on a colour, which its captions name; the picture of the latents stands on it."""
        monkeypatch.setattr(decoder, "COLOURED", 2)
        said, settings = [], decoder.Settings
        monkeypatch.setattr(decoder, "Settings", lambda texts, **how: said.append(texts) or settings(texts, **how))
        found = decoder.drawn_again(pipe, file, 1.0, batch=4)
        assert found["ground"][:4].unique().tolist() == [255]
        colour = next(name for name in data.BACKGROUNDS if name != "white")
        assert found["ground"][4:8].flatten(0, 2).tolist() == [list(data.BACKGROUNDS[colour])] * 4
        assert all(text.endswith(f", {colour} background") for text in said[1])
        assert not any("background" in text for text in said[0])
        rgba = np.load(file)["images"][4:8]
        mean = pipe.vae.encode(data.to_tensor(data.composite(rgba, data.BACKGROUNDS[colour]))).mean
        torch.testing.assert_close(found["mean"][4:8].float(), mean, rtol=1e-3, atol=1e-3)

    def test_training(self, pipe, file, tmp_path, no_step_is_run):
        before = {name: value.clone() for name, value in pipe.vae.state_dict().items()}
        train = partial(decoder.train_decoder, file, pipe, tmp_path / "run", steps=24, batch=BATCH, lr=0.02)
        after = {name: value.clone() for name, value in train().state_dict().items()}
        changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
        assert changed == {"decoder", "post_quant_conv"}
        no_step_is_run()
        pipe.vae.load_state_dict(before)
        assert_equal(train().state_dict(), after)


def test_timesteps():
    """At first the later the likelier, then one half of them, then a quarter; within five standard deviations."""
    phases = {0: lambda t: t**2, 2500: lambda t: (t**2 + t) / 2, 9000: lambda t: t**2 / 4 + 0.75 * t**0.5}
    for step, below in phases.items():
        t = diffusion.draw_t(20_000, step, torch.Generator().manual_seed(step))
        assert t.min() >= 0 and t.max() == 999
        for share in (0.1, 0.5, 0.9):
            p = below(share)
            assert abs((t < 1000 * share).double().mean() - p) < 5 * (p * (1 - p) / 20_000) ** 0.5


class TestExport:
    @pytest.fixture
    def parts(self, small):
        torch.manual_seed(2)
        nets = diffusion.Nets()
        autoencoder = VAE(VAEConfig(channels=(8, 8, 16), layers=1, groups=4, scaling_factor=0.7))
        return {"unet": nets.unet, "vae": autoencoder, "text_encoder": nets.text_encoder}

    @pytest.fixture
    def model(self, parts, tokenizer, tmp_path):
        export.export(**parts, tokenizer=tokenizer, folder=tmp_path / "model")
        return tmp_path / "model"

    def test_ours(self, parts, model, tokenizer):
        loaded = checkpoint.load(model)
        for name, net in parts.items():
            assert_equal(getattr(loaded, name).state_dict(), {k: v.half() for k, v in net.state_dict().items()})
            assert getattr(loaded, name).config == net.config
        assert loaded.scheduler["prediction_type"] == "v_prediction"
        assert loaded.size == 64
        assert loaded.tokenizer.length == captions.LENGTH
        words = Tokenizer.from_files(tokenizer / "vocab.json", tokenizer / "merges.txt", length=captions.LENGTH)
        assert torch.equal(loaded.tokenizer(ARBITRARY[0]), words(ARBITRARY[0]))

    def diffusers_loads(self, model):
        return diffusers.StableDiffusionPipeline.from_pretrained(model, dtype=torch.float16, local_files_only=True)

    @pytest.fixture
    def complaints(self, caplog):
        """What diffusers and transformers log at WARNING or above, but for what they say of packages that are not here.

        Their loggers keep it from pytest.
        """
        loggers = [logging.getLogger(name) for name in ("diffusers", "transformers")]
        for logger in loggers:
            logger.addHandler(caplog.handler)
        packages = "transformers.utils.import_utils"
        yield lambda: [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING and r.name != packages]
        for logger in loggers:
            logger.removeHandler(caplog.handler)

    def test_diffusers(self, parts, model, complaints):
        pipe = self.diffusers_loads(model)
        assert complaints() == []
        for name, net in parts.items():
            theirs = {k.removeprefix("text_model."): v for k, v in getattr(pipe, name).state_dict().items()}
            ours = {k.removeprefix("text_model."): v.half() for k, v in net.state_dict().items()}
            assert_equal(theirs, ours)
        assert pipe.vae.config.scaling_factor == 0.7
        assert pipe.scheduler.config.prediction_type == "v_prediction"

    @pytest.mark.parametrize(
        "weights", ["unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model"]
    )
    def test_diffusers_would_complain(self, weights, model, complaints):
        """That the test before can fail."""
        file = model / f"{weights}.safetensors"
        tensors = load_file(file)
        name = max(tensors)
        tensors["other"] = tensors.pop(name)
        save.save_file(tensors, file, metadata={"format": "pt"})
        self.diffusers_loads(model)
        assert any(name.removeprefix("text_model.") in complaint for complaint in complaints())

    def test_all_or_nothing(self, parts, tokenizer, model, monkeypatch):
        files = {f: f.read_bytes() for f in model.rglob("*") if f.is_file()}
        save_file, calls = save.save_file, itertools.count(1)

        def fail_late(*arguments, **options):
            if next(calls) == 3:
                raise OSError("disk full")
            save_file(*arguments, **options)

        with torch.no_grad():
            parts["unet"].conv_in.weight += 1
        with monkeypatch.context() as patch:
            patch.setattr(save, "save_file", fail_late)
            with pytest.raises(OSError, match="disk full"):
                export.export(**parts, tokenizer=tokenizer, folder=model)
        assert files == {f: f.read_bytes() for f in model.rglob("*") if f.is_file()}
        assert {f.name for f in model.parent.iterdir()} == {"model", "tokenizer"}

        (model / "unet" / "stale.json").write_text("{}")
        export.export(**parts, tokenizer=tokenizer, folder=model)
        assert {f for f in model.rglob("*") if f.is_file()} == files.keys()
        assert torch.equal(checkpoint.load(model).unet.conv_in.weight, parts["unet"].conv_in.weight.half())
        assert {f.name for f in model.parent.iterdir()} == {"model", "tokenizer"}

    def test_a_folder_of_something_else_is_left_alone(self, parts, tokenizer, tmp_path):
        (tmp_path / "home").mkdir()
        (tmp_path / "home" / "thesis.tex").write_text("...")
        with pytest.raises(FileExistsError, match=r"home is in the way: it has files and no model_index\.json"):
            export.export(**parts, tokenizer=tokenizer, folder=tmp_path / "home")
        assert [f.name for f in (tmp_path / "home").iterdir()] == ["thesis.tex"]


class TestEvaluate:
    def test_one_concept_in_one_style_alone(self, tmp_path, monkeypatch):
        """Concept 0 is drawn in the first style alone, the three others in all; the judge is not asked for it."""
        drawn = [(0, STYLES[0]), *itertools.product((1, 2, 3), STYLES)]
        splits = ["train"] * len(drawn)
        drawn += [(4, STYLES[1]), (5, STYLES[2])]
        splits += ["test_attribute", "test_concept"]
        drawn.append((6, STYLES[0]))
        splits.append("test_pair")
        random = np.random.default_rng(0)
        images = random.integers(0, 256, (len(drawn), 64, 64, 4), dtype=np.uint8)
        meta = [
            {"hex": f"{concept}", "label": f"thing {concept}", "style": style, "tags": [], "split": split}
            for (concept, style), split in zip(drawn, splits, strict=True)
        ]
        emoji.write(tmp_path / "d.npz", images, json.dumps(meta))
        asked = []

        class Judge:
            concepts, styles = dict.fromkeys(range(7)), dict.fromkeys(STYLES)

            def __init__(self, file):
                pass

            def score(self, pictures, wanted):
                assert len(pictures) == len(wanted)
                asked.append(wanted)
                return dict.fromkeys(("concept_top1", "concept_top5", "others_top5", "style", "both"), 0.0)

        blank = Image.new("RGB", (64, 64))
        autoencoder = SimpleNamespace(
            post_quant_conv=SimpleNamespace(weight=torch.zeros(1)),
            encode=lambda x: Gaussian(x, x),
            decode=lambda z: z + 16 / 255,
        )

        class Pipe:
            vae = autoencoder

            def __call__(self, prompts, **_):
                return SimpleNamespace(images=[blank] * len(prompts))

        monkeypatch.setattr(evaluate.Pipeline, "from_pretrained", lambda folder: Pipe())
        monkeypatch.setattr(evaluate, "Judge", Judge)
        report = evaluate.evaluate(None, tmp_path / "d.npz")
        assert report["vae"].keys() == {"test_attribute", "test_concept", "test_pair"}
        assert "the concept in another style" in report["seen pairs"]
        assert "the concept in another style" not in report["held-out attributes"]
        model, real, through_vae, copied, _ = asked[:5]
        assert model == real == through_vae
        assert copied == [pair for pair in real if pair[0] != "0"]
        assert len(copied) == 9
        assert report["seen pairs"]["count"] == 10

    def test_loss_curve_is_the_mean_of_each_20(self, tmp_path, monkeypatch):
        from matplotlib.axes import Axes

        rows = [{"step": k, "loss": float(k), "lr": 1e-3} for k in range(1, 51)]
        (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        drawn = []
        monkeypatch.setattr(Axes, "plot", lambda self, x, y, *_, **__: drawn.append((list(x), list(y))))
        plot({"VAE": tmp_path}, tmp_path / "loss.png")
        assert drawn == [([20, 40, 60], [10.5, 30.5, 45.5]), (list(range(1, 51)), [1e-3] * 50)]
