"""The manifest: what a checkpoint holds and how each of its files must read."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cptrain.checkpoint import files
from cptrain.checkpoint.files import Digest

NAME = "manifest.json"
SCHEMA = 1


class Damaged(Exception):
    """This checkpoint cannot be trusted; the reason is the message."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tensor:
    """A tensor's global shape, and its dtype without "torch."."""

    shape: tuple[int, ...]
    dtype: str

    def __str__(self) -> str:
        return f"{self.dtype}{list(self.shape)}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """step: of the train state; torch: the version that wrote; world: number of ranks; mesh: axis -> degree;
    tensors: by key; files: by name, all plain names in the checkpoint's own folder."""

    step: int
    torch: str
    world: int
    mesh: Mapping[str, int]
    tensors: Mapping[str, Tensor]
    files: Mapping[str, Digest]

    def to_text(self) -> str:
        """JSON with a checksum over all that it says."""
        body: dict[str, Any] = {
            "schema": SCHEMA,
            "step": self.step,
            "torch": self.torch,
            "world": self.world,
            "mesh": dict(self.mesh),
            "files": {name: entry._asdict() for name, entry in sorted(self.files.items())},
            "tensors": {
                key: {"shape": list(tensor.shape), "dtype": tensor.dtype}
                for key, tensor in sorted(self.tensors.items())
            },
        }
        return json.dumps({"checksum": _checksum(body), **body}, indent=1) + "\n"

    @classmethod
    def from_text(cls, text: str) -> Manifest:
        """Read `to_text` back; Damaged if it is not what was written, RuntimeError if a newer version wrote it."""
        try:
            body = json.loads(text)
            checksum = body.pop("checksum")
            if checksum != _checksum(body):
                raise Damaged(f"{NAME} does not match its own checksum")
            if body["schema"] != SCHEMA:
                raise RuntimeError(
                    f"{NAME} has schema {body['schema']}, this cptrain reads {SCHEMA}; use the version that wrote it"
                )
            manifest = cls(
                step=body["step"],
                torch=body["torch"],
                world=body["world"],
                mesh=body["mesh"],
                tensors={
                    key: Tensor(shape=tuple(entry["shape"]), dtype=entry["dtype"])
                    for key, entry in body["tensors"].items()
                },
                files={name: Digest(entry["size"], entry["sha256"]) for name, entry in body["files"].items()},
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise Damaged(f"{NAME} cannot be read ({type(error).__name__}: {error})") from error
        for name in manifest.files:
            if name != Path(name).name:
                raise Damaged(f"{NAME} lists {name!r}, which is not a file of this folder")
        return manifest

    def check(self, folder: Path, name: str) -> None:
        """Damaged unless the file reads as it was written."""
        try:
            found = files.digest(folder / name)
        except OSError as error:
            raise Damaged(f"{name} cannot be read ({error.strerror})") from error
        self._compare(name, found)

    def read(self, folder: Path, name: str) -> bytes:
        """The content of a small file; Damaged unless it reads as it was written."""
        try:
            content = (folder / name).read_bytes()
        except OSError as error:
            raise Damaged(f"{name} cannot be read ({error.strerror})") from error
        self._compare(name, files.digest_of(content))
        return content

    def _compare(self, name: str, found: Digest) -> None:
        written = self.files.get(name)
        if written is None:
            raise Damaged(f"{NAME} does not list {name}")
        if found.size != written.size:
            raise Damaged(f"{name} has {found.size} bytes, {written.size} were written")
        if found != written:
            raise Damaged(f"{name} has the right size but not the content that was written")


def _checksum(body: Mapping[str, Any]) -> str:
    return files.digest_of(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).sha256
