"""Where a picture enters the loop: the start that a strength stands for, and the part that a mask keeps."""

from torch import Tensor

from ldm.samplers.denoiser import Denoiser, Prediction


def steps_at(strength: float, steps: int) -> int:
    """How many of `steps` steps, counted from the end, run: floor(steps * strength), at least 1, and 0 at strength 0.

    diffusers' count, without its slips of floating point: int(100 * 0.29) is 28.
    """
    if strength == 0:
        return 0
    return max(1, int(steps * strength + 1e-6))


def keep_outside(denoise: Denoiser, latents: Tensor, mask: Tensor) -> Denoiser:
    """A denoiser that already knows x0 where the mask is 0: inpainting with any model.

    latents (B,4,h,w): the picture to keep. mask (1,1,h,w): 1 to repaint, 0 to keep, in between to blend. A run that
    starts at latents + sigma * noise then keeps the outside at latents + sigma * noise for every sigma, to the end.
    """

    def denoise_inside(x: Tensor, sigma: Tensor) -> Prediction:
        prediction = denoise(x, sigma)
        x0 = mask * prediction.x0 + (1 - mask) * latents
        return prediction._replace(x0=x0, eps=(x - x0) / sigma)

    return denoise_inside
