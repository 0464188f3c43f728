"""Whether int8 weights pay: PyTorch's own dynamic quantisation of the linear layers of SD 1.5's UNet.

    python -m benchmarks.int8          some minutes, 8 GB

diffusers' UNet with random weights, batch 2, 512x512: as it is in float32 and bfloat16, and with its linear layers in
int8 (weights by channel, activations as they come). Medians of three rounds, taking turns, and how far each is from
float32 in the root of the mean square. Its convolutions stay in float32: dynamic quantisation has none for them.
"""

import copy
import time
from statistics import median

import torch
from diffusers import UNet2DConditionModel
from torch import nn
from torch.ao.quantization import quantize_dynamic

ROUNDS = 3


@torch.no_grad()
def main() -> None:
    torch.manual_seed(0)
    exact = UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8).eval()
    nets = {
        "float32": exact,
        "int8": quantize_dynamic(copy.deepcopy(exact), {nn.Linear}, torch.qint8),
        "bfloat16": copy.deepcopy(exact).to(torch.bfloat16),
    }
    x, context = torch.randn(2, 4, 64, 64), torch.randn(2, 77, 768)
    seconds: dict[str, list[float]] = {name: [] for name in nets}
    results = {}
    for _ in range(1 + ROUNDS):  # the first warms up
        for name, net in nets.items():
            dtype = torch.bfloat16 if name == "bfloat16" else torch.float32
            start = time.perf_counter()
            results[name] = net(x.to(dtype), 481, context.to(dtype)).sample.float()
            seconds[name].append(time.perf_counter() - start)
    reference = results["float32"]
    print("| linear layers | an evaluation | float32 / this | off |\n|---|---|---|---|")
    for name, taken in seconds.items():
        own, plain = median(taken[1:]), median(seconds["float32"][1:])
        off = float((results[name] - reference).square().mean().sqrt() / reference.square().mean().sqrt())
        print(f"| {name} | {own:.2f} s | {plain / own:.2f} | {off:.1e} |")


if __name__ == "__main__":
    main()
