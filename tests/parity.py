"""Our net and the reference's on the same weights, compared module by module; and our net with one number rewritten.

Both sides run under forward hooks. Module names are the same on both, so outputs pair by name, and `differences` goes
no further where one of ours has no partner: it cannot compare less than it claims.
"""

import gzip
import inspect
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from ldm.clip import TextConfig
from ldm.clip.tokenizer import OFFICIAL, Tokenizer
from ldm.models import Model
from ldm.unet import UNetConfig
from ldm.unet.blocks import timestep_embedding
from ldm.vae import VAEConfig

TOLERANCE = 1e-5  # of the largest value of the module's output: float32 rounding in nets of a few layers
QUIET = 0.03  # weights so small that the eps of a norm shows: it is added to a variance of about QUIET ** 2

# They only hold others (the reference has a list or nothing in their place); what they hold is compared.
CONTAINERS = (nn.ModuleList, nn.Sequential, nn.Identity)

Outputs = dict[str, list[Tensor]]


class Reference(NamedTuple):
    net: nn.Module
    outputs: Outputs


def randomise(net: nn.Module, gain: float = 1.0, seed: int = 0) -> nn.Module:
    """Draw every parameter, norms and biases too: at 1 and 0 they would hide what is forgotten or swapped.

    Weights are scaled by 1/sqrt(fan in), so that activations keep the size of their inputs, times `gain`.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in net.modules():
            for name, parameter in module.named_parameters(recurse=False):
                parameter.normal_(generator=generator)
                if isinstance(module, nn.GroupNorm | nn.LayerNorm):
                    parameter.mul_(0.3).add_(1.0 if name == "weight" else 0.0)
                elif parameter.ndim == 1:
                    parameter.mul_(0.3 * gain**2)  # as small as what a weight leaves of a quiet input
                else:
                    parameter.mul_(gain / parameter[0].numel() ** 0.5)
    return net.eval()


def twin(net_class: type[nn.Module], config: Any, reference: nn.Module, prefix: str = "") -> nn.Module:
    """Our net on the very tensors of `reference`, loaded strictly: another name or shape is a RuntimeError."""
    with torch.device("meta"):
        net = net_class(config)
    net.load_state_dict({prefix + name: tensor for name, tensor in reference.state_dict().items()}, assign=True)
    return net.eval()


def tensors(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    if output is None:
        return []
    return [t for part in (output.values() if isinstance(output, dict) else output) for t in tensors(part)]


def record(net: nn.Module, run: Callable[[nn.Module], dict[str, Tensor]], prefix: str = "") -> Outputs:
    """What every module puts out, under `prefix` + its name, and what `run(net)` returns, while it runs."""
    outputs: Outputs = {}

    def keep(name: str) -> Callable:
        return lambda module, inputs, output: outputs.setdefault(name, []).extend(tensors(output))

    hooks = [module.register_forward_hook(keep(prefix + name)) for name, module in net.named_modules() if name]
    with torch.no_grad():
        results = run(net)
    for hook in hooks:
        hook.remove()
    return outputs | {name: [tensor] for name, tensor in results.items()}


def differences(net: nn.Module, outputs: Outputs, reference: Outputs, apart: tuple[str, ...] = ()) -> dict[str, float]:
    """max|ours - theirs| / max|theirs| of every module of `net` and of every result; inf where shapes differ.

    `apart` are the modules whose output has no counterpart in the reference.
    """
    modules = dict(net.named_modules())
    names = {name for name in modules if name and not isinstance(modules[name], CONTAINERS)} - set(apart)
    names |= outputs.keys() - modules.keys()
    assert names <= outputs.keys(), f"never ran in ours: {sorted(names - outputs.keys())}"
    assert names <= reference.keys(), f"never ran in the reference: {sorted(names - reference.keys())}"
    return {name: max_difference(outputs[name], reference[name]) for name in sorted(names)}


def max_difference(ours: list[Tensor], theirs: list[Tensor]) -> float:
    if [t.shape for t in ours] != [t.shape for t in theirs]:
        return float("inf")
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(ours, theirs, strict=True))


def assert_equal(differences: dict[str, float], count: int, tolerance: float = TOLERANCE) -> None:
    """`count` is written out in each test, so that a comparison that lost its modules fails."""
    assert len(differences) == count
    off = {name: value for name, value in differences.items() if not value <= tolerance}
    assert not off, f"more than {tolerance} off: {off}"


def rewrite(monkeypatch: pytest.MonkeyPatch, module: ModuleType, edits: dict[str, str]) -> None:
    """Let the classes and functions of `module` be what they would be if its source said the new texts, not the old."""
    source = inspect.getsource(module)
    for old, new in edits.items():
        assert source.count(old) == 1, f"{module.__name__} says {old!r} {source.count(old)} times: name one place"
        source = source.replace(old, new)
    rewritten: dict[str, Any] = {"__name__": module.__name__}
    exec(source, rewritten)
    for user in [user for name, user in sys.modules.items() if name.startswith("ldm.")]:
        for name, original in list(vars(user).items()):
            defined = inspect.isclass(original) or inspect.isfunction(original)
            if defined and original.__module__ == module.__name__:
                monkeypatch.setattr(user, name, rewritten[original.__name__])


# UNet


def diffusers_unet(c: UNetConfig, time_id: int | None = None) -> UNet2DConditionModel:
    """`time_id` is the width of the embedding of each of the six numbers in SDXL's vector."""
    sdxl = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": time_id,
        "projection_class_embeddings_input_dim": c.vector_width,
    }
    return UNet2DConditionModel(
        in_channels=c.in_channels,
        out_channels=c.out_channels,
        down_block_types=tuple("CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in c.depth),
        up_block_types=tuple("CrossAttnUpBlock2D" if depth else "UpBlock2D" for depth in reversed(c.depth)),
        block_out_channels=c.channels,
        layers_per_block=c.layers,
        transformer_layers_per_block=tuple(depth or c.mid_depth for depth in c.depth),  # the last is the middle's too
        attention_head_dim=tuple(c.heads_at(channels) for channels in c.channels),  # in spite of its name: heads
        cross_attention_dim=c.context_width,
        use_linear_projection=c.linear_projection,
        norm_num_groups=c.groups,
        **(sdxl if c.vector_width is not None else {}),
    )


class UNetInputs(NamedTuple):
    x: Tensor
    t: Tensor | float
    context: Tensor
    pooled: Tensor | None = None  # (B,pooled)
    time_ids: Tensor | None = None  # (B,6)
    time_id_width: int = 0

    def reference(self) -> dict[str, Any]:
        condition = {"text_embeds": self.pooled, "time_ids": self.time_ids}
        extra = {} if self.pooled is None else {"added_cond_kwargs": condition}
        return {"sample": self.x, "timestep": self.t, "encoder_hidden_states": self.context} | extra

    def ours(self) -> dict[str, Any]:
        extra = {}
        if self.pooled is not None:
            ids = timestep_embedding(self.time_ids.flatten(), self.time_id_width).reshape(len(self.x), -1)
            extra = {"vector": torch.cat([self.pooled, ids], dim=1)}
        return {"x": self.x, "t": self.t, "context": self.context} | extra


def unet_reference(net: UNet2DConditionModel, inputs: UNetInputs) -> Reference:
    outputs = record(net, lambda net: {"output": net(**inputs.reference()).sample})
    for level in range(len(net.down_blocks)):
        del outputs[f"down_blocks.{level}"][0]  # (h, (every skip)), where h is the last skip once more
    return Reference(net, outputs)


def unet_differences(
    net_class: type[nn.Module], c: UNetConfig, reference: Reference, inputs: UNetInputs
) -> dict[str, float]:
    net = twin(net_class, c, reference.net)
    return differences(net, record(net, lambda net: {"output": net(**inputs.ours())}), reference.outputs)


# VAE


def diffusers_vae(c: VAEConfig) -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(c.channels),
        up_block_types=("UpDecoderBlock2D",) * len(c.channels),
        block_out_channels=c.channels,
        layers_per_block=c.layers,
        latent_channels=c.latent_channels,
        norm_num_groups=c.groups,
        scaling_factor=c.scaling_factor,
    )


def vae_results(mean: Tensor, std: Tensor, image: Tensor) -> dict[str, Tensor]:
    """The logarithm because std spans twenty orders of magnitude: its small values count as much as the large ones."""
    return {"mean": mean, "std": std, "log std": std.log(), "image": image}


def vae_reference(net: AutoencoderKL, image: Tensor, z: Tensor) -> Reference:
    def run(net: AutoencoderKL) -> dict[str, Tensor]:
        posterior = net.encode(image).latent_dist
        return vae_results(posterior.mean, posterior.std, net.decode(z).sample)

    return Reference(net, record(net, run))


def vae_differences(
    net_class: type[nn.Module], c: VAEConfig, reference: Reference, image: Tensor, z: Tensor
) -> dict[str, float]:
    net = twin(net_class, c, reference.net)
    outputs = record(net, lambda net: vae_results(*net.encode(image), net.decode(z)))
    for part in ("encoder", "decoder"):
        norm = f"{part}.mid_block.attentions.0.group_norm"
        outputs[norm] = [h.flatten(2) for h in outputs[norm]]  # diffusers normalises (B,C,hw), ours (B,C,h,w)
    return differences(net, outputs, reference.outputs)


# Text encoder

TEXT_APART = (
    "text_model",  # holds the three parts
    "text_model.encoder",  # returns the outputs of all layers, transformers the last alone: each layer is compared
    "text_model.embeddings.position_embedding",  # read as a table, not called: `embeddings` is compared
)


def transformers_text(c: TextConfig) -> CLIPTextModel | CLIPTextModelWithProjection:
    """`skip` and `final_norm` are not theirs to know: diffusers' pipelines pick among the hidden states."""
    config = CLIPTextConfig(
        vocab_size=c.vocab_size,
        hidden_size=c.width,
        intermediate_size=4 * c.width,
        num_hidden_layers=c.layers,
        num_attention_heads=c.heads,
        max_position_embeddings=c.length,
        hidden_act=c.activation,
        bos_token_id=None,
        eos_token_id=c.end_token,
        projection_dim=c.projection or c.width,
    )
    return CLIPTextModel(config) if c.projection is None else CLIPTextModelWithProjection(config)


def text_prefix(net: CLIPTextModel | CLIPTextModelWithProjection) -> str:
    """What their names lack: transformers 5 has dropped it where nothing stands beside it."""
    return "" if isinstance(net, CLIPTextModelWithProjection) else "text_model."


@torch.no_grad()
def text_reference(net: CLIPTextModel | CLIPTextModelWithProjection, c: TextConfig, ids: Tensor) -> Reference:
    """Clip skip n is hidden_states[-n - skip] (webui's count), then the final LayerNorm where the config has it.
    pooled is the last layer's whatever the skip, projected where the config has that."""

    def pooled(net: nn.Module) -> Tensor:
        return net(ids).pooler_output if c.projection is None else net(ids).text_embeds

    outputs = record(net, lambda net: {"pooled": pooled(net)}, text_prefix(net))
    hidden = net(ids, output_hidden_states=True).hidden_states
    norm = (net if c.projection is None else net.text_model).final_layer_norm
    for n in range(1, c.layers - c.skip + 1):
        context = hidden[-n - c.skip]
        outputs[f"clip skip {n}"] = [norm(context) if c.final_norm else context, *outputs["pooled"]]
    return Reference(net, outputs)


@torch.no_grad()
def text_differences(net_class: type[nn.Module], c: TextConfig, reference: Reference, ids: Tensor) -> dict[str, float]:
    net = twin(net_class, c, reference.net, text_prefix(reference.net))
    outputs = record(net, lambda net: {"pooled": net(ids).pooled})
    for n in range(1, c.layers - c.skip + 1):
        outputs[f"clip skip {n}"] = [*net(ids, clip_skip=n)]
    return differences(net, outputs, reference.outputs, TEXT_APART)


# Pipeline


def reference_pipeline(model: Model) -> StableDiffusionPipeline:
    """Random weights, rounded to what float16 can hold, and the official tokenizer."""
    tokenizer = Tokenizer.official()
    lines = gzip.decompress(OFFICIAL.read_bytes()).decode().split("\n")[1 : 49408 - 512 - 2 + 1]
    unet, vae, text = diffusers_unet(model.unet), diffusers_vae(model.vae), transformers_text(model.text_encoder)
    for seed, net in enumerate((unet, vae, text)):
        randomise(net, seed=seed).half()
    theirs = CLIPTokenizer(tokenizer.vocab, [tuple(line.split()) for line in lines], model_max_length=77)
    scheduler = DDIMScheduler(**model.scheduler, clip_sample=False)
    return StableDiffusionPipeline(vae, text, theirs, unet, scheduler, None, None, requires_safety_checker=False)
