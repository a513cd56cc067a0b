"""The identity certificate and the fairness ledger of a run: what it was, and what it spent."""

import hashlib
import importlib.metadata
import platform
import sys
from collections.abc import Mapping
from functools import partial
from typing import Any

import pytorch_lightning as pl
import torch

from lightning_base.callbacks.flops import count_flops
from lightning_base.callbacks.tensorboard import card, tensorboard_writer
from lightning_base.distributed.reduction import over_ranks, rank
from lightning_base.model import shared_parameters, weights_fingerprint
from lightning_base.module import LanguageModel
from lightning_base.program.run_directory import RunDirectory
from lightning_base.program.sources import code_sources, git_commit

PACKAGES = ("torch", "pytorch-lightning", "hydra-core", "omegaconf", "torchmetrics", "numpy", "numba", "tokenizers")


class BatchFingerprint(pl.Callback):
    """A hash of every token batch in the order the model consumed it, the same for any world size and accumulation.

    Each sequence is hashed with the step and the slot of the global batch in which it was consumed; the hashes are
    added modulo 2^128. A sum needs no order between ranks, and a sequence at another place has another hash.
    """

    MODULUS = 2**128

    def __init__(self) -> None:
        self.total = 0
        self.sequences = 0

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Mapping[str, Any], batch_idx: int
    ) -> None:
        parts = trainer.accumulate_grad_batches
        step, part = divmod(batch_idx, parts)
        rows = batch["rows"]  # of the data module, which keeps them on the host
        first = (part * trainer.world_size + trainer.global_rank) * len(rows)
        for slot, row in enumerate(rows, start=first):
            digest = hashlib.blake2b(f"{step}:{slot}:".encode() + row.tobytes(), digest_size=16).digest()
            self.total = (self.total + int.from_bytes(digest, "little")) % self.MODULUS
        self.sequences += len(rows)

    def combined(self) -> tuple[str, int]:
        """The fingerprint and the number of sequences over all ranks; every rank has to ask."""
        parts = over_ranks((self.total, self.sequences))
        total = sum(part[0] for part in parts) % self.MODULUS
        return f"{total:032x}", sum(part[1] for part in parts)

    def state_dict(self) -> dict[str, Any]:
        # Lightning builds checkpoints on every rank and keeps the first rank's: it has to hold all of the sum.
        fingerprint, sequences = self.combined()
        return {"fingerprint": fingerprint, "sequences": sequences}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.total = 0 if rank() else int(state_dict["fingerprint"], 16)
        self.sequences = 0 if rank() else int(state_dict["sequences"])


class Certificate(pl.Callback):
    """Writes what identifies the run and what a token costs into manifest.json before the first step.

    TensorBoard gets the same as text cards: ``certificate``, ``ledger`` and ``configuration``.
    """

    def __init__(self, run: RunDirectory, config: dict[str, Any]) -> None:
        self.run, self.config = run, config
        # How the steps were computed, and from which one on: a run may go on with another number of ranks.
        self.layouts: list[dict[str, Any]] = []
        # Of the packages whose code has computed them, one after the other.
        self.sources: list[dict[str, Any]] = []

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        # Before a checkpoint is restored: a resumed run starts from the same initial weights.
        if stage != "fit":
            return
        assert isinstance(pl_module, LanguageModel)
        experts = experts_fingerprint(pl_module)
        if not trainer.is_global_zero:
            return
        self.run.write_manifest(
            initial_weights_fingerprint=weights_fingerprint(shared_parameters(pl_module.model)),
            initial_expert_weights_fingerprint=experts,
        )

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, LanguageModel)
        ledger = self._ledger(trainer, pl_module)  # by all ranks: with sharded experts a pass needs every one
        if not trainer.is_global_zero:
            return
        prepared = trainer.datamodule.prepared  # type: ignore[attr-defined]
        certificate: dict[str, Any] = {
            "corpus_fingerprint": prepared.fingerprint,
            "tokenizer_sha256": prepared.tokenizer_sha256,
            "seed": self.config["seed"],
            "config": self.config,
            "architecture": pl_module.model.architecture,
            "packages": {name: importlib.metadata.version(name) for name in (*PACKAGES, *pl_module.model.packages)},
            "python": platform.python_version(),
            "git_commit": git_commit(),
            "sources": code_sources(self.config),
            "world_size": trainer.world_size,
            "device": device_name(pl_module.device),
            "corpus": prepared.statistics,
        }
        self.run.write_manifest(**certificate, ledger=ledger)
        writer = tensorboard_writer(trainer, only_new=True)
        if writer is not None:
            manifest = self.run.manifest()
            cards = {"ledger": manifest.pop("ledger"), "configuration": manifest.pop("config"), "certificate": manifest}
            for tag, values in cards.items():
                writer.add_text(tag, card(values))

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        layout = {
            "world_size": trainer.world_size,
            "strategy": self.config["strategy"]["name"],
            "accumulation": trainer.accumulate_grad_batches,
        }
        before = {**self.layouts[-1]} if self.layouts else {}
        before.pop("from_step", None)
        if layout != before:
            self.layouts.append({"from_step": trainer.global_step, **layout})
        if not trainer.is_global_zero:
            return
        sources = self.run.manifest()["sources"]
        if self.sources[-1:] != [sources]:
            if self.sources:
                said = "the code is not that of the steps so far: the report will keep this run apart from others"
                print(f"going on from step {trainer.global_step}, and {said}", file=sys.stderr, flush=True)
            self.sources.append(sources)
        self.run.write_manifest(layouts=self.layouts, earlier_sources=self.sources[:-1])

    def state_dict(self) -> dict[str, Any]:
        return {"layouts": self.layouts, "sources": self.sources}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.layouts = list(state_dict["layouts"])
        self.sources = list(state_dict.get("sources", [{}]))  # of an older checkpoint nobody knows

    def _ledger(self, trainer: pl.Trainer, pl_module: LanguageModel) -> dict[str, Any]:
        model = pl_module.model
        layers = model.sparse_layers
        router = next(iter(layers.values())).router
        held = sum(p.numel() for layer in layers.values() for p in layer.experts.parameters())
        experts = held * router.num_experts // len(next(iter(layers.values())).experts.held)
        total = sum(p.numel() for p in model.parameters()) - held + experts
        dataset = trainer.datamodule.training_sequences()  # type: ignore[attr-defined]
        items = [dataset[i] for i in range(next(iter(layers.values())).routing_group)]
        batch = {name: torch.stack([item[name] for item in items]).to(pl_module.device) for name in items[0]}
        flops = count_flops(pl_module, batch, mean_over_ranks=partial(trainer.strategy.reduce, reduce_op="mean"))
        return {
            "router": type(router).__name__,
            "num_experts": router.num_experts,
            "top_k": router.top_k,
            "capacity_factor": getattr(router, "capacity_factor", None),
            "asks_for_fewer": router.asks_for_fewer,
            "causal_in_training": router.causal,
            "straight_through": router.straight_through,
            "evaluation_modes": dict(router.evaluation_modes),
            "parameters": total,
            "active_parameters": total - experts + experts * router.top_k // router.num_experts,
            "expert_hidden_width": next(iter(layers.values())).experts.hidden_width,
            "split_width": self.config["model"]["split_width"],
            "loss_coefficients": pl_module.loss_coefficients,
            **flops,
        }


def experts_fingerprint(module: LanguageModel) -> str:
    """SHA-256 over that of every expert, whichever rank holds it; every rank has to ask."""
    parameters = dict(module.named_parameters())
    digests = {
        (name, expert): weights_fingerprint(iter([(name, torch.nn.Parameter(value.detach(), requires_grad=False))]))
        for name, layer in module.expert_parameters.items()
        for expert, value in zip(layer.experts.held, parameters[name], strict=True)
    }
    merged = {key: digest for of_rank in over_ranks(digests) for key, digest in of_rank.items()}
    return hashlib.sha256(repr(sorted(merged.items())).encode()).hexdigest()


def device_name(device: torch.device) -> str:
    """What the numbers were measured on."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
