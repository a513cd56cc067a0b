"""The public function: what may go in, what comes out, and what must not change the answer."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_base.assignment import SOLVERS, balanced_assignment
from lightning_base.assignment.choice import PARALLEL
from lightning_base.assignment.examples import EXAMPLES
from tests.assignment.cases import assert_balanced, random_scores, scale_of

APPROXIMATE = ["auction", "sinkhorn"]


def example(T: int = 600, E: int = 12) -> torch.Tensor:
    return EXAMPLES["Zipf clusters"](T, E, torch.Generator().manual_seed(0))


def test_a_problem_solved_by_hand() -> None:
    # Both tokens prefer expert 0. Giving it to token 0 earns 3 + 1, to token 1 earns 1 + 2.
    ours = balanced_assignment(torch.tensor([[3.0, 1.0], [2.0, 1.0]]), certificate=True)
    assert ours.expert.tolist() == [0, 1]
    assert ours.objective == 4.0
    assert ours.gap == 0.0
    # Token 0 stays for a price difference of at most 2, token 1 leaves from 1 on.
    assert 1.0 <= float(ours.prices[0] - ours.prices[1]) <= 2.0


def test_which_expert_gets_the_odd_token_is_part_of_the_optimum() -> None:
    # Three tokens, two experts: 2 + 1. All gain 1 at expert 1 but token 0 gains 5: the best is 5 + 1 + 0.
    scores = torch.tensor([[0.0, 5.0], [0.0, 1.0], [0.0, 1.0]])
    ours = balanced_assignment(scores)
    assert ours.objective == 6.0
    assert torch.bincount(ours.expert).tolist() == [1, 2]


@given(st.integers(0, 2**32 - 1))
def test_permuting_tokens_and_experts_keeps_the_objective(seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores = random_scores(rng, int(rng.integers(1, 60)), int(rng.integers(1, 10)))
    permuted = scores[torch.from_numpy(rng.permutation(len(scores)))][
        :, torch.from_numpy(rng.permutation(scores.shape[1]))
    ]
    before, after = balanced_assignment(scores).objective, balanced_assignment(permuted).objective
    assert abs(before - after) <= 1e-12 * scale_of(scores)


@given(st.integers(0, 2**32 - 1))
def test_a_constant_per_token_adds_to_the_objective_and_changes_nothing_else(seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores = torch.from_numpy(rng.integers(-100, 100, (int(rng.integers(1, 60)), int(rng.integers(1, 10))))).double()
    shift = torch.from_numpy(rng.integers(-1000, 1000, len(scores))).double()
    before, after = balanced_assignment(scores), balanced_assignment(scores + shift[:, None])
    assert after.objective == before.objective + float(shift.sum())


@given(st.integers(0, 2**32 - 1))
def test_a_constant_per_expert_moves_its_price_and_not_the_tokens(seed: int) -> None:
    rng = np.random.default_rng(seed)
    E, each = int(rng.integers(1, 10)), int(rng.integers(1, 12))
    scores = torch.from_numpy(rng.integers(-100, 100, (E * each, E))).double()
    shift = torch.from_numpy(rng.integers(-1000, 1000, E)).double()
    before, after = balanced_assignment(scores), balanced_assignment(scores + shift)
    assert after.objective == before.objective + each * float(shift.sum())
    # The shifted prices of one problem prove that the answer to the other is optimal.
    worth = scores + shift - (before.prices + shift)
    assert (worth.amax(1) - worth.gather(1, after.expert[:, None])[:, 0]).max() < 1e-9


@given(st.integers(0, 2**32 - 1), st.integers(-80, 80))
def test_a_power_of_two_scales_the_objective_exactly(seed: int, power: int) -> None:
    rng = np.random.default_rng(seed)
    scores = torch.from_numpy(rng.standard_normal((int(rng.integers(1, 60)), int(rng.integers(1, 10)))))
    before, after = balanced_assignment(scores), balanced_assignment(scores * 2.0**power)
    assert after.objective == pytest.approx(before.objective * 2.0**power, rel=1e-12)


@pytest.mark.parametrize("power", [-1060, -300, -140, 120, 1000, 1022])
def test_extreme_magnitudes_are_solved_exactly(power: int) -> None:
    scores = torch.ldexp(
        torch.randint(-4, 4, (50, 5), generator=torch.Generator().manual_seed(0)).double(), torch.tensor(power)
    )
    expected = balanced_assignment(torch.ldexp(scores, torch.tensor(-power)), solver="oracle").objective
    ours = balanced_assignment(scores)
    assert_balanced(ours.expert, 5)
    assert float(torch.ldexp(scores, torch.tensor(-power)).gather(1, ours.expert[:, None]).sum()) == expected


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("solver", SOLVERS)
def test_every_float_dtype(dtype: torch.dtype, solver: str) -> None:
    scores = example().to(dtype)
    ours = balanced_assignment(scores, solver=solver)
    assert ours.expert.dtype == torch.int64
    assert ours.prices.dtype == torch.float64
    assert ours.objective == pytest.approx(float(scores.double().gather(1, ours.expert[:, None]).sum()), rel=1e-12)


@pytest.mark.parametrize("solver", SOLVERS)
def test_strides_do_not_matter(solver: str) -> None:
    scores = example()
    expected = balanced_assignment(scores, solver=solver)
    wide = torch.zeros(600, 24)
    wide[:, ::2] = scores
    for same in (
        scores.t().contiguous().t(),
        wide[:, ::2],
        scores.flip(0).flip(0),
        scores[:, None].expand(-1, 1, -1)[:, 0],
    ):
        assert torch.equal(balanced_assignment(same, solver=solver).expert, expected.expert)


def test_the_input_is_not_changed_and_gets_no_gradient() -> None:
    scores = example().requires_grad_()
    before = scores.detach().clone()
    ours = balanced_assignment(scores)
    assert not ours.prices.requires_grad
    assert torch.equal(scores.detach(), before)


@pytest.mark.parametrize("k", [1, pytest.param(2, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("kind", EXAMPLES)
def test_the_number_of_threads_changes_nothing(kind: str, k: int) -> None:
    scores = EXAMPLES[kind](2**15, 80, torch.Generator().manual_seed(3))  # large enough for several threads
    assert scores.numel() >= PARALLEL
    threads = torch.get_num_threads()
    answers = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            answers.append(balanced_assignment(scores, k=k))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a.expert, answers[0].expert) for a in answers)
    assert all(torch.equal(a.prices, answers[0].prices) for a in answers)


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_same_input_gives_the_same_answer(solver: str) -> None:
    assert torch.equal(
        balanced_assignment(example(), solver=solver).expert, balanced_assignment(example(), solver=solver).expert
    )


def test_prices_passed_back_give_the_same_optimum() -> None:
    first = balanced_assignment(example())
    again = balanced_assignment(example(), prices=first.prices, certificate=True)
    assert again.objective == pytest.approx(first.objective, rel=1e-12)
    assert abs(again.gap or 0.0) <= 1e-9 * scale_of(example())


@pytest.mark.parametrize("solver", APPROXIMATE)
@pytest.mark.parametrize("seed", range(4))
def test_approximate_solvers_are_balanced_and_not_above_the_optimum(solver: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(50):
        T, E = int(rng.integers(0, 50)), int(rng.integers(1, 10))
        scores = random_scores(rng, T, E)
        approximate = balanced_assignment(scores, solver=solver, certificate=True)
        assert_balanced(approximate.expert, E)
        assert approximate.objective <= balanced_assignment(scores).objective + 1e-9 * scale_of(scores)
        assert approximate.gap is not None
        assert approximate.gap >= -1e-9 * scale_of(scores)


@pytest.mark.parametrize("solver", APPROXIMATE)
def test_approximate_solvers_gain_most_of_what_there_is(solver: str) -> None:
    scores = EXAMPLES["correlated centroids"](2048, 16, torch.Generator().manual_seed(0))
    random = float(scores.double().mean(1).sum())  # expectation of a random balanced assignment
    gain = (balanced_assignment(scores, solver=solver).objective - random) / (
        balanced_assignment(scores).objective - random
    )
    assert gain > 0.9


def test_a_capped_auction_is_still_balanced() -> None:
    ours = balanced_assignment(example(), solver="auction", max_rounds=1)
    assert_balanced(ours.expert, 12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"solver": "hungarian"}, "solver: 'hungarian' is not one of transport"),
        ({"k": 0}, "k: between 1 and the number of experts, 12"),
        ({"k": 13}, "k: between 1 and the number of experts, 12"),
        ({"k": 2, "solver": "auction"}, "k: solver 'auction' assigns one expert per token"),
        ({"capacities": [50] * 11}, r"capacities: one per expert is needed, shape \(12,\)"),
        ({"capacities": [51] * 12}, "capacities: they sum to 612, but T \\* k = 600"),
        ({"capacities": [-1, 101] + [50] * 10}, "capacities: expert 0 has -1"),
        ({"capacities": [49.5, 50.5] + [50] * 10}, "capacities: whole numbers"),
        ({"prices": torch.zeros(3)}, r"prices: shape \(12,\) is needed"),
        ({"prices": torch.full((12,), torch.nan)}, "prices: finite numbers"),
    ],
)
def test_a_wrong_argument_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        balanced_assignment(example(), **change)


@pytest.mark.parametrize("solver", SOLVERS)
def test_plus_infinity_is_an_error_that_names_the_row(solver: str) -> None:
    scores = example()
    scores[5, 3] = torch.inf
    with pytest.raises(ValueError, match=r"\+inf in row 5 \(token 5, expert 3\)"):
        balanced_assignment(scores, solver=solver)


def test_a_token_with_nowhere_to_go_is_named() -> None:
    scores = example()
    scores[17] = -torch.inf
    with pytest.raises(ValueError, match="token 17"):
        balanced_assignment(scores)


def test_a_token_whose_only_experts_are_closed_is_named() -> None:
    scores = example()
    scores[41, 2:] = -torch.inf
    with pytest.raises(ValueError, match="token 41"):
        balanced_assignment(scores, capacities=[0, 0] + [60] * 10)


@pytest.mark.parametrize("T", [64, 2000])
def test_forbidden_pairs_at_size_leave_the_certificate_closed(T: int) -> None:
    scores = example(T, 16)
    scores[torch.rand(T, 16, generator=torch.Generator().manual_seed(1)) < 0.5] = -torch.inf
    ours = balanced_assignment(scores, certificate=True)
    assert_balanced(ours.expert, 16)
    assert abs(ours.gap or 0.0) <= 1e-9 * scale_of(scores)


def test_forbidden_pairs_without_an_assignment_are_an_error_at_size() -> None:
    scores = example(2000, 16)
    scores[:1000, 2:] = -torch.inf  # a thousand tokens may only use two experts with room for 125 each
    with pytest.raises(ValueError, match="leave no assignment"):
        balanced_assignment(scores)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("solver", SOLVERS)
def test_scores_on_a_gpu_give_an_answer_there(solver: str) -> None:
    scores = example().cuda()
    ours = balanced_assignment(scores, solver=solver, certificate=True)
    assert ours.expert.device == ours.prices.device == scores.device
    if solver == "transport":
        assert torch.equal(ours.expert.cpu(), balanced_assignment(example()).expert)


def test_closed_experts_get_no_token_and_a_price_that_keeps_everyone_away() -> None:
    ours = balanced_assignment(example(), capacities=[0, 100, 0] + [50] * 8 + [100], certificate=True)
    assert torch.bincount(ours.expert, minlength=12).tolist() == [0, 100, 0] + [50] * 8 + [100]
    assert abs(ours.gap or 0.0) <= 1e-9 * scale_of(example())
    worth = example().double() - ours.prices
    assert (worth.amax(1) - worth.gather(1, ours.expert[:, None])[:, 0]).max() < 1e-9


def test_nothing_of_the_size_of_tokens_squared_is_made() -> None:
    # 32768 x 8 scores are 1 MiB; a T x T matrix, even of bytes, would be 1 GiB. 400 MiB are allowed beyond imports.
    program = """
import resource, torch
from lightning_base.assignment import balanced_assignment
scores = torch.randint(0, 3, (32768, 8)).float()
for solver in ("transport", "auction", "sinkhorn"):
    balanced_assignment(scores[:64], solver=solver)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 400 * 2**20, resource.RLIM_INFINITY))
for solver in ("transport", "auction", "sinkhorn"):
    answer = balanced_assignment(scores, solver=solver)
    assert torch.bincount(answer.expert).tolist() == [4096] * 8, solver
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


def test_importing_the_package_loads_neither_lightning_nor_hydra_nor_numba() -> None:
    program = "import sys, lightning_base.assignment as a; print({m.split('.')[0] for m in sys.modules})"
    loaded = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout
    assert "torch" in loaded
    for name in ("lightning'", "pytorch_lightning", "hydra", "numba"):
        assert name not in loaded


@pytest.mark.exhaustive
def test_a_kernel_that_is_not_in_the_cache_is_announced_and_one_that_is_not(tmp_path: Path) -> None:
    program = """
from lightning_base.assignment.kernel import kernel

@kernel
def one_more(number):
    return number + 1

assert one_more(1) == 2
"""
    (tmp_path / "program.py").write_text(program)
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    said = [
        subprocess.run(
            [sys.executable, tmp_path / "program.py"], env=environment, check=True, capture_output=True, text=True
        ).stderr
        for _ in range(2)
    ]
    assert said[0].count("compiling the exact solver, once per machine") == 1
    assert said[1] == ""


@pytest.mark.exhaustive
def test_the_first_call_on_a_machine_says_that_it_compiles_and_later_ones_are_silent(tmp_path: Path) -> None:
    program = "import torch; from lightning_base.assignment import balanced_assignment as b; b(torch.zeros(2, 2))"
    said = [
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)},
            check=True,
            capture_output=True,
            text=True,
        ).stderr
        for _ in range(2)
    ]
    assert said[0].count("compiling the exact solver, once per machine") == 1
    assert said[1] == ""


def test_kernels_work_without_a_place_for_their_machine_code(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from lightning_base.assignment import kernel

    def nowhere(function: Any) -> None:
        raise RuntimeError("cannot cache function: no locator available")

    monkeypatch.setattr(kernel, "_PackageCache", nowhere)
    assert kernel.kernel(_next)(1) == 2
    assert "in this process only" in caplog.text


def _next(number: int) -> int:
    return number + 1
