"""Schedules, exhaustively and without processes: every visible pair once, nothing else, even work."""

from __future__ import annotations

import random

import pytest
import torch

from cptrain.context_parallel.layout import Layout, contiguous, zigzag
from cptrain.context_parallel.mask import CAUSAL, FULL, Mask
from cptrain.context_parallel.schedule import Block, ring_schedule

RANKS = range(1, 17)
MASKS = {"causal": CAUSAL, "full": FULL}


def dealt(num_ranks: int, chunks_per_rank: int, chunk_size: int, seed: int) -> Layout:
    """A random dealing of chunks, each hand sorted."""
    deck = list(range(num_ranks * chunks_per_rank))
    random.Random(seed).shuffle(deck)
    hands = (tuple(sorted(deck[r * chunks_per_rank : (r + 1) * chunks_per_rank])) for r in range(num_ranks))
    return Layout(chunk_size, tuple(hands))


LAYOUTS = {
    "contiguous": [contiguous(n, 3 * n) for n in RANKS],
    "zigzag": [zigzag(n, 4 * n) for n in RANKS],
    "random": [dealt(n, per_rank, 1 + seed % 2, seed) for n in RANKS for per_rank in (1, 2, 3, 5) for seed in (0, 1)],
}


def times_computed(layout: Layout, mask: Mask) -> torch.Tensor:
    """In how many blocks each global (query, key) pair lies. [S, S]."""
    shards = layout.permutation().view(layout.num_ranks, -1)
    counts = torch.zeros(layout.length, layout.length, dtype=torch.int64)
    for rank in range(layout.num_ranks):
        for hop in ring_schedule(layout, mask, rank):
            for block in hop.blocks:
                queries = shards[rank, block.q_start : block.q_stop]
                keys = shards[hop.source, block.k_start : block.k_stop]
                assert len(queries) == block.q_stop - block.q_start > 0
                assert len(keys) == block.k_stop - block.k_start > 0
                pairs = torch.ones(len(queries), len(keys), dtype=torch.int64)
                if block.causal:
                    assert len(queries) == len(keys), "a causal block is square"
                    pairs = pairs.tril()
                assert block.num_pairs == pairs.sum()
                counts[queries[:, None], keys] += pairs
    return counts


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("name", LAYOUTS)
def test_schedule_computes_each_visible_pair_once_and_no_other(name, mask):
    for layout in LAYOUTS[name]:
        visible = torch.ones(layout.length, layout.length, dtype=torch.int64)
        if mask == "causal":
            visible = visible.tril()
        assert torch.equal(times_computed(layout, MASKS[mask]), visible), layout


def test_schedule_mask_describes_what_is_visible():
    assert [[CAUSAL.visible(q, k) for k in range(3)] for q in range(3)] == torch.ones(3, 3).bool().tril().tolist()
    assert all(FULL.visible(q, k) for q in range(3) for k in range(3))


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("name", LAYOUTS)
def test_schedule_makes_all_hops_and_receives_from_behind(name, mask):
    for layout in LAYOUTS[name]:
        size = layout.num_ranks
        for rank in range(size):
            hops = ring_schedule(layout, MASKS[mask], rank)
            assert [hop.source for hop in hops] == [(rank - i) % size for i in range(size)]


def work(layout: Layout, rank: int) -> int:
    return sum(block.num_pairs for hop in ring_schedule(layout, CAUSAL, rank) for block in hop.blocks)


def test_schedule_of_causal_zigzag_gives_every_rank_the_same_work():
    for layout in LAYOUTS["zigzag"]:
        assert len({work(layout, rank) for rank in range(layout.num_ranks)}) == 1


def test_schedule_of_causal_zigzag_gives_every_rank_the_same_work_at_each_hop():
    for layout in LAYOUTS["zigzag"]:
        for index in range(1, layout.num_ranks):
            hops = [ring_schedule(layout, CAUSAL, rank)[index] for rank in range(layout.num_ranks)]
            assert len({sum(block.num_pairs for block in hop.blocks) for hop in hops}) == 1


def test_schedule_of_causal_contiguous_leaves_the_last_rank_most_work():
    layout = contiguous(16, 16 * 8)
    shares = [work(layout, rank) for rank in range(16)]
    assert shares == sorted(shares)
    assert max(shares) > 1.8 * sum(shares) / 16


@pytest.mark.parametrize("mask", MASKS)
def test_schedule_of_zigzag_is_one_kernel_call_a_hop(mask):
    for layout in LAYOUTS["zigzag"]:
        for rank in range(layout.num_ranks):
            assert [len(hop.blocks) for hop in ring_schedule(layout, MASKS[mask], rank)] == [1] * layout.num_ranks


def test_schedule_of_full_attention_is_one_whole_block_a_hop_for_any_layout():
    for layout in LAYOUTS["random"]:
        length = layout.shard_length
        for hop in ring_schedule(layout, FULL, 0):
            assert hop.blocks == (Block(0, length, 0, length, False),)
