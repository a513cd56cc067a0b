"""Routers: one algorithm per file, all returning a RoutingPlan."""

from lightning_base.routing.balanced import BASE
from lightning_base.routing.dense import Dense
from lightning_base.routing.plan import RoutingGroups, RoutingPlan
from lightning_base.routing.replay import Replay
from lightning_base.routing.router import Router
from lightning_base.routing.switch import Switch
from lightning_base.routing.top_k import TopK
from lightning_base.routing.uniform import Uniform

__all__ = ["BASE", "Dense", "Replay", "Router", "RoutingGroups", "RoutingPlan", "Switch", "TopK", "Uniform"]
