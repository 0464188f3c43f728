"""Makes docs/samplers.md and its plots:  .venv/bin/python docs/samplers.py  (about a minute and a half on one core)."""

from collections.abc import Callable, Collection
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from ldm.proof import MIXTURE, order, sliced_wasserstein
from ldm.proof.__main__ import BUDGETS, ROWS, end, table
from ldm.samplers import SAMPLERS

PAGE = Path(__file__).with_suffix(".md")
PICTURES = Path(__file__).with_suffix("")
COUNTS = (5, 10, 20, 40, 80, 160, 320)
PANELS = {
    "deterministic, one step": ["euler", "heun", "dpm_2", "dpm_adaptive"],
    "deterministic, multistep": ["lms", "plms", "dpmpp_2m", "unipc", "deis"],
    "with fresh noise, one step": ["euler_ancestral", "dpm_2_ancestral", "dpmpp_2s_ancestral", "dpmpp_sde", "restart"],
    "with fresh noise, multistep and jumps": ["dpmpp_2m_sde", "dpmpp_3m_sde", "lcm", "tcd"],
}
# Okabe and Ito's colours, apart for every kind of colour blindness, and a mark for each besides.
STYLES = [("#0072B2", "o"), ("#D55E00", "s"), ("#009E73", "^"), ("#000000", "D"), ("#CC79A7", "v")]

TEXT = """# Samplers, measured where the answer is known

Made by `.venv/bin/python docs/samplers.py`; `python -m ldm.proof` prints the table alone (a minute on one core).

Where the data is a mixture of Gaussians, the perfect denoiser E[x0 | x] has a closed form, so that what is left is the
sampler's own error. Here the data is in the plane: `GAUSSIAN`, one tilted Gaussian, and `MIXTURE`, three of them.

{table}

## How to read it

**order** is what the paper or the method's name promises; **measured** the slope of log error against log evaluations,
over 40, 80, 160 and 320 steps, in equal parts of log sigma from 3 to 0.3. There the data takes shape, and errors soon
shrink at the rate that holds in the end. The sigmas stop above 0, since the step to 0 never gets smaller. **in use** is
the same slope over karras sigmas from 14.6 to 0.029, Stable Diffusion's range: what a first or last step does wrong
hardly shows there yet, so that lms and unipc look better than they are in the end. **why** says what an order that is
not reached is due to; figures in it are measured with the table, the rest by `tests/test_proof.py`.

- Without noise: the largest error of x, over 64 points, on the mixture, against 10,000 steps of the classical
  Runge-Kutta method, which on the single Gaussian agrees with the exact flow to 1e-13.
- With fresh noise, *weak*: the error of mean and covariance on the single Gaussian, against their exact values. There a
  sampler is affine in its start and in each draw, so that one run with unit vectors in their places gives both without
  random numbers; draws along one Brownian path are correlated as their intervals overlap. The denoiser being linear
  there, this is necessary for a weak order on other data and does not prove it; nor does it say anything of paths.

**evaluations** are those used, counted where the denoiser is called, in the largest number of steps that needs at most
5, 10, 20, 50; **mean** (in standard deviations of the data), **covariance** (relative, Frobenius norm) and **sliced
W2** (root mean square of the W2 distances along 128 directions) belong to these four, on the mixture, with 20,000
points, karras sigmas that end with the step to 0 for all, and a start from data with noise of 14.6. (In use one starts
from noise alone, an error of the start, not of the sampler.) The last row is 20,000 other points of the data: below
such figures all are alike. "-" is a tolerance that dpm_adaptive cannot meet with so few.

Few evaluations and many are different contests: with 5 most methods of one evaluation a step are ahead of those of two,
which have only three steps for the whole way, and order says little until there are some 20. The data has no detail as
fine as that of pictures, and the denoiser no error of its own; nothing here says which picture looks better.

![error against evaluations](samplers/order.webp)

The error of **measured**, from 5 to 320 steps; grey lines fall with order 1, 2 and 3. lcm and tcd have none.

![sliced Wasserstein distance against evaluations](samplers/distribution.webp)

The column **sliced W2**; the grey line is the data's own.

ddim and euler_cfg_pp (without guidance) are euler; ddpm is euler_ancestral.

## Yours

A sampler of your own is measured by the same functions; [ldm/proof](../ldm/proof/__init__.py) explains the arguments.

```python
from ldm.proof import distribution, order

print(order(my_sampler).slope)  # 1 as Euler's, 2 as Heun's, ...
print(distribution(my_sampler, evaluations=20))
```
"""


def convergence(name: str) -> tuple[list[int], list[float]]:
    found = order(ROWS[name].sampler or SAMPLERS[name], counts=COUNTS)
    return found.evaluations, found.errors


def distance(name: str) -> tuple[list[int], list[float]]:
    ends = [e for e in (end(name, budget) for budget in BUDGETS) if e]
    return [e.evaluations for e in ends], [e.sliced for e in ends]


def guides(axes: Axes) -> None:
    axes.set_ylim(1e-7, 1)
    for slope in (1, 2, 3):
        axes.plot([10, 640], [0.3, 0.3 * 64.0**-slope], color="0.75", linewidth=1, zorder=0)
        axes.annotate(str(slope), (640, 0.3 * 64.0**-slope), color="0.5", xytext=(4, -3), textcoords="offset points")


def floor(axes: Axes) -> None:
    axes.set_xticks(BUDGETS, [str(budget) for budget in BUDGETS])
    axes.minorticks_off()
    axes.axhline(sliced_wasserstein(MIXTURE.sample(20_000, seed=7)), color="0.75", linewidth=1, zorder=0)


def plot(
    file: str, points: Callable, background: Callable, label: str, corner: str, without: Collection[str] = ()
) -> None:
    figure, grid = plt.subplots(2, 2, figsize=(10, 8), sharex=True, sharey=True, layout="constrained")
    for axes, (title, names) in zip(grid.flat, PANELS.items(), strict=True):
        for name, (color, marker) in zip(names, STYLES, strict=False):
            if name not in without:
                axes.loglog(*points(name), color=color, marker=marker, markersize=5, label=name)
        background(axes)
        axes.set_title(title)
        axes.legend(loc=corner)
    figure.supxlabel("evaluations of the denoiser")
    figure.supylabel(label)
    PICTURES.mkdir(exist_ok=True)
    figure.savefig(PICTURES / file, dpi=100)


if __name__ == "__main__":
    PAGE.write_text(TEXT.replace("{table}", "\n".join(table())))
    plot("order.webp", convergence, guides, "error of x, or of mean and covariance", "lower left", ("lcm", "tcd"))
    plot("distribution.webp", distance, floor, "sliced W2 to the data", "upper right")
