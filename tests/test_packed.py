"""Packed documents: attention inside each equals one process with a dense mask, whatever the method and the pack."""

from __future__ import annotations

import itertools
import random
from contextlib import ExitStack
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from small import loss_sum, small_batch, small_model
from test_attention import HEADS, gathered, problem
from tolerance import assert_matches
from torch.distributed.device_mesh import init_device_mesh

from cptrain.context_parallel import ContextParallel, carrier, hops, memory_order, parts
from cptrain.context_parallel.packed_batch import PackedBatch
from cptrain.context_parallel.packing import Moved, Packer, find_documents
from cptrain.distributed.transport import recorded_messages
from cptrain.parallel.activation_checkpoint import apply_activation_checkpoint
from cptrain.parallel.apply import compile_blocks

CHUNK = 6  # tokens
PLANS: dict[int, dict[str, dict[str, Any]]] = {
    1: {"alone": {}, "alone, blocks in few calls": {"kernel": "reference"}},
    2: {
        "ring": {"ring": 2},
        "ulysses": {"ulysses": 2},
        "all-gather": {"ring": 2, "method": "all_gather"},
        "ring without overlap": {"ring": 2, "overlap": False},
        "ring, blocks in few calls": {"ring": 2, "kernel": "reference"},
    },
    3: {
        "ring": {"ring": 3},
        "ulysses": {"ulysses": 3},
        "all-gather": {"ring": 3, "method": "all_gather"},
        "double ring of 3": {"ring": 3, "ring_inner_degree": 3},
    },
    4: {
        "ring": {"ring": 4},
        "ulysses": {"ulysses": 4},
        "hybrid": {"ring": 2, "ulysses": 2},
        "hybrid, ulysses outside": {"ring": 2, "ulysses": 2, "outside": "ulysses"},
        "double ring 2 x 2": {"ring": 4, "ring_inner_degree": 2},
        "all-gather": {"ring": 4, "method": "all_gather"},
        "ring, blocks in few calls": {"ring": 4, "kernel": "reference"},
        "all-gather, blocks in few calls": {"ring": 4, "method": "all_gather", "kernel": "reference"},
    },
    8: {
        "ring": {"ring": 8},
        "ulysses": {"ulysses": 8},
        "hybrid": {"ring": 2, "ulysses": 4},
        "hybrid with double ring": {"ring": 4, "ulysses": 2, "ring_inner_degree": 2},
        "all-gather": {"ring": 8, "method": "all_gather"},
    },
}


def lengths_of(name: str, length: int) -> list[int]:
    """Lengths of the documents of one row; a negative one is padding."""
    if name == "one document":
        return [length]
    if name == "tokens":
        return [1] * length
    if name == "on chunk edges":
        return [CHUNK] * (length // CHUNK)
    if name == "off chunk edges":
        return [CHUNK + 1] * ((length - 2) // (CHUNK + 1)) + [length - (length - 2) // (CHUNK + 1) * (CHUNK + 1)]
    if name == "long and short":
        return [length - 10, 1, 4, 3, 2]
    if name == "one and padding":
        return [length // 2 + 1, -(length - length // 2 - 1)]
    if name == "padding tail":
        return [length // 2 - 3, length // 4, -(length - length // 2 + 3 - length // 4)]
    generator, lengths = random.Random(name), []
    while sum(lengths) < length:
        lengths.append(min(length - sum(lengths), 1 + int(generator.expovariate(1 / generator.choice((2, 9, 40))))))
    return lengths


PACKS = ("one document", "tokens", "on chunk edges", "off chunk edges", "long and short", "padding tail", "a", "b", "c")


def ids_of(names: tuple[str, ...], length: int) -> torch.Tensor:
    """Ids [B, S] of the documents of the rows."""
    rows = []
    for name in names:
        lengths = lengths_of(name, length)
        ids = torch.tensor([-1 if n < 0 else number for number, n in enumerate(lengths)])
        rows.append(ids.repeat_interleave(torch.tensor([abs(n) for n in lengths])))
    return torch.stack(rows)


def seen(ids: torch.Tensor, window_size: int | None = None) -> torch.Tensor:
    """The dense mask [B, 1, S, S] that ids and window stand for."""
    length = ids.size(1)
    distance = torch.arange(length)[:, None] - torch.arange(length)
    mask = (distance >= 0) & (distance < (window_size or length))
    return (mask & (ids[:, :, None] == ids[:, None, :]) & (ids >= 0)[:, :, None])[:, None]


def single_process(q, k, v, dout, ids: torch.Tensor, window_size: int | None):
    """Output and gradients with a dense mask; tokens that see nothing give nothing."""
    q, k, v = (x.detach().clone().requires_grad_() for x in (q, k, v))
    keys, values = (x.repeat_interleave(q.size(1) // x.size(1), dim=1) for x in (k, v))
    mask, real = seen(ids, window_size).to(q.device), (ids >= 0)[:, None, :, None].to(q.device)
    scores = (q @ keys.mT / q.size(-1) ** 0.5).masked_fill(~mask, -torch.inf)
    out = torch.where(mask.any(-1, keepdim=True), scores, 0.0).softmax(-1) @ values
    out = out * real
    return out.detach(), *torch.autograd.grad(out, (q, k, v), dout)


def make_plan(
    *, ring: int = 1, ulysses: int = 1, outside: str = "ring", device: str = "cpu", **options: Any
) -> ContextParallel:
    axes = {"ring": ring, "ulysses": ulysses}
    names = ("ring", "ulysses") if outside == "ring" else ("ulysses", "ring")
    mesh = init_device_mesh(device, tuple(axes[name] for name in names), mesh_dim_names=names)
    return ContextParallel(mesh, layout="balanced", **{"chunk_size": CHUNK, **options})


def shards(cp: ContextParallel, batch: PackedBatch, q, k, v, dout, window_size: int | None) -> tuple[torch.Tensor, ...]:
    """The same through a plan: what this rank has of it."""
    q, k, v = (x.requires_grad_() for x in batch.shard(q, k, v, dim=2))
    with batch:
        out = cp.attention(q, k, v, is_causal=True, window_size=window_size)
        return out, *torch.autograd.grad(out, (q, k, v), batch.shard(dout, dim=2))


def sharded(cp: ContextParallel, q, k, v, dout, ids: torch.Tensor, window_size: int | None):
    """The same through a plan, gathered to global order."""
    batch = cp.pack(ids)
    return gathered(batch, *shards(cp, batch, q, k, v, dout, window_size))


def check_every_pack(rank: int, world: int, options: dict[str, Any], device: str = "cpu") -> None:
    plan, length = make_plan(device=device, **options), 2 * CHUNK * 2 * world
    rows = [(name, PACKS[number - 1]) for number, name in enumerate(PACKS)]
    rows = rows[:: 2 if world > 3 else 1]  # all packs: each row has another one beside it
    every_heads = HEADS if options.get("ulysses") != 3 else {"mha": (6, 6), "gqa": (6, 3), "mqa": (6, 1)}
    for (number, names), (kind, (heads, kv_heads)) in itertools.product(
        enumerate(rows), enumerate(every_heads.values())
    ):
        window_size = 5 if (number + kind) % 2 else None
        inputs, ids = problem(heads, kv_heads, length=length, device=device), ids_of(names, length)
        expected = single_process(*inputs, ids, window_size)
        batch = plan.pack(ids)
        actual = shards(plan, batch, *inputs, window_size)
        for name, a, e in zip(("out", "dq", "dk", "dv"), actual, expected, strict=True):
            # A pack of single tokens alone has no gradient at queries; its row here is one of two.
            try:
                assert_matches(a, batch.shard(e, dim=2), whole=e)
            except AssertionError as error:
                raise AssertionError(
                    f"{name}, {names}, {heads}/{kv_heads} heads, window {window_size}: {error}"
                ) from None


@pytest.mark.parametrize(("world", "name"), [(world, name) for world, plans in PLANS.items() for name in plans])
def test_packed_attention_equals_one_process_in_fp64(pool, world, name):
    pool.run(world, check_every_pack, PLANS[world][name])


def check_hops_together(rank: int, world: int, options: dict[str, Any], by_head: bool) -> None:
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(hops, "COPIES_ARE_DEAR", frozenset()))
        for module in (memory_order, carrier, parts):
            stack.enter_context(mock.patch.object(module, "by_head", return_value=by_head))
        check_every_pack(rank, world, options)


@pytest.mark.parametrize(
    ("world", "name", "by_head"),
    [
        (2, "ring", True),
        (3, "ring", False),
        (4, "ring, blocks in few calls", False),  # as on CUDA
        (4, "ring, blocks in few calls", True),
        (8, "ring", True),
    ],
)
def test_packed_attention_is_the_same_where_hops_are_computed_together(pool, world, name, by_head):
    pool.run(world, check_hops_together, PLANS[world][name], by_head)


def check_single_rows(rank: int, world: int, options: dict[str, Any]) -> None:
    plan, length = make_plan(**options), 4 * CHUNK * world
    for name in ("one and padding", "padding tail", "long and short", "a"):
        for window_size in (None, 5, 1000):
            inputs, ids = tuple(x[:1] for x in problem(8, 2, length=length)), ids_of((name,), length)
            expected = single_process(*inputs, ids, window_size)
            for a, e in zip(sharded(plan, *inputs, ids, window_size), expected, strict=True):
                assert_matches(a, e)


@pytest.mark.parametrize(
    ("world", "name"),
    [(1, "alone"), (1, "alone, blocks in few calls"), (2, "ring"), (2, "ulysses"), (2, "all-gather"), (4, "hybrid")],
)
def test_packed_row_by_itself_equals_one_process_in_fp64(pool, world, name):
    pool.run(world, check_single_rows, PLANS[world][name])


def check_hops_that_ranks_leave_out(rank: int, world: int, overlap: bool) -> None:
    """Documents of which ranks leave out different hops, and would wait for each other if orders differed."""
    plan, lengths = make_plan(ring=4, chunk_size=8, overlap=overlap), torch.tensor([34, 5, 14, 17, 18, 3, 12, 9, 5, 11])
    ids = torch.arange(len(lengths)).repeat_interleave(lengths)[None]
    inputs = tuple(x[:1] for x in problem(8, 2, length=ids.size(1)))
    expected = single_process(*inputs, ids, None)
    for a, e in zip(sharded(plan, *inputs, ids, None), expected, strict=True):
        assert_matches(a, e)


@pytest.mark.parametrize("overlap", [True, False])
def test_packed_ranks_that_leave_out_different_hops_do_not_wait_for_each_other(pool, overlap):
    pool.run(4, check_hops_that_ranks_leave_out, overlap)


def graphs_of_many_kinds(rank: int, world: int) -> int:
    """Compiled blocks meet both routes, windows, packings of several sizes, and passes without gradients."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    cp, length = make_plan(ring=2, chunk_size=64), 1024
    model, eager = small_model(num_layers=3), small_model(num_layers=3)
    for each, (layer, window_size) in itertools.product((model, eager), enumerate((None, 9, 100))):
        cp.apply(each, modules=f"layers.{layer}.attention", window_size=window_size)
    compile_blocks(model, backend="aot_eager")
    for size in (length, 1, length // 2, 2, length):
        lengths = torch.full((length // size,), size)
        ids = torch.arange(len(lengths)).repeat_interleave(lengths).expand(2, -1)
        batch = cp.pack(ids)
        tensors = batch.shard(*small_batch(length))
        with batch:
            loss = loss_sum(model, *tensors)
            loss.backward()
            with torch.no_grad():
                assert_matches(loss_sum(model, *tensors), loss_sum(eager, *tensors))
    return counters["stats"]["unique_graphs"]


def test_packed_blocks_compile_for_every_kind_of_batch(pool):
    assert pool.run(2, graphs_of_many_kinds)[0] > 8


def different_documents(rank: int, world: int) -> None:
    cp, length = make_plan(ring=2), 4 * CHUNK * world
    ids = torch.zeros(1, length, dtype=torch.int64)
    ids[0, length - 1 - rank :] = 1
    with pytest.raises(RuntimeError, match="have packed different documents"):
        cp.pack(ids).__enter__()
    with cp.pack(torch.zeros(1, length, dtype=torch.int64)):
        pass


def dtensor_cut_again(rank: int, world: int) -> None:
    cp, tokens = make_plan(ring=2), torch.zeros(1, 4 * CHUNK * world, dtype=torch.int64)
    batch = cp.pack(tokens)
    with pytest.raises(ValueError, match=r"shard takes whole, plain tensors: hand over x.full_tensor\(\) of a DTensor"):
        batch.shard(batch.shard(tokens, as_dtensor=True))


def test_packed_batch_refuses_to_cut_a_dtensor(pool):
    pool.run(2, dtensor_cut_again)


def test_packed_ranks_with_different_documents_are_told_so(pool):
    pool.run(2, different_documents)


def routes_of_packs(rank: int, world: int, options: dict[str, Any]) -> dict[str, str]:
    plan, routes = make_plan(**options), {}
    for name in ("one document", "on chunk edges", "a"):
        with plan.pack(ids_of((name,), 2 * CHUNK * 2 * world)):
            routes[name] = plan._entered.route(0, torch.bfloat16).partition(";")[0]
    return routes


def routes_of_windows(rank: int, world: int, method: str) -> list[str]:
    """How keys travel for layers without a window and with one, in half precision and in full, and what then moves."""
    plan, length = make_plan(ring=2, method=method), 2 * CHUNK * 2 * world
    model = small_model(num_layers=2)
    plan.apply(model, modules="layers.0.attention")
    plan.apply(model, modules="layers.1.attention", window_size=4)
    assert plan.packer().windows == (0, 4)
    batch = plan.pack(ids_of(("one document",), length))
    found = []
    with batch:
        for window in (0, 4, 3, 5):
            route = plan._entered.route(window, torch.bfloat16).partition(";")[0]
            assert batch.exchanges(window, torch.bfloat16) == (route == "exchange")
            found.append(f"{window} {route} {batch.num_moved(window, torch.bfloat16) < batch.packing.ring_keys}")
    return found


@pytest.mark.parametrize(("method", "carried"), [("auto", "ring"), ("all_gather", "all_gather")])
def test_packed_layers_with_windows_send_what_their_windows_reach(pool, method, carried):
    # A window that nobody counted goes the way of the next wider one.
    expected = [f"0 {carried} False", "4 exchange True", "3 exchange True", f"5 {carried} False"]
    assert pool.run(2, routes_of_windows, method)[0] == expected


def test_packed_full_precision_counts_gradients_as_wide_as_keys(pool):
    assert pool.run(2, routes_by_width)[0] == (True, False)


def routes_by_width(rank: int, world: int) -> tuple[bool, bool]:
    plan = make_plan(ring=2)
    packing = plan.pack(ids_of(("one document",), 96)).packing
    # In half precision a ring sends 1 + 2 widths of all 96 keys, an exchange 2 + 2 of these; in full 1 + 1 and 2 + 1.
    batch = plan.packed(replace(packing, moved=(Moved(0, 68, 68),)).encode())
    return batch.exchanges(0, torch.bfloat16), batch.exchanges(0, torch.float32)


def test_packed_keys_go_round_the_ring_or_straight_to_readers_by_what_is_cheaper(pool):
    assert pool.run(2, routes_of_packs, PLANS[2]["ring"])[0] == {
        "one document": "ring",
        "on chunk edges": "exchange",
        "a": "exchange",
    }


def packed_model(
    rank: int, world: int, options: dict[str, Any], mode: str, compiled: bool
) -> tuple[list[int], int, int]:
    """Messages of forward and backward of two batches through a model, whose loss and gradients are checked, too."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    cp, length = make_plan(**options), 4 * CHUNK * world
    model, whole = small_model(num_layers=2), small_model(num_layers=2)
    cp.apply(model, modules="layers.*.attention")
    alone = ContextParallel(cp.mesh, ring=None, ulysses=None, layout="balanced")
    alone.apply(whole, modules="layers.*.attention")
    apply_activation_checkpoint(model, mode)  # type: ignore[arg-type]
    if compiled:
        compile_blocks(model, backend="aot_eager")
    counts = []
    for step, names in enumerate((("off chunk edges", "a"), ("b", "c"), ("padding tail", "long and short"))):
        ids = ids_of(names, length)
        batch, reference = cp.pack(ids), alone.pack(ids)
        tokens, labels, positions = small_batch(length)
        for module in (model, whole):
            module.zero_grad()
        recompiles = torch._dynamo.config.patch(error_on_recompile=compiled and step > 0)
        with batch, recompiles:
            with recorded_messages() as forward:
                loss = loss_sum(model, *batch.shard(tokens, labels, positions))
            with recorded_messages() as backward:
                loss.backward()
        with reference:
            expected = loss_sum(whole, *reference.shard(tokens, labels, positions))
            expected.backward()
        total = loss.detach().clone()
        dist.all_reduce(total)
        assert_matches(total, expected.detach())
        for ours, theirs in zip(model.parameters(), whole.parameters(), strict=True):
            dist.all_reduce(ours.grad)
            assert_matches(ours.grad, theirs.grad)
        counts.append((len(forward), len(backward)))
    return counts, counters["stats"]["unique_graphs"]


WAYS = [("selective", False), ("full", False), ("selective", True), ("full", True)]
WAYS_OF_METHODS = [
    *(("ring", *way) for way in WAYS),
    ("ulysses", *WAYS[2]),
    ("ulysses", *WAYS[1]),
    ("all-gather", *WAYS[3]),
]


@pytest.mark.parametrize(("name", "mode", "compiled"), WAYS_OF_METHODS, ids=lambda value: str(value))
def test_packed_model_equals_one_rank_and_repeats_no_message_unless_all_is_recomputed(pool, name, mode, compiled):
    plain, _ = pool.run(2, packed_model, PLANS[2][name], "none", False)[0]
    counts, graphs = pool.run(2, packed_model, PLANS[2][name], mode, compiled)[0]
    again = mode == "full"
    assert counts == [(there, back + again * there) for there, back in plain]
    assert sum(there for there, _ in plain) > 0
    assert graphs == (1 if compiled else 0)


def refusals(rank: int, world: int) -> None:
    cp, zigzag = make_plan(ring=2), ContextParallel(make_plan(ring=2).mesh)
    length = 4 * CHUNK * world
    ids = ids_of(("a", "b"), length)
    batch = cp.pack(ids)
    q, k, v = (x.clone() for x in batch.shard(*problem(4, 2, length=length)[:3], dim=2))

    def refused(error: type[Exception], message: str, call: Any) -> None:
        with pytest.raises(error, match=message):
            call()

    refused(RuntimeError, "outside of a batch", lambda: cp.attention(q, k, v, is_causal=True))
    refused(ValueError, "shard of a plan .* use pack", lambda: cp.shard(ids))
    refused(ValueError, "ring_layout of a plan", lambda: cp.ring_layout(length))
    refused(ValueError, "unshard of a plan .* use pack", lambda: cp.unshard(q, dim=2))
    refused(ValueError, 'layout = "zigzag": packed documents need', lambda: zigzag.pack(ids))
    refused(ValueError, "give either document_ids or offsets", cp.pack)
    refused(ValueError, "a sequence of 47 tokens does not divide", lambda: cp.pack(ids[:, :47]))
    refused(ValueError, "this batch has 2 rows along dim 0 and 48 tokens", lambda: batch.shard(ids[:, :46]))
    refused(ValueError, "packed for a ring of 1", lambda: cp.packed(Packer(1)(find_documents(ids), 2).encode()))
    refused(ValueError, "chunk_size = 7: must divide the 24 tokens", lambda: make_plan(ring=2, chunk_size=7).pack(ids))
    refused(ValueError, "chunk_size = 0: must be a number", lambda: make_plan(ring=2, chunk_size=0))
    with batch:
        refused(NotImplementedError, "is_causal=False inside", lambda: cp.attention(q, k, v, is_causal=False))
        refused(
            ValueError, "is not the batch that was entered", lambda: cp.attention(q[:1], k[:1], v[:1], is_causal=True)
        )
        refused(RuntimeError, "another batch is entered", cp.pack(ids).__enter__)
        cp.attention(q, k, v, is_causal=True)
    refused(RuntimeError, "outside of a batch", lambda: cp.attention(q, k, v, is_causal=True))
    from_offsets = cp.pack(offsets=[[0, 20, length], [0, length]])
    assert from_offsets.packing == cp.pack(torch.tensor([[0] * 20 + [1] * (length - 20), [0] * length])).packing


def test_packed_plan_refuses_what_would_not_be_exact(pool):
    pool.run(2, refusals)


def recompute_outside(rank: int, world: int) -> None:
    cp, length = make_plan(ring=world), 4 * CHUNK * world
    model = small_model(num_layers=1)
    cp.apply(model, modules="layers.*.attention")
    apply_activation_checkpoint(model, "full")
    batch = cp.pack(ids_of(("a", "b"), length))
    with batch:
        loss = loss_sum(model, *batch.shard(*small_batch(length)))
    with pytest.raises(RuntimeError, match=r"outside of a batch: forward and backward \(which may recompute\)"):
        loss.backward()


def test_packed_recompute_outside_of_the_batch_is_an_error(pool):
    pool.run(2, recompute_outside)


def recompute_in_another(rank: int, world: int, mode: str) -> None:
    cp, length = make_plan(ring=world), 4 * CHUNK * world
    model = small_model(num_layers=2)
    cp.apply(model, modules="layers.*.attention")
    apply_activation_checkpoint(model, mode)  # type: ignore[arg-type]
    ours, theirs = cp.pack(ids_of(("a", "b"), length)), cp.pack(ids_of(("b", "a"), length))
    with ours:
        loss, again = (loss_sum(model, *ours.shard(*small_batch(length))) for _ in range(2))
    with theirs:
        own = loss_sum(model, *theirs.shard(*small_batch(length)))
        if mode == "none":
            loss.backward()  # recomputes nothing
        else:
            with pytest.raises(RuntimeError, match="recomputes attention inside of another"):
                loss.backward()
    with theirs:
        own.backward()
    with ours:
        again.backward()


@pytest.mark.parametrize("mode", ["none", "selective", "full"])
def test_packed_recompute_inside_of_another_batch_is_an_error(pool, mode):
    pool.run(1, recompute_in_another, mode)


def dtensors(rank: int, world: int) -> None:
    cp, length = make_plan(ring=2, ulysses=2), 4 * CHUNK * world
    q, k, v, dout = problem(8, 4, length=length)
    ids = ids_of(("a", "padding tail"), length)
    expected = single_process(q, k, v, dout, ids, None)
    batch = cp.pack(ids)
    tensors = [x.requires_grad_() for x in batch.shard(q, k, v, dim=2, as_dtensor=True)]
    with batch:
        out = cp.attention(*tensors, is_causal=True)
        grads = torch.autograd.grad(out, tensors, batch.shard(dout, dim=2, as_dtensor=True))
    for a, e in zip((out.detach(), *grads), expected, strict=True):
        assert_matches(batch.unshard(a, dim=2), e)


def test_packed_dtensors_come_back_as_dtensors(pool):
    pool.run(4, dtensors)


def sent_in_bf16(rank: int, world: int) -> tuple[int, int]:
    """Bytes that a rank sends forward and backward, of keys that go straight to their readers."""
    cp, length = make_plan(ring=world), 4 * CHUNK * world
    batch = cp.pack(ids_of(("a", "b"), length))
    q, k, v, dout = batch.shard(*(x.bfloat16() for x in problem(4, 2, length=length)), dim=2)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    with batch:
        assert cp._entered.route(0, torch.bfloat16) == cp._exchange_route
        with recorded_messages() as forward:
            out = cp.attention(*leaves, is_causal=True)
        with recorded_messages() as backward:
            torch.autograd.grad(out, leaves, dout)
    return sum(m.num_bytes for m in forward), sum(m.num_bytes for m in backward)


def test_packed_gradients_travel_home_in_fp32(pool):
    forward, backward = (sum(numbers) for numbers in zip(*pool.run(3, sent_in_bf16), strict=True))
    # Keys in bf16 once more, and the gradients of each of them.
    assert forward > 0 and backward == forward + 2 * forward
