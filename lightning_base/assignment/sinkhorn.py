"""Entropic balanced assignment: a few Sinkhorn iterations, then rounding to exact loads, in torch on any device.

Shape suffixes: T tokens, E experts.
"""

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from lightning_base.assignment.problem import Loads
from lightning_base.assignment.rounding import round_to_loads


def solve_sinkhorn(
    scores_TE: Float[Tensor, "T E"],
    loads: Loads,
    start_E: Float64[Tensor, "E"] | None = None,
    *,
    temperature: float = 0.1,
    iterations: int = 50,
) -> tuple[Int64[Tensor, "T"], Float64[Tensor, "E"]]:
    """Approximately optimal, exactly balanced assignment, and the entropic prices.

    Maximises sum_te P[t, e] s[t, e] + tau H(P) over plans P with row sums 1 and column sums the loads, in the log
    domain (Cuturi 2013; S-BASE, Clark et al. 2022, arXiv 2202.01169), with tau = `temperature` times the standard
    deviation of the scores; then every token takes the expert where s - p is largest as far as there is room.

    Bound: exactly `iterations` iterations of O(T E), then `round_to_loads`. Without the rounding the loads are wrong:
    Sinkhorn balances the plan P, not its argmax.
    """
    scores = scores_TE.to(torch.promote_types(scores_TE.dtype, torch.float32))
    allowed = scores.isfinite()
    unit = scores.abs().where(allowed, 0.0).amax()
    unit = unit.where(unit > 0, 1.0)  # work in units of the largest score, so that no magnitude overflows
    scores = scores / unit
    kept = scores[allowed]
    tau = (kept.std(correction=0) if kept.numel() else scores.new_ones(())) * temperature
    tau = tau.clamp_min(1e-4)
    target_E = torch.from_numpy(loads.target).to(scores)
    price_E = scores.new_zeros(scores.shape[1]) if start_E is None else start_E.to(scores) / unit
    for _ in range(iterations):
        log_plan = ((scores - price_E) / tau).log_softmax(dim=1)
        excess = log_plan.logsumexp(dim=0) - target_E.log()
        price_E = price_E + tau * excess.nan_to_num(
            posinf=0.0, neginf=0.0
        )  # an expert forbidden to all keeps its price
    expert_T = round_to_loads(scores - price_E, loads)
    return expert_T, price_E.double() * unit
