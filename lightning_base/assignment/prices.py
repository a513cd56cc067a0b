"""One damped Newton step on the smoothed dual: prices that nearly balance the loads.

Legend: T tokens, E experts.
"""

from typing import Any

import numpy as np
from numba.cpython.unsafe.numbers import trailing_zeros
from numpy.typing import NDArray

from lightning_base.assignment.kernel import kernel

F64 = NDArray[np.float64]


lowest_bit: Any = trailing_zeros  # its index
NONE: Any = np.uint64(0)
ONE: Any = np.uint64(1)
FEW = 12


@kernel
def _above(scores: NDArray[np.floating], prices: NDArray[np.floating], floor: Any) -> Any:
    """The experts, at most 64, with s - p above the floor, one bit each: without a branch, so it vectorises."""
    bits = NONE
    for e in range(scores.shape[0]):
        bits |= np.uint64(scores[e] - prices[e] > floor) << np.uint64(e)
    return bits


@kernel
def _dot(left: F64, right: F64) -> float:
    total = 0.0
    for e in range(left.shape[0]):
        total += left[e] * right[e]
    return total


@kernel
def _solve(H_EE: F64, right: F64) -> F64:
    """Conjugate gradients with a diagonal preconditioner, to 3 digits or 30 iterations: O(E^2) each."""
    E = right.shape[0]
    x = np.zeros(E)
    product = np.empty(E)
    residual = right.copy()
    scaled = np.empty(E)
    for e in range(E):
        scaled[e] = residual[e] / H_EE[e, e]
    direction = scaled.copy()
    norm = _dot(residual, scaled)
    enough = 1e-6 * norm
    for _ in range(30):
        if norm <= enough:
            break
        for e in range(E):
            product[e] = 0.0
        for f in range(E):  # H is symmetric: adding up its rows vectorises, dot products would not
            row = H_EE[f]
            weight = direction[f]
            for e in range(E):
                product[e] += row[e] * weight
        curvature = _dot(direction, product)
        if curvature <= 0.0:
            break
        step = norm / curvature
        for e in range(E):
            x[e] += step * direction[e]
            residual[e] -= step * product[e]
            scaled[e] = residual[e] / H_EE[e, e]
        following = _dot(residual, scaled)
        for e in range(E):
            direction[e] = scaled[e] + following / norm * direction[e]
        norm = following
    return x


@kernel
def _project(value: F64, shared: NDArray[np.int64], n: int, tau: float) -> tuple[float, int]:
    """Projection of value / tau on the simplex: the threshold and how many entries are above it, moved to the front."""
    if n <= FEW:
        for i in range(1, n):  # sorted, which is quickest for few
            v, e = value[i], shared[i]
            j = i
            while j > 0 and value[j - 1] < v:
                value[j] = value[j - 1]
                shared[j] = shared[j - 1]
                j -= 1
            value[j] = v
            shared[j] = e
        total = 0.0
        threshold = 0.0
        for j in range(n):
            total += value[j]
            level = (total - tau) / (j + 1)
            if value[j] <= level:
                return threshold, j
            threshold = level
        return threshold, n
    while True:  # the threshold only rises, and each round drops an entry or is the last (Michelot 1986)
        total = 0.0
        for j in range(n):
            total += value[j]
        threshold = (total - tau) / n
        kept = 0
        for j in range(n):
            if value[j] > threshold:
                value[kept], shared[kept] = value[j], shared[j]
                kept += 1
        if kept == n or kept == 0:
            return threshold, n
        n = kept


@kernel
def newton_step(
    scores_TE: NDArray[np.floating], best_T: NDArray[np.int32], margin_T: NDArray[np.floating], load: NDArray[np.int64],
    target: F64, tau: float, every: int, prices: F64,
) -> None:  # fmt: skip
    """Move prices towards balance, in place.

    The choice of a token, argmax of v = s - p, is smoothed to the projection of v / tau on the simplex (quadratically
    regularised transport, Blondel et al. 2018): a token whose best leads by tau or more keeps it, the others split. The
    smoothed loads n(p) have derivative -(sum_t diag(1_S) - 1_S 1_S' / |S|) / tau, S the experts that share token t, and
    the step solves with it for n(p) = target. No price moves by more than tau, inside which the model holds.

    `best`, `margin` and `load` come from a pass at these prices. Only what smoothing changes is estimated from
    one token in `every`: the hard loads are of all tokens, which leaves little to estimate and little noise.
    One pass over the sampled tokens with small margin, O(E) each, and at most 30 iterations of O(E^2).
    """
    E = target.shape[0]
    H_EE = np.zeros((E, E))
    excess = np.empty(E)
    for f in range(E):
        excess[f] = load[f] - target[f]
    shared = np.empty(E, np.int64)
    value = np.empty(E)
    rounded = prices.astype(scores_TE.dtype)  # which experts share a token need not be exact
    share = every / tau
    due = 0.0
    for t in range(0, best_T.shape[0], every):
        if margin_T[t] >= tau:
            continue
        b = best_T[t]
        excess[b] -= every
        row = scores_TE[t]
        floor = scores_TE.dtype.type(row[b] - rounded[b] - tau)
        n = 0
        for first in range(0, E, 64):
            near = _above(row[first : first + 64], rounded[first : first + 64], floor)
            while near != NONE:
                e: Any = first + np.int64(lowest_bit(near))
                near &= near - ONE
                value[n] = row[e] - prices[e]
                shared[n] = e
                n += 1
        threshold, size = _project(value, shared, n, tau)
        weight = 1.0 * every
        if size > FEW:  # of tokens with many experts only some enter H: the others would say the same, in O(size^2)
            due += FEW / size
            if due < 1.0:
                weight = 0.0
            else:
                due -= 1.0
                weight *= size / FEW
        for i in range(size):
            e = shared[i]
            excess[e] += (value[i] - threshold) * share
            if weight > 0.0:
                H_EE[e, e] += weight
                for j in range(size):
                    H_EE[e, shared[j]] -= weight / size
    damping = 1e-9
    for e in range(E):
        damping += 0.05 * H_EE[e, e] / E
    for e in range(E):
        H_EE[e, e] += damping
    step = _solve(H_EE, excess)
    for e in range(E):
        prices[e] += tau * min(max(step[e], -1.0), 1.0)
