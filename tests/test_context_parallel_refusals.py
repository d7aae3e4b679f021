"""What a plan refuses, in words that name the argument, the rule and a way out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from small import small_model
from test_context_parallel import on_two_axes, plan, qkv
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from cptrain.context_parallel import ContextParallel


def text_of(call: Callable[[], Any]) -> str:
    """The kind and message of the error that a call ends with."""
    try:
        call()
    except (ValueError, NotImplementedError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def second_derivative(cp: ContextParallel, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    q = q.clone().requires_grad_()
    (first,) = torch.autograd.grad(cp.attention(q, k, v, is_causal=True).sum(), q, create_graph=True)
    first.sum().backward()


def refusals(rank: int, world: int) -> dict[str, str]:
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("ring", "ulysses"))
    bare = init_device_mesh("cpu", (2,))
    cp = ContextParallel(mesh)
    q, k, v, _ = qkv(4, 2, 8)
    cut = small_model(num_layers=1)

    def attend(*tensors: torch.Tensor, causal: bool = True, **options: Any) -> str:
        return text_of(lambda: cp.attention(*tensors, is_causal=causal, **options))

    return {
        "unknown axis": text_of(lambda: ContextParallel(mesh, ring="context")),
        "missing axis": text_of(lambda: ContextParallel(init_device_mesh("cpu", (2,), mesh_dim_names=("ring",)))),
        "no names": text_of(lambda: ContextParallel(bare)),
        "one axis twice": text_of(lambda: ContextParallel(mesh, ulysses="ring")),
        "unknown layout": text_of(lambda: ContextParallel(mesh, layout="striped")),
        "unknown method": text_of(lambda: ContextParallel(mesh, method="megatron")),
        "method of another degree": text_of(lambda: ContextParallel(mesh, method="ulysses")),
        "hybrid of one axis": text_of(lambda: ContextParallel(mesh, method="hybrid")),
        "unknown kernel": text_of(lambda: ContextParallel(mesh, kernel="triton")),
        "inner degree": text_of(lambda: ContextParallel(mesh, ring_inner_degree=3)),
        "inner degree in words": text_of(lambda: ContextParallel(mesh, ring_inner_degree="2")),
        "no mesh": text_of(lambda: ContextParallel(None)),
        "method of another degree, regrouped": text_of(lambda: cp.regroup(ring=2, ulysses=1, method="ulysses")),
        "window of nothing, applied": text_of(lambda: cp.apply(cut, modules="layers.0.attention", window_size=0)),
        "window below, applied": text_of(lambda: cp.apply(cut, modules="layers.0.attention", window_size=-1)),
        "window of a part, applied": text_of(lambda: cp.apply(cut, modules="layers.0.attention", window_size=4.0)),
        "heads that are described": text_of(lambda: cp.describe(64, num_heads=4, num_kv_heads=3, head_dim=8)),
        "window of truth": attend(q, k, v, window_size=True),
        "window in words": attend(q, k, v, window_size="3"),
        "chunks in words": text_of(lambda: ContextParallel(mesh, layout="balanced", chunk_size="64")),
        "kv heads alone": text_of(lambda: cp.describe(64, num_kv_heads=3)),
        "fewer heads than none": text_of(lambda: cp.describe(64, num_heads=-4, head_dim=8)),
        "a DTensor": text_of(lambda: cp.shard(cp.shard(torch.arange(8), dim=0, as_dtensor=True), dim=0)),
        "empty heads": attend(q[..., :0], k[..., :0], v),
        "empty values": attend(q, k, v[..., :0]),
        "second derivatives": text_of(lambda: second_derivative(cp, q, k, v)),
        "inner rings of no ring": text_of(lambda: ContextParallel(mesh, method="all_gather", ring_inner_degree=2)),
        "chunks of no layout": text_of(lambda: ContextParallel(mesh, chunk_size=7)),
        "dims": attend(q[0], k[0], v[0]),
        "dtypes": attend(q, k.float(), v),
        "shapes": attend(q, k, v[:, :1]),
        "causal lengths": attend(q, k[:, :, :4], v[:, :, :4]),
        "heads": attend(q[:, :3], k, v),
        "no kv heads": attend(q, k[:, :0], v[:, :0]),
        "no heads": attend(q[:, :0], k, v),
        "window without causal": attend(q, k, v, causal=False, window_size=3),
        "window of a part": attend(q, k, v, window_size=3.0),
        "window of nothing": attend(q, k, v, window_size=0),
        "scale": attend(q, k, v, scale=0.0),
        "tangents": text_of(lambda: torch.func.jvp(lambda x: cp.attention(x, k, v, is_causal=True), (q,), (q,))),
        "two lengths": text_of(lambda: cp.shard(torch.arange(8), torch.arange(16), dim=0)),
    }


@pytest.fixture(scope="module")
def refused(pool) -> dict[str, str]:
    return pool.run(2, refusals)[0]


@pytest.mark.parametrize(
    ("what", "message"),
    {
        "unknown axis": 'ValueError: ring = "context": the mesh has the axes ring, ulysses',
        "missing axis": 'ValueError: ulysses = "ulysses": the mesh has the axes ring; name one, or set ulysses=None',
        "no names": 'ValueError: ring = "ring": the axes of the mesh have no names; name one',
        "inner degree in words": "ValueError: ring_inner_degree = '2': a ring of 2 allows 1, 2",
        "no mesh": "ValueError: mesh = None: must be a DeviceMesh",
        "method of another degree, regrouped": 'ValueError: method = "ulysses": ring degree 2 and ulysses degree 1 ',
        "window of nothing, applied": "ValueError: window_size = 0: must be at least 1",
        "window below, applied": "ValueError: window_size = -1: must be at least 1",
        "window of a part, applied": "ValueError: window_size = 4.0: must be a whole number of tokens, or None",
        "heads that are described": "ValueError: 4 query heads are not a multiple of 3 kv heads",
        "window of truth": "ValueError: window_size = True: must be a whole number of tokens",
        "window in words": "ValueError: window_size = '3': must be a whole number of tokens",
        "chunks in words": "ValueError: chunk_size = '64': must be a number of tokens",
        "kv heads alone": "ValueError: num_heads = 0, num_kv_heads = 3, head_dim = 0: give num_heads and head_dim",
        "fewer heads than none": "ValueError: -4 query heads and -4 kv heads: there must be at least 1 of each",
        "a DTensor": "ValueError: shard takes whole, plain tensors: hand over x.full_tensor()",
        "empty heads": "ValueError: q (2, 4, 8, 0), v (2, 2, 8, 4): heads have no elements",
        "empty values": "ValueError: q (2, 4, 8, 4), v (2, 2, 8, 0): heads have no elements",
        "second derivatives": "NotImplementedError: second derivatives of attention",
        "one axis twice": 'ValueError: ring and ulysses are both "ring": ',
        "unknown layout": 'ValueError: layout = "striped": must be one of contiguous, zigzag',
        "unknown method": 'ValueError: method = "megatron": must be one of auto, ring, ',
        "method of another degree": 'ValueError: method = "ulysses": ring degree 2 and ulysses degree 1 allow auto, ',
        "hybrid of one axis": 'ValueError: method = "hybrid": ring degree 2 and ulysses degree 1 allow auto, ',
        "unknown kernel": 'ValueError: kernel = "triton": must be one of auto, cpu flash, ',
        "inner degree": "ValueError: ring_inner_degree = 3: a ring of 2 allows 1, 2",
        "inner rings of no ring": 'ValueError: ring_inner_degree = 2: method = "all_gather" has no ring; leave it out',
        "chunks of no layout": 'ValueError: chunk_size = 7: layout = "zigzag" deals no chunks; leave it out, or set ',
        "dims": "ValueError: q, k, v have 3, 3, 3 dims; they must be [B, H, T, D]",
        "dtypes": "ValueError: q is torch.float64, k torch.float32, v torch.float64: cast them to one dtype",
        "shapes": "ValueError: q (2, 4, 8, 4), k (2, 2, 8, 4), v (2, 1, 8, 4) do not fit together",
        "causal lengths": "ValueError: 8 query and 4 key tokens per rank: a causal mask needs as many keys as queries",
        "heads": "ValueError: 3 query heads are not a multiple of 2 kv heads",
        "no kv heads": "ValueError: 4 query heads and 0 kv heads: there must be at least 1 of each",
        "no heads": "ValueError: 0 query heads and 2 kv heads: there must be at least 1 of each",
        "window without causal": "ValueError: window_size = 3: needs is_causal=True; or leave it out",
        "window of a part": "ValueError: window_size = 3.0: must be a whole number of tokens, or None",
        "window of nothing": "ValueError: window_size = 0: must be at least 1; or leave it out",
        "scale": "ValueError: scale = 0.0: must be above 0",
        "tangents": "NotImplementedError: forward-mode differentiation (torch.func.jvp) is not supported",
        "two lengths": "ValueError: lengths [8, 16] along dim 0: they must be one sequence",
    }.items(),
)
def test_context_parallel_refuses_by_name(refused, what, message):
    assert refused[what].startswith(message)


def ulysses_refusals(rank: int, world: int) -> list[str]:
    cp, cases = plan(ulysses=4), [qkv(*heads, 4)[:3] for heads in ((6, 6), (12, 3), (8, 2))]
    return [text_of(lambda case=case: cp.attention(*case, is_causal=True)) for case in cases]


def test_context_parallel_refuses_a_ulysses_degree_that_tears_heads_apart_and_lists_those_that_do_not(pool):
    indivisible, torn, replicated = pool.run(4, ulysses_refusals)[0]
    assert "ulysses degree 4: 6 heads and 6 kv heads on this rank allow 1, 2, 3, 6; or give the rest" in indivisible
    assert "ulysses degree 4: 12 heads and 3 kv heads on this rank allow 1, 3, 6, 12; or give the rest" in torn
    assert replicated == "no error"


def length_texts(rank: int, world: int) -> dict[str, list[str]]:
    ring_only = init_device_mesh("cpu", (world,), mesh_dim_names=("ring",))
    plans = {
        "ring 2 x ulysses 2 (zigzag)": plan(2, 2),
        "ring 2 x ulysses 2 (contiguous)": plan(2, 2, layout="contiguous"),
        "ring 1 x ulysses 4 (zigzag)": plan(1, 4),
        "ring 4 x ulysses 1 (zigzag)": ContextParallel(ring_only, ulysses=None),
    }
    return {
        name: [text_of(lambda cp=cp, n=n: cp.shard(torch.arange(n), dim=0)) for n in (0, 3, 12, 22)]
        for name, cp in plans.items()
    }


def test_context_parallel_names_the_nearest_lengths_that_it_can_cut(pool):
    found = pool.run(4, length_texts)[0]
    for name, (_, short, twelve, long) in found.items():
        multiple = 8 if name.startswith("ring 4") else 4
        assert short == f"ValueError: a sequence of 3 tokens does not divide over {name}: it must be a multiple of " + (
            f"{multiple}; try {multiple}"
        )
        assert long.endswith(f"must be a multiple of {multiple}; try " + ("16 or 24" if multiple == 8 else "20 or 24"))
        assert (twelve == "no error") == (multiple == 4)
    assert all(empty.startswith("ValueError: a sequence of 0 tokens") for empty, *_ in found.values())


def plan_beside_a_group_of_one_rank(rank: int, world: int) -> str:
    dist.new_group([0])
    try:
        plan(2)
    except RuntimeError as error:
        return str(error)
    return "no error"


def test_context_parallel_refuses_ranks_with_different_groups_rather_than_wait_for_ever(pool):
    for text in pool.run(2, plan_beside_a_group_of_one_rank):
        assert text.startswith("ranks [0, 1] belong to between 2 and 3 process groups")


def foreign_dtensors(rank: int, world: int) -> dict[str, str]:
    """What a plan of 2 x 2 ranks says to DTensors that other meshes cut."""
    names = ("ring", "ulysses")
    whole = init_device_mesh("cpu", (1, 2, 2, 1), mesh_dim_names=("dp", *names, "tp"))
    cp, inputs = ContextParallel(whole), qkv(4, 4, 16)[:3]

    def said(other: ContextParallel, mesh: DeviceMesh | None = None) -> str:
        mesh = mesh or other.mesh
        cuts = [Shard(2) if name in names else Replicate() for name in mesh.mesh_dim_names or ()]
        q, k, v = (DTensor.from_local(other.shard(x, dim=2), mesh, cuts, run_check=False) for x in inputs)
        return text_of(lambda: cp.attention(q, k, v, is_causal=True))

    return {
        "its own": said(cp),
        "a part of it": said(cp, whole[names]),
        "alike": said(ContextParallel(init_device_mesh("cpu", (2, 2), mesh_dim_names=names))),
        "other degrees": said(ContextParallel(init_device_mesh("cpu", (4, 1), mesh_dim_names=names)), None),
        "other groups": said(ContextParallel(init_device_mesh("cpu", (2, 2), mesh_dim_names=names[::-1]))),
        "other order": said(cp, DeviceMesh("cpu", [[2, 3], [0, 1]], mesh_dim_names=names)),
    }


def test_context_parallel_refuses_dtensors_that_another_mesh_cuts(pool):
    found = pool.run(4, foreign_dtensors)
    assert {found[0][name] for name in ("its own", "a part of it", "alike")} == {"no error"}
    start = "ValueError: q, k, v are DTensors on a mesh whose ring has the ranks"
    ends = {
        "other degrees": f"{start} [0, 1, 2, 3], this one at 0; in the plan it has [0, 2], this one at 0: cut them",
        "other groups": f"{start} [0, 1], this one at 0; in the plan it has [0, 2], this one at 0: cut them",
        "other order": f"{start} [0, 2], this one at 1; in the plan it has [0, 2], this one at 0: cut them",
    }
    for name, text in ends.items():
        assert found[0][name].startswith(text)
        assert all(of_rank[name].startswith(start) for of_rank in found)


def dtensors_on_axes_of_one(rank: int, world: int) -> list[tuple[Any, ...]]:
    """Placements of what a plan gives back for DTensors that are Shard(2) on axes of one rank too."""
    names, found = ("ring", "ulysses", "tp"), []
    for shape in ((2, 1, 1), (1, 1, 2)):
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
        cp, cuts = ContextParallel(mesh), [Shard(2), Shard(2), Replicate()]
        q, k, v = (DTensor.from_local(cp.shard(x, dim=2), mesh, cuts, run_check=False) for x in qkv(4, 2, 16)[:3])
        key = DTensor.from_local(k.to_local(), mesh, [Shard(2), Replicate(), Replicate()], run_check=False)
        found.append(cp.attention(q, k if shape[0] == 1 else key, v, is_causal=True).placements)
    return found


def test_context_parallel_takes_dtensors_that_are_sharded_on_axes_of_one_rank(pool):
    assert pool.run(2, dtensors_on_axes_of_one)[0] == [(Shard(2), Shard(2), Replicate())] * 2


def dtensor_refusals(rank: int, world: int) -> dict[str, str]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("ring", "tp"))
    cp = ContextParallel(mesh, ulysses=None)
    q, k, v, _ = (on_two_axes(x, cp, mesh, Shard(2), Shard(1)) for x in qkv(4, 2, 16))
    wrong = DTensor.from_local(k.to_local(), mesh, (Shard(1), Shard(1)), run_check=False)
    whole = on_two_axes(qkv(4, 2, 16)[1], cp, mesh, Shard(2), Replicate())
    elsewhere = DTensor.from_local(v.to_local(), mesh["tp"], (Shard(1),), run_check=False)
    calls = {
        "plain": (q, k.to_local(), v),
        "axis": (q, wrong, v),
        "mesh": (q, k, elsewhere),
        "heads": (q, whole, whole),
    }
    return {name: text_of(lambda x=x: cp.attention(*x, is_causal=True)) for name, x in calls.items()}


def test_context_parallel_refuses_dtensors_that_are_placed_otherwise(pool):
    found = pool.run(4, dtensor_refusals)[0]
    assert found["plain"].startswith("ValueError: k is a plain tensor while another of q, k, v is a DTensor")
    assert found["axis"].startswith("ValueError: k is S(1) on ring; needed is S(2)")
    assert found["mesh"].startswith("ValueError: v is a DTensor on the axes ('tp',); the sequence is cut over ring")
    assert "must be cut alike" in found["heads"], "local groups of heads would pair the wrong ones"
