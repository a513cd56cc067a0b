"""Noisy top-k gating (Shazeer et al. 2017, arXiv 1701.06538).

Shapes: T tokens, D width, G routing groups, E experts, K experts per token.
"""

from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lightning_base.routing.noise import draw_key, normal_noise
from lightning_base.routing.plan import RoutingGroups, RoutingPlan, count_by_group
from lightning_base.routing.router import Router
from lightning_base.routing.selection import full_precision


class NoisyTopK(Router):
    """Each token goes to the k experts of its largest noisy logits; a softmax over these k is the gate (eq. 3 to 5).

    The noise is normal with a standard deviation that the router learns for every token and expert,
    softplus(x W_noise); in evaluation there is none. Two losses keep experts even, each the squared coefficient of
    variation over experts, in each routing group: of the gates summed over tokens (eq. 6, 7), and of a smooth estimate
    of the tokens each expert gets (appendix A). Without noise that estimate is a count.

    Args:
        num_experts: E.
        width: D.
        top_k: k, between 2 and E - 1.
    """

    key: Tensor
    step: Tensor
    loss_coefficients: ClassVar[dict[str, float]] = {"importance_loss": 0.1, "load_loss": 0.1}
    refused_options: ClassVar[dict[str, str]] = {
        "renormalize": "its gates are a softmax over the k kept experts, which always sums to 1",
        "capacity_factor": "it drops nothing, its losses keep experts even; router=gshard has noise and a capacity",
        "balance_scope": "it has no load_balancing_loss; its losses on importance and load are per routing group",
    }

    def __init__(self, *, num_experts: int, width: int, top_k: int = 2) -> None:
        super().__init__(num_experts=num_experts, top_k=top_k)
        if top_k == 1:
            raise ValueError(
                "router.top_k=1: a softmax over one kept expert is always 1, so that the gate could not learn from the "
                "output; set router.top_k=2 or more, or take router=switch"
            )
        if top_k == num_experts:
            raise ValueError(
                f"router.top_k={top_k} with router.num_experts={num_experts}: every token would go to every expert and "
                f"there would be no load to balance; set router.top_k to less than {num_experts}"
            )
        self.gate = nn.Linear(width, num_experts, bias=False)
        self.noise_gate = nn.Linear(width, num_experts, bias=False)
        self.register_buffer("key", torch.zeros((), dtype=torch.int64))
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self.reset_parameters()

    @property
    def needs_token_ids(self) -> bool:
        return self.training

    def reset_parameters(self) -> None:
        # Appendix A: no signal and some noise, so that the first steps are even.
        nn.init.zeros_(self.gate.weight)
        nn.init.zeros_(self.noise_gate.weight)
        self.key.copy_(draw_key())

    def end_step(self, sums: dict[str, Tensor]) -> None:
        self.step += 1

    def forward(self, tokens: Tensor, token_ids: Tensor, groups: RoutingGroups) -> RoutingPlan:
        with torch.autocast(tokens.device.type, enabled=False):
            clean_TE = nn.functional.linear(full_precision(tokens), full_precision(self.gate.weight))
            spread_TE = nn.functional.softplus(
                nn.functional.linear(full_precision(tokens), full_precision(self.noise_gate.weight))
            )
        logits_TE = clean_TE
        if self.training:
            noise_TE = normal_noise(token_ids, groups, self.num_experts, key=int(self.key), step=int(self.step))
            logits_TE = clean_TE + noise_TE * spread_TE
        top_TK, expert_TK = logits_TE.topk(self.top_k, dim=-1)
        gates_TE = torch.zeros_like(logits_TE).scatter(1, expert_TK, top_TK.softmax(-1))
        if self.training:
            load_TE = chance_of_being_kept(clean_TE, logits_TE, spread_TE, self.top_k)
        else:
            load_TE = torch.zeros_like(logits_TE).scatter(1, expert_TK, 1.0)

        expert_index = expert_TK.flatten()
        token_index = torch.arange(len(tokens), device=tokens.device).repeat_interleave(self.top_k)
        return RoutingPlan(
            token_index=token_index,
            expert_index=expert_index,
            weight=gates_TE[token_index, expert_index],
            group_demand=count_by_group(groups, self.num_experts, token_index, expert_index),
            groups=groups,
            top_k=self.top_k,
            losses={
                "importance_loss": squared_variation(gates_TE, groups),
                "load_loss": squared_variation(load_TE, groups),
            },
            aux={"probabilities": clean_TE.softmax(-1).detach()},
        )


def chance_of_being_kept(
    clean_TE: Float[Tensor, "T E"], noisy_TE: Float[Tensor, "T E"], spread_TE: Float[Tensor, "T E"], k: int
) -> Float[Tensor, "T E"]:
    """For every token and expert, the chance that it is among the top k if its own noise alone is drawn anew.

    Phi((x W_gate - the k-th largest noisy logit of the other experts) / softplus(x W_noise)), appendix A, eq. 8 and 9.
    """
    top_TK = noisy_TE.topk(k + 1, dim=-1).values
    kth_T1, next_T1 = top_TK[:, k - 1 : k], top_TK[:, k:]
    # Without an expert of the top k, the k-th largest of the rest is the one after the k-th of all.
    threshold_TE = torch.where(noisy_TE > next_T1, next_T1, kth_T1)
    # A softplus far below 0 underflows; so narrow a spread is a step function anyway.
    return torch.special.ndtr((clean_TE - threshold_TE) / spread_TE.clamp(min=1e-6))


def squared_variation(value_TE: Float[Tensor, "T E"], groups: RoutingGroups) -> Float[Tensor, ""]:
    """CV^2 over experts of the values summed over tokens, in each group, averaged over groups that hold tokens."""
    sums_GE = groups.sum(value_TE)
    mean_G1 = sums_GE.mean(1, keepdim=True)
    squared_G = (sums_GE - mean_G1).square().mean(1) / mean_G1.squeeze(1).square().clamp(min=1e-20)
    return squared_G.sum() / max(groups.held, 1)
