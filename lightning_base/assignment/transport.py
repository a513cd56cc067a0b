"""The exact solver: balanced assignment as a transportation problem with one price per expert.

Legend: T tokens, E experts, K experts per token.
"""

import numpy as np
from numpy.typing import NDArray

from lightning_base.assignment.choice import Choice
from lightning_base.assignment.passes import place_rows
from lightning_base.assignment.prices import newton_step
from lightning_base.assignment.problem import Loads
from lightning_base.assignment.residual import BALANCED, rebalance

Floats = NDArray[np.floating]
F64 = NDArray[np.float64]
I64 = NDArray[np.int64]

SAMPLE = 8  # every eighth token prices the experts for all
SMALL = 2**12  # up to so many scores, shortest paths alone are quickest
NEWTON = (1.0, 0.5, 0.25)  # smoothing of the Newton steps, in mean margins
ROUNDS = 4


def solve_transport(scores_TE: Floats, loads: Loads, start_E: F64 | None) -> tuple[I64, F64]:
    """Exact assignment [T, k] and prices [E] of C-contiguous scores without NaN or +inf, every capacity at least one.

    1. Prices: those given, or those of every eighth token, found the same way; then a few Newton steps on all tokens.
    2. Every token to its best experts at these prices. Those with a small margin may still move; the others are held.
    3. Successive shortest paths among those who may move.
    4. If some held token would now rather be elsewhere, it may move too, and 2 and 3 are repeated at the new prices.

    Bound: the samples have log_8 T levels; each has at most `len(NEWTON)` steps; 2 to 4 are done at most `ROUNDS`
    times, the last time with every token free to move, when there is nothing left to check.

    Raises ValueError if the forbidden pairs (-inf) leave no assignment.
    """
    choice = Choice(scores_TE, loads.k)
    cold = start_E is None
    prices = _price_by_sample(choice, loads) if cold else _newton(choice, loads, np.array(start_E), warm=True)
    expert, prices, balanced = _assign(choice, loads, prices)
    if not balanced:
        raise ValueError("scores: the forbidden pairs (-inf) leave no assignment with these loads")
    return expert, prices


def _price_by_sample(choice: Choice, loads: Loads) -> F64:
    """Prices from nothing: exact on a sample, whose own prices come from a smaller sample, then Newton on all."""
    T, E = choice.scores_TE.shape
    if T * E <= SMALL:
        return np.zeros(E)
    sample = Choice(np.ascontiguousarray(choice.scores_TE[::SAMPLE]), loads.k)
    sample_loads = _share(loads, len(sample.scores_TE), T)
    prices = _price_by_sample(sample, sample_loads)
    everyone = np.arange(len(sample.scores_TE))
    sample.at(prices)
    _, prices, _ = _shortest_paths(sample, sample_loads, prices, everyone)
    return _newton(choice, loads, prices, warm=False)


def _share(loads: Loads, num_sampled: int, num_tokens: int) -> Loads:
    """The same shares for a sample of the tokens, rounded to whole tokens by largest remainder."""
    exact = loads.target * (num_sampled / num_tokens)
    base = np.floor(exact + 1e-9).astype(np.int64)
    short = num_sampled * loads.k - int(base.sum())
    base[np.argsort(base - exact, kind="stable")[:short]] += 1
    return Loads(base, 0, loads.k)


def _newton(choice: Choice, loads: Loads, prices: F64, warm: bool) -> F64:
    """Smoothed Newton steps with shrinking smoothing, until what is left is cheaper to do by shortest paths."""
    T, E = choice.scores_TE.shape
    choice.at(prices)
    if loads.k > 1 or T * E <= SMALL:
        return prices
    finite = np.isfinite(choice.margin_T)
    scale = float(choice.margin_T.mean(where=finite, dtype=np.float64)) if finite.any() else 0.0
    for factor in NEWTON[1:] if warm else NEWTON:
        if scale == 0.0 or 2 * choice.excess(loads) <= E:
            break
        newton_step(choice.scores_TE, choice.chosen_TK[:, 0], choice.margin_T, loads.target, scale * factor, prices)
        choice.at(prices)
    return prices


def _assign(choice: Choice, loads: Loads, prices: F64) -> tuple[I64, F64, bool]:
    """Optimal assignment and prices, starting at prices where `choice` already stands; steps 2 to 4."""
    T, E = choice.scores_TE.shape
    # Where ties leave whole groups of tokens in the wrong place, prices have far to go and holding any is in vain.
    wanted = T if choice.excess(loads) > T // 16 else max(T // 4, 4 * E)
    may_move = np.zeros(T, bool)
    for round_ in range(ROUNDS):
        if round_ == ROUNDS - 1 or wanted >= T or T * E <= SMALL:
            return _shortest_paths(choice, loads, prices, np.arange(T))
        threshold = np.partition(choice.margin_T, wanted)[wanted]
        may_move |= choice.margin_T <= max(threshold, choice.rounding(prices))
        expert, new_prices, balanced = _shortest_paths(choice, loads, prices, np.flatnonzero(may_move))
        if not balanced:
            wanted *= 4
            continue
        wrong = _unhappy(choice, expert, ~may_move, prices, new_prices)
        if len(wrong) == 0:
            return expert, new_prices, True
        may_move[wrong] = True
        prices = new_prices
        choice.at(prices)
    raise AssertionError("the last round frees every token")


def _unhappy(choice: Choice, expert_TK: I64, held_T: NDArray[np.bool_], before: F64, after: F64) -> I64:
    """Held tokens whose experts are no longer their best at the new prices, in double precision."""
    change = after - before
    # A margin shrinks by at most the rise of the token's own dearest expert less the least rise of any other.
    shrink = change[expert_TK].max(1) - change.min() + choice.rounding(after)
    unsure = np.flatnonzero(held_T & (choice.margin_T <= shrink))
    rows = choice.scores_TE[unsure].astype(np.float64) - after
    own = np.take_along_axis(rows, expert_TK[unsure], 1).min(1)
    np.put_along_axis(rows, expert_TK[unsure], -np.inf, 1)
    return unsure[own < rows.max(1, initial=-np.inf)]


def _shortest_paths(choice: Choice, loads: Loads, prices: F64, index: I64) -> tuple[I64, F64, bool]:
    """Exact assignment when only the tokens in `index` may move and all others keep their choice."""
    scores_TE, k = choice.scores_TE, loads.k
    T, E = scores_TE.shape
    bonus = np.zeros(E, np.int64)
    extended = np.append(prices, 0.0)
    if loads.bonus:
        order = np.argsort(-prices, kind="stable")
        bonus[order[: loads.bonus]] = 1
        extended[E] = prices[order[loads.bonus - 1]]
    expert = choice.chosen_TK.astype(np.int64)
    free = loads.base + bonus
    if len(index) < T:
        held = np.ones(T, bool)
        held[index] = False
        free -= np.bincount(expert[held].ravel(), minlength=E)
    rows_NE = scores_TE.copy() if len(index) == T else scores_TE[index]
    value = np.empty(len(index) * k)
    place = np.empty(len(index) * k, np.int64)
    slack = 2.0**-46 * float(np.abs(prices).max())
    sure = choice.margin_T[index] > max(choice.rounding(prices), slack)
    bad = place_rows(rows_NE, extended, k, slack, expert[index], sure, free, value, place)
    if bad >= 0:
        raise ValueError(f"scores: token {index[bad]} has fewer than k = {k} experts that are not forbidden (-inf)")
    status, _ = rebalance(rows_NE, value, place, k, -free, bonus, loads.bonus, extended)
    expert[index] = place.reshape(-1, k)
    return expert, extended[:E], status == BALANCED
