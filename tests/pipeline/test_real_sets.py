"""prepare by the command, on real Ray, over all real annotations at hand: areas of masks against independent counts."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask as coco
import pytest
from PIL import Image, ImageDraw
from pycocotools.coco import COCO

from rlfseg import cli, hdf5
from rlfseg.pipeline.folders import require_finished
from tests.blanks import complete

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
Areas = dict[str, dict[str, int]]  # picture -> task -> pixels
Set = tuple[str, Path, Path | None, Areas]  # source, path, pictures, and what is to come out


def coco_set(data: Path, made: Path) -> Set:
    path = data / "coco_instances" / "instances_val2017.json"
    truth = COCO(str(path))
    sizes = {image["file_name"]: (image["width"], image["height"]) for image in truth.imgs.values()}
    areas: Areas = {}
    for row in truth.anns.values():
        of_image = areas.setdefault(str(row["image_id"]), {})
        same = [a for a in truth.imgToAnns[row["image_id"]] if a["category_id"] == row["category_id"]]
        of_image[str(row["category_id"])] = int(np.any([truth.annToMask(a) for a in same], axis=0).sum())
    return "coco", path, complete(made / "photos", data / "coco_photos" / "images", sizes), areas


def stuff_set(data: Path, made: Path) -> Set:
    path = data / "native_formats" / "cocostuff_style" / "stuffthingmaps" / "val2017"
    values = {p.stem: np.asarray(Image.open(p)) for p in path.glob("*.png")}
    sizes = {f"{name}.jpg": array.shape[::-1] for name, array in values.items()}
    areas = {
        str(int(name)): {str(v + 1): int(n) for v, n in zip(*np.unique(a, return_counts=True), strict=True) if v != 255}
        for name, a in values.items()
    }
    return "cocostuff", path, complete(made / "photos", data / "coco_photos" / "images", sizes), areas


def phrasecut_set(data: Path, made: Path) -> Set:
    path = data / "native_formats" / "phrasecut_schema"
    sizes = {p["image_id"]: (p["width"], p["height"]) for p in json.loads((path / "image_data_split.json").read_text())}
    areas: Areas = {}
    for split in ("train", "val", "test", "miniv"):
        for task in json.loads((path / f"refer_{split}.json").read_text()):
            canvas = Image.new("L", sizes[task["image_id"]])
            for polygon in (p for polygons in task["Polygons"] for p in polygons if len(p) > 1):
                ImageDraw.Draw(canvas).polygon([(int(x), int(y)) for x, y in polygon], outline=1, fill=1)
            areas.setdefault(str(task["image_id"]), {})[task["task_id"]] = int(np.asarray(canvas).sum())
    return "phrasecut", path, None, areas


def refer_set(name: str) -> Callable[[Path, Path], Set]:
    def made_of(data: Path, made: Path) -> Set:
        path = data / "native_formats" / "refer" / name
        refs = pickle.loads(path.read_bytes())  # noqa: S301  our own copy, in a test
        return "refer", path, None, _of_refs(refs, path.parent)

    return made_of


def grefcoco_set(data: Path, made: Path) -> Set:
    """RefCOCO's refs in gRefCOCO's form, and one that means nothing in its picture."""
    known = data / "native_formats" / "refer" / "refcoco"
    refs = pickle.loads((known / "refs(unc).p").read_bytes())  # noqa: S301  our own copy, in a test
    refs = [{**ref, "ann_id": [ref["ann_id"]]} for ref in refs]
    refs.append({**refs[0], "ref_id": 10**6, "ann_id": [-1]})
    folder = made / "grefcoco"
    folder.mkdir()
    (folder / "instances.json").symlink_to(known / "instances.json")
    (folder / "grefs(unc).json").write_text(json.dumps(refs))
    pictures = known.parent / "images" / "mscoco" / "images" / "train2014"
    return "grefcoco", folder, pictures, _of_refs(refs, folder)


def _of_refs(refs: list[Any], folder: Path) -> Areas:
    tree = json.loads((folder / "instances.json").read_text())
    images, rows = ({row["id"]: row for row in tree[key]} for key in ("images", "annotations"))
    areas: Areas = {}
    for ref in refs:
        image = images[ref["image_id"]]
        ids = ref["ann_id"] if isinstance(ref["ann_id"], list) else [ref["ann_id"]]
        polygons = [p for key in ids if key != -1 for p in rows[key]["segmentation"]]
        encoded = coco.frPyObjects(polygons, image["height"], image["width"]) if polygons else []
        tasks = [f"{ref['ref_id']}__{sentence['sent_id']}" for sentence in ref["sentences"]]
        area = int(coco.area(coco.merge(encoded))) if encoded else 0
        areas.setdefault(str(ref["image_id"]), {}).update(dict.fromkeys(tasks, area))
    return areas


SETS: dict[str, Callable[[Path, Path], Set]] = {
    "coco": coco_set,
    "cocostuff": stuff_set,
    "phrasecut": phrasecut_set,
    "refcoco": refer_set("refcoco/refs(unc).p"),
    "refcoco+": refer_set("refcoco+/refs(unc).p"),
    "umd": refer_set("refcocog/refs(umd).p"),
    "google": refer_set("refcocog/refs(google).p"),
    "grefcoco": grefcoco_set,
}


@pytest.mark.parametrize("name", SETS)
def test_all_of_a_set_is_converted(
    ray: None, shared_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    source, path, pictures, areas = SETS[name](shared_data, tmp_path)
    out = tmp_path / "out"
    line = [f"--source={source}", f"--path={path}", f"--out={out}", "--images_per_shard=40"]
    assert cli.main("prepare", [*line, *([f"--images={pictures}"] if pictures else [])]) == 0, capsys.readouterr().err
    done = require_finished(out)
    assert (done["rows_in"], done["rows_out"], done["refused"]) == (len(areas), len(areas), {})
    assert done["phrases"] == sum(map(len, areas.values()))
    assert (done["report"]["skipped"], done["report"]["partly"]) == ({}, {})
    reader, found = hdf5.Reader(out), Areas()
    for row in hdf5.read_index(out).to_pylist():
        phrases = reader.verified(row["shard"], row["id"]).phrases
        found[row["id"]] = {str(p.task): int(p.mask.sum()) for p in phrases}
        assert [p.caption for p in phrases] == row["captions"]
    assert found == areas
