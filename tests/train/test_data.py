"""The data set, what is measured on it and what is seen of a training, with made-up pictures and without a network."""

import base64
import gzip
import hashlib
import io
import itertools
import json
import re
import sys
import tarfile
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import gaussian_filter
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ldm.train import curves, data, emoji, evaluate, metrics
from ldm.train.captions import caption
from ldm.train.judge import Judge, squared_distances, thumbnails
from ldm.train.judge import cell_features as judge_features
from ldm.train.plot import plot, read_log
from ldm.train.watch import grids, tensorboard
from ldm.vae.vae import Gaussian

STYLES = {"red": (220, 30, 30), "green": (30, 160, 30), "blue": (30, 30, 220), "grey": (128, 128, 128)}
CONCEPTS, HELD_OUT = 24, 4  # the last four concepts are in no training picture
STRAY = (22, "red")  # this picture shows something else
STRAY_IS_LOST = {"red": 0, "green": 1, "blue": 1, "grey": 1}


@pytest.fixture(scope="module")
def rows():
    """RGBA pictures and captions: a concept is a pattern of 8x8 cells, a style its colour."""
    random = np.random.default_rng(0)
    images, meta = [], []
    for c in range(CONCEPTS):
        pattern = random.random((8, 8)) < 0.5
        for s, (style, colour) in enumerate(STYLES.items()):
            cells = random.random((8, 8)) < 0.5 if (c, style) == STRAY else pattern
            cells = cells ^ (random.random((8, 8)) < 0.05)  # no two drawings are the same
            picture = np.empty((64, 64, 4), np.uint8)
            picture[..., :3] = np.clip(colour + random.normal(0, 8, (64, 64, 3)), 0, 255)
            picture[..., 3] = 255 * np.kron(cells, np.ones((8, 8), np.uint8))
            images.append(picture)
            split = "test_attribute" if c >= CONCEPTS - HELD_OUT else "test_pair" if s == c % 7 else "train"
            meta.append({"hex": f"{c:04x}", "label": f"thing {c}", "style": style, "split": split, "tags": []})
    return np.stack(images), meta


@pytest.fixture(scope="module")
def file(rows, tmp_path_factory):
    file = tmp_path_factory.mktemp("data") / "data.npz"
    emoji.write(file, rows[0], json.dumps(rows[1]))
    return file


@pytest.fixture(scope="module")
def judge(file):
    return Judge(file)


def of_split(meta, split):
    return [i for i, m in enumerate(meta) if m["split"] == split]


def pairs(meta, chosen):
    return [(meta[i]["hex"], meta[i]["style"]) for i in chosen]


class TestJudge:
    def test_finds_planted_concepts_and_styles_that_it_was_not_fitted_on(self, judge, rows):
        images, meta = data.composite(rows[0]), rows[1]
        for split in ("test_pair", "test_attribute"):
            chosen = [i for i in of_split(meta, split) if (int(meta[i]["hex"], 16), meta[i]["style"]) != STRAY]
            assert judge.score(images[chosen], pairs(meta, chosen)) == dict.fromkeys(
                ("concept_top1", "concept_top5", "others_top5", "style", "both"), 1.0
            )

    def test_wrong_concept_or_wrong_style_counts_as_such(self, judge, rows):
        images, meta = data.composite(rows[0]), rows[1]
        chosen = of_split(meta, "test_pair")
        other_style = [(concept, {"red": "green"}.get(style, "red")) for concept, style in pairs(meta, chosen)]
        score = judge.score(images[chosen], other_style)
        assert (score["concept_top1"], score["style"], score["both"]) == (1, 0, 0)
        nobody = [("ffff", style) for _, style in pairs(meta, chosen)]
        score = judge.score(images[chosen], nobody)
        assert (score["concept_top5"], score["style"], score["both"]) == (0, 1, 0)

    def test_others_leave_out_the_picture_itself(self, judge, rows):
        images, meta = data.composite(rows[0]), rows[1]
        drawings = [i for i, m in enumerate(meta) if int(m["hex"], 16) == STRAY[0]]
        scores = {meta[i]["style"]: judge.score(images[[i]], pairs(meta, [i])) for i in drawings}
        assert {style: score["others_top5"] for style, score in scores.items()} == STRAY_IS_LOST
        assert all(score["concept_top5"] == 1 for score in scores.values())  # its own drawing is in the mean

    def test_held_out_concepts_are_no_choice_where_nobody_asked_for_one(self, judge, rows):
        images, meta = data.composite(rows[0]), rows[1]
        picture = images[of_split(meta, "test_attribute")[:1]]
        trained = [(f"{c:04x}", "red") for c in range(CONCEPTS - HELD_OUT)]
        found = [judge.score(picture, [pair])["concept_top1"] for pair in trained]
        assert sum(found) == 1  # the nearest of the others

    def test_the_pictures_left_out_are_those_of_the_pair(self, judge, rows):
        concept = judge.concepts["0003"]
        mine = [judge.pictures["0003", style] for style in STYLES if ("0003", style) in judge.pictures]
        assert len(mine) == judge.counts[concept] == 3  # of four styles one is in test_pair
        np.testing.assert_allclose(np.mean(mine, axis=0), judge.means[concept], rtol=1e-4, atol=1e-4)
        style = next(style for style in STYLES if ("0003", style) in judge.pictures)  # that of the first of them
        others = judge.others(concept, ("0003", style))
        np.testing.assert_allclose(np.mean(mine[1:], axis=0), others, rtol=1e-4, atol=1e-4)

    def test_unknown_style_is_an_error(self, judge):
        with pytest.raises(ValueError, match=r"unknown styles \['oil'\].*'blue'"):
            judge.score(np.zeros((1, 64, 64, 3), np.uint8), [("0000", "oil")])

    def test_squared_distances(self):
        a, b = np.random.default_rng(0).random((3, 5)), np.random.default_rng(1).random((4, 5))
        np.testing.assert_allclose(squared_distances(a, b), ((a[:, None] - b) ** 2).sum(-1), rtol=1e-12)

    def test_thumbnails(self):
        image = np.arange(64 * 64 * 3).reshape(1, 64, 64, 3).astype(np.uint8)
        small = thumbnails(image).reshape(16, 16, 3)
        assert small[2, 3, 1] == pytest.approx(image[0, 8:12, 12:16, 1].mean() / 255)


class Pipe:
    """Stands in for a pipeline: paints by `picture(caption)`; the VAE returns its input plus 8/255."""

    def __init__(self, picture):
        self.picture, self.calls = picture, []
        self.vae = SimpleNamespace(
            post_quant_conv=SimpleNamespace(weight=data.to_tensor(np.zeros((1, 1, 1, 3), np.uint8))),
            encode=lambda x: Gaussian(x, x),
            decode=lambda z: z + 16 / 255,
        )

    def __call__(self, prompts, *, seed, steps, progress, guidance_scale=7.5):
        self.calls.append((prompts, seed, steps, guidance_scale, progress))
        return SimpleNamespace(images=[Image.fromarray(self.picture(prompt)) for prompt in prompts])


@pytest.fixture
def run(file, monkeypatch, capsys):
    def run(picture, **options):
        pipe = Pipe(picture)
        monkeypatch.setattr(evaluate.Pipeline, "from_pretrained", lambda folder: pipe)
        report = evaluate.evaluate(None, file, **options)
        return report, pipe, capsys.readouterr().out

    return run


class TestEvaluate:
    def test_the_truth_scores_the_ceiling(self, run, rows):
        images, meta = data.composite(rows[0]), rows[1]
        truth = {caption(m): image for image, m in zip(images, meta, strict=True)}
        report, _, printed = run(truth.__getitem__)
        for kind in evaluate.PROMPTS:
            assert report[kind]["the model"] == report[kind]["real pictures (ceiling)"]
            assert report[kind]["the model"]["style"] == 1
            assert f"| {kind} ({report[kind]['count']}) | the model |" in printed
            assert report[kind]["the model"]["both"] == 1
        others = [report[kind]["the model"]["others_top5"] for kind in evaluate.PROMPTS]
        assert others == [1, 1, pytest.approx(15 / 16)]  # all but the stray
        assert report["seen pairs"]["the model"]["nearer_than_0.0007"] == 1  # they are training pictures
        assert report["held-out pairs"]["the model"]["nearer_than_0.002"] == 0  # these are not

    def test_noise_scores_the_floor(self, run):
        random = np.random.default_rng(0)
        report, _, _ = run(lambda prompt: random.integers(0, 256, (64, 64, 3), dtype=np.uint8))
        floor = report["seen pairs"]["chance"]
        assert floor["concept_top1"] == 1 / CONCEPTS
        assert floor["both"] == 5 / CONCEPTS / 4
        assert report["seen pairs"]["the model"]["concept_top1"] < 3 * floor["concept_top1"]
        assert report["seen pairs"]["the model"]["both"] < 2 * floor["both"]
        assert report["seen pairs"]["the model"]["nearer_than_0.002"] == 0

    def test_near_copies(self, run, rows):
        truth = {caption(m): image for image, m in zip(data.composite(rows[0]), rows[1], strict=True)}

        def shifted(prompt):  # every value by 9, which is an MSE of .00125
            image = truth[prompt]
            return np.where(image < 247, image + 9, image - 9).astype(np.uint8)

        model = run(shifted)[0]["seen pairs"]["the model"]
        assert (model["nearer_than_0.0007"], model["nearer_than_0.002"]) == (0, 1)

    def test_cheats(self, run):
        report, _, _ = run(lambda prompt: np.zeros((64, 64, 3), np.uint8))
        for kind in ("seen pairs", "held-out pairs"):
            copied, stray = report[kind]["the concept in another style"], report[kind]["any picture in the style"]
            assert copied["concept_top1"] > 0.9
            assert copied["style"] == copied["both"] == 0
            assert stray["style"] == 1
            assert stray["concept_top1"] < 0.25
        assert "the concept in another style" not in report["held-out attributes"]  # no style of it was trained on

    def test_vae(self, run, rows):
        report, _, printed = run(lambda prompt: np.zeros((64, 64, 3), np.uint8))
        for split, measured in report["vae"].items():
            real = data.composite(rows[0][of_split(rows[1], split)]).astype(float)
            mse = ((np.minimum(real + 8, 255) - real) ** 2).mean((1, 2, 3))
            assert measured["psnr"] == pytest.approx((10 * np.log10(255**2 / mse)).mean(), rel=1e-6)
            assert 0.9 < measured["ssim"] < 1
            assert f"| {split} | {measured['psnr']:.1f} dB | {measured['ssim']:.3f} |" in printed

    def test_distances(self, run, rows):
        """Where every prompt gives one picture, two seeds are not apart; the truth is nearer than noise."""
        truth = {caption(m): image for image, m in zip(data.composite(rows[0]), rows[1], strict=True)}
        report = run(truth.__getitem__)[0]
        assert report["apart"]["two seeds of a prompt"] == dict.fromkeys(evaluate.PROMPTS, 0)
        assert report["apart"]["two prompts"]["seen pairs"] > 0.05
        assert report["apart"]["two real drawings of a concept"].keys() == {"seen pairs", "held-out pairs"}
        assert report["kid"].keys() == {"the model", "training pictures in the same styles (floor)"}
        assert report["kid"]["the model"] < 0  # unbiased: below 0 for the same pictures
        random = np.random.default_rng(0)
        noise = run(lambda prompt: random.integers(0, 256, (64, 64, 3), dtype=np.uint8))[0]
        assert noise["kid"]["the model"] > 10 * abs(report["kid"]["training pictures in the same styles (floor)"])
        assert noise["apart"]["two seeds of a prompt"]["seen pairs"] > 0.005

    def test_calls(self, run):
        _, pipe, _ = run(lambda prompt: np.zeros((64, 64, 3), np.uint8), count=66, steps=3, guidance_scale=2.0, seed=9)
        sizes = [len(prompts) for prompts, *_ in pipe.calls]
        assert sizes == [64, 2, 64, 2, 12, 12, 16, 16]  # seen pairs, held-out pairs, 4 concepts of 4 styles; twice each
        assert pipe.calls[1][1:] == ([73, 74], 3, 2.0, False)
        assert [seed[0] for _, seed, *_ in pipe.calls] == [9, 73, 75, 139, 9, 21, 9, 25]

    def test_the_same_rows_are_drawn_whatever_their_order(self, rows):
        meta, count = rows[1], 10
        train = of_split(meta, "train")
        drawn = evaluate.draw(train, meta, count, 0)
        assert drawn == evaluate.draw(train[::-1], meta, count, 0)
        assert set(drawn) != set(evaluate.draw(train, meta, count, 1))

    def test_contact_sheet(self, file, rows, tmp_path):
        prompts = evaluate.sheet_prompts(file, 10)
        seen = {caption(m) for m in rows[1] if m["split"] == "train"}
        assert set(prompts) < seen
        pipe = Pipe(lambda prompt: np.full((64, 64, 3), 77, np.uint8))
        evaluate.contact_sheet(pipe, prompts, tmp_path / "sheet.png")
        sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
        assert (sheet == 77).all(-1).sum() >= 10 * 128 * 128
        assert sheet.shape[1] == 8 * 136 + 8
        assert pipe.calls[0][1] == list(range(10))
        assert (sheet[8 + 128 : 8 + 128 + 26, 8:136] < 128).any()  # the prompt is under its picture

    def test_curves(self, file, rows, monkeypatch, tmp_path):
        """A model that draws the truth at guidance 3 and more, black below, whatever else is set."""
        truth = {caption(m): image for image, m in zip(data.composite(rows[0]), rows[1], strict=True)}
        calls = []

        def pipe(prompts, *, seed, progress, **settings):
            calls.append(settings)
            images = [truth[p] if settings["guidance_scale"] >= 3 else np.zeros((64, 64, 3), np.uint8) for p in prompts]
            return SimpleNamespace(images=[Image.fromarray(image) for image in images])

        monkeypatch.setattr(curves.Pipeline, "from_pretrained", lambda folder: pipe)
        found = curves.curves(None, file, tmp_path / "curves.png", count=9, guidance_scale=4.0, steps=7)
        styles = found["guidance_scale"]["seen pairs"]["style"]
        assert styles[3:] == [1] * 4 and max(styles[:3]) < 0.5
        assert found["steps"]["held-out pairs"]["style"] == [1] * 6
        assert {"guidance_scale": 4.0, "steps": 50} in calls
        assert {"guidance_scale": 1.0, "steps": 7} in calls
        assert {"guidance_scale": 4.0, "steps": 7, "clip_skip": 3} in calls
        assert Image.open(tmp_path / "curves.png").size == (1440, 480)

    @pytest.mark.parametrize(("steps", "points"), [(2, 2), (30, 30), (1000, 50)])
    def test_plot_of_few_steps(self, steps, points, tmp_path, monkeypatch):
        """Each of a few, the means of 20 of many."""
        from matplotlib.figure import Figure

        lines = [json.dumps({"step": k, "loss": k, "lr": 1e-3}) for k in range(1, steps + 1)]
        (tmp_path / "log.jsonl").write_text("\n".join(lines) + "\n")
        drawn = []
        monkeypatch.setattr(
            Figure, "savefig", lambda figure, *_, **__: drawn.append(figure.axes[0].lines[0].get_data())
        )
        plot({"run": tmp_path}, tmp_path / "loss.png")
        x, y = drawn[0]
        assert len(x) == points and np.allclose(x, y + (9.5 if steps > 40 else 0))

    def test_plot_loss(self, tmp_path):
        lines = [json.dumps({"step": k, "loss": 1 / k, "lr": 1e-3, "seconds": k}) for k in (20, 40, 60)]
        (tmp_path / "log.jsonl").write_text("\n".join(lines) + "\n")
        plot(dict.fromkeys(("VAE", "diffusion"), tmp_path), tmp_path / "loss.png")
        assert Image.open(tmp_path / "loss.png").size == (1200, 600)
        with pytest.raises(FileNotFoundError, match=r"has no log\.jsonl: give the folder of a run"):
            plot({"none": tmp_path / "none"}, tmp_path / "loss.png")


LINES = b'{"step": 1, "loss": 0.5, "lr": 0.001}\n{"step": 2, "loss": 0.25, "lr": 0.002, "seconds": 3}\n'


class TestLog:
    @pytest.mark.parametrize("written", [b"", b"{", b'{"step": 3, "lo', b'{"step": 3, "loss": 1.0, "lr": 1.0}'])
    def test_what_is_being_written_is_left_out(self, written, tmp_path):
        (tmp_path / "log.jsonl").write_bytes(LINES + written)
        columns = {name: column.tolist() for name, column in read_log(tmp_path).items()}
        assert columns == {"step": [1, 2], "loss": [0.5, 0.25], "lr": [0.001, 0.002]}

    @pytest.mark.parametrize("line", [b"", b"{", b"[1]", b"3", b"\0\0", b"\xff", b'{"step": 3, "loss": 1.0}'])
    def test_broken_lines(self, line, tmp_path):
        log = tmp_path / "log.jsonl"
        log.write_bytes(LINES + line + b"\n" + LINES)
        with pytest.raises(ValueError, match=f"^{re.escape(str(log))}: line 3 is broken, .* remove it"):
            read_log(tmp_path)

    @pytest.mark.parametrize("content", [b"", b'{"step": 1'])
    def test_no_step(self, content, tmp_path):
        (tmp_path / "log.jsonl").write_bytes(content)
        with pytest.raises(ValueError, match=r"log\.jsonl is empty: no step has been taken yet"):
            read_log(tmp_path)

    def test_where_nothing_can_be_drawn(self, tmp_path, monkeypatch):
        (tmp_path / "log.jsonl").write_bytes(LINES)
        with pytest.raises(FileNotFoundError, match=r"a\.png: the folder .*none does not exist, make it first"):
            plot({"run": tmp_path}, tmp_path / "none" / "a.png")
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
        with pytest.raises(ValueError, match="matplotlib is not installed: pip install matplotlib"):
            plot({"run": tmp_path}, tmp_path / "a.png")


class TestWatch:
    def test_grids(self, tmp_path):
        """A row for each prompt, a column for each seed."""
        calls = []

        def pipe(prompt, *, seed, width, height, **settings):
            calls.append((prompt, width, height, settings))
            colours = [(len(prompt), 10 + s, 0) for s in seed]
            return SimpleNamespace(images=[Image.new("RGB", (width, height), colour) for colour in colours])

        watch = grids(pipe, ["1", "22", "333"], 5, tmp_path / "samples", 8, clip_skip=2, steps=7)
        for step in range(1, 12):
            watch(step, {})
        assert sorted(file.name for file in (tmp_path / "samples").iterdir()) == [
            "step-0000005.png",
            "step-0000010.png",
        ]
        sheet = np.asarray(Image.open(tmp_path / "samples" / "step-0000010.png"))
        assert sheet.shape == (3 * 8, 4 * 8, 3)
        for row, column in itertools.product(range(3), range(4)):
            part = sheet[8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
            assert (part == (row + 1, 10 + column, 0)).all()
        settings = {"progress": False, "clip_skip": 2, "steps": 7}
        assert calls == [(prompt, 8, 8, settings) for prompt in ["1", "22", "333"]] * 2

    def test_tensorboard_of_a_run_that_goes_on(self, tmp_path):
        """The steps after its last state are drawn once, as they were taken the second time."""
        for steps, loss in ((range(1, 7), 1.0), (range(4, 9), 2.0)):
            watch = tensorboard(tmp_path / "events")
            for step in steps:
                watch(step, {"loss": loss, "norm": 2 * loss, "lr": 4 * loss})
        events = EventAccumulator(str(tmp_path / "events")).Reload()
        for name, scale in (("loss", 1), ("norm", 2), ("lr", 4)):
            drawn = [(event.step, event.value) for event in events.Scalars(name)]
            assert drawn == [(step, (1 if step < 4 else 2) * scale) for step in range(1, 9)]

    def test_without_tensorboard(self, tmp_path, monkeypatch):
        """It is said before the first step."""
        monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
        with pytest.raises(ValueError, match="tensorboard is not installed: pip install tensorboard"):
            tensorboard(tmp_path)


class TestMetrics:
    def test_psnr_and_ssim_of_even_pictures(self):
        """Without contrast only the means differ: SSIM is (2ab + C) / (a^2 + b^2 + C), C = (0.01 * 255)^2."""
        a, b = np.full((2, 64, 64, 3), 100, np.uint8), np.full((2, 64, 64, 3), 120, np.uint8)
        assert metrics.psnr(a, b) == pytest.approx(20 * np.log10(255 / 20))
        assert metrics.ssim(a, b) == pytest.approx((2 * 100 * 120 + 2.55**2) / (100**2 + 120**2 + 2.55**2))
        assert metrics.ssim(a, a) == 1

    def test_ssim_is_the_definition(self):
        """Means, variances and covariance in Gaussian windows of 1.5 pixels, 11 wide; without a border of 5."""
        a, b = np.random.default_rng(0).integers(0, 256, (2, 1, 20, 24, 3), dtype=np.uint8)
        x, y = a[0].astype(float), b[0].astype(float)

        def mean(values):
            return gaussian_filter(values, (1.5, 1.5, 0), truncate=3.5)

        mx, my, c1, c2 = mean(x), mean(y), 2.55**2, 7.65**2
        vx, vy, both = mean(x * x) - mx**2, mean(y * y) - my**2, mean(x * y) - mx * my
        every = (2 * mx * my + c1) * (2 * both + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))
        assert metrics.ssim(a, b) == pytest.approx(every[5:-5, 5:-5].mean(), rel=1e-6)

    def test_copies_and_apart(self):
        a, b = np.full((2, 64, 64, 3), 100, np.uint8), np.full((3, 64, 64, 3), 151, np.uint8)
        b[1] = 0
        np.testing.assert_allclose(metrics.copies(a, b), [0.04, 0.04], atol=1e-6)  # (51 / 255)^2
        assert metrics.apart(a, b[:2]) == pytest.approx((0.04 + (100 / 255) ** 2) / 2)

    def test_kid_is_the_definition(self):
        random = np.random.default_rng(0)
        a, b = random.integers(0, 256, (2, 5, 64, 64, 3), dtype=np.uint8)
        x, y = judge_features(a), judge_features(b)
        spread = (y**2).mean()

        def k(p, q):
            return (p @ q / (768 * spread) + 1) ** 3

        pairs = list(itertools.permutations(range(5), 2))
        expected = np.mean([k(x[i], x[j]) + k(y[i], y[j]) for i, j in pairs])
        expected -= 2 * np.mean([k(p, q) for p in x for q in y])
        assert metrics.kid(a, b) == pytest.approx(expected, rel=1e-4)


def sha256(content):
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A data set of two opaque pictures of 60x60, which shrinking leaves as they are, in one npm package."""
    random = np.random.default_rng(0)
    pictures = np.full((2, 64, 64, 4), (255, 255, 255, 0), np.uint8)
    pictures[:, 2:62, 2:62] = 255
    pictures[:, 2:62, 2:62, :3] = random.integers(0, 256, (2, 60, 60, 3))
    cache = tmp_path / "cache"
    cache.mkdir()
    with tarfile.open(cache / "who-icons-1.0.0.tgz", "w:gz") as archive:
        for i, picture in enumerate(pictures):
            webp = io.BytesIO()
            Image.fromarray(picture[2:62, 2:62]).save(webp, "WEBP", lossless=True)
            member = tarfile.TarInfo(f"package/assets/icon{i}.webp")
            member.size = webp.tell()
            webp.seek(0)
            archive.addfile(member, webp)
    manifest = [
        {"hex": f"{i}", "label": f"thing {i}", "tags": ["é"], "kw": [], "group": "g", "subgroup": "s"}
        | {"pictures": {"flat": {"icon": f"icon{i}", "colors": [["red", 0.7]], "split": "train"}}}
        for i in range(2)
    ]
    (tmp_path / "manifest.json.gz").write_bytes(gzip.compress(json.dumps(manifest).encode()))
    sha512 = base64.b64encode(hashlib.sha512((cache / "who-icons-1.0.0.tgz").read_bytes()).digest()).decode()
    monkeypatch.setattr(emoji, "MANIFEST", tmp_path / "manifest.json.gz")
    monkeypatch.setattr(emoji, "SOURCES", {"flat": ("@who/icons@1.0.0", sha512)})
    monkeypatch.setattr(emoji, "CAPTIONS_SHA256", sha256(emoji.captions(manifest).encode()))
    monkeypatch.setattr(emoji, "IMAGES_SHA256", sha256(pictures.tobytes()))
    monkeypatch.setattr(emoji, "version", lambda name: "0.0.1")
    return SimpleNamespace(
        cache=cache, tarball=cache / "who-icons-1.0.0.tgz", pictures=pictures, out=tmp_path / "o.npz"
    )


def nothing_written(package):
    return not list(package.out.parent.glob("o.npz*"))


class TestBuild:
    def test_build(self, package):
        emoji.build(package.out, package.cache)
        images, meta = data.load(package.out)
        np.testing.assert_array_equal(images, package.pictures)
        assert meta[1] == {
            **{"style": "flat", "hex": "1", "label": "thing 1", "tags": ["é"], "kw": [], "group": "g", "subgroup": "s"},
            **{"colors": [["red", 0.7]], "caption": "thing 1, flat style", "split": "train"},
        }

    def test_damaged_package(self, package):
        content = bytearray(package.tarball.read_bytes())
        content[100] ^= 1
        package.tarball.write_bytes(content)
        with pytest.raises(
            ValueError, match=r"who-icons-1.0.0.tgz has sha512 .*, expected .*; delete it and run again"
        ):
            emoji.build(package.out, package.cache)
        assert nothing_written(package)

    def test_other_pixels(self, package, monkeypatch):
        monkeypatch.setattr(emoji, "IMAGES_SHA256", "0" * 64)
        message = (
            r"the rendered pictures have sha256 .* expected 0+; .*resvg_py 0.5.0 \(here 0.0.1\), pillow 13.0.0 \(here"
        )
        with pytest.raises(ValueError, match=message):
            emoji.build(package.out, package.cache)
        assert nothing_written(package)

    def test_other_captions(self, package, monkeypatch):
        monkeypatch.setattr(emoji, "CAPTIONS_SHA256", "0" * 64)
        with pytest.raises(ValueError, match=r"the captions have sha256 .* restore manifest.json.gz"):
            emoji.build(package.out, package.cache)
        assert nothing_written(package)

    def test_without_npm(self, package, monkeypatch):
        package.tarball.unlink()
        monkeypatch.setenv("PATH", "")
        with pytest.raises(RuntimeError, match=r"npm, which fetches @who/icons@1.0.0, was not found; install Node.js"):
            emoji.build(package.out, package.cache)
        assert nothing_written(package)

    def test_failed_writing_leaves_no_file(self, package, monkeypatch):
        def fail(f, **arrays):
            f.write(b"half")
            raise OSError("disk full")

        monkeypatch.setattr(np, "savez_compressed", fail)
        with pytest.raises(OSError, match="disk full"):
            emoji.build(package.out, package.cache)
        assert nothing_written(package)

    def test_manifest_is_the_pinned_one(self):
        manifest = json.loads(gzip.decompress(emoji.MANIFEST.read_bytes()))
        text = emoji.captions(manifest)
        assert sha256(text.encode()) == emoji.CAPTIONS_SHA256
        meta = json.loads(text)
        assert len(manifest) == 1396
        assert len({m["caption"] for m in meta}) == len(meta) == 8750
        assert all(m["caption"] == caption(m) for m in meta)
        assert {m["style"] for m in meta} == set(emoji.SOURCES)
        assert Counter(m["split"] for m in meta) == {
            "train": 8159, "test_pair": 392, "test_attribute": 50, "test_concept": 149
        }  # fmt: skip


class TestShrink:
    def test_colour_is_weighted_by_alpha(self):
        block = np.zeros((240, 240, 4), np.uint8)
        block[::2] = (200, 0, 0, 255)  # every other line is opaque red,
        block[1::2] = (0, 0, 200, 0)  # the rest is blue that nobody sees
        picture = emoji.shrink(Image.fromarray(block))
        assert (picture[2:62, 2:62] == (200, 0, 0, 128)).all()
        assert (picture[:2] == (255, 255, 255, 0)).all()
        assert (picture[:, 62:] == (255, 255, 255, 0)).all()

    def test_nearly_transparent_is_white(self):
        clear = np.full((60, 60, 4), (9, 9, 9, 0), np.uint8)
        assert (emoji.shrink(Image.fromarray(clear)) == (255, 255, 255, 0)).all()

    def test_other_sizes_are_resized_with_lanczos(self):
        image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8))
        expected = np.asarray(image.resize((60, 60), Image.Resampling.LANCZOS)).astype(int)
        picture = emoji.shrink(image)[2:62, 2:62].astype(int)
        assert (picture[..., 3] == 255).all()
        assert abs(picture[..., :3] - expected).max() <= 1  # Pillow's own 8-bit arithmetic rounds twice
