"""LoRA in training (Hu et al. 2021): a net is frozen, and paths of low rank beside its Linear and Conv2d modules learn.

    y = W x + alpha/r up(down(x))       down (r,in[,k,k]), up (out,r[,1,1]); a convolution's down has its stride and
                                        padding, its up is 1x1

The paths hang on forward hooks: the net keeps its modules, its names and its tensors. What is trained is saved with
`save_lora` and comes back, merged, with `pipe.load_lora`.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.clip import TextConfig, TextEncoder
from ldm.save import write_file
from ldm.source import all_finite
from ldm.unet import UNet, UNetConfig
from ldm.unet.keys import official_name

UNET_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
TEXT_ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")
KINDS = {"all-linear": (nn.Linear,), "conv": (nn.Linear, nn.Conv2d)}
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Adapter(nn.Module):
    """One path. It is the hook of its module, which it does not own: `parameters()` are the two factors."""

    def __init__(self, module: nn.Linear | nn.Conv2d, rank: int, alpha: float, generator: torch.Generator | None):
        super().__init__()
        self.scale = alpha / rank
        out, inp, *kernel = module.weight.shape
        # PEFT's convention: factors are float32 under a half-precision net, and so are their products; the sum is
        # rounded once. (Under autocast the products are in its dtype, as all others.)
        dtype = torch.promote_types(module.weight.dtype, torch.float32)
        down = torch.empty(rank, inp, *kernel, dtype=dtype)
        nn.init.kaiming_uniform_(down, a=5**0.5, generator=generator)  # as a Linear's own weight, and PEFT's lora_A
        self.down = nn.Parameter(down.to(module.weight.device))
        self.up = nn.Parameter(self.down.new_zeros(out, rank, *[1] * len(kernel)))

    def forward(self, module: nn.Linear | nn.Conv2d, inputs: tuple[Tensor], y: Tensor) -> Tensor:
        """module(*inputs) is y; returns what the module gives instead, in y's dtype."""
        x = inputs[0].to(self.down.dtype)
        if isinstance(module, nn.Conv2d):
            hidden = module._conv_forward(x, self.down, None)  # (B,r,h,w), with the module's stride and padding
            change = F.conv2d(hidden, self.up)  # (B,out,h,w)
        else:
            change = F.linear(F.linear(x, self.down), self.up)  # (...,out)
        return (y + change * self.scale).to(y.dtype)


class Adapters(nn.Module):
    """The paths beside the modules of one net: `parameters()` are for the optimiser, `remove()` takes them off.

    `layers`: the Adapter of each module, by its path in the net with _ for . (what kohya's files call it).
    """

    def __init__(
        self,
        net: UNet | TextEncoder,
        rank: int,
        alpha: float,
        modules: Mapping[str, nn.Linear | nn.Conv2d],
        generator: torch.Generator | None,
    ):
        super().__init__()
        self.config, self.rank, self.alpha = net.config, rank, alpha
        self.paths = list(modules)
        adapters = {path: Adapter(module, rank, alpha, generator) for path, module in modules.items()}
        self.layers = nn.ModuleDict({path.replace(".", "_"): adapter for path, adapter in adapters.items()})
        self._hooks = [modules[path].register_forward_hook(adapter) for path, adapter in adapters.items()]
        self._thawed = [parameter for parameter in net.parameters() if parameter.requires_grad]
        net.requires_grad_(False)

    def remove(self) -> None:
        """The net is the one before, bitwise, and asks for gradients where it did; the factors stay, to be saved."""
        for hook in self._hooks:
            hook.remove()
        for parameter in self._thawed:
            parameter.requires_grad_(True)


def add_lora(
    net: UNet | TextEncoder,
    rank: int,
    alpha: float | None = None,
    targets: str | Sequence[str] = "attention",
    generator: torch.Generator | None = None,
    without: Iterable[nn.Module] = (),
) -> Adapters:
    """Freeze a net and give it LoRA paths to train. Up is zero: at first the net gives what it gave, bitwise.

    alpha: of alpha / rank, rank unless given. targets: "attention" (to_q, to_k, to_v, to_out.0 of a UNet, q_proj,
    k_proj, v_proj, out_proj of a text encoder, as diffusers' scripts), "all-linear", "conv" (every Linear and every
    Conv2d), or ends of module names (diffusers'), as PEFT's target_modules. generator: on the CPU, for down; the
    modules draw in the net's order. without: modules of the net that get no path, nor does what is inside of them, as
    the layers of a text encoder that clip skip leaves unread: their factors would stay as they were drawn.
    Raises ValueError for a rank, alpha or target that cannot be.
    """
    if rank < 1:
        raise ValueError(f"rank={rank}: use a whole number from 1")
    if alpha is not None and not 0 < alpha < float("inf"):
        raise ValueError(f"alpha={alpha}: use a finite number above 0")
    return Adapters(net, rank, rank if alpha is None else alpha, chosen(net, targets, without), generator)


def chosen(
    net: UNet | TextEncoder, targets: str | Sequence[str], without: Iterable[nn.Module]
) -> dict[str, nn.Linear | nn.Conv2d]:
    """The modules by their paths, in the net's order."""
    left_out = {inner for module in without for inner in module.modules()}
    every = {path: m for path, m in net.named_modules() if isinstance(m, nn.Linear | nn.Conv2d) and m not in left_out}
    if isinstance(targets, str) and targets in KINDS:
        return {path: module for path, module in every.items() if isinstance(module, KINDS[targets])}
    if targets == "attention":
        targets = UNET_ATTENTION if isinstance(net, UNet) else TEXT_ATTENTION
    elif isinstance(targets, str):
        raise ValueError(f"targets={targets!r}: use 'attention', {', '.join(map(repr, KINDS))}, or a list of names")
    found = {end: [path for path in every if f".{path}".endswith(f".{end}")] for end in targets}
    if missed := [end for end, paths in found.items() if not paths] or not found:
        known = sorted({re.sub(r".*\.(?=[a-z])", "", path) for path in every})  # to_q, to_out.0
        raise ValueError(
            f"targets={list(targets)}: no Linear or Conv2d of this {type(net).__name__} ends in"
            f" {missed if found else 'nothing'}; its modules end in {', '.join(known)}"
        )
    wanted = {path for paths in found.values() for path in paths}
    return {path: module for path, module in every.items() if path in wanted}


# Files


def save_lora(
    path: str | Path,
    adapters: Mapping[str, Adapters],
    layout: Literal["kohya", "peft"] = "kohya",
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write the adapters of a model's parts (unet, text_encoder, text_encoder_2), whole or not at all.

    layout: "kohya" is what webui and ComfyUI read, too; "peft" is what diffusers' save_lora_weights writes. dtype:
    of the factors, float32, float16 or bfloat16. `pipe.load_lora` and diffusers' load_lora_weights read both.
    Raises ValueError for an argument that is none of these, and for a factor that is not finite in dtype.
    """
    path = Path(path)
    if not adapters or adapters.keys() - {"unet", "text_encoder", "text_encoder_2"}:
        raise ValueError(f"adapters of {list(adapters)}: give those of unet, text_encoder and text_encoder_2, by name")
    if layout not in ("kohya", "peft") or dtype not in DTYPES:
        options = f"layout={layout!r}, dtype={dtype}"
        raise ValueError(f"{options}: use 'kohya' or 'peft', and {', '.join(map(str, DTYPES))}")
    down, up = ("lora_down", "lora_up") if layout == "kohya" else ("lora_A", "lora_B")
    tensors = {}
    for part, own in adapters.items():
        for module, adapter in zip(own.paths, own.layers.values(), strict=True):
            assert isinstance(adapter, Adapter)
            name = kohya_name(part, own.config, module) if layout == "kohya" else f"{part}.{module}"
            for word, factor in ((down, adapter.down), (up, adapter.up)):
                tensors[f"{name}.{word}.weight"] = tensor = factor.detach().to("cpu", dtype)
                if not all_finite(tensor):
                    raise ValueError(f"{name}.{word} has NaN or infinity in {dtype}: use float32, or train it again")
            if layout == "kohya":
                tensors[f"{name}.alpha"] = torch.tensor(float(own.alpha))  # in float32: alpha / r is exact
    write_file(path, tensors, kohya_metadata(adapters) if layout == "kohya" else peft_metadata(adapters))


def kohya_name(part: str, config: UNetConfig | TextConfig, path: str) -> str:
    """His trainers know SDXL's UNet by its official names, and number SDXL's text encoders."""
    if isinstance(config, UNetConfig):
        prefix = "lora_unet_"
        if config.vector_width is not None:
            path = official_name(config, f"{path}.weight").removesuffix(".weight")
    else:
        prefix = "lora_te2_" if part == "text_encoder_2" else "lora_te_" if config.final_norm else "lora_te1_"
    return prefix + path.replace(".", "_")


def kohya_metadata(adapters: Mapping[str, Adapters]) -> dict[str, str]:
    """What tools read: kohya's own scripts the network, webui the base model."""

    def common(values: set[float]) -> str:
        return f"{values.pop():g}" if len(values) == 1 else "Dynamic"

    version = base_model(next(iter(adapters.values())).config)
    return {
        "ss_network_module": "networks.lora",
        "ss_network_dim": common({own.rank for own in adapters.values()}),
        "ss_network_alpha": common({own.alpha for own in adapters.values()}),
        "ss_base_model_version": version,
        "ss_v2": str(version == "sd_v2"),
    }


def base_model(config: UNetConfig | TextConfig) -> str:
    """As kohya names it."""
    if isinstance(config, UNetConfig):
        xl, v2 = config.vector_width is not None, config.linear_projection
    else:
        xl, v2 = not config.final_norm, config.activation == "gelu"
    return "sdxl_base_v1-0" if xl else "sd_v2" if v2 else "sd_v1"


def peft_metadata(adapters: Mapping[str, Adapters]) -> dict[str, str]:
    """The fields of PEFT's LoraConfig that are not its defaults, of each part, where diffusers reads them."""
    fields: dict[str, Any] = {}
    for part, own in adapters.items():
        # PEFT takes the ends of names: without `text_model.` they are those of any version of transformers.
        modules = [path.removeprefix("text_model.") for path in own.paths]
        config = {"peft_type": "LORA", "r": own.rank, "lora_alpha": own.alpha, "target_modules": modules}
        fields |= {f"{part}.{name}": value for name, value in config.items()}
    return {"format": "pt", "lora_adapter_metadata": json.dumps(fields, indent=2, sort_keys=True)}
