"""Time one training step at context parallel 2 and tensor parallel 2 against one rank, and that against a bare loop.

Every case runs in processes of its own with --threads threads per rank; cases take turns for --rounds rounds, so that a
machine whose speed drifts treats them alike. Ratios are medians over rounds of the same round's times: "over one rank"
and "over bare" are speed-ups over the trainer on one rank and over the bare loop. Attention is causal over the whole
sequence.

What two ranks can gain is what the machine gives to two processes at once: "two_runs" is twice the one-rank run, side
by side, without a message between them. "in_step" is the same, but the two wait for each other before each block,
forward and backward: what cores whose speed drifts apart give to ranks that need each other. "torch_ring" is the ring
of 2 with torch's own ring attention in place of ours. The "torchtitan_" cases, for which more has to be installed (see
tools/torchtitan_step.py), are the same steps by torchtitan's trainer; "over one rank" is then over its own.

"CPU s/step" is what the threads of all ranks compute and copy in a step, without what they wait for each other: over
that of one rank it says what parallelism costs on cores of whatever speed.

    python tools/bench_step.py                       # the table of the README
    python tools/bench_step.py --cases one,cp4 --layers 2 --tokens 4096
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from torchtitan_step import missing, time_torchtitan

if TYPE_CHECKING:
    from cptrain.context_parallel import ContextParallel
    from cptrain.models.llama import Llama

CASES = {
    "bare": (1, {}),
    "one": (1, {}),
    "two_runs": (1, {}),
    "in_step": (1, {}),
    "cp2": (2, {"ring_degree": 2}),
    "torch_ring": (2, {"ring_degree": 2}),
    "ulysses2": (2, {"ulysses_degree": 2}),
    "tp2": (2, {"tensor_parallel_degree": 2}),
    "fsdp2": (2, {"data_parallel_shard_degree": 2}),
    "cp4": (4, {"ring_degree": 4}),
    "torchtitan_one": (1, {}),
    "torchtitan_cp2": (2, {"context_parallel_degree": 2}),
    "torchtitan_tp2": (2, {"tensor_parallel_degree": 2}),
}
TWICE = ("two_runs", "in_step")  # two processes, each of which does all the work
PEER = "torchtitan_"


def main() -> None:
    arguments = parse()
    if arguments.child:
        run_case(arguments)
        return
    names = arguments.cases.split(",")
    times: dict[str, list[float]] = {name: [] for name in names}
    cpu_times: dict[str, list[float]] = {name: [] for name in names}
    for number in range(arguments.rounds):
        for name in names:
            seconds, cpu_seconds = measure(arguments, name)
            times[name].append(seconds)
            cpu_times[name].append(cpu_seconds)
            print(f"round {number + 1}  {name:<10} {seconds:8.3f} s/step  {cpu_seconds:8.3f} CPU s/step", flush=True)
    print(
        f"\n{arguments.layers} layers, dim {arguments.dim}, {arguments.heads} heads, "
        f"{arguments.kv_heads or arguments.heads} kv heads, vocabulary {arguments.vocab}, fp32, activation "
        f"checkpointing {arguments.checkpointing}, one sequence of {arguments.tokens} tokens, {arguments.threads} "
        f"thread(s) per rank, {arguments.rounds} rounds of {arguments.steps} steps after {arguments.warmup}"
    )
    print(
        "| case | processes | s/step (median) | over one rank | over bare | of two runs | CPU s/step | over one rank |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for name in names:
        processes = 2 if name in TWICE else CASES[name][0]
        share = work = "-"
        one = f"{PEER}one" if name.startswith(PEER) else "one"
        over_one, over_bare = (
            f"{ratio(times[alone], times[name]) * (2 if name in TWICE else 1):.3f}x" if alone in times else "-"
            for alone in (one, "bare")
        )
        if one in times:
            work = f"{ratio(cpu_times[name], cpu_times[one]) / (2 if name in TWICE else 1):.3f}"
        if "two_runs" in times and processes == 2:
            share = f"{ratio(times['two_runs'], times[name]) / (1 if name in TWICE else 2):.1%}"
        seconds, cpu_seconds = (f"{statistics.median(of[name]):.3f}" for of in (times, cpu_times))
        print(f"| {name} | {processes} | {seconds} | {over_one} | {over_bare} | {share} | {cpu_seconds} | {work} |")


def ratio(above: list[float], below: list[float]) -> float:
    """The median over rounds of above / below."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--cases", default="bare,one,two_runs,in_step,cp2,torch_ring,tp2", help=f"of {', '.join(CASES)}"
    )
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--kv-heads", type=int, default=0, help="0 = heads")
    parser.add_argument("--vocab", type=int, default=2048)
    parser.add_argument("--tokens", type=int, default=8192, help="global length of the one sequence")
    parser.add_argument("--threads", type=int, default=1, help="per rank")
    parser.add_argument("--warmup", type=int, default=1, help="steps before the clock starts")
    parser.add_argument(
        "--steps", type=int, default=2, help="timed steps of each case in each round; the fastest counts"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--checkpointing", default="none", choices=("none", "selective", "full"))
    parser.add_argument("--child", default="", help=argparse.SUPPRESS)
    parser.add_argument("--result", default="", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if unknown := [name for name in arguments.cases.split(",") if name not in CASES]:
        parser.error(f"--cases: {', '.join(unknown)} is not one of {', '.join(CASES)}")
    if PEER in arguments.cases and (absent := missing()):
        parser.error(f"--cases: {PEER}* needs {', '.join(absent)}: see tools/torchtitan_step.py, or leave them out")
    return arguments


def measure(arguments: argparse.Namespace, name: str) -> tuple[float, float]:
    """Seconds per step of one case, in fresh processes, and CPU seconds of all of them.

    Of TWICE, which share the machine, the mean of both and the CPU seconds of both.
    """
    with tempfile.TemporaryDirectory() as folder:
        results = [Path(folder) / str(number) for number in range(2 if name in TWICE else 1)]
        running = [launch(arguments, name, result) for result in results]
        if not all_succeed(running):
            raise SystemExit(f"{name} failed; see above")
        seconds, cpu_seconds = zip(*(json.loads(result.read_text()) for result in results), strict=True)
        return statistics.mean(seconds), sum(cpu_seconds)


def all_succeed(running: list[subprocess.Popen]) -> bool:
    """Wait for the processes, of which none is left waiting for one that failed."""
    while any(process.poll() is None for process in running):
        if any(process.poll() for process in running):
            for process in running:
                process.terminate()
        time.sleep(0.1)
    return not any(process.returncode for process in running)


def launch(arguments: argparse.Namespace, name: str, result: Path) -> subprocess.Popen:
    """Start the ranks of one case, which write what they measured to `result`."""
    ranks = CASES[name][0]
    torchrun = f"torch.distributed.run --rdzv-backend c10d --rdzv-endpoint localhost:0 --nproc-per-node {ranks}"
    command = [sys.executable, *(["-m", *torchrun.split()] if ranks > 1 or name.startswith(PEER) else [])]
    command += [__file__, *sys.argv[1:], "--child", name, "--result", str(result)]
    return subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": str(arguments.threads)})


def run_case(arguments: argparse.Namespace) -> None:
    import torch

    from cptrain.distributed.process_group import process_group
    from cptrain.distributed.settings import CommConfig

    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as folder:
        if arguments.child.startswith(PEER):
            seconds = time_peer(arguments, Path(folder))
        else:
            with process_group(CommConfig(), torch.device("cpu")):
                timed = time_bare_loop if arguments.child == "bare" else time_trainer
                seconds = timed(arguments, Path(folder))
    if int(os.environ.get("RANK", 0)) == 0:
        Path(arguments.result).write_text(json.dumps(seconds))


def settings_of(arguments: argparse.Namespace, folder: Path):
    from cptrain.train.settings import TrainSettings

    def change(section, **keys):
        return dataclasses.replace(section, **keys)

    default = TrainSettings()
    return change(
        default,
        job=change(default.job, dump_folder=str(folder)),
        model=change(
            default.model,
            dim=arguments.dim,
            num_layers=arguments.layers,
            num_heads=arguments.heads,
            num_kv_heads=arguments.kv_heads or arguments.heads,
            vocab_size=arguments.vocab,
        ),
        data=change(default.data, document_mask=False),
        training=change(default.training, seq_len=arguments.tokens, steps=arguments.warmup + arguments.steps),
        parallelism=change(default.parallelism, **CASES[arguments.child][1]),
        activation_checkpoint=change(default.activation_checkpoint, mode=arguments.checkpointing),
        checkpoint=change(default.checkpoint, enable=False),
        validation=change(default.validation, enable=False),
        metrics=change(default.metrics, enable_tensorboard=False),
    )


class Clock:
    """Seconds, and CPU seconds of all threads of this process, of each step after the first `warmup`."""

    def __init__(self, warmup: int) -> None:
        self._warmup = warmup
        self.seconds: list[float] = []
        self.cpu_seconds: list[float] = []

    @contextmanager
    def step(self) -> Iterator[None]:
        start, cpu_start = time.perf_counter(), time.process_time()
        yield
        if self._warmup:
            self._warmup -= 1
            return
        self.seconds.append(time.perf_counter() - start)
        self.cpu_seconds.append(time.process_time() - cpu_start)


def time_trainer(arguments: argparse.Namespace, folder: Path) -> tuple[float, float]:
    """Seconds of the fastest timed step of the real trainer, and the fewest CPU seconds of one, of all ranks."""
    import torch
    import torch.distributed as dist

    from cptrain.distributed.host import prepare_host
    from cptrain.train.trainer import Trainer

    device = torch.device("cpu")
    prepare_host(device)  # as cptrain.train does
    clock = Clock(arguments.warmup)
    with Trainer(settings_of(arguments, folder), device) as trainer:
        if arguments.child == "torch_ring":
            use_torch_ring(trainer.model, trainer.stage.context)
        elif arguments.child == "in_step":
            meet_at_blocks(trainer.model, Path(arguments.result))
        for _ in range(arguments.warmup + arguments.steps):
            dist.barrier()
            with clock.step():
                trainer.train_step()
        return fastest(clock)


def time_peer(arguments: argparse.Namespace, folder: Path) -> tuple[float, float]:
    """The same of torchtitan's trainer."""
    import torch.distributed as dist

    clock = Clock(arguments.warmup)
    time_torchtitan(arguments, folder, clock, CASES[arguments.child][1])
    seconds = fastest(clock)
    dist.destroy_process_group()
    return seconds


def fastest(clock: Clock) -> tuple[float, float]:
    """Seconds of the fastest step of this rank, and the fewest CPU seconds that all ranks together took for one."""
    import torch
    import torch.distributed as dist

    cpu_seconds = torch.tensor(clock.cpu_seconds)
    dist.all_reduce(cpu_seconds)
    return min(clock.seconds), min(cpu_seconds.tolist())


def meet_at_blocks(model: Llama, result: Path) -> None:
    """Have this process, whose result is called "0" or "1", and its peer wait for each other before every block."""
    import torch.distributed as dist

    store = dist.FileStore(str(result.with_name("meeting")), 2)
    peers = dist.ProcessGroupGloo(store, int(result.name), 2, timedelta(minutes=10))

    def meet(*_: object) -> None:
        peers.barrier().wait()

    for layer in model.layers:
        layer.register_forward_pre_hook(meet)
        layer.register_full_backward_pre_hook(meet)


def use_torch_ring(model: Llama, plan: ContextParallel) -> None:
    """Give a model on a zigzag ring the attention of torch's own template of a ring, around the same kernel."""
    import torch
    import torch.distributed.tensor.experimental._context_parallel._attention as theirs

    from cptrain.context_parallel import dispatch

    group = plan.mesh.get_group(plan.ring)
    aten = torch.ops.aten

    def forward_block(q, k, v, *, is_causal):
        return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, is_causal)

    def backward_block(*, grad_out, query, key, value, out, logsumexp, is_causal):
        return aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad_out, query, key, value, out, logsumexp, 0.0, is_causal
        )

    class TorchRing(torch.autograd.Function):
        @staticmethod
        def forward(ctx, q, k, v):
            out, lse = theirs._templated_ring_attention(group, 2, forward_block, q, k, v, is_causal=True)
            ctx.save_for_backward(q, k, v, out, lse)
            return out

        @staticmethod
        def backward(ctx, grad_out):
            return theirs._templated_ring_attention_backward(
                group, 2, backward_block, grad_out, "grad_out", *ctx.saved_tensors, is_causal=True
            )

    def attention(q, k, v, *, is_causal, window_size=None, scale=None):
        return TorchRing.apply(q, k, v)

    for name, module in dispatch.match(model, "*.attention").items():
        dispatch.install(name, module, attention, None)


def time_bare_loop(arguments: argparse.Namespace, folder: Path) -> tuple[float, float]:
    """The same of this model and optimizer in a loop anyone would write."""
    import torch
    import torch.nn.functional as F

    from cptrain.models.init import initialise
    from cptrain.models.llama import Llama

    settings = settings_of(arguments, folder)
    model = Llama(settings.shape(arguments.vocab))
    initialise(model, seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=8e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    tokens = torch.randint(0, 256, (1, arguments.tokens + 1))
    positions = torch.arange(arguments.tokens)[None]
    clock = Clock(arguments.warmup)
    for _ in range(arguments.warmup + arguments.steps):
        with clock.step():
            loss = F.cross_entropy(model(tokens[:, :-1], positions).flatten(0, 1), tokens[:, 1:].flatten())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    return min(clock.seconds), min(clock.cpu_seconds)


if __name__ == "__main__":
    main()
