"""Threads of ranks on CPU do not interrupt one another."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "SCHED_BATCH"), reason="what Linux alone does")

# The rule that the process starts with, those of a thread afterwards, and of a child.
PROGRAM = """
import os, subprocess, sys, threading
from unittest import mock
from cptrain.distributed.turns import take_turns

os.sched_setscheduler(0, getattr(os, sys.argv[1]), os.sched_param(0))
refused = mock.patch("os.sched_setscheduler", side_effect=OSError(22, 'Invalid argument'))
if sys.argv[2] == "refused":
    refused.start()
take_turns()
rules = []
thread = threading.Thread(target=lambda: rules.append(os.sched_getscheduler(0)))
thread.start(), thread.join()
print(*rules, subprocess.check_output([sys.executable, "-c", "import os; print(os.sched_getscheduler(0))"], text=True))
"""


@pytest.mark.parametrize(
    ("before", "system", "after"),
    [
        ("SCHED_OTHER", "allows", "SCHED_BATCH"),
        ("SCHED_OTHER", "refused", "SCHED_OTHER"),
        ("SCHED_IDLE", "allows", "SCHED_IDLE"),  # a user's own choice
    ],
)
def test_distributed_threads_that_compute_are_not_interrupted(before, system, after):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, before, system], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.split() == [str(getattr(os, after))] * 2
