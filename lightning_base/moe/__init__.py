"""The sparse layer: router, dispatch, experts, combine."""

from lightning_base.moe.dispatch import Dispatcher
from lightning_base.moe.exchange import Exchange
from lightning_base.moe.experts import Experts
from lightning_base.moe.layer import SparseLayer, set_evaluation_mode

__all__ = ["Dispatcher", "Exchange", "Experts", "SparseLayer", "set_evaluation_mode"]
