"""Routing algorithms for mixture-of-experts language models, compared honestly; and as layers for any model.

The names of ``__all__``, and every router of ``lightning_base.routing``, can be imported from here. Importing this
package loads nothing else: a name loads its part when it is asked for, and only ``ExpertLoadLogger`` loads Lightning.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_base.assignment import Assignment, balanced_assignment
    from lightning_base.callbacks.expert_load import ExpertLoadLogger
    from lightning_base.drop_in import DropIn, auxiliary_loss, drop_ins, end_step, read_inputs
    from lightning_base.metrics import ExpertLoad
    from lightning_base.moe import Experts, SparseLayer, set_evaluation_mode
    from lightning_base.routing import *  # noqa: F403
    from lightning_base.routing import Router, RoutingPlan

__version__ = "0.1.0"

__all__ = [
    "Assignment",
    "DropIn",
    "ExpertLoad",
    "ExpertLoadLogger",
    "Experts",
    "Router",
    "RoutingPlan",
    "SparseLayer",
    "auxiliary_loss",
    "balanced_assignment",
    "drop_ins",
    "end_step",
    "read_inputs",
    "set_evaluation_mode",
]

_HOMES = {
    "Assignment": "assignment",
    "balanced_assignment": "assignment",
    "Experts": "moe",
    "SparseLayer": "moe",
    "set_evaluation_mode": "moe",
    "DropIn": "drop_in",
    "auxiliary_loss": "drop_in",
    "drop_ins": "drop_in",
    "end_step": "drop_in",
    "read_inputs": "drop_in",
    "ExpertLoad": "metrics",
    "ExpertLoadLogger": "callbacks.expert_load",
}


def __getattr__(name: str) -> Any:
    # A capital letter: a router, of which this file keeps no list, so that adding one touches no other file.
    home = _HOMES.get(name, "routing" if name[:1].isupper() else None)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(f"{__name__}.{home}")
    if name not in module.__dict__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return module.__dict__[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *import_module(f"{__name__}.routing").__all__})
