"""Checks of a plan: what they compare with, the documents they pack, and that they find what is wrong with them."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import planted
import pytest
import torch
import torch.nn.functional as F
from test_packed import PLANS, make_plan
from tolerance import assert_matches

from cptrain.context_parallel.finding import Finding, table
from cptrain.context_parallel.mask import CAUSAL, Documents, Mask
from cptrain.context_parallel.packing import pack
from cptrain.context_parallel.selfcheck import (
    Sizes,
    check_attention,
    check_flow,
    check_positions,
    cuts_of,
    dense_attention,
    probes,
    single_device_attention,
    small_chunk_size,
    small_documents,
    visible,
)

CPU = torch.device("cpu")
LENGTH = 48  # divides over every ring below
DOCUMENTS = Documents((0, 1, 9, 12, 16, 20), padding=(2, 4))  # two rows of 12, and of 8 that end in padding


@pytest.mark.parametrize("mask", [CAUSAL, Mask(True, 3), Mask(True, 0, DOCUMENTS), Mask(True, 3, DOCUMENTS)])
def test_selfcheck_sees_what_the_mask_says(mask):
    rows, length = (2, 10) if mask.documents else (1, 10)
    seen = visible(mask, length, CPU)
    pairs = [[[mask.visible(row * length + q, row * length + k) for k in range(length)] for q in range(length)]
             for row in range(rows)]  # fmt: skip
    assert seen.tolist() == pairs


def test_selfcheck_reference_is_attention_of_each_document_and_nothing_at_padding():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, h, 10, 4, generator=generator, dtype=torch.float64) for h in (4, 2, 2))
    documents = Documents((0, 1, 9, 10, 16, 20), padding=(2, 4))
    results = []
    for attention in (dense_attention, single_device_attention):
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        out = attention(*inputs, Mask(True, 0, documents))
        results.append([out.detach(), *torch.autograd.grad(out.square().sum(), inputs)])
    for dense, single in zip(*results, strict=True):
        assert_matches(single, dense)
        assert not dense[0, :, 9:].any() and not dense[1, :, 6:].any()
    for row, start, stop in ((0, 0, 1), (0, 1, 9), (1, 0, 6)):
        alone = (x[row : row + 1, :, start:stop] for x in (q, k, v))
        expected = F.scaled_dot_product_attention(*alone, is_causal=True, enable_gqa=True)
        assert_matches(results[0][0][row : row + 1, :, start:stop], expected)


@pytest.mark.parametrize("ring_degree", [1, 2, 3, 4, 8])
def test_selfcheck_documents_are_of_every_kind(ring_degree):
    documents = small_documents(LENGTH, ring_degree=ring_degree)
    chunk = small_chunk_size(LENGTH, ring_degree)
    first, second = (
        [start - row * LENGTH for start in documents.offsets if row * LENGTH <= start < (row + 1) * LENGTH]
        for row in range(2)
    )
    assert first != second and first[0] == second[0] == 0
    lengths = [stop - start for start, stop in documents.spans()]
    assert max(lengths) > LENGTH // max(2, ring_degree) and lengths.count(1) > 1
    if chunk > 1:
        assert {start % chunk == 0 for start in first[1:]} == {True, False}
    assert documents.padding == (len(documents.offsets) - 2,), "one row ends in padding"


@pytest.mark.parametrize("ring_degree", [2, 4])
def test_selfcheck_probes_reach_all_that_a_rank_sees_and_tell_documents_apart(ring_degree):
    documents = small_documents(LENGTH, ring_degree=ring_degree)
    chunk = small_chunk_size(LENGTH, ring_degree)
    layout = pack(documents, num_ranks=ring_degree, num_rows=2, chunk_size=chunk).layout
    sets = list(probes(layout, CPU, documents=documents, rows=2))
    seen = visible(Mask(True, 0, documents), LENGTH, CPU)
    held = torch.zeros(ring_degree, 2 * LENGTH, dtype=torch.bool)
    for rank, own in enumerate(held):
        for span in layout.spans(rank):
            own[span.start : span.start + span.length] = True
    reaches = {tuple((chosen[:, :, None] & seen).any(1).flatten().tolist()) for chosen in sets[:ring_degree]}
    assert reaches == {tuple((own.view(2, -1)[:, :, None] & seen).any(1).flatten().tolist()) for own in held}
    alternating = sets[-1].flatten()
    of_documents = [set(alternating[start:stop].tolist()) for start, stop in documents.spans()]
    assert all(len(values) == 1 for values in of_documents)
    assert all(a != b for a, b in pairwise(of_documents))


def check_plan(
    rank: int, world: int, options: dict[str, Any], dtype: torch.dtype, fault: str = "nothing"
) -> list[tuple[str, list[Finding]]]:
    """Findings of every way in which the plan carries keys, under causal masks and with a window."""
    plan = make_plan(**options)
    sizes = Sizes(length=LENGTH, heads=8, kv_heads=2, head_dim=8, dtype=dtype)
    outcomes = []
    with getattr(planted, fault)():
        for mask in (CAUSAL, Mask(True, 5)):
            for cut in cuts_of(plan, mask, sizes.length):
                found = [*check_attention(cut, sizes), check_positions(cut), *check_flow(cut, sizes)]
                outcomes.append((cut.name, found))
    return outcomes


@pytest.mark.parametrize(
    ("world", "name"),
    [
        (1, "alone"),
        (2, "ring"),
        (2, "ulysses"),
        (2, "all-gather"),
        (3, "ring"),
        (4, "hybrid, ulysses outside"),
        (4, "double ring 2 x 2"),
    ],
)
def test_selfcheck_passes_on_packed_documents(pool, world, name):
    # Chunks of the plan itself are those of real sequences.
    for outcomes in pool.run(world, check_plan, PLANS[world][name] | {"chunk_size": 4096}, torch.float64):
        for _, findings in outcomes:
            assert all(finding.passed for finding in findings), table(findings)


def test_selfcheck_goes_both_ways_that_keys_of_documents_may_go(pool):
    names = [name for name, _ in pool.run(2, check_plan, PLANS[2]["ring"], torch.float64)[0]]
    count = len(list(small_documents(LENGTH, ring_degree=2).spans()))
    assert names == [f"{mask} in {count} documents by {way}" for mask in ("causal", "window 5")
                     for way in ("ring", "exchange")]  # fmt: skip


def test_selfcheck_of_packed_documents_in_bf16_measures_by_the_rounding_of_one_device(pool):
    for _, findings in pool.run(2, check_plan, PLANS[2]["ring"], torch.bfloat16)[0]:
        assert all(finding.passed for finding in findings), table(findings)
        assert all(1e-4 < finding.error < finding.allowed < 0.1 for finding in findings[:4]), table(findings)


@pytest.mark.parametrize(("world", "name"), [(1, "alone"), (2, "ring"), (2, "ulysses"), (2, "all-gather")])
def test_selfcheck_finds_a_document_mask_that_is_off(pool, world, name):
    for outcomes in pool.run(world, check_plan, PLANS[world][name], torch.float64, "no_document_mask"):
        for cut, findings in outcomes:
            failed = {finding.name for finding in findings if not finding.passed}
            expected = {f"attention, {cut}: {part}" for part in ("out", "dq", "dk", "dv")} | {f"flow, {cut}: leaks"}
            assert failed == expected, table(findings)


def test_selfcheck_finds_a_hop_that_the_ring_drops_and_nothing_wrong_with_the_exchange(pool):
    outcomes = dict(pool.run(2, check_plan, PLANS[2]["ring"], torch.float64, "dropped_hop")[0])
    for cut, findings in outcomes.items():
        failed = {finding.name.rpartition(": ")[2] for finding in findings if not finding.passed}
        assert failed <= {"out", "dq", "dk", "dv", "tokens not reached"} and bool(failed) == ("ring" in cut), cut
