"""Balance of a vector of counts, n [*, E] -> [*]: pure functions, one number per vector.

Every function takes assignments per expert on the last axis and works on any number of leading axes. Without any
assignment there is no balance to speak of, and the answer is NaN.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int64
from torch import Tensor

Counts = Int64[Tensor, "*rest E"]
Value = Float[Tensor, "*rest"]


def max_vio(counts: Counts) -> Value:
    """(max n - mean n) / mean n: 0 when even, E - 1 when collapsed (Wang et al. 2024, arXiv 2408.15664, eq. 4)."""
    n, mean = _with_mean(counts)
    return (n.amax(-1) - mean) / mean


def load_cv(counts: Counts) -> Value:
    """Population standard deviation of n over its mean (Shazeer et al. 2017)."""
    n, mean = _with_mean(counts)
    # Not torch's own, which warns where there is no vector at all.
    return (n - mean.unsqueeze(-1)).square().mean(-1).sqrt() / mean


def min_load(counts: Counts) -> Value:
    """min n / mean n: 1 when even, 0 if an expert gets nothing."""
    n, mean = _with_mean(counts)
    return n.amin(-1) / mean


def gini(counts: Counts) -> Value:
    """Gini coefficient of n: 0 when even, (E - 1)/E when collapsed (arXiv 2506.21328)."""
    n, mean = _with_mean(counts)
    ordered = n.sort(-1).values
    size = n.shape[-1]
    rank = torch.arange(1, size + 1, device=n.device, dtype=n.dtype)
    return ((2 * rank - size - 1) * ordered).sum(-1) / (size * size * mean)


def load_entropy(counts: Counts) -> Value:
    """-sum f ln f / ln E: 1 when even, 0 when collapsed; 1 by convention for a single expert."""
    n, mean = _with_mean(counts)
    size = n.shape[-1]
    share = n / (mean * size)[..., None]
    entropy = -torch.special.xlogy(share, share).sum(-1)
    if size == 1:
        return entropy + 1
    return entropy / torch.log(torch.tensor(float(size), dtype=n.dtype))


def dead_experts(counts: Counts) -> Value:
    """Share of experts with n = 0 over the window the counts were taken in."""
    n, mean = _with_mean(counts)
    return (n == 0).to(n.dtype).mean(-1) + 0 * mean


def _with_mean(counts: Tensor) -> tuple[Tensor, Tensor]:
    n = counts.double()
    mean = n.mean(-1)
    return n, torch.where(mean > 0, mean, torch.nan)


BALANCE: dict[str, Callable[[Tensor], Tensor]] = {
    function.__name__: function for function in (max_vio, load_cv, min_load, gini, load_entropy, dead_experts)
}
