"""The settings as a whole: every key is read, what is wrong between sections, and the file of them."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from keys_read import unread

import cptrain
from cptrain.checkpoint.settings import CheckpointConfig
from cptrain.config import ConfigError, dump, keys, load, parse_command_line, preset_names, presets_folder
from cptrain.train.settings import JobConfig, TrainingConfig, TrainingStage, TrainSettings

PACKAGE = Path(cptrain.__file__).parent
SECTIONS = [*dict.fromkeys(key.path.split(".")[0] for key in keys(TrainSettings))]
MODEL = ["--model.dim=64", "--model.num_layers=2", "--model.num_heads=8", "--model.num_kv_heads=4"]


def test_settings_are_all_read() -> None:
    """Every key is read by code that does something; keys_read.py says what counts."""
    assert unread(PACKAGE) == []


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What is found unread when every section has three more keys.

    `unused` is named nowhere else, `checked` is looked at by the section's own `problems` only, and `seq_len`, `seed`
    and `size`, of which each section gets one that it does not have, are read from other objects everywhere.
    """
    package = tmp_path_factory.mktemp("planted") / "cptrain"
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__"))
    for path in package.glob("*/settings.py"):
        text = re.sub(
            r"(?m)^(class (\w+)(?:Config|Stage):\n(?:    \"\"\".*\"\"\"\n\n)?)",
            lambda found: (
                found[1]
                + '    unused: int = setting(1, "")\n    checked: int = setting(1, "")\n'
                + f'    {"size" if found[2] == "Training" else "seq_len"}: int = setting(1, "")\n'
            ),
            path.read_text(),
        )
        text = text.replace(
            "    def problems(self) -> Iterator[Problem]:\n",
            "    def problems(self) -> Iterator[Problem]:\n        assert self.checked > 0 and self._checks()\n\n"
            "    def _checks(self) -> bool:\n        return self.checked > 1\n\n"
            "    def more_problems(self) -> Iterator[Problem]:\n",
        )
        path.write_text(text)
    return unread(package)


@pytest.mark.parametrize("section", SECTIONS)
def test_settings_that_nothing_reads_are_found(planted: list[str], section: str) -> None:
    names = {"unused", "checked", "size" if section == "training" else "seq_len"}
    assert {f"{section}.{name}" for name in names} <= set(planted)


def test_settings_that_nothing_reads_are_found_in_arrays_of_tables(planted: list[str]) -> None:
    assert {"training.stages[].unused", "training.stages[].checked"} <= set(planted)


def test_settings_that_are_read_are_not_suspected(planted: list[str]) -> None:
    names = {"unused", "checked", "size", "seq_len"}
    assert [path for path in planted if path.rpartition(".")[2] not in names] == unread(PACKAGE)


# --- what spans several sections --------------------------------------------------------------------------------------


def problems_of(world_size: int | None, *flags: str) -> list[str]:
    try:
        load(TrainSettings, overrides=[*MODEL, *flags], world_size=world_size)
    except ConfigError as error:
        return list(error.problems)
    return []


CONTIGUOUS = ["data.document_mask=false", "parallelism.context_parallel_layout=contiguous"]
# (world size, flags, the key that is at fault, what its message says, and for "set it to" flags that then go with it)
WRONG = [
    (2, ["training.seq_len=90", "parallelism.ring_degree=2"], "training.seq_len", "multiple of 4", "88 or 92"),
    (8, ["training.seq_len=100", "parallelism.ring_degree=8"], "training.seq_len", "multiple of 16", "96 or 112"),
    (8, ["training.seq_len=7", "parallelism.ulysses_degree=8"], "training.seq_len", "multiple of 16", "16"),
    (
        8,
        ["training.seq_len=36", "parallelism.ring_degree=2", "parallelism.tensor_parallel_degree=4"],
        "training.seq_len",
        "must be a multiple of 8 = context degree 2 x lcm(2, tensor degree 4)",
        "32 or 40",
    ),
    (
        4,
        ["training.seq_len=1022", "parallelism.tensor_parallel_degree=4"],
        "training.seq_len",
        "must be a multiple of the tensor degree 4",
        "1020 or 1024",
    ),
    (
        1,
        ["training.global_batch_size=6", "training.local_batch_size=4"],
        "training.global_batch_size",
        "must be a multiple of local_batch_size 4 x 1 data-parallel ranks",
        "8",
    ),
    (
        8,
        ["training.global_batch_size=7", "training.local_batch_size=1", "parallelism.ring_degree=2"],
        "training.global_batch_size",
        "must be a multiple of local_batch_size 1 x 4 data-parallel ranks",
        "8",
    ),
    (
        2,
        ["model.ffn_dim=255", "parallelism.tensor_parallel_degree=2"],
        "model.ffn_dim",
        "255 does not divide over the tensor degree 2",
        "256",
    ),
    (
        4,
        ["model.vocab_size=301", "parallelism.tensor_parallel_degree=4"],
        "model.vocab_size",
        "301 does not divide over the tensor degree 4",
        "304",
    ),
    (1, ["model.vocab_size=256"], "model.vocab_size", "the tokenizer has 259 ids", "259"),
    (1, ["data.validation_fraction=0"], "data.validation_fraction", "validation needs held-out text", "0.01"),
    (
        2,
        ["parallelism.context_parallel_layout=zigzag", "parallelism.ring_degree=2"],
        "parallelism.context_parallel_layout",
        "documents that see only themselves are uneven work",
        '"auto"',
    ),
    (
        2,
        ["parallelism.context_parallel_layout=balanced", "data.document_mask=false"],
        "parallelism.context_parallel_layout",
        "the balanced layout deals out documents",
        '"zigzag"',
    ),
    (1, ["model.attention_mask=full"], "data.document_mask", "attention inside of documents is causal", "false"),
    (
        4,
        ["training.seq_len=1024", "parallelism.chunk_size=100", "parallelism.ring_degree=4"],
        "parallelism.chunk_size",
        "must divide the 256 tokens of a sequence that a ring rank holds",
        "128",
    ),
    (
        4,
        ["data.document_mask=false", "parallelism.chunk_size=100", "parallelism.ring_degree=4"],
        "parallelism.chunk_size",
        "has no effect with data.document_mask = false, which deals no chunks out; leave it out",
        "",
    ),
]
MENDED = [wrong for wrong in WRONG if wrong[-1]]  # by another value


@pytest.mark.parametrize(
    ("flags", "layout"),
    [([], "balanced"), (["data.document_mask=false"], "zigzag"), (CONTIGUOUS, "contiguous")],
)
def test_settings_choose_the_layout_that_the_mask_needs(flags: list[str], layout: str) -> None:
    assert load(TrainSettings, overrides=[*MODEL, *(f"--{flag}" for flag in flags)], world_size=2).layout == layout


def test_settings_take_any_length_on_one_rank() -> None:
    assert problems_of(1, "--training.seq_len=1023") == []


@pytest.mark.parametrize(("world", "flags", "key", "rule", "fix"), WRONG)
def test_settings_between_sections_are_refused_with_their_fix(
    world: int, flags: list[str], key: str, rule: str, fix: str
) -> None:
    (problem,) = problems_of(world, *[f"--{flag}" for flag in flags])
    assert problem.startswith(f"{key} = ") and rule in problem
    assert not fix or re.search(rf"set it to {re.escape(fix)}( |,|$)", problem)


@pytest.mark.parametrize(("world", "flags", "key", "rule", "fix"), MENDED)
def test_settings_fix_of_a_message_mends_it(world: int, flags: list[str], key: str, rule: str, fix: str) -> None:
    for value in fix.split(" or "):
        bare = value.strip('"')
        assert problems_of(world, *[f"--{flag}" for flag in flags], f"--{key}={bare}") == []


@pytest.mark.parametrize(
    ("world", "flags", "key", "rule"),
    [
        (3, ["ring_degree=2"], "ring_degree", "= 2 does not divide the world size 3"),
        (
            1,
            ["context_parallel_degree=2"],
            "context_parallel_degree",
            "torchrun --nproc-per-node 2 -m cptrain.train ...`",
        ),
        (8, ["data_parallel_shard_degree=2"], "data_parallel_shard_degree", "but the world size is 8; run on 2 ranks"),
        (8, ["data_parallel_replicate_degree=3"], "data_parallel_replicate_degree", "does not divide the world size 8"),
        (3, ["tensor_parallel_degree=3"], "tensor_parallel_degree", "8 heads and 4 kv heads allow 1, 2, 4"),
        (8, ["tensor_parallel_degree=8"], "tensor_parallel_degree", "8 heads and 4 kv heads allow 1, 2, 4"),
        (3, ["ulysses_degree=3"], "ulysses_degree", "8 heads and 4 kv heads over tensor degree 1 allow 1, 2, 4, 8"),
        (
            16,
            ["ulysses_degree=8", "tensor_parallel_degree=2"],
            "ulysses_degree",
            "8 heads and 4 kv heads over tensor degree 2 allow 1, 2, 4",
        ),
        (8, ["context_parallel_degree=8", "ring_degree=3"], "context_parallel_degree", "ring x ulysses = 3 x 2 = 6"),
        (4, ["context_parallel_method=ring", "ulysses_degree=4"], "ulysses_degree", 'the method "ring" needs 1'),
        (4, ["context_parallel_method=ulysses", "ring_degree=4"], "ring_degree", 'the method "ulysses" needs 1'),
        (4, ["context_parallel_method=hybrid", "ring_degree=4"], "context_parallel_method", "here 4 x 1"),
    ],
)
def test_settings_degrees_that_do_not_fit_are_refused(world: int, flags: list[str], key: str, rule: str) -> None:
    (problem,) = problems_of(world, *[f"--parallelism.{flag}" for flag in flags])
    assert problem.startswith(f"parallelism.{key} = ") and rule in problem


def test_settings_need_the_world_size_for_what_depends_on_it_only() -> None:
    flags = ["--parallelism.ring_degree=8", "--training.seq_len=100", "--data.validation_fraction=0"]
    assert [problem.partition(" ")[0] for problem in problems_of(None, *flags)] == ["data.validation_fraction"]


@pytest.mark.parametrize(
    "bad",
    [
        [],
        ["--training.gc_freq=0"],
        ["--optimizer.lr=-1", "--checkpoint.interval=0"],
        ["--training.max_norm=0", "--parallelism.ring_inner_degree=0"],
    ],
)
def test_settings_report_all_problems_at_once(bad: list[str]) -> None:
    """What is wrong between sections does not wait for what is wrong in one of them, where it does not rest on it."""
    flags = ["--training.seq_len=1001", "--training.global_batch_size=3", "--data.validation_fraction=0"]
    right = ["--parallelism.ring_degree=2", "--training.local_batch_size=2"]
    flags += ["--data.num_workers=-1", *right]
    found = {problem.partition(" ")[0] for problem in problems_of(2, *flags, *bad)}
    expected = {flag[2:].partition("=")[0] for flag in [*flags, *bad] if flag not in right}
    if "--parallelism.ring_inner_degree=0" in bad:  # there are no degrees to measure lengths and batches by
        expected -= {"training.seq_len", "training.global_batch_size"}
    assert found == expected


@pytest.mark.parametrize(
    ("world", "flags", "keys"),
    [
        (2, "training.seq_len=2047 optimizer.lr=abc training.steps=x", "training.steps optimizer.lr training.seq_len"),
        (3, "training.seq_len=2047", "parallelism.ring_degree training.seq_len"),
        (3, "training.global_batch_size=7 training.local_batch_size=2", "parallelism.ring_degree"),
        (4, "model.rope_factor=0.5 parallelism.ulysses_degree=3", "model.rope_factor parallelism.ulysses_degree"),
        (4, "model.vocab_size=100 parallelism.ring_degree=8", "model.vocab_size parallelism.ring_degree"),
        (4, "parallelism.chunk_size=0 training.seq_len=2047", "parallelism.chunk_size training.seq_len"),
        (
            4,
            "model.num_heads=0 parallelism.ulysses_degree=3",
            "model.num_heads parallelism.ulysses_degree training.seq_len",
        ),
        (
            4,
            "model.num_heads=x parallelism.ulysses_degree=3",
            "model.num_heads parallelism.ulysses_degree training.seq_len",
        ),
        (12, "model.num_heads=0 parallelism.ulysses_degree=3", "model.num_heads training.seq_len"),
        (4, "model.num_kv_heads=3 training.seq_len=2046", "model.num_kv_heads training.seq_len"),
        (4, "model.flavor=x parallelism.ulysses_degree=3", "model.flavor parallelism.ulysses_degree"),
        (3, "parallelism.ring_degree=x training.seq_len=2047", "parallelism.ring_degree"),
        (2, "data.source=txt data.paths=x", "data.source"),
        (2, "data.document_mask=x parallelism.context_parallel_layout=zigzag", "data.document_mask"),
    ],
)
def test_settings_hide_no_problem_but_those_that_rest_on_a_wrong_key(world: int, flags: str, keys: str) -> None:
    found = problems_of(world, "--parallelism.ring_degree=2", *[f"--{flag}" for flag in flags.split()])
    expected = keys.split()
    if "ulysses_degree=3" in flags and "num_heads" not in flags:
        assert any("8 heads and 4 kv heads over tensor degree 1 allow 1, 2, 4, 8" in problem for problem in found)
    assert list(dict.fromkeys(problem.partition(" ")[0] for problem in found)) == expected


@pytest.mark.parametrize("method", ["auto", "ring", "ulysses", "hybrid", "all_gather"])
def test_settings_say_nothing_of_degrees_that_wrong_heads_would_choose(method: str) -> None:
    flags = ["--model.num_heads=0", "--parallelism.context_parallel_degree=4", "--parallelism.chunk_size=1024"]
    flags += [f"--parallelism.context_parallel_method={method}", "--training.seq_len=2048"]
    found = [problem.partition(" ")[0] for problem in problems_of(4, *flags)]
    # Of a ring of all four, each rank would hold half a chunk.
    assert found == ["model.num_heads", *["parallelism.chunk_size"] * (method in ("ring", "all_gather"))]
    flags[2] = "--parallelism.chunk_size=auto"
    found = [problem.partition(" ")[0] for problem in problems_of(6, *flags, "--training.seq_len=2044")]
    assert found == ["model.num_heads", "parallelism.context_parallel_degree", "training.seq_len"]


def test_settings_check_chunks_of_a_ring_that_wrong_heads_do_not_choose() -> None:
    flags = ["--model.num_kv_heads=3", "--parallelism.ring_degree=4", "--parallelism.chunk_size=7"]
    found = [problem.partition(" ")[0] for problem in problems_of(4, *flags)]
    assert found == ["model.num_kv_heads", "parallelism.chunk_size"]


@pytest.mark.parametrize(
    ("flags", "rule"),
    [
        (["--validation.needles=-1"], "must not be negative"),
        (["--validation.needles=2", "--model.attention_mask=full", "--data.no-document_mask"], "sees the digits"),
    ],
)
def test_settings_of_needles_that_mean_nothing_are_refused(flags: list[str], rule: str) -> None:
    (problem,) = problems_of(1, *flags)
    assert problem.startswith("validation.needles = ") and rule in problem
    assert not problems_of(1, "--validation.needles=2", "--validation.no-enable")


def test_settings_refuse_windows_too_short_for_a_needle_stage_by_stage() -> None:
    stages = "--training.stages=[{steps=10, seq_len=64}, {steps=10}, {steps=10, seq_len=2048}]"
    needle = "--validation.needles=2"
    (problem,) = problems_of(1, needle, "--training.seq_len=64")
    assert re.fullmatch(r"training.seq_len = 64 .* needs 120 tokens; .*validation.needles to 0", problem)
    assert problems_of(1, needle, "--training.seq_len=64", stages)[0].startswith("training.stages[0].seq_len")
    assert not problems_of(1, needle, "--training.seq_len=120")
    assert problems_of(None, needle, "--training.seq_len=64") == [problem], "the world size has no part in it"
    # How many ids another tokenizer makes of the sentences is known when it is built.
    assert not problems_of(1, needle, "--training.seq_len=64", "--tokenizer.name=some.package:make")


@pytest.mark.parametrize(
    ("flags", "key"),
    [
        ("model.num_heads=10000000000 model.num_kv_heads=3 model.head_dim=32", "model.num_kv_heads"),
        ("training.seq_len=1000000000000 parallelism.chunk_size=3", "parallelism.chunk_size"),
        ("parallelism.ring_degree=1000000000000 parallelism.ring_inner_degree=7", "parallelism.ring_inner_degree"),
    ],
)
def test_settings_of_any_size_are_answered_at_once(flags: str, key: str) -> None:
    (problem,) = problems_of(1, *[f"--{flag}" for flag in flags.split()])
    assert problem.startswith(f"{key} = ")


def test_settings_leave_a_vocabulary_that_is_not_known_to_the_run() -> None:
    flags = ["--tokenizer.name=a:b", "--parallelism.tensor_parallel_degree=3", "--model.ffn_dim=96"]
    flags += ["--training.seq_len=96"]
    flags += ["--model.num_heads=6", "--model.num_kv_heads=3", "--model.head_dim=16"]
    settings = load(TrainSettings, overrides=[*MODEL, *flags], world_size=3)
    assert settings.shape(settings.known_vocabulary).vocab_size == 0
    assert settings.degrees(3, settings.shape(0)).tp == 3
    with pytest.raises(
        ValueError, match=r"model\.vocab_size: 64 does not divide over the tensor degree 3; set it to 66"
    ):
        settings.degrees(3, settings.shape(50))
    (problem,) = problems_of(3, *flags, "--model.vocab_size=64")
    assert problem.startswith("model.vocab_size = 64 ")


@pytest.mark.parametrize(
    ("flag", "meant"), [("steps", "`training.steps` or `validation.steps`"), ("TRAINING.steps", "`training.steps`")]
)
def test_settings_of_an_unknown_section_are_looked_for_by_their_name(flag: str, meant: str) -> None:
    (problem,) = problems_of(1, f"--{flag}=20")
    assert problem.endswith(f"unknown key; did you mean {meant}?")


def test_settings_with_a_tensor_degree_beyond_the_heads_offer_no_empty_list() -> None:
    found = problems_of(128, "--parallelism.tensor_parallel_degree=64", "--parallelism.ulysses_degree=2")
    assert [problem.partition(" ")[0] for problem in found] == ["parallelism.tensor_parallel_degree"]


@pytest.mark.parametrize("name", ["a\0b", "a\nb", "\x7f"])
def test_settings_names_of_folders_hold_no_control_characters(name: str) -> None:
    for config in (JobConfig(name=name), JobConfig(dump_folder=name)):
        assert ["control characters" in problem.rule for problem in config.problems()] == [True]


def test_settings_folders_of_a_run_may_be_below_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert JobConfig(name="x", dump_folder="~/runs").folder == Path("/home/me/runs/x")
    assert CheckpointConfig(folder="~/kept").below(Path("outputs/x")) == Path("/home/me/kept")
    assert CheckpointConfig().below(Path("outputs/x")) == Path("outputs/x/checkpoint")


def test_settings_refuse_a_step_to_load_where_nothing_is_loaded() -> None:
    (problem,) = problems_of(1, "--checkpoint.no-enable", "--checkpoint.load_step=5")
    assert (
        problem.startswith("checkpoint.load_step = 5") and "leave it out, or set checkpoint.enable to true" in problem
    )
    assert problems_of(1, "--checkpoint.no-enable") == problems_of(1, "--checkpoint.load_step=5") == []


@pytest.mark.parametrize(
    ("stage", "problem"),
    [
        (
            "seq_len = 66\nring_degree = 2",
            "training.stages[1].seq_len = 66 (run.toml:7): must be a multiple of 4 = context degree 2 x "
            "lcm(2, tensor degree 1); set it to 64 or 68",
        ),
        (
            "ring_degree = 4",
            "training.stages[1].ring_degree = 4 (run.toml:7): replicate 1 x ring 4 x ulysses 1 x tensor 1 = 4 does not "
            "divide the world size 2; run on a multiple of 4 ranks, or lower ring_degree",
        ),
        (
            "local_batch_size = 2",
            "training.global_batch_size = 2 (run.toml:3): in training.stages[1]: must be a multiple of "
            "local_batch_size 2 x 2 data-parallel ranks; set it to 4",
        ),
        (
            "ulysses_degree = 3",
            "training.stages[1].ulysses_degree = 3 (run.toml:7): 8 heads and 4 kv heads over tensor degree 1 allow "
            "1, 2, 4, 8; or give the rest to ring_degree",
        ),
    ],
)
def test_settings_problem_of_a_stage_names_the_line_that_caused_it(tmp_path: Path, stage: str, problem: str) -> None:
    text = "[training]\nseq_len = 64\nglobal_batch_size = 2\n[[training.stages]]\nsteps = 1\n[[training.stages]]\n"
    (tmp_path / "run.toml").write_text(text + stage)
    with pytest.raises(ConfigError) as caught:
        load(TrainSettings, [tmp_path / "run.toml"], overrides=MODEL, world_size=2, presets=tmp_path)
    assert list(caught.value.problems) == [problem]


# --- the file ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", preset_names(presets_folder()))
def test_settings_of_a_preset_print_and_load_again(tmp_path: Path, preset: str) -> None:
    command = parse_command_line(["--config", preset, "--print-config"], TrainSettings, prog="train", environ={})
    (tmp_path / "printed.toml").write_text(command.text)
    assert load(TrainSettings, [tmp_path / "printed.toml"]) == command.settings


def test_settings_with_stages_print_and_load_again(tmp_path: Path) -> None:
    stage = TrainingStage(steps=3, seq_len=128, context_parallel_method="all_gather", ring_degree=2)
    settings = TrainSettings(training=TrainingConfig(stages=(stage, TrainingStage())))
    (tmp_path / "printed.toml").write_text(dump(settings))
    overrides = MODEL[:3]
    assert load(TrainSettings, [tmp_path / "printed.toml"], overrides=overrides).training == settings.training
