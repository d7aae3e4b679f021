"""Packed documents over ranks: how even the work is, how many keys travel, and what attention takes, by layout.

--plan is arithmetic, without processes: over many packs, the largest work of a rank over the mean ("imbalance"), keys
that travel as a share of what a full ring moves ("moved"), kernel calls of a forward pass on the rank with most (median
of four packs; on --device, by default cuda, where links are fast), and for "balanced" what a batch takes on the host:
dealing and encoding ("planning"), and the blocks of one rank ("schedule").
--time runs one pack of each set forward and backward in every layout, a process per rank. The bound is the kernel of
one device over every document in turn, divided by the ranks. Layouts take turns; "over bound" is the median over
rounds of time / bound, both of the same round. Where there are a core per rank and thread, time is the wall clock
until the slowest rank is done; else it is the CPU time of the rank with most, messages included; "computing" is the
part of the thread that computes. More ranks than cores share caches and cores, and their kernels run slower for it; the
bound, which only as many ranks as there are cores compute, does not. With --simulate every rank therefore runs by
itself, as many at a time as there are cores, and a message is a copy in memory (simulated_group.py); --device cuda then
runs them in turn on one device, by its own time. Without --plan or --time both parts run. The pack timed is the one of
median work among the first --packs of two documents and more.

    python tools/bench_documents.py                                            # some minutes, on CPUs
    python tools/bench_documents.py --plan --packs 16
    python tools/bench_documents.py --time --seq-lens 65536 --ranks 2 --rounds 1 --sets lognormal

Sets: "stdlib" are windows of the built-in corpus (the interpreter's .py files, a token per byte); "lognormal" those of
a stream with a long tail (median 600 tokens, 0.3 % of documents above 64K). Layouts: see documents_cases.py.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from attention_cases import DTYPES
from documents_cases import (
    LAYOUTS,
    SETS,
    Cut,
    balanced_packing,
    cut_of,
    documents_of,
    make_cut,
    median_pack,
    place_of,
    rank_pieces,
)
from documents_clock import CAUSAL_RING, SINGLE, Case, case_times
from documents_report import PLAN_HEADER, TIME_HEADER, Planned, Timed, combine, write_csv
from kernel_calls import Place

from cptrain.context_parallel.carrier import cached_shard_blocks
from cptrain.context_parallel.hops import groups_of
from cptrain.context_parallel.packing import Packing

CALL_PACKS = 4  # of which --plan counts the kernel calls
DEFAULT_DTYPES = {"cpu": "fp32", "cuda": "bf16"}
TIMED = ("balanced", "zigzag", "per-document zigzag", CAUSAL_RING)  # layouts, the plan in question first


def main(argv: list[str] | None = None) -> int:
    """0; writes both tables and their CSV."""
    arguments = parse(argv)
    both = not (arguments.plan or arguments.time)
    found: list[Planned | Timed] = []
    if arguments.plan or both:
        print(f"{plan_conditions(arguments)}\n\n{PLAN_HEADER}")
        for planned in plans(arguments):
            print(planned.line(), flush=True)
            found.append(planned)
    if arguments.time or both:
        print(f"{chr(10) if found else ''}{conditions(arguments)}\n\n{TIME_HEADER}")
        for timed in times(arguments):
            print(timed.line(), flush=True)
            found.append(timed)
    path = Path(arguments.out) / "documents.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_csv(found, path)
    print(f"\nwrote {path}")
    return 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    def pair(text: str) -> tuple[int, int]:
        first, _, second = text.partition(":")
        return int(first), int(second or first)

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", action="store_true", help="the first part alone")
    parser.add_argument("--time", action="store_true", help="the second part alone")
    parser.add_argument("--sets", default="stdlib,lognormal", help=f"of {', '.join(SETS)}")
    parser.add_argument("--packs", type=int, default=16, help="of each set and size")
    parser.add_argument("--sizes", default="65536:8,262144:32,1048576:32", help="of --plan: tokens:ranks")
    parser.add_argument("--simulate", action="store_true", help="--time: ranks one at a time on each core")
    parser.add_argument("--layouts", default=",".join(TIMED), help=f"of --time: of {', '.join(TIMED)}")
    parser.add_argument("--seq-lens", default="16384", help="of --time")
    parser.add_argument("--ranks", default="2,4,8", help="of --time")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--causal-up-to", type=int, default=16384, help=f"tokens; above, {CAUSAL_RING} is left out")
    parser.add_argument("--heads", type=pair, default=(8, 8), help="query:kv heads")
    parser.add_argument("--dim", type=int, default=64, help="of one head")
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="by default fp32 on cpu, bf16 on cuda")
    parser.add_argument("--kernel", default="auto", help="see cptrain.context_parallel.kernels.KERNELS")
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        help="by default cuda for --plan, cpu for --time, which needs --simulate for cuda",
    )
    parser.add_argument("--threads", type=int, default=1, help="per rank")
    parser.add_argument("--out", default="outputs/bench", help="folder of documents.csv")
    arguments = parser.parse_args(argv)
    arguments.sets, arguments.layouts = arguments.sets.split(","), arguments.layouts.split(",")
    arguments.sizes = [pair(text) for text in arguments.sizes.split(",")]
    arguments.seq_lens, arguments.ranks = (
        [int(number) for number in text.split(",")] for text in (arguments.seq_lens, arguments.ranks)
    )
    if unknown := set(arguments.sets) - set(SETS):
        parser.error(f"--sets: {', '.join(sorted(unknown))} is not one of {', '.join(SETS)}")
    if unknown := set(arguments.layouts) - set(TIMED):
        parser.error(f"--layouts: {', '.join(sorted(unknown))} is not one of {', '.join(TIMED)}")
    pairs = [*arguments.sizes, *((length, ranks) for length in arguments.seq_lens for ranks in arguments.ranks)]
    for length, ranks in pairs:
        if ranks < 2 or length % (2 * ranks):
            parser.error(f"{length} tokens on {ranks} ranks: needs two ranks at least and a multiple of 2 x ranks")
    arguments.plan_device, arguments.device = arguments.device or "cuda", arguments.device or "cpu"
    arguments.plan_dtype = arguments.dtype or DEFAULT_DTYPES[arguments.plan_device]
    arguments.dtype = arguments.dtype or DEFAULT_DTYPES[arguments.device]
    if arguments.plan or not arguments.time:
        try:
            plan_place(arguments)
        except NotImplementedError as error:
            parser.error(f"--plan: {error}")
    if arguments.device == "cuda" and not arguments.simulate and (arguments.time or not arguments.plan):
        parser.error("--device cuda: one device runs one rank at a time; add --simulate")
    if arguments.rounds < 1 or arguments.packs < 1:
        parser.error("--rounds and --packs must be at least 1")
    return arguments


def plan_place(arguments: argparse.Namespace) -> Place:
    """What the kernel calls of --plan are counted for."""
    heads, kv_heads = arguments.heads
    return place_of(
        *(arguments.plan_device, arguments.plan_dtype),
        heads=heads,
        kv_heads=kv_heads,
        dim=arguments.dim,
        name=arguments.kernel,
    )


def plan_conditions(arguments: argparse.Namespace) -> str:
    place, (heads, kv_heads) = plan_place(arguments), arguments.heads
    return (
        f"Layouts over {arguments.packs} packs (bench_documents.py --plan); kernel calls of a forward pass by "
        f"{place.kernel.name} on {place.device}, {heads}:{kv_heads} heads of {arguments.dim}, {arguments.plan_dtype}"
    )


def conditions(arguments: argparse.Namespace) -> str:
    heads, kv_heads = arguments.heads
    machine = f"{arguments.threads} thread(s) per rank, {len(os.sched_getaffinity(0))} cores"
    if arguments.device == "cuda":
        machine = torch.cuda.get_device_name()
    text = (
        f"Attention forward + backward, {heads}:{kv_heads} heads of {arguments.dim}, {arguments.dtype}, "
        f"{machine}, torch {torch.__version__}, "
        f"median of {arguments.rounds} {'' if arguments.simulate else 'paired '}round(s)"
        f"{', every rank by itself' if arguments.simulate else ''}"
    )
    asked = CAUSAL_RING in arguments.layouts
    left_out = [f"{length:,}" for length in arguments.seq_lens if asked and length > arguments.causal_up_to]
    return text + (f"; {CAUSAL_RING} left out at {', '.join(left_out)} tokens (--causal-up-to)" if left_out else "")


def plans(arguments: argparse.Namespace) -> Iterator[Planned]:
    """Every line of the first table."""
    place = plan_place(arguments)
    for seq_len, ranks in arguments.sizes:
        for name in arguments.sets:
            packs = [SETS[name](seq_len, number) for number in range(arguments.packs)]
            for layout in LAYOUTS:
                host: dict[str, list[float]] = {"planning_ms": [], "schedule_ms": []}
                cuts, calls = [], []
                if layout == "balanced":
                    balanced_packing(documents_of(packs[0]), ranks)  # the first call is not timed
                for lengths in packs:
                    if layout == "balanced":
                        cut, planning_ms, schedule_ms = planned_cut(lengths, ranks, place)
                        host["planning_ms"].append(planning_ms)
                        host["schedule_ms"].append(schedule_ms)
                    else:
                        cut = make_cut(layout, lengths, ranks)
                    cuts.append((cut.imbalance, cut.moved_share))
                    # Per-document zigzag has ten thousand of them at 1M tokens, which take a second to count.
                    if len(calls) < CALL_PACKS:
                        calls.append(cut.num_calls(place))
                uneven, moved = zip(*cuts, strict=True)
                timings = {key: statistics.median(values) for key, values in host.items() if values}
                timings |= {f"{key}_max": max(values) for key, values in host.items() if values}
                yield Planned(
                    set=name,
                    seq_len=seq_len,
                    ranks=ranks,
                    layout=layout,
                    packs=len(packs),
                    imbalance=statistics.median(uneven),
                    imbalance_max=max(uneven),
                    moved_share=statistics.mean(moved),
                    moved_share_max=max(moved),
                    device=place.device,
                    kernel=place.kernel.name,
                    calls=round(statistics.median(calls)),
                    **timings,  # type: ignore[arg-type]
                )


def planned_cut(lengths: list[int], ranks: int, place: Place) -> tuple[Cut, float, float]:
    """The balanced cut, milliseconds that it took to plan and encode, and those of one rank's schedule."""
    start = time.perf_counter()
    documents = documents_of(lengths)
    packing = balanced_packing(documents, ranks)
    packing.encode()
    planned = time.perf_counter()
    schedule(packing, place)
    return cut_of(documents, packing.layout), 1e3 * (planned - start), 1e3 * (time.perf_counter() - planned)


def schedule(packing: Packing, place: Place) -> None:
    """What a rank works out at its first attention over a batch: the one with the last place, as good as any."""
    for cached in (cached_shard_blocks, groups_of):
        cached.cache_clear()
    rank_pieces(packing, packing.layout.num_ranks - 1, place)


def cases_of(arguments: argparse.Namespace, ranks: int) -> list[Case]:
    """What --time measures on so many ranks."""
    heads, kv_heads = arguments.heads
    return [
        Case(
            set_name=name,
            lengths=tuple(median_pack(name, seq_len, arguments.packs)),
            ranks=ranks,
            layouts=tuple(
                layout for layout in arguments.layouts if layout != CAUSAL_RING or seq_len <= arguments.causal_up_to
            ),
            heads=heads,
            kv_heads=kv_heads,
            dim=arguments.dim,
            dtype=arguments.dtype,
            kernel=arguments.kernel,
            threads=arguments.threads,
            rounds=arguments.rounds,
            simulated=arguments.simulate,
            device=arguments.device,
        )
        for seq_len in arguments.seq_lens
        for name in arguments.sets
    ]


def times(arguments: argparse.Namespace) -> Iterator[Timed]:
    """Every line of the second table."""
    for ranks in arguments.ranks:
        cases = cases_of(arguments, ranks)
        for case, measured in zip(cases, case_times(cases, ranks), strict=True):
            single = [times for times in measured if times.layout == SINGLE and times.clocks]
            for layout in case.layouts:
                yield combine(case, [times for times in measured if times.layout == layout], single)


if __name__ == "__main__":
    sys.exit(main())
