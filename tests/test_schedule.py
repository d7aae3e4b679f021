"""Schedules, exhaustively and without processes: every visible pair once, nothing else, even work."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import pairwise
from unittest import mock

import pytest
import torch

import cptrain.context_parallel.attention as operator
from cptrain.context_parallel import hops
from cptrain.context_parallel.attention import Route
from cptrain.context_parallel.groups import Groups
from cptrain.context_parallel.launches import matched, put, take
from cptrain.context_parallel.layout import Layout, Span, contiguous, zigzag
from cptrain.context_parallel.mask import CAUSAL, FULL, Documents, Mask
from cptrain.context_parallel.schedule import Block, Shape, shard_blocks, whole_blocks

RANKS = range(1, 17)
WINDOWS = (1, 2, 3, 4, 5, 9, 16, 1000)
MASKS = {"causal": CAUSAL, "full": FULL, **{f"window {w}": Mask(causal=True, window=w) for w in WINDOWS}}


def dealt(num_ranks: int, chunks_per_rank: int, chunk_size: int, seed: int) -> Layout:
    """A random dealing of chunks, each hand sorted."""
    deck = list(range(num_ranks * chunks_per_rank))
    random.Random(seed).shuffle(deck)
    hands = (tuple(sorted(deck[r * chunks_per_rank : (r + 1) * chunks_per_rank])) for r in range(num_ranks))
    return Layout(chunk_size, tuple(hands))


LAYOUTS = {
    "contiguous": [contiguous(n, 3 * n) for n in RANKS],
    "zigzag": [zigzag(n, 4 * n) for n in RANKS],
    "zigzag, odd chunks": [zigzag(n, 10 * n) for n in (1, 2, 3, 5)],
    "random": [dealt(n, per_rank, 1 + seed % 3, seed) for n in RANKS for per_rank in (1, 2, 3) for seed in (0, 2)],
}


def visible(length: int, mask: Mask) -> torch.Tensor:
    """The dense mask, from its words: [S, S]."""
    distance = torch.arange(length)[:, None] - torch.arange(length)
    seen = distance >= 0 if mask.causal else torch.ones(length, length, dtype=torch.bool)
    return seen & (distance < mask.window) if mask.window else seen


def count(counts: torch.Tensor, blocks: tuple[Block, ...], queries: torch.Tensor, keys: torch.Tensor) -> None:
    """Add one for each (query, key) pair that these blocks compute; queries and keys are global positions."""
    for block in blocks:
        rows, columns = queries[block.q_start : block.q_stop], keys[block.k_start : block.k_stop]
        assert len(rows) == block.q_stop - block.q_start > 0
        assert len(columns) == block.k_stop - block.k_start > 0
        pairs = torch.ones(len(rows), len(columns), dtype=torch.int64)
        if block.shape is not Shape.FULL:
            assert len(rows) == len(columns), "a triangle is half a square"
            pairs = pairs.tril() if block.shape is Shape.LOWER else pairs.triu()
        assert block.num_pairs == pairs.sum()
        counts[rows[:, None], columns] += pairs


@pytest.mark.parametrize("name", LAYOUTS)
def test_schedule_computes_each_visible_pair_once_and_no_other(name):
    for layout in LAYOUTS[name]:
        shards = layout.permutation().view(layout.num_ranks, -1)
        for mask in MASKS.values():
            by_source, whole = (torch.zeros(layout.length, layout.length, dtype=torch.int64) for _ in range(2))
            for rank in range(layout.num_ranks):
                for source in range(layout.num_ranks):
                    count(by_source, shard_blocks(layout, mask, rank, source), shards[rank], shards[source])
                count(whole, whole_blocks(layout, mask, rank), shards[rank], torch.arange(layout.length))
            expected = visible(layout.length, mask).to(torch.int64)
            assert torch.equal(by_source, expected), (layout, mask)
            assert torch.equal(whole, expected), (layout, mask)


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_schedule_mask_describes_what_is_visible(mask):
    assert torch.tensor([[mask.visible(q, k) for k in range(20)] for q in range(20)]).equal(visible(20, mask))


@pytest.mark.parametrize(("causal", "window"), [(True, -1), (False, 3)])
def test_schedule_refuses_a_mask_that_means_nothing(causal, window):
    with pytest.raises(ValueError, match=f"window = {window}"):
        Mask(causal=causal, window=window)


EXCHANGED = {
    "window": Mask(causal=True, window=4),
    "wide window": Mask(causal=True, window=25),
    "documents": Mask(causal=True, documents=Documents((0, 3, 4, 17, 31), padding=(1,))),
    "documents and window": Mask(causal=True, window=6, documents=Documents((0, 29, 30))),
}


def whole_stream(mask: Mask, length: int) -> Mask:
    """The mask with its last document as long as the sequence is."""
    if mask.documents is None:
        return mask
    offsets = [offset for offset in mask.documents.offsets if offset < length]
    padding = tuple(number for number in mask.documents.padding if number < len(offsets))
    return replace(mask, documents=Documents((*offsets, length), padding=padding))


@pytest.mark.parametrize("at_once", [1, 2, 100])
@pytest.mark.parametrize("mask", EXCHANGED.values(), ids=EXCHANGED)
@pytest.mark.parametrize("name", ["zigzag", "contiguous", "random"])
def test_schedule_of_exchanged_keys_computes_each_visible_pair_once(name, mask, at_once):
    """Whatever number of hops is computed together; what one rank sends is what the other expects."""
    for layout in (layout for layout in LAYOUTS[name] if layout.num_ranks in (1, 2, 3, 4, 8)):
        here, shards = whole_stream(mask, layout.length), layout.permutation().view(layout.num_ranks, -1)
        tokens = range(layout.length)
        expected = torch.tensor([[here.visible(q, k) for k in tokens] for q in tokens]).to(torch.int64)
        groups = [hops.groups_of(layout, here, rank, at_once) for rank in range(layout.num_ranks)]
        found = torch.zeros_like(expected)
        for rank in range(layout.num_ranks):
            count(found, shard_blocks(layout, here, rank, rank), shards[rank], shards[rank])
            assert len(groups[rank]) == -(-(layout.num_ranks - 1) // at_once)
            for group in groups[rank]:
                keys = torch.full((group.keys.num_keys,), -1)
                assert group.keys.needed == tuple(hop.incoming for hop in group.hops)
                for hop, place in zip(group.hops, group.keys.places, strict=True):
                    sent = [h.outgoing for g in groups[hop.source] for h in g.hops if h.reader == rank]
                    assert hop.incoming == (sent[0] if sent else ())
                    for start, stop in place:
                        assert (keys[start:stop] == -1).all()
                    if hop.incoming:
                        put(keys[None, None], place, take(shards[hop.source][None, None], hop.incoming))
                assert keys.tolist() == sorted(set(keys.tolist()) - {-1})
                count(found, group.keys.blocks, shards[rank], keys)
        assert torch.equal(found, expected), (layout, here)


def test_schedule_takes_small_hops_together_where_copies_are_cheap():
    assert hops.hops_at_once(zigzag(8, 8 * 2048), "cuda") == 8
    assert hops.hops_at_once(zigzag(8, 8 * 65_536), "cuda") == 1
    assert hops.hops_at_once(zigzag(8, 8 * 2048), "cpu") == 1
    assert hops.hops_at_once(zigzag(8, 8 * 2048), "cuda", fast=True) == 16
    assert hops.hops_at_once(zigzag(8, 8 * 2048), "cuda", heads_per_key=4, fast=True) == 32
    assert hops.hops_at_once(zigzag(8, 8 * 2048), "cuda", heads_per_key=4) == 8
    assert hops.hops_at_once(zigzag(8, 8 * 2048), "cpu", heads_per_key=4, fast=True) == 1


@pytest.mark.parametrize(
    ("tokens", "heads_per_key", "at_once", "growth"),
    # growth: heads_per_key * tokens / 3,200, what arrives during a block; never less than 2
    [(8192, 4, 8, 10), (8192, 1, 4, 2), (8192, 8, 16, 20), (2048, 4, 32, 2), (32_768, 4, 2, 40), (131_072, 4, 1, 163)],
)
def test_schedule_of_a_ring_keeps_to_the_pace_of_its_link(tokens, heads_per_key, at_once, growth):
    layout = zigzag(8, 8 * tokens)
    assert hops.ring_pace(layout, "cuda", heads_per_key=heads_per_key, fast=True) == (at_once, growth)
    assert hops.ring_pace(layout, "cuda", heads_per_key=heads_per_key, fast=False) == (1, 1)
    assert hops.ring_pace(layout, "cpu", heads_per_key=heads_per_key, fast=True).at_once == 1


def test_schedule_of_a_carrier_keeps_to_the_links_of_its_own_groups():
    layout = zigzag(8, 8 * 8192)
    ring = Groups(ring="all", inner="all")
    double = Groups(ring="all", inner="four", outer="two")
    found = {}
    with mock.patch.object(operator, "Ring") as rings, mock.patch.object(operator, "Exchange") as exchanges:
        for name, groups in {"ring": ring, "double": double}.items():
            for link in ("fast", ""):
                for method in ("ring", "exchange"):
                    route = Route(method, 8, "zigzag", True, "auto", groups._replace(link=link))
                    route.carrier(layout, CAUSAL, "cuda", 4)
                found[name, link] = rings.call_args.kwargs["pace"], exchanges.call_args.kwargs["at_once"]
    # of a double ring only the links inside are known to be fast, and an exchange goes everywhere
    assert found == {
        ("ring", "fast"): ((8, 10), 8),
        ("ring", ""): ((1, 1), 2),
        ("double", "fast"): ((8, 10), 2),
        ("double", ""): ((1, 1), 2),
    }


@pytest.mark.parametrize("count", [0, 1, 2, 3, 8, 15])
@pytest.mark.parametrize(("at_once", "growth"), [(1, 1), (1, 2), (2, 2), (3, 2), (4, 2), (16, 2), (4, 3), (8, 10)])
def test_schedule_of_a_ring_takes_hops_together_in_rising_batches(count, at_once, growth):
    found = hops.batches(range(count, 0, -1), hops.Pace(at_once, growth))
    assert [hop for batch in found for hop in batch] == list(range(count, 0, -1))
    sizes = [len(batch) for batch in found]
    assert sizes[:1] in ([], [1]) and max(sizes, default=1) <= at_once
    assert all(after <= growth * before for before, after in pairwise(sizes))
    # no smaller than that allows, but for the last
    assert all(after == min(growth * before, at_once) for before, after in pairwise(sizes[:-1]))


def test_schedule_matches_ranges_of_equal_size():
    def numbers(ranges):
        return [number for start, stop in ranges for number in range(start, stop)]

    for first, second in (
        (((0, 4),), ((10, 12), (20, 22))),
        (((0, 1), (5, 9)), ((3, 6), (8, 10))),
        (((2, 4), (6, 8)), ((0, 2), (5, 7))),
        ((), ()),
    ):
        pairs = matched(first, second)
        found = [numbers([(part.start, part.stop) for part in side]) for side in zip(*pairs, strict=True)] or [[], []]
        assert found == [numbers(first), numbers(second)]


def work(layout: Layout, rank: int, mask: Mask = CAUSAL) -> int:
    sources = range(layout.num_ranks)
    return sum(block.num_pairs for source in sources for block in shard_blocks(layout, mask, rank, source))


def test_schedule_of_causal_zigzag_gives_every_rank_the_same_work():
    for layout in LAYOUTS["zigzag"]:
        assert len({work(layout, rank) for rank in range(layout.num_ranks)}) == 1


def test_schedule_of_windowed_zigzag_gives_every_rank_nearly_the_same_work():
    for num_ranks in (2, 4, 8):
        shares = [
            work(zigzag(num_ranks, 64 * num_ranks), rank, Mask(causal=True, window=8)) for rank in range(num_ranks)
        ]
        assert max(shares) <= 1.05 * sum(shares) / num_ranks


def test_schedule_of_causal_zigzag_gives_every_rank_the_same_work_at_each_hop():
    for layout in LAYOUTS["zigzag"]:
        size = layout.num_ranks
        for hop in range(1, size):
            found = [shard_blocks(layout, CAUSAL, rank, (rank - hop) % size) for rank in range(size)]
            assert len({sum(block.num_pairs for block in blocks) for blocks in found}) == 1


def test_schedule_of_causal_contiguous_leaves_the_last_rank_most_work():
    layout = contiguous(16, 16 * 8)
    shares = [work(layout, rank) for rank in range(16)]
    assert shares == sorted(shares)
    assert max(shares) > 1.8 * sum(shares) / 16


@pytest.mark.parametrize("mask", [CAUSAL, FULL], ids=["causal", "full"])
def test_schedule_of_zigzag_is_one_kernel_call_a_hop(mask):
    for layout in LAYOUTS["zigzag"]:
        for rank in range(layout.num_ranks):
            assert all(len(shard_blocks(layout, mask, rank, source)) == 1 for source in range(layout.num_ranks))


def test_schedule_of_full_attention_is_one_whole_block_a_hop_for_any_layout():
    for layout in LAYOUTS["random"]:
        length = layout.shard_length
        for source in range(layout.num_ranks):
            assert shard_blocks(layout, FULL, 0, source) == (Block(0, length, 0, length),)


def test_schedule_of_one_window_in_one_rank_is_few_triangles():
    blocks = whole_blocks(contiguous(1, 4096), Mask(causal=True, window=512), 0)
    assert len(blocks) <= 2 * 4096 // 511 + 2
    assert contiguous(1, 4096).spans(0) == [Span(0, 0, 4096)]


def cut_in(length: int, seed: int) -> Documents:
    """Random documents, some of one token, some padding."""
    chance, offsets = random.Random(seed), [0]
    while offsets[-1] < length:
        offsets.append(min(length, offsets[-1] + chance.choice((1, 2, 5, 11, length))))
    numbers = range(len(offsets) - 1)
    return Documents(tuple(offsets), tuple(number for number in numbers if number and chance.random() < 0.2))


def documents_seen(documents: Documents) -> torch.Tensor:
    """[S, S]: whether two tokens are of one document."""
    ids = torch.full((documents.length,), -1)
    for number, (start, stop) in enumerate(documents.spans()):
        ids[start:stop] = number
    return (ids[:, None] == ids) & (ids >= 0)


@pytest.mark.parametrize("name", LAYOUTS)
def test_schedule_of_documents_computes_each_visible_pair_once_and_no_other(name):
    for number, layout in enumerate(LAYOUTS[name]):
        shards = layout.permutation().view(layout.num_ranks, -1)
        for window in (0, 1, 4):
            documents = cut_in(layout.length, number)
            mask = Mask(causal=True, window=window, documents=documents)
            by_source, whole = (torch.zeros(layout.length, layout.length, dtype=torch.int64) for _ in range(2))
            for rank in range(layout.num_ranks):
                for source in range(layout.num_ranks):
                    count(by_source, shard_blocks(layout, mask, rank, source), shards[rank], shards[source])
                count(whole, whole_blocks(layout, mask, rank), shards[rank], torch.arange(layout.length))
            expected = (visible(layout.length, mask) & documents_seen(documents)).to(torch.int64)
            assert torch.equal(by_source, expected), (layout, mask)
            assert torch.equal(whole, expected), (layout, mask)


def test_schedule_mask_of_documents_describes_what_is_visible():
    documents = Documents((0, 3, 4, 9, 12), padding=(3,))
    mask = Mask(causal=True, window=4, documents=documents)
    expected = visible(12, mask) & documents_seen(documents)
    assert torch.tensor([[mask.visible(q, k) for k in range(12)] for q in range(12)]).equal(expected)


@pytest.mark.parametrize("name", LAYOUTS)
def test_schedule_gives_each_query_one_lower_triangle_and_that_first(name):
    """Its result is written over the row, everything else merged into it."""
    for number, layout in enumerate(LAYOUTS[name]):
        documents = cut_in(layout.length, number)
        for mask in (CAUSAL, Mask(True, 4), Mask(True, 0, documents), Mask(True, 3, documents)):
            for rank in range(layout.num_ranks):
                shard = layout.permutation().view(layout.num_ranks, -1)[rank].tolist()
                for blocks in (shard_blocks(layout, mask, rank, rank), whole_blocks(layout, mask, rank)):
                    lower = [block for block in blocks if block.shape is Shape.LOWER]
                    assert list(blocks[: len(lower)]) == lower
                    rows = sorted(row for block in lower for row in range(block.q_start, block.q_stop))
                    assert rows == [row for row, token in enumerate(shard) if mask.visible(token, token)]
                for source in range(layout.num_ranks):
                    if source != rank:
                        others = shard_blocks(layout, mask, rank, source)
                        assert all(block.shape is not Shape.LOWER for block in others)


def test_schedule_of_a_dealt_long_document_is_one_block_a_chunk_and_source():
    layout = dealt(4, 8, 4, seed=3)
    mask = Mask(causal=True, documents=Documents((0, layout.length)))
    for rank in range(4):
        for source in range(4):
            if source != rank:
                assert len(shard_blocks(layout, mask, rank, source)) <= 8
