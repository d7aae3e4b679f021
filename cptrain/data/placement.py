"""Which pieces of which documents make up a window."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from cptrain.data.best_fit import best_fit_decreasing
from cptrain.data.cache import opened, publish
from cptrain.data.corpus import Pieces
from cptrain.data.settings import LongDocuments
from cptrain.data.shuffle import shuffled_order
from cptrain.data.split import Split


class Concat:
    """The documents of a split as one stream, cut every seq_len tokens.

    Neighbouring windows share one token, the last label of one being the first token of the next, so each token is
    predicted once. The tail that fills no window is left out. ValueError if the split does not fill one window.
    """

    def __init__(self, split: Split, *, seq_len: int) -> None:
        self.split = split
        self.seq_len = seq_len
        self.num_windows = max(0, split.num_tokens - 1) // seq_len
        if self.num_windows == 0:
            raise ValueError(
                f"training.seq_len = {seq_len}: one window needs {seq_len + 1:,} tokens, the {split.name} text has "
                f"{split.num_tokens:,} in {split.num_documents:,} documents; "
                f"{_more_held_out(split)}lower training.seq_len or add data.paths"
            )

    def pieces(self, number: int) -> Pieces:
        """What window `number` holds, in order."""
        return self.split.pieces(number * self.seq_len, (number + 1) * self.seq_len)

    def describe(self) -> str:
        """What has become of the documents, for the log."""
        return f"{self.num_windows:,} windows of {self.seq_len:,}"

    def identity(self) -> dict[str, str]:
        """All that decides the windows beside the split, by setting."""
        return {}


class BestFit:
    """Whole documents of a split, placed into windows of seq_len tokens by best-fit decreasing.

    Documents longer than seq_len are cut into pieces of seq_len and a remainder that is placed like a document
    (long_documents "split"), or left out ("drop"). In a window, pieces come in the order of the split; the windows are
    numbered in an order of the seed's, so that any run of them is a fair sample of the lengths. Computed once, in the
    folder of the split: whoever comes first does it, 10 million documents taking seconds. The arrays stay on disk;
    pickles as the folder that holds them. ValueError if there is no document to place.
    """

    def __init__(self, split: Split, *, seq_len: int, long_documents: LongDocuments) -> None:
        self.split = split
        self.seq_len = seq_len
        self.long_documents = long_documents
        folder = split.folder / f"{split.name}-best_fit-{seq_len}-{long_documents}"
        publish(folder, lambda path: _write_best_fit(path, split, seq_len, long_documents), within=True)
        with opened(folder):
            self._starts, self._lengths, self._continues, self._firsts = (
                np.asarray(np.load(folder / f"{name}.npy", mmap_mode="r"))
                for name in ("starts", "lengths", "continues", "firsts")
            )
            self._about: dict[str, int] = json.loads((folder / "about.json").read_text())
        self.num_windows = len(self._firsts) - 1
        if self.num_windows == 0:
            way_out = "raise training.seq_len" if split.num_documents else "add data.paths"
            if split.num_documents and long_documents == "drop":
                way_out += ' or set data.long_documents = "split"'
            raise ValueError(
                f"training.seq_len = {seq_len}: one window needs a document that fits in, the {split.name} text has "
                f"none among its {split.num_documents:,} documents; {_more_held_out(split)}{way_out}"
            )

    def __reduce__(self) -> tuple[object, ...]:
        return _reopen, (self.split, self.seq_len, self.long_documents)

    def pieces(self, number: int) -> Pieces:
        """What window `number` holds, in order; less than seq_len tokens where nothing was left that fits."""
        part = slice(self._firsts[number], self._firsts[number + 1])
        return Pieces(self._starts[part], self._lengths[part], bool(self._continues[number]))

    def describe(self) -> str:
        """What has become of the documents, for the log."""
        placed = self._about["num_tokens"]
        padding = 1 - placed / (self.num_windows * self.seq_len)
        if self.long_documents == "split":
            long = f"{self._about['num_long']:,} longer documents split"
        else:
            dropped = 1 - placed / self.split.num_tokens
            long = f"{self._about['num_long']:,} longer documents dropped ({dropped:.2%} of the tokens)"
        return f"{self.num_windows:,} windows of {self.seq_len:,} by best fit, {padding:.2%} padding, {long}"

    def identity(self) -> dict[str, str]:
        """All that decides the windows beside the split, by setting."""
        return {"data.packing": "best_fit", "data.long_documents": self.long_documents}


def _more_held_out(split: Split) -> str:
    return f"raise data.validation_fraction (= {split.fraction:g}), " if split.name == "held-out" else ""


def _reopen(split: Split, seq_len: int, long_documents: LongDocuments) -> BestFit:
    return BestFit(split, seq_len=seq_len, long_documents=long_documents)


def _write_best_fit(folder: Path, split: Split, seq_len: int, long_documents: LongDocuments) -> None:
    lengths = np.diff(split.starts)
    starts = split.corpus.offsets[split.documents]
    is_long = lengths > seq_len
    if long_documents == "drop":
        starts, lengths = starts[~is_long], lengths[~is_long]
    # Documents into pieces: the n-th of a document begins n * seq_len tokens after it does.
    num_pieces = -(-lengths // seq_len)
    document = np.repeat(np.arange(len(lengths)), num_pieces)
    cut = (np.arange(len(document)) - (np.cumsum(num_pieces) - num_pieces)[document]) * seq_len
    starts, left = starts[document] + cut, lengths[document] - cut
    lengths = np.minimum(left, seq_len)

    # Bins are opened for the longest documents first; shuffled, lest the first windows be all long ones.
    bins = best_fit_decreasing(lengths, seq_len)
    num_windows = int(bins.max(initial=-1)) + 1
    windows = np.argsort(shuffled_order(num_windows, seed=split.seed))[bins]
    order = np.argsort(windows, kind="stable")
    np.save(folder / "starts.npy", starts[order])
    np.save(folder / "lengths.npy", lengths[order])
    # A piece that its document continues fills a window by itself.
    np.save(folder / "continues.npy", np.bincount(windows[left > seq_len], minlength=num_windows).astype(bool))
    np.save(folder / "firsts.npy", np.concatenate([[0], np.cumsum(np.bincount(windows))]).astype(np.int64))
    about = {"num_tokens": int(lengths.sum()), "num_long": int(is_long.sum())}
    (folder / "about.json").write_text(json.dumps(about))
