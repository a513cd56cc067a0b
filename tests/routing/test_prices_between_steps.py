"""BASE's prices between steps: a warm start that is state, the same however a batch is cut, and no other assignment."""

import csv
from pathlib import Path

import program
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from lightning_base.callbacks.assignment import assignment_gain, first_group, measure
from lightning_base.routing import BASE, RoutingGroups, RoutingPlan


@pytest.fixture
def router() -> BASE:
    torch.manual_seed(0)
    router = BASE(num_experts=4, width=8)
    router.reset_parameters()
    return router.train()


def plan_of(router: BASE, tokens: torch.Tensor, sizes: tuple[int, ...]) -> RoutingPlan:
    return router(tokens, torch.zeros(len(tokens), dtype=torch.int64), RoutingGroups(sizes))


def test_prices_are_in_the_checkpoint(router: BASE) -> None:
    assert router.state_dict()["prices"].shape == (4,)


def test_a_forward_pass_alone_changes_no_state(router: BASE) -> None:
    before = router.prices.clone()
    plan_of(router, torch.randn(32, 8), (16, 16))
    assert torch.equal(router.prices, before)


def test_micro_batches_and_ranks_sum_to_what_one_batch_gives(router: BASE) -> None:
    tokens = torch.randn(64, 8)
    plan = plan_of(router, tokens, (16,) * 4)
    whole = router.step_sums(plan)
    parts = [router.step_sums(plan_of(router, part, (16, 16))) for part in tokens.split(32)]
    summed = {name: parts[0][name] + parts[1][name] for name in whole}
    for name, value in whole.items():
        assert torch.allclose(summed[name], value, rtol=1e-12, atol=1e-15), name
    router.end_step(summed)
    assert torch.allclose(router.prices, plan.aux["group_prices"].mean(0), atol=1e-12)


def test_a_warm_start_finds_an_assignment_of_the_same_value(router: BASE) -> None:
    tokens = torch.randn(32, 8)
    router.prices.copy_(torch.tensor([3.0, -2.0, 0.5, -1.5]))
    plan = plan_of(router, tokens, (32,))
    scores = tokens @ router.centroids.detach().T
    rows, columns = linear_sum_assignment(scores.double().numpy().repeat(8, axis=1), maximize=True)
    optimum = scores.double().numpy()[rows, columns // 8].sum()
    reached = scores.double().gather(1, plan.expert_index[:, None]).sum()
    assert float(reached) == pytest.approx(optimum, rel=1e-9)
    assert plan.load.tolist() == [8, 8, 8, 8]


def test_a_group_of_padding_has_no_say_in_the_prices(router: BASE) -> None:
    tokens = torch.randn(16, 8)
    alone = router.step_sums(plan_of(router, tokens, (16,)))
    with_empty = router.step_sums(plan_of(router, tokens, (16, 0)))
    assert all(torch.equal(alone[name], with_empty[name]) for name in alone)
    router.end_step({"prices": torch.zeros(4, dtype=torch.float64), "groups": torch.zeros((), dtype=torch.float64)})
    assert torch.isfinite(router.prices).all()


def test_assignment_gain_by_hand() -> None:
    # Two tokens, two experts. Balanced: (0, 1) is worth 3 + 2 = 5, the optimum; (1, 0) is worth 1 + 0 = 1. A random
    # balanced assignment is worth the row means, 2 + 1 = 3. So the gains are (5 - 3)/2 = 1 and (1 - 3)/2 = -1.
    scores = torch.tensor([[3.0, 1.0], [0.0, 2.0]])
    assert assignment_gain(scores, torch.tensor([[0], [1]]), 5.0) == pytest.approx(1.0)
    assert assignment_gain(scores, torch.tensor([[1], [0]]), 5.0) == pytest.approx(-1.0)
    # A constant added to a token's scores changes nothing.
    shifted = scores + torch.tensor([[10.0], [-4.0]])
    assert assignment_gain(shifted, torch.tensor([[1], [0]]), 11.0) == pytest.approx(-1.0)


def test_nothing_to_gain_is_all_gained() -> None:
    assert assignment_gain(torch.ones(4, 2), torch.tensor([[0], [0], [1], [1]]), 4.0) == 1.0


def test_assignment_gain_of_two_experts_per_token_by_hand() -> None:
    # Two tokens, four experts, two each, so one token per expert. Best: token 0 to 0 and 1, token 1 to 2 and 3, worth
    # 4 + 2 + 3 + 1 = 10. Random: twice the row means, 2 * (6/4 + 4/4) = 5. Token 0 to 0 and 2, token 1 to 1 and 3: 5.
    scores = torch.tensor([[4.0, 2.0, 0.0, 0.0], [0.0, 0.0, 3.0, 1.0]])
    assert assignment_gain(scores, torch.tensor([[0, 1], [2, 3]]), 10.0) == pytest.approx(1.0)
    assert assignment_gain(scores, torch.tensor([[0, 2], [3, 1]]), 10.0) == pytest.approx(0.0)


def test_the_first_group_of_a_plan_is_read_in_any_order(router: BASE) -> None:
    # Three tokens of two experts each, all first choices before any second one; the first group has two tokens.
    plan = RoutingPlan(
        token_index=torch.tensor([0, 1, 2, 0, 1, 2]),
        expert_index=torch.tensor([3, 1, 2, 0, 2, 1]),
        weight=torch.ones(6),
        group_demand=torch.tensor([[1, 1, 1, 1], [0, 1, 1, 0]]),
        groups=RoutingGroups((2, 1)),
        top_k=2,
    )
    assert first_group(plan).tolist() == [[3, 0], [1, 2]]


def test_what_is_measured_of_a_balanced_plan_is_optimal(router: BASE) -> None:
    two = BASE(num_experts=4, width=8, top_k=2)
    two.reset_parameters()
    for each in (router, two):
        plan = plan_of(each, torch.randn(32, 8), (16, 16))
        measured = measure(plan.aux["scores"][:16], first_group(plan), each.prices)
        assert measured["assignment_gain"] == pytest.approx(1.0, abs=1e-6)
        assert measured["solve_time_cold"] > 0
        assert measured["solve_time_warm"] > 0
        worse = measure(plan.aux["scores"][:16], first_group(plan).flip(0), None)
        assert worse["assignment_gain"] < 0.9
        assert "solve_time_warm" not in worse


def test_a_run_with_two_experts_per_token_is_monitored(small_corpus: list[str], tmp_path: Path) -> None:
    options = ("router=base", "router.top_k=2", "trainer.max_steps=3", "trainer.log_every_n_steps=1")
    done = program.train(*small_corpus, *options, f"runs_dir={tmp_path}")
    assert done.returncode == 0, done.stderr
    folder = program.only_job(tmp_path)
    with open(folder / "metrics.csv", newline="") as file:
        names = {row["name"] for row in csv.DictReader(file)}
    gains = [name for name in names if name.startswith("train_group/assignment_gain/")]
    assert gains
    for name in gains:
        assert [value for _, value in program.series(folder, name)] == pytest.approx([1.0] * 3, abs=1e-5)
    assert [value for _, value in program.series(folder, "train_group/max_vio/load/max")] == [0.0] * 3
