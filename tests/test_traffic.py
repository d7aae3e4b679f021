"""What attention sends: the formulas against closed forms, and against what is really sent, method by method."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
from test_attention import PLANS, make_plan
from test_packed import PLANS as PACKED_PLANS
from test_packed import ids_of
from test_packed import make_plan as make_balanced_plan

from cptrain.context_parallel.layout import make_layout
from cptrain.context_parallel.mask import CAUSAL, FULL, Documents, Mask
from cptrain.context_parallel.packing import Moved
from cptrain.context_parallel.traffic import Call, attention_traffic, num_bytes
from cptrain.distributed.transport import Message, recorded_messages

HEADS, KV_HEADS, KEY_DIM, VALUE_DIM = 8, 2, 6, 4
DTYPES = (torch.float64, torch.bfloat16)
MASKS = (CAUSAL, FULL, Mask(True, 3), Mask(True, 20))


def call(dtype: torch.dtype, *, kv_heads: int = KV_HEADS) -> Call:
    return Call(batch=2, heads=HEADS, kv_heads=kv_heads, key_dim=KEY_DIM, value_dim=VALUE_DIM, itemsize=dtype.itemsize)


def mismatches(rank: int, world: int, options: dict) -> list[str]:
    """Calls whose messages are not those of the formulas, and calls that sent nothing at all."""
    found, plan, length = [], make_plan(**options), 12 * world
    for dtype in DTYPES:
        for mask in MASKS:
            shapes = ((HEADS, KEY_DIM), (KV_HEADS, KEY_DIM), (KV_HEADS, VALUE_DIM))
            q, k, v = (torch.randn(2, h, length // world, d, dtype=dtype, requires_grad=True) for h, d in shapes)
            with recorded_messages() as there:
                out = plan.attention(q, k, v, is_causal=mask.causal, window_size=mask.window or None)
            with recorded_messages() as back:
                out.sum().backward()
            expected = attention_traffic(
                call(dtype),
                mask,
                plan.ring_layout(length),
                ring_rank=plan.ring_rank,
                gathers=plan.method == "all_gather",
                ulysses_degree=plan.ulysses_degree,
            )
            if (Counter(there), Counter(back)) != expected or not (there or mask.window):
                found.append(f"{mask}, {dtype}: sent {there}, {back}; formulas {expected}")
    return found


@pytest.mark.parametrize(
    ("world", "name"), [(world, name) for world in (2, 3, 4) for name in PLANS[world] if "overlap" not in name]
)
def test_traffic_is_what_is_sent(pool, world, name):
    for found in pool.run(world, mismatches, PLANS[world][name]):
        assert not found, found


def mismatches_of_packs(rank: int, world: int, options: dict) -> list[str]:
    """Calls on packed documents whose messages are not those of the formulas, and calls that sent nothing at all."""
    found, plan, length = [], make_balanced_plan(**options), 24 * world
    packing = plan.pack(ids_of(("long and short", "padding tail"), length)).packing
    # As if nothing had to travel, and as if everything had: keys go straight to their readers, and round the ring.
    for moved in (0, 2 * world * length) if plan.ring_degree > 1 else (0,):
        batch = plan.packed(replace(packing, moved=(Moved(0, moved, moved), Moved(5, moved, moved))).encode())
        for dtype, window in ((torch.float64, 0), (torch.bfloat16, 5)):
            shapes = ((HEADS, KEY_DIM), (KV_HEADS, KEY_DIM), (KV_HEADS, VALUE_DIM))
            q, k, v = (torch.randn(2, h, length // world, d, dtype=dtype, requires_grad=True) for h, d in shapes)
            asked = (plan.method != "all_gather" or window > 0) and plan.ring_degree > 1
            assert batch.exchanges(window, dtype) == (asked and not moved)
            with batch:
                with recorded_messages() as there:
                    out = plan.attention(q, k, v, is_causal=True, window_size=window or None)
                with recorded_messages() as back:
                    out.sum().backward()
            expected = attention_traffic(
                call(dtype),
                packing.mask(window),
                packing.layout,
                ring_rank=plan.ring_rank,
                gathers=plan.method == "all_gather",
                exchanges=batch.exchanges(window, dtype),
                ulysses_degree=plan.ulysses_degree,
            )
            if (Counter(there), Counter(back)) != expected or not (there or back):
                found.append(f"{moved} moved, window {window}: sent {there}, {back}; formulas {expected}")
    return found


@pytest.mark.parametrize(
    ("world", "name"),
    [
        (world, name)
        for world in (2, 3, 4)
        for name in PACKED_PLANS[world]
        if "overlap" not in name and (world, name) != (3, "ulysses")
    ],
)
def test_traffic_of_packed_documents_is_what_is_sent(pool, world, name):
    for found in pool.run(world, mismatches_of_packs, PACKED_PLANS[world][name]):
        assert not found, found


def test_traffic_of_documents_is_the_keys_that_readers_see_whatever_the_rows():
    # One document begins 5 tokens before the edge between two ranks; rows are joined, so the batch counts once.
    token = KV_HEADS * (KEY_DIM + VALUE_DIM) * 8
    layout = make_layout("contiguous", 2, 48)
    documents = Documents((0, 10, 19, 27, 48), padding=(3,))
    for window, keys in ((0, 5), (3, 2)):
        first, second = (
            attention_traffic(
                call(torch.float64), Mask(True, window, documents), layout, ring_rank=rank, exchanges=True
            )
            for rank in range(2)
        )
        assert [num_bytes(sent) for sent in (*first, *second)] == [keys * token, keys * token, 0, keys * token]


def bytes_of(dtype: torch.dtype, mask: Mask, layout_name: str, ring: int, **options) -> tuple[int, int]:
    layout = make_layout(layout_name, ring, 48 * ring)
    forward, backward = attention_traffic(call(dtype), mask, layout, ring_rank=0, **options)
    return num_bytes(forward), num_bytes(backward)


@pytest.mark.parametrize("ring", [2, 3, 8])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_traffic_of_a_ring_is_keys_there_and_keys_and_gradients_back(ring, dtype):
    m = 2 * KV_HEADS * 48 * (KEY_DIM + VALUE_DIM) * dtype.itemsize
    wide = 2 if dtype == torch.bfloat16 else 1
    expected = (ring - 1) * m, (ring - 2) * m + (ring - 1) * wide * m
    assert bytes_of(dtype, CAUSAL, "zigzag", ring) == expected


def test_traffic_of_all_gather_goes_once_more_back_and_is_reduced_in_fp32():
    m = 2 * KV_HEADS * 48 * (KEY_DIM + VALUE_DIM) * 2
    assert bytes_of(torch.bfloat16, FULL, "contiguous", 4, gathers=True) == (3 * m, 3 * m + 3 * 2 * m)


def test_traffic_of_ulysses_is_the_same_both_ways_and_repeats_kv_heads_up_to_the_degree():
    tokens = 48 // 4
    there, back = bytes_of(torch.bfloat16, CAUSAL, "zigzag", 1, ulysses_degree=4)
    assert there == back == 2 * tokens * (HEADS + 4) * (KEY_DIM + VALUE_DIM) * 2 * 3 // 4


def test_traffic_of_a_window_is_the_keys_it_reaches():
    # A contiguous rank reads the 6 last keys of the one before it, and gives their gradients back.
    token = 2 * KV_HEADS * (KEY_DIM + VALUE_DIM) * 8
    layout = make_layout("contiguous", 4, 48)
    sent = [attention_traffic(call(torch.float64), Mask(True, 7), layout, ring_rank=rank) for rank in range(4)]
    assert [num_bytes(there) for there, _ in sent] == [6 * token, 6 * token, 6 * token, 0]
    assert [num_bytes(back) for _, back in sent] == [6 * token, 12 * token, 12 * token, 6 * token]


def record_of_nothing(rank: int, world: int) -> tuple[list[Message], int, list[Message]]:
    """Messages of a block that sends nothing, of one that does, and what the first list holds after the second."""
    plan = make_plan(ring=world)
    q = torch.randn(1, 2, 4, 4)
    with recorded_messages() as nothing:
        pass
    with recorded_messages() as something:
        plan.attention(q, q, q, is_causal=True)
    plan.attention(q, q, q, is_causal=True)
    return nothing, len(something), nothing


def test_traffic_is_recorded_inside_the_block_only(pool):
    assert pool.run(2, record_of_nothing)[0] == ([], 1, [])


def test_traffic_recording_keeps_backward_in_the_thread_that_records():
    # On CUDA backward otherwise runs in threads of the engine, whose messages would be missed.
    with recorded_messages():
        assert not torch.autograd.is_multithreading_enabled()
    assert torch.autograd.is_multithreading_enabled()
