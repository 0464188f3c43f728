"""Damaged, wrong and hostile files: always an error of ours that names the file, and nothing half-loaded.

The named cases are what people meet; the generated ones, 10,000 in all, are whatever hypothesis comes upon. All run
under a limit of time and of memory beyond what the process had.
"""

import ctypes
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from contextlib import contextmanager
from math import prod
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from synthetic import TINY_ROW, diffusers_pipeline, single_file, tiny_nets

import ldm
from ldm import checkpoint, models
from ldm.checkpoint import TELLS_V, CheckpointError, load
from ldm.convert import convert
from ldm.models import CONTEXT, CONV_IN
from ldm.source import all_finite

MEMORY = 64e6  # bytes
SECONDS = 20
KEY = "model.diffusion_model.input_blocks.0.0.weight"
READERS = st.sampled_from([load, ldm.inspect])


def fuzz(count):
    phases, checks = [Phase.generate, Phase.shrink], list(HealthCheck)
    return settings(
        max_examples=count, deadline=None, derandomize=True, database=None, phases=phases, suppress_health_check=checks
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A good single file, a good folder, a good LoRA and a good embedding."""
    path = tmp_path_factory.mktemp("whole")
    save_file(
        {name: tensor.contiguous() for name, tensor in single_file(tiny_nets()).items()}, path / "good.safetensors"
    )
    diffusers_pipeline().save_pretrained(path / "good")
    to_q = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    lora = {f"{to_q}.lora_down.weight": torch.ones(2, 16), f"{to_q}.lora_up.weight": torch.ones(16, 2)}
    save_file(lora | {f"{to_q}.alpha": torch.tensor(1.0)}, path / "lora.safetensors")
    save_file({"emb_params": torch.ones(3, 24)}, path / "word.safetensors")
    return path


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """The tiny model is known by a row of its own, and needs no official tokenizer, which takes long to make."""
    monkeypatch.setattr(models, "OFFICIAL", (*models.OFFICIAL, TINY_ROW))
    monkeypatch.setattr(checkpoint, "official_tokenizer", lambda text: None)


@pytest.fixture(autouse=True)
def trimmed():
    """What earlier tests have freed goes back to the system: else it would be had again without the process growing."""
    ctypes.CDLL(None).malloc_trim(0)


@contextmanager
def limits():
    """An error after SECONDS, and when the process has grown by MEMORY at any time since."""

    def late(number, frame):
        raise TimeoutError(f"more than {SECONDS} s")

    def status(field):
        return 1024 * int(re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())[1])

    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = status("VmRSS")
    earlier = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, earlier)
    assert status("VmHWM") - before < MEMORY


def refused(path, read=load):
    """What our own error says; None if the file is good after all, and then all of it is there."""
    try:
        result = read(path)
    except CheckpointError as error:
        assert Path(path).name in str(error), error
        return str(error)
    if read is load:
        for net in (result.unet, result.vae, result.text_encoder):
            assert all(p.device.type == "cpu" and torch.isfinite(p).all() for p in net.parameters())
    return None


# Files, taken apart and put together


def parts_of(file):
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def assemble(header, data, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def raw(change):
    """A case that changes the bytes of the good file."""
    return lambda whole, path: path.write_bytes(change((whole / "good.safetensors").read_bytes()))


def header(change):
    """A case that changes the header as data; it may return another one, or bytes."""

    def make(whole, path):
        entries, data = parts_of(whole / "good.safetensors")
        path.write_bytes(assemble(change(entries) or entries, data))

    return make


def entry(**fields):
    return header(lambda entries: entries[KEY].update(fields))


def tensors(change):
    """A case that changes the tensors; safetensors writes them."""

    def make(whole, path):
        values = load_file(whole / "good.safetensors")
        change(values)
        save_file(values, path)

    return make


def value(number, name=KEY, dtype=None):
    def change(values):
        values[name] = values[name].clone() if dtype is None else values[name].to(dtype)
        values[name].view(-1)[-1] = number

    return tensors(change)


def swap_fields(entries, a, b, *fields):
    for field in fields:
        entries[a][field], entries[b][field] = entries[b][field], entries[a][field]


def header_end(data):
    return 8 + int.from_bytes(data[:8], "little")


def long_header(whole, path):
    """It is in order: a good file with 9 MB of notes."""
    entries, data = parts_of(whole / "good.safetensors")
    path.write_bytes(assemble({"__metadata__": {"notes": "x" * 9_000_000}} | entries, data))


def hole(whole, path):
    """Two GB, none of which is on the disk."""
    with path.open("wb") as file:
        file.write((2**31).to_bytes(8, "little") + b"{")
        file.truncate(2**31 + 100)


def sparse(size, start=b"{"):
    """A file of that many bytes, most of which are not on the disk."""

    def make(path):
        path.unlink(missing_ok=True)
        path.write_bytes(start)
        os.truncate(path, size)

    return make


def many_tensors(count):
    """Without elements: they take no room among the data."""
    empty = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    more = {f"{i:040}": empty for i in range(count)}
    return header(lambda entries: json.dumps(entries | more, separators=(",", ":")).encode())


def telling_bias(shape, dtype, bits):
    """A case with the tensors that tell SD 2, the last of them, which says how it predicts, of a wrong kind."""

    def make(whole, path):
        entries, end = {}, 0
        shapes = {CONV_IN: (320, 4, 3, 3), CONTEXT: (320, 1024), TELLS_V: shape}
        for name, extents in shapes.items():
            kind, size = (dtype, bits) if name == TELLS_V else ("F16", 16)
            begin, end = end, end + prod(extents) * size // 8
            entries[name] = {"dtype": kind, "shape": extents, "data_offsets": [begin, end]}
        head = assemble(entries, b"")
        path.write_bytes(head)
        os.truncate(path, len(head) + end)

    return make


TO_Q, TO_K = (f"model.diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_{x}.weight" for x in "qk")
NESTED = b"[" * 100_000 + b"]" * 100_000
TEXT = "cond_stage_model.transformer.text_model.final_layer_norm.weight"
VAE_BIAS = "first_stage_model.decoder.conv_out.bias"
DAMAGED, OTHER, FIT = "truncated or damaged", "not a safetensors file", "does not fit"
NUMBERS = "values that are NaN, infinite, or too large"

FILES = {
    # cut off, or of a wrong length
    "empty": (raw(lambda d: b""), "is empty"),
    "1 byte": (raw(lambda d: d[:1]), OTHER),
    "7 bytes": (raw(lambda d: d[:7]), OTHER),
    "the length alone": (raw(lambda d: d[:8]), OTHER),
    "cut after the brace": (raw(lambda d: d[:9]), DAMAGED),
    "cut in the header": (raw(lambda d: d[: header_end(d) // 2]), DAMAGED),
    "cut before the end of the header": (raw(lambda d: d[: header_end(d) - 1]), DAMAGED),
    "cut after the header": (raw(lambda d: d[: header_end(d)]), DAMAGED),
    "cut in the first tensor": (raw(lambda d: d[: header_end(d) + 5]), DAMAGED),
    "cut by a byte": (raw(lambda d: d[:-1]), DAMAGED),
    "a byte too many": (raw(lambda d: d + b"x"), DAMAGED),
    "twice the file": (raw(lambda d: d + d), DAMAGED),
    "header length 0": (raw(lambda d: bytes(8) + d[8:]), DAMAGED),
    "header length 1": (raw(lambda d: (1).to_bytes(8, "little") + d[8:]), DAMAGED),
    "header length too small": (raw(lambda d: (header_end(d) - 9).to_bytes(8, "little") + d[8:]), DAMAGED),
    "header length too large": (raw(lambda d: (header_end(d) - 7).to_bytes(8, "little") + d[8:]), DAMAGED),
    "header length beyond the file": (raw(lambda d: (7_000_000).to_bytes(8, "little") + d[8:]), DAMAGED),
    "header length 2 GB": (raw(lambda d: (2**31).to_bytes(8, "little") + d[8:]), "claims a header of 2,147,483,648 by"),
    "header length 2 GB in such a file": (hole, "claims a header of 2,147,483,648 bytes"),
    "header length of all bits": (raw(lambda d: b"\xff" * 8 + d[8:]), "claims a header of 18,446,744,073,709,551,615"),
    "big-endian length": (raw(lambda d: d[:8][::-1] + d[8:]), "claims a header of"),
    "header of 9 MB": (long_header, "claims a header of 9,"),
    # more than fits into the memory
    "54,000 tensors": (many_tensors(54_000), "lists far more"),
    "14,000 tensors": (many_tensors(14_000), "14000 unknown"),
    "many notes": (header(lambda e: e.update(__metadata__={str(i): "" for i in range(480_000)})), "lists far more"),
    "many extents": (entry(shape=[1] * 2_000_000), "lists far more"),
    "a bias that fills the memory": (telling_bias((320, 300_000), "F16", 16), FIT),
    "a bias of a dtype that PyTorch does not read": (telling_bias((320,), "F4", 4), FIT),
    # headers that say nothing, or nonsense
    "nested without end, where safetensors does not look": (
        header(lambda e: json.dumps(e | {KEY: e[KEY] | {"x": 0}}).encode().replace(b'"x": 0', b'"x": ' + NESTED)),
        DAMAGED,
    ),
    "a long number, where safetensors does not look": (
        header(lambda e: json.dumps(e | {KEY: e[KEY] | {"x": 0}}).encode().replace(b'"x": 0', b'"x": ' + b"9" * 5000)),
        DAMAGED,
    ),
    "not UTF-8": (raw(lambda d: d[:12] + b"\xff\xfe" + d[14:]), DAMAGED),
    "not JSON": (raw(lambda d: d[:9] + b"}{" + d[11:]), DAMAGED),
    "null bytes": (raw(lambda d: d[:9] + bytes(50) + d[59:]), DAMAGED),
    "a list": (header(lambda e: b"[1, 2]"), OTHER),
    "no tensors": (header(lambda e: b"{}"), DAMAGED),
    "nested without end": (header(lambda e: b'{"a":' * 50_000), DAMAGED),
    "an open string": (header(lambda e: b'{"a'), DAMAGED),
    "a number of a million digits": (
        header(lambda e: b'{"a":{"dtype":"F32","shape":[' + b"9" * 10**6 + b'],"data_offsets":[0,4]}}'),
        DAMAGED,
    ),
    "NaN as an extent": (entry(shape=[float("nan"), 4, 3, 3]), DAMAGED),
    "metadata that is no text": (header(lambda e: e.update(__metadata__={"step": 1})), DAMAGED),
    "metadata that is a list": (header(lambda e: e.update(__metadata__=["a"])), DAMAGED),
    "a name twice": (
        header(
            lambda e: b'{"extra":' + json.dumps(e[KEY]).encode() + b"," + json.dumps(e | {"extra": e[KEY]}).encode()[1:]
        ),
        r"has extra more than once|truncated or damaged",
    ),
    "a name twice, of the same bytes": (
        header(lambda e: b"{" + json.dumps({KEY: e[KEY]}).encode()[1:-1] + b"," + json.dumps(e).encode()[1:]),
        f"has {KEY} more than once",
    ),
    # entries
    "no dtype": (header(lambda e: e[KEY].pop("dtype") and None), DAMAGED),
    "no shape": (header(lambda e: e[KEY].pop("shape") and None), DAMAGED),
    "no offsets": (header(lambda e: e[KEY].pop("data_offsets") and None), DAMAGED),
    "unknown dtype": (entry(dtype="Q4_K"), DAMAGED),
    "dtype in small letters": (entry(dtype="f32"), DAMAGED),
    "dtype of another size": (entry(dtype="F16"), DAMAGED),
    "int32": (entry(dtype="I32"), f"does not fit:\n1 of a type other than .*\n  {KEY} is I32"),
    "complex numbers": (tensors(lambda t: t.update({KEY: t[KEY].to(torch.complex64)})), "is C64"),
    "bool": (tensors(lambda t: t.update({KEY: t[KEY] > 0})), "is BOOL"),
    "float8": (tensors(lambda t: t.update({KEY: t[KEY].to(torch.float8_e4m3fn)})), "is F8_E4M3"),
    "a fraction as an extent": (entry(shape=[16.5, 4, 3, 3]), DAMAGED),
    "a negative extent": (entry(shape=[-16, -4, 3, 3]), DAMAGED),
    "extents beyond 64 bits": (entry(shape=[2**62, 2**62]), DAMAGED),
    "an extent of 0": (entry(shape=[0, 4, 3, 3]), DAMAGED),
    "no extents": (entry(shape=[]), DAMAGED),
    "extents turned round": (entry(shape=[3, 3, 4, 16]), "is no known model"),
    "flat": (header(lambda e: e[TO_Q].update(shape=[32 * 32])), FIT),
    "a dimension too many": (header(lambda e: e[TO_Q].update(shape=[1, 32, 32])), FIT),
    "offsets turned round": (header(lambda e: e[KEY].update(data_offsets=e[KEY]["data_offsets"][::-1])), DAMAGED),
    "negative offsets": (entry(data_offsets=[-8, 2296]), DAMAGED),
    "offsets out of range": (entry(data_offsets=[10**12, 10**12 + 2304]), DAMAGED),
    "three offsets": (entry(data_offsets=[0, 4, 8]), DAMAGED),
    "overlapping tensors": (header(lambda e: e[TO_Q].update(data_offsets=e[TO_K]["data_offsets"])), DAMAGED),
    "tensors of one size swapped": (
        header(lambda e: swap_fields(e, VAE_BIAS, "model.diffusion_model.out.2.bias", "data_offsets", "shape")),
        FIT,
    ),
    "a tensor under another name": (header(lambda e: e.update({"renamed": e.pop(TO_Q)})), FIT),
    "a tensor too few": (tensors(lambda t: t.pop(TO_Q)), f"no {TO_Q}"),
    "a tensor too many": (tensors(lambda t: t.update(extra=torch.ones(1))), r"1 unknown:\n  extra"),
    "a name of a megabyte": (tensors(lambda t: t.update({"x" * 10**6: torch.ones(1)})), "1 unknown"),
    "another model's tensor": (tensors(lambda t: t.update({TO_K: torch.ones(32, 768)})), "of another shape"),
    # values
    "NaN": (value(float("nan")), f"{KEY} has {NUMBERS}"),
    "infinity": (value(float("inf"), TEXT), f"{TEXT} has {NUMBERS}"),
    "minus infinity": (value(float("-inf"), VAE_BIAS), f"{VAE_BIAS} has {NUMBERS}"),
    "NaN in float16": (value(float("nan"), dtype=torch.float16), NUMBERS),
    "NaN in bfloat16": (value(float("nan"), dtype=torch.bfloat16), NUMBERS),
    "infinity in float64": (value(float("inf"), dtype=torch.float64), NUMBERS),
    # other files under such a name
    "a web page": (raw(lambda d: b"<!DOCTYPE html><html><head><title>404</title>"), OTHER),
    "a config": (raw(lambda d: b'{"_class_name": "UNet2DConditionModel"}'), OTHER),
    "a picture": (raw(lambda d: b"\x89PNG\r\n\x1a\n" + d), OTHER),
    "GGUF": (raw(lambda d: b"GGUF" + d), OTHER),
    "a zip": (raw(lambda d: b"PK\x03\x04" + d), "is a pickle"),
    "a pickle": (
        lambda w, path: torch.save({"a": torch.ones(1)}, path, _use_new_zipfile_serialization=False),
        "is a pic",
    ),
    "a Git LFS pointer": (raw(lambda d: b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a"), "LFS pointer"),
    # no files
    "nothing": (lambda w, path: None, "does not exist"),
    "a folder": (lambda w, path: path.mkdir(), "is not a diffusers folder|no weights in"),
    "a link to nothing": (lambda w, path: path.symlink_to("nowhere"), "is a link to nothing"),
    "a link to itself": (lambda w, path: path.symlink_to(path), "cannot be opened|does not exist"),
    "a named pipe": (lambda w, path: os.mkfifo(path), "is no file"),
    "a socket": (lambda w, path: socket.socket(socket.AF_UNIX).bind(str(path)), "is no file"),
}


@pytest.mark.parametrize("case", FILES)
def test_named_file(case, whole, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make, message = FILES[case]
    path = tmp_path / "bad.safetensors"
    make(whole, path)
    with limits():
        said = refused(path, load)
        refused(path, ldm.inspect)
    assert said is not None and re.search(message, said), said
    assert len(said) < 5000
    assert [file.name for file in tmp_path.iterdir()] in ([], ["bad.safetensors"])


def test_good_files_are_good(whole):
    assert refused(whole / "good.safetensors") is None
    assert refused(whole / "good") is None


def test_the_limits_hold():
    """That the tests here can fail."""
    with pytest.raises(AssertionError), limits():
        bytearray(b"x" * int(MEMORY + 5e6))
    with pytest.raises(TimeoutError), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules[__name__], "SECONDS", 1)
        with limits():
            signal.pause()


@pytest.mark.parametrize("number", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("asked", [None, torch.float16, torch.bfloat16, torch.float32])
def test_no_number_in_any_dtype(asked, stored, number, whole, tmp_path):
    value(number, dtype=stored)(whole, tmp_path / "bad.safetensors")
    with pytest.raises(CheckpointError, match=f"bad.safetensors: {KEY} has {NUMBERS}"):
        load(tmp_path / "bad.safetensors", dtype=asked)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_numbers_whose_sum_is_none(dtype):
    large = torch.full((1000,), torch.finfo(dtype).max, dtype=dtype)
    assert all_finite(large) and all_finite(-large) and all_finite(large[:0])
    large[500], large[700] = float("inf"), float("-inf")
    assert not all_finite(large) and not all_finite(large[:600])


def test_numbers_beyond_the_dtype_asked_for(whole, tmp_path):
    value(1e5)(whole, tmp_path / "large.safetensors")
    with pytest.raises(CheckpointError, match=f"{KEY} has {NUMBERS} for torch.float16"):
        load(tmp_path / "large.safetensors", dtype=torch.float16)
    assert load(tmp_path / "large.safetensors", dtype=torch.bfloat16).unet.conv_in.weight.view(-1)[-1] == 99840


@pytest.mark.parametrize("path", ["x" * 300 + ".safetensors", "null\0.safetensors", "", "a/" * 3000])
def test_paths_that_cannot_be(path):
    with pytest.raises(CheckpointError):
        load(path)


UNREADABLE = """
import os, sys
import ldm
from ldm.checkpoint import CheckpointError
if os.geteuid() == 0:
    os.setuid(65534)
for path in sys.argv[1:]:
    for read in (ldm.checkpoint.load, ldm.inspect):
        try:
            read(path)
        except CheckpointError as error:
            assert "bad" in str(error) and "ermission" in str(error), error
            print(read.__name__)
try:
    ldm.checkpoint.load(os.path.dirname(sys.argv[1]) + "/good", vae=os.path.dirname(sys.argv[1]) + "/badly")
except CheckpointError as error:
    assert "badly" in str(error) and "ermission" in str(error), error
    print("load")
"""


def test_unreadable(whole, tmp_path):
    """The superuser may read everything: then another user tries, who must get as far as these files."""
    for folder in (tmp_path, *tmp_path.parents):
        if os.geteuid() == 0 and (mode := folder.stat().st_mode) & 0o055 != 0o055:
            folder.chmod(mode | 0o055)
    shutil.copy(whole / "good.safetensors", tmp_path / "bad.safetensors")
    (tmp_path / "bad.safetensors").chmod(0)
    shutil.copytree(whole / "good", tmp_path / "good")
    shutil.copytree(whole / "good", tmp_path / "bad")
    (tmp_path / "bad" / "unet" / "config.json").chmod(0)
    (tmp_path / "badly").mkdir(mode=0)
    paths = [tmp_path / "bad.safetensors", tmp_path / "bad", tmp_path / "badly", tmp_path / "badly" / "m.safetensors"]
    for part in ("unet", "vae", "tokenizer", "text_encoder"):
        paths.append(shutil.copytree(whole / "good", tmp_path / f"bad {part}"))
        (paths[-1] / part).chmod(0)
    run = subprocess.run([sys.executable, "-c", UNREADABLE, *paths], capture_output=True, text=True)
    # load refuses them all; of a folder with something wrong in it inspect makes a report. A VAE is looked for at once.
    assert (run.stdout.count("load"), run.stdout.count("inspect")) == (len(paths) + 1, 3), run.stderr + run.stdout


# Folders


def edited(file, **fields):
    def make(path):
        where = path / file
        where.write_text(json.dumps(json.loads(where.read_text()) | fields))

    return make


def written(file, content):
    def make(path):
        where = path / file
        where.unlink(missing_ok=True)
        where.write_bytes(content if isinstance(content, bytes) else content.encode())

    return make


def replaced(file, make):
    def change(path):
        where = path / file
        shutil.rmtree(where) if where.is_dir() else where.unlink()
        make(where)

    return change


UNET, VAE, SCHEDULER = "unet/config.json", "vae/config.json", "scheduler/scheduler_config.json"
TOKENIZER = "tokenizer/tokenizer.json"
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
INDEX = "unet/diffusion_pytorch_model.safetensors.index.json"
ONLY = "but this version only does"


def two_files(**changes):
    """The tokenizer as vocab.json and merges.txt, one of them changed."""

    def make(path):
        model = vocabulary_of(path)
        (path / TOKENIZER).unlink()
        files = {"vocab": path / "tokenizer/vocab.json", "merges": path / "tokenizer/merges.txt"}
        files["vocab"].write_text(json.dumps(model["vocab"]))
        files["merges"].write_text("\n".join(" ".join(pair) for pair in model["merges"]))
        for name, change in changes.items():
            change(files[name])

    return make


def many_words():
    return {f"word{i}": i for i in range(2, 200_000)}


def indexed(weight_map):
    return lambda p: ((p / WEIGHTS).unlink(), written(INDEX, json.dumps({"weight_map": weight_map}))(p))


FOLDERS = {
    "empty": (lambda p: (shutil.rmtree(p), p.mkdir()), "has no model_index.json"),
    "index of a list": (written("model_index.json", "[1]"), "accepted is a JSON object"),
    "index of nothing": (written("model_index.json", ""), "is not JSON"),
    "index not UTF-8": (written("model_index.json", b'{"a": "\xff"}'), "is not JSON"),
    "index nested without end": (written("model_index.json", "[" * 100_000), "is not JSON"),
    "index is a folder": (replaced("model_index.json", Path.mkdir), "has no model_index.json"),
    "index is a link to itself": (replaced("model_index.json", lambda f: f.symlink_to(f)), "has no model_index.json"),
    "index is a pipe": (replaced("model_index.json", os.mkfifo), "has no model_index.json"),
    "index of 300 MB": (replaced("model_index.json", sparse(300_000_000)), "is too long"),
    "a config of 700 MB": (replaced(UNET, sparse(700_000_000)), "is too long"),
    "a config of a million items": (written(UNET, '{"a": [' + "{}," * 10**6 + "0]}"), "is too long"),
    "the largest config": (
        edited(
            UNET,
            block_out_channels=[32] * 5,
            down_block_types=["CrossAttnDownBlock2D"] * 5,
            up_block_types=["CrossAttnUpBlock2D"] * 5,
            layers_per_block=3,
            transformer_layers_per_block=12,
            attention_head_dim=2,
        ),
        FIT,
    ),
    "a vocabulary of 300 MB": (two_files(vocab=sparse(300_000_000)), "is too long"),
    "merges of 80 MB": (two_files(merges=sparse(80_000_000, b"a b\n" * 100)), "is too long"),
    "merges of a million lines": (two_files(merges=lambda f: f.write_text("a b\n" * 10**6)), "lines of merges"),
    "a vocabulary of 200,000 tokens": (
        two_files(vocab=lambda f: f.write_text(json.dumps({"<|startoftext|>": 0, "<|endoftext|>": 1} | many_words()))),
        "at most 100,000",
    ),
    "an index of 300,000 shards": (
        indexed({str(i): f"{i}.safetensors" for i in range(300_000)}),
        "is too long",
    ),
    "an index of 2,000 shards": (indexed({str(i): f"{i}.safetensors" for i in range(2000)}), "at most 1000"),
    "a tensor in two shards": (
        lambda p: (
            (p / WEIGHTS).rename(p / "unet/a.safetensors"),
            shutil.copy(p / "unet/a.safetensors", p / "unet/b.safetensors"),
            written(INDEX, '{"weight_map": {"conv_in.bias": "a.safetensors", "conv_out.bias": "b.safetensors"}}')(p),
        ),
        r"b\.safetensors has .*, and so has .*a\.safetensors",
    ),
    "a tensor in another shard": (
        lambda p: (
            (p / WEIGHTS).rename(p / "unet/a.safetensors"),
            save_file({"x": torch.ones(1)}, p / "unet/b.safetensors"),
            written(INDEX, '{"weight_map": {"conv_in.bias": "b.safetensors", "conv_out.bias": "a.safetensors"}}')(p),
        ),
        r"conv_in\.bias is in b\.safetensors, but it is in a\.safetensors",
    ),
    "a tensor in no shard": (
        lambda p: (
            (p / WEIGHTS).rename(p / "unet/a.safetensors"),
            written(INDEX, '{"weight_map": {"conv_in.b": "a.safetensors"}}')(p),
        ),
        r"but it is in none of its files",
    ),
    "latents of another mean": (edited(VAE, latents_mean=[0.5] * 4, latents_std=[2.0] * 4), ONLY),
    "latents of mean 0": (edited(VAE, latents_mean=[0.0] * 4), ONLY),
    "another pipeline": (edited("model_index.json", _class_name="FluxPipeline"), ONLY),
    "a pipeline of no name": (edited("model_index.json", _class_name=["a"]), ONLY),
    "unet is missing": (lambda p: shutil.rmtree(p / "unet"), "has no config.json"),
    "unet is a file": (replaced("unet", lambda f: f.write_text("x")), "has no config.json"),
    "unet is a link to itself": (replaced("unet", lambda f: f.symlink_to(f)), "has no config.json"),
    "unet without weights": (lambda p: (p / WEIGHTS).unlink(), "no weights in"),
    "weights are a folder": (replaced(WEIGHTS, Path.mkdir), "no weights in"),
    "weights are empty": (written(WEIGHTS, ""), "is empty"),
    "weights of another part": (
        lambda p: shutil.copy(p / "vae/diffusion_pytorch_model.safetensors", p / WEIGHTS),
        "there is no unet at all",
    ),
    "a billion layers": (edited(UNET, layers_per_block=10**9), f"{ONLY} whole numbers from 1 to"),
    "a hundred thousand layers": (edited(UNET, layers_per_block=10**5), f"{ONLY} at most 3"),
    "a hundred thousand levels": (edited(UNET, block_out_channels=[32] * 10**5), f"{ONLY} at most 5"),
    "a trillion channels": (edited(UNET, block_out_channels=[10**12, 10**12]), f"{ONLY} a list of whole numbers from"),
    "many channels": (edited(UNET, block_out_channels=[999_984, 999_984]), FIT),
    "channels of text": (edited(UNET, block_out_channels="many"), ONLY),
    "a depth of a million": (
        edited(UNET, transformer_layers_per_block=10**6 - 1),
        f"{ONLY} a whole number from 1 to 12",
    ),
    "a negative width": (edited(UNET, cross_attention_dim=-24), ONLY),
    "true as a number": (edited(UNET, in_channels=True), ONLY),
    "NaN": (edited(VAE, scaling_factor=float("nan")), ONLY),
    "infinity": (edited(VAE, scaling_factor=float("inf")), ONLY),
    "no groups": (edited(UNET, norm_num_groups=0), ONLY),
    "groups that do not divide": (edited(UNET, norm_num_groups=7), ONLY),
    "heads that do not divide": (edited(UNET, attention_head_dim=5), ONLY),
    "a number of ten thousand digits": (written(UNET, '{"in_channels": ' + "9" * 10**4 + "}"), "is not JSON|only does"),
    "an activation of none": (edited("text_encoder/config.json", hidden_act=None), ONLY),
    "a million text layers": (edited("text_encoder/config.json", num_hidden_layers=999_999), f"{ONLY} at most 64"),
    "a text as long as a book": (edited("text_encoder/config.json", max_position_embeddings=999_999), FIT),
    "betas of text": (edited(SCHEDULER, beta_start="small"), "beta_start"),
    "betas of infinity": (edited(SCHEDULER, beta_end=float("inf")), "beta_end"),
    "betas above 1": (edited(SCHEDULER, beta_end=1e5), "beta_end"),
    "a trillion timesteps": (
        edited("scheduler/scheduler_config.json", num_train_timesteps=10**12),
        "num_train_timesteps",
    ),
    "another prediction": (edited(SCHEDULER, prediction_type="flow"), ONLY),
    "tokenizer is missing": (lambda p: shutil.rmtree(p / "tokenizer"), "no tokenizer in"),
    "tokenizer without a model": (written(TOKENIZER, "{}"), "is no tokenizer"),
    "tokenizer of numbers": (
        written(TOKENIZER, '{"model": {"vocab": 5, "merges": 6}}'),
        "is no tokenizer",
    ),
    "tokenizer with negative ids": (
        written(TOKENIZER, '{"model": {"vocab": {"a": -1}, "merges": []}}'),
        "is no tokenizer",
    ),
    "tokenizer that merges what is not there": (
        lambda p: edited(TOKENIZER, model={**vocabulary_of(p), "merges": [["qq", "zz"]]})(p),
        "is no tokenizer",
    ),
    "tokenizer of no length": (edited("tokenizer/tokenizer_config.json", model_max_length=0), ONLY),
    "tokenizer of a text's length": (edited("tokenizer/tokenizer_config.json", model_max_length="77"), ONLY),
    "padding that is not there": (edited("tokenizer/tokenizer_config.json", pad_token="<nothing>"), "is no tokenizer"),
    "shards that lead elsewhere": (
        lambda p: ((p / WEIGHTS).unlink(), written(INDEX, '{"weight_map": {"a": "../../secret.safetensors"}}')(p)),
        ONLY,
    ),
    "shards that are missing": (
        lambda p: ((p / WEIGHTS).unlink(), written(INDEX, '{"weight_map": {"a": "one.safetensors"}}')(p)),
        "one.safetensors does not exist",
    ),
    "no shards": (lambda p: ((p / WEIGHTS).unlink(), written(INDEX, '{"weight_map": {}}')(p)), ONLY),
    "an index of itself": (
        lambda p: ((p / WEIGHTS).unlink(), written(INDEX, json.dumps({"weight_map": {"a": Path(INDEX).name}}))(p)),
        "not a safetensors file",
    ),
}


def vocabulary_of(path):
    return json.loads((path / "tokenizer" / "tokenizer.json").read_text())["model"]


@pytest.mark.parametrize("case", FOLDERS)
def test_named_folder(case, whole, tmp_path):
    make, message = FOLDERS[case]
    path = shutil.copytree(whole / "good", tmp_path / "bad")
    make(path)
    with limits():
        said = refused(path, load)
        refused(path, ldm.inspect)
    assert said is not None and re.search(message, said), said
    assert len(said) < 5000


def test_damaged_metadata(whole, tmp_path):
    """The JSON files that a single file carries are read as strictly as a folder's."""
    convert(whole / "good", tmp_path / "bad.safetensors")
    entries, data = parts_of(tmp_path / "bad.safetensors")
    for name, text in {UNET: "{", VAE: "[]", "model_index.json": "", "tokenizer/vocab.json": "{}"}.items():
        damaged = entries | {"__metadata__": entries["__metadata__"] | {name: text}}
        (tmp_path / "bad.safetensors").write_bytes(assemble(damaged, data))
        assert refused(tmp_path / "bad.safetensors", load) is not None
    index = {"model_index.json": entries["__metadata__"]["model_index.json"]}
    (tmp_path / "bad.safetensors").write_bytes(assemble(entries | {"__metadata__": index}, data))
    assert "has no vae/config.json" in refused(tmp_path / "bad.safetensors", load)


def test_a_name_that_is_not_utf8(whole, tmp_path):
    """Of a good file: safetensors cannot open it, and that is no damage."""
    path = tmp_path / os.fsdecode(b"bad \xff.safetensors")
    shutil.copy(whole / "good.safetensors", path)
    for read in (load, ldm.inspect):
        assert "name that is not UTF-8, which safetensors cannot open: rename it" in refused(path, read)


# LoRA and embeddings

SMALL = {
    "cut": lambda d: d[:-3],
    "length of all bits": lambda d: b"\xff" * 8 + d[8:],
    "not UTF-8": lambda d: d.replace(b"weight", b"w\xffight").replace(b"params", b"p\xfframs"),
    "empty": lambda d: b"",
    "of no tensors": lambda d: assemble({}, b""),
    "NaN": lambda d: d[:-4] + b"\x00\x00\xc0\x7f",
    "of another width": lambda d: d.replace(b"[2,16]", b"[16,2]").replace(b"[3,24]", b"[4,18]"),
    "of integers": lambda d: d.replace(b'"F32"', b'"I32"'),
    "unmatched": lambda d: d.replace(b"attn1_to_q", b"attn1_to_z").replace(b"emb_params", b"emb param."),
}


@pytest.mark.parametrize("name", ["lora", "word"])
@pytest.mark.parametrize("case", SMALL)
def test_small_files(case, name, whole, tmp_path):
    """Neither half of one is loaded: the pipeline is what it was."""
    data = (whole / f"{name}.safetensors").read_bytes()
    path = tmp_path / "bad.safetensors"
    path.write_bytes(SMALL[case](data))
    pipe = ldm.Pipeline.from_pretrained(whole / "good")
    read = pipe.load_lora if name == "lora" else pipe.load_embedding
    read(whole / f"{name}.safetensors")
    before = {n: p.clone() for net in (pipe.unet, pipe.text_encoder) for n, p in net.state_dict().items()}
    if (case, name) == ("unmatched", "word"):  # then it is diffusers' file of a word of that name
        assert read(path) == "emb param."
        return
    with limits():
        assert refused(path, read)
    after = {n: p for net in (pipe.unet, pipe.text_encoder) for n, p in net.state_dict().items()}
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert len(pipe.loras) == (name == "lora")


# Generated cases

JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.sampled_from([0, 1, -1, 3, 7, 8, 64, 2**31, 10**6, 1e-5, 0.5, 1e308, float("nan"), float("inf")]),
    st.text(max_size=8),
    st.lists(st.integers(-2, 2**40), max_size=5),
    st.lists(st.text(max_size=3), max_size=3),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)
DTYPES = st.sampled_from(
    ["F64", "F32", "F16", "BF16", "I64", "I32", "U8", "BOOL", "F8_E4M3", "C64", "F4", "", "f32", 7]
)


@fuzz(8000)
@given(data=st.data())
def test_any_bytes(data, whole, fuzzed):
    """Cut, overwritten, longer or shorter anywhere."""
    good = (whole / "good.safetensors").read_bytes()
    end = header_end(good)
    place = st.one_of(st.integers(0, 9), st.integers(0, end + 8), st.integers(0, len(good)))
    changed = bytearray(good)
    for _ in range(data.draw(st.integers(1, 3))):
        at = min(data.draw(place), len(changed))
        match data.draw(st.sampled_from(["cut", "overwrite", "insert", "delete", "length"])):
            case "cut":
                del changed[at:]
            case "overwrite":
                junk = data.draw(st.binary(min_size=1, max_size=16))
                changed[at : at + len(junk)] = junk
            case "insert":
                changed[at:at] = data.draw(st.binary(min_size=1, max_size=16))
            case "delete":
                del changed[at : at + data.draw(st.integers(1, 64))]
            case "length":
                changed[:8] = data.draw(st.integers(0, 2**64 - 1)).to_bytes(8, "little")
    fuzzed(bytes(changed), data.draw(READERS))


@fuzz(1200)
@given(data=st.data())
def test_any_header(data, whole, fuzzed):
    """JSON in order, but for what it says."""
    entries, values = parts_of(whole / "good.safetensors")
    for _ in range(data.draw(st.integers(1, 3))):
        name, other = (data.draw(st.sampled_from(sorted(entries))) for _ in range(2))
        if not isinstance(entries[name], dict) or not isinstance(entries[other], dict):
            continue
        shape = entries[name].get("shape")
        match data.draw(
            st.sampled_from(["dtype", "shape", "turned", "offsets", "swap", "name", "drop", "copy", "junk"])
        ):
            case "dtype":
                entries[name]["dtype"] = data.draw(DTYPES)
            case "shape":
                entries[name]["shape"] = data.draw(st.one_of(JUNK, st.lists(st.integers(0, 64), max_size=5)))
            case "turned" if isinstance(shape, list):
                entries[name]["shape"] = data.draw(st.permutations(shape))
            case "offsets":
                low = data.draw(st.integers(-5, len(values) + 5))
                entries[name]["data_offsets"] = [low, data.draw(st.integers(-5, len(values) + 5))]
            case "swap":
                fields = data.draw(st.sets(st.sampled_from(["shape", "data_offsets", "dtype"]), min_size=1))
                for field in fields & entries[name].keys() & entries[other].keys():
                    swap_fields(entries, name, other, field)
            case "name":
                entries[data.draw(st.text(max_size=20))] = entries.pop(name)
            case "drop":
                del entries[name]
            case "copy":
                entries[data.draw(st.text(max_size=20))] = dict(entries[name])
            case "junk":
                entries[name][data.draw(st.sampled_from(["dtype", "shape", "data_offsets", "x"]))] = data.draw(JUNK)
    fuzzed(assemble(entries, values), data.draw(READERS))


@fuzz(200)
@given(data=st.data())
def test_any_value(data, whole, fuzzed):
    """A good header; any bits in some of the values. What loads is finite."""
    good = bytearray((whole / "good.safetensors").read_bytes())
    at = data.draw(st.integers(header_end(good) // 4, len(good) // 4 - 1)) * 4  # data begin at a multiple of 8
    bits = data.draw(st.sampled_from([0x7FC00000, 0x7F800000, 0xFF800000, 0x7F7FFFFF, 0xFFFFFFFF, 0]))
    good[at : at + 4] = bits.to_bytes(4, "little")
    said = fuzzed(bytes(good), load)
    assert (said is None) == (bits in (0x7F7FFFFF, 0))
    assert said is None or NUMBERS in said


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory):
    path = tmp_path_factory.mktemp("fuzz") / "fuzzed.safetensors"

    def run(data, reader):
        path.write_bytes(data)
        with limits():
            return refused(path, reader)

    return run


@pytest.fixture(scope="module")
def copies(whole, tmp_path_factory):
    """A good folder, mended after each case."""
    path = shutil.copytree(whole / "good", tmp_path_factory.mktemp("fuzz") / "fuzzed")
    return path, {file: file.read_bytes() for file in path.rglob("*.json")}


@fuzz(600)
@given(data=st.data())
def test_any_config(data, copies):
    path, good = copies
    file = data.draw(st.sampled_from(sorted(good)))
    fields = json.loads(good[file])
    match data.draw(st.sampled_from(["field", "field", "field", "drop", "cut", "bytes", "gone"])):
        case "field":
            name = data.draw(st.one_of(st.sampled_from(sorted(fields)), st.text(max_size=6)))
            text = json.dumps(fields | {name: data.draw(JUNK)}).encode()
        case "drop":
            name = data.draw(st.sampled_from(sorted(fields)))
            text = json.dumps({k: v for k, v in fields.items() if k != name}).encode()
        case "cut":
            text = good[file][: data.draw(st.integers(0, len(good[file])))]
        case "bytes":
            at = data.draw(st.integers(0, len(good[file])))
            text = good[file][:at] + data.draw(st.binary(min_size=1, max_size=8)) + good[file][at + 1 :]
        case "gone":
            text = None
    try:
        file.unlink() if text is None else file.write_bytes(text)
        with limits():
            refused(path, data.draw(READERS))
    finally:
        file.write_bytes(good[file])
