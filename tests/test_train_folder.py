"""Where a run writes is tried before the run, and held against others while it lasts."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import IO

import pytest

from cptrain.train import folder
from cptrain.train.folder import Folders
from cptrain.train.settings import TrainSettings


def settings_in(path: Path, **checkpoint: str) -> TrainSettings:
    settings = TrainSettings()
    return replace(
        settings,
        job=replace(settings.job, dump_folder=str(path)),
        checkpoint=replace(settings.checkpoint, **checkpoint),
    )


@pytest.fixture(autouse=True)
def little_patience(monkeypatch):
    monkeypatch.setattr(folder, "PATIENCE_S", 0.3)


@pytest.mark.parametrize(("section", "key"), [("job", "dump_folder"), ("checkpoint", "folder")])
def test_train_folder_that_cannot_be_written_is_named_with_its_key(tmp_path, section, key):
    settings = settings_in(tmp_path / "runs")
    Folders().take(settings)
    (tmp_path / "file").touch()
    beyond = str(tmp_path / "file" / "folder")
    settings = replace(settings, **{section: replace(getattr(settings, section), **{key: beyond})})
    with pytest.raises(ValueError, match=f"Not a directory; set {section}.{key} to a folder that you may write"):
        Folders().take(settings)


def test_train_folder_is_held_until_it_is_released(tmp_path):
    settings, first, second = settings_in(tmp_path), Folders(), Folders()
    first.take(settings)
    with pytest.raises(ValueError, match=f"process {os.getpid()} on .* writes here; .* set another job.name") as caught:
        second.take(settings)
    assert str(caught.value).startswith(str(settings.job.folder))
    second.take(replace(settings, job=replace(settings.job, name="other")))
    first.release()
    Folders().take(settings)


def test_train_folder_of_checkpoints_elsewhere_is_held_too(tmp_path):
    shared = str(tmp_path / "checkpoints")
    first = Folders()
    first.take(settings_in(tmp_path / "one", folder=shared))
    with pytest.raises(ValueError, match=r"checkpoints: process .* set another checkpoint.folder"):
        Folders().take(settings_in(tmp_path / "two", folder=shared))
    assert [path.name for path in Path(shared).iterdir()] == [folder.LOCK]
    first.release()


HOLDER = """
import sys, time
from pathlib import Path
from dataclasses import replace
from cptrain.train.folder import Folders
from cptrain.train.settings import TrainSettings

settings = TrainSettings()
folders = Folders()
folders.take(replace(settings, job=replace(settings.job, dump_folder=sys.argv[1])))
print("held", flush=True)
time.sleep(60)
"""


def test_train_folder_of_a_killed_run_is_free(tmp_path):
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match=f"process {holder.pid} on"):
            Folders().take(settings_in(tmp_path))
        holder.send_signal(signal.SIGKILL)
    Folders().take(settings_in(tmp_path))


def test_train_folder_without_locks_is_warned_of(tmp_path, monkeypatch, caplog):
    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    folders = Folders()
    folders.take(settings_in(tmp_path))
    assert "has no locks (No locks available)" in caplog.text
    folders.release()


def test_train_folder_with_somebody_elses_lock_is_held(tmp_path, monkeypatch):
    settings, first = settings_in(tmp_path), Folders()
    first.take(settings)
    first.release()
    opened = Path.open

    def as_somebody_else(path: Path, mode: str = "r", **options: str) -> IO[str]:
        if mode == "r+":
            raise PermissionError(errno.EACCES, "Permission denied")
        return opened(path, mode, **options)

    monkeypatch.setattr(os, "access", lambda path, mode: False)
    monkeypatch.setattr(Path, "open", as_somebody_else)
    first.take(settings)
    with pytest.raises(ValueError, match="writes here"):
        Folders().take(settings)
    first.release()


def test_train_folder_that_is_half_taken_is_left(tmp_path):
    (tmp_path / "file").touch()
    beyond = settings_in(tmp_path / "runs", folder=str(tmp_path / "file" / "folder"))
    refused, second = Folders(), Folders()
    with pytest.raises(ValueError, match="that you may write"):
        refused.take(beyond)
    second.take(settings_in(tmp_path / "runs"))
    second.release()
