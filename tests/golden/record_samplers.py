"""Record every step of k-diffusion's samplers on a closed form: `python tests/golden/record_samplers.py`, two seconds.

x (1,4,2,2) float64 at each of its own Karras sigmas, for data from the mixture of tests/samplers/reference.py;
nothing of ldm takes part. The versions are in the file's metadata.
"""

import inspect
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parent.parent))
from samplers.reference import TABLE, float64, k_sampling, mixture

FILE = Path(__file__).with_name("k_diffusion.safetensors")
NAMES = ["euler", "euler_ancestral", "heun", "dpm_2", "dpm_2_ancestral", "lms", "dpmpp_2s_ancestral", "dpmpp_sde"]
NAMES += ["dpmpp_2m", "dpmpp_2m_sde", "dpmpp_3m_sde"]
BREAK_AT_1_STEP = ["dpmpp_2m_sde", "dpmpp_3m_sde"]


def draws(seed: int = 1):
    generator = torch.Generator().manual_seed(seed)
    return lambda *_: torch.randn(1, 4, 2, 2, generator=generator, dtype=torch.float64)


def steps_of(name: str, sigmas: torch.Tensor) -> torch.Tensor:
    """x at each of the sigmas (n+1,1,4,2,2)."""
    function, noise, xs = getattr(k_sampling, f"sample_{name}"), draws(), []
    x = noise() * sigmas[0]
    options = {"noise_sampler": noise} if "noise_sampler" in inspect.signature(function).parameters else {}
    last = function(
        lambda x, sigma: mixture(x, sigma[0]), x, sigmas, callback=lambda s: xs.append(s["x"]), disable=True, **options
    )
    return torch.stack([*xs, last])


if __name__ == "__main__":
    recorded = {}
    for steps in (1, 2, 3, 10, 25, 50):
        with float64():
            sigmas = k_sampling.get_sigmas_karras(steps, TABLE[0], TABLE[-1])
        recorded[f"sigmas/{steps}"] = sigmas
        for name in NAMES:
            if steps > 1 or name not in BREAK_AT_1_STEP:
                recorded[f"{name}/{steps}"] = steps_of(name, sigmas)
    versions = {package: version(package) for package in ("k-diffusion", "torch", "torchsde", "torchdiffeq")}
    save_file(recorded, FILE, metadata=versions)
    print(f"{len(recorded)} tensors in {FILE.name}, {FILE.stat().st_size:,} bytes: {versions}")
