"""Every fault that tools/plant_faults.py plants still has its place in the source."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def tool() -> Iterator[ModuleType]:
    sys.path.insert(0, str(ROOT / "tools"))
    import plant_faults

    yield plant_faults
    sys.path.remove(str(ROOT / "tools"))


def test_plant_faults_finds_the_place_of_each(tool: ModuleType) -> None:
    for fault in tool.FAULTS:
        source = (ROOT / "cptrain" / "context_parallel" / fault.file).read_text(encoding="utf-8")
        assert source.count(fault.old) == 1, fault.name
        assert fault.new not in (fault.old, ""), fault.name
