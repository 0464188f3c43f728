"""What is minimised in the training of latent diffusion: how a batch is noised, what the net is to say of it, and what
its error weighs.

    x_t = sqrt(a) z + sqrt(1 - a) noise,    a = alphas_cumprod[t],    snr = a / (1 - a)
    target = noise (epsilon: Ho et al. 2020)  or  sqrt(a) noise - sqrt(1 - a) z (v: Salimans & Ho 2022, appendix D)
    loss = mean over the rows of  weight * mean((net(x_t, t, text) - target)^2)
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ldm.clip import TextEncoder, TextEncoding
from ldm.clip.text_encoder import Layer
from ldm.samplers.denoiser import PREDICTION_TYPES
from ldm.samplers.schedule import Schedule
from ldm.unet import UNet, vector_embedding
from ldm.unet.blocks import ResnetBlock
from ldm.unet.transformer import TransformerBlock


class Draws(NamedTuple):
    """The random numbers of one step, float32; `t` int64. Their order is that of the fields."""

    t: Tensor  # (B,) uniform in 0..999
    sample: Tensor  # (B,4,h,w) which z of the VAE's distribution
    noise: Tensor  # (B,4,h,w)
    offset: Tensor  # (B,4,1,1) of offset noise
    perturbation: Tensor  # (B,4,h,w) of noise on the input
    dropout: Tensor  # (B,) uniform in [0,1): captions


def draw(shape: Sequence[int], generator: torch.Generator) -> Draws:
    """For latents of `shape` (B,4,h,w). All are drawn, wanted or not, so that no option changes the numbers of another.

    The generator is `step_generator(seed, step)`; who needs other numbers of the same step draws them after these.
    """
    count, channels, *_ = shape
    return Draws(
        torch.randint(1000, (count,), generator=generator),
        torch.randn(*shape, generator=generator),
        torch.randn(*shape, generator=generator),
        torch.randn(count, channels, 1, 1, generator=generator),
        torch.randn(*shape, generator=generator),
        torch.rand(count, generator=generator),
    )


def signal(schedule: Schedule, t: Tensor) -> Tensor:
    """a (B,) float64 of timesteps (B,). Where samplers have 2^-24 for the sake of a finite sigma, at the end of a
    schedule of zero terminal SNR, it is 0: the net is shown noise alone (Lin et al. 2023, section 3.1)."""
    a = schedule.alphas_cumprod.to(t.device)[t]
    return torch.where(a > 2**-24, a, 0.0)


def scales(z: Tensor, t: Tensor, schedule: Schedule) -> tuple[Tensor, Tensor]:
    """sqrt(a) and sqrt(1 - a), (B,1,1,1) in the dtype of z."""
    a = signal(schedule, t)[:, None, None, None]
    return a.sqrt().to(z.dtype), (1 - a).sqrt().to(z.dtype)


def noised(z: Tensor, noise: Tensor, t: Tensor, schedule: Schedule) -> Tensor:
    """x_t (B,4,h,w) of latents and noise (B,4,h,w) at timesteps t (B,)."""
    alpha, sigma = scales(z, t, schedule)
    return alpha * z + sigma * noise


def check_target(schedule: Schedule, prediction_type: str) -> None:
    """Raises ValueError for an unknown prediction_type, and for epsilon with zero terminal SNR."""
    if prediction_type not in PREDICTION_TYPES:
        raise ValueError(f"prediction_type={prediction_type!r}: use one of {', '.join(PREDICTION_TYPES)}")
    if prediction_type == "epsilon" and signal(schedule, torch.tensor([999])) == 0:
        raise ValueError(
            "prediction_type='epsilon' with zero terminal SNR: at t = 999 the net would be asked for what it is shown;"
            " use v_prediction, or a schedule without zero_snr"
        )


def target(z: Tensor, noise: Tensor, t: Tensor, schedule: Schedule, prediction_type: str) -> Tensor:
    """What the net is to say of `noised`. Raises ValueError as `check_target`."""
    check_target(schedule, prediction_type)
    if prediction_type == "v_prediction":
        alpha, sigma = scales(z, t, schedule)
        return alpha * noise - sigma * z
    return noise


def min_snr_weight(snr: Tensor, gamma: float, prediction_type: str) -> Tensor:
    """min(snr, gamma) / snr for epsilon, min(snr, gamma) / (snr + 1) for v (B,): Hang et al. 2023, as diffusers.

    For both it is min(snr, gamma) times the squared error of z. That of v vanishes with the snr: at the end of a
    schedule of zero terminal SNR nothing is learnt from the noise alone.
    """
    if prediction_type == "epsilon":
        return (gamma / snr).clamp(max=1)
    return snr.clamp(max=gamma) / (snr + 1)


def prior_weights(of_class: Tensor, prior_weight: float) -> Tensor:
    """(B,) float64 with which a mean over all rows is mean(the subject's) + prior_weight * mean(the class's): Ruiz et
    al. 2023, eq. 2. of_class (B,) is True for pictures of the class; the weights are those of the whole batch."""
    count, others = len(of_class), (~of_class).sum().double()
    return torch.where(of_class, prior_weight * count / (count - others), count / others)


@dataclass(frozen=True)
class Objective:
    """The options of the loss. The defaults are for a few hundred steps on five pictures of a subject: the plain loss
    of the model's own training, from which such a run should not lead away.

    min_snr: gamma of `min_snr_weight` (Hang et al. 2023, who take 5). None: it makes training from scratch faster, and
    does so by looking less at the low noise, where the details are by which a subject is known.
    offset_noise: s in noise + s * randn(B,4,1,1) (Guttenberg 2023, who takes 0.1), for pictures that are dark or bright
    as a whole. 0: it moves the brightness of all that the model draws.
    input_noise: s in x_t = sqrt(a) z + sqrt(1 - a) (noise + s * randn), whose target has the noise alone (Ning et al.
    2023, who take 0.1). 0: it answers to errors that add up over a sampling run, and the model has learnt that.
    prior_weight: of the class's pictures (Ruiz et al. 2023). 1, as in the paper.
    caption_dropout: the share of captions that are replaced by the empty text (Ho & Salimans 2022, who take 0.1 to
    0.2). 0: five pictures would teach the subject to the empty text as well, and guidance, which leads away from it,
    would lead away from the subject.
    """

    min_snr: float | None = None
    offset_noise: float = 0.0
    input_noise: float = 0.0
    prior_weight: float = 1.0
    caption_dropout: float = 0.0

    def __post_init__(self):
        for name in ("offset_noise", "input_noise", "prior_weight"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name}={getattr(self, name)}: give a number of at least 0")
        if self.min_snr is not None and not 0 < self.min_snr < float("inf"):
            raise ValueError(f"min_snr={self.min_snr}: give a number above 0 (usual is 5), or None for the plain loss")
        if not 0 <= self.caption_dropout <= 1:
            raise ValueError(f"caption_dropout={self.caption_dropout}: give a share from 0 to 1")

    def rows(
        self,
        mean: Tensor,
        std: Tensor,
        draws: Draws,
        schedule: Schedule,
        prediction_type: str,
        of_class: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x (B,4,h,w), t (B,), target (B,4,h,w) and weight (B,) of a batch: what `Diffusion` takes first.

        mean, std (B,4,h,w): the VAE's, both times its scaling_factor. of_class: as in `prior_weights`; these and those
        of min_snr multiply (diffusers' DreamBooth has the latter for the subject's pictures alone). float32, or float64
        where `mean` and `draws` are.
        """
        t, z = draws.t, mean + std * draws.sample
        noise = draws.noise + self.offset_noise * draws.offset
        x = noised(z, noise + self.input_noise * draws.perturbation, t, schedule)
        weight = torch.ones(len(z)) if of_class is None else prior_weights(of_class, self.prior_weight)
        if self.min_snr is not None:
            a = signal(schedule, t)
            weight = weight * min_snr_weight(a / (1 - a), self.min_snr, prediction_type)
        return x, t, target(z, noise, t, schedule, prediction_type), weight.to(z.dtype)

    def with_dropout(self, text: Tensor, empty: Tensor, draws: Draws) -> Tensor:
        """Token ids, contexts or pooled vectors (B,...), some of them replaced by `empty` (...), the empty text's."""
        dropped = draws.dropout < self.caption_dropout  # (B,)
        return torch.where(dropped.view(-1, *[1] * empty.ndim), empty, text)


def encode(encoders: Iterable[nn.Module], ids: Sequence[Tensor], clip_skip: int = 1) -> TextEncoding:
    """`ids` (B,N), one for each encoder. context (B,N,width): the encoders' side by side. pooled: the last one's."""
    encodings = [encoder(own, clip_skip) for encoder, own in zip(encoders, ids, strict=True)]
    return TextEncoding(torch.cat([e.context for e in encodings], dim=-1), encodings[-1].pooled)


class Diffusion(nn.Module):
    """The nets that are trained together, and their loss. Which weights are trained is told by their requires_grad.

    text_encoders: none when the texts are encoded beforehand; one; or SDXL's two. Layers after the one that `clip_skip`
    takes are frozen, for no gradient would ever come there, but in the encoder that gives SDXL's pooled vector.
    autocast: the nets run in bfloat16 where that is safe, on weights that stay float32 (Micikevicius et al. 2018).
    checkpointing: a block's activations are computed anew on the way back instead of kept (Chen et al. 2016): the same
    gradients in less memory, for another forward pass. It stays with the nets; without gradients it does nothing.
    """

    def __init__(
        self,
        unet: UNet,
        text_encoders: Iterable[TextEncoder] = (),
        *,
        clip_skip: int = 1,
        autocast: bool = False,
        checkpointing: bool = False,
    ):
        super().__init__()
        self.unet = unet
        encoders = list(text_encoders)
        self.text_encoders = nn.ModuleList(encoders)
        self.clip_skip = clip_skip
        self.autocast = autocast
        for module in unread(unet, encoders, clip_skip):
            module.requires_grad_(False)
        if checkpointing:
            checkpoint_blocks(self)

    def forward(self, x: Tensor, t: Tensor, target: Tensor, weight: Tensor, *condition: Tensor) -> Tensor:
        """The mean loss (): x, target (B,4,h,w) float32, t (B,) int64, weight (B,), from `Objective.rows`.

        condition: ids (B,N) for each of the text encoders, without encoders context (B,N,width), and for SDXL pooled
        (B,projection); then for SDXL the numbers of its size conditioning (B,6), the refiner's (B,5).
        """
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.autocast, cache_enabled=False):
            if count := len(self.text_encoders):
                condition = *encode(self.text_encoders, condition[:count], self.clip_skip), *condition[count:]
            context, *rest = condition
            out = self.unet(x, t, context, vector_embedding(*rest) if len(rest) == 2 else None)
        loss = F.mse_loss(out.to(target.dtype), target, reduction="none").mean(dim=(1, 2, 3))  # (B,)
        return (weight * loss).mean()


def unread(unet: UNet, encoders: Sequence[TextEncoder], clip_skip: int) -> list[nn.Module]:
    """The modules of the text encoders on which neither the context depends nor SDXL's pooled vector."""
    modules: list[nn.Module] = []
    for encoder in encoders:
        if encoder is encoders[-1] and unet.config.vector_width is not None:
            continue  # all of it is read
        c, model = encoder.config, encoder.text_model
        modules += model.encoder.layers[c.layers - c.skip - clip_skip + 1 :]
        modules += [] if c.final_norm else [model.final_layer_norm]
    return modules


def blocks(net: nn.Module) -> list[nn.Module]:
    """The resnet and transformer blocks of a UNet, the layers of a text encoder."""
    return [module for module in net.modules() if isinstance(module, ResnetBlock | TransformerBlock | Layer)]


def checkpoint_blocks(net: nn.Module) -> None:
    """Let each of the `blocks` keep its input alone. They draw no random numbers, whose state would be kept, too."""
    for module in blocks(net):
        again = partial(checkpoint, module.forward, use_reentrant=False, preserve_rng_state=False)
        module.forward = again  # type: ignore[method-assign]
