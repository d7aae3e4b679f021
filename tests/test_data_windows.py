from __future__ import annotations

import itertools
import os
import pickle
import random
import tracemalloc
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_data_corpus import BOS, EOS, corpus_of, documents_of, prepared, write_tokens

from cptrain.data.split import Split, split_documents
from cptrain.data.windows import IGNORE, Windows


def random_texts(count: int, *, longest: int = 40, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return ["".join(rng.choices("abcdefgh", k=rng.randint(1, longest))) for _ in range(count)]


def training_of(tmp_path: Path, texts: list[str], *, seed: int = 0) -> Split:
    return split_documents(corpus_of(tmp_path, texts), fraction=0.0, seed=seed)[0]


def stream_of(split: Split) -> list[tuple[int, int]]:
    """Every (token, document) of the split, by plain loops: the reference."""
    documents = documents_of(split.corpus)
    return [(token, number) for number in split.documents.tolist() for token in documents[number]]


# Split


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.5])
def test_data_split_each_document_is_on_one_side(tmp_path: Path, fraction: float) -> None:
    corpus = corpus_of(tmp_path, random_texts(200))
    training, held_out = split_documents(corpus, fraction=fraction, seed=1)
    assert sorted([*training.documents, *held_out.documents]) == list(range(200))


@pytest.mark.parametrize("fraction", [0.0, 0.01, 0.1, 0.5])
def test_data_split_holds_out_that_share_of_the_tokens(tmp_path: Path, fraction: float) -> None:
    corpus = corpus_of(tmp_path, random_texts(400))
    _, held_out = split_documents(corpus, fraction=fraction, seed=1)
    assert abs(held_out.num_tokens - fraction * corpus.num_tokens) <= 21  # half of the longest document


def test_data_split_never_holds_out_a_document_longer_than_the_share(tmp_path: Path) -> None:
    for seed in range(8):
        (tmp_path / str(seed)).mkdir()
        corpus = corpus_of(tmp_path / str(seed), ["x" * 2000, *random_texts(50)])
        training, held_out = split_documents(corpus, fraction=0.1, seed=seed)
        assert 0 in training.documents
        assert held_out.num_documents > 0


def test_data_split_depends_on_the_seed_alone(tmp_path: Path) -> None:
    corpus = corpus_of(tmp_path, random_texts(200))
    (tmp_path / "copy").mkdir()
    copy = corpus_of(tmp_path / "copy", random_texts(200))
    splits = [split_documents(c, fraction=0.2, seed=seed) for c, seed in ((corpus, 1), (copy, 1), (corpus, 2))]
    for side in (0, 1):
        orders = [split[side].documents.tolist() for split in splits]
        assert orders[0] == orders[1] != orders[2]


def test_data_split_shuffles_the_documents(tmp_path: Path) -> None:
    order = training_of(tmp_path, random_texts(200)).documents
    assert (np.diff(order) == 1).sum() < 8


def test_data_split_pickles_without_its_order(tmp_path: Path) -> None:
    split = training_of(tmp_path, random_texts(3000, longest=5))
    data = pickle.dumps(split)
    assert len(data) < 2000
    assert pickle.loads(data).documents.tolist() == split.documents.tolist()


@pytest.mark.parametrize(
    ("change", "key"),
    [("text", "data.fingerprint"), ("seed", "data.seed"), ("fraction", "data.validation_fraction")],
)
def test_data_split_identity_names_what_changed(tmp_path: Path, change: str, key: str) -> None:
    values = {"text": (["ab"] * 10, ["ba"] * 10), "seed": (0, 1), "fraction": (0.1, 0.2)}

    def identity(changed: str) -> dict[str, str | int | float]:
        text, seed, fraction = (pair[name == changed] for name, pair in values.items())
        return split_documents(corpus_of(tmp_path, text), fraction=fraction, seed=seed)[0].identity()

    before, after = identity("nothing"), identity(change)
    assert [name for name in before if before[name] != after[name]] == [key]


# Windows


@pytest.mark.parametrize("seq_len", [1, 2, 7, 64, 500])
@pytest.mark.parametrize("longest", [1, 40])
def test_data_windows_hold_the_stream_in_order(tmp_path: Path, seq_len: int, longest: int) -> None:
    split = training_of(tmp_path, random_texts(200, longest=longest))
    windows, stream = Windows(split, seq_len=seq_len), stream_of(split)
    assert len(windows) == (len(stream) - 1) // seq_len
    joined = torch.cat([windows.window(number)["tokens"] for number in range(len(windows))])
    assert joined.tolist() == [token for token, _ in stream[: len(windows) * seq_len]]


@pytest.mark.parametrize("seq_len", [1, 2, 7, 64, 500])
def test_data_windows_predict_each_token_once_but_for_the_first_of_a_document(tmp_path: Path, seq_len: int) -> None:
    split = training_of(tmp_path, random_texts(200))
    windows, stream = Windows(split, seq_len=seq_len), stream_of(split)
    joined = torch.cat([windows.window(number)["labels"] for number in range(len(windows))])
    pairs = itertools.pairwise(stream[: len(windows) * seq_len + 1])
    assert joined.tolist() == [token if mine == its else IGNORE for (_, mine), (token, its) in pairs]


def test_data_windows_eos_is_predicted_and_bos_is_not(tmp_path: Path) -> None:
    windows = Windows(training_of(tmp_path, ["ab", "cd", "ef", "gh"]), seq_len=15)
    sample = windows.window(0)
    assert (sample["labels"] == EOS).sum() == 4
    assert (sample["labels"] == BOS).sum() == 0
    assert sample["labels"][sample["tokens"] == EOS].tolist() == [IGNORE] * 3


def test_data_windows_label_of_a_document_that_ends_with_the_window_is_ignored(tmp_path: Path) -> None:
    assert Windows(training_of(tmp_path, ["ab", "cd"]), seq_len=4).window(0)["labels"][-1] == IGNORE


def test_data_windows_positions_run_through_the_window(tmp_path: Path) -> None:
    windows = Windows(training_of(tmp_path, random_texts(20)), seq_len=9)
    assert windows.window(3)["positions"].tolist() == list(range(9))


@pytest.mark.parametrize("seq_len", [1, 7, 64])
def test_data_windows_document_ids_count_documents_from_zero(tmp_path: Path, seq_len: int) -> None:
    split = training_of(tmp_path, random_texts(60))
    windows, stream = Windows(split, seq_len=seq_len), stream_of(split)
    for number in range(len(windows)):
        documents = [document for _, document in stream[number * seq_len : (number + 1) * seq_len]]
        ids = [len(list(dict.fromkeys(documents[: i + 1]))) - 1 for i in range(seq_len)]
        assert windows.window(number)["document_ids"].tolist() == ids


def test_data_windows_are_int64_of_seq_len(tmp_path: Path) -> None:
    sample = Windows(training_of(tmp_path, random_texts(20)), seq_len=9)[0]
    assert list(sample) == ["tokens", "labels", "positions", "document_ids"]
    assert {(part.dtype, part.shape) for part in sample.values()} == {(torch.int64, (9,))}


def test_data_windows_each_epoch_reads_every_window_once(tmp_path: Path) -> None:
    windows = Windows(training_of(tmp_path, random_texts(60)), seq_len=9)
    count = len(windows)
    places = [windows.locate(index) for index in range(3 * count)]
    assert [epoch for epoch, _ in places] == [0] * count + [1] * count + [2] * count
    orders = [[window for epoch, window in places if epoch == wanted] for wanted in range(3)]
    assert [sorted(order) for order in orders] == [list(range(count))] * 3
    assert orders[0] != orders[1] != orders[2]


def test_data_windows_sample_is_the_window_it_is_located_at(tmp_path: Path) -> None:
    windows = Windows(training_of(tmp_path, random_texts(60)), seq_len=9)
    for index in (0, 5, len(windows) + 3):
        sample, window = windows[index], windows.window(windows.locate(index)[1])
        assert all(torch.equal(sample[name], window[name]) for name in window)


def test_data_windows_order_follows_the_seed(tmp_path: Path) -> None:
    corpus = corpus_of(tmp_path, random_texts(60))
    orders = []
    for seed in (0, 1):
        windows = Windows(split_documents(corpus, fraction=0.0, seed=seed)[0], seq_len=9)
        orders.append([windows.locate(index) for index in range(len(windows))])
    assert orders[0] != orders[1]


def test_data_windows_beyond_the_last_are_refused(tmp_path: Path) -> None:
    windows = Windows(training_of(tmp_path, ["abcd"]), seq_len=2)
    with pytest.raises(IndexError, match="window 2: there are 2"):
        windows.window(2)


def test_data_windows_cost_does_not_grow_with_the_corpus(tmp_path: Path) -> None:
    count = 300_000
    path = write_tokens(tmp_path / "a.bin", [1, EOS] * count)
    corpus = prepared(tmp_path, source="tokens", paths=(str(path),))
    windows = Windows(split_documents(corpus, fraction=0.0, seed=0)[0], seq_len=64)
    tracemalloc.start()
    windows[0]
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < count  # one array over all documents is eight times that


def shrink(path: Path) -> None:
    os.truncate(path, 4096)  # what is read below still lies in the first page: of any other, reading kills the process


def write_over(path: Path) -> None:
    write_tokens(path, [2, 2, EOS] * 2000)
    os.utime(path, ns=(0, 1))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (shrink, "went from 12,000 to 4,096 bytes"),
        (write_over, "was written to"),
        (Path.unlink, "is gone"),
    ],
)
def test_data_windows_of_a_file_that_changes_under_a_run_are_refused(tmp_path: Path, change: Any, said: str) -> None:
    paths = [write_tokens(tmp_path / name, [1, 2, EOS] * 2000) for name in ("a.bin", "b.bin")]
    corpus = prepared(tmp_path, source="tokens", paths=tuple(map(str, paths)))
    read = partial(corpus.read, lengths=np.array([3]))
    change(paths[0])
    assert read(np.array([9000])).tolist() == [1, 2, EOS], "of the other file"
    with pytest.raises(RuntimeError, match=rf"a\.bin: {said} after it was opened, .*; start again"):
        read(np.array([9]))


@pytest.mark.parametrize(("side", "way_out"), [(0, "lower"), (1, r"raise data\.validation_fraction")])
def test_data_windows_too_little_text_says_how_much_is_needed(tmp_path: Path, side: int, way_out: str) -> None:
    split = split_documents(corpus_of(tmp_path, ["ab"] * 10), fraction=0.5, seed=0)[side]
    assert len(Windows(split, seq_len=19)) == 1
    with pytest.raises(ValueError, match=f"seq_len = 20: one window needs 21 tokens, the .* has 20 in 5 .*{way_out}"):
        Windows(split, seq_len=20)
