"""What ranks would send, by hand and by the program's dispatcher in a fake world. P ranks, E experts."""

import numpy as np
import pytest

from lightning_base.benchmark.volumes import metered, volume

WIDTH = 16
ROW = 4 * WIDTH
# Two ranks with two experts each: rank 0 sends 1 + 4 of its ten tokens away, rank 1 2 + 0 of its six.
COUNTS = np.array([[3, 2, 1, 4], [2, 0, 3, 1]])


def test_two_ranks_by_hand() -> None:
    found = volume(COUNTS, WIDTH, equal=False)
    # Forward rank 0 sends its 5 tokens and the outputs for rank 1's 2; backward the gradients of the same rows; and two
    # counts of 8 bytes. Rank 1 sends as much.
    assert found.sent.tolist() == [2 * (5 + 2) * ROW + 16] * 2
    assert (found.largest, found.dispatch_largest) == (5 * ROW, 5 * ROW)
    assert found.dispatch_mean == 3.5 * ROW
    assert volume(COUNTS, WIDTH, equal=True).sent.tolist() == [2 * 7 * ROW] * 2


def test_equal_loads_send_equal_messages() -> None:
    found = volume(np.full((8, 16), 3), WIDTH, equal=True)
    assert found.dispatch_largest == found.dispatch_mean == 2 * 3 * ROW
    assert set(found.sent) == {4 * 7 * 6 * ROW}


@pytest.mark.parametrize("world", [8, 1024])
def test_the_dispatcher_sends_in_a_fake_world_what_was_computed(world: int) -> None:
    counts_PE = np.random.default_rng(0).integers(0, 20, (8, 16))
    counts_PE[5, 1:] = 0  # nearly none: a fake world, other than gloo, refuses a rank without any
    counts_PE[5, 0] = 1
    found = volume(counts_PE, WIDTH, equal=False)
    for rank in (0, 5, world - 1):
        total = metered(counts_PE, WIDTH, equal=False, world=world, rank=rank)
        assert total.sent == total.received == found.sent[rank % 8]
        assert total.largest <= found.largest
