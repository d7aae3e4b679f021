"""Settings given as flags."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
from test_config_schema import Settings, StageConfig

from cptrain.config import ConfigError, load, setting


@pytest.mark.parametrize(
    ("flags", "key", "value"),
    [
        (["--training.steps", "20"], "training.steps", 20),
        (["--training.steps=20"], "training.steps", 20),
        (["--training.steps", "131_072"], "training.steps", 131072),
        (["--training.seq-len", "1024"], "training.seq_len", 1024),
        (["--parallelism.data-parallel_shard-degree=8"], "parallelism.data_parallel_shard_degree", 8),
        (["--parallelism.data_parallel_shard_degree", "-2"], "parallelism.data_parallel_shard_degree", -2),
        (["--parallelism.data_parallel_shard_degree=-2"], "parallelism.data_parallel_shard_degree", -2),
        (["--training.steps", "1", "--training.steps", "2"], "training.steps", 2),
        (["--training.max_norm", "3"], "training.max_norm", 3.0),
        (["--training.max_norm=1e-3"], "training.max_norm", 1e-3),
        (["--training.max_norm", "-inf"], "training.max_norm", float("-inf")),
        (["--compile.enable"], "compile.enable", True),
        (["--compile.enable=true"], "compile.enable", True),
        (["--compile.enable", "True"], "compile.enable", True),
        (["--compile.enable", "--compile.enable=false"], "compile.enable", False),
        (["--compile.enable", "--compile.enable", "false"], "compile.enable", False),
        (["--compile.enable", "--compile.enable=False"], "compile.enable", False),
        (["--compile.enable", "--compile.no-enable"], "compile.enable", False),
        (["--compile.enable", "--compile.no_enable"], "compile.enable", False),
        (["--compile.no-enable", "--compile.enable"], "compile.enable", True),
        (["--compile.enable", "--training.steps=5"], "compile.enable", True),
        (["--compile.dynamic"], "compile.dynamic", True),
        (["--compile.no-dynamic"], "compile.dynamic", False),
        (["--compile.dynamic", "--compile.dynamic", "auto"], "compile.dynamic", "auto"),
        (["--compile.level", "2"], "compile.level", 2),
        (["--parallelism.ulysses_degree", "4"], "parallelism.ulysses_degree", 4),
        (["--parallelism.ulysses_degree=4", "--parallelism.ulysses_degree=auto"], "parallelism.ulysses_degree", "auto"),
        (["--parallelism.context_parallel_method", "RING"], "parallelism.context_parallel_method", "ring"),
        (["--data.temperature", "2"], "data.temperature", 2.0),
        (["--data.field_name", "some text"], "data.field_name", "some text"),
        (["--data.field_name=a=b"], "data.field_name", "a=b"),
        (["--data.field_name="], "data.field_name", ""),
        (["--data.field_name", "5"], "data.field_name", "5"),
        (["--data.field_name", "true"], "data.field_name", "true"),
        (["--data.field_name", '"quo\\"ted"'], "data.field_name", 'quo"ted'),
        (["--data.field_name", "'a,b'"], "data.field_name", "a,b"),
        (["--data.field_name", '"a"\nb = 1'], "data.field_name", '"a"\nb = 1'),
        (["--data.field_name", "'open"], "data.field_name", "'open"),
        (["--data.field_name=--x"], "data.field_name", "--x"),
        (["--data.field_name", "-x"], "data.field_name", "-x"),
        (["--data.paths", '["a","b c"]'], "data.paths", ("a", "b c")),
        (["--data.paths", '["a,b"]'], "data.paths", ("a,b",)),
        (["--data.paths", "[a, b]"], "data.paths", ("a", "b")),
        (["--data.paths", "a,b"], "data.paths", ("a", "b")),
        (["--data.paths=a, b"], "data.paths", ("a", "b")),
        (["--data.paths", "a"], "data.paths", ("a",)),
        (["--data.paths", "[ab]*.txt"], "data.paths", ("[ab]*.txt",)),
        (["--data.paths", "a", "b", "c,d"], "data.paths", ("a", "b", "c,d")),
        (["--data.paths=x", "--data.paths="], "data.paths", ()),
        (["--data.paths=x", "--data.paths=[]"], "data.paths", ()),
        (["--data.weights", "1,0.5"], "data.weights", (1.0, 0.5)),
        (["--data.weights", "1", "-0.5"], "data.weights", (1.0, -0.5)),
        (["--parallelism.kernel.window", "-1,5"], "parallelism.kernel.window", (-1, 5)),
        (["--parallelism.kernel.window", "-1", "5"], "parallelism.kernel.window", (-1, 5)),
        (["--parallelism.kernel.window", "[3, 4]"], "parallelism.kernel.window", (3, 4)),
        (
            ["--training.stages", "[{steps = 3}, {steps=4}]"],
            "training.stages",
            (StageConfig(steps=3), StageConfig(steps=4)),
        ),
        (["--training.stages=[{steps=3}]", "--training.stages=[]"], "training.stages", ()),
    ],
)
def test_config_overrides_take_every_form(flags: list[str], key: str, value: Any) -> None:
    bound: Any = load(Settings, overrides=flags)
    for name in key.split("."):
        bound = getattr(bound, name)
    assert (bound, type(bound)) == (value, type(value))
    if isinstance(value, tuple):
        assert [type(item) for item in bound] == [type(item) for item in value]


def test_config_overrides_leave_the_rest_alone() -> None:
    changed = load(Settings, overrides=["--compile.enable", "--training.steps", "20"])
    assert changed.compile.enable
    assert changed.training.steps == 20
    assert (changed.data, changed.parallelism) == (Settings().data, Settings().parallelism)


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["--training.steps", "abc"], 'training.steps = "abc" (flag --training.steps): must be an integer'),
        (
            ["--training.steps=1e3"],
            'training.steps = "1e3" (flag --training.steps): must be an integer; did you mean 1000?',
        ),
        (["--training.steps=1.5"], 'training.steps = "1.5" (flag --training.steps): must be an integer'),
        (["--training.steps=inf"], 'training.steps = "inf" (flag --training.steps): must be an integer'),
        (["--training.steps="], 'training.steps = "" (flag --training.steps): must be an integer'),
        (
            ["--training.steps"],
            "training.steps (flag --training.steps): needs a value: an integer; write --training.steps=value",
        ),
        (
            ["--data.field-name", "--compile.enable"],
            "data.field_name (flag --data.field-name): needs a value: a string; write --data.field-name=value",
        ),
        (
            ["--training.steps=5", "x", "y"],
            "training.steps (flag --training.steps): takes one value, not 3; remove x y, or quote a value that has "
            "spaces",
        ),
        (["--compile.enable", "yes"], 'compile.enable = "yes" (flag --compile.enable): must be true or false'),
        (["--compile.no-enable=true"], "--compile.no-enable: takes no value; write --compile.enable=false"),
        (["--compile.no-enable=False"], "--compile.no-enable: takes no value; write --compile.enable=true"),
        (
            ["--compile.no-level"],
            "compile.no_level (flag --compile.no-level): unknown key; did you mean `compile.level`?",
        ),
        (
            ["--parallelism.context_parallel_method=rign"],
            'parallelism.context_parallel_method = "rign" (flag --parallelism.context_parallel_method): must be one of '
            '"auto", "ring", "ulysses"; did you mean "ring"?',
        ),
        (
            ["--training.stpes", "5"],
            'training.stpes = "5" (flag --training.stpes): unknown key; did you mean `training.steps`?',
        ),
        (
            ["--TRAINING.steps=5"],
            'TRAINING.steps = "5" (flag --TRAINING.steps): unknown key; did you mean `training.steps`?',
        ),
        (
            ["--tp.cp-size=5"],
            'tp.cp_size = "5" (flag --tp.cp-size): unknown key; did you mean `parallelism.context_parallel_degree`?',
        ),
        (
            ["--training.stages[].steps=5"],
            'training.stages[].steps = "5" (flag --training.stages[].steps): unknown key; '
            "did you mean `training.steps`?",
        ),
        (
            ["--training", "{steps = 5}"],
            'training = "{steps = 5}" (flag --training): unknown key; --help training lists its keys',
        ),
        (
            ["--parallelism.kernel.window", "1,2,3"],
            "parallelism.kernel.window = [1, 2, 3] (flag --parallelism.kernel.window): must be a list of 2: "
            "an integer, an integer",
        ),
        (["--training.stages", "3"], 'training.stages = "3" (flag --training.stages): must be an array of tables'),
        (
            ["--training.stages=[{step=3, steps=3}]"],
            "training.stages[0].step = 3 (flag --training.stages): unknown key; did you mean "
            "`training.stages[].steps`?",
        ),
        (["stray", "text"], "stray text: is no flag; write --section.key value"),
        (["--"], "--: is no flag; write --section.key value"),
        (["--training.steps", "0"], "training.steps = 0 (flag --training.steps): must be positive; set it to 1"),
        (["--training.seq-len=3"], "training.seq_len = 3 (flag --training.seq-len): must divide 4096"),
    ],
)
def test_config_overrides_report_what_is_wrong(flags: list[str], problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(Settings, overrides=flags)
    assert caught.value.problems == (problem,)


@dataclass(frozen=True, kw_only=True)
class Negated:
    cache: bool = setting(True, "")
    no_cache: bool = setting(False, "")


def test_config_overrides_know_a_key_that_begins_with_no() -> None:
    assert load(Negated, overrides=["--no-cache"]) == Negated(no_cache=True)


def test_config_overrides_report_every_bad_flag() -> None:
    with pytest.raises(ConfigError) as caught:
        load(Settings, overrides=["x", "--a.b", "--training.steps", "--compile.enable=3", "--data.weights=1,x"])
    assert len(caught.value.problems) == 5
