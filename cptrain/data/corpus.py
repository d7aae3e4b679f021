"""The corpus: every document's tokens in one flat, memory-mapped sequence.

[Note: files that change]
Of a file that gets shorter under a mapping, reading kills the process with SIGBUS, without a word; one that is written
over has other documents than its offsets say. So before every read, the size and the time of change of the files that
it touches are compared with what they were when this process opened them; that takes a microsecond or two a file. Not
noticed are a change between that look and the read, one that keeps size and time, and one from before this process (a
worker opens the files for itself) if it keeps the size.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cptrain.data.cache import opened


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
        with opened(folder):
            about = json.loads((folder / "corpus.json").read_text())
            self.fingerprint: str = about["fingerprint"]
            self.vocab_size: int = about["vocab_size"]
            self.pad_id: int = about["pad_id"]
            dtype = np.dtype(about["dtype"])
            self.offsets = np.asarray(np.load(folder / "offsets.npy", mmap_mode="r"))
        self._shards: list[_Shard] = []
        for name, num_tokens in about["shards"]:
            path = folder / name  # an absolute name replaces the folder
            state = _state(path)  # before it is mapped: what changes in between is noticed
            if state is None or state[0] != num_tokens * dtype.itemsize:
                raise RuntimeError(f"{path}: missing, or no longer {num_tokens} tokens of {dtype}; remove {folder}")
            self._shards.append(_Shard(path, state, np.asarray(np.memmap(path, dtype=dtype, mode="r"))))
        self._shard_starts = np.cumsum([0, *(len(shard.tokens) for shard in self._shards)])
        self.num_documents = len(self.offsets) - 1
        self.num_tokens = int(self.offsets[-1])

    def __reduce__(self) -> tuple[type[Corpus], tuple[Path]]:
        return Corpus, (self.folder,)

    def read(self, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """The tokens of some pieces, joined, int64 [sum of lengths].

        starts, lengths: int64 [pieces]. A piece is tokens [start, start + length) of the sequence, in one document.
        RuntimeError if a file that holds them has changed, see [Note: files that change].
        """
        shards = np.searchsorted(self._shard_starts, starts, side="right") - 1
        begins = starts - self._shard_starts[shards]
        for shard in set(shards.tolist()):
            self._shards[shard].check()
        pieces = zip(shards.tolist(), begins.tolist(), (begins + lengths).tolist(), strict=True)
        return np.concatenate([self._shards[shard].tokens[begin:end] for shard, begin, end in pieces], dtype=np.int64)


class _Shard(NamedTuple):
    """A file of tokens, what it was when it was opened, and its tokens, mapped."""

    path: Path
    state: tuple[int, int]
    tokens: np.ndarray

    def check(self) -> None:
        """RuntimeError if the file is no longer what was opened."""
        now = _state(self.path)
        if now != self.state:
            what = "is gone" if now is None else "was written to"
            if now is not None and now[0] != self.state[0]:
                what = f"went from {self.state[0]:,} to {now[0]:,} bytes"
            raise RuntimeError(
                f"{self.path}: {what} after it was opened, so where its documents begin is no longer known; start "
                "again and leave it as it is while a run reads it"
            )


def _state(path: Path) -> tuple[int, int] | None:
    """Size and time of change of a file; None where there is none."""
    try:
        found = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return found.st_size, found.st_mtime_ns


def open_corpus(folder: Path) -> Corpus:
    """The corpus that `prepare_corpus` left in `folder`. RuntimeError if it is not there or its files have changed."""
    return Corpus(Path(folder))
