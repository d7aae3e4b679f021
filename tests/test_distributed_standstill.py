"""What is counted as standing still for messages: all that a late rank makes the others wait for, and no work."""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.distributed as dist
from test_attention import make_plan, problem

from cptrain.distributed.standstill import measured_standstill, standing_still

CPU = torch.device("cpu")
LATE_S = 0.4  # of one rank: far more than messages of these sizes take
PLANS: dict[str, dict[str, Any]] = {
    "ring": {"ring": 2},
    "ring without overlap": {"ring": 2, "overlap": False},
    "double ring of 2": {"ring": 2, "ring_inner_degree": 2},
    "keys that a window reaches": {"ring": 2, "window_size": 4},
    "ulysses": {"ulysses": 2},
    "all-gather": {"ring": 2, "method": "all_gather"},
    "all-gather without overlap": {"ring": 2, "method": "all_gather", "overlap": False},
}


def stand_still(rank: int, world: int) -> dict[str, list[float]]:
    """Seconds of each plan, in forward and in backward passes, to both of which the last rank comes late."""
    found: dict[str, list[float]] = {}
    for name, options in PLANS.items():
        window_size = options.get("window_size")
        plan = make_plan(**{key: value for key, value in options.items() if key != "window_size"})
        inputs = [plan.shard(x, dim=2) for x in problem(4, 4, length=24)]
        for measures in (False, True):  # messages are slower the first time
            q, k, v, dout = (x.clone().requires_grad_() for x in inputs)
            for direction in ("forward", "backward"):
                dist.barrier()
                with measured_standstill(CPU) as standstill:
                    if measures and rank == world - 1:
                        time.sleep(LATE_S)
                    if direction == "forward":
                        out = plan.attention(q, k, v, is_causal=True, window_size=window_size)
                    else:
                        torch.autograd.grad(out, (q, k, v), dout)
                if measures:
                    found.setdefault(name, []).append(standstill.seconds())
    return found


def test_standstill_is_what_a_late_rank_makes_the_others_wait(pool):
    prompt, late = pool.run(2, stand_still)
    for name in PLANS:
        for direction, waits, works in zip(("forward", "backward"), prompt[name], late[name], strict=True):
            assert waits > LATE_S / 2 > works, f"{name}, {direction}: {waits:.3f} s, the late rank {works:.3f} s"


def test_standstill_is_counted_inside_of_the_innermost_block_alone():
    def wait() -> None:
        with standing_still():
            time.sleep(0.01)

    wait()
    with measured_standstill(CPU) as standstill:
        time.sleep(0.01)
        assert standstill.seconds() == 0
        wait()
        once = standstill.seconds()
        with measured_standstill(CPU) as inner:
            wait()
        assert standstill.seconds() == once >= 0.01 <= inner.seconds()
        wait()
        twice = standstill.seconds()
    wait()
    assert standstill.seconds() == twice >= once + 0.01
    with measured_standstill(CPU, wanted=False) as unwanted:
        wait()
    assert unwanted.seconds() == 0
