"""Copies that the host does not wait for: by way of pinned memory, in the stream that uses them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from runs import small_settings, write_text
from test_attention import make_plan

from cptrain.context_parallel import all_gather, api, packed_batch
from cptrain.context_parallel.layout import make_layout
from cptrain.distributed import sending
from cptrain.distributed.sending import current_stream, send
from cptrain.train import stage
from cptrain.train.trainer import Trainer

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 1)


def test_sending_to_cuda_goes_by_pinned_memory_without_waiting():
    x = mock.Mock(device=CPU)
    assert send(x, CUDA) is x.pin_memory.return_value.to.return_value
    x.pin_memory.return_value.to.assert_called_once_with(CUDA, non_blocking=True)


@pytest.mark.parametrize(("here", "there"), [(CPU, CPU), (CUDA, CUDA), (CUDA, CPU)])
def test_sending_elsewhere_is_a_plain_copy(here, there):
    x = mock.Mock(device=here)
    assert send(x, there) is x.to.return_value
    x.to.assert_called_once_with(there)
    x.pin_memory.assert_not_called()


def test_sending_knows_the_current_stream(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=7, device=device))
    assert (current_stream(CUDA), current_stream(CPU)) == (7, 0)


def test_sending_orders_of_chunks_once_for_each_stream(monkeypatch):
    streams = iter((1, 2, 1, 2))
    monkeypatch.setattr(sending, "current_stream", lambda device: next(streams))
    layout = make_layout("zigzag", 2, 24)
    all_gather._chunk_orders.cache_clear()
    first, second, third, fourth = (all_gather._chunk_orders(layout, 1, CPU) for _ in range(4))
    assert first is third and second is fourth and first is not second
    all_gather._chunk_orders.cache_clear()


def sent(rank: int, world: int) -> list[int]:
    """How many indices are sent in cutting two tensors, and in gathering one, of a plan and of a batch."""
    counts = []
    x = torch.zeros(1, 24)
    for module, cuts in (
        (api, make_plan(ring=1)),
        (packed_batch, make_plan("balanced", chunk_size=6).pack(torch.zeros(1, 24, dtype=torch.int64))),
    ):
        for work in (lambda cuts=cuts: cuts.shard(x, x, dim=1), lambda cuts=cuts: cuts.unshard(x, dim=1)):
            with mock.patch.object(module, "send", wraps=send) as sends:
                work()
            counts.append(sends.call_count)
    return counts


def test_sending_cuts_sequences_and_gathers_them(pool):
    assert pool.run(1, sent) == [[2, 1, 2, 1]]


def devices(rank: int, world: int, settings) -> list[torch.device]:
    with (
        mock.patch.object(stage, "TrainBatches", wraps=stage.TrainBatches) as training,
        mock.patch.object(stage, "validation_batches", wraps=stage.validation_batches) as held_out,
        Trainer(settings, torch.device("cpu", 0)) as trainer,
    ):
        trainer.stage.held_out_batches().close()
        return [made.call_args.kwargs["device"] for made in (training, held_out)]


def test_sending_batches_is_prepared_for_the_device_of_the_run(pool, tmp_path: Path):
    (found,) = pool.run(1, devices, small_settings(tmp_path, write_text(tmp_path)))
    assert found == [torch.device("cpu", 0)] * 2
