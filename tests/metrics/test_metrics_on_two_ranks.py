"""Two processes joined by gloo, against one process that holds everything."""

import json
from pathlib import Path

import forks
import pytest
import torch
from hand_made_plans import make_plan, plan_of_counts
from tiny_training import leave

from lightning_base.metrics import ExpertLoad, LanguageModelLoss
from lightning_base.routing import RoutingPlan

# Rank 0 holds 4 tokens and drops one; rank 1 holds 9 in two groups.
PLANS = [
    plan_of_counts([3, 1, 0], capacity=[2], dropped=[(2, 0)], gate=0.25, probabilities=[[0.5, 0.5, 0.0]] * 4),
    make_plan(
        [[(0, 2), (1, 2), (2, 1), (3, 0), (4, 1), (5, 2)], [(6, 0), (7, 0), (8, 0)]],
        (6, 3),
        3,
        capacity=[3, 3],
        gate=0.75,
        probabilities=[[1 / 3, 1 / 3, 1 / 3]] * 9,
    ),
]
LOSSES = [([1.0, 1.0, 1.0], [1, 2, 1]), ([5.0], [4])]


def update(load: ExpertLoad, loss: LanguageModelLoss, plan: RoutingPlan, nll: list[float], bytes_: list[int]) -> None:
    load.update({"layer": plan})
    loss.update(torch.tensor(nll), torch.tensor(bytes_))


def values(*metrics: ExpertLoad | LanguageModelLoss) -> dict[str, float]:
    return {name: value.item() for metric in metrics for name, value in metric.compute().items()}


def on_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    load, loss = ExpertLoad(["layer"], 3), LanguageModelLoss()
    update(load, loss, PLANS[rank], *LOSSES[rank])
    once = values(load, loss)
    update(load, loss, PLANS[rank], *LOSSES[rank])
    twice = values(load, loss)
    Path(folder, f"{rank}.json").write_text(json.dumps([once, twice]))
    leave()


@pytest.fixture(scope="module")
def of_two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[list[dict[str, float]]]:
    """What each rank computed, after one update and after a second."""
    folder = tmp_path_factory.mktemp("ranks")
    forks.call_on_two_ranks(on_rank, str(folder))
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.fixture(scope="module")
def of_one_process() -> dict[str, float]:
    load, loss = ExpertLoad(["layer"], 3), LanguageModelLoss()
    for plan, (nll, bytes_) in zip(PLANS, LOSSES, strict=True):
        update(load, loss, plan, nll, bytes_)
    return values(load, loss)


def without_overload(found: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in found.items() if "overload_factor" not in name}


def test_both_ranks_read_what_one_process_would(of_two_ranks, of_one_process) -> None:
    for once, _ in of_two_ranks:
        assert without_overload(once) == pytest.approx(without_overload(of_one_process), rel=1e-12)


def test_unequal_ranks_by_hand(of_two_ranks) -> None:
    expected = {
        # Demand (3, 1, 0) + (1, 2, 3) + (3, 0, 0) = (7, 3, 3), mean 13/3; the drop makes it (6, 3, 3), mean 4.
        "window/max_vio/demand/layer": 7 / (13 / 3) - 1,
        "window/max_vio/load/layer": 0.5,
        # Groups: 3 / (4/3), 3 / 2 and 3 / 1 over the mean, each less 1: 1.25, 0.5, 2; their mean is 1.25.
        "group/max_vio/demand/layer": 1.25,
        "window/drop_rate/layer": 1 / 13,
        "window/tokens_left_behind/layer": 1 / 13,
        "window/capacity_usage/layer": 12 / 24,  # slots 3 * (2 + 3 + 3)
        "window/router_confidence/layer": (3 * 0.25 + 9 * 0.75) / 12,
        "window/gate_entropy/layer": (4 * 0.6931471805599453 + 9 * 1.0986122886681098) / 13,
        "window/overload_factor/layer": 9 / 6,  # 3 and 9 tokens computed
        "loss": 2.0,  # 8 nats over 4 targets; the mean of the ranks' means would be 3
        "bits_per_byte": 8 / 0.6931471805599453 / 8,
    }
    for once, _ in of_two_ranks:
        assert {name: once[name] for name in expected} == pytest.approx(expected)


def test_reading_in_between_does_not_disturb_the_sums(of_two_ranks) -> None:
    for once, twice in of_two_ranks:
        # The same tokens again: every share stays what it was.
        assert twice == pytest.approx(once, rel=1e-12)
