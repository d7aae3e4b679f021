from __future__ import annotations

import os
from collections.abc import Iterator

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from pool import Pool


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    """The session's pool of gloo workers; see tests/pool.py."""
    workers = Pool()
    yield workers
    workers.remove()
