"""How bench_attention measures on one rank: seconds, bytes sent, time spent in messages, and transient memory."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from attention_cases import PASSES, Problem, Variant, sent_bytes
from torch.distributed.device_mesh import init_device_mesh

from cptrain.context_parallel import ContextParallel
from cptrain.context_parallel.kernels import backward_block, choose_kernel, forward_block
from cptrain.context_parallel.schedule import Shape
from cptrain.distributed.standstill import Standstill, measured_standstill

Run = Callable[[], Any]

# Of the single kernel, behind one another, in one reading of the clock. As in training, the host is then ahead of the
# device: one run by itself would begin with what the host takes.
RUNS_ON_CUDA = 5


@dataclass
class Row:
    """One variant and pass of one problem on one rank; lists hold one entry per round."""

    variant: Variant
    passes: str
    rank: int
    formula_bytes: int
    sent_bytes: int = 0
    peak_bytes: int = 0
    kernel: str = ""
    single_s: list[float] = field(default_factory=list)
    method_s: list[float] = field(default_factory=list)
    exposed_s: list[float] = field(default_factory=list)


class Traffic:
    """Bytes that this rank sends, and how long its computation stands still for messages, while `counted` runs.

    Bytes are those that a rank must send whatever the algorithm: N - 1 parts for a gathering or a reduce-scatter.
    """

    def __init__(self, standstill: Standstill) -> None:
        self.standstill = standstill
        self.sent_bytes = 0


@contextmanager
def counted(device: torch.device) -> Iterator[Traffic]:
    """Counts every message of this process while the block runs."""
    names = ["batch_isend_irecv"]
    # Newer versions of torch have two names for the collectives of one tensor.
    for new, old in (
        ("all_gather_single", "all_gather_into_tensor"),
        ("reduce_scatter_single", "reduce_scatter_tensor"),
    ):
        names += [name for name in (new, old) if hasattr(dist, name)]
    originals = {name: getattr(dist, name) for name in names}

    def batch(operations: list[dist.P2POp]) -> list[dist.Work]:
        traffic.sent_bytes += sum(o.tensor.nbytes for o in operations if o.op is dist.isend)
        return originals["batch_isend_irecv"](operations)

    def collective(name: str) -> Callable[..., Any]:
        def call(output: torch.Tensor, given: torch.Tensor, *positional: Any, **options: Any) -> Any:
            size = dist.get_world_size(options["group"])
            sends_all = name.startswith("all_gather")
            traffic.sent_bytes += given.nbytes * (size - 1) // (1 if sends_all else size)
            return originals[name](output, given, *positional, **options)

        return call

    for name in names:
        setattr(dist, name, batch if name == "batch_isend_irecv" else collective(name))
    try:
        with measured_standstill(device) as standstill:
            traffic = Traffic(standstill)
            yield traffic
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


def seconds(run: Run, device: torch.device, *, together: bool, repeats: int = 1) -> float:
    """Seconds of one run, of so many behind one another; together=True starts them on all ranks at once."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    if together:
        dist.barrier()
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / repeats


def transient_bytes(run: Run, device: torch.device) -> int:
    """The most memory that `run` holds beyond what was there before, results included.

    On CPU it is read from the profiler's record of every allocation, scratch of the kernels among them.
    """
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # it would report every start and stop on stderr
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True, acc_events=True) as profile:
        run()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    changes = [(event["ts"], event["args"]["Bytes"]) for event in events if event["name"] == "[memory]"]
    held = peak = 0
    for _, change in sorted(changes, key=lambda pair: pair[0]):
        held += change
        peak = max(peak, held)
    return peak


def single_runs(problem: Problem, device: torch.device, kernel_name: str) -> tuple[dict[str, Run], str]:
    """The whole problem on one device, by pass, and the kernel's name.

    A window, which no kernel of one device has, is what the library does with one rank.
    """
    q, k, v, dout = problem.tensors(problem.seq_len, device)
    kernel = choose_kernel(device.type, q.dtype, key_dim=problem.dim, name=kernel_name)
    if problem.description.window:
        mesh = init_device_mesh(device.type, (dist.get_world_size(),), mesh_dim_names=("all",))
        plan = ContextParallel(mesh, ring=None, ulysses=None, kernel=kernel_name)
        return plan_runs(plan, problem, (q, k, v, dout)), kernel.name
    shape = Shape.LOWER if problem.description.causal else Shape.FULL

    def forward() -> tuple[torch.Tensor, torch.Tensor]:
        return forward_block(kernel, q, k, v, shape, problem.scale)

    def both() -> None:
        backward_block(kernel, dout, q, k, v, *forward(), shape, problem.scale)

    return dict(zip(PASSES, (forward, both), strict=True)), kernel.name


def plan_runs(plan: ContextParallel, problem: Problem, tensors: tuple[torch.Tensor, ...]) -> dict[str, Run]:
    """What a plan does with this rank's part of the problem, by pass."""
    q, k, v, dout = tensors
    mask = problem.description
    options: dict[str, Any] = {"is_causal": mask.causal, "window_size": mask.window or None}

    def forward() -> None:
        with torch.no_grad():
            plan.attention(q, k, v, **options)

    def both() -> None:
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        torch.autograd.grad(plan.attention(*leaves, **options), leaves, dout)

    return dict(zip(PASSES, (forward, both), strict=True))


def measure(
    problem: Problem,
    variants: list[Variant],
    device: torch.device,
    *,
    rank: int,
    rounds: int,
    passes: tuple[str, ...] = PASSES,
    kernel: str = "auto",
    together: bool = True,
    memory: bool = True,
) -> list[Row]:
    """Every variant and pass of a problem on this rank.

    The single kernel and the variants take turns, so that a machine whose speed drifts treats them alike. Rounds of 0
    measure bytes and memory alone. together=False is for a rank whose peers are simulated.
    """
    single, kernel_name = single_runs(problem, device, kernel)
    rows, runs = [], []
    for variant in variants:
        plan = variant.plan(problem, device, kernel)
        tensors = problem.tensors(problem.seq_len // variant.ranks, device)
        formulas = sent_bytes(problem, variant, rank)
        for which, run in plan_runs(plan, problem, tensors).items():
            if which in passes:
                rows.append(Row(variant, which, rank, formulas[which], kernel=kernel_name))
                runs.append(run)
    for row, run in zip(rows, runs, strict=True):
        with counted(device) as traffic:
            seconds(run, device, together=together)  # the first use of shapes and buffers is not timed
        row.sent_bytes = traffic.sent_bytes
        if memory:
            row.peak_bytes = transient_bytes(run, device)
    cuda = device.type == "cuda"
    for number in range(-1 if rounds else 0, rounds):
        alone: dict[str, float] = {}
        for row, run in zip(rows, runs, strict=True):
            # A CUDA device that has just worked hard is slower: there the single kernel runs right before each row, and
            # as long as it.
            if cuda or row.passes not in alone:
                alone[row.passes] = seconds(
                    single[row.passes], device, together=together, repeats=RUNS_ON_CUDA if cuda else 1
                )
            if number < 0:
                continue  # warms up the single kernel
            repeats = RUNS_ON_CUDA * row.variant.ranks if cuda else 1
            with counted(device) as traffic:
                taken = seconds(run, device, together=together, repeats=repeats)
            row.single_s.append(alone[row.passes])
            row.method_s.append(taken)
            row.exposed_s.append(traffic.standstill.seconds() / repeats)
    return rows
