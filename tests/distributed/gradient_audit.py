"""What a router's auxiliary losses send back to it, and what it remembers, in one setting of ranks and micro batches.

Called in one process, or run on two by torchrun: ``python gradient_audit.py FOLDER`` writes every arm for each rank.
"""

import inspect
import logging
import sys
import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

import pytorch_lightning as pl
import torch
from omegaconf import OmegaConf
from router_arms import FOLDER, ROUTERS
from tiny_training import SEQUENCES, VOCABULARY, fit, language_model, leave, micro_batches
from torch import Tensor

from lightning_base.instantiation import resolve
from lightning_base.module import LanguageModel
from lightning_base.routing import Router, RoutingPlan
from lightning_base.routing.losses import Scope

STEPS = 3


@dataclass(frozen=True)
class Setting:
    """How a step is cut, and whether blocks are computed twice."""

    world_size: int = 1
    accumulation: int = 1
    activation_checkpointing: bool = False


@dataclass
class Audit:
    """Of one arm in one setting.

    Args:
        gradients: of every router parameter, by auxiliary loss and parameter.
        state: the router's buffers after three optimizer steps of training.
        inputs: what the router saw in the first pass.
    """

    gradients: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    state: dict[str, Tensor] = field(default_factory=dict)
    inputs: Tensor | None = None


def arms() -> dict[str, tuple[str, dict[str, Any]]]:
    """Every router of conf/router with every option that adds a loss, once for each scope of its balancing loss.

    ``shuffle_tokens`` among the options is the model's.
    """
    found = {}
    for name in ROUTERS:
        target = resolve(str(OmegaConf.load(FOLDER / f"{name}.yaml")["_target_"]), "router", Router)
        parameters = inspect.signature(target).parameters
        more = {option: True for option in parameters if option.endswith("_loss")}
        scopes = [{"balance_scope": scope} for scope in get_args(Scope)] if "balance_scope" in parameters else [{}]
        found.update({"/".join([name, *scope.values()]): (name, {**more, **scope}) for scope in scopes})
    # What is computed again deals the same tokens to the same groups, on which this loss depends.
    found["switch/group/shuffled"] = ("switch", {"balance_scope": "group", "shuffle_tokens": SEQUENCES // 2})
    return found


class LossByLoss(pl.Callback):
    """Makes each of the first steps about one auxiliary loss, keeps its gradient, and lets nothing be learned of it."""

    def __init__(self, losses: list[str]) -> None:
        self.losses, self.audit = losses, Audit()

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: LanguageModel, batch: Any, batch_idx: int) -> None:
        step = batch_idx // trainer.accumulate_grad_batches
        if step <= len(self.losses):
            # At 0 in the training that follows: what is compared there is the state, which other gradients would blur.
            on = self.losses[step] if step < len(self.losses) else None
            pl_module.loss_coefficients = {loss: float(loss == on) for loss in self.losses}

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: LanguageModel, optimizer: Any) -> None:
        if trainer.global_step < len(self.losses):
            router = the_router(pl_module)
            self.audit.gradients[self.losses[trainer.global_step]] = {
                name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in router.named_parameters()
            }
            for parameter in pl_module.parameters():
                if parameter.grad is not None:
                    parameter.grad.zero_()


def the_router(module: LanguageModel) -> Router:
    (layer,) = module.model.sparse_layers.values()
    return layer.router


def audit(router: str, options: dict[str, Any], setting: Setting, *, rank: int = 0, scaled: bool = False) -> Audit:
    """Trains a tiny model with a router and reports.

    Args:
        router: its name in conf/router.
        options: on top of its file.
        setting: how each step is cut.
        rank: of this process.
        scaled: a router that is wrong: its losses grow with the number of ranks.
    """
    router_options = dict(options)
    shuffle_tokens = router_options.pop("shuffle_tokens", False)
    module = language_model(
        router,
        max_steps=99,
        router_options=router_options,
        shuffle_tokens=shuffle_tokens,
        activation_checkpointing=setting.activation_checkpointing,
    )
    built = the_router(module)
    built.prepare(torch.arange(1, VOCABULARY + 1))
    losses = sorted(built.loss_coefficients)
    module.max_steps = len(losses) + STEPS
    watch = LossByLoss(losses)

    def keep_input(_: Router, given: tuple[Tensor, ...]) -> None:
        if watch.audit.inputs is None:
            watch.audit.inputs = given[0].detach().clone()

    def scale(_: Router, given: tuple[Tensor, ...], plan: RoutingPlan) -> RoutingPlan:
        return replace(plan, losses={name: setting.world_size * loss for name, loss in plan.losses.items()})

    built.register_forward_pre_hook(keep_input)
    if scaled:
        built.register_forward_hook(scale)
    cut = {"world_size": setting.world_size, "accumulation": setting.accumulation}
    batches = [
        batch
        for step in range(module.max_steps)
        # The same text for every loss, and then another one at every step.
        for batch in micro_batches(max(0, step - len(losses)), rank=rank, predict=step >= len(losses), **cut)
    ]
    fit(module, batches, watch, **cut)
    watch.audit.state = {name: buffer.detach().clone() for name, buffer in built.named_buffers()}
    return watch.audit


def main(folder: Path) -> None:
    """One of two ranks."""
    warnings.filterwarnings("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    found = {arm: audit(*what, Setting(world_size=2), rank=rank) for arm, what in arms().items()}
    found["scaled"] = audit("switch", {}, Setting(world_size=2), rank=rank, scaled=True)
    torch.save({arm: vars(one) for arm, one in found.items()}, folder / f"{rank}.pt")
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
