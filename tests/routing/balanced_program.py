"""The balanced assignment as scipy solves it: the reference for routers that approach it by prices."""

import numpy as np
import scipy.optimize
import scipy.sparse


def balanced_optimum(scores: np.ndarray, top_k: int) -> float:
    """max sum s x with x in {0, 1}, k experts per token and T k / E tokens per expert, for T k / E whole.

    Args:
        scores: [T, E].
        top_k: k.
    """
    num_tokens, num_experts = scores.shape
    share, rest = divmod(num_tokens * top_k, num_experts)
    assert rest == 0
    per_token = scipy.sparse.kron(scipy.sparse.eye(num_tokens), np.ones((1, num_experts)))
    per_expert = scipy.sparse.kron(np.ones((1, num_tokens)), scipy.sparse.eye(num_experts))
    found = scipy.optimize.milp(
        -scores.ravel().astype(float),
        integrality=np.ones(scores.size),
        bounds=scipy.optimize.Bounds(0, 1),
        constraints=[
            scipy.optimize.LinearConstraint(per_token, top_k, top_k),
            scipy.optimize.LinearConstraint(per_expert, share, share),
        ],
    )
    assert found.success
    return -float(found.fun)


def dual_value(scores: np.ndarray, prices: np.ndarray, top_k: int) -> float:
    """What the prices prove: no balanced assignment is worth more (weak duality). In double precision."""
    num_tokens, num_experts = scores.shape
    margins = np.sort(scores.astype(float) - prices.astype(float), axis=1)[:, ::-1]
    return float(margins[:, :top_k].sum() + prices.astype(float).sum() * num_tokens * top_k / num_experts)
