"""Plant faults in context parallelism, one at a time, and see that the tests notice each.

A test that cannot fail proves nothing.

Each fault is one edit of one file, made in a copy of the checkout. Ends with 1 if any fault leaves the tests green.

    python tools/plant_faults.py                 # all of them, a few minutes
    python tools/plant_faults.py --only stale-keys,dropped-window
    python tools/plant_faults.py --list
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
TESTS = (
    "tests/test_schedule.py",
    "tests/test_kernels.py",
    "tests/test_balance.py",
    "tests/test_message_order.py",
    "tests/test_packed.py",
    "tests/test_attention.py",
)


@dataclass(frozen=True)
class Fault:
    """`old`, found exactly once in `file`, becomes `new`."""

    name: str
    what: str
    file: str
    old: str
    new: str


FAULTS = (
    Fault(
        "off-by-one",
        "a causal block hides each query's own key",
        "schedule.py",
        "width, high = k.length, q.start - k.start",
        "width, high = k.length, q.start - k.start - 1",
    ),
    Fault(
        "swapped-halves",
        "the two chunks of a zigzag shard change places in the schedule",
        "layout.py",
        "for i, chunk in enumerate(self.chunks[rank]):",
        "for i, chunk in enumerate(self.chunks[rank][::-1]):",
    ),
    Fault(
        "dropped-hop",
        "the last hop of a ring is received and not computed",
        "ring.py",
        "                compute(self._piece(self._sources(revolution, batch), k, v, held))",
        "                if arriving:\n"
        "                    compute(self._piece(self._sources(revolution, batch), k, v, held))",
    ),
    Fault(
        "stale-keys",
        "backward goes on with the keys it has instead of those it received",
        "ring.py",
        "buffers.give_back(*(b for b in held if not (goes_on and b is start) and b is not kept))\n"
        "                    held = arriving",
        "buffers.give_back(*arriving)",
    ),
    Fault(
        "wrong-group",
        "gradients that leave an inner ring go round the outer ring of another place",
        "groups.py",
        "outer = ranks[place % inner_degree :: inner_degree]",
        "outer = ranks[(place // inner_degree) % inner_degree :: inner_degree]",
    ),
    Fault(
        "missing-scale",
        "backward forgets the scale of the scores",
        "compute.py",
        "backward_launch(self._kernel, *ours, launch, self._scale)",
        "backward_launch(self._kernel, *ours, launch, 1.0)",
    ),
    Fault(
        "bf16-accumulator",
        "sums over hops are rounded at every hop",
        "carrier.py",
        "return torch.float64 if dtype == torch.float64 else torch.float32",
        "return dtype",
    ),
    Fault(
        "lse-sign",
        "the weights of two blocks are exchanged when they are merged",
        "merging.py",
        "torch.sigmoid(block_lse - lse)",
        "torch.sigmoid(lse - block_lse)",
    ),
    Fault(
        "wrong-heads",
        "Ulysses deals heads out like cards, tearing groups of query heads apart",
        "ulysses.py",
        "given = [x.chunk(size, from_dim) for x in xs]",
        "given = [[x[:, p::size] if from_dim == 1 else x.chunk(size, 2)[p] for p in range(size)] for x in xs]",
    ),
    Fault(
        "dropped-window",
        "the sliding window is lost on the way to the schedule",
        "attention.py",
        "self.num_ranks * tokens), Mask(causal, window)",
        "self.num_ranks * tokens), Mask(causal, 0)",
    ),
    Fault(
        "lost-gradients",
        "keys sent only where they are needed: gradients that come back are not added",
        "exchange.py",
        "whole.add(ranges, part)",
        "whole.add((), part)",
    ),
    Fault(
        "unpermuted-gather",
        "gathered keys stay in the order of the ranks",
        "all_gather.py",
        "both = self._reordered(parts, to_sequence).view(",
        "both = parts.movedim(0, 2).reshape(",
    ),
    Fault(
        "no-documents",
        "tokens see the documents before their own",
        "packing.py",
        "return Mask(causal=True, window=window, documents=self.documents)",
        "return Mask(causal=True, window=window)",
    ),
    Fault(
        "shifted-documents",
        "documents begin a token late",
        "packing.py",
        "return Documents((*starts.tolist(), ids.numel()), tuple(padding.tolist()))",
        "return Documents((0, *(s + 1 for s in starts.tolist()[1:]), ids.numel()), tuple(padding.tolist()))",
    ),
    Fault(
        "seen-padding",
        "padding is a document like any other",
        "packing.py",
        "documents = Documents(take(num_offsets), take(num_padding))",
        "documents = Documents(take(num_offsets), take(num_padding)[:0])",
    ),
    Fault(
        "wrong-owner",
        "a rank cuts tensors as the next one should",
        "packed_batch.py",
        "return self.packing.positions_of(plan.ring_rank)",
        "return self.packing.positions_of(plan.ring_rank - 1)",
    ),
    Fault(
        "overwritten-rows",
        "a rectangle's result replaces that of its rows so far instead of being merged",
        "compute.py",
        "if not all_new:",
        "if False:",
    ),
    Fault(
        "torn-segments",
        "of blocks in one kernel call, the second begins a key early",
        "launches.py",
        "return segments_of(queries, keys, device)",
        "return segments_of(queries, [keys[0] - 1, *keys[1:-1], keys[-1] + 1], device)",
    ),
    Fault(
        "narrow-gradients",
        "gradients travel home in the dtype of the keys",
        "exchange.py",
        "whole = tuple(x.result() for x in sums)",
        "whole = tuple(x.result().to(k.dtype) for x in sums)",
    ),
    Fault(
        "shuffled-hops",
        "keys of hops that are computed together lie in another order than that of the sequence",
        "parts.py",
        "put(x, place, part)",
        "put(x, place[::-1], part)",
    ),
    Fault(
        "waiting-circle",
        "backward looks ahead past hops that move nothing here, so ranks start messages in different orders",
        "exchange.py",
        "empty=True",
        "empty=False",
    ),
    Fault(
        "overlapping-rows",
        "blocks that share rows go into one kernel call",
        "launches.py",
        "if earlier[-1].q_stop <= block.q_start",
        "if earlier[-1].q_start <= block.q_start",
    ),
    Fault(
        "never-left",
        "a batch is still entered after it was left",
        "packed_batch.py",
        "self.plan._entered.leave()",
        "pass",
    ),
    Fault(
        "unguarded-recompute",
        "a backward pass may recompute inside of another batch",
        "packed_batch.py",
        "return _Guard.apply(out, self)",
        "return out",
    ),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="print the faults and stop")
    parser.add_argument("--only", default="", help="names, separated by commas")
    parser.add_argument("--tests", nargs="+", default=TESTS, help="what must notice")
    arguments = parser.parse_args()
    wanted = arguments.only.split(",") if arguments.only else [fault.name for fault in FAULTS]
    unknown = set(wanted) - {fault.name for fault in FAULTS}
    if unknown:
        parser.error(f"no fault is called {', '.join(sorted(unknown))}; see --list")
    faults = [fault for fault in FAULTS if fault.name in wanted]
    if arguments.list:
        for fault in faults:
            print(f"{fault.name:<18} {fault.file:<14} {fault.what}")
        return 0
    missed = [fault.name for fault in faults if not notices(fault, arguments.tests)]
    print(
        f"{len(faults) - len(missed)} of {len(faults)} faults noticed"
        + (f"; missed: {', '.join(missed)}" if missed else "")
    )
    return 1 if missed else 0


def notices(fault: Fault, tests: list[str]) -> bool:
    """Whether the tests fail with this fault planted."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="cptrain-fault-") as folder:
        copy = Path(folder) / "checkout"
        for part in ("cptrain", "tests", "configs"):
            shutil.copytree(ROOT / part, copy / part, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", copy)
        plant(fault, copy)
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests],
            cwd=copy,
            env={**os.environ, "PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
    summary = next((line for line in reversed(done.stdout.splitlines()) if line.startswith(("FAILED", "ERROR"))), "")
    verdict = (
        "noticed"
        if done.returncode == 1
        else "MISSED"
        if done.returncode == 0
        else f"pytest ended with {done.returncode}"
    )
    print(f"{fault.name:<18} {verdict:<8} {time.perf_counter() - start:5.1f} s  {summary[:110]}", flush=True)
    return done.returncode == 1


def plant(fault: Fault, checkout: Path) -> None:
    """Make the edit; RuntimeError if the line it changes is not there any more."""
    path = checkout / "cptrain" / "context_parallel" / fault.file
    source = path.read_text(encoding="utf-8")
    if source.count(fault.old) != 1:
        raise RuntimeError(f"{fault.name}: {fault.file} holds {source.count(fault.old)} times, not once:\n{fault.old}")
    path.write_text(source.replace(fault.old, fault.new), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
