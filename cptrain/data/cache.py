"""Folders that appear complete or not at all."""

from __future__ import annotations

import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

_ABANDONED_AFTER_S = 24 * 3600.0


def cache_folder(cache_dir: str) -> Path:
    """The folder `data.cache_dir` stands for."""
    if cache_dir != "auto":
        return Path(cache_dir).expanduser().absolute()
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cptrain"
    except RuntimeError as error:
        raise RuntimeError(f'data.cache_dir = "auto": {error} Set data.cache_dir to a folder, or HOME') from error


@contextmanager
def opened(folder: Path) -> Iterator[None]:
    """The block reads a published folder. RuntimeError with the way out where a file of it is missing or damaged."""
    try:
        yield
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise RuntimeError(
            f"{folder}: a file in it is missing or damaged ({error}); remove {folder}, and it is made anew. Where "
            "other ranks have it: data.cache_dir must lie on a file system that every rank sees"
        ) from error


def publish(folder: Path, fill: Callable[[Path], None], *, within: bool = False) -> None:
    """Make `folder` with what `fill` writes into the folder it is given, unless it is there already.

    `fill` writes beside, under a name of its own; the rename comes last. So a crash leaves no half-made `folder`, and
    of several processes that make the same one, one wins and the others throw theirs away.
    within: a part of a folder that was published. RuntimeError if that is gone, or if the disk refuses.
    """
    if folder.is_dir():
        return
    if within and not folder.parent.is_dir():  # made anew here it would hold this part alone, and look complete
        raise RuntimeError(f"{folder.parent}: removed while it was in use; start again, and it is made anew")
    temporary = folder.parent / f"{folder.name}.tmp-{uuid.uuid4().hex}"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(folder)
        temporary.mkdir()
        fill(temporary)
        for path in [*temporary.iterdir(), temporary]:
            _sync(path)
        try:
            temporary.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
        _sync(folder.parent)
    except OSError as error:
        raise RuntimeError(
            f"{folder.parent}: {error.strerror or error}; set data.cache_dir to a folder with room that you may write"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _remove_abandoned(folder: Path) -> None:
    """Remove what a killed process left of the same folder. One at work has written within the last day."""
    for path in folder.parent.glob(f"{folder.name}.tmp-*"):
        try:
            newest = max(part.stat().st_mtime for part in [path, *path.iterdir()])
        except OSError:  # its owner has just renamed it
            continue
        if time.time() - newest > _ABANDONED_AFTER_S:
            shutil.rmtree(path, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
