"""Rows of tokens to assignments and back, on a CPU: both ways and both gradients without adding row by row.

Shapes: A assignments sorted by expert, T tokens, D width.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_base.routing.plan import count


def rows_by_token(token_index: Tensor, num_tokens: int) -> tuple[Tensor, Tensor]:
    """The assignments of token 0, then of token 1, and so on, [A], and where those of each token begin, [T + 1]."""
    return torch.argsort(token_index, stable=True), count(token_index + 1, num_tokens + 1).cumsum(0)


@torch.library.custom_op("lightning_base::sum_rows", mutates_args=())
def sum_rows(rows_AD: Tensor, weight: Tensor | None, position: Tensor, begin: Tensor) -> Tensor:
    """The sum of each token's rows, times their weights if there are any, [T, D]; zero for a token without rows.

    Args:
        rows_AD: [A, D].
        weight: [A].
        position: [A], rows in the order of their tokens.
        begin: [T + 1], where in ``position`` each token begins.
    """
    weights = None if weight is None else weight.to(rows_AD.dtype)[position]
    # A bag of embeddings is the same sum, and has a kernel that reads and writes every row once.
    return F.embedding_bag(position, rows_AD, begin, mode="sum", per_sample_weights=weights, include_last_offset=True)


@torch.library.custom_op("lightning_base::take_rows", mutates_args=())
def take_rows(tokens_TD: Tensor, token_index: Tensor, position: Tensor, begin: Tensor) -> Tensor:
    """The row of each assignment's token, [A, D]; ``position`` and ``begin`` are for the gradient."""
    return tokens_TD.index_select(0, token_index)


@torch.library.custom_op("lightning_base::combine_rows", mutates_args=())
def combine_rows(rows_AD: Tensor, weight: Tensor, token_index: Tensor, position: Tensor, begin: Tensor) -> Tensor:
    """``sum_rows`` with a gradient, for which it is told each row's token."""
    return sum_rows(rows_AD, weight, position, begin)


@torch.library.custom_op("lightning_base::combine_rows_backward", mutates_args=())
def combine_rows_backward(
    grad_TD: Tensor, rows_AD: Tensor, weight: Tensor, token_index: Tensor
) -> tuple[Tensor, Tensor]:
    grad_AD = grad_TD.index_select(0, token_index)
    weight_grad = torch.linalg.vecdot(grad_AD, rows_AD).to(weight.dtype)
    return grad_AD.mul_(weight[:, None].to(grad_AD.dtype)), weight_grad


@sum_rows.register_fake
def _(rows_AD: Tensor, weight: Tensor | None, position: Tensor, begin: Tensor) -> Tensor:
    return rows_AD.new_empty(begin.shape[0] - 1, rows_AD.shape[1])


@take_rows.register_fake
def _(tokens_TD: Tensor, token_index: Tensor, position: Tensor, begin: Tensor) -> Tensor:
    return tokens_TD.new_empty(token_index.shape[0], tokens_TD.shape[1])


@combine_rows.register_fake
def _(rows_AD: Tensor, weight: Tensor, token_index: Tensor, position: Tensor, begin: Tensor) -> Tensor:
    return rows_AD.new_empty(begin.shape[0] - 1, rows_AD.shape[1])


@combine_rows_backward.register_fake
def _(grad_TD: Tensor, rows_AD: Tensor, weight: Tensor, token_index: Tensor) -> tuple[Tensor, Tensor]:
    return rows_AD.new_empty(rows_AD.shape), weight.new_empty(weight.shape)


def _save_taken(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[2:])


def _take_backward(ctx: Any, grad_AD: Tensor) -> tuple[Tensor | None, ...]:
    return sum_rows(grad_AD, None, *ctx.saved_tensors), None, None, None


def _save_combined(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])


def _combine_backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
    return *combine_rows_backward(grad_TD, *ctx.saved_tensors), None, None, None


take_rows.register_autograd(_take_backward, setup_context=_save_taken)
combine_rows.register_autograd(_combine_backward, setup_context=_save_combined)
