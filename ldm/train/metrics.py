"""What is measured on pictures besides what they show: fidelity, copies, distance to real pictures, diversity."""

import numpy as np
import torch

from ldm.image import to_images
from ldm.train import data
from ldm.train.judge import batched, cell_features, squared_distances, thumbnails
from ldm.vae import VAE

BATCH = 32


@torch.no_grad()
def through(vae: VAE, images: np.ndarray) -> np.ndarray:
    """(n,64,64,3) uint8 -> the same, encoded (the posterior's mean), decoded and rounded to 8 bits."""
    weight = vae.post_quant_conv.weight
    pictures = []
    for i in range(0, len(images), BATCH):
        out = vae.decode(vae.encode(data.to_tensor(images[i : i + BATCH]).to(weight)).mean)
        pictures += [np.asarray(image) for image in to_images(out)]
    return np.stack(pictures)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Mean over pairs of pictures (n,h,w,3) uint8 of the peak signal-to-noise ratio in dB."""
    mse = ((a.astype(np.float32) - b) ** 2).mean((1, 2, 3))
    return float((10 * np.log10(255**2 / mse)).mean())


def ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Mean over pairs of pictures (n,h,w,3) uint8 of the structural similarity as Wang et al. 2004 define it: windows
    with Gaussian weights of 1.5 pixels, the mean of the three channels. Needs scikit-image (extra `train`)."""
    from skimage.metrics import structural_similarity

    wang = dict(gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=255, channel_axis=2)
    return float(np.mean([structural_similarity(x, y, **wang) for x, y in zip(a, b, strict=True)]))


def copies(pictures: np.ndarray, training: np.ndarray) -> np.ndarray:
    """(n,): the mean squared error, at 16x16 in [0,1], between each picture and the training picture nearest to it."""
    real, small = thumbnails(training), thumbnails(pictures)
    nearest = [squared_distances(small[i : i + 1000], real).min(1) for i in range(0, len(small), 1000)]
    return np.concatenate(nearest) / real.shape[1]


def apart(a: np.ndarray, b: np.ndarray) -> float:
    """Mean over pairs of pictures (n,64,64,3) uint8 of their squared difference at 16x16 in [0,1]."""
    return float(((thumbnails(a) - thumbnails(b)) ** 2).mean())


def kid(a: np.ndarray, b: np.ndarray) -> float:
    """Squared maximum mean discrepancy, unbiased, with the kernel (x.y / d + 1)^3 (Binkowski et al. 2018, KID).

    a, b: pictures (n,64,64,3) uint8. The features are the concept judge's, not Inception's: figures compare to each
    other alone. 0: no difference; it may fall below, by chance.
    """
    x, y = (batched(cell_features, pictures).astype(np.float64) for pictures in (a, b))  # for what cancels out
    scale = np.sqrt((y**2).mean())

    def kernel(p: np.ndarray, q: np.ndarray) -> np.ndarray:
        return (p @ q.T / (scale**2 * p.shape[1]) + 1) ** 3

    def mean_of_others(k: np.ndarray) -> float:
        return (k.sum() - k.trace()) / (len(k) * (len(k) - 1))

    return float(mean_of_others(kernel(x, x)) + mean_of_others(kernel(y, y)) - 2 * kernel(x, y).mean())
