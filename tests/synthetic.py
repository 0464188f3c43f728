"""Writes synthetic checkpoints in the official and in diffusers' layouts, with tiny nets or full-size ones."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

import ldm.clip.keys
import ldm.unet.keys
import ldm.vae.keys
from ldm.clip import TextConfig, TextEncoder
from ldm.clip.tokenizer import byte_alphabet
from ldm.models import CONTEXT, CONV_IN, SD1, Model
from ldm.unet import UNet, UNetConfig
from ldm.vae import VAE, VAEConfig

SD15_SHAPES = json.loads((Path(__file__).parent / "keys" / "sd15.json").read_text())

TINY = Model(
    unet=UNetConfig(channels=(16, 32), layers=1, depth=(1, 0), heads=4, context_width=24, groups=8),
    vae=VAEConfig(channels=(8, 16), layers=1, groups=4),
    text_encoder=TextConfig(vocab_size=520, width=24, layers=2, heads=4, end_token=519),
    scheduler=SD1.scheduler,
    size=64,
)
# The same with the official vocabulary.
TINY_NETS = replace(TINY, text_encoder=replace(TINY.text_encoder, vocab_size=49408, end_token=49407))
TINY_ROW = ("tiny SD 1.x", {CONV_IN: (16, 4, 3, 3), CONTEXT: (16, 24)}, TINY)


def tiny_nets(seed=0, dtype=torch.float32):
    """UNet, VAE and text encoder with random values everywhere, norms and biases too."""
    generator = torch.Generator().manual_seed(seed)
    nets = UNet(TINY.unet), VAE(TINY.vae), TextEncoder(TINY.text_encoder)
    for net in nets:
        for p in net.requires_grad_(False).parameters():
            p.normal_(std=0.1, generator=generator)
        net.to(dtype).eval()
    return nets


def official(net, layout=0):
    """The tensors of a net under the names of a layout (0 is that of the single files), as the official files have
    them: the VAE's attention is made of 1x1 convolutions."""
    keys = {UNet: ldm.unet.keys, VAE: ldm.vae.keys, TextEncoder: ldm.clip.keys}[type(net)]
    tensors = {keys.spellings(net.config, name)[layout]: p for name, p in net.state_dict().items()}
    return {name: p[..., None, None] if ".attn_1." in name and p.ndim == 2 else p for name, p in tensors.items()}


def single_file(nets, ema=False, buffers=False, text_layout=0):
    unet, vae, text = nets
    tensors = official(unet) | official(vae) | official(text, text_layout)
    if ema:
        for name in official(unet):
            tensors["model_ema." + name.removeprefix("model.").replace(".", "")] = torch.zeros(1)
        tensors |= {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(1)}
    if buffers:
        tensors |= {name: torch.zeros(shape) for name, shape in SD15_SHAPES.items() if "." not in name}
        prefix = "cond_stage_model.transformer." + ("text_model." if text_layout == 0 else "")
        tensors[prefix + "embeddings.position_ids"] = torch.arange(77)[None]
    return tensors


def write(path, tensors):
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return path


def shift(path, by):
    """Pad the header of a safetensors file with `by` spaces, so that its data start at another alignment."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    path.write_bytes((length + by).to_bytes(8, "little") + data[8 : 8 + length] + b" " * by + data[8 + length :])
    return path


def full_size(dtype=torch.float16):
    """SD 1.5's tensors, all names and shapes, filled from one block of random numbers."""
    block = torch.randn(2**20, generator=torch.Generator().manual_seed(0)).mul_(0.02).to(dtype)
    return {
        name: block.repeat(torch.Size(shape).numel() // len(block) + 1)[: torch.Size(shape).numel()].view(shape)
        for name, shape in SD15_SHAPES.items()
    }


def vocabulary():
    """A tokenizer's vocab.json and merges.txt: single bytes, and enough merges for "cat" and "red"."""
    merges = [("c", "a"), ("ca", "t</w>"), ("r", "e"), ("re", "d</w>"), ("t", "h"), ("th", "e</w>")]
    alphabet = byte_alphabet()
    tokens = [*alphabet, *(c + "</w>" for c in alphabet), *("".join(pair) for pair in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    return {token: i for i, token in enumerate(tokens)}, merges


def diffusers_pipeline(seed=0):
    """A StableDiffusionPipeline as tiny as TINY, with random values everywhere."""
    from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    unet = UNet2DConditionModel(
        sample_size=32,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=24,
        attention_head_dim=4,
        norm_num_groups=8,
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        scaling_factor=0.5,
    )
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=520,
            hidden_size=24,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            bos_token_id=518,
            eos_token_id=519,
        )
    )
    generator = torch.Generator().manual_seed(seed)
    for net in (unet, vae, text):
        for p in net.requires_grad_(False).parameters():
            p.normal_(std=0.1, generator=generator)
        net.eval()
    vocab, merges = vocabulary()
    scheduler = PNDMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1
    )
    tokenizer = CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=77)
    return StableDiffusionPipeline(vae, text, tokenizer, unet, scheduler, None, None, requires_safety_checker=False)


# Layouts of the official files

KEYS = Path(__file__).parent / "keys"


def sparse(path, shapes):
    """A safetensors file of float16 zeros, all of whose data are a hole: no space on the disk, whatever its size."""
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * int(np.prod(shape))
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return path


LAYOUTS = {  # the row, and how many tensors its nets have
    "sd15": ("SD 1.x", 1130),
    "sd15_inpaint": ("SD 1.x inpainting", 1130),
    "sd2": ("SD 2.x", 1306),
    "sdxl_base": ("SDXL base", 2641),
    "sdxl_refiner": ("SDXL refiner", 1985),
}
KINDS = ("weight", "bias")
BUFFERS = {name for name in json.loads((KEYS / "sd15.json").read_text()) if "." not in name}
OTHERS = {  # the tensors that no net asks for, but the buffers
    "sd15": {"cond_stage_model.transformer.text_model.embeddings.position_ids"},
    "sd15_inpaint": {"cond_stage_model.transformer.text_model.embeddings.position_ids"},
    "sd2": {"cond_stage_model.model.logit_scale"},
    "sdxl_base": {
        "conditioner.embedders.0.transformer.text_model.embeddings.position_ids",
        "conditioner.embedders.1.model.logit_scale",
    },
    "sdxl_refiner": {"conditioner.embedders.0.model.logit_scale"},
}
LAST = "cond_stage_model.model.transformer.resblocks.23."
UNUSED = {
    "sd2": {"cond_stage_model.model.text_projection"}
    | {
        LAST + f"{part}.{kind}"
        for part in ("ln_1", "ln_2", "attn.out_proj", "mlp.c_fc", "mlp.c_proj")
        for kind in KINDS
    }
    | {LAST + f"attn.in_proj_{kind}" for kind in KINDS}
}
