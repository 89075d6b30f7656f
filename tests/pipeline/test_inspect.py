"""`rlfseg inspect` counts every sample once; training says what its latents are not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from rlfseg import hdf5
from rlfseg.config import InspectConfig, TrainConfig
from rlfseg.errors import ConfigError
from rlfseg.hdf5 import Labelled, Sample
from rlfseg.pipeline import inspect
from rlfseg.pipeline.folders import begin, finish
from rlfseg.pipeline.sources import Latents


def sample(name: str) -> Sample:
    grey = np.full((8, 8, 3), 90, np.uint8)
    return Sample(id=name, image=grey, phrases=(Labelled(caption="dog", mask=np.eye(8, dtype=np.uint8)),))


def test_an_id_in_two_files_is_one_row_in_and_one_refused(tmp_path: Path) -> None:
    hdf5.write_shard(tmp_path / "a.h5", [sample("1"), sample("2")])
    hdf5.write_shard(tmp_path / "b.h5", [sample("2")])
    files = (str(tmp_path / "a.h5"), str(tmp_path / "b.h5"))
    summary = inspect.run(InspectConfig(files=files, out=str(tmp_path / "out")))
    assert (summary.rows_in, summary.rows_out, len(summary.refused)) == (3, 2, 1)


def test_training_on_a_folder_of_another_stage_is_refused_in_a_line(tmp_path: Path) -> None:
    begin(tmp_path, {"samples": "elsewhere"})
    finish(tmp_path, {"samples": "elsewhere"}, {"rows_in": 0, "rows_out": 0, "refused": {}})
    with pytest.raises(ConfigError, match="was not written by `encode`"):
        Latents(tmp_path, TrainConfig(out="x", latents=str(tmp_path)))
