"""From our names of the text encoders' parameters, which are transformers' up to version 4, to those in files."""

from ldm.clip.config import TextConfig

HUGGING_FACE = ("cond_stage_model.transformer.", "conditioner.embedders.0.transformer.")
OPEN_CLIP = ("cond_stage_model.model.", "conditioner.embedders.1.model.", "conditioner.embedders.0.model.")

OUTER = {
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm.weight": "ln_final.weight",
    "text_model.final_layer_norm.bias": "ln_final.bias",
    "text_projection.weight": "text_projection.T",
}
LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}


def open_clip_name(name: str) -> str:
    """`name` as OpenCLIP calls it: with q, k and v stacked in one tensor, whose parts `Source` names .q, .k and .v."""
    match name.split("."):
        case ["text_model", "encoder", "layers", layer, "self_attn", ("q_proj" | "k_proj" | "v_proj") as part, kind]:
            return f"transformer.resblocks.{layer}.attn.in_proj_{kind}.{part[0]}"
        case ["text_model", "encoder", "layers", layer, *part, kind]:
            return f"transformer.resblocks.{layer}.{LAYER['.'.join(part)]}.{kind}"
    return OUTER[name]


def spellings(config: TextConfig, name: str) -> tuple[str, ...]:
    """The names under which a file may hold our parameter: one per layout, layouts in the same order for all names.

    Official files prefix transformers' names (SD 1, SDXL's first encoder) or OpenCLIP's (SD 2, SDXL's second). Some of
    SD 1, and all that transformers 5 writes, leave out `text_model.`.
    """
    short = name.removeprefix("text_model.")
    theirs = open_clip_name(name)
    hugging_face = [prefix + n for prefix in HUGGING_FACE for n in (name, short)]
    return *hugging_face, *(prefix + theirs for prefix in OPEN_CLIP), name, short
