"""Loss-free balancing: a bias that chooses and does not weigh, moved once per step by the sign of what is missing.

T tokens, E experts, k experts per token.
"""

import pytest
import torch
from router_arms import build_router, groups_of, random_tokens

from lightning_base.instantiation import ConfigError
from lightning_base.routing import LossFree, RoutingGroups, RoutingPlan


def with_logits_as_tokens(**options: object) -> LossFree:
    """Four experts whose logits are the token vector itself."""
    router = LossFree(num_experts=4, width=4, **options)
    with torch.no_grad():
        router.gate.weight.copy_(torch.eye(4))
    return router


def route(router: LossFree, tokens: torch.Tensor, groups: RoutingGroups | None = None) -> RoutingPlan:
    return router(tokens, torch.zeros(len(tokens), dtype=torch.int64), groups or groups_of(len(tokens)))


def sigmoid(x: float) -> float:
    return 1 / (1 + 2.718281828459045**-x)


@pytest.mark.parametrize("mode", [True, False], ids=["training", "evaluation"])
def test_the_bias_chooses_and_the_score_alone_weighs(mode: bool) -> None:
    router = with_logits_as_tokens(bias_update_rate=0.1).train(mode)
    # Scores: sigmoid of 2, 1, 0, -1 = 0.881, 0.731, 0.5, 0.269.
    token = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    plan = route(router, token)
    assert plan.expert_index.tolist() == [0, 1]
    assert plan.weight.tolist() == pytest.approx([sigmoid(2), sigmoid(1)])
    # b = (-0.4, 0, 0, 0.3): 0.481, 0.731, 0.5, 0.569, so that experts 1 and 3 lead.
    router.bias_steps.copy_(torch.tensor([-4, 0, 0, 3]))
    plan = route(router, token)
    assert plan.expert_index.tolist() == [1, 3]
    assert plan.weight.tolist() == pytest.approx([sigmoid(1), sigmoid(-1)])


def test_renormalized_gates_of_a_token_sum_to_one() -> None:
    plan = route(with_logits_as_tokens(renormalize=True), torch.tensor([[2.0, 1.0, 0.0, -1.0]]))
    total = sigmoid(2) + sigmoid(1)
    assert plan.weight.tolist() == pytest.approx([sigmoid(2) / total, sigmoid(1) / total])


def test_a_step_moves_each_bias_by_the_rate_towards_what_is_missing() -> None:
    router = with_logits_as_tokens(bias_update_rate=0.25)
    # 16 assignments, so the mean is 4: expert 0 has too many, 1 too few, 2 and 3 are as they should be.
    router.end_step({"demand": torch.tensor([6, 2, 4, 4])})
    assert router.bias.tolist() == [-0.25, 0.25, 0.0, 0.0]
    # 6 assignments, mean 1.5: below it are 1 and 1.
    router.end_step({"demand": torch.tensor([2, 2, 1, 1])})
    assert router.bias.tolist() == [-0.5, 0.0, 0.25, 0.25]
    router.end_step({})
    assert router.bias.tolist() == [-0.5, 0.0, 0.25, 0.25]


def test_micro_batches_and_ranks_sum_to_the_step_of_one_batch() -> None:
    tokens, ids = random_tokens(96)
    parts, whole = build_router("loss_free"), build_router("loss_free")
    whole.end_step(whole.step_sums(whole(tokens, ids, groups_of(32, 32, 32))))
    sums = [
        parts.step_sums(parts(part, part_ids, groups_of(32)))["demand"]
        for part, part_ids in zip(tokens.split(32), ids.split(32), strict=True)
    ]
    parts.end_step({"demand": sums[0] + sums[1] + sums[2]})
    assert whole.bias_steps.tolist() == parts.bias_steps.tolist()
    assert whole.bias_steps.abs().sum() > 0
    # Taken one by one they would have moved it elsewhere: the sum matters.
    one_by_one = build_router("loss_free")
    for demand in sums:
        one_by_one.end_step({"demand": demand})
    assert one_by_one.bias_steps.tolist() != whole.bias_steps.tolist()


def test_the_bias_is_in_the_checkpoint_and_survives_half_precision_exactly() -> None:
    router = with_logits_as_tokens()
    router.to(torch.bfloat16)
    for _ in range(1_001):
        router.end_step({"demand": torch.tensor([9, 1, 5, 5])})
    other = with_logits_as_tokens()
    other.load_state_dict(router.state_dict())
    assert other.bias.tolist() == pytest.approx([-1.001, 1.001, 0.0, 0.0])


def test_a_forward_pass_changes_no_state() -> None:
    router = build_router("loss_free").train()
    before = {name: value.clone() for name, value in router.state_dict().items()}
    router(*random_tokens(32), groups_of(32))
    assert all(torch.equal(value, before[name]) for name, value in router.state_dict().items())


def test_repeated_steps_balance_a_lopsided_batch() -> None:
    router = build_router("loss_free", bias_update_rate=0.01)
    tokens, ids = random_tokens(256)
    tokens = 0.5 * tokens + 2 * router.gate.weight[0].detach() / router.gate.weight[0].detach().norm()
    loads = []
    for _ in range(120):
        plan = router(tokens, ids, groups_of(256))
        loads.append(int(plan.demand.max()))
        router.end_step(router.step_sums(plan))
    # The mean is 256 * 2 / 8 = 64.
    assert loads[0] > 110
    assert max(loads[-10:]) < 75


def test_the_sequence_loss_is_the_papers() -> None:
    router = with_logits_as_tokens(sequence_loss=True)
    router.bias_steps.copy_(torch.tensor([-5_000, 0, 0, 5_000]))  # the loss counts what the scores alone would choose
    tokens = 2 * torch.randn(7, 4, generator=torch.Generator().manual_seed(0))
    # One group of two sequences, 4 and 3 tokens long.
    plan = route(router, tokens, RoutingGroups((7,), (4, 3)))
    expected = 0.0
    for first, last in ((0, 4), (4, 7)):
        length = last - first
        scores = [[sigmoid(x) for x in token] for token in tokens[first:last].tolist()]
        for e in range(4):
            # Eq. 18: E / (k T) times how often e is among the two highest scores; eq. 20: mean of the normalized score.
            chosen = sum(sorted(row, reverse=True).index(row[e]) < 2 for row in scores)
            mean_share = sum(row[e] / sum(row) for row in scores) / length
            expected += 4 / (2 * length) * chosen * mean_share / 2  # the mean of two sequences
    assert plan.losses["load_balancing_loss"].item() == pytest.approx(expected, rel=1e-5)
    assert router.loss_coefficients == {"load_balancing_loss": 1e-4}
    assert with_logits_as_tokens().loss_coefficients == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"capacity_factor": 1.0}, r"router\.capacity_factor=1\.0 contradicts LossFree: .* without dropping"),
        ({"top_k": 1, "renormalize": True}, r"router\.renormalize=true with router\.top_k=1: .*renormalize=false"),
        ({"bias_update_rate": -0.1}, r"router\.bias_update_rate=-0\.1: a rate is a number of at least 0"),
        ({"top_k": 9}, r"router\.top_k=9 with router\.num_experts=8"),
    ],
)
def test_what_cannot_work_is_refused_in_a_sentence(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_router("loss_free", **options)
