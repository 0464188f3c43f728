"""A trace on one sheet. Needs matplotlib (extra `plot`)."""

from typing import TYPE_CHECKING

import numpy as np

from ldm.trace import Decode, Trace, shown

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ACROSS = 10  # pictures of x0, and maps


def plot(trace: Trace, picture: int, decode: Decode | None) -> "Figure":
    """Pictures of x0 over the curves over the maps of the words. Raises ValueError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("matplotlib is not installed: pip install matplotlib") from error
    words = shown(trace.words[picture])[:ACROSS]
    figure = Figure(figsize=(12, 7 if words else 5.4), layout="constrained")
    heights = [1.6, 2.6, 1.8][: 2 + bool(words)]
    sheet, curves, *maps = figure.subfigures(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
    figure.suptitle(trace.texts[picture].partition("\n")[0], wrap=True, parse_math=False)
    chosen = np.linspace(0, len(trace) - 1, min(ACROSS, len(trace))).round().astype(int)
    images = trace.pictures("x0", picture, decode)
    for axes, i in zip(sheet.subplots(1, ACROSS), chosen, strict=False):
        axes.imshow(images[i])
        axes.set_title(f"σ = {float(trace[i].sigma):.3g}", fontsize=9)
    draw_curves(trace, picture, curves.subplots(1, 4))
    if words:
        heat = trace.attention(picture).nanmean(dim=0)  # (words,h,w)
        for axes, (i, word) in zip(maps[0].subplots(1, ACROSS), words, strict=False):
            axes.imshow(heat[i].numpy(), cmap="inferno", vmin=0)
            axes.set_title(f"{word}\nup to {float(heat[i].max()):.2g}", fontsize=9, parse_math=False)
    for part in (sheet, *maps):
        for axes in part.axes:
            axes.axis("off")
    return figure


def draw_curves(trace: Trace, picture: int, places: "np.ndarray[tuple[int], np.dtype[np.object_]]") -> None:
    curves = {n: (values if n == "sigma" else values[:, picture]).numpy() for n, values in trace.curves().items()}
    sigma, norms, cosine, scale = places
    sigma.plot(curves["sigma"], ".-", label="sigma")
    sigma.set(title="noise level σ", yscale="log")
    for name in ("eps", "eps_cond", "eps_uncond"):
        norms.plot(curves[name], label=name)
    norms.set(title="size of eps (root mean square)")
    norms.legend(fontsize=8)
    cosine.plot(curves["cosine"])
    cosine.set(title="cosine of eps_cond and eps_uncond")
    scale.plot(curves["scale"])
    scale.set(title="guidance scale in effect")
    if np.isfinite(curves["scale"]).any():
        scale.set_ylim(min(0, 1.1 * np.nanmin(curves["scale"])), max(0, 1.1 * np.nanmax(curves["scale"])))
    for axes in places:
        axes.set_xlabel("step")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.title.set_fontsize(10)
