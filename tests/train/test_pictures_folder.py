"""A folder of pictures: what is used, what is refused and why, where it is cut, who comes when, what is kept."""

import json
import os
import struct
import time
import unicodedata
import warnings
import zlib
from itertools import chain, pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save as saved

from ldm.clip import TextEncoding
from ldm.image import to_tensor
from ldm.train.caches import Cache, cache_latents, cache_texts, fingerprint
from ldm.train.loop import batch_indices
from ldm.train.pictures import (
    Picture,
    batch_rows,
    buckets,
    cover,
    crop,
    natural,
    nearest_bucket,
    open_folder,
)
from ldm.vae import VAE, VAEConfig


def picture(width=64, height=64, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def ramp(width, height):
    """Red is x, green is y."""
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    return Image.fromarray(np.stack([x, y, 0 * x], -1).astype(np.uint8))


def fill(path, *names, size=(64, 64)):
    for seed, name in enumerate(names):
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        picture(*size, seed).save(path / name)
    return path


def opened(path, **options):
    return open_folder(path, **{"resolution": 64, "caption": "a dog"} | options)


def names(folder):
    return [picture.file.relative_to(folder.path).as_posix() for picture in folder.pictures]


def reasons(folder):
    return {refusal.name: refusal.reason for refusal in folder.refused}


class TestFiles:
    def test_natural_order_and_folders(self, tmp_path):
        wanted = ["1.png", "2.PNG", "10.jpg", "a b/1.webp", "a b/02.png", "B.bmp", "C2.gif", "c.tif", "é.png", "猫.png"]
        folder = opened(fill(tmp_path, *reversed(wanted)))
        assert names(folder) == wanted
        assert not folder.refused
        assert folder.captions == ["a dog"] * len(wanted)

    def test_the_order_does_not_depend_on_the_file_system(self, tmp_path, monkeypatch):
        fill(tmp_path, *(f"{i}.png" for i in range(12)))
        rglob = type(tmp_path).rglob
        for order in (sorted, lambda files: sorted(files, reverse=True)):
            monkeypatch.setattr(type(tmp_path), "rglob", lambda *a, order=order: order(rglob(*a)))
            assert names(opened(tmp_path)) == [f"{i}.png" for i in range(12)]

    def test_natural(self):
        """A total order: names that differ in case or zeros alone stay apart; é is é in both of Unicode's spellings."""
        order = ["1", "01.png", "1.png", "2.png", "2a.png", "A2.png", "a10.png", "A.png", "a.png", "b.png"]
        assert sorted(reversed(order), key=natural) == order
        assert natural("é") == natural(unicodedata.normalize("NFD", "é"))

    def test_hidden_is_left_out(self, tmp_path):
        fill(tmp_path, "a.png", ".b.png", ".cache/c.png")
        folder = opened(tmp_path)
        assert names(folder) == ["a.png"]
        assert not folder.refused

    def test_thousands_quickly(self, tmp_path):
        content = fill(tmp_path, "0.png").joinpath("0.png").read_bytes()
        for i in range(1, 3000):
            (tmp_path / f"{i}.png").write_bytes(content)
        start = time.process_time()
        folder = opened(tmp_path)
        for step in range(100):
            folder.rows(step, 4, 0)
        assert names(folder) == [f"{i}.png" for i in range(3000)]
        assert time.process_time() - start < 10  # a second, unless something is quadratic

    def test_no_folder(self, tmp_path):
        with pytest.raises(ValueError, match=r"nothing does not exist"):
            opened(tmp_path / "nothing")
        with pytest.raises(ValueError, match=r"at least 1 are needed.*: 0 pictures; 0 refused"):
            opened(tmp_path)
        (tmp_path / "file").touch()
        with pytest.raises(ValueError, match=r"file is not a folder"):
            opened(tmp_path / "file")

    def test_an_empty_folder(self, tmp_path):
        """To be filled: nothing is missed in it."""
        folder = opened(tmp_path, least=0)
        assert str(folder) == f"{tmp_path}: 0 pictures; 0 refused"
        assert (len(folder), folder.pictures, folder.captions, folder.kinds.dtype) == (0, [], [], torch.int64)
        (tmp_path / "text.png").write_text("I am no picture")
        assert str(opened(tmp_path, least=0)).startswith(f"{tmp_path}: 0 pictures; 1 refused\n  text.png: ")

    @pytest.mark.parametrize("resolution", [0, 32, 100])
    def test_resolution(self, resolution, tmp_path):
        with pytest.raises(ValueError, match=f"resolution={resolution}: give a multiple of 64"):
            opened(tmp_path, resolution=resolution)


def png(width, height):
    """A whole and valid file of so many black pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


class TestRefusals:
    def test_by_name_and_reason(self, tmp_path):
        fill(tmp_path, "good.png", "whole.jpg")
        data = (tmp_path / "whole.jpg").read_bytes()
        (tmp_path / "cut.jpg").write_bytes(data[: len(data) // 2])
        (tmp_path / "nothing.png").touch()
        (tmp_path / "text.png").write_text("I am no picture")
        (tmp_path / "bomb.png").write_bytes(png(30_000, 30_000))
        picture(1, 1).save(tmp_path / "dot.png")
        picture(31, 300).save(tmp_path / "narrow.png")
        picture(32, 300).save(tmp_path / "wide enough.png")
        Image.new("F", (64, 64)).save(tmp_path / "float.tif")
        (tmp_path / "phone.heic").write_bytes(data)
        (tmp_path / "lost.txt").write_text("a caption")
        (tmp_path / "link.png").symlink_to("nowhere")
        os.mkfifo(tmp_path / "pipe.png")
        (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
        (tmp_path / "empty.txt").write_text(" \n")
        fill(tmp_path, "latin.png", "empty.png")
        (tmp_path / "sub").mkdir()
        (tmp_path / os.fsdecode(b"\xff.png")).write_bytes(data)

        folder = opened(tmp_path, least=3)
        assert names(folder) == ["good.png", "whole.jpg", "wide enough.png"]
        told = {
            "cut.jpg": "damaged or cut off",
            "nothing.png": "not an image that Pillow can read",
            "text.png": "not an image that Pillow can read",
            "bomb.png": "more than 178956970 pixels",
            "dot.png": "1x1 would have to be enlarged more than twice for 64x64",
            "narrow.png": "31x300 would have to be enlarged",
            "float.tif": "mode F",
            "phone.heic": "not a picture by its name",
            "lost.txt": "a caption to no picture",
            "link.png": "a link to nothing",
            "pipe.png": "no file at all",
            "latin.png": "latin.txt is not UTF-8",
            "empty.png": "its caption is empty",
            "\\udcff.png": "not UTF-8",
        }
        assert reasons(folder).keys() == told.keys()
        for name, reason in told.items():
            assert reason in reasons(folder)[name]
            assert str(tmp_path) not in reasons(folder)[name]
        assert str(folder).startswith(f"{tmp_path}: 3 pictures of 64x64; 14 refused\n  \\udcff.png: its name")
        assert str(folder).endswith("\n  and 4 more")
        with pytest.raises(ValueError, match=r"at least 4 are needed.*3 pictures of 64x64; 14 refused\n.*\n  bomb"):
            opened(tmp_path, least=4)

    def test_two_spellings_of_one_name(self, tmp_path, monkeypatch):
        """One is used, and always the same."""
        spellings = [unicodedata.normalize(form, "é.png") for form in ("NFC", "NFD")]
        fill(tmp_path, *spellings)
        for files in (spellings, spellings[::-1]):
            monkeypatch.setattr(type(tmp_path), "rglob", lambda path, _, files=files: [path / file for file in files])
            folder = opened(tmp_path)
            assert names(folder) == spellings[1:]  # e comes before é
            assert "two files of this name" in reasons(folder)["é.png"]

    def test_an_animation_is_its_first_frame(self, tmp_path):
        frames = [Image.new("RGB", (64, 64), colour) for colour in ("red", "blue")]
        frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
        with pytest.warns(UserWarning, match=r"a\.gif has 2 frames: the first is used"):
            folder = opened(tmp_path)
        with warnings.catch_warnings(action="error"):  # it was said once
            pixels = folder.pixels([0])
        assert pixels[0, :, 0, 0].tolist() == [1, -1, -1]

    def test_a_file_that_changes_later(self, tmp_path):
        folder = opened(fill(tmp_path, "a.png"))
        picture(64, 65).save(tmp_path / "a.png")
        with pytest.raises(ValueError, match=r"a\.png was 64x64 .* is 64x65 now"):
            folder.pixels([0])
        (tmp_path / "a.png").unlink()
        with pytest.raises(ValueError, match=r"a\.png: No such file"):
            folder.pixels([0])


class TestCaptions:
    def captions(self, path, **options):
        folder = open_folder(path, resolution=64, **options)
        return dict(zip(names(folder), folder.captions, strict=True)), reasons(folder)

    def metadata(self, path, *rows):
        path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows), encoding="utf-8")

    def test_the_first_that_there_is(self, tmp_path):
        fill(tmp_path, "a.png", "b.png", "c.png", "sub/d.png", "sub/e f.png")
        self.metadata(tmp_path / "metadata.jsonl", {"file_name": "a.png", "text": "a cat"}, "")
        self.metadata(tmp_path / "sub" / "metadata.jsonl", {"file_name": "d.png", "text": "ein Käse 🧀", "more": 1})
        (tmp_path / "a.txt").write_text("not this")
        (tmp_path / "b.txt").write_text("\ufeffa sidecar\n", encoding="utf-8")
        texts = {"a.png": "a cat", "b.png": "a sidecar", "c.png": "given", "sub/d.png": "ein Käse 🧀"}
        assert self.captions(tmp_path, caption="given") == (texts | {"sub/e f.png": "given"}, {})

    def test_a_name_in_either_spelling(self, tmp_path):
        fill(tmp_path, unicodedata.normalize("NFD", "é.png"))
        self.metadata(tmp_path / "metadata.jsonl", {"file_name": "./é.png", "text": "e"})
        assert open_folder(tmp_path, resolution=64).captions == ["e"]

    def test_csv(self, tmp_path):
        fill(tmp_path, "a.png", "b.png")
        (tmp_path / "metadata.csv").write_text('file_name,text\na.png,"one, ""two""\nthree"\nb.png,b\nb\n')
        texts, refused = self.captions(tmp_path)
        assert texts == {"a.png": 'one, "two"\nthree', "b.png": "b"}
        assert refused.keys() == {"metadata.csv, entry 3"}

    def test_refused(self, tmp_path):
        fill(tmp_path, "twice.png", "once.png", "empty.png")
        rows = [{"file_name": f"{name}.png", "text": name} for name in ("twice", "once", "twice", "absent")]
        half = r'{"file_name": "a", "text": "\ud800"}'
        bad = ["{", "[1]", "3", {"file_name": "once.png"}, {"file_name": 1, "text": "a"}, half]
        self.metadata(tmp_path / "metadata.jsonl", *rows, {"file_name": "empty.png", "text": " "}, *bad)
        texts, refused = self.captions(tmp_path, caption="given")
        assert texts == {"once.png": "once"}
        entries = [f"metadata.jsonl, entry {i}" for i in range(6, 12)]
        assert [*refused] == ["absent.png", "empty.png", *entries, "twice.png"]
        assert "no such file" in refused["absent.png"]
        assert "listed twice" in refused["twice.png"]

    def test_metadata_that_is_no_text(self, tmp_path):
        fill(tmp_path, "a.png")
        (tmp_path / "metadata.jsonl").write_bytes(b"\xff")
        assert self.captions(tmp_path, caption="x") == (
            {"a.png": "x"}, {"metadata.jsonl": "metadata.jsonl is not UTF-8: save it as that"}
        )  # fmt: skip

    def test_none(self, tmp_path):
        fill(tmp_path, *(f"{i}.png" for i in range(14)))
        (tmp_path / "3.txt").write_text("a caption")
        with pytest.raises(ValueError, match=r"13 of 14 pictures have no caption(.|\n)*\n  2.png\n  4.png\n"):
            open_folder(tmp_path, resolution=64)
        assert set(self.captions(tmp_path, caption="")[0].values()) == {"", "a caption"}


class TestGeometry:
    @pytest.mark.parametrize(
        ("size", "target", "resized", "numbers"),
        [
            ((1500, 1000), (512, 512), (768, 512), [1000, 1500, 0, 128, 512, 512]),
            ((1000, 1500), (512, 512), (512, 768), [1500, 1000, 128, 0, 512, 512]),
            ((512, 512), (512, 512), (512, 512), [512, 512, 0, 0, 512, 512]),
            ((1000, 999), (512, 512), (512, 512), [999, 1000, 0, 0, 512, 512]),  # 512.5, rounded down
            ((400, 300), (512, 512), (682, 512), [300, 400, 0, 85, 512, 512]),  # enlarged; 682.7
            ((1500, 1000), (640, 384), (640, 426), [1000, 1500, 21, 0, 384, 640]),  # 426.7: the height is cut
            ((4000, 1000), (1024, 256), (1024, 256), [1000, 4000, 0, 0, 256, 1024]),
        ],
    )
    def test_on_paper(self, size, target, resized, numbers, tmp_path):
        assert cover(size, target) == resized
        assert crop(Image.new("RGB", size), target).size == target
        assert Picture(tmp_path, "", size, target).size_numbers() == numbers

    def test_what_is_cut(self):
        """Of 96 x 64 pixels the middle 64 columns, and at half the size every second of them, averaged."""
        pixels = to_tensor(crop(ramp(96, 64), (64, 64)))
        assert torch.equal(pixels, to_tensor(ramp(96, 64))[..., 16:80])
        half = ((to_tensor(crop(ramp(96, 64), (32, 32))) + 1) * 127.5).round()
        x = 2 * torch.arange(32) + 0.5  # between two columns
        assert (half[0, 0] - 16 - x).abs().max() == 0.5
        assert (half[0, 1, 2:-2] - x[2:-2, None]).abs().max() == 0.5  # the picture ends above and below

    def test_the_numbers_say_where_it_is_cut(self, tmp_path):
        for size in [(70, 64), (64, 93), (64, 64)]:
            _, _, top, left, _, _ = Picture(tmp_path, "", size, (64, 64)).size_numbers()
            assert crop(ramp(*size), (64, 64)).getpixel((0, 0)) == (left, top, 0)

    def test_novelais_buckets(self):
        widths = {256: 1024, 320: 768, 384: 640, 448: 576, 512: 512, 576: 448, 640: 384, 704: 320, 768: 320, 832: 256}
        sizes = {*widths.items(), (896, 256), (960, 256), (1024, 256)}
        assert buckets(512, 64) == sorted(sizes | {(h, w) for w, h in sizes})

    @given(st.integers(1, 30), st.sampled_from([8, 16, 64]))
    def test_buckets(self, times, multiple):
        resolution = times * multiple
        sizes = buckets(resolution, multiple)
        assert (resolution, resolution) in sizes
        assert {(h, w) for w, h in sizes} == set(sizes)
        for w, h in sizes:
            assert w % multiple == h % multiple == 0
            assert w * h <= resolution**2
            assert resolution / 2 <= min(w, h) <= max(w, h) <= 2 * resolution

    def test_nearest_bucket(self):
        sizes = buckets(512, 64)
        for size, bucket in [
            ((3000, 2000), (640, 384)),  # 1.5: log distances .105 to 1.667 and .154 to 1.286
            ((2000, 3000), (384, 640)),
            ((400, 300), (576, 448)),  # 1.333 beside 1.286
            ((512, 512), (512, 512)),
            ((9000, 100), (1024, 256)),
        ]:
            assert nearest_bucket(size, sizes) == bucket
        # By the logarithm 1.5 belongs to 2, by the difference to neither.
        assert nearest_bucket((1500, 1000), [(100, 100), (200, 100)]) == (200, 100)
        assert nearest_bucket((1000, 1500), [(100, 100), (100, 200)]) == (100, 200)

    def test_exif(self, tmp_path):
        """A phone's upright 2:3, stored lying: assigned, cut and sized as it is seen."""
        exif = Image.Exif()
        exif[0x0112] = 6
        stored = ramp(240, 160)
        stored.save(tmp_path / "a.png", exif=exif)
        folder = opened(tmp_path, resolution=128, bucketed=True, multiple=16)
        assert folder.pictures[0][2:] == ((160, 240), (96, 160))
        pixels = folder.pixels([0])
        assert folder.pictures[0].size_numbers() == [240, 160, 0, 5, 160, 96]  # resized to 106 x 160
        upright = stored.transpose(Image.Transpose.ROTATE_270).resize((106, 160), Image.Resampling.LANCZOS)
        assert torch.equal(pixels, to_tensor(upright)[..., 5:101])

    def test_kinds_of_pixels(self, tmp_path):
        values = np.full((64, 64), 200 * 257, np.uint16)
        kinds = {
            "alpha.png": Image.new("RGBA", (64, 64), (0, 0, 0, 0)),
            "cmyk.jpg": Image.new("CMYK", (64, 64), (0, 0, 0, 255)),
            "deep.png": Image.fromarray(values),
            "palette.gif": Image.new("RGB", (64, 64), (255, 0, 0)).convert("P"),
            "grey.webp": Image.new("L", (64, 64), 0).convert("RGB"),
            "avif.avif": Image.new("RGB", (64, 64), "white"),
        }
        for name, image in kinds.items():
            image.save(tmp_path / name)
        folder = opened(tmp_path)
        pixels = folder.pixels(range(len(kinds)))
        seen = dict(zip(names(folder), ((pixels[:, :, 32, 32] + 1) * 127.5).round().int().tolist(), strict=True))
        assert seen == {
            "alpha.png": [255] * 3,
            "cmyk.jpg": [0] * 3,
            "deep.png": [200] * 3,
            "palette.gif": [255, 0, 0],
            "grey.webp": [0] * 3,
            "avif.avif": [255] * 3,
        }
        assert pixels.dtype == torch.float32

    def test_printed_buckets(self, tmp_path):
        fill(tmp_path, "a.png", "b.png", size=(160, 96))
        fill(tmp_path, "c.png")
        folder = opened(tmp_path, bucketed=True, multiple=16)
        assert str(folder) == f"{tmp_path}: 3 pictures: 1 of 64x64, 2 of 80x48; 0 refused"
        assert str(opened(fill(tmp_path / "d", "e.png"))).endswith("d: 1 picture of 64x64; 0 refused")


class TestBatches:
    @settings(max_examples=150, deadline=None)
    @given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.integers(1, 8), st.integers(0, 50))
    def test_all_as_often(self, counts, batch, seed):
        """Each batch is full and of one kind; each kind's rows come as a shuffle after the other, none left out."""
        kinds = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
        kinds = kinds[torch.randperm(len(kinds), generator=torch.Generator().manual_seed(seed))]
        epochs = 3 * batch  # after `batch` epochs no one waits: each kind has been called a multiple of `batch` times
        rows = [batch_rows(kinds, batch, seed, step) for step in range(epochs * len(kinds) // batch)]
        seen = {kind: [] for kind in range(len(counts))}
        for some in rows:
            assert some.shape == (batch,)
            assert len(kinds[some].unique()) == 1
            seen[int(kinds[some[0]])] += some.tolist()
        for kind, order in seen.items():
            own = (kinds == kind).nonzero().flatten().tolist()
            assert len(order) == epochs * len(own)
            for start in range(0, len(order), len(own)):
                assert sorted(order[start : start + len(own)]) == own

    def test_no_kind_waits_for_long(self):
        """In step with the epochs: at any step every picture was seen as often, but for a batch of its kind."""
        kinds = torch.tensor([0] * 50 + [1] * 10 + [2] * 3)
        seen = torch.zeros(63)
        for step in range(200):
            seen.scatter_add_(0, (rows := batch_rows(kinds, 4, 1, step)), torch.ones(len(rows)))
            epoch = (step + 1) * 4 / 63
            for kind, count in enumerate(kinds.bincount()):
                assert abs(seen[kinds == kind].sum() / count - epoch) <= 1 + 4 / count

    def test_kinds_are_mixed(self):
        kinds = torch.tensor([0, 1] * 100)
        drawn = [int(kinds[batch_rows(kinds, 2, 0, step)[0]]) for step in range(100)]
        assert sum(drawn) == 50
        assert 25 < sum(a != b for a, b in pairwise(drawn)) < 75

    @pytest.mark.parametrize(("count", "batch"), [(24, 4), (5, 1), (9, 9)])
    def test_one_kind_is_batch_indices(self, count, batch):
        for step in range(3 * count):
            ours = batch_rows(torch.zeros(count, dtype=torch.long), batch, 3, step)
            assert torch.equal(ours, batch_indices(count, batch, 3, step))

    def test_five_pictures_make_a_batch_of_eight(self, tmp_path):
        folder = opened(fill(tmp_path, *(f"{i}.png" for i in range(5))))
        rows = torch.cat([folder.rows(step, 8, 0) for step in range(5)])
        assert rows.bincount().tolist() == [8] * 5
        assert rows[:5].sort().values.tolist() == [0, 1, 2, 3, 4]

    def test_a_function_of_seed_and_step(self, tmp_path):
        fill(tmp_path, *(f"{i}.png" for i in range(6)), size=(96, 64))
        fill(tmp_path, "7.png", "8.png", "9.png", size=(64, 96))

        def run(seed, steps):
            folder = opened(tmp_path, bucketed=True, multiple=32)
            rows = [folder.rows(step, 2, seed) for step in steps]
            return [(r, folder.pixels(r)) for r in rows]

        whole, again = run(0, range(9)), run(0, range(8, -1, -1))[::-1]
        assert all(map(torch.equal, chain(*whole), chain(*again)))
        assert not all(torch.equal(one[0], two[0]) for one, two in zip(whole, run(1, range(9)), strict=True))
        orders = [torch.cat([rows for rows, _ in part]).tolist() for part in (whole[:4], whole[4:8])]
        assert orders[0] != orders[1]

    def test_batch(self):
        with pytest.raises(ValueError, match="a batch of 0 pictures"):
            batch_rows(torch.zeros(3, dtype=torch.long), 0, 0, 0)


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(1)
    return VAE(VAEConfig(channels=(8, 16), layers=1, groups=4)).requires_grad_(False)


class TestCache:
    def count(self, vae, monkeypatch):
        calls, encode = [], vae.encode
        monkeypatch.setattr(vae, "encode", lambda image: calls.append(len(image)) or encode(image))
        return calls

    def test_latents(self, vae, tmp_path, monkeypatch):
        fill(tmp_path / "in", "a.png", "b.png", "c.png", size=(96, 64))
        folder = opened(tmp_path / "in", bucketed=True, multiple=16)
        calls = self.count(vae, monkeypatch)
        cached = cache_latents(folder, vae, tmp_path / "cache")
        assert len(calls) == 3
        found = cached(torch.tensor([2, 0]))
        expected = vae.encode(folder.pixels([2, 0]))
        assert found["mean"].shape == (2, 4, *(side // 2 for side in folder.pictures[0].target[::-1]))
        for name in ("mean", "std"):
            torch.testing.assert_close(found[name], getattr(expected, name), rtol=1e-5, atol=1e-6)
            assert found[name].dtype == torch.float32

        calls.clear()
        assert torch.equal(cache_latents(folder, vae, tmp_path / "cache")([2])["mean"], found["mean"][:1])
        assert calls == []

    def test_what_is_noticed(self, vae, tmp_path, monkeypatch):
        path = fill(tmp_path / "in", "a.png", "b.png")
        calls = self.count(vae, monkeypatch)

        def cached(**options):
            calls.clear()
            made = cache_latents(opened(path, **options), vae, tmp_path / "cache")
            return made, len(calls)

        first, made = cached()
        assert made == 2
        picture(64, 64, 9).save(path / "a.png")  # of the same size
        changed, made = cached()
        assert made == 1
        assert not torch.equal(changed([0])["mean"], first([0])["mean"])
        assert torch.equal(changed([1])["mean"], first([1])["mean"])
        assert cached(resolution=32, multiple=32)[1] == 2
        with torch.no_grad():
            vae.quant_conv.bias[0] += 1e-3
        shifted, made = cached()
        assert made == 2
        assert not torch.equal(shifted([1])["mean"], first([1])["mean"])
        (path / "a.png").rename(path / "z.png")  # the picture is the same
        assert cached()[1] == 0

    @pytest.mark.parametrize(
        "damage",
        [
            lambda data: b"",
            lambda data: b"half",
            lambda data: data[:-1],
            lambda data: data[:-1] + bytes([data[-1] ^ 1]),
            lambda data: saved({"x": torch.zeros(1, 3)}),  # the same tensors, but nothing to check them by
        ],
    )
    def test_stopped_and_damaged(self, damage, tmp_path):
        made = []

        def compute(row):
            if row == 2 and len(made) == 2:
                raise InterruptedError
            made.append(row)
            return {"x": torch.full((1, 3), float(row), dtype=torch.bfloat16)}

        with pytest.raises(InterruptedError):
            Cache(tmp_path, ["a", "b", "c"], compute, "")
        assert sorted(file.name for file in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors"]
        file = tmp_path / "a.safetensors"
        file.write_bytes(damage(file.read_bytes()))
        cache = Cache(tmp_path, ["a", "b", "c"], compute, "")
        assert made == [0, 1, 0, 2]
        found = cache([2, 0])["x"]
        assert found.dtype == torch.float32
        assert found.tolist() == [[2.0] * 3, [0.0] * 3]
        assert len(list(tmp_path.iterdir())) == 3

    def test_what_goes_bad_later(self, tmp_path):
        """Whichever bit flips and wherever it is cut, the file is named, and the next run computes it anew."""

        def opened():
            return Cache(tmp_path, ["a", "b"], lambda row: {"x": torch.full((1, 3), float(row))}, "")

        cache, file = opened(), tmp_path / "b.safetensors"
        content = file.read_bytes()
        for i, byte in enumerate(content):
            for damaged in (content[:i], content[:i] + bytes([byte ^ 1 << i % 8]) + content[i + 1 :]):
                file.write_bytes(damaged)
                with pytest.raises(ValueError, match=r"b\.safetensors is damaged .* start again"):
                    cache([0, 1])
        assert opened()([0, 1])["x"].tolist() == [[0] * 3, [1] * 3]
        file.unlink()
        with pytest.raises(FileNotFoundError, match=r"b\.safetensors"):
            cache([0, 1])

    def test_texts(self, tmp_path):
        calls = []

        def encode(text):
            calls.append(text)
            return TextEncoding(torch.full((1, 7, 2), float(len(text))), torch.full((1, 2), -float(len(text))))

        for key, made in (("one", ["", "a dog"]), ("one", []), ("two", ["", "a dog"])):
            calls.clear()
            cached = cache_texts(["", "a dog"], encode, key, tmp_path)([1, 0, 1])
            assert calls == made
            assert cached["context"][:, 0, 0].tolist() == [5, 0, 5]
            assert cached["pooled"][:, 0].tolist() == [-5, 0, -5]

    def test_fingerprint(self):
        def of(values, dtype=torch.float32):
            net = torch.nn.Linear(1, 1, bias=False)
            net.weight = torch.nn.Parameter(torch.tensor(values, dtype=dtype))
            return fingerprint(net)

        assert of([1, 2]) == of([1, 2])
        assert len({of(values) for values in ([1, 2], [2, 1], [[1, 2]], [[1], [2]], [1, 2 + 3e-7])}) == 5
        assert of([0], torch.float16) != of([0], torch.bfloat16)
