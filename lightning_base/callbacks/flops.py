"""FLOPs per token, counted on a real training pass.

Shapes: A assignments, E experts, M and N matrix widths.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode

from lightning_base.module import LanguageModel


def count_flops(
    module: LanguageModel, batch: Mapping[str, Tensor], mean_over_ranks: Callable[[Tensor], Any] = lambda value: value
) -> dict[str, Any]:
    """Counts the matrix products of one forward and backward pass in training mode.

    The experts' share is proportional to the assignments they compute; it is scaled to no dropped token, so that the
    figure is what the layer is built to spend, and what was counted stands beside it. Parameters are left as they were.

    With sharded experts every rank has to count the same batch: each computes its experts for the tokens of all.
    """
    model = module.model
    was_training = model.training
    model.train()
    routers = [layer.router for layer in model.sparse_layers.values()]
    for router in routers:
        router.rehearsal = True
    # The fused attention kernel of the CPU is unknown to the counter; the plain one is made of products it knows.
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten._grouped_mm: grouped_matmul_flops})
    try:
        with counter, sdpa_kernel(SDPBackend.MATH):
            output = model(batch["input_ids"], None, None)
            loss = cross_entropy(output.logits.flatten(0, 1).float(), batch["input_ids"].flatten())
            loss.backward()
    finally:
        for router in routers:
            router.rehearsal = False
        model.train(was_training)
        model.zero_grad(set_to_none=True)
    total = counter.get_total_flops()
    by_module = counter.get_flop_counts()
    counted = sum(
        sum(counts.values()) for name, counts in by_module.items() if name.endswith(".experts") or name == "experts"
    )
    others = total - counted
    experts = float(mean_over_ranks(torch.tensor(counted, dtype=torch.float64, device=module.device)))
    asked = sum(plan.num_tokens * plan.top_k for plan in output.plans.values())
    kept = sum(len(plan.token_index) for plan in output.plans.values())
    # Of the experts that tokens asked for, as everywhere: who asks for fewer than k drops nothing by that.
    dropped = sum(int(plan.asked) - len(plan.token_index) for plan in output.plans.values())
    tokens = batch["input_ids"].numel()
    nominal = others + experts * asked / max(kept, 1)
    return {
        "flops_per_token": nominal / tokens,
        "expert_flops_per_token": experts * asked / max(kept, 1) / tokens,
        "flops_per_token_counted": (others + experts) / tokens,
        "drop_rate_when_counted": dropped / max(kept + dropped, 1),
    }


def grouped_matmul_flops(a_shape: Any, b_shape: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """2 A M N, whether A is a leading axis (forward, input gradient) or the one summed over (weight gradient)."""
    if len(a_shape) == 2 and len(b_shape) == 2:
        return 2 * a_shape[0] * a_shape[1] * b_shape[1]
    return 2 * a_shape[0] * b_shape[-2] * b_shape[-1]
