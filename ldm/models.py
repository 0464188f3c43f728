"""The models of the family, a row of numbers each, and by which tensors their files are told apart."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import ldm.unet.keys
import ldm.vae.keys
from ldm.clip import TextConfig
from ldm.unet import UNetConfig
from ldm.vae import VAEConfig


@dataclass(frozen=True)
class Model:
    """What the weights do not say. zero_negative: no negative prompt means zeros, not the encoding of an empty text."""

    unet: UNetConfig
    vae: VAEConfig
    text_encoder: TextConfig | None
    scheduler: Mapping[str, Any]
    size: int
    text_encoder_2: TextConfig | None = None
    zero_negative: bool = False

    @property
    def prefixes(self) -> dict[str, str]:
        """What the names of each part begin with in an official single file."""
        first, second = "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."
        if self.text_encoder is None:
            second = "conditioner.embedders.0.model."
        elif self.text_encoder_2 is None:  # OpenAI's as transformers names it, OpenCLIP's under names of its own
            first = f"cond_stage_model.{'transformer' if self.text_encoder.activation == 'quick_gelu' else 'model'}."
        unet, vae = ldm.unet.keys.PREFIX, ldm.vae.keys.PREFIX
        return {"unet": unet, "vae": vae, "text_encoder": first, "text_encoder_2": second}


SCHEDULER = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
    "steps_offset": 1,
    "set_alpha_to_one": False,
}
SD1 = Model(UNetConfig(), VAEConfig(), TextConfig(), SCHEDULER, size=512)
SD2 = Model(
    UNetConfig(heads=None, head_width=64, context_width=1024, linear_projection=True),
    VAEConfig(),
    # Of OpenCLIP's ViT-H without its 24th layer: the text is taken before it.
    TextConfig(width=1024, layers=23, heads=16, activation="gelu"),
    SCHEDULER,
    size=512,
)
BIG_G = TextConfig(width=1280, layers=32, heads=20, activation="gelu", skip=1, final_norm=False, projection=1280)
SDXL = Model(
    UNetConfig(
        channels=(320, 640, 1280),
        depth=(0, 2, 10),
        mid_depth=10,
        heads=None,
        head_width=64,
        context_width=768 + 1280,
        linear_projection=True,
        vector_width=1280 + 6 * 256,
    ),
    VAEConfig(scaling_factor=0.13025, upcast=True),
    TextConfig(skip=1, final_norm=False),
    {**SCHEDULER, "timestep_spacing": "leading"},
    size=1024,
    text_encoder_2=BIG_G,
    zero_negative=True,
)
REFINER = Model(
    UNetConfig(
        channels=(384, 768, 1536, 1536),
        depth=(0, 4, 4, 0),
        mid_depth=4,
        heads=None,
        head_width=64,
        context_width=1280,
        linear_projection=True,
        vector_width=1280 + 5 * 256,
    ),
    SDXL.vae,
    None,
    SDXL.scheduler,
    size=1024,
    text_encoder_2=BIG_G,
)


def inpainting(model: Model) -> Model:
    """The same with a UNet that is also shown the mask (1 channel) and the masked picture (4)."""
    return replace(model, unet=replace(model.unet, in_channels=2 * model.vae.latent_channels + 1))


CONV_IN = "model.diffusion_model.input_blocks.0.0.weight"
CONTEXT = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
CONTEXT_XL = "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight"
DEPTH_XL = "model.diffusion_model.input_blocks.7.1.transformer_blocks.{}.norm1.weight"
VECTOR = "model.diffusion_model.label_emb.0.0.weight"
TIME_STACK = "model.diffusion_model.input_blocks.1.1.time_stack.0.norm1.weight"
ABSENT = None

Shape = tuple[int | None, ...]  # None is any extent

# The official single files: name, telling tensors with their shapes, and the model, None for one that is known but not
# loaded. The first row whose tensors are all as told is it.
OFFICIAL: tuple[tuple[str, Mapping[str, Shape | None], Model | None], ...] = (
    ("Stable Video Diffusion", {TIME_STACK: (None,)}, None),
    ("Zero123", {CONTEXT: (320, 768), "cc_projection.weight": (None, None)}, None),
    ("Segmind Vega", {CONTEXT_XL: (640, 2048), DEPTH_XL.format(1): (1280,), DEPTH_XL.format(2): ABSENT}, None),
    ("SSD-1B", {CONTEXT_XL: (640, 2048), DEPTH_XL.format(3): (1280,), DEPTH_XL.format(4): ABSENT}, None),
    ("SDXL base", {VECTOR: (1280, 2816), CONTEXT_XL: (640, 2048), CONV_IN: (320, 4, 3, 3)}, SDXL),
    ("SDXL inpainting", {VECTOR: (1280, 2816), CONTEXT_XL: (640, 2048), CONV_IN: (320, 9, 3, 3)}, inpainting(SDXL)),
    ("SDXL InstructPix2Pix", {VECTOR: (1280, 2816), CONTEXT_XL: (640, 2048), CONV_IN: (320, 8, 3, 3)}, None),
    ("SDXL refiner", {VECTOR: (1536, 2560), CONTEXT_XL: (768, 1280), CONV_IN: (384, 4, 3, 3)}, REFINER),
    ("SD 2.x unCLIP", {CONTEXT: (320, 1024), VECTOR: (None, None)}, None),
    ("SD 2.x x4 upscaler", {CONV_IN: (None, 7, 3, 3)}, None),
    ("SD 2.x depth", {CONTEXT: (320, 1024), CONV_IN: (320, 5, 3, 3)}, None),
    ("SD 2.x inpainting", {CONTEXT: (320, 1024), CONV_IN: (320, 9, 3, 3)}, inpainting(SD2)),
    ("SD 2.x", {CONTEXT: (320, 1024), CONV_IN: (320, 4, 3, 3)}, SD2),
    ("SD 1.x InstructPix2Pix", {CONTEXT: (320, 768), CONV_IN: (320, 8, 3, 3)}, None),
    ("SD 1.x inpainting", {CONTEXT: (320, 768), CONV_IN: (320, 9, 3, 3)}, inpainting(SD1)),
    ("SD 1.x", {CONTEXT: (320, 768), CONV_IN: (320, 4, 3, 3)}, SD1),
)

# Models of other families, by a tensor that only they have, with or without a prefix.
OTHERS = {
    r"distilled_guidance_layer\..*": "Chroma",
    # Each as its makers and as diffusers name it; Flux, too, has what is told of the last.
    r"double_blocks\.0\.img_attn\.norm\.key_norm\.scale|single_transformer_blocks\.0\.attn\.to_k\.weight": "Flux",
    r"joint_blocks\.0\.context_block\.attn\.qkv\.weight|transformer_blocks\.0\.norm1_context\.linear\.weight": (
        "Stable Diffusion 3"
    ),
    r"txt_in\.individual_token_refiner\..*": "HunyuanVideo",
    r"double_layers\.0\.attn\.w1q\.weight": "AuraFlow",
    r"clf\.1\.weight": "Stable Cascade",
    r"mlp_t5\.0\.weight": "Hunyuan-DiT",
    r"t_block\.1\.weight|adaln_single\.linear\.weight": "PixArt",
    r"cap_embedder\.1\.weight": "Lumina 2",
    r"t5_yproj\.weight": "Mochi",
    r"head\.modulation": "Wan",
}

ADDITION = "an addition to a model, which this version does not do"
EMBEDDING = "embedding", "an embedding", "it gives a model words, pipe.load_embedding(this file)"

# What is no whole model: a name that only such a file has, its kind, what to call it, and what to do with it.
PIECES = {
    r"(ip_adapter|image_proj)\..*": ("IP-Adapter", "an IP-Adapter", ADDITION),
    r"(.*\.)?motion_modules\..*": ("AnimateDiff", "AnimateDiff's motion modules", ADDITION),
    # What changes a model, in any of the forms that there are.
    r".*lora_.*|.*\.lora\..*|.*_lora\..*|.*\.(hada|lokr)_w\d.*|.*\.(oft_\w+|ia3_l|on_input|diff|diff_b)(\..*)?": (
        "LoRA",
        "a LoRA",
        "it changes a model, pipe.load_lora(this file)",
    ),
    r"control_model\..*|controlnet_.*": ("ControlNet", "a ControlNet", ADDITION),
    r"(first_stage_model\.)?decoder\.conv_in\.weight": ("VAE", "a VAE alone", "load a model, with this file as vae="),
    r"decoder\.layers\.0\.weight": ("VAE", "a TAESD", "load a model, with this file as vae="),
    r"down_blocks\.0\.resnets\..*": ("UNet", "a UNet alone", "give the folder that has model_index.json"),
    r"(diffusion_model\.)?input_blocks\.0\.0\.weight": ("UNet", "a UNet alone", "give a file that has the whole model"),
    r"(.*\.)?token_embedding\.weight": (
        "text encoder",
        "a text encoder alone",
        "give the file or folder that has the whole model",
    ),
    r"(.*\.)?encoder\.block\.0\.layer\.0\.SelfAttention\.q\.weight": (
        "text encoder",
        "a T5 text encoder",
        "it reads text for models of other families, which this version does not do",
    ),
    r"emb_params|clip_g|clip_l|<.*>": EMBEDDING,
}


class Finding(NamedTuple):
    """What a file is. `why`: the tensors that told, with their shapes. `model` is None for what cannot be loaded as
    one, `advice` then what to do with it."""

    kind: str
    name: str
    model: Model | None
    why: dict[str, tuple[int, ...]]
    advice: str = ""


def identify(shapes: Mapping[str, tuple[int, ...]]) -> Finding:
    """Tell a file by the names and shapes of its tensors."""
    for name, tells, model in OFFICIAL:
        if all(fits(shapes.get(tensor), shape) for tensor, shape in tells.items()):
            why = {tensor: shapes[tensor] for tensor, shape in tells.items() if shape is not ABSENT}
            return Finding("model", name, model, why)
    for pattern, name in OTHERS.items():
        if tells := first(shapes, rf"(.*\.)?({pattern})"):
            return Finding("model", name, None, tells)
    if not any(name.startswith(ldm.unet.keys.PREFIX) for name in shapes):
        for pattern, (kind, name, advice) in PIECES.items():
            if tells := first(shapes, pattern):
                return Finding(kind, name, None, tells, advice)
    if len(shapes) == 1:  # under the word itself
        [(name, shape)] = shapes.items()
        if len(shape) in (1, 2) and shape[-1] in (768, 1024, 1280):
            kind, called, advice = EMBEDDING
            return Finding(kind, called, None, {name: shape}, advice)
    return Finding("unknown", "no known model", None, {})


def first(shapes: Mapping[str, tuple[int, ...]], pattern: str) -> dict[str, tuple[int, ...]]:
    """The first tensor whose whole name fits, if there is one."""
    match = re.compile(pattern).fullmatch
    return next(({name: shape} for name, shape in shapes.items() if match(name)), {})


def fits(shape: tuple[int, ...] | None, telling: Shape | None) -> bool:
    if shape is None or telling is ABSENT:
        return shape is None and telling is ABSENT
    return len(shape) == len(telling) and all(told in (None, n) for n, told in zip(shape, telling, strict=True))
