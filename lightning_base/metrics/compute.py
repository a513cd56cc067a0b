"""How evenly computation is spread: pure functions over counts of tokens, or over seconds.

Shapes: E experts, W workers (ranks, or experts where each rank holds one), G routing groups or forward passes.
"""

import torch
from jaxtyping import Float, Float64, Int64, Shaped
from torch import Tensor


def idle_fraction(work: Shaped[Tensor, "*rest W"]) -> Float64[Tensor, "*rest"]:
    """1 - mean/max over workers: the share of their time that workers wait if each step takes as long as the slowest.

    0 when even, 1 - 1/W when one worker has all of it; NaN where there is no work.

    Args:
        work: [*, W], tokens or seconds of each worker.
    """
    amount = work.double()
    most = amount.amax(-1)
    return 1 - amount.mean(-1) / torch.where(most > 0, most, torch.nan)


def batched_padding(counts_GE: Int64[Tensor, "*rest G E"]) -> Float64[Tensor, "*rest"]:
    """Share of the rows that would be padding if every forward pass gave each expert as many rows as its fullest one.

    That is what one batched matmul over experts, or an all-to-all with equal splits, has to compute and send.

    Args:
        counts_GE: [*, G, E], tokens of each expert in each of G forward passes.
    """
    counts = counts_GE.double()
    rows = (counts.amax(-1) * counts.shape[-1]).sum(-1)
    return 1 - counts.sum((-1, -2)) / torch.where(rows > 0, rows, torch.nan)


def capacity_padding(
    counts_GE: Int64[Tensor, "*rest G E"], capacity_G: Int64[Tensor, "*rest G"]
) -> Float64[Tensor, "*rest"]:
    """Share of the slots that stay empty in buffers of one fixed capacity per expert: 1 - ``capacity_usage``.

    Args:
        counts_GE: [*, G, E], tokens of each expert in each routing group, after the drop.
        capacity_G: [*, G], slots of one expert.
    """
    slots = capacity_G.double().sum(-1) * counts_GE.shape[-1]
    return 1 - counts_GE.double().sum((-1, -2)) / torch.where(slots > 0, slots, torch.nan)


def expert_flops(counts: Int64[Tensor, "*rest"], *, entries: int, training: bool = False) -> Float[Tensor, "*rest"]:
    """FLOPs of the matrix products of experts that compute ``counts`` tokens, a multiplication and an addition each.

    A token meets every entry of the matrices of its expert once, and twice more in the backward pass, for the gradients
    of inputs and of weights.

    Args:
        counts: tokens of each expert, or of all experts of a rank: assignments, so that k counts.
        entries: of all matrices of one expert, 2 D H S for S sublayers of W1 [D, H] and W2 [H, D].
        training: with the backward pass.
    """
    return counts.double() * (2 * entries * (3 if training else 1))
