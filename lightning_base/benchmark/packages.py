"""Peers from PyPI that know k = 2 and more only: experts of half the width make their active FLOPs equal.

Shapes: T tokens, D width.
"""

import warnings

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_base.benchmark.arms import Arm, Losses, Setting
from lightning_base.benchmark.peers import Reference, chosen, weighted

TWO_CHOICES = 2.5  # slots for both choices of a token, times 1.25


def st_moe(setting: Setting, ample: bool) -> tuple[Arm, Reference]:
    """st-moe-pytorch (Zoph et al. 2022), every second choice taken."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of how its arguments are annotated
        from st_moe_pytorch import MoE

    block = MoE(
        dim=setting.D,
        num_experts=setting.E,
        expert_hidden_mult=setting.hidden_width // 2 // setting.D,
        threshold_train=0.0,
        capacity_factor_train=2.0 * setting.E if ample else TWO_CHOICES,
        is_distributed=False,
    )
    block.to(setting.device, setting.dtype).train()

    def forward(x_BLD: Tensor) -> tuple[Tensor, Losses]:
        found = block(x_BLD)
        return found.outputs, (found.total_aux_loss,)

    def reference(x_BLD: Tensor) -> Tensor:
        probabilities_TE = F.linear(x_BLD.flatten(0, 1), block.gate.to_gates.weight).softmax(-1)
        experts = block.experts.experts
        return weighted(chosen(probabilities_TE, 2, True), lambda e, x_TD: experts[e](x_TD), x_BLD)

    note = "other function: GEGLU, 3 products of 2/3 the width, k = 2"
    return Arm("st-moe-pytorch", forward, list(block.parameters()), note), reference


def mixture_of_experts(setting: Setting, ample: bool) -> tuple[Arm, Reference]:
    """mixture-of-experts (Shazeer et al. 2017, after tensor2tensor), every second choice taken."""
    from mixture_of_experts import MoE

    block = MoE(
        dim=setting.D,
        num_experts=setting.E,
        hidden_dim=setting.hidden_width // 2,
        activation=torch.nn.ReLU,
        second_policy_train="all",
        capacity_factor_train=2.0 * setting.E if ample else TWO_CHOICES,
    )
    block.to(setting.device, setting.dtype).train()

    def forward(x_BLD: Tensor) -> tuple[Tensor, Losses]:
        y_BLD, loss = block(x_BLD)
        return y_BLD, (loss,)

    def reference(x_BLD: Tensor) -> Tensor:
        probabilities_TE = (x_BLD.flatten(0, 1) @ block.gate.w_gating).softmax(-1)
        w1, w2 = block.experts.w1, block.experts.w2
        return weighted(chosen(probabilities_TE, 2, True), lambda e, x_TD: (x_TD @ w1[e]).relu() @ w2[e], x_BLD)

    return Arm("mixture-of-experts", forward, list(block.parameters()), "k = 2; no norms"), reference
