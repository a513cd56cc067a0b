"""What a rank leaves where the launcher finds it, once something went wrong."""

import os
import time
import traceback
from contextlib import suppress
from pathlib import Path

from lightning_base.moe.layer import SparseLayer
from lightning_base.program import checkpoint
from lightning_base.program.run_directory import RunDirectory, write_json
from lightning_base.routing.plan import RoutingPlan
from lightning_base.routing.router import Router


def write_failure(job: RunDirectory, rank: int, error: BaseException) -> None:
    """Leaves what happened on this rank."""
    write_json(
        job.failures / f"rank_{rank}.json",
        {
            "time": time.time(),
            "rank": rank,
            "restart": int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)),
            "error": f"{type(error).__name__}: {error}{of_router(error)}",
            # All ranks fail with one whose part of a checkpoint cannot be written; only that one knows the cause.
            "elsewhere": isinstance(error, checkpoint.CheckpointError) and error.__cause__ is None,
            "traceback": "".join(traceback.format_exception(error)),
        },
    )


def of_router(error: BaseException) -> str:
    """Which router an error comes from, if it was raised in one or in carrying out what one had planned."""
    for frame, line in reversed(list(traceback.walk_tb(error.__traceback__))):
        owner, plan = frame.f_locals.get("self"), frame.f_locals.get("plan")
        if isinstance(owner, Router):
            file = Path(frame.f_code.co_filename).name
            return f" (in {type(owner).__name__}.{frame.f_code.co_name}, line {line} of {file})"
        if isinstance(owner, SparseLayer) and isinstance(plan, RoutingPlan):
            return out_of_range(plan, owner.router)
    return ""


def out_of_range(plan: RoutingPlan, router: Router) -> str:
    """What is wrong with the numbers in a plan; nothing, if they can no longer be read."""
    with suppress(Exception):  # of a GPU that has given up
        for name, index, end in (
            ("token", plan.token_index, plan.num_tokens),
            ("expert", plan.expert_index, router.num_experts),
        ):
            outside = index[(index < 0) | (index >= end)].tolist()
            if outside:
                kind = type(router).__name__
                return f" ({kind}.forward gave {name}_index={outside[0]}: {name}s are numbered from 0 to {end - 1})"
    return ""
