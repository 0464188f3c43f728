"""The text chunk "parameters" of a PNG: the settings of a picture as webui writes them, for its many readers."""

import json
from collections.abc import Sequence

from ldm.settings import Settings

# SDXL's, of which webui writes nothing.
CONDITIONS = ("original_size", "crops_coords_top_left", "target_size", "aesthetic_score", "negative_aesthetic_score")


def quote(value: object) -> str:
    """webui's rule: a value that holds a separator is written as a JSON string."""
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if any(c in text for c in ',:\n"') else text


def parameters(
    settings: Settings, index: int, size: tuple[int, int], model: str, extra: dict[str, object] | None = None
) -> str:
    """What picture `index` of a call was made from. size: (width, height) in pixels. extra: more fields."""
    s = settings
    fields: dict[str, object] = {
        "Steps": s.steps if s.sigmas is None or isinstance(s.sigmas, str) else len(s.sigmas) - 1,
        "Sampler": s.sampler_name,
        "CFG scale": s.guidance_scale,
        "Seed": s.seeds[index],
        "Size": f"{size[0]}x{size[1]}",
        "Model": model,
    }
    if isinstance(s.sigmas, str):
        fields["Schedule type"] = s.sigmas
    if s.clip_skip != 1:
        fields["Clip skip"] = s.clip_skip
    if s.eta:
        fields["Eta"] = s.eta
    if s.subseed_strength:
        fields |= {"Variation seed": s.subseeds[index], "Variation seed strength": s.subseed_strength}
    if s.seed_resize_from is not None:
        fields["Seed resize from"] = "{}x{}".format(*s.seed_resize_from)
    if s.tiling is not None:
        fields["Tiling"] = True if s.tiling == "both" else s.tiling  # webui's is both
    if s.image is not None or s.latents is not None:
        fields["Denoising strength"] = s.strength
    if s.guidance_rescale:
        fields["CFG rescale"] = s.guidance_rescale
    if s.emphasis != "mean":
        fields["Emphasis"] = "No norm" if s.emphasis == "none" else "None"
    for name in CONDITIONS:
        if (value := getattr(s, name)) != getattr(Settings, name):
            fields[name.replace("_", " ").capitalize()] = tuple(value) if isinstance(value, Sequence) else value
    if s.refiner is not None:
        fields |= {"Refiner": s.refiner.name, "Refiner switch at": s.refiner_start}
    negative = s.negative_texts[index]
    lines = [s.texts[index], *([f"Negative prompt: {negative}"] if negative else [])]
    return "\n".join([*lines, ", ".join(f"{key}: {quote(value)}" for key, value in (fields | (extra or {})).items())])
