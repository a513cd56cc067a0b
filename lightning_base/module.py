"""The LightningModule: steps and optimizer, no logging logic beyond ``self.log``.

Shapes: B sequences, L positions, V vocabulary.
"""

from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn import functional as F

from lightning_base.auxiliary_losses import StepCounts, auxiliary_losses, step_counts
from lightning_base.distributed.gradients import clip_gradients, gradient_norm
from lightning_base.distributed.reduction import sum_over_ranks
from lightning_base.instantiation import instantiate
from lightning_base.metrics.language_model import LanguageModelLoss
from lightning_base.model_options import read_model
from lightning_base.moe.exchange import Exchange
from lightning_base.moe.layer import SparseLayer, set_evaluation_mode
from lightning_base.non_finite import NonFiniteError, first_not_finite
from lightning_base.optimization import learning_rate, make_optimizer
from lightning_base.program.checkpoint import PARAMETER_NAMES
from lightning_base.routing.plan import RoutingPlan
from lightning_base.routing.router import Router
from lightning_base.routing.selection import full_precision
from lightning_base.sparse_model import SparseModel

IGNORED = -100


def valid_or_none(batch: Mapping[str, Any]) -> Tensor | None:
    """Which positions are not padding, [B, L]; None if all are.

    The loader says so in ``padded``, where it looked before the batch went to a GPU: a look at it there waits.
    """
    padded = batch["padded"] if "padded" in batch else not bool(batch["valid"].all())
    return batch["valid"] if padded else None


class LanguageModel(pl.LightningModule):
    """Trains a language model whose feed-forward layers a router fills.

    The losses do not depend on how a global batch is cut: a micro batch's loss is its summed negative log-likelihood
    over the targets of the whole global batch, scaled so that the mean over ranks and micro batches is the true one.

    Args:
        router: ``_target_`` and options of the router, as in ``conf/router/``.
        model: its options, as in ``conf/model/``.
        optimizer: learning_rate, warmup_steps, schedule, final_learning_rate, weight_decay, betas.
        max_steps: optimizer steps of the whole run, which the schedule spans.
        vocab_size: V.
        sequence_length: the longest L.
        routing_group: sequences routed together.
        seed: of the initial weights.
        loss_coefficients: overrides the router's own for its auxiliary losses.
        router_init_scale: how many times larger than its paper has them the parameters of a router are at first.
        attend_across_documents: False: a position sees only its own document.
        compile: torch.compile on the inner model.
        activation_checkpointing: recompute blocks in the backward pass.
        expert_share: which of how many ranks this is among those that share the experts; the others' are not made here.

    Attributes:
        plans: the RoutingPlan of each sparse layer in the last forward pass, detached.
        last_checkpoint: the newest checkpoint from which a finite loss was computed, for the message of a failure.
        held_with: parameters of which this rank holds a part, with the ranks that hold the whole together.
        unproven_checkpoint: a newer one, until that is known; set by whoever saves. Weights can be finite and useless.
    """

    bytes_per_token: Tensor

    def __init__(
        self,
        *,
        router: Mapping[str, Any],
        model: Mapping[str, Any],
        optimizer: Mapping[str, Any],
        max_steps: int,
        vocab_size: int,
        sequence_length: int,
        routing_group: int,
        seed: int,
        loss_coefficients: Mapping[str, float] | None = None,
        router_init_scale: float = 1.0,
        attend_across_documents: bool = True,
        compile: bool = False,
        activation_checkpointing: bool = False,
        expert_share: tuple[int, int] = (0, 1),
    ) -> None:
        super().__init__()
        # Plain containers only: a checkpoint must load with weights_only=True.
        self.save_hyperparameters(ignore="expert_share")

        options = read_model(model)

        def make_router() -> Router:
            made = instantiate(router, "router", Router, width=options.router_width, vocab_size=vocab_size)
            assert isinstance(made, Router)
            return made

        self.model: SparseModel = options.build(
            seed=seed,
            router_scale=router_init_scale,
            vocab_size=vocab_size,
            sequence_length=sequence_length,
            make_router=make_router,
            routing_group=routing_group,
            checkpoint_activations=activation_checkpointing,
            expert_share=expert_share,
        )
        self.optimizer_options = dict(optimizer)
        self.max_steps = max_steps
        self.attend_across_documents = attend_across_documents
        first = next(iter(self.model.sparse_layers.values())).router
        self.loss_coefficients = {**first.loss_coefficients, **(loss_coefficients or {})}
        self.evaluation_modes = first.evaluation_modes
        self.register_buffer("bytes_per_token", torch.zeros(vocab_size, dtype=torch.int64))
        self.validation_loss = LanguageModelLoss()
        # Not a submodule: the state dict keeps one set of names, compiled or not.
        self._forward = [torch.compile(self.model) if compile else self.model]
        self.plans: dict[str, RoutingPlan] = {}
        self.held_with: dict[nn.Parameter, ProcessGroup] = {}
        self.last_checkpoint: str | None = None
        self.unproven_checkpoint: str | None = None
        self._step_sums: dict[str, Tensor] = {}
        self._router_sums: dict[str, dict[str, Tensor]] = {}
        self._step_counts: StepCounts = {}

    @property
    def expert_parameters(self) -> dict[str, SparseLayer]:
        """The parameters of experts, by their names in the state dict, with their layers."""
        names = {parameter: name for name, parameter in self.named_parameters()}
        layers = self.model.sparse_layers.values()
        return {names[parameter]: layer for layer in layers for parameter in layer.experts.parameters()}

    def whole_shapes(self) -> dict[str, torch.Size]:
        """The shapes of all that is in the state dict, with the experts of all ranks."""
        layers, state = self.expert_parameters, self.state_dict()
        experts = {name: torch.Size([layers[name].experts.num_experts, *state[name].shape[1:]]) for name in layers}
        return {name: value.shape for name, value in state.items()} | experts

    def setup(self, stage: str) -> None:
        """Takes from the data, if it knows them, the bytes of each token, for bits per byte, and its frequency.

        With several ranks, lets the tokens of a shuffle go from one to another.
        """
        prepared = getattr(getattr(self.trainer, "datamodule", None), "prepared", None)
        if prepared is not None:
            size = prepared.vocab_size
            if prepared.bytes_per_token is not None:
                self.bytes_per_token[:size] = torch.from_numpy(prepared.bytes_per_token).to(self.bytes_per_token)
            routers = [layer.router for layer in self.model.sparse_layers.values()]
            if stage == "fit" and any(type(router).prepare is not Router.prepare for router in routers):
                token_counts = torch.zeros_like(self.bytes_per_token)
                token_counts[:size] = torch.from_numpy(prepared.train.token_counts(size)).to(token_counts)
                for router in routers:
                    router.prepare(token_counts)
        padding = getattr(getattr(self.trainer, "datamodule", None), "packing", None) != "packed"
        for layer in self.model.sparse_layers.values():
            if layer.shuffle is not None and self.trainer.world_size > 1:
                assert dist.group.WORLD is not None
                layer.shuffle.exchange, layer.shuffle.padding = Exchange(dist.group.WORLD), padding

    def forward(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, RoutingPlan]]:
        """Logits [B, L, V] and the plan of each sparse layer."""
        document = None if self.attend_across_documents else batch["document"]
        try:
            output = self._forward[0](batch["input_ids"], valid_or_none(batch), document)
        except ValueError as error:
            # A solver refuses NaN scores; the user wants to know where they came from.
            self._raise_if_not_finite(batch, error)
            raise
        self.plans = {name: plan.detached() for name, plan in output.plans.items()}
        return output.logits, output.plans

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        micro_batch = batch_idx % self.trainer.accumulate_grad_batches
        self._shuffle_as(micro_batch)
        logits, plans = self(batch)
        nll = F.cross_entropy(
            full_precision(logits.flatten(0, 1)), batch["targets"].flatten(), ignore_index=IGNORED, reduction="sum"
        )
        for layer, plan in self.plans.items():
            sums = self._router_sums.setdefault(layer, {})
            for name, value in self.model.sparse_layers[layer].router.step_sums(plan).items():
                sums[name] = sums[name] + value if name in sums else value
        parts = self.trainer.world_size * self.trainer.accumulate_grad_batches
        if micro_batch == 0:
            self._step_counts = self._count_step(plans, batch)
        share = nll / batch["step_targets"].reshape(-1)[0]
        loss = share * parts
        self._add_to_step("loss", share.detach())
        for name, auxiliary in auxiliary_losses(plans, self.loss_coefficients, self._step_counts, parts).items():
            self._add_to_step(name, auxiliary.detach() / parts)
            coefficient = self.loss_coefficients[name]
            if coefficient:
                loss = loss + coefficient * auxiliary
        if not bool(torch.isfinite(loss)):
            self._raise_if_not_finite(batch, None)
        self.last_checkpoint, self.unproven_checkpoint = self.unproven_checkpoint or self.last_checkpoint, None
        return loss

    def on_train_batch_end(self, outputs: object, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        self._shuffle_as(None)

    def validation_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        logits, _ = self(batch)
        targets = batch["targets"].flatten()
        # Chosen from the losses, not from the logits, which are V times as many.
        nll = F.cross_entropy(full_precision(logits.flatten(0, 1)), targets, ignore_index=IGNORED, reduction="none")
        counted = targets != IGNORED
        self.validation_loss.update(nll[counted], self.bytes_per_token[targets[counted]])

    def on_validation_epoch_end(self) -> None:
        self._log_evaluation("validation")

    def test_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        self.validation_step(batch, batch_idx)

    def on_test_epoch_end(self) -> None:
        self._log_evaluation(self.test_name)

    @property
    def test_name(self) -> str:
        """What the figures of a test pass are called: ``final``, or ``final_<mode>`` for another evaluation mode."""
        mode = getattr(self, "_evaluation_mode", None)
        return "final" if mode is None else f"final_{mode}"

    def set_evaluation_mode(self, mode: str | None) -> None:
        """Routes evaluation in another of the router's ``evaluation_modes``; None restores the default."""
        self._evaluation_mode = mode
        set_evaluation_mode(self.model, mode)

    def configure_optimizers(self) -> Any:
        # A fused optimizer undoes the scaling of 16-mixed by itself, after the gradients were clipped.
        fused = self._trainer is None or self.trainer.precision != "16-mixed"
        optimizer, schedule = make_optimizer(self.model, self.optimizer_options, self.max_steps, fused=fused)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        # Here and not at the end of the batch, where callbacks come first: a checkpoint has to hold the routers' state.
        flat = {(layer, name): value for layer, sums in self._router_sums.items() for name, value in sums.items()}
        reduced = sum_over_ranks(flat, self._reduce)
        for layer, sums in self._router_sums.items():
            self.model.sparse_layers[layer].router.end_step({name: reduced[layer, name] for name in sums})
        self._router_sums = {}

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Takes the norm once: to see that it is finite, to log it and to clip to it."""
        norm = gradient_norm(self.parameters(), self.held_with)
        if not bool(torch.isfinite(norm)) and self.trainer.precision != "16-mixed":
            # Before the weights take it up and are saved; with 16-mixed the scaler skips such a step by itself.
            raise NonFiniteError(self._not_finite("The gradient", "in the backward pass, with a finite loss"))
        self._log_step(norm)
        if gradient_clip_val is not None:
            clip_gradients(self.parameters(), gradient_clip_val, norm)

    def _log_step(self, gradient_norm: Tensor) -> None:
        """Logs the step in progress.

        Written here and not by Lightning, whose rows come after the callbacks of the step: a checkpoint is saved by one
        of these, and has to come after all rows of its step, or a kill between the two would lose some.
        """
        step, sums = self.global_step + 1, self._step_sums
        self._step_sums = {}
        if not self._is_logged(step):
            return
        # Sums over micro batches, then over ranks: the loss of the global batch.
        reduced = sum_over_ranks(sums, self._reduce)
        self.log("train/loss", reduced["loss"], logger=False)
        if step % self.trainer.log_every_n_steps:  # type: ignore[attr-defined]
            return
        values = {f"train/{name}": float(value) for name, value in reduced.items()}
        values |= {
            "train/gradient_norm": float(gradient_norm),
            "train/learning_rate": learning_rate(self.optimizer_options, step, self.max_steps),
        }
        for logger in self.trainer.loggers:
            logger.log_metrics(values, step)

    def _is_logged(self, step: int) -> bool:
        """Whether anybody looks at a step: loggers write every n; a bar wants the first, an evaluation the last.

        Lightning's own check comes after its bookkeeping, which takes a hundredth of a small step.
        """
        return step % self.trainer.log_every_n_steps == 0 or step in (1, self.max_steps)  # type: ignore[attr-defined]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # By name, so that what the optimizer knows of a parameter is found whatever holds it.
        names = {parameter: name for name, parameter in self.named_parameters()}
        checkpoint[PARAMETER_NAMES] = [
            [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]
            for optimizer in self.trainer.optimizers
        ]

    def _count_step(self, plans: Mapping[str, RoutingPlan], batch: Mapping[str, Any]) -> StepCounts:
        """Counts over the whole optimizer step for losses that need them, when its first micro batch is at hand.

        What is still to come is routed ahead, without gradient: a loss built from the counts so far would change with
        the number of micro batches.
        """
        counts = step_counts(plans)
        if not counts:
            return {}
        for number, part in enumerate(batch.get("ahead", ()), 1):
            self._shuffle_as(number)
            document = None if self.attend_across_documents else part["document"]
            with torch.no_grad():
                more = step_counts(self._forward[0](part["input_ids"], valid_or_none(part), document).plans)
            counts = {key: count + more[key] for key, count in counts.items()}
        self._shuffle_as(0)  # activation checkpointing computes the first pass again
        return sum_over_ranks(counts, self._reduce)

    def _shuffle_as(self, micro_batch: int | None) -> None:
        """Which micro batch of this step the passes that follow are of; None: they are of no step."""
        for layer in self.model.sparse_layers.values():
            if layer.shuffle is not None and micro_batch is not None:
                layer.shuffle.begin(self.global_step, micro_batch)
            elif layer.shuffle is not None:
                layer.shuffle.end()

    def _reduce(self, value: Tensor) -> Tensor:
        reduced = self.trainer.strategy.reduce(value, reduce_op="sum")
        assert isinstance(reduced, Tensor)
        return reduced

    def _add_to_step(self, name: str, value: Tensor) -> None:
        self._step_sums[name] = self._step_sums.get(name, torch.zeros_like(value)) + value

    def _log_evaluation(self, name: str) -> None:
        values: dict[str, Any] = {f"{name}/{key}": value for key, value in self.validation_loss.compute().items()}
        self.validation_loss.reset()
        for key, value in values.items():
            self.log(key, value.float(), prog_bar=key == "validation/loss")
        self.log("step", float(self.global_step))

    def _raise_if_not_finite(self, batch: Mapping[str, Tensor], cause: Exception | None) -> None:
        """Runs the batch again with an eye on every block, and names the first that is not finite."""
        self._shuffle_as(None)  # this rank may be the only one that is here
        place = first_not_finite(self.model, batch, parameters=cause is not None)
        if cause is not None and place is None:
            return
        where = f"first in {place}" if place is not None else "in the loss itself, with every layer finite"
        if place is None and self.held_with:
            where = "in a layer that this rank cannot look for, because others hold parts of its parameters"
        raise NonFiniteError(self._not_finite("The loss", where), place) from cause

    def _not_finite(self, what: str, where: str) -> str:
        """The sentence of a failure: the step, the place, and what there is to go back to."""
        last = self.last_checkpoint
        saved = f"the last good checkpoint is {last}" if last else "no checkpoint was saved yet"
        return (
            f"{what} is not finite at step {self.global_step + 1}, {where}; {saved}. "
            "Lower module.learning_rate, set trainer.gradient_clip_val, or train in 32-true."
        )
