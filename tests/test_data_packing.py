"""Windows of whole documents (data.packing = "best_fit"), and positions that begin anew in each document."""

from __future__ import annotations

import itertools
import logging
import pickle
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_data_corpus import EOS, corpus_of, documents_of, prepared, write_tokens
from test_data_windows import random_texts, training_of

from cptrain.data.best_fit import best_fit_decreasing
from cptrain.data.settings import DataConfig
from cptrain.data.split import Split, split_documents
from cptrain.data.tokenizer import ByteTokenizer
from cptrain.data.windows import IGNORE, NO_DOCUMENT, Windows, build_windows

PAD = 258
LENGTHS = [1, 2, 7, 16, 64]  # of windows; random_texts are documents of 3 to 42 tokens

Piece = tuple[tuple[int, ...], tuple[int, ...]]  # tokens and labels


def best_fit(split: Split, seq_len: int, **values: Any) -> Windows:
    return Windows(split, seq_len=seq_len, packing="best_fit", **values)


def samples_of(windows: Windows) -> list[dict[str, torch.Tensor]]:
    return [windows.window(number) for number in range(len(windows))]


def pieces_in(sample: dict[str, torch.Tensor]) -> list[Piece]:
    """What a window holds of each document."""
    rows = zip(*(sample[name].tolist() for name in ("document_ids", "tokens", "labels")), strict=True)
    groups = itertools.groupby((row for row in rows if row[0] != NO_DOCUMENT), key=lambda row: row[0])
    return [tuple(zip(*((token, label) for _, token, label in group), strict=True)) for _, group in groups]  # type: ignore[misc]


def pieces_of(split: Split, seq_len: int) -> list[list[Piece]]:
    """Each document of the split cut every seq_len tokens, in order, by plain loops: the reference."""
    documents = documents_of(split.corpus)
    cut = []
    for document in (documents[number] for number in split.documents):
        labels = [*document[1:], IGNORE]
        begins = range(0, len(document), seq_len)
        cut.append([(tuple(document[b : b + seq_len]), tuple(labels[b : b + seq_len])) for b in begins])
    return cut


def naive_best_fit(lengths: list[int], capacity: int) -> list[int]:
    """The room left in each bin, sorted; every bin is looked at for every item."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [room for room in rooms if room >= length]
        if fitting:
            rooms[rooms.index(min(fitting))] -= length
        else:
            rooms.append(capacity - length)
    return sorted(rooms)


# Best fit


@pytest.mark.parametrize("capacity", [1, 2, 9, 60, 1000])
@pytest.mark.parametrize("longest", [0.2, 0.6, 1.0])
def test_data_packing_leaves_the_room_that_a_naive_search_leaves(capacity: int, longest: float) -> None:
    rng = np.random.default_rng(0)
    for count in (1, 5, 50, 300):
        lengths = rng.integers(1, max(1, round(longest * capacity)) + 1, count)
        filled = np.bincount(best_fit_decreasing(lengths, capacity), weights=lengths).astype(int)
        assert sorted(capacity - filled) == naive_best_fit(lengths.tolist(), capacity)


def test_data_packing_places_equal_lengths_in_the_order_given() -> None:
    assert best_fit_decreasing(np.array([3, 7, 3, 7, 3]), 10).tolist() == [0, 0, 1, 1, 2]


@pytest.mark.parametrize("seq_len", LENGTHS)
def test_data_packing_split_holds_every_token_once(tmp_path: Path, seq_len: int) -> None:
    split = training_of(tmp_path, random_texts(100))
    held = Counter(tokens for sample in samples_of(best_fit(split, seq_len)) for tokens, _ in pieces_in(sample))
    assert held == Counter(tokens for document in pieces_of(split, seq_len) for tokens, _ in document)


@pytest.mark.parametrize("seq_len", LENGTHS)
def test_data_packing_split_predicts_every_token_once_but_for_the_first_of_a_document(
    tmp_path: Path, seq_len: int
) -> None:
    split = training_of(tmp_path, random_texts(100))
    held = Counter(piece for sample in samples_of(best_fit(split, seq_len)) for piece in pieces_in(sample))
    assert held == Counter(piece for document in pieces_of(split, seq_len) for piece in document)


def test_data_packing_piece_predicts_the_first_token_of_the_next(tmp_path: Path) -> None:
    windows = best_fit(training_of(tmp_path, ["abcdef"]), 4)  # BOS a b c | d e f EOS
    assert sorted(sample["labels"].tolist() for sample in samples_of(windows)) == [
        [*b"abcd"],
        [*b"ef", EOS, IGNORE],
    ]


@pytest.mark.parametrize("seq_len", [7, 16, 30])
def test_data_packing_drop_leaves_out_exactly_the_longer_documents(tmp_path: Path, seq_len: int) -> None:
    split = training_of(tmp_path, random_texts(100))
    windows = best_fit(split, seq_len, long_documents="drop")
    held = Counter(piece for sample in samples_of(windows) for piece in pieces_in(sample))
    assert held == Counter(document[0] for document in pieces_of(split, seq_len) if len(document) == 1)


def test_data_packing_windows_are_one_in_each_bin_of_best_fit(tmp_path: Path) -> None:
    split = training_of(tmp_path, random_texts(100))
    lengths = [len(tokens) for document in pieces_of(split, 50) for tokens, _ in document]
    padding = [int((sample["document_ids"] == NO_DOCUMENT).sum()) for sample in samples_of(best_fit(split, 50))]
    assert sorted(padding) == naive_best_fit(lengths, 50)


@pytest.mark.parametrize("seq_len", [16, 64])
def test_data_packing_document_ids_count_from_zero_and_padding_comes_last(tmp_path: Path, seq_len: int) -> None:
    seen = set()
    for sample in samples_of(best_fit(training_of(tmp_path, random_texts(101)), seq_len)):
        ids = sample["document_ids"].tolist()
        padding = ids.count(NO_DOCUMENT)
        real = ids[: seq_len - padding]
        assert ids[seq_len - padding :] == [NO_DOCUMENT] * padding
        assert real[0] == 0
        assert {after - before for before, after in itertools.pairwise(real)} <= {0, 1}
        seen.add((padding > 0, real[-1] > 0))
    assert len(seen) > 1


def test_data_packing_pieces_of_a_window_come_in_the_order_of_the_split(tmp_path: Path) -> None:
    split = training_of(tmp_path, random_texts(100))
    place = {tokens: rank for rank, document in enumerate(pieces_of(split, 150)) for tokens, _ in document}
    for sample in samples_of(best_fit(split, 150)):
        ranks = [place[tokens] for tokens, _ in pieces_in(sample)]
        assert len(ranks) > 1
        assert ranks == sorted(ranks)


def test_data_packing_any_run_of_windows_is_a_fair_sample_of_the_lengths(tmp_path: Path) -> None:
    windows = best_fit(training_of(tmp_path, random_texts(1000)), 42)
    longest = [max(len(tokens) for tokens, _ in pieces_in(sample)) for sample in samples_of(windows)]
    half = len(longest) // 2
    assert abs(np.mean(longest[:half]) - np.mean(longest[half:])) < 2  # in the order of the bins 10


@pytest.mark.parametrize(("pad_id", "filler"), [(PAD, PAD), (None, EOS)])
def test_data_packing_padding_is_pad_else_eos_and_predicts_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pad_id: int | None, filler: int
) -> None:
    monkeypatch.setattr(ByteTokenizer, "pad_id", pad_id)
    sample = best_fit(training_of(tmp_path, ["ab"]), 7).window(0)
    assert sample["tokens"][4:].tolist() == [filler] * 3
    assert sample["labels"][3:].tolist() == [IGNORE] * 4
    assert sample["positions"][4:].tolist() == [0] * 3


def test_data_packing_windows_are_int64_of_seq_len(tmp_path: Path) -> None:
    sample = best_fit(training_of(tmp_path, random_texts(5)), 50)[0]
    assert list(sample) == ["tokens", "labels", "positions", "document_ids"]
    assert {(part.dtype, part.shape) for part in sample.values()} == {(torch.int64, (50,))}


def test_data_packing_beyond_the_last_window_is_refused(tmp_path: Path) -> None:
    with pytest.raises(IndexError, match="window 1: there are 1"):
        best_fit(training_of(tmp_path, ["ab"]), 7).window(1)


# Positions


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
@pytest.mark.parametrize("reset", [False, True])
def test_data_packing_positions_begin_anew_in_each_document_or_run_on(
    tmp_path: Path, packing: str, reset: bool
) -> None:
    windows = Windows(
        training_of(tmp_path, random_texts(100)),
        seq_len=64,
        packing=packing,  # type: ignore[arg-type]
        reset_positions=reset,
    )
    for sample in samples_of(windows):
        ids = [number for number in sample["document_ids"].tolist() if number != NO_DOCUMENT]
        expected = [index - ids.index(number) if reset else index for index, number in enumerate(ids)]
        assert sample["positions"][: len(ids)].tolist() == expected
        assert ids[-1] > 0


# What the placement depends on


def test_data_packing_depends_on_corpus_and_seed_alone(tmp_path: Path) -> None:
    held = []
    for name, seed in (("one", 0), ("two", 0), ("three", 1)):
        (tmp_path / name).mkdir()
        windows = best_fit(training_of(tmp_path / name, random_texts(100), seed=seed), 64)
        held.append([sample["tokens"].tolist() for sample in samples_of(windows)])
    assert held[0] == held[1] != held[2]


def test_data_packing_is_computed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    split = training_of(tmp_path, random_texts(100))
    first = best_fit(split, 16)
    monkeypatch.setattr("cptrain.data.placement._write_best_fit", None)  # may not be called
    assert [pieces_in(sample) for sample in samples_of(best_fit(split, 16))] == [
        pieces_in(sample) for sample in samples_of(first)
    ]


def test_data_packing_is_computed_again_for_another_setting(tmp_path: Path) -> None:
    split, other = split_documents(corpus_of(tmp_path, random_texts(100)), fraction=0.5, seed=0)
    made = [best_fit(split, 16), best_fit(split, 17), best_fit(split, 16, long_documents="drop"), best_fit(other, 16)]
    assert len({len(windows) for windows in made}) == 4


def test_data_packing_pickles_without_its_placement(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    windows = best_fit(training_of(tmp_path, random_texts(3000, longest=5)), 16)
    data = pickle.dumps(windows)
    caplog.clear()
    again = pickle.loads(data)
    assert len(data) < 2000
    assert caplog.messages == []
    assert all(torch.equal(again[5][name], part) for name, part in windows[5].items())


def test_data_packing_cost_of_a_window_does_not_grow_with_the_corpus(tmp_path: Path) -> None:
    count = 300_000
    path = write_tokens(tmp_path / "a.bin", [1, EOS] * count)
    windows = best_fit(
        split_documents(prepared(tmp_path, source="tokens", paths=(str(path),)), fraction=0, seed=0)[0], 64
    )
    tracemalloc.start()
    windows[0]
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < count  # one array over all documents is eight times that


# What is said


@pytest.mark.parametrize(
    ("long_documents", "said"),
    [
        ("split", "5 documents, 31 tokens, 4 windows of 8 by best fit, 3.12% padding, 1 longer documents split"),
        (
            "drop",
            "5 documents, 31 tokens, 2 windows of 8 by best fit, 6.25% padding, 1 longer documents dropped "
            "(51.61% of the tokens)",
        ),
    ],
)
def test_data_packing_logs_windows_padding_and_long_documents(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, long_documents: str, said: str
) -> None:
    caplog.set_level(logging.INFO)
    # 16 | 4, 4 | 4, 3
    split = training_of(tmp_path, ["abcdefghijklmn", "ab", "cd", "ef", "g"])
    for _ in range(2):  # the second finds it on disk
        caplog.clear()
        best_fit(split, 8, long_documents=long_documents)
        assert caplog.messages == [f"data: training: {said}"]


def test_data_packing_identity_tells_packings_apart(tmp_path: Path) -> None:
    split = training_of(tmp_path, random_texts(100))
    assert best_fit(split, 16, long_documents="drop").identity() == {
        **split.identity(),
        "data.packing": "best_fit",
        "data.long_documents": "drop",
    }


def test_data_packing_identity_of_concat_is_that_of_the_split(tmp_path: Path) -> None:
    split = training_of(tmp_path, random_texts(100))
    assert Windows(split, seq_len=16).identity() == split.identity()


def test_data_packing_with_everything_dropped_is_refused(tmp_path: Path) -> None:
    message = (
        r"seq_len = 3: one window needs a document that fits in, the training text has none among its 2 documents; "
        r'raise training\.seq_len or set data\.long_documents = "split"'
    )
    with pytest.raises(ValueError, match=message):
        best_fit(training_of(tmp_path, ["ab", "cd"]), 3, long_documents="drop")


def test_data_packing_without_held_out_documents_is_refused(tmp_path: Path) -> None:
    _, held_out = split_documents(corpus_of(tmp_path, ["ab", "cd"]), fraction=0.1, seed=0)
    with pytest.raises(ValueError, match=r"none among its 0 documents; raise data\.validation_fraction \(= 0\.1\)"):
        best_fit(held_out, 8)


# Settings


def test_data_packing_windows_follow_the_settings(tmp_path: Path) -> None:
    split = training_of(tmp_path, random_texts(100))
    for config in (
        DataConfig(),
        DataConfig(document_mask=False),
        DataConfig(packing="best_fit"),
        DataConfig(packing="best_fit", long_documents="drop", reset_positions=False),
    ):
        reset = config.document_mask and config.reset_positions == "auto"
        expected = Windows(
            split,
            seq_len=20,
            packing=config.packing,
            long_documents=config.long_documents,
            reset_positions=reset,
        )
        pairs = zip(samples_of(build_windows(split, config, seq_len=20)), samples_of(expected), strict=True)
        assert all(torch.equal(ours[name], theirs[name]) for ours, theirs in pairs for name in ours)
