"""Memory that the experts use again: nobody else's is handed out, and no more is kept than was needed at once."""

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from lightning_base.moe.experts import Experts
from lightning_base.moe.memory import MEMORY, SLACK, SMALL, STEPS, KeptMemory

MILLION = 2**18  # of float32 values make a mebibyte
# A request, or giving back one of those that are held.
ACTIONS = st.lists(st.one_of(st.integers(1, 6 * MILLION), st.floats(0, 0.999)), max_size=40)


@example([2 * MILLION, 0.0, 7 * MILLION // 2, 0.0, 6 * MILLION])  # each too large for the block before
@given(ACTIONS)
def test_no_two_tensors_share_memory_and_no_more_is_kept_than_was_in_use_at_once(actions: list[int | float]) -> None:
    memory = KeptMemory()
    held: list[tuple[float, torch.Tensor]] = []
    most = 0
    for mark, action in enumerate(actions):
        if isinstance(action, int):
            tensor = memory.empty(torch.float32, action)
            tensor[0] = tensor[-1] = mark
            held.append((mark, tensor))
            del tensor
        elif held:
            del held[int(action * len(held))]
        most = max(most, sum(4 * len(tensor) for _, tensor in held if 4 * len(tensor) >= SMALL))
        assert memory.used + memory.free <= SLACK * (1 + 1 / STEPS) * most
        assert all(tensor[0] == mark == tensor[-1] for mark, tensor in held)


def test_a_tensor_of_nearly_the_same_size_lies_where_the_last_one_lay() -> None:
    memory = KeptMemory()
    place = memory.empty(torch.float32, 8 * MILLION).data_ptr()  # freed at once
    assert memory.empty(torch.float64, 7 * MILLION // 2).data_ptr() == place
    assert memory.empty(torch.float32, 1000, 2).shape == (1000, 2)
    memory.forget()
    assert memory.free == memory.used == 0


@pytest.mark.parametrize("keep", [lambda tensor: tensor[5:9], lambda tensor: tensor.numpy()[3:], torch.Tensor.detach])
def test_what_refers_to_a_part_keeps_the_whole(keep: object) -> None:
    memory = KeptMemory()
    part = keep(memory.empty(torch.float32, MILLION).fill_(1.0))  # type: ignore[operator]
    others = [memory.empty(torch.float32, MILLION).fill_(2.0) for _ in range(3)]
    assert (np.asarray(part) == 1).all()
    assert len(others) == 3
    assert memory.free == 0


def test_threads_do_not_get_the_same_memory() -> None:
    memory = KeptMemory()

    def work(mark: int) -> bool:
        return all(bool((memory.empty(torch.float32, MILLION).fill_(mark) == mark).all()) for _ in range(50))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(8)))
    assert memory.used == 0


def test_a_child_of_a_process_whose_other_thread_held_the_lock_gets_memory() -> None:
    with ThreadPoolExecutor(1) as pool:
        pool.submit(MEMORY._lock.acquire).result()
        if (child := os.fork()) == 0:
            MEMORY.empty(torch.float32, MILLION)
            os._exit(0)
        pool.submit(MEMORY._lock.release).result()
    assert os.waitpid(child, 0)[1] == 0


def test_gradients_of_the_next_step_lie_where_those_of_this_one_lay() -> None:
    experts = Experts(num_experts=4, width=128, hidden_width=1024)
    counts_E = torch.full((4,), 16)

    def gradients() -> list[int]:
        experts(torch.randn(64, 128), counts_E).sum().backward()
        assert all(parameter.grad is not None for parameter in experts.parameters())
        return sorted(parameter.grad.data_ptr() for parameter in (experts.w1[0], experts.w2[0]))

    MEMORY.forget()
    first = gradients()
    experts.zero_grad()
    assert gradients() == first
    held = [parameter.grad for parameter in experts.parameters()]
    experts.zero_grad()
    assert not set(gradients()) & {gradient.data_ptr() for gradient in held if gradient is not None}
