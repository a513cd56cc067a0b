"""W2 relu(W1 x) of every expert, forward and backward, on a CPU.

Two batched products and their gradients are all the work there is; what a plain chain of operations adds is memory.
Activations and gradients are tens of megabytes each, which the allocator maps anew in every step, and the kernel clears
them page by page: a third of the time at 64 experts. So nothing is written that need not be (relu and its gradient work
in place), and what is written lies in memory that is kept.

Shapes: A assignments sorted by expert, D width, H hidden width, E experts.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from lightning_base.moe.memory import MEMORY
from lightning_base.moe.workers import for_each_expert

# Bytes of the gradient of relu(x W1) that are in memory at once; it is as large as what the forward pass keeps.
AT_ONCE = 8 * 2**20


@torch.library.custom_op("lightning_base::relu_experts", mutates_args=())
def relu_experts(x_AD: Tensor, w1_EDH: Tensor, w2_EHD: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """What each token's expert makes of it, relu(x W1) W2, [A, D], and relu(x W1), [A, H], for the backward pass.

    Args:
        x_AD: the tokens of expert 0, then of expert 1, ...; float32 or float64 on a CPU.
        w1_EDH: [E, D, H], in the same precision.
        w2_EHD: [E, H, D].
        counts: [E], tokens per expert, summing to A.
    """
    x_AD = x_AD.contiguous()
    inner_AH = MEMORY.empty(x_AD.dtype, len(x_AD), w1_EDH.shape[2])
    update_AD = MEMORY.empty(x_AD.dtype, *x_AD.shape)
    sizes = counts.tolist()
    if _equal(sizes):
        x_END, inner_ENH, update_END = (rows.view(len(sizes), sizes[0], -1) for rows in (x_AD, inner_AH, update_AD))
        torch.bmm(x_END, w1_EDH, out=inner_ENH)
        inner_AH.relu_()
        torch.bmm(inner_ENH, w2_EHD, out=update_END)
        return update_AD, inner_AH

    def compute(expert: int, rows: slice) -> None:
        inner = torch.mm(x_AD[rows], w1_EDH[expert], out=inner_AH[rows]).relu_()
        torch.mm(inner, w2_EHD[expert], out=update_AD[rows])

    for_each_expert(compute, sizes, flops_per_row=2 * w1_EDH[0].numel())
    return update_AD, inner_AH


@torch.library.custom_op("lightning_base::relu_experts_backward", mutates_args=())
def relu_experts_backward(
    grad_AD: Tensor, x_AD: Tensor, inner_AH: Tensor, w1_EDH: Tensor, w2_EHD: Tensor, counts: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``x_AD``, ``w1_EDH`` and ``w2_EHD``, given that of the first result; zero for idle experts."""
    x_AD, grad_AD, sizes = x_AD.contiguous(), grad_AD.contiguous(), counts.tolist()
    x_grad_AD, w1_grad_EDH, w2_grad_EHD = (MEMORY.empty(x_AD.dtype, *like.shape) for like in (x_AD, w1_EDH, w2_EHD))
    if _equal(sizes):
        x_END, grad_END, inner_ENH, x_grad_END = (
            rows.view(len(sizes), sizes[0], -1) for rows in (x_AD, grad_AD, inner_AH, x_grad_AD)
        )
        at_once = max(torch.get_num_threads(), AT_ONCE // inner_ENH[0].nbytes)
        buffer_ENH = MEMORY.empty(x_AD.dtype, min(at_once, len(sizes)), *inner_ENH.shape[1:])
        for first in range(0, len(sizes), at_once):
            some = slice(first, first + at_once)
            inner_grad_ENH = buffer_ENH[: len(sizes) - first]
            torch.bmm(inner_ENH[some].transpose(1, 2), grad_END[some], out=w2_grad_EHD[some])
            torch.bmm(grad_END[some], w2_EHD[some].transpose(1, 2), out=inner_grad_ENH)
            _mask(inner_grad_ENH, inner_ENH[some])
            torch.bmm(x_END[some].transpose(1, 2), inner_grad_ENH, out=w1_grad_EDH[some])
            torch.bmm(inner_grad_ENH, w1_EDH[some].transpose(1, 2), out=x_grad_END[some])
        return x_grad_AD, w1_grad_EDH, w2_grad_EHD

    def compute(expert: int, rows: slice) -> None:
        grad, inner = grad_AD[rows], inner_AH[rows]
        torch.mm(inner.t(), grad, out=w2_grad_EHD[expert])
        inner_grad = torch.mm(grad, w2_EHD[expert].t(), out=MEMORY.empty(inner.dtype, *inner.shape))
        _mask(inner_grad, inner)
        torch.mm(x_AD[rows].t(), inner_grad, out=w1_grad_EDH[expert])
        torch.mm(inner_grad, w1_EDH[expert].t(), out=x_grad_AD[rows])

    for_each_expert(compute, sizes, flops_per_row=2 * w1_EDH[0].numel())
    return x_grad_AD, w1_grad_EDH, w2_grad_EHD


def _mask(inner_grad: Tensor, inner: Tensor) -> None:
    """The gradient of relu, in place."""
    torch.ops.aten.threshold_backward.grad_input(inner_grad, inner, 0, grad_input=inner_grad)


def _equal(sizes: list[int]) -> bool:
    return len(sizes) > 1 and sizes[0] > 0 and sizes.count(sizes[0]) == len(sizes)


@relu_experts.register_fake
def _(x_AD: Tensor, w1_EDH: Tensor, w2_EHD: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    return x_AD.new_empty(x_AD.shape), x_AD.new_empty(x_AD.shape[0], w1_EDH.shape[2])


@relu_experts_backward.register_fake
def _(
    grad_AD: Tensor, x_AD: Tensor, inner_AH: Tensor, w1_EDH: Tensor, w2_EHD: Tensor, counts: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return x_AD.new_empty(x_AD.shape), w1_EDH.new_empty(w1_EDH.shape), w2_EHD.new_empty(w2_EHD.shape)


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
    x_AD, w1_EDH, w2_EHD, counts = inputs
    _, inner_AH = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(inner_AH)
    ctx.save_for_backward(x_AD, inner_AH, w1_EDH, w2_EHD, counts)


def _backward(ctx: Any, grad_AD: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if grad_AD is None:
        return None, None, None, None
    return *relu_experts_backward(grad_AD, *ctx.saved_tensors), None


relu_experts.register_autograd(_backward, setup_context=_save)


@register_flop_formula(torch.ops.lightning_base.relu_experts)
def _(x_shape: Any, w1_shape: Any, *args: Any, **kwargs: Any) -> int:
    return 4 * x_shape[0] * w1_shape[1] * w1_shape[2]


@register_flop_formula(torch.ops.lightning_base.relu_experts_backward)
def _(grad_shape: Any, x_shape: Any, inner_shape: Any, *args: Any, **kwargs: Any) -> int:
    return 8 * x_shape[0] * x_shape[1] * inner_shape[1]
