"""What bench_documents found: the lines of both tables, and their CSV."""

from __future__ import annotations

import csv
import os
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from attention_report import size
from documents_clock import Case, Times

PLAN_HEADER = (
    "| set | tokens | ranks | layout | imbalance, median | max | moved, mean | kernel calls per rank and layer "
    "| planning ms, median | max | schedule ms, median | max |\n|---|---|---|---|---|---|---|---|---|---|---|---|"
)
TIME_HEADER = (
    "| set | tokens | documents | ranks | layout | route | imbalance | kernel calls per rank and layer | sent "
    "| time | bound | over bound | computing |\n|---|---|---|---|---|---|---|---|---|---|---|---|---|"
)


@dataclass(frozen=True, kw_only=True)
class Planned:
    """One line of the first table, over all packs."""

    set: str
    seq_len: int
    ranks: int
    layout: str
    packs: int
    imbalance: float
    imbalance_max: float
    moved_share: float
    moved_share_max: float
    device: str
    kernel: str
    calls: int
    planning_ms: float | str = ""
    planning_ms_max: float | str = ""
    schedule_ms: float | str = ""
    schedule_ms_max: float | str = ""

    def line(self) -> str:
        times = (self.planning_ms, self.planning_ms_max, self.schedule_ms, self.schedule_ms_max)
        cells = (
            *(self.set, f"{self.seq_len:,}", str(self.ranks), self.layout),
            *(f"{self.imbalance:.3f}", f"{self.imbalance_max:.3f}", f"{self.moved_share:.3f}", str(self.calls)),
            *(f"{t:.1f}" if isinstance(t, float) else "-" for t in times),
        )
        return f"| {' | '.join(cells)} |"


@dataclass(frozen=True, kw_only=True)
class Timed:
    """One line of the second table: seconds are medians over rounds of the rank with most, bytes those of that rank."""

    set: str
    seq_len: int
    ranks: int
    layout: str
    documents: int
    rounds: int
    heads: int
    kv_heads: int
    dim: int
    dtype: str
    clock: str
    simulated: bool
    route: str
    imbalance: float
    calls: int
    sent_bytes: int
    time_s: float
    bound_s: float
    over_bound: float
    computing_over_bound: float

    def line(self) -> str:
        cells = (
            *(self.set, f"{self.seq_len:,}", str(self.documents), str(self.ranks), self.layout, self.route),
            *(f"{self.imbalance:.3f}", str(self.calls), size(self.sent_bytes), f"{self.time_s:.3f} s"),
            *(f"{self.bound_s:.3f} s", f"{self.over_bound:.3f}", f"{self.computing_over_bound:.3f}"),
        )
        return f"| {' | '.join(cells)} |"


def combine(case: Case, ranks: Sequence[Times], single: Sequence[Times]) -> Timed:
    """One result of what the ranks measured of one layout: in every round the rank with most counts.

    Simulated ranks run at different moments: there a rank counts with its median, or the most of many would be noise.
    """
    enough = case.ranks * case.threads <= len(os.sched_getaffinity(0)) and not case.simulated

    def most(measured: Sequence[Times], clock: str) -> list[float]:
        by_rank = [[getattr(clocks, clock) for clocks in times.clocks] for times in measured]
        if case.simulated:
            return [max(statistics.median(values) for values in by_rank)]
        return [max(values) for values in zip(*by_rank, strict=True)]

    clock = "wall_s" if enough else "cpu_s"
    taken, bounds = most(ranks, clock), [seconds / case.ranks for seconds in most(single, clock)]
    thread, thread_bounds = most(ranks, "thread_s"), [seconds / case.ranks for seconds in most(single, "thread_s")]
    work = [times.work for times in ranks]
    return Timed(
        set=case.set_name,
        seq_len=case.seq_len,
        ranks=case.ranks,
        layout=ranks[0].layout,
        documents=len(case.lengths),
        rounds=case.rounds,
        heads=case.heads,
        kv_heads=case.kv_heads,
        dim=case.dim,
        dtype=case.dtype,
        clock="device" if case.repeats else "wall" if enough else "cpu",
        simulated=case.simulated,
        route=ranks[0].route,
        imbalance=max(work) * len(work) / sum(work),
        calls=max(times.calls for times in ranks),
        sent_bytes=max(times.sent_bytes for times in ranks),
        time_s=statistics.median(taken),
        bound_s=statistics.median(bounds),
        over_bound=statistics.median(t / b for t, b in zip(taken, bounds, strict=True)),
        computing_over_bound=statistics.median(t / b for t, b in zip(thread, thread_bounds, strict=True)),
    )


def write_csv(found: Sequence[Planned | Timed], path: Path) -> None:
    """Both tables as one: a line has the columns of its part, which `part` names."""
    names = ["part", *dict.fromkeys(field.name for kind in (Planned, Timed) for field in fields(kind))]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, names, restval="")
        writer.writeheader()
        for result in found:
            writer.writerow({"part": "plan" if isinstance(result, Planned) else "time", **asdict(result)})
