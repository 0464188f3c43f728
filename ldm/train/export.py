"""Write trained nets as a diffusers folder: fp16 safetensors, configs, tokenizer and scheduler files."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from ldm.clip import TextEncoder
from ldm.train.loop import whole_folder
from ldm.unet import UNet
from ldm.vae import VAE


def unet_config(unet: UNet, size: int) -> dict:
    c, attends = unet.config, [d > 0 for d in unet.config.depth]
    return dict(
        _class_name="UNet2DConditionModel",
        sample_size=size,
        in_channels=c.in_channels,
        out_channels=c.out_channels,
        down_block_types=["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attends],
        up_block_types=["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)],
        mid_block_type="UNetMidBlock2DCrossAttn",
        block_out_channels=c.channels,
        layers_per_block=c.layers,
        attention_head_dim=c.heads,  # in SD 1 configs this name means the number of heads
        cross_attention_dim=c.context_width,
        norm_num_groups=c.groups,
        norm_eps=1e-5,
        act_fn="silu",
    )


def vae_config(vae: VAE, size: int) -> dict:
    c = vae.config
    return dict(
        _class_name="AutoencoderKL",
        sample_size=size,
        in_channels=3,
        out_channels=3,
        down_block_types=["DownEncoderBlock2D"] * len(c.channels),
        up_block_types=["UpDecoderBlock2D"] * len(c.channels),
        block_out_channels=c.channels,
        layers_per_block=c.layers,
        latent_channels=c.latent_channels,
        norm_num_groups=c.groups,
        scaling_factor=c.scaling_factor,
        act_fn="silu",
    )


def text_config(text_encoder: TextEncoder) -> dict:
    c = text_encoder.config
    return dict(
        architectures=["CLIPTextModel"],
        model_type="clip_text_model",
        vocab_size=c.vocab_size,
        max_position_embeddings=c.length,
        hidden_size=c.width,
        intermediate_size=4 * c.width,
        projection_dim=c.width,
        num_hidden_layers=c.layers,
        num_attention_heads=c.heads,
        hidden_act=c.activation,
        layer_norm_eps=1e-5,
        bos_token_id=c.end_token - 1,
        eos_token_id=c.end_token,
        pad_token_id=c.end_token,
    )


SCHEDULER = dict(
    _class_name="DDIMScheduler",
    beta_schedule="scaled_linear",
    beta_start=0.00085,
    beta_end=0.012,
    num_train_timesteps=1000,
    prediction_type="v_prediction",
    clip_sample=False,
    set_alpha_to_one=False,
    steps_offset=1,
)

INDEX = dict(
    _class_name="StableDiffusionPipeline",
    unet=["diffusers", "UNet2DConditionModel"],
    vae=["diffusers", "AutoencoderKL"],
    text_encoder=["transformers", "CLIPTextModel"],
    tokenizer=["transformers", "CLIPTokenizer"],
    scheduler=["diffusers", "DDIMScheduler"],
    safety_checker=[None, None],
    feature_extractor=[None, None],
    image_encoder=[None, None],
    requires_safety_checker=False,
)


def export(unet: UNet, vae: VAE, text_encoder: TextEncoder, tokenizer: Path, folder: Path, size: int = 64) -> None:
    """The whole model at once, in the place of the one that `folder` holds, or nothing.

    `tokenizer`: a folder of vocab.json, merges.txt, tokenizer_config.json. `size`: side of a picture in pixels.
    Raises FileExistsError for a folder of anything but a model: it would be lost.
    """
    if folder.exists() and any(folder.iterdir()) and not (folder / "model_index.json").exists():
        raise FileExistsError(f"{folder} is in the way: it has files and no model_index.json; name another folder")

    with whole_folder(folder) as new:

        def write(file: str, config: dict) -> None:
            (new / file).parent.mkdir(exist_ok=True)
            (new / file).write_text(json.dumps(config, indent=2) + "\n")

        def save(file: str, net: nn.Module) -> None:
            tensors = {k: v.detach().to(torch.float16).contiguous() for k, v in net.state_dict().items()}
            save_file(tensors, new / file, metadata={"format": "pt"})

        write("model_index.json", INDEX)
        write("scheduler/scheduler_config.json", SCHEDULER)
        write("unet/config.json", unet_config(unet, size // vae.config.factor))
        write("vae/config.json", vae_config(vae, size))
        write("text_encoder/config.json", text_config(text_encoder))
        save("unet/diffusion_pytorch_model.safetensors", unet)
        save("vae/diffusion_pytorch_model.safetensors", vae)
        save("text_encoder/model.safetensors", text_encoder)
        shutil.copytree(tokenizer, new / "tokenizer")
