"""ExpertLoad: how evenly the experts of all sparse layers were asked and used.

Shapes: N sparse layers, E experts, G routing groups, W ranks.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_base.metrics.balance import BALANCE
from lightning_base.routing.plan import RoutingPlan


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
    demand: Tensor
    load: Tensor
    group_sums: Tensor
    group_count: Tensor
    slots: Tensor
    limited: Tensor
    weight_sum: Tensor
    entropy_sum: Tensor
    entropy_tokens: Tensor
    tokens: Tensor
    left_behind: Tensor
    rank_load: Tensor

    def __init__(self, layers: list[str], num_experts: int | Sequence[int], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.layers = list(layers)
        self.num_experts = [num_experts] * len(layers) if isinstance(num_experts, int) else list(num_experts)
        size, most = len(layers), max(self.num_experts)

        def add(name: str, *shape: int, dtype: torch.dtype = torch.int64, reduce: str | None = "sum") -> None:
            self.add_state(name, torch.zeros(size, *shape, dtype=dtype), dist_reduce_fx=reduce)

        add("demand", most)
        add("load", most)
        add("group_sums", 2, len(BALANCE), dtype=torch.float64)
        add("group_count")
        add("slots")
        add("limited")
        add("weight_sum", dtype=torch.float64)
        add("entropy_sum", dtype=torch.float64)
        add("entropy_tokens")
        add("tokens")
        add("left_behind")
        # Not reduced: after a sync it is stacked to [W, N], which is what a comparison of ranks needs.
        add("rank_load", reduce=None)

    def update(self, plans: Mapping[str, RoutingPlan]) -> None:
        """Adds one forward pass: the plan of each layer, by name."""
        for i, name in enumerate(self.layers):
            plan = plans[name]
            group_load = plan.group_load
            self.demand[i, : plan.num_experts] += plan.demand
            self.load[i, : plan.num_experts] += plan.load
            self.rank_load[i] += len(plan.token_index)
            self.tokens[i] += plan.num_tokens
            self.left_behind[i] += plan.tokens_left_behind
            self.weight_sum[i] += plan.weight.detach().double().sum()
            if plan.capacity is not None:
                self.slots[i] += plan.capacity.sum() * plan.num_experts
                self.limited[i] += len(plan.token_index)
            probabilities = plan.aux.get("probabilities")
            if probabilities is not None:
                self.entropy_sum[i] += -torch.special.xlogy(probabilities, probabilities).sum().double()
                self.entropy_tokens[i] += len(probabilities)
            # Groups that are all padding have no balance; they are left out of the mean over groups.
            held = plan.group_demand.sum(1) > 0
            for j, counts in enumerate((plan.group_demand[held], group_load[held])):
                values = torch.stack([function(counts).nan_to_num(0.0).sum() for function in BALANCE.values()])
                self.group_sums[i, j] += values
            self.group_count[i] += held.sum()

    def compute(self) -> dict[str, Tensor]:
        """All metrics, as 0-dim float tensors."""
        asked = self.demand.sum(1)
        dispatched = self.load.sum(1)
        per_layer: dict[str, Tensor] = {}
        for j, (side, counts) in enumerate((("demand", self.demand), ("load", self.load))):
            for m, (name, function) in enumerate(BALANCE.items()):
                per_layer[f"window/{name}/{side}"] = self._of_each_layer(function, counts)
                per_layer[f"group/{name}/{side}"] = self.group_sums[:, j, m] / self.group_count
        per_layer["window/drop_rate"] = 1 - dispatched / asked
        per_layer["window/tokens_left_behind"] = self.left_behind / self.tokens
        per_layer["window/router_confidence"] = self.weight_sum / dispatched
        if bool((self.slots > 0).any()):
            per_layer["window/capacity_usage"] = self.limited / self.slots
        if bool((self.entropy_tokens > 0).any()):
            per_layer["window/gate_entropy"] = self.entropy_sum / self.entropy_tokens
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
