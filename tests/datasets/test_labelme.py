"""datasets/labelme.py: shapes of every kind against Pillow and plain arithmetic."""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

from rlfseg.config import PrepareConfig
from rlfseg.datasets import sources
from rlfseg.datasets.records import Loaded, Record
from rlfseg.errors import BadSample, ConfigError, DataError

Tree = Any
TRIANGLE = [[1, 1], [1, 20], [25, 20]]


def png(array: Any) -> str:
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, "PNG")
    return base64.b64encode(stream.getvalue()).decode()


def shape(label: str, points: Tree, kind: str | None = "polygon", **more: Tree) -> Tree:
    return {"label": label, "points": points, "group_id": None, "shape_type": kind, "flags": {}} | more


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Writes a picture of 40 x 30 pixels and its JSON."""

    def file(*shapes: Tree, **more: Tree) -> Path:
        Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
        tree = {"imagePath": "a.png", "imageData": None, "imageHeight": 30, "imageWidth": 40, "shapes": list(shapes)}
        (tmp_path / "a.json").write_text(json.dumps(tree | more))
        return tmp_path

    return file


def load(root: Path) -> Loaded:
    survey = sources.survey(PrepareConfig(out="unused", source="labelme", path=str(root)))
    (record,) = survey.records
    return sources.loader("labelme")(Record.from_json(record.to_json()), survey.rule)


def test_shapes_of_every_kind(write: Callable[..., Path]) -> None:
    inside = np.array([[1, 0, 1], [1, 1, 1]], np.uint8) * 255
    root = write(
        shape("dog", TRIANGLE),
        shape("car", [[30, 3], [36, 9]], "rectangle"),
        shape("dog", [[30, 12], [39, 12], [39, 20]], None),
        shape("ball", [[20, 15], [20, 5]], "circle"),
        shape("patch", [[4, 7], [6, 8]], "mask", mask=png(inside)),
        shape("wire", [[0, 0], [9, 9]], "line"),
        shape("eye", [[3, 3]], "point"),
    )
    sample, skipped, partly = load(root)
    phrases = {p.caption: p for p in sample.phrases}
    assert list(phrases) == ["dog", "car", "ball", "patch"]
    canvas = Image.new("L", (40, 30))
    ImageDraw.Draw(canvas).polygon([(x, y) for x, y in TRIANGLE], outline=1, fill=1)
    assert phrases["dog"].instances is not None
    assert phrases["dog"].instances.shape == (2, 30, 40)
    assert np.array_equal(phrases["dog"].instances[0], canvas)
    assert (phrases["car"].mask == np.pad(np.ones((7, 7)), ((3, 20), (30, 3)))).all()
    assert phrases["ball"].mask.sum() == pytest.approx(math.pi * 10.5**2, rel=0.05)  # its outline belongs to it
    assert phrases["patch"].mask[7:9, 4:7].tolist() == (inside // 255).tolist()
    assert phrases["patch"].mask.sum() == 5
    assert skipped == {"a: 4": "no outline that covers a pixel", "a: 5": "no outline that covers a pixel"}
    assert partly == {}


def test_a_group_is_one_object(write: Callable[..., Path]) -> None:
    other = [[30, 12], [39, 12], [39, 20]]
    shapes = [shape("dog", TRIANGLE, group_id=3), shape("dog", other, group_id=3), shape("dog", other)]
    (dog,) = load(write(*shapes)).sample.phrases
    assert dog.instances is not None
    assert len(dog.instances) == 2
    assert np.array_equal(dog.instances[0], dog.mask)


def test_where_the_picture_is(write: Callable[..., Path]) -> None:
    root = write(shape("dog", TRIANGLE))
    (root / "photos").mkdir()
    (root / "a.png").rename(root / "photos" / "b.png")
    for path in ("photos/b.png", "photos\\b.png", "..\\" + root.name + "\\photos\\b.png"):
        tree = json.loads((root / "a.json").read_text()) | {"imagePath": path}
        (root / "a.json").write_text(json.dumps(tree))
        assert load(root).sample.image.shape == (30, 40, 3)
    tree |= {"imagePath": "gone.png", "imageData": png(np.full((30, 40, 3), 7, np.uint8))}
    (root / "a.json").write_text(json.dumps(tree))
    assert load(root).sample.image.max() == 7
    (root / "a.json").write_text(json.dumps(tree | {"imageData": None}))
    with pytest.raises(BadSample, match=r"gone\.png \[a\]: no such file"):
        load(root)


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"imageHeight": 31}, r"a\.png \[a\]: is 40 x 30 pixels as displayed; .*a\.json says 40 x 31"),
        ({"imageHeight": None}, r"a\.json \[a\]: top: 'imageHeight' must be a whole number"),
        ({"imageHeight": 10**6, "imageWidth": 10**6}, r"1000000 x 1000000 pixels; the limit is"),
        ({"shapes": 7}, "'shapes' must be a list"),
        ({"shapes": [shape("x", [[1]])]}, r"shapes\[0\]: 'points' must be pairs of numbers"),
        ({"shapes": [shape("x", [[1, "2"]])]}, "'points' must be pairs of numbers"),
        ({"shapes": [shape("x", [[1, 2]], "circle")]}, "a circle has 2 points, this has 1"),
        ({"shapes": [shape("x", [[1, 2], [3, 4]], "mask")]}, r"shapes\[0\]\.mask: not base64"),
        ({"shapes": [shape("x", [[1, 2], [3, 4]], "mask", mask="AAAA")]}, r"shapes\[0\]\.mask.*not a picture"),
        ({"shapes": [shape("x", [[39, 2], [3, 4]], "mask", mask=png(np.ones((2, 2), np.uint8)))]}, "reaches out"),
        ({"shapes": [shape("x", [[-1, 2], [3, 4]], "mask", mask=png(np.ones((2, 2), np.uint8)))]}, "reaches out"),
        ({"shapes": [{"label": 7}]}, r"shapes\[0\]: 'label' must be text, this is 7"),
        ({"imagePath": None}, "'imagePath' must be text"),
        ({"imagePath": "gone.png", "imageData": "%"}, "imageData: not base64"),
    ],
)
def test_a_bad_file_is_that_samples_fault(write: Callable[..., Path], more: Tree, reason: str) -> None:
    root = write(shape("dog", TRIANGLE), **more)
    with pytest.raises(BadSample, match=reason) as caught:
        load(root)
    assert caught.value.sample == "a"


def test_other_files_and_folders(tmp_path: Path, write: Callable[..., Path]) -> None:
    with pytest.raises(DataError, match="no folder with LabelMe's JSON files"):
        load(tmp_path)
    root = write()
    (root / "a.json").write_text("{")
    with pytest.raises(BadSample, match=r"a\.json \[a\]: not whole JSON"):
        load(root)
    with pytest.raises(ConfigError, match="images: has no effect for source labelme; leave it out"):
        sources.survey(PrepareConfig(out="unused", source="labelme", path=str(root), images="x"))


def test_hostile_shapes_cost_little(write: Callable[..., Path]) -> None:
    root = write(
        shape("far", [[0, 0], [1e300, 1e300]], "circle"),
        shape("wide", [[0, 0], [1e7, 0]], "circle"),
        shape("box", [[-1e30, 0], [1e30, 9]], "rectangle"),
    )
    sample, skipped, partly = load(root)
    assert sample.phrases == ()
    assert (len(skipped), partly) == (3, {})
