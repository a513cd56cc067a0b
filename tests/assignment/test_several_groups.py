"""Several groups of tokens at once: the answers of one after another, on any number of threads, in any process."""

import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

from lightning_base.assignment import balanced_assignment, balanced_assignments, solve
from lightning_base.assignment.examples import EXAMPLES
from lightning_base.assignment.pool import thread_pool


@pytest.fixture(autouse=True)
def three_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(solve, "WORTH_THREADS", 0)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def groups(kind: str) -> list[torch.Tensor]:
    sizes = (300, 1, 1024, 0, 777, 300, 2048)
    return list(EXAMPLES[kind](sum(sizes), 24, torch.Generator().manual_seed(0)).split(sizes))


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("kind", EXAMPLES)
def test_groups_at_once_are_solved_as_one_after_another(kind: str, k: int) -> None:
    prices = balanced_assignment(groups(kind)[4]).prices
    expected = [balanced_assignment(group, prices=prices, k=k) for group in groups(kind)]
    for _ in range(3):
        found = balanced_assignments(groups(kind), prices=prices, k=k)
        for ours, one in zip(found, expected, strict=True):
            assert torch.equal(ours.expert, one.expert)
            assert torch.equal(ours.prices, one.prices)
            assert ours.objective == one.objective


def test_groups_are_solved_on_several_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_base.assignment import transport

    asked = []
    real = transport.solve_transport
    monkeypatch.setattr(transport, "solve_transport", lambda *a, **named: asked.append(named) or real(*a, **named))
    balanced_assignments(groups("common mean"))
    assert asked == [{"threads": 1}] * 6  # all but the empty one, and no pass of theirs asks for more threads
    asked.clear()
    torch.set_num_threads(1)
    balanced_assignments(groups("common mean"))
    assert asked == [{}] * 6


@pytest.mark.parametrize("solver", ["auction", "sinkhorn", "oracle", "greedy"])
def test_the_other_solvers_take_groups_too(solver: str) -> None:
    small = [group[:40] for group in groups("common mean")]
    found = balanced_assignments(small, solver=solver)
    expected = [balanced_assignment(group, solver=solver) for group in small]
    assert all(torch.equal(ours.expert, one.expert) for ours, one in zip(found, expected, strict=True))


def test_groups_whose_samples_are_worth_threads_too_do_not_wait_for_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    # Work in the pool that waited for work in the same pool would wait for ever.
    from lightning_base.assignment import choice

    monkeypatch.setattr(choice, "PARALLEL", 1)
    found = balanced_assignments(groups("Zipf clusters"))
    monkeypatch.undo()
    for ours, group in zip(found, groups("Zipf clusters"), strict=True):
        assert torch.equal(ours.expert, balanced_assignment(group).expert)


def test_no_groups_give_no_answers() -> None:
    assert balanced_assignments([]) == []


def test_a_group_that_has_no_assignment_is_an_error() -> None:
    scores = torch.zeros(20, 3)
    scores[:, 1:] = -torch.inf
    with pytest.raises(ValueError, match="leave no assignment"):
        balanced_assignments([torch.zeros(20, 3), scores])


def test_threads_are_kept_between_calls() -> None:
    balanced_assignments(groups("common mean"))
    before = thread_pool(3)
    balanced_assignments(groups("common mean"))
    assert thread_pool(3) is before


def test_a_forked_child_makes_its_own_threads_and_both_processes_end() -> None:
    program = """
import os, sys, torch
from lightning_base.assignment import balanced_assignments, solve
solve.WORTH_THREADS = 0
torch.set_num_threads(2)
groups = [torch.randn(400, 8, generator=torch.Generator().manual_seed(i)) for i in range(4)]
before = balanced_assignments(groups)
child = os.fork()
after = balanced_assignments(groups)
assert all(torch.equal(a.expert, b.expert) for a, b in zip(before, after))
if child:
    assert os.waitpid(child, 0)[1] == 0
"""
    # Forking a process with threads is warned of from Python 3.12 on; this solver's do not mind.
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", program]
    subprocess.run(command, check=True, timeout=60)
