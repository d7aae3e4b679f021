"""bench_documents runs at tiny sizes, and what it counts is right. Nothing here looks at a time."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from io import StringIO
from itertools import chain
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import torch
from test_attention import problem
from test_bench import ROOT, read, table
from test_packed import single_process
from tolerance import assert_matches

from cptrain.context_parallel import ContextParallel, compute, groups, hops
from cptrain.context_parallel.mask import Mask
from cptrain.context_parallel.schedule import blocks

LENGTHS = (700, 3, 40, 901, 17, 1, 386)  # 2048 tokens; on 4 ranks some do not fill 8 pieces
TINY = ["--time", "--sets", "lognormal", "--heads", "4:2", "--dim", "8", "--packs", "3", "--rounds", "2"]


@pytest.fixture(scope="module")
def tools() -> Iterator[ModuleType]:
    """bench_documents as a module, beside the others of its folder."""
    sys.path.insert(0, str(ROOT / "tools"))
    import bench_documents

    yield bench_documents
    sys.path.remove(str(ROOT / "tools"))


@pytest.fixture(scope="module")
def planned(tools: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """(what --plan printed, the folder it wrote)."""
    folder = tmp_path_factory.mktemp("plan")
    options = ["--plan", "--sets", "lognormal", "--packs", "3", "--sizes", "16384:4,32768:8", "--out", str(folder)]
    return printed(tools, options), folder


def times_of(rank: int, world: int, argv: list[str]) -> list[list[Any]]:
    """What one rank measures of every case."""
    sys.path.insert(0, str(ROOT / "tools"))
    import bench_documents
    from documents_clock import measure

    return [measure(case, rank) for case in bench_documents.cases_of(bench_documents.parse(argv), world)]


@pytest.fixture(scope="module")
def timed(tools: ModuleType, pool, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """(what --time printed, the folder it wrote) of ranks of the pool; `test_readme` starts its own."""
    folder = tmp_path_factory.mktemp("time")
    options = [*TINY, "--seq-lens", "768", "--ranks", "3", "--out", str(folder / "found")]
    cases = [list(chain.from_iterable(case)) for case in zip(*pool.run(3, times_of, options), strict=True)]
    with mock.patch.object(tools, "case_times", return_value=cases):
        return printed(tools, options), folder / "found"


def printed(tools: ModuleType, options: list[str]) -> str:
    with redirect_stdout(StringIO()) as out:
        assert tools.main(options) == 0
    return out.getvalue()


def columns(text: str) -> list[str]:
    head = next(line for line in text.splitlines() if line.startswith("|"))
    return [cell.strip() for cell in head.strip("|").split("|")]


def test_bench_documents_plan_prints_every_layout_of_every_size(planned: tuple[str, Path]) -> None:
    text, _ = planned
    names = columns(text)
    assert names[3:5] == ["layout", "imbalance, median"] and "moved, mean" in names
    assert {"kernel calls per rank and layer", "planning ms, median", "schedule ms, median"} <= set(names)
    rows = table(text)
    layouts = ["contiguous", "zigzag", "per-document zigzag", "balanced"]
    assert [row[1:4] for row in rows] == [
        [tokens, ranks, layout] for tokens, ranks in (("16,384", "4"), ("32,768", "8")) for layout in layouts
    ]
    for row in rows:
        assert (row[8] != "-") == (row[3] == "balanced"), "only ours is planned"
        assert float(row[4]) <= float(row[5])
    assert "kernel calls of a forward pass by cuda flash on cuda, 8:8 heads of 64, bf16" in text


def test_bench_documents_plan_writes_a_csv(planned: tuple[str, Path]) -> None:
    text, folder = planned
    rows = read(folder / "documents.csv")
    assert [row["part"] for row in rows] == ["plan"] * 8
    for row, cells in zip(rows, table(text), strict=True):
        assert f"{float(row['imbalance']):.3f}" == cells[4]
        assert int(row["calls"]) > 0 and 0 < float(row["moved_share"]) < 1


def test_bench_documents_balanced_is_even(planned: tuple[str, Path]) -> None:
    uneven = {(row[1], row[3]): float(row[5]) for row in table(planned[0])}
    for tokens in ("16,384", "32,768"):
        assert uneven[tokens, "balanced"] <= 1.05 < uneven[tokens, "zigzag"]


def test_bench_documents_time_prints_and_writes_every_layout(timed: tuple[str, Path]) -> None:
    text, folder = timed
    layouts = ["balanced", "zigzag", "per-document zigzag", "causal ring"]
    rows = read(folder / "documents.csv")
    assert [(row["ranks"], row["layout"]) for row in rows] == [("3", layout) for layout in layouts]
    assert columns(text)[6:] == [
        *("imbalance", "kernel calls per rank and layer", "sent", "time", "bound", "over bound", "computing")
    ]
    for row, cells in zip(rows, table(text), strict=True):
        assert cells[11] == f"{float(row['over_bound']):.3f}"
        assert row["part"] == "time" and row["rounds"] == "2"
        assert float(row["time_s"]) > 0 and float(row["bound_s"]) > 0


def test_bench_documents_causal_ring_sends_all_keys_and_gradients(timed: tuple[str, Path]) -> None:
    sent = {row["layout"]: int(row["sent_bytes"]) for row in read(timed[1] / "documents.csv")}
    keys = 2 * 2 * 8 * 4  # bytes of a token's k and v: 2 kv heads of 8 in fp32
    # Keys go N - 1 hops forward and N - 2 back, their gradients N - 1.
    assert sent["causal ring"] == 768 // 3 * keys * 5


def test_bench_documents_simulates_ranks_that_send_what_real_ones_do(
    tools: ModuleType, timed: tuple[str, Path]
) -> None:
    from documents_clock import SINGLE, measure_simulated

    (case,) = tools.cases_of(tools.parse([*TINY, "--simulate", "--seq-lens", "768", "--ranks", "3"]), 3)
    found = measure_simulated(case, range(3))
    assert all(len(times.clocks) == case.rounds for times in found)
    assert [times.layout for times in found if times.layout == SINGLE] == [SINGLE]
    sent = {layout: max(t.sent_bytes for t in found if t.layout == layout) for layout in case.layouts}
    real = read(timed[1] / "documents.csv")
    assert sent == {row["layout"]: int(row["sent_bytes"]) for row in real}
    combined = tools.combine(
        case, [t for t in found if t.layout == "balanced"], [t for t in found if t.layout == SINGLE]
    )
    assert combined.simulated and combined.clock == "cpu"


def test_bench_documents_leaves_the_causal_ring_out_above_a_length(tools: ModuleType) -> None:
    options = ["--seq-lens", "256,512", "--ranks", "2", "--causal-up-to", "256"]
    arguments = tools.parse([*TINY, *options])
    assert tools.conditions(arguments).endswith("causal ring left out at 512 tokens (--causal-up-to)")
    assert [case.layouts[3:] for case in tools.cases_of(arguments, 2)] == [("causal ring",), ()]


def test_bench_documents_times_the_layouts_asked_for(tools: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = tools.parse([*TINY, "--seq-lens", "32768", "--ranks", "2", "--layouts", "zigzag,balanced"])
    assert "left out" not in tools.conditions(arguments)
    assert [case.layouts for case in tools.cases_of(arguments, 2)] == [("zigzag", "balanced")]
    with pytest.raises(SystemExit):
        tools.parse([*TINY, "--layouts", "balanced,contiguous"])
    assert "--layouts: contiguous is not one of balanced, zigzag, per-document zigzag," in capsys.readouterr().err


@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "per-document zigzag", "balanced"])
def test_bench_documents_cut_computes_every_pair_once(tools: ModuleType, layout: str) -> None:
    from documents_cases import make_cut, num_pairs

    cut = make_cut(layout, LENGTHS, 4)
    mask = Mask(causal=True, documents=cut.documents)
    work = [sum(block.num_pairs for theirs in cut.spans for block in blocks(ours, theirs, mask)) for ours in cut.spans]
    assert sum(work) == num_pairs(LENGTHS)
    assert cut.imbalance == pytest.approx(max(work) / (sum(work) / 4))
    packing = cut.packing()
    assert (packing.imbalance, packing.cost.num_pairs) == (cut.imbalance, sum(work))
    assert [packing.layout.spans(rank) for rank in range(4)] == cut.spans


@pytest.mark.parametrize("layout", ["balanced", "per-document zigzag", "causal ring"])
@pytest.mark.parametrize(("kernel", "together"), [("cpu flash", False), ("reference", False), ("reference", True)])
def test_bench_documents_counts_the_kernel_calls_that_are_made(
    tools: ModuleType, monkeypatch: pytest.MonkeyPatch, layout: str, kernel: str, together: bool
) -> None:
    from documents_clock import Case, layout_run
    from simulated_group import simulated_ranks

    if together:  # as on CUDA
        monkeypatch.setattr(hops, "COPIES_ARE_DEAR", frozenset())
        monkeypatch.setattr(groups, "_link", lambda *_: "fast")
    made: list[object] = []
    launch = compute.forward_launch

    def noted(*given):
        made.append(given)
        return launch(*given)

    monkeypatch.setattr(compute, "forward_launch", noted)
    sizes = {"heads": 4, "kv_heads": 2, "dim": 8, "dtype": "fp32"}
    case = Case(set_name="", lengths=LENGTHS, ranks=4, layouts=(layout,), kernel=kernel, **sizes)
    for rank in range(4):
        with simulated_ranks(rank, 4, torch.device("cpu")):
            times, run = layout_run(case, layout, rank)
            made.clear()
            run()
        assert times.calls == len(made) > 0


def test_bench_documents_counts_blocks_that_go_together_as_one_call(tools: ModuleType) -> None:
    from documents_cases import make_cut, place_of

    places = {
        name: place_of(device, "bf16", heads=8, kv_heads=8, dim=64, name=name)
        for device, name in (("cpu", "cpu flash"), ("cuda", "efficient"), ("cuda", "cuda flash"))
    }
    # Sixteen whole documents on every rank.
    calls = {name: make_cut("balanced", [64] * 128, 8).num_calls(place) for name, place in places.items()}
    assert calls == {"cpu flash": 16, "efficient": 16, "cuda flash": 1}
    # One document in zigzag: on CPU every hop by itself, on CUDA what the queries of a rank in the middle see.
    calls = {name: make_cut("zigzag", [2048], 8).num_calls(place) for name, place in places.items()}
    assert calls == {"cpu flash": 8, "efficient": 3, "cuda flash": 3}


def test_bench_documents_per_document_zigzag_pads_to_pieces(tools: ModuleType) -> None:
    from documents_cases import make_cut

    cut = make_cut("per-document zigzag", (5, 8, 3), 2)
    # 2 x 2 pieces each: 5 tokens as 8, 3 as 4; what fills them up is no document.
    assert cut.documents.offsets == (0, 5, 8, 16, 19, 20)
    assert cut.documents.padding == (1, 4)
    assert cut.spans[0] == [(0, 0, 2), (2, 6, 4), (6, 14, 3), (9, 19, 1)]
    assert cut.spans[1] == [(0, 2, 4), (4, 10, 4), (8, 17, 2)]


def dense_and_cut(rank: int, world: int, layout: str) -> None:
    """Attention over a pack in this layout is that of one process."""
    sys.path.insert(0, str(ROOT / "tools"))
    from documents_clock import batch_of
    from torch.distributed.device_mesh import init_device_mesh

    plan = ContextParallel(init_device_mesh("cpu", (world,), mesh_dim_names=("ring",)), ulysses=None, layout="balanced")
    batch = batch_of(plan, layout, (33, 3, 20, 40))
    documents = batch.packing.documents
    ids = torch.tensor([documents.of(token) for token in range(documents.length)])[None]
    inputs = problem(4, 2, length=documents.length)
    inputs = tuple(x[:1] for x in inputs)
    expected = single_process(*inputs, ids, None)
    q, k, v = (x.clone().requires_grad_() for x in batch.shard(*inputs[:3], dim=2))
    with batch:
        out = plan.attention(q, k, v, is_causal=True)
        grads = torch.autograd.grad(out, (q, k, v), batch.shard(inputs[3], dim=2))
    for actual, wanted in zip((out, *grads), expected, strict=True):
        assert_matches(batch.unshard(actual.detach(), dim=2), wanted)


@pytest.mark.parametrize("layout", ["zigzag", "per-document zigzag"])
def test_bench_documents_times_exact_attention(pool, layout: str) -> None:
    pool.run(4, dense_and_cut, layout)


def test_bench_documents_long_tail_has_the_tail_it_says(tools: ModuleType) -> None:
    from documents_cases import MEDIAN, SIGMA, lognormal_pack

    # 0.3 % of documents have more than 64K tokens.
    assert 0.5 * math.erfc(math.log(65536 / MEDIAN) / SIGMA / math.sqrt(2)) == pytest.approx(0.003, rel=0.02)
    packs = [lognormal_pack(65536, number) for number in range(200)]
    assert all(sum(lengths) == 65536 and min(lengths) > 0 for lengths in packs)
    # Inside a window, past its first and last document, they are as the stream has them, but for those too long.
    inner = sorted(length for lengths in packs for length in lengths[1:-1])
    assert inner[len(inner) // 2] == pytest.approx(MEDIAN, rel=0.15)
    # 15 % of tokens lie in documents of more than 64K, of which a window that begins in one sees the rest.
    alone = sum(len(lengths) == 1 for lengths in packs)
    assert 0 < alone < 30


def test_bench_documents_refuses_lengths_that_no_zigzag_cuts(
    tools: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        tools.main(["--time", "--seq-lens", "100", "--ranks", "8"])
    assert "100 tokens on 8 ranks" in capsys.readouterr().err
