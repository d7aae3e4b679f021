"""A checkpoint on the disk, and the proof that it is what was written."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.metadata import Metadata

from cptrain.checkpoint import manifest, plain, storage
from cptrain.checkpoint.manifest import Damaged, Manifest
from cptrain.checkpoint.peers import Peers

TRAIN_STATE = "train_state.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Intact:
    """What is known of a checkpoint whose every file reads as it was written."""

    manifest: Manifest
    metadata: Metadata
    train_state: dict[str, Any]


def verify(folder: Path, step: int, peers: Peers) -> Intact:
    """Compare every file with its digest, each on one rank. Collective: Damaged on all ranks if a file differs.

    Reading anything before this is not safe: flipped bits would load silently, and a pickle could run code.
    """
    text, damage = "", ""
    if peers.is_first:
        try:
            text = (folder / manifest.NAME).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            damage = f"{manifest.NAME} cannot be read ({error})"
    text, damage = peers.from_first((text, damage))
    if damage:
        raise Damaged(damage)
    record = Manifest.from_text(text)
    if record.step != step:
        raise Damaged(f"{manifest.NAME} is of step {record.step}")
    with peers.together(f"cannot read {folder}"):
        try:
            for name in sorted(record.files)[peers.rank :: peers.world]:
                record.check(folder, name)
            metadata = storage.parse_metadata(
                record.read(folder, storage.METADATA), {name: entry.size for name, entry in record.files.items()}
            )
            if storage.describe(metadata) != record.tensors:
                raise Damaged(f"{manifest.NAME} and {storage.METADATA} list different tensors")
            train_state = plain.decode(record.read(folder, TRAIN_STATE).decode())
        except Damaged as error:
            damage = str(error)
    verdicts = dict.fromkeys(verdict for verdict in peers.gather(damage) if verdict)
    if verdicts:
        raise Damaged("; ".join(verdicts))
    return Intact(manifest=record, metadata=metadata, train_state=train_state)
