"""Sparse layers inside a model that knows nothing of them: a module from tensor to tensor, and the two calls that its
training loop adds.

Shapes: B sequences, L positions, D width.
"""

import inspect
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_base.auxiliary_losses import auxiliary_losses, step_counts
from lightning_base.distributed.reduction import sum_over_ranks
from lightning_base.instantiation import did_you_mean
from lightning_base.moe.layer import SparseLayer
from lightning_base.routing.plan import RoutingPlan


class DropIn(nn.Module):
    """A sparse layer that gives its hidden states alone, so that it can stand where any module of a model stood.

    The plan is kept for whoever asks. A training loop adds ``auxiliary_loss(model)`` to the loss of every forward pass
    and calls ``end_step(model)`` once per optimizer step. What activation checkpointing computes again in the backward
    pass is not counted again.

    >>> block.mlp = DropIn(SparseLayer(router, experts, routing_group=4, residual=False))

    Args:
        layer: with ``residual=False`` where the model adds the residual by itself.
        loss_coefficients: overrides the router's own, by the name of the loss.

    Attributes:
        plan: of the last forward pass, in training or evaluation, detached; None before the first.

    Raises:
        ValueError: a coefficient of a loss that the router does not have.
    """

    def __init__(self, layer: SparseLayer, *, loss_coefficients: Mapping[str, float] | None = None) -> None:
        super().__init__()
        known = layer.router.loss_coefficients
        for name in loss_coefficients or {}:
            if name not in known:
                router = type(layer.router).__name__
                raise ValueError(f"loss_coefficients.{name}: {router} has no such loss{did_you_mean(name, known)}")
        self.layer = layer
        self.loss_coefficients = {**known, **(loss_coefficients or {})}
        self._begin()

    def _begin(self) -> None:
        self.plan: RoutingPlan | None = None
        self._live: RoutingPlan | None = None
        self._sums: dict[str, Tensor] | None = None
        self._token_ids: Tensor | None = None
        self._valid: Tensor | None = None

    def forward(self, hidden: Tensor, token_ids: Tensor | None = None, valid: Tensor | None = None) -> Tensor:
        """Hidden states after the layer; arguments as those of ``SparseLayer``, or as ``read_inputs`` has found them.

        Raises:
            ValueError: the shapes of ``hidden`` and of what was read do not agree.
        """
        if token_ids is None and self.layer.router.needs_token_ids:
            token_ids = _fitted("token_ids", self._token_ids, hidden)
        if valid is None:
            valid = _fitted("valid", self._valid, hidden)
        output, plan = self.layer(hidden, token_ids, valid)
        self._keep(plan)
        return output

    # What is kept outlives the graph that a compiler sees.
    @torch.compiler.disable
    def _keep(self, plan: RoutingPlan) -> None:
        # Inside a backward pass this is activation checkpointing, which repeats a pass that was kept.
        if torch._C._current_graph_task_id() == -1:
            self._take(plan)

    def _take(self, plan: RoutingPlan) -> None:
        self.plan = plan.detached()
        self._live = plan if self.training and self.loss_coefficients else None
        if self.training:
            sums = self._sums or {}
            for name, value in self.layer.router.step_sums(self.plan).items():
                sums[name] = sums[name] + value if name in sums else value
            self._sums = sums

    def __getstate__(self) -> dict[str, Any]:
        # A step in progress holds its graph, which can neither be copied nor saved.
        passing = ("plan", "_live", "_sums", "_token_ids", "_valid")
        return {**self.__dict__, **dict.fromkeys(passing)}


def drop_ins(model: nn.Module) -> dict[str, DropIn]:
    """The ``DropIn`` modules of a model by name, from the first to the last, compiled or not."""
    found = ((name, module) for name, module in model.named_modules() if isinstance(module, DropIn))
    return {name.replace("_orig_mod.", "") or "drop_in": module for name, module in found}


def auxiliary_loss(model: nn.Module, group: dist.ProcessGroup | None = None) -> Tensor:
    """What the routers of the last forward pass add to its loss, times their coefficients; 0 if nothing.

    Each loss is averaged over the layers that have it, so that its coefficient means the same at any depth. Losses that
    balance a whole step (``balance_scope="step"``) count the forward pass on all ranks; gradients are taken to be
    averaged over ranks, as DistributedDataParallel does.

    Args:
        model: with ``DropIn`` modules.
        group: the ranks that train it together; all of them by default.

    Raises:
        RuntimeError: the forward pass was without gradient, as under reentrant activation checkpointing.
    """
    found = {name: drop_in for name, drop_in in drop_ins(model).items() if drop_in._live is not None}
    plans = {name: drop_in._live for name, drop_in in found.items() if drop_in._live is not None}
    counts = sum_over_ranks(step_counts(plans), partial(_sum, group=group))
    weighted: dict[str, list[Tensor]] = {}
    for name, plan in plans.items():
        coefficients = found[name].loss_coefficients
        for loss, value in auxiliary_losses({name: plan}, coefficients, counts, _world_size(group)).items():
            trainable = any(parameter.requires_grad for parameter in found[name].layer.router.parameters())
            if torch.is_grad_enabled() and trainable and not value.requires_grad:
                raise RuntimeError(
                    f"{loss} of {name} has no gradient, because its forward pass had none: with activation "
                    "checkpointing, use_reentrant=False would do"
                )
            weighted.setdefault(loss, []).append(coefficients[loss] * value)
    first = next(model.parameters(), torch.zeros(()))
    return sum((torch.stack(values).mean() for values in weighted.values()), torch.zeros((), device=first.device))


def end_step(model: nn.Module, group: dist.ProcessGroup | None = None) -> None:
    """Ends an optimizer step: routers take up what they have seen since the last, summed over ranks.

    BASE keeps prices to start from, loss-free balancing moves its biases, routers with noise draw new one. Every rank
    has to call it.

    Args:
        model: with ``DropIn`` modules.
        group: the ranks that train it together; all of them by default.
    """
    found = {name: drop_in for name, drop_in in drop_ins(model).items() if drop_in._sums is not None}
    sums = {(name, key): value for name, drop_in in found.items() for key, value in (drop_in._sums or {}).items()}
    reduced = sum_over_ranks(sums, partial(_sum, group=group))
    for name, drop_in in found.items():
        drop_in.layer.router.end_step({key: value for (layer, key), value in reduced.items() if layer == name})
        drop_in._sums, drop_in._live = None, None


def read_inputs(
    model: nn.Module, *, token_ids: str | None = "input_ids", valid: str | None = "attention_mask"
) -> RemovableHandle:
    """Lets the ``DropIn`` modules of a model see arguments of its forward pass, which reach no layer otherwise.

    Without it, padding is routed like any other token, and routers that need token ids refuse to work.

    Args:
        model: whose ``forward`` is called.
        token_ids: the argument with token ids [B, L]; None if there is none.
        valid: the argument [B, L] that is 0 or False for padding; None if there is none. With a cache of earlier
            positions it may be longer than L: the last L count.

    Returns:
        a handle whose ``remove()`` ends it.

    Raises:
        ValueError: ``forward`` has no such argument.
    """
    names = list(inspect.signature(model.forward).parameters)
    for key, name in (("token_ids", token_ids), ("valid", valid)):
        if name is not None and name not in names:
            raise ValueError(
                f"{key}={name}: the forward of {type(model).__name__} has no such argument{did_you_mean(name, names)}"
            )
    return model.register_forward_pre_hook(
        partial(_read, names=names, token_ids=token_ids, valid=valid), with_kwargs=True
    )


# The model's own forward is what there is to compile.
@torch.compiler.disable
def _read(
    model: nn.Module, args: tuple, kwargs: dict[str, Any], *, names: list[str], token_ids: str | None, valid: str | None
) -> None:
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    ids, real = given.get(token_ids or ""), given.get(valid or "")
    for drop_in in drop_ins(model).values():
        drop_in._token_ids, drop_in._valid = ids, None if real is None else real.bool()


def _fitted(name: str, read: Tensor | None, hidden: Tensor) -> Tensor | None:
    """What was read from the model's arguments, in the shape of the tokens of ``hidden``."""
    if read is None:
        return None
    shape = hidden.shape[:-1]
    if read.ndim == 2 and len(shape) == 2 and read.shape[0] == shape[0]:
        read = read[:, -shape[1] :]
    if read.numel() != shape.numel():
        raise ValueError(
            f"{name} read from the model is {list(read.shape)}, and the layer got hidden {list(hidden.shape)}"
        )
    return read.reshape(shape)


def _sum(value: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(value, group=group)
    return value


def _world_size(group: dist.ProcessGroup | None) -> int:
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1
