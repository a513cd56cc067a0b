"""A sparse layer whose experts lie on two ranks, against one that has the tokens of both."""

from pathlib import Path
from typing import Any

import forks
import pytest
import torch
from router_arms import build_router
from tiny_training import leave

from lightning_base.moe import Experts, SparseLayer
from lightning_base.moe.dispatch import ShardedDispatcher
from lightning_base.moe.exchange import Exchange
from lightning_base.moe.layer import without_exchange
from lightning_base.routing import RoutingGroups, RoutingPlan

WIDTH, LENGTH, SEQUENCES, EXPERTS = 16, 8, 4, 4
# Sequences of both ranks, two each; of the second text rank 1 has nothing but padding.
LENGTHS = {"full": [8, 8, 8, 8], "one rank is empty": [8, 3, 0, 0], "nobody has a token": [0, 0, 0, 0]}
ROUTERS = {"base": {}, "switch": {"capacity_factor": 0.5}, "top_k": {}, "expert_choice": {}, "uniform": {}}
Seen = dict[str, Any]


def layer_of(router: str) -> SparseLayer:
    torch.manual_seed(0)
    built = build_router(router, WIDTH, num_experts=EXPERTS, **ROUTERS[router]).double()
    experts = Experts(num_experts=EXPERTS, width=WIDTH, hidden_width=24, sublayers=2).double()
    for w2 in experts.w2:
        torch.nn.init.normal_(w2, std=0.2)
    return SparseLayer(built, experts, routing_group=2)


def text_of(lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(SEQUENCES, LENGTH, WIDTH, generator=generator, dtype=torch.float64)
    ids = torch.randint(0, 100, (SEQUENCES, LENGTH), generator=generator)
    return hidden, ids, torch.arange(LENGTH) < torch.tensor(lengths)[:, None]


def look(layer: SparseLayer, text: tuple[torch.Tensor, ...], mine: slice, *, training: bool) -> Seen:
    """What a pass gives and sends back; the loss is another for every number in the output."""
    layer.train(training)
    layer.zero_grad()
    hidden, ids, valid = (part[mine] for part in text)
    hidden = hidden.clone().requires_grad_()
    weight = torch.arange(text[0].numel(), dtype=torch.float64).view_as(text[0])[mine] / text[0].numel()
    output, plan = layer(hidden, ids, None if bool(valid.all()) else valid)
    ((output * weight).sin().sum()).backward()
    return {
        "output": output.detach(),
        "hidden": hidden.grad,
        "parameters": {name: p.grad for name, p in layer.named_parameters() if p.grad is not None},
        "computed": int(plan.aux.get("computed", -1)),
        "assignments": len(plan.token_index),
    }


class Kinds:
    def __init__(self) -> None:
        self.seen: list[str] = []

    def begin(self) -> None:
        pass

    def end(self, kind: str, sent: list[int], received: list[int]) -> None:
        self.seen.append(kind)


def on_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    found: dict[Any, Any] = {}
    mine = slice(2 * rank, 2 * rank + 2)
    for router in ROUTERS:
        for name, lengths in LENGTHS.items():
            for training in (True, False):
                layer = layer_of(router)
                layer.shard(Exchange(torch.distributed.group.WORLD), same_sizes=name == "full")
                assert layer.exchange is not None
                layer.exchange.meter = Kinds()
                seen = look(layer, text_of(lengths), mine, training=training)
                found[router, name, training] = {**seen, "kinds": layer.exchange.meter.seen}
    # By itself, while the other rank is elsewhere.
    layer = layer_of("top_k")
    layer.shard(Exchange(torch.distributed.group.WORLD))
    if rank == 0:
        with without_exchange(layer), torch.no_grad():
            found["alone"] = layer(*text_of(LENGTHS["full"])[:2])[0]
    found["lie"] = lie()
    torch.save(found, Path(folder, f"{rank}.pt"))
    leave()


def lie() -> str:
    """What is said of a plan that declares what is not so."""
    experts = torch.tensor([0, 0, 1, 2])
    plan = RoutingPlan(
        token_index=torch.arange(4),
        expert_index=experts,
        weight=torch.ones(4),
        group_demand=torch.bincount(experts, minlength=EXPERTS)[None],
        groups=RoutingGroups((4,)),
        equal_loads=True,
    )
    try:
        ShardedDispatcher(plan, Exchange(torch.distributed.group.WORLD), same_sizes=True)
    except RuntimeError as error:
        return str(error)
    return ""


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    folder = tmp_path_factory.mktemp("sharded")
    forks.call_on_two_ranks(on_rank, str(folder))
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("name", LENGTHS)
@pytest.mark.parametrize("router", ROUTERS)
def test_two_ranks_do_what_one_does(router: str, name: str, training: bool, ranks: list[Any]) -> None:
    whole = look(layer_of(router), text_of(LENGTHS[name]), slice(None), training=training)
    by_rank = [rank[router, name, training] for rank in ranks]
    for key in ("output", "hidden"):
        torch.testing.assert_close(torch.cat([one[key] for one in by_rank]), whole[key], rtol=1e-11, atol=1e-13)
    for parameter, gradient in whole["parameters"].items():
        parts = [one["parameters"].get(parameter) for one in by_rank]
        # Every rank has the whole gradient of its experts, and its own share of the router's.
        found = torch.cat(parts) if parameter.startswith("experts.") else sum(p for p in parts if p is not None)
        torch.testing.assert_close(found, gradient, rtol=1e-11, atol=1e-13, msg=parameter)
    assert sum(one["computed"] for one in by_rank) == sum(one["assignments"] for one in by_rank) == whole["assignments"]


def test_counts_are_sent_only_where_loads_may_differ(ranks: list[Any]) -> None:
    rows = ["dispatch", "combine", "combine_backward", "dispatch_backward"]
    for router in ROUTERS:
        for name in LENGTHS:
            for training in (True, False):
                # With padding groups of the ranks differ, and evaluation may have padding; BASE evaluates greedily.
                declared = router in ("base", "expert_choice", "uniform") and training and name == "full"
                expected = rows if declared else ["counts", *rows]
                assert ranks[0][router, name, training]["kinds"] == expected, (router, name, training)


def test_a_plan_that_declares_what_is_not_so_is_refused(ranks: list[Any]) -> None:
    for rank in ranks:
        assert rank["lie"] == "the plan declares equal loads, and has [2, 1, 1, 0]"


def test_a_rank_by_itself_runs_its_own_experts(ranks: list[Any]) -> None:
    layer = layer_of("top_k")
    for weights in layer.experts.w2:
        weights.data[EXPERTS // 2 :] = 0  # the experts of the other rank add nothing
    with torch.no_grad():
        expected = layer(*text_of(LENGTHS["full"])[:2])[0]
    torch.testing.assert_close(ranks[0]["alone"], expected, rtol=1e-12, atol=1e-13)
