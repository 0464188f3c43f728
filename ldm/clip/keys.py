"""From our names of the text encoder's parameters, which are transformers' up to version 4, to those in files."""

from ldm.clip.config import TextConfig

PREFIX = "cond_stage_model.transformer."


def spellings(config: TextConfig, name: str) -> tuple[str, ...]:
    """The names under which a file may hold our parameter: one per layout, layouts in the same order for all names.

    Official files of SD 1 prefix transformers' names. Some of them, and all that transformers 5 writes, leave out
    `text_model.`.
    """
    short = name.removeprefix("text_model.")
    return PREFIX + name, PREFIX + short, name, short
