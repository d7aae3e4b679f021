"""What a step counts of its batches: documents, padding, pairs and keys, and the FLOPs and curves made of it."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from runs import small_settings
from small import small_shape
from test_packed import make_plan

from cptrain.distributed.standstill import Standstill
from cptrain.models.shape import ModelShape
from cptrain.train.batch import PACKING, Counts, PackDocuments
from cptrain.train.trainer import Trainer

# Documents of 5, 3 and 4 tokens and 4 of padding, in chunks of 4: their tokens see 15 + 6 + 10 keys, 0-3 and 4-7 and
# 8-11 of them 10 and 11 and 10. Two ranks are most even if one holds the second and the last: 20 and 11.
THREE = [0] * 5 + [1] * 3 + [2] * 4 + [-1] * 4
ONE = [0] * 16
# Its last token alone sees keys of another rank, the first four; with a window of 2 the one before it.
SEEN_AFAR, SEEN_AFAR_BY_WINDOW = 4, 1
PAIRS, PAIRS_BY_WINDOW = 15 + 6 + 10, (1 + 4 * 2) + (1 + 2 * 2) + (1 + 3 * 2)


def batch_of(ids: list[int]) -> dict[str, torch.Tensor]:
    """A batch of one window."""
    return {"document_ids": torch.tensor([ids])}


def counted(rank: int, world: int, batches: list[list[int]], shape: ModelShape, method: str, dtype: Any) -> Counts:
    """Counts of one micro-batch after another under a ring of all ranks."""
    plan = make_plan(ring=world, chunk_size=4, method=method)
    packs = PackDocuments(plan.packer(shape.windows()))
    return Counts.total(
        [Counts.of(batch, shape, plan.packed(packs(batch)[PACKING]), dtype) for batch in map(batch_of, batches)]
    )


def test_batch_counts_documents_without_padding_and_what_moves(pool) -> None:
    expected = {"sequences": 1, "documents": 3, "padding": 4, "pairs": 2 * PAIRS}
    expected |= {"work": PAIRS, "largest_work": 2 * 20, "moved_keys": 2 * SEEN_AFAR, "ring_keys": 2 * 16}
    for counts in pool.run(2, counted, [THREE], small_shape(), "ring", torch.bfloat16):
        assert asdict(counts) == expected
        assert counts.curves(16) == {
            "long_context/docs_per_seq": 3.0,
            "long_context/padding(%)": 25.0,
            "cp/work_imbalance": 40 / 31,
            "cp/keys_moved(%)": 25.0,
        }


@pytest.mark.parametrize(
    ("method", "moved"),
    [("ring", SEEN_AFAR + SEEN_AFAR_BY_WINDOW), ("all_gather", 16 + SEEN_AFAR_BY_WINDOW)],
)
def test_batch_counts_every_layer_with_its_own_window(pool, method: str, moved: int) -> None:
    shape = small_shape(window_size=2, full_attention_every=2)
    counts = pool.run(2, counted, [THREE], shape, method, torch.bfloat16)[0]
    assert (counts.pairs, counts.work) == (PAIRS + PAIRS_BY_WINDOW, PAIRS)
    assert (counts.moved_keys, counts.ring_keys) == (moved, 2 * 16)


@pytest.mark.parametrize(("ids", "method"), [(ONE, "ring"), (THREE, "all_gather")])
def test_batch_counts_all_keys_where_all_are_carried(pool, ids: list[int], method: str) -> None:
    # In zigzag, 12 of the 16 keys of one document are seen by the other rank: a ring sends fewer bytes than those.
    counts = pool.run(2, counted, [ids], small_shape(), method, torch.bfloat16)[0]
    assert counts.curves(16)["cp/keys_moved(%)"] == 100.0


def test_batch_counts_of_micro_batches_add_up(pool) -> None:
    counts = pool.run(2, counted, [THREE, ONE], small_shape(), "ring", torch.bfloat16)[0]
    assert counts.curves(32) == {
        "long_context/docs_per_seq": 2.0,
        "long_context/padding(%)": 12.5,
        "cp/work_imbalance": (2 * 20 + 2 * 68) / (31 + 136),
        "cp/keys_moved(%)": 100 * (SEEN_AFAR + 16) / 32,
    }


def test_batch_without_document_masks_counts_windows_without_their_padding() -> None:
    batch = {"document_ids": torch.tensor([THREE, ONE])}
    counts = Counts.of(batch, small_shape(), None, torch.bfloat16)
    assert counts == Counts(sequences=2, documents=4, padding=4, pairs=2 * (12 * 13 // 2 + 16 * 17 // 2))
    assert counts.curves(32) == {"long_context/docs_per_seq": 2.0, "long_context/padding(%)": 12.5}


def train(rank: int, world: int, folder: Path, **sections: dict[str, Any]) -> int:
    """One step of two windows of 256 tokens over a ring of all ranks; returns the size of the vocabulary."""
    settings = small_settings(
        folder,
        str(folder / "*.txt"),
        training={"seq_len": 256, "steps": 1, "global_batch_size": 2},
        parallelism={"ring_degree": world},
        validation={"enable": False},
        **sections,
    )
    with Trainer(settings, torch.device("cpu")) as trainer:
        trainer.train()
        return trainer.shape.vocab_size


@pytest.mark.parametrize(
    ("masked", "window"), [(True, 0), (True, 30), (False, 0)], ids=["documents", "windows", "not masked"]
)
def test_batch_flops_that_are_logged_are_those_of_documents(pool, tmp_path: Path, masked: bool, window: int) -> None:
    for number in range(30):  # 102 tokens each with BOS and EOS, of which a window of 256 holds two
        (tmp_path / f"{number}.txt").write_text("a" * 100)
    data = {"packing": "best_fit", "document_mask": masked}
    vocab_size = pool.run(2, train, tmp_path, model={"window_size": window}, data=data)[0]
    logged = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    seen = [min(place, window or place) for place in range(1, (102 if masked else 204) + 1)]
    pairs = 2 * 2 * sum(seen) * (2 if masked else 1)  # layers, windows, documents
    # dim 32, 8 heads and 4 kv heads of 4, ffn_dim 64: of q, o, k, v and the three of SwiGLU.
    weights = 2 * (32 * 32 * 2 + 32 * 16 * 2 + 32 * 64 * 3) + 32 * vocab_size
    flops = 3 * (2 * weights * 2 * 204 + 4 * 32 * pairs)
    assert logged["tflops"] * 1e12 * logged["step_time_s"] * 2 == pytest.approx(flops, rel=1e-9)
    assert logged["tokens_seen"] == 2 * 256
    assert logged["long_context/docs_per_seq"] == 2.0
    assert logged["long_context/padding(%)"] == 100 * 52 / 256
    assert ("cp/work_imbalance" in logged) == ("cp/keys_moved(%)" in logged) == masked
    assert 0 < logged["cp/comm_exposed(%)"] < 100


def train_standing_still(rank: int, world: int, folder: Path) -> None:
    with mock.patch.object(Standstill, "seconds", return_value=0.5 * (rank + 1)):
        train(rank, world, folder)


def test_batch_step_tells_the_mean_share_of_standing_still(pool, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("a" * 3000)
    pool.run(2, train_standing_still, tmp_path)
    logged = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert logged["cp/comm_exposed(%)"] == pytest.approx(100 * 0.75 / logged["step_time_s"])


def test_batch_of_one_rank_has_no_curves_of_context_parallel(pool, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("a" * 3000)
    pool.run(1, train, tmp_path)
    logged = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert not [key for key in logged if key.startswith("cp/")]
