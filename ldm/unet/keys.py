"""From our names of the UNet's parameters, which are diffusers', to those of the official single files."""

from ldm.unet.config import UNetConfig

PREFIX = "model.diffusion_model."

OUTER = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def official_name(config: UNetConfig, name: str) -> str:
    """`name` as the official files call it, without their prefix.

    Those number the blocks through: conv_in is input_blocks.0, then every level has its `layers` resnets and, but the
    last, a downsampler; on the way up a level has `layers` + 1 resnets, the upsampler shares the place of the last one.
    """
    stride = config.layers + 1
    module, _, kind = name.rpartition(".")
    match module.split("."):
        case ["down_blocks", level, "resnets", i, part]:
            theirs = f"input_blocks.{stride * int(level) + int(i) + 1}.0.{RESNET[part]}"
        case ["down_blocks", level, "attentions", i, *part]:
            theirs = ".".join([f"input_blocks.{stride * int(level) + int(i) + 1}.1", *part])
        case ["down_blocks", level, "downsamplers", "0", "conv"]:
            theirs = f"input_blocks.{stride * int(level) + stride}.0.op"
        case ["mid_block", "resnets", i, part]:
            theirs = f"middle_block.{2 * int(i)}.{RESNET[part]}"
        case ["mid_block", "attentions", "0", *part]:
            theirs = ".".join(["middle_block.1", *part])
        case ["up_blocks", level, "resnets", i, part]:
            theirs = f"output_blocks.{stride * int(level) + int(i)}.0.{RESNET[part]}"
        case ["up_blocks", level, "attentions", i, *part]:
            theirs = ".".join([f"output_blocks.{stride * int(level) + int(i)}.1", *part])
        case ["up_blocks", level, "upsamplers", "0", "conv"]:
            attends = config.depth[-1 - int(level)] > 0
            theirs = f"output_blocks.{stride * int(level) + config.layers}.{2 if attends else 1}.conv"
        case _:
            theirs = OUTER[module]
    return f"{theirs}.{kind}"


def spellings(config: UNetConfig, name: str) -> tuple[str, ...]:
    """The names under which a file may hold our parameter: one per layout, layouts in the same order for all names."""
    return PREFIX + official_name(config, name), name
