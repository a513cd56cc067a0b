"""Experts as Switch was released: a buffer of fixed capacity for each expert, filled up with zeros.

Shapes: A assignments sorted by expert, D width, E experts, S slots of all experts.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_base.moe.experts import Experts


class SlottedExperts(nn.Module):
    """The same function as ``experts``, on the same code; empty slots cost as much as full ones.

    Args:
        experts: whose weights and products it uses; of one sublayer.
        capacity_factor: slots over an even share.
        tokens: T of every batch.
    """

    sublayers = 1

    def __init__(self, experts: Experts, capacity_factor: float, tokens: int) -> None:
        super().__init__()
        self.experts, self.num_experts = experts, experts.num_experts
        self.slots = math.ceil(capacity_factor * tokens / experts.num_experts)

    def forward(self, tokens_AD: Tensor, counts: Tensor, *, normalized: bool = False) -> Tensor:
        """What each token's expert adds to it; as ``Experts.forward``."""
        expert_A = torch.arange(self.num_experts).repeat_interleave(counts)
        place_A = torch.arange(len(tokens_AD)) - (counts.cumsum(0) - counts)[expert_A]
        slot_A = expert_A * self.slots + place_A
        normed_AD = tokens_AD if normalized else F.layer_norm(tokens_AD, tokens_AD.shape[-1:])
        empty_SD = tokens_AD.new_zeros(self.num_experts * self.slots, tokens_AD.shape[1])
        full = torch.full_like(counts, self.slots)
        return self.experts(empty_SD.index_copy(0, slot_A, normed_AD), full, normalized=True).index_select(0, slot_A)
