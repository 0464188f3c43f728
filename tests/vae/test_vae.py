"""The VAE against diffusers' AutoencoderKL on tiny random nets, and every number that ports get wrong."""

from functools import cache

import pytest
import torch
from parity import (
    QUIET,
    TOLERANCE,
    Reference,
    assert_equal,
    diffusers_vae,
    randomise,
    rewrite,
    twin,
    vae_differences,
    vae_reference,
)
from torch import Tensor

from ldm import convolutions, vae
from ldm.vae import Gaussian, VAEConfig, blocks
from ldm.vae import vae as vae_module

CONFIGS = {
    "4 levels": VAEConfig(channels=(16, 32, 32, 64), groups=8),
    "3 levels": VAEConfig(channels=(32, 64, 96), layers=1),
    "8 latent channels": VAEConfig(channels=(24, 48), latent_channels=8, groups=12),
}
MODULES = {"4 levels": 168, "3 levels": 107, "8 latent channels": 104}
RESULTS = ("mean", "std", "log std", "image")


@cache
def case(name: str, size: tuple[int, int], gain: float = 1.0) -> tuple[Reference, Tensor, Tensor]:
    """Latents of `size`, images of as many times more pixels as the config's factor says."""
    c = CONFIGS[name]
    torch.manual_seed(1)
    image = torch.rand(2, 3, *(c.factor * n for n in size)) * 2 - 1
    z = torch.randn(2, c.latent_channels, *size)
    net = randomise(diffusers_vae(c), gain)
    # log variances on both sides of either bound of the clamp, -30 and 20
    net.quant_conv.bias.data[c.latent_channels :] += torch.linspace(-60, 60, c.latent_channels)
    return vae_reference(net, image, z), image, z


def check(name: str, size: tuple[int, int] = (4, 5), gain: float = 1.0) -> dict[str, float]:
    return vae_differences(vae.VAE, CONFIGS[name], *case(name, size, gain))


@pytest.mark.parametrize("gain", [1.0, QUIET])
@pytest.mark.parametrize("size", [(4, 5), (8, 8), (3, 7)])
@pytest.mark.parametrize("name", CONFIGS)
def test_every_module_equals_diffusers(name, size, gain):
    assert_equal(check(name, size, gain), MODULES[name] + len(RESULTS))


def test_a_sample_equals_diffusers():
    c = CONFIGS["3 levels"]
    reference = randomise(diffusers_vae(c))
    net = twin(vae.VAE, c, reference)
    image = torch.rand(2, 3, 16, 20) * 2 - 1
    noise = torch.randn(2, 4, 4, 5, generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        ours = net.encode(image).sample(noise)
        theirs = reference.encode(image).latent_dist.sample(torch.Generator().manual_seed(7))
    assert (ours - theirs).abs().max() <= TOLERANCE * theirs.abs().max()


def test_a_sample_is_mean_plus_std_times_noise():
    assert Gaussian(torch.tensor(3.0), torch.tensor(2.0)).sample(torch.tensor(-0.5)) == 2.0


def eps(norm: str, before: str = "") -> dict[str, str]:
    return {f"{norm}, eps=1e-6){before}": f"{norm}, eps=1e-5){before}"}


TRAPS = {
    "eps of a resnet's norm1": (blocks, eps("GroupNorm(groups, inp")),
    "eps of a resnet's norm2": (blocks, eps("GroupNorm(groups, out")),
    "eps of the attention's norm": (blocks, eps("GroupNorm(groups, channels")),
    "eps of the encoder's conv_norm_out": (
        vae_module,
        eps("ch[-1]", "\n        self.conv_out = Conv2d(ch[-1], 2 *"),
    ),
    "eps of the decoder's conv_norm_out": (vae_module, eps("ch[-1]", "\n        self.conv_out = Conv2d(ch[-1], 3,")),
    "downsampling pads on all sides": (blocks, {"(0, 1, 0, 1)": "(1, 1, 1, 1)"}),
    "downsampling pads on the left and at the top": (blocks, {"(0, 1, 0, 1)": "(1, 0, 1, 0)"}),
    "lower bound of the log variance": (vae_module, {"clamp(-30.0, 20.0)": "clamp(-31.0, 20.0)"}),
    "upper bound of the log variance": (vae_module, {"clamp(-30.0, 20.0)": "clamp(-30.0, 21.0)"}),
    "variance for standard deviation": (vae_module, {"(0.5 * logvar": "(1.0 * logvar"}),
    "log variance before the mean": (vae_module, {"mean, logvar = self": "logvar, mean = self"}),
    "upsampling by interpolation": (convolutions, {'mode="nearest"': 'mode="bilinear"'}),
}


@pytest.mark.parametrize("trap", TRAPS)
def test_parity_is_lost_when_a_number_is_changed(trap, monkeypatch):
    module, edits = TRAPS[trap]
    rewrite(monkeypatch, module, edits)
    assert any(max(check("4 levels", gain=gain).values()) > TOLERANCE for gain in (1.0, QUIET))


@pytest.mark.parametrize("name", ["to_q", "to_k", "to_v", "to_out"])
def test_attention_has_every_bias(name, monkeypatch):
    linear = "Linear(channels, channels)"
    old = f"self.{name} = nn.Sequential({linear})" if name == "to_out" else f"self.{name} = {linear}"
    rewrite(monkeypatch, blocks, {old: old.replace("channels)", "channels, bias=False)")})
    with pytest.raises(RuntimeError, match=f"{name}.*bias"):
        check("3 levels")
