"""What a sparse layer makes on its way is small: no tensor over tokens, experts and slots, no one-hot of experts."""

from typing import Any

import pytest
import torch
from router_arms import ROUTERS, VOCABULARY, build_router
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_base import SparseLayer
from lightning_base.moe import Experts

TOKENS, GROUP, EXPERTS, WIDTH = 512, 256, 16, 24
SCORES = TOKENS * EXPERTS
# An even share of the slots of one group; with a capacity factor there are more.
SLOTS = GROUP // EXPERTS
# Its loss sums over all scores how likely each is among the k, which depends on whether it is (Shazeer et al. 2017, 8).
ALLOWED = {"noisy_top_k": [f"aten.gt.Tensor: [{TOKENS}, {EXPERTS}]"]}


class Sizes(TorchDispatchMode):
    """Looks at every tensor that an operation gives."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0
        self.one_hot: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = function(*args, **(kwargs or {}))
        for one in tree_leaves(found):
            if isinstance(one, Tensor):
                self.largest = max(self.largest, one.numel())
                if is_one_hot(one):
                    self.one_hot.append(f"{function}: {list(one.shape)}")
        return found


def is_one_hot(tensor: Tensor) -> bool:
    """Of the experts of a whole group or more, k of them for a token: zeros, and an E-th or two of ones."""
    if tensor.numel() < GROUP * EXPERTS or EXPERTS not in (tensor.shape[0], tensor.shape[-1]):
        return False
    ones = int((tensor == 1).sum())
    return 0 < ones <= tensor.numel() // EXPERTS * 4 and ones + int((tensor == 0).sum()) == tensor.numel()


def look(layer: SparseLayer) -> Sizes:
    """At a forward and backward pass over eight sequences, four to a group."""
    hidden = torch.randn(8, TOKENS // 8, WIDTH, requires_grad=True)
    ids = torch.randint(0, VOCABULARY, hidden.shape[:2])
    with Sizes() as seen:
        output, plan = layer(hidden, ids)
        (output.square().mean() + sum(plan.losses.values())).backward()
    assert hidden.grad is not None
    return seen


@pytest.mark.parametrize("name", ROUTERS)
def test_nothing_is_as_large_as_tokens_times_experts_times_slots(name: str) -> None:
    options = {} if "dense" in name else {"num_experts": EXPERTS}
    router = build_router(name, width=WIDTH, **options)
    experts = Experts(num_experts=router.num_experts, width=WIDTH, hidden_width=8)
    for w2 in experts.w2:
        nn.init.normal_(w2, std=0.1)
    seen = look(SparseLayer(router, experts, routing_group=4).train())
    assert 0 < seen.largest <= 4 * SCORES
    assert seen.one_hot == ALLOWED.get(name, [])


def test_a_layer_that_makes_them_is_found() -> None:
    expert_T = torch.arange(TOKENS) % EXPERTS
    with Sizes() as seen:
        chosen_TE = F.one_hot(expert_T, EXPERTS).float()
        place_T = (chosen_TE.cumsum(0) * chosen_TE).sum(1).long() - 1
        torch.einsum("te,tc->tec", chosen_TE, F.one_hot(place_T, TOKENS // EXPERTS).float())
    assert seen.largest == TOKENS * EXPERTS * TOKENS // EXPERTS
    assert seen.one_hot
