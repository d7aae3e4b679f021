"""Windows of `seq_len` tokens made of a split's documents, each with its labels, positions and document ids."""

from __future__ import annotations

import logging

import numpy as np
import torch

from cptrain.data.placement import BestFit, Concat
from cptrain.data.settings import DataConfig, LongDocuments, Packing
from cptrain.data.shuffle import shuffled_position
from cptrain.data.split import Split

logger = logging.getLogger("cptrain")

IGNORE = -100  # the label of a position that predicts nothing; the default of torch's cross entropy
NO_DOCUMENT = -1  # the document id of padding


class Windows:
    """The windows of a split, and the endless shuffled order in which training reads them.

    split: whose tokens; its seed also orders the windows within each epoch. seq_len: before any sharding.
    packing: how documents get into windows, see `Concat` and `BestFit`. long_documents: of "best_fit" only.
    reset_positions: positions begin at 0 in each document rather than in each window.
    With "best_fit", the first process to make these computes the placement of all documents; it pickles small.
    ValueError if there is no window.
    """

    def __init__(
        self,
        split: Split,
        *,
        seq_len: int,
        packing: Packing = "concat",
        long_documents: LongDocuments = "split",
        reset_positions: bool = False,
    ) -> None:
        if seq_len < 1:
            raise ValueError(f"training.seq_len = {seq_len}: must be positive")
        self.split = split
        self.seq_len = seq_len
        self.reset_positions = reset_positions
        self._placement = (
            Concat(split, seq_len=seq_len)
            if packing == "concat"
            else BestFit(split, seq_len=seq_len, long_documents=long_documents)
        )
        logger.info(
            f"data: {split.name}: {split.num_documents:,} documents, {split.num_tokens:,} tokens, "
            f"{self._placement.describe()}"
        )

    def __len__(self) -> int:
        """Windows in one epoch."""
        return self._placement.num_windows

    def __getitem__(self, global_index: int) -> dict[str, torch.Tensor]:
        """Sample `global_index` of training (any integer from 0), as `window` gives it."""
        return self.window(self.locate(global_index)[1])

    def identity(self) -> dict[str, str | int | float]:
        """All that decides which tokens sample i holds, by setting, seq_len aside: a checkpoint keeps and compares it.

        Compare the keys of both sides: "concat" adds none to those of the split.
        """
        return {**self.split.identity(), **self._placement.identity()}

    def locate(self, global_index: int) -> tuple[int, int]:
        """(epoch, window) of a sample: each epoch reads every window once, in an order of its own."""
        epoch, position = divmod(global_index, len(self))
        return epoch, shuffled_position(position, len(self), seed=self.split.seed, epoch=epoch)

    def window(self, number: int) -> dict[str, torch.Tensor]:
        """Window `number`: for "concat" in the order of the text, for "best_fit" in that of its seed.

        All int64 [seq_len]. tokens. labels: the token that follows each; IGNORE where that begins another document,
        since nothing in a document says which one comes next: every EOS is predicted, no BOS is. positions: from 0 in
        each window or document. document_ids: from 0 in each window, equal within a document.
        Padding comes last: tokens the corpus' pad_id, labels IGNORE, positions 0, document_ids NO_DOCUMENT.
        """
        if not 0 <= number < len(self):
            raise IndexError(f"window {number}: there are {len(self)}")
        starts, lengths, continues = self._placement.pieces(number)
        reads = lengths.copy()
        reads[-1] += continues  # the last label
        stream = self.split.corpus.read(starts, reads)
        ends = np.cumsum(lengths)
        num_tokens = int(ends[-1])
        labels = np.full(self.seq_len, IGNORE)
        labels[: len(stream) - 1] = stream[1:]
        labels[ends[:-1] - 1] = IGNORE
        positions = np.arange(num_tokens)
        if self.reset_positions:
            positions -= np.repeat(ends - lengths, lengths)
        parts = {
            "tokens": self._fill_up(stream[:num_tokens], self.split.corpus.pad_id),
            "labels": labels,
            "positions": self._fill_up(positions, 0),
            "document_ids": self._fill_up(np.repeat(np.arange(len(lengths)), lengths), NO_DOCUMENT),
        }
        return {name: torch.from_numpy(values) for name, values in parts.items()}

    def _fill_up(self, values: np.ndarray, filler: int) -> np.ndarray:
        missing = self.seq_len - len(values)
        return np.concatenate([values, np.full(missing, filler)]) if missing else values


def build_windows(split: Split, config: DataConfig, *, seq_len: int) -> Windows:
    """The windows that the settings describe. With several ranks, build them on one and send them to the others."""
    return Windows(
        split,
        seq_len=seq_len,
        packing=config.packing,
        long_documents=config.long_documents,
        reset_positions=config.resolved_reset_positions(),
    )
