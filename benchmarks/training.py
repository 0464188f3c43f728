"""How much memory the training of SD 1.5's UNet takes at 512x512, and how long a step, beside diffusers and PEFT.

python -m benchmarks.training         # 16 GB of memory, 14 of disk in the temporary directory, some ten minutes
python -m benchmarks.training lora    # 7 GB of memory, 4 of disk, four minutes

Random weights, one picture's latents, batch 1, gradient checkpointing (and ours without it, "keeping all" activations),
the same AdamW, two threads, each case in a process of its own. LoRA of rank 4 on the attention, in float32; the whole
UNet in bfloat16 autocast, its weights, gradients and AdamW's moments in float32. Two steps: the first one allocates the
optimiser's state, the second one's time is shown. Peaks are of the whole process, and above what is in use when the
weights are loaded. Ours are taken twice: after the steps, and after the state has been saved. All losses of the first
step of a kind must be the same.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from safetensors.torch import save_file

from ldm.models import SD1
from ldm.unet import UNet
from tests.parity import randomise

MEASURE = """
import json, sys, time
from pathlib import Path
import torch
from safetensors.torch import load_file
from torch.optim import AdamW
from ldm.models import SD1
from ldm.samplers.schedule import Schedule
from ldm.train.loop import step_generator
from ldm.train.objective import Objective, draw
{imports}

def memory(kind):  # of this process, in bytes
    return 1024 * int(Path("/proc/self/status").read_text().split(kind)[1].split()[0])

def batch_of(step):
    generator = step_generator(0, step)
    mean, std = torch.randn(1, 4, 64, 64, generator=generator), torch.zeros(1, 4, 64, 64)
    rows = Objective().rows(mean, std, draw(mean.shape, generator), schedule, "epsilon")
    return *rows, torch.randn(1, 77, 768, generator=generator)

torch.set_num_threads(2)
schedule = Schedule.from_config(SD1.scheduler)
with torch.device("meta"):
    unet = {unet}
unet.load_state_dict(load_file(sys.argv[1]), assign=True)
for p in unet.parameters():
    p.sum()  # a memory-mapped weight is read when it is used
weights, losses, times = memory("VmRSS:"), [], []
{prepare}
trained = [p for p in parameters if p.requires_grad]
optimizer = AdamW(trained, 1e-4 if {lora} else 2e-6, weight_decay=0.01, fused=True)
{run}
print(json.dumps(dict(
    loss=losses[0], seconds=times[1] - times[0], weights=weights, steps=steps, saved=memory("VmHWM:"),
    trained=sum(p.numel() for p in trained),
)))
"""
OURS = {
    "imports": "from ldm.train.adapters import add_lora\nfrom ldm.train.loop import train\n"
    "from ldm.train.objective import Diffusion\nfrom ldm.unet import UNet",
    "unet": "UNet(SD1.unet)",
    "prepare": """
beside = add_lora(unet, 4) if {lora} else torch.nn.Module()
objective = Diffusion(unet, autocast=not {lora}, checkpointing={checkpointing})
objective.beside = beside
parameters = objective.parameters()
""",
    "run": """
def on_step(step, line):
    global steps
    times.append(time.perf_counter())
    losses.append(line["loss"])
    steps = memory("VmHWM:")

train(objective, batch_of, [optimizer], Path(sys.argv[2]), steps=2, schedule="constant", warmup=0, workers=1,
      ema_decay=None, save_minutes=float("inf"), on_step=on_step)
""",
}
THEIRS = {
    "imports": "from peft import LoraConfig\nfrom tests.parity import diffusers_unet",
    "unet": "diffusers_unet(SD1.unet)",
    "prepare": """
unet.train().enable_gradient_checkpointing()
if {lora}:
    unet.requires_grad_(False)
    unet.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
parameters = unet.parameters()
""",
    "run": """
for step in range(2):
    x, t, target, weight, context = batch_of(step)
    optimizer.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=not {lora}):
        out = unet(x, t, context).sample
    loss = torch.nn.functional.mse_loss(out.float(), target)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(trained, 1.0)
    optimizer.step()
    times.append(time.perf_counter())
    losses.append(loss.item())
steps = memory("VmHWM:")
""",
}
CASES = {"ldm": (OURS, True), "diffusers": (THEIRS, True), "ldm, keeping all": (OURS, False)}


def measure(parts: dict[str, str], lora: bool, checkpointing: bool, weights: Path) -> dict[str, float]:
    parts = {name: part.format(lora=lora, checkpointing=checkpointing) for name, part in parts.items()}
    code = MEASURE.format(lora=lora, **parts)
    with tempfile.TemporaryDirectory(dir=weights.parent) as states:
        run = subprocess.run([sys.executable, "-c", code, weights, states], stdout=subprocess.PIPE, check=True)
    return json.loads(run.stdout)


def main(kinds: list[str]) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        weights = Path(temporary) / "unet.safetensors"
        save_file(randomise(UNet(SD1.unet)).state_dict(), weights)
        size = weights.stat().st_size
        print(f"UNet of SD 1.5, float32, {size / 1e9:.2f} GB, latents of 64x64, batch 1, two threads")
        print(f"{'':24}{'trained':>10}{'peak':>11}{'above weights':>16}{'state saved':>14}{'step':>9}{'loss':>10}")
        for kind in kinds:
            for name, (parts, checkpointing) in CASES.items():
                m = measure(parts, kind == "lora", checkpointing, weights)
                peak, above, saved = (b / 1e9 for b in (m["steps"], m["steps"] - m["weights"], m["saved"]))
                print(f"{kind + ', ' + name:24}{m['trained'] / 1e6:8.1f} M{peak:8.2f} GB{above:13.2f} GB", end="")
                print(f"{saved:11.2f} GB{m['seconds']:7.1f} s{m['loss']:10.5f}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:] or ["lora", "full"])
