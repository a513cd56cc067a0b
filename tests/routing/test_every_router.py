"""What every router promises, whatever its algorithm: what ``lightning-base check-router`` asks, of each of ours."""

import pytest
from router_arms import ROUTERS, subject_of

from lightning_base.check_router import ALL, Asked, NotAsked

# Besides each file as it stands: options that change what a router promises.
ARMS = [pytest.param(name, {}, id=name) for name in ROUTERS] + [
    pytest.param("top_k", {"capacity_factor": 0.5}, id="top_k-with-capacity"),
    pytest.param("top_k", {"top_k": 3, "renormalize": False}, id="top_k-3-not-renormalized"),
    pytest.param("switch", {"capacity_factor": None, "evaluation_capacity_factor": 0.5}, id="switch-dropless"),
    pytest.param("switch", {"balance_scope": "step"}, id="switch-balanced-over-the-step"),
    pytest.param("switch", {"balance_scope": "sequence"}, id="switch-balanced-by-sequence"),
    pytest.param("base", {"top_k": 2}, id="base-2"),
    pytest.param("base", {"solver": "greedy"}, id="base-without-balance"),
    pytest.param("sinkhorn", {"top_k": 2}, id="sinkhorn-2"),
    pytest.param("loss_free", {"sequence_loss": True, "renormalize": True}, id="loss_free-with-sequence-loss"),
    pytest.param("quantile", {"top_k": 1, "iterations": 3}, id="quantile-1"),
    pytest.param("bip", {"top_k": 1, "iterations": 1}, id="bip-1"),
    pytest.param("top_k", {"gate": "sigmoid", "balance_scope": "sequence"}, id="top_k-sigmoid"),
    pytest.param("top_k", {"gate": "sigmoid", "top_k": 1, "renormalize": False}, id="top_k-1-sigmoid"),
    pytest.param("top_k", {"z_loss": True, "balance_scope": "step"}, id="top_k-with-z-loss"),
    pytest.param("noisy_top_k", {"num_experts": 4, "top_k": 3}, id="noisy_top_k-3"),
    pytest.param("gshard", {"capacity_factor": None, "balance_scope": "step"}, id="gshard-dropless"),
    pytest.param("gshard", {"num_experts": 2, "capacity_factor": 0.5}, id="gshard-of-two"),
    pytest.param("expert_choice", {"top_k": 1}, id="expert_choice-1"),
    pytest.param("hash", {"variant": "random"}, id="hash-random"),
    pytest.param("random", {"top_k": 3}, id="random-3"),
]
# Two ranks take a second for each arm; in short, test_parity.py has some routers there and test_checks.py others.
LONG = ("ranks",)
# In short, of the files as they stand alone.
LONG_WITH_OPTIONS = ("accumulation", "padding", "recomputation", *LONG)


def cases() -> list[object]:
    """Every check of every arm."""
    return [
        pytest.param(
            Asked(check, subject_of(*arm.values[:1], **arm.values[1])),
            id=f"{arm.id}-{check.name}".replace(" ", "_"),
            marks=[pytest.mark.exhaustive] if check.name in (LONG_WITH_OPTIONS if arm.values[1] else LONG) else [],
        )
        for arm in ARMS
        for check in ALL
    ]


@pytest.mark.parametrize("check", cases())
def test_a_router_keeps_its_promise(check: Asked) -> None:
    try:
        check()
    except NotAsked:  # test_checks.py knows when that may be
        return


def test_every_configured_router_is_found() -> None:
    assert {"base", "dense", "switch", "top_k", "uniform"} <= set(ROUTERS)
