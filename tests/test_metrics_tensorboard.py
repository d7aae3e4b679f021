from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cptrain.metrics.logger import Metrics
from cptrain.metrics.memory import Memory
from cptrain.metrics.record import StepRecord, Summary
from cptrain.metrics.settings import MetricsConfig
from cptrain.metrics.tags import curves

ON_EVERY_DEVICE = {
    *("grad_norm", "n_tokens_seen", "throughput(tps)", "tflops", "mfu(%)", "time_metrics/end_to_end(s)"),
    *("time_metrics/data_loading(s)", "time_metrics/data_loading(%)", "memory/max_active(GiB)"),
    *("memory/max_active(%)", "memory/max_reserved(GiB)", "memory/max_reserved(%)"),
    *("lr", "loss_metrics/global_avg_loss", "loss_metrics/global_max_loss", "validation_metrics/loss"),
}


def train(folder: Path, steps: range, *, style: str = "titan", resumed_step: int = 0, scale: float = 1.0) -> None:
    config = MetricsConfig(tag_style=style, peak_tflops=100.0)
    with Metrics(
        config,
        folder=folder,
        rank=0,
        num_devices=2,
        device=torch.device("cpu"),
        compute_dtype=torch.float32,
        total_steps=10,
        resumed_step=resumed_step,
        toml='[job]\nname = "toy"\n',
        hyper_parameters={"optimizer.lr": 0.25, "training.seq_len": 2048, "job.name": "toy"},
    ) as metrics:
        for step in steps:
            if step == 0:
                metrics.validation(0, 9.0 * scale)
                continue
            metrics.record(
                StepRecord(
                    step=step,
                    loss=step * scale,
                    max_loss=step * scale + 1,
                    grad_norm=0.5,
                    lr=0.25,
                    tokens=4096,
                    tokens_seen=4096 * step,
                    step_time_s=2.0,
                    data_time_s=0.5,
                    flops=10**12,
                    extra={"long_context/docs_per_seq": 3.0},
                )
            )
        metrics.validation(steps[-1], 7.0 * scale)


def read(folder: Path) -> EventAccumulator:
    events = EventAccumulator(str(folder / "tb"))
    events.Reload()
    return events


def points(events: EventAccumulator, tag: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in events.Scalars(tag)]


def test_tensorboard_has_torchtitans_tags(tmp_path):
    train(tmp_path, range(1, 3))
    assert set(read(tmp_path).Tags()["scalars"]) == ON_EVERY_DEVICE | {"long_context/docs_per_seq"}


def test_tensorboard_has_hugging_faces_tags_where_it_has_any(tmp_path):
    train(tmp_path, range(1, 3), style="hf")
    renamed = {
        "loss_metrics/global_avg_loss": "train/loss",
        "grad_norm": "train/grad_norm",
        "lr": "train/learning_rate",
        "n_tokens_seen": "train/num_input_tokens_seen",
        "validation_metrics/loss": "eval/loss",
    }
    expected = {renamed.get(tag, tag) for tag in ON_EVERY_DEVICE} | {"long_context/docs_per_seq"}
    assert set(read(tmp_path).Tags()["scalars"]) == expected


def test_tensorboard_values_are_those_of_the_steps(tmp_path):
    train(tmp_path, range(1, 3))
    events = read(tmp_path)
    values = {tag: points(events, tag)[-1] for tag in events.Tags()["scalars"] if not tag.startswith("memory")}
    assert values == {
        "loss_metrics/global_avg_loss": (2, 2.0),
        "loss_metrics/global_max_loss": (2, 3.0),
        "grad_norm": (2, 0.5),
        "lr": (2, 0.25),
        "n_tokens_seen": (2, 8192.0),
        "throughput(tps)": (2, 1024.0),
        "tflops": (2, 0.25),
        "mfu(%)": (2, 0.25),
        "time_metrics/end_to_end(s)": (2, 2.0),
        "time_metrics/data_loading(s)": (2, 0.5),
        "time_metrics/data_loading(%)": (2, 25.0),
        "validation_metrics/loss": (2, 7.0),
        "long_context/docs_per_seq": (2, 3.0),
    }


def test_tensorboard_of_a_cuda_run_counts_what_its_allocator_went_through():
    memory = Memory(active_bytes=1 << 30, reserved_bytes=3 << 30, capacity_bytes=4 << 30, alloc_retries=5, ooms=6)
    points = curves(
        Summary(
            **dict.fromkeys(("step", "tokens_seen"), 1),
            **dict.fromkeys(("loss", "max_loss", "grad_norm", "lr", "tps", "tps_total", "tflops", "eta_s"), 1.0),
            **dict.fromkeys(("step_time_s", "data_time_s"), 1.0),
            mfu_percent=None,
            memory=memory,
        )
    )
    assert {tag: value for tag, value in points.items() if tag.startswith("memory")} == {
        "memory/max_active(GiB)": 1.0,
        "memory/max_active(%)": 25.0,
        "memory/max_reserved(GiB)": 3.0,
        "memory/max_reserved(%)": 75.0,
        "memory/num_alloc_retries": 5,
        "memory/num_ooms": 6,
    }
    assert "mfu(%)" not in points


def test_tensorboard_shows_the_resolved_settings(tmp_path):
    train(tmp_path, range(1, 2))
    events = read(tmp_path)
    (text,) = events.Tensors("config/text_summary")
    assert text.tensor_proto.string_val[0].decode() == '```toml\n[job]\nname = "toy"\n```'
    hyper_parameters = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    assert b"optimizer.lr" in hyper_parameters
    assert [path.name for path in (tmp_path / "tb").iterdir() if path.is_dir()] == []  # not a run of their own


def test_tensorboard_curves_do_not_overlap_after_a_resume(tmp_path):
    train(tmp_path, range(1, 7))
    train(tmp_path, range(4, 6), resumed_step=3, scale=10.0)
    events = read(tmp_path)
    assert points(events, "loss_metrics/global_avg_loss") == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0), (5, 50.0)]
    assert points(events, "validation_metrics/loss") == [(5, 70.0)]


def test_tensorboard_curves_start_over_with_the_training(tmp_path):
    train(tmp_path, range(4))
    train(tmp_path, range(2), scale=10.0)
    events = read(tmp_path)
    assert points(events, "loss_metrics/global_avg_loss") == [(1, 10.0)]
    assert points(events, "validation_metrics/loss") == [(0, 90.0), (1, 70.0)]


def test_tensorboard_can_be_switched_off(tmp_path):
    metrics = Metrics(
        MetricsConfig(enable_tensorboard=False),
        folder=tmp_path,
        rank=0,
        num_devices=1,
        device=torch.device("cpu"),
        compute_dtype=torch.float32,
        total_steps=1,
    )
    metrics.close()
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("cptrain.metrics.settings", ("torch", "tensorboard")),
        ("cptrain.metrics.flops", ("torch", "tensorboard")),
        ("cptrain.optim.settings", ("torch",)),
        ("cptrain.metrics.logger", ("tensorboard",)),
    ],
)
def test_metrics_imports_stay_light(module, absent):
    code = f"import sys, {module}; print([name for name in {absent!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
