"""Damaged and hostile checkpoints: found before a byte of them is used, passed over with a reason, never run."""

from __future__ import annotations

import dataclasses
import enum
import io
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_checkpoint import TOML, assert_equal, assert_loads, make, save, tensors, tmp_path
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

from cptrain.checkpoint import files, manifest, storage
from cptrain.checkpoint.manifest import Manifest

__all__ = ["tmp_path"]

FILES = ["__0_0.distcp", ".metadata", "train_state.json", "config.toml", "manifest.json"]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0b100
    path.write_bytes(content)


def blank(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def remove(path: Path) -> None:
    path.unlink()


def swap(path: Path) -> None:
    """Another step's file: whole in itself."""
    shutil.copy(path.parent.parent / "step-1" / path.name, path)


@pytest.mark.parametrize("damage", [truncate, flip, blank, remove, swap])
@pytest.mark.parametrize("name", FILES)
def test_checkpoint_damage_is_found_and_the_older_one_used(tmp_path, caplog, name, damage):
    save(tmp_path, 1)
    make(tmp_path).save(2, tensors(2), {"step": 2}, TOML + "# 2")
    damage(tmp_path / "checkpoint/step-2" / name)
    assert_loads(tmp_path, 1)
    message = next(record.getMessage() for record in caplog.records if "is damaged and not used" in record.getMessage())
    assert "checkpoint/step-2" in message
    assert name in message


def test_checkpoint_damage_of_all_is_an_error_and_not_a_fresh_start(tmp_path):
    save(tmp_path, 1, 2)
    for step in (1, 2):
        flip(tmp_path / f"checkpoint/step-{step}/__0_0.distcp")
    target = tensors(7)
    with pytest.raises(
        RuntimeError, match=r"no checkpoint there is intact\n  step-2: __0_0.distcp has the .*\n  step-1: "
    ):
        make(tmp_path).load(target)
    assert_equal(target, tensors(7))


def test_checkpoint_damage_of_an_asked_for_step_is_not_passed_over(tmp_path):
    save(tmp_path, 1, 2)
    flip(tmp_path / "checkpoint/step-2/__0_0.distcp")
    with pytest.raises(RuntimeError, match=r"no checkpoint there is intact\n  step-2: "):
        make(tmp_path, load_step=2).load(tensors(0))


def test_checkpoint_damage_does_not_push_intact_ones_out(tmp_path):
    """A run that fell back keeps what it fell back to, however new the damaged one looks."""
    save(tmp_path, 1, 9)
    flip(tmp_path / "checkpoint/step-9/__0_0.distcp")
    resumed = make(tmp_path, keep_latest_k=1)
    assert resumed.load(tensors(0)) == {"step": 1}
    resumed.save(2, tensors(2), {"step": 2}, TOML)
    assert_loads(tmp_path, 2)


def test_checkpoint_under_another_steps_name_is_damaged(tmp_path):
    save(tmp_path, 1)
    (tmp_path / "checkpoint/step-1").rename(tmp_path / "checkpoint/step-5")
    with pytest.raises(RuntimeError, match=r"step-5: manifest\.json is of step 1"):
        make(tmp_path).load(tensors(0))


def test_checkpoint_of_a_newer_schema_is_refused_and_not_passed_over(tmp_path, monkeypatch):
    save(tmp_path, 1)
    monkeypatch.setattr(manifest, "SCHEMA", 2)
    save(tmp_path, 3)
    monkeypatch.undo()
    with pytest.raises(RuntimeError, match=r"has schema 2, this cptrain reads 1"):
        make(tmp_path).load(tensors(0))


# --- hostile ones: everything below has digests and checksum in order -------------------------------------------------


def forge(folder: Path, change: Callable[[Metadata], Any]) -> None:
    """Replace `.metadata` by what `change` returns (the metadata itself if None), and sign it."""
    path = folder / storage.METADATA
    metadata = pickle.loads(path.read_bytes())
    path.write_bytes(pickle.dumps(change(metadata) or metadata))
    record = Manifest.from_text((folder / manifest.NAME).read_text())
    signed = dataclasses.replace(record, files={**record.files, storage.METADATA: files.digest(path)})
    (folder / manifest.NAME).write_text(signed.to_text())


class Payload:
    def __init__(self, function: Callable, *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("place", ["top", "planner_data", "key", "chunk"])
@pytest.mark.parametrize("function", ["os.mkdir", "eval", "torch.hub"])
def test_checkpoint_payload_is_refused_and_not_run(tmp_path, function, place):
    marker = tmp_path / "ran"
    payload = {
        "os.mkdir": Payload(os.mkdir, str(marker)),
        "eval": Payload(eval, f"__import__('os').mkdir({str(marker)!r})"),
        "torch.hub": Payload(torch.hub.os.makedirs, str(marker)),
    }[function]

    def plant(metadata: Metadata) -> Any:
        if place == "planner_data":
            metadata.planner_data = payload
        elif place == "key":
            metadata.state_dict_metadata["extra"] = payload  # type: ignore[assignment]
        elif place == "chunk":
            metadata.state_dict_metadata["cursor"].chunks.append(payload)  # type: ignore[union-attr, arg-type]
        return payload if place == "top" else metadata

    save(tmp_path, 1, 2)
    forge(tmp_path / "checkpoint/step-2", plant)
    assert_loads(tmp_path, 1)
    assert not marker.exists()
    with pytest.raises(RuntimeError, match=r"step-2: \.metadata asks for \w+\.\w+, which tensor metadata never needs"):
        make(tmp_path, load_step=2).load(tensors(0))
    pickle.loads((tmp_path / "checkpoint/step-2/.metadata").read_bytes())
    assert marker.exists(), "the payload is a dud: this test shows nothing"


class OldPickler(pickle.Pickler):
    """Pickles members of enums as Python 3.11.0 to 3.11.3 do."""

    def reducer_override(self, value: Any) -> Any:
        return (getattr, (type(value), value.name)) if isinstance(value, enum.Enum) else NotImplemented


def test_checkpoint_of_an_earlier_python_loads(tmp_path):
    save(tmp_path, 1, 2)
    path = tmp_path / "checkpoint/step-2" / storage.METADATA
    with io.BytesIO() as content:
        OldPickler(content).dump(pickle.loads(path.read_bytes()))
        assert b"getattr" in content.getvalue()
        path.write_bytes(content.getvalue())
    record = Manifest.from_text((path.parent / manifest.NAME).read_text())
    signed = dataclasses.replace(record, files={**record.files, storage.METADATA: files.digest(path)})
    (path.parent / manifest.NAME).write_text(signed.to_text())
    assert_loads(tmp_path, 2)


def test_checkpoint_attributes_of_what_is_no_enum_are_refused(tmp_path):
    save(tmp_path, 1, 2)
    forge(tmp_path / "checkpoint/step-2", lambda metadata: Payload(getattr, Metadata, "__init__"))
    with pytest.raises(RuntimeError, match=r"step-2: \.metadata asks for an attribute of .*Metadata"):
        make(tmp_path, load_step=2).load(tensors(0))


@pytest.mark.parametrize("kind", ["relative", "absolute", "unlisted"])
def test_checkpoint_paths_out_of_its_folder_are_refused(tmp_path, kind):
    save(tmp_path, 1, 2)
    folder = tmp_path / "checkpoint/step-2"
    (folder / "unlisted").write_bytes((folder / "__0_0.distcp").read_bytes())
    path = {
        "relative": "../step-1/__0_0.distcp",
        "absolute": str(tmp_path / "checkpoint/step-1/__0_0.distcp"),
        "unlisted": "unlisted",
    }[kind]

    def plant(metadata: Metadata) -> None:
        for place in metadata.storage_data.values():
            place.relative_path = path

    forge(folder, plant)
    with pytest.raises(RuntimeError, match=r"step-2: \.metadata: .* not a file of this checkpoint"):
        make(tmp_path, load_step=2).load(tensors(0))


def test_checkpoint_manifest_with_paths_is_refused(tmp_path):
    save(tmp_path, 1)
    path = tmp_path / "checkpoint/step-1/manifest.json"
    record = Manifest.from_text(path.read_text())
    outside = {"../step-1/config.toml": record.files["config.toml"]}
    path.write_text(dataclasses.replace(record, files={**record.files, **outside}).to_text())
    with pytest.raises(RuntimeError, match=r"'\.\./step-1/config\.toml', which is not a file of this folder"):
        make(tmp_path).load(tensors(0))


def without_chunks(metadata: Metadata) -> None:
    metadata.state_dict_metadata["cursor"].chunks.clear()  # type: ignore[union-attr]


def bytes_item(metadata: Metadata) -> None:
    metadata.state_dict_metadata["cursor"] = BytesStorageMetadata()


def beyond_the_end(metadata: Metadata) -> None:
    next(iter(metadata.storage_data.values())).offset = 2**40


def other_shape(metadata: Metadata) -> None:
    metadata.state_dict_metadata["cursor"].size = torch.Size([1])  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_chunks, "the chunks of cursor do not make up its shape"),
        (bytes_item, "cursor is not a tensor, and reading it would run code"),
        (beyond_the_end, "lies outside __0_0.distcp"),
        (other_shape, "list different tensors"),
        (lambda metadata: [metadata], "holds a list"),
        (lambda metadata: setattr(metadata, "storage_data", None), "cannot be read"),
    ],
)
def test_checkpoint_metadata_that_does_not_add_up_is_refused(tmp_path, change, message):
    save(tmp_path, 1)
    forge(tmp_path / "checkpoint/step-1", change)
    with pytest.raises(RuntimeError, match=message):
        make(tmp_path).load(tensors(0))


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_checkpoint_planner_refuses_items_that_are_not_tensors(tmp_path):
    """The last line of defence: whatever the metadata says, nothing is unpickled."""
    marker = tmp_path / "ran"
    peers = make(tmp_path)._peers
    storage.dcp.save({"a": Payload(os.mkdir, str(marker))}, checkpoint_id=tmp_path / "x", no_dist=True)
    metadata = pickle.loads((tmp_path / "x/.metadata").read_bytes())
    with pytest.raises(RuntimeError, match="a is not a tensor, and reading it would run code"):
        storage.read(tmp_path / "x", {"a": torch.zeros(1)}, metadata, peers)
    assert not marker.exists()
