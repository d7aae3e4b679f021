from __future__ import annotations

import os
from collections.abc import Iterator

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from pool import Pool

from cptrain.distributed.turns import take_turns

take_turns()  # all processes that tests start, too: ranks outnumber the cores

# A process that began one of these last would work alone for minutes at the end.
LONGEST = (
    "test_train_invariance.py",
    "test_train_stages.py",
    "test_train_end_to_end.py",
    "test_readme.py",
    "test_traffic.py",
    "test_resume.py",
    "test_startup_check.py",
    "test_train_cli.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, in this order; the others stay as they are."""
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    """The session's pool of gloo workers; see tests/pool.py."""
    workers = Pool()
    yield workers
    workers.remove()
