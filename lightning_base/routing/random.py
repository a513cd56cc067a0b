"""The control that looks at nothing: experts drawn at random.

Shapes: T tokens, E experts, K experts per token.
"""

from typing import ClassVar

import torch
from torch import Tensor

from lightning_base.routing.noise import draw_key, uniform_noise
from lightning_base.routing.plan import RoutingGroups, RoutingPlan, count_by_group
from lightning_base.routing.router import Router
from lightning_base.routing.selection import full_precision

# No step of training has this number.
EVALUATION_STEP = -1


class Random(Router):
    """Each token goes to k different experts drawn at random, with weight 1/k, in training and in evaluation.

    Even on average, as ``uniform`` is exactly, but never the same for the same text twice: experts cannot divide the
    work by position either. Evaluation draws once and for all.

    Args:
        num_experts: E.
        top_k: k.
    """

    key: Tensor
    step: Tensor
    refused_options: ClassVar[dict[str, str]] = {
        "renormalize": "its k gates are 1/k, which always sums to 1",
        "capacity_factor": "it is a control without drops, even on average",
        "balance_scope": "it has nothing to learn and no load-balancing loss",
    }

    def __init__(self, *, num_experts: int, top_k: int = 1) -> None:
        super().__init__(num_experts=num_experts, top_k=top_k)
        self.register_buffer("key", torch.zeros((), dtype=torch.int64))
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self.reset_parameters()

    @property
    def needs_token_ids(self) -> bool:
        return True

    def reset_parameters(self) -> None:
        self.key.copy_(draw_key())

    def end_step(self, sums: dict[str, Tensor]) -> None:
        self.step += 1

    def forward(self, tokens: Tensor, token_ids: Tensor, groups: RoutingGroups) -> RoutingPlan:
        step = int(self.step) if self.training else EVALUATION_STEP
        draw_TE = uniform_noise(token_ids, groups, self.num_experts, key=int(self.key), step=step)
        expert_index = draw_TE.topk(self.top_k, dim=-1).indices.flatten()
        token_index = torch.arange(len(tokens), device=tokens.device).repeat_interleave(self.top_k)
        return RoutingPlan(
            token_index=token_index,
            expert_index=expert_index,
            weight=full_precision(tokens).new_full((len(token_index),), 1 / self.top_k),
            group_demand=count_by_group(groups, self.num_experts, token_index, expert_index),
            groups=groups,
            top_k=self.top_k,
        )
