"""The public function: checks the scores, calls one solver, measures its answer.

Shape suffixes: T tokens, E experts, K experts per token.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float64, Int64
from numpy.typing import NDArray
from torch import Tensor

from lightning_base.assignment.pool import thread_pool
from lightning_base.assignment.problem import Loads, dual_bound, even_loads, given_loads

WORTH_THREADS = 2**16  # scores of a group, from which on it is quicker to solve several at once


class Assignment(NamedTuple):
    """An expert for every token, and what is known about how good that is."""

    expert: Int64[Tensor, "T"] | Int64[Tensor, "T k"]
    """[T], or [T, k] when k > 1, on the device of the scores."""
    prices: Float64[Tensor, "E"]
    """The dual solution, mean 0 over the experts: a warm start for the next call."""
    objective: float
    """Sum of the scores of the chosen pairs, in double precision."""
    gap: float | None
    """Dual bound minus objective: 0 up to rounding if optimal. None unless asked for."""


class Answer(NamedTuple):
    """What a solver returns: experts [T, k] and prices [E] (None where it has none)."""

    expert: Tensor
    prices: Tensor | None


def _transport(scores_TE: Tensor, loads: Loads, start_E: Tensor | None, **options: Any) -> Answer:
    from lightning_base.assignment.transport import solve_transport  # Numba takes a second to import

    start = None if start_E is None else start_E.cpu().numpy()
    expert, prices = solve_transport(scores_TE.cpu().contiguous().numpy(), loads, start, **options)
    return Answer(torch.from_numpy(expert), torch.from_numpy(prices))


def _oracle(scores_TE: Tensor, loads: Loads, start_E: Tensor | None) -> Answer:
    from lightning_base.assignment.oracle import solve_oracle

    return Answer(torch.from_numpy(solve_oracle(scores_TE.double().cpu().numpy(), loads))[:, None], None)


def _auction(scores_TE: Tensor, loads: Loads, start_E: Tensor | None, **options: Any) -> Answer:
    from lightning_base.assignment.auction import solve_auction

    expert, prices = solve_auction(scores_TE, loads, **options)
    return _permitted(Answer(expert[:, None], prices), scores_TE, loads)


def _sinkhorn(scores_TE: Tensor, loads: Loads, start_E: Tensor | None, **options: Any) -> Answer:
    from lightning_base.assignment.sinkhorn import solve_sinkhorn

    expert, prices = solve_sinkhorn(scores_TE, loads, start_E, **options)
    return _permitted(Answer(expert[:, None], prices), scores_TE, loads)


def _permitted(answer: Answer, scores_TE: Tensor, loads: Loads) -> Answer:
    """An approximate answer, or the exact one where the approximation chose a forbidden pair."""
    if bool(scores_TE.gather(1, answer.expert).isfinite().all()):
        return answer
    return _transport(scores_TE, loads, None)


def _greedy(scores_TE: Tensor, loads: Loads, start_E: Tensor | None) -> Answer:
    return Answer(scores_TE.topk(loads.k, dim=1).indices, None)


SOLVERS: Mapping[str, Callable[..., Answer]] = {
    "transport": _transport,
    "auction": _auction,
    "sinkhorn": _sinkhorn,
    "oracle": _oracle,
    "greedy": _greedy,
}


def balanced_assignment(
    scores: Float[Tensor, "T E"],
    *,
    solver: str = "transport",
    capacities: Sequence[int | float] | NDArray[np.number] | Tensor | None = None,
    prices: Tensor | None = None,
    k: int = 1,
    certificate: bool = False,
    **options: Any,
) -> Assignment:
    """Assign every token to k distinct experts so that the sum of scores is largest and the loads are balanced.

    Args:
        scores: [T, E], any float dtype, device and strides; -inf forbids a pair. No gradient flows.
        solver: one of `SOLVERS`.
        capacities: [E] tokens for each expert, summing to T k. Default: floor or ceil of T k / E, where the experts
            that get the ceil are part of the optimum.
        prices: [E] prices of an earlier call on similar scores: a warm start, never a change of the optimum.
        k: experts per token.
        certificate: also compute the duality gap (one more pass over the scores).
        options: passed on to the solver.

    Raises:
        ValueError: unknown solver; k outside 1..E; capacities that do not fit; NaN or +inf in the scores (the row is
            named); forbidden pairs that leave no assignment; k > 1 with a solver that has none.
    """
    problem = _checked(scores, solver, capacities, prices, k)
    return _measured(problem, _solved(problem, options), certificate)


def balanced_assignments(
    groups: Sequence[Float[Tensor, "_ E"]],
    *,
    solver: str = "transport",
    prices: Tensor | None = None,
    k: int = 1,
    **options: Any,
) -> list[Assignment]:
    """`balanced_assignment` of each group of tokens by itself, all from the same prices.

    Groups that are large enough are solved on several threads at once, at most as many as torch uses. They do not
    depend on each other, so that the answers are those of one after another.
    """
    problems = [_checked(group, solver, None, prices, k) for group in groups]
    threads = min(torch.get_num_threads(), len(problems))
    if threads > 1 and solver == "transport" and sum(p.work.numel() for p in problems) >= WORTH_THREADS * len(problems):
        # All that torch does stays in this thread: in others, it would start threads of its own for each.
        answers = list(thread_pool(threads).map(lambda problem: _solved(problem, {"threads": 1, **options}), problems))
    else:
        answers = [_solved(problem, options) for problem in problems]
    return [_measured(problem, answer) for problem, answer in zip(problems, answers, strict=True)]


class _Problem(NamedTuple):
    """Scores that are known to be good, as they came and as they are worked on, and what is asked."""

    scores: Tensor  # [T, E]
    work: Tensor  # [T, E], the same times two to the minus `exponent`, float32 or float64
    exponent: int
    loads: Loads
    solver: str
    prices: Tensor | None  # [E], scaled like `work`
    is_open: Tensor | None  # [E], which experts take tokens at all; None if all do


def _checked(
    scores: Tensor,
    solver: str,
    capacities: Sequence[int | float] | NDArray[np.number] | Tensor | None,
    prices: Tensor | None,
    k: int,
) -> _Problem:
    if solver not in SOLVERS:
        raise ValueError(f"solver: {solver!r} is not one of {', '.join(SOLVERS)}")
    T, E = scores.shape
    if E == 0:
        raise ValueError("scores: at least one expert is needed, got shape " + str(tuple(scores.shape)))
    if not 1 <= k <= E:
        raise ValueError(f"k: between 1 and the number of experts, {E}, is needed, got {k}")
    if k > 1 and solver not in ("transport", "greedy"):
        raise ValueError(f"k: solver {solver!r} assigns one expert per token, got k = {k}; use 'transport'")
    loads = even_loads(T, E, k) if capacities is None else given_loads(capacities, T, E, k)
    scores = scores.detach()
    work = scores if scores.dtype in (torch.float32, torch.float64) else scores.float()  # exact, and quicker to read
    if solver == "transport":
        # Before anything is read, for each of which the host would wait on a GPU.
        work, prices = work.cpu().contiguous(), None if prices is None else prices.cpu()
    exponent, lowest = _checked_magnitude(work)
    if exponent != 0:
        work = _times_two_to_the(-exponent, work.double())
    open_E = None if int(loads.largest.min()) > 0 else torch.from_numpy(loads.largest > 0).to(work.device)
    if solver != "greedy" and (open_E is not None or lowest == -math.inf):
        _check_open_pairs(work, open_E, k)
    if prices is not None:
        prices = _times_two_to_the(-exponent, _checked_prices(prices, E))
    return _Problem(scores, work, exponent, loads, solver, prices, open_E)


def _solved(problem: _Problem, options: dict[str, Any]) -> Answer:
    solve = SOLVERS[problem.solver]
    if len(problem.work) == 0:
        return Answer(torch.empty(0, problem.loads.k, dtype=torch.int64), None)
    if problem.solver == "greedy" or problem.is_open is None:
        return solve(problem.work, problem.loads, problem.prices, **options)
    return _without_closed(solve, problem.work, problem.loads, problem.prices, problem.is_open, options)


def _measured(problem: _Problem, answer: Answer, certificate: bool = False) -> Assignment:
    scores, loads = problem.scores, problem.loads
    T, E = scores.shape
    expert = answer.expert.to(scores.device)
    found = torch.zeros(E, dtype=torch.float64) if answer.prices is None else answer.prices.to("cpu", torch.float64)
    found = _times_two_to_the(problem.exponent, found - found.mean()).to(scores.device)
    objective = float(scores.gather(1, expert).sum(dtype=torch.float64)) if T else 0.0
    gap = dual_bound(scores, found, loads) - objective if certificate else None
    return Assignment(expert if loads.k > 1 else expert[:, 0], found, objective, gap)


def _times_two_to_the(exponent: int, tensor: Tensor) -> Tensor:
    return tensor if exponent == 0 else torch.ldexp(tensor, torch.tensor(exponent))


def _checked_magnitude(scores_TE: Tensor) -> tuple[int, float]:
    """0 if the largest score has an ordinary magnitude, otherwise the power of two that brings it to one; the minimum.

    Scaling by a power of two is exact, and then no sum or difference can overflow. NaN and +inf are errors that name
    the first row; everything else is a score or a forbidden pair.
    """
    if scores_TE.numel() == 0:
        return 0, 0.0
    # One after the other, since both at once take longer. On the CPU by numpy, which starts no threads for so little:
    # on busy cores torch would wait for its own longer than all else takes.
    values: Any = scores_TE.numpy() if scores_TE.device.type == "cpu" else scores_TE
    low, high = float(values.min()), float(values.max())
    if math.isnan(high) or high == math.inf:
        name = "NaN" if math.isnan(high) else "+inf"
        bad = scores_TE.isnan() if math.isnan(high) else scores_TE == math.inf
        row, expert = bad.nonzero()[0].tolist()
        raise ValueError(
            f"scores: {name} in row {row} (token {row}, expert {expert}); finite scores or -inf are needed"
        )
    magnitude = max(abs(low), abs(high))
    if low == -math.inf:
        magnitude = float(scores_TE.abs().where(scores_TE.isfinite(), 0.0).amax())
    return 0 if magnitude == 0 or 2.0**-60 < magnitude < 2.0**60 else math.frexp(magnitude)[1], low


def _check_open_pairs(scores_TE: Tensor, open_E: Tensor | None, k: int) -> None:
    """Every token needs k open experts that are not forbidden to it; the first that has fewer is named."""
    open_TE = scores_TE > -math.inf
    few = (open_TE if open_E is None else open_TE & open_E).sum(1) < k
    if bool(few.any()):
        token = int(few.nonzero()[0])
        raise ValueError(
            f"scores: token {token} has fewer than k = {k} experts that are neither forbidden (-inf) nor of capacity 0"
        )


def _checked_prices(prices_E: Tensor, num_experts: int) -> Tensor:
    if prices_E.shape != (num_experts,):
        raise ValueError(f"prices: shape ({num_experts},) is needed, got {tuple(prices_E.shape)}")
    if not bool(prices_E.isfinite().all()):
        raise ValueError("prices: finite numbers are needed, got " + str(prices_E.tolist()))
    return prices_E.detach().double()


def _without_closed(
    solve: Callable[..., Answer],
    scores_TE: Tensor,
    loads: Loads,
    start_E: Tensor | None,
    open_E: Tensor,
    options: dict[str, Any],
) -> Answer:
    """Solve without the experts of capacity 0, then price them so high that no token wants them."""
    index = open_E.nonzero()[:, 0]
    inner = Loads(loads.base[index.cpu().numpy()], loads.bonus, loads.k)
    answer = solve(scores_TE[:, index], inner, None if start_E is None else start_E.to(index.device)[index], **options)
    prices = torch.zeros(len(index), dtype=torch.float64) if answer.prices is None else answer.prices.cpu()
    rows = scores_TE.double().cpu()
    worst_T = (rows[:, index.cpu()] - prices).topk(loads.k, dim=1).values[:, -1]
    full = (rows - worst_T[:, None]).amax(0).nan_to_num(neginf=0.0)  # forbidden to every token: any price will do
    full[index.cpu()] = prices
    return Answer(index.to(answer.expert.device)[answer.expert], full)
