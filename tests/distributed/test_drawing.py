"""A rank that shares the experts makes its own alone, with the weights that they have where one rank has all."""

from typing import Any

import pytest
import torch
from tiny_training import language_model
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_base.module import LanguageModel

EXPERTS, RANKS = 32, 4
GPT2 = {"model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 2, "n_inner": 1024, "n_positions": 64}
MODELS: dict[str, Any] = {
    "our own": {"width": 16, "depth": 2, "heads": 2, "ffn_width": 1024},
    "drawn": {"library": "transformers", "config": GPT2},
    "copied": {"library": "transformers", "config": GPT2, "upcycle": True},
}


class Alive(TorchDispatchMode):
    """The most bytes that all tensors have together which come to be inside."""

    def __init__(self) -> None:
        super().__init__()
        self.peak, self._seen = 0, {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu":
                storage = tensor.untyped_storage()
                self._seen[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self._seen = {key: held for key, held in self._seen.items() if not held[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._seen.values()))
        return found


def build(model: str, share: tuple[int, int]) -> tuple[LanguageModel, int]:
    """A model with one sparse layer, and the most bytes there were while it was made."""
    options = language_model("uniform", max_steps=1, router_options={"num_experts": EXPERTS}).hparams
    with Alive() as alive:
        made = LanguageModel(**{**options, "model": MODELS[model], "vocab_size": 64}, expert_share=share)
    return made, alive.peak


@pytest.mark.parametrize("model", MODELS)
def test_a_rank_draws_its_own_experts_and_never_holds_the_others(model: str) -> None:
    whole, most = build(model, (0, 1))
    expected, shapes = whole.state_dict(), whole.whole_shapes()
    experts = sum(expected[name].nbytes for name in whole.expert_parameters)
    assert experts > 0.8 * sum(value.nbytes for value in expected.values())
    for rank in range(RANKS):
        part, at_most = build(model, (rank, RANKS))
        held = range(rank * EXPERTS // RANKS, (rank + 1) * EXPERTS // RANKS)
        assert part.whole_shapes() == shapes
        for name, value in part.state_dict().items():
            mine = expected[name][held.start : held.stop] if name in part.expert_parameters else expected[name]
            assert torch.equal(value, mine), name
        # Of the others not even a fourth part, and that one at a time.
        assert at_most < most - 0.7 * experts
