"""The corpus: every document's tokens in one flat, memory-mapped sequence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np


class Pieces(NamedTuple):
    """What a window holds: pieces of different documents, in order. Only the last may end before its document does.

    starts, lengths: int64 [pieces], tokens [start, start + length) of the corpus' flat sequence. continues: whether the
    document of the last piece goes on, so that there is a next token to predict.
    """

    starts: np.ndarray
    lengths: np.ndarray
    continues: bool


class Corpus:
    """All documents, one after the other, read from disk as needed.

    folder: what `prepare_corpus` made. vocab_size: every token id is below it. pad_id: what fills a window up, the
    tokenizer's PAD or, where the vocabulary has none, its EOS.
    offsets: int64 [num_documents + 1], where each document begins in the flat sequence; the last one is num_tokens.
    fingerprint: digest of all tokens and offsets, the same on any machine; store it to see whether data has changed.
    Pickles as its folder, so a worker process maps the files itself.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            about = json.loads((folder / "corpus.json").read_text())
        except FileNotFoundError as error:
            raise RuntimeError(
                f"{folder}: no corpus here; data.cache_dir must lie on a file system that every rank sees"
            ) from error
        self.fingerprint: str = about["fingerprint"]
        self.vocab_size: int = about["vocab_size"]
        self.pad_id: int = about["pad_id"]
        dtype = np.dtype(about["dtype"])
        self._shards: list[np.ndarray] = []
        for name, num_tokens in about["shards"]:
            path = folder / name  # an absolute name replaces the folder
            if not path.is_file() or path.stat().st_size != num_tokens * dtype.itemsize:
                raise RuntimeError(f"{path}: missing, or no longer {num_tokens} tokens of {dtype}; remove {folder}")
            self._shards.append(np.asarray(np.memmap(path, dtype=dtype, mode="r")))
        self._shard_starts = np.cumsum([0, *(len(shard) for shard in self._shards)])
        self.offsets = np.asarray(np.load(folder / "offsets.npy", mmap_mode="r"))
        self.num_documents = len(self.offsets) - 1
        self.num_tokens = int(self.offsets[-1])

    def __reduce__(self) -> tuple[type[Corpus], tuple[Path]]:
        return Corpus, (self.folder,)

    def read(self, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """The tokens of some pieces, joined, int64 [sum of lengths].

        starts, lengths: int64 [pieces]. A piece is tokens [start, start + length) of the sequence, in one document.
        """
        shards = np.searchsorted(self._shard_starts, starts, side="right") - 1
        begins = starts - self._shard_starts[shards]
        pieces = zip(shards.tolist(), begins.tolist(), (begins + lengths).tolist(), strict=True)
        return np.concatenate([self._shards[shard][begin:end] for shard, begin, end in pieces], dtype=np.int64)


def open_corpus(folder: Path) -> Corpus:
    """The corpus that `prepare_corpus` left in `folder`. RuntimeError if it is not there or its files have changed."""
    return Corpus(Path(folder))
