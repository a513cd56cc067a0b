"""Top-k by one number, gate by another: what routers that balance through a bias have in common.

Shapes: T tokens, E experts, K experts per token, A = T K assignments.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor


class Selection(NamedTuple):
    """Assignments token by token, each token's in the order of the ranking."""

    token_index: Int64[Tensor, " A"]
    expert_index: Int64[Tensor, " A"]
    weight: Float[Tensor, " A"]


def select_top_k(
    ranking_TE: Float[Tensor, "T E"], gates_TE: Float[Tensor, "T E"], top_k: int, renormalize: bool = False
) -> Selection:
    """The k experts of each token that rank highest, weighted by their gates.

    Args:
        ranking_TE: [T, E], decides; no gradient flows through it.
        gates_TE: [T, E], weighs; the gradient flows through it.
        top_k: k.
        renormalize: a token's k weights are divided by their sum.
    """
    return weigh(ranking_TE.topk(top_k, dim=-1).indices, gates_TE, renormalize)


def full_precision(value: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """In float32, or float64 if that is what it is: what is decided and summed here is not rounded to half of that."""
    return value if value.dtype == torch.float64 else value.float()


def weigh(expert_TK: Int64[Tensor, "T K"], gates_TE: Float[Tensor, "T E"], renormalize: bool = False) -> Selection:
    """The assignments of experts already chosen, [T, K]; other arguments as in ``select_top_k``."""
    weight_TK = gates_TE.gather(1, expert_TK)
    if renormalize:
        weight_TK = weight_TK / weight_TK.sum(-1, keepdim=True)
    token_TK = torch.arange(len(expert_TK), device=expert_TK.device)[:, None].expand_as(expert_TK)
    return Selection(token_TK.reshape(-1), expert_TK.reshape(-1), weight_TK.reshape(-1))


def check_renormalize(renormalize: bool, top_k: int) -> None:
    """Raises ValueError where renormalizing would leave the router nothing to learn from."""
    if renormalize and top_k == 1:
        raise ValueError(
            "router.renormalize=true with router.top_k=1: the gate would always be 1 and the router could not "
            "learn; set router.renormalize=false"
        )
