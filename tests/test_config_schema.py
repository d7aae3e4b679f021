"""The toy settings that the tests of `config` share, and what the schema says of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import MISSING, dataclass, field
from typing import Any, Literal

import pytest

from cptrain.config import ALIASES, Problem, keys, setting
from cptrain.config.schema import summary


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """One stage of the length schedule."""

    steps: int = setting(MISSING, "steps this stage lasts")
    seq_len: int = setting(1024, "tokens per sequence")

    def problems(self) -> Iterator[Problem]:
        if self.steps < 1:
            yield Problem(key="steps", rule="must be positive", fix="set it to 1")


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How long and on how much.

    The rest of a docstring is for readers of the code.
    """

    seq_len: int = setting(2048, "tokens per sequence, over all ranks")
    steps: int = setting(1000, "optimizer steps in the run")
    max_norm: float = setting(1.0, "largest gradient norm")
    stages: tuple[StageConfig, ...] = setting((), "lengths over time")

    def problems(self) -> Iterator[Problem]:
        if self.steps < 1:
            yield Problem(key="steps", rule="must be positive", fix="set it to 1")
        if 4096 % self.seq_len:
            yield Problem(key="seq_len", rule="must divide 4096")
        if len(self.stages) > 2:
            yield Problem(key="stages", rule="at most 2")


@dataclass(frozen=True, kw_only=True)
class KernelConfig:
    """Which kernel."""

    name: str = setting("auto", "name of the kernel")
    window: tuple[int, int] = setting((-1, 0), "tokens before and after")


@dataclass(frozen=True, kw_only=True)
class ParallelismConfig:
    """[parallelism]: how the ranks are divided."""

    data_parallel_shard_degree: int = setting(-1, "FSDP2 ranks, -1 = the rest")
    context_parallel_degree: int = setting(1, "ranks that share one sequence")
    context_parallel_method: Literal["auto", "ring", "ulysses"] = setting("auto", "how they exchange it")
    ulysses_degree: int | Literal["auto"] = setting("auto", "ranks that exchange heads")
    kernel: KernelConfig = setting(KernelConfig(window=(-1, -1)), "the attention kernel")


@dataclass(frozen=True, kw_only=True)
class CompileConfig:
    enable: bool = setting(False, "compile every block")
    dynamic: bool | Literal["auto"] = setting("auto", "shapes that change")
    level: Literal[0, 1, 2] = setting(1, "how hard")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where documents come from."""

    paths: tuple[str, ...] = setting((), "files and globs")
    weights: tuple[float, ...] = field(default_factory=lambda: (1.0,), metadata={"help": "share of each"})
    field_name: str = setting("text", "the field that holds the text")
    temperature: float | Literal["auto"] = setting("auto", "of the mixture")

    def problems(self) -> Iterator[Problem]:
        for index, path in enumerate(self.paths):
            if not path:
                yield Problem(key=f"paths[{index}]", rule="must name a file")


@dataclass(frozen=True, kw_only=True)
class Settings:
    training: TrainingConfig = setting(TrainingConfig(), "")
    parallelism: ParallelismConfig = setting(ParallelismConfig(), "")
    compile: CompileConfig = field(default_factory=CompileConfig)
    data: DataConfig = setting(DataConfig(), "")

    def problems(self, world_size: int | None) -> Iterator[Problem]:
        degree = self.parallelism.context_parallel_degree
        if self.training.seq_len // degree < 1:
            yield Problem(key="training.seq_len", rule=f"must be at least {degree}")
        if world_size is not None and world_size % degree:
            yield Problem(
                key="parallelism.context_parallel_degree", rule=f"must divide the world size {world_size}", fix="use 1"
            )
        if self.compile.enable and self.compile.level == 0:
            yield Problem(key="compile", rule="has nothing to do", fix="set compile.level = 1")


def test_config_schema_lists_every_key_once() -> None:
    paths = [key.path for key in keys(Settings)]
    assert len(set(paths)) == len(paths) == 19
    assert paths[:6] == [
        "training.seq_len",
        "training.steps",
        "training.max_norm",
        "training.stages",
        "training.stages[].steps",
        "training.stages[].seq_len",
    ]
    assert "parallelism.kernel.window" in paths
    assert "parallelism.kernel" not in paths


def test_config_schema_gives_resolved_type_default_and_help() -> None:
    by_path = {key.path: key for key in keys(Settings)}
    window = by_path["parallelism.kernel.window"]
    assert (window.hint, window.default, window.help) == (tuple[int, int], (-1, -1), "tokens before and after")
    assert window.field.name == "window"
    assert by_path["training.stages[].steps"].default is MISSING
    assert by_path["data.weights"].default == (1.0,)
    assert by_path["compile.enable"].default is False


@pytest.mark.parametrize(
    ("section", "line"),
    [
        (TrainingConfig, "How long and on how much."),
        (ParallelismConfig, "how the ranks are divided."),
        (CompileConfig, ""),
    ],
)
def test_config_schema_summary_is_the_first_line_of_the_own_docstring(section: type, line: str) -> None:
    assert summary(section) == line


@pytest.mark.parametrize("hint", [dict[str, int], list[int], "int | None", bytes, Any])
def test_config_schema_refuses_types_that_toml_cannot_give(hint: Any) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Odd:
        key: Any = setting(0, "")

    Odd.__annotations__["key"] = hint
    with pytest.raises(TypeError, match="a setting cannot be of type"):
        keys(Odd)


def test_config_schema_aliases_are_no_keys_and_each_means_one_key() -> None:
    words = [word for aliases in ALIASES.values() for word in aliases.split()]
    assert len(words) == len(set(words))
    assert not set(words) & {key.rpartition(".")[2] for key in ALIASES}
