"""The exact solver: balanced assignment as a transportation problem with one price per expert.

Legend: T tokens, E experts, K experts per token.
"""

import numpy as np
from numpy.typing import NDArray

from lightning_base.assignment.choice import Choice
from lightning_base.assignment.passes import typical_margin
from lightning_base.assignment.prices import newton_step
from lightning_base.assignment.problem import Loads
from lightning_base.assignment.residual import BALANCED
from lightning_base.assignment.restricted import NO_EXPERT, assign_movable, choose_movable, free_unhappy

Floats = NDArray[np.floating]
F64 = NDArray[np.float64]
I64 = NDArray[np.int64]

SAMPLE = 8  # one token in so many prices the experts for all
SMALL = 2**11  # up to so many scores, shortest paths alone are quickest
NEWTON = ((1.0, 8), (0.5, 4), (0.25, 1))  # smoothing of each step in typical margins; one token in so many smoothed
FINER = ((0.125, 1), (0.0625, 1))  # further steps, as long as one leaves less than `GAIN` of the tokens too many
GAIN = 0.9
ALL = 64  # all tokens may move where one in so many is too many
MORE = 32  # how many tokens may move for each that is one too many
ROUNDS = 4
KEY = {4: np.int32, 8: np.int64}  # equal rows have equal margins, and few others do


def solve_transport(
    scores_TE: Floats, loads: Loads, start_E: F64 | None, *, threads: int | None = None
) -> tuple[I64, F64]:
    """Exact assignment [T, k] and prices [E] of C-contiguous scores without NaN or +inf, every capacity at least one.

    1. Prices: those given, or those of a sample of the tokens, found the same way; then Newton steps on all tokens.
    2. Every token to its best experts at these prices. Those with a small margin may still move; the others are held.
    3. Successive shortest paths among those who may move.
    4. If some held token would now rather be elsewhere, it may move too, and 2 and 3 are repeated at the new prices.

    Bound: the samples have log_8 T levels; each has at most `len(NEWTON + FINER)` steps; 2 to 4 are done at most
    `ROUNDS` times, the last time with every token free to move, when there is nothing left to check.

    Raises ValueError if the forbidden pairs (-inf) leave no assignment.
    """
    choice = Choice(scores_TE, loads.k, threads)
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
        choice.at(np.zeros(E))
        return np.zeros(E)
    some_TE = np.ascontiguousarray(choice.scores_TE[::SAMPLE])
    sample = Choice(some_TE, loads.k, choice.threads)
    sample_loads = _share(loads, len(sample.scores_TE), T)
    prices = _price_by_sample(sample, sample_loads)
    _, prices, _ = _shortest_paths(sample, sample_loads, prices, np.ones(len(sample.scores_TE), bool))
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
    scale = typical_margin(choice.margin_T)
    found, excess = prices, choice.excess(loads)
    before = excess
    least = excess
    for factor, every in (*(NEWTON[1:] if warm else NEWTON), *FINER):
        if scale == 0.0 or excess <= max(E // 2, T // 100):
            break
        if (factor, every) in FINER and not T // 32 < excess < GAIN * before:
            break
        prices = prices.copy()
        newton_step(
            choice.scores_TE, choice.chosen_TK[:, 0], choice.margin_T, choice.load_E, loads.target, scale * factor,
            every if T >= 16 * E else 1, prices,
        )  # fmt: skip
        choice.at(prices)
        before, excess = excess, choice.excess(loads)
        if excess <= least:
            found, least = prices, excess
    if found is not prices:
        choice.at(found)
    return found


def _assign(choice: Choice, loads: Loads, prices: F64) -> tuple[I64, F64, bool]:
    """Optimal assignment and prices, starting at prices where `choice` already stands; steps 2 to 4."""
    T, E = choice.scores_TE.shape
    # Prices have far to go where ties leave whole groups of tokens in the wrong place or tokens in tight clusters are
    # nearly tied: some that were held would want to leave, and each round costs as much as the first.
    excess = choice.excess(loads)
    wanted = T if excess > T // ALL else max(T // 4, 4 * E, MORE * excess)
    may_move = np.zeros(T, bool)
    for round_ in range(ROUNDS):
        if round_ == ROUNDS - 1 or wanted >= T or T * E <= SMALL:
            return _shortest_paths(choice, loads, prices, np.ones(T, bool))
        threshold = float(np.partition(choice.margin_T, wanted)[wanted])
        choose_movable(
            choice.chosen_TK, choice.margin_T, max(threshold, choice.rounding), choice.load_E, loads.largest, may_move
        )
        expert, new_prices, balanced = _shortest_paths(choice, loads, prices, may_move)
        if not balanced:
            wanted *= 4
            continue
        if not free_unhappy(choice.scores_TE, expert, choice.margin_T, choice.rounding, prices, new_prices, may_move):
            return expert, new_prices, True
        prices = new_prices
        choice.at(prices)
    raise AssertionError("the last round frees every token")


def _shortest_paths(choice: Choice, loads: Loads, prices: F64, may_move: NDArray[np.bool_]) -> tuple[I64, F64, bool]:
    """Optimal assignment when only some tokens may move and all others keep their choice, and whether there is one."""
    extended = np.append(prices, 0.0)
    expert = np.empty(choice.chosen_TK.shape, np.int64)
    status, token = assign_movable(
        choice.scores_TE, choice.chosen_TK, choice.margin_T, choice.margin_T.view(KEY[choice.margin_T.itemsize]),
        choice.rounding, may_move, loads.base.copy(), loads.bonus, extended, expert,
    )  # fmt: skip
    if status == NO_EXPERT:
        raise ValueError(f"scores: token {token} has fewer than k = {loads.k} experts that are not forbidden (-inf)")
    return expert, extended[:-1], status == BALANCED
