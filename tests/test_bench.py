"""The bench tools run at tiny sizes, and what they count is right. Nothing here looks at a time."""

from __future__ import annotations

import csv
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from itertools import chain
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import torch
from test_attention import problem
from torch.distributed.device_mesh import init_device_mesh

from cptrain.context_parallel import ContextParallel, compute, groups, hops
from cptrain.context_parallel.kernels import choose_kernel

ROOT = Path(__file__).resolve().parent.parent
CASE = ["--seq-lens", "32", "--heads", "4:2", "--dims", "8", "--rounds", "2", "--threads", "1", "--device", "cpu"]


@pytest.fixture(scope="module")
def tools() -> Iterator[ModuleType]:
    """bench_attention as a module, beside the others of its folder."""
    sys.path.insert(0, str(ROOT / "tools"))
    import bench_attention

    yield bench_attention
    sys.path.remove(str(ROOT / "tools"))


def table(text: str) -> list[list[str]]:
    """The cells of every row of a Markdown table but its head."""
    rows = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in rows[2:]]


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def rows_of(rank: int, world: int, argv: list[str]) -> list[list[Any]]:
    """What one rank measures of every job."""
    sys.path.insert(0, str(ROOT / "tools"))
    import bench_attention

    arguments = bench_attention.parse(argv)
    return [
        bench_attention.measured(
            arguments, job, bench_attention.variants(arguments, job, world), torch.device("cpu"), rank
        )
        for job in bench_attention.problems(arguments)
    ]


@pytest.fixture(scope="module")
def measured(tools: ModuleType, pool, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """(what it printed, the folder it wrote) of bench_attention on two ranks, which are those of the pool.

    `test_readme` runs it with processes of its own.
    """
    folder = tmp_path_factory.mktemp("bench")
    options = ["--methods", "ring,ulysses,all_gather,hybrid", "--masks", "causal,window:6", "--dtypes", "bf16"]
    argv = [*CASE, *options, "--overlap", "on,off", "--out", str(folder)]
    jobs = zip(*pool.run(2, rows_of, argv), strict=True)
    rows = [list(chain.from_iterable(of_ranks)) for of_ranks in jobs]
    with mock.patch.object(tools, "process_rows", return_value=rows), redirect_stdout(StringIO()) as printed:
        assert tools.main(argv) == 0
    return printed.getvalue(), folder


def test_bench_attention_sends_the_bytes_of_the_formulas(measured: tuple[str, Path]) -> None:
    rows = read(measured[1] / "attention.csv")
    assert {row["method"] for row in rows} == {"ring", "ulysses", "all_gather"}, "no hybrid of 2 ranks"
    assert len(rows) == 3 * 2 * 2 * 2  # methods x masks x overlap x passes
    assert all(row["sent_bytes"] == row["formula_bytes"] and int(row["sent_bytes"]) > 0 for row in rows)
    # A ring of two sends its 16 tokens once, and their gradients in fp32 back: 2 (k, v) x 2 heads x 8 x 16 elements.
    ring = {
        row["passes"]: int(row["sent_bytes"]) for row in rows if row["method"] == "ring" and row["mask"] == "causal"
    }
    assert ring == {"fwd": 512 * 2, "fwd+bwd": 512 * (2 + 4)}


def test_bench_attention_writes_table_csv_and_chart(measured: tuple[str, Path]) -> None:
    text, folder = measured
    rows = read(folder / "attention.csv")
    assert len(table(text)) == len(rows)
    for cells, row in zip(table(text), rows, strict=True):
        assert (cells[0], cells[2], cells[3]) == (row["seq_len"], row["dtype"], row["mask"])
        assert cells[9] == f"{100 * float(row['of_bound']):.1f} %"
        assert float(row["time_s"]) > float(row["exposed_s"]) > 0
        assert int(row["peak_bytes"]) > 0
    assert (folder / "attention.png").read_bytes().startswith(b"\x89PNG")


def test_bench_attention_simulates_a_rank_that_sends_what_a_real_one_does(
    tools: ModuleType, measured: tuple[str, Path], tmp_path: Path
) -> None:
    options = ["--simulate-ranks", "2", "--rank", "all", "--dtypes", "bf16", "--out", str(tmp_path)]
    assert tools.main([*CASE, *options]) == 0
    simulated, real = read(tmp_path / "attention.csv"), read(measured[1] / "attention.csv")
    keys = ("method", "passes", "mask", "overlap")
    expected = {tuple(row[key] for key in keys): row["sent_bytes"] for row in real}
    assert len(simulated) == 4
    for row in simulated:
        assert row["simulated"] == "True"
        assert row["sent_bytes"] == expected[tuple(row[key] for key in keys)]


@pytest.mark.parametrize(
    ("device", "method", "calls", "slowest"),
    [
        # In zigzag all ranks have as much work. Where hops are computed together, those in the middle need a call more.
        ("cuda", "ring", [2, 3, 3, 3, 3, 3, 3, 2], 6),
        ("cpu", "ring", [8] * 8, 7),
        ("cuda", "double_ring", [4, 5, 4, 4, 4, 5, 4, 4], 5),
        ("cuda", "ulysses", [1] * 8, 7),
    ],
)
def test_bench_attention_slowest_rank_is_that_with_most_calls_of_equal_work(
    tools: ModuleType, device: str, method: str, calls: list[int], slowest: int
) -> None:
    from attention_cases import Problem, Variant
    from kernel_calls import Place

    job = Problem(seq_len=65536, heads=32, kv_heads=8, dim=128, dtype="bf16", mask="causal")
    variant = Variant(method=method, ranks=8)
    place = Place(device=device, kernel=choose_kernel(device, torch.bfloat16), dtype=torch.bfloat16, heads_per_key=4)
    assert [variant.num_calls(job, rank, place) for rank in range(8)] == calls
    assert variant.slowest_rank(job, device) == slowest


@pytest.mark.parametrize("method", ["ring", "double_ring", "hybrid", "ulysses"])
@pytest.mark.parametrize("mask", ["causal", "window:20"])
def test_bench_attention_counts_the_kernel_calls_that_are_made(
    tools: ModuleType, monkeypatch: pytest.MonkeyPatch, method: str, mask: str
) -> None:
    from attention_cases import Problem, Variant
    from attention_clock import plan_runs
    from kernel_calls import Place
    from simulated_group import simulated_ranks

    monkeypatch.setattr(hops, "COPIES_ARE_DEAR", frozenset())  # as on CUDA
    monkeypatch.setattr(groups, "_link", lambda *_: "fast")
    made: list[object] = []
    launch = compute.forward_launch
    monkeypatch.setattr(compute, "forward_launch", lambda *given: made.append(given) or launch(*given))
    job = Problem(seq_len=256, heads=8, kv_heads=4, dim=8, dtype="fp32", mask=mask)
    variant = Variant(method=method, ranks=4)
    place = Place(device="cpu", kernel=choose_kernel("cpu", torch.float32), dtype=torch.float32, heads_per_key=2)
    for rank in range(4):
        with simulated_ranks(rank, 4, torch.device("cpu")):
            plan = variant.plan(job, torch.device("cpu"))
            made.clear()
            plan_runs(plan, job, job.tensors(64, torch.device("cpu")))["fwd"]()
        assert variant.num_calls(job, rank, place) == len(made) > 0


@pytest.mark.parametrize("rank", ["0", "slowest"])
def test_bench_attention_simulates_every_method(tools: ModuleType, tmp_path: Path, rank: str) -> None:
    methods = "ring,ulysses,hybrid,double_ring"
    options = ["--simulate-ranks", "4", "--rank", rank, "--methods", methods, "--bandwidth", "1"]
    assert tools.main([*CASE, *options, "--out", str(tmp_path)]) == 0
    assert {row["method"] for row in read(tmp_path / "attention.csv")} == set(methods.split(","))


def test_bench_attention_fails_when_bytes_contradict_the_formula(
    tools: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import attention_clock

    monkeypatch.setattr(attention_clock, "sent_bytes", lambda *_: {"fwd": 1024, "fwd+bwd": 1024})
    options = ["--simulate-ranks", "2", "--methods", "ring", "--passes", "fwd+bwd", "--out", str(tmp_path)]
    assert tools.main([*CASE, *options]) == 1
    assert "4.00 KiB, the formula says 1.00 KiB" in capsys.readouterr().out


def test_bench_attention_memory_of_a_ring_does_not_grow(tools: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--memory", "--ranks", "4,8,16", "--tokens-per-rank", "64", "--methods", "ring,ulysses"]
    assert tools.main([*CASE, *options]) == 0
    rows = {(row[3], row[4]): row[5:] for row in table(capsys.readouterr().out)}
    for which in ("fwd", "fwd+bwd"):
        assert len(rows["ring", which]) == 3
        assert len(set(rows["ring", which])) == 1
    # Heads of 4:2 are not enough for 8 ranks, and two kv heads are repeated for 4.
    assert rows["ulysses", "fwd"][1:] == ["-", "-"]


def test_bench_attention_without_matplotlib_says_what_to_install(
    tools: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "pip install 'cptrain[bench]'" in tools.write_chart([], tmp_path / "chart.png")
    assert not (tmp_path / "chart.png").exists()


def test_bench_simulated_link_copies_and_keeps_to_its_bandwidth(tools: ModuleType) -> None:
    from simulated_group import Link

    link = Link(torch.device("cpu"), bandwidth=1e6)
    there = torch.zeros(5)
    first = link.carry([(there, torch.tensor([1.0, 2.0]))], 20_000)
    second = link.carry([(there[:1], None)], 20_000)
    assert there.tolist() == [0, 2, 0, 0, 0]
    assert second._due - first._due >= 0.02 - 1e-9  # one after another: 20,000 bytes at 1 MB/s


SIZES = {"layers": 1, "dim": 16, "heads": 2, "kv_heads": 0, "vocab": 512, "tokens": 32, "threads": 1}
COUNTS = {"warmup": 0, "steps": 1, "checkpointing": "none"}


def step_table(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *options: str
) -> dict[str, list[str]]:
    """The cells of the table that bench_step prints, by case."""
    import bench_step

    monkeypatch.setattr(sys, "argv", ["bench_step.py", *options])
    bench_step.main()
    return {row[0]: row[1:] for row in table(capsys.readouterr().out)}


def test_bench_step_prints_a_table(
    tools: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import bench_step

    # Seconds and CPU seconds of a step in the first of three rounds, each half as fast as the one before.
    found = {
        "bare": (9.0, 6.0),
        "one": (6.0, 5.0),
        "two_runs": (8.0, 11.0),
        "in_step": (10.0, 12.5),
        "torch_ring": (4.8, 7.5),
        "torchtitan_one": (8.0, 8.0),
        "torchtitan_cp2": (5.0, 10.0),
    }
    slower = iter([1] * 7 + [2] * 7 + [4] * 7)

    def measure(_: Namespace, name: str) -> tuple[float, float]:
        times = next(slower)
        return times * found[name][0], times * found[name][1]

    monkeypatch.setattr(bench_step, "measure", measure)
    monkeypatch.setattr(bench_step, "missing", list)
    rows = step_table(monkeypatch, capsys, "--cases", ",".join(found), "--rounds", "3")
    # Two runs at once do twice the work of one; of that two ranks reach a share. A peer has one rank of its own.
    assert rows == {
        "bare": ["1", "18.000", "0.667x", "1.000x", "-", "12.000", "1.200"],
        "one": ["1", "12.000", "1.000x", "1.500x", "-", "10.000", "1.000"],
        "two_runs": ["2", "16.000", "1.500x", "2.250x", "100.0%", "22.000", "1.100"],
        "in_step": ["2", "20.000", "1.200x", "1.800x", "80.0%", "25.000", "1.250"],
        "torch_ring": ["2", "9.600", "1.250x", "1.875x", "83.3%", "15.000", "1.500"],
        "torchtitan_one": ["1", "16.000", "1.000x", "1.125x", "-", "16.000", "1.000"],
        "torchtitan_cp2": ["2", "10.000", "1.600x", "1.800x", "80.0%", "20.000", "1.250"],
    }


def test_bench_step_runs_two_processes_in_step(
    tools: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import bench_step

    answers: list[list[float]] = []
    read = bench_step.json.loads
    monkeypatch.setattr(bench_step.json, "loads", lambda text: answers.append(read(text)) or answers[-1])
    options = [f"--{name.replace('_', '-')}={value}" for name, value in {**SIZES, **COUNTS}.items()]
    rows = step_table(monkeypatch, capsys, "--cases=in_step", "--rounds=1", *options)
    (first_s, first_cpu_s), (second_s, second_cpu_s) = answers
    assert min(first_s, first_cpu_s, second_s, second_cpu_s) > 0
    assert rows["in_step"][1] == f"{(first_s + second_s) / 2:.3f}", "the mean of both"
    assert rows["in_step"][5] == f"{first_cpu_s + second_cpu_s:.3f}", "of both"


def test_bench_step_leaves_no_run_waiting_for_one_that_failed(tools: ModuleType) -> None:
    import bench_step

    codes = ("import time; time.sleep(60)", "raise SystemExit(3)")
    start = time.monotonic()
    assert not bench_step.all_succeed([subprocess.Popen([sys.executable, "-c", code]) for code in codes])
    assert time.monotonic() - start < 30
    assert bench_step.all_succeed([subprocess.Popen([sys.executable, "-c", "pass"]) for _ in codes])


def test_bench_step_refuses_unknown_cases_by_name(
    tools: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        step_table(monkeypatch, capsys, "--cases", "one,cp3,tp")
    assert "--cases: cp3, tp is not one of bare, one, two_runs" in capsys.readouterr().err


def test_bench_step_refuses_a_peer_that_is_not_installed(
    tools: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import bench_step
    import torchtitan_step

    monkeypatch.setattr(torchtitan_step, "NEEDED", ("torch", "no_such_package"))
    monkeypatch.setattr(bench_step, "measure", lambda *_: (1.0, 1.0))
    with pytest.raises(SystemExit):
        step_table(monkeypatch, capsys, "--cases", "one,torchtitan_cp2")
    assert "torchtitan_* needs no_such_package: see tools/torchtitan_step.py" in capsys.readouterr().err
    assert step_table(monkeypatch, capsys, "--cases", "one")["one"][1] == "1.000"


def ring_of_torch(rank: int, world: int) -> tuple[list[torch.Tensor], int]:
    """Output and gradients of causal attention by torch's ring around the CPU's kernel, and its all-to-alls."""
    sys.path.insert(0, str(ROOT / "tools"))
    import torch.distributed.tensor.experimental._context_parallel._attention as ring
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor
    from torchtitan_step import cpu_kernel_in_torch_ring

    stock, rules = dict(ring.custom_ops), dict(DTensor._op_dispatcher.sharding_propagator.op_strategy_funcs)
    cpu_kernel_in_torch_ring()
    ring._enable_cp_dtensor_dispatcher()
    try:
        mesh = init_device_mesh("cpu", (world,))
        tensors = [x.chunk(2 * world, dim=2) for x in ring_problem(world)]
        order = [chunk for r in range(world) for chunk in (r, 2 * world - 1 - r)]
        q, k, v, grad = (
            distribute_tensor(torch.cat([x[chunk] for chunk in order], 2), mesh, [Shard(2)]) for x in tensors
        )
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiled:
            out = torch.nn.functional.scaled_dot_product_attention(*leaves, is_causal=True)
            out.backward(grad)
        found = [x.full_tensor().chunk(2 * world, dim=2) for x in (out.detach(), *(leaf.grad for leaf in leaves))]
        sent = sum(event.name == "_c10d_functional::all_to_all_single" for event in profiled.events())
        return [torch.cat([x[order.index(chunk)] for chunk in range(2 * world)], 2) for x in found], sent
    finally:
        ring._disable_cp_dtensor_dispatcher()
        ring.custom_ops = stock
        DTensor._op_dispatcher.sharding_propagator.op_strategy_funcs.clear()
        DTensor._op_dispatcher.sharding_propagator.op_strategy_funcs.update(rules)


def ring_problem(world: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, 2, 8 * world, 8, dtype=torch.float64, generator=generator) for _ in range(4)]


def test_ring_of_torch_that_the_step_is_compared_with_is_exact(pool) -> None:
    q, k, v, grad = ring_problem(2)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = torch.nn.functional.scaled_dot_product_attention(*leaves, is_causal=True)
    out.backward(grad)
    for found, messages in pool.run(2, ring_of_torch):
        for ours, expected in zip(found, (out, *(leaf.grad for leaf in leaves)), strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)  # it merges in fp32
        assert messages > 0, "a ring sends"


def test_bench_step_counts_cpu_seconds_of_work_alone(tools: ModuleType) -> None:
    from bench_step import Clock

    clock = Clock(1)
    for _ in range(2):
        with clock.step():
            time.sleep(0.5)
    assert len(clock.seconds) == len(clock.cpu_seconds) == 1
    assert clock.seconds[0] >= 0.5 > 2 * clock.cpu_seconds[0]


def seconds_at_blocks(rank: int, world: int, folder: Path) -> tuple[float, float]:
    """How long forward and backward take, to each of which the second rank comes a second late."""
    sys.path.insert(0, str(ROOT / "tools"))
    from bench_step import meet_at_blocks

    model = torch.nn.Module()
    model.layers = torch.nn.ModuleList([torch.nn.Linear(2, 2)])
    meet_at_blocks(model, folder / str(rank))
    start = time.perf_counter()
    time.sleep(rank)
    loss = model.layers[0](torch.ones(2, requires_grad=True)).sum()
    between = time.perf_counter()
    time.sleep(rank)
    loss.backward()
    return between - start, time.perf_counter() - between


def test_bench_step_in_step_waits_for_the_other_run_at_each_block(pool, tmp_path: Path) -> None:
    (forward_s, backward_s), _ = pool.run(2, seconds_at_blocks, tmp_path)
    assert forward_s > 0.9 and backward_s > 0.9


def test_bench_step_in_step_meets_in_the_model_that_trains(
    tmp_path: Path, tools: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    import bench_step

    met: list[int] = []
    monkeypatch.setattr(bench_step, "meet_at_blocks", lambda model, result: met.append(len(model.layers)))
    sizes = {**SIZES, "layers": 2}
    bench_step.run_case(Namespace(child="in_step", result=str(tmp_path / "0"), **sizes, **COUNTS))
    assert met == [2]


def cpu_seconds_of_a_ring(rank: int, world: int, folder: Path) -> float:
    """What time_trainer says of two ranks that compute for one and for two seconds."""
    sys.path.insert(0, str(ROOT / "tools"))
    import bench_step

    class Clock(bench_step.Clock):
        @contextmanager
        def step(self):
            yield
            self.seconds.append(2.0)
            self.cpu_seconds.append(rank + 1.0)

    arguments = Namespace(child="cp2", result="", **SIZES, **COUNTS)
    with mock.patch.object(bench_step, "Clock", Clock):
        return bench_step.time_trainer(arguments, folder)[1]


def test_bench_step_adds_the_cpu_seconds_of_all_ranks(pool, tmp_path: Path) -> None:
    assert pool.run(2, cpu_seconds_of_a_ring, tmp_path) == [3.0, 3.0]


def step_of_torch_ring(rank: int, world: int, folder: Path) -> tuple[float, int]:
    """Seconds of a step of that case, and how often torch's ring was called in it."""
    sys.path.insert(0, str(ROOT / "tools"))
    import bench_step
    import torch.distributed.tensor.experimental._context_parallel._attention as theirs

    ring = theirs._templated_ring_attention
    with mock.patch.object(theirs, "_templated_ring_attention", side_effect=ring) as called:
        seconds, _ = bench_step.time_trainer(Namespace(child="torch_ring", result="", **SIZES, **COUNTS), folder)
    return seconds, called.call_count


def test_bench_step_trains_with_the_ring_of_torch(pool, tmp_path: Path) -> None:
    for seconds, calls in pool.run(2, step_of_torch_ring, tmp_path):
        assert seconds > 0 and calls == SIZES["layers"]


class Attention(torch.nn.Module):
    """Calls the attention of torch, as a model's attention does."""

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)


def torch_ring(rank: int, world: int) -> None:
    """The ring that bench_step measures beside ours computes the same."""
    sys.path.insert(0, str(ROOT / "tools"))
    from bench_step import use_torch_ring

    plan = ContextParallel(init_device_mesh("cpu", (world,), mesh_dim_names=("ring",)), ulysses=None)
    inputs = plan.shard(*(x.float() for x in problem(4, 4, length=32)), dim=2)
    model = torch.nn.ModuleDict({"attention": Attention(), "other": torch.nn.Module()})
    model = torch.nn.ModuleDict({"layer": model})
    results = []
    for prepare in (lambda: plan.apply(model, modules="*.attention"), lambda: use_torch_ring(model, plan)):
        prepare()
        q, k, v = (x.clone().requires_grad_() for x in inputs[:3])
        out = model["layer"]["attention"](q, k, v)
        results.append((out, *torch.autograd.grad(out, (q, k, v), inputs[3])))
    ours, theirs = results
    assert type(theirs[0].grad_fn).__name__ == "TorchRingBackward" != type(ours[0].grad_fn).__name__
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_bench_step_compares_with_a_ring_that_computes_the_same(pool) -> None:
    pool.run(2, torch_ring)
