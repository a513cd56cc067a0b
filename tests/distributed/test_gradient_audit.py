"""Auxiliary losses send the same gradient to a router, and leave the same state in it, however a step is cut.

Shapes: T tokens, D width, E experts, K experts per token.
"""

from pathlib import Path

import forks
import numpy as np
import program
import pytest
import torch
from gradient_audit import Audit, Setting, arms, audit, the_router
from scipy.special import logsumexp, softmax
from tiny_training import GROUP, LENGTH, SEQUENCES, language_model

ARMS = arms()
every_arm = pytest.mark.parametrize("arm", ARMS)
pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*log_every_n_steps")
TOKENS_OF = {"sequence": LENGTH, "group": GROUP * LENGTH, "step": SEQUENCES * LENGTH}


@pytest.fixture(scope="module")
def alone() -> dict[str, Audit]:
    """Every arm on one rank."""
    return {arm: audit(*what, Setting()) for arm, what in ARMS.items()}


@pytest.fixture(scope="module")
def on_two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Audit]]:
    """Every arm as each of two ranks saw it, and a router that is wrong."""
    folder = tmp_path_factory.mktemp("audit")
    script = Path(__file__).with_name("gradient_audit.py")
    path = ":".join(map(str, (program.REPOSITORY, script.parent, script.parent.parent)))
    done = forks.run(
        ["-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", script, folder],
        environment={**program.environment(), "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    saved = [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]
    return [{arm: Audit(**fields) for arm, fields in rank.items()} for rank in saved]


def differences(one: Audit, other: Audit, tolerance: float = 1e-5) -> list[str]:
    """What differs between two audits by more than a share of its largest number."""
    assert one.gradients.keys() == other.gradients.keys()
    assert one.state.keys() == other.state.keys()
    pairs = [
        (f"{loss}, {name}", gradient, other.gradients[loss][name])
        for loss, gradients in one.gradients.items()
        for name, gradient in gradients.items()
    ]
    pairs += [(f"state, {name}", value, other.state[name]) for name, value in one.state.items()]
    return [
        what
        for what, a, b in pairs
        if a.numel() and float((a.double() - b.double()).abs().max()) > tolerance * float(a.double().abs().max())
    ]


@every_arm
def test_every_auxiliary_loss_reaches_its_router(arm: str, alone: dict[str, Audit]) -> None:
    for loss, gradients in alone[arm].gradients.items():
        assert any(float(gradient.abs().max()) > 1e-4 for gradient in gradients.values()), loss


@every_arm
def test_two_ranks_send_the_gradient_of_one(
    arm: str, alone: dict[str, Audit], on_two_ranks: list[dict[str, Audit]]
) -> None:
    assert differences(alone[arm], on_two_ranks[0][arm]) == []
    # Between ranks nothing may differ at all, or they would drift apart.
    assert differences(on_two_ranks[0][arm], on_two_ranks[1][arm], tolerance=0) == []


@every_arm
@pytest.mark.parametrize(
    "setting",
    [
        pytest.param(Setting(accumulation=2), marks=pytest.mark.exhaustive),
        pytest.param(Setting(activation_checkpointing=True), marks=pytest.mark.exhaustive),
        Setting(accumulation=2, activation_checkpointing=True),
    ],
    ids=str,
)
def test_accumulation_and_recomputation_send_the_same_gradient(
    arm: str, setting: Setting, alone: dict[str, Audit]
) -> None:
    assert differences(alone[arm], audit(*ARMS[arm], setting)) == []


def test_a_loss_that_grows_with_the_ranks_is_found_out(on_two_ranks: list[dict[str, Audit]]) -> None:
    assert differences(audit("switch", {}, Setting(), scaled=True), on_two_ranks[0]["scaled"]) == [
        "load_balancing_loss, gate.weight"
    ]


def test_routers_with_losses_and_state_are_among_the_arms(alone: dict[str, Audit]) -> None:
    losses = {(arm.split("/")[0], loss) for arm, one in alone.items() for loss in one.gradients}
    assert {("switch", "load_balancing_loss"), ("top_k", "router_z_loss")} <= losses
    assert any(bool(one.state["prices"].any()) for one in alone.values() if "prices" in one.state)
    assert all(int(one.state["step"]) > 0 for one in alone.values() if "step" in one.state)


# The same gradients by hand, in double precision


def balancing_gradient(tokens_TD: np.ndarray, gate_ED: np.ndarray, k: int, size: int) -> np.ndarray:
    """dL/dW of the mean over parts of ``size`` tokens of E sum_i f_i P_i, with f held fixed.

    For one part: P_i = mean_t p_ti and dp_ti/dlogit_tj = p_ti ([i = j] - p_tj), so that
    dL/dlogit_tj = E/T p_tj (f_j - sum_i f_i p_ti).
    """
    num_experts = len(gate_ED)
    result_ED = np.zeros_like(gate_ED)
    parts = np.split(tokens_TD, len(tokens_TD) // size)
    for part_TD in parts:
        p_TE = softmax(part_TD @ gate_ED.T, axis=1)
        chosen_TK = np.argsort(-p_TE, axis=1)[:, :k]
        f_E = np.bincount(chosen_TK.ravel(), minlength=num_experts) / chosen_TK.size
        slope_TE = num_experts / size * p_TE * (f_E - p_TE @ f_E[:, None])
        result_ED += slope_TE.T @ part_TD / len(parts)
    return result_ED


def z_gradient(tokens_TD: np.ndarray, gate_ED: np.ndarray) -> np.ndarray:
    """dL/dW of the mean over tokens of logsumexp^2: dL/dlogit_tj = 2/T logsumexp_t p_tj."""
    logits_TE = tokens_TD @ gate_ED.T
    slope_TE = 2 / len(tokens_TD) * logsumexp(logits_TE, axis=1, keepdims=True) * softmax(logits_TE, axis=1)
    return slope_TE.T @ tokens_TD


def inputs_and_gate(one: Audit, router: str, options: dict) -> tuple[np.ndarray, np.ndarray]:
    gate = the_router(language_model(router, max_steps=1, router_options=options)).gate.weight
    assert one.inputs is not None
    return one.inputs.double().numpy(), gate.detach().double().numpy()


@pytest.mark.parametrize("scope", TOKENS_OF)
@pytest.mark.parametrize(("router", "k"), [("switch", 1), ("top_k", 2)])
def test_the_balancing_gradient_is_the_one_derived_by_hand(
    router: str, k: int, scope: str, alone: dict[str, Audit]
) -> None:
    one = alone[f"{router}/{scope}"]
    tokens_TD, gate_ED = inputs_and_gate(one, *ARMS[f"{router}/{scope}"])
    expected = balancing_gradient(tokens_TD, gate_ED, k, TOKENS_OF[scope])
    found = one.gradients["load_balancing_loss"]["gate.weight"].numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6 * np.abs(expected).max())


def test_the_z_gradient_is_the_one_derived_by_hand(alone: dict[str, Audit]) -> None:
    one = alone["top_k/group"]
    expected = z_gradient(*inputs_and_gate(one, *ARMS["top_k/group"]))
    found = one.gradients["router_z_loss"]["gate.weight"].numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6 * np.abs(expected).max())
