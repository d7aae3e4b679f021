"""Where a run writes is tried before the run."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cptrain.train.folder import make_folders
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
