"""Fetches what is loaded of a model on the Hugging Face hub, and nothing else, all of it from one commit.

huggingface_hub does the work: its cache, its login, HF_ENDPOINT and HF_HUB_OFFLINE are what they always are.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeGuard

import torch

from ldm import folder
from ldm.source import CheckpointError

NAME = re.compile(r"(?!.*(--|\.\.))\b[\w.-]{1,96}\b/\b[\w.-]{1,96}\b", re.ASCII)  # the hub's own rule
FILE = re.compile(
    r".*\.(safetensors|sft|ckpt|pt|pth|bin|gguf|onnx|pkl|zip|json|yaml|png|jpe?g|webp|git)", re.IGNORECASE
)
REASONS = {  # by the names of huggingface_hub's errors, those that inherit from others first
    "GatedRepoError": "its owner grants access: ask on the repository's page, then log in with `hf auth login`",
    "RepositoryNotFoundError": "it is not there (nor is such a path here), or is private: then `hf auth login` first",
    "RevisionNotFoundError": "it has no such revision: give a branch, tag or commit that it has, or none for main",
    "LocalEntryNotFoundError": "{} is not in the cache, the hub was not reached ({}), and there is no such path here",
    "Exception": "{} was not fetched whole ({}): call again, files that are complete are kept",
}


def is_name(path: str | Path) -> TypeGuard[str]:
    """Whether it is owner/name, a repository's, and no path: a Path, a file of weights, something in a folder here."""
    named = isinstance(path, str) and NAME.fullmatch(path) and not FILE.fullmatch(path)
    return bool(named) and not Path(path).parent.exists()


def fetch_model(name: str, revision: str | None, dtype: torch.dtype | None, own_vae: bool) -> Path:
    """The diffusers folder, in huggingface_hub's cache, with all that `ldm.checkpoint.load` reads there for this dtype.

    revision: a branch, tag or commit; None is main. own_vae: False leaves out the VAE's weights. Raises CheckpointError
    for what is not there, is no diffusers folder, or cannot be fetched.
    """
    repository = Repository(name, revision, "model_index.json")
    parts = {part for part, what in folder.read_index(repository.folder).items() if what != [None, None]}
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        if part == "vae" and not own_vae:
            repository.fetch("vae/config.json", needed=False)  # a single file in its place has none
        elif part in parts:
            repository.fetch(f"{part}/config.json")
            repository.fetch_weights(f"{part}/", dtype)
    for part in parts & {"tokenizer", "tokenizer_2"}:
        files = ("tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt")
        *_, vocab, merges = [repository.fetch(f"{part}/{file}", needed=False) for file in files]
        if not (vocab and merges):
            repository.fetch(f"{part}/tokenizer.json")
    repository.fetch("scheduler/scheduler_config.json")
    return repository.folder


def fetch_vae(name: str, dtype: torch.dtype | None) -> Path:
    """The same for a repository that is a VAE, of its main branch."""
    repository = Repository(name, None, "config.json")
    repository.fetch_weights("", dtype)
    return repository.folder


class Repository:
    """One commit of a repository. `folder` is where its files are, once they are fetched."""

    def __init__(self, name: str, revision: str | None, index: str):
        self.name, self.revision, self.offline = name, revision, False
        try:
            import huggingface_hub.constants
        except ImportError as error:
            raise self.error("to fetch it, `pip install huggingface_hub` first (or ldm[hub])") from error
        self.hub, self.offline = huggingface_hub, huggingface_hub.constants.HF_HUB_OFFLINE
        path = self.ask(index, self.hub.hf_hub_download, filename=index, revision=revision)
        if path is None:
            files = self.ask("its list of files", self.hub.HfApi().model_info, revision=revision).siblings or []
            single = [file.rfilename for file in files if file.rfilename.endswith(".safetensors")]
            raise self.error(
                f"it has no {index}, but {', '.join(single[:10]) or 'no safetensors files either'}. To load a single"
                f" file, fetch it with `hf download {name} FILE`, which prints its path, and give that"
            )
        self.folder = Path(path).parent

    def fetch(self, path: str, needed: bool = True) -> Path | None:
        """The file, now in the cache. None where the commit, or offline the cache, has no such file."""
        where = {"filename": path, "revision": self.folder.name}
        found = self.ask(path, self.hub.try_to_load_from_cache, **where)
        if found is None and not self.offline:
            found = self.ask(path, self.hub.hf_hub_download, **where)
        if isinstance(found, str):
            return Path(found)
        if needed:
            raise self.error(f"it has no {path}, and cannot be loaded without: give another revision or repository")
        return None

    def fetch_weights(self, prefix: str, dtype: torch.dtype | None) -> None:
        """Those that `ldm.folder.weights` will take."""
        names = [prefix + name for name in folder.weight_names(folder.stem_of(prefix), dtype)]
        for name in names:
            if path := self.fetch(name, needed=False):
                for shard in folder.shards_of(path) if path.suffix == ".json" else []:
                    self.fetch(prefix + shard)
                return
        raise self.error(f"it has no weights that are loaded here; looked for {', '.join(names)}")

    def ask(self, what: str, call: Callable[..., Any], **arguments: Any) -> Any:
        """What the call returns, or None where the repository has no such file."""
        try:
            return call(self.name, **arguments)
        except Exception as error:  # huggingface_hub's, its HTTP client's or the system's
            names = [kind.__name__ for kind in type(error).__mro__]
            if "EntryNotFoundError" in names and "LocalEntryNotFoundError" not in names:
                return None
            reason = next(reason for name, reason in REASONS.items() if name in names)
            raise self.error(reason.format(what, error.__cause__ or error)) from error

    def error(self, problem: str) -> CheckpointError:
        where = "in the cache (HF_HUB_OFFLINE is set)" if self.offline else "on the Hugging Face hub"
        return CheckpointError(f"{self.name}, revision {self.revision or 'main'}, {where}: {problem}")
