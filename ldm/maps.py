"""Where the UNet looks in the text: the weights of its cross-attentions, softmax(q k^T / sqrt(d)), caught on the way.

    with ldm.capture(pipe.unet) as maps:
        pipe("a red heart")
    maps["mid_block.attentions.0.transformer_blocks.0.attn2"]  # (rows,heads,77,h,w)
    for word, heat in maps.words(pipe.plan("a red heart")):    # (h,w)

The nets know nothing of this: hooks work the weights out a second time from each layer's queries and the text, so that
the pictures are bitwise what they are without. Sums over the run are kept, not its evaluations: 0.13 GB for
SD 1.5 at 512 pixels. To have the maps of each step, capture each by itself: `with ldm.capture(pipe.unet) as maps:
step = next(steps)`, with steps of `pipe.stream`.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from ldm.clip import TextEncoder
from ldm.clip.prompt import PromptPlan
from ldm.unet import UNet
from ldm.unet.transformer import Attention, SpatialTransformer, TransformerBlock


class Maps(Mapping[str, Tensor]):
    """{layer: (rows,heads,tokens,h,w) float32}, the mean over the evaluations of a run; over the tokens it sums to 1.

    rows: of the UNet's batch, [negative prompts,] prompts, one each for every picture.
    """

    def __init__(self):
        self._sums: dict[str, Tensor] = {}  # (rows,heads,tokens,h,w)
        self._counts: dict[str, Tensor] = {}  # (rows,)
        self._texts: dict[tuple[int, ...], int] = {}  # rows of tokens that were encoded meanwhile, and their end token

    def __getitem__(self, layer: str) -> Tensor:
        return self._sums[layer] / self._counts[layer][:, None, None, None, None]

    def __iter__(self) -> Iterator[str]:
        return iter(self._sums)

    def __len__(self) -> int:
        return len(self._sums)

    def clear(self) -> None:
        self._sums.clear()
        self._counts.clear()

    def add(self, layer: str, new: Tensor) -> None:
        """The weights (rows,heads,tokens,h,w) of one evaluation. Its last rows are the prompts', however many it has.

        Raises ValueError for other tokens than those before.
        """
        total, count = self._sums.get(layer, new[:0]), self._counts.get(layer, new.new_zeros(0))
        if new.shape[2] != total.shape[2]:
            was, now = total.shape[2], new.shape[2]
            raise ValueError(f"capture saw texts of {was} tokens, then of {now}: capture each run by itself")
        ones = new.new_ones(len(new))
        if len(new) > len(total):
            total, new, count, ones = new, total, ones, count
        total[len(total) - len(new) :] += new
        count[len(count) - len(ones) :] += ones
        self._sums[layer], self._counts[layer] = total, count

    def heat(self, count: int = 1, negative: bool = False) -> Tensor:
        """(count,tokens,h,w): the mean over heads and layers, enlarged to the finest layer's size, of `count` pictures.

        negative: under their negative prompts. Raises ValueError where nothing was caught, or not so many rows.
        """
        rows = slice(-2 * count, -count) if negative else slice(-count, None)
        seen = min((len(total) for total in self._sums.values()), default=0)
        if seen < count * (1 + negative):
            whose = "negative prompts, which only a guided run has," if negative else "prompts"
            raise ValueError(f"maps of {seen} rows: no {count} of {whose} are among them; run the pipeline inside")
        size = max((total.shape[-2:] for total in self._sums.values()), key=lambda size: size[0] * size[1])
        layers = [self[layer][rows].mean(dim=1) for layer in self]  # (count,tokens,h,w) each
        return torch.stack([F.interpolate(layer, size, mode="bilinear") for layer in layers]).mean(dim=0)

    def words(
        self, plan: PromptPlan, picture: int = 0, count: int = 1, negative: bool = False
    ) -> list[tuple[str, Tensor]]:
        """Each word of the prompt with its map (h,w): the share of what every place looks at that is the word's tokens.

        plan: `pipe.plan(prompt)` of the picture, or of its negative prompt, with the emphasis of the run. picture:
        which of the `count` in the batch. Raises ValueError as `heat`, and for the plan of a text that was not encoded
        inside the block. Whose picture a text belongs to is not known; and where none was encoded, as of a stream that
        had begun before, only that a plan is too long.
        """
        if not 0 <= picture < count:
            raise ValueError(f"picture={picture} of count={count}: give one from 0 to {count - 1}")
        if not isinstance(plan, PromptPlan):
            raise ValueError(f"plan is a {type(plan).__name__}: give pipe.plan(prompt)")
        for (ids, _), tokens in zip(plan.chunks, plan.tokens, strict=True):
            if self._texts and all(row[1 : len(ids) + 2] != (*ids, end) for row, end in self._texts.items()):
                raise ValueError(
                    f"the run had no text of the plan's tokens {' '.join(tokens)!r}: give the plan of its prompt, made"
                    " with its emphasis (None where the conventions take brackets as text), pipe.plan(prompt, emphasis)"
                )
        return shares(self.heat(count, negative)[picture], plan)


def shares(heat: Tensor, plan: PromptPlan) -> list[tuple[str, Tensor]]:
    """heat (tokens,h,w) -> each word with the sum (h,w) over its tokens."""
    last = max((place for _, places in plan.words for place in places), default=0)
    if last >= len(heat):
        raise ValueError(f"the plan's words reach to token {last}, the maps have {len(heat)}: give their own plan")
    return [(word, heat[places].sum(dim=0)) for word, places in plan.words]


@contextmanager
def capture(unet: UNet) -> Iterator[Maps]:
    """Catch the cross-attention of whatever runs on this UNet inside the block; see `Maps`.

    One run to a block. A run at another size begins anew, so that an enlargement's maps are of its last pass; another
    length of the text is a ValueError. Rows that not every evaluation has (under guidance_interval) are means over
    those that have them. With gradients, evaluations on the way back count.
    """
    if not isinstance(unet, UNet):
        raise ValueError(f"capture of a {type(unet).__name__}: give the net that looks at the text, pipe.unet")
    maps = Maps()
    context = torch.empty(0)
    whole = size = torch.Size()

    # Plain functions: a copy of the net, as for tiling, shares them and not a copy of the maps.
    def begin(net: nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> None:
        nonlocal context, whole
        context = args[2] if len(args) > 2 else given["context"]
        if args[0].shape[-2:] != whole:
            maps.clear()
        whole = args[0].shape[-2:]

    def measure(transformer: nn.Module, args: tuple[Any, ...]) -> None:
        nonlocal size
        size = args[0].shape[-2:]

    def read(module: nn.Module, args: tuple[Any, ...]) -> None:
        if isinstance(module, TextEncoder):
            maps._texts |= {tuple(row): module.config.end_token for row in args[0].tolist()}

    def catcher(layer: str, attn: Attention):  # noqa: ANN202
        def catch(to_q: nn.Module, args: tuple[Any, ...], q: Tensor) -> None:
            with torch.no_grad():
                maps.add(layer, weights(q, attn.to_k.forward(context), attn.heads, size))

        return catch

    # The UNet does not know whose text it is given: hooks of all modules tell.
    hooks = [register_module_forward_pre_hook(read), unet.register_forward_pre_hook(begin, with_kwargs=True)]
    for name, module in unet.named_modules():
        if isinstance(module, SpatialTransformer):
            hooks.append(module.register_forward_pre_hook(measure))
        elif isinstance(module, TransformerBlock):
            hooks.append(module.attn2.to_q.register_forward_hook(catcher(f"{name}.attn2", module.attn2)))
    try:
        yield maps
    finally:
        for hook in hooks:
            hook.remove()


def weights(q: Tensor, k: Tensor, heads: int, size: torch.Size) -> Tensor:
    """softmax(q k^T / sqrt(d)) of q (B,hw,C) and k (B,M,C), in float32 -> (B,heads,M,h,w)."""
    q, k = (rearrange(t.float(), "b n (a d) -> b a n d", a=heads) for t in (q, k))
    probabilities = (q @ k.mT * q.shape[-1] ** -0.5).softmax(dim=-1)  # (B,heads,hw,M)
    return rearrange(probabilities, "b a (h w) m -> b a m h w", h=size[0])
