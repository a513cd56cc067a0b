"""ExpertLoad: how evenly the experts of all sparse layers were asked and used.

Shapes: N sparse layers, E experts, G routing groups, W ranks.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor
from torchmetrics import Metric

from lightning_base.metrics.balance import BALANCE
from lightning_base.routing.plan import RoutingPlan

# What is one number per layer.
SINGLE = (
    "group_count",
    "slots",
    "limited",
    "weight_sum",
    "entropy_sum",
    "entropy_tokens",
    "tokens",
    "left_behind",
)


class ExpertLoad(Metric):
    """Sums expert counts over updates and ranks; ``compute`` turns them into the metrics of every layer.

    One metric for all layers, so that synchronising it costs a handful of collectives, not a handful per layer.

    ``compute`` gives ``{"<scope>/<metric>/<demand|load>/<layer>": value}`` plus, for each, the mean and the max over
    layers. Scope ``window`` is everything since the last reset, on all ranks; scope ``group`` is the mean over single
    routing groups. ``demand`` is what the router wanted, before the drop; ``load`` what was computed, after it.

    Args:
        layers: names of the sparse layers.
        num_experts: E, of all layers or of each; the counts of a layer with fewer than the most end in zeros.
    """

    # ``forward`` would otherwise merge states by how they are reduced, and ``rank_load`` is not.
    full_state_update = True
    sums: Tensor
    rank_load: Tensor

    def __init__(self, layers: list[str], num_experts: int | Sequence[int], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.layers = list(layers)
        self.num_experts = [num_experts] * len(layers) if isinstance(num_experts, int) else list(num_experts)
        size, most = len(layers), max(self.num_experts)
        widths = {"demand": most, "load": most, "group_sums": 2 * len(BALANCE)} | dict.fromkeys(SINGLE, 1)
        ends = list(itertools.accumulate(widths.values()))
        self._columns = {name: slice(end - n, end) for (name, n), end in zip(widths.items(), ends, strict=True)}
        # One state for all sums, since each state costs three collectives. Whole numbers below 2^53 are exact.
        self.add_state("sums", torch.zeros(size, ends[-1], dtype=torch.float64), dist_reduce_fx="sum")
        # Not reduced: after a sync it is stacked to [W, N], which is what a comparison of ranks needs.
        self.add_state("rank_load", torch.zeros(size, dtype=torch.int64), dist_reduce_fx=None)

    @property
    def demand(self) -> Int64[Tensor, "N E"]:
        """Assignments that each layer's experts were asked for."""
        return self._part("demand").long()

    @property
    def load(self) -> Int64[Tensor, "N E"]:
        """Assignments that they computed."""
        return self._part("load").long()

    @property
    def tokens(self) -> Int64[Tensor, " N"]:
        """Tokens that each layer has routed."""
        return self._part("tokens").long()

    def _part(self, name: str) -> Tensor:
        """The columns of a sum, [N, columns], or [N] of a single one: a view."""
        found = self.sums[:, self._columns[name]]
        return found[:, 0] if name in SINGLE else found

    def update(self, plans: Mapping[str, RoutingPlan]) -> None:
        """Adds one forward pass: the plan of each layer, by name."""
        demand, load, group_sums = (self._part(name) for name in ("demand", "load", "group_sums"))
        single = {name: self._part(name) for name in SINGLE}
        for i, name in enumerate(self.layers):
            plan = plans[name]
            group_load = plan.group_load
            demand[i, : plan.num_experts] += plan.demand
            load[i, : plan.num_experts] += plan.load
            # With sharded experts a rank computes the tokens of others.
            self.rank_load[i] += plan.aux.get("computed", len(plan.token_index))
            single["tokens"][i] += plan.num_tokens
            single["left_behind"][i] += plan.tokens_left_behind
            single["weight_sum"][i] += plan.weight.detach().double().sum()
            if plan.capacity is not None:
                single["slots"][i] += plan.capacity.sum() * plan.num_experts
                single["limited"][i] += len(plan.token_index)
            probabilities = plan.aux.get("probabilities")
            if probabilities is not None:
                single["entropy_sum"][i] += -torch.special.xlogy(probabilities, probabilities).sum().double()
                single["entropy_tokens"][i] += len(probabilities)
            # Groups that are all padding have no balance; they are left out of the mean over groups.
            held = plan.group_demand.sum(1) > 0
            for j, counts in enumerate((plan.group_demand[held], group_load[held])):
                values = torch.stack([function(counts).nan_to_num(0.0).sum() for function in BALANCE.values()])
                group_sums[i, j * len(BALANCE) : (j + 1) * len(BALANCE)] += values
            single["group_count"][i] += held.sum()

    def compute(self) -> dict[str, Tensor]:
        """All metrics, as 0-dim float tensors."""
        demand, load, group_sums = self.demand, self.load, self._part("group_sums")
        single = {name: self._part(name) for name in SINGLE}
        asked, dispatched = demand.sum(1), load.sum(1)
        per_layer: dict[str, Tensor] = {}
        for j, (side, counts) in enumerate((("demand", demand), ("load", load))):
            for m, (name, function) in enumerate(BALANCE.items()):
                per_layer[f"window/{name}/{side}"] = self._of_each_layer(function, counts)
                per_layer[f"group/{name}/{side}"] = group_sums[:, j * len(BALANCE) + m] / single["group_count"]
        per_layer["window/drop_rate"] = 1 - dispatched / asked
        per_layer["window/tokens_left_behind"] = single["left_behind"] / single["tokens"]
        per_layer["window/router_confidence"] = single["weight_sum"] / dispatched
        if bool((single["slots"] > 0).any()):
            per_layer["window/capacity_usage"] = single["limited"] / single["slots"]
        if bool((single["entropy_tokens"] > 0).any()):
            per_layer["window/gate_entropy"] = single["entropy_sum"] / single["entropy_tokens"]
        per_rank = self.rank_load.reshape(-1, len(self.layers)).double()
        per_layer["window/overload_factor"] = per_rank.amax(0) / per_rank.mean(0)

        result = {}
        for name, values in per_layer.items():
            result.update({f"{name}/{layer}": value for layer, value in zip(self.layers, values, strict=True)})
            result[f"{name}/mean"], result[f"{name}/max"] = values.mean(), values.max()
        return result

    def _of_each_layer(self, function: Callable[[Tensor], Tensor], counts: Tensor) -> Tensor:
        """The balance of every layer, [N], without the zeros that fill up the counts of a layer with fewer experts."""
        if min(self.num_experts) == max(self.num_experts):
            return function(counts)
        rows = zip(counts, self.num_experts, strict=True)
        return torch.stack([function(row[:num_experts]) for row, num_experts in rows])
