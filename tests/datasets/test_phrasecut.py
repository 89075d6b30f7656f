"""datasets/phrasecut.py: every task of the schema's real files, and the traps of the data set."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from rlfseg import hdf5
from rlfseg.config import PrepareConfig
from rlfseg.datasets import phrasecut, records, sources
from rlfseg.errors import BadSample, ConfigError, DataError

Tree = Any
SQUARE = [[2.9, 2.9], [2.9, 6.9], [6.9, 6.9], [6.9, 2.9]]


def task(image: int, anns: str, phrase: str, polygons: Tree) -> Tree:
    structure = {"name": phrase, "attributes": [], "relation_ids": [], "relation_descriptions": [], "type": "name"}
    return {
        "task_id": f"{image}__{anns}",
        "image_id": image,
        "ann_ids": [int(a) for a in anns.split("_")],
        "Polygons": polygons,
        "instance_boxes": [[0, 0, 1, 1]] * len(polygons),
        "phrase": phrase,
        "phrase_structure": structure,
    }


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Three pictures of 10 x 8 pixels: two of train, one of test."""
    (tmp_path / "images").mkdir()
    pictures = [(1, 5001, "train"), (2, None, "train"), (3, None, "test")]
    for image, _, _ in pictures:
        Image.new("L", (10, 8), image).save(tmp_path / "images" / f"{image}.jpg")  # grey, as some are
    (tmp_path / "image_data_split.json").write_text(
        json.dumps([{"image_id": i, "coco_id": c, "width": 10, "height": 8, "split": s} for i, c, s in pictures])
    )
    write(
        tmp_path,
        "train",
        [
            task(1, "11_12", "wet hill", [[SQUARE], [SQUARE, [[0, 0], [1, 0], [1, 1]]]]),
            task(2, "21", "hill", [[SQUARE]]),
            task(1, "13", "wet hill", [[[[0, 0], [9, 0], [9, 1]]]]),
        ],
    )
    write(tmp_path, "test", [task(3, "31", "man's hat", [[SQUARE]])])
    return tmp_path


def write(root: Path, split: str, tasks: Tree) -> None:
    (root / f"refer_{split}.json").write_text(json.dumps(tasks))


def settings(root: Path, **more: Any) -> PrepareConfig:
    return PrepareConfig(out="unused", source="phrasecut", path=str(root), **more)


def as_phrasecut_draws(polygons: Tree, width: int, height: int) -> NDArray[np.uint8]:
    """The mask of its own evaluator, `utils/data_transfer.py`, written down anew."""
    mask = np.zeros((height, width), np.uint8)
    for polygon in polygons:
        if len(polygon) < 2:
            continue
        canvas = Image.new("L", (width, height), 0)
        ImageDraw.Draw(canvas).polygon([(int(x), int(y)) for x, y in polygon], outline=1, fill=1)
        mask |= np.asarray(canvas)
    return mask


def test_every_task_of_the_schemas_files_has_the_evaluators_mask(shared_data: Path, tmp_path: Path) -> None:
    root = shared_data / "native_formats" / "phrasecut_schema"
    pictures = {p["image_id"]: p for p in json.loads((root / "image_data_split.json").read_text())}
    tasks = {s: json.loads((root / f"refer_{s}.json").read_text()) for s in ("train", "val", "test", "miniv")}
    survey = sources.survey(settings(root))
    hdf5.write_shard(tmp_path / "0.h5", (records.load(r, survey.rule).sample for r in survey.records))
    reader = hdf5.Reader(tmp_path)
    assert survey.rule == "pil"
    seen = 0
    for split, listed in tasks.items():
        ids = list(dict.fromkeys(str(t["image_id"]) for t in listed))
        assert [r.id for r in survey.records if r.split == split] == ids
        for one in listed:
            sample = reader.sample("0.h5", str(one["image_id"]))
            picture = pictures[one["image_id"]]
            (phrase,) = [p for p in sample.phrases if p.task == one["task_id"]]
            objects = [as_phrasecut_draws(o, picture["width"], picture["height"]) for o in one["Polygons"]]
            assert phrase.caption == one["phrase"]
            assert np.array_equal(phrase.instances, [o for o in objects if o.any()])
            assert np.array_equal(phrase.mask, np.any(objects, axis=0))
            assert sample.coco_id == str(picture["coco_id"])
            seen += 1
    assert seen == survey.phrases.num_rows == 224
    assert [json.loads(s) for s in survey.phrases["structure"].to_pylist()] == [
        t["phrase_structure"] for listed in tasks.values() for t in listed
    ]


def test_one_phrase_asked_twice_stays_two_and_grey_becomes_rgb(root: Path) -> None:
    first, second = sources.survey(settings(root, splits=("train",))).records
    sample = records.load(first, "pil").sample
    assert [(p.caption, p.task) for p in sample.phrases] == [("wet hill", "1__11_12"), ("wet hill", "1__13")]
    assert sample.image.shape == (8, 10, 3)
    assert not np.array_equal(sample.phrases[0].mask, sample.phrases[1].mask)
    assert sample.phrases[0].instances is not None
    assert sample.phrases[0].instances.sum(axis=(1, 2)).tolist() == [25, 28]  # the second of two polygons
    assert (first.coco_id, second.coco_id) == ("5001", None)


def test_splits_are_files(root: Path) -> None:
    assert [r.id for r in sources.survey(settings(root, splits=("test",))).records] == ["3"]
    assert [r.split for r in sources.survey(settings(root)).records] == ["train", "train", "test"]
    with pytest.raises(ConfigError, match=r"splits: .* has refer_\*\.json of train, test, not of \['val', 'miniv'\]"):
        sources.survey(settings(root, splits=("val", "miniv")))


@pytest.mark.fault("ingest-04", part="prepare")
@pytest.mark.parametrize("shapeless", [[], [[]], [[[]]], [[[[1, 2]]]], [[[1, 2, 3, 4]]], [7], [[7]]])
def test_a_task_without_a_shape_is_named_and_the_others_stay(root: Path, shapeless: Tree) -> None:
    write(
        root,
        "test",
        [task(3, "31", "hat", shapeless), task(3, "32", "coat", [[SQUARE]]), task(3, "33", "x", shapeless)],
    )
    (record,) = sources.survey(settings(root, splits=("test",))).records
    sample, skipped, partly = records.load(record, "pil")
    assert [p.caption for p in sample.phrases] == ["coat"]
    assert (list(skipped), partly) == (["3: 3__31", "3: 3__33"], {})


def test_objects_are_named_by_their_annotations(root: Path) -> None:
    write(root, "test", [task(3, "31_32", "hats", [[SQUARE], []]) | {"ann_ids": [31, 32]}])
    (record,) = sources.survey(settings(root, splits=("test",))).records
    assert records.load(record, "pil").partly == {"3: 3__31_32": "1 objects (annotation 32)"}


def test_lone_surrogates_are_refused_with_their_picture_alone(root: Path) -> None:
    odd = task(3, "31", "hat", [[SQUARE]]) | {"task_id": "3__\ud800"}
    typed = task(1, "14", "coat", [[SQUARE]]) | {"phrase_structure": {"name": "\udc80", "type": "\ud801"}}
    write(root, "test", [odd, typed])
    survey = sources.survey(settings(root, splits=("test",)))
    assert survey.phrases is not None
    assert survey.phrases["task"].to_pylist() == ["3__\\ud800", "1__14"]
    assert survey.phrases["phrase_type"].to_pylist()[1] == "\\ud801"
    with pytest.raises(BadSample, match=r"the task '3__\\ud800' isn't Unicode text"):
        records.load(survey.records[0], "pil")
    assert len(records.load(survey.records[1], "pil").sample.phrases) == 1


@pytest.mark.fault("ingest-01")
def test_a_list_cut_short_is_told_loudly(root: Path) -> None:
    # PhraseCutDataset/issues/1: a valid list of fewer items.
    survey = sources.survey(settings(root, splits=("train",)))
    assert sources.notes(survey.report) == (
        "train is not the official split: 2 images instead of 71,746 and 3 phrases instead of 310,816",
    )
    path = root / "refer_train.json"
    path.write_text(path.read_text()[:-100])
    with pytest.raises(DataError, match=r"refer_train\.json: broken after 2 whole items .*was it cut short\?"):
        sources.survey(settings(root, splits=("train",)))


def test_an_official_split_is_not_complained_about(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(phrasecut, "OFFICIAL", {"train": records.Counts(2, 3), "test": records.Counts(1, 1)})
    assert sources.notes(sources.survey(settings(root)).report) == ()


def test_a_picture_of_another_size_is_refused_by_name(root: Path) -> None:
    # As with 17 pictures of the real set.
    Image.new("RGB", (11, 8)).save(root / "images" / "2.jpg")
    first, second = sources.survey(settings(root, splits=("train",))).records
    records.load(first, "pil")
    with pytest.raises(BadSample, match=r"2\.jpg \[2\]: is 11 x 8 pixels as displayed; .*train\.json says 10 x 8"):
        records.load(second, "pil")


def test_the_older_name_of_the_list_of_pictures(root: Path) -> None:
    (root / "image_data_split.json").rename(root / "image_data_split3000.json")
    assert len(sources.survey(settings(root)).records) == 3
    (root / "image_data_split3000.json").unlink()
    with pytest.raises(DataError, match=r"has neither image_data_split\.json nor image_data_split3000\.json"):
        sources.survey(settings(root))


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda t: t.pop("Polygons"), r"refer_test\.json, \[0\]: 'Polygons' must be a list, this is None"),
        (lambda t: t.update(Polygons={}), r"'Polygons' must be a list, this is {}"),
        (lambda t: t.update(phrase=None), r"'phrase' must be text, this is None"),
        (lambda t: t.update(image_id="3"), r"'image_id' must be a whole number, this is '3'"),
        (lambda t: t.update(image_id=True), r"'image_id' must be a whole number, this is True"),
        (lambda t: t.update(image_id=9), r"task 3__31: no picture of the list has id 9"),
        (lambda t: t.update(task_id=7), r"'task_id' must be text, this is 7"),
    ],
)
def test_a_bad_task_is_named(root: Path, spoil: Callable[[Tree], object], reason: str) -> None:
    one = task(3, "31", "hat", [[SQUARE]])
    spoil(one)
    write(root, "test", [one])
    with pytest.raises(DataError, match=reason):
        sources.survey(settings(root, splits=("test",)))


def test_no_data_set_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has refer_\*\.json of no split"):
        sources.survey(settings(tmp_path))
