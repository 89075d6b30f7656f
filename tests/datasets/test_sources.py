"""datasets/sources.py: what is missing, unused, excluded or without effect is said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from rlfseg.config import PrepareConfig
from rlfseg.datasets import exclude, records, sources
from rlfseg.errors import ConfigError, DataError

SQUARE = [2, 2, 2, 6, 6, 6, 6, 2]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """COCO's layout: ten annotated pictures, of which 3 are missing, and 5 that no list names."""
    (tmp_path / "val2017").mkdir()
    for n in (*range(1, 8), *range(20, 25)):
        Image.new("RGB", (10, 8)).save(tmp_path / "val2017" / f"{n}.jpg")
    (tmp_path / "val2017" / "readme.txt").touch()
    rows = range(1, 11)
    tree = {
        "images": [{"id": n, "file_name": f"{n}.jpg", "width": 10, "height": 8} for n in rows],
        "annotations": [{"image_id": n, "category_id": 1, "segmentation": [SQUARE]} for n in rows],
        "categories": [{"id": 1, "name": "dog"}],
    }
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "mine_a.json").write_text(json.dumps(tree))
    return tmp_path


def settings(root: Path, **more: Any) -> PrepareConfig:
    path = str(root / "annotations" / "mine_a.json")
    known = {"out": "unused", "source": "coco", "path": path, "images": str(root / "val2017"), "on_error": "skip"}
    return PrepareConfig(**known | more)


@pytest.mark.fault("ingest-03", part="survey")
def test_missing_and_unused_pictures_are_counted_and_named(root: Path) -> None:
    survey = sources.survey(settings(root))
    assert [r.id for r in survey.records] == [str(n) for n in range(1, 8)]
    assert {k: v.rsplit("/", 1)[1] for k, v in survey.refused.items()} == {
        str(n): f"{n}.jpg: no such file" for n in (8, 9, 10)
    }
    assert sources.notes(survey.report) == (
        "missing: 3 pictures are not on disk: 10.jpg, 8.jpg, 9.jpg",
        "unused: 5 pictures that no list names: 20.jpg, 21.jpg, 22.jpg, 23.jpg, 24.jpg",
    )
    with pytest.raises(DataError, match=r"3 of 10 pictures can't be had: .*8\.jpg: no such file, .*--on_error skip"):
        sources.survey(settings(root, on_error="stop"))


def test_no_picture_at_all(root: Path) -> None:
    (root / "empty").mkdir()
    with pytest.raises(DataError, match=r"no picture is left to convert: .*1\.jpg: no such file, .* and 5 more"):
        sources.survey(settings(root, images=str(root / "empty")))


def test_excluded_pictures_are_left_out(root: Path) -> None:
    (root / "leak.txt").write_text("2\n\n 3 \n999\n")
    for given, asked in ((str(root / "leak.txt"), 3), ("2,3", 2), (" 2, 3 ", 2)):
        survey = sources.survey(settings(root, exclude_ids=given))
        assert [r.id for r in survey.records] == ["1", "4", "5", "6", "7"]
        assert survey.report["excluded"] == ["2", "3"]
        assert f"exclude_ids: 2 of {asked} ids are in this set" in sources.notes(survey.report)
    with pytest.raises(DataError, match="no picture is left to convert: all are excluded"):
        sources.survey(settings(root, exclude_ids=",".join(str(n) for n in range(1, 11))))


def test_a_list_is_of_the_kind_that_most_of_it_is(root: Path) -> None:
    # As in PhraseCut: 103 is COCO's id of picture 3 and the id of another.
    made = [records.Record(id=i, image=f"/x/{i}.jpg", size=None, split="", phrases=(), source="", coco_id=c)
            for i, c in (("1", "101"), ("2", "102"), ("3", "103"), ("103", None), ("4", "30"))]  # fmt: skip
    for given, ids, note in (
        ("103,1", {"103", "1"}, "2 of 2 ids"),
        ("103,101", {"3", "1"}, "2 of 2 COCO ids"),
        ("103.jpg,1.jpg", {"103", "1"}, "2 of 2 file names"),
        ("000000000030.jpg,30,COCO_train2014_000000000103.jpg", {"4", "3"}, "3 of 3 COCO ids"),
    ):
        assert exclude.exclusion(made, given) == (ids, f"exclude_ids: {note} are in this set")


def test_a_list_that_excludes_nothing_says_so(root: Path) -> None:
    for text, told in (("dog.jpg\ncat.jpg\n", "those given like 'cat.jpg'"), ("\n", "the list is empty")):
        (root / "leak.txt").write_text(text)
        (note,) = [n for n in sources.notes(sources.survey(settings(root, exclude_ids=str(root / "leak.txt"))).report)
                   if n.startswith("exclude_ids")]  # fmt: skip
        assert f"exclude_ids: 0 of {len(text.split())} ids are in this set; NOTHING is excluded" in note
        assert note.endswith(f"ids here are like '1', {told}")


@pytest.mark.parametrize("given", ["leek.txt", "2,three", "4" * 300, ",".join(["7"] * 200 + ["x"]), "a\0b", "\ud800"])
def test_what_is_neither_a_file_nor_an_id_is_a_slip(root: Path, given: str) -> None:
    with pytest.raises(ConfigError, match=r"exclude_ids: '.* is neither a file nor the id of a picture in this set"):
        sources.survey(settings(root, exclude_ids=given))


def test_a_long_line_of_ids_is_no_file_name(root: Path) -> None:
    ids = ",".join(["2"] * 500)
    assert sources.survey(settings(root, exclude_ids=ids)).report["excluded"] == ["2"]


def test_a_list_that_is_not_utf_8_is_named(root: Path) -> None:
    (root / "leak.txt").write_bytes("café.jpg\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"leak\.txt: can't be read \('utf-8' codec"):
        sources.survey(settings(root, exclude_ids=str(root / "leak.txt")))
    (root / "leak.txt").write_bytes(b"\xef\xbb\xbf2\r\n3\r\n")  # as Windows writes it
    assert sources.survey(settings(root, exclude_ids=str(root / "leak.txt"))).report["excluded"] == ["2", "3"]


def test_settings_without_effect_are_refused(root: Path) -> None:
    with pytest.raises(ConfigError, match="rasteriser: has no effect for source cocostuff"):
        sources.survey(settings(root, source="cocostuff", rasteriser="pil"))
    with pytest.raises(ConfigError, match="images: has no effect for source folder"):
        sources.survey(settings(root, source="folder"))
    with pytest.raises(ConfigError, match=r"path: null; source coco needs one, see docs/data\.md"):
        sources.survey(settings(root, path=None))
    with pytest.raises(ConfigError, match=r"splits: no picture of .* is in val; it has a"):
        sources.survey(settings(root, splits=("val",)))


def test_the_rule_is_the_sets_own_unless_told(root: Path) -> None:
    rules = [sources.survey(settings(root, rasteriser=r)).attributes["rasteriser"] for r in ("auto", "pil")]
    assert rules == ["pycocotools", "pil"]


def test_names_are_cut_off_after_a_few() -> None:
    report = {
        "name": "x",
        "splits": {"": {"found": {"images": 7, "phrases": None}, "official": {"images": 9, "phrases": 9}}},
        "missing": [f"{n}.jpg" for n in range(7)],
        "unused": {"count": 70, "first": ["a"] * 5},
        "excluded": [],
        "exclusion": "",
        "without_phrases": 0,
        "skipped": {f"{n}: task": "why" for n in range(6)},
        "partly": {"7: task": "1 objects"},
    }
    assert sources.notes(report) == (
        "x is not the official split: 7 images instead of 9",
        "missing: 7 pictures are not on disk: 0.jpg, 1.jpg, 2.jpg, 3.jpg, 4.jpg and 2 more",
        "unused: 70 pictures that no list names: a, a, a, a, a and 65 more",
        "skipped: 6 phrases can't be drawn: 0: task (why), 1: task (why), 2: task (why), 3: task (why), 4: task (why) "
        "and 1 more",
        "partly: 1 phrases are drawn without a part: 7: task (1 objects)",
    )
