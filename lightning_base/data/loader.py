"""Loaders of sequences. Where training stands is one number: the sequences all ranks together have consumed."""

import multiprocessing
import signal
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import Sampler
from torchdata.stateful_dataloader import StatefulDataLoader

from lightning_base.data.order import SEQUENCES_CONSUMED, GlobalBatchSampler
from lightning_base.data.sequences import SequenceDataset
from lightning_base.program.processes.launch import STOP_SIGNALS


class TokenLoader(StatefulDataLoader):
    """Batches of sequences, in the order of a batch sampler."""

    def __init__(self, dataset: SequenceDataset, sampler: Sampler[list[int]], num_workers: int = 0) -> None:
        with warnings.catch_warnings():
            # torchdata 0.11 calls a function that torch 2.10 and later call deprecated.
            warnings.filterwarnings("ignore", message="'set_vital' is deprecated")
            super().__init__(
                dataset,
                batch_sampler=sampler,
                num_workers=num_workers,
                # Forking a process with threads (Lightning, tokenizers, CUDA) can deadlock.
                multiprocessing_context=worker_context() if num_workers else None,
            )

    def __iter__(self) -> Iterator[Any]:
        # Workers inherit what is held back: asked to stop along with everybody, a rank needs them for one more step.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        try:
            return super().__iter__()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


class TrainingLoader(TokenLoader):
    """Batches of one rank for a whole run.

    A batch is the items of its sequences, stacked to [b, L], and `step_targets`, an int64 scalar: the targets in the
    whole global batch of this step, over all ranks and micro batches. Losses summed and divided by it come to the same
    whatever the world size. With accumulation, the first micro batch of a step also brings `ahead`, the inputs of those
    that follow it on this rank, for losses that need the counts of the whole step.

    StatefulDataLoader's own state holds a snapshot per worker process and can be loaded only with as many workers. A
    sequence is read from disk by its index alone, so the number of sequences consumed says everything, and is the same
    number on every rank. What workers have fetched in advance does not count as consumed.
    """

    def __init__(self, dataset: SequenceDataset, sampler: GlobalBatchSampler, num_workers: int = 0) -> None:
        super().__init__(dataset, sampler, num_workers)
        self._consumed = sampler.start
        self._resume: int | None = None

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        self._consumed = self.batch_sampler.start if self._resume is None else self._resume
        return self._batches(self._consumed)

    def _batches(self, consumed: int) -> Iterator[dict[str, torch.Tensor]]:
        sampler, dataset = self.batch_sampler, self.dataset
        sampler.load_state_dict({SEQUENCES_CONSUMED: consumed})
        self._resume = None  # not before the first batch, as in the sampler
        step, step_targets = -1, torch.zeros((), dtype=torch.int64)
        try:
            for batch in super().__iter__():
                if step != consumed // sampler.global_batch:
                    step = consumed // sampler.global_batch
                    step_targets = torch.tensor(int(dataset.number_of_targets(sampler.global_batch_at(step)).sum()))
                    if sampler.accumulation > 1:
                        batch = batch | {"ahead": self._ahead(step)}
                consumed += sampler.consumed_at_once
                self._consumed = consumed
                yield batch | {"step_targets": step_targets}
        finally:
            self._iterator = None  # ends the workers

    def _ahead(self, step: int) -> list[dict[str, torch.Tensor]]:
        """The inputs of this rank's micro batches of a step after the first one."""
        items = [[self.dataset[i] for i in indices] for indices in self.batch_sampler.micro_batches_at(step)[1:]]
        names = ("input_ids", "valid", "document")
        return [{name: torch.stack([item[name] for item in part]) for name in names} for part in items]

    def state_dict(self) -> dict[str, Any]:
        """How many sequences all ranks together have consumed."""
        return {SEQUENCES_CONSUMED: self._consumed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The next iteration goes on from there.

        Raises:
            ValueError: the state lies inside a micro batch of this accumulation.
        """
        self.batch_sampler.load_state_dict(state_dict)
        self._consumed = self._resume = state_dict[SEQUENCES_CONSUMED]


def worker_context() -> multiprocessing.context.BaseContext:
    """How to start a loader's workers without forking this process."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    # Imported once in the server that workers are forked from, instead of once in each of them.
    context.set_forkserver_preload(["__main__", "lightning_base.data.sequences"])
    return context
