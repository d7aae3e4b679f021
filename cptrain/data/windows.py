"""Windows of `seq_len` tokens cut from a split, each with its labels, positions and document ids."""

from __future__ import annotations

import logging

import torch

from cptrain.data.shuffle import shuffled_position
from cptrain.data.split import Split

logger = logging.getLogger("cptrain")

IGNORE = -100  # the label of a position that predicts nothing; the default of torch's cross entropy


class Windows:
    """The windows of a split, and the endless shuffled order in which training reads them.

    Window w covers tokens [w * seq_len, (w + 1) * seq_len] of the split's stream. Neighbours share one token, the last
    label of one being the first token of the next, so each token is predicted once. The tail that fills no window is
    left out.

    split: whose tokens; its seed also orders the windows within each epoch. seq_len: before any sharding.
    ValueError if the split does not fill one window.
    """

    def __init__(self, split: Split, *, seq_len: int) -> None:
        if seq_len < 1:
            raise ValueError(f"training.seq_len = {seq_len}: must be positive")
        self.split = split
        self.seq_len = seq_len
        self._num_windows = max(0, split.num_tokens - 1) // seq_len
        if self._num_windows == 0:
            way_out = "lower training.seq_len or add data.paths"
            if split.name == "held-out":
                way_out = f"raise data.validation_fraction (= {split.fraction:g}), {way_out}"
            raise ValueError(
                f"training.seq_len = {seq_len}: one window needs {seq_len + 1:,} tokens, the {split.name} text has "
                f"{split.num_tokens:,} in {split.num_documents:,} documents; {way_out}"
            )
        logger.info(
            f"data: {split.name}: {split.num_documents:,} documents, {split.num_tokens:,} tokens, "
            f"{self._num_windows:,} windows of {seq_len:,}"
        )

    def __len__(self) -> int:
        """Windows in one epoch."""
        return self._num_windows

    def __getitem__(self, global_index: int) -> dict[str, torch.Tensor]:
        """Sample `global_index` of training (any integer from 0), as `window` gives it."""
        return self.window(self.locate(global_index)[1])

    def locate(self, global_index: int) -> tuple[int, int]:
        """(epoch, window) of a sample: each epoch reads every window once, in an order of its own."""
        epoch, position = divmod(global_index, self._num_windows)
        return epoch, shuffled_position(position, self._num_windows, seed=self.split.seed, epoch=epoch)

    def window(self, number: int) -> dict[str, torch.Tensor]:
        """Window `number` in the order of the text. All int64 [seq_len]:

        tokens. labels: the token that follows each; IGNORE where that begins another document, since nothing in a
        document says which one comes next: every EOS is predicted, no BOS is. positions: 0 .. seq_len - 1.
        document_ids: from 0 in each window, equal within a document.
        """
        if not 0 <= number < self._num_windows:
            raise IndexError(f"window {number}: there are {self._num_windows}")
        begin = number * self.seq_len
        stream, documents = (torch.from_numpy(part) for part in self.split.read(begin, begin + self.seq_len + 1))
        return {
            "tokens": stream[:-1],
            "labels": stream[1:].masked_fill(documents[1:] != documents[:-1], IGNORE),
            "positions": torch.arange(self.seq_len),
            "document_ids": documents[:-1],
        }
