"""What the machine can do at most: its matrix product and its copy, and the time that a layer needs by both.

Shapes: T tokens, D width, H hidden width, E experts.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from lightning_base.benchmark.arms import Setting
from lightning_base.benchmark.timing import now


@dataclass(frozen=True)
class Roofline:
    """FLOPs per second of a large matrix product, and bytes per second of a copy, read and written both counted."""

    flops: float
    bandwidth: float

    def seconds(self, setting: Setting) -> float:
        """The least that a forward and backward pass of the experts can take."""
        return max(setting.flops / self.flops, least_bytes(setting) / self.bandwidth)


def measure(setting: Setting) -> Roofline:
    """Of the device and data type of a setting."""
    kind = {"device": setting.device, "dtype": setting.dtype}
    size = 2048 if setting.device == "cpu" else 8192
    a, b = torch.randn(size, size, **kind), torch.randn(size, size, **kind)  # type: ignore[call-overload]
    out = torch.empty_like(a)
    source = torch.empty(2**26, **kind).fill_(1.0)  # type: ignore[call-overload]
    target = torch.empty_like(source)
    product = best(lambda: torch.mm(a, b, out=out), setting.device)
    copy = best(lambda: target.copy_(source), setting.device)
    return Roofline(2 * size**3 / product, 2 * source.nbytes / copy)


def expert_rate(setting: Setting) -> float:
    """FLOPs per second of the batched product [E, T/E, D] by [E, D, H], as the experts' first one is."""
    kind = {"device": setting.device, "dtype": setting.dtype}
    T, D, H, E = setting.T, setting.D, setting.hidden_width, setting.E
    x_ECD, w_EDH = torch.randn(E, T // E, D, **kind), torch.randn(E, D, H, **kind)  # type: ignore[call-overload]
    out = torch.empty(E, T // E, H, **kind)  # type: ignore[call-overload]
    return 2 * T * D * H / best(lambda: torch.bmm(x_ECD, w_EDH, out=out), setting.device)


def least_bytes(setting: Setting) -> int:
    """Bytes that a forward and backward pass moves if every product reads its operands and writes its result once.

    Forward: x W1 -> h, h W2 -> y. Backward: the gradients of h (from y and W2), W2 (h, y), x (h, W1), W1 (x, h).
    """
    T, D, H, E = setting.T, setting.D, setting.hidden_width, setting.E
    weight, narrow, wide = E * D * H, T * D, T * H
    return 6 * (weight + narrow + wide) * setting.dtype.itemsize


def best(method: Callable[[], object], device: str, rounds: int = 7) -> float:
    """Seconds of the quickest of some calls: what the machine can do, not what it does while others use it."""
    method()
    taken = []
    for _ in range(rounds):
        began = now(device)
        method()
        taken.append(now(device) - began)
        time.sleep(0)
    return min(taken)
