"""`cptrain.check`: right configurations pass in every combination, and each fault fails the rows that name it."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import planted
import pytest
import torch

from cptrain.check import toy
from cptrain.check.__main__ import main
from cptrain.check.flow import influence
from cptrain.check.layers import methods_by_layer
from cptrain.check.run import check
from cptrain.context_parallel.finding import Finding, agreed, table
from cptrain.context_parallel.mask import CAUSAL, FULL, Documents, Mask
from cptrain.context_parallel.selfcheck import small_documents
from cptrain.data.settings import DataConfig
from cptrain.distributed.settings import ParallelismConfig
from cptrain.models.settings import ModelConfig
from cptrain.parallel.settings import ActivationCheckpointConfig
from cptrain.train.settings import TrainingConfig, TrainingStage, TrainSettings

MODEL = {"dim": 32, "num_layers": 4, "num_heads": 4, "num_kv_heads": 2, "ffn_dim": 64}
CPU = torch.device("cpu")
ATTENTION = ("out", "dq", "dk", "dv")
STEP = ("step: loss", "step: gradient norm", "step: worst gradient")
FLOW, LEAK = "flow: tokens not reached", "flow: leaks from unseen tokens"
BETWEEN = "leak between documents"
TOKENS, ROTARY = "positions of each rank's tokens", "rotary positions"
MESSAGES = ("messages of forward", "messages of backward")


def settings(
    *,
    mode: str = "selective",
    model: dict[str, Any] | None = None,
    training: dict[str, Any] | None = None,
    data: dict[str, Any] | None = None,
    **degrees: Any,
) -> TrainSettings:
    """Without document masks, unless `data` says otherwise."""
    return TrainSettings(
        data=DataConfig(**{"document_mask": False} | (data or {})),
        model=ModelConfig(**MODEL | (model or {})),
        training=TrainingConfig(**{"seq_len": 64} | (training or {})),
        parallelism=ParallelismConfig(**degrees),
        activation_checkpoint=ActivationCheckpointConfig(mode=mode),  # type: ignore[arg-type]
    )


def attention(*masks: str) -> list[str]:
    return [f"attention, {mask}: {name}" for mask in masks for name in ATTENTION]


def in_documents(mask: str, *, ring: int, ways: tuple[str, ...] = ("ring", "exchange"), length: int = 64) -> list[str]:
    """What attention inside the documents of a check is called, for each way that keys may go."""
    count = len(list(small_documents(length, ring_degree=ring).spans()))
    return [f"{mask} in {count} documents" + (f" by {way}" if way else "") for way in ways]


def check_all(rank: int, world: int, each: list[TrainSettings]) -> list[list[tuple[str, list[Finding]]]]:
    """The outcome of each configuration, from every rank."""
    return [list(check(one, CPU)) for one in each]


DOCUMENTS = {"document_mask": True}
# ranks, settings, and the masks whose attention gets rows
CONFIGURATIONS: dict[str, tuple[int, TrainSettings, list[str]]] = {
    "one rank": (1, settings(), ["causal"]),
    "one rank, windows": (1, settings(model={"window_size": 16, "full_attention_every": 2}), ["window 16", "causal"]),
    "fsdp, accumulation": (2, settings(training={"global_batch_size": 4}), ["causal"]),
    "ulysses, full mask": (2, settings(ulysses_degree=2, model={"attention_mask": "full"}), ["full"]),
    "all-gather": (2, settings(ring_degree=2, context_parallel_method="all_gather", mode="none"), ["causal"]),
    "ring of 3": (3, settings(ring_degree=3, training={"seq_len": 60}), ["causal"]),
    "ring x tp, with everything that a model may have": (
        4,
        settings(
            ring_degree=2, tensor_parallel_degree=2, model={"qk_norm": True, "qkv_bias": True, "tied_embeddings": True}
        ),
        ["causal"],
    ),
    "hybrid, ulysses outside, all recomputed": (
        4,
        settings(ring_degree=2, ulysses_degree=2, context_parallel_order="context_first", mode="full"),
        ["causal"],
    ),
    "double ring": (4, settings(ring_degree=4, ring_inner_degree=2), ["causal"]),
    "windows beside full attention": (
        4,
        settings(ring_degree=4, model={"window_size": 16, "full_attention_every": 2}, mode="full"),
        ["window 16", "causal"],
    ),
    "replicas of a ring, contiguous": (
        4,
        settings(
            ring_degree=2,
            data_parallel_replicate_degree=2,
            context_parallel_layout="contiguous",
            training={"local_batch_size": 2},
        ),
        ["causal"],
    ),
    "documents on one rank": (1, settings(data=DOCUMENTS), in_documents("causal", ring=1, ways=("",))),
    "documents with padding, all-gather": (
        2,
        settings(
            ring_degree=2, context_parallel_method="all_gather", data=DOCUMENTS | {"packing": "best_fit"}, mode="none"
        ),
        in_documents("causal", ring=2, ways=("",)),
    ),
    "documents, ring x tp, accumulation, all recomputed": (
        4,
        settings(
            ring_degree=2,
            tensor_parallel_degree=2,
            mode="full",
            data=DOCUMENTS,
            training={"local_batch_size": 2, "global_batch_size": 4},
        ),
        in_documents("causal", ring=2),
    ),
    "documents, hybrid, ulysses outside": (
        4,
        settings(
            ring_degree=2,
            ulysses_degree=2,
            context_parallel_order="context_first",
            data=DOCUMENTS,
            training={"local_batch_size": 2},
        ),
        in_documents("causal", ring=2),
    ),
    "documents, windows beside full attention, double ring": (
        4,
        settings(
            ring_degree=4,
            ring_inner_degree=2,
            chunk_size=8,
            model={"window_size": 16, "full_attention_every": 2},
            data=DOCUMENTS | {"packing": "best_fit"},
        ),
        [*in_documents("window 16", ring=4), *in_documents("causal", ring=4)],
    ),
}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_check_passes(pool, name):
    world, configuration, masks = CONFIGURATIONS[name]
    outcomes = pool.run(world, check_all, [configuration])
    ((_, findings),) = outcomes[0][0]
    assert all(finding.passed for finding in findings), table(findings)
    between = [BETWEEN] if configuration.data.document_mask else []
    assert [f.name for f in findings] == [*attention(*masks), TOKENS, ROTARY, *STEP, FLOW, LEAK, *between, *MESSAGES]
    for other in outcomes[1:]:
        assert [f.passed for f in other[0][0][1]] == [f.passed for f in findings], "ranks must agree"


def test_check_visits_every_plan_of_the_stages(pool):
    stages = (
        TrainingStage(steps=9, ring_degree=1, ulysses_degree=1),
        TrainingStage(steps=2, seq_len=128, ring_degree=2),
        TrainingStage(steps=5, ring_degree=1, ulysses_degree=1),
        TrainingStage(steps=1, ulysses_degree=2),
    )
    (outcome,) = pool.run(2, check_all, [settings(training={"stages": stages})])[0]
    titles = [heading.partition(" on ")[0] for heading, _ in outcome]
    assert titles == ["whole sequences", "ring 2, zigzag", "ulysses 2"]
    for _, findings in outcome:
        assert all(finding.passed for finding in findings), table(findings)


def check_in_bf16(rank: int, world: int, one: TrainSettings, fault: str) -> list[Finding]:
    """As on a device whose kernel has no fp64."""
    one = dataclasses.replace(one, training=dataclasses.replace(one.training, mixed_precision_param="bfloat16"))
    with mock.patch.object(toy, "exact_dtype", lambda device, dtype, kernel: dtype), getattr(planted, fault)():
        ((_, findings),) = check(one, CPU)
    return findings


def test_check_in_bf16_measures_by_the_rounding_of_one_device(pool):
    findings = pool.run(2, check_in_bf16, settings(ring_degree=2), "nothing")[0]
    assert all(finding.passed for finding in findings), table(findings)
    rounded = [f for f in findings if f.name in (*attention("causal"), STEP[2])]
    assert all(1e-4 < f.error < f.allowed < 0.1 for f in rounded), table(findings)


def test_check_in_bf16_finds_a_fault(pool):
    findings = pool.run(2, check_in_bf16, settings(ring_degree=2), "dropped_hop")[0]
    failed = {f.name for f in findings if not f.passed}
    # The loss of random weights is about that of a uniform guess, whatever they attend to.
    assert failed - {STEP[0]} == {*attention("causal"), *STEP[1:], FLOW}


def check_faulty(rank: int, world: int, one: TrainSettings, fault: str) -> list[Finding]:
    with getattr(planted, fault)():
        ((_, findings),) = check(one, CPU)
    return findings


RING = settings(ring_degree=2)
WINDOWS = settings(ring_degree=2, model={"window_size": 16})
PACKED = settings(ring_degree=2, data=DOCUMENTS)
BY_RING, BY_EXCHANGE = in_documents("causal", ring=2)
# fault -> settings, and exactly the rows that fail
FAULTS: dict[str, tuple[TrainSettings, set[str]]] = {
    "dropped_hop": (RING, {*attention("causal"), *STEP, FLOW}),
    "scaled_loss": (RING, set(STEP)),
    "averaged_gradients": (RING, set(STEP[1:])),
    "norm_of_a_shard": (RING, {STEP[1]}),
    "local_positions": (RING, {ROTARY, *STEP}),
    "detached_keys": (RING, {*attention("causal")[2:], *STEP[1:], FLOW}),
    "no_causal_mask": (RING, {*attention("causal"), *STEP, LEAK}),
    "dropped_window": (WINDOWS, {*attention("window 16"), *STEP, LEAK, *MESSAGES}),
    "wrong_scale": (RING, {*attention("causal"), *STEP}),
    "extra_message": (RING, {MESSAGES[0]}),
    "repeated_messages": (RING, {MESSAGES[1]}),
    "swapped_chunks": (RING, {*attention("causal"), TOKENS, *STEP, FLOW, LEAK}),
}
# The same with document masks: batches of the check go by exchange.
FAULTS_OF_DOCUMENTS: dict[str, set[str]] = {
    "no_document_mask": {*attention(BY_RING, BY_EXCHANGE), *STEP, LEAK, BETWEEN, *MESSAGES},
    "shifted_documents": {*attention(BY_RING, BY_EXCHANGE), *STEP, FLOW, LEAK, BETWEEN, *MESSAGES},
    "dropped_hop": set(attention(BY_RING)),
    "running_positions": {ROTARY},
    "swapped_chunks": {*attention(BY_RING, BY_EXCHANGE), TOKENS, *STEP, FLOW, LEAK, BETWEEN},
}


def assert_fails(outcomes: list[list[Finding]], expected: set[str]) -> None:
    for findings in outcomes:
        assert {f.name for f in findings if not f.passed} == expected, table(findings)
        assert table(findings).count("look at: ") == len(expected)


@pytest.mark.parametrize("fault", FAULTS)
def test_check_fails_the_rows_that_name_the_fault(pool, fault):
    one, expected = FAULTS[fault]
    assert_fails(pool.run(2, check_faulty, one, fault), expected)


@pytest.mark.parametrize("fault", FAULTS_OF_DOCUMENTS)
def test_check_with_documents_fails_the_rows_that_name_the_fault(pool, fault):
    assert_fails(pool.run(2, check_faulty, PACKED, fault), FAULTS_OF_DOCUMENTS[fault])


def test_check_finds_on_one_rank_that_documents_are_not_masked(pool):
    (name,) = in_documents("causal", ring=1, ways=("",))
    outcomes = pool.run(1, check_faulty, settings(data=DOCUMENTS), "no_document_mask")
    assert_fails(outcomes, {*attention(name), *STEP, LEAK, BETWEEN})


def command(rank: int, world: int, argv: list[str], fault: str = "nothing") -> tuple[int, str, str]:
    """Exit code, output and errors of the command line, in the group that is there already."""
    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", ["check", *argv]),
        mock.patch("cptrain.check.run.process_group", return_value=contextlib.nullcontext()),
        getattr(planted, fault)(),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        pytest.raises(SystemExit) as ended,
    ):
        main()
    return ended.value.code, out.getvalue(), err.getvalue()


SMALL = ["--config", "debug", "--training.seq_len", "64", "--data.document_mask", "false"]


def test_check_command_ends_with_1_on_all_ranks_when_a_row_fails(pool):
    (code, out, _), (other_code, other_out, _) = pool.run(2, command, SMALL, "scaled_loss")
    assert (code, other_code, other_out) == (1, 1, "")
    assert "step: loss" in out and "then the loss: a sum over tokens" in out
    assert out.rstrip().endswith("would not be exact")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([*SMALL, "--parallelism.ring_degre", "2"], "did you mean"),
        ([*SMALL, "--parallelism.ring_degree", "1", "--parallelism.ulysses_degree", "2"], 'the method "ring" needs 1'),
        (
            [*SMALL, "--parallelism.ring_degree=1", "--model.window_size=9", "--parallelism.attention_kernel=cudnn"],
            'the attention kernel "cudnn" is not there',
        ),
    ],
)
def test_check_command_ends_with_2_for_settings_that_cannot_work(pool, argv, message):
    ((code, out, err),) = pool.run(1, command, argv)
    assert (code, out) == (2, "")
    assert message in err and "Traceback" not in err


def test_check_command_dry_run_shows_every_stage(tmp_path: Path, monkeypatch, capsys):
    # What the stages replace need not fit the ranks by itself: no step ever runs with it.
    stages = "".join(f"[[training.stages]]\nring_degree = {ring}\n" for ring in (1, 2))
    (tmp_path / "staged.toml").write_text(f"[parallelism]\nring_degree = 3\n{stages}")
    files = ["debug", str(tmp_path / "staged.toml")]
    monkeypatch.setattr(sys, "argv", ["check", "--config", *files, "--dry-run", "--world-size", "4"])
    main()
    first, second = capsys.readouterr().out.split("\n\n")
    assert "dp_shard 4 x ring 1" in first and "dp_shard 2 x ring 2" in second


def test_check_command_runs_under_torchrun(tmp_path: Path):
    (tmp_path / "mine.toml").write_text(
        "[model]\ndim = 32\nnum_layers = 3\nnum_heads = 4\nffn_dim = 64\nwindow_size = 20\nfull_attention_every = 3\n"
        "[data]\ndocument_mask = false\n[training]\nseq_len = 256\n[parallelism]\nring_degree = 2\n"
    )
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launch, "-m", "cptrain.check", "--config", "mine.toml", "--activation_checkpoint.mode", "full"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "layers 0-1: window 20, needed keys straight from their owners" in done.stdout
    assert "layers 2: causal, ring of 2, zigzag" in done.stdout
    assert done.stdout.rstrip().endswith("all checks passed")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.toml"], "a check leaves nothing behind"


def lines_of(rank: int, world: int) -> dict[str, list[str]]:
    from test_attention import make_plan

    shape = settings(model={"window_size": 8, "full_attention_every": 2, "num_layers": 14}).shape(64)
    plain = settings().shape(64)
    return {
        "hybrid": methods_by_layer(make_plan(ring=2, ulysses=2), plain, 64),
        "all-gather": methods_by_layer(make_plan(ring=4, method="all_gather"), plain, 64),
        "double": methods_by_layer(make_plan(ring=4, ring_inner_degree=2), shape, 64),
        "packed": methods_by_layer(make_plan("balanced", ring=4, ring_inner_degree=2), shape, 64),
        "packed, ulysses": methods_by_layer(make_plan("balanced", ulysses=4), plain, 64),
        "packed, all-gather": methods_by_layer(make_plan("balanced", ring=4, method="all_gather"), shape, 64),
    }


def test_check_says_how_each_layer_computes_attention(pool):
    assert pool.run(4, lines_of)[0] == {
        "hybrid": ["layers 0-3: causal, all-to-all over 2 ranks and ring of 2, zigzag"],
        "all-gather": ["layers 0-3: causal, keys gathered over 4 ranks one head at a time, zigzag"],
        "double": [
            "layers 0, 2, 4, 6, ..., 12: window 8, needed keys straight from their owners, of 4 ranks, zigzag",
            "layers 1, 3, 5, 7, ..., 13: causal, ring of 4 with inner rings of 2, zigzag",
        ],
        "packed": [
            f"layers {layers} in documents, ring of 4 with inner rings of 2 or needed keys straight from their owners, "
            "by the batch, balanced"
            for layers in ("0, 2, 4, 6, ..., 12: window 8", "1, 3, 5, 7, ..., 13: causal")
        ],
        "packed, ulysses": ["layers 0-3: causal in documents, all-to-all over 4 ranks"],
        "packed, all-gather": [
            f"layers {layers} in documents, keys gathered over 4 ranks one head at a time{straight}, balanced"
            for layers, straight in (
                ("0, 2, 4, 6, ..., 12: window 8", " or needed keys straight from their owners, by the batch"),
                ("1, 3, 5, 7, ..., 13: causal", ""),
            )
        ],
    }


def test_check_toy_keeps_what_decides_the_parallelism():
    one = settings(
        ring_degree=2,
        tensor_parallel_degree=3,
        model={
            "num_heads": 24,
            "num_kv_heads": 6,
            "head_dim": 100,
            "ffn_dim": 96,
            "vocab_size": 384,
            "window_size": 512,
            "full_attention_every": 3,
        },
        training={"seq_len": 8 * 1536, "local_batch_size": 4, "global_batch_size": 32},
    )
    small = toy.toy_settings(one, world_size=6, device=CPU, folder=Path("/nowhere"))
    shape = small.shape(259)
    assert (shape.num_heads, shape.num_kv_heads, shape.head_dim) == (24, 6, 20)
    assert list(small.problems(6)) == []
    length = small.training.seq_len
    assert length == 132 and shape.windows() == (round(512 * length / one.training.seq_len), 0)
    assert (small.training.local_batch_size, small.training.global_batch_size) == (2, 4)
    assert small.training.dtype == "float64"


def test_check_influence_of_tokens_goes_through_all_layers():
    (reach,) = influence([Mask(True, 3), Mask(True, 2)], 8, CPU)
    assert reach[7].tolist() == [False] * 4 + [True] * 4
    assert torch.equal(influence([CAUSAL, Mask(True, 2)], 4, CPU)[0], torch.ones(4, 4).tril().bool())
    assert influence([FULL], 4, CPU).all()


def test_check_influence_of_tokens_ends_where_their_document_does():
    documents = Documents((0, 4, 6, 8, 16), padding=(2,))  # two rows of 8
    first, second = influence([Mask(True, 3, documents), Mask(True, 2, documents)], 8, CPU)
    assert first[3].tolist() == [True] * 4 + [False] * 4
    assert first[5].tolist() == [False] * 4 + [True] * 2 + [False] * 2
    assert torch.equal(first[6:], torch.eye(8).bool()[6:]), "padding depends on itself"
    assert second[7].tolist() == [False] * 4 + [True] * 4


def rows_of_one_rank(rank: int, world: int) -> list[tuple[float, bool, str]]:
    """Of rows that are wrong on rank 1 only."""
    errors = [1.0, float("nan")] if rank == 1 else [0.0, 0.0]
    rows = [Finding(name="x", error=error, allowed=0.5, look_at="", where="here") for error in errors]
    return [(finding.error, finding.passed, finding.where) for finding in agreed(rows, CPU)]


def test_check_ranks_agree_on_the_worst_of_them(pool):
    first, second = pool.run(2, rows_of_one_rank)
    assert first == [(1.0, False, "worse on another rank"), (float("inf"), False, "worse on another rank")]
    assert second == [(1.0, False, "here"), (float("inf"), False, "here")]


@pytest.mark.parametrize("error", [float("nan"), float("inf")])
def test_check_table_takes_what_is_no_number_for_a_failure(error):
    text = table([Finding(name="x", error=error, allowed=1.0, look_at="here")])
    assert str(error) in text and "FAILED" in text and "look at: here" in text
