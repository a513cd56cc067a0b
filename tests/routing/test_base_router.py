"""BASE: balanced in training, greedy in evaluation, learning through its sigmoid gate alone."""

import math

import pytest
import scipy.optimize
import torch
from balanced_program import balanced_optimum
from router_arms import build_router, groups_of, random_tokens

from lightning_base.assignment import SOLVERS
from lightning_base.instantiation import ConfigError
from lightning_base.routing import BASE


def base(**options: object) -> BASE:
    router = build_router("base", **options)
    assert isinstance(router, BASE)
    return router


@pytest.mark.parametrize("solver", sorted(set(SOLVERS) - {"greedy"}))
@pytest.mark.parametrize("same", [False, True], ids=["different-tokens", "equal-tokens"])
def test_training_load_is_exactly_balanced_in_every_group(solver: str, same: bool) -> None:
    tokens, ids = random_tokens(88)
    if same:
        tokens = tokens[:1].repeat(88, 1)
    plan = base(solver=solver)(tokens, ids, groups_of(64, 16, 5, 3))
    assert plan.group_demand[:2].tolist() == [[8] * 8, [2] * 8]
    # 5 and 3 tokens for 8 experts: nobody gets two.
    assert sorted(plan.group_demand[2].tolist()) == [0] * 3 + [1] * 5
    assert sorted(plan.group_demand[3].tolist()) == [0] * 5 + [1] * 3
    assert plan.load.tolist() == plan.demand.tolist()


def test_training_takes_the_best_balanced_assignment_of_each_group() -> None:
    router = base()
    tokens, ids = random_tokens(56)
    plan = router(tokens, ids, groups_of(40, 16))
    scores = (tokens @ router.centroids.T).detach().double()
    for first, last in ((0, 40), (40, 56)):
        # Each expert's column once per token it takes: a square assignment problem, solved by scipy.
        columns = scores[first:last].repeat_interleave((last - first) // 8, dim=1).numpy()
        best = columns[scipy.optimize.linear_sum_assignment(columns, maximize=True)].sum()
        reached = scores[range(first, last), plan.expert_index[first:last]].sum().item()
        assert reached == pytest.approx(best, abs=1e-5)


def test_evaluation_takes_the_highest_score_of_each_token() -> None:
    router = base().eval()
    tokens, ids = random_tokens(64)
    centroids = router.centroids.detach()
    expected = [max(range(8), key=lambda e: float(token @ centroids[e])) for token in tokens]
    assert router(tokens, ids, groups_of(64)).expert_index.tolist() == expected
    assert len(set(torch.bincount(torch.tensor(expected), minlength=8).tolist())) > 1, "the example is balanced anyway"


def test_evaluation_can_be_balanced_on_request() -> None:
    router = base()
    tokens, ids = random_tokens(64)
    in_training = router(tokens, ids, groups_of(64)).expert_index
    router.eval()
    router.evaluation_mode = "balanced"
    assert torch.equal(router(tokens, ids, groups_of(64)).expert_index, in_training)


def test_training_mode_decides_and_not_whether_gradients_are_on() -> None:
    router = base()
    tokens, ids = random_tokens(64)
    balanced, greedy = (router.train(mode)(tokens, ids, groups_of(64)).expert_index for mode in (True, False))
    assert not torch.equal(balanced, greedy)
    router.requires_grad_(False)
    for mode, expected in ((True, balanced), (False, greedy)):
        router.train(mode)
        assert torch.equal(router(tokens, ids, groups_of(64)).expert_index, expected)
        with torch.no_grad():
            assert torch.equal(router(tokens, ids, groups_of(64)).expert_index, expected)


def test_the_gate_is_the_sigmoid_of_the_assigned_score_and_nothing_else_learns() -> None:
    router = base()
    tokens, ids = random_tokens(24)
    tokens.requires_grad_()
    plan = router(tokens, ids, groups_of(24))
    upstream = torch.linspace(-1, 1, 24)
    (plan.weight * upstream).sum().backward()
    # d sigmoid(h . w_a) / d w_a = s (1 - s) h, summed over the tokens of expert a; the other way round for h.
    gradient = torch.zeros(8, 16)
    for t in range(24):
        expert = int(plan.expert_index[t])
        score = sum(tokens[t, d].item() * router.centroids[expert, d].item() for d in range(16))
        gate = 1 / (1 + 2.718281828459045**-score)
        assert plan.weight[t].item() == pytest.approx(gate, rel=1e-5)
        slope = float(upstream[t]) * gate * (1 - gate)
        gradient[expert] += slope * tokens[t].detach()
        torch.testing.assert_close(tokens.grad[t], slope * router.centroids[expert].detach(), atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(router.centroids.grad, gradient, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("gate", "expected"),
    [
        # Scores of one token: 0 for all experts but the one that it gets, which has ln 3.
        ("sigmoid", 0.75),
        ("centred_sigmoid", 1 / (1 + 3**-0.75)),  # ln 3 less the mean, a quarter of it
        ("twice_sigmoid", 1.5),
        ("softmax", 0.5),  # 3 / (3 + 3 x 1) with four experts
        ("one", 1.0),
    ],
)
def test_gates_by_hand(gate: str, expected: float) -> None:
    router = BASE(num_experts=4, width=4, gate=gate).eval()
    with torch.no_grad():
        router.centroids.copy_(torch.eye(4) * math.log(3))
    plan = router(torch.eye(4)[[2]], torch.zeros(1, dtype=torch.int64), groups_of(1))
    assert plan.expert_index.tolist() == [2]
    assert plan.weight.item() == pytest.approx(expected)
    assert router.centroids.requires_grad == (gate != "one")


def test_an_unknown_gate_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"router\.gate=tanh: choose one of sigmoid, centred_sigmoid, twice_sigmoid, softmax, one"
    ):
        BASE(num_experts=4, width=4, gate="tanh")


def test_centroids_start_orthogonal_with_gain_a_tenth() -> None:
    centroids = base().centroids.detach()
    torch.testing.assert_close(centroids @ centroids.T, 0.01 * torch.eye(8), atol=1e-7, rtol=0)


@pytest.mark.parametrize("name", ["switch", "top_k"])
def test_softmax_gates_start_at_a_tenth_of_the_usual_variance(name: str) -> None:
    # Std sqrt(0.1 / 512) = 0.01398; over 8 * 512 draws its own error is about 1.1 percent.
    gate = dict(build_router(name, width=512).named_parameters())["gate.weight"]
    assert gate.std().item() == pytest.approx(0.01398, rel=0.05)
    assert gate.mean().item() == pytest.approx(0.0, abs=0.001)


@pytest.mark.parametrize("k", [2, 3, 8])
def test_several_experts_per_token_are_the_best_balanced_ones(k: int) -> None:
    router = base(top_k=k)
    tokens, ids = random_tokens(40)
    plan = router(tokens, ids, groups_of(24, 16))
    scores = (tokens @ router.centroids.T).detach()
    assert plan.top_k == k
    assert plan.group_demand.tolist() == [[24 * k // 8] * 8, [16 * k // 8] * 8]
    for first, last in ((0, 24), (24, 40)):
        mine = (plan.token_index >= first) & (plan.token_index < last)
        reached = scores[plan.token_index[mine], plan.expert_index[mine]].double().sum().item()
        assert reached == pytest.approx(balanced_optimum(scores[first:last].double().numpy(), k), abs=1e-5)
    chosen = [sorted(plan.expert_index[plan.token_index == t].tolist()) for t in range(40)]
    assert all(len(set(experts)) == k for experts in chosen)
    # Each assignment has a sigmoid of its own; those of a token need not sum to anything.
    expected = torch.sigmoid(scores[plan.token_index, plan.expert_index])
    torch.testing.assert_close(plan.weight.detach(), expected)


def test_an_uneven_share_of_several_experts_is_within_one() -> None:
    # 5 tokens of 2 experts: 10 places at 8 experts, so two experts get a second token.
    plan = base(top_k=2)(*random_tokens(5), groups_of(5))
    assert sorted(plan.demand.tolist()) == [1] * 6 + [2] * 2


def test_evaluation_takes_the_k_highest_scores_of_each_token() -> None:
    router = base(top_k=2).eval()
    tokens, ids = random_tokens(32)
    plan = router(tokens, ids, groups_of(32))
    scores = (tokens @ router.centroids.T).detach().tolist()
    expected = [sorted(range(8), key=lambda e, row=row: row[e])[-2:] for row in scores]
    found = [plan.expert_index[plan.token_index == t].tolist() for t in range(32)]
    assert [sorted(experts) for experts in found] == [sorted(experts) for experts in expected]


@pytest.mark.parametrize("solver", sorted(SOLVERS))
def test_a_solver_of_one_expert_per_token_is_refused_for_two(solver: str) -> None:
    if solver in ("transport", "greedy"):
        assert base(top_k=2, solver=solver)(*random_tokens(16), groups_of(16)).top_k == 2
    else:
        with pytest.raises(ConfigError, match=rf"router\.top_k=2 with router\.solver={solver}: .*transport or greedy$"):
            base(top_k=2, solver=solver)


@pytest.mark.parametrize("option", ["capacity_factor", "renormalize"])
def test_what_contradicts_balanced_assignment_is_refused_with_the_reason(option: str) -> None:
    with pytest.raises(ConfigError, match=rf"router\.{option}=1 contradicts BASE: .*(nothing is dropped|sigmoid)"):
        base(**{option: 1})
