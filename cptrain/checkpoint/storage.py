"""Tensors to and from files by torch.distributed.checkpoint, reading nothing that could run code.

The only file of this room that knows what a DCP folder looks like inside: the names `__RANK_N.distcp` and `.metadata`,
and which classes the pickle in `.metadata` is made of. Measured on torch 2.13: DCP's own reader executes any pickle in
`.metadata`, follows `relative_path` out of the folder, and unpickles every item that is not a tensor.
"""

from __future__ import annotations

import contextlib
import io
import math
import pickle
import warnings
from collections.abc import Iterator, Mapping
from enum import EnumMeta
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from cptrain.checkpoint.manifest import Damaged, Tensor
from cptrain.checkpoint.peers import Peers

METADATA = ".metadata"

_ALLOWED = {
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "pathlib": {"PosixPath"},
    "pathlib._local": {"PosixPath"},
}


def write(folder: Path, tensors: Mapping[str, torch.Tensor], peers: Peers) -> dict[str, Tensor]:
    """Write every rank's tensors into an existing empty folder; what was written, by key.

    Collective. RuntimeError with the reason on all ranks if a rank could not write. Nothing is flushed to the disk yet.
    """
    # One writer thread: with more, an error in a thread is swallowed and the checkpoint counts as written. Flushing is
    # left to us: DCP calls fsync on .metadata while its bytes are still in Python's buffer.
    writer = dcp.FileSystemWriter(folder, thread_count=1, sync_files=False, overwrite=False)
    planner = dcp.DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    with _quiet():
        try:
            metadata = dcp.save(
                dict(tensors),
                storage_writer=writer,
                planner=planner,
                process_group=peers.group,
                no_dist=peers.group is None,
            )
        except dcp.CheckpointException as error:
            raise RuntimeError(_reason(error)) from error
    return describe(metadata)


def read(folder: Path, tensors: Mapping[str, torch.Tensor], metadata: Metadata, peers: Peers) -> None:
    """Fill the given tensors in place from any layout they were saved in. Collective; RuntimeError on all ranks."""
    with _quiet():
        try:
            dcp.load(
                dict(tensors),
                storage_reader=_Reader(folder, metadata),
                planner=_TensorsOnly(flatten_state_dict=False, flatten_sharded_tensors=False),
                process_group=peers.group,
                no_dist=peers.group is None,
            )
        except dcp.CheckpointException as error:
            raise RuntimeError(_reason(error)) from error


def own_files(folder: Path, peers: Peers) -> list[Path]:
    """The files that `write` made on this rank."""
    found = sorted(folder.glob(f"__{peers.rank}_*.distcp"))
    return [*found, folder / METADATA] if peers.is_first else found


def describe(metadata: Metadata) -> dict[str, Tensor]:
    """Global shape and dtype of every tensor, by key."""
    return {
        key: Tensor(shape=tuple(entry.size), dtype=str(entry.properties.dtype).removeprefix("torch."))
        for key, entry in metadata.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }


def parse_metadata(content: bytes, sizes: Mapping[str, int]) -> Metadata:
    """The content of `.metadata`, without running code that it brings; Damaged if it is not plain tensor metadata.

    sizes: the bytes of each file that it may point into, by name.
    """
    try:
        metadata = _Unpickler(io.BytesIO(content)).load()
        _check(metadata, sizes)
    except Damaged:
        raise
    except Exception as error:  # a crafted pickle can raise anything
        raise Damaged(f"{METADATA} cannot be read ({type(error).__name__}: {error})") from error
    return metadata


def _check(metadata: Any, sizes: Mapping[str, int]) -> None:
    if not isinstance(metadata, Metadata):
        raise Damaged(f"{METADATA} holds a {type(metadata).__name__}")
    for key, entry in metadata.state_dict_metadata.items():
        if not isinstance(entry, TensorStorageMetadata):
            raise Damaged(f"{METADATA}: {key} is not a tensor, and reading it would run code from the checkpoint")
        if sum(math.prod(chunk.sizes) for chunk in entry.chunks) != math.prod(entry.size):
            raise Damaged(f"{METADATA}: the chunks of {key} do not make up its shape {list(entry.size)}")
    for index, place in metadata.storage_data.items():
        if place.relative_path not in sizes:
            raise Damaged(f"{METADATA}: {index.fqn} is in {place.relative_path!r}, not a file of this checkpoint")
        if not 0 <= place.offset <= place.offset + place.length <= sizes[place.relative_path]:
            raise Damaged(f"{METADATA}: {index.fqn} lies outside {place.relative_path}")
        if place.transform_descriptors:
            raise Damaged(f"{METADATA}: {index.fqn} is encoded as {place.transform_descriptors!r}")


class _Unpickler(pickle.Unpickler):
    """Makes only the classes that tensor metadata is made of."""

    def find_class(self, module: str, name: str) -> Any:
        if name in _ALLOWED.get(module, ()):
            return super().find_class(module, name)
        if module == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype):
            return found
        if (module, name) == ("builtins", "getattr"):
            return _enum_member
        raise Damaged(f"{METADATA} asks for {module}.{name}, which tensor metadata never needs: it may be an attack")


def _enum_member(owner: Any, name: str) -> Any:
    """A member of an enum, which Python 3.11.0 to 3.11.3 pickle as a call of getattr; no attribute of anything else."""
    if not isinstance(owner, EnumMeta):
        raise Damaged(f"{METADATA} asks for an attribute of {owner!r}, which tensor metadata never needs")
    return owner[name]


class _Reader(dcp.FileSystemReader):
    """Reads with metadata that has been checked already, instead of unpickling the file itself."""

    def __init__(self, folder: Path, metadata: Metadata) -> None:
        super().__init__(folder)
        self._checked = metadata

    def read_metadata(self) -> Metadata:  # type: ignore[override]
        return self._checked


class _TensorsOnly(dcp.DefaultLoadPlanner):
    """Refuses items that are not tensors: DCP would unpickle them."""

    def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
        raise RuntimeError(f"{read_item.dest_index.fqn} is not a tensor, and reading it would run code")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """One process without torch.distributed is a supported way to run, not something to warn of."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _reason(error: dcp.CheckpointException) -> str:
    """The failing ranks with their errors; DCP's own text is the tracebacks of all of them."""
    return "; ".join(
        f"rank {rank}: {type(cause).__name__}: {cause}" for rank, (cause, _) in sorted(error.failures.items())
    )
