"""The order in which sequences are evaluated: each exactly once, on any number of ranks."""

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

from lightning_base.data.sequences import PADDING


class EvaluationSampler(Sampler[list[int]]):
    """The batches of one rank when a split is evaluated.

    Sequences are taken in order, a global batch at a time; a rank's share is a run of consecutive whole routing groups,
    so groups hold the same sequences whatever the world size. Every rank gets equally many batches of equal size: what
    is missing at the end is padding (index -1), which has no targets, so nothing is counted twice and no rank waits for
    another.

    Args:
        dataset_length: how many sequences there are.
        global_batch: sequences evaluated at a time by all ranks together.
        group_sequences: sequences in a routing group.
        world_size: number of ranks.
        rank: which of them this is.
        limit: evaluate only this many, spread evenly so that they stand for the whole split; None evaluates all.

    Raises:
        ValueError: the global batch is not a whole number of routing groups per rank, or the limit is below 1.
    """

    def __init__(
        self,
        dataset_length: int,
        *,
        global_batch: int,
        group_sequences: int = 1,
        world_size: int = 1,
        rank: int = 0,
        limit: int | None = None,
    ) -> None:
        if global_batch < 1 or global_batch % (world_size * group_sequences):
            raise ValueError(
                f"a global batch of {global_batch} sequences in evaluation cannot be divided by ranks x "
                f"data.routing_group = {world_size} x {group_sequences}: "
                f"choose a multiple of {world_size * group_sequences}."
            )
        if limit is not None and limit < 1:
            raise ValueError(f"data.validation_sequences={limit} evaluates nothing: give 1 or more, or null for all.")
        self.dataset_length = dataset_length
        self.count = dataset_length if limit is None else min(limit, dataset_length)
        self.global_batch = global_batch
        self.share = global_batch // world_size
        self.rank = rank

    def __len__(self) -> int:
        """Batches per rank."""
        return -(-self.count // self.global_batch)

    def __iter__(self) -> Iterator[list[int]]:
        for batch in range(len(self)):
            place = batch * self.global_batch + self.rank * self.share + np.arange(self.share)
            sequence = place * self.dataset_length // self.count
            yield np.where(place < self.count, sequence, PADDING).tolist()
