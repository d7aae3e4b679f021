"""`python -m cptrain.train`: what it says and how it ends, with and without torchrun."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

import cptrain
from cptrain.checkpoint.settings import CheckpointConfig
from cptrain.config import preset_names, presets_folder
from cptrain.context_parallel.merging import merge_in_torch
from cptrain.distributed.settings import CommConfig
from cptrain.models.settings import ModelConfig
from cptrain.train import run as run_module
from cptrain.train.__main__ import main
from cptrain.train.settings import TrainSettings

ROOT = Path(__file__).resolve().parent.parent
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID")
LAUNCHER += ("SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")

BAD = """\
[model]
flavor = "debug"
[training]
seq_len = 1001
steps = 0
[optimizer]
learning_rate = 1e-3
[parallelism]
cp_size = 2
ring_degree = 2
"""
BAD_PROBLEMS = """\
5 problems in the settings:
  optimizer.learning_rate = 0.001 (bad.toml:7): unknown key; did you mean `optimizer.lr`?
  parallelism.cp_size = 2 (bad.toml:9): unknown key; did you mean `parallelism.context_parallel_degree`?
  data.num_workers = -1 (flag --data.num-workers): must not be negative; set it to 0
  training.steps = 0 (bad.toml:5): must be at least 1
  training.seq_len = 1001 (bad.toml:4): must be a multiple of 4 = context degree 2 x lcm(2, tensor degree 1); set it \
to 1000 or 1004
"""


@dataclass
class Ended:
    code: int
    out: str
    err: str
    cpu_s: float  # wall time depends on who else is at work on the machine


def run(*arguments: str, cwd: Path) -> Ended:
    """`python` with these arguments in a folder, to its end."""
    environment = {name: value for name, value in os.environ.items() if name not in LAUNCHER}
    environment["PYTHONPATH"] = str(ROOT)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Ended(done.returncode, done.stdout, done.stderr, cpu_s)


def here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What the command line prints, run in this process."""
    for name in LAUNCHER:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "argv", ["cptrain.train", *arguments])
    main()
    return capsys.readouterr().out


def ranks_of(preset: str) -> str:
    found = re.search(r"(?m)^# ranks: (\d+)$", (presets_folder() / f"{preset}.toml").read_text())
    assert found, f"{preset}.toml does not say for how many ranks it is"
    return found[1]


# --- one process ------------------------------------------------------------------------------------------------------


def test_train_cli_bad_config_ends_with_all_problems_and_code_2(tmp_path: Path) -> None:
    (tmp_path / "bad.toml").write_text(BAD)
    arguments = ["--config", "bad.toml", "--data.num-workers", "-1", "--dry-run", "--world-size", "2"]
    ended = run("-m", "cptrain.train", *arguments, cwd=tmp_path)
    assert (ended.code, ended.out, ended.err) == (2, "", BAD_PROBLEMS)
    assert ended.cpu_s < 1.5


def test_train_cli_help_takes_under_a_second(tmp_path: Path) -> None:
    ended = run("-m", "cptrain.train", "--help", cwd=tmp_path)
    assert (ended.code, ended.err) == (0, "")
    assert ended.out.startswith("usage: python -m cptrain.train --config NAME")
    assert ended.cpu_s < 1


@pytest.mark.parametrize("section", ["training", "model", "parallelism.ring_degree"])
def test_train_cli_help_of_a_section_lists_its_keys(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], section: str
) -> None:
    out = here(monkeypatch, capsys, "--help", section)
    assert f"  {section}" in out and "[metrics]" not in out


def test_train_cli_dry_run_says_what_each_rank_holds(tmp_path: Path) -> None:
    ended = run("-m", "cptrain.train", "--config", "debug_4d", "--dry-run", "--world-size", "8", cwd=tmp_path)
    assert (ended.code, ended.err) == (0, "")
    said = dict(re.split(r"  +", line, maxsplit=1) for line in ended.out.splitlines())
    assert said["mesh"] == "dp_replicate 1 x dp_shard 1 x ring 2 x ulysses 2 x tp 2 = 8 ranks"
    assert said["sequence"] == "1,024 tokens, 256 per rank"
    assert said["batch"].startswith("2 sequences = 2,048 tokens per step: 2 micro-batches of 1 on 1 data-parallel rank")
    assert "377,472 parameters" in said["model"]
    # 8 heads and 4 kv heads of 16: halved by tensor parallel, then by Ulysses, which gathers half of the sequence.
    assert said["per rank"].endswith(
        "47,184 parameters; tokens [1, 256], attention sees q [1, 2, 512, 16], k and v [1, 1, 512, 16] at a time"
    )
    assert re.fullmatch(
        r"about [\d.]+ MiB of tensors as backward begins: (\w[\w ]+ [\d.]+ [MK]iB(, )?)+ \(on a GPU\)", said["memory"]
    )
    assert ended.cpu_s < 1.5
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("preset", preset_names(presets_folder()))
def test_train_cli_dry_run_of_a_preset(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], preset: str
) -> None:
    ranks = ranks_of(preset)
    assert f" = {ranks} ranks\n" in here(monkeypatch, capsys, "--config", preset, "--dry-run", "--world-size", ranks)


def test_train_cli_takes_a_path_from_any_folder(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "mine.toml").write_text('job.name = "mine"\n')
    monkeypatch.chdir(tmp_path)
    out = here(monkeypatch, capsys, "--config", "debug", "below/mine.toml", "--dry-run", "--world-size=2")
    assert "mine, writes to outputs/mine\n" in out


def test_train_cli_dry_run_takes_the_launchers_world_size(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in LAUNCHER:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setattr(sys, "argv", ["cptrain.train", "--config", "debug", "--dry-run"])
    main()
    assert "dp_shard 4 x ring 2 x ulysses 1 x tp 1 = 8 ranks" in capsys.readouterr().out


def test_train_cli_dry_run_shows_every_stage(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    # What the stages replace need not fit the ranks by itself: no step ever runs with it.
    stages = "[parallelism]\nring_degree = 3\n[[training.stages]]\nring_degree = 1\nseq_len = 512\n"
    (tmp_path / "staged.toml").write_text(stages + "[[training.stages]]\nring_degree = 2\nseq_len = 4096\n")
    out = here(
        monkeypatch, capsys, "--config", "debug", str(tmp_path / "staged.toml"), "--dry-run", "--world-size", "4"
    )
    first, second = out.split("\n\n")
    assert "dp_shard 4 x ring 1" in first and "512 tokens, 512 per rank" in first
    assert "dp_shard 2 x ring 2" in second and "4,096 tokens, 2,048 per rank" in second


def test_train_cli_one_process_is_told_what_it_takes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        here(monkeypatch, capsys, "--config", "debug")
    said = capsys.readouterr().err.splitlines()[1]
    assert said.startswith("  parallelism.ring_degree = 2 (debug.toml:") and said.endswith(
        "start 2 with `torchrun --nproc-per-node 2 -m cptrain.train ...` (for --dry-run: add --world-size 2), or lower "
        "ring_degree"
    )


# --- how a run ends ---------------------------------------------------------------------------------------------------


class FakeTrainer:
    """Stops at step 7 as it was told."""

    stopped_by = ""
    step = 7

    def train(self) -> str:
        return self.stopped_by

    def __enter__(self) -> FakeTrainer:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def run_with(
    monkeypatch: pytest.MonkeyPatch, trainer: Any, launcher: dict[str, str] | None = None, **checkpoint: bool
) -> None:
    """`run` without a process group, and with `trainer` in place of the class."""
    monkeypatch.setattr(run_module, "process_group", lambda *_: contextlib.nullcontext())
    monkeypatch.setattr(run_module.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(run_module.dist, "get_world_size", lambda: 1)
    monkeypatch.setattr(run_module, "Trainer", trainer)
    monkeypatch.setattr(run_module.logger, "handlers", [])
    monkeypatch.setattr(run_module.logger, "propagate", True)
    monkeypatch.setattr(run_module.logger, "level", 0)
    monkeypatch.setattr(sys, "argv", ["cptrain.train", "--config", "debug", "--data.paths", "my text/*.txt"])
    for name in LAUNCHER:
        monkeypatch.delenv(name, raising=False)
    for name, value in (launcher or {}).items():
        monkeypatch.setenv(name, value)
    comm = CommConfig(train_timeout_seconds=71, init_timeout_seconds=72)
    model = ModelConfig(flavor="debug")
    run_module.run(TrainSettings(model=model, checkpoint=CheckpointConfig(**checkpoint), comm=comm))


def raise_in(package: ModuleType, error: Exception) -> None:
    """Raise it as code of the package does."""
    code = compile("def refuse(): raise error", str(Path(str(package.__file__)).parent / "part.py"), "exec")
    names: dict[str, Any] = {"error": error}
    exec(code, names)
    names["refuse"]()


@pytest.mark.parametrize("kind", [ValueError, NotImplementedError])
def test_train_cli_what_does_not_fit_ends_with_code_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], kind: type[Exception]
) -> None:
    with pytest.raises(SystemExit) as caught:
        run_with(monkeypatch, lambda *_: raise_in(cptrain, kind("data.paths: no such file")))
    assert caught.value.code == 2
    assert capsys.readouterr() == ("", "data.paths: no such file\n")


@pytest.mark.parametrize("error", [KeyError("a bug"), ValueError("Expecting ',' delimiter"), RuntimeError("of torch")])
def test_train_cli_other_errors_keep_their_traceback(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    with pytest.raises(type(error)):
        run_with(monkeypatch, lambda *_: raise_in(torch, error))


LINES = """
import logging
from cptrain.train import run
run._start_logging(0)
for number in range(9):
    logging.getLogger("cptrain").info("line %d of \\u00fc", number)
    if number == 0 and {closes}:
        input()
"""


def test_train_cli_goes_on_without_a_reader_of_its_lines() -> None:
    program = [sys.executable, "-u", "-c", LINES.format(closes=True)]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen(program, text=True, **pipes) as process:
        assert "line 0" in process.stdout.readline()
        process.stdout.close()
        process.stdin.write("go on\n")
        process.stdin.close()
        assert "Logging error" not in process.stderr.read()


def test_train_cli_writes_its_lines_where_not_all_letters_are_known() -> None:
    environ = os.environ | {"PYTHONIOENCODING": "ascii"}
    program = [sys.executable, "-c", LINES.format(closes=False)]
    done = subprocess.run(program, env=environ, capture_output=True, text=True, check=True)
    assert done.stderr == "" and done.stdout.count("of \\xfc\n") == 9


def test_train_cli_an_error_of_compiled_code_below_ours_keeps_its_traceback() -> None:
    with pytest.raises(RuntimeError, match="size of tensor"), run_module.worded():
        merge_in_torch(*(torch.zeros(1, 1, *size) for size in ((2, 4), (2,), (3, 4), (3,))))


def test_train_cli_an_error_of_another_rank_than_the_first_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr("cptrain.config.error.time.sleep", lambda _: None)
    with pytest.raises(SystemExit) as caught, run_module.worded():
        raise_in(cptrain, ValueError("data.paths: no such file"))
    assert (caught.value.code, capsys.readouterr().err) == (2, "[rank 3] data.paths: no such file\n")


class Failing(FakeTrainer):
    """Ends with the error that the class is given."""

    error: Exception = Exception()
    stage = SimpleNamespace(settings=TrainSettings(model=ModelConfig(flavor="debug")))

    def train(self) -> str:
        raise self.error


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
            'less memory is needed with activation_checkpoint.mode = "full", or a larger parallelism.context_parallel_',
        ),
        (torch.OutOfMemoryError("CUDA out of memory."), "PYTORCH_ALLOC_CONF=expandable_segments:True"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"),
            "less memory is needed with activation_",
        ),
        (RuntimeError("Timed out waiting 100000ms for recv operation"), "comm.train_timeout_seconds = 71: raise"),
        (RuntimeError("The client socket has timed out after 3000ms"), "comm.init_timeout_seconds = 72 says"),
        (RuntimeError("Watchdog caught collective operation timeout"), "comm.train_timeout_seconds = 71"),
        (RuntimeError("Connection closed by peer [127.0.0.1]:1234"), "another rank has ended: "),
        (RuntimeError("read: Connection reset by peer"), "another rank has ended: "),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), ""),
    ],
)
def test_train_cli_says_what_to_do_about_errors_of_others(
    monkeypatch: pytest.MonkeyPatch, error: Exception, told: str
) -> None:
    monkeypatch.setattr(Failing, "error", error)

    def fail(*_: object) -> None:
        raise error

    for trainer in (lambda *_: Failing(), fail):
        error.__notes__ = []
        with pytest.raises(type(error)) as caught:
            run_with(monkeypatch, trainer)
        notes = caught.value.__notes__
        assert len(notes) == bool(told)
        assert told in "".join(notes)


def test_train_cli_a_device_without_memory_at_the_start_is_somebody_elses(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(run_module, "local_device", fail)
    with pytest.raises(torch.OutOfMemoryError) as caught:
        run_with(monkeypatch, FakeTrainer)
    assert caught.value.__notes__[0].startswith("less memory is needed with nothing else on the device; ")


@pytest.mark.parametrize(
    ("variables", "told"),
    [
        ({"SLURM_NTASKS": "2", "SLURM_PROCID": "0"}, "SLURM_NTASKS = 2, but MASTER_ADDR, MASTER_PORT not set: "),
        (
            {"SLURM_NTASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "1"},
            "[rank 1] SLURM_NTASKS = 2, but MASTER_ADDR, MASTER_PORT not set: ",
        ),
        # This rank alone can know it: nobody told the others how many there are.
        ({"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}, "[rank 1] 2 ranks on this host, but 1 GPU found: "),
        ({"LOCAL_WORLD_SIZE": "2"}, "2 ranks on this host, but 1 GPU found: "),
    ],
)
def test_train_cli_ranks_that_cannot_be_started_end_with_code_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], variables: dict[str, str], told: str
) -> None:
    for name in LAUNCHER:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: "GPU" in told)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(run_module, "prepare_host", lambda _: None)
    monkeypatch.setattr("cptrain.config.error.time.sleep", lambda _: None)
    with pytest.raises(SystemExit) as caught:
        run_module.run(TrainSettings())
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith(told)


def test_train_cli_stopped_run_prints_a_command_to_paste(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(FakeTrainer, "stopped_by", "SIGTERM")
    run_with(monkeypatch, lambda *_: FakeTrainer())
    first, second = (line.split("  ", 1)[1] for line in capsys.readouterr().out.splitlines())
    assert first == "stopped by SIGTERM after step 7; the same command goes on from there:"
    assert shlex.split(second)[2:] == ["cptrain.train", *sys.argv[1:]]
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run_module.resume_command().startswith("torchrun --nproc-per-node 2 -m cptrain.train --config debug")


def test_train_cli_stopped_run_of_several_nodes_prints_the_command_of_each(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(FakeTrainer, "stopped_by", "SIGTERM")
    launcher = {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "32", "LOCAL_WORLD_SIZE": "8"}
    run_with(monkeypatch, lambda *_: FakeTrainer(), launcher)
    first, second = (line.split("  ", 1)[1] for line in capsys.readouterr().out.splitlines())
    assert "; the same command, on every node and with its --rdzv options, goes on" in first
    assert second.startswith("  torchrun --nnodes 4 --nproc-per-node 8 -m cptrain.train --config debug")


def test_train_cli_stopped_run_without_checkpoints_does_not_promise_to_go_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(FakeTrainer, "stopped_by", "SIGTERM")
    run_with(monkeypatch, lambda *_: FakeTrainer(), enable=False)
    out = capsys.readouterr().out
    assert out.endswith("stopped by SIGTERM after step 7; nothing is saved: checkpoint.enable = false\n")


def test_train_cli_finished_run_says_nothing_of_going_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_with(monkeypatch, lambda *_: FakeTrainer())
    assert capsys.readouterr().out == ""


# --- torchrun ---------------------------------------------------------------------------------------------------------


def test_train_cli_bad_config_under_torchrun_is_told_once(tmp_path: Path) -> None:
    (tmp_path / "bad.toml").write_text(BAD)
    ended = run(*TORCHRUN, "-m", "cptrain.train", "--config", "bad.toml", "--data.num-workers", "-1", cwd=tmp_path)
    assert ended.err.count(BAD_PROBLEMS) == ended.err.count("problems in the settings") == 1
    assert ended.err.count("Traceback") == 1 and "ChildFailedError" in ended.err  # torchrun's own, not of a rank
    assert "exitcode  : 2" in ended.err and ended.code == 1  # the first rank to end, and what torchrun makes of it
    assert ended.out == ""
    assert list(tmp_path.iterdir()) == [tmp_path / "bad.toml"]
