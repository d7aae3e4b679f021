"""Where a run writes is tried before the run, and a resumed model that is another one in silence is named."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest

from cptrain.models.settings import ModelConfig
from cptrain.train.folder import make_folders, plain_shape, warn_of_other_shape
from cptrain.train.settings import TrainSettings


@pytest.mark.parametrize(("section", "key"), [("job", "dump_folder"), ("checkpoint", "folder")])
def test_train_folder_that_cannot_be_written_is_named_with_its_key(tmp_path, section, key):
    settings = TrainSettings()
    settings = replace(settings, job=replace(settings.job, dump_folder=str(tmp_path / "runs")))
    make_folders(settings)
    (tmp_path / "file").touch()
    beyond = str(tmp_path / "file" / "folder")
    settings = replace(settings, **{section: replace(getattr(settings, section), **{key: beyond})})
    with pytest.raises(ValueError, match=f"Not a directory; set {section}.{key} to a folder that you may write"):
        make_folders(settings)


def test_train_folder_of_another_shape_is_warned_of_by_key(caplog):
    shape = TrainSettings(model=ModelConfig(flavor="llama3.2-1b")).shape(512)
    with caplog.at_level(logging.WARNING):
        warn_of_other_shape(plain_shape(shape), plain_shape(shape))
        warn_of_other_shape(plain_shape(shape), {})
        assert not caplog.records
        warn_of_other_shape(plain_shape(replace(shape, rope_theta=2.0)), plain_shape(shape))
    (record,) = caplog.records
    assert record.getMessage().endswith(f": rope_theta = {shape.rope_theta} (here 2.0)")
