"""datasets/paper.py: files as the paper's authors write them, and ours, come through as they are."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest

from rlfseg import hdf5
from rlfseg.config import PrepareConfig
from rlfseg.datasets import sources
from rlfseg.errors import DataError
from rlfseg.hdf5 import Labelled, Sample, child
from tests.test_preflight import child_that

IMAGE = np.arange(60, dtype=np.uint8).reshape(4, 5, 3)
MASK = np.eye(4, 5, dtype=np.uint8)


@pytest.fixture
def files(tmp_path: Path) -> Path:
    with h5py.File(tmp_path / "theirs.h5", "w") as file:
        file["2328797/image"] = IMAGE
        file["2328797/mask/white/black dog"] = MASK  # h5py makes a group of `white`
        file["2328797/mask/hill"] = MASK * 255
    phrase = Labelled(caption="/", mask=MASK, instances=MASK[None], task="7__1")
    hdf5.write_shard(tmp_path / "ours.hdf5", [Sample(id="a/b", image=IMAGE, phrases=(phrase,), coco_id="9")])
    return tmp_path


def settings(path: Path, on_error: str = "stop") -> PrepareConfig:
    return PrepareConfig(out="unused", source="hdf5", path=str(path), on_error=on_error)  # type: ignore[arg-type]


def test_both_forms_come_through(files: Path) -> None:
    survey = sources.survey(settings(files))
    load = sources.loader("hdf5")
    found = {r.id: load(type(r).from_json(r.to_json()), survey.rule).sample for r in survey.records}
    assert sorted(found) == ["2328797", "a/b"]
    assert {p.caption for p in found["2328797"].phrases} == {"white/black dog", "hill"}
    assert all(np.array_equal(p.mask, MASK) for s in found.values() for p in s.phrases)
    (phrase,) = found["a/b"].phrases
    assert (phrase.task, found["a/b"].coco_id) == ("7__1", "9")
    assert np.array_equal(phrase.instances, MASK[None])
    assert survey.report["splits"][""]["found"] == {"images": 2, "phrases": 3}


def test_a_damaged_file_is_named(files: Path) -> None:
    (files / "half.h5").write_bytes((files / "theirs.h5").read_bytes()[:900])
    with pytest.raises(DataError, match=r"1 of 3 pictures can't be had: .*half\.h5: not a whole HDF5 file"):
        sources.survey(settings(files))
    survey = sources.survey(settings(files, "skip"))
    assert list(survey.refused) == [str(files / "half.h5")]
    assert len(survey.records) == 2


def test_what_files_say_of_themselves_is_kept(files: Path) -> None:
    """And numbers, other attributes and those that are no text are not taken for it."""
    assert sources.survey(settings(files)).attributes == {"source": "HDF5"}
    told = {"source": "PhraseCut", "rasteriser": "pil", "text": "sent"}
    for name, rule in (("ours.hdf5", "pil"), ("theirs.h5", "pycocotools")):
        with h5py.File(files / name, "a") as file:
            file.attrs.update({**told, "rasteriser": rule, "more": "x"})
    assert sources.survey(settings(files / "ours.hdf5")).attributes == told
    assert sources.survey(settings(files)).attributes == told | {"rasteriser": "pil; pycocotools"}
    with h5py.File(files / "ours.hdf5", "a") as file:
        file.attrs.update({"source": 7, "rasteriser": ["pil", "pil"]})
    assert sources.survey(settings(files / "ours.hdf5")).attributes == {"source": "HDF5", "text": "sent"}


def test_nothing_is_taken_from_a_file_that_crashed_its_reader(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its first sample could be read; who opens it again may crash."""
    images = [Sample(id=i, image=IMAGE, phrases=()) for i in ("0", "poison", "z")]
    hdf5.write_shard(files / "bad.h5", images)
    monkeypatch.setattr(child, "CHILD", child_that("os.abort()"))
    survey = sources.survey(settings(files, "skip"))
    assert sorted(r.id for r in survey.records) == ["2328797", "a/b"]
    bad = files / "bad.h5"
    assert sorted(survey.refused) == [str(bad), f"{bad} [0]"]
    assert all(f"{bad}: reading its sample 'poison' crashed (SIGABRT)" in why for why in survey.refused.values())


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no HDF5 files there"):
        sources.survey(settings(tmp_path))
    (tmp_path / "a.h5").write_text("x")
    with pytest.raises(DataError, match=r"no picture is left to convert: .*a\.h5: not a whole HDF5 file"):
        sources.survey(settings(tmp_path, "skip"))


def test_one_id_in_two_files_is_refused(files: Path) -> None:
    (files / "copy.h5").write_bytes((files / "theirs.h5").read_bytes())
    with pytest.raises(DataError, match="the id '2328797' is there twice"):
        sources.survey(settings(files))
