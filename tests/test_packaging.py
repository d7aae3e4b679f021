"""What is installed, from which versions, and that every shipped preset is found and valid."""

from __future__ import annotations

import re
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

from cptrain.config.command import parse_command_line
from cptrain.config.preset import find, listing, preset_names, presets_folder
from cptrain.metrics import human
from cptrain.train.memory import needed
from cptrain.train.report import describe
from cptrain.train.settings import BYTE_VOCABULARY, TrainSettings

ROOT = Path(__file__).resolve().parent.parent
CUT_EACH = {"fsdp_reduce_each_microbatch": True}
PRESETS = ("debug", "debug_4d", "llama_128k", "llama_1m", "llama_70b_128k")


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def pins() -> dict[str, str]:
    """Version by lower-case name in constraints.txt."""
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    return {name.lower(): version for name, version in (line.split("==") for line in lines)}


def ranks_of(preset: str) -> int:
    """The number of ranks that a preset's second comment names."""
    match = re.search(r"^# ranks: (\d+)$", (presets_folder() / f"{preset}.toml").read_text(), re.MULTILINE)
    assert match, f"{preset}.toml does not say for how many ranks it is"
    return int(match[1])


def settings_of(preset: str, *, world_size: int) -> TrainSettings:
    command = parse_command_line(
        ["--config", preset, "--dry-run", "--world-size", str(world_size)], TrainSettings, prog="train"
    )
    assert command.settings is not None
    return command.settings


def test_packaging_wheel_puts_presets_where_they_are_looked_for() -> None:
    included = project()["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    assert included == {"configs": "cptrain/configs"}
    assert presets_folder() in (ROOT / "configs", ROOT / "cptrain" / "configs")


def test_packaging_takes_nothing_but_the_project() -> None:
    targets = project()["tool"]["hatch"]["build"]["targets"]
    assert targets["wheel"]["packages"] == ["cptrain"]
    for path in targets["sdist"]["include"]:
        # Without the slash a pattern matches at any depth: outputs/debug/config.toml would be next.
        assert path.startswith("/"), path


@pytest.mark.parametrize(
    "written", [*project()["project"]["dependencies"], *project()["project"]["optional-dependencies"]["dev"]]
)
def test_packaging_pins_a_version_that_each_dependency_allows(written: str) -> None:
    requirement = Requirement(written)
    assert requirement.specifier.contains(pins()[requirement.name])


def test_packaging_presets_are_the_ones_tested_here() -> None:
    assert preset_names(presets_folder()) == sorted(PRESETS)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("suffix", ["", ".toml"])
def test_packaging_preset_is_found_from_any_folder(
    preset: str, suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert find(preset + suffix, presets_folder()) == presets_folder() / f"{preset}.toml"


@pytest.mark.parametrize("preset", PRESETS)
def test_packaging_preset_is_listed_with_its_purpose(preset: str) -> None:
    [line] = [line for line in listing(presets_folder()).splitlines() if line.split()[0] == preset]
    assert len(line.split()) > 5


@pytest.mark.parametrize("preset", PRESETS)
def test_packaging_preset_runs_on_the_ranks_it_names(preset: str) -> None:
    ranks = ranks_of(preset)
    settings = settings_of(preset, world_size=ranks)
    shape = settings.shape(BYTE_VOCABULARY)
    assert f"= {ranks} ranks" in describe(settings, settings.degrees(ranks, shape), shape)


@pytest.mark.parametrize(
    ("preset", "world_size", "sections"),
    [
        ("llama_128k", 8, {}),
        ("llama_128k", 8, {"activation_checkpoint": {"mode": "full"}}),
        ("llama_128k", 8, {"activation_checkpoint": {"mode": "none"}}),
        ("llama_128k", 8, {"training": {"global_batch_size": 4}}),
        ("llama_128k", 8, {"training": {"global_batch_size": 4}, "parallelism": CUT_EACH}),
        ("llama_1m", 32, {}),
        ("llama_1m", 32, {"activation_checkpoint": {"mode": "full"}}),
        ("llama_1m", 32, {"activation_checkpoint": {"mode": "full"}, "training": {"seq_len": 2 * 1_048_576}}),
        ("llama_1m", 32, {"training": {"global_batch_size": 4}}),
        ("llama_1m", 32, {"training": {"global_batch_size": 4}, "parallelism": CUT_EACH}),
        ("llama_70b_128k", 64, {}),
        ("llama_70b_128k", 32, {}),
        ("llama_70b_128k", 64, {"training": {"global_batch_size": 4}}),
        ("llama_70b_128k", 64, {"training": {"global_batch_size": 4}, "parallelism": CUT_EACH}),
    ],
)
def test_packaging_preset_says_how_much_memory_it_needs(preset: str, world_size: int, sections: dict) -> None:
    settings = settings_of(preset, world_size=world_size)
    for name, keys in sections.items():
        settings = replace(settings, **{name: replace(getattr(settings, name), **keys)})
    shape = settings.shape(settings.known_vocabulary)
    need = needed(settings, settings.degrees(world_size, shape), shape, "cuda")
    assert human.size(need.total) in (presets_folder() / f"{preset}.toml").read_text()


@pytest.mark.parametrize("preset", PRESETS)
def test_packaging_preset_writes_to_a_folder_of_its_own(preset: str) -> None:
    assert settings_of(preset, world_size=ranks_of(preset)).job.name == preset


@pytest.mark.parametrize(
    ("preset", "seq_len", "parameters", "ring", "ulysses", "tp"),
    [
        ("debug_4d", 1024, None, 2, 2, 2),
        ("llama_128k", 131_072, 8_030_261_248, 1, 8, 1),
        ("llama_1m", 1_048_576, 8_030_261_248, 4, 8, 1),
        ("llama_70b_128k", 131_072, 70_553_706_496, 4, 1, 8),
    ],
)
def test_packaging_preset_is_what_its_name_says(
    preset: str, seq_len: int, parameters: int | None, ring: int, ulysses: int, tp: int
) -> None:
    ranks = ranks_of(preset)
    settings = settings_of(preset, world_size=ranks)
    shape = settings.shape(BYTE_VOCABULARY)
    degrees = settings.degrees(ranks, shape)
    assert settings.training.seq_len == seq_len
    assert (degrees.ring, degrees.ulysses, degrees.tp) == (ring, ulysses, tp)
    assert parameters is None or f"{parameters:,} parameters" in describe(settings, degrees, shape)


def test_packaging_debug_is_a_ring_of_two_on_the_built_in_text() -> None:
    settings = settings_of("debug", world_size=ranks_of("debug"))
    assert ranks_of("debug") == 2
    assert (settings.parallelism.context_parallel_method, settings.parallelism.ring_degree) == ("ring", 2)
    assert (settings.training.seq_len, settings.data.source) == (2048, "stdlib")


@pytest.mark.parametrize("preset", ["llama_128k", "llama_1m", "llama_70b_128k"])
def test_packaging_large_preset_does_not_accumulate(preset: str) -> None:
    # FSDP2 keeps whole gradients in fp32 between micro-batches: 32 GB that these presets have no room for.
    ranks = ranks_of(preset)
    settings = settings_of(preset, world_size=ranks)
    degrees = settings.degrees(ranks, settings.shape(BYTE_VOCABULARY))
    assert settings.global_batch_size(degrees) == settings.training.local_batch_size * degrees.data


@pytest.mark.parametrize("preset", PRESETS)
def test_packaging_preset_holds_out_a_window_of_the_built_in_text(preset: str) -> None:
    # A Python without its own tests, as some distributions ship it, has about 11 million bytes of library.
    settings = settings_of(preset, world_size=ranks_of(preset))
    assert settings.data.validation_fraction * 11_000_000 > settings.training.seq_len
