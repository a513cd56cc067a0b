"""What is timed computes what it says, and memory and roofline count what they should."""

import numpy as np
import pytest
import torch

from lightning_base.benchmark import layer, peers
from lightning_base.benchmark.arms import Setting, make_batches, make_experts, ours, references
from lightning_base.benchmark.memory import peak_bytes
from lightning_base.benchmark.roofline import Roofline, least_bytes
from lightning_base.benchmark.slots import SlottedExperts

SMALL = Setting(T=64, D=16, E=4, L=32)


def test_every_peer_computes_what_its_reference_computes() -> None:
    peers.check_peers()


def test_a_peer_that_computes_something_else_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = peers.loop

    def wrong(*given: object) -> object:
        arm, reference = honest(*given)  # type: ignore[arg-type]
        return arm, lambda x: reference(x) + 1e-3

    monkeypatch.setattr(peers, "loop", wrong)
    with pytest.raises(RuntimeError, match="loop over masks differs from its reference"):
        peers.check_peers()


def test_the_floor_is_each_experts_network_on_its_share_of_sorted_tokens() -> None:
    experts = make_experts(SMALL, SMALL.E, SMALL.hidden_width)
    floor = references(SMALL, experts)[0]
    x_TD = torch.randn(64, 16)
    y_TD = floor.forward(x_TD.view(2, 32, 16))[0].flatten(0, 1)
    w1, w2 = experts.w1[0][2], experts.w2[0][2]
    torch.testing.assert_close(y_TD[32:48], (x_TD[32:48] @ w1).relu() @ w2)


def test_a_pass_makes_the_gradients_of_every_parameter() -> None:
    experts = make_experts(SMALL, SMALL.E, SMALL.hidden_width)
    batches = make_batches(SMALL)
    for arm in [*references(SMALL, experts), *ours(SMALL, experts)]:
        touched: set[int] = set()
        hooks = [
            p.register_hook(lambda _g, p=p, touched=touched: touched.add(id(p))) for p in (*arm.parameters, batches[0])
        ]
        arm.run(batches, torch.ones_like(batches[0]))
        for hook in hooks:
            hook.remove()
        assert touched == {id(p) for p in (*arm.parameters, batches[0])}, arm.name


def test_peak_memory_is_what_tensors_hold_together() -> None:
    megabyte = 1 << 18  # numbers

    def together() -> None:
        _kept = torch.ones(64 * megabyte), np.ones(32 * megabyte, np.float32)

    def in_turn() -> None:
        torch.ones(64 * megabyte)
        np.ones(32 * megabyte, np.float32)

    assert peak_bytes(together, "cpu") / 2**20 == pytest.approx(96, abs=4)
    assert peak_bytes(in_turn, "cpu") / 2**20 == pytest.approx(64, abs=4)


def test_the_roofline_takes_the_longer_of_products_and_memory() -> None:
    setting = Setting(T=8, D=2, E=4, L=8)
    # Products: 3 passes of 2 products of 2 * 8 * 2 * 8 FLOPs. Memory: each of six products has a weight of 4 * 2 * 8
    # numbers, a narrow operand of 8 * 2 and a wide one of 8 * 8, four bytes each.
    assert setting.flops == 3 * 2 * 256
    assert least_bytes(setting) == 6 * (64 + 16 + 64) * 4
    assert Roofline(flops=1536.0, bandwidth=1e9).seconds(setting) == 1.0
    assert Roofline(flops=1e9, bandwidth=3456.0).seconds(setting) == 1.0


def test_slots_of_fixed_capacity_compute_the_same_as_experts() -> None:
    experts = make_experts(SMALL, SMALL.E, SMALL.hidden_width)
    counts = torch.tensor([20, 0, 5, 16])
    x_AD = torch.randn(41, 16)
    slotted = SlottedExperts(experts, capacity_factor=1.25, tokens=64)
    torch.testing.assert_close(slotted(x_AD, counts), experts(x_AD, counts))
    arm = ours(SMALL, experts)[1]  # Switch at capacity factor 1.25
    assert arm.layer is not None
    (x_BLD, *_) = make_batches(SMALL)
    expected = arm.forward(x_BLD)[0]
    arm.layer.experts = slotted  # type: ignore[assignment]
    torch.testing.assert_close(arm.forward(x_BLD)[0], expected)


def test_the_layer_is_measured_against_floor_dense_and_peers() -> None:
    found = layer.measure(SMALL, rounds=3, seconds=5.0)
    base = {record["measure"]: record for record in found if record["arm"] == "BASE"}
    for measure in ("forward+backward / floor", "forward+backward / dense", "throughput / fastest peer"):
        assert base[measure]["rounds"] == 3
        assert base[measure]["low"] <= base[measure]["ratio"] <= base[measure]["high"]
    assert 0 < base["all but experts / forward"]["ratio"] < 1
