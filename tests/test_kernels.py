"""Kernels of one block, and how blocks are folded into one softmax, against a dense formula in fp64."""

from __future__ import annotations

import itertools
import math
import sys
from dataclasses import replace

import pytest
import torch
from tolerance import assert_matches
from torch.nn.attention import _registry
from torch.utils._python_dispatch import TorchDispatchMode

from cptrain.context_parallel import kernels, launches, reference
from cptrain.context_parallel.kernels import (
    CPU_FLASH,
    KERNELS,
    REFERENCE,
    Kernel,
    backward_block,
    backward_launch,
    choose_kernel,
    forward_block,
    forward_launch,
)
from cptrain.context_parallel.launches import Launch, Segments, accumulate, plan_launches, put, segments_of, take
from cptrain.context_parallel.merging import merge
from cptrain.context_parallel.schedule import Block, Shape
from cptrain.distributed import sending

SCALE = 0.4
ON_CPU = [kernel for kernel in KERNELS if "cpu" in kernel.devices]
any_kernel = pytest.mark.parametrize("kernel", ON_CPU, ids=lambda kernel: kernel.name)
# (causal, query length, key length, query heads, kv heads)
SHAPES = {
    "causal": (True, 13, 13, 4, 4),
    "causal gqa": (True, 13, 13, 6, 2),
    "full": (False, 13, 13, 4, 4),
    "full mqa": (False, 13, 13, 4, 1),
    "few queries": (False, 5, 13, 6, 2),
    "few keys": (False, 13, 5, 6, 2),
}


def block(shape: str, dtype: torch.dtype = torch.float64, dim: int = 8) -> tuple[torch.Tensor, ...]:
    """q, k, v and the output's gradient."""
    return tuple(x.to(dtype) for x in random_block(*SHAPES[shape][1:], dim=dim))


def random_block(num_queries: int, num_keys: int, heads: int, kv_heads: int, *, dim: int) -> tuple[torch.Tensor, ...]:
    """q, k, v and the output's gradient of two sequences, in fp64."""
    generator = torch.Generator().manual_seed(num_queries)
    sizes = [(2, heads, num_queries, dim), *[(2, kv_heads, num_keys, dim)] * 2, (2, heads, num_queries, dim)]
    return tuple(torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes)


def dense(q, k, v, dout, *, causal: bool, scale: float = SCALE) -> tuple[torch.Tensor, ...]:
    """out, lse, dq, dk, dv in fp64 from whole matrices: softmax and its derivative written out."""
    q, k, v, dout = (x.double() for x in (q, k, v, dout))
    groups = q.size(1) // k.size(1)
    wide_k, wide_v = (torch.stack([x] * groups, 2).flatten(1, 2) for x in (k, v))
    scores = torch.einsum("bhqd,bhkd->bhqk", q, wide_k) * scale
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), -math.inf)
    exps = scores.exp()
    p = exps / exps.sum(-1, keepdim=True)
    dp = torch.einsum("bhqd,bhkd->bhqk", dout, wide_v)
    ds = p * (dp - (p * dp).sum(-1, keepdim=True)) * scale
    dk, dv = torch.einsum("bhqk,bhqd->bhkd", ds, q), torch.einsum("bhqk,bhqd->bhkd", p, dout)
    return (
        torch.einsum("bhqk,bhkd->bhqd", p, wide_v),
        exps.sum(-1).log(),
        torch.einsum("bhqk,bhkd->bhqd", ds, wide_k),
        *(x.unflatten(1, (-1, groups)).sum(2) for x in (dk, dv)),
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@any_kernel
def test_kernel_equals_the_dense_formula(kernel, shape, dtype):
    q, k, v, dout = block(shape, dtype)
    causal = SHAPES[shape][0]
    out, lse = kernel.forward(q, k, v, causal, SCALE)
    actual = (out, lse, *kernel.backward(dout, q, k, v, out, lse, causal, SCALE))
    for name, a, e in zip(("out", "lse", "dq", "dk", "dv"), actual, dense(q, k, v, dout, causal=causal), strict=True):
        try:
            assert_matches(a, e.to(dtype))
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None


@any_kernel
def test_kernel_in_bf16_keeps_the_dtype_of_q_and_an_fp32_lse(kernel):
    q, k, v, dout = block("causal gqa", torch.bfloat16)
    out, lse = kernel.forward(q, k, v, True, SCALE)
    grads = kernel.backward(dout, q, k, v, out, lse, True, SCALE)
    assert lse.dtype == torch.float32
    for a, e in zip((out, *grads), [dense(q, k, v, dout, causal=True)[i] for i in (0, 2, 3, 4)], strict=True):
        assert a.dtype == torch.bfloat16
        assert (a.double() - e).norm() < 0.01 * e.norm()


@any_kernel
def test_kernel_takes_tensors_of_any_strides(kernel):
    """Last dims of a stride other than 1 (a transposed projection), and the gradient of a sum, which has stride 0."""
    q, k, v, _ = block("causal gqa")
    ones = torch.ones(()).double().expand(q.shape)
    expected = dense(q, k, v, ones, causal=True)
    strided_q, strided_k, strided_v = (x.mT.contiguous().mT for x in (q, k, v))
    for queries, keys, values in ((strided_q, k, v), (q, strided_k, v), (q, k, strided_v)):
        out, lse = kernel.forward(queries, keys, values, True, SCALE)
        grads = kernel.backward(ones, queries, keys, values, out.mT.contiguous().mT, lse, True, SCALE)
        for a, e in zip((out, lse, *grads), expected, strict=True):
            assert_matches(a, e)


def forward_in_blocks(kernel: Kernel, q, k, v, cuts: list[tuple[int, int]], *, offset: int):
    """Merged (out, lse) of queries that see all keys before `offset` and, causally, those from it on."""
    out = torch.zeros(*q.shape[:3], v.size(-1), dtype=torch.float64)
    lse = torch.full(q.shape[:3], -math.inf, dtype=torch.float64)
    for start, stop in cuts:
        merge(out, lse, *kernel.forward(q, k[:, :, start:stop], v[:, :, start:stop], start >= offset, SCALE))
    return out, lse


@any_kernel
def test_kernel_gradients_of_blocks_add_up_given_the_final_out_and_lse(kernel):
    q, _, _, dout = block("few queries")
    _, k, v, _ = block("full")
    k, v = (x[:, :2] for x in (k, v))
    cuts, offset = [(0, 3), (3, 8), (8, 13)], 8  # two full blocks, then the 5 x 5 diagonal
    rows = torch.arange(5)[:, None] + offset
    p = torch.einsum("bhqd,bhkd->bhqk", q, k.repeat_interleave(3, 1)) * SCALE
    p = p.masked_fill(torch.arange(13) > rows, -math.inf).softmax(-1)
    expected_out = p @ v.repeat_interleave(3, 1)
    ds = p * ((dout @ v.repeat_interleave(3, 1).mT) - (dout * expected_out).sum(-1, keepdim=True)) * SCALE
    expected = (
        ds @ k.repeat_interleave(3, 1),
        (ds.mT @ q).unflatten(1, (2, 3)).sum(2),
        (p.mT @ dout).unflatten(1, (2, 3)).sum(2),
    )

    out, lse = forward_in_blocks(kernel, q, k, v, cuts, offset=offset)
    assert_matches(out, expected_out)
    grads = [kernel.backward(dout, q, k[:, :, i:j], v[:, :, i:j], out, lse, i >= offset, SCALE) for i, j in cuts]
    assert_matches(sum(dq for dq, _, _ in grads), expected[0])
    assert_matches(torch.cat([dk for _, dk, _ in grads], 2), expected[1])
    assert_matches(torch.cat([dv for _, _, dv in grads], 2), expected[2])


@any_kernel
def test_kernel_merge_of_blocks_is_the_same_in_any_order(kernel):
    q, k, v, dout = block("full")
    expected_out, expected_lse, *_ = dense(q, k, v, dout, causal=False)
    for cuts in itertools.permutations([(0, 1), (1, 5), (5, 6), (6, 13)]):
        out, lse = forward_in_blocks(kernel, q, k, v, list(cuts), offset=99)
        assert_matches(out, expected_out)
        assert_matches(lse, expected_lse)


def rows(out: list[float], lse: list[float], dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """out [1, 1, T, 2] with both channels alike, and lse [1, 1, T]."""
    return torch.tensor(out, dtype=dtype)[None, None, :, None].repeat(1, 1, 1, 2), torch.tensor(lse, dtype=dtype)[
        None, None
    ]


def test_kernel_merge_leaves_a_row_without_keys_at_zero_until_a_block_shows_it_one():
    none = -math.inf
    out, lse = rows([0, 0, 3], [none, none, 1])
    merge(out, lse, *rows([0, 5, 0], [none, 2, none]))
    assert out[0, 0, :, 0].tolist() == [0, 5, 3]
    assert lse[0, 0].tolist() == [none, 2, 1]
    merge(out, lse, *rows([7, 0, 0], [4, none, none]))
    assert out[0, 0, :, 0].tolist() == [7, 5, 3]
    assert lse[0, 0].tolist() == [4, 2, 1]


@pytest.mark.parametrize("gap", [89.0, 1e3, 1e30])
def test_kernel_merge_of_far_apart_lse_neither_overflows_nor_drops_the_larger(gap):
    out, lse = rows([1, 1, 2], [0, gap, 0])
    merge(out, lse, *rows([2, 2, 1], [gap, 0, -gap]))
    expected_out, expected_lse = rows([2, 1, 2], [gap, gap, 0])
    assert torch.equal(out, expected_out)
    torch.testing.assert_close(lse, expected_lse)


def test_kernel_merge_lets_a_nan_through():
    out, lse = rows([1], [0])
    merge(out, lse, *rows([math.nan], [math.nan]))
    assert out.isnan().all()
    assert lse.isnan().all()


def test_kernel_merge_takes_blocks_of_lower_precision_without_touching_them():
    out, lse = rows([1, 2], [0, 0], torch.float32)
    block_out, block_lse = rows([3, 4], [0, 0], torch.bfloat16)[0], torch.zeros(1, 1, 2)
    before = block_out.clone(), block_lse.clone()
    merge(out, lse, block_out, block_lse)
    assert out.dtype == torch.float32
    assert out[0, 0, :, 0].tolist() == [2, 3]
    assert torch.equal(block_out, before[0])
    assert torch.equal(block_lse, before[1])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@any_kernel
def test_kernel_never_writes_into_an_input_or_returns_a_part_of_it(kernel, dtype):
    q, k, v, dout = block("causal", dtype)
    copies = [x.clone() for x in (q, k, v, dout)]
    out, lse = kernel.forward(q, k, v, True, SCALE)
    kept_out, kept_lse = out.clone(), lse.clone()
    results = (out, lse, *kernel.backward(dout, q, k, v, out, lse, True, SCALE))
    for x, copy in zip((q, k, v, dout, out, lse), [*copies, kept_out, kept_lse], strict=True):
        assert torch.equal(x, copy)
    storages = [x.untyped_storage().data_ptr() for x in (q, k, v, dout, *results)]
    assert len(set(storages)) == len(storages)


def on_generation(monkeypatch, generation: int) -> None:
    """As if this machine had a CUDA device of that compute capability."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (generation, 0))


def test_kernel_choice_takes_the_fastest_that_fits(monkeypatch):
    assert choose_kernel("cpu", torch.float64) is CPU_FLASH
    assert choose_kernel("cpu", torch.float64, key_dim=24, value_dim=16) is REFERENCE
    for generation, fastest in ((8, "cuda flash"), (9, "cudnn"), (10, "cudnn"), (12, "cuda flash")):
        on_generation(monkeypatch, generation)
        assert choose_kernel("cuda", torch.bfloat16).name == fastest
        assert choose_kernel("cuda", torch.bfloat16, packed=True).name == "cuda flash"
        assert choose_kernel("cuda", torch.bfloat16, key_dim=256).name == "cuda flash"
        assert choose_kernel("cuda", torch.bfloat16, key_dim=512).name == "efficient"
        assert choose_kernel("cuda", torch.bfloat16, key_dim=20).name == "reference"
        assert choose_kernel("cuda", torch.bfloat16, key_dim=192, value_dim=128).name == "efficient"
        assert choose_kernel("cuda", torch.float32).name == "efficient"
        assert choose_kernel("cuda", torch.float64) is REFERENCE


def test_kernel_choice_is_logged_once_and_warns_of_plain_torch(caplog):
    kernels._choose.cache_clear()
    with caplog.at_level("INFO", logger=kernels.__name__):
        for dims in ((24, 24), (24, 16), (24, 16)):
            choose_kernel("cpu", torch.float32, key_dim=dims[0], value_dim=dims[1])
        choose_kernel("cpu", torch.float32, key_dim=24, value_dim=16, name="reference")
    infos, warnings = ([r.getMessage() for r in caplog.records if r.levelname == x] for x in ("INFO", "WARNING"))
    odd = "torch.float32 on cpu with keys of 24 and values of 16"
    assert infos == [
        "attention kernel cpu flash for torch.float32 on cpu with keys of 24",
        *[f"attention kernel reference for {odd}"] * 2,
    ]
    assert warnings == [f"attention is several times slower in plain torch: no other kernel takes {odd}"]


def test_kernel_choice_leaves_cudnn_out_where_results_must_not_vary_or_it_is_switched_off(monkeypatch):
    on_generation(monkeypatch, 9)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert choose_kernel("cuda", torch.bfloat16).name == "cuda flash"
    with pytest.raises(NotImplementedError, match=r"keys of 64, deterministic; what works there: cuda flash, eff"):
        choose_kernel("cuda", torch.bfloat16, name="cudnn")
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: False)
    assert choose_kernel("cuda", torch.bfloat16).name == "cudnn"
    monkeypatch.setattr(torch.backends.cuda, "cudnn_sdp_enabled", lambda: False)
    assert choose_kernel("cuda", torch.bfloat16).name == "cuda flash"


def test_kernel_choice_takes_the_one_that_is_named():
    for kernel in KERNELS:
        if not kernel.implementation:
            assert choose_kernel(min(kernel.devices), torch.bfloat16, name=kernel.name) is kernel


class Handle:
    """What torch keeps of an implementation that is active."""

    def remove(self) -> None:
        pass


def test_kernel_choice_activates_the_implementation_that_it_names_once(monkeypatch):
    activated: list[str] = []
    for name in ("FA3", "FA4"):
        monkeypatch.setitem(
            _registry._FLASH_ATTENTION_IMPLS, name, lambda name=name: (activated.append(name), Handle())[1]
        )
    try:
        on_generation(monkeypatch, 9)
        for name in ("fa3", "fa3", "fa4"):
            assert choose_kernel("cuda", torch.bfloat16, packed=True, name=name).name == name
        assert activated == ["FA3", "FA4"]
        assert choose_kernel("cuda", torch.bfloat16).name == "cudnn", "by name only"
    finally:
        _registry.restore_flash_attention_impl(_raise_warn=False)


def test_kernel_choice_refuses_an_implementation_whose_package_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn_interface", None)
    with pytest.raises(
        NotImplementedError, match=r'"fa3" needs a package .*flash_attn_interface.*; install it, or take'
    ):
        choose_kernel("cuda", torch.bfloat16, name="fa3")


@pytest.mark.parametrize(
    ("device", "dtype", "options", "message"),
    [
        ("cpu", torch.int64, {}, r"no attention kernel for torch\.int64 on cpu .*; what works there: none; cast to"),
        (
            "cuda",
            torch.float32,
            {"name": "cuda flash"},
            r'"cuda flash" is not there .* works there: efficient, reference',
        ),
        (
            "cpu",
            torch.float32,
            {"name": "cpu flash", "key_dim": 24, "value_dim": 16},
            r"keys of 24 and values of 16; .*: reference$",
        ),
        (
            "cuda",
            torch.bfloat16,
            {"name": "cudnn", "packed": True},
            r"keys of 64, packed documents; what works there: cuda flash, efficient, reference",
        ),
    ],
)
def test_kernel_choice_refuses_by_name_and_says_what_works(device, dtype, options, message):
    with pytest.raises(NotImplementedError, match=message):
        choose_kernel(device, dtype, **options)


@pytest.mark.parametrize("kernel", [k for k in KERNELS if "cuda" in k.devices], ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_kernel_of_cuda_is_called_as_its_operator_wants_it(kernel, kv_heads):
    """Shapes and dtypes only: tensors without data run an operator's signature and shape rules without a device."""
    q = torch.empty(2, 4, 40, 16, device="meta", dtype=torch.bfloat16)
    k, v = (torch.empty(2, kv_heads, 24, 16, device="meta", dtype=torch.bfloat16) for _ in range(2))
    out, lse = kernel.forward(q, k, v, False, 0.5)
    grads = kernel.backward(q, q, k, v, out, lse.contiguous(), False, 0.5)
    assert (out.shape, out.dtype) == (q.shape, q.dtype)
    assert (lse.shape, lse.dtype) == (q.shape[:3], torch.float32)
    assert [(x.shape, x.dtype) for x in grads] == [(x.shape, x.dtype) for x in (q, k, v)]


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements that any operation returned."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.numel())
        return result


@pytest.mark.parametrize("causal", [True, False])
def test_kernel_reference_scores_few_rows_at_a_time_and_is_the_same(monkeypatch, causal):
    heads, length, tile = 2, 61, 4
    q, k, v, dout = (torch.randn(1, heads, length, 3, dtype=torch.float64) for _ in range(4))
    expected = dense(q, k, v, dout, causal=causal)
    monkeypatch.setattr(reference, "ROWS_PER_TILE", tile)
    with LargestTensor() as largest:
        out, lse = REFERENCE.forward(q, k, v, causal, SCALE)
        actual = (out, lse, *REFERENCE.backward(dout, q, k, v, out, lse, causal, SCALE))
    assert largest.elements == heads * tile * length
    for a, e in zip(actual, expected, strict=True):
        assert_matches(a, e)


def packed_problem() -> tuple[Segments, tuple[torch.Tensor, ...]]:
    generator = torch.Generator().manual_seed(3)
    q, k, v, dout = (torch.randn(1, heads, 15, 8, generator=generator, dtype=torch.float64) for heads in (6, 2, 2, 6))
    return segments_of((5, 1, 9), (5, 1, 9), q.device), (q, k, v, dout)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kernel", [k for k in ON_CPU if k.forward_packed], ids=lambda kernel: kernel.name)
def test_kernel_of_packed_segments_equals_the_dense_formula_of_each(kernel, causal):
    packed, (q, k, v, dout) = packed_problem()
    out, lse = kernel.forward_packed(q, k, v, packed, causal, SCALE)
    actual = (out, lse, *kernel.backward_packed(dout, q, k, v, out, lse, packed, causal, SCALE))
    for rows in (slice(0, 5), slice(5, 6), slice(6, 15)):
        expected = dense(*(x[:, :, rows] for x in (q, k, v, dout)), causal=causal)
        for a, e in zip(actual, expected, strict=True):
            if e.abs().max() > 1e-12:  # one token alone has no gradient but that of its value
                assert_matches(a[:, :, rows], e)


@pytest.mark.parametrize(
    "kernel", [k for k in KERNELS if k.forward_packed and k not in ON_CPU], ids=lambda kernel: kernel.name
)
def test_kernel_of_packed_segments_is_called_as_its_operator_wants_it(kernel):
    """Shapes and dtypes only, without a device."""
    packed = segments_of((20, 5, 15), (20, 1, 3), torch.device("meta"))
    q = torch.empty(1, 4, 40, 16, device="meta", dtype=torch.bfloat16)
    k, v = (torch.empty(1, 2, 24, 16, device="meta", dtype=torch.bfloat16) for _ in range(2))
    out, lse = kernel.forward_packed(q, k, v, packed, True, 0.5)
    grads = kernel.backward_packed(q, q, k, v, out, lse, packed, True, 0.5)
    assert (out.shape, out.dtype) == (q.shape, q.dtype)
    assert (lse.shape, lse.dtype) == (q.shape[:3], torch.float32)
    assert [(x.shape, x.dtype) for x in grads] == [(x.shape, x.dtype) for x in (q, k, v)]


def block_of(start: int, length: int, keys: int, shape: Shape) -> Block:
    return Block(start, start + length, 100 - keys, 100, shape)


def test_launches_put_triangles_together_and_rectangles_whose_rows_are_apart():
    lower = tuple(Block(at, at + 4, at, at + 4, Shape.LOWER) for at in (0, 4, 8))
    first, above, same_rows = (block_of(at, 4, 10, Shape.FULL) for at in (0, 4, 0))
    long = block_of(8, 4, 17, Shape.FULL)
    found = [launch.blocks for launch in plan_launches((*lower, first, above, same_rows, long), packs=True)]
    assert found[0] == lower
    assert (long,) in found
    assert sorted(map(len, found)) == [1, 1, 2, 3]
    alone = plan_launches((*lower, first), packs=False)
    assert [launch.blocks for launch in alone] == [(block,) for block in (*lower, first)]


@pytest.mark.parametrize("shape", list(Shape), ids=lambda shape: shape.value)
def test_launches_of_several_blocks_equal_each_block_by_itself(shape):
    generator = torch.Generator().manual_seed(1)
    q, k, v, dout = (torch.randn(1, 2, 20, 8, generator=generator, dtype=torch.float64) for _ in range(4))
    launch = Launch(shape, (Block(1, 6, 3, 8, shape), Block(9, 11, 0, 2, shape), Block(11, 18, 13, 20, shape)))
    parts = take(q, launch.rows), take(k, launch.columns), take(v, launch.columns)
    out, lse = forward_launch(REFERENCE, *parts, launch, SCALE)
    douts = take(dout, launch.rows)
    grads = backward_launch(REFERENCE, douts, *parts, out, lse, launch, SCALE)
    begin = 0
    for (start, stop), (first, last) in zip(launch.rows, launch.columns, strict=True):
        here = slice(begin, begin + stop - start)
        tensors = q[:, :, start:stop], k[:, :, first:last], v[:, :, first:last]
        expected_out, expected_lse = forward_block(REFERENCE, *tensors, shape, SCALE)
        final = expected_out, expected_lse
        expected = backward_block(REFERENCE, dout[:, :, start:stop], *tensors, *final, shape, SCALE)
        for a, e in zip((out, lse, *grads), (*final, *expected), strict=True):
            assert_matches(a[:, :, here], e)
        begin += stop - start


RANGES = {
    "one": ((5, 11),),
    "neighbours": ((2, 4), (4, 9), (9, 10)),
    "few": ((1, 3), (6, 8), (17, 21)),
    "many": ((0, 2), (3, 4), (6, 8), (8, 9), (11, 12), (15, 19), (22, 23)),
}


@pytest.mark.parametrize("by_token", [False, True])
@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("name", RANGES)
def test_launches_write_and_add_where_they_took(name, heads, by_token):
    """Whether ranges are copied one by one or by an index, in either memory order."""

    def stored(x: torch.Tensor) -> torch.Tensor:
        return x.transpose(1, 2).contiguous().transpose(1, 2) if by_token else x

    generator, ranges = torch.Generator().manual_seed(0), RANGES[name]
    x = stored(torch.randn(2, heads, 24, 4, generator=generator, dtype=torch.float64))
    index = torch.cat([torch.arange(*each) for each in ranges])
    assert torch.equal(take(x, ranges), x[:, :, index])

    values = stored(torch.randn(2, heads, len(index), 4, generator=generator, dtype=torch.float64))
    written = x.clone()
    put(written, ranges, values)
    expected = x.clone()
    expected[:, :, index] = values
    assert torch.equal(written, expected)

    again = ((ranges[0][0], ranges[0][0] + 1), *ranges)  # the first token twice
    accumulate(written, again, torch.cat([values[:, :, :1], values], 2))
    expected[:, :, index] += values
    expected[:, :, index[:1]] += values[:, :, :1]
    assert_matches(written, expected)


def test_launches_send_an_index_once_for_each_stream_that_uses_it(monkeypatch):
    streams, sent = iter((1, 2, 1, 2, 2, 1)), []
    monkeypatch.setattr(sending, "current_stream", lambda device: next(streams))
    monkeypatch.setattr(launches, "send", lambda x, device: sent.append(x) or x)
    launches._index.cache_clear()
    x = torch.zeros(1, 1, 30, 1)
    for work in (take, put, accumulate) * 2:
        values = () if work is take else (torch.ones(1, 1, 12, 1),)
        work(x, RANGES["many"], *values)
    assert len(sent) == 2
    launches._index.cache_clear()


def test_launches_send_offsets_once_for_each_stream_that_uses_them(monkeypatch):
    streams, sent, used = iter((1, 2, 1, 2)), [], []
    monkeypatch.setattr(sending, "current_stream", lambda device: next(streams))
    monkeypatch.setattr(launches, "send", lambda x, device: sent.append(x) or x)
    launches.segments.cache_clear()

    def forward(q, k, v, packed, causal, scale):
        used.append(packed)
        return q, q[..., 0]

    def backward(dout, q, k, v, out, lse, packed, causal, scale):
        used.append(packed)
        return q, k, v

    kernel = replace(REFERENCE, forward_packed=forward, backward_packed=backward)
    blocks = (Block(0, 2, 0, 2, Shape.LOWER), Block(2, 5, 2, 5, Shape.LOWER))
    x, lse, launch = torch.zeros(1, 1, 5, 4), torch.zeros(1, 1, 5), Launch(Shape.LOWER, blocks)
    for _ in range(2):
        forward_launch(kernel, x, x, x, launch, SCALE)
        backward_launch(kernel, x, x, x, x, x, lse, launch, SCALE)
    assert len(sent) == 4 and used[0] is used[2] and used[1] is used[3] and used[0] is not used[1]
    launches.segments.cache_clear()


def test_launches_take_neighbouring_ranges_as_a_view():
    x = torch.zeros(1, 1, 10, 1)
    assert take(x, ((1, 3), (3, 4))).data_ptr() == x[:, :, 1:].data_ptr()
