"""torch.compile on models with sparse layers. In a process of its own: the compiler cannot trace the shape checks that
are on in this one."""

import copy

import pytest
import torch
from gpt2_with_experts import VOCABULARY, WIDTH, gpt2_with_experts, text
from torch import nn

from lightning_base import Hash, Router, Switch, auxiliary_loss, drop_ins, end_step, read_inputs


def model_with(router: Router) -> nn.Module:
    model = gpt2_with_experts(router).train()
    for drop_in in drop_ins(model).values():
        for w2 in drop_in.layer.experts.w2:
            nn.init.normal_(w2, std=0.1)
    read_inputs(model)
    return model


def compare(rank: int, backend: str, router: Router) -> None:
    """Raises unless the compiled model gives the same outputs, plans, gradients and state as the plain one."""
    torch.set_num_threads(1)
    model = model_with(router)
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


# Inductor would spend most of a minute on generating code that has nothing to do with this project.
@pytest.mark.parametrize(
    ("backend", "router"),
    [
        ("eager", Hash(num_experts=4, vocab_size=VOCABULARY)),
        ("aot_eager", Switch(num_experts=4, width=WIDTH)),
    ],
    ids=["eager-hash", "aot_eager-switch"],
)
def test_a_compiled_model_gives_the_same_outputs_plans_gradients_and_state(backend: str, router: Router) -> None:
    context = torch.multiprocessing.spawn(compare, args=(backend, router), nprocs=1, join=False)
    while not context.join(timeout=300):
        pass
    assert [process.exitcode for process in context.processes] == [0]
