"""Expert choice routing (Zhou et al. 2022, arXiv 2202.09368).

Shapes: T tokens, D width, E experts, S tokens of one routing group, M the most tokens that an expert takes there.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from lightning_base.routing.plan import RoutingGroups, RoutingPlan, count_by_group
from lightning_base.routing.router import Router
from lightning_base.routing.selection import full_precision


class ExpertChoice(Router):
    """Each expert takes the T k / E tokens of a routing group that score highest for it (section 3.2, eq. 1 and 2).

    Scores S are a softmax over experts, and the gate is S. Every expert gets the same number of tokens, while a token
    may get all experts or none. Where T k / E is not whole, the first experts take one token more, T k in all.

    Whether an expert takes a token depends on the tokens after it, so that a language model cannot generate with it.
    The default evaluation does the same as training, as in the paper; ``evaluation_mode = "greedy"`` lets each token
    choose its k experts of highest S, which knows nothing of later tokens.

    Args:
        num_experts: E.
        width: D.
        top_k: experts per token on average, k: the paper's capacity factor.
    """

    causal = False
    evaluation_modes: Mapping[str, bool] = MappingProxyType({"expert_choice": False, "greedy": True})
    refused_options: ClassVar[dict[str, str]] = {
        "capacity_factor": "an expert takes exactly T k / E tokens; the paper's capacity factor is router.top_k here",
        "renormalize": "a token has any number of experts, and one taken by a single expert would always have gate 1",
        "balance_scope": "it is balanced by construction and has no load-balancing loss",
    }

    def __init__(self, *, num_experts: int, width: int, top_k: int = 2) -> None:
        super().__init__(num_experts=num_experts, top_k=top_k)
        self.gate = nn.Linear(width, num_experts, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.trunc_normal_(self.gate.weight, std=(0.1 / self.gate.in_features) ** 0.5)

    def forward(self, tokens: Tensor, token_ids: Tensor, groups: RoutingGroups) -> RoutingPlan:
        with torch.autocast(tokens.device.type, enabled=False):
            logits_TE = nn.functional.linear(full_precision(tokens), full_precision(self.gate.weight))
        scores_TE = logits_TE.softmax(-1)
        experts_choose = self.training or self.evaluation_mode == "expert_choice"
        if experts_choose:
            token_index, expert_index = chosen_by_experts(scores_TE.detach(), groups, self.top_k)
        else:
            expert_index = scores_TE.topk(self.top_k, dim=-1).indices.flatten()
            token_index = torch.arange(len(tokens), device=tokens.device).repeat_interleave(self.top_k)
        return RoutingPlan(
            token_index=token_index,
            expert_index=expert_index,
            weight=scores_TE[token_index, expert_index],
            group_demand=count_by_group(groups, self.num_experts, token_index, expert_index),
            groups=groups,
            top_k=self.top_k,
            equal_loads=experts_choose and groups.even_over(self.num_experts, self.top_k),
            aux={"probabilities": scores_TE.detach()},
        )


def chosen_by_experts(
    scores_TE: Float[Tensor, "T E"], groups: RoutingGroups, k: int
) -> tuple[Int64[Tensor, " A"], Int64[Tensor, " A"]]:
    """Tokens and experts of the assignments when every expert takes its best tokens of each routing group."""
    device, num_experts = scores_TE.device, scores_TE.shape[1]
    tokens, experts = [torch.arange(0, device=device)], [torch.arange(0, device=device)]
    for start, scores_SE in zip(groups.starts(), groups.split(scores_TE), strict=True):
        share, left = divmod(len(scores_SE) * k, num_experts)
        best_ME = scores_SE.topk(share + (left > 0), dim=0).indices
        # The last row belongs to the experts that take one more.
        takes_ME = torch.ones_like(best_ME, dtype=torch.bool)
        takes_ME[share:, left:] = False
        tokens.append(start + best_ME[takes_ME])
        experts.append(torch.arange(num_experts, device=device).expand_as(best_ME)[takes_ME])
    return torch.cat(tokens), torch.cat(experts)
