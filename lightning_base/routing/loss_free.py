"""Loss-free balancing by a bias per expert (Wang et al. 2024, arXiv 2408.15664; DeepSeek-V3, arXiv 2412.19437).

Shapes: T tokens, D width, E experts, A assignments.
"""

import math
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lightning_base.routing.losses import balancing_loss
from lightning_base.routing.plan import RoutingGroups, RoutingPlan, count_by_group
from lightning_base.routing.router import Router
from lightning_base.routing.selection import check_renormalize, full_precision, select_top_k


class LossFree(Router):
    """Each token goes to the k experts of its largest s + b, weighted by s = sigmoid(logit) without b (eq. 3).

    After every optimizer step, b_e grows by ``bias_update_rate`` if fewer tokens of the whole step than the mean asked
    for expert e, and shrinks by as much if more did (algorithm 1). The bias of a step comes from the steps before, so
    the router is causal in training and evaluation.

    Args:
        num_experts: E.
        width: D.
        top_k: k.
        renormalize: a token's k gates sum to 1, as in DeepSeek-V3; the first paper leaves them as they are.
        bias_update_rate: u.
        sequence_loss: adds DeepSeek-V3's complementary loss (eq. 17 to 20), which balances every sequence by itself.
    """

    refused_options: ClassVar[dict[str, str]] = {
        "capacity_factor": "its bias balances the experts without dropping any token",
    }
    bias_steps: Tensor

    def __init__(
        self,
        *,
        num_experts: int,
        width: int,
        top_k: int = 2,
        renormalize: bool = False,
        bias_update_rate: float = 0.001,
        sequence_loss: bool = False,
    ) -> None:
        super().__init__(num_experts=num_experts, top_k=top_k)
        check_renormalize(renormalize, top_k)
        if not (bias_update_rate >= 0 and math.isfinite(bias_update_rate)):
            raise ValueError(f"router.bias_update_rate={bias_update_rate}: a rate is a number of at least 0")
        self.renormalize = renormalize
        self.bias_update_rate = bias_update_rate
        self.sequence_loss = sequence_loss
        # An option decides which losses there are, so that this is the instance's.
        self.loss_coefficients = {"load_balancing_loss": 1e-4} if sequence_loss else {}  # type: ignore[misc]
        self.gate = nn.Linear(width, num_experts, bias=False)
        # The bias in units of the rate: whole numbers stay exact when a model is trained in half precision, where a
        # bias of 0.5 could not grow by 0.001.
        self.register_buffer("bias_steps", torch.zeros(num_experts, dtype=torch.int64))
        self.reset_parameters()

    @property
    def needs_sequences(self) -> bool:
        return self.sequence_loss

    def reset_parameters(self) -> None:
        nn.init.trunc_normal_(self.gate.weight, std=(0.1 / self.gate.in_features) ** 0.5)

    @property
    def bias(self) -> Float[Tensor, " E"]:
        """b, [E]."""
        return self.bias_update_rate * self.bias_steps.float()

    def forward(self, tokens: Tensor, token_ids: Tensor, groups: RoutingGroups) -> RoutingPlan:
        with torch.autocast(tokens.device.type, enabled=False):
            gates_TE = nn.functional.linear(full_precision(tokens), full_precision(self.gate.weight)).sigmoid()
        detached_TE = gates_TE.detach()
        chosen = select_top_k(detached_TE + self.bias, gates_TE, self.top_k, self.renormalize)
        losses: dict[str, Tensor] = {}
        if self.sequence_loss:
            # Eq. 18 counts the experts that the scores alone would choose: the loss is about s, the bias corrects it.
            unbiased = select_top_k(detached_TE, gates_TE, self.top_k)
            shares_TE = gates_TE / gates_TE.sum(-1, keepdim=True)
            losses = balancing_loss(shares_TE, unbiased.token_index, unbiased.expert_index, groups, "sequence").losses
        return RoutingPlan(
            token_index=chosen.token_index,
            expert_index=chosen.expert_index,
            weight=chosen.weight,
            group_demand=count_by_group(groups, self.num_experts, chosen.token_index, chosen.expert_index),
            groups=groups,
            top_k=self.top_k,
            losses=losses,
            aux={"scores": detached_TE, "gates": detached_TE[chosen.token_index, chosen.expert_index]},
        )

    def step_sums(self, plan: RoutingPlan) -> dict[str, Tensor]:
        return {"demand": plan.demand}

    def end_step(self, sums: dict[str, Tensor]) -> None:
        if "demand" in sums:
            demand_E = sums["demand"].round().long()
            # sign(mean - n), in whole numbers.
            self.bias_steps.add_(torch.sign(demand_E.sum() - self.num_experts * demand_E))
