from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch

from cptrain.metrics import human
from cptrain.metrics.line import format_line
from cptrain.metrics.logger import Metrics
from cptrain.metrics.memory import Memory, read_memory
from cptrain.metrics.record import StepRecord, Summary
from cptrain.metrics.settings import MetricsConfig, ProfilingConfig

LINE = re.compile(
    r"step: (?P<step>\d+)  loss: (?P<loss>\d+\.\d{5})  grad_norm: (?P<grad_norm>\d+\.\d{4})  "
    r"memory: (?P<memory>\d+\.\d\d)GiB\((?P<share>\d+\.\d\d)%\)  tps: (?P<tps>[\d,]+)/(?P<per>gpu|rank) "
    r"\((?P<tps_total>[\d,]+) total\)  tflops: (?P<tflops>[\d,]+\.\d\d)  mfu: (?P<mfu>\d+\.\d\d%|n/a)  "
    r"lr: (?P<lr>\d\.\d{4}e[+-]\d\d)  tokens: (?P<tokens>[\d.]+[KMBT]?)  step_time: (?P<step_time>\d+\.\d\d)s  "
    r"data: (?P<data>\d+\.\d)%  eta: (?P<eta>\d+:\d\d:\d\d)"
)


class Clock:
    """Seconds that pass only when a test says so."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


def record(step: int, **changes: object) -> StepRecord:
    values: dict[str, object] = {
        "step": step,
        "loss": 4.123456789,
        "max_loss": 4.5,
        "grad_norm": 1.23456789,
        "lr": 3e-4,
        "tokens": 8192,
        "tokens_seen": 8192 * step,
        "step_time_s": 2.0,
        "data_time_s": 0.1,
        "flops": 4_000_000_000_000,
    }
    return StepRecord(**(values | changes))


def metrics(folder: Path, config: MetricsConfig | None = None, **changes: object) -> Metrics:
    values: dict[str, object] = {
        "rank": 0,
        "num_devices": 4,
        "device": torch.device("cpu"),
        "compute_dtype": torch.float32,
        "total_steps": 100,
    }
    return Metrics(config or MetricsConfig(enable_tensorboard=False), folder=folder, **(values | changes))


def written(folder: Path, name: str = "metrics.jsonl") -> list[dict]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


@pytest.fixture(autouse=True)
def messages(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    with caplog.at_level(logging.INFO, logger="cptrain"):
        yield caplog


def summary(**changes: object) -> Summary:
    values: dict[str, object] = {
        "step": 10,
        "loss": 4.12345,
        "max_loss": 5.0,
        "grad_norm": 1.2345,
        "lr": 3e-4,
        "tokens_seen": 1_310_000_000,
        "tps": 12345.0,
        "tps_total": 98760.0,
        "tflops": 412.1,
        "mfu_percent": 41.7,
        "step_time_s": 1.23,
        "data_time_s": 0.00615,
        "eta_s": 754.0,
        "memory": Memory(active_bytes=40 << 30, reserved_bytes=41 << 30, capacity_bytes=82 << 30),
    }
    return Summary(**(values | changes))


def test_metrics_line_has_torchtitans_grammar():
    assert format_line(summary(), device_word="gpu") == (
        "step: 10  loss: 4.12345  grad_norm: 1.2345  memory: 41.00GiB(50.00%)  tps: 12,345/gpu (98,760 total)  "
        "tflops: 412.10  mfu: 41.70%  lr: 3.0000e-04  tokens: 1.31B  step_time: 1.23s  data: 0.5%  eta: 0:12:34"
    )


@pytest.mark.parametrize("loss", [math.nan, math.inf, 123456.0])
@pytest.mark.parametrize("mfu", [None, 7.0])
def test_metrics_line_splits_into_pairs_whatever_the_values(loss, mfu):
    line = format_line(summary(loss=loss, mfu_percent=mfu), device_word="rank")
    pairs = dict(part.split(": ", 1) for part in line.split("  "))
    assert list(pairs) == [
        *("step", "loss", "grad_norm", "memory", "tps", "tflops", "mfu"),
        *("lr", "tokens", "step_time", "data", "eta"),
    ]
    assert pairs["mfu"] == ("n/a" if mfu is None else "7.00%")
    assert str(float(pairs["loss"])) == str(loss)


def test_metrics_line_of_a_cpu_run_counts_per_rank(tmp_path, messages):
    with metrics(tmp_path) as run:
        run.record(record(1))
    found = LINE.fullmatch(messages.messages[-1])
    assert found
    assert found["per"] == "rank"
    assert (found["tps"], found["tps_total"]) == ("1,024", "4,096")  # 8192 tokens in 2 s on 4 devices
    assert (found["tflops"], found["mfu"]) == ("0.50", "n/a")
    assert (found["step_time"], found["data"], found["tokens"]) == ("2.00", "5.0", "8.19K")


def test_metrics_rates_are_averaged_over_the_steps_since_the_last_line(tmp_path):
    with metrics(tmp_path, MetricsConfig(log_freq=3, enable_tensorboard=False)) as run:
        for step in range(1, 7):
            run.record(record(step, step_time_s=float(step), data_time_s=step / 4, tokens=100 * step, loss=step))
    lines = written(tmp_path)
    assert [line["step"] for line in lines] == [1, 3, 6]
    assert [line["step_time_s"] for line in lines] == [1.0, 2.5, 5.0]  # of steps 1 | 2, 3 | 4, 5, 6
    assert [line["data_time_s"] for line in lines] == [0.25, 0.625, 1.25]
    assert [line["tps_total"] for line in lines] == [100.0, 100.0, 100.0]
    assert [line["tps"] for line in lines] == [25.0, 25.0, 25.0]
    assert [line["loss"] for line in lines] == [1.0, 3.0, 6.0]


def test_metrics_are_due_at_the_first_the_last_and_every_nth_step(tmp_path):
    run = metrics(tmp_path, MetricsConfig(log_freq=4, enable_tensorboard=False), total_steps=11, resumed_step=5)
    assert [step for step in range(6, 12) if run.due(step)] == [6, 8, 11]
    run.close()


def test_metrics_read_device_values_only_when_due(tmp_path):
    class Unread:
        def __float__(self) -> float:
            raise AssertionError("the host would have waited for the device")

    config = MetricsConfig(log_freq=10, enable_tensorboard=False)
    with metrics(tmp_path, config) as run:
        run.record(record(1, loss=torch.tensor(2.5), extra={"long_context/docs_per_seq": torch.tensor(3)}))
        run.record(record(2, loss=Unread(), max_loss=Unread(), grad_norm=Unread(), extra={"x": Unread()}))
    (line,) = written(tmp_path)
    assert (line["loss"], line["long_context/docs_per_seq"]) == (2.5, 3.0)


def test_metrics_of_other_ranks_write_nothing(tmp_path, messages):
    with metrics(tmp_path / "out", rank=1) as run:
        run.record(record(1))
        run.validation(1, 2.0)
    assert not messages.messages
    assert not (tmp_path / "out").exists()


def test_metrics_eta_leaves_the_slow_first_step_out(tmp_path):
    clock = Clock()
    with metrics(tmp_path, total_steps=10, clock=clock, resumed_step=2) as run:
        for step, seconds in ((3, 60.0), (4, 2.0), (5, 4.0)):
            clock.now += seconds
            run.record(record(step, step_time_s=seconds))
    # 7 steps left at the only pace known; then at 2 s, then at 3 s on average.
    assert [line["eta_s"] for line in written(tmp_path)] == [7 * 60.0, 6 * 2.0, 5 * 3.0]


def test_metrics_eta_counts_the_time_between_steps(tmp_path):
    clock = Clock()
    with metrics(tmp_path, total_steps=4, clock=clock) as run:
        run.record(record(1))
        clock.now += 30.0  # a step of 2 s and a save
        run.record(record(2))
    assert written(tmp_path)[-1]["eta_s"] == 60.0


def test_metrics_mfu_is_a_share_of_the_peak_given(tmp_path, messages):
    config = MetricsConfig(peak_tflops=2.0, enable_tensorboard=False)
    with metrics(tmp_path, config) as run:
        run.record(record(1))
    assert written(tmp_path)[0]["mfu_percent"] == 25.0  # 4 TFLOP in 2 s on 4 devices: 0.5 of 2 TFLOP/s each
    assert "mfu: 25.00%" in messages.messages[-1]


def test_metrics_mfu_above_one_hundred_is_questioned_once(tmp_path, messages):
    config = MetricsConfig(peak_tflops=0.4, enable_tensorboard=False)
    with metrics(tmp_path, config) as run:
        for step in range(1, 4):
            run.record(record(step))
    warnings = [entry.getMessage() for entry in messages.records if entry.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert warnings[0].startswith("mfu: 125.00% is IMPOSSIBLE")
    assert "0.4 TFLOP/s" in warnings[0]


def test_metrics_mfu_at_one_hundred_is_believed(tmp_path, messages):
    with metrics(tmp_path, MetricsConfig(peak_tflops=0.5, enable_tensorboard=False)) as run:
        run.record(record(1))
    assert not [entry for entry in messages.records if entry.levelno == logging.WARNING]


def test_metrics_jsonl_keeps_every_digit(tmp_path):
    loss = 1 / 3
    with metrics(tmp_path) as run:
        run.record(record(1, loss=torch.tensor(loss, dtype=torch.float64), lr=1e-4 / 7, tokens_seen=2**53 + 1))
    (line,) = written(tmp_path)
    assert (line["loss"], line["lr"], line["tokens_seen"]) == (loss, 1e-4 / 7, 2**53 + 1)


def test_metrics_jsonl_is_on_disk_after_each_line(tmp_path):
    run = metrics(tmp_path)
    run.record(record(1))
    assert len(written(tmp_path)) == 1
    run.validation(1, 2.0)
    assert len(written(tmp_path)) == 2
    run.close()


def test_metrics_that_cannot_be_written_do_not_end_the_run(tmp_path, messages):
    full, gone = OSError(28, "No space left on device"), FileNotFoundError(2, "No such file or directory")
    with metrics(tmp_path, MetricsConfig(enable_tensorboard=True, log_freq=1)) as out:
        out.record(record(1))
        with mock.patch.object(out._jsonl, "write", side_effect=full):
            out.record(record(2))
            out.record(record(3))
        out.record(record(4))
        with mock.patch.object(out._tensorboard, "write", side_effect=gone):
            out.record(record(5))
    told = "cannot be written ([Errno 28] No space left on device): the run goes on, points will be missing"
    assert messages.text.count(f"metrics: metrics.jsonl {told}") == 1
    assert messages.text.count("metrics: TensorBoard cannot be written ([Errno 2] No such file or directory)") == 1
    assert [line["step"] for line in written(tmp_path)] == [1, 4, 5]


def test_metrics_close_tensorboard_where_the_lines_cannot_be_closed(tmp_path, messages):
    out = metrics(tmp_path, MetricsConfig(enable_tensorboard=True, log_freq=1))
    with (
        mock.patch.object(out._jsonl, "close", side_effect=OSError(28, "No space left on device")),
        mock.patch.object(out._tensorboard, "close") as closed,
    ):
        out.close()
    assert closed.called and "metrics: metrics.jsonl cannot be written" in messages.text
    out.close()


@pytest.mark.parametrize(("loss", "text"), [(math.nan, "nan"), (math.inf, "inf"), (-math.inf, "-inf")])
def test_metrics_jsonl_stays_strict_json_when_a_loss_is_no_number(tmp_path, loss, text):
    with metrics(tmp_path) as run:
        run.record(record(1, loss=loss))

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    assert json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)["loss"] == text


def test_metrics_validation_is_told_apart(tmp_path, messages):
    with metrics(tmp_path) as run:
        run.record(record(1))
        run.validation(1, torch.tensor(2.25), {"long_context/needle_acc": 0.5})
        run.validation(2, 2.125)
    train, validation, _ = written(tmp_path)
    assert (train["kind"], validation["kind"]) == ("train", "validation")
    assert (validation["step"], validation["loss"], validation["long_context/needle_acc"]) == (1, 2.25, 0.5)
    assert messages.messages[-2:] == [
        "validate step: 1  loss: 2.25000  needle_acc: 0.500",
        "validate step: 2  loss: 2.12500",
    ]


def interrupted(folder: Path) -> None:
    """A run that validates, takes five steps and dies in the middle of a line."""
    with metrics(folder) as run:
        run.validation(0, 5.0)
        for step in range(1, 6):
            run.record(record(step, loss=float(step)))
        run.validation(3, 4.0)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "kind": "tr')


def test_metrics_resume_has_each_step_once(tmp_path):
    interrupted(tmp_path)
    with metrics(tmp_path, resumed_step=3) as run:
        for step in (4, 5):
            run.record(record(step, loss=10.0 * step))
    lines = written(tmp_path)
    assert [(line["step"], line["kind"][0], line["loss"]) for line in lines] == [
        *[(0, "v", 5.0), (1, "t", 1.0), (2, "t", 2.0), (3, "t", 3.0), (3, "v", 4.0)],
        *[(4, "t", 40.0), (5, "t", 50.0)],
    ]


def test_metrics_resume_keeps_what_it_takes_back_in_a_file_beside(tmp_path):
    interrupted(tmp_path)
    metrics(tmp_path, resumed_step=3).close()
    first, second, torn = (tmp_path / "metrics.rolled_back.jsonl").read_text().splitlines()
    assert [json.loads(first)["step"], json.loads(second)["step"]] == [4, 5]
    assert torn == '{"step": 2, "kind": "tr'
    assert not (tmp_path / "metrics.jsonl.tmp").exists()


def test_metrics_start_from_scratch_takes_everything_back(tmp_path):
    interrupted(tmp_path)
    with metrics(tmp_path) as run:
        run.validation(0, 6.0)
    assert [(line["step"], line["loss"]) for line in written(tmp_path)] == [(0, 6.0)]


def test_metrics_resume_from_the_last_step_moves_nothing(tmp_path):
    with metrics(tmp_path) as run:
        run.record(record(1))
    before = (tmp_path / "metrics.jsonl").read_bytes()
    metrics(tmp_path, resumed_step=1).close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_metrics_memory_on_cpu_is_the_peak_of_this_process():
    before = read_memory(torch.device("cpu"))
    size = 64 << 20
    block = torch.ones(size, dtype=torch.uint8)
    after = read_memory(torch.device("cpu"))
    del block
    later = read_memory(torch.device("cpu"))
    assert 0 < before.reserved_bytes < after.capacity_bytes
    assert later.reserved_bytes == pytest.approx(after.reserved_bytes, abs=4 << 20)  # the kernel counts in batches
    assert after.reserved_bytes >= size
    assert (after.alloc_retries, after.ooms) == (None, None)


@pytest.mark.parametrize(
    ("number", "text"),
    [
        *[(0, "0"), (812, "812"), (999, "999"), (1000, "1.00K"), (65536, "65.5K"), (999_400, "999K")],
        *[(999_600, "1.00M"), (9_996_000, "10.0M"), (131_072_000, "131M"), (1_310_000_000, "1.31B")],
        *[(15_000_000_000_000, "15.0T"), (2_500_000_000_000_000, "2500T")],
    ],
)
def test_metrics_counts_are_short(number, text):
    assert human.count(number) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00:00"), (754, "0:12:34"), (59.6, "0:01:00"), (111600, "31:00:00"), (-3, "0:00:00")],
)
def test_metrics_durations_have_one_form(seconds, text):
    assert human.duration(seconds) == text


@pytest.mark.parametrize(
    ("key", "config"),
    [
        ("log_freq", MetricsConfig(log_freq=0)),
        ("peak_tflops", MetricsConfig(peak_tflops=0.0)),
        ("peak_tflops", MetricsConfig(peak_tflops=math.nan)),
        ("profile_freq", ProfilingConfig(profile_freq=3)),
        ("profiler_warmup", ProfilingConfig(profiler_warmup=0)),
        ("profiler_active", ProfilingConfig(profiler_active=0)),
        ("num_traces", ProfilingConfig(num_traces=-1)),
        ("save_traces_folder", ProfilingConfig(save_traces_folder=" ")),
    ],
)
def test_metrics_settings_name_the_wrong_key(key, config):
    assert [problem.key for problem in config.problems()] == [key]


def test_metrics_default_settings_have_no_problems():
    assert not [*MetricsConfig().problems(), *ProfilingConfig().problems()]
