"""torch.compile of context-parallel blocks: one graph for all of them, the same results, the same messages."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from small import loss_sum, plan, small_batch, small_model
from test_attention import make_plan, problem
from test_messages import LAYERS, logged, once
from test_packed import make_plan as make_balanced_plan
from tolerance import assert_matches
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from cptrain.parallel.activation_checkpoint import apply_activation_checkpoint
from cptrain.parallel.apply import compile_blocks

STEPS = 3
CASES = [((2, 1), "none"), ((2, 1), "selective"), ((2, 1), "full"), ((1, 2), "selective")]


def compiled_steps(degrees: tuple[int, int], mode: str) -> tuple[int, Counter, Counter]:
    """Graphs compiled in three steps, events of the last; results are checked against the same model in eager mode."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    cp = plan(*degrees)
    inputs = cp.shard(*small_batch(16))
    eager, compiled = small_model(num_layers=LAYERS), small_model(num_layers=LAYERS)
    for model in (eager, compiled):
        cp.apply(model, modules="layers.*.attention")
        apply_activation_checkpoint(model, mode)  # type: ignore[arg-type]
    compile_blocks(compiled, backend="aot_eager")
    expected = loss_sum(eager, *inputs)
    expected.backward()
    for step in range(STEPS):
        compiled.zero_grad()
        with torch._dynamo.config.patch(error_on_recompile=step > 0), logged() as log:
            loss = loss_sum(compiled, *inputs)
            forward = log.take()
            loss.backward()
            backward = log.take()
        assert_matches(loss, expected)
        for ours, theirs in zip(compiled.parameters(), eager.parameters(), strict=True):
            assert_matches(ours.grad, theirs.grad)
    return counters["stats"]["unique_graphs"], forward, backward


def compiled_steps_of_each_case(rank: int, world: int) -> dict:
    return {case: compiled_steps(*case) for case in CASES}


@pytest.fixture(scope="module")
def steps(pool) -> dict:
    return pool.run(2, compiled_steps_of_each_case)[0]


each_case = pytest.mark.parametrize(
    "case", CASES, ids=lambda case: f"ring {case[0][0]} x ulysses {case[0][1]}, {case[1]}"
)


@each_case
def test_compile_makes_one_graph_for_all_blocks_and_steps_that_equals_eager(steps, case):
    assert steps[case][0] == 1


@each_case
def test_compile_repeats_no_message_or_kernel_unless_checkpointing_is_full(steps, case):
    degrees, mode = case
    forward, backward = once(*degrees)
    assert steps[case][1:] == (forward, backward + forward if mode == "full" else backward)


class FakedAgain(TorchDispatchMode):
    """Runs every call of the attention operator once more without data, and compares what comes out."""

    compared = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        if func is torch.ops.cptrain.attention.default:
            with FakeTensorMode() as mode:
                fakes = func(*(mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in args))
            for fake, real in zip(fakes, results, strict=True):
                assert (fake.shape, fake.stride(), fake.dtype) == (real.shape, real.stride(), real.dtype)
            self.compared += 1
        return results


def compare_with_fakes(rank: int, world: int, options: dict[str, Any]) -> int:
    inputs = problem(4, 2, length=12 * world)
    with FakedAgain() as calls:
        plan = make_plan(**options)
        q, k, v, _ = plan.shard(*inputs, dim=2)
        for window_size in (None, 3, 12 * world - 1):
            plan.attention(q, k, v, is_causal=True, window_size=window_size)
        packs = make_balanced_plan(**options)
        for lengths in ([12 * world], [2] * (6 * world)):  # round a ring, and straight
            batch = packs.pack(torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)).expand(2, -1))
            with batch:
                packs.attention(*batch.shard(*inputs[:3], dim=2), is_causal=True)
    return calls.compared


@pytest.mark.parametrize(
    ("world", "options"),
    [(1, {}), (2, {"ring": 2}), (2, {"ring": 2, "method": "all_gather"}), (2, {"ulysses": 2}), (3, {"ring": 3})],
    ids=str,
)
def test_compile_is_told_the_shapes_that_attention_returns(pool, world, options):
    assert pool.run(world, compare_with_fakes, options) == [5] * world
