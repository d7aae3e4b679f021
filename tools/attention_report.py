"""What bench_attention found, over all ranks: table, CSV and chart."""

from __future__ import annotations

import csv
import dataclasses
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from attention_cases import Problem
from attention_clock import Row

MIB = 2**20
HEADER = (
    "| S | heads | dtype | mask | ranks | method | pass | time | single / ranks | of bound | sent | exposed | peak |\n"
    "|---|---|---|---|---|---|---|---|---|---|---|---|---|"
)


@dataclass(frozen=True, kw_only=True)
class Result:
    """One line of the table and of the CSV; seconds and bytes are those of the rank with most of them."""

    device: str
    kernel: str
    simulated: bool
    ranks: int
    threads: int
    method: str
    layout: str
    overlap: bool
    passes: str
    seq_len: int
    batch: int
    heads: int
    kv_heads: int
    dim: int
    dtype: str
    mask: str
    rounds: int
    time_s: float
    single_s: float
    of_bound: float
    exposed_s: float
    sent_bytes: int
    formula_bytes: int
    bytes_match: bool
    peak_bytes: int

    def line(self) -> str:
        """The row of the Markdown table under HEADER."""
        sent = size(self.sent_bytes) + ("" if self.bytes_match else f", the formula says {size(self.formula_bytes)}")
        method = self.method + ("" if self.overlap else ", no overlap")
        cells = (
            f"{self.seq_len:,}",
            f"{self.heads}:{self.kv_heads} x {self.dim}",
            self.dtype,
            self.mask,
            f"{self.ranks}{', simulated' if self.simulated else ''}",
            method,
            self.passes,
            _duration(self.time_s),
            _duration(self.single_s / self.ranks),
            f"{100 * self.of_bound:.1f} %",
            sent,
            _duration(self.exposed_s),
            size(self.peak_bytes),
        )
        return f"| {' | '.join(cells)} |"


def combine(problem: Problem, rows: Sequence[Row], *, device: str, threads: int, simulated: bool) -> Result:
    """One result of what the ranks measured of one variant and pass: in every round the slowest rank counts."""
    first = rows[0]
    assert all((row.variant, row.passes) == (first.variant, first.passes) for row in rows)
    times, singles, exposed = (
        [max(values) for values in zip(*lists, strict=True)]
        for lists in zip(*((row.method_s, row.single_s, row.exposed_s) for row in rows), strict=True)
    )
    ranks = first.variant.ranks
    return Result(
        device=device,
        kernel=first.kernel,
        simulated=simulated,
        ranks=ranks,
        threads=threads,
        method=first.variant.method,
        layout=first.variant.layout,
        overlap=first.variant.overlap,
        passes=first.passes,
        seq_len=problem.seq_len,
        batch=problem.batch,
        heads=problem.heads,
        kv_heads=problem.kv_heads,
        dim=problem.dim,
        dtype=problem.dtype,
        mask=problem.mask,
        rounds=len(times),
        time_s=statistics.median(times),
        single_s=statistics.median(singles),
        of_bound=statistics.median(single / ranks / time for single, time in zip(singles, times, strict=True)),
        exposed_s=statistics.median(exposed),
        sent_bytes=max(row.sent_bytes for row in rows),
        formula_bytes=max(row.formula_bytes for row in rows),
        bytes_match=all(row.sent_bytes == row.formula_bytes for row in rows),
        peak_bytes=max(row.peak_bytes for row in rows),
    )


def size(num_bytes: int) -> str:
    """Bytes as text, in MiB or KiB."""
    return f"{num_bytes / MIB:.2f} MiB" if num_bytes >= MIB else f"{num_bytes / 2**10:.2f} KiB"


def _duration(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 10 else f"{seconds * 1e3:,.{1 if seconds >= 0.1 else 2}f} ms"


def write_csv(results: Sequence[Result], path: Path) -> None:
    names = [field.name for field in dataclasses.fields(Result)]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(map(dataclasses.asdict, results))


def write_chart(results: Sequence[Result], path: Path) -> str:
    """Per cent of the bound over the length, a panel per pass and a line per case; returns what was done, as text."""
    try:
        import matplotlib
    except ImportError:
        return "no chart: matplotlib is not installed; pip install 'cptrain[bench]'"
    matplotlib.use("agg")
    from matplotlib import pyplot

    passes = list(dict.fromkeys(result.passes for result in results))
    figure, panels = pyplot.subplots(1, len(passes), figsize=(5.5 * len(passes) + 2.5, 4.5), sharey=True, squeeze=False)
    for panel, which in zip(panels[0], passes, strict=True):
        series: dict[str, list[tuple[int, float]]] = {}
        for result in results:
            if result.passes == which:
                label = f"{result.method}{'' if result.overlap else ' (no overlap)'}, {result.ranks} ranks, "
                label += f"{result.heads}:{result.kv_heads} x {result.dim}, {result.dtype}, {result.mask}"
                series.setdefault(label, []).append((result.seq_len, 100 * result.of_bound))
        for label, points in series.items():
            panel.plot(*zip(*sorted(points), strict=True), marker="o", label=label)
        panel.axhline(100, color="black", linewidth=0.8, linestyle="--")
        panel.set(title=which, xlabel="tokens of the sequence", xscale="log")
        panel.set_xticks(sorted({result.seq_len for result in results}))
        panel.xaxis.set_major_formatter(matplotlib.ticker.StrMethodFormatter("{x:,.0f}"))
        panel.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
        panel.set_ylim(0, None)
    panels[0][0].set_ylabel("% of one device's kernel / ranks")
    panels[0][-1].legend(loc="center left", bbox_to_anchor=(1.02, 0.5), fontsize=7)
    figure.savefig(path, dpi=150, bbox_inches="tight")
    pyplot.close(figure)
    return f"wrote {path}"
