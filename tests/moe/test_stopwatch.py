"""The stopwatch of a sparse layer, on a clock that moves by one whenever it is looked at."""

import copy

import pytest
import torch
from router_arms import build_router
from torch import Tensor

from lightning_base.model import Transformer, initialize
from lightning_base.moe.stopwatch import PHASES, Stopwatch

LAYERS = 2
ONCE = dict.fromkeys(PHASES, float(LAYERS))
TWICE = dict.fromkeys(PHASES, 2.0 * LAYERS)


class Ticking(Stopwatch):
    """Every phase takes one tick, so that seconds are how often it was passed."""

    ticks = 0

    def now(self) -> float:
        self.ticks += 1
        return float(self.ticks)


def model_of(checkpointed: bool = False) -> Transformer:
    """Two sparse layers of two."""
    model = Transformer(
        vocab_size=30,
        sequence_length=8,
        width=16,
        depth=2,
        heads=2,
        ffn_width=32,
        make_router=lambda: build_router("base", num_experts=4),
        routing_group=2,
        sparse_layers=[0, 1],
        checkpoint_activations=checkpointed,
    )
    initialize(model, 0)
    return model.train()


def some_ids() -> Tensor:
    return torch.randint(0, 30, (4, 8), generator=torch.Generator().manual_seed(0))


def give(model: Transformer, watch: Stopwatch | None) -> None:
    for layer in model.sparse_layers.values():
        layer.stopwatch = watch


def test_every_layer_passes_every_phase_once_and_computes_what_it_does_without() -> None:
    model, watch = model_of(), Ticking()
    expected = model(some_ids()).logits
    give(model, watch)
    assert torch.equal(model(some_ids()).logits, expected)
    assert watch.seconds == ONCE
    model(some_ids())
    assert watch.seconds == TWICE
    watch.reset()
    assert watch.seconds == dict.fromkeys(PHASES, 0.0)


def test_without_a_stopwatch_nobody_looks_at_a_clock() -> None:
    model, watch = model_of(), Ticking()
    give(model, watch)
    give(model, None)
    model(some_ids())
    assert watch.ticks == 0


@pytest.mark.parametrize("paused", [True, False])
def test_paused_in_the_backward_pass_it_does_not_count_what_is_computed_again(paused: bool) -> None:
    model, watch = model_of(checkpointed=True), Ticking()
    give(model, watch)
    loss = model(some_ids()).logits.square().mean()
    assert watch.seconds == ONCE
    watch.paused = paused
    loss.backward()
    # The other case is what a stopwatch that runs on would read. Checkpointing stops before the last phase.
    assert watch.seconds == (ONCE if paused else {**TWICE, "combine": ONCE["combine"]})


def test_a_phase_is_charged_for_its_own_time() -> None:
    model, watch = model_of(), Ticking()
    give(model, watch)
    for layer in model.sparse_layers.values():
        layer.experts.register_forward_pre_hook(lambda *_: setattr(watch, "ticks", watch.ticks + 10))
    model(some_ids())
    assert watch.seconds == {**ONCE, "experts": 11.0 * LAYERS}


def compare_compiled(rank: int) -> None:
    """Raises unless a compiled model with a stopwatch answers like one without, and is timed at every call."""
    torch.set_num_threads(1)
    model, watch = model_of(), Ticking()
    compiled = torch.compile(copy.deepcopy(model), backend="aot_eager")
    expected = model(some_ids()).logits
    for calls, given in enumerate((None, watch, watch, None, watch)):
        give(compiled._orig_mod, given)
        torch.testing.assert_close(compiled(some_ids()).logits, expected, atol=1e-4, rtol=1e-4)
        passed = (0, 1, 2, 2, 3)[calls]
        assert watch.seconds == dict.fromkeys(PHASES, float(passed * LAYERS)), calls


@pytest.mark.exhaustive
def test_a_compiled_model_is_timed_too() -> None:
    # In a process of its own: the compiler cannot trace the shape checks that are on in this one.
    context = torch.multiprocessing.spawn(compare_compiled, nprocs=1, join=False)
    while not context.join(timeout=300):
        pass
    assert [process.exitcode for process in context.processes] == [0]
