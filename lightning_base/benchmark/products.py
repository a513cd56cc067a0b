"""The matrix products of a layer: alone, and what share of a pass they are.

Shapes: T tokens, D width, H hidden width, E experts, C = T/E tokens of an expert.
"""

import time
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from lightning_base.benchmark.arms import Arm, Losses, Setting
from lightning_base.moe.experts import Experts

SIX_PRODUCTS = "six products, memory kept"
PRODUCTS = frozenset(f"aten::{name}" for name in ("mm", "bmm", "addmm", "baddbmm", "_grouped_mm"))
# Experts of unequal sizes have their products in threads of their own.
ALL_THREADS = torch._C._profiler._ExperimentalConfig(profile_all_threads=True)


class SixProducts(Arm):
    """The floor's matrix products into buffers that exist: what is left if nothing else had to be done.

    Forward x W1 -> h, h W2 -> y; backward the gradients of h, W2, x and W1. No relu, nothing is allocated.

    Args:
        setting: sizes.
        experts: whose weights are used.
    """

    def __init__(self, setting: Setting, experts: Experts) -> None:
        super().__init__(SIX_PRODUCTS, self._two, [])
        self.shape = setting.E, setting.T // setting.E, setting.D
        self.w1_EDH, self.w2_EHD = experts.w1[0].detach(), experts.w2[0].detach()
        self.h_ECH = self.w1_EDH.new_zeros(*self.shape[:2], setting.hidden_width)
        self.y_ECD = self.w1_EDH.new_zeros(self.shape)
        self.w1_grad_EDH, self.w2_grad_EHD, self.h_grad_ECH, self.x_grad_ECD = (
            torch.zeros_like(like) for like in (self.w1_EDH, self.w2_EHD, self.h_ECH, self.y_ECD)
        )

    def _two(self, x_BLD: Tensor) -> tuple[Tensor, Losses]:
        torch.bmm(x_BLD.detach().view(self.shape), self.w1_EDH, out=self.h_ECH)
        return torch.bmm(self.h_ECH, self.w2_EHD, out=self.y_ECD).view_as(x_BLD), ()

    def run(self, batches: Sequence[Tensor], gradient: Tensor | None) -> None:
        super().run(batches, None)
        if gradient is None:
            return
        x_ECD, grad_ECD = batches[self._turn % len(batches) - 1].detach().view(self.shape), gradient.view(self.shape)
        torch.bmm(grad_ECD, self.w2_EHD.mT, out=self.h_grad_ECH)
        torch.bmm(self.h_ECH.mT, grad_ECD, out=self.w2_grad_EHD)
        torch.bmm(self.h_grad_ECH, self.w1_EDH.mT, out=self.x_grad_ECD)
        torch.bmm(x_ECD.mT, self.h_grad_ECH, out=self.w1_grad_EDH)


def share_in_products(method: Callable[[], object]) -> float:
    """What share of a call's time on the CPU a matrix product runs in some thread, by torch's profiler."""
    with profile(activities=[ProfilerActivity.CPU], experimental_config=ALL_THREADS) as seen:
        began = time.perf_counter()
        method()
        taken = time.perf_counter() - began
    spans = [(event.time_range.start, event.time_range.end) for event in seen.events() if event.name in PRODUCTS]
    return covered(spans) / 1e6 / taken


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """The length of what spans cover together; where several overlap it counts once."""
    total, until = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total
