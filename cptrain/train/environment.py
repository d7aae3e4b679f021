"""What a run was made with, for whoever reads its folder later."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import cptrain


def describe_environment(world_size: int) -> dict[str, Any]:
    """Versions, machine, command and the state of the checkout that `cptrain` runs from."""
    return {
        "cptrain": cptrain.__version__,
        "git": _git_state(Path(cptrain.__file__).parent),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchdata": _version("torchdata"),
        "cuda": torch.version.cuda,
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "world_size": world_size,
        "command": sys.argv,
    }


def write_environment(path: Path, world_size: int) -> None:
    """Write `describe_environment` as JSON."""
    path.write_text(json.dumps(describe_environment(world_size), indent=2) + "\n", encoding="utf-8")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git_state(folder: Path) -> dict[str, Any] | None:
    """The commit and whether files differ from it; None where there is no checkout or no git."""
    try:
        commit = _git(folder, "rev-parse", "HEAD").strip()
        return {"commit": commit, "modified": bool(_git(folder, "status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.SubprocessError):
        return None


def _git(folder: Path, *arguments: str) -> str:
    return subprocess.run(
        ["git", "-C", str(folder), *arguments], check=True, capture_output=True, text=True, timeout=10
    ).stdout
