"""How good and how fast the balanced assignment of a BASE layer is.

Shapes: T tokens of one routing group, E experts, K experts per token.
"""

import statistics
import time
from typing import Any

import pytorch_lightning as pl
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from lightning_base.assignment import balanced_assignment
from lightning_base.module import LanguageModel
from lightning_base.routing.plan import RoutingPlan


class AssignmentMonitor(pl.Callback):
    """Logs, for routers that solve an assignment, what the solver gained and took.

    ``train/solve_time`` [s]: time in the solver per optimizer step on this rank, all layers, mean since the last log.
    ``train_group/assignment_gain/<layer|mean>``: (objective - random balanced) / (optimum - random balanced) of one
    routing group of the step; 1 is optimal. ``train_group/solve_time_cold/<layer|mean>`` and ``..._warm/<layer|mean>``
    [s]: the exact solver on the same scores without and with the prices of the steps before.

    Args:
        log_every_n_steps: optimizer steps between two logs; the first step is logged too.
    """

    def __init__(self, log_every_n_steps: int) -> None:
        self.log_every_n_steps = log_every_n_steps
        self._seconds, self._steps = 0.0, 0
        self._prices: dict[str, Tensor] = {}

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, LanguageModel)
        # The prices the step starts from: at its end the router has moved on.
        layers = pl_module.model.sparse_layers.items()
        buffers = {name: getattr(layer.router, "prices", None) for name, layer in layers}
        self._prices = {name: buffer.double().clone() for name, buffer in buffers.items() if isinstance(buffer, Tensor)}

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, LanguageModel)
        layers = pl_module.model.sparse_layers
        # Not those that approximate one: their assignment is neither balanced nor meant to be optimal.
        plans = {name: plan for name, plan in pl_module.plans.items() if hasattr(layers[name].router, "solver")}
        self._seconds += sum(float(plan.aux["assignment_seconds"]) for plan in plans.values())
        if (batch_idx + 1) % trainer.accumulate_grad_batches or not plans:
            return
        self._steps += 1
        step = trainer.global_step
        if (step % self.log_every_n_steps and step != 1) or not trainer.is_global_zero:
            return
        values = {"train/solve_time": self._seconds / self._steps}
        self._seconds, self._steps = 0.0, 0
        found: dict[str, dict[str, float]] = {}
        for name, plan in plans.items():
            size = plan.groups.sizes[0]
            if not size:
                continue
            for key, value in measure(plan.aux["scores"][:size], first_group(plan), self._prices.get(name)).items():
                found.setdefault(key, {})[name] = value
        for key, by_layer in found.items():
            by_layer["mean"] = statistics.fmean(by_layer.values())
            values.update({f"train_group/{key}/{layer}": value for layer, value in by_layer.items()})
        for logger in trainer.loggers:
            logger.log_metrics(values, step)


def first_group(plan: RoutingPlan) -> Int64[Tensor, "T K"]:
    """The experts of each token of the plan's first routing group, in whatever order the plan lists them."""
    mine = plan.token_index < plan.groups.sizes[0]
    order = plan.token_index[mine].argsort(stable=True)
    return plan.expert_index[mine][order].view(plan.groups.sizes[0], plan.top_k)


def measure(
    scores_TE: Float[Tensor, "T E"], expert_TK: Int64[Tensor, "T K"], prices_E: Float64[Tensor, " E"] | None
) -> dict[str, float]:
    """The gain of an assignment, and the times of the exact solver from a cold and from a warm start."""
    k = expert_TK.shape[1]
    began = time.perf_counter()
    optimum = balanced_assignment(scores_TE, k=k)
    cold = time.perf_counter() - began
    result = {"assignment_gain": assignment_gain(scores_TE, expert_TK, optimum.objective), "solve_time_cold": cold}
    if prices_E is not None:
        began = time.perf_counter()
        balanced_assignment(scores_TE, prices=prices_E, k=k)
        result["solve_time_warm"] = time.perf_counter() - began
    return result


def assignment_gain(scores_TE: Float[Tensor, "T E"], expert_TK: Int64[Tensor, "T K"], optimum: float) -> float:
    """Share of the attainable gain over a random balanced assignment; adding a constant to a row changes nothing.

    A random balanced assignment is worth k times the row means on average. Above 1 only if the assignment is not
    balanced; 1 if there is nothing to gain.
    """
    scores = scores_TE.double()
    k = expert_TK.shape[1]
    random = k * float(scores.mean(1).sum())
    reached = float(scores.gather(1, expert_TK).sum())
    spread = optimum - random
    tolerance = 1e-9 * k * float(scores.abs().amax(1).sum())
    return 1.0 if abs(spread) <= tolerance else (reached - random) / spread
