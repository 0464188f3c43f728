"""From our names of the VAE's parameters, which are diffusers', to those of the official single files."""

from ldm.vae.config import TinyConfig, VAEConfig

PREFIX = "first_stage_model."

ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
OLD_ATTENTION = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def official_name(config: VAEConfig, name: str) -> str:
    """`name` as the official files call it, without their prefix. They count the decoder's levels from the finest."""
    last = len(config.channels) - 1
    match name.split("."):
        case ["encoder", "down_blocks", level, "resnets", i, *part]:
            theirs = ["encoder.down", level, "block", i, *resnet(part)]
        case ["encoder", "down_blocks", level, "downsamplers", "0", *part]:
            theirs = ["encoder.down", level, "downsample", *part]
        case ["decoder", "up_blocks", level, "resnets", i, *part]:
            theirs = ["decoder.up", str(last - int(level)), "block", i, *resnet(part)]
        case ["decoder", "up_blocks", level, "upsamplers", "0", *part]:
            theirs = ["decoder.up", str(last - int(level)), "upsample", *part]
        case [half, "mid_block", "resnets", i, *part]:
            theirs = [half, "mid", f"block_{int(i) + 1}", *resnet(part)]
        case [half, "mid_block", "attentions", "0", *module, kind]:
            theirs = [half, "mid.attn_1", ATTENTION[".".join(module)], kind]
        case [half, "conv_norm_out", kind]:
            theirs = [half, "norm_out", kind]
        case _:
            return name
    return ".".join(theirs)


def resnet(part: list[str]) -> list[str]:
    module, kind = part
    return ["nin_shortcut" if module == "conv_shortcut" else module, kind]


def old_name(name: str) -> str:
    """`name` as old versions of diffusers wrote it: the attention's four matrices had other names."""
    match name.split("."):
        case [half, "mid_block", "attentions", "0", *module, kind]:
            part = ".".join(module)
            return ".".join([half, "mid_block.attentions.0", OLD_ATTENTION.get(part, part), kind])
    return name


def spellings(config: VAEConfig, name: str) -> tuple[str, ...]:
    """The names under which a file may hold our parameter: one per layout, layouts in the same order for all names."""
    if isinstance(config, TinyConfig):
        return PREFIX + name, name
    official = official_name(config, name)
    return PREFIX + official, official, name, old_name(name)
