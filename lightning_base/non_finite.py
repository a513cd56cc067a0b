"""Where a loss that is NaN or infinite comes from."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_base.distributed.gradients import local
from lightning_base.moe.layer import without_exchange
from lightning_base.sparse_model import SparseModel


class NonFiniteError(RuntimeError):
    """A loss or hidden state that is NaN or infinite; names the step and the layer.

    Attributes:
        place: the first part of the model that is not finite, if any: one of its ``stages`` or a parameter.
    """

    def __init__(self, sentence: str, place: str | None = None) -> None:
        super().__init__(sentence)
        self.place = place


def first_not_finite(model: SparseModel, batch: Mapping[str, Tensor], *, parameters: bool) -> str | None:
    """The first part of a model whose output for a batch is not finite, or None.

    Args:
        model: of this rank, which may be the only one that looks.
        batch: with ``input_ids`` and ``valid``.
        parameters: whether to look among the parameters where all outputs are finite.
    """
    broken: list[str] = []

    def watch(name: str, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        if isinstance(hidden, Tensor) and not bool(torch.isfinite(hidden).all()):
            broken.append(name)

    hooks = [
        module.register_forward_hook(lambda _m, _i, output, name=name: watch(name, output))
        for name, module in model.stages.items()
    ]
    # This rank may be the only one that is here: it cannot gather slices, nor ask for experts.
    sliced = any(local(parameter) is not parameter for parameter in model.parameters())
    try:
        if not sliced:
            with torch.no_grad(), without_exchange(model):
                model(batch["input_ids"], batch["valid"])
    except ValueError:
        pass  # a solver stopped at NaN scores: the hooks have seen where they began, or it is the router itself
    finally:
        for hook in hooks:
            hook.remove()
    if not broken and parameters:
        named = model.named_parameters()
        broken = [name.removeprefix("blocks.") for name, each in named if not bool(torch.isfinite(local(each)).all())]
    return broken[0] if broken else None
