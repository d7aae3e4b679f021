"""Attention over sequence shards equals attention in one process: every method x layout x mask x heads, both ways."""

from __future__ import annotations

import itertools
import sys
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from tolerance import assert_matches
from torch.distributed.device_mesh import init_device_mesh

from cptrain.context_parallel import ContextParallel
from cptrain.context_parallel.hops import Pace
from cptrain.context_parallel.packed_batch import PackedBatch

# ranks -> what a plan is made with; "ring" and "ulysses" are degrees
PLANS: dict[int, dict[str, dict[str, Any]]] = {
    1: {"alone": {}},
    2: {
        "ring": {"ring": 2},
        "ulysses": {"ulysses": 2},
        "all-gather": {"ring": 2, "method": "all_gather"},
        "double ring of 2": {"ring": 2, "ring_inner_degree": 2},
        "ring without overlap": {"ring": 2, "overlap": False},
    },
    3: {
        "ring": {"ring": 3},
        "all-gather": {"ring": 3, "method": "all_gather"},
        "double ring of 3": {"ring": 3, "ring_inner_degree": 3},
    },
    4: {
        "ring": {"ring": 4},
        "ulysses": {"ulysses": 4},
        "hybrid": {"ring": 2, "ulysses": 2},
        "hybrid, ulysses outside": {"ring": 2, "ulysses": 2, "outside": "ulysses"},
        "all-gather": {"ring": 4, "method": "all_gather"},
        "double ring 2 x 2": {"ring": 4, "ring_inner_degree": 2},
        "double ring 2 x 2 without overlap": {"ring": 4, "ring_inner_degree": 2, "overlap": False},
        "all-gather without overlap": {"ring": 4, "method": "all_gather", "overlap": False},
    },
    6: {"double ring 2 x 3": {"ring": 6, "ring_inner_degree": 3}},
    8: {
        "ring": {"ring": 8},
        "ulysses": {"ulysses": 8},
        "hybrid": {"ring": 4, "ulysses": 2},
        "hybrid with double ring": {"ring": 4, "ulysses": 2, "ring_inner_degree": 2},
        "all-gather": {"ring": 8, "method": "all_gather"},
        "double ring, inner 2": {"ring": 8, "ring_inner_degree": 2},
        "double ring, inner 4": {"ring": 8, "ring_inner_degree": 4},
    },
}
HEADS = {"mha": (8, 8), "gqa": (8, 2), "mqa": (8, 1)}
# chunks are 6 tokens of zigzag and 12 of contiguous: windows within one, across one, across ranks, and beyond all
MASKS: dict[str, dict[str, Any]] = {
    "causal": {"is_causal": True},
    "full": {"is_causal": False},
    "window 2": {"is_causal": True, "window_size": 2},
    "window 4": {"is_causal": True, "window_size": 4},
    "window 7": {"is_causal": True, "window_size": 7},
    "window 20": {"is_causal": True, "window_size": 20},
    "window 1000": {"is_causal": True, "window_size": 1000},
}


def problem(
    heads: int,
    kv_heads: int,
    *,
    length: int,
    batch: int = 2,
    dim: int = 8,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
) -> tuple[torch.Tensor, ...]:
    """Global q, k, v and the output's gradient, the same on every rank."""
    generator = torch.Generator().manual_seed(heads * 100 + kv_heads)
    shapes = [(batch, count, length, dim) for count in (heads, kv_heads, kv_heads, heads)]
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype) for shape in shapes)


def visible(length: int, window_size: int) -> torch.Tensor:
    """The dense mask that a sliding window stands for."""
    distance = torch.arange(length)[:, None] - torch.arange(length)
    return (distance >= 0) & (distance < window_size)


def single_process(q, k, v, dout, *, is_causal: bool, window_size: int | None = None, scale: float | None = None):
    """Output and gradients of plain SDPA over the whole sequence."""
    q, k, v = (x.detach().clone().requires_grad_() for x in (q, k, v))
    mask = None if window_size is None else visible(q.size(2), window_size).to(q.device)
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=is_causal and mask is None, scale=scale, enable_gqa=q.size(1) != k.size(1)
    )
    return out.detach(), *torch.autograd.grad(out, (q, k, v), dout)


def gathered(cp: ContextParallel | PackedBatch, *parts: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Each [B, h, T, D] in global order, those of one length in one message: on few cores, messages take the time."""
    whole: dict[int, torch.Tensor] = {}
    for length in {x.size(2) for x in parts}:
        alike = [number for number, x in enumerate(parts) if x.size(2) == length]
        widest = max(parts[number].size(3) for number in alike)
        joined = torch.cat([F.pad(parts[n].detach(), (0, widest - parts[n].size(3))) for n in alike], 1)
        found = cp.unshard(joined, dim=2).split([parts[number].size(1) for number in alike], 1)
        whole |= {number: x[..., : parts[number].size(3)] for number, x in zip(alike, found, strict=True)}
    return tuple(whole[number] for number in range(len(parts)))


def shards(cp: ContextParallel, q, k, v, dout, **options: Any) -> tuple[torch.Tensor, ...]:
    """The same through a plan: what this rank has of it."""
    q, k, v = (cp.shard(x, dim=2).requires_grad_() for x in (q, k, v))
    out = cp.attention(q, k, v, **options)
    return out, *torch.autograd.grad(out, (q, k, v), cp.shard(dout, dim=2))


def sharded(cp: ContextParallel, q, k, v, dout, **options: Any):
    """The same through a plan, gathered to global order."""
    return gathered(cp, *shards(cp, q, k, v, dout, **options))


def make_plan(
    layout: str = "zigzag",
    *,
    ring: int = 1,
    ulysses: int = 1,
    outside: str = "ring",
    device: str = "cpu",
    **options: Any,
):
    """A plan over all ranks; `outside` is the axis whose ranks lie further apart."""
    axes = {"ring": ring, "ulysses": ulysses}
    names = ("ring", "ulysses") if outside == "ring" else ("ulysses", "ring")
    mesh = init_device_mesh(device, tuple(axes[name] for name in names), mesh_dim_names=names)
    return ContextParallel(mesh, layout=layout, **options)  # type: ignore[arg-type]


def check_every_case(rank: int, world: int, options: dict[str, Any], device: str = "cpu") -> None:
    plans = {layout: make_plan(layout, device=device, **options) for layout in ("zigzag", "contiguous")}
    for (heads, kv_heads), (mask_name, mask) in itertools.product(HEADS.values(), MASKS.items()):
        inputs = problem(heads, kv_heads, length=12 * world, device=device)
        expected = single_process(*inputs, **mask)
        for layout, plan in plans.items():
            # Each rank looks at what it has: to gather all of it would be a quarter of the time.
            for name, a, e in zip(("out", "dq", "dk", "dv"), shards(plan, *inputs, **mask), expected, strict=True):
                try:
                    assert_matches(a, plan.shard(e, dim=2), whole=e)
                except AssertionError as error:
                    case = f"{name}, {layout}, {mask_name}, {heads}/{kv_heads} heads"
                    raise AssertionError(f"{case}: {error}") from None


@pytest.mark.parametrize(("world", "name"), [(world, name) for world, plans in PLANS.items() for name in plans])
def test_attention_equals_one_process_in_fp64(pool, world, name):
    pool.run(world, check_every_case, PLANS[world][name])


def check_hops_together(
    rank: int, world: int, options: dict[str, Any], at_once: int, growth: int = 2, device: str = "cpu"
) -> None:
    pace = {"ring_pace": mock.Mock(return_value=Pace(at_once, growth)), "hops_at_once": mock.Mock(return_value=at_once)}
    with mock.patch.multiple(sys.modules["cptrain.context_parallel.attention"], **pace):
        check_every_case(rank, world, options, device)
    assert pace["ring_pace"].called


@pytest.mark.parametrize(
    ("world", "name", "at_once", "growth"),
    [
        (3, "ring", 2, 2),
        (4, "ring", 2, 2),
        (6, "double ring 2 x 3", 3, 2),
        (8, "ring", 3, 2),
        (8, "ring", 100, 10),
        (8, "double ring, inner 4", 2, 2),
        (8, "double ring, inner 4", 4, 4),
    ],
)
def test_attention_is_the_same_where_hops_are_computed_together(pool, world, name, at_once, growth):
    pool.run(world, check_hops_together, PLANS[world][name], at_once, growth)


def bf16_errors(
    rank: int,
    world: int,
    options: dict[str, Any],
    heads: tuple[int, int] = HEADS["gqa"],
    *,
    device: str = "cpu",
    dim: int = 16,
) -> list[tuple[str, float, float]]:
    plan, rows = make_plan(device=device, **options), []
    for mask_name in ("causal", "full", "window 20"):
        inputs = problem(*heads, length=64 * world, dim=dim, dtype=torch.bfloat16, device=device)
        mask = MASKS[mask_name]
        exact = single_process(*(x.double() for x in inputs), **mask)
        single = single_process(*inputs, **mask)
        ours = sharded(plan, *inputs, **mask)
        for name, a, s, e in zip(("out", "dq", "dk", "dv"), ours, single, exact, strict=True):
            assert a.dtype == torch.bfloat16
            error = tuple(float((x.double() - e).norm() / e.norm()) for x in (a, s))
            rows.append((f"{mask_name}, {name}", *error))
    return rows


@pytest.mark.parametrize(
    ("world", "name"),
    [(4, "ring"), (4, "ulysses"), (4, "hybrid"), (4, "all-gather"), (4, "double ring 2 x 2"), (8, "ring")],
)
@pytest.mark.parametrize("heads", HEADS)
def test_attention_in_bf16_is_within_twice_the_single_device_error(pool, world, name, heads):
    for what, ours, single in pool.run(world, bf16_errors, PLANS[world][name], HEADS[heads])[0]:
        assert single > 1e-4, f"{what}: the reference shows no bf16 error, so the test compares nothing"
        assert ours <= 2 * single, f"{what}: error {ours:.2e}, one device has {single:.2e}"


def fp32_and_scale(rank: int, world: int) -> None:
    inputs = problem(4, 2, length=16 * world, dtype=torch.float32)
    before = [x.clone() for x in inputs]
    expected = single_process(*inputs, is_causal=True, scale=0.7)
    for a, e in zip(sharded(make_plan(ring=world), *inputs, is_causal=True, scale=0.7), expected, strict=True):
        assert_matches(a, e)
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))


def test_attention_takes_a_scale_and_keeps_fp32_inputs_unharmed(pool):
    pool.run(4, fp32_and_scale)


def differing_dims(rank: int, world: int, options: dict[str, Any]) -> None:
    q, k, v, dout = problem(4, 2, length=12 * world, dim=8)
    v, dout = v[..., :4].contiguous(), dout[..., :4].contiguous()
    for mask in (MASKS["causal"], MASKS["window 7"], MASKS["full"]):
        expected = single_process(q, k, v, dout, **mask)
        for a, e in zip(sharded(make_plan(**options), q, k, v, dout, **mask), expected, strict=True):
            assert_matches(a, e)


def errors_under_autocast(rank: int, world: int, options: dict[str, Any]) -> list[tuple[float, float]]:
    """Of the kernel of plain torch, which values narrower than keys take: under autocast, and without."""
    plan, (q, k, v, dout) = make_plan(**options), problem(4, 2, length=16 * world, dim=16, dtype=torch.bfloat16)
    q, v, dout = 16 * q, v[..., :8].contiguous(), dout[..., :8].contiguous()  # sharp: rounded scores would show
    exact = single_process(*(x.double() for x in (q, k, v, dout)), is_causal=True)
    found = []
    for enabled in (True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            found.append(sharded(plan, q, k, v, dout, is_causal=True))
    return [
        tuple(float((x.double() - e).norm() / e.norm()) for x in both) for *both, e in zip(*found, exact, strict=True)
    ]


@pytest.mark.parametrize(("world", "name"), [(1, "alone"), (2, "ring"), (2, "ulysses"), (2, "all-gather")])
def test_attention_keeps_its_dtypes_under_autocast(pool, world, name):
    for under, without in pool.run(world, errors_under_autocast, PLANS[world][name])[0]:
        assert under == without


@pytest.mark.parametrize("name", ["ring", "ulysses", "all-gather", "double ring 2 x 2"])
def test_attention_takes_values_narrower_than_keys(pool, name):
    pool.run(4, differing_dims, PLANS[4][name])


def cross_attention(rank: int, world: int, options: dict[str, Any]) -> None:
    q, _, _, dout = problem(4, 4, length=6 * world)
    _, k, v, _ = problem(4, 2, length=10 * world)
    expected = single_process(q, k, v, dout, is_causal=False)
    for a, e in zip(sharded(make_plan(**options), q, k, v, dout, is_causal=False), expected, strict=True):
        assert_matches(a, e)


@pytest.mark.parametrize("name", ["ring", "ulysses", "hybrid", "all-gather", "double ring 2 x 2"])
def test_attention_crosses_to_keys_of_another_length(pool, name):
    pool.run(4, cross_attention, PLANS[4][name])


def window_of_one(rank: int, world: int) -> None:
    q, k, v, dout = problem(4, 4, length=12 * world)
    out, dq, dk, dv = sharded(make_plan(ring=world), q, k, v, dout, is_causal=True, window_size=1)
    assert_matches(out, v)
    assert_matches(dv, dout)
    assert dq.abs().max() < 1e-12 and dk.abs().max() < 1e-12  # a softmax of one key does not depend on it


def test_attention_with_a_window_of_one_returns_the_values(pool):
    pool.run(2, window_of_one)
