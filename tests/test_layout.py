"""Layouts: every token is dealt once, evenly, and finds its way back."""

from __future__ import annotations

import itertools

import pytest

from cptrain.context_parallel.layout import LAYOUTS, Layout, contiguous, make_layout, zigzag

RANKS = range(1, 17)


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_permutation_deals_every_token_once(name):
    for num_ranks in RANKS:
        layout = make_layout(name, num_ranks, 6 * num_ranks)
        assert layout.num_ranks == num_ranks
        assert layout.length == 6 * num_ranks
        assert layout.shard_length == 6
        assert sorted(layout.permutation().tolist()) == list(range(layout.length))


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_spans_are_the_runs_of_each_shard(name):
    for num_ranks in RANKS:
        layout = make_layout(name, num_ranks, 6 * num_ranks)
        for rank, shard in enumerate(layout.permutation().view(num_ranks, -1).tolist()):
            covered = []
            for local, start, length in layout.spans(rank):
                assert local == len(covered)
                covered += range(start, start + length)
            assert covered == shard
            jumps = sum(after != before + 1 for before, after in itertools.pairwise(shard))
            assert len(layout.spans(rank)) == jumps + 1, "neighbouring chunks must be joined"


def test_layout_contiguous_gives_each_rank_one_run():
    for num_ranks in RANKS:
        assert contiguous(num_ranks, 5 * num_ranks).permutation().tolist() == list(range(5 * num_ranks))


def test_layout_zigzag_pairs_each_chunk_with_its_mirror_image():
    for num_ranks in RANKS:
        layout = zigzag(num_ranks, 2 * num_ranks)
        for rank, shard in enumerate(layout.permutation().view(num_ranks, 2).tolist()):
            assert shard == [rank, 2 * num_ranks - 1 - rank]


def test_layout_zigzag_gives_every_rank_the_same_causal_work():
    for num_ranks in RANKS:
        visible_keys = zigzag(num_ranks, 6 * num_ranks).permutation().view(num_ranks, -1) + 1
        assert len(set(visible_keys.sum(1).tolist())) == 1


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_of_one_rank_keeps_any_length_in_order(name):
    layout = make_layout(name, 1, 7)
    assert layout.permutation().tolist() == list(range(7))


@pytest.mark.parametrize(
    ("name", "num_ranks", "length", "needed", "nearest"),
    [
        ("zigzag", 4, 20, "multiple of 8, got 20", "try 16 or 24"),
        ("zigzag", 4, 7, "multiple of 8, got 7", "try 8"),
        ("contiguous", 3, 10, "multiple of 3, got 10", "try 9 or 12"),
        ("contiguous", 3, 0, "multiple of 3, got 0", "try 3"),
    ],
)
def test_layout_error_names_the_nearest_length(name, num_ranks, length, needed, nearest):
    with pytest.raises(ValueError, match=f"{name} layout.*{needed}; {nearest}$"):
        make_layout(name, num_ranks, length)


@pytest.mark.parametrize(
    ("chunks", "rule"),
    [
        (((0, 1), (2,)), "same number of chunks"),
        (((0, 3), (2, 1)), "rising order"),
        (((0, 1), (1, 2)), "every index once"),
        (((0, 1), (2, 4)), "every index once"),
        ((), "same number of chunks"),
    ],
    ids=["uneven", "out of order", "dealt twice", "missing", "no ranks"],
)
def test_layout_refuses_chunks_that_are_no_even_rising_deal(chunks, rule):
    with pytest.raises(ValueError, match=rule):
        Layout(4, chunks)
