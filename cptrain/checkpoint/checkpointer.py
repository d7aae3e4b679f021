"""Checkpoints that are whole or not there at all, for any number of ranks.

[Note: protocol]
Saving writes into a fresh `step-N.tmp`, flushes and digests every file on the rank that wrote it, adds a manifest of
all digests, flushes the folder and renames it to `step-N`: a process killed at any point leaves the previous checkpoint
as it was. Loading tries the newest first, and reads it only after every file has been compared with its digest; a
damaged one is passed over with the reason in the log. DCP alone does neither: saving over a checkpoint can destroy it,
and most flipped bits in a shard load without a word.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from cptrain.checkpoint import files, folders, manifest, plain, rng, storage
from cptrain.checkpoint.files import Digest
from cptrain.checkpoint.manifest import Damaged, Manifest, Tensor
from cptrain.checkpoint.peers import Peers
from cptrain.checkpoint.settings import LATEST, CheckpointConfig
from cptrain.checkpoint.state import flatten
from cptrain.checkpoint.verify import TRAIN_STATE, Intact, verify

logger = logging.getLogger("cptrain")

CONFIG = "config.toml"


class Checkpointer:
    """Saves and loads the state of a run under one folder that all ranks see.

    folder: the job's output folder, where a relative `config.folder` starts.
    group: all ranks, gloo, used for nothing else (saving on a group that training uses too can deadlock); None for one
        process, with or without torch.distributed.
    mesh: axis name -> degree, recorded in the manifest for people; loading works on any mesh.
    `save` and `load` are collective: they raise on all ranks or on none.
    """

    def __init__(
        self,
        config: CheckpointConfig,
        folder: Path,
        group: dist.ProcessGroup | None = None,
        *,
        mesh: Mapping[str, int] | None = None,
    ) -> None:
        self.folder = config.below(Path(folder))
        self._config = config
        self._peers = Peers(group)
        self._mesh = dict(mesh or {})
        self._held: int | None = None  # the step whose folder is known to hold this run's state

    def due(self, step: int) -> bool:
        """Whether the config asks for a checkpoint after this step."""
        return self._config.enable and step % self._config.interval == 0

    def steps(self) -> list[int]:
        """The steps of all finished checkpoints, newest first, as this rank sees the folder; no file is checked."""
        return folders.steps(self.folder)

    def latest_step(self) -> int | None:
        """The newest of `steps`, None if there is none."""
        return next(iter(self.steps()), None)

    def save(self, step: int, tensors: Mapping[str, Any], train_state: Mapping[str, Any], config_toml: str) -> bool:
        """Write `step-N`, then delete the oldest beyond keep_latest_k; returns whether anything was written.

        tensors: nested dicts of tensors and DTensors. All ranks pass the same keys, and what is not a DTensor has the
            same value on all of them; section "rng" alone differs from rank to rank.
        train_state: plain values (int, float, str, bool, None, lists and dicts of these), kept as readable JSON from
            which every float comes back exactly.
        config_toml: the resolved config, kept as it is.
        ValueError for what cannot be saved, RuntimeError if a rank failed: the checkpoints before are untouched then.
        A step that this run has saved or loaded already is not written again.
        """
        if not self._config.enable:
            return False
        peers, what = self._peers, f"cannot save step {step} in {self.folder}"
        with peers.together(what):
            held = self._held == step and step in self.steps()
        if peers.from_first(held):
            if peers.is_first:
                logger.info("checkpoint: step %d is in %s already", step, self.folder)
            return False
        fresh = folders.unfinished(self.folder, step)
        with contextlib.ExitStack() as stack:
            with peers.together(what):
                if step < 0:
                    raise ValueError(f"step = {step}: must not be negative")
                flat = flatten(tensors)
                texts = {TRAIN_STATE: plain.encode(dict(train_state)), CONFIG: config_toml}
            with peers.together(what):
                if peers.is_first:
                    stack.enter_context(folders.lock(self.folder))
                    folders.begin(self.folder, step)
            with peers.together(what):
                if not fresh.is_dir():
                    raise RuntimeError(f"{fresh} is not visible; all ranks must see the same folder")
            with peers.together(what):
                saved = storage.write(fresh, flat, peers)
            with peers.together(what):
                own = storage.own_files(fresh, peers)
                for name, text in texts.items() if peers.is_first else ():
                    files.write(fresh / name, text)
                    own.append(fresh / name)
                digests = {}
                for path in own:
                    files.flush(path)
                    digests[path.name] = files.digest(path)
            digests = {name: entry for part in peers.gather(digests) for name, entry in part.items()}
            with peers.together(what):
                if peers.is_first:
                    self._commit(step, saved, digests)
            self._held = step
            if peers.is_first:
                logger.info("checkpoint: saved step %d in %s", step, folders.finished(self.folder, step))
                folders.prune(self.folder, self._config.keep_latest_k)
        return True

    def load(self, tensors: Mapping[str, Any]) -> dict[str, Any] | None:
        """Fill the tensors in place from the newest intact checkpoint (or load_step); returns its train state.

        None if there is no checkpoint: a fresh start. Nothing is written into the tensors unless all names, shapes and
        dtypes agree. Generator states (section "rng") are taken by the ranks that find their own; others keep theirs.
        RuntimeError if there are checkpoints but none is intact, or load_step is not; ValueError if the tensors differ.
        """
        if not self._config.enable:
            return None
        peers, what = self._peers, f"cannot resume from {self.folder}"
        with peers.together(what):
            wanted = flatten(tensors)
            candidates = self._candidates() if peers.is_first else []
        candidates = peers.from_first(candidates)
        if not candidates:
            if peers.is_first:
                logger.info("checkpoint: none in %s: starting fresh", self.folder)
            return None
        step, found = self._newest_intact(candidates)
        source = folders.finished(self.folder, step)
        with peers.together(f"cannot resume from {source}"):
            chosen = _match(wanted, found.manifest.tensors)
        with peers.together(f"cannot resume from {source}: the tensors are partly overwritten now"):
            storage.read(source, chosen, found.metadata, peers)
        self._held = step
        self._report(source, found.manifest, kept=len(wanted) > len(chosen))
        return found.train_state

    def _commit(self, step: int, saved: Mapping[str, Tensor], digests: Mapping[str, Digest]) -> None:
        fresh = folders.unfinished(self.folder, step)
        for name, entry in digests.items():
            if not (fresh / name).is_file() or (fresh / name).stat().st_size != entry.size:
                raise RuntimeError(f"{name} of another rank is not visible; all ranks must see the same folder")
        record = Manifest(
            step=step,
            torch=torch.__version__,
            world=self._peers.world,
            mesh=self._mesh,
            tensors=saved,
            files=digests,
        )
        files.write(fresh / manifest.NAME, record.to_text())
        folders.commit(self.folder, step, since=step if self._held is None else self._held)

    def _candidates(self) -> list[int]:
        """The steps to try, newest first."""
        folders.recover(self.folder)
        found, asked = self.steps(), self._config.load_step
        if asked == LATEST:
            return found
        if asked not in found:
            there = ", ".join(map(str, sorted(found))) or "none"
            raise RuntimeError(f"checkpoint.load_step = {asked} is not there; there are: {there}; -1 takes the newest")
        return [asked]

    def _newest_intact(self, candidates: list[int]) -> tuple[int, Intact]:
        reasons = []
        for step in candidates:
            source = folders.finished(self.folder, step)
            try:
                return step, verify(source, step, self._peers)
            except Damaged as damage:
                reasons.append(f"{source.name}: {damage}")
                if self._peers.is_first:
                    logger.warning("checkpoint: %s is damaged and not used: %s", source, damage)
        raise RuntimeError(
            "\n  ".join([f"cannot resume from {self.folder}: no checkpoint there is intact", *reasons])
            + "\ntraining does not silently start over: restore one, or choose another job.name for a new run"
        )

    def _report(self, source: Path, record: Manifest, kept: bool) -> None:
        keeping = sum(self._peers.gather(kept))
        if not self._peers.is_first:
            return
        logger.info(
            "checkpoint: resumed from %s, written by %d ranks with torch %s", source, record.world, record.torch
        )
        if record.world != self._peers.world or keeping:
            logger.info(
                "checkpoint: %d ranks now, %d then: %d of them take their random generator states from it, "
                "%d stay as they were seeded",
                self._peers.world,
                record.world,
                self._peers.world - keeping,
                keeping,
            )


def _match(wanted: Mapping[str, torch.Tensor], saved: Mapping[str, Tensor]) -> dict[str, torch.Tensor]:
    """The wanted tensors that the checkpoint has: all but some generator states. ValueError if another is missing."""
    here = {key: Tensor(shape=tuple(t.shape), dtype=str(t.dtype).removeprefix("torch.")) for key, t in wanted.items()}
    names = [key for key in sorted({*here, *saved}) if not key.startswith(f"{rng.SECTION}.")]
    complaints = {
        "not in the checkpoint": [key for key in names if key not in saved],
        "in the checkpoint only": [key for key in names if key not in here],
        "of another shape or dtype": [
            f"{key} ({saved[key]} in the checkpoint, {here[key]} here)"
            for key in names
            if key in here and key in saved and here[key] != saved[key]
        ],
    }
    lines = [f"{len(keys)} {kind}: {_some(keys)}" for kind, keys in complaints.items() if keys]
    if lines:
        raise ValueError(
            "\n  ".join(["it holds other tensors than this run", *lines])
            + "\nuse the [model] and [optimizer] settings of its config.toml, or another job.name for a new run"
        )
    return {key: tensor for key, tensor in wanted.items() if saved.get(key) == here[key]}


def _some(keys: list[str], most: int = 8) -> str:
    return ", ".join(keys[:most]) + (f" and {len(keys) - most} more" if len(keys) > most else "")
