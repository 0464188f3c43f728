"""Train the default model's UNet and text encoder together, on latents that the VAE has computed once.

`python -m ldm.train diffusion`, after `data` and `vae`; it first gives the text encoder its lesson (ldm/train/text.py).
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ldm.clip import TextConfig, TextEncoder
from ldm.clip.text_encoder import Layer
from ldm.clip.tokenizer import Tokenizer
from ldm.samplers.schedule import Schedule
from ldm.train import captions, data, processes, state
from ldm.train.loop import batch_indices, muon_and_adamw, step_generator, train
from ldm.train.text import train_text
from ldm.unet import UNet, UNetConfig
from ldm.unet.blocks import ResnetBlock
from ldm.unet.transformer import SpatialTransformer
from ldm.vae import VAE

UNET = UNetConfig(channels=(96, 128, 192), layers=1, depth=(0, 1, 1), heads=4, context_width=256)
TEXT = TextConfig(
    vocab_size=captions.VOCABULARY,
    length=captions.LENGTH,
    width=256,
    layers=4,
    heads=4,
    end_token=captions.VOCABULARY - 1,
)


@torch.no_grad()
def compute_latents(vae: VAE, file: Path, seed: int = 0) -> dict:
    """Every training picture once on white and once on a colour of its own: mean and std (2n,4,16,16) float16.

    Also `scaling_factor`, 1 / the standard deviation of the samples, and the `colours` of the second half.
    """
    rgba, meta = data.load(file)
    rgba = rgba[[m["split"] == "train" for m in meta]]
    names = [name for name in data.BACKGROUNDS if name != "white"]
    colours = [names[i] for i in torch.randint(len(names), (len(rgba),), generator=step_generator(seed, 0))]
    means, stds = [], []
    for ground in (["white"] * len(rgba), colours):
        for i in range(0, len(rgba), 64):
            rows = [data.composite(rgba[j], data.BACKGROUNDS[ground[j]]) for j in range(i, min(i + 64, len(rgba)))]
            with torch.autocast("cpu", torch.bfloat16):
                mean, std = vae.encode(data.to_tensor(rows))
            means.append(mean.half())
            stds.append(std.half())
    mean, std = torch.cat(means), torch.cat(stds)
    white = mean[: len(rgba)].float()
    spread = (white.var() + std[: len(rgba)].float().square().mean()).sqrt()
    return dict(mean=mean, std=std, colours=colours, scaling_factor=round(1 / spread.item(), 5))


def save_whole(path: Path, content: dict) -> None:
    """All or nothing: written beside `path`, then renamed."""
    temporary = path.with_suffix(".part")
    torch.save(content, temporary)
    temporary.replace(path)


class Nets(nn.Module):
    """What is trained together."""

    def __init__(self, unet: UNetConfig = UNET, text: TextConfig = TEXT):
        super().__init__()
        self.unet = UNet(unet)
        self.text_encoder = TextEncoder(text)

    def forward(self, x: Tensor, t: Tensor, ids: Tensor, v: Tensor, weight: Tensor) -> Tensor:
        """The mean of each picture's squared error of v, times its weight (B,)."""
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            out = self.unet(x, t, self.text_encoder(ids).context)
        loss = F.mse_loss(out.float(), v, reduction="none").mean(dim=(1, 2, 3))
        return (weight * loss).mean()


def initialise(nets: Nets) -> None:
    """The UNet's residual branches and its output start at zero (Dhariwal & Nichol 2021), the text encoder's branches
    small beside its embeddings: else the tokens of a prompt drown in their common mean, and all say the same."""
    for module in nets.unet.modules():
        if isinstance(module, ResnetBlock):
            nn.init.zeros_(module.conv2.weight)
        if isinstance(module, SpatialTransformer):
            nn.init.zeros_(module.proj_out.weight)
    nn.init.zeros_(nets.unet.conv_out.weight)
    text = nets.text_encoder.text_model
    nn.init.normal_(text.embeddings.token_embedding.weight, std=0.5)
    nn.init.normal_(text.embeddings.position_embedding.weight, std=0.1)
    with torch.no_grad():
        for module in text.modules():
            if isinstance(module, Layer):
                module.self_attn.out_proj.weight /= (2 * len(text.encoder.layers)) ** 0.5
                module.mlp.fc2.weight /= (2 * len(text.encoder.layers)) ** 0.5


WORDS_FIRST = 2500  # steps
DETAILS_FROM = 9000


def draw_t(count: int, step: int, generator: torch.Generator) -> Tensor:
    """(count,) timesteps 0..999. First the later the likelier, in proportion: the words decide at high noise what is
    drawn. Then one half of them, and the others all alike. In the end three quarters as the square of a uniform number,
    half of them below 250: there it is decided whether an area is flat, an edge sharp."""
    u, v = torch.rand(count, generator=generator), torch.rand(count, generator=generator)
    if step < WORDS_FIRST:
        share = u.sqrt()
    elif step < DETAILS_FROM:
        share = torch.where(v < 0.5, u.sqrt(), u)
    else:
        share = torch.where(v < 0.25, u.sqrt(), u**2)
    return (1000 * share).long().clamp(max=999)


def loss_weight(alphas: Tensor, gamma: float) -> Tensor:
    """min(SNR + 1, gamma) / (SNR + 1), SNR = a / (1 - a): the weight of the squared error of v.

    The plain loss of v (Salimans & Ho 2022) weighs an error of x0 by SNR + 1; here that is cut off at gamma, as Hang et
    al. 2023 do with SNR. At high noise, where it is decided what is drawn, the plain loss stays as it is.
    """
    return (gamma * (1 - alphas)).clamp(max=1)


def vocabulary(folder: Path) -> Tokenizer:
    """The tokenizer that `train_diffusion` has made there."""
    words = folder / "tokenizer"
    return Tokenizer.from_files(words / "vocab.json", words / "merges.txt", length=captions.LENGTH)


def draw_batch(
    meta: list[dict], latents: dict, batch: int, seed: int, step: int
) -> tuple[Tensor, list[str], Tensor, Tensor]:
    """Step `step`'s scaled latents z (B,4,16,16), their texts, the noise and the timesteps."""
    generator = step_generator(seed, step)
    rows = batch_indices(len(meta), batch, seed, step)
    coloured = torch.rand(batch, generator=generator) < 0.12
    texts = []
    for row, ground in zip(rows.tolist(), coloured.tolist(), strict=True):
        text = captions.draw_caption(meta[row], generator)
        texts.append(captions.on_background(text, latents["colours"][row] if ground else "white"))
    rows = rows + len(meta) * coloured
    mean, std = latents["mean"][rows].float(), latents["std"][rows].float()
    z = latents["scaling_factor"] * (mean + std * torch.randn(mean.shape, generator=generator))  # (B,4,16,16)
    noise = torch.randn(z.shape, generator=generator)
    return z, texts, noise, draw_t(batch, step, generator)


def train_diffusion(
    file: Path, vae: VAE, folder: Path, *, steps: int = 16_000, batch: int = 64, lr: float = 2e-3, seed: int = 0
) -> Nets:
    """v prediction (Salimans & Ho 2022), light on the low noise. Returns the EMA `unet` and `text_encoder`.

    `folder` receives the tokenizer, the latents (both are kept from an earlier start) and the state of the loop.
    """
    meta = [m for m in data.load(file)[1] if m["split"] == "train"]
    with processes.first():
        if not (folder / "tokenizer").exists():
            captions.train_vocabulary(meta, folder / "tokenizer")
        if not (folder / "latents.pt").exists():
            save_whole(folder / "latents.pt", compute_latents(vae, file))
    tokenizer = vocabulary(folder)
    latents = torch.load(folder / "latents.pt", weights_only=True)
    alphas = Schedule().alphas_cumprod.float()

    torch.manual_seed(seed)
    nets = Nets()
    initialise(nets)
    if not state.paths(folder):
        white = latents["scaling_factor"] * latents["mean"][: len(meta)].float()
        train_text(nets.text_encoder, tokenizer, meta, white, folder / "text")

    def batch_of(step: int) -> tuple[Tensor, ...]:
        z, texts, noise, t = draw_batch(meta, latents, batch, seed, step)
        a = alphas[t][:, None, None, None]
        x, v = a.sqrt() * z + (1 - a).sqrt() * noise, a.sqrt() * noise - (1 - a).sqrt() * z
        return x, t, tokenizer(texts), v, loss_weight(alphas[t], 5.0 if step < DETAILS_FROM else 20.0)

    # For so few pixels and tokens the plain product is faster than flash attention, whose backward pass is slow.
    with sdpa_kernel(SDPBackend.MATH):
        return train(
            nets, batch_of, muon_and_adamw(nets, lr), folder, steps=steps, settings=dict(batch=batch, seed=seed)
        )
