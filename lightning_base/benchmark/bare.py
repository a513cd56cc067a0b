"""The loop that a harness is held against: forward pass, loss, backward pass, clipping, AdamW.

Shapes: N positions of a batch, V vocabulary.
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils import clip_grad_norm_

from lightning_base.auxiliary_losses import auxiliary_losses, step_counts
from lightning_base.benchmark.ledger import Ledger
from lightning_base.data.preparation import prepare_for_run
from lightning_base.module import IGNORED
from lightning_base.program import rank as train
from lightning_base.program.config import Config
from lightning_base.program.read_config import read_config
from lightning_base.routing.plan import RoutingPlan

CONF = Path(__file__).parents[1] / "conf"
PREPARED: dict[str, str] = {}


def configuration(overrides: Sequence[str]) -> tuple[Config, dict[str, Any]]:
    """The configuration of ``experiments/train.py`` with these overrides: checked, and as plain containers."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        composed = compose("config", list(overrides))
    plain = OmegaConf.to_container(composed, resolve=True)
    assert isinstance(plain, dict)
    named = {str(key): value for key, value in plain.items()}
    return read_config(named), named


def prepared_corpus(config: Config) -> str:
    """The name of the prepared corpus; looked for once, as by the program."""
    key = repr(config.data)
    if key not in PREPARED:
        PREPARED[key] = prepare_for_run(config.build_corpus(), config.data).folder.name
    return PREPARED[key]


# Fixed, whatever the default model is, so that figures of different versions compare.
SMALL_STEP = ("model=every_other", "data.vocab_size=4096")


class BareLoop:
    """Trains a model and data of its own, built from the same configuration as a run's, with nothing around the step.

    What belongs to the method stays: auxiliary losses, the state that a router carries over, the learning rate.

    Args:
        config: of the run; one process, no accumulation.

    Attributes:
        losses: of every step so far.
        plans: of the last forward pass.
    """

    def __init__(self, config: Config) -> None:
        self.module = train.build_module(config).train()
        self.model = self.module.model
        self.forward = self.module._forward[0]
        optimizers = self.module.configure_optimizers()
        self.optimizer, self.schedule = optimizers["optimizer"], optimizers["lr_scheduler"]["scheduler"]
        self.data = train.build_data(config, prepared_corpus(config))
        self.data.setup()
        self.batches = iter(self.data.train_dataloader())
        self.clip = config.trainer.gradient_clip_val
        self.losses: list[Tensor] = []
        self.plans: dict[str, RoutingPlan] = {}
        self.ledger = Ledger()
        for part, method in (
            ("forward and loss", "loss"),
            ("backward", "backward"),
            ("clipping", "clip_gradients"),
            ("optimizer", "update"),
        ):
            setattr(self, method, self.ledger.charge(part, getattr(self, method)))

    def run(self, steps: int) -> float:
        """Takes that many steps; gives the seconds."""
        began = time.perf_counter()
        with torch.enable_grad():
            for _ in range(steps):
                loss, plans = self.loss(next(self.batches))
                self.backward(loss)
                for layer, plan in plans.items():
                    router = self.model.sparse_layers[layer].router
                    router.end_step(router.step_sums(plan))
                self.clip_gradients()
                self.update()
        self.ledger.close_turn()
        return time.perf_counter() - began

    def loss(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, RoutingPlan]]:
        """Forward pass on a batch without padding: the loss with its auxiliary losses, and the plans."""
        output = self.forward(batch["input_ids"])
        self.plans = output.plans
        logits_NV, targets_N = output.logits.flatten(0, 1), batch["targets"].flatten()
        loss = F.cross_entropy(logits_NV, targets_N, ignore_index=IGNORED, reduction="sum") / batch["step_targets"]
        self.losses.append(loss.detach())
        coefficients = self.module.loss_coefficients
        for name, value in auxiliary_losses(output.plans, coefficients, step_counts(output.plans), 1).items():
            loss = loss + coefficients[name] * value
        return loss, output.plans

    def backward(self, loss: Tensor) -> None:
        self.optimizer.zero_grad()
        loss.backward()

    def clip_gradients(self) -> None:
        if self.clip is not None:
            clip_grad_norm_(self.model.parameters(), self.clip)

    def update(self) -> None:
        self.optimizer.step()
        self.schedule.step()
