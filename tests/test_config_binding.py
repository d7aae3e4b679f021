"""TOML files into dataclasses, and everything that can be wrong with them."""

from __future__ import annotations

import math
import os
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from test_config_schema import Settings, StageConfig

from cptrain.config import ConfigError, Problem, load, setting

Write = Callable[..., Path]
EVERYTHING = """
compile.enable = true
[training]
steps = 20
max_norm = 3
stages = [{steps = 5}, {steps = 6, seq_len = 8}]
[parallelism]
ulysses_degree = 4
context_parallel_method = "ring"
kernel.window = [128, 0]
[data]
paths = ["a", "b"]
weights = [1, 0.5]
temperature = inf
"""


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Writes a TOML file and returns its path as a user in that folder would give it."""
    monkeypatch.chdir(tmp_path)

    def write(text: str | bytes, name: str = "my.toml") -> Path:
        Path(name).write_bytes(text if isinstance(text, bytes) else text.encode())
        return Path(name)

    return write


def problems_of(*files: Path, world_size: int | None = None, root: type = Settings) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(root, files, world_size=world_size)
    return list(caught.value.problems)


def test_config_binding_of_nothing_is_the_defaults() -> None:
    assert load(Settings) == Settings()


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("compile", "enable", True),
        ("training", "steps", 20),
        ("training", "max_norm", 3.0),
        ("training", "stages", (StageConfig(steps=5), StageConfig(steps=6, seq_len=8))),
        ("parallelism", "ulysses_degree", 4),
        ("parallelism", "context_parallel_method", "ring"),
        ("data", "paths", ("a", "b")),
        ("data", "weights", (1.0, 0.5)),
        ("data", "temperature", math.inf),
    ],
)
def test_config_binding_gives_each_key_its_type(write: Write, section: str, key: str, value: Any) -> None:
    bound = getattr(getattr(load(Settings, [write(EVERYTHING)]), section), key)
    assert (bound, type(bound)) == (value, type(value))
    if isinstance(value, tuple):
        assert [type(item) for item in bound] == [type(item) for item in value]


def test_config_binding_keeps_the_defaults_of_a_default_instance(write: Write) -> None:
    kernel = load(Settings, [write('[parallelism.kernel]\nname = "x"')]).parallelism.kernel
    assert (kernel.name, kernel.window) == ("x", (-1, -1))


def test_config_binding_lets_later_files_win_key_by_key(write: Write) -> None:
    files = [
        write("[training]\nsteps = 1\nmax_norm = 2.0", "a.toml"),
        write("[training]\nsteps = 5\n[data]", "b.toml"),
        write("[training]", "c.toml"),
    ]
    training = load(Settings, files).training
    assert (training.steps, training.max_norm) == (5, 2.0)


@pytest.mark.parametrize(
    ("later", "steps"),
    [
        ("[[training.stages]]\nsteps = 7", [7]),
        ("[training]\nstages = [{steps = 7}]", [7]),
        ("[training]\nstages = []", []),
        ("[training]\nsteps = 9", [1, 2]),
    ],
)
def test_config_binding_replaces_an_array_of_tables_as_a_whole(write: Write, later: str, steps: list[int]) -> None:
    first = write("[[training.stages]]\nsteps = 1\nseq_len = 4\n[[training.stages]]\nsteps = 2", "a.toml")
    stages = load(Settings, [first, write(later, "b.toml")]).training.stages
    assert [stage.steps for stage in stages] == steps
    assert all(stage.seq_len == 1024 for stage in stages if stage.steps == 7)


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('training.steps = "20"', 'training.steps = "20" (my.toml:1): must be an integer; did you mean 20?'),
        ("training.steps = 1.5", "training.steps = 1.5 (my.toml:1): must be an integer"),
        ("training.steps = 1e3", "training.steps = 1000.0 (my.toml:1): must be an integer; did you mean 1000?"),
        ("training.steps = true", "training.steps = true (my.toml:1): must be an integer"),
        ("training.steps = 1979-05-27", "training.steps = datetime.date(1979, 5, 27) (my.toml:1): must be an integer"),
        ("training.max_norm = false", "training.max_norm = false (my.toml:1): must be a number"),
        ("compile.enable = 1", "compile.enable = 1 (my.toml:1): must be true or false"),
        ('compile.enable = "True"', 'compile.enable = "True" (my.toml:1): must be true or false; did you mean true?'),
        ("compile.level = 3", "compile.level = 3 (my.toml:1): must be one of 0, 1, 2"),
        ("compile.level = true", "compile.level = true (my.toml:1): must be one of 0, 1, 2"),
        ('compile.dynamic = "on"', 'compile.dynamic = "on" (my.toml:1): must be true or false or "auto"'),
        ("data.field_name = 5", "data.field_name = 5 (my.toml:1): must be a string"),
        (
            'parallelism.context_parallel_method = "Rings"',
            'parallelism.context_parallel_method = "Rings" (my.toml:1): must be one of "auto", "ring", "ulysses"; '
            'did you mean "ring"?',
        ),
        (
            'parallelism.ulysses_degree = "atuo"',
            'parallelism.ulysses_degree = "atuo" (my.toml:1): must be an integer or "auto"; did you mean "auto"?',
        ),
        ('data.paths = "a"', 'data.paths = "a" (my.toml:1): must be a list, each item a string; did you mean ["a"]?'),
        ("data.paths = [1]", "data.paths = [1] (my.toml:1): must be a list, each item a string"),
        (
            "parallelism.kernel.window = [1]",
            "parallelism.kernel.window = [1] (my.toml:1): must be a list of 2: an integer, an integer",
        ),
        ("training.stages = [1]", "training.stages = [1] (my.toml:1): must be an array of tables"),
        ("training.steps = {}", "training.steps (my.toml:1): must be an integer"),
        (
            "training = 5",
            "training = 5 (my.toml:1): is a section, not a value; set its keys, as in `training.seq_len`",
        ),
    ],
)
def test_config_binding_names_wrong_types(write: Write, line: str, problem: str) -> None:
    assert problems_of(write(line)) == [problem]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("[training]\n\nstep = 5", "training.step = 5 (my.toml:3): unknown key; did you mean `training.steps`?"),
        (
            "[parallelism]\ncontext_parallel_size = 8",
            "parallelism.context_parallel_size = 8 (my.toml:2): unknown key; "
            "did you mean `parallelism.context_parallel_degree`?",
        ),
        (
            "[checkpoint]\nsave_steps = 8",  # the key that this alias means is not in the toy
            "checkpoint.save_steps = 8 (my.toml:2): unknown key; sections are training, parallelism, compile, data",
        ),
        ("[compile]\ndyn = 8", "compile.dyn = 8 (my.toml:2): unknown key; did you mean `compile.dynamic`?"),
        (
            "[parallelism]\nkernel.x = 8",
            "parallelism.kernel.x = 8 (my.toml:2): unknown key; --help parallelism lists its keys",
        ),
        ("cp_size = 8", "cp_size = 8 (my.toml:1): unknown key; did you mean `parallelism.context_parallel_degree`?"),
        (
            "[distributed]\nsp_size = 8",
            "distributed.sp_size = 8 (my.toml:2): unknown key; did you mean `parallelism.context_parallel_degree`?",
        ),
        (
            "[training]\nsequence_len = 8",
            "training.sequence_len = 8 (my.toml:2): unknown key; did you mean `training.seq_len`?",
        ),
        (
            "[training]\nenable = true",
            "training.enable = true (my.toml:2): unknown key; did you mean `compile.enable`?",
        ),
        (
            "[training]\nparallelism.context_parallel_degree = 2",
            "training.parallelism.context_parallel_degree = 2 (my.toml:2): unknown key; "
            "did you mean `parallelism.context_parallel_degree`?",
        ),
        ("[trainin]\nsteps = 1", "trainin.steps = 1 (my.toml:2): unknown key; did you mean `training.steps`?"),
        ("[training]\nxyz = 1", "training.xyz = 1 (my.toml:2): unknown key; --help training lists its keys"),
        (
            "[nowhere]\nxyz = 1",
            "nowhere.xyz = 1 (my.toml:2): unknown key; sections are training, parallelism, compile, data",
        ),
        ("[float8]", "float8 (my.toml:1): unknown key; sections are training, parallelism, compile, data"),
        (
            "[[training.stages]]\nsteps = 1\n[[training.stages]]\nsteps = 1\nseqlen = 2",
            "training.stages[1].seqlen = 2 (my.toml:5): unknown key; did you mean `training.stages[].seq_len`?",
        ),
        (
            "[training.stages]\nsteps = 1",
            "training.stages.steps = 1 (my.toml:2): unknown key; did you mean `training.stages[].steps`?",
        ),
        (
            "[[training]]\nsteps = 1",
            "training[0].steps = 1 (my.toml:2): unknown key; did you mean `training.steps`?",
        ),
        (
            '"training.steps" = 1',
            '"training.steps" = 1 (my.toml:1): unknown key; did you mean `training.steps`?',
        ),
    ],
)
def test_config_binding_names_unknown_keys_with_a_suggestion(write: Write, line: str, problem: str) -> None:
    assert problems_of(write(line)) == [problem]


def test_config_binding_names_keys_that_have_to_be_set(write: Write) -> None:
    stages = "[[training.stages]]\nseq_len = 2\n" + 2 * "[[training.stages]]\nsteps = 2\n"
    # A section around one that does not bind is not checked: nothing is said of the third stage.
    assert problems_of(write(stages)) == ["training.stages[0].steps: has to be set; must be an integer"]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("training.steps = 0", "training.steps = 0 (my.toml:1): must be positive; set it to 1"),
        ("\ntraining.seq_len = 3", "training.seq_len = 3 (my.toml:2): must divide 4096"),
        (
            "training.stages = [\n  {steps = 1},\n  {steps = 0},\n]",
            "training.stages[1].steps = 0 (my.toml:3): must be positive; set it to 1",
        ),
        ('[data]\npaths = ["a",\n""]', 'data.paths[1] = "" (my.toml:2): must name a file'),
        (
            "[[training.stages]]\nsteps = 1\n[[training.stages]]\nsteps = 1\n[[training.stages]]\nsteps = 1",
            "training.stages (my.toml:2): at most 2",
        ),
        ("parallelism.context_parallel_degree = 4096", "training.seq_len = 2048 (default): must be at least 4096"),
        ("compile.enable = true\ncompile.level = 0", "compile: has nothing to do; set compile.level = 1"),
    ],
)
def test_config_binding_runs_the_checks_of_sections_and_root(write: Write, text: str, problem: str) -> None:
    assert problems_of(write(text)) == [problem]


@pytest.mark.parametrize(("world_size", "fails"), [(None, False), (4, False), (6, True)])
def test_config_binding_hands_the_world_size_to_the_root(write: Write, world_size: int | None, fails: bool) -> None:
    path = write("[parallelism]\ncontext_parallel_degree = 4")
    if fails:
        assert problems_of(path, world_size=world_size) == [
            "parallelism.context_parallel_degree = 4 (my.toml:2): must divide the world size 6; use 1"
        ]
    else:
        load(Settings, [path], world_size=world_size)


def test_config_binding_reports_everything_at_once(write: Write) -> None:
    first = write("cp_size = 2\n[training]\nsteps = 0\nsteq_len = 3\n[data]\npaths = ['']", "a.toml")
    second = write("[compile]\nenable = 'yes'\n[training]\nseq_len = 3", "b.toml")
    with pytest.raises(ConfigError) as caught:
        load(Settings, [first, second], overrides=["--foo.bar", "1", "--training.max_norm=x"])
    starts = [problem.partition(":")[0] for problem in caught.value.problems]
    assert sorted(starts) == [
        'compile.enable = "yes" (b.toml',
        "cp_size = 2 (a.toml",
        'data.paths[0] = "" (a.toml',
        'foo.bar = "1" (flag --foo.bar)',
        'training.max_norm = "x" (flag --training.max_norm)',
        "training.seq_len = 3 (b.toml",
        "training.steps = 0 (a.toml",
        "training.steq_len = 3 (a.toml",
    ]
    assert str(caught.value).startswith("8 problems in the settings:\n  ")


@pytest.mark.parametrize(
    ("text", "keys"),
    [
        ("training.steps = 'x'\ntraining.seq_len = 3", ["training.steps", "training.seq_len"]),
        (
            "training.seq_len = 'x'\nparallelism.context_parallel_degree = 4096",
            ["training.seq_len", "parallelism.context_parallel_degree"],
        ),
        ("compile.level = 'x'\ncompile.enable = true", ["compile.level"]),
        ("parallelism.context_parallel_degree = 'x'", ["parallelism.context_parallel_degree"]),
        ("compile.enable = 'x'\ncompile.level = 0", ["compile.enable"]),
        ("data.paths = ['', 1]", ["data.paths"]),
        ("training.stages = [{steps = 'x'}]\ntraining.seq_len = 3", ["training.stages[0].steps"]),
        (
            "parallelism.context_parallel_degree = 3\nparallelism.context_parallel_method = 5",
            ["parallelism.context_parallel_method", "parallelism.context_parallel_degree"],
        ),
    ],
)
def test_config_binding_checks_what_does_not_rest_on_a_value_of_the_wrong_type(
    write: Write, text: str, keys: list[str]
) -> None:
    assert [problem.partition(" ")[0] for problem in problems_of(write(text), world_size=4)] == keys


def test_config_binding_names_the_file_that_wins(write: Write) -> None:
    files = [write("training.steps = 5", "a.toml"), write("\ntraining.steps = 0", "b.toml")]
    assert problems_of(*files) == ["training.steps = 0 (b.toml:2): must be positive; set it to 1"]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[training]\nsteps = = 5\n", "my.toml:2:9: not valid TOML: invalid value"),
        ("[training]\nsteps = [1,\n", "my.toml:2:12: not valid TOML: invalid value"),
        ("a = 1\na = 2", "my.toml:2:6: not valid TOML: cannot overwrite a value"),
        (f"a = {'[' * 9999}", "my.toml: not valid TOML: TOML inline arrays/tables are nested more than the allowed"),
        (b"a = '\xff'", "my.toml: is not UTF-8 text: byte 5 (invalid start byte)"),
    ],
)
def test_config_binding_says_where_a_file_is_not_toml(write: Write, text: str | bytes, problem: str) -> None:
    (found,) = problems_of(write(text))
    assert found.startswith(problem)


def test_config_binding_reports_a_broken_file_with_the_others_but_runs_no_checks(write: Write) -> None:
    files = [write("steps = ", "a.toml"), write("[training]\nsteps = 0\nfoo = 1", "b.toml"), Path("gone.toml")]
    assert problems_of(*files) == [
        "a.toml:1:8: not valid TOML: invalid value",
        "gone.toml: cannot be read: No such file or directory",
        "training.foo = 1 (b.toml:3): unknown key; --help training lists its keys",
    ]


def test_config_binding_takes_a_byte_order_mark(write: Write) -> None:
    assert load(Settings, [write(b"\xef\xbb\xbftraining.steps = 5\r\n")]).training.steps == 5


def test_config_binding_calls_presets_by_name(write: Write, tmp_path: Path) -> None:
    path = tmp_path / write("x = 1")
    with pytest.raises(ConfigError, match=r"\(my.toml:1\)"):
        load(Settings, [path], presets=tmp_path)
    with pytest.raises(ConfigError, match=rf"\({path}:1\)"):
        load(Settings, [path])


@dataclass(frozen=True, kw_only=True)
class Fragile:
    """A root whose check divides by a value that it refuses itself."""

    degree: int = setting(1, "")
    other: int = setting(1, "")

    def problems(self, world_size: int | None) -> Iterator[Problem]:
        if self.degree == 0:
            yield Problem(key="degree", rule="must be positive")
        yield from [] if 8 % (self.degree * self.other) == 0 else [Problem(key="degree", rule="must divide 8")]


def test_config_binding_keeps_the_refusal_when_a_check_then_stumbles(write: Write) -> None:
    assert problems_of(write("degree = 0"), root=Fragile) == ["degree = 0 (my.toml:1): must be positive"]


def test_config_binding_does_not_hide_a_check_that_stumbles_alone(write: Write) -> None:
    with pytest.raises(ZeroDivisionError):
        load(Fragile, [write("other = 0")])


def test_config_binding_shortens_long_values(write: Write) -> None:
    (problem,) = problems_of(write(f'training.steps = "{"x" * 1000}"'))
    assert problem == f'training.steps = "{"x" * 56}... (my.toml:1): must be an integer'


def test_config_binding_error_survives_pickling() -> None:
    error = ConfigError(["a", "b", "a"])
    assert error.problems == ("a", "b")
    assert str(pickle.loads(pickle.dumps(error))) == str(error) == "2 problems in the settings:\n  a\n  b"


def test_config_binding_refuses_text_that_is_not_utf8() -> None:
    with pytest.raises(ConfigError, match="must be a string"):
        load(Settings, overrides=["--data.field_name", os.fsdecode(b"\xff")])
