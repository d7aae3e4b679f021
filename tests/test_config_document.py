"""Resolved settings as TOML that loads again."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path
from typing import Any, get_args, get_origin

import pytest
import tomli
from test_config_schema import Settings, StageConfig, TrainingConfig

from cptrain.config import dump, load
from cptrain.config.schema import fields_of
from cptrain.config.values import members

TEXTS = [
    "",
    "a b",
    'q"q',
    "b\\s",
    "line\nline\r\n",
    "tab\t",
    "\x00\x1f\x7f\x85",
    "# no [comment]",
    "ünï→😀",
    "'''",
    '"""',
    "\\u0041",
]
FLOATS = [0.0, -0.0, 1.0, -1.5, 1e-300, 1e22, 5e-05, float("inf"), float("-inf"), 0.1]


def random_value(hint: Any, rng: random.Random) -> Any:
    hint = rng.choice(members(hint))
    args = get_args(hint)
    if dataclasses.is_dataclass(hint):
        assert isinstance(hint, type)
        return hint(**{field.name: random_value(inner, rng) for field, inner in fields_of(hint)})
    if get_origin(hint) is tuple:
        items = [args[0]] * rng.randrange(4) if args[-1] is Ellipsis else args
        return tuple(random_value(item, rng) for item in items)
    if args:
        return rng.choice(args)
    choices = {bool: [True, False], int: [0, -1, 2**62, 131072], float: FLOATS, str: TEXTS}[hint]
    return rng.choice(choices)


@pytest.fixture
def load_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Binds a TOML text; the toy checks are off, because random values break them."""
    for section in (Settings, TrainingConfig, StageConfig):
        monkeypatch.setattr(section, "problems", lambda *_: iter(()))
    monkeypatch.setattr("test_config_schema.DataConfig.problems", lambda *_: iter(()))

    def load_text(text: str) -> Any:
        path = tmp_path / "resolved.toml"
        path.write_text(text, encoding="utf-8", newline="")
        return load(Settings, [path])

    return load_text


@pytest.mark.parametrize("seed", range(60))
def test_config_document_loads_to_the_same_values(seed: int, load_text: Any) -> None:
    settings = random_value(Settings, random.Random(seed))
    again = load_text(dump(settings))
    assert again == settings
    assert repr(again) == repr(settings)  # equality does not see -0.0, nor 1 in place of 1.0 or True
    assert dump(again) == dump(settings)


def test_config_document_keeps_nan(load_text: Any) -> None:
    settings = dataclasses.replace(Settings(), training=TrainingConfig(max_norm=float("nan")))
    assert repr(load_text(dump(settings))) == repr(settings)


def test_config_document_holds_every_key_with_its_help() -> None:
    stages = (StageConfig(steps=1), StageConfig(steps=2))
    text = dump(dataclasses.replace(Settings(), training=TrainingConfig(stages=stages)))
    assert text.startswith(
        "# How long and on how much.\n"
        "[training]\n"
        "seq_len = 2048  # tokens per sequence, over all ranks\n"
        "steps = 1000  # optimizer steps in the run\n"
        "max_norm = 1.0  # largest gradient norm\n"
        "\n"
        "[[training.stages]]\n"
        "steps = 1  # steps this stage lasts\n"
        "seq_len = 1024  # tokens per sequence\n"
        "\n"
        "[[training.stages]]\n"
        "steps = 2  # steps this stage lasts\n"
        "seq_len = 1024  # tokens per sequence\n"
        "\n"
        "# how the ranks are divided.\n"
        "[parallelism]\n"
    )
    assert text.endswith("\n") and not text.endswith("\n\n")


def test_config_document_of_defaults_names_every_key() -> None:
    parsed = tomli.loads(dump(Settings()))
    assert parsed["training"]["stages"] == []
    for name, section in dataclasses.asdict(Settings()).items():
        assert parsed[name].keys() == section.keys()
