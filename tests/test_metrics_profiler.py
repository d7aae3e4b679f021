from __future__ import annotations

import gzip
import json
import logging
from pathlib import Path

import pytest
import torch

from cptrain.metrics.profiler import profiling
from cptrain.metrics.settings import ProfilingConfig

CPU = torch.device("cpu")


def run(folder: Path, steps: int, *, rank: int = 0, resumed_step: int = 0, **settings: object) -> dict[str, list[int]]:
    """Take steps that each multiply matrices of their own size, step s of s x s; what each trace shows, by its path."""
    config = ProfilingConfig(**({"enable_profiling": True} | settings))
    assert not list(config.problems())
    with profiling(config, folder=folder, rank=rank, device=CPU, resumed_step=resumed_step) as profiler:
        for step in range(resumed_step + 1, resumed_step + steps + 1):
            torch.ones(step, step) @ torch.ones(step, step)
            profiler.step()
    return {str(path.relative_to(folder)): traced(path) for path in sorted(folder.rglob("*.gz"))}


def traced(path: Path) -> list[int]:
    with gzip.open(path) as file:
        events = json.load(file)["traceEvents"]
    return [event["args"]["Input Dims"][0][0] for event in events if event.get("name") == "aten::matmul"]


def test_profiler_traces_the_last_steps_of_each_cycle(tmp_path):
    traces = run(tmp_path, 13, profile_freq=5, profiler_warmup=1, profiler_active=2, num_traces=2, resumed_step=100)
    assert traces == {
        "profile/step-105/rank0_trace.json.gz": [104, 105],
        "profile/step-110/rank0_trace.json.gz": [109, 110],
    }


def test_profiler_stops_after_the_number_of_traces(tmp_path):
    assert list(run(tmp_path, 6, profile_freq=2, profiler_warmup=1, rank=3)) == ["profile/step-2/rank3_trace.json.gz"]
    assert len(run(tmp_path / "all", 6, profile_freq=2, profiler_warmup=1, num_traces=0)) == 3


def test_profiler_writes_what_it_has_when_the_run_ends_early(tmp_path):
    traces = run(tmp_path, 3, profile_freq=5, profiler_warmup=1, profiler_active=3)
    assert traces == {"profile/step-3/rank0_trace.json.gz": [3]}


@pytest.mark.parametrize("steps", [1, 3, 4])
def test_profiler_says_when_the_run_was_too_short_for_a_trace(tmp_path, caplog, steps):
    with caplog.at_level(logging.WARNING, logger="cptrain"):
        assert run(tmp_path, steps, profile_freq=5, profiler_warmup=2) == {}
    assert f"no trace was written: this process took {steps} steps" in caplog.text
    assert "profile_freq = 5" in caplog.text


def test_profiler_that_is_off_does_nothing(tmp_path):
    assert run(tmp_path, 20, enable_profiling=False) == {}
    assert list(tmp_path.iterdir()) == []


def test_profiler_refuses_a_memory_history_that_the_device_does_not_keep(tmp_path):
    with pytest.raises(
        RuntimeError, match=r"profiling\.enable_memory_snapshot = true: only CUDA .* this run is on cpu"
    ):
        run(tmp_path, 1, enable_memory_snapshot=True)
