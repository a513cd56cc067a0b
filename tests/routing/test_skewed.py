"""Skewed: everything on one expert, where the measures of balance have known answers."""

import pytest
import torch
from router_arms import build_router, decisions, groups_of, random_tokens

from lightning_base.metrics.expert_load import ExpertLoad


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_every_token_goes_to_the_first_expert_with_weight_one(training: bool) -> None:
    plan = build_router("skewed").train(training)(*random_tokens(20), groups_of(12, 8))
    assert decisions(plan) == [[(0, 1.0)]] * 20
    assert plan.group_demand.tolist() == [[12, *[0] * 7], [8, *[0] * 7]]


def test_it_is_the_worst_that_measures_of_balance_can_show() -> None:
    plan = build_router("skewed")(*random_tokens(40), groups_of(40))
    measure = ExpertLoad(["layer"], 8)
    measure.update({"layer": plan})
    values = {name: float(value) for name, value in measure.compute().items()}
    # The mean load is 40 / 8 = 5: the fullest expert has (40 - 5) / 5 = 7 too many, and seven of eight are idle.
    assert values["window/max_vio/load/layer"] == pytest.approx(7.0)
    assert values["window/dead_experts/load/layer"] == pytest.approx(7 / 8)
    assert values["window/drop_rate/layer"] == 0.0


def test_there_is_nothing_to_learn() -> None:
    router = build_router("skewed")
    assert list(router.parameters()) == []
    assert router.loss_coefficients == {}
    assert torch.isfinite(router(*random_tokens(5), groups_of(5)).weight).all()
