"""The one attention that the three nets share."""

from einops import rearrange
from torch import Tensor

from ldm import kernels


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(d)) v in `heads` heads of width d (Vaswani et al. 2017, eq. 1).

    q (B,N,C), k and v (B,M,C) -> (B,N,C), in the dtype of q. `mask` is boolean, True where a query may look, and
    broadcasts to (B,heads,N,M).
    """
    q, k, v = (rearrange(t, "b n (h d) -> b h n d", h=heads) for t in (q, k, v))
    out = kernels.attention(q, k, v, mask)
    return rearrange(out, "b h n d -> b n (h d)")
