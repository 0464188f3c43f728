"""The linear preview: exact where the VAE is linear, close to its pictures where it is not, and next to free."""

import time
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import ldm
from ldm.preview import Preview, fit


@pytest.fixture(scope="module")
def pipe():
    return ldm.Pipeline.from_pretrained()


@pytest.fixture(scope="module")
def latents(pipe):
    """Of pictures that the fit has not seen."""
    prompts = ["red heart, twemoji style", "slice of pizza, noto style", "grinning cat, blob style"]
    return pipe(prompts, steps=8, progress=False).latents


def linear(channels):
    """A pipeline whose VAE is a linear map, of which every latent becomes four pixels."""
    weight, bias = torch.randn(3, channels), torch.randn(3)

    def decode(z):
        pixels = torch.einsum("rc,bchw->brhw", weight, z) + bias[:, None, None]
        return pixels.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)

    config = SimpleNamespace(latent_channels=channels)
    return SimpleNamespace(vae=SimpleNamespace(config=config), device="cpu", decode=decode), weight, bias


@pytest.mark.parametrize("channels", [4, 16])
def test_a_linear_vae_is_found(channels):
    pipe, weight, bias = linear(channels)
    for latents in (None, torch.randn(2, channels, 5, 3)):
        found = fit(pipe, latents)
        assert torch.allclose(found.weight, weight, atol=1e-5) and torch.allclose(found.bias, bias, atol=1e-5)


def test_on_paper():
    preview = Preview(torch.tensor([[1.0, 0], [0, 2], [1, 1]]), torch.tensor([0.0, 0, -1]))
    assert preview(torch.tensor([3.0, 5]).view(1, 2, 1, 1)).flatten().tolist() == [3, 10, 7]


def decibels(pipe, preview, latents):
    """PSNR against the decoded pictures, each 4x4 pixels averaged; the range is [-1, 1]."""
    pixels = F.avg_pool2d(pipe.decode(latents), pipe.vae.config.factor)
    error = (preview(latents).clamp(-1, 1) - pixels.clamp(-1, 1)).square().mean()
    return 10 * float(torch.log10(4 / error))


def test_close_to_the_pictures(pipe, latents):
    """Measured: 17.6 dB. What is fitted to white noise, or to these very pictures, is farther and nearer."""
    white = torch.randn(8, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    general, least, best = (decibels(pipe, fit(pipe, to), latents) for to in (None, white, latents))
    assert general > 17 and least + 1 < general < best


def test_the_fit_is_always_the_same(pipe):
    torch.manual_seed(1)
    a = fit(pipe)
    torch.manual_seed(2)
    assert all(map(torch.equal, a, fit(pipe)))


def test_under_a_hundredth_of_a_step(pipe, latents):
    """The best of ten, of one picture: measured at 0.1 %."""
    preview, x = fit(pipe), latents[:1]
    context = pipe.encode_text(["red heart"] * 2).context

    def seconds(work):
        times = []
        for _ in range(10):
            start = time.perf_counter()
            work()
            times.append(time.perf_counter() - start)
        return min(times)

    with torch.no_grad():
        step = seconds(lambda: pipe.unet(torch.cat([x, x]), 500, context))
    assert seconds(lambda: preview(x)) < step / 100
