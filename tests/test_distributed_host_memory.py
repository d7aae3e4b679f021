"""Memory that tensors free is kept for the next ones."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from unittest import mock

import pytest
import torch

import cptrain.train.run as train_run
from cptrain.distributed import host
from cptrain.train.settings import TrainSettings

# Pages that this process fetches while it makes and frees the same 32 MiB in four tensors, ten times.
PROGRAM = """
import ctypes, resource, sys, torch
from cptrain.distributed.host_memory import TRIM_THRESHOLD, keep_freed_memory

ctypes.CDLL(None).mallopt(TRIM_THRESHOLD, 1_000_000)  # glibc's own one moves
if sys.argv[1] == "keep":
    keep_freed_memory()

def pages():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def step():
    tensors = [torch.ones(2 * 2**20) for _ in range(4)]

step(), step()
before = pages()
for _ in range(10):
    step()
print(pages() - before)
"""


def fetched_pages(argument: str, **environment: str) -> int:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, argument],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="what glibc alone does")
def test_distributed_memory_that_tensors_free_is_kept():
    all_of_it = 10 * 32 * 2**20 // os.sysconf("SC_PAGESIZE")
    assert fetched_pages("keep") < all_of_it / 5
    assert fetched_pages("give back") > all_of_it / 2
    # who says something else in the environment is heard
    assert fetched_pages("keep", MALLOC_TRIM_THRESHOLD_="1000000") > all_of_it / 2


@pytest.mark.parametrize(("device", "kept"), [("cpu", True), ("cuda", False)])
def test_distributed_memory_is_kept_and_turns_are_taken_by_training_on_cpu(device, kept):
    class Reached(Exception):
        pass

    stubs = {"keep_freed_memory": mock.Mock(), "take_turns": mock.Mock()}
    started = {
        "local_device": mock.Mock(return_value=torch.device(device)),
        "process_group": mock.Mock(side_effect=Reached),
    }
    with mock.patch.multiple(host, **stubs), mock.patch.multiple(train_run, **started), pytest.raises(Reached):
        train_run.run(TrainSettings())
    assert stubs["keep_freed_memory"].called == stubs["take_turns"].called == kept
