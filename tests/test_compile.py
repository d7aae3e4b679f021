"""torch.compile of context-parallel blocks: one graph for all of them, the same results, the same messages."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from small import loss_sum, plan, small_batch, small_model
from test_messages import LAYERS, logged, once
from tolerance import assert_matches

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
