"""Which layer of a port is wrong: run the reference, keep what each layer did, and check the port against it.

    record(reference, (x, t, context), "unet.safetensors")     # any torch module: diffusers', transformers', ours
    print(check(port, "unet.safetensors"))                      # the port on the same weights: a line a layer

`check` runs the port twice. First as it is: a layer's difference is then its own and that of all before it, and shows
how rounding and faults grow. Then layer by layer: a module without children works on its recorded input, whatever came
to it, and every module hands on its recorded output. What is off now is off for one reason. If it is what came to a
layer, that is the code of the module around it; if it is what the layer makes of the recorded input, it is the layer.
"""

from ldm.parity.checking import Fault, Layer, Report, check
from ldm.parity.difference import TOLERANCE, Difference
from ldm.parity.recording import record

__all__ = ["TOLERANCE", "Difference", "Fault", "Layer", "Report", "check", "record"]
