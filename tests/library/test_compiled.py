"""torch.compile on models with sparse layers. In a process of its own: the compiler cannot trace the shape checks that
are on in this one."""

import copy

import forks
import pytest
import torch
from gpt2_with_experts import VOCABULARY, WIDTH, gpt2_with_experts, text
from router_arms import ROUTERS, options_of
from torch import nn

from lightning_base import Hash, Router, SparseLayer, Switch, auxiliary_loss, drop_ins, end_step, read_inputs
from lightning_base.instantiation import instantiate
from lightning_base.moe import Experts


def model_with(router: Router) -> nn.Module:
    model = gpt2_with_experts(router).train()
    for drop_in in drop_ins(model).values():
        for w2 in drop_in.layer.experts.w2:
            nn.init.normal_(w2, std=0.1)
    read_inputs(model)
    return model


ROUTERS_BY_NAME = {
    "hash": lambda: Hash(num_experts=4, vocab_size=VOCABULARY),
    "switch": lambda: Switch(num_experts=4, width=WIDTH),
}


def compare(backend: str, name: str) -> None:
    """Raises unless the compiled model gives the same outputs, plans, gradients and state as the plain one."""
    torch.set_num_threads(1)
    model = model_with(ROUTERS_BY_NAME[name]())
    inner = copy.deepcopy(model)
    compiled = torch.compile(inner, backend=backend)
    # The drops of the second batch give its tensors another size.
    for ids in (text(), text(seed=1)):
        mask = torch.ones_like(ids)
        mask[0, 17:] = 0
        expected, got = (m(input_ids=ids, attention_mask=mask, labels=ids) for m in (model, compiled))
        torch.testing.assert_close(got.logits, expected.logits, atol=1e-4, rtol=1e-4)
        plans, others = ({name: drop_in.plan for name, drop_in in drop_ins(m).items()} for m in (model, compiled))
        assert list(plans) == list(others)
        for key, plan in plans.items():
            assert plan is not None
            assert plan.num_tokens == 8 * 24 - 7
            assert torch.equal(others[key].expert_index, plan.expert_index), key
        (expected.loss + auxiliary_loss(model)).backward()
        (got.loss + auxiliary_loss(compiled)).backward()
        end_step(model)
        end_step(compiled)
    for (key, parameter), twin in zip(model.named_parameters(), inner.parameters(), strict=True):
        torch.testing.assert_close(twin.grad, parameter.grad, atol=1e-4, rtol=1e-3, msg=lambda m, k=key: f"{k}: {m}")
    for buffer, twin in zip(model.buffers(), inner.buffers(), strict=True):
        torch.testing.assert_close(twin, buffer)
    assert torch._dynamo.utils.counters["frames"]["ok"] > 0, "nothing was compiled"


def compare_layers(names: list[str]) -> None:
    """Raises unless the compiled sparse layer of each router, with the options of its file, is the plain one."""
    torch.set_num_threads(1)
    for name in names:
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()  # or the first router's frames would count for all
        options = {**options_of(name), "num_experts": 1 if "dense" in name else 4}
        router = instantiate(options, "router", Router, width=WIDTH, vocab_size=VOCABULARY)
        assert isinstance(router, Router)
        layer = SparseLayer(
            router, Experts(num_experts=router.num_experts, width=WIDTH, hidden_width=8), routing_group=2
        ).train()
        for w2 in layer.experts.w2:
            nn.init.normal_(w2, std=0.1)
        inner = copy.deepcopy(layer)
        compiled = torch.compile(inner, backend="aot_eager")
        ids = text()[:4]
        hidden = torch.randn(*ids.shape, WIDTH)
        (expected, plan), (got, other) = (one(hidden, ids) for one in (layer, compiled))
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
        assert torch.equal(other.token_index, plan.token_index), name
        assert torch.equal(other.expert_index, plan.expert_index), name
        for output in (expected, got):
            output.square().mean().backward()
        for parameter, twin in zip(layer.parameters(), inner.parameters(), strict=True):
            both = [torch.zeros_like(p) if p.grad is None else p.grad for p in (parameter, twin)]
            torch.testing.assert_close(*both, atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
        assert torch._dynamo.utils.counters["frames"]["ok"] > 0, f"nothing of {name} was compiled"


def count_graphs() -> None:
    """Raises unless a layer is one graph but for the assignment, and is compiled no more after three calls."""
    torch.set_num_threads(1)
    # What breaks the graph: BASE's solver, which is Numba's, and how many assignments a capacity leaves, which no
    # compiler can know.
    allowed = {"top_k": "", "dense": "", "hash": "", "base": "balanced_by_group", "switch": "aten.nonzero"}
    for name, reason in allowed.items():
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        options = {**options_of(name), "num_experts": 1 if "dense" in name else 4}
        router = instantiate(options, "router", Router, width=WIDTH, vocab_size=VOCABULARY)
        assert isinstance(router, Router)
        experts = Experts(num_experts=router.num_experts, width=WIDTH, hidden_width=8)
        compiled = torch.compile(SparseLayer(router, experts, routing_group=2).train(), backend="aot_eager")
        graphs = []
        for seed in range(6):
            ids = text(seed=seed)[:4]
            compiled(torch.randn(*ids.shape, WIDTH), ids)[0].sum().backward()
            graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        breaks = torch._dynamo.utils.counters["graph_break"]
        assert all(reason and reason in why for why in breaks), f"{name}: {list(breaks)}"
        assert graphs[0] == 1 or reason, f"{name}: {graphs}"
        assert graphs[2:] == graphs[2:3] * 4, f"{name}: {graphs}"


# Inductor would spend most of a minute on generating code that has nothing to do with this project.
@pytest.mark.parametrize(("backend", "router"), [("eager", "hash"), ("aot_eager", "switch")])
@pytest.mark.exhaustive
def test_a_compiled_model_gives_the_same_outputs_plans_gradients_and_state(backend: str, router: str) -> None:
    forks.call(compare, backend, router)


@pytest.mark.exhaustive
def test_so_does_the_layer_of_every_router() -> None:
    forks.call(compare_layers, ROUTERS)


@pytest.mark.exhaustive
def test_the_assignment_alone_breaks_the_graph_and_nothing_is_compiled_again() -> None:
    forks.call(count_graphs)
