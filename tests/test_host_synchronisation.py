"""How often a training step makes the host wait for the device."""

import json
import warnings
from pathlib import Path

import forks
import numpy as np
import pytest
import torch
from router_arms import VOCABULARY, build_router
from torch import nn
from waits_per_step import Waits

from lightning_base import SparseLayer
from lightning_base.moe import Experts

WIDTH = 16
# Unequal experts are a choice that the host makes, and what a capacity leaves is a number that it has to know.
OF_A_LAYER = {"dense": 0, "hash": 1, "top_k": 1, "switch": 2}


@pytest.mark.parametrize("router", ["dense", "switch", "base"])
def test_a_step_waits_to_see_that_loss_and_gradient_are_finite_and_for_its_router_and_no_more(
    router: str, small_corpus: list[str], tmp_path: Path
) -> None:
    program = Path(__file__).with_name("waits_per_step.py")
    # Experts with relu have a path of their own on a CPU; these take the one of a GPU.
    done = forks.run([str(program), str(tmp_path), router, "model.activation=gelu", *small_corpus], timeout=120)
    assert done.returncode == 0, done.stderr
    per_step = json.loads(done.stdout.splitlines()[-1])
    # The loader's batches and the seconds of a solver are on the host.
    on_host = ("data/", "callbacks/assignment.py")
    per_step = {asked: count for asked, count in per_step.items() if not asked.startswith(on_host)}
    routers = {asked for asked in per_step if asked.startswith(("routing/", "assignment/"))}
    experts = {"moe/experts.py:any_experts": 1} if router != "dense" else {}
    assert {asked: per_step[asked] for asked in per_step.keys() - routers} == {
        "module.py:training_step": 1,
        "module.py:configure_gradient_clipping": 1,
        **experts,
    }
    # Dropping over capacity and an assignment on the host cannot do without.
    assert bool(routers) == (router != "dense")


def test_what_dispatches_nothing_is_counted_too_and_what_is_on_the_host_is_not() -> None:
    numbers = torch.tensor([2, 1, 3])
    waiting = {
        "tolist": lambda: numbers.tolist(),
        "numpy": lambda: numbers.numpy(),
        "array": lambda: np.asarray(numbers),
        "bool": lambda: bool(numbers[0]),
        "int": lambda: int(numbers[0]),
        "float": lambda: float(numbers[0]),
        "item": lambda: numbers[0].item(),
        "unique": lambda: numbers.unique(),
        "repeat": lambda: torch.repeat_interleave(numbers),
        "masked": lambda: numbers.masked_select(numbers > 1),
        "mask": lambda: numbers[numbers > 1],
        "cpu": lambda: numbers.cpu().contiguous().numpy(),
        "cpu and item": lambda: numbers[0].cpu().item(),
    }
    for name, ask in waiting.items():
        with Waits() as counted:
            ask()
        assert counted.seen.total() == 1, name
    with Waits() as counted:
        torch.repeat_interleave(numbers, output_size=6)
        numbers.repeat_interleave(2).cumsum(0).add_(1)
    assert not counted.seen
    assert numbers.cpu() is numbers  # nothing is left in its place


def layer_and_input(router: str, device: str, dtype: torch.dtype) -> tuple[SparseLayer, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    made = build_router(router, width=WIDTH)
    experts = Experts(num_experts=made.num_experts, width=WIDTH, hidden_width=8, activation="gelu")
    for w2 in experts.w2:
        nn.init.normal_(w2, std=0.1)
    layer = SparseLayer(made, experts, routing_group=2).train().to(device, dtype)
    ids = torch.randint(0, VOCABULARY, (4, 32))
    return layer, torch.randn(4, 32, WIDTH).to(device, dtype), ids.to(device)


def one_pass(layer: SparseLayer, hidden: torch.Tensor, ids: torch.Tensor) -> None:
    output, plan = layer(hidden, ids)
    (output.square().mean() + sum(plan.losses.values())).backward()


@pytest.mark.parametrize(("router", "waits"), OF_A_LAYER.items())
def test_a_layer_waits_for_unequal_experts_and_for_a_capacity(router: str, waits: int) -> None:
    given = layer_and_input(router, "cpu", torch.float32)
    with Waits() as counted:
        one_pass(*given)
    assert counted.seen.total() == waits, counted.seen


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA's own count of synchronisations needs a GPU")
@pytest.mark.parametrize(("router", "waits"), OF_A_LAYER.items())
def test_cuda_counts_as_many(router: str, waits: int) -> None:
    given = layer_and_input(router, "cuda", torch.bfloat16)
    one_pass(*given)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            one_pass(*given)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    found = [str(one.message) for one in seen if "synchronizing CUDA operation" in str(one.message)]
    assert len(found) == waits, found
