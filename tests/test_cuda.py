"""On a CUDA device: every kernel of it, attention of many ranks in stream order, and training.

Ranks use a device each where there are enough (NCCL), else they share one (tests/staged_group.py).
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import staged_group
import test_attention
import test_packed
import torch
import torch.distributed as dist
from runs import small_settings, train, write_text
from test_kernels import dense, random_block
from torch.distributed.device_mesh import init_device_mesh

from cptrain.context_parallel import ContextParallel, groups
from cptrain.context_parallel.kernels import (
    KERNELS,
    REFERENCE,
    Kernel,
    backward_block,
    backward_launch,
    forward_block,
    forward_launch,
)
from cptrain.context_parallel.launches import Launch, take
from cptrain.context_parallel.merging import merge, merge_in_torch
from cptrain.context_parallel.packed_batch import COMPARED
from cptrain.context_parallel.schedule import Block, Shape
from cptrain.distributed import transport
from cptrain.distributed.side_stream import MOST_BEHIND, SideStream

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SCALE = 0.15
# Norm of the error over that of the exact result.
LIMITS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
CASES = [
    (kernel, dtype)
    for kernel in KERNELS
    if "cuda" in kernel.devices and not kernel.implementation
    for dtype in sorted(kernel.dtypes, key=str)
]


def name_of(value: Any) -> str:
    """Of a parameter, the same in every process."""
    return value.name if isinstance(value, Kernel) else str(value).removeprefix("torch.")


every_case = pytest.mark.parametrize(("kernel", "dtype"), CASES, ids=name_of)
# (causal, query length, key length, query heads, kv heads): on and off the edges of tiles
SHAPES = {
    "causal": (True, 256, 256, 4, 4),
    "causal, odd": (True, 333, 333, 4, 4),
    "causal gqa": (True, 130, 130, 8, 2),
    "full": (False, 256, 256, 4, 4),
    "full mqa, odd": (False, 77, 77, 4, 1),
    "few queries": (False, 5, 333, 8, 2),
    "few keys": (False, 333, 5, 8, 2),
    "one token": (True, 1, 1, 4, 2),
}


def tensors(shape: str, dtype: torch.dtype, *, dim: int = 64) -> tuple[torch.Tensor, ...]:
    """q, k, v and the gradient of the output, stored tokens first as projections do."""
    block = random_block(*SHAPES[shape][1:], dim=dim)
    return tuple(x.to("cuda", dtype).transpose(1, 2).contiguous().transpose(1, 2) for x in block)


def assert_near(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype, what: str, *, times: float = 1):
    """Relative to the norm, within what the dtype allows; of a result of 0 (one token alone) to numbers of 0.1."""
    assert actual.shape == expected.shape, what
    assert actual.isfinite().all(), what
    error, signal = (actual.double() - expected.double()).norm(), expected.double().norm()
    size = expected.numel() ** 0.5
    limit = LIMITS[dtype] * times * (signal.item() if signal > 1e-6 * size else 0.1 * size)
    assert error <= limit, f"{what}: error {error:.2e}, allowed {limit:.2e}, signal {signal:.2e}"


def dense_on_device(*inputs: torch.Tensor, causal: bool) -> list[torch.Tensor]:
    return [x.cuda() for x in dense(*(x.cpu() for x in inputs), causal=causal, scale=SCALE)]


@pytest.mark.parametrize("shape", SHAPES)
@every_case
def test_cuda_kernel_equals_the_dense_formula(kernel, dtype, shape):
    q, k, v, dout = tensors(shape, dtype)
    causal = SHAPES[shape][0]
    out, lse = kernel.forward(q, k, v, causal, SCALE)
    grads = kernel.backward(dout, q, k, v, out, lse, causal, SCALE)
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert all(x.dtype == dtype for x in (out, *grads))
    expected = dense_on_device(q, k, v, dout, causal=causal)
    for name, a, e in zip(("out", "lse", "dq", "dk", "dv"), (out, lse, *grads), expected, strict=True):
        assert_near(a, e, dtype, name)


WIDTHS = [(16, 16), (80, 80), (128, 128), (256, 256), (128, 64), (64, 128), (192, 128)]


@pytest.mark.parametrize(
    ("kernel", "dtype", "dims"),
    [(kernel, dtype, dims) for kernel, dtype in CASES for dims in WIDTHS if kernel.fits(*dims)],
    ids=name_of,
)
def test_cuda_kernel_takes_every_width_that_it_is_said_to(kernel, dtype, dims):
    q, k, _, _ = tensors("causal gqa", dtype, dim=dims[0])
    _, _, v, dout = tensors("causal gqa", dtype, dim=dims[1])
    out, lse = kernel.forward(q, k, v, True, SCALE)
    grads = kernel.backward(dout, q, k, v, out, lse, True, SCALE)
    for a, e in zip((out, lse, *grads), dense_on_device(q, k, v, dout, causal=True), strict=True):
        assert_near(a, e, dtype, f"widths {dims}")


@every_case
def test_cuda_kernel_takes_tensors_of_any_strides(kernel, dtype):
    """Heads first, last dims of a stride other than 1, slices of longer tensors, and the gradient of a sum."""
    q, k, v, _ = tensors("causal gqa", dtype)
    ones = torch.ones((), device="cuda", dtype=dtype).expand(q.shape)
    expected = dense_on_device(q, k, v, ones, causal=True)
    for form in (
        lambda x: x.contiguous(),
        lambda x: x.mT.contiguous().mT,
        lambda x: torch.cat([x, x], 2)[:, :, : x.size(2)],
        lambda x: torch.cat([x, x], 2)[:, :, x.size(2) :],
    ):
        inputs = [form(x) for x in (q, k, v)]
        out, lse = kernel.forward(*inputs, True, SCALE)
        grads = kernel.backward(ones, *inputs, form(out), form(lse[..., None])[..., 0], True, SCALE)
        for a, e in zip((out, lse, *grads), expected, strict=True):
            assert_near(a, e, dtype, "strided")


@every_case
def test_cuda_kernel_gradients_of_blocks_add_up_given_the_final_out_and_lse(kernel, dtype):
    """333 queries behind 267 keys that all of them see: two full blocks, then the causal one."""
    q, own_k, own_v, dout = tensors("causal, odd", dtype)
    earlier = [torch.randn_like(own_k[:, :, :267]) for _ in range(2)]
    k, v = torch.cat([earlier[0], own_k], 2), torch.cat([earlier[1], own_v], 2)
    wide = [x.double() for x in (q, k, v)]
    leaves = [x.requires_grad_() for x in wide]
    scores = (leaves[0] @ leaves[1].mT) * SCALE
    hidden = torch.arange(600, device="cuda") > torch.arange(333, device="cuda")[:, None] + 267
    exact = scores.masked_fill(hidden, -math.inf).softmax(-1) @ leaves[2]
    expected = torch.autograd.grad(exact, leaves, dout.double())

    cuts = [(0, 64), (64, 267), (267, 600)]
    out = torch.zeros(q.shape, device="cuda", dtype=torch.promote_types(dtype, torch.float32))
    lse = torch.full(q.shape[:3], -math.inf, device="cuda", dtype=out.dtype)
    for start, stop in cuts:
        merge(out, lse, *kernel.forward(q, k[:, :, start:stop], v[:, :, start:stop], start == 267, SCALE))
    assert_near(out, exact.detach(), dtype, "out")
    final = out.to(dtype)
    grads = [kernel.backward(dout, q, k[:, :, i:j], v[:, :, i:j], final, lse, i == 267, SCALE) for i, j in cuts]
    assert_near(sum(dq.double() for dq, _, _ in grads), expected[0], dtype, "dq", times=2)
    assert_near(torch.cat([dk for _, dk, _ in grads], 2), expected[1], dtype, "dk", times=2)
    assert_near(torch.cat([dv for _, _, dv in grads], 2), expected[2], dtype, "dv", times=2)


@every_case
def test_cuda_kernel_computes_upper_triangles(kernel, dtype):
    q, k, v, dout = tensors("causal, odd", dtype)
    out, lse = forward_block(kernel, q, k, v, Shape.UPPER, SCALE)
    grads = backward_block(kernel, dout, q, k, v, out, lse, Shape.UPPER, SCALE)
    expected = dense_on_device(*(x.flip(2) for x in (q, k, v, dout)), causal=True)
    for a, e in zip((out, lse, *grads), expected, strict=True):
        assert_near(a, e.flip(2), dtype, "upper")


@pytest.mark.parametrize("shape", list(Shape), ids=lambda shape: shape.value)
@pytest.mark.parametrize("kv_heads", [1, 2, 8])
@pytest.mark.parametrize(("kernel", "dtype"), [case for case in CASES if case[0].forward_packed], ids=name_of)
def test_cuda_kernel_of_packed_segments_equals_each_block_by_itself(kernel, dtype, kv_heads, shape):
    generator = torch.Generator().manual_seed(1)
    q, k, v, dout = (
        torch.randn(1, 700, count, 64, generator=generator).to("cuda", dtype).transpose(1, 2)
        for count in (8, kv_heads, kv_heads, 8)
    )
    ranges = ((1, 6), (9, 11), (11, 140), (150, 151), (300, 700))
    launch = Launch(shape, tuple(Block(i, j, 700 - j, 700 - i, shape) for i, j in ranges))
    parts = take(q, launch.rows), take(k, launch.columns), take(v, launch.columns)
    out, lse = forward_launch(kernel, *parts, launch, SCALE)
    grads = backward_launch(kernel, take(dout, launch.rows), *parts, out, lse, launch, SCALE)
    begin = 0
    for block in launch.blocks:
        here = slice(begin, begin + block.q_stop - block.q_start)
        rows, columns = slice(block.q_start, block.q_stop), slice(block.k_start, block.k_stop)
        inputs = [x.double() for x in (q[:, :, rows], k[:, :, columns], v[:, :, columns])]
        final = forward_block(REFERENCE, *inputs, shape, SCALE)
        expected = (*final, *backward_block(REFERENCE, dout[:, :, rows].double(), *inputs, *final, shape, SCALE))
        for name, a, e in zip(("out", "lse", "dq", "dk", "dv"), (out, lse, *grads), expected, strict=True):
            assert_near(a[:, :, here], e, dtype, f"{name} of {block}", times=2)
        begin = here.stop


@pytest.mark.parametrize("dim", [16, 80, 128])
@pytest.mark.parametrize(("wide", "dtype"), [(torch.float32, torch.bfloat16), (torch.float64, torch.float64)], ids=str)
def test_cuda_merge_in_one_pass_is_the_same_as_in_torch(wide, dtype, dim):
    """In either memory order, in part of the rows, with rows that nobody has seen and log-sum-exps far apart."""
    pytest.importorskip("triton")
    from cptrain.context_parallel.merging_triton import merge_in_one_pass

    generator = torch.Generator("cuda").manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device="cuda", dtype=torch.float64)

    limit = 1e-5 if wide == torch.float32 else 1e-12
    for rows in (slice(0, 100), slice(37, 100), slice(5, 6)):
        out, block = random(2, 100, 3, dim).to(wide).transpose(1, 2), random(2, 3, 100, dim).to(dtype)
        lse, block_lse = random(2, 3, 100).to(wide) * 50, random(2, 100, 3).to(wide).transpose(1, 2) * 50
        lse[:, :, 40:60], block_lse[:, :, 50:70] = -math.inf, -math.inf
        expected = out.clone(), lse.clone()
        parts = block[:, :, rows], block_lse[:, :, rows]
        merge_in_torch(expected[0][:, :, rows], expected[1][:, :, rows], *parts)
        merge_in_one_pass(out[:, :, rows], lse[:, :, rows], *parts)
        for actual, right in zip((out, lse), expected, strict=True):
            torch.testing.assert_close(actual, right, rtol=limit, atol=limit)


def test_cuda_merge_is_done_in_one_pass(monkeypatch):
    from cptrain.context_parallel import merging
    from cptrain.context_parallel.merging_triton import merge_in_one_pass

    assert merging._one_pass() is merge_in_one_pass
    monkeypatch.setattr(merging, "merge_in_torch", None)
    row = torch.zeros(1, 1, 3, 16, device="cuda")
    lse = torch.full((1, 1, 3), -math.inf, device="cuda")
    merge(row, lse, torch.ones_like(row), torch.zeros_like(lse))
    assert row.eq(1).all() and lse.eq(0).all()


def test_cuda_side_stream_holds_what_it_reads_and_no_more():
    size, rounds = 1 << 22, 24
    side = SideStream(torch.device("cuda"))
    total = torch.zeros(size, device="cuda")
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    for number in range(rounds):
        x = torch.full((size,), 1e6, device="cuda")
        torch.cuda._sleep(4_000_000)
        x.fill_(float(number))
        with side.after(x):  # which is not there yet, and is read late
            torch.cuda._sleep(2_000_000)
            total.add_(x)
        del x
        torch.full((size,), -1e6, device="cuda")  # takes the place of whatever is free
    side.join()
    assert torch.equal(total, torch.full_like(total, rounds * (rounds - 1) / 2))
    peak = torch.cuda.max_memory_allocated() - before
    assert peak <= (MOST_BEHIND + 2) * total.nbytes


@pytest.mark.parametrize(("bandwidth", "fast"), [(0, True), (50e9, False), (200e9, True)])
def test_cuda_links_are_measured(monkeypatch, bandwidth, fast):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "tools")
    from simulated_group import simulated_ranks

    device = torch.device("cuda")
    with simulated_ranks(1, 4, device, bandwidth=bandwidth):
        group = dist.new_group(list(range(4)))
        speed = transport.link_speed(group.group_name, device)
        assert (speed >= groups.FAST) == fast
        assert not bandwidth or 0.5 * bandwidth < speed < 1.1 * bandwidth
        assert transport.link_speed(group.group_name, torch.device("cpu")) == 0.0
        mesh = init_device_mesh("cuda", (4,), mesh_dim_names=("ring",))
        assert ContextParallel(mesh, ulysses=None)._groups.is_fast == fast


@pytest.mark.parametrize(
    ("ranks", "options"),
    [(1, {}), (4, {"ring": 4}), (4, {"ring": 4, "method": "all_gather"}), (4, {"ring": 2, "ulysses": 2})],
    ids=str,
)
def test_cuda_attention_over_a_new_batch_of_documents_never_makes_the_host_wait(monkeypatch, ranks, options):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "tools")
    from simulated_group import simulated_ranks

    length = 288 * ranks
    inputs = [x.bfloat16() for x in test_attention.problem(8, 4, length=length, batch=1, dim=64, device="cuda")]

    def run(name: str) -> None:
        batch = plan.pack(test_packed.ids_of((name,), length))
        q, k, v, dout = batch.shard(*inputs, dim=2)
        with batch:
            q, k, v = (x.requires_grad_() for x in (q, k, v))
            torch.autograd.grad(plan.attention(q, k, v, is_causal=True), (q, k, v), dout)

    with simulated_ranks(ranks // 2, ranks, torch.device("cuda")):
        plan = test_packed.make_plan(device="cuda", chunk_size=48, **options)
        for name in ("a", "b", "c")[:COMPARED]:  # ranks compare these, and kernels are called for the first time
            run(name)
        torch.cuda.set_sync_debug_mode("error")
        try:
            run("tokens")
            run("off chunk edges")
        finally:
            torch.cuda.set_sync_debug_mode("default")


def measured(rank: int, world: int, *, device: str) -> float:
    group = dist.new_group(list(range(world)))
    return transport.link_speed(group.group_name, torch.device(device))


def test_cuda_ranks_agree_on_the_speed_of_their_links(pool):
    (speed,) = set(on_device(pool, 4, measured))
    assert speed > 0


def on_device(pool, world: int, function: Any, *args: Any, **options: Any) -> list[Any]:
    """The function on so many ranks with CUDA tensors."""
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.device_count() >= world else staged_group.BACKEND
    return pool.run(world, function, *args, device="cuda", backend=backend, **options)


@pytest.mark.parametrize(
    ("world", "name"), [(world, name) for world, plans in test_attention.PLANS.items() for name in plans if world < 8]
)
def test_cuda_attention_equals_one_process_in_fp64(pool, world, name):
    on_device(pool, world, test_attention.check_every_case, test_attention.PLANS[world][name])


@pytest.mark.parametrize(
    ("world", "name", "at_once"), [(4, "ring", 2), (4, "double ring 2 x 2", 2), (4, "ring", 4), (8, "ring", 3)]
)
def test_cuda_attention_is_the_same_where_hops_are_computed_together(pool, world, name, at_once):
    options = test_attention.PLANS[world][name]
    on_device(pool, world, test_attention.check_hops_together, options, at_once, growth=at_once)


@pytest.mark.parametrize("kernel", ["cuda flash", "cudnn", "efficient"])
@pytest.mark.parametrize("name", ["ring", "ulysses", "hybrid", "all-gather", "double ring 2 x 2"])
def test_cuda_attention_in_bf16_is_within_twice_the_single_device_error(pool, name, kernel):
    options = test_attention.PLANS[4][name] | {"kernel": kernel}
    for what, ours, single in on_device(pool, 4, test_attention.bf16_errors, options, dim=64)[0]:
        assert single > 1e-4, f"{what}: the reference shows no bf16 error, so the test compares nothing"
        assert ours <= 2 * single, f"{what}: error {ours:.2e}, one device has {single:.2e}"


@pytest.mark.parametrize(
    ("world", "name"), [(world, name) for world, plans in test_packed.PLANS.items() for name in plans if world < 8]
)
def test_cuda_packed_attention_equals_one_process_in_fp64(pool, world, name):
    on_device(pool, world, test_packed.check_every_pack, test_packed.PLANS[world][name])


def packed_errors(rank: int, world: int, options: dict[str, Any], *, device: str) -> list[tuple[str, float, float]]:
    """(case, error, error of one device), relative to fp64, of single rows, whose blocks go in few calls."""
    plan, found = test_packed.make_plan(device=device, chunk_size=48, **options), []
    for name in test_packed.PACKS:
        length = 288 * world
        exact = test_attention.problem(8, 2, length=length, batch=1, dim=64, device=device)
        inputs = tuple(x.bfloat16() for x in exact)
        ids = test_packed.ids_of((name,), length)
        for window_size in (None, 50):
            expected = test_packed.single_process(*(x.double() for x in inputs), ids, window_size)
            single = test_packed.single_process(*inputs, ids, window_size)
            ours = test_packed.sharded(plan, *inputs, ids, window_size)
            for what, a, s, e in zip(("out", "dq", "dk", "dv"), ours, single, expected, strict=True):
                scale = max(float(e.norm()), 1e-3 * float(expected[0].norm()))
                errors = [float((x.double() - e).norm()) / scale for x in (a, s)]
                found.append((f"{what}, {name}, window {window_size}", *errors))
    return found


@pytest.mark.parametrize(
    ("world", "options"),
    [(1, {}), (4, {"ring": 4}), (4, {"ring": 4, "method": "all_gather"}), (4, {"ring": 2, "ulysses": 2})],
    ids=str,
)
def test_cuda_packed_attention_in_bf16_is_within_twice_the_single_device_error(pool, world, options):
    for what, ours, single in on_device(pool, world, packed_errors, options)[0]:
        assert ours <= 2 * single + 1e-3, f"{what}: error {ours:.2e}, one device has {single:.2e}"


def losses(rank: int, world: int, folder: str, text: str, sections: dict[str, Any], *, device: str) -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Set timeout is now only supported")  # by groups of torch's own
        outcome = train(small_settings(Path(folder), text, **sections), torch.device(device))
    return None if outcome is None else (outcome.losses, outcome.grad_norms)


@pytest.mark.parametrize(
    ("world", "parallelism"),
    [(1, {}), (4, {"ring_degree": 4}), (4, {"ring_degree": 2, "tensor_parallel_degree": 2})],
    ids=str,
)
def test_cuda_training_gives_the_losses_of_the_cpu(pool, tmp_path, world, parallelism):
    text, found = write_text(tmp_path), []
    for name, kinds in (("cpu", {}), ("cuda", {"parallelism": parallelism})):
        folder = tmp_path / name
        folder.mkdir()
        if name == "cpu":
            found.append(pool.run(1, losses, str(folder), text, kinds, device="cpu")[0])
        else:
            found.append(on_device(pool, world, losses, str(folder), text, kinds)[0])
    for cpu, cuda in zip(*found, strict=True):
        assert cuda == pytest.approx(cpu, abs=1e-9)


@pytest.mark.parametrize("more", [[], ["--compile.enable"]], ids=["eager", "compiled"])
def test_cuda_debug_preset_learns_in_bf16_and_goes_on(tmp_path, more):
    command = [sys.executable, "-m", "cptrain.train", "--config", "debug", "--parallelism.ring_degree", "1"]
    command += ["--job.dump_folder", str(tmp_path), "--checkpoint.interval", "20", "--validation.freq", "20", *more]
    for steps in ("20", "40"):
        done = subprocess.run([*command, "--training.steps", steps], timeout=300, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
    lines = (tmp_path / "debug" / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    steps = [record["step"] for record in records if record["kind"] == "train"]
    assert steps == sorted(set(steps)) and steps[-1] == 40
    held_out = [record["loss"] for record in records if record["kind"] == "validation"]
    assert held_out[-1] < 3.5 < held_out[0]
