"""The data of a run, as Lightning asks for it."""

import warnings
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from lightning_base.data.corpus import Corpus
from lightning_base.data.evaluation import EvaluationSampler
from lightning_base.data.loader import TokenLoader, TrainingLoader
from lightning_base.data.order import GlobalBatchSampler, check_batch
from lightning_base.data.preparation import prepare_for_run
from lightning_base.data.prepared import PreparedCorpus
from lightning_base.data.sequences import SequenceDataset, check_sequences


def with_host_values(batch: dict[str, Any]) -> dict[str, Any]:
    """A batch with what is looked at in every step, and would make the host wait if it were looked at on a GPU.

    `padded`, whether any position is padding; in training `targets_of_step`, the number of targets in the whole global
    batch; and `rows` [b, 2L], inputs and targets as a numpy array, which no transfer moves.
    """
    rows = torch.cat([batch["input_ids"], batch["targets"]], 1).numpy()
    ahead = {"ahead": [part | {"padded": is_padded(part)} for part in batch["ahead"]]} if "ahead" in batch else {}
    counts = {"targets_of_step": int(batch["step_targets"])} if "step_targets" in batch else {}
    return batch | {"padded": is_padded(batch), "rows": rows} | counts | ahead


def is_padded(batch: dict[str, Any]) -> bool:
    """Whether any position of a batch is padding."""
    return not bool(batch["valid"].all())


class TextDataModule(pl.LightningDataModule):
    """Prepares a corpus once per node and loads it in the order of `GlobalBatchSampler` and `EvaluationSampler`.

    The Trainer needs `use_distributed_sampler=False` and one epoch: iterating the training loader is the whole run.
    `prepare_data` may be called without a Trainer, to find everything that is wrong with the input before ranks start.

    Args:
        corpus: where the documents come from.
        sequence_length: L, tokens in a sequence.
        global_batch: sequences in an optimizer step, over all ranks and micro batches.
        routing_group: sequences that are routed together.
        vocab_size: tokens in the vocabulary.
        validation_fraction: share of the corpus, in bytes, that is held out.
        packing: "packed" or "documents", see `SequenceDataset`.
        attend_across_documents: False leaves out the targets that would be predicted from another document.
        validation_sequences: how many sequences the periodic validation looks at; None is all of them. The test
            loader always takes the whole validation split.
        num_workers: processes that load training batches. Reading a memory map takes microseconds, so 0 is good.
        cache_dir: where prepared corpora are kept.
        seed: of the order of training sequences.
        num_steps: optimizer steps in the whole run.
        accumulation: micro batches per step and rank.
        distinct_batches: how many global batches training repeats over and over; None takes new text in every step.
        tokenizer: a `tokenizer.json` of one's own, or a folder with one; None learns one from text.
        end_of_text: the token that ends a document, for token ids and with a tokenizer of one's own.
        prepared: the name of the corpus's folder in `cache_dir`, if it has been prepared already.

    Attributes:
        prepared: the `PreparedCorpus`, after `prepare_data` or `setup`.

    Raises:
        ValueError: settings that cannot be used, in one sentence that names the key.
    """

    prepared: PreparedCorpus | None

    def __init__(
        self,
        corpus: Corpus,
        *,
        sequence_length: int,
        global_batch: int,
        routing_group: int,
        vocab_size: int,
        validation_fraction: float,
        packing: str = "packed",
        attend_across_documents: bool = True,
        validation_sequences: int | None = None,
        num_workers: int = 0,
        cache_dir: str | Path,
        seed: int,
        num_steps: int,
        accumulation: int = 1,
        distinct_batches: int | None = None,
        tokenizer: str | None = None,
        end_of_text: str | int | None = None,
        prepared: str | None = None,
    ) -> None:
        super().__init__()
        check_sequences(sequence_length, packing)
        check_batch(global_batch, 1, accumulation, routing_group)
        self.corpus = corpus
        self.sequence_length = sequence_length
        self.global_batch = global_batch
        self.routing_group = routing_group
        self.vocab_size = vocab_size
        self.validation_fraction = validation_fraction
        self.packing = packing
        self.attend_across_documents = attend_across_documents
        self.validation_sequences = validation_sequences
        self.num_workers = num_workers
        self.cache_dir = Path(cache_dir).expanduser()
        self.seed = seed
        self.num_steps = num_steps
        self.accumulation = accumulation
        self.distinct_batches = distinct_batches
        self.tokenizer = tokenizer
        self.end_of_text = end_of_text
        self.prepared_folder = prepared
        self.prepared = None

    @property
    def world_size(self) -> int:
        """The Trainer's, or 1 without one."""
        return self.trainer.world_size if self.trainer else 1

    @property
    def rank(self) -> int:
        """The Trainer's global rank, or 0 without one."""
        return self.trainer.global_rank if self.trainer else 0

    def prepare_data(self) -> None:
        """Builds the cache, or finds it, and checks that there is enough text for one training batch; once.

        Raises:
            CorpusError: the input cannot be used, in one sentence that names the key.
        """
        if self.prepared is not None:
            return
        if self.prepared_folder is not None:
            self.prepared = PreparedCorpus(self.cache_dir.resolve() / self.prepared_folder)
        else:
            self.prepared = prepare_for_run(self.corpus, self)

    def setup(self, stage: str | None = None) -> None:
        """Opens the cache; only the first rank of each node has read the corpus to find it.

        Raises:
            ValueError: the global batch cannot be divided over the ranks.
        """
        check_batch(self.global_batch, self.world_size, self.accumulation, self.routing_group)
        if self.trainer and self.world_size > 1:
            # By name: the folder of caches may have another path on another node.
            name = self.trainer.strategy.broadcast(self.prepared.folder.name if self.prepared else "")
            self.prepared = self.prepared or PreparedCorpus(self.cache_dir.resolve() / name)
        elif self.prepared is None:
            self.prepare_data()
        # Lightning recommends more workers to whoever has few; here they would only cost memory.
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")

    def train_dataloader(self) -> TrainingLoader:
        """The micro batches of this rank for the whole run, see `TrainingLoader`."""
        dataset = self.training_sequences()
        sampler = GlobalBatchSampler(
            len(dataset),
            global_batch=self.global_batch,
            seed=self.seed,
            num_steps=self.num_steps,
            world_size=self.world_size,
            rank=self.rank,
            accumulation=self.accumulation,
            distinct_batches=self.distinct_batches,
        )
        return TrainingLoader(dataset, sampler, self.num_workers)

    def val_dataloader(self) -> TokenLoader:
        """`validation_sequences` sequences of the validation split."""
        return self._evaluation_loader(self.validation_sequences)

    def test_dataloader(self) -> TokenLoader:
        """The whole validation split."""
        return self._evaluation_loader(None)

    def on_before_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        """Looks at a batch as long as it is on the host."""
        return with_host_values(batch)

    def training_sequences(self) -> SequenceDataset:
        """The training split as sequences."""
        return self._sequences(self._opened(), training=True)

    def _sequences(self, prepared: PreparedCorpus, training: bool) -> SequenceDataset:
        return SequenceDataset(
            prepared.train if training else prepared.validation,
            self.sequence_length,
            self.packing,
            attend_across_documents=self.attend_across_documents,
            drop_last=training,
        )

    def _evaluation_loader(self, limit: int | None) -> TokenLoader:
        dataset = self._sequences(self._opened(), training=False)
        sampler = EvaluationSampler(
            len(dataset),
            # As many at a time as in training, so that what fits into memory there fits here.
            global_batch=self.global_batch // self.accumulation,
            group_sequences=self.routing_group,
            world_size=self.world_size,
            rank=self.rank,
            limit=limit,
        )
        return TokenLoader(dataset, sampler)

    def _opened(self) -> PreparedCorpus:
        if self.prepared is None:
            raise RuntimeError("the data is not prepared yet: call setup() first.")
        return self.prepared
