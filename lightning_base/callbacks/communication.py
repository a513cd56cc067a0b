"""What sparse layers send between ranks in a training step, and what the exchange costs.

Shapes: W ranks, M messages of one rank in a step, L layers.
"""

import csv
import time
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from jaxtyping import Float64
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_base.callbacks.metrics_csv import start_csv
from lightning_base.module import LanguageModel
from lightning_base.moe.exchange import Exchange
from lightning_base.moe.layer import SparseLayer
from lightning_base.program.run_directory import RunDirectory

COLUMNS = ("step", "layer", "rank", "bytes_sent", "bytes_received", "largest_message", "seconds", "waiting")


class Message(NamedTuple):
    """One collective as a rank sees it; its own part, which never leaves it, is not counted.

    Args:
        layer: its number.
        group: the first rank of those that take part.
        peers: the other ranks of these.
        begin: when this rank was ready [s].
        end: when everything had arrived [s].
        sent: bytes.
        received: bytes.
        largest: bytes to or from one rank.
        tokens: 1 if tokens go to experts, forward; then ``sent`` says how evenly they are asked for.
    """

    layer: int
    group: int
    peers: int
    begin: float
    end: float
    sent: int
    received: int
    largest: int
    tokens: int


class Tally:
    """The meter of one layer's exchange; on a GPU it waits for the device, before and after.

    Args:
        messages: where to write them down.
        layer: its number.
        exchange: what is measured.
        device: where the layer is.
    """

    def __init__(self, messages: list[Message], layer: int, exchange: Exchange, device: torch.device) -> None:
        self._messages, self._layer, self._own, self._device = messages, layer, exchange.rank, device
        self._group, self._peers = dist.get_process_group_ranks(exchange.group)[0], exchange.size - 1
        self._begin = 0.0

    def begin(self) -> None:
        self._begin = self._now()

    def end(self, kind: str, sent: list[int], received: list[int]) -> None:
        out, into = (sum(parts) - parts[self._own] for parts in (sent, received))
        largest = max([0, *(n for parts in (sent, received) for i, n in enumerate(parts) if i != self._own)])
        where = (self._layer, self._group, self._peers)
        self._messages.append(Message(*where, self._begin, self._now(), out, into, largest, int(kind == "dispatch")))

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.time()  # not a monotonic clock: ranks compare theirs


class Communication(pl.Callback):
    """Logs what the sparse layers of a logged step exchange between ranks, and writes it down by rank and layer.

    Names are ``communication/<what>/<layer|mean|max>``, over all messages of one optimizer step: forward, backward,
    counts, shuffles, what activation checkpointing sends again and what is routed ahead. What a rank keeps is not sent.
    Nothing is logged where nothing is exchanged.

    ``bytes``: sent by a rank, the mean over ranks, which is also what one receives.
    ``busiest_rank``: the most that one rank sends or receives, over that mean: 1 if all do the same.
    ``largest_message``: bytes from one rank to another.
    ``uneven_dispatch``: the largest message with tokens for experts over the mean one: 1 for equal loads.
    ``seconds``: from when a rank is ready to when all has arrived, the mean over ranks.
    ``waiting``: of these, until the slowest rank is ready. Ranks on several nodes compare their clocks as they are.

    ``communication/share``: ``seconds`` of all layers over the time of the step.

    The forward part is in ``train_time/dispatch`` and ``combine``, the rest in ``train_time/backward_and_optimizer``.
    Gradients that DDP or FSDP reduce are not measured: they overlap the backward pass. Their bytes are computed from
    sizes, see ``gradient_bytes``, and stand in the manifest.

    Args:
        run: where ``communication.csv`` goes.
        log_every_n_steps: optimizer steps between two measured steps; the first step is measured too.
        resumed_step: rows after this step are cut when a run resumes.
    """

    def __init__(self, run: RunDirectory, log_every_n_steps: int, resumed_step: int | None = None) -> None:
        self.run, self.path, self.resumed_step = run, run.path / "communication.csv", resumed_step
        self.log_every_n_steps = log_every_n_steps
        self._messages: list[Message] = []
        self._began = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, LanguageModel)
        if not trainer.is_global_zero:
            return
        if trainer.world_size > 1:
            computed = round(gradient_bytes(pl_module, trainer.world_size))
            self.run.write_manifest(communication={"gradient_bytes_computed": computed})
        if self.path.exists() or any(exchanges(layer) for layer in pl_module.model.sparse_layers.values()):
            start_csv(self.path, COLUMNS, self.resumed_step)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, LanguageModel)
        step, part = divmod(batch_idx, trainer.accumulate_grad_batches)
        if part or ((step + 1) % self.log_every_n_steps and step):
            return
        for number, layer in enumerate(pl_module.model.sparse_layers.values()):
            for exchange in exchanges(layer):
                exchange.meter = Tally(self._messages, number, exchange, pl_module.device)
        self._began = time.time()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, LanguageModel)
        if not self._messages or (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        taken, messages, layers = time.time() - self._began, self._messages, pl_module.model.sparse_layers
        self._messages = []
        for layer in layers.values():
            for exchange in exchanges(layer):
                exchange.meter = None
        mine = torch.tensor([*messages, (taken,) * len(Message._fields)], dtype=torch.float64, device=pl_module.device)
        ranks = trainer.strategy.all_gather(mine).reshape(-1, *mine.shape).cpu()
        if not trainer.is_global_zero:
            return
        by_rank = costs(ranks[:, :-1], len(layers))
        values = {"communication/share": float(by_rank["seconds"].sum(1).mean() / ranks[:, -1, 0].mean())}
        for what, found_L in summary(by_rank).items():
            by_layer = dict(zip(layers, found_L.tolist(), strict=True))
            by_layer |= {"mean": float(found_L.mean()), "max": float(found_L.max())}
            values |= {f"communication/{what}/{layer}": value for layer, value in by_layer.items()}
        for logger in trainer.loggers:
            logger.log_metrics(values, trainer.global_step)
        with open(self.path, "a", newline="") as file:
            writer = csv.writer(file)
            for i, name in enumerate(layers):
                for rank in range(len(ranks)):
                    counts = [int(by_rank[what][rank, i]) for what in COLUMNS[3:6]]
                    times = [f"{float(by_rank[what][rank, i]):.6f}" for what in COLUMNS[6:]]
                    writer.writerow((trainer.global_step, name, rank, *counts, *times))


def exchanges(layer: SparseLayer) -> list[Exchange]:
    """Through which the tokens of a layer go to other ranks."""
    found = (layer.exchange, None if layer.shuffle is None else layer.shuffle.exchange)
    return [exchange for exchange in found if exchange is not None]


def costs(messages_WMC: Float64[Tensor, "W M C"], layers: int) -> dict[str, Float64[Tensor, "W L"]]:
    """By rank and layer: ``bytes_sent``, ``bytes_received``, ``largest_message``, ``seconds``, ``waiting``; and of the
    messages with tokens for experts the ``largest_dispatch`` and what is ``dispatched`` to a peer on average.

    Args:
        messages_WMC: [W, M, C], the fields of ``Message``; the m-th of all ranks of a group are one collective.
        layers: L.
    """
    of = dict(zip(Message._fields, messages_WMC.unbind(-1), strict=True))
    layer_WM, group_WM = of["layer"].long(), of["group"].long()
    latest = torch.full_like(of["begin"], -torch.inf).scatter_reduce(0, group_WM, of["begin"], "amax")
    waiting_WM = latest.gather(0, group_WM) - of["begin"]
    zeros = of["begin"].new_zeros(len(of["begin"]), layers)

    def total(value_WM: Tensor) -> Tensor:
        return zeros.scatter_add(1, layer_WM, value_WM)

    def largest(value_WM: Tensor) -> Tensor:
        return zeros.scatter_reduce(1, layer_WM, value_WM, "amax")

    return {
        "bytes_sent": total(of["sent"]),
        "bytes_received": total(of["received"]),
        "largest_message": largest(of["largest"]),
        "seconds": total(of["end"] - of["begin"]),
        "waiting": total(torch.minimum(waiting_WM, of["end"] - of["begin"])),
        "largest_dispatch": largest(of["largest"] * of["tokens"]),
        "dispatched": total(of["sent"] * of["tokens"] / of["peers"].clamp(min=1)) / total(of["tokens"]).clamp(min=1),
    }


def summary(by_rank: dict[str, Float64[Tensor, "W L"]]) -> dict[str, Float64[Tensor, " L"]]:
    """What is logged of each layer, from ``costs``; ``uneven_dispatch`` only where tokens go to experts."""
    sent_L = by_rank["bytes_sent"].mean(0)
    busiest_L = torch.maximum(by_rank["bytes_sent"], by_rank["bytes_received"]).amax(0)
    found = {
        "bytes": sent_L,
        "busiest_rank": busiest_L / sent_L.clamp(min=1),
        "largest_message": by_rank["largest_message"].amax(0),
        "seconds": by_rank["seconds"].mean(0),
        "waiting": by_rank["waiting"].mean(0),
    }
    if bool(by_rank["dispatched"].any()):
        found["uneven_dispatch"] = by_rank["largest_dispatch"].amax(0) / by_rank["dispatched"].mean(0).clamp(min=1)
    return found


def gradient_bytes(module: LanguageModel, world_size: int) -> float:
    """Bytes that a rank sends in a step to reduce gradients, computed and not measured.

    Of a parameter of b bytes with c copies a ring all-reduce sends 2 b (c - 1) / c per rank. A parameter in slices over
    W ranks, as FSDP keeps it, is gathered forward and backward and its gradient scattered: 3 b (W - 1) / W.
    """
    total = 0.0
    for parameter in module.parameters():
        size = parameter.numel() * parameter.element_size()
        if isinstance(parameter, DTensor):
            total += 3 * size * (world_size - 1) / world_size
        elif parameter.requires_grad:
            group = module.held_with.get(parameter)
            copies = world_size // (1 if group is None else dist.get_world_size(group))
            total += 2 * size * (copies - 1) / copies
    return total
