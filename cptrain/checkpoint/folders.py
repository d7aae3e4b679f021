"""The names under the checkpoint folder, and moves between them that a crash cannot tear.

[Note: names]
step-N              a whole checkpoint: it got this name, in one rename, after everything in it was on the disk
step-N.tmp          being written, or what a crash left of that
step-N.replaced     the former step-N while a new one takes its place; goes back if the crash came in between
step-N.deleting     on its way out
step-N.superseded   a run that resumed from before N left it behind; kept for its owner, never read again
latest              names the newest step for people and scripts; loading looks at the folders themselves
.lock               held while a save is running
run.lock            held while a run is, where this folder is not in that of the run
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from cptrain.checkpoint import files
from cptrain.checkpoint.folder_lock import FolderLock

logger = logging.getLogger("cptrain")


def finished(root: Path, step: int) -> Path:
    return root / f"step-{step}"


def unfinished(root: Path, step: int) -> Path:
    return root / f"step-{step}.tmp"


def steps(root: Path) -> list[int]:
    """The steps of all whole checkpoints, newest first; nothing is said of what is in them."""
    if not root.is_dir():
        return []
    found = [int(match[1]) for path in root.iterdir() if (match := re.fullmatch(r"step-(0|[1-9]\d*)", path.name))]
    return sorted(found, reverse=True)


def begin(root: Path, step: int) -> None:
    """Make a new empty `step-N.tmp`; everything that a crash left behind is cleared first."""
    root.mkdir(parents=True, exist_ok=True)
    recover(root)
    for path in root.iterdir():
        if re.fullmatch(r"step-\d+\.(tmp|deleting|replaced)", path.name):
            logger.info("checkpoint: removing %s, left by an interrupted save", path)
            shutil.rmtree(path)
    unfinished(root, step).mkdir()


def recover(root: Path) -> None:
    """Put a replaced checkpoint back whose successor never arrived."""
    if not root.is_dir():
        return
    for path in root.glob("step-*.replaced"):
        if not path.with_suffix("").exists():
            logger.warning("checkpoint: the save that was to replace %s never finished: using it again", path.stem)
            path.rename(path.with_suffix(""))
            files.flush(root)


def commit(root: Path, step: int, *, since: int) -> None:
    """Turn a finished `step-N.tmp` into `step-N`. Other checkpoints of later steps than `since` step aside.

    since: the newest step whose folder this run came from, or wrote: later ones are of another run.
    """
    final, fresh = finished(root, step), unfinished(root, step)
    files.flush(fresh)
    for later in steps(root):
        if later > since and later != step:
            _set_aside(finished(root, later), since)
    replaced = root / f"step-{step}.replaced"
    if final.exists():
        logger.info("checkpoint: replacing %s, which an earlier run wrote", final)
        final.rename(replaced)
    fresh.rename(final)
    files.flush(root)
    try:
        _name_latest(root, final.name)
        if replaced.exists():
            shutil.rmtree(replaced)
    except OSError as error:  # the checkpoint itself is whole
        logger.warning("checkpoint: %s is saved, but not all around it is in order (%s)", final, error)


def prune(root: Path, keep_latest_k: int) -> None:
    """Delete all but the newest k checkpoints (0: none is deleted). A failure is logged: the new checkpoint is safe."""
    for step in steps(root)[keep_latest_k:] if keep_latest_k else []:
        going = root / f"step-{step}.deleting"
        try:
            finished(root, step).rename(going)
            shutil.rmtree(going)
        except OSError as error:
            logger.warning("checkpoint: could not delete the old step-%d (%s)", step, error)


@contextlib.contextmanager
def lock(root: Path) -> Iterator[None]:
    """Hold the folder for one save; RuntimeError if another process is saving here. Death releases it."""
    root.mkdir(parents=True, exist_ok=True)
    hold = FolderLock(root / ".lock")
    if hold.take():
        raise RuntimeError(
            f"another process is saving a checkpoint into {root}; end it, or give this job another job.name"
        )
    try:
        yield
    finally:
        hold.release()


def _set_aside(path: Path, step: int) -> None:
    names = itertools.chain([".superseded"], (f".superseded-{count}" for count in itertools.count(2)))
    target = next(target for name in names if not (target := path.with_name(path.name + name)).exists())
    logger.warning(
        "checkpoint: this run went on from step %d, not from %s; renaming that to %s", step, path, target.name
    )
    path.rename(target)


def _name_latest(root: Path, name: str) -> None:
    fresh = root / "latest.tmp"
    fresh.unlink(missing_ok=True)
    files.write(fresh, name + "\n")
    fresh.replace(root / "latest")
