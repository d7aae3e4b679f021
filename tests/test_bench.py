"""The bench tools run end to end at tiny sizes, and what they count is right. Nothing here looks at a time."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from unittest import mock

import pytest
import torch
from test_attention import problem
from torch.distributed.device_mesh import init_device_mesh

from cptrain.context_parallel import ContextParallel

ROOT = Path(__file__).resolve().parent.parent
CASE = ["--seq-lens", "32", "--heads", "4:2", "--dims", "8", "--rounds", "2", "--threads", "1", "--device", "cpu"]


@pytest.fixture(scope="module")
def tools() -> Iterator[ModuleType]:
    """bench_attention as a module, beside the others of its folder."""
    sys.path.insert(0, str(ROOT / "tools"))
    import bench_attention

    yield bench_attention
    sys.path.remove(str(ROOT / "tools"))


def run_tool(name: str, *arguments: str, folder: Path) -> str:
    """What a tool prints, run from another folder as a user would."""
    paths = [str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / name), *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def table(text: str) -> list[list[str]]:
    """The cells of every row of a Markdown table but its head."""
    rows = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in rows[2:]]


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """(what it printed, the folder it wrote) of bench_attention on two real ranks."""
    folder = tmp_path_factory.mktemp("bench")
    options = ["--methods", "ring,ulysses,all_gather,hybrid", "--masks", "causal,window:6", "--dtypes", "bf16"]
    return run_tool(
        "bench_attention.py", *CASE, *options, "--overlap", "on,off", folder=folder
    ), folder / "outputs/bench"


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


def test_bench_step_prints_a_table(tmp_path: Path) -> None:
    size = ["--layers", "1", "--dim", "16", "--heads", "2", "--vocab", "512", "--tokens", "32"]
    cases = "one,two_runs,in_step,torch_ring"
    text = run_tool(
        "bench_step.py", "--cases", cases, *size, "--rounds", "1", "--steps", "1", "--warmup", "0", folder=tmp_path
    )
    rows = {row[0]: row[1:] for row in table(text)}
    assert list(rows) == cases.split(",")
    seconds = {name: float(row[1]) for name, row in rows.items()}
    assert rows["one"][2:4] == ["1.000x", "-"]
    # Two runs at once do twice the work of one; what two ranks reach of that is their share.
    assert float(rows["two_runs"][2][:-1]) == pytest.approx(2 * seconds["one"] / seconds["two_runs"], rel=0.1)
    assert rows["two_runs"][3] == "100.0%"
    assert float(rows["in_step"][3][:-1]) == pytest.approx(100 * seconds["two_runs"] / seconds["in_step"], rel=0.1)
    assert float(rows["torch_ring"][3][:-1]) == pytest.approx(50 * seconds["two_runs"] / seconds["torch_ring"], rel=0.1)
    cpu_seconds = {name: float(row[4]) for name, row in rows.items()}
    assert rows["one"][5] == "1.000" and 0 < cpu_seconds["one"] < 1.5 * seconds["one"]
    assert float(rows["two_runs"][5]) == pytest.approx(cpu_seconds["two_runs"] / cpu_seconds["one"] / 2, rel=0.1)
    assert float(rows["torch_ring"][5]) == pytest.approx(cpu_seconds["torch_ring"] / cpu_seconds["one"], rel=0.1)


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
    sizes = {"layers": 2, "dim": 16, "heads": 2, "kv_heads": 0, "vocab": 512, "tokens": 32, "threads": 1}
    counts = {"warmup": 0, "steps": 1, "checkpointing": "none"}
    bench_step.run_case(Namespace(child="in_step", result=str(tmp_path / "0"), **sizes, **counts))
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

    sizes = {"layers": 1, "dim": 16, "heads": 2, "kv_heads": 0, "vocab": 512, "tokens": 32, "threads": 1}
    arguments = Namespace(child="cp2", warmup=0, steps=1, checkpointing="none", result="", **sizes)
    with mock.patch.object(bench_step, "Clock", Clock):
        return bench_step.time_trainer(arguments, folder)[1]


def test_bench_step_adds_the_cpu_seconds_of_all_ranks(pool, tmp_path: Path) -> None:
    assert pool.run(2, cpu_seconds_of_a_ring, tmp_path) == [3.0, 3.0]


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
