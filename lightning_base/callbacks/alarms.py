"""Alarms: a router that goes wrong is seen while it trains, not in the report.

Shapes: N sparse layers, E experts.
"""

from dataclasses import asdict, dataclass
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from lightning_base.callbacks.tensorboard import tensorboard_writer
from lightning_base.distributed.reduction import over_ranks, rank
from lightning_base.module import LanguageModel
from lightning_base.non_finite import NonFiniteError
from lightning_base.program.run_directory import RunDirectory
from lightning_base.routing.plan import RoutingPlan
from lightning_base.routing.router import Router

NAMES = ("collapse", "dead_experts", "saturation")
NON_FINITE = "non_finite_gates"


@dataclass(frozen=True)
class Alarm:
    """What went wrong in which layer, when it was first seen, and the number that shows it."""

    name: str
    layer: str
    step: int
    value: float
    sentence: str


class Alarms(pl.Callback):
    """Watches every sparse layer and raises an alarm, once per layer and name, in the progress bar, in TensorBoard
    (a text ``alarms`` with all so far; curves ``alarm/<name>``, in how many layers), in metrics.csv and in status.json.
    The run goes on.

    ``collapse``: one expert is asked for more than X times its even share, where X is ``collapse_factor``, or three
    quarters of the way from an even share to all there is (E / k times) where that is less, so that few experts or a
    large k can collapse too. A router that balances every routing group, such as BASE in training, cannot. Seen in
    ``checks`` logged intervals in a row: the first steps of a run often send nearly all to one expert and recover.
    ``dead_experts``: experts that no token asked for in ``dead_checks`` logged intervals in a row.
    ``saturation``: the mean over tokens of the largest gate probability, or for sigmoid gates g the mean over the
    experts chosen of max(g, 1 - g), exceeds ``saturation`` in ``checks`` logged steps in a row: entropy is near zero,
    and so is the gradient. Of routers that say either (``probabilities`` or ``gates`` in a plan's aux).
    ``non_finite_gates``: a NaN or infinite gate. The run fails in that step anyway; the alarm says where it began. If
    another rank than the first sees it, it is in status.json alone: bar and TensorBoard are the first rank's.

    With a log every n steps, an alarm comes at most n (checks + 1) steps after its reason has begun, or
    n (dead_checks + 1); a gate that is not finite is seen in its step. Demand, before any drop, is what counts: a
    capacity would hide a collapse. It is summed at every step on each rank, and over ranks in one collective per log.

    Args:
        run: whose status.json to write to.
        log_every_n_steps: optimizer steps between two checks; the first step is checked too.
        collapse_factor: X.
        checks: how often in a row a collapse or saturation has to be seen.
        dead_checks: how often in a row an expert has to be without tokens.
        saturation: of the mean top gate probability, or the mean max(g, 1 - g).

    Attributes:
        alarms: all that were raised, in their order.
        active: the names of the alarms whose reason held at the last check.
    """

    def __init__(
        self,
        run: RunDirectory,
        log_every_n_steps: int,
        *,
        collapse_factor: float = 4.0,
        checks: int = 3,
        dead_checks: int = 10,
        saturation: float = 0.99,
    ) -> None:
        self.run, self.log_every_n_steps = run, log_every_n_steps
        self.collapse_factor, self.checks = collapse_factor, checks
        self.dead_checks, self.saturation = dead_checks, saturation
        self.alarms: list[Alarm] = []
        self.active: list[str] = []
        # Since the last check, on this rank: for each layer E counts, the sum of top gates and how many.
        self._counts: dict[str, Tensor] = {}
        # For how many checks in a row a reason has held, by name and layer; for dead experts [E] by expert.
        self._streaks: dict[str, dict[str, list[int]]] = {name: {} for name in NAMES}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero:
            # Those of a future that did not happen are gone with its checkpoint.
            self.run.write_alarms([asdict(alarm) for alarm in self.alarms])

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, LanguageModel)
        parts = trainer.accumulate_grad_batches
        step = batch_idx // parts + 1
        checked = step % self.log_every_n_steps == 0 or step == 1
        for layer, plan in pl_module.plans.items():
            counts = counts_of(plan, checked)
            # What a checkpoint held comes back on the CPU.
            before = self._counts.get(layer)
            self._counts[layer] = counts if before is None else counts + before.to(counts.device)
        if not checked or (batch_idx + 1) % parts:
            return
        summed = trainer.strategy.reduce(torch.stack(list(self._counts.values())), reduce_op="sum")
        assert isinstance(summed, Tensor)
        layers, self._counts = list(self._counts), {}
        raised: list[Alarm] = []
        for layer, counts in zip(layers, summed.cpu(), strict=True):
            router = pl_module.model.sparse_layers[layer].router
            raised += self._check(layer, counts, router, trainer.global_step)
        self.active = [name for name in NAMES if self._holds(name)]
        if trainer.is_global_zero:
            self._show(trainer, raised)

    def _check(self, layer: str, counts: Tensor, router: Router, step: int) -> list[Alarm]:
        """The new alarms of one layer, from its sums over all ranks since the last check."""
        demand_E, (top, tokens) = counts[:-2], counts[-2:].tolist()
        num_experts, most = len(demand_E), int(demand_E.argmax())
        factor = float(demand_E.max() / demand_E.mean()) if float(demand_E.sum()) else 1.0
        limit = min(self.collapse_factor, 1 + 0.75 * (num_experts / router.top_k - 1))
        probability = top / tokens if tokens else 0.0
        self._count("collapse", layer, [factor > limit])
        # One expert is always at 1; a router's gate distribution is over several.
        self._count("saturation", layer, [num_experts > 1 and probability > self.saturation])
        self._count("dead_experts", layer, (demand_E == 0).tolist())
        dead = [e for e, n in enumerate(self._streaks["dead_experts"][layer]) if n >= self.dead_checks]
        listed = ", ".join(map(str, dead[:8])) + (", ..." if len(dead) > 8 else "")
        balance = remedy(router, "load_balancing_loss", "take a router that balances")
        found = {
            "collapse": (
                factor,
                f"{layer} sends {factor:.1f} times an even share to expert {most} (of {num_experts}; alarm above "
                f"{limit:.1f}): {balance}, or lower module.learning_rate",
            ),
            "dead_experts": (
                float(len(dead)),
                f"{layer} has sent no token to {len(dead)} of {num_experts} experts ({listed}) in {self.dead_checks} "
                f"logged intervals: {balance}, or use fewer experts",
            ),
            "saturation": (
                probability,
                f"{layer} is sure of its choices to {probability:.4f} on average (largest gate probability of a token; "
                f"of sigmoid gates max(g, 1 - g); alarm above {self.saturation}), so that its router hardly learns: "
                f"{remedy(router, 'router_z_loss', 'take a router with a z-loss')}, or lower module.learning_rate",
            ),
        }
        known = {alarm.name for alarm in self.alarms if alarm.layer == layer}
        new = [Alarm(name, layer, step, *found[name]) for name in NAMES if self._holds(name, layer)]
        new = [alarm for alarm in new if alarm.name not in known]
        self.alarms += new
        return new

    def _count(self, name: str, layer: str, holds: list[bool]) -> None:
        before = self._streaks[name].get(layer, [0] * len(holds))
        self._streaks[name][layer] = [n + 1 if now else 0 for n, now in zip(before, holds, strict=True)]

    def _holds(self, name: str, layer: str | None = None) -> int:
        """In how many layers, or whether in this one, the reason of an alarm has held for long enough."""
        needed = self.dead_checks if name == "dead_experts" else self.checks
        streaks = self._streaks[name]
        return sum(max(streaks[key]) >= needed for key in ([layer] if layer else streaks))

    def _show(self, trainer: pl.Trainer, raised: list[Alarm]) -> None:
        for logger in trainer.loggers:
            logger.log_metrics({f"alarm/{name}": float(self._holds(name)) for name in NAMES}, trainer.global_step)
        self._announce(trainer, raised)

    def _announce(self, trainer: pl.Trainer, raised: list[Alarm]) -> None:
        if not raised:
            return
        writer = tensorboard_writer(trainer)
        if writer is not None:
            listed = "".join(f"- step {alarm.step}, {alarm.name}: {alarm.sentence}\n" for alarm in self.alarms)
            writer.add_text("alarms", listed, raised[-1].step)
        self.run.write_alarms([asdict(alarm) for alarm in self.alarms])

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        assert isinstance(pl_module, LanguageModel)
        if not isinstance(exception, NonFiniteError):
            return
        step = trainer.global_step + 1
        places = list(pl_module.model.stages)
        # A solver refuses such scores, so that there is no plan of the step, if they come from an earlier place.
        place = exception.place or ""
        refused = isinstance(exception.__cause__, ValueError) and place in places
        for layer, sparse in pl_module.model.sparse_layers.items():
            plan = pl_module.plans.get(layer)
            gates = torch.zeros(0) if plan is None else plan.weight
            values = [gates, *sparse.router.parameters()]
            bad = sum(int((~torch.isfinite(value)).sum()) for value in values)
            if not bad and refused and places.index(place) <= places.index(layer):
                bad = 1
            if bad:
                sentence = f"{layer} has gates that are not finite at step {step}: {exception}"
                alarm = Alarm(NON_FINITE, layer, step, float(bad), sentence)
                self.alarms.append(alarm)
                self.active.append(NON_FINITE)
                # On whichever rank it happened: the others only see that one is gone.
                for logger in trainer.loggers:
                    logger.log_metrics({f"alarm/{NON_FINITE}": 1.0}, step)
                self._announce(trainer, [alarm])
                return

    def state_dict(self) -> dict[str, Any]:
        # Of all ranks: Lightning builds checkpoints on every rank and keeps the first rank's.
        counts = over_ranks({layer: value.cpu() for layer, value in self._counts.items()})
        return {
            "counts": {layer: torch.stack([part[layer] for part in counts]).sum(0) for layer in self._counts},
            "alarms": [asdict(alarm) for alarm in self.alarms],
            "streaks": {name: {layer: list(n) for layer, n in by.items()} for name, by in self._streaks.items()},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.alarms = [Alarm(**alarm) for alarm in state_dict["alarms"]]
        self._streaks = {**self._streaks, **state_dict["streaks"]}
        self._counts = {layer: 0 * value if rank() else value for layer, value in state_dict["counts"].items()}


def remedy(router: Router, loss: str, otherwise: str) -> str:
    """What to do about an alarm: raise the coefficient of a loss, if the router has it."""
    return f"raise module.loss_coefficients.{loss}" if loss in router.loss_coefficients else otherwise


def counts_of(plan: RoutingPlan, with_gates: bool) -> Tensor:
    """[E + 2]: the demand of each expert, the sum of the top gates, and how many these are.

    A top gate is the largest gate probability of a token, or max(g, 1 - g) of a sigmoid gate g.

    Args:
        plan: of one forward pass.
        with_gates: the last two are 0 if not, or if the router has no gates that could saturate.
    """
    demand_E = plan.group_demand.sum(0).double()
    # Sigmoids first: probabilities made of them by dividing by their sum saturate never.
    if with_gates and "gates" in plan.aux:
        tops = torch.maximum(plan.aux["gates"], 1 - plan.aux["gates"])
    elif with_gates and "probabilities" in plan.aux:
        tops = plan.aux["probabilities"].amax(-1)
    else:
        tops = plan.weight.new_zeros(0)
    top = tops.double().sum()
    return torch.cat([demand_E, torch.stack([top, top.new_tensor(len(tops))])])
