"""Stable Diffusion from scratch: `ldm.Pipeline.from_pretrained()("a red heart").images[0]`."""

from importlib import import_module
from types import ModuleType

from ldm.inspection import inspect
from ldm.maps import capture
from ldm.output import Output
from ldm.pipeline import Pipeline
from ldm.samplers import SAMPLERS
from ldm.settings import Settings

__version__ = "0.1.0"

# Parts that stand outside of the flow, loaded when they are asked for: `ldm.parity.check`.
OUTSIDE = ("parity", "preview", "proof", "trace", "train")

__all__ = ["SAMPLERS", "Output", "Pipeline", "Settings", "capture", "inspect"]


def __getattr__(name: str) -> ModuleType:
    if name in OUTSIDE:
        return import_module(f"ldm.{name}")
    raise AttributeError(f"module 'ldm' has no attribute {name!r}")
