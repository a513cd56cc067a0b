"""Balance of computation: known answers by hand, FLOPs against torch's counter. E experts, W workers, D width."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from lightning_base.callbacks.compute_balance import balance
from lightning_base.callbacks.flops import grouped_matmul_flops
from lightning_base.metrics.compute import batched_padding, capacity_padding, expert_flops, idle_fraction
from lightning_base.moe import Experts


@pytest.mark.parametrize(
    ("work", "idle"),
    [
        ([4, 4, 4, 4], 0),
        ([16, 0, 0, 0], 3 / 4),  # 1 - 1/W
        ([4, 8], 1 / 4),  # 1 - 6/8
        ([2, 4, 6], 1 / 3),  # 1 - 4/6
        ([7], 0),
    ],
)
def test_idle_fraction_by_hand(work: list[int], idle: float) -> None:
    assert idle_fraction(torch.tensor(work)).item() == pytest.approx(idle, abs=1e-12)
    # Seconds are as good as tokens.
    assert idle_fraction(torch.tensor(work).double() * 1e-3).item() == pytest.approx(idle, abs=1e-12)


def test_without_work_nobody_is_idle_or_busy() -> None:
    assert math.isnan(idle_fraction(torch.tensor([0, 0])).item())


@given(work=st.lists(st.integers(0, 1000), min_size=1, max_size=9).filter(any))
def test_idle_time_is_what_is_left_of_the_workers_time_until_the_slowest_is_done(work: list[int]) -> None:
    waited = sum(max(work) - one for one in work)
    assert idle_fraction(torch.tensor(work)).item() == pytest.approx(waited / (max(work) * len(work)), abs=1e-12)


def test_leading_axes_are_separate() -> None:
    assert idle_fraction(torch.tensor([[4, 8], [5, 5]])).tolist() == pytest.approx([0.25, 0])


def test_batched_padding_by_hand() -> None:
    # Passes of (4, 8) and (6, 0): rows 2 x 8 and 2 x 6, 28 in all, 18 of them tokens.
    assert batched_padding(torch.tensor([[4, 8], [6, 0]])).item() == pytest.approx(1 - 18 / 28)
    assert batched_padding(torch.tensor([[5, 5], [2, 2]])).item() == 0


def test_passes_that_collapse_on_different_experts_are_padded_though_their_sum_is_even() -> None:
    counts = torch.tensor([[8, 0], [0, 8]])
    assert batched_padding(counts).item() == 0.5
    assert idle_fraction(counts.sum(0)).item() == 0


def test_capacity_padding_by_hand() -> None:
    # 2 experts with 4 slots and then 1: 10 slots, 3 + 1 + 1 + 0 = 5 of them filled.
    found = capacity_padding(torch.tensor([[3, 1], [1, 0]]), torch.tensor([4, 1]))
    assert found.item() == pytest.approx(0.5)
    # Two layers at once.
    both = capacity_padding(torch.tensor([[[3, 1]], [[2, 2]]]), torch.tensor([[4], [2]]))
    assert both.tolist() == pytest.approx([0.5, 0.0])


@pytest.mark.parametrize("counts", [[4, 4, 4], [1, 7, 2]], ids=["even", "uneven"])
@pytest.mark.parametrize("sublayers", [1, 2])
def test_flops_are_those_that_torch_counts(counts: list[int], sublayers: int) -> None:
    experts = Experts(num_experts=3, width=16, hidden_width=24, sublayers=sublayers)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter)
    tokens = torch.randn(sum(counts), 16, requires_grad=True)
    found = []
    for backward in (False, True):
        counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten._grouped_mm: grouped_matmul_flops})
        with counter:
            added = experts(tokens, torch.tensor(counts))
            if backward:
                added.square().sum().backward()
        found.append(counter.get_total_flops())
    entries = 2 * 16 * 24 * sublayers
    assert expert_flops(torch.tensor(counts), entries=entries).sum().item() == found[0]
    assert expert_flops(torch.tensor(counts), entries=entries, training=True).sum().item() == found[1]


def test_balance_over_ranks_passes_and_layers_by_hand() -> None:
    # 2 ranks, 2 passes each, 2 layers, 2 experts: loads[rank][pass][layer] = tokens of the experts.
    loads = [[[[4, 0], [1, 1]], [[2, 2], [2, 0]]], [[[0, 4], [1, 1]], [[0, 0], [1, 1]]]]
    slots = [[[4, 2], [2, 2]], [[4, 2], [0, 2]]]
    found = balance(torch.tensor(loads), torch.tensor(slots), "train", "step")
    expected = {
        # Layer 0: ranks have 8 and 4, 1 - 6/8; layer 1: 4 and 4.
        "train_step/idle_fraction": [0.25, 0.0],
        # Layer 0: experts have 6 and 6; layer 1: 5 and 3, 1 - 4/5.
        "train_step/idle_fraction_experts": [0.0, 0.2],
        # Both as long as the fuller: 2 (4 + 2 + 4 + 0) = 20 rows for 12 tokens, 2 (1 + 2 + 1 + 1) = 10 for 8.
        "train_micro_batch/batched_padding": [0.4, 0.2],
        # 2 (4 + 2 + 4 + 0) = 20 slots for 12 tokens, 2 * 8 = 16 for 8.
        "train_step/capacity_padding": [0.4, 0.5],
    }
    assert found.keys() == expected.keys()
    for name, by_layer in expected.items():
        assert found[name].tolist() == pytest.approx(by_layer, abs=1e-12), name
    without = balance(torch.tensor(loads), torch.zeros(2, 2, 2, dtype=torch.int64), "final", "pass")
    assert "final_pass/capacity_padding" not in without


def test_flops_of_one_token_by_hand() -> None:
    # 2 products of 8 x 32 multiplications and additions: 2 * 2 * 8 * 32.
    assert expert_flops(torch.tensor([1, 0, 3]), entries=2 * 8 * 32).tolist() == [1024, 0, 3072]
