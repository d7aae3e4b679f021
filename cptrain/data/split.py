"""Which documents are for training, which are held out, and the order of both."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from cptrain.data.cache import opened, publish
from cptrain.data.corpus import Corpus, Pieces
from cptrain.data.shuffle import shuffled_order


class Split:
    """Some documents of a corpus in a fixed order: a stream of tokens.

    documents: int64 [num_documents], numbers of documents. starts: int64 [num_documents + 1], where each begins in the
    stream. name: "training" or "held-out". Both arrays stay on disk; pickles as the folder that holds them.
    """

    def __init__(self, corpus: Corpus, folder: Path, name: str, *, fraction: float, seed: int) -> None:
        self.corpus = corpus
        self.folder = folder
        self.name = name
        self.fraction = fraction
        self.seed = seed
        with opened(folder):
            self.documents = np.asarray(np.load(folder / f"{name}-documents.npy", mmap_mode="r"))
            self.starts = np.asarray(np.load(folder / f"{name}-starts.npy", mmap_mode="r"))
        self.num_documents = len(self.documents)
        self.num_tokens = int(self.starts[-1])

    def identity(self) -> dict[str, str | int | float]:
        """All that decides the stream of tokens, by setting: a checkpoint keeps it and compares."""
        return {
            "data.fingerprint": self.corpus.fingerprint,
            "data.validation_fraction": self.fraction,
            "data.seed": self.seed,
        }

    def __reduce__(self) -> tuple[object, ...]:
        return _reopen, (self.corpus, self.folder, self.name, self.fraction, self.seed)

    def pieces(self, begin: int, end: int) -> Pieces:
        """The documents that tokens [begin, end) of the stream cover, the first and the last one cut where those end.

        The cost grows with the number of these documents and with the logarithm of the number of all.
        """
        # Keys of the array's own dtype: with another one searchsorted converts the whole array first.
        first = int(np.searchsorted(self.starts, np.int64(begin), side="right")) - 1
        last = int(np.searchsorted(self.starts, np.int64(end), side="left"))
        starts, stops = self.starts[first:last], self.starts[first + 1 : last + 1]
        begins, ends = np.maximum(starts, begin), np.minimum(stops, end)
        places = self.corpus.offsets[self.documents[first:last]] + begins - starts
        return Pieces(places, ends - begins, bool(end < stops[-1]))


def _reopen(corpus: Corpus, folder: Path, name: str, fraction: float, seed: int) -> Split:
    return Split(corpus, folder, name, fraction=fraction, seed=seed)


def split_documents(corpus: Corpus, *, fraction: float, seed: int) -> tuple[Split, Split]:
    """(training, held-out): every document in exactly one of them, in an order that depends on the seed alone.

    Documents are ordered by a hash of (seed, number); from the front, they are held out until their tokens come nearest
    to `fraction` of all. A document longer than that share always stays with training, lest one book be the whole of
    the held-out text. The orders are kept in the corpus' folder: whoever comes first computes them.
    """
    digest = hashlib.blake2b(repr((seed, fraction)).encode(), digest_size=8).hexdigest()
    folder = corpus.folder / f"split-{digest}"
    publish(folder, lambda path: _write_split(path, corpus, fraction, seed), within=True)
    training, held_out = (
        Split(corpus, folder, name, fraction=fraction, seed=seed) for name in ("training", "held-out")
    )
    return training, held_out


def _write_split(folder: Path, corpus: Corpus, fraction: float, seed: int) -> None:
    order = shuffled_order(corpus.num_documents, seed=seed)
    lengths = np.diff(corpus.offsets)[order]
    share = fraction * corpus.num_tokens
    candidates = np.flatnonzero(lengths <= share)
    sums = np.concatenate([[0], np.cumsum(lengths[candidates])])
    count = int(np.abs(sums - share).argmin())
    held_out = np.zeros(len(order), dtype=bool)
    held_out[candidates[:count]] = True
    for name, chosen in (("training", ~held_out), ("held-out", held_out)):
        np.save(folder / f"{name}-documents.npy", order[chosen])
        np.save(folder / f"{name}-starts.npy", np.concatenate([[0], np.cumsum(lengths[chosen])]).astype(np.int64))
