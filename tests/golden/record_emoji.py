"""Record the default model's reference outputs with diffusers: `python tests/golden/record_emoji.py`, some ten seconds.

The group emoji-64 in ldm/verify.json is replaced, the others stay. Run it when the weights have changed: the difference
that git shows is then the new numbers, and nothing else. Nothing of ldm takes part in what is recorded. Single nets run
in float64, so that the record has no machine's rounding in it.
"""

import json
from pathlib import Path

import diffusers
import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).parent.parent.parent
REFERENCES = ROOT / "ldm" / "verify.json"
WEIGHTS = ROOT / "weights" / "emoji-64"

X, CONTEXT = {"seed": 1, "shape": [1, 4, 16, 16]}, {"seed": 2, "shape": [1, 32, 256]}
PIXELS, PICTURE = {"seed": 3, "shape": [1, 3, 64, 64]}, {"seed": 4, "shape": [64, 64, 3]}
LATENTS, IMAGE = [0, [0, 4], [4, 13, 4], 8], [0, [0, 3], [16, 49, 16], 32]  # every channel, three places in it
NETS, RUNS = {"tolerance": 1e-4}, {"kind": "generate", "at": IMAGE, "tolerance": 1e-4}
HEART = {"prompt": "red heart, noto style", "steps": 5, "guidance_scale": 7.5, "seed": 0}
DDIM = {"sampler": "DDIMScheduler", "settings": {**HEART, "sigmas": "leading"}}
EULER = {"sampler": "EulerDiscreteScheduler", "settings": {**HEART, "sigmas": "linspace"}}
FROM_PICTURE = {**DDIM, "settings": {**DDIM["settings"], "strength": 0.6}, "image": PICTURE}
ROWS = [
    {"case": "text encoder", "kind": "text", "prompt": HEART["prompt"], "at": [0, [1, 4], [-3, None]], **NETS},
    {"case": "UNet, t = 20", "kind": "unet", "t": 20, "x": X, "context": CONTEXT, "at": LATENTS, **NETS},
    {"case": "UNet, t = 999", "kind": "unet", "t": 999, "x": X, "context": CONTEXT, "at": LATENTS, **NETS},
    {"case": "VAE, decoder", "kind": "decode", "z": X, "at": IMAGE, **NETS},
    {"case": "VAE, encoder", "kind": "encode", "pixels": PIXELS, "batch": 1, "seed": 0, "at": LATENTS, **NETS},
    {"case": "VAE, there and back", "kind": "autoencode", "pixels": PIXELS, "at": IMAGE, **NETS},
    {"case": "text to image, 5 steps", **DDIM, **RUNS},
    {"case": "text to image, 5 steps", "noise": X, **EULER, **RUNS},
    {"case": "image to image, 3 of 5 steps", **FROM_PICTURE, **RUNS},
]


def array(given, folder):
    """(B,...) float32, of a file in `folder` or as it is to be drawn."""
    if isinstance(given, str):
        values = np.load(folder / Path(given).name)
    else:
        values = np.random.RandomState(given["seed"]).standard_normal(given["shape"])
    return torch.from_numpy(values.astype(np.float32))


def picture(given, folder):
    """(1,3,h,w) in [0,1]. Of a PIL image diffusers makes a channels-last view, whose norms are less exact."""
    if isinstance(given, str):
        pixels = np.array(Image.open(folder / Path(given).name).convert("RGB"))
    else:
        pixels = np.random.RandomState(given["seed"]).randint(0, 256, given["shape"], np.uint8)
    return torch.from_numpy(pixels).permute(2, 0, 1)[None].contiguous() / 255


def generate(pipe, row, folder):
    s = dict(row["settings"])
    scheduler = getattr(diffusers, row["sampler"])
    components = pipe.components | {
        "scheduler": scheduler.from_config(pipe.scheduler.config, timestep_spacing=s["sigmas"])
    }
    arguments = {name: s[name] for name in ("prompt", "guidance_scale", "width", "height", "strength") if name in s}
    arguments |= {"num_inference_steps": s["steps"], "generator": torch.Generator().manual_seed(s["seed"])}
    kind = type(pipe).__name__.removesuffix("Pipeline")
    if "image" in row:
        arguments["image"] = picture(row["image"], folder)
        kind = kind.removesuffix("Inpaint") + "Img2Img"
    if "mask" in row:
        arguments["mask_image"] = picture(row["mask"], folder)[:, :1]
        kind = kind.replace("Img2Img", "Inpaint")
    if "noise" in row:
        arguments["latents"] = array(row["noise"], folder)
    options = {} if "XL" in kind else {"requires_safety_checker": False}
    run = getattr(diffusers, f"{kind}Pipeline")(**components, **options)
    run.set_progress_bar_config(disable=True)
    return run(**arguments, output_type="pt").images


@torch.no_grad()
def expected(pipe, row, folder=None):
    """What diffusers' pipeline gives in a row, as a list of numbers."""
    match row["kind"]:
        case "text":
            ids = pipe.tokenizer(row["prompt"], padding="max_length", truncation=True, return_tensors="pt").input_ids
            output = pipe.text_encoder(ids).last_hidden_state
        case "unet":
            x, context = (array(row[name], folder).to(pipe.dtype) for name in ("x", "context"))
            output = pipe.unet(x, torch.tensor([row["t"]]), context).sample
        case "decode":
            output = pipe.vae.decode(array(row["z"], folder).to(pipe.dtype)).sample
        case "encode":
            gaussian = pipe.vae.encode(array(row["pixels"], folder).to(pipe.dtype)).latent_dist
            # As `sample` does, which draws other numbers in float64.
            output = gaussian.mean + gaussian.std * torch.randn(
                gaussian.mean.shape, generator=torch.Generator().manual_seed(row["seed"])
            )
        case "autoencode":
            output = pipe.vae(array(row["pixels"], folder).to(pipe.dtype)).sample
        case "generate":
            output = generate(pipe, row, folder)
    index = tuple(slice(*i) if isinstance(i, list) else i for i in row["at"])
    return [float(f"{value:.6g}") for value in output[index].flatten().tolist()]


def emoji():
    single, double = (
        diffusers.StableDiffusionPipeline.from_pretrained(WEIGHTS, dtype=dtype, local_files_only=True)
        for dtype in (torch.float32, torch.float64)
    )
    return [{**row, "expected": expected(single if row["kind"] == "generate" else double, row)} for row in ROWS]


def dumps(references):
    """JSON with a row a line, so that what has changed can be read."""
    rows = [row for group in references["groups"] for row in group["rows"]]
    marked = [{**group, "rows": [f"row {id(row)}" for row in group["rows"]]} for group in references["groups"]]
    text = json.dumps({**references, "groups": marked}, indent=1)
    for row in rows:
        text = text.replace(f'"row {id(row)}"', json.dumps(row))
    return text + "\n"


if __name__ == "__main__":
    references = json.loads(REFERENCES.read_text("utf-8"))
    group = next(group for group in references["groups"] if group["weights"] == "emoji-64")
    group["rows"] = emoji()
    REFERENCES.write_text(dumps(references), "utf-8")
