"""Which module of one implementation is which of another's."""

from collections.abc import Iterable, Mapping

from torch import nn

import ldm.clip.keys
import ldm.unet.keys
import ldm.vae.keys
from ldm.checkpoint import NETS

# What the names of a net begin with where it stands in a larger one.
PREFIXES = (
    ldm.unet.keys.PREFIX,
    ldm.vae.keys.PREFIX,
    *ldm.clip.keys.HUGGING_FACE,
    *ldm.clip.keys.OPEN_CLIP,
    "text_model.",
)


def bare(name: str) -> str:
    for prefix in PREFIXES:
        name = name.removeprefix(prefix)
    return name


def other_names(model: nn.Module) -> dict[str, list[str]]:
    """Of the layers of one of our nets their names in the layouts of the key tables; of any other model none."""
    for net, spellings in NETS.values():
        if isinstance(model, net):
            weights = [name for name in model.state_dict() if name.endswith(".weight")]
            found = {weight: spellings(model.config, weight) for weight in weights}
            return {
                ours.removesuffix(".weight"): [bare(s.removesuffix(".weight")) for s in found[ours]] for ours in found
            }
    return {}


def partners(model: nn.Module, recorded: Mapping[str, Iterable[str]]) -> dict[str, str]:
    """The recorded module of each of the model's that has one, by name. recorded: by name the other names of each."""
    index = {alias: name for name, aliases in recorded.items() for alias in aliases}
    index |= {bare(name): name for name in recorded}
    aliases, found = other_names(model), {}
    for name, _ in model.named_modules():
        spellings = (bare(name), *aliases.get(name, []))
        if known := [index[spelling] for spelling in spellings if spelling in index]:
            found[name] = known[0]
    return found
