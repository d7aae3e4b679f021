"""Dealing chunks of packed documents: every token once, even work, few keys that travel, the same everywhere."""

from __future__ import annotations

import math
import random
from itertools import accumulate

import numpy as np
import pytest
import torch

from cptrain.context_parallel import balance
from cptrain.context_parallel.balance import (
    choose_chunk_size,
    chunk_parts,
    deal,
    num_moved,
    owners_of,
    shared_documents,
    work_of,
)
from cptrain.context_parallel.layout import contiguous, zigzag
from cptrain.context_parallel.mask import Documents, Mask
from cptrain.context_parallel.packing import Packer, Packing, decode, find_documents, join_offsets, pack
from cptrain.context_parallel.schedule import needed, shard_blocks
from cptrain.context_parallel.trading import Held


def long_tail(length: int, seed: int, *, median: float = 600.0, spread: float = 1.708) -> Documents:
    """Documents of lognormal lengths, as long-context training data has them (0.3 % above 64K tokens)."""
    chance, offsets = random.Random(seed), [0]
    while offsets[-1] < length:
        offsets.append(min(length, offsets[-1] + max(1, int(math.exp(chance.gauss(math.log(median), spread))))))
    return Documents(tuple(offsets))


def several(rows: int, length: int, seed: int, **options: float) -> Documents:
    """As many rows of such documents."""
    return join_offsets([long_tail(length, seed * 100 + row, **options).offsets for row in range(rows)])


@pytest.mark.parametrize(
    ("length", "num_ranks", "limit"), [(65536, 8, 0.38), (262144, 32, 0.095), (1 << 20, 32, 0.085)]
)
def test_balance_of_a_long_tail_is_even_and_moves_few_keys(length, num_ranks, limit):
    packs = [Packer(num_ranks)(long_tail(length, seed), 1) for seed in range(6)]
    assert max(packing.imbalance for packing in packs) <= 1.05
    assert sum(packing.moved_share for packing in packs) / len(packs) <= limit


@pytest.mark.parametrize(
    ("lengths", "limit"),
    [
        ((26066, 39470), 0.45),
        ((34111, 60, 4284, 2824, 24257), 0.42),
        ((41097, 4506, 9456, 2693, 2274, 5510), 0.55),
        ((8342, 297, 5079, 10449, 1816, 6343, 33210), 0.48),
    ],
)
def test_balance_of_a_few_documents_trades_chunks_until_few_keys_move(lengths, limit):
    # Windows of Python files. Without trading these move 0.65, 0.48, 0.65 and 0.60 of a full ring's keys.
    packing = Packer(8)(Documents((0, *accumulate(lengths))), 1)
    assert packing.imbalance <= balance.LIMIT + 0.001
    assert packing.moved_share <= limit


@pytest.mark.parametrize("num_ranks", [2, 4, 8])
def test_balance_trades_save_as_many_keys_as_they_say(num_ranks):
    for seed in range(4):
        documents = long_tail(48 * num_ranks, seed, median=40)
        parts = chunk_parts(documents, 4)
        owners = [chunk % num_ranks for chunk in range(len(parts))]
        held = Held(owners, work_of(parts), shared_documents(parts, documents), np.full(num_ranks, 1 << 40))
        for _ in range(12):
            mine = held.worth_trying()
            theirs, saved = held.partners(mine)
            for one, other, keys in zip(mine, theirs, saved, strict=True):
                owners[one], owners[other] = owners[other], owners[one]
                assert keys == 0 or num_moved(parts, held.owners) - num_moved(parts, owners) == keys
                owners[one], owners[other] = owners[other], owners[one]
            best = int(saved.argmax())
            held.exchange(int(mine[best]), int(theirs[best]))
            owners = held.owners.tolist()


def test_balance_is_better_than_any_fixed_pattern():
    for seed in range(4):
        documents = long_tail(65536, seed)
        packing = Packer(8)(documents, 1)
        for pattern in (contiguous(8, 65536), zigzag(8, 65536)):
            fixed = pack(documents, num_ranks=8, num_rows=1, chunk_size=pattern.chunk_size, layout=pattern)
            assert packing.imbalance < fixed.imbalance
            assert fixed.imbalance > 1.2


@pytest.mark.parametrize("window", [0, 7])
@pytest.mark.parametrize("num_rows", [1, 3])
def test_balance_deals_as_many_tokens_of_each_row_to_every_rank(num_rows, window):
    for num_ranks in range(1, 9):
        documents = several(num_rows, 24 * num_ranks, num_ranks, median=9)
        layout = deal(documents, num_ranks=num_ranks, num_rows=num_rows, chunk_size=4, window=window)
        assert sorted(layout.permutation().tolist()) == list(range(documents.length))
        rows = layout.permutation().view(num_ranks, -1) // (24 * num_ranks)
        for shard in rows:
            assert torch.bincount(shard, minlength=num_rows).tolist() == [24] * num_rows


def test_balance_with_a_window_evens_out_the_pairs_inside_of_it():
    # Without the window, the long document's end would seem as much work as all of the short ones.
    documents = Documents((0, 32768, *range(32768 + 64, 65536 + 1, 64)))
    seen = Packer(8, windows=(512,))(documents, 1)
    blind = Packer(8)(documents, 1).layout
    as_blind = pack(documents, num_ranks=8, num_rows=1, chunk_size=blind.chunk_size, windows=[512], layout=blind)
    assert seen.imbalance <= 1.05 < as_blind.imbalance


def test_balance_swaps_chunks_of_one_row_only(monkeypatch):
    monkeypatch.setattr(balance, "LIMIT", 1.0)  # so that there is always something to even out
    monkeypatch.setattr(balance, "SLACK", 0.5)
    for seed in range(20):
        documents = several(3, 96, seed, median=15)
        layout = deal(documents, num_ranks=4, num_rows=3, chunk_size=4)
        rows = layout.permutation().view(4, -1) // 96
        assert all(torch.bincount(shard, minlength=3).tolist() == [24] * 3 for shard in rows)


def test_balance_leaves_room_for_the_lightest_chunks_while_dealing(monkeypatch):
    monkeypatch.setattr(balance, "_swap", lambda *_: None)  # which would even out what dealing does not
    monkeypatch.setattr(balance, "_zigzag", lambda *_: None)
    shares = [Packer(8)(long_tail(65536, seed), 1).imbalance for seed in range(8)]
    assert sum(shares) / len(shares) <= 1.05


def test_balance_of_one_document_is_zigzag():
    layout = deal(Documents((0, 512)), num_ranks=4, num_rows=1, chunk_size=16)
    assert torch.equal(layout.permutation(), zigzag(4, 512).permutation())


def test_balance_keeps_short_documents_whole():
    offsets = tuple(range(0, 4096 + 1, 128))
    packing = pack(Documents(offsets), num_ranks=4, num_rows=1, chunk_size=64)
    assert packing.imbalance <= 1.05
    assert packing.moved_of().keys == 0


def test_balance_of_padding_alone_deals_it_out():
    packing = pack(Documents((0, 64), padding=(0,)), num_ranks=4, num_rows=1, chunk_size=4)
    assert packing.layout.shard_length == 16
    assert packing.cost == (0, 0) and packing.moved == ((0, 0, 0),)


@pytest.mark.parametrize("window", [0, 1, 5, 30])
def test_balance_counts_work_and_travelling_keys_as_schedules_do(window):
    for seed in range(6):
        num_ranks = 2 + seed
        documents = several(2, 24 * num_ranks, seed, median=11)
        layout = deal(documents, num_ranks=num_ranks, num_rows=2, chunk_size=6, window=window)
        mask = Mask(causal=True, window=window, documents=documents)
        parts, owners = chunk_parts(documents, 6), owners_of(layout)
        blocks = {(r, s): shard_blocks(layout, mask, r, s) for r in range(num_ranks) for s in range(num_ranks)}
        for rank in range(num_ranks):
            pairs = sum(block.num_pairs for source in range(num_ranks) for block in blocks[rank, source])
            assert pairs == sum(work_of(parts, window)[chunk] for chunk in layout.chunks[rank])
        cost = pack(documents, num_ranks=num_ranks, num_rows=2, chunk_size=6, windows=[window], layout=layout).cost
        loads = [sum(b.num_pairs for s in range(num_ranks) for b in blocks[r, s]) for r in range(num_ranks)]
        assert (cost.num_pairs, cost.largest_work) == (sum(loads), max(loads))
        for inner_degree in (1, 2):
            travelling = sum(
                stop - start
                for (rank, source), found in blocks.items()
                if rank != source and (inner_degree == 1 or rank // inner_degree != source // inner_degree)
                for start, stop in needed(found)
            )
            assert travelling == num_moved(parts, owners, window=window, inner_degree=inner_degree)


def test_balance_depends_on_the_documents_alone():
    documents = long_tail(65536, 5)
    again = Documents(tuple(documents.offsets))
    assert deal(documents, num_ranks=8, num_rows=1, chunk_size=256).chunks == deal(
        again, num_ranks=8, num_rows=1, chunk_size=256
    ).chunks  # fmt: skip


@pytest.mark.parametrize(
    ("shard_length", "expected"),
    [(131072, 8192), (8192, 512), (1024, 256), (512, 128), (128, 32), (1, 1), (3 * 4096, 768), (7, 1)],
)
def test_balance_chooses_chunks_of_about_a_sixteenth(shard_length, expected):
    assert choose_chunk_size(shard_length) == expected


@pytest.mark.parametrize(
    ("wanted", "ways_out"), [(100, "64 or 128"), (0, "8 or 16"), (4, "8 or 16"), (5000, "512 or 1024")]
)
def test_balance_refuses_a_chunk_size_that_does_not_divide(wanted, ways_out):
    with pytest.raises(ValueError, match=f"chunk_size = {wanted}: must divide the 1024 tokens .*; try {ways_out}$"):
        choose_chunk_size(1024, wanted)


def test_packing_survives_its_encoding():
    ids = torch.tensor([[0] * 5 + [1] * 9 + [2] * 2 + [-1] * 8, [4] * 20 + [5] * 4])
    packing = pack(find_documents(ids), num_ranks=2, num_rows=2, chunk_size=3)
    encoded = packing.encode()
    assert encoded.dtype == torch.int64
    assert len(encoded) == 256
    assert decode(encoded) == packing
    assert decode(encoded.clone()) is decode(encoded)
    assert packing.documents.offsets == (0, 5, 14, 16, 24, 44, 48)
    assert packing.documents.padding == (3,)


def test_packing_of_offsets_is_that_of_ids():
    ids = torch.tensor([[0] * 5 + [1] * 3, [0] * 1 + [1] * 7])
    assert join_offsets([[0, 5, 8], [0, 1, 8]]) == find_documents(ids)


def test_packing_tells_rows_apart_whose_ids_meet():
    assert find_documents(torch.tensor([[0, 0], [0, 0]])).offsets == (0, 2, 4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: find_documents(torch.tensor([0, 1])), r"document_ids \(2,\): must be \[B, S\]"),
        (lambda: join_offsets([[0, 4], [0, 5]]), r"offsets\[1\] = \[0, 5\]: must rise from 0 to the length .*, 4"),
        (lambda: join_offsets([[0, 8], [0, 9, 8]]), r"offsets\[1\] = \[0, 9, 8\]: must rise from 0"),
        (lambda: join_offsets([[0, 3.7, 8]]), r"offsets\[0\] = \[0, 3.7, 8\]: must be a list of whole numbers"),
        (lambda: join_offsets([0, 8]), r"offsets\[0\] = 0: must be a list of whole numbers, a list for each row"),
        (lambda: join_offsets(torch.tensor([0, 8])), r"offsets\[0\] = 0: must be a list"),
        (lambda: join_offsets([]), "an id or an offset|must rise from 0"),
        (lambda: Documents((0, 3, 3)), r"offsets of documents must rise from 0, got \(0, 3, 3\)"),
        (lambda: Documents((1, 3)), "must rise from 0"),
        (lambda: Documents((0, 3), padding=(1,)), r"padding = \(1,\): there are 1 documents"),
        (
            lambda: Packing(Documents((0, 8)), contiguous(2, 8), 2, (0, 0), ()),
            "a document spans two rows of 4 tokens",
        ),
        (
            lambda: Packing(Documents((0, 8)), contiguous(2, 6), 1, (0, 0), ()),
            "documents of 8 and chunks of 6 tokens",
        ),
    ],
)
def test_packing_refuses_what_is_no_batch(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_packing_goes_round_the_ring_where_that_is_fewer_bytes():
    whole, short = Documents((0, 96)), Documents(tuple(range(0, 97, 6)))
    for num_ranks in (2, 4, 8):
        alone, many = (pack(d, num_ranks=num_ranks, num_rows=1, chunk_size=6) for d in (whole, short))
        assert many.exchange_is_cheaper()
        # Two ranks: a ring sends keys once forward and once back with gradients, and none to start backward from.
        assert alone.exchange_is_cheaper() == (num_ranks > 2)


def test_balance_takes_offsets_as_tensors():
    for rows in ([torch.tensor([0, 5, 8]), torch.tensor([0, 2, 8])], torch.tensor([[0, 5, 8], [0, 2, 8]])):
        assert join_offsets(rows).offsets == (0, 5, 8, 10, 16)
