"""The same layer as others have written it. Every peer comes with a plain reference for its own function.

Shapes: B sequences, L positions, T = B L tokens, D width, H hidden width, E experts, K experts per token.
"""

import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_base.benchmark.arms import Arm, Losses, Setting, make_batches, make_experts
from lightning_base.moe.experts import Experts
from lightning_base.moe.layer import SparseLayer
from lightning_base.routing import TopK

SWIGLU = "other function: SwiGLU, 3 products of 2/3 the width, no norms"
Reference = Callable[[Float[Tensor, "B L D"]], Float[Tensor, "B L D"]]


def peers(setting: Setting, experts: Experts, *, ample: bool = False) -> Iterator[tuple[Arm, Reference]]:
    """Every peer that can be imported, each with what it should compute if nothing is dropped.

    Args:
        setting: sizes.
        experts: ours, which the plain loop shares.
        ample: capacities so large that nothing is dropped, to check the function; as they are timed otherwise.
    """
    from lightning_base.benchmark.packages import mixture_of_experts, st_moe

    yield loop(setting, experts)
    for make in (mixtral_eager, mixtral_grouped, transformers_switch, st_moe, mixture_of_experts):
        try:
            found = make(setting, ample)
        except ImportError as error:
            print(f"not measured: {make.__name__} ({error}); the extra `bench` has it", file=sys.stderr)
            continue
        yield found


def check_peers() -> None:
    """Raises RuntimeError for a peer that does not compute what its reference computes."""
    setting = Setting(T=128, D=32, E=4, L=64)
    (x_BLD, *_) = make_batches(setting)
    for arm, reference in peers(setting, make_experts(setting, setting.E, setting.hidden_width), ample=True):
        with torch.no_grad():
            error = float((arm.forward(x_BLD)[0] - reference(x_BLD)).abs().max())
        if not error < 1e-4:
            raise RuntimeError(f"{arm.name} differs from its reference by {error:.1e}")


def draw_weights(module: nn.Module) -> None:
    """Normal matrices: some of these blocks are made with uninitialised memory."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)


def weighted(gates_TE: Tensor, expert: Callable[[int, Tensor], Tensor], x_BLD: Tensor) -> Tensor:
    """Every expert on every token, summed by gates that are zero for experts not chosen: slow, and plain."""
    x_TD = x_BLD.flatten(0, 1)
    outputs = [gates_TE[:, e, None] * expert(e, x_TD) for e in range(gates_TE.shape[1])]
    return torch.stack(outputs).sum(0).view_as(x_BLD)


def chosen(probabilities_TE: Tensor, k: int, renormalize: bool) -> Tensor:
    """The k largest gates of each token, the others zero."""
    value_TK, index_TK = probabilities_TE.topk(k, -1)
    if renormalize:
        value_TK = value_TK / value_TK.sum(-1, keepdim=True)
    return torch.zeros_like(probabilities_TE).scatter(1, index_TK, value_TK)


def loop(setting: Setting, experts: Experts) -> tuple[Arm, Reference]:
    """Our top-1 layer as one would write it first: for every expert, the mask of its tokens."""
    gate_ED = nn.Parameter(torch.randn(setting.E, setting.D) * setting.D**-0.5)
    gate_ED.data = gate_ED.data.to(setting.device, setting.dtype)
    w1_EDH, w2_EHD = experts.w1[0], experts.w2[0]

    def forward(x_BLD: Tensor) -> tuple[Tensor, Losses]:
        x_TD = x_BLD.flatten(0, 1)
        normed_TD = F.layer_norm(x_TD, (setting.D,))
        weight_T, expert_T = F.linear(normed_TD, gate_ED).softmax(-1).max(-1)
        y_TD = x_TD.clone()
        for e in range(setting.E):
            mine = (expert_T == e).nonzero().squeeze(1)
            inner = (F.layer_norm(x_TD[mine], (setting.D,)) @ w1_EDH[e]).relu()
            y_TD.index_add_(0, mine, weight_T[mine, None] * (inner @ w2_EHD[e]))
        return y_TD.view_as(x_BLD), ()

    def reference(x_BLD: Tensor) -> Tensor:
        # Our own layer: both must come to the same.
        router = TopK(num_experts=setting.E, width=setting.D, top_k=1, renormalize=False)
        router.gate.weight.data = gate_ED.data
        return SparseLayer(router, experts, routing_group=len(x_BLD))(x_BLD)[0]

    return Arm("loop over masks", forward, [gate_ED, w1_EDH, w2_EHD]), reference


def mixtral(setting: Setting, implementation: str) -> tuple[Arm, Reference]:
    """Mixtral's block with k = 1, where the renormalised gate is always 1; as wide as makes equal FLOPs."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    config: Any = MixtralConfig(
        hidden_size=setting.D,
        intermediate_size=round(setting.hidden_width * 2 / 3 / 8) * 8,
        num_local_experts=setting.E,
        num_experts_per_tok=1,
    )
    config._experts_implementation = implementation
    block = MixtralSparseMoeBlock(config)
    draw_weights(block)
    block.to(setting.device, setting.dtype).train()
    w: Any = block.experts

    def expert(e: int, x_TD: Tensor) -> Tensor:
        gate_TH, up_TH = (x_TD @ w.gate_up_proj[e].T).chunk(2, -1)
        return (F.silu(gate_TH) * up_TH) @ w.down_proj[e].T

    def reference(x_BLD: Tensor) -> Tensor:
        probabilities_TE = F.linear(x_BLD.flatten(0, 1), block.gate.weight).softmax(-1)
        return weighted(chosen(probabilities_TE, 1, True), expert, x_BLD)

    name = f"Mixtral, {implementation}"
    return Arm(name, lambda x: (block(x), ()), list(block.parameters()), SWIGLU), reference


def mixtral_eager(setting: Setting, ample: bool) -> tuple[Arm, Reference]:
    return mixtral(setting, "eager")


def mixtral_grouped(setting: Setting, ample: bool) -> tuple[Arm, Reference]:
    return mixtral(setting, "grouped_mm")


def transformers_switch(setting: Setting, ample: bool) -> tuple[Arm, Reference]:
    """The Switch block of transformers, capacity factor 1.25 in every sequence."""
    from transformers import SwitchTransformersConfig
    from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersSparseMLP

    config = SwitchTransformersConfig(
        d_model=setting.D,
        d_ff=setting.hidden_width,
        num_experts=setting.E,
        expert_capacity=setting.L if ample else max(1, -(-5 * setting.L // (4 * setting.E))),
        router_jitter_noise=0.0,
        dropout_rate=0.0,
    )
    block = SwitchTransformersSparseMLP(config)
    draw_weights(block)
    block.to(setting.device, setting.dtype).train()

    def expert(e: int, x_TD: Tensor) -> Tensor:
        one: Any = block.experts[f"expert_{e}"]
        return F.linear(F.linear(x_TD, one.wi.weight).relu(), one.wo.weight)

    def reference(x_BLD: Tensor) -> Tensor:
        probabilities_TE = F.linear(x_BLD.flatten(0, 1), block.router.classifier.weight).softmax(-1)
        return weighted(chosen(probabilities_TE, 1, False), expert, x_BLD)

    note = "no norms; capacity 1.25 in every sequence"
    return Arm("transformers' Switch", lambda x: (block(x), ()), list(block.parameters()), note), reference
