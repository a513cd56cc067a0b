"""The sparse layer against the floor, against a dense layer and against how others have written it.

Shapes: R rounds.
"""

import functools
import gc
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_base.benchmark import roofline
from lightning_base.benchmark.arms import (
    EXPERTS_ALONE,
    ONE_EXPERT,
    Arm,
    Setting,
    compiled,
    make_batches,
    make_experts,
    ours,
    references,
)
from lightning_base.benchmark.memory import can_measure, page_faults, peak_bytes
from lightning_base.benchmark.peers import check_peers, peers
from lightning_base.benchmark.products import SIX_PRODUCTS, SixProducts, share_in_products
from lightning_base.benchmark.record import Form, Record, ratio_record
from lightning_base.benchmark.timing import Seconds, interleaved
from lightning_base.moe.stopwatch import Stopwatch

Size = tuple[int, int, int]
SHORTEST: list[Size] = [(2048, 128, 8)]
MEMORY_ROUNDS = 3
SLOW_EVERY = 5  # rounds for one of an arm that takes several times as long as most
QUICK = [*SHORTEST, (2048, 512, 8), (4096, 256, 32), (8192, 256, 64)]
FULL = [
    *QUICK,
    (2048, 128, 4),
    (8192, 128, 128),
    (4096, 512, 32),
    (32768, 128, 128),
    (32768, 256, 64),
    (2048, 2048, 8),
]


def records(form: Form, through_compiler: bool, sizes: Sequence[Size] = ()) -> list[Record]:
    """Ratios to the floor, to dense and to the fastest peer; phases, memory and the roofline.

    Args:
        form: how many rounds, and which sizes.
        through_compiler: whether every arm of ours is also measured compiled.
        sizes: T, D and E on the CPU, instead of those of the form.
    """
    check_peers()
    found: list[Record] = []
    rounds, seconds = {"full": (21, 150.0), "quick": (11, 80.0), "shortest": (7, 15.0)}[form]
    for setting in [Setting(*size) for size in sizes] or settings(form):
        found += measure(setting, rounds, seconds, through_compiler)
    return found


def settings(form: Form) -> Iterator[Setting]:
    """On the CPU in float32, and in the long form on a GPU in float32 and bfloat16."""
    for T, D, E in {"full": FULL, "quick": QUICK, "shortest": SHORTEST}[form]:
        yield Setting(T, D, E)
    if form == "full" and torch.cuda.is_available():
        for dtype in (torch.float32, torch.bfloat16):
            for T, D, E in FULL:
                yield Setting(T, D, E, device="cuda", dtype=dtype)


def measure(setting: Setting, rounds: int, seconds: float, through_compiler: bool = False) -> list[Record]:
    """All records of one setting."""
    torch.manual_seed(0)
    experts = make_experts(setting, setting.E, setting.hidden_width)
    base_arms = references(setting, experts)
    our_arms = ours(setting, experts)
    peer_arms = [arm for arm, _ in peers(setting, experts)]
    arms = [*base_arms, SixProducts(setting, experts), *our_arms, *peer_arms]
    if through_compiler:
        torch._dynamo.config.recompile_limit = 64  # all arms share the code of one layer
        arms += [compiled(arm) for arm in (*base_arms, *our_arms)]
    batches = make_batches(setting)
    gradient = torch.randn_like(batches[0])

    def timed(gradient: Tensor | None, seconds: float, title: str) -> tuple[Seconds, dict[str, list[int]]]:
        faults: dict[str, list[int]] = {arm.name: [] for arm in arms}

        def run(arm: Arm) -> None:
            before = page_faults()
            arm.run(batches, gradient)
            faults[arm.name].append(page_faults() - before)

        methods = {arm.name: functools.partial(run, arm) for arm in arms}
        times = interleaved(
            methods,
            rounds=rounds,
            seconds=seconds,
            device=setting.device,
            title=f"{setting} {title}",
            slow_every=SLOW_EVERY,
        )
        return times, faults

    found: list[Record] = []
    for what, (times, faults) in (
        ("forward", timed(None, seconds / 3, "forward")),
        ("forward+backward", timed(gradient, seconds, "forward and backward")),
    ):
        for arm in arms:
            seconds_of_arm = float(np.nanmedian(times[arm.name]))
            shown: dict[str, Any] = {
                "tokens_per_second": round(setting.T / seconds_of_arm),
                "ms": round(1e3 * seconds_of_arm, 3),
                "page_faults": round(float(np.median(faults[arm.name][1:]))),  # the first pass is no timed one
                "note": arm.note,
                "dropped": dropped(arm, batches),
            }
            for other in ("floor", "dense"):
                if arm.name not in (other, "dense" if other == "floor" else ""):
                    aim = floor_aim(arm, setting) if (other, what) == ("floor", "forward+backward") else None
                    ratios_R = times[arm.name] / times[other]
                    found.append(
                        ratio_record("layer", str(setting), arm.name, f"{what} / {other}", ratios_R, aim=aim, **shown)
                    )
    found += against_peers(setting, times, our_arms, peer_arms)
    found += phases(setting, our_arms, batches)
    around_R = 1 - times[EXPERTS_ALONE] / times["BASE"]
    measure = "all but experts / forward+backward"
    found.append(ratio_record("layer", str(setting), "BASE", measure, around_R, aim=phase_aim(setting)))
    if setting.device == "cpu":
        found += in_products(setting, arms, batches, gradient)
    if can_measure(setting.device):
        slow = {name for name, times_R in times.items() if np.isnan(times_R).any()}
        found += memory(setting, arms, batches, gradient, slow)
    found += attainable(setting, times)
    return found


def floor_aim(arm: Arm, setting: Setting) -> float | None:
    """At most 0.9 floors for BASE with 32 experts and more, 1.05 for the other layers of ours."""
    if arm.layer is None or arm.name == ONE_EXPERT:
        return None
    return 0.9 if arm.name == "BASE" and setting.E >= 32 else 1.05


def against_peers(setting: Setting, times: Seconds, our_arms: Sequence[Arm], peer_arms: Sequence[Arm]) -> list[Record]:
    """How many times the throughput of the fastest peer, which is the one of the least median, and of st-moe."""
    fastest = min((arm.name for arm in peer_arms), key=lambda name: float(np.nanmedian(times[name])))
    compared = {"throughput / fastest peer": (fastest, 1.2 if setting.E >= 32 else 1.0)}
    if "st-moe-pytorch" in times:
        compared["throughput / st-moe-pytorch"] = ("st-moe-pytorch", 4.0)
    return [
        ratio_record(
            "layer", str(setting), arm.name, measure, times[peer] / times[arm.name], better="higher", aim=aim, peer=peer
        )
        for arm in our_arms
        if arm.name != ONE_EXPERT
        for measure, (peer, aim) in compared.items()
    ]


def dropped(arm: Arm, batches: Sequence[Tensor]) -> float | None:
    """What share of the assignments finds no slot: work that an arm is spared."""
    if arm.layer is None:
        return None
    with torch.no_grad():
        plans = [arm.layer(x_BLD)[1] for x_BLD in batches]
    return round(1 - sum(len(plan.token_index) for plan in plans) / sum(int(plan.asked) for plan in plans), 3)


def phases(setting: Setting, our_arms: Sequence[Arm], batches: Sequence[Tensor], rounds: int = 7) -> list[Record]:
    """What share of the forward pass all but the experts takes: router with assignment, dispatch, combine."""
    found = []
    for arm in our_arms:
        assert arm.layer is not None
        shares = []
        for _ in range(rounds):
            arm.layer.stopwatch = Stopwatch(setting.device)
            arm.run(batches, None)
            spent = arm.layer.stopwatch.seconds
            shares.append(1 - spent["experts"] / sum(spent.values()))
        arm.layer.stopwatch = None
        measure = "all but experts / forward"
        found.append(ratio_record("layer", str(setting), arm.name, measure, np.array(shares), aim=phase_aim(setting)))
    return found


def phase_aim(setting: Setting) -> float | None:
    """Router, assignment, dispatch and combine: at most a tenth of the layer where it is 512 wide and more."""
    return 0.1 if setting.D >= 512 else None


def in_products(setting: Setting, arms: Sequence[Arm], batches: Sequence[Tensor], gradient: Tensor) -> list[Record]:
    """What share of one forward and backward pass a matrix product runs."""
    return [
        ratio_record(
            "layer",
            str(setting),
            arm.name,
            "matrix products / forward+backward",
            np.array([share_in_products(functools.partial(arm.run, batches, gradient))]),
            better="higher",
            compared=False,
        )
        for arm in arms
    ]


def memory(
    setting: Setting, arms: Sequence[Arm], batches: Sequence[Tensor], gradient: Tensor, slow: Collection[str]
) -> list[Record]:
    """Peak memory of a forward and backward pass over the floor's, weights and inputs not counted.

    Arms in ``slow`` are looked at once.
    """
    # What the products write is there before.
    arms = [arm for arm in arms if arm.name != SIX_PRODUCTS]
    peaks: dict[str, list[float]] = {arm.name: [] for arm in arms}
    # What is here already stays: each look at the peak collects garbage, and would look through all that was imported.
    gc.collect()
    gc.freeze()
    for turn in range(MEMORY_ROUNDS):
        for arm in arms:
            method = functools.partial(arm.run, batches, gradient)
            skipped = turn > 0 and arm.name in slow
            peaks[arm.name].append(float("nan") if skipped else peak_bytes(method, setting.device))
    gc.unfreeze()
    floor_R = np.array(peaks["floor"])
    return [
        ratio_record(
            "layer",
            str(setting),
            arm.name,
            "peak memory / floor",
            np.array(peaks[arm.name]) / floor_R,
            aim=1.3 if arm.layer is not None else None,
            megabytes=round(float(np.nanmedian(peaks[arm.name])) / 2**20, 1),
        )
        for arm in arms
        if arm.name != "floor"
    ]


def attainable(setting: Setting, times: Seconds) -> list[Record]:
    """The roofline's time over the measured one: 1 is all that the machine can do."""
    top = roofline.measure(setting)
    least = top.seconds(setting)
    more: dict[str, Any] = {
        "gflops": round(top.flops / 1e9, 1),
        "expert_gflops": round(roofline.expert_rate(setting) / 1e9, 1),
        "copy_gb_per_s": round(top.bandwidth / 1e9, 2),
        "layer_gflop": round(setting.flops / 1e9, 2),
        "layer_megabytes": round(roofline.least_bytes(setting) / 2**20, 1),
        "bound": "matrix product" if least * top.flops <= setting.flops * 1.0001 else "memory",
    }
    return [
        ratio_record("layer", str(setting), name, "attainable / measured", least / times[name], better="higher", **more)
        for name in ("floor", SIX_PRODUCTS, "dense", "BASE")
    ]
