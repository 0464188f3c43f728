"""Models by their hub names, from a small hub on the loopback interface that counts what it is asked for."""

import hashlib
import http.server
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from urllib.parse import unquote, urlsplit

import huggingface_hub
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLImg2ImgPipeline
from family import REFINER, XL, xl
from safetensors.torch import save_file
from synthetic import diffusers_pipeline

import ldm
from ldm import hub
from ldm.checkpoint import load
from ldm.source import CheckpointError

NAME = "owner/tiny"
PARTS = ("unet", "vae", "text_encoder", "text_encoder_2")
DECOYS = (
    "README.md",
    "tiny.safetensors",
    "tiny.ckpt",
    "unet/diffusion_pytorch_model.bin",
    "unet/diffusion_pytorch_model.non_ema.safetensors",
    "unet/diffusion_flax_model.msgpack",
    "unet/model.onnx",
    "text_encoder/pytorch_model.bin",
    "vae/diffusion_pytorch_model.bin",
    "safety_checker/config.json",
    "safety_checker/model.safetensors",
    "feature_extractor/preprocessor_config.json",
    "openvino/model.xml",
)


class Hub(http.server.ThreadingHTTPServer):
    """`commits`: of each repository, its commits and their folders; `branches`: the names of commits.

    Every request is kept in `asked`. `gated` repositories want `token`. `cut` says how often the body of a file ends
    in the middle, `empty` lets it end at once after that, and `moved` is called when a file has been sent.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Routes)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.commits, self.branches, self.asked = {}, {}, []
        self.gated, self.token, self.broken = set(), "hf_secret", set()
        self.cut, self.resumes, self.moved = {}, True, {}

    def add(self, name, folder, *branches):
        commit = hashlib.sha1(f"{name} {folder}".encode()).hexdigest()
        self.commits.setdefault(name, {})[commit] = Path(folder)
        self.branches.setdefault(name, {}).update(dict.fromkeys(branches or ["main"], commit))
        return commit

    def files(self, method="GET"):
        """The files that were asked for, without what comes before them."""
        found = [re.fullmatch(r"/.*/resolve/[^/]+/(.+)", path) for asked, path in self.asked if asked == method]
        return [match[1] for match in found if match]


class Routes(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # headers and bodies are written one after the other
    server: Hub

    def log_message(self, *args):
        pass

    def answer(self, status, body=b"", **headers):
        self.send_response(status)
        for name, value in ({"content_length": len(body)} | headers).items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_GET(self):
        path = urlsplit(self.path).path
        self.server.asked.append((self.command, path))
        api = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        if not api and not file:
            return self.answer(404)
        name, revision, *rest = (part and unquote(part) for part in (api or file).groups())
        if name not in self.server.commits:
            return self.answer(401, X_Error_Code="RepoNotFound")
        if name in self.server.gated and self.headers["Authorization"] != f"Bearer {self.server.token}":
            return self.answer(403, X_Error_Code="GatedRepo")
        if name in self.server.broken:
            return self.answer(500)
        commit = self.server.branches[name].get(revision or "main", revision)
        if commit not in self.server.commits[name]:
            return self.answer(404, X_Error_Code="RevisionNotFound")
        folder = self.server.commits[name][commit]
        if api:
            names = [str(path.relative_to(folder)) for path in sorted(folder.rglob("*")) if path.is_file()]
            info = {"id": name, "sha": commit, "siblings": [{"rfilename": name} for name in names]}
            return self.answer(200, json.dumps(info).encode(), content_type="application/json")
        return self.send_file(folder / rest[0], commit)

    do_HEAD = do_GET

    def send_file(self, file, commit):
        if not file.is_file():
            return self.answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
        body = file.read_bytes()
        headers = {"ETag": f'"{hashlib.sha1(body).hexdigest()}"', "X_Repo_Commit": commit}
        if self.command == "HEAD":
            return self.answer(200, content_length=len(body), **headers)
        begun = re.fullmatch(r"bytes=(\d+)-", self.headers["Range"] or "")
        rest = body[int(begun[1]) :] if begun else body
        if self.server.cut.get(file.name, 0) > 0:
            self.server.cut[file.name] -= 1
            self.close_connection = True
            headers["content_length"] = len(rest)
            rest = b"" if begun else rest[: len(rest) // 2]
        self.answer(206 if begun else 200, rest, **headers)
        if file.name in self.server.moved:
            self.server.moved.pop(file.name)()
        return None


@pytest.fixture
def server():
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    huggingface_hub.close_session()
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(autouse=True)
def settings(server, tmp_path, monkeypatch):
    """huggingface_hub's own, as the environment would set them before it is imported."""
    constants = huggingface_hub.constants
    for name, value in {
        "ENDPOINT": server.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": server.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(tmp_path / "cache"),
        "HF_TOKEN_PATH": str(tmp_path / "token"),
        "AGENT_HARNESSES_PATH": str(tmp_path / "harnesses"),
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_PROGRESS_BARS": True,
    }.items():
        monkeypatch.setattr(constants, name, value)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_OIDC_RESOURCE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # it waits before it asks again
    monkeypatch.chdir(tmp_path)
    return constants


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Tiny models of two seeds, the first with half weights of another and with what nobody should ask for."""
    path = tmp_path_factory.mktemp("models")
    diffusers_pipeline().save_pretrained(path / "tiny")
    diffusers_pipeline(seed=1).to(torch.float16).save_pretrained(path / "tiny", variant="fp16")
    for decoy in DECOYS:
        (path / "tiny" / decoy).parent.mkdir(exist_ok=True)
        (path / "tiny" / decoy).write_bytes(b"nobody wants this")
    diffusers_pipeline(seed=2).save_pretrained(path / "other")
    diffusers_pipeline(seed=2).save_pretrained(path / "sharded", max_shard_size="80KB")
    xl(XL).save_pretrained(path / "XL")
    xl(REFINER, StableDiffusionXLImg2ImgPipeline).save_pretrained(path / "refiner")
    return path


@pytest.fixture
def model(folders, tmp_path):
    """A folder that a test may spoil."""
    return Path(shutil.copytree(folders / "tiny", tmp_path / "spoilt"))


def draw(pipe):
    return pipe("a cat", steps=2, progress=False)


def assert_same(ours, theirs):
    assert (ours.size, ours.scheduler, ours.zero_negative) == (theirs.size, theirs.scheduler, theirs.zero_negative)
    for part in PARTS:
        a, b = (getattr(parts, part) for parts in (ours, theirs))
        assert (a is None) == (b is None)
        if a is not None:
            assert a.config == b.config
            assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    for name in ("tokenizer", "tokenizer_2"):
        a, b = (getattr(parts, name) for parts in (ours, theirs))
        assert (a and (a.vocab, a.pad, a.length)) == (b and (b.vocab, b.pad, b.length))


def assert_refused(message, *arguments, **options):
    with pytest.raises(CheckpointError, match=message) as error:
        ldm.Pipeline.from_pretrained(*arguments, **options)
    assert str(error.value).startswith(arguments[0]) or str(error.value).startswith(str(options.get("vae")))


# What is fetched

NEEDED = {
    "model_index.json",
    "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
    "text_encoder/config.json",
    "text_encoder/model.safetensors",
    "tokenizer/tokenizer_config.json",
    "tokenizer/tokenizer.json",
    "scheduler/scheduler_config.json",
}


def test_pictures_are_those_of_the_folder_and_nothing_else_is_fetched(server, folders):
    server.add(NAME, folders / "tiny")
    pipe = ldm.Pipeline.from_pretrained(NAME)
    assert pipe.name == NAME
    ours, theirs = draw(pipe), draw(ldm.Pipeline.from_pretrained(folders / "tiny"))
    assert torch.equal(ours.latents, theirs.latents)
    assert np.array_equal(ours.images[0], theirs.images[0])
    assert set(server.files()) == NEEDED and len(server.files()) == len(NEEDED)
    assert not set(server.files("HEAD")) & set(DECOYS)


def test_the_second_time_it_only_asks_whether_the_branch_has_moved(server, folders):
    server.add(NAME, folders / "tiny")
    load(NAME)
    server.asked.clear()
    assert_same(load(NAME), load(folders / "tiny"))
    assert server.asked == [("HEAD", f"/{NAME}/resolve/main/model_index.json")]


@pytest.mark.parametrize("name", ["XL", "refiner", "sharded"])
def test_other_models(name, server, folders):
    server.add(NAME, folders / name)
    assert_same(load(NAME), load(folders / name))
    if name == "sharded":
        assert len([file for file in server.files() if re.fullmatch(r"unet/.*-of-.*", file)]) > 2


def test_a_tokenizer_of_two_files(server, model):
    tokenizer = model / "tokenizer"
    both = json.loads((tokenizer / "tokenizer.json").read_text())["model"]
    (tokenizer / "vocab.json").write_text(json.dumps(both["vocab"]))
    (tokenizer / "merges.txt").write_text("\n".join(" ".join(pair) for pair in both["merges"]))
    server.add(NAME, model)
    assert_same(load(NAME), load(model))
    assert "tokenizer/tokenizer.json" not in server.files()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, None])
def test_half_weights_are_for_float16_alone(dtype, server, folders):
    server.add(NAME, folders / "tiny")
    assert_same(load(NAME, dtype=dtype), load(folders / "tiny", dtype=dtype))
    half = [file for file in server.files() if ".fp16." in file]
    assert len(half) == (3 if dtype == torch.float16 else 0)
    assert len([file for file in server.files() if file.endswith(".safetensors")]) == 3


def test_half_weights_where_there_are_no_others(server, model):
    for file in [*model.glob("*/model.safetensors"), *model.glob("*/diffusion_pytorch_model.safetensors")]:
        file.unlink()
    server.add(NAME, model)
    assert_same(load(NAME), load(model))


def test_another_vae(server, folders, tmp_path):
    server.add(NAME, folders / "tiny")
    theirs = load(folders / "tiny", vae=folders / "other" / "vae")
    assert_same(load(NAME, vae=folders / "other" / "vae"), theirs)
    assert not [file for file in server.files() if file.startswith("vae/") and file != "vae/config.json"]
    save_file(theirs.vae.state_dict(), tmp_path / "vae.safetensors")
    assert_same(load(NAME, vae="vae.safetensors"), theirs)

    (folders / "other" / "vae" / "duplicate.safetensors").touch()
    server.add("owner/vae", folders / "other" / "vae")
    server.asked.clear()
    assert_same(load(NAME, vae="owner/vae"), theirs)
    assert_same(load(folders / "tiny", vae="owner/vae"), theirs)
    assert server.files() == ["config.json", "diffusion_pytorch_model.safetensors"]


def test_revisions(server, folders):
    server.add(NAME, folders / "tiny")
    commit = server.add(NAME, folders / "other", "v2", "refs/pr/1")
    for revision in ("v2", "refs/pr/1", commit):
        assert_same(load(NAME, revision=revision), load(folders / "other"))
    assert ldm.Pipeline.from_pretrained(NAME, revision="v2").name == NAME
    assert_same(load(NAME), load(folders / "tiny"))
    server.add(NAME, folders / "other")
    assert_same(load(NAME), load(folders / "other"))


@pytest.mark.parametrize("file", ["model_index.json", "config.json", "diffusion_pytorch_model.safetensors"])
def test_all_is_from_one_commit_though_the_branch_moves(file, server, folders):
    server.add(NAME, folders / "tiny")
    server.moved[file] = lambda: server.add(NAME, folders / "other")
    assert_same(load(NAME), load(folders / "tiny"))
    assert not server.moved
    assert_same(load(NAME), load(folders / "other"))


# What goes wrong


def test_wrong_revision(server, folders):
    server.add(NAME, folders / "tiny")
    assert_refused(f"{NAME}, revision v9, on the Hugging Face hub: it has no such revision: give", NAME, revision="v9")
    commit = "0" * 40
    assert_refused(f"{NAME}, revision {commit}, .* it has no such revision", NAME, revision=commit)


def test_no_such_repository(server):
    assert_refused(
        "nobody/none, revision main, .* it is not there .*, or is private: then `hf auth login`", "nobody/none"
    )


def test_gated(server, folders, tmp_path):
    server.add(NAME, folders / "tiny")
    server.gated.add(NAME)
    assert_refused("its owner grants access: ask on the repository's page, then log in", NAME)
    (tmp_path / "token").write_text(server.token)
    assert_same(load(NAME), load(folders / "tiny"))


@pytest.mark.parametrize(
    ("gone", "message"),
    [
        ("unet/config.json", "it has no unet/config.json, and cannot be loaded without: give another revision"),
        ("unet/diffusion_pytorch_model*", r"no weights that are loaded here; looked for unet/\S+\.safetensors, unet/"),
        ("text_encoder/model*", "no weights that are loaded here; looked for text_encoder/model.safetensors, "),
        ("tokenizer/tokenizer.json", "it has no tokenizer/tokenizer.json"),
        ("scheduler/*", "it has no scheduler/scheduler_config.json"),
    ],
)
def test_missing_file(gone, message, server, model):
    for file in model.glob(gone):
        if file.suffix != ".bin":
            file.unlink()
    server.add(NAME, model)
    assert_refused(f"{NAME}, revision main, on the Hugging Face hub: .*{message}", NAME)
    assert not [file for file in server.files() if file.endswith(".bin")]


def test_missing_shard(server, folders, tmp_path):
    model = Path(shutil.copytree(folders / "sharded", tmp_path / "spoilt"))
    shard = sorted(model.glob("unet/*-of-*"))[1]
    shard.unlink()
    server.add(NAME, model)
    assert_refused(f"it has no unet/{shard.name}, and cannot", NAME)


def test_no_diffusers_folder(server, folders, model):
    (model / "model_index.json").unlink()
    server.add(NAME, model, "main", "v2")
    single = r"it has no model_index.json, but .*tiny\.safetensors.*`hf download owner/tiny FILE`"
    assert_refused(single, NAME)
    assert_refused(f"revision v2.*{single}", NAME, revision="v2")
    server.add("owner/vae", folders / "tiny" / "feature_extractor")
    path = str(folders / "tiny")
    assert_refused("owner/vae, .* it has no config.json, but no safetensors files either", path, vae="owner/vae")


def test_an_index_of_another_kind(server, model):
    (model / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    server.add(NAME, model)
    with pytest.raises(CheckpointError, match=r"_class_name is 'FluxPipeline', but this version only does"):
        load(NAME)
    assert server.files() == ["model_index.json"]


def test_shards_are_looked_for_in_the_repository_alone(server, folders, tmp_path):
    model = Path(shutil.copytree(folders / "sharded", tmp_path / "spoilt"))
    index = model / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../../../../secret.safetensors"}}))
    server.add(NAME, model)
    with pytest.raises(CheckpointError, match=r"weight_map is .*secret.*, but this version only does .* beside it"):
        load(NAME)
    assert not any("secret" in path for path in server.files())


def test_broken_transfer_and_then_a_good_one(server, folders):
    server.add(NAME, folders / "tiny")
    weights = "diffusion_pytorch_model.safetensors"
    server.cut[weights] = 100  # once in the middle, and then at once, as often as it asks
    assert_refused(f"{NAME}, revision main, .*: unet/{weights} was not fetched whole .*: call again", NAME)
    assert server.cut[weights] < 99
    server.cut.clear()
    server.asked.clear()
    assert_same(load(NAME), load(folders / "tiny"))
    assert "unet/config.json" not in server.files()  # what was complete is kept


def test_a_broken_transfer_is_taken_up_again(server, folders):
    server.add(NAME, folders / "tiny")
    server.cut["diffusion_pytorch_model.safetensors"] = 1
    assert_same(load(NAME), load(folders / "tiny"))
    assert server.files().count("unet/diffusion_pytorch_model.safetensors") == 2


def test_hub_out_of_order(server, folders):
    server.add(NAME, folders / "tiny")
    server.broken.add(NAME)
    assert_refused(f"{NAME}, revision main, .*: model_index.json is not in the cache, the hub was not reached", NAME)
    server.broken.clear()
    assert_same(load(NAME), load(folders / "tiny"))


# Without the network


@pytest.fixture
def unreachable(settings, monkeypatch):
    def cut_off():
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            url = f"http://127.0.0.1:{free.getsockname()[1]}"
        monkeypatch.setattr(settings, "ENDPOINT", url)
        monkeypatch.setattr(settings, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")

    return cut_off


def test_no_network(server, folders, unreachable):
    server.add(NAME, folders / "tiny")
    load(NAME)
    unreachable()
    assert_same(load(NAME), load(folders / "tiny"))
    message = "model_index.json is not in the cache, the hub was not reached .*, and there is no such path here"
    assert_refused(f"owner/new, revision main, .*: {message}", "owner/new")
    assert_refused(f"{NAME}, revision v2, .*: {message}", NAME, revision="v2")


def test_offline_with_a_filled_cache(server, folders, settings, tmp_path, monkeypatch):
    server.add(NAME, folders / "tiny")
    load(NAME)
    server.asked.clear()
    monkeypatch.setattr(settings, "HF_HUB_OFFLINE", True)
    assert_same(load(NAME), load(folders / "tiny"))
    shutil.rmtree(tmp_path / "cache" / "models--owner--tiny" / ".no_exist")  # as if another program had filled it
    pipe = ldm.Pipeline.from_pretrained(NAME)
    assert pipe.name == NAME
    assert torch.equal(draw(pipe).latents, draw(ldm.Pipeline.from_pretrained(folders / "tiny")).latents)
    assert server.asked == []


def test_offline_with_an_empty_or_half_filled_cache(server, folders, settings, monkeypatch):
    server.add(NAME, folders / "tiny")
    monkeypatch.setattr(settings, "HF_HUB_OFFLINE", True)
    assert_refused(rf"{NAME}, revision main, in the cache \(HF_HUB_OFFLINE is set\): model_index.json is not in", NAME)
    assert server.asked == []
    monkeypatch.setattr(settings, "HF_HUB_OFFLINE", False)
    server.cut["diffusion_pytorch_model.safetensors"] = 100
    assert_refused("was not fetched whole", NAME)
    monkeypatch.setattr(settings, "HF_HUB_OFFLINE", True)
    assert_refused(r"HF_HUB_OFFLINE is set\): it has no weights that are loaded here; looked for unet/", NAME)


def test_the_environment_is_heeded(server, folders, tmp_path):
    """In a process of its own: endpoint, cache and token as huggingface_hub reads them."""
    server.add(NAME, folders / "tiny")
    server.gated.add(NAME)
    variables = {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": server.token}
    code = f"import ldm.checkpoint; print(ldm.checkpoint.load({NAME!r}).size)"
    root = str(Path(ldm.__file__).parent.parent)

    environment = os.environ | variables | {"PYTHONPATH": root, "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout == "64\n", done.stderr
    assert (tmp_path / "home" / "hub" / "models--owner--tiny").is_dir() and not (tmp_path / "cache").exists()


# What is no hub name


@pytest.mark.parametrize("name", ["owner/tiny", "Stability-AI/sd_xl.base-1.0", "a/b", "_a/b_", "1/2", "a" * 96 + "/b"])
def test_names(name):
    assert hub.is_name(name)
    assert not hub.is_name(Path(name))
    assert not hub.is_name(name + ".safetensors")


PATHS = [
    "tiny",
    "owner/tiny/unet",
    "./owner/tiny",
    "../owner/tiny",
    "/owner/tiny",
    "owner/tiny/",
    "owner\\tiny",
    "~/tiny",
    "owner/",
    "/tiny",
    "owner/ti ny",
    "owner/tiny\n",
    "öwner/tiny",
    "-owner/tiny",
    "owner/tiny.",
    "owner/ti--ny",
    "owner/..",
    "owner/tiny..x",
    "a" * 97 + "/b",
    "owner/tiny.safetensors",
    "owner/tiny.ckpt",
    "owner/tiny.pt",
    "owner/tiny.bin",
    "owner/tiny.pth",
    "owner/tiny.git",
    "here/missing",
    "file/missing",
    "https://huggingface.co/owner/tiny",
    "owner/tiny@main",
    Path("owner/tiny"),
    Path("here/missing"),
]


@pytest.mark.parametrize("path", PATHS, ids=repr)
def test_paths_ask_for_nothing(path, server, folders, tmp_path, monkeypatch):
    server.add(NAME, folders / "tiny")
    (tmp_path / "here").mkdir()
    (tmp_path / "file").touch()
    opened = []
    for name in ("socket", "create_connection", "getaddrinfo"):
        monkeypatch.setattr(socket, name, lambda *args, **kwargs: opened.append(args))
    assert not hub.is_name(path)
    for arguments in ((path,), (folders / "tiny", path), (NAME, path), (path, NAME)):
        with pytest.raises(CheckpointError):
            load(*arguments)
    with pytest.raises(ValueError, match=r"revision='main': only a model of the Hugging Face hub has one, and"):
        load(path, revision="main")
    assert opened == [] and server.asked == []


def test_what_is_there_is_a_path(server, folders, tmp_path):
    shutil.copytree(folders / "other", tmp_path / "owner" / "tiny")
    server.add(NAME, folders / "tiny")
    assert_same(load(NAME), load(folders / "other"))
    assert ldm.Pipeline.from_pretrained(NAME).name == "tiny"
    assert server.asked == []


def test_without_the_package(server, folders, monkeypatch):
    server.add(NAME, folders / "tiny")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert_refused("owner/tiny, .* `pip install huggingface_hub` first", NAME)
    assert_refused("owner/vae, .* `pip install huggingface_hub` first", str(folders / "tiny"), vae="owner/vae")
    load(folders / "tiny")
    assert server.asked == []
