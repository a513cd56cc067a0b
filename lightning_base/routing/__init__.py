"""Routers: one algorithm per file, all returning a RoutingPlan."""

from lightning_base.routing.balanced import BASE
from lightning_base.routing.bip import BIP
from lightning_base.routing.dense import Dense
from lightning_base.routing.expert_choice import ExpertChoice
from lightning_base.routing.gated_dense import GatedDense
from lightning_base.routing.gshard import GShard
from lightning_base.routing.hash import Hash
from lightning_base.routing.loss_free import LossFree
from lightning_base.routing.noisy_top_k import NoisyTopK
from lightning_base.routing.plan import RoutingGroups, RoutingPlan
from lightning_base.routing.quantile import Quantile
from lightning_base.routing.random import Random
from lightning_base.routing.replay import Replay
from lightning_base.routing.router import Router
from lightning_base.routing.sinkhorn import Sinkhorn
from lightning_base.routing.skewed import Skewed
from lightning_base.routing.switch import Switch
from lightning_base.routing.top_k import TopK
from lightning_base.routing.uniform import Uniform

__all__ = [
    "BASE",
    "BIP",
    "Dense",
    "ExpertChoice",
    "GShard",
    "GatedDense",
    "Hash",
    "LossFree",
    "NoisyTopK",
    "Quantile",
    "Random",
    "Replay",
    "Router",
    "RoutingGroups",
    "RoutingPlan",
    "Sinkhorn",
    "Skewed",
    "Switch",
    "TopK",
    "Uniform",
]
