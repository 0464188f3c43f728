"""The key tables against the list of the official tensors, and against diffusers' own converter."""

import pytest
import torch
from diffusers.loaders import single_file_utils as diffusers
from synthetic import SD15_SHAPES

import ldm.clip.keys
import ldm.unet.keys
import ldm.vae.keys
from ldm.clip import TextConfig, TextEncoder
from ldm.source import IGNORED
from ldm.unet import UNet, UNetConfig
from ldm.vae import VAE, VAEConfig

BUFFERS = {
    "betas",
    "alphas_cumprod",
    "alphas_cumprod_prev",
    "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod",
    "posterior_variance",
    "posterior_log_variance_clipped",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
    "cond_stage_model.transformer.text_model.embeddings.position_ids",
}

SDXL = UNetConfig(
    channels=(320, 640, 1280),
    depth=(0, 2, 10),
    mid_depth=10,
    heads=None,
    head_width=64,
    context_width=2048,
    linear_projection=True,
    vector_width=2816,
)
DEEP = UNetConfig(channels=(32, 64, 64), layers=3, depth=(0, 1, 2), mid_depth=2, context_width=16)


def on_meta(net, config):
    with torch.device("meta"):
        return net(config)


def test_the_tables_are_a_bijection_onto_sd15():
    nets = (
        (on_meta(UNet, UNetConfig()), ldm.unet.keys),
        (on_meta(VAE, VAEConfig()), ldm.vae.keys),
        (on_meta(TextEncoder, TextConfig()), ldm.clip.keys),
    )
    ours = {(i, name): tuple(p.shape) for i, (net, _) in enumerate(nets) for name, p in net.state_dict().items()}
    theirs = {key: nets[key[0]][1].spellings(nets[key[0]][0].config, key[1])[0] for key in ours}
    assert len(ours) == len(set(theirs.values())) == 1130
    assert set(SD15_SHAPES) - set(theirs.values()) == BUFFERS == set(filter(IGNORED.fullmatch, SD15_SHAPES))
    convolved = set()
    for key, name in theirs.items():
        official = tuple(SD15_SHAPES[name])
        if official != ours[key]:
            assert official == (*ours[key], 1, 1)
            convolved.add(name)
    halves, parts = ("encoder", "decoder"), ("q", "k", "v", "proj_out")
    assert convolved == {f"first_stage_model.{h}.mid.attn_1.{p}.weight" for h in halves for p in parts}


@pytest.mark.parametrize("config", [UNetConfig(), SDXL, DEEP], ids=["SD 1", "SDXL", "three layers"])
def test_unet_names_are_diffusers_names(config):
    names = list(on_meta(UNet, config).state_dict())
    checkpoint = {ldm.unet.keys.spellings(config, name)[0]: name for name in names}  # names travel in place of tensors
    options = {"layers_per_block": config.layers, "class_embed_type": None, "addition_embed_type": None}
    if config.vector_width is not None:
        options["addition_embed_type"] = "text_time"
    converted = diffusers.convert_ldm_unet_checkpoint(checkpoint, options)
    assert converted == {name: name for name in names}


@pytest.mark.parametrize(
    "config", [VAEConfig(), VAEConfig(channels=(32, 64, 64), layers=3)], ids=["SD", "three layers"]
)
def test_vae_names_are_diffusers_names(config):
    state = on_meta(VAE, config).state_dict()
    checkpoint = {ldm.vae.keys.spellings(config, name)[0]: p for name, p in state.items()}
    ids = {id(p): name for name, p in state.items()}
    count = len(config.channels)
    options = {"down_block_types": [None] * count, "up_block_types": [None] * count, "layers_per_block": config.layers}
    converted = diffusers.convert_ldm_vae_checkpoint(checkpoint, options)
    assert {name: ids[id(p)] for name, p in converted.items()} == {name: name for name in state}


def test_text_names_are_transformers_names():
    config = TextConfig(width=32, layers=2, heads=2)
    names = list(on_meta(TextEncoder, config).state_dict())
    checkpoint = {ldm.clip.keys.spellings(config, name)[0]: name for name in names}
    converted = diffusers.convert_ldm_clip_checkpoint(checkpoint, remove_prefix="cond_stage_model.transformer.")
    assert converted == {name: name for name in names}
