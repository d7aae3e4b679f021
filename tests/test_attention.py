"""Attention over sequence shards equals attention in one process, forward and backward."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from tolerance import assert_matches
from torch.distributed.device_mesh import init_device_mesh

from cptrain.context_parallel import ContextParallel

DEGREES = {2: [(2, 1), (1, 2)], 3: [(3, 1)], 4: [(4, 1), (1, 4), (2, 2)], 8: [(4, 2), (2, 4)]}
HEADS = {"mha": (8, 8), "gqa": (8, 2), "mqa": (8, 1)}
CASES = [(n, r, u) for n, pairs in DEGREES.items() for r, u in pairs]


def problem(
    heads: int, kv_heads: int, *, length: int, batch: int = 2, dim: int = 8, dtype: torch.dtype = torch.float64
):
    """Global q, k, v and the output's gradient, the same on every rank."""
    generator = torch.Generator().manual_seed(heads * 100 + kv_heads)
    shapes = [(batch, heads, length, dim), (batch, kv_heads, length, dim), (batch, kv_heads, length, dim)]
    q, k, v = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes)
    return q, k, v, torch.randn(shapes[0], generator=generator, dtype=torch.float64).to(dtype)


def single_process(q, k, v, dout, *, causal: bool, scale: float | None = None):
    """Output and gradients of plain SDPA over the whole sequence."""
    q, k, v = (x.detach().clone().requires_grad_() for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=q.size(1) != k.size(1))
    return out.detach(), *torch.autograd.grad(out, (q, k, v), dout)


def sharded(cp: ContextParallel, q, k, v, dout, *, causal: bool, scale: float | None = None):
    """The same through a plan, gathered to global order."""
    q, k, v = (cp.shard(x, dim=2).requires_grad_() for x in (q, k, v))
    out = cp.attention(q, k, v, is_causal=causal, scale=scale)
    grads = torch.autograd.grad(out, (q, k, v), cp.shard(dout, dim=2))
    return tuple(cp.unshard(x.detach(), dim=2) for x in (out, *grads))


def plan(ring: int, ulysses: int, layout: str = "zigzag") -> ContextParallel:
    mesh = init_device_mesh("cpu", (ring, ulysses), mesh_dim_names=("ring", "ulysses"))
    return ContextParallel(mesh, layout=layout)  # type: ignore[arg-type]


def check_every_case(rank: int, world: int, ring: int, ulysses: int) -> None:
    for layout, causal, (heads, kv_heads) in itertools.product(("zigzag", "contiguous"), (True, False), HEADS.values()):
        inputs = problem(heads, kv_heads, length=12 * world)
        expected = single_process(*inputs, causal=causal)
        actual = sharded(plan(ring, ulysses, layout), *inputs, causal=causal)
        for name, a, e in zip(("out", "dq", "dk", "dv"), actual, expected, strict=True):
            try:
                assert_matches(a, e)
            except AssertionError as error:
                raise AssertionError(f"{name}, {layout}, causal {causal}, {heads}/{kv_heads} heads: {error}") from None


@pytest.mark.parametrize(("world", "ring", "ulysses"), CASES)
def test_attention_equals_one_process_in_fp64(pool, world, ring, ulysses):
    pool.run(world, check_every_case, ring, ulysses)


def bf16_errors(rank: int, world: int, ring: int, ulysses: int) -> list[tuple[str, float, float]]:
    inputs = problem(8, 2, length=64 * world, dim=16, dtype=torch.bfloat16)
    exact = single_process(*(x.double() for x in inputs), causal=True)
    single = single_process(*inputs, causal=True)
    ours = sharded(plan(ring, ulysses), *inputs, causal=True)
    rows = []
    for name, a, s, e in zip(("out", "dq", "dk", "dv"), ours, single, exact, strict=True):
        assert a.dtype == torch.bfloat16
        rows.append((name, float((a.double() - e).norm() / e.norm()), float((s.double() - e).norm() / e.norm())))
    return rows


@pytest.mark.parametrize(("world", "ring", "ulysses"), [(4, 4, 1), (4, 1, 4), (4, 2, 2), (8, 8, 1)])
def test_attention_in_bf16_is_within_twice_the_single_device_error(pool, world, ring, ulysses):
    for name, ours, single in pool.run(world, bf16_errors, ring, ulysses)[0]:
        assert single > 1e-4, f"{name}: the reference shows no bf16 error, so the test compares nothing"
        assert ours <= 2 * single, f"{name}: error {ours:.2e}, one device has {single:.2e}"


def fp32_and_scale(rank: int, world: int) -> None:
    inputs = problem(4, 2, length=16 * world, dtype=torch.float32)
    expected = single_process(*inputs, causal=True, scale=0.7)
    for a, e in zip(sharded(plan(world, 1), *inputs, causal=True, scale=0.7), expected, strict=True):
        assert_matches(a, e)


def test_attention_takes_a_scale_and_keeps_fp32_inputs_unharmed(pool):
    pool.run(4, fp32_and_scale)
