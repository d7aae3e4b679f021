"""Checkpoints of one process: what comes back, what is kept, and what a crash or a clash leaves."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from cptrain.checkpoint import checkpointer, files, folders, plain, storage
from cptrain.checkpoint.checkpointer import Checkpointer
from cptrain.checkpoint.settings import CheckpointConfig

TOML = "[job]\nname = 'a'\n"


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """A folder in memory where there is one: every save waits for the disk several times."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as folder:
        yield Path(folder)


def make(folder: Path, **settings: Any) -> Checkpointer:
    return Checkpointer(CheckpointConfig(**settings), folder)


def tensors(seed: int) -> dict[str, Any]:
    """Every dtype and layout that a run may hold, different for each seed; seed 0 is all zeros."""
    random = torch.Generator().manual_seed(seed)
    scale = 0.0 if seed == 0 else 1.0
    wide = torch.randn(5, 6, generator=random) * scale
    return {
        "model": {
            "layers.0.weight": torch.randn(7, 3, generator=random) * scale,
            "transposed": wide.t(),
            "view": wide[1:3, ::2],
            "bf16": (torch.randn(4, generator=random) * scale).bfloat16(),
            "empty": torch.zeros(0, 3),
        },
        "optimizer": {"step": torch.tensor(float(seed)), "mask": torch.tensor([seed > 0, False])},
        "cursor": torch.tensor(seed * 2**40),
    }


def assert_equal(left: dict[str, Any], right: dict[str, Any]) -> None:
    assert left.keys() == right.keys()
    for key, value in left.items():
        if isinstance(value, dict):
            assert_equal(value, right[key])
        else:
            assert torch.equal(value, right[key]), key


def save(folder: Path, *steps: int, **settings: Any) -> Checkpointer:
    saver = make(folder, **settings)
    for step in steps:
        assert saver.save(step, tensors(step), {"step": step}, TOML)
    return saver


def assert_loads(folder: Path, step: int, **settings: Any) -> None:
    target = tensors(0)
    assert make(folder, **settings).load(target) == {"step": step}
    assert_equal(target, tensors(step))


def test_checkpoint_comes_back_bitwise(tmp_path):
    save(tmp_path, 3)
    assert_loads(tmp_path, 3)


def test_checkpoint_holds_readable_files(tmp_path):
    save(tmp_path, 3)
    folder = tmp_path / "checkpoint/step-3"
    assert (folder / "config.toml").read_text() == TOML
    assert json.loads((folder / "train_state.json").read_text()) == {"step": 3}
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["step"], manifest["world"], manifest["torch"]) == (3, 1, torch.__version__)
    assert manifest["tensors"]["model.layers.0.weight"] == {"shape": [7, 3], "dtype": "float32"}
    listed = {"__0_0.distcp", ".metadata", "train_state.json", "config.toml"}
    assert manifest["files"].keys() == {path.name for path in folder.iterdir()} - {"manifest.json"} == listed
    assert (tmp_path / "checkpoint/latest").read_text() == "step-3\n"


def test_checkpoint_absent_means_a_fresh_start(tmp_path):
    target = tensors(7)
    assert make(tmp_path).load(target) is None
    assert_equal(target, tensors(7))
    assert make(tmp_path).latest_step() is None


def test_checkpoint_newest_is_by_number_and_not_by_name(tmp_path):
    save(tmp_path, 2, 9, 10)
    assert make(tmp_path).steps() == [10, 9, 2]
    assert_loads(tmp_path, 10)


def test_checkpoint_load_step_is_taken(tmp_path):
    save(tmp_path, 1, 2, 3)
    assert_loads(tmp_path, 2, load_step=2)


def test_checkpoint_load_step_that_is_absent_names_those_there(tmp_path):
    save(tmp_path, 1, 3)
    with pytest.raises(RuntimeError, match=r"load_step = 2 is not there; there are: 1, 3"):
        make(tmp_path, load_step=2).load(tensors(0))


def test_checkpoint_disabled_writes_and_reads_nothing(tmp_path):
    save(tmp_path, 1)
    off = make(tmp_path, enable=False)
    assert off.save(2, tensors(2), {}, TOML) is False
    assert off.load(tensors(0)) is None
    assert off.steps() == [1]


def test_checkpoint_is_due_at_every_interval():
    assert [step for step in range(1, 10) if make(Path(), interval=3).due(step)] == [3, 6, 9]
    assert not make(Path(), interval=3, enable=False).due(3)


@pytest.mark.parametrize(("keep", "left"), [(0, [4, 3, 2, 1]), (1, [4]), (2, [4, 3])])
def test_checkpoint_keeps_the_latest_k(tmp_path, keep, left):
    save(tmp_path, 1, 2, 3, 4, keep_latest_k=keep)
    assert make(tmp_path).steps() == left
    assert {path.name for path in (tmp_path / "checkpoint").glob("step-*")} == {f"step-{step}" for step in left}


def test_checkpoint_undeletable_old_one_is_logged_and_kept(tmp_path, monkeypatch, caplog):
    def fail(*args: Any) -> None:
        raise OSError(13, "Permission denied")

    monkeypatch.setattr(folders.shutil, "rmtree", fail)
    save(tmp_path, 1, 2, keep_latest_k=1)
    assert "could not delete the old step-1 ([Errno 13] Permission denied)" in caplog.text
    assert_loads(tmp_path, 2)


def test_checkpoint_is_not_written_twice_by_one_run(tmp_path):
    saver = save(tmp_path, 1)
    assert saver.save(1, tensors(8), {"step": 1}, TOML) is False
    resumed = make(tmp_path)
    resumed.load(tensors(0))
    assert resumed.save(1, tensors(8), {"step": 1}, TOML) is False
    assert_loads(tmp_path, 1)


def test_checkpoint_of_another_run_is_replaced(tmp_path):
    save(tmp_path, 1)
    assert make(tmp_path).save(1, tensors(8), {"step": 8}, TOML)
    assert_loads(tmp_path, 8)
    assert {path.name for path in (tmp_path / "checkpoint").glob("step-*")} == {"step-1"}


def test_checkpoint_branch_sets_later_steps_aside(tmp_path, caplog):
    save(tmp_path, 1, 5, 6)
    branch = make(tmp_path, load_step=1)
    branch.load(tensors(0))
    branch.save(2, tensors(2), {"step": 2}, TOML)
    assert make(tmp_path).steps() == [2, 1]
    assert_loads(tmp_path, 2)
    assert (tmp_path / "checkpoint/step-6.superseded/manifest.json").exists()
    assert "renaming that to step-6.superseded" in caplog.text


def test_checkpoint_branch_that_goes_past_later_steps_sets_them_aside_too(tmp_path):
    save(tmp_path, 4, 8)
    branch = make(tmp_path, load_step=4, keep_latest_k=2)
    branch.load(tensors(0))
    for step in (10, 12):
        branch.save(step, tensors(step), {"step": step}, TOML)
        assert make(tmp_path).steps() == [step, {10: 4, 12: 10}[step]], (
            "what it came from counts, what it left does not"
        )
    assert (tmp_path / "checkpoint/step-8.superseded/manifest.json").exists()


def test_checkpoint_that_is_damaged_does_not_push_an_intact_one_out(tmp_path):
    save(tmp_path, 4, 8)
    (tmp_path / "checkpoint/step-8/__0_0.distcp").write_bytes(b"")
    resumed = make(tmp_path, keep_latest_k=2)
    assert resumed.load(tensors(0)) == {"step": 4}
    resumed.save(10, tensors(10), {"step": 10}, TOML)
    assert make(tmp_path).steps() == [10, 4]


@pytest.mark.parametrize("part", ["_name_latest", "shutil.rmtree"])
def test_checkpoint_that_is_whole_is_saved_whatever_fails_after_it(tmp_path, monkeypatch, caplog, part):
    def fail(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    save(tmp_path, 4)
    monkeypatch.setattr(f"cptrain.checkpoint.folders.{part}", fail)
    saver = make(tmp_path)
    assert saver.save(4, tensors(8), {"step": 8}, TOML)
    assert "step-4 is saved, but not all around it is in order ([Errno 28] No space left on device)" in caplog.text
    assert_loads(tmp_path, 8)


def test_checkpoint_setting_aside_never_overwrites(tmp_path):
    for _ in range(3):
        save(tmp_path, 5)
        save(tmp_path, 2)
    names = {path.name for path in (tmp_path / "checkpoint").glob("step-5*")}
    assert names == {"step-5.superseded", "step-5.superseded-2", "step-5.superseded-3"}


def test_checkpoint_folder_in_use_is_refused(tmp_path):
    with (
        folders.lock(tmp_path / "checkpoint"),
        pytest.raises(RuntimeError, match="another process is saving a checkpoint into"),
    ):
        save(tmp_path, 1)
    save(tmp_path, 1)


# --- what cannot be saved or does not fit -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"model": {"w": 1.5}}, r"model\.w is a float: only tensors go here"),
        ({"model": {"w": torch.empty(2, device="meta")}}, r"model\.w is on the meta device"),
        ({"a": {"b.c": torch.zeros(1)}, "a.b": {"c": torch.zeros(1)}}, r"a\.b\.c names two tensors"),
    ],
)
def test_checkpoint_refuses_what_is_not_a_tensor(tmp_path, state, message):
    with pytest.raises(ValueError, match=message):
        make(tmp_path).save(1, state, {}, TOML)
    assert make(tmp_path).steps() == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model: model.update(extra=torch.zeros(2)), r"1 not in the checkpoint: model\.extra"),
        (lambda model: model.pop("bf16"), r"1 in the checkpoint only: model\.bf16"),
        (lambda model: model.update(bf16=torch.zeros(4)), r"model\.bf16 \(bfloat16\[4\] in .*, float32\[4\] here\)"),
        (
            lambda model: model.update(view=torch.zeros(3, 2)),
            r"model\.view \(float32\[2, 3\] in .*, float32\[3, 2\] here",
        ),
    ],
)
def test_checkpoint_of_other_tensors_is_named_and_touches_nothing(tmp_path, change, message):
    save(tmp_path, 1)
    target = tensors(7)
    change(target["model"])
    before = {key: value.clone() for key, value in target["model"].items()}
    with pytest.raises(ValueError, match=message):
        make(tmp_path).load(target)
    assert_equal(before, target["model"])


# --- plain values -----------------------------------------------------------------------------------------------------

FLOATS = [0.1, 1 / 3, math.pi * 1e-300, 5e-324, 1.7976931348623157e308, -0.0, math.inf, -math.inf, math.nextafter(1, 2)]


def test_checkpoint_plain_values_come_back_exactly(tmp_path):
    state = {"floats": FLOATS, "int": 2**70, "text": 'ü\n"', "deep": [[1, 1.0, True, None], {"a": []}], "nan": math.nan}
    make(tmp_path).save(1, tensors(1), state, TOML)
    back = make(tmp_path).load(tensors(0))
    assert [value.hex() for value in back["floats"]] == [value.hex() for value in FLOATS]
    assert math.isnan(back.pop("nan"))
    state.pop("nan")
    assert repr(back) == repr(state)


@pytest.mark.parametrize(
    "value", [(1, 2), numpy.float64(0.5), torch.tensor(1), {1: 2}, {"float": "x"}, b"x", Path("x")]
)
def test_checkpoint_plain_values_refuse_what_would_change(value):
    with pytest.raises(ValueError, match=r"train_state\.a\[1\] is a"):
        plain.encode({"a": [0, value]})


# --- crashes ----------------------------------------------------------------------------------------------------------


class Crash(BaseException):
    """Not an Exception: no handler of the code under test may mend it."""


def crash_at(monkeypatch: pytest.MonkeyPatch, moment: int) -> None:
    """Raise at the given one of all calls that change the disk, and at each that follows: the process is gone."""
    count = itertools.count(1)

    def planted(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            if next(count) >= moment:
                raise Crash
            return function(*args, **kwargs)

        return call

    for name in ("rename", "replace", "mkdir", "fsync", "unlink", "rmdir"):
        monkeypatch.setattr(os, name, planted(getattr(os, name)))
    # torch writes the shards through other calls: cut them short in the middle.
    monkeypatch.setattr(storage, "write", planted(storage.write))


# What is there before a save of step 4 (step -> seed of its tensors), and what may be found if that save is cut short.
SCENES = {
    "first": ({}, {0}),
    "next": ({1: 1, 2: 2}, {2}),
    "replace": ({1: 1, 2: 2, 4: 8}, {8}),
    "branch": ({1: 1, 2: 2, 6: 6}, {2, 6}),
}


@pytest.mark.parametrize("scene", SCENES)
def test_checkpoint_crash_at_any_moment_leaves_the_old_or_the_new(tmp_path, monkeypatch, scene):
    before, old = SCENES[scene]
    for moment in itertools.count(1):
        folder = tmp_path / str(moment)
        for step, seed in before.items():
            make(folder).save(step, tensors(seed), {"step": seed}, TOML)
        saver = make(folder, keep_latest_k=2)
        done = False
        with monkeypatch.context() as patch, contextlib.suppress(Crash, RuntimeError):  # torch wraps what it meets
            crash_at(patch, moment)
            done = saver.save(4, tensors(4), {"step": 4}, TOML)
        target = tensors(0)
        state = make(folder).load(target)
        found = state["step"] if state else 0
        assert found in ({4} if done else {4, *old})
        assert_equal(target, tensors(found))
        for step in make(folder).steps():
            assert make(folder, load_step=step).load(tensors(0)) is not None, "none is half there"
        if done:
            break
        assert make(folder, keep_latest_k=2).save(7, tensors(7), {"step": 7}, TOML), "the next save works"
        assert_loads(folder, 7)
        left = [path.name for path in (folder / "checkpoint").iterdir()]
        assert not [name for name in left if name.endswith((".tmp", ".deleting", ".replaced"))]
    assert moment > 10


def test_checkpoint_error_while_saving_names_step_and_cause(tmp_path, monkeypatch):
    def full(path: Path) -> None:
        raise OSError(28, "No space left on device")

    save(tmp_path, 1)
    monkeypatch.setattr(files, "flush", full)
    with pytest.raises(RuntimeError, match=r"cannot save step 2 in .*checkpoint: OSError: \[Errno 28\] No space left"):
        save(tmp_path, 2)
    monkeypatch.undo()
    assert_loads(tmp_path, 1)


def test_checkpoint_error_inside_dcp_is_told_in_one_line(tmp_path, monkeypatch):
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(storage.dcp.FileSystemWriter, "write_data", full)
    with pytest.raises(RuntimeError, match=r"OSError: \[Errno 28\] No space left on device$"):
        save(tmp_path, 2)


def test_checkpoint_unflushed_name_is_never_committed(tmp_path, monkeypatch):
    """Every file and the folder itself are flushed before the rename, the parent after it."""
    events: list[str] = []
    synced, renamed = os.fsync, os.rename

    def fsync(descriptor: int) -> None:
        events.append("flush " + Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        synced(descriptor)

    def rename(source: Any, target: Any) -> None:
        events.append(f"rename {Path(source).name} {Path(target).name}")
        renamed(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename)
    save(tmp_path, 2)
    place = events.index("rename step-2.tmp step-2")
    listed = {path.name for path in (tmp_path / "checkpoint/step-2").iterdir()}
    assert {f"flush {name}" for name in listed} <= set(events[:place])
    assert events[place - 1 : place + 2] == ["flush step-2.tmp", "rename step-2.tmp step-2", "flush checkpoint"]


# --- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("key", "value"), [("folder", " "), ("interval", 0), ("keep_latest_k", -1), ("load_step", -2)])
def test_checkpoint_settings_report_each_problem(key, value):
    assert [problem.key for problem in CheckpointConfig(**{key: value}).problems()] == [key]


def test_checkpoint_settings_defaults_are_sound():
    assert list(CheckpointConfig().problems()) == []


def test_checkpoint_settings_do_not_import_torch():
    code = "import sys, cptrain.checkpoint.settings; sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(CheckpointConfig)])
def test_checkpoint_settings_are_all_read(field):
    assert f"config.{field}" in Path(checkpointer.__file__).read_text()
