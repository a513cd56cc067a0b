"""Cuts the tokens of a split into sequences of one length.

The stream of a split is read as if an end of text stood before its first document, so that every token, the first one
included, is predicted from the one before it. Sequence i of a packed stream predicts tokens i*L to (i+1)*L - 1.

Shapes: L tokens of a sequence, N tokens of the split, D documents, S sequences, B indices.
"""

import numpy as np
import torch
from jaxtyping import Int64
from torch.utils.data import Dataset

from lightning_base.data.prepared import TokenSplit

IGNORED = -100  # the target where nothing is predicted, as in torch.nn.functional.cross_entropy
PADDING = -1  # the index of a sequence that is nothing but padding, and the document of a padding position
PACKINGS = ("packed", "documents")


def check_sequences(sequence_length: int, packing: str) -> None:
    """Checks what can be checked before there is any data.

    Raises:
        ValueError: an argument out of range, with its key.
    """
    if sequence_length < 1:
        raise ValueError(f"data.sequence_length={sequence_length} is no length: give 1 or more.")
    if packing not in PACKINGS:
        raise ValueError(f"data.packing={packing} is not a way of packing: choose {' or '.join(PACKINGS)}.")


class SequenceDataset(Dataset[dict[str, torch.Tensor]]):
    """Sequences of L tokens, by index.

    An item holds, each of shape [L]:

    - `input_ids` int64; padding holds the end of text;
    - `targets` int64, the token after each input; -100 where nothing is predicted;
    - `valid` bool, False at padding;
    - `document` int64, which document of the split the input belongs to; -1 at padding. An end of text belongs to
      the document it ends.

    Item -1 is nothing but padding.

    Args:
        split: the tokens.
        sequence_length: L.
        packing: "packed" cuts the stream every L tokens, whatever documents it crosses; "documents" cuts each document
            by itself and pads its last sequence.
        attend_across_documents: False leaves out, in packed sequences, the prediction of a document's first token,
            which would have to be made from the end of another document.
        drop_last: leaves out the last packed sequence if it is not full. Validation keeps it, padded.

    Raises:
        ValueError: an argument out of range, with its key.
    """

    def __init__(
        self,
        split: TokenSplit,
        sequence_length: int,
        packing: str = "packed",
        *,
        attend_across_documents: bool = True,
        drop_last: bool = False,
    ) -> None:
        check_sequences(sequence_length, packing)
        self.split = split
        self.sequence_length = L = sequence_length
        self.packing = packing
        self.attend_across_documents = attend_across_documents
        if packing == "packed":
            self.length = len(split.tokens) // L if drop_last else -(-len(split.tokens) // L)
        else:
            # [D+1] the first sequence of each document; the only array here that grows with the corpus.
            sequences_D = -(-np.diff(split.offsets) // L)
            self.first_sequence = np.concatenate([[0], np.cumsum(sequences_D)])
            self.length = int(self.first_sequence[-1])

    def __len__(self) -> int:
        return self.length

    def number_of_targets(self, indices_B: Int64[np.ndarray, "B"]) -> Int64[np.ndarray, "B"]:
        """How many targets each sequence has, from the document boundaries alone; 0 for padding (-1)."""
        start_B, stop_B, _ = self._bounds(indices_B)
        targets_B = stop_B - start_B
        if self._boundaries_masked:
            inner = self.split.offsets[1:-1]
            targets_B = targets_B - (np.searchsorted(inner, stop_B) - np.searchsorted(inner, start_B))
        return np.where(indices_B == PADDING, 0, targets_B)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        L, split = self.sequence_length, self.split
        input_L = np.full(L, split.eos_id, dtype=np.int64)
        target_L = np.full(L, IGNORED, dtype=np.int64)
        document_L = np.full(L, PADDING, dtype=np.int64)
        length = 0
        if index != PADDING:
            if not 0 <= index < self.length:
                raise IndexError(f"sequence {index} of {self.length}")
            start, stop, document = (int(bound[0]) for bound in self._bounds(np.asarray([index])))
            length = stop - start
            input_L[int(start == 0) : length] = split.tokens[max(start - 1, 0) : stop - 1]
            target_L[:length] = split.tokens[start:stop]
            document_L[:length] = self._documents(start, stop) if self.packing == "packed" else document
            if self._boundaries_masked:
                inner = split.offsets[1:-1]
                first, last = np.searchsorted(inner, (start, stop))
                target_L[inner[first:last] - start] = IGNORED
        valid_L = np.arange(L) < length
        arrays = {"input_ids": input_L, "targets": target_L, "valid": valid_L, "document": document_L}
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    @property
    def _boundaries_masked(self) -> bool:
        return self.packing == "packed" and not self.attend_across_documents

    def _bounds(self, indices_B: Int64[np.ndarray, "B"]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """First target, end of targets, and document of each sequence; the inputs lie one token earlier."""
        L = self.sequence_length
        if self.packing == "packed":
            start_B = indices_B * L
            return start_B, np.minimum(start_B + L, len(self.split.tokens)), np.zeros_like(indices_B)
        document_B = np.searchsorted(self.first_sequence, indices_B, side="right") - 1
        start_B = self.split.offsets[document_B] + (indices_B - self.first_sequence[document_B]) * L
        return start_B, np.minimum(start_B + L, self.split.offsets[document_B + 1]), document_B

    def _documents(self, start: int, stop: int) -> Int64[np.ndarray, "n"]:
        """The document of each input of a packed sequence; the end of text before the first document counts to it."""
        positions = np.maximum(np.arange(start - 1, stop - 1), 0)
        return np.searchsorted(self.split.offsets, positions, side="right") - 1
