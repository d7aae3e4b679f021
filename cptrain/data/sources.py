"""Text documents and where they come from: files found, documents read one by one, faults named."""

from __future__ import annotations

import glob
import json
import logging
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from cptrain.data.settings import DataConfig

logger = logging.getLogger(__name__)

_NAMES_KEPT = 200


class Faults:
    """Counts what could not be read and keeps the names, of the first 200; or raises at the first one."""

    def __init__(self, *, on_error: str) -> None:
        self.count = 0
        self.names: list[str] = []
        self._raises = on_error == "raise"

    def add(self, where: str, why: str) -> None:
        """Note one fault. ValueError naming it if faults are to be raised."""
        if self._raises:
            raise ValueError(f'{where}: {why}; correct it, or leave it out with data.on_error = "skip"')
        self.count += 1
        if len(self.names) < _NAMES_KEPT:
            self.names.append(f"{where} ({why})")


def find_files(config: DataConfig) -> list[Path]:
    """The files of the source in the order of their documents: as listed, sorted within each glob, each file once, by
    whatever symbolic links it is matched.

    ValueError naming a path that matches nothing or is a folder.
    """
    if config.source == "stdlib":
        return _stdlib_files()
    found: dict[str, str] = {}  # by what a link leads to
    num_matched = 0
    for pattern in config.paths:
        matches = sorted(glob.glob(os.path.expanduser(pattern), recursive=True))
        files = [os.path.abspath(match) for match in matches if not os.path.isdir(match)]
        if config.source == "tokens":
            files = [file for file in files if not file.endswith(".idx")]  # the offsets that lie beside
        if not files:
            what = f"is a folder; write {pattern.rstrip('/')}/**/*" if matches == [pattern] else "matches no file"
            raise ValueError(f"data.paths: {pattern!r} {what} (relative paths start at {os.getcwd()})")
        num_matched += len(files)
        for file in files:
            found.setdefault(os.path.realpath(file), file)
    if left_out := num_matched - len(found):
        logger.info(f"data.paths: {left_out} of {num_matched} matches are files that are matched before; read once")
    return [Path(file) for file in found.values()]


def _stdlib_files() -> list[Path]:
    root = Path(sysconfig.get_paths()["stdlib"])
    files = []
    for folder, inner, names in os.walk(root):
        inner[:] = [name for name in inner if name not in ("site-packages", "dist-packages", "__pycache__")]
        files += [Path(folder, name) for name in names if name.endswith(".py")]
    if not files:
        raise RuntimeError(
            f'this interpreter\'s library {root} has no .py files; set data.source to "text" and data.paths'
        )
    return sorted(files, key=lambda file: file.relative_to(root).as_posix())


def read_documents(config: DataConfig, files: list[Path], faults: Faults) -> Iterator[tuple[str, str]]:
    """Each document's name (file, or file:line) and text, in order. What cannot be read goes to `faults`."""
    for file in files:
        if config.source == "jsonl":
            yield from _read_lines(file, config.text_field, faults)
            continue
        try:
            text = file.read_bytes().decode("utf-8")
        except OSError as error:
            faults.add(str(file), f"cannot be read: {error.strerror}")
        except UnicodeDecodeError as error:
            faults.add(str(file), f"no UTF-8 at byte {error.start}")
        else:
            yield str(file), text


def _read_lines(file: Path, field: str, faults: Faults) -> Iterator[tuple[str, str]]:
    try:
        with file.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                where = f"{file}:{number}"
                try:
                    record = json.loads(line)
                except (ValueError, RecursionError) as error:  # no JSON, or no UTF-8
                    faults.add(where, f"no JSON: {error}")
                    continue
                text = record.get(field) if isinstance(record, dict) else None
                if isinstance(text, str):
                    yield where, text
                else:
                    faults.add(where, f"no text in the field {field!r} (data.text_field)")
    except OSError as error:
        faults.add(str(file), f"cannot be read: {error.strerror}")
