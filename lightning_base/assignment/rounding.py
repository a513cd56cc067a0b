"""From preferences to an exactly balanced assignment, in torch on any device: what the approximate solvers end with.

Shape suffixes: T tokens, E experts.
"""

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from lightning_base.assignment.problem import Loads


def round_to_loads(
    value_TE: Float[Tensor, "T E"], loads: Loads, taken_T: Int64[Tensor, "T"] | None = None
) -> Int64[Tensor, "T"]:
    """An expert for every token with exactly the permitted loads, by deferred choice: O(T E) per round.

    Each round every token without an expert asks for the best one that has room, and an expert with too many requests
    keeps those who would lose most by being refused. Experts fill to their base load first, then the tokens left
    take the bonus places. `taken_T` (-1: none yet) fixes experts beforehand, within loads that are permitted.

    Bound: a round that does not place everyone fills at least one expert, so each of the two stages takes at most
    E + 1 rounds. A forbidden pair (-inf) is chosen only when every expert with room is forbidden to the token.
    """
    T, E = value_TE.shape
    device = value_TE.device
    expert_T = torch.full((T,), -1, device=device) if taken_T is None else taken_T.clone()
    base_E = torch.from_numpy(loads.base).to(device)
    taken_E = torch.bincount(expert_T[expert_T >= 0], minlength=E)
    _fill(value_TE, expert_T, (base_E - taken_E).clamp_min(0))
    if loads.bonus:
        _fill(value_TE, expert_T, (taken_E <= base_E).long())
    return expert_T


def _fill(value_TE: Tensor, expert_T: Tensor, room_E: Tensor) -> None:
    """Place tokens that have no expert until all are placed or no room is left; `expert_T`, `room_E` in place."""
    E = value_TE.shape[1]
    lowest = torch.finfo(value_TE.dtype).min
    for _ in range(E + 1):
        waiting = (expert_T < 0).nonzero()[:, 0]
        if len(waiting) == 0 or int(room_E.sum()) == 0:
            return
        value = value_TE[waiting].clamp_min(lowest).masked_fill(room_E == 0, -torch.inf)
        top = value.topk(min(2, E), dim=1)
        request = top.indices[:, 0]
        regret = top.values[:, 0] - top.values[:, -1]
        order = regret.argsort(descending=True, stable=True)
        order = order[request[order].argsort(stable=True)]
        count = torch.bincount(request, minlength=E)
        rank = torch.arange(len(order), device=order.device) - (count.cumsum(0) - count)[request[order]]
        kept = order[rank < room_E[request[order]]]
        expert_T[waiting[kept]] = request[kept]
        room_E -= torch.bincount(request[kept], minlength=E)
