"""The command a newcomer types: two ranks under torchrun train, are stopped, go on, and leave their files."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from runs import write_text
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_train_cli import LAUNCHER, ROOT, TORCHRUN

from cptrain.config import load, presets_folder
from cptrain.train.settings import TrainSettings

# What a rank is started with: it writes its exit code down. Bash takes the signals, too, and must outlive them.
WRITES_ITS_CODE = ["bash", "-c", 'trap "" TERM INT; "$@"; echo $? > code-$RANK', "rank"]
TINY = [
    "--config=debug",
    "--model.dim=32",
    "--model.num_layers=2",
    "--model.ffn_dim=64",
    "--training.seq_len=64",
    "--training.steps=100000",
    "--optimizer.lr=2e-2",
    "--lr_scheduler.warmup_steps=0",
    "--data.source=text",
    "--data.paths=some text/*.txt",
    "--data.validation_fraction=0.2",
    "--data.cache_dir=cache",
    "--validation.steps=2",
    "--validation.freq=100000",
    "--checkpoint.interval=100000",
]


def start(command: list[str], folder: Path) -> subprocess.Popen[str]:
    environment = {name: value for name, value in os.environ.items() if name not in LAUNCHER}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def end(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of a process that is about to end."""
    try:
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
    return process.returncode, out, err


def steps_in(job: Path, kind: str = "train") -> list[int]:
    path = job / "metrics.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [record["step"] for record in records if record["kind"] == kind]


def stop_in_training(process: subprocess.Popen[str], job: Path, number: int) -> tuple[int, str, str]:
    """Send a signal once two steps are done."""
    give_up = time.monotonic() + 100
    while len(steps_in(job)) < 2 and process.poll() is None and time.monotonic() < give_up:
        time.sleep(0.05)
    process.send_signal(number)
    return end(process)


@dataclasses.dataclass
class Run:
    """A run that SIGTERM stopped, and the same command again with three more steps to go."""

    job: Path
    code: int
    out: str
    err: str
    codes_of_ranks: list[str]
    stopped_at: int
    again: tuple[int, str, str]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("end-to-end")
    (folder / "some text").mkdir()
    write_text(folder / "some text")
    job = folder / "outputs" / "debug"
    command = [sys.executable, *TORCHRUN, "--no-python", *WRITES_ITS_CODE, sys.executable, "-m", "cptrain.train", *TINY]
    code, out, err = stop_in_training(start(command, folder), job, signal.SIGTERM)
    codes = [(folder / f"code-{rank}").read_text().strip() for rank in range(2)]
    stopped_at = steps_in(job)[-1]
    printed = shlex.split(out.strip().splitlines()[-1].partition("  ")[2])
    assert printed[:5] == ["torchrun", "--nproc-per-node", "2", "-m", "cptrain.train"], out + err
    again = end(start([sys.executable, *TORCHRUN, *printed[3:], f"--training.steps={stopped_at + 3}"], folder))
    return Run(job, code, out, err, codes, stopped_at, again)


def test_end_to_end_sigterm_saves_and_prints_the_resume_command(run: Run) -> None:
    assert f"stopped by SIGTERM after step {run.stopped_at}; the same command goes on from there:" in run.out
    assert run.out.strip().endswith(f"  torchrun --nproc-per-node 2 -m cptrain.train {shlex.join(TINY)}")
    assert f"checkpoint: saved step {run.stopped_at} in " in run.out
    assert (run.job / "checkpoint" / f"step-{run.stopped_at}" / "manifest.json").is_file()


def test_end_to_end_says_which_layers_run_context_parallel(run: Run) -> None:
    assert "context parallel  ring of 2, balanced, 1 hop each way\n" in run.out
    assert "context layers    2 of 2: layers.0.attention .. layers.1.attention\n" in run.out


def test_end_to_end_ranks_end_well_after_sigterm(run: Run) -> None:
    assert run.codes_of_ranks == ["0", "0"]
    # torchrun itself ends with an error after any signal, whatever its ranks say, and with a traceback of its own.
    assert run.code == 1
    assert run.err.count("Traceback") == 1 and "SignalException: Process" in run.err


def test_end_to_end_the_same_command_goes_on_to_the_end(run: Run) -> None:
    code, out, err = run.again
    assert (code, err) == (0, "")
    assert f"resumed from outputs/debug/checkpoint/step-{run.stopped_at}," in out
    last = run.stopped_at + 3
    assert steps_in(run.job) == list(range(1, last + 1))
    assert steps_in(run.job, "validation") == [0, last]
    assert f"checkpoint: saved step {last} in " in out


def test_end_to_end_learns(run: Run) -> None:
    records = [json.loads(line) for line in (run.job / "metrics.jsonl").read_text().splitlines()]
    first, last = [record["loss"] for record in records if record["kind"] == "validation"]
    assert last < first - 0.3


def test_end_to_end_leaves_its_files(run: Run) -> None:
    files = {path.name for path in run.job.iterdir()}
    assert files == {"config.toml", "environment.json", "metrics.jsonl", "tb", "checkpoint", "run.lock"}
    last = run.stopped_at + 3
    kept = {path.name for path in (run.job / "checkpoint").iterdir()}
    assert kept == {f"step-{run.stopped_at}", f"step-{last}", "latest", ".lock"}
    assert (run.job / "checkpoint" / "latest").read_text() == f"step-{last}\n"
    assert json.loads((run.job / "checkpoint" / f"step-{last}" / "train_state.json").read_text())["step"] == last


def test_end_to_end_config_is_what_ran(run: Run) -> None:
    flags = [*TINY[1:], f"--training.steps={run.stopped_at + 3}"]
    asked = load(TrainSettings, [presets_folder() / "debug.toml"], overrides=flags)
    assert load(TrainSettings, [run.job / "config.toml"]) == asked


def test_end_to_end_environment_says_what_ran(run: Run) -> None:
    environment = json.loads((run.job / "environment.json").read_text())
    assert environment["world_size"] == 2
    assert environment["command"][1:3] == TINY[:2]
    assert set(environment) >= {"cptrain", "torch", "python", "git", "platform", "threads"}


def test_end_to_end_tensorboard_holds_the_curves(run: Run) -> None:
    events = EventAccumulator(str(run.job / "tb"), size_guidance={"scalars": 0})
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert tags >= {
        "loss_metrics/global_avg_loss",
        "loss_metrics/global_max_loss",
        "grad_norm",
        "lr",
        "n_tokens_seen",
        "throughput(tps)",
        "tflops",
        "time_metrics/end_to_end(s)",
        "time_metrics/data_loading(s)",
        "time_metrics/data_loading(%)",
        "memory/max_reserved(GiB)",
        "validation_metrics/loss",
    }
    losses = [event.step for event in events.Scalars("loss_metrics/global_avg_loss")]
    assert losses == list(range(1, run.stopped_at + 4))
    (text,) = {event.tensor_proto.string_val[0] for event in events.Tensors("config/text_summary")[-1:]}
    assert b"[parallelism]" in text
    hyper_parameters = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    for key in (b"optimizer.lr", b"training.seq_len", b"training.global_batch_size", b"degree.ring", b"model.dim"):
        assert key in hyper_parameters


def test_end_to_end_without_torchrun_ctrl_c_ends_well(tmp_path: Path) -> None:
    (tmp_path / "some text").mkdir()
    write_text(tmp_path / "some text")
    flags = [*TINY, "--parallelism.ring_degree=1", "--metrics.no-enable_tensorboard", "--job.name=alone"]
    job = tmp_path / "outputs" / "alone"
    process = start([sys.executable, "-m", "cptrain.train", *flags], tmp_path)
    code, out, err = stop_in_training(process, job, signal.SIGINT)
    assert (code, err) == (0, "")
    step = steps_in(job)[-1]
    assert f"stopped by SIGINT after step {step}" in out
    assert out.strip().endswith(f"  python -m cptrain.train {shlex.join(flags)}")
    assert (job / "checkpoint" / f"step-{step}").is_dir()
