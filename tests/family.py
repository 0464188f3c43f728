"""The family of Stable Diffusion in tiny: a model of each kind, as diffusers' pipeline and as ours."""

from dataclasses import replace

import numpy as np
import torch
from diffusers import (
    DDIMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
)
from parity import diffusers_unet, diffusers_vae, randomise, transformers_text
from PIL import Image, ImageDraw
from synthetic import vocabulary
from transformers import CLIPTokenizer

import ldm
from ldm import checkpoint
from ldm.clip import TextConfig
from ldm.models import SCHEDULER, SDXL, Model, inpainting
from ldm.unet import UNetConfig
from ldm.vae import VAEConfig

TEXT = TextConfig(vocab_size=520, width=24, layers=3, heads=4, end_token=519)
TEXT_2 = replace(TEXT, width=32, activation="gelu", skip=1, final_norm=False, projection=32)
UNET = UNetConfig(
    channels=(16, 32),
    layers=1,
    depth=(1, 0),
    heads=None,
    head_width=8,
    context_width=24,
    linear_projection=True,
    groups=8,
)
VAE_ = VAEConfig(channels=(8, 16), layers=1, groups=4, scaling_factor=0.5)

SD1 = Model(replace(UNET, heads=4, head_width=None, linear_projection=False), VAE_, TEXT, SCHEDULER, 64)
SD1_INPAINT = inpainting(SD1)
SD2 = Model(UNET, VAE_, replace(TEXT, activation="gelu"), SCHEDULER, 64)
SD2_V = replace(SD2, scheduler={**SCHEDULER, "prediction_type": "v_prediction"})
ZERO_SNR = replace(SD2_V, scheduler={**SD2_V.scheduler, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"})
XL = Model(
    replace(UNET, depth=(0, 2), mid_depth=2, context_width=24 + 32, vector_width=32 + 6 * 256),
    replace(VAE_, upcast=True),
    replace(TEXT, skip=1, final_norm=False),
    SDXL.scheduler,
    64,
    TEXT_2,
    zero_negative=True,
)
REFINER = replace(
    XL,
    unet=replace(XL.unet, context_width=32, vector_width=32 + 5 * 256),
    text_encoder=None,
    zero_negative=False,
)
MODELS = {
    "SD 1": SD1,
    "SD 1 inpainting": SD1_INPAINT,
    "SD 2": SD2,
    "SD 2 v": SD2_V,
    "SD 2 inpainting": inpainting(SD2),
    "SDXL": XL,
    "SDXL inpainting": inpainting(XL),
    "refiner": REFINER,
}


def tokenizer(pad):
    vocab, merges = vocabulary()
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=77, pad_token=pad)


def parts_of(model):
    """diffusers' and transformers' nets for a model, with random values everywhere under which each input matters."""
    nets = {"unet": diffusers_unet(model.unet, 256), "vae": diffusers_vae(model.vae)}
    tokenizers = {}
    for part in ("text_encoder", "text_encoder_2"):
        if config := getattr(model, part):
            nets[part] = transformers_text(config)
            pad = "<|endoftext|>" if config.activation == "quick_gelu" else "!"
            tokenizers[part.replace("text_encoder", "tokenizer")] = tokenizer(pad)
    for seed, net in enumerate(nets.values()):
        randomise(net, seed=seed).requires_grad_(False)
    nets["unet"].register_to_config(sample_size=model.size // model.vae.factor)
    return nets | tokenizers


def saved(pipe, folder):
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(folder)
    return ldm.Pipeline.from_pretrained(folder)


SD_NONE = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}


def scheduler(cls, model):
    """As from_config makes it of the official folders' files."""
    fields = {**model.scheduler, "clip_sample": False, "skip_prk_steps": True}
    return cls(**{k: v for k, v in fields.items() if k in cls.__init__.__annotations__})


def sd(model, cls=StableDiffusionPipeline, sampler=DDIMScheduler):
    pipe = cls(**parts_of(model), scheduler=scheduler(sampler, model), **SD_NONE)
    # transformers 5 took `text_model` away, diffusers still looks for it at clip_skip; as a plain attribute, no module.
    object.__setattr__(pipe.text_encoder, "text_model", pipe.text_encoder)
    return pipe


def theirs(pipe, seed=0, steps=5, **arguments):
    """The last latents."""
    arguments = {"guidance_scale": 7.5} | arguments
    generator = torch.Generator().manual_seed(seed)
    return pipe(generator=generator, num_inference_steps=steps, output_type="latent", **arguments).images


def ours(pipe, seed=0, steps=5, **arguments):
    return pipe(seed=seed, steps=steps, progress=False, **arguments).latents


def xl(model, cls=StableDiffusionXLPipeline, sampler=EulerDiscreteScheduler):
    parts = dict.fromkeys(("text_encoder", "tokenizer")) | parts_of(model)
    options = {"force_zeros_for_empty_prompt": model.zero_negative, "add_watermarker": False}
    if model.text_encoder is None:
        options["requires_aesthetics_score"] = True
    return cls(**parts, scheduler=scheduler(sampler, model), **options)


def reference(model, sampler):
    """diffusers' pipeline of the kind that the model's own folder names."""
    inpaints = model.unet.in_channels == 9
    if model.text_encoder_2 is None:
        return sd(model, StableDiffusionInpaintPipeline if inpaints else StableDiffusionPipeline, sampler)
    if model.text_encoder is None:
        return xl(model, StableDiffusionXLImg2ImgPipeline, sampler)
    return xl(model, StableDiffusionXLInpaintPipeline if inpaints else StableDiffusionXLPipeline, sampler)


def contiguous(image):
    """(1,3,h,w) in [0,1]. Of a PIL image diffusers makes a channels-last view, whose norms are less exact."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].contiguous() / 255


def photo(width=40, height=24):
    """A picture with edges and gradients that is not square."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    image = Image.fromarray(np.stack([x, y, 255 - x], -1).astype(np.uint8))
    ImageDraw.Draw(image).ellipse((10, 4, 30, 20), fill=(250, 220, 30), outline="black", width=2)
    return image


def official_tensors(pipe):
    """A pipeline's tensors as the official single file of its model has them: OpenCLIP's stacked, the VAE's attention
    of 1x1 convolutions."""
    first, second = pipe.text_encoder, pipe.text_encoder_2
    text = 2 if second else 0 if first.config.activation == "quick_gelu" else 4  # as numbered by the key tables
    layouts = {"unet": 0, "vae": 0, "text_encoder": text, "text_encoder_2": 5 if first else 6}
    tensors = {}
    for part, layout in layouts.items():
        if net := getattr(pipe, part):
            spellings = checkpoint.NETS[part][1]
            tensors |= {spellings(net.config, name)[layout]: p for name, p in net.state_dict().items()}
    for name in [name for name in tensors if name.endswith(".q")]:
        stacked = name.removesuffix(".q")
        tensors[stacked] = torch.cat([tensors.pop(f"{stacked}.{part}") for part in "qkv"])
    for name in [name for name in tensors if name.endswith(".text_projection.T")]:
        tensors[name.removesuffix(".T")] = tensors.pop(name).T.contiguous()
    return {name: p[..., None, None] if ".attn_1." in name and p.ndim == 2 else p for name, p in tensors.items()}


def assert_close(a, b):
    assert a.shape == b.shape
    assert (a - b).abs().max() <= 1e-3
