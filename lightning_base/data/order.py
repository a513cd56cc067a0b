"""The order in which a run consumes its training sequences.

Position j of a run (step i, slot s of its global batch: j = i*G + s) is sequence `permutation_e[j mod N]` of epoch
e = j // N, a permutation drawn from (seed, e). So the global batch of step i depends on the corpus, the seed and i, and
on nothing else: not on ranks, accumulation, workers, or where a run was resumed.

N sequences, G sequences in a global batch, W ranks, A micro batches per step and rank, b = G/(W*A) sequences in each.
"""

from collections.abc import Iterator
from functools import lru_cache

import numpy as np
from jaxtyping import Int64
from torch.utils.data import Sampler

SEQUENCES_CONSUMED = "sequences_consumed"


def check_batch(global_batch: int, world_size: int, accumulation: int, routing_group: int) -> None:
    """Checks that every micro batch of every rank is a whole number of routing groups.

    Raises:
        ValueError: it is not, with the nearest global batches that would do.
    """
    unit = world_size * accumulation * routing_group
    if global_batch < 1 or global_batch % unit:
        raise ValueError(
            f"data.global_batch={global_batch} cannot be divided by trainer.devices x trainer.accumulate_grad_batches "
            f"x data.routing_group = {world_size} x {accumulation} x {routing_group}: choose a multiple of {unit}."
        )


class GlobalBatchSampler(Sampler[list[int]]):
    """The micro batches of one rank, for a whole run.

    A global batch is laid out micro batch first, then rank: micro batch a of rank r holds slots a*W*b + r*b and the
    b - 1 after it. One iteration is the whole run: `num_steps * accumulation` micro batches, over as many epochs as
    that takes.

    Its state is the number of sequences that all ranks together have consumed, so it can be resumed with another world
    size, and with another accumulation between two steps.

    Args:
        dataset_length: N.
        global_batch: G.
        seed: of the permutations; not negative.
        num_steps: optimizer steps in the whole run.
        world_size: W.
        rank: which of them this is.
        accumulation: A.
        start_step: the step to begin with.
        distinct_batches: how many global batches there are before the first one comes again; None lets epochs decide.

    Raises:
        ValueError: the global batch cannot be divided, or does not fit into one epoch.
    """

    def __init__(
        self,
        dataset_length: int,
        *,
        global_batch: int,
        seed: int,
        num_steps: int,
        world_size: int = 1,
        rank: int = 0,
        accumulation: int = 1,
        start_step: int = 0,
        distinct_batches: int | None = None,
    ) -> None:
        check_batch(global_batch, world_size, accumulation, routing_group=1)
        if dataset_length < global_batch:
            raise ValueError(
                f"data.global_batch={global_batch} is more than the {dataset_length} training sequences there are: "
                "choose a smaller batch or sequence length, or give more text."
            )
        if seed < 0:
            raise ValueError(f"seed={seed} is negative: give 0 or more.")
        self.dataset_length = dataset_length
        self.global_batch = global_batch
        self.seed = seed
        self.num_steps = num_steps
        self.period = None if distinct_batches is None else distinct_batches * global_batch
        self.accumulation = accumulation
        self.micro_batch = global_batch // (world_size * accumulation)
        self.rank = rank
        self.start = start_step * global_batch
        self._consumed = self.start
        self._resume: int | None = None

    def __len__(self) -> int:
        """Micro batches in the whole run, those before the start included."""
        return self.num_steps * self.accumulation

    @property
    def consumed_at_once(self) -> int:
        """Sequences that all ranks together consume with one micro batch: W * b."""
        return self.global_batch // self.accumulation

    def global_batch_at(self, step: int) -> Int64[np.ndarray, "G"]:
        """The sequences of one optimizer step, over all ranks and micro batches."""
        return self._at(step * self.global_batch, self.global_batch)

    def micro_batches_at(self, step: int) -> list[list[int]]:
        """The sequences of this rank in one optimizer step, a list for each micro batch."""
        first = step * self.global_batch + self.rank * self.micro_batch
        starts = range(first, first + self.global_batch, self.consumed_at_once)
        return [self._at(start, self.micro_batch).tolist() for start in starts]

    def __iter__(self) -> Iterator[list[int]]:
        # Set here and not in the generator: the state must be right before the first batch is asked for.
        self._consumed = self.start if self._resume is None else self._resume
        return self._micro_batches(self._consumed)

    def _micro_batches(self, consumed: int) -> Iterator[list[int]]:
        self._resume = None  # not before the first batch: a loader may ask for several iterators and use the last
        while consumed < self.num_steps * self.global_batch:
            first = consumed + self.rank * self.micro_batch
            consumed += self.consumed_at_once
            self._consumed = consumed
            yield self._at(first, self.micro_batch).tolist()

    def state_dict(self) -> dict[str, int]:
        """How many sequences all ranks together have consumed."""
        return {SEQUENCES_CONSUMED: self._consumed}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """The next iteration goes on from there.

        Raises:
            ValueError: the state lies inside a micro batch of this accumulation.
        """
        consumed = state[SEQUENCES_CONSUMED]
        if consumed % self.consumed_at_once:
            raise ValueError(
                f"the checkpoint was taken after {consumed} sequences, inside a step of data.global_batch="
                f"{self.global_batch}, where trainer.accumulate_grad_batches={self.accumulation} cannot go on: "
                "resume with the accumulation it was saved with."
            )
        self._consumed = self._resume = consumed

    def _at(self, position: int, count: int) -> Int64[np.ndarray, "count"]:
        """The sequences at `count` positions of the run."""
        positions = np.arange(position, position + count)
        if self.period is not None:
            positions %= self.period
        sequences = np.empty(count, dtype=np.int64)
        epochs = positions // self.dataset_length
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            sequences[here] = permutation(self.dataset_length, self.seed, epoch)[positions[here] % self.dataset_length]
        return sequences


# Two, because a batch may reach from one epoch into the next.
@lru_cache(maxsize=2)
def permutation(length: int, seed: int, epoch: int) -> Int64[np.ndarray, "length"]:
    """The order of one epoch, drawn from (seed, epoch)."""
    # Sorting raw bits, because NumPy guarantees those for ever, and what shuffling makes of them only for one version.
    bits = np.random.Philox(np.random.SeedSequence([seed, epoch])).random_raw(length)
    return np.argsort(bits, kind="stable")
