"""What is timed computes what it says, and memory and roofline count what they should."""

import mmap

import numpy as np
import pytest
import torch

from lightning_base.benchmark import layer, peers, timing
from lightning_base.benchmark.arms import Setting, make_batches, make_experts, ours, references
from lightning_base.benchmark.memory import page_faults, peak_bytes
from lightning_base.benchmark.products import SixProducts, covered, share_in_products
from lightning_base.benchmark.roofline import Roofline, least_bytes
from lightning_base.benchmark.slots import SlottedExperts
from lightning_base.moe import Experts

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


def test_the_layer_is_measured_against_floor_dense_and_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    # At this size the assignment is most of BASE, which may be told for a slow arm that sits rounds out.
    monkeypatch.setattr(timing, "SLOW", float("inf"))
    found = layer.measure(SMALL, rounds=3, seconds=5.0)
    base = {record["measure"]: record for record in found if record["arm"] == "BASE"}
    for measure in ("forward+backward / floor", "forward+backward / dense", "throughput / fastest peer"):
        assert base[measure]["rounds"] == 3
        assert base[measure]["low"] <= base[measure]["ratio"] <= base[measure]["high"]
    assert 0 < base["all but experts / forward"]["ratio"] < 1
    assert 0 < base["matrix products / forward+backward"]["ratio"] < 1
    assert "six products, memory kept" in {record["arm"] for record in found if "page_faults" in record}


def test_the_six_products_are_those_of_the_floor_without_relu() -> None:
    experts = make_experts(SMALL, SMALL.E, SMALL.hidden_width)
    arm, batches = SixProducts(SMALL, experts), make_batches(SMALL)
    gradient = torch.randn_like(batches[0])
    buffers = [arm.h_grad_ECH, arm.w1_grad_EDH]
    for x_BLD in batches[:2]:
        arm.run(batches, gradient)
        x_ECD = x_BLD.detach().view(4, 16, 16).requires_grad_()
        w1, w2 = (weight[0].detach().requires_grad_() for weight in (experts.w1, experts.w2))
        torch.bmm(torch.bmm(x_ECD, w1), w2).backward(gradient.view(4, 16, 16))
        for found, expected in zip((arm.x_grad_ECD, arm.w1_grad_EDH, arm.w2_grad_EHD), (x_ECD, w1, w2), strict=True):
            torch.testing.assert_close(found, expected.grad)
    assert [buffer.data_ptr() for buffer in buffers] == [arm.h_grad_ECH.data_ptr(), arm.w1_grad_EDH.data_ptr()]


def test_the_share_of_products_counts_what_runs_at_the_same_time_once() -> None:
    assert covered([(0.0, 2.0), (1.0, 4.0), (6.0, 7.0), (1.0, 3.0)]) == 5
    a = torch.randn(256, 256)
    assert share_in_products(lambda: a.exp_().clamp_(-1, 1)) == 0
    assert share_in_products(lambda: (a @ a) @ a) > 0.2


def test_products_of_experts_in_threads_of_their_own_are_counted() -> None:
    experts = Experts(num_experts=2, width=256, hidden_width=256)
    counts, x_AD = torch.tensor([300, 200]), torch.randn(500, 256)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert 0 < share_in_products(lambda: experts(x_AD, counts)) <= 1
    finally:
        torch.set_num_threads(threads)


def test_a_page_that_is_touched_for_the_first_time_is_a_page_fault() -> None:
    with mmap.mmap(-1, 1000 * mmap.PAGESIZE) as memory:
        before = page_faults()
        for page in range(1000):
            memory[page * mmap.PAGESIZE] = 1
        first = page_faults() - before
        for page in range(1000):
            memory[page * mmap.PAGESIZE] = 2
        again = page_faults() - before - first
    assert first >= 1000 > 100 > again
