"""The data of a run, as Lightning asks for it."""

import warnings
from pathlib import Path

import pytorch_lightning as pl

from lightning_base.data.corpus import Corpus, CorpusError
from lightning_base.data.evaluation import EvaluationSampler
from lightning_base.data.loader import TokenLoader, TrainingLoader
from lightning_base.data.order import GlobalBatchSampler, check_batch
from lightning_base.data.preparation import prepare
from lightning_base.data.prepared import PreparedCorpus
from lightning_base.data.sequences import SequenceDataset, check_sequences


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
        prepared = prepare(
            self.corpus,
            vocab_size=self.vocab_size,
            validation_fraction=self.validation_fraction,
            cache_dir=self.cache_dir,
        )
        self._check_size(prepared)
        self.prepared = prepared

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
        )
        return TrainingLoader(dataset, sampler, self.num_workers)

    def val_dataloader(self) -> TokenLoader:
        """`validation_sequences` sequences of the validation split."""
        return self._evaluation_loader(self.validation_sequences)

    def test_dataloader(self) -> TokenLoader:
        """The whole validation split."""
        return self._evaluation_loader(None)

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

    def _check_size(self, prepared: PreparedCorpus) -> None:
        sequences = len(self._sequences(prepared, training=True))
        if sequences < self.global_batch:
            raise CorpusError(
                f"data.corpus is too small: it makes {sequences} training sequences of data.sequence_length="
                f"{self.sequence_length}, and data.global_batch={self.global_batch} asks for more: "
                "give more text, shorter sequences or a smaller batch."
            )
        tokens = len(prepared.validation.tokens)
        if tokens < self.sequence_length:
            raise CorpusError(
                f"data.corpus is too small: data.validation_fraction={self.validation_fraction} leaves {tokens} tokens "
                f"to validate on, less than one sequence of data.sequence_length={self.sequence_length}: "
                "give more text, shorter sequences or a larger fraction."
            )
