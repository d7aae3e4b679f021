"""A session-wide pool of gloo workers, so that a distributed test costs milliseconds instead of an interpreter start.

Workers are children of a fork server that has already imported torch (a plain fork of pytest hangs once OpenMP has run
in the parent). Each job gets a default process group of its own, of exactly its ranks, over a FileStore: no ports.
"""

from __future__ import annotations

import gc
import importlib
import multiprocessing
import multiprocessing.connection
import os
import shutil
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

# Among it the compiler, which torch imports at a worker's first step otherwise: a second and a half.
PRELOAD = [
    "torch",
    "torch.distributed",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
    "torch._dynamo",
    "pool",
]


def _serve(connection: multiprocessing.connection.Connection, path: list[str]) -> None:
    """Run jobs until the parent hangs up."""
    sys.path[:] = path
    import torch

    torch.set_num_threads(1)
    warnings.filterwarnings("error", module=r"cptrain(\..*)?")
    while True:
        try:
            job = connection.recv()
        except EOFError:
            return
        failures: list[str] = []

        def fail(error: BaseException, failures: list[str] = failures) -> None:
            failures.append(f"{type(error).__name__}: {error}\n{traceback.format_exc()}")
            connection.send((False, failures[0]))

        try:
            result = _run(fail, *job)
        except BaseException as error:  # before there was a group, or a result that cannot be sent
            fail(error)
        if not failures:
            connection.send((True, result))


def _run(
    fail: Callable[[BaseException], None],
    module: str,
    name: str,
    rank: int,
    world: int,
    store: str,
    backend: str,
    args: tuple,
    kwargs: dict,
) -> Any:
    import staged_group
    import torch
    import torch.distributed as dist

    from cptrain.distributed.shared_gloo import shared_gloo

    if module not in sys.modules:
        importlib.import_module(module)
        # Modules stay: the collection after each job need not look at all of torch again.
        gc.collect()
        gc.freeze()
    function: Any = sys.modules[module]
    for part in name.split("."):
        function = getattr(function, part)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world))
    torch.manual_seed(0)
    if backend == staged_group.BACKEND:
        staged_group.register()
        if torch.cuda.is_available():
            torch.cuda.set_device(0)  # or a mesh would take the device of LOCAL_RANK
            torch.cuda.init()
    elif "nccl" in backend:
        torch.cuda.set_device(rank)
    dist.init_process_group(
        backend or shared_gloo(),
        store=dist.FileStore(store, world),
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=60),
    )
    try:
        result = function(rank, world, *args, **kwargs)
        dist.barrier()  # nobody hangs up while another is still connecting to a group
        return result
    except BaseException as error:
        # Told before the group ends, which would make the other ranks fail too, and perhaps be heard first.
        fail(error)
    finally:
        dist.destroy_process_group()
        torch._dynamo.reset() if "torch._dynamo" in sys.modules else None
        _forget_meshes()
        gc.collect()


def _forget_meshes() -> None:
    """Empty the caches in which DTensor keeps meshes.

    Their groups have ended, but every group that is still known has a thread that wakes up a hundred times a second:
    after a few hundred jobs these alone would keep a core busy.
    """
    from torch.distributed.tensor import DTensor, _redistribute
    from torch.distributed.tensor._collective_utils import MeshTopoInfo
    from torch.distributed.tensor.debug import _clear_sharding_prop_cache

    _clear_sharding_prop_cache()
    MeshTopoInfo.build_from_mesh.cache_clear()
    DTensor._op_dispatcher.sharding_propagator._propagate_tensor_meta_cached.cache_clear()
    _redistribute._gen_transform_infos.cache_clear()
    if hasattr(_redistribute, "clear_redistribute_planner_cache"):  # not in every torch from 2.11 on
        _redistribute.clear_redistribute_planner_cache()


class Pool:
    """`run(n, function, *args)` calls `function(rank, n, *args)` on n ranks and returns their results in rank order.

    `function` must be importable (a top-level def of a test module), arguments and results picklable. The first rank
    that raises stops the job: its traceback is raised in the parent at once, and all workers are replaced.
    """

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(PRELOAD)
        self._workers: list[tuple[Any, multiprocessing.connection.Connection]] = []
        self._folder = Path(
            tempfile.mkdtemp(prefix="cptrain-pool-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None)
        )
        self._jobs = 0

    def run(
        self,
        world: int,
        function: Callable,
        *args: Any,
        timeout_s: float = 240,
        backend: str = "",
        **kwargs: Any,
    ) -> list[Any]:
        while len(self._workers) < world:
            here, there = self._context.Pipe()
            process = self._context.Process(target=_serve, args=(there, list(sys.path)), daemon=True)
            process.start()
            there.close()
            self._workers.append((process, here))
        self._jobs += 1
        store = self._folder / f"job-{self._jobs}"
        for rank in range(world):
            job = (function.__module__, function.__qualname__, rank, world, str(store), backend, args, kwargs)
            self._workers[rank][1].send(job)
        results: dict[int, Any] = {}
        pending = {self._workers[rank][1]: rank for rank in range(world)}
        while pending:
            ready = multiprocessing.connection.wait(list(pending), timeout=timeout_s)
            if not ready:
                ranks = sorted(pending.values())
                self.close()
                raise TimeoutError(f"{function.__qualname__} on {world} ranks: no answer from {ranks} in {timeout_s} s")
            for connection in ready:
                rank = pending.pop(connection)  # type: ignore[arg-type]
                try:
                    good, results[rank] = connection.recv()  # type: ignore[union-attr]
                except EOFError:
                    good, results[rank] = False, "the process died"
                if not good:
                    self.close()
                    raise AssertionError(f"rank {rank} of {world}: {results[rank]}")
        store.unlink(missing_ok=True)
        return [results[rank] for rank in range(world)]

    def close(self) -> None:
        """End every worker; the next `run` starts new ones."""
        for process, connection in self._workers:
            connection.close()
            process.kill()
        for process, _ in self._workers:
            process.join()
        self._workers.clear()

    def remove(self) -> None:
        self.close()
        shutil.rmtree(self._folder, ignore_errors=True)
