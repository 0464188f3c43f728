"""Stable Diffusion from scratch: `ldm.Pipeline.from_pretrained()("a red heart").images[0]`."""

from ldm.inspection import inspect
from ldm.maps import capture
from ldm.output import Output
from ldm.pipeline import Pipeline
from ldm.samplers import SAMPLERS
from ldm.settings import Settings

__version__ = "0.1.0"

__all__ = ["SAMPLERS", "Output", "Pipeline", "Settings", "capture", "inspect"]
