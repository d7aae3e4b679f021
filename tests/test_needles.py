"""Digits hidden in a long text: what the windows hold, and how many of them a model is said to find."""

from __future__ import annotations

import dataclasses
import json
import re
import threading
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from runs import GLOBAL_BATCH, small_settings, write_text
from test_data_corpus import BOS, EOS, corpus_of

from cptrain.data.needles import Needles
from cptrain.data.pass_key import AFTER, BEFORE, LEAST_TEXT, QUESTION, tokens_needed
from cptrain.data.split import split_documents
from cptrain.data.tokenizer import ByteTokenizer
from cptrain.data.windows import IGNORE, Windows
from cptrain.metrics.tags import NEEDLE_ACC
from cptrain.train import evaluation
from cptrain.train.evaluation import Evaluation, StoppedError, check_needles_fit
from cptrain.train.settings import TrainingConfig, TrainingStage, TrainSettings, ValidationConfig
from cptrain.train.trainer import Trainer

SEQ_LEN = 320
COUNT = 5


class PairTokenizer(ByteTokenizer):
    """Two letters are a token of their own."""

    vocab_size = 259 + 256 * 256

    def encode(self, text: str) -> np.ndarray:
        letters = text.encode()
        whole = len(letters) // 2 * 2
        pairs = np.frombuffer(letters[:whole], dtype=np.uint8).astype(np.int64).reshape(-1, 2)
        return np.append(259 + pairs[:, 0] * 256 + pairs[:, 1], np.frombuffer(letters[whole:], dtype=np.uint8))

    def decode(self, ids: Any) -> str:
        return b"".join(bytes([i] if i < 256 else divmod(int(i) - 259, 256)) for i in ids if i != BOS).decode()


def needles_in(folder: Path, tokenizer: ByteTokenizer, *, seq_len: int = SEQ_LEN, count: int = COUNT, seed: int = 1):
    corpus = corpus_of(folder, [chr(ord("a") + number) * (20 + 7 * number) for number in range(20)])
    windows = Windows(split_documents(corpus, fraction=0.0, seed=0)[0], seq_len=seq_len)
    return Needles(windows, tokenizer, count=count, seed=seed)


def test_needle_has_a_byte_for_each_character() -> None:
    assert tokens_needed(len) == tokens_needed(lambda text: len(ByteTokenizer().encode(text)))


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), PairTokenizer()], ids=["bytes", "pairs"])
def test_needle_is_said_once_and_asked_for_at_the_end(tmp_path: Path, tokenizer: ByteTokenizer) -> None:
    needles, keys = needles_in(tmp_path, tokenizer), set()
    assert len(needles) == COUNT
    for number in range(COUNT):
        window = needles.window(number)
        assert window.pop("needle").item() == number
        assert {name: (x.dtype, x.shape) for name, x in window.items()} == dict.fromkeys(
            ("tokens", "labels", "positions", "document_ids"), (torch.int64, (SEQ_LEN,))
        )
        tokens, labels = window["tokens"], window["labels"]
        assert window["document_ids"].eq(0).all() and torch.equal(window["positions"], torch.arange(SEQ_LEN))
        assert EOS not in tokens and (tokens == BOS).nonzero().flatten().tolist() == [0]
        asked = (labels != IGNORE).nonzero().flatten()
        assert asked.tolist() == list(range(SEQ_LEN - 1 - len(asked), SEQ_LEN - 1))
        assert torch.equal(labels[asked], tokens[asked + 1])
        text = tokenizer.decode(tokens.numpy())
        [(before, key, after)] = re.findall(
            rf"^(.*){BEFORE} (\d{{5}}){re.escape(AFTER)}(.*){re.escape(QUESTION)}", text
        )
        assert text.endswith(f"{QUESTION} {key}") and len(re.findall(r"\d+", text)) == 2
        assert tokenizer.decode(labels[asked].numpy()) == f" {key}"
        assert len(before) / len(before + after) == pytest.approx((number + 0.5) / COUNT, abs=0.01)
        keys.add(key)
    assert len(keys) == COUNT


def test_needles_are_those_of_the_seed(tmp_path: Path) -> None:
    one, same, other = (needles_in(tmp_path, ByteTokenizer(), seed=seed) for seed in (1, 1, 2))
    for number in range(COUNT):
        tokens = [needles.window(number)["tokens"] for needles in (one, same, other)]
        assert torch.equal(tokens[0], tokens[1]) and not torch.equal(tokens[0], tokens[2])


def test_needles_lie_in_different_text(tmp_path: Path) -> None:
    needles = needles_in(tmp_path, ByteTokenizer())
    begins = {tuple(needles.window(number)["tokens"][1:20].tolist()) for number in range(COUNT)}
    assert len(begins) > 1


def test_needles_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"training\.seq_len = 64: a window with a needle needs \d+ tokens; set"
    ) as caught:
        needles_in(tmp_path, ByteTokenizer(), seq_len=64)
    needed = int(re.findall(r"needs (\d+) tokens", str(caught.value))[0])
    needles = needles_in(tmp_path, ByteTokenizer(), seq_len=needed)
    text = ByteTokenizer().decode(needles.window(2)["tokens"].numpy())
    assert len(text) - len(text.partition(BEFORE)[2]) - len(BEFORE) == LEAST_TEXT // 2
    with pytest.raises(ValueError, match=r"training\.seq_len"):
        needles_in(tmp_path, ByteTokenizer(), seq_len=needed - 1)


def test_needles_of_all_stages_are_checked_before_the_first() -> None:
    stages = tuple(TrainingStage(steps=1, seq_len=length) for length in (512, 64))
    settings = TrainSettings(training=TrainingConfig(stages=stages), validation=ValidationConfig(needles=2))
    with pytest.raises(ValueError, match=r"^training\.stages\[1\]\.seq_len = 64: a window with a needle needs"):
        check_needles_fit(settings, ByteTokenizer())
    for harmless in (ValidationConfig(), ValidationConfig(enable=False, needles=2)):
        check_needles_fit(dataclasses.replace(settings, validation=harmless), ByteTokenizer())


class NoDigits(ByteTokenizer):
    def encode(self, text: str) -> np.ndarray:
        return np.array([letter for letter in text.encode() if chr(letter).isalpha()])


class OneDigit(ByteTokenizer):
    def encode(self, text: str) -> np.ndarray:
        return np.array([ord("0") if chr(letter).isdigit() else letter for letter in text.encode()])


@pytest.mark.parametrize("tokenizer", [NoDigits(), OneDigit()])
def test_needles_need_a_tokenizer_that_tells_digits_apart(tmp_path: Path, tokenizer: ByteTokenizer) -> None:
    with pytest.raises(ValueError, match="does not tell digits apart"):
        needles_in(tmp_path, tokenizer)


def test_needles_lie_in_text_without_padding_and_marks(tmp_path: Path) -> None:
    corpus = corpus_of(tmp_path, ["a" * 200] * 3)
    windows = Windows(split_documents(corpus, fraction=0.0, seed=0)[0], seq_len=SEQ_LEN, packing="best_fit")
    tokens = Needles(windows, ByteTokenizer(), count=1, seed=0).window(0)["tokens"]
    assert not {EOS, corpus.pad_id} & set(tokens.tolist())


class NoBos(ByteTokenizer):
    bos_id = None  # type: ignore[assignment]


def test_needles_begin_without_a_bos_where_there_is_none(tmp_path: Path) -> None:
    needles = needles_in(tmp_path, NoBos())
    needles._text.window = lambda _: {"tokens": torch.full((500,), 97), "document_ids": torch.zeros(500)}
    assert needles.window(0)["tokens"][0] == 97


def test_needles_in_no_text_are_refused(tmp_path: Path) -> None:
    needles = needles_in(tmp_path, ByteTokenizer())
    needles._text.window = lambda _: {"tokens": torch.full((500,), EOS), "document_ids": torch.zeros(500)}
    with pytest.raises(ValueError, match="holds no text"):
        needles.window(0)


LAYOUTS = {
    "one rank": (1, {}, 4),
    "ring 2": (2, {"ring_degree": 2}, 8),
    "fsdp 2": (2, {"data_parallel_shard_degree": 2}, 2),
    "tp 2": (2, {"tensor_parallel_degree": 2}, 8),
    "fsdp 2 x ulysses 2": (4, {"data_parallel_shard_degree": 2, "ulysses_degree": 2}, 4),
}


def even(hidden: Any, output: Any, labels: torch.Tensor) -> torch.Tensor:
    """A model that is right about digits below five."""
    return labels < ord("5")


def shares(rank: int, world: int, settings: Any) -> tuple[list[float], list[bool]]:
    """Of a fresh model, of one that always says 0 where 0 is asked for, and of one that is right about some digits."""
    with Trainer(settings, torch.device("cpu")) as trainer:
        found = Evaluation(trainer.model, trainer.stage, trainer.shard, lambda: False)
        first = found.needles()
        with torch.no_grad():
            trainer.model.output.weight.zero_()
        with mock.patch.object(Needles, "_encode", lambda self, text: np.zeros(len(text), dtype=np.int64)):
            second = found.needles()
        with mock.patch.object(evaluation, "correct_each", even):
            third = found.needles()
        windows = [trainer.stage._needles.window(number) for number in range(COUNT)]
        small = [bool((x["labels"] < ord("5")).all()) for x in windows]
    return [each[NEEDLE_ACC] for each in (first, second, third)], small


@pytest.mark.parametrize(("layout", "masked"), [*((layout, True) for layout in LAYOUTS), ("ring 2", False)])
def test_needles_found_are_the_same_for_every_layout(pool, tmp_path, layout, masked) -> None:
    world, degrees, local = LAYOUTS[layout]
    settings = small_settings(
        tmp_path,
        write_text(tmp_path, num_files=100),
        parallelism=degrees,
        training={"seq_len": SEQ_LEN, "local_batch_size": local, "global_batch_size": GLOBAL_BATCH},
        validation={"needles": COUNT},
        data={"document_mask": masked},
        debug={"seed": 6},
    )
    for (fresh, right, some), small in pool.run(world, shares, settings):
        assert 0 < sum(small) < COUNT, "some of the keys must have small digits alone"
        assert (fresh, right, some) == (0.0, 1.0, pytest.approx(sum(small) / COUNT))


def recorded(rank: int, world: int, settings: Any) -> None:
    with Trainer(settings, torch.device("cpu")) as trainer:
        trainer.train()


def stopped(rank: int, world: int, settings: Any) -> int:
    """How many batches a signal lets through that comes after the second of four."""
    asked, passed = iter((False, False, True)), []
    with Trainer(settings, torch.device("cpu")) as trainer:

        def shard(batch: Any) -> Any:
            passed.append(batch)
            return trainer.shard(batch)

        with pytest.raises(StoppedError):
            Evaluation(trainer.model, trainer.stage, shard, lambda: next(asked)).needles()
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("batches")]
    return len(passed)


def test_needles_are_left_out_when_a_signal_comes(pool, tmp_path) -> None:
    settings = small_settings(
        tmp_path,
        write_text(tmp_path, num_files=100),
        training={"seq_len": SEQ_LEN, "local_batch_size": 1},
        validation={"needles": 4},
    )
    assert pool.run(1, stopped, settings) == [2]


@pytest.mark.parametrize("count", [0, 3])
def test_needles_found_are_recorded_beside_the_held_out_loss(pool, tmp_path, count) -> None:
    settings = small_settings(
        tmp_path,
        write_text(tmp_path, num_files=100),
        training={"seq_len": SEQ_LEN, "steps": 2},
        validation={"needles": count, "freq": 1},
        parallelism={"ring_degree": 2},
    )
    pool.run(2, recorded, settings)
    lines = [json.loads(line) for line in (settings.job.folder / "metrics.jsonl").read_text().splitlines()]
    validations = [line for line in lines if line["kind"] == "validation"]
    assert [line["step"] for line in validations] == [0, 1, 2]
    assert all(line.get(NEEDLE_ACC) == (0.0 if count else None) and line["loss"] > 0 for line in validations)
