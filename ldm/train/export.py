"""Write trained nets as a diffusers folder: fp16 safetensors, configs, tokenizer and scheduler files."""

from pathlib import Path

import torch

from ldm.clip import TextEncoder
from ldm.models import SCHEDULER, Model
from ldm.save import folder_texts, write_folder
from ldm.unet import UNet
from ldm.vae import VAE


def export(unet: UNet, vae: VAE, text_encoder: TextEncoder, tokenizer: Path, folder: Path, size: int = 64) -> None:
    """The whole model at once, in the place of the one that `folder` holds, or nothing.

    `tokenizer`: a folder of vocab.json, merges.txt, tokenizer_config.json. `size`: side of a picture in pixels.
    Raises FileExistsError for a folder of anything but a model: it would be lost.
    """
    if folder.exists() and any(folder.iterdir()) and not (folder / "model_index.json").exists():
        raise FileExistsError(f"{folder} is in the way: it has files and no model_index.json; name another folder")
    scheduler = SCHEDULER | {"prediction_type": "v_prediction"}
    model = Model(unet.config, vae.config, text_encoder.config, scheduler, size)
    nets = {"unet": unet, "vae": vae, "text_encoder": text_encoder}
    tensors = {
        part: {name: value.detach().to(torch.float16).contiguous() for name, value in net.state_dict().items()}
        for part, net in nets.items()
    }
    texts = folder_texts(model, {})
    texts |= {f"tokenizer/{file.name}": file.read_text(encoding="utf-8") for file in tokenizer.iterdir()}
    write_folder(folder, tensors, texts)
