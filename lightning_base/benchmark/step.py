"""A whole training step of every arm over the dense arm's, where feed-forward layers are most of the work.

Shapes: N steps, S sparse layers, A assignments, D width, E experts, W ranks.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor, nn

from lightning_base.benchmark.bare import SMALL_STEP, BareLoop, configuration
from lightning_base.benchmark.record import Form, Record, ratio_record
from lightning_base.benchmark.slots import SlottedExperts
from lightning_base.benchmark.timing import Seconds, interleaved
from lightning_base.callbacks.flops import count_flops
from lightning_base.moe.experts import Experts

# Every feed-forward layer sparse and eight times as wide as the model: experts do most of the work. The batch is large
# enough that the optimizer, whose work grows with the number of experts, does not decide.
MODEL = {"width": 256, "depth": 4, "heads": 4, "ffn_width": 2048, "sparse_layers": 4}
SEQUENCES, LENGTH = 32, 128
TOKENS = SEQUENCES * LENGTH
SETTING = f"width {MODEL['width']}, feed-forward {MODEL['ffn_width']}, {TOKENS} tokens"
ROUTERS = ("dense", "base", "switch", "top_k")
SLOTTED = "switch, fixed slots"
CAPACITY = 1.25


def records(form: Form, compiled: bool) -> list[Record]:
    """Ratios of whole steps, with and without compilation, and what imbalance costs where experts are on ranks."""
    torch.manual_seed(0)
    loops = {router: make_loop(router) for router in ROUTERS}
    loops[SLOTTED] = make_loop("switch")
    for layer in loops[SLOTTED].model.sparse_layers.values():
        layer.experts = SlottedExperts(layer.experts, CAPACITY, TOKENS)  # type: ignore[assignment, arg-type]
    if compiled:
        loops |= {f"{router}, compiled": make_loop(router, "module.compile=true") for router in ROUTERS}
    shares = {name: flop_share(loop) for name, loop in loops.items()}
    loads: dict[str, list[Tensor]] = {name: [] for name in loops}

    def step(name: str) -> None:
        loops[name].run(1)
        loads[name].append(torch.stack([plan.load for plan in loops[name].plans.values()]))

    methods = {name: lambda name=name: step(name) for name in loops}
    rounds, seconds = (30, 400.0) if form == "full" else (7, 45.0)
    times = interleaved(methods, rounds=rounds, seconds=seconds, title="step")
    found = [
        {**step_record(name, times, shares[name], loops[name]), "dropped": dropped(torch.stack(loads[name]), name)}
        for name in loops
        if name != "dense"
    ]
    for other in ("switch", SLOTTED):
        ratios_R = times[other] / times["base"]
        aim = 1.1 if other == SLOTTED else None
        found.append(ratio_record("step", SETTING, "base", f"throughput / {other}", ratios_R, better="higher", aim=aim))
    for ranks in (2, 4):
        found += rank_records({name: torch.stack(loads[name]) for name in ("base", "switch", "top_k")}, ranks)
    return found


def make_loop(router: str, *overrides: str) -> BareLoop:
    """The bare loop of one arm on the project's own corpus."""
    given = [*SMALL_STEP, *(f"model.{key}={value}" for key, value in MODEL.items())]
    given += [f"data.global_batch={SEQUENCES}", f"data.sequence_length={LENGTH}", *overrides]
    return BareLoop(configuration([f"router={router}", *given])[0])


def flop_share(loop: BareLoop) -> float:
    """What share of the FLOPs of a training step the feed-forward layers have."""
    if isinstance(next(iter(loop.model.sparse_layers.values())).experts, SlottedExperts):
        return float("nan")  # padding would count as work
    ids = torch.randint(0, 4096, (SEQUENCES // 4, LENGTH), generator=torch.Generator().manual_seed(0))
    counted = count_flops(loop.module, {"input_ids": ids})
    return float(counted["expert_flops_per_token"] / counted["flops_per_token"])


def step_record(name: str, times: Seconds, share: float, loop: BareLoop) -> Record:
    """One arm's step over the dense arm's."""
    more: dict[str, Any] = {
        "ms": round(1e3 * float(np.median(times[name])), 1),
        "tokens_per_second": round(TOKENS / float(np.median(times[name]))),
        "feed_forward_flops": None if np.isnan(share) else round(share, 3),
        "optimizer_share": round(optimizer_share(loop), 3),
        "parameters": sum(parameter.numel() for parameter in loop.model.parameters()),
    }
    aim = 1.1 if name in ROUTERS else None
    return ratio_record("step", SETTING, name, "step / dense", times[name] / times["dense"], aim=aim, **more)


def dropped(load_NSE: Int64[Tensor, "N S E"], name: str) -> float:
    """What share of the assignments found no slot: work that an arm was spared."""
    asked = TOKENS * (2 if name.startswith("top_k") else 1)
    return round(1 - float(load_NSE.double().sum(2).mean()) / asked, 3)


def optimizer_share(loop: BareLoop) -> float:
    """What share of its steps' time a loop has spent in clipping and AdamW."""
    spent = [turn["clipping"] + turn["optimizer"] for turn in loop.ledger.turns[1:]]
    return float(
        np.median([part / sum(turn.values()) for part, turn in zip(spent, loop.ledger.turns[1:], strict=True)])
    )


def rank_records(loads: Mapping[str, Int64[Tensor, "N S E"]], ranks: int) -> list[Record]:
    """How many times as fast BASE's experts are where every rank holds an equal share of them, by the most loaded rank.

    All ranks wait for that one in every layer. Its experts run here, one rank's at a time, with the tokens that the
    last steps gave them.

    Args:
        loads: by arm, the tokens that each expert of each sparse layer computed in each step.
        ranks: W.
    """
    (width, hidden_width), steps = (MODEL["width"], MODEL["ffn_width"]), 3
    experts = {}
    for name in loads:
        k = 2 if name == "top_k" else 1
        experts[name] = Experts(num_experts=8 // ranks, width=width, hidden_width=hidden_width // k)
        nn.init.normal_(experts[name].w2[0], std=0.01)

    def run(name: str, step: int) -> None:
        for load_E in loads[name][-1 - step]:
            load_WE = load_E.view(ranks, -1)
            counts = load_WE[load_WE.sum(1).argmax()]
            x_AD = torch.randn(int(counts.sum()), width, requires_grad=True)
            experts[name](x_AD, counts).backward(torch.ones_like(x_AD))

    def run_steps(name: str) -> None:
        for step in range(steps):
            run(name, step)

    methods = {name: lambda name=name: run_steps(name) for name in loads}
    times = interleaved(methods, rounds=5, seconds=5.0, title=f"most loaded of {ranks} ranks")
    return [
        ratio_record(
            "step",
            SETTING,
            "base",
            f"throughput / {name} on {ranks} ranks",
            times[name] / times["base"],
            better="higher",
            aim=1.1 if name == "switch" else None,
        )
        for name in loads
        if name != "base"
    ]
