"""datasets/coco.py and cocostuff.py: real annotations against pycocotools' own reading, and label maps by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from rlfseg import hdf5
from rlfseg.config import PrepareConfig
from rlfseg.datasets import coco, cocostuff, records, sources
from rlfseg.errors import BadSample, ConfigError, DataError
from tests.blanks import complete

# pycocotools 2.0.11 hands NumPy 2 an array in the old way.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
Tree = Any
SQUARE = [2, 2, 2, 6, 6, 6, 6, 2]


def settings(path: Path, source: Any = "coco", **more: Any) -> PrepareConfig:
    return PrepareConfig(out="unused", source=source, path=str(path), **more)


def photos(shared_data: Path) -> Path:
    return shared_data / "coco_photos" / "images"


@pytest.mark.parametrize(
    ("split", "annotations", "crowds", "there"), [("val2017", 815, 11, 22), ("train2017", 705, 6, 19)]
)
def test_every_real_annotation_is_pycocotools_mask(
    shared_data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    split: str,
    annotations: int,
    crowds: int,
    there: int,
) -> None:
    """All 80 pictures of a file, blank where the photograph isn't at hand; drawn, written and read back."""
    path = shared_data / "coco_instances" / f"instances_{split}.json"
    truth = COCO(str(path))
    capsys.readouterr()
    sizes = {image["file_name"]: (image["width"], image["height"]) for image in truth.imgs.values()}
    folder = complete(tmp_path / "images", photos(shared_data), sizes)
    survey = sources.survey(settings(path, images=str(folder)))
    loaded = [records.load(records.Record.from_json(r.to_json()), survey.rule) for r in survey.records]
    assert [(one.skipped, one.partly) for one in loaded] == [({}, {})] * 80
    assert hdf5.write_shard(tmp_path / "0.h5", (one.sample for one in loaded)) == 80
    reader, seen = hdf5.Reader(tmp_path), []
    for image in truth.imgs:
        rows = truth.loadAnns(truth.getAnnIds(imgIds=image))
        sample = reader.verified("0.h5", str(image))
        names = {truth.cats[key]["name"] for key in {row["category_id"] for row in rows}}
        assert [p.caption for p in sample.phrases] == sorted(names, key=lambda n: truth.getCatIds(catNms=[n])[0])
        for phrase in sample.phrases:
            masks = [truth.annToMask(row) for row in rows if str(row["category_id"]) == phrase.task]
            assert np.array_equal(phrase.instances, masks)
            assert np.array_equal(phrase.mask, np.any(masks, axis=0))
        seen += rows
    assert len(seen) == len(truth.anns) == annotations
    assert sum(row["iscrowd"] for row in seen) == crowds
    assert sum((photos(shared_data) / name).is_file() for name in sizes) == there


def test_photographs_that_are_missing_are_counted(shared_data: Path) -> None:
    path = shared_data / "coco_instances" / "instances_val2017.json"
    survey = sources.survey(settings(path, images=str(photos(shared_data)), on_error="skip"))
    assert (len(survey.records), len(survey.refused)) == (22, 58)
    assert "missing: 58 pictures are not on disk" in "\n".join(sources.notes(survey.report))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """COCO's layout with two pictures of 10 x 8 pixels, one of them without annotations."""
    (tmp_path / "val2017").mkdir()
    (tmp_path / "annotations").mkdir()
    for image in (1, 2):
        Image.new("RGB", (10, 8)).save(tmp_path / "val2017" / f"{image:012}.jpg")
    return tmp_path


def tree(*annotations: Tree) -> Tree:
    return {
        "images": [{"id": n, "file_name": f"{n:012}.jpg", "width": 10, "height": 8} for n in (1, 2)],
        "annotations": list(annotations),
        "categories": [{"id": k, "name": n} for k, n in ((18, "dog"), (1, "t-shirt"), (92, "wall-other-merged"))],
    }


def row(category: int = 18, image: int = 1, **more: Tree) -> Tree:
    return {"id": 5, "image_id": image, "category_id": category, "segmentation": [SQUARE]} | more


def write(root: Path, content: Tree, name: str = "instances_val2017.json") -> Path:
    path = root / "annotations" / name
    path.write_text(json.dumps(content))
    return path


def test_pictures_are_found_in_cocos_layout_and_only_those_with_phrases_written(root: Path) -> None:
    survey = sources.survey(settings(write(root, tree(row(18), row(1), row(18)))))
    (record,) = survey.records
    found = [(e.caption, e.task, len(e.objects or ())) for e in record.phrases]
    assert found == [("t-shirt", "1", 1), ("dog", "18", 2)]
    assert (record.id, record.coco_id, record.split) == ("1", "1", "val2017")
    assert sources.notes(survey.report) == (
        "val2017 is not the official split: 2 images instead of 5,000",
        "without phrases: 1 pictures, not written",
    )


def test_panoptic_segments(root: Path) -> None:
    maps = root / "annotations" / "panoptic_val2017"
    maps.mkdir()
    ids = np.zeros((8, 10), np.int32)
    ids[:2], ids[2:4], ids[5:] = 70_001, 9, 300
    Image.fromarray(np.stack([ids % 256, ids // 256 % 256, ids // 65536], -1).astype(np.uint8)).save(maps / "1.png")
    segments = [{"id": i, "category_id": c, "iscrowd": 0} for i, c in ((70_001, 18), (9, 92), (300, 18))]
    annotation = {"image_id": 1, "file_name": "1.png", "segments_info": segments}
    survey = sources.survey(settings(write(root, tree(annotation), "panoptic_val2017.json")))
    (record,) = survey.records
    dog, wall = records.load(records.Record.from_json(record.to_json()), survey.rule).sample.phrases
    assert [(p.caption, p.task) for p in (dog, wall)] == [("dog", "18"), ("wall", "92")]
    assert np.array_equal(dog.instances, [ids == 70_001, ids == 300])
    assert np.array_equal(wall.mask, ids == 9)
    assert survey.attributes["source"] == "COCO panoptic"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ([], "must be an object with the lists images, annotations"),
        ({"images": [{}], "annotations": []}, r"images\[0\]: 'id' must be a whole number, this is None"),
        ({"images": [{"id": 1}] * 2, "annotations": []}, r"images\[0\]: 'file_name' must be text"),
        (tree(row(image=7)), r"annotations\[0\]: no image has id 7"),
        (tree(row(7)), r"annotations\[0\]: no category has id 7"),
        (tree(row(segmentation=None)), r"annotations\[0\]: 'segmentation' must be polygons or an RLE, this is None"),
        (tree(row(), {"image_id": 1, "category_id": 18}), r"annotations\[1\]: 'segmentation' must be"),
        ({**tree(row()), "images": tree()["images"] * 2}, r"images\[2\]: id 1 came before"),
        ({**tree(row()), "categories": [3]}, r"categories\[0\]: must be an object"),
        (tree({"image_id": 1, "file_name": "1.png", "segments_info": [7]}), r"segments_info\[0\]: must be an object"),
    ],
)
def test_a_bad_annotation_is_named(root: Path, content: Tree, reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        sources.survey(settings(write(root, content)))


@pytest.mark.fault("raster-01", part="annotation")
def test_what_cannot_be_drawn_is_named_by_its_annotation(root: Path) -> None:
    bad = ([], [[]], [[1, 1, 5, 5]])
    rows = [row(18, id=50 + n, segmentation=s) for n, s in enumerate(bad)] + [
        row(1, id=7),
        row(1, id=8, segmentation=[]),
    ]
    path = write(root, tree(*rows, row(92, segmentation=[[0, 0]])))
    (record,) = sources.survey(settings(path)).records
    sample, skipped, partly = records.load(records.Record.from_json(record.to_json()), "pycocotools")
    assert [p.caption for p in sample.phrases] == ["t-shirt"]
    assert skipped == {
        "1: 18": "no outline that covers a pixel (annotation 50, annotation 51, annotation 52)",
        "1: 92": "no outline that covers a pixel (annotation 5)",
    }
    assert partly == {"1: 1": "1 objects (annotation 8)"}


@pytest.mark.fault("raster-04", part="annotation")
def test_an_rle_that_does_not_add_up_is_named_by_its_annotation(root: Path) -> None:
    rle = {"size": [8, 10], "counts": [1, 2]}
    nameless = {"image_id": 1, "category_id": 18, "segmentation": rle}
    for bad, named in ((row(18, id=77, segmentation=rle), "annotation 77"), (nameless, r"annotation \[1\]")):
        (record,) = sources.survey(settings(write(root, tree(row(18), bad)))).records
        reason = rf"val2017\.json \[1\]: the phrase 'dog', 18, {named}: RLE counts \[1, 2\] don't describe a mask"
        with pytest.raises(BadSample, match=reason):
            records.load(record, "pycocotools")


def test_pictures_elsewhere_must_be_given(root: Path) -> None:
    path = write(root, tree(row()))
    (root / "val2017").rename(root / "photos")
    with pytest.raises(ConfigError, match=r"images: .*val2017 .* is no folder; give the pictures' own"):
        sources.survey(settings(path))
    with pytest.raises(ConfigError, match=r"images: .*nowhere is no folder"):
        sources.survey(settings(path, images=str(root / "nowhere")))
    assert len(sources.survey(settings(path, images=str(root / "photos"))).records) == 1


# --- COCO-Stuff ------------------------------------------------------------------------------------------------------


def test_labels_are_the_published_ones(shared_data: Path) -> None:
    lines = (shared_data / "native_formats" / "cocostuff_style" / "labels.txt").read_text().splitlines()
    assert [line.split(": ") for line in lines[1:]] == [[str(n), name] for n, name in enumerate(cocostuff.LABELS, 1)]


def test_names_are_readable_and_differ() -> None:
    never = {11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90}  # values of things that no map holds
    used = [p for value, p in enumerate(cocostuff.PHRASES) if value not in never]
    assert len(set(used)) == len(used) == 171
    assert not any("-" in name for name in used)
    said = [coco.readable(n) for n in ("sky-other-merged", "wall-brick", "floor-wood", "window-blind", "tree-merged")]
    assert said == ["sky", "brick wall", "wood floor", "window blind", "tree"]


@pytest.mark.parametrize("split", ["val2017", "train2017"])
def test_every_real_label_map(shared_data: Path, tmp_path: Path, split: str) -> None:
    """All 100 maps of a split, over blank pictures where the photograph isn't at hand; written and read back."""
    maps = shared_data / "native_formats" / "cocostuff_style" / "stuffthingmaps" / split
    truth = {path.stem: np.asarray(Image.open(path)) for path in sorted(maps.glob("*.png"))}
    sizes = {f"{name}.jpg": values.shape[::-1] for name, values in truth.items()}
    folder = complete(tmp_path / "images", photos(shared_data), sizes)
    survey = sources.survey(settings(maps, "cocostuff", images=str(folder)))
    load = sources.loader("cocostuff")
    loaded = [load(records.Record.from_json(r.to_json()), survey.rule) for r in survey.records]
    assert [(one.skipped, one.partly) for one in loaded] == [({}, {})] * 100
    assert hdf5.write_shard(tmp_path / "0.h5", (one.sample for one in loaded)) == len(truth) == 100
    reader = hdf5.Reader(tmp_path)
    for name, values in truth.items():
        sample = reader.verified("0.h5", str(int(name)))
        assert [int(p.task or 0) for p in sample.phrases] == [v + 1 for v in np.unique(values).tolist() if v != 255]
        assert sum(p.mask for p in sample.phrases).max() == 1  # every pixel has one label
        for phrase in sample.phrases:
            value = int(phrase.task or 0) - 1
            assert np.array_equal(phrase.mask, values == value)
            assert phrase.caption.split()[-1].rstrip("s") in cocostuff.LABELS[value].replace("-", " ")


def test_a_value_that_is_no_label_and_a_map_of_another_size(tmp_path: Path) -> None:
    maps, photos = tmp_path / "stuffthingmaps" / "val2017", tmp_path / "images" / "val2017"
    maps.mkdir(parents=True)
    photos.mkdir(parents=True)
    values = {"000000000007": 182, "a": 181, "b": 0, "c": 255}
    for name, value in values.items():
        Image.new("L", (6 if name == "b" else 5, 4), value).save(maps / f"{name}.png")
        Image.new("RGB", (5, 4)).save(photos / f"{name}.JPEG")
    seven, a, b, c = sources.survey(settings(maps, "cocostuff")).records
    assert [(r.id, r.coco_id) for r in (seven, a)] == [("7", "7"), ("a", None)]
    with pytest.raises(BadSample, match=r"7\.png \[7\]: holds the value 182; COCO-Stuff's are 0 to 181 .* and 255"):
        cocostuff.load_classes(seven, "pil")
    with pytest.raises(BadSample, match=r"b\.png \[b\]: the mask is 6 x 4 pixels, its picture 5 x 4"):
        cocostuff.load_classes(b, "pil")
    assert [p.caption for p in cocostuff.load_classes(a, "pil").sample.phrases] == ["wood"]
    assert cocostuff.load_classes(c, "pil").sample.phrases == ()
    with pytest.raises(DataError, match="no PNG there; give the folder of one split's label maps"):
        sources.survey(settings(maps.parent, "cocostuff"))
