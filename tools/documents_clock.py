"""How bench_documents times attention over packs: processes of ranks, their clocks, their messages."""

from __future__ import annotations

import math
import multiprocessing
import multiprocessing.connection
import os
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from attention_cases import DTYPES
from attention_clock import RUNS_ON_CUDA
from bench_attention import received
from documents_cases import LayoutName, documents_of, make_cut, place_of, rank_pieces
from kernel_calls import Place, ring_pieces
from simulated_group import simulated_ranks
from torch.distributed.device_mesh import init_device_mesh

from cptrain.context_parallel import ContextParallel
from cptrain.context_parallel.kernels import backward_launch, forward_launch
from cptrain.context_parallel.launches import Launch
from cptrain.context_parallel.mask import CAUSAL
from cptrain.context_parallel.packed_batch import PackedBatch
from cptrain.context_parallel.schedule import Block, Shape
from cptrain.distributed.host import prepare_host
from cptrain.distributed.transport import recorded_messages

CAUSAL_RING = "causal ring"  # zigzag that ignores documents
SINGLE = "single"

Run = Callable[[], Any]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One pack on so many ranks, and the layouts to compare. dtype: of attention_cases.DTYPES."""

    set_name: str
    lengths: tuple[int, ...]
    ranks: int
    layouts: tuple[str, ...]  # of LAYOUTS, or CAUSAL_RING
    heads: int
    kv_heads: int
    dim: int
    dtype: str
    kernel: str = "auto"
    threads: int = 1
    rounds: int = 3
    simulated: bool = False  # every rank by itself, messages are local copies
    device: str = "cpu"  # "cuda" only simulated

    @property
    def seq_len(self) -> int:
        return sum(self.lengths)

    @property
    def repeats(self) -> int:
        """Runs behind one another in one reading of a CUDA device's clock; 0 on CPU."""
        return RUNS_ON_CUDA if self.device == "cuda" else 0

    def place(self) -> Place:
        """What computes attention over packed documents here."""
        return place_of(
            self.device, self.dtype, heads=self.heads, kv_heads=self.kv_heads, dim=self.dim, name=self.kernel
        )

    def tensors(self, tokens: int) -> tuple[torch.Tensor, ...]:
        """Random q, k, v and the gradient of the output, stored [B, T, H, D] as models do."""
        generator = torch.Generator(self.device).manual_seed(tokens)
        heads = (self.heads, self.kv_heads, self.kv_heads, self.heads)
        return tuple(
            torch.randn(1, tokens, count, self.dim, generator=generator, device=self.device)
            .to(DTYPES[self.dtype])
            .transpose(1, 2)
            for count in heads
        )


class Clocks(NamedTuple):
    """Seconds of one run on one rank. cpu_s: of all threads of the process; thread_s: of the one that computes.

    On a CUDA device all three are the device's time.
    """

    wall_s: float
    cpu_s: float
    thread_s: float


@dataclass
class Times:
    """What one rank measured of one layout, or of SINGLE; `clocks` has one entry per round."""

    layout: str
    route: str = ""
    calls: int = 0  # of the kernel, forward
    work: int = 0  # (query, key) pairs
    sent_bytes: int = 0
    clocks: list[Clocks] = field(default_factory=list)


def case_times(cases: Sequence[Case], ranks: int) -> Iterator[list[Times]]:
    """What all ranks measured of every case.

    Each rank is a process of its own, or, simulated, as many processes as there are cores, or one device, run them in
    turn.
    """
    workers = min(ranks, len(os.sched_getaffinity(0)) if cases[0].device == "cpu" else 1)
    workers = workers if cases[0].simulated else ranks
    target = run_simulated if cases[0].simulated else run_rank
    os.environ["OMP_NUM_THREADS"] = str(cases[0].threads)
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        pipes, processes = [], []
        for worker in range(workers):
            here, there = context.Pipe(duplex=False)
            process = context.Process(
                target=target, args=(cases, worker, workers, f"{folder}/store", there), daemon=True
            )
            process.start()
            there.close()
            pipes.append(here)
            processes.append(process)
        try:
            for _ in cases:
                times: list[Times] = []
                waiting = list(pipes)
                while waiting:
                    for pipe in multiprocessing.connection.wait(waiting):
                        times += received(pipe)  # type: ignore[arg-type]
                        waiting.remove(pipe)  # type: ignore[arg-type]
                yield times
            for process in processes:
                process.join()
        finally:
            for process in processes:
                process.kill()


def run_rank(
    cases: Sequence[Case], rank: int, ranks: int, store: str, pipe: multiprocessing.connection.Connection
) -> None:
    """The process of one rank: sends what it measured of every case, or the traceback of what went wrong."""
    try:
        torch.set_num_threads(cases[0].threads)
        prepare_host(torch.device(cases[0].device))  # as cptrain.train does
        dist.init_process_group("gloo", store=dist.FileStore(store, ranks), rank=rank, world_size=ranks)
        for case in cases:
            pipe.send(measure(case, rank))
        dist.destroy_process_group()
    except Exception:
        pipe.send(f"rank {rank}: {traceback.format_exc()}")


def run_simulated(
    cases: Sequence[Case], worker: int, workers: int, store: str, pipe: multiprocessing.connection.Connection
) -> None:
    """The process that runs every workers-th rank, one after another: sends what `run_rank` sends."""
    try:
        torch.set_num_threads(cases[0].threads)
        prepare_host(torch.device(cases[0].device))  # as cptrain.train does
        for case in cases:
            pipe.send(measure_simulated(case, range(worker, case.ranks, workers)))
    except Exception:
        pipe.send(f"worker {worker}: {traceback.format_exc()}")


def measure_simulated(case: Case, ranks: Sequence[int]) -> list[Times]:
    """Some ranks, each alone in every layout, and once a round the single process.

    Before each reading of the clock stands the same run, as the layer and the step before stand before an attention.
    """
    found = {SINGLE: Times(SINGLE)}
    for _ in range(case.rounds):
        for rank in ranks:
            with simulated_ranks(rank, case.ranks, torch.device(case.device)):
                for layout in case.layouts:
                    times, run = layout_run(case, layout, rank)
                    run()
                    with recorded_messages() as messages:
                        clocks = timed(run, case.repeats)
                    times = found.setdefault(f"{layout} {rank}", times)
                    times.clocks.append(clocks)
                    times.sent_bytes = sum(message.num_bytes for message in messages) // max(case.repeats, 1)
        with simulated_ranks(0, 1, torch.device(case.device)):
            run = single_run(case)
            run()
            found[SINGLE].clocks.append(timed(run, case.repeats))
    return list(found.values())


def measure(case: Case, rank: int) -> list[Times]:
    """Every layout and the single process, taking turns, so that a machine whose speed drifts treats them alike.

    As many ranks as there are cores run the single process at the same time: caches, memory and clock are then as busy
    as with a layout. A first turn, which is not timed, makes schedules, connections and buffers.
    """
    computes_alone = rank < len(os.sched_getaffinity(0))
    tried = [layout_run(case, layout, rank) for layout in case.layouts]
    tried.append((Times(SINGLE), single_run(case)))
    for number in range(-1, case.rounds):
        for times, run in tried:
            if times.layout == SINGLE and not computes_alone:
                dist.barrier()
                dist.barrier()
                continue
            with recorded_messages() as messages:
                clocks = timed(run)
            if number >= 0:
                times.clocks.append(clocks)
                times.sent_bytes = sum(message.num_bytes for message in messages)
    return [times for times, _ in tried]


def timed(run: Run, repeats: int = 0) -> Clocks:
    """One run that starts on all ranks at once; the next one starts when all have ended.

    With repeats, so many behind one another on a CUDA device, and the device's time of one.
    """
    if repeats:
        begin, finish = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(repeats):
            run()
        finish.record()
        finish.synchronize()
        seconds = begin.elapsed_time(finish) / repeats / 1e3
        return Clocks(seconds, seconds, seconds)
    dist.barrier()
    start = time.perf_counter(), time.process_time(), time.thread_time()
    run()
    end = time.perf_counter(), time.process_time(), time.thread_time()
    dist.barrier()
    return Clocks(*(b - a for a, b in zip(start, end, strict=True)))


def single_run(case: Case) -> Run:
    """Every document by itself with the kernel of one device, forward and backward.

    One after another, or all in one call of a kernel that takes packed segments.
    """
    q, k, v, dout = case.tensors(case.seq_len)
    kernel = case.place().kernel
    spans = list(documents_of(case.lengths).spans())
    scale = 1 / math.sqrt(case.dim)
    calls = [(slice(start, stop), _triangles([(start, stop)])) for start, stop in spans]
    if kernel.forward_packed is not None:
        calls = [(slice(0, case.seq_len), _triangles(spans))]

    def run() -> None:
        # Gradients go into tensors of the whole pack, as the caller of any attention gets them.
        out, gradients = torch.empty_like(q), [torch.empty_like(x) for x in (q, k, v)]
        for rows, launch in calls:
            part, ours, keys, values = (x[:, :, rows] for x in (dout, q, k, v))
            result, lse = forward_launch(kernel, ours, keys, values, launch, scale)
            out[:, :, rows] = result
            found = backward_launch(kernel, part, ours, keys, values, result, lse, launch, scale)
            for whole, gradient in zip(gradients, found, strict=True):
                whole[:, :, rows] = gradient

    return run


def _triangles(spans: Sequence[tuple[int, int]]) -> Launch:
    return Launch(Shape.LOWER, tuple(Block(start, stop, start, stop, Shape.LOWER) for start, stop in spans))


def layout_run(case: Case, layout: str, rank: int) -> tuple[Times, Run]:
    """What is known of a layout on this rank, and its forward and backward pass."""
    mesh = init_device_mesh(case.device, (case.ranks,), mesh_dim_names=("ring",))
    place = case.place()
    if layout == CAUSAL_RING:
        plan = ContextParallel(mesh, ulysses=None, kernel=place.kernel.name)  # the one that packed documents get
        batch, route = None, "ring"
        pieces = ring_pieces(plan.ring_layout(case.seq_len), CAUSAL, rank, place)
        tokens = case.seq_len // case.ranks
    else:
        plan = ContextParallel(mesh, ulysses=None, layout="balanced", kernel=case.kernel)
        batch = batch_of(plan, layout, case.lengths)  # type: ignore[arg-type]
        route = "exchange" if batch.exchanges(0, place.dtype) else "ring"
        pieces = rank_pieces(batch.packing, rank, place)
        tokens = batch.packing.layout.shard_length
    *inputs, dout = case.tensors(tokens)

    def run() -> None:
        leaves = [x.detach().requires_grad_() for x in inputs]
        with batch or nullcontext():
            torch.autograd.grad(plan.attention(*leaves, is_causal=True), leaves, dout)

    work = sum(block.num_pairs for blocks in pieces for block in blocks)
    return Times(layout, route, place.num_calls(pieces), work), run


def batch_of(plan: ContextParallel, layout: LayoutName, lengths: Sequence[int]) -> PackedBatch:
    """A pack in any layout under a plan for packed documents: attention reads the chunks, never the name.

    Not compared between the ranks, as only the first batches of a plan are.
    """
    return replace(plan.packed(make_cut(layout, lengths, plan.ring_degree).packing().encode()), compares=False)
