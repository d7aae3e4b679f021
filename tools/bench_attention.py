"""Time attention over sequence shards against the kernel of one device divided by the number of ranks.

Every rank is a process with --threads threads. In each round all ranks first compute the whole problem on their own, at
the same time (equal contention: caches, memory and clock are as busy as with a method), then each method together; no
process starts inside the clock. A time is that of the slowest rank; "of bound" is the median over rounds of
single / ranks / time, both of the same round. "exposed" is what a rank stands still for messages, "peak" the most
memory that a call holds beyond its inputs.

    python tools/bench_attention.py --seq-lens 2048,16384 --dtypes fp32,bf16 --heads 8:8,8:2
    python tools/bench_attention.py --methods ring --overlap on,off
    python tools/bench_attention.py --simulate-ranks 8 --seq-lens 65536 --heads 32:8 --dims 128 --dtypes bf16
    python tools/bench_attention.py --memory --methods ring,all_gather --tokens-per-rank 2048

--simulate-ranks runs one rank's schedule alone on this device; its messages are local copies (simulated_group.py).
Ranks use CUDA devices where there are enough of them, else the CPU.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import multiprocessing.connection
import os
import sys
import tempfile
import traceback
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from attention_cases import DTYPES, METHODS, PASSES, Problem, Variant
from attention_clock import Row, measure
from attention_report import HEADER, Result, combine, size, write_chart, write_csv
from simulated_group import simulated_ranks

from cptrain.distributed.host import prepare_host


def main(argv: list[str] | None = None) -> int:
    """0, or 1 when what was sent contradicts the formulas."""
    arguments = parse(argv)
    if arguments.memory:
        print_memory(arguments)
        return 0
    print(f"bench_attention.py {' '.join(sys.argv[1:] if argv is None else argv)}: {conditions(arguments)}\n\n{HEADER}")
    results = []
    for result in times(arguments):
        print(result.line(), flush=True)
        results.append(result)
    folder = Path(arguments.out)
    folder.mkdir(parents=True, exist_ok=True)
    write_csv(results, folder / "attention.csv")
    print(f"\nwrote {folder / 'attention.csv'}; {write_chart(results, folder / 'attention.png')}")
    wrong = sum(not result.bytes_match for result in results)
    if wrong:
        print(f"{wrong} rows sent other than the formula's bytes", file=sys.stderr)
    return 1 if wrong else 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    def listed(kind: Any = str) -> Any:
        return lambda text: [kind(part) for part in text.split(",")]

    def heads(text: str) -> tuple[int, int]:
        query, _, key = text.partition(":")
        return int(query), int(key or query)

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", type=listed(), default=["ring", "ulysses"], help=f"of {', '.join(METHODS)}")
    parser.add_argument("--seq-lens", type=listed(int), default=[2048], help="global lengths")
    parser.add_argument("--heads", type=listed(heads), default=[(8, 8)], help="query:kv heads, such as 8:8,8:2")
    parser.add_argument("--dims", type=listed(int), default=[64], help="of one head")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--dtypes", type=listed(), default=["fp32"], help=f"of {', '.join(DTYPES)}")
    parser.add_argument("--masks", type=listed(), default=["causal"], help="of causal, full, window:W")
    parser.add_argument("--passes", type=listed(), default=list(PASSES), help=f"of {', '.join(PASSES)}")
    parser.add_argument("--layout", default="zigzag", choices=("zigzag", "contiguous"))
    parser.add_argument("--overlap", type=listed(), default=["on"], help="of on, off")
    parser.add_argument("--ranks", type=listed(int), default=[], help="default 2; with --memory 2,4,8")
    parser.add_argument("--ulysses-degree", type=int, default=0, help="of hybrid; 0 = the largest that fits")
    parser.add_argument("--inner-degree", type=int, default=0, help="of double_ring; 0 = the largest that fits")
    parser.add_argument("--kernel", default="auto", help="see cptrain.context_parallel.kernels.KERNELS")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--threads", type=int, default=1, help="per rank")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--simulate-ranks", type=int, default=0, help="run one rank of so many, alone on this device")
    parser.add_argument(
        "--rank", default="slowest", help="simulated: slowest (most pairs, then calls), all, or a number"
    )
    parser.add_argument("--bandwidth", type=float, default=0.0, help="simulated: GB/s of the link; 0 = as copies are")
    parser.add_argument("--memory", action="store_true", help="transient memory at a fixed number of tokens per rank")
    parser.add_argument("--tokens-per-rank", type=int, default=2048)
    parser.add_argument("--out", default="outputs/bench", help="folder of attention.csv and attention.png")
    arguments = parser.parse_args(argv)
    for name, allowed in (("methods", METHODS), ("dtypes", DTYPES), ("passes", PASSES), ("overlap", ("on", "off"))):
        if unknown := set(getattr(arguments, name)) - set(allowed):
            parser.error(f"--{name}: {', '.join(sorted(unknown))} is not one of {', '.join(allowed)}")
    arguments.ranks = arguments.ranks or ([2, 4, 8] if arguments.memory else [2])
    if arguments.simulate_ranks:
        arguments.ranks = [arguments.simulate_ranks]
    return arguments


def conditions(arguments: argparse.Namespace) -> str:
    device = device_of(arguments, 0)
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {arguments.threads} thread(s) per rank"
    return f"{name}, torch {torch.__version__}, {arguments.layout}, median of {arguments.rounds} paired rounds"


def device_of(arguments: argparse.Namespace, rank: int) -> torch.device:
    """Where a rank computes."""
    needed = 1 if arguments.simulate_ranks or arguments.memory else max(arguments.ranks)
    enough = torch.cuda.is_available() and torch.cuda.device_count() >= needed
    if arguments.device == "cuda" and not enough:
        raise SystemExit(f"--device cuda: {needed} devices are needed, one per rank; or add --simulate-ranks")
    return torch.device("cuda", rank % needed) if enough and arguments.device != "cpu" else torch.device("cpu")


def problems(arguments: argparse.Namespace) -> Iterator[Problem]:
    for (heads, kv_heads), dim, dtype, mask, seq_len in itertools.product(
        arguments.heads, arguments.dims, arguments.dtypes, arguments.masks, arguments.seq_lens
    ):
        yield Problem(
            seq_len=seq_len,
            heads=heads,
            kv_heads=kv_heads,
            dim=dim,
            dtype=dtype,
            mask=mask,
            batch=arguments.batch,
        )


def variants(arguments: argparse.Namespace, problem: Problem, ranks: int) -> list[Variant]:
    """The methods that fit the problem; the others are named on stderr."""
    found = []
    for method, overlap in itertools.product(arguments.methods, arguments.overlap):
        variant = Variant(
            method=method,
            ranks=ranks,
            layout=arguments.layout,
            overlap=overlap == "on",
            ulysses_degree=arguments.ulysses_degree if method == "hybrid" else 0,
            inner_degree=arguments.inner_degree if method == "double_ring" else 0,
        )
        try:
            variant.check(problem)
        except ValueError as error:
            print(f"left out: {variant.title()} on {ranks} ranks, {problem.title()}: {error}", file=sys.stderr)
        else:
            found.append(variant)
    return found


def times(arguments: argparse.Namespace) -> Iterator[Result]:
    """Every result, as it is found."""
    kind = device_of(arguments, 0).type
    for ranks in arguments.ranks:
        jobs = [(problem, variants(arguments, problem, ranks)) for problem in problems(arguments)]
        jobs = [job for job in jobs if job[1]]
        source = simulated_rows(arguments, jobs) if arguments.simulate_ranks else process_rows(arguments, jobs, ranks)
        for (problem, _), rows in zip(jobs, source, strict=True):
            together = defaultdict(list)
            for row in rows:
                together[row.variant, row.passes].append(row)
            for alike in together.values():
                yield combine(
                    problem,
                    alike,
                    device=kind,
                    threads=arguments.threads,
                    simulated=bool(arguments.simulate_ranks),
                )


Jobs = list[tuple[Problem, list[Variant]]]


def simulated_rows(arguments: argparse.Namespace, jobs: Jobs) -> Iterator[list[Row]]:
    """What the asked for ranks measure of every job, one rank after another in this process."""
    torch.set_num_threads(arguments.threads)
    device, size = device_of(arguments, 0), arguments.simulate_ranks
    prepare_host(device)  # as cptrain.train does
    for problem, methods in jobs:
        rows = []
        slowest = {v: v.slowest_rank(problem, device.type, arguments.kernel) for v in methods}
        for rank in range(size):
            chosen = [
                variant
                for variant in methods
                if arguments.rank == "all"
                or rank == (slowest[variant] if arguments.rank == "slowest" else int(arguments.rank))
            ]
            if chosen:
                with simulated_ranks(rank, size, device, bandwidth=arguments.bandwidth * 1e9):
                    rows += measured(arguments, problem, chosen, device, rank)
        yield rows


def measured(
    arguments: argparse.Namespace, problem: Problem, methods: list[Variant], device: torch.device, rank: int
) -> list[Row]:
    return measure(
        problem,
        methods,
        device,
        rank=rank,
        rounds=0 if arguments.memory else arguments.rounds,
        passes=tuple(arguments.passes),
        kernel=arguments.kernel,
        together=not arguments.simulate_ranks,
    )


def process_rows(arguments: argparse.Namespace, jobs: Jobs, ranks: int) -> Iterator[list[Row]]:
    """What all ranks measure of every job, each rank in a process of its own."""
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        pipes, processes = [], []
        for rank in range(ranks):
            here, there = context.Pipe(duplex=False)
            process = context.Process(
                target=run_rank, args=(arguments, jobs, rank, ranks, f"{folder}/store", there), daemon=True
            )
            process.start()
            there.close()
            pipes.append(here)
            processes.append(process)
        try:
            for _ in jobs:
                rows: list[Row] = []
                waiting = list(pipes)
                while waiting:
                    for pipe in multiprocessing.connection.wait(waiting):
                        rows += received(pipe)
                        waiting.remove(pipe)
                yield rows
            for process in processes:
                process.join()
        finally:
            for process in processes:
                process.kill()


def received(pipe: Any) -> list[Row]:
    try:
        answer = pipe.recv()
    except EOFError:
        answer = "a rank died without a word"
    if isinstance(answer, str):
        raise SystemExit(answer)
    return answer


def run_rank(
    arguments: argparse.Namespace,
    jobs: Jobs,
    rank: int,
    ranks: int,
    store: str,
    pipe: multiprocessing.connection.Connection,
) -> None:
    """The process of one rank: sends its rows of every job, or the traceback of what went wrong."""
    try:
        torch.set_num_threads(arguments.threads)
        device = device_of(arguments, rank)
        prepare_host(device)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.FileStore(store, ranks), rank=rank, world_size=ranks)
        for problem, methods in jobs:
            pipe.send(measured(arguments, problem, methods, device, rank))
        dist.destroy_process_group()
    except Exception:
        pipe.send(f"rank {rank}: {traceback.format_exc()}")


def print_memory(arguments: argparse.Namespace) -> None:
    """A table of transient memory over the number of ranks, at a fixed number of tokens per rank."""
    device = device_of(arguments, 0)
    ranks = arguments.ranks
    print(
        f"Transient memory of one rank, simulated on {device.type}, {arguments.tokens_per_rank:,} tokens per rank, "
        f"{arguments.layout}\n\n"
        f"| heads | dtype | mask | method | pass | {' | '.join(f'{count} ranks' for count in ranks)} |\n"
        f"|{'---|' * (5 + len(ranks))}"
    )
    lines: dict[tuple[str, ...], dict[int, int]] = {}
    for count in ranks:
        arguments.simulate_ranks = count
        arguments.seq_lens = [arguments.tokens_per_rank * count]
        jobs = [(problem, variants(arguments, problem, count)) for problem in problems(arguments)]
        for (problem, _), rows in zip(jobs, simulated_rows(arguments, jobs), strict=True):
            for row in rows:
                case = (
                    f"{problem.heads}:{problem.kv_heads} x {problem.dim}",
                    problem.dtype,
                    problem.mask,
                    row.variant.title(),
                    row.passes,
                )
                cells = lines.setdefault(case, {})
                # With --rank all, the rank that needs most.
                cells[count] = max(cells.get(count, 0), row.peak_bytes)
    for case, cells in lines.items():
        sizes = (size(cells[count]) if count in cells else "-" for count in ranks)
        print(f"| {' | '.join(case)} | {' | '.join(sizes)} |")


if __name__ == "__main__":
    sys.exit(main())
