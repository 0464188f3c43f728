"""LoRA: small changes to the weights of a model, merged into them, and taken out again bitwise.

A file has, for some weights W0 of the UNet and the text encoders, the factors of a change dW. The nets run on

    W = W0 + sum_i s_i dW_i             s_i: the scale of the i-th LoRA, in the order in which they were loaded

computed in float32, from W0 itself at every change: W does not depend on what was loaded before. With rank r:

    LoRA (Hu et al. 2021)               dW = alpha/r a b                      a, "up" (out,r); b, "down" (r,in[,k,k])
    LoHa (Hyeon-Woo et al. 2021)        dW = alpha/r (a1 b1) * (a2 b2)
    LoKr (Yeh et al. 2023, LyCORIS)     dW = alpha/r kron(w1, w2)             w a matrix, or a b (none: alpha/r = 1)
    DoRA (Liu et al. 2024) on each      dW := m (W0 + dW) / ||W0 + dW|| - W0  m (out,1) or (1,in), the norm along the 1

where a b, in a convolution, may have a Tucker core t (r,r,k,k) between the two. The scale is outside of DoRA, as in
webui and ComfyUI: 0 is the model without it. In PEFT it is inside, at dW; at 1 they agree.
"""

import json
import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import reduce
from itertools import product
from numbers import Real
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from ldm.checkpoint import listing
from ldm.folder import accept, like, read_json
from ldm.source import CheckpointError, all_finite, open_safetensors
from ldm.unet import UNet
from ldm.unet.keys import official_name

PEFT = "base_model.model."  # with which PEFT's own files begin every name

# What a tensor is, by what follows the module in its name: kohya's word, PEFT's, and those that diffusers has had.
ROLES = {
    **dict.fromkeys(("lora_up", "lora_B", "lora.up", "lora_linear_layer.up", "up"), "up"),
    **dict.fromkeys(("lora_down", "lora_A", "lora.down", "lora_linear_layer.down", "down"), "down"),
    "lora_mid": "mid",
    "lora_magnitude_vector": "magnitude",
}
ROLES = {f"{name}.weight": role for name, role in ROLES.items()} | {"lora_magnitude_vector": "magnitude"}
ADAPTER = re.compile(r"(lora_A|lora_B|lora_magnitude_vector)\.[^.]+\.weight")  # PEFT's may have a name of their own

# What makes a change together.
LOHA = {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}
LOKR_1 = {"lokr_w1"}, {"lokr_w1_a", "lokr_w1_b"}
LOKR_2 = {"lokr_w2"}, {"lokr_w2_a", "lokr_w2_b"}, {"lokr_w2_a", "lokr_w2_b", "lokr_t2"}
LYCORIS = [LOHA, LOHA | {"hada_t1", "hada_t2"}, *(one | two for one, two in product(LOKR_1, LOKR_2))]
FORMS = [{"up", "down"}, {"up", "mid", "down"}, *LYCORIS]
ROLES |= {role: role for role in {"alpha", "dora_scale"}.union(*LYCORIS)}

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
WHOLE = (torch.int64, torch.int32)  # of an alpha, too
MADE_FOR = {768: "SD 1", 1024: "SD 2", 1280: "SDXL's refiner", 2048: "SDXL"}  # by the width of the context
READS_CONTEXT = re.compile(r".*attn2[._](processor\.)?to_k.*(down|lora_A|hada_w1_b).*")


class Target(NamedTuple):
    """A weight that can be changed: a Linear's (out,in) or a Conv2d's (out,in,k,k)."""

    part: str
    path: str
    weight: Tensor


class Factor(NamedTuple):
    """A matrix (n,m): a itself, or a b, or those with a Tucker core t (r,r,k,k) between, its k k in m."""

    a: Tensor
    b: Tensor | None = None
    t: Tensor | None = None

    def shape(self) -> tuple[int, int]:
        """Raises ValueError where they do not multiply."""
        n, r = self.a.shape
        if self.b is None:
            return n, r
        s, m = self.b.shape
        core = (r, r) if self.t is None else self.t.shape
        if core[:2] != (r, s):
            raise ValueError
        return n, m * math.prod(core[2:])

    def matrix(self, w0: Tensor) -> Tensor:
        a, *rest = (x.to(w0.device, w0.dtype) for x in self if x is not None)
        match rest:
            case [b]:
                a = a @ b
            case [b, t]:
                a = torch.einsum("nr,rs...,sm->nm...", a, t, b).flatten(1)
        return a


@dataclass(frozen=True)
class Change:
    """What a LoRA does to one weight. scale: alpha / r."""

    factors: list[Factor]
    kron: bool
    scale: float
    m: Tensor | None

    def __call__(self, w0: Tensor) -> Tensor:
        """dW, of w0's shape (out,in[,k,k]) and dtype."""
        matrices = (factor.matrix(w0) for factor in self.factors)
        dw = self.scale * reduce(torch.kron if self.kron else torch.mul, matrices).reshape(w0.shape)
        if self.m is None:
            return dw
        v, m = (w0 + dw).reshape(*w0.shape[:2], -1), self.m.to(w0.device, w0.dtype)  # (out,in,k*k)
        norm = torch.linalg.vector_norm(v, dim=(1, 2) if m.shape[1] == 1 else (0, 2), keepdim=True)
        return (m[..., None] / (norm + torch.finfo(v.dtype).eps) * v).reshape(w0.shape) - w0


class Lora:
    """A LoRA in a pipeline's weights: `lora.scale = 0.5` merges it anew, `lora.remove()` takes it out."""

    def __init__(self, path: Path, changes: Mapping[Tensor, Change]):
        self.path = path
        self.changes = changes
        self.removed = False
        self._scale = 0.0

    def __repr__(self) -> str:
        return f"Lora({str(self.path)!r}, scale={self.scale})"

    @property
    def scale(self) -> float:
        return self._scale

    @scale.setter
    def scale(self, scale: float) -> None:
        """Raises ValueError, with the weights as they were, if it is not finite or a weight overflows."""
        if self.removed:
            raise ValueError(f"{self.path} has been removed: to have it again, load it again")
        before, self._scale = self._scale, finite(scale)
        try:
            self._merge()
        except BaseException:  # out of memory or interrupted, too
            self._scale = before
            self._merge()
            raise

    def remove(self) -> None:
        """A weight that no other LoRA changes is the original tensor again."""
        self.scale = 0.0
        self.removed = True
        for weight in self.changes:
            state = state_of(weight)
            state.loras.remove(self)
            if not state.loras:
                del weight.__dict__["loras"]

    @torch.no_grad()
    def _merge(self) -> None:
        for weight in self.changes:
            state = state_of(weight)
            active = [lora for lora in state.loras if lora.scale != 0]
            w = state.original
            if active:
                w = w0 = w.to(weight.device, torch.float32)
                for lora in active:
                    w = w + lora.scale * lora.changes[weight](w0)
            w = w.to(weight.device, weight.dtype)
            if active and not all_finite(w):
                raise ValueError(f"{self.path}, scale={self.scale}: a weight overflows {w.dtype}; use a smaller scale")
            weight.data = w
            increment_version(weight)  # which `.data` leaves


class State(NamedTuple):
    """What is merged into a weight. It stays with the weight: nets may be shared by pipelines."""

    original: Tensor
    loras: list[Lora]


def state_of(weight: Tensor) -> State:
    return weight.__dict__.setdefault("loras", State(weight.data, []))


def load(path: str | Path, scale: float, nets: Mapping[str, Any]) -> Lora:
    """Merge a file into the nets, by part: unet, text_encoder, text_encoder_2.

    Raises CheckpointError if anything in the file does not fit, ValueError for a scale that is not finite or with which
    a weight overflows; then nothing has changed.
    """
    path, scale = Path(path), finite(scale)
    lora = Lora(path, read(path, nets))
    for weight in lora.changes:
        state_of(weight).loras.append(lora)
    try:
        lora.scale = scale
    except BaseException:
        lora.remove()
        raise
    return lora


def finite(scale: float) -> float:
    if not (isinstance(scale, Real) and abs(scale) < math.inf):
        raise ValueError(f"scale={scale!r}: use a finite number; 1 is the LoRA as it was trained, 0 is without it")
    return float(scale)


# Names


def spellings(part: str, path: str, net: nn.Module, alone: bool) -> Iterator[str]:
    """The names of a module in files. alone: whether there is one text encoder only, which needs no telling apart."""
    flat = path.replace(".", "_")
    if isinstance(net, UNet):
        official = official_name(net.config, f"{path}.weight").removesuffix(".weight")
        yield from (f"lora_unet_{flat}", f"lora_unet_{official.replace('.', '_')}")
        # Until 2023 diffusers kept them in its attention processors.
        old = re.sub(r"\.(attn[12])\.to_(q|k|v|out)(\.0)?$", r".\1.processor.to_\2_lora", path)
        yield from (prefix + name for prefix in ("", "unet.", PEFT) for name in (path, old))
    else:
        kohya = ("lora_te2_",) if part == "text_encoder_2" else ("lora_te_", "lora_te1_")
        yield from (prefix + flat for prefix in kohya)
        old = re.sub(r"\.self_attn\.(q|k|v|out)_proj$", r".self_attn.to_\1_lora", path)
        for name in (path, old):
            for prefix in (f"{part}.", PEFT) if alone else (f"{part}.",):
                yield from (prefix + name, prefix + name.removeprefix("text_model."))


def spelled(nets: Mapping[str, Any]) -> dict[str, Target]:
    """All that can be changed, by all names that files have for it."""
    return {
        name: Target(part, path, module.weight)
        for part, net in nets.items()
        for path, module in net.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
        for name in spellings(part, path, net, len(nets) == 2)
    }


def split(name: str, table: Mapping[str, Target]) -> tuple[Target | None, str]:
    """The weight that a tensor is for, and what its name says then."""
    words = name.split(".")
    for i in reversed(range(1, len(words))):
        if (module := ".".join(words[:i])) in table:
            return table[module], ".".join(words[i:])
    return None, name


# Files


def read(path: Path, nets: Mapping[str, Any]) -> dict[Tensor, Change]:
    """What a file changes."""
    file = open_safetensors(path)
    # Copies: a training that goes on may write the file again.
    tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (a file is not a mapping)
    table = spelled(nets)
    found: dict[Target, dict[str, str]] = defaultdict(dict)  # the names of a weight's tensors, by what they are
    problems: dict[str, list[str]] = defaultdict(list)
    for name, tensor in tensors.items():
        target, suffix = split(name, table)
        role = ROLES.get(ADAPTER.sub(r"\1.weight", suffix))
        if target is None:
            problems["unmatched: this model has no such weights"].append(name)
        elif role is None:
            problems["of a kind that is not supported: LoRA, LoHa, LoKr and DoRA are"].append(name)
        elif role in found[target]:
            problems["given twice"].append(f"{found[target][role]}, {name}")
        else:
            found[target][role] = name
            if tensor.dtype not in FLOATS and not (role == "alpha" and tensor.dtype in WHOLE):
                problems[f"of a type other than {', '.join(map(str, FLOATS))}"].append(f"{name}: {tensor.dtype}")
            elif not all_finite(tensor):
                problems["with NaN or infinity"].append(name)
    changes = {}
    configs = {part: peft_config(path, file.metadata() or {}, part, tensors) for part in nets if not problems}
    for target, names in found.items() if not problems else ():
        f = {role: tensors[name] for role, name in names.items()}
        shapes = ", ".join(f"{name} {tuple(tensors[name].shape)}" for name in sorted(names.values()))
        if f.keys() - {"alpha", "dora_scale", "magnitude"} not in FORMS:
            problems["incomplete: what belongs with them is missing"].append(shapes)
        elif change := fitted(f, target, configs[target.part]):
            changes[target.weight] = change
        else:
            problems["of another shape"].append(f"{shapes}: {target.path} is {tuple(target.weight.shape)}")
    if problems or not changes:
        lists = "".join(listing(kind, lines) for kind, lines in problems.items()) or " it is empty"
        raise CheckpointError(f"{path} is no LoRA for this model{made_for(tensors, nets)}:{lists}")
    return changes


def fitted(f: Mapping[str, Tensor], target: Target, config: Mapping[str, Any] | None) -> Change | None:
    """The change that tensors make, if it is one for a weight of this shape."""
    wanted = target.weight.flatten(1).shape
    kron = "lokr_w1" in f or "lokr_w1_a" in f
    try:
        parts = factors(f)
        shapes = [part.shape() for part in parts]
    except (ValueError, IndexError):
        return None
    made = {tuple(map(math.prod, zip(*shapes, strict=True)))} if kron else {*shapes}
    if made != {tuple(wanted)} or any(x.numel() == 0 for x in f.values()) or ("alpha" in f and f["alpha"].numel() != 1):
        return None
    m = f.get("magnitude", f.get("dora_scale"))
    if m is not None:  # PEFT's magnitude is of the outputs, even where it is (1,out,1,1)
        m = m.reshape(-1, 1) if "magnitude" in f or m.ndim < 2 else m.flatten(1)
        if tuple(m.shape) not in ((wanted[0], 1), (1, target.weight.shape[1])):
            return None
    ranks = [part.b.shape[0] for part in parts if part.b is not None]
    scale = scale_of(f.get("alpha"), ranks[-1], target, config) if ranks else 1.0  # LoKr of two whole matrices has no r
    return Change(parts, kron, scale, m)


def factors(f: Mapping[str, Tensor]) -> list[Factor]:
    if "up" in f:
        return [Factor(f["up"].flatten(1), f["down"].flatten(1), f.get("mid"))]
    parts = []
    for w, t in (("hada_w1", "hada_t1"), ("hada_w2", "hada_t2"), ("lokr_w1", ""), ("lokr_w2", "lokr_t2")):
        if w in f:
            parts.append(Factor(f[w].flatten(1)))
        elif f"{w}_a" in f:
            a = f[f"{w}_a"]
            parts.append(Factor(a.transpose(0, -1) if t in f else a, f[f"{w}_b"], f.get(t)))  # (r,n) with a core
    return parts


def scale_of(alpha: Tensor | None, rank: int, target: Target, config: Mapping[str, Any] | None) -> float:
    """alpha / r, which is 1 where nobody says what alpha is."""
    if alpha is not None:
        return alpha.item() / rank
    if config is None:
        return 1.0
    # The first text encoder's modules have lost their prefix in transformers 5, the second's have not.
    names = {target.path, target.path.removeprefix("text_model." if target.part == "text_encoder" else "")}
    patterns = (config["alpha_pattern"] or {}).items()
    own = [value for pattern, value in patterns if any(re.match(rf"(.*\.)?({pattern})$", name) for name in names)]
    return (own or [config["lora_alpha"]])[0] / (math.sqrt(rank) if config["use_rslora"] else rank)


def peft_config(
    path: Path, metadata: Mapping[str, str], part: str, tensors: Mapping[str, Tensor]
) -> dict[str, Any] | None:
    """The fields of PEFT's LoraConfig for a part: of the file's header, where diffusers keeps them, or of the file that
    stands beside one of PEFT's own."""
    where = path
    if any(name.startswith(PEFT) for name in tensors):
        where = path.with_name("adapter_config.json")
        if not where.is_file():
            raise CheckpointError(f"{path} is PEFT's own: put the {where.name} that has its alpha beside it")
        found = read_json(where)
    else:
        header = metadata.get("lora_adapter_metadata", "{}")
        try:
            fields = {} | json.loads(header)
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"{path}: lora_adapter_metadata in its header is no JSON object: {error}") from error
        own = {name.removeprefix(f"{part}."): field for name, field in fields.items() if name.startswith(f"{part}.")}
        found = own or {name: field for name, field in fields.items() if "." not in name}
        if not found:
            return None
    c = {"peft_type": "LORA", "lora_alpha": None, "alpha_pattern": None, "use_rslora": False} | found
    accept(
        where, c, "peft_type", c["peft_type"] == "LORA", "'LORA' of PEFT's kinds; LoHa and LoKr as LyCORIS writes them"
    )
    patterns = c["alpha_pattern"] or {}
    accept(where, c, "lora_alpha", like(c["lora_alpha"], 1.0), "numbers above 0")
    accept(where, c, "use_rslora", like(c["use_rslora"], False), "true or false")
    known = isinstance(patterns, dict) and all(like(alpha, 1.0) and is_pattern(p) for p, alpha in patterns.items())
    accept(where, c, "alpha_pattern", known, "regular expressions for names, and numbers above 0")
    return c


def is_pattern(text: str) -> bool:
    try:
        return bool(re.compile(text))
    except re.error:
        return False


def made_for(tensors: Mapping[str, Tensor], nets: Mapping[str, Any]) -> str:
    """What other model a file looks made for."""
    ours = nets["unet"].config.context_width
    for name, tensor in tensors.items():
        if READS_CONTEXT.fullmatch(name) and tensor.ndim > 1 and tensor.shape[1] != ours:
            width = tensor.shape[1]
            return f", but looks made for {MADE_FOR.get(width, 'another')} (width of the context {width}, here {ours})"
    return ""
