"""What is to be solved: how many tokens each expert must get, and the dual bound that certifies an answer.

Shape suffixes: T tokens, E experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float, Float64
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True)
class Loads:
    """Expert e takes `base[e]` tokens, and `bonus` of the experts (which ones is part of the optimum) take one more."""

    base: NDArray[np.int64]  # [E]
    bonus: int
    k: int  # experts per token

    @cached_property
    def target(self) -> NDArray[np.float64]:
        """Mean load of each expert when the bonus is shared evenly, [E]."""
        return self.base.astype(np.float64) + self.bonus / len(self.base)

    @cached_property
    def largest(self) -> NDArray[np.int64]:
        """The most tokens each expert may hold, [E]."""
        return self.base + (self.bonus > 0)


def even_loads(num_tokens: int, num_experts: int, k: int = 1) -> Loads:
    """Floor or ceil of T k / E for every expert."""
    base, bonus = divmod(num_tokens * k, num_experts)
    return Loads(np.full(num_experts, base, dtype=np.int64), bonus, k)


def given_loads(
    capacities: Sequence[int | float] | NDArray[np.number] | Tensor, num_tokens: int, num_experts: int, k: int
) -> Loads:
    """Exactly `capacities[e]` tokens for expert e.

    Raises ValueError if there is not one capacity per expert, if one is negative, fractional or larger than T, or if
    they do not add up to T k.
    """
    given = np.asarray(capacities.detach().cpu() if isinstance(capacities, Tensor) else capacities)
    if given.shape != (num_experts,):
        raise ValueError(f"capacities: one per expert is needed, shape ({num_experts},), got shape {given.shape}")
    base = given.astype(np.int64)
    if (base != given).any():
        raise ValueError(f"capacities: whole numbers are needed, got {given.tolist()}")
    if (base < 0).any():
        raise ValueError(f"capacities: expert {int(base.argmin())} has {int(base.min())}, at least 0 is needed")
    if (base > num_tokens).any():
        worst = int(base.argmax())
        raise ValueError(f"capacities: expert {worst} has {int(base[worst])}, but there are only {num_tokens} tokens")
    if base.sum() != num_tokens * k:
        raise ValueError(
            f"capacities: they sum to {int(base.sum())}, but T * k = {num_tokens} * {k} = {num_tokens * k}"
        )
    return Loads(base, 0, k)


def dual_bound(scores_TE: Float[Tensor, "T E"], prices_E: Float64[Tensor, "E"], loads: Loads) -> float:
    """Upper bound on the objective of every balanced assignment, from any prices, in double precision.

    Weak duality: sum_t (sum of the k largest s[t, e] - p[e]) + max over permitted loads n of sum_e n[e] p[e].
    Works in blocks of tokens, so that a double copy of the scores is never made.
    """
    prices_E = prices_E.to(device=scores_TE.device, dtype=torch.float64)
    total = 0.0
    for block in scores_TE.split(max(1, 2**20 // max(scores_TE.shape[1], 1))):
        total += float((block.double() - prices_E).topk(loads.k, dim=1).values.sum())
    base_E = torch.from_numpy(loads.base).to(prices_E.device)
    total += float((prices_E * base_E)[base_E > 0].sum())
    return total + float(prices_E.topk(loads.bonus).values.sum())
