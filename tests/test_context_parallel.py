"""The plan that users hold: how it cuts and joins sequences, whose gradients meet, and what it does with DTensors."""

from __future__ import annotations

import gc
import re
from collections import Counter
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from small import small_model
from tolerance import assert_matches
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from cptrain.context_parallel import ContextParallel, description, groups, hops
from cptrain.context_parallel import ring as ring_carrier
from cptrain.context_parallel.layout import zigzag
from cptrain.context_parallel.traffic import Call
from cptrain.context_parallel.ulysses import replicate_kv_heads
from cptrain.distributed.transport import recorded_messages


def plan(ring: int = 1, ulysses: int = 1, **options: Any) -> ContextParallel:
    mesh = init_device_mesh("cpu", (ring, ulysses), mesh_dim_names=("ring", "ulysses"))
    return ContextParallel(mesh, **options)


def qkv(heads: int, kv_heads: int, length: int, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple:
    """q, k, v and the output's gradient, the same on every rank."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(2, count, length, 4) for count in (heads, kv_heads, kv_heads, heads)]
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes)


def one_process(q, k, v, dout, *, causal: bool = True) -> tuple[torch.Tensor, ...]:
    """Output and gradients of plain attention over the whole sequence."""
    q, k, v = (x.clone().requires_grad_() for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
    return out.detach(), *torch.autograd.grad(out, (q, k, v), dout)


def degrees_and_messages(rank: int, world: int) -> dict[str, tuple[int, int, int, str, int]]:
    """(ring, ulysses, degree, method, messages of one attention forward) of plans with unused axes."""
    flat = init_device_mesh("cpu", (2,), mesh_dim_names=("cp",))
    plans = {
        "ring alone": ContextParallel(flat, ring="cp", ulysses=None),
        "ulysses alone": ContextParallel(flat, ring=None, ulysses="cp"),
        "neither": ContextParallel(flat, ring=None, ulysses=None),
        "ring of one": plan(1, 2),
        "ulysses of one": plan(2, 1),
    }
    inputs, found = qkv(4, 2, 8), {}
    for name, cp in plans.items():
        with recorded_messages() as messages:
            out = cp.attention(*(cp.shard(x, dim=2) for x in inputs[:3]), is_causal=True)
        assert_matches(cp.unshard(out, dim=2), one_process(*inputs)[0])
        found[name] = (cp.ring_degree, cp.ulysses_degree, cp.degree, cp.method, len(messages))
    return found


def test_context_parallel_leaves_axes_of_none_and_of_one_rank_unused(pool):
    for found in pool.run(2, degrees_and_messages):
        assert found == {
            "ring alone": (2, 1, 2, "ring", 1),
            "ulysses alone": (1, 2, 2, "ulysses", 2),
            "neither": (1, 1, 1, "auto", 0),
            "ring of one": (1, 2, 2, "ulysses", 2),
            "ulysses of one": (2, 1, 2, "ring", 1),
        }


def check_round_trips(rank: int, world: int) -> None:
    for options in ({}, {"layout": "contiguous"}):
        cp = plan(2, 2, **options)
        tokens = torch.arange(2 * 16).view(2, 16)
        states = torch.randn(3, 2, 16, 5, generator=torch.Generator().manual_seed(0))
        for x, dim in ((tokens, 1), (tokens, -1), (states, 2), (states, -2), (tokens[0], 0)):
            part = cp.shard(x, dim=dim)
            assert part.size(dim) == x.size(dim) // world
            assert torch.equal(cp.unshard(part, dim=dim), x)
            placed = cp.shard(x, dim=dim, as_dtensor=True)
            assert torch.equal(placed.to_local(), part)
            assert torch.equal(cp.unshard(placed, dim=dim), x)


def test_context_parallel_unshard_undoes_shard_along_any_dim(pool):
    pool.run(4, check_round_trips)


def check_global_truth(rank: int, world: int) -> None:
    cp = plan(2, 2)
    x = torch.arange(2 * 16).view(2, 16)
    placed = cp.shard(x, dim=1, as_dtensor=True)
    assert isinstance(placed, DTensor)
    assert placed.shape == x.shape
    assert placed.placements == (Shard(1), Shard(1))
    inverse = torch.argsort(cp.ring_layout(16).permutation())
    assert torch.equal(placed.full_tensor()[:, inverse], x)
    alone = ContextParallel(cp.mesh, ring=None, ulysses=None).shard(x, dim=1, as_dtensor=True)
    assert torch.equal(alone.full_tensor(), x)


def test_context_parallel_dtensor_holds_the_permuted_sequence_as_its_whole(pool):
    pool.run(4, check_global_truth)


def shards_of_a_batch(rank: int, world: int) -> tuple[list[int], list[int], list[int]]:
    tokens, labels, positions = plan(2, 2).shard(
        torch.arange(16)[None] * 10, torch.arange(1, 17)[None] * 10, torch.arange(16)[None]
    )
    return tokens[0].tolist(), labels[0].tolist(), positions[0].tolist()


def test_context_parallel_cuts_all_tensors_of_a_batch_by_one_permutation(pool):
    parts = pool.run(4, shards_of_a_batch)
    for tokens, labels, positions in parts:
        assert tokens == [10 * p for p in positions]
        assert labels == [10 * (p + 1) for p in positions]
    # Zigzag over the ring, then each shard in two for ulysses.
    assert [positions for *_, positions in parts] == [[0, 1, 2, 3], [12, 13, 14, 15], [4, 5, 6, 7], [8, 9, 10, 11]]


def check_gradient_of_unshard(rank: int, world: int) -> None:
    cp = plan(2, 2)
    weights = torch.randn(3, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    part = cp.shard(torch.ones(3, 16, dtype=torch.float64)).requires_grad_()
    (cp.unshard(part, dim=1) * weights).sum().backward()
    assert torch.equal(part.grad, cp.shard(weights))


def test_context_parallel_unshard_is_differentiable(pool):
    pool.run(4, check_gradient_of_unshard)


def check_inputs_survive(rank: int, world: int) -> None:
    for options in ({"ring": 4}, {"ring": 4, "ring_inner_degree": 2}, {"ring": 4, "method": "all_gather"}):
        cp = plan(**options)
        for dtype in (torch.float64, torch.float32):
            q, k, v, dout = (cp.shard(x, dim=2) for x in qkv(4, 2, 32, dtype=dtype))
            leaves = [x.clone().requires_grad_() for x in (q, k, v)]
            out = cp.attention(*leaves, is_causal=True)
            first = out.detach().clone()
            torch.autograd.grad(out, leaves, dout, retain_graph=True)
            once = torch.autograd.grad(out, leaves, dout, retain_graph=True)
            again = torch.autograd.grad(out, leaves, dout)
            for kept, original in zip((*leaves, out, *once), (q, k, v, first, *again), strict=True):
                assert torch.equal(kept, original)


def test_context_parallel_attention_leaves_inputs_output_and_what_backward_saved_bitwise_as_they_were(pool):
    pool.run(4, check_inputs_survive)


def check_needle(rank: int, world: int, options: dict[str, Any]) -> None:
    cp = plan(**options)
    length, query = 16, 9
    leaves = [cp.shard(x, dim=2).requires_grad_() for x in qkv(4, 4, length)[:3]]
    out = cp.attention(*leaves, is_causal=True)
    chosen = cp.shard((torch.arange(length) == query).double().view(1, 1, -1, 1), dim=2)
    grads = torch.autograd.grad((out * chosen).sum(), leaves)
    _, dk, dv = (cp.unshard(grad, dim=2).abs().amax((0, 1, 3)) for grad in grads)
    assert (dk[: query + 1] > 0).all(), "every earlier token is heard, the first one too"
    assert (dv[: query + 1] > 0).all()
    assert torch.equal(dk[query + 1 :], torch.zeros(length - query - 1, dtype=torch.float64))
    assert torch.equal(dv[query + 1 :], torch.zeros(length - query - 1, dtype=torch.float64))


@pytest.mark.parametrize(
    "options",
    [{"ring": 4}, {"ring": 4, "layout": "contiguous"}, {"ulysses": 4}, {"ring": 2, "ulysses": 2}],
    ids=["ring", "contiguous ring", "ulysses", "hybrid"],
)
def test_context_parallel_gradients_reach_the_first_token_and_none_comes_from_the_future(pool, options):
    pool.run(4, check_needle, options)


def check_two_models(rank: int, world: int) -> None:
    plans = (plan(4, 1), plan(1, 4), plan(2, 2, layout="contiguous"))
    problems = [qkv(*heads, 32, seed=seed) for seed, heads in enumerate(((8, 8), (4, 2), (8, 1)))]
    leaves = [
        [cp.shard(x, dim=2).requires_grad_() for x in problem[:3]] for cp, problem in zip(plans, problems, strict=True)
    ]
    outs = [cp.attention(*tensors, is_causal=True) for cp, tensors in zip(plans, leaves, strict=True)]
    for cp, tensors, out, problem in zip(plans, leaves, outs, problems, strict=True):
        grads = torch.autograd.grad(out, tensors, cp.shard(problem[3], dim=2))
        for ours, theirs in zip((out.detach(), *grads), one_process(*problem), strict=True):
            assert_matches(cp.unshard(ours, dim=2), theirs)


def test_context_parallel_plans_and_head_counts_do_not_disturb_each_other(pool):
    pool.run(4, check_two_models)


def test_context_parallel_repeats_kv_heads_beside_each_other_and_sums_their_gradients():
    x = torch.arange(2.0).view(1, 2, 1, 1).requires_grad_()
    repeated = replicate_kv_heads(x, 6)
    assert repeated.flatten().tolist() == [0, 0, 0, 1, 1, 1]
    repeated.backward(torch.arange(1.0, 7.0).view(1, 6, 1, 1))
    assert x.grad.flatten().tolist() == [1 + 2 + 3, 4 + 5 + 6]
    assert replicate_kv_heads(x, 2) is x


def on_two_axes(x: torch.Tensor, cp: ContextParallel, mesh, *placements) -> DTensor:
    """The whole x as a DTensor: this rank's tokens by the plan, its heads by the tp axis."""
    part = cp.shard(x, dim=2)
    if placements[1] == Shard(1):
        part = part.chunk(2, 1)[mesh.get_local_rank("tp")]
    return DTensor.from_local(part.contiguous(), mesh, placements, run_check=False)


def check_dtensors(rank: int, world: int) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("ring", "tp"))
    cp = ContextParallel(mesh, ulysses=None)
    inputs = qkv(4, 2, 16)
    expected = one_process(*inputs)
    for placements in ((Shard(2), Shard(1)), (Shard(2), Replicate())):
        leaves = [on_two_axes(x, cp, mesh, *placements).requires_grad_() for x in inputs[:3]]
        out = cp.attention(*leaves, is_causal=True)
        grads = torch.autograd.grad(out, leaves, on_two_axes(inputs[3], cp, mesh, *placements))
        for ours, theirs in zip((out, *grads), expected, strict=True):
            assert ours.placements == placements
            assert ours.shape == theirs.shape
            assert_matches(cp.unshard(ours.detach(), dim=2), theirs)
        plain = cp.attention(*(x.to_local() for x in leaves), is_causal=True)
        assert torch.equal(plain, out.to_local())


def test_context_parallel_dtensors_with_heads_cut_over_tensor_parallel_equal_one_process(pool):
    pool.run(4, check_dtensors)


def unsharded_by_a_plan_of_one(rank: int, world: int) -> bool:
    mesh = init_device_mesh("cpu", (1, 1, 2), mesh_dim_names=("ring", "ulysses", "tp"))
    x = torch.arange(8.0).view(1, 4, 2, 1)
    placed = DTensor.from_local(x.chunk(2, 1)[rank], mesh["tp"], [Shard(1)], run_check=False)
    return torch.equal(ContextParallel(mesh).unshard(placed, dim=2), x)


def test_context_parallel_unshard_of_a_plan_of_one_rank_still_gathers_other_axes(pool):
    assert pool.run(2, unsharded_by_a_plan_of_one) == [True, True]


def groups_made(rank: int, world: int) -> list[int]:
    """How many process groups exist after each of: a plan, two regroupings, the same two again."""
    mesh = init_device_mesh("cpu", (1, 2, 2), mesh_dim_names=("dp_shard", "ring", "ulysses"))
    first = ContextParallel(mesh)
    counts = []
    for ring, ulysses in ((4, 1), (1, 4), (4, 1), (1, 4)):
        regrouped = first.regroup(ring=ring, ulysses=ulysses)
        inputs = qkv(4, 4, 16)
        out = regrouped.attention(*(regrouped.shard(x, dim=2) for x in inputs[:3]), is_causal=True)
        assert_matches(regrouped.unshard(out, dim=2), one_process(*inputs)[0])
        counts.append(len(dist.distributed_c10d._world.pg_map))
    assert first.regroup(ring=2, ulysses=2) is first
    assert regrouped.regroup(ring=2, ulysses=2, method="hybrid") is first
    assert regrouped.regroup(ring=4, ulysses=1, method="ring") is first.regroup(ring=4, ulysses=1)
    return [*counts, len(dist.distributed_c10d._world.pg_map)]


def test_context_parallel_regroup_makes_no_new_groups_when_it_goes_back(pool):
    for counts in pool.run(4, groups_made):
        assert counts[0] < counts[1] == counts[2] == counts[3] == counts[4]


def regrouped_along_two_axes(rank: int, world: int) -> list[tuple[int, ...]]:
    names = ("dp_replicate", "dp_shard", "ring", "ulysses")
    first = ContextParallel(init_device_mesh("cpu", (2, 2, 2, 1), mesh_dim_names=names))
    wide = first.regroup(ring=4, ulysses=1)
    tall = first.regroup(ring=4, ulysses=1, data="dp_replicate")
    assert wide.regroup(ring=2, ulysses=1) is tall.regroup(ring=2, ulysses=1, data="dp_replicate") is first
    plans = (wide, tall, tall.regroup(ring=2, ulysses=1))
    return [tuple(each.mesh.size(each.mesh.mesh_dim_names.index(name)) for name in names) for each in plans]


def test_context_parallel_regroup_tells_the_sizes_of_other_axes_apart(pool):
    assert pool.run(8, regrouped_along_two_axes)[0] == [(2, 1, 4, 1), (1, 2, 4, 1), (1, 4, 2, 1)]


def methods_of_one_ring(rank: int, world: int) -> list[str]:
    first = plan(2)
    plans = [first.regroup(ring=2, ulysses=1, method=method) for method in ("ring", "all_gather", "auto", "all_gather")]
    assert plans[0] is plans[2] is first
    assert plans[1] is plans[3]
    assert plans[1].regroup(ring=2, ulysses=1) is first
    return [each.method for each in plans]


def test_context_parallel_regroup_tells_methods_of_one_ring_apart(pool):
    assert pool.run(2, methods_of_one_ring)[0] == ["ring", "all_gather", "ring", "all_gather"]


def empty_batches(rank: int, world: int) -> list[tuple[int, ...]]:
    found = []
    for cp in (plan(2), plan(1, 2), ContextParallel(plan(2).mesh, method="all_gather")):
        q, k, v = (torch.ones(0, heads, 8, 4, requires_grad=True) for heads in (4, 2, 2))
        out = cp.attention(q, k, v, is_causal=True)
        found += [tuple(x.shape) for x in (out, *torch.autograd.grad(out.sum(), (q, k, v)))]
    return found


def test_context_parallel_batch_of_nothing_is_nothing_under_every_method(pool):
    shapes = [(0, 4, 8, 4), (0, 4, 8, 4), (0, 2, 8, 4), (0, 2, 8, 4)]
    assert pool.run(2, empty_batches) == [shapes * 3] * 2


def described_after_changes(rank: int, world: int) -> list[str]:
    """The last line of a plan of two models, when another plan has taken some of it over, and when one is gone."""
    first, other = plan(2), plan(1, 2)
    models = [small_model(num_layers=2) for _ in range(2)]
    first.apply(models[0], modules="layers.*.attention")
    first.apply(models[1], modules="layers.*.attention", window_size=5)
    found = [first.describe()]
    other.apply(models[0], modules="layers.1.attention")
    found.append(first.describe())
    first.apply(models[1], modules="layers.0.attention")
    del models[0]
    gc.collect()
    return [*found, first.describe(), other.describe()]


def test_plan_describes_the_modules_it_serves_by_now(pool):
    both, less, least, other = (
        [re.sub(r", ring of.*|, needed.*|, all-to-all.*", "", line) for line in text.splitlines()[1:]]
        for text in pool.run(2, described_after_changes)[0]
    )
    names = "layers.0.attention .. layers.1.attention"
    assert both == [f"2 modules, {names}: no window", f"2 modules, {names}: window 5"]
    first = "layers.0.attention"
    assert less == [f"{first}: no window", f"2 modules, {names}: window 5"]
    assert sorted(least) == [f"{first}: no window", f"{first.replace('0', '1')}: window 5"]
    assert other == ["no module applied yet: no window"]


def described(rank: int, world: int) -> dict[str, str]:
    model = small_model(num_layers=4)
    cp = plan(2, 2)
    before = cp.describe()
    cp.apply(model, modules=["layers.0.attention", "layers.1.attention"])
    cp.apply(model, modules=["layers.[23].attention"], window_size=8)
    shapes = {"num_heads": 8, "num_kv_heads": 2, "head_dim": 64, "dtype": torch.bfloat16}
    mesh = init_device_mesh("cpu", (4,), mesh_dim_names=("ring",))
    gathers = ContextParallel(mesh, ulysses=None, method="all_gather")
    return {"before": before, "applied": cp.describe(4096, **shapes), "all_gather": gathers.describe(4096, **shapes)}


def test_plan_describes_its_modules_messages_and_buffers(pool):
    texts = pool.run(4, described)[0]
    assert texts["before"].splitlines()[1].startswith("no module applied yet: no window, all-to-all over 2 ranks and ")
    lines = texts["applied"].splitlines()
    assert lines[0] == "hybrid (ring 2 x ulysses 2, zigzag, 1 hop)"
    assert lines[1].startswith("2 modules, layers.0.attention .. layers.1.attention: no window, all-to-all over 2")
    # a ring rank holds 2048 tokens of 1 kv head (of 2, over Ulysses 2) of 64 + 64 elements of 2 bytes: 512 KiB
    # all-to-all: half of a rank's 1024 tokens of 8 query and 2 + 2 kv heads of 64 elements together, and of the result
    sent = "1 x 768 KiB (all_to_all), 1 x 512 KiB (all_to_all)"
    assert lines[2] == f"  forward sends {sent}, 1 x 512 KiB (send)"
    assert lines[3] == f"  backward sends {sent}, 1 x 1 MiB (send)"
    # 1024 tokens of 8 query heads, of 2 kv heads each for keys and for values
    assert lines[4] == "  exchanged q, k, v and out of 1 MiB, 256 KiB, 256 KiB, 1 MiB"
    assert lines[5] == "  2 key buffers of 512 KiB"
    assert lines[6].startswith("2 modules, layers.2.attention .. layers.3.attention: window 8, ")
    assert "needed keys straight from their owners" in lines[6]
    # zigzag over 2: rank 0 sees 7 keys before its last chunk, of 1 kv head of 64 + 64 elements of 2 bytes
    assert lines[10] == "  holds at most 1.75 KiB of others' keys"
    gathered = texts["all_gather"].splitlines()
    assert gathered[2] == "  forward sends 2 x 768 KiB (all_gather)"
    assert gathered[3] == "  backward sends 2 x 768 KiB (all_gather), 2 x 1.5 MiB (reduce_scatter)"
    # one kv head of 4096 tokens as it came, in order, and the next head; gradients in fp32
    assert gathered[4] == "  3 gathered key buffers of 1 MiB, backward 2 gradient buffers of 2 MiB"


def described_beside_what_is_sent(rank: int, world: int) -> tuple[list[str], list[str]]:
    """What a contiguous plan says of a window, and the same lines of what one such call sends on this rank."""
    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("ring",))
    cp = ContextParallel(mesh, ulysses=None, layout="contiguous")
    cp.apply(small_model(num_layers=1), modules="layers.0.attention", window_size=5)
    said = cp.describe(16 * world, num_heads=2, num_kv_heads=2, head_dim=4, dtype=torch.float32)
    q, k, v = (torch.ones(1, 2, 16, 4, requires_grad=True) for _ in range(3))
    with recorded_messages() as there:
        out = cp.attention(q, k, v, is_causal=True, window_size=5)
    with recorded_messages() as back:
        out.sum().backward()
    found = {"forward": there, "backward": back}
    return said.splitlines()[2:4], [f"  {x} sends {description._messages(Counter(sent))}" for x, sent in found.items()]


def test_plan_describes_what_this_rank_sends_where_ranks_differ(pool):
    (first, _), *_, (last, _) = found = pool.run(3, described_beside_what_is_sent)
    assert all(said == sent for said, sent in found)
    assert first[0] == "  forward sends 1 x 256 B (send)"
    assert last[0] == "  forward sends nothing"


def test_plan_refuses_to_describe_a_call_of_which_something_is_missing(pool):
    for text in pool.run(1, incomplete_descriptions)[0]:
        assert "ValueError" in text


def incomplete_descriptions(rank: int, world: int) -> list[str]:
    found = []
    for shapes in ({"num_heads": 4}, {"head_dim": 8}, {"num_heads": 4, "head_dim": 8}):
        try:
            found.append(plan().describe(64 if len(shapes) == 1 else None, **shapes))
        except ValueError as error:
            found.append(f"ValueError: {error}")
    return found


def test_plan_says_which_hops_are_computed_together_of_heads_as_ulysses_leaves_them():
    plan = SimpleNamespace(
        ring_degree=8,
        ring_inner_degree=1,
        ulysses_degree=8,
        mesh=SimpleNamespace(device_type="cuda"),
        _groups=groups.Groups(link="fast"),
    )
    # 32 query heads share 8 repeated kv heads: four times 16,384 tokens of keys at once
    call = Call(batch=1, heads=32, kv_heads=4, key_dim=128, value_dim=128, itemsize=2)
    text = description._key_buffers(plan, zigzag(8, 8 * 16_384), call, "1 MiB")
    assert text == "11 key buffers of 1 MiB, hops computed together: 1, 4, 3"


def batched(rank: int, world: int, speed: float, tokens_per_message: int) -> list[tuple[str, int]]:
    """Of a ring and a double ring, where copies are cheap: what is said of buffers, and the batches put in order."""
    found = []
    for inner in (1, 2):
        with (
            mock.patch.object(groups, "link_speed", return_value=speed),
            mock.patch.multiple(hops, COPIES_ARE_DEAR=frozenset(), TOKENS_PER_MESSAGE=tokens_per_message),
            mock.patch.object(ring_carrier, "new_tokens", wraps=ring_carrier.new_tokens) as collected,
        ):
            mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("ring",))
            cp = ContextParallel(mesh, ulysses=None, ring_inner_degree=inner)
            assert cp._groups.is_fast == (speed > groups.FAST)
            inputs = qkv(4, 4, 12 * world)
            out = cp.attention(*(cp.shard(x, dim=2) for x in inputs[:3]), is_causal=True)
            assert_matches(cp.unshard(out, dim=2), one_process(*inputs)[0])
            text = cp.describe(12 * world, num_heads=4, num_kv_heads=4, head_dim=64, dtype=torch.float32)
            found.append((text.splitlines()[-1].split(" of ")[0].strip(), collected.call_count // 2))
    return found


def test_plan_computes_hops_together_where_links_of_a_ring_are_fast(pool):
    # batches of 1, 2 and 1 hops: three held and arriving, two in order; a double ring of two has none of several
    assert pool.run(4, batched, 2e11, 3200) == [[("5 key buffers", 1), ("4 key buffers", 0)]] * 4
    # 12 tokens a rank, 4 per message: batches of 1 and 3 hops
    assert pool.run(4, batched, 2e11, 4) == [[("7 key buffers", 1), ("4 key buffers", 0)]] * 4
    assert pool.run(4, batched, 5e10, 4) == [[("2 key buffers", 0), ("4 key buffers", 0)]] * 4
