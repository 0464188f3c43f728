"""How much memory the full-size VAE takes for a large picture, in strips and whole, beside diffusers' tiling.

python -m benchmarks.vae         # 2048x2048: 17 GB of memory, about half an hour on two cores with nothing else to do
python -m benchmarks.vae 1024    # a quarter of both

Random weights and inputs in float32. Each figure is taken in a fresh process of two threads: the peak memory above what
is in use when the call begins (weights, inputs, imports), the time of the call, and how far its result is from the
whole's at the worst pixel, in 1/255 of the range [-1,1] (in decoding; in encoding, of the standard deviation of the
means).
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from ldm.vae import VAE, VAEConfig
from tests.parity import randomise

MEASURE = """
import sys, time
from pathlib import Path
import torch
from safetensors.torch import load_file
{imports}

def memory(kind):  # of this process, in bytes
    return 1024 * int(Path("/proc/self/status").read_text().split(kind)[1].split()[0])

weights, inputs, output = sys.argv[1:]
torch.set_num_threads(2)
net = {net}
net.load_state_dict(load_file(weights))
net.eval().requires_grad_(False)
{prepare}
x, before, start = torch.load(inputs), memory("VmRSS:"), time.perf_counter()
with torch.no_grad():
    y = {call}
print(memory("VmHWM:") - before, time.perf_counter() - start)
torch.save(y, output)
"""
OURS = {"imports": "from ldm.vae import VAE, VAEConfig, strips", "net": "VAE(VAEConfig())"}
THEIRS = {
    "imports": "from ldm.vae import VAEConfig\nfrom tests.parity import diffusers_vae",
    "net": "diffusers_vae(VAEConfig())",
}
# In the tiles that their config of SD 1 leads to (sample_size 512), which `diffusers_vae` does not name.
TILING = "net.tile_sample_min_size, net.tile_latent_min_size = 512, 64\nnet.enable_tiling()"
CALLS = {
    "decode": {"ours": "net.decode(x)", "theirs": "net.decode(x).sample"},
    "encode": {"ours": "net.encode(x).mean", "theirs": "net.encode(x).latent_dist.mean"},
}
CASES = {
    "ldm, whole": ("ours", {**OURS, "prepare": "strips.WHOLE_UP_TO = float('inf')"}),
    "ldm, strips": ("ours", {**OURS, "prepare": "strips.WHOLE_UP_TO = 0"}),
    "diffusers, tiling": ("theirs", {**THEIRS, "prepare": TILING}),
}


def measure(code: str, weights: Path, inputs: Path) -> tuple[float, float, Tensor]:
    output = inputs.with_name("output.pt")
    run = subprocess.run(
        [sys.executable, "-c", code, weights, inputs, output], stdout=subprocess.PIPE, text=True, check=True
    )
    peak, seconds = map(float, run.stdout.split())
    return peak, seconds, torch.load(output)


def main(side: int) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        weights, inputs = Path(temporary) / "vae.safetensors", Path(temporary) / "inputs.pt"
        net = randomise(VAE(VAEConfig()))
        save_file(net.state_dict(), weights)
        size = weights.stat().st_size
        del net
        print(f"VAE of SD 1, float32, {size / 1e9:.2f} GB, {side}x{side} pixels, two threads")
        print(f"{'':28}{'peak above weights':>20}{'time':>10}{'/ whole':>10}{'largest difference':>22}")
        torch.manual_seed(0)
        x = {"decode": torch.randn(1, 4, side // 8, side // 8), "encode": torch.rand(1, 3, side, side) * 2 - 1}
        for half, calls in CALLS.items():
            torch.save(x[half], inputs)
            for name, (whose, parts) in CASES.items():
                peak, seconds, y = measure(MEASURE.format(call=calls[whose], **parts), weights, inputs)
                if name == "ldm, whole":
                    whole, took = y, seconds
                off = (y - whole).abs().max() / (2 / 255 if half == "decode" else whole.std())
                unit = "/ 255" if half == "decode" else "std"
                print(f"{half + ', ' + name:28}{peak / 1e9:17.2f} GB{seconds:8.0f} s{seconds / took:10.2f}", end="")
                print(f"{off:16.5f} {unit}", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]) if sys.argv[1:] else 2048)
