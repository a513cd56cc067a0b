"""The auction of the BASE paper, in torch on any device, with a hard cap on its rounds.

Shape suffixes: T tokens (the goods), E experts (the bidders), C the largest capacity.
"""

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from lightning_base.assignment.problem import Loads
from lightning_base.assignment.rounding import round_to_loads

HEURISTIC_AFTER = 100  # rounds, as released: from here a winner's hold on a token is weakened, which ends quickly


def solve_auction(
    scores_TE: Float[Tensor, "T E"], loads: Loads, *, relative_epsilon: float = 0.02, max_rounds: int = 300
) -> tuple[Int64[Tensor, "T"], Float64[Tensor, "E"]]:
    """Approximately optimal, always exactly balanced assignment, and prices read off the final bids.

    Every expert bids for its c favourite tokens the lead of each over the (c+1)-th, plus epsilon = `relative_epsilon`
    times the range of the scores; a token goes to the highest bidder and its cost rises by the bid. It ends when every
    token has a bid (Lewis et al. 2021, section 2.2.2, after Bertsekas 1992).

    Bound: at most `max_rounds` rounds of O(T E log) each. A token is held by one expert, and no expert holds more than
    it bid for, so whatever the last round leaves is a valid partial assignment, which `round_to_loads` completes.
    """
    T = len(scores_TE)
    scores_ET = scores_TE.t().to(torch.promote_types(scores_TE.dtype, torch.float32)).contiguous()
    allowed_ET = scores_ET.isfinite()
    unit = scores_ET.abs().where(allowed_ET, 0.0).amax()
    unit = unit.where(unit > 0, 1.0)  # work in units of the largest score, so that no magnitude overflows
    scores_ET = (scores_ET / unit).where(allowed_ET, -4.0)  # forbidden: below all others by more than their range
    low, high = scores_ET.where(allowed_ET, 1.0).amin(), scores_ET.amax()
    epsilon = ((high - low) * relative_epsilon).clamp_min(1e-6)
    capacity_E = _capacities(scores_TE, loads)
    C = int(capacity_E.max())
    bids_for_EC = torch.arange(C, device=scores_ET.device) < capacity_E[:, None]

    cost_T = scores_ET.new_zeros(T)
    value_ET = scores_ET.clone()
    winner_T = torch.full((T,), -1, device=scores_ET.device)
    held_T = torch.zeros(T, dtype=torch.bool, device=scores_ET.device)
    token_T = torch.arange(T, device=scores_ET.device)
    for round_ in range(max_rounds):
        top = value_ET.topk(min(C + 1, T), dim=1)
        next_best_E = top.values.gather(1, capacity_E.clamp_max(T - 1)[:, None])
        raise_EC = torch.where(bids_for_EC, top.values[:, :C] - next_best_E + epsilon, 0.0)
        bid_ET = torch.zeros_like(value_ET).scatter_(1, top.indices[:, :C], raise_EC)
        if round_ < HEURISTIC_AFTER:  # whoever holds a token keeps it if nobody else bids
            holding = bid_ET[winner_T[held_T], token_T[held_T]]
            bid_ET[winner_T[held_T], token_T[held_T]] = torch.where(holding > 0, epsilon, holding)
        highest_T, bidder_T = bid_ET.max(0)
        held_T = highest_T > 0
        winner_T = torch.where(held_T, bidder_T, -1)
        if bool(held_T.all()):
            break
        cost_T += highest_T
        value_ET = scores_ET - cost_T
        kept = (winner_T[held_T], token_T[held_T])
        value_ET[kept] = high if round_ < HEURISTIC_AFTER else scores_ET[kept]

    expert_T = round_to_loads(scores_TE, loads, winner_T)
    profit = (scores_ET - cost_T).topk(C, dim=1).values.gather(1, (capacity_E - 1).clamp_min(0)[:, None])[:, 0]
    return expert_T, profit.double() * unit


def _capacities(scores_TE: Tensor, loads: Loads) -> Tensor:
    """One whole capacity per expert: the bonus places go to the experts that most tokens like best."""
    capacity_E = torch.from_numpy(loads.base).to(scores_TE.device)
    if loads.bonus:
        demand = torch.bincount(scores_TE.argmax(1), minlength=scores_TE.shape[1])
        capacity_E = capacity_E.clone()
        capacity_E[demand.argsort(descending=True, stable=True)[: loads.bonus]] += 1
    return capacity_E
