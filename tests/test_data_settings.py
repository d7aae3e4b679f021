from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from cptrain.data.settings import DataConfig, TokenizerConfig


@pytest.mark.parametrize(
    "config",
    [
        DataConfig(),
        DataConfig(packing="best_fit", long_documents="drop"),
        TokenizerConfig(),
        TokenizerConfig(name="a.b:make", path="x"),
    ],
)
def test_data_settings_valid_ones_have_no_problems(config: DataConfig | TokenizerConfig) -> None:
    assert list(config.problems()) == []


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"paths": ("a.txt",)}, "paths"),
        ({"source": "text"}, "paths"),
        ({"source": "text", "paths": ("",)}, "paths"),
        ({"text_field": ""}, "text_field"),
        ({"validation_fraction": 1.0}, "validation_fraction"),
        ({"validation_fraction": -0.1}, "validation_fraction"),
        ({"seed": -1}, "seed"),
        ({"long_documents": "drop"}, "long_documents"),
        ({"num_workers": -1}, "num_workers"),
        ({"prefetch_factor": 0}, "prefetch_factor"),
        ({"cache_dir": ""}, "cache_dir"),
    ],
)
def test_data_settings_wrong_value_is_named(values: dict[str, Any], key: str) -> None:
    assert [problem.key for problem in DataConfig(**values).problems()] == [key]


@pytest.mark.parametrize(
    ("values", "key"), [({"path": "x"}, "path"), ({"name": "bpe"}, "name"), ({"name": "a.b:"}, "name")]
)
def test_data_settings_wrong_tokenizer_is_named(values: dict[str, Any], key: str) -> None:
    assert [problem.key for problem in TokenizerConfig(**values).problems()] == [key]


def test_data_settings_report_all_problems_at_once() -> None:
    config = DataConfig(source="jsonl", num_workers=-1, validation_fraction=2.0)
    assert [problem.key for problem in config.problems()] == ["paths", "validation_fraction", "num_workers"]


def test_data_settings_seed_auto_is_the_training_seed() -> None:
    assert (DataConfig().resolved_seed(7), DataConfig(seed=3).resolved_seed(7)) == (7, 3)


@pytest.mark.parametrize("mask", [True, False])
def test_data_settings_positions_auto_follow_the_mask(mask: bool) -> None:
    values = [DataConfig(document_mask=mask, reset_positions=reset) for reset in ("auto", True, False)]
    assert [config.resolved_reset_positions() for config in values] == [mask, True, False]


def test_data_settings_import_neither_torch_nor_numpy() -> None:
    code = "import sys, cptrain.data.settings; assert not {'torch', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
