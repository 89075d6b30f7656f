"""LabelMe: a JSON file a picture; a phrase is a label, its objects the shapes that bear it.

    {"imagePath": "a.jpg", "imageData": null, "imageHeight": 428, "imageWidth": 640,
     "shapes": [{"label": "dog", "points": [[3.5, 7], ...], "group_id": null, "shape_type": "polygon"}]}

Shapes of one label and one `group_id` are one object. Polygons, rectangles, circles and masks have an area; points and
lines have none and are left out, by name. The picture is the file at `imagePath` if there is one, else `imageData`.
Files are opened with their pictures, so phrases are counted at the end.
"""

from __future__ import annotations

import base64
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from rlfseg.datasets.lists import as_object, brief, field, read_json
from rlfseg.datasets.raster import MOST_POINTS, Outline, Rule
from rlfseg.datasets.records import Counts, Entry, Loaded, Plan, Record, load
from rlfseg.errors import BadSample, DataError
from rlfseg.images import MAX_PIXELS, Source, load_mask, rle_encode

Shape = dict[str, Any]


def plan(path: Path) -> Plan:
    """Lists LabelMe's files.

    Args:
        path: A folder; those under it are listed too.

    Returns:
        A record a JSON file, its id the path in the folder without `.json`.

    Raises:
        DataError: No such folder, or no JSON file in it.
    """
    files = sorted(path.rglob("*.json")) if path.is_dir() else []
    if not files:
        raise DataError(f"{path}: no folder with LabelMe's JSON files")
    records = [
        Record(
            id=file.relative_to(path).with_suffix("").as_posix(),
            image=str(file),
            size=None,
            split="",
            phrases=(),
            source=str(file),
        )
        for file in files
    ]
    return Plan(name="LabelMe", records=records, rule="pil", found={"": Counts(len(records), None)})


def load_shapes(record: Record, rule: Rule) -> Loaded:
    """The picture and the phrases of a LabelMe file.

    Args:
        record: A record of the plan.
        rule: How polygons are filled.

    Returns:
        As `records.load`.

    Raises:
        BadSample: As `records.load`, or the file isn't LabelMe's.
    """
    file = Path(record.image)
    try:
        tree = as_object(read_json(file), "top", file)
        size = field(tree, "imageHeight", int, "top", file), field(tree, "imageWidth", int, "top", file)
        if not 0 < size[0] * size[1] <= MAX_PIXELS:
            raise DataError(f"{file}: {size[1]} x {size[0]} pixels; the limit is {MAX_PIXELS:,}")
        picture = _picture(tree, file)
        phrases = _entries(field(tree, "shapes", list, "top", file), size, file)
    except DataError as error:
        raise BadSample(str(error).removeprefix(str(file)).lstrip(":, "), file=str(file), sample=record.id) from error
    name = record.image if isinstance(picture, bytes) else str(picture)
    return load(replace(record, image=name, size=size, phrases=phrases), rule, picture)


def _picture(tree: Shape, file: Path) -> Source:
    """Path of the picture, or its bytes where there is no such file."""
    # LabelMe writes Windows' separators on Windows.
    path = file.parent / field(tree, "imagePath", str, "top", file).replace("\\", "/")
    data = tree.get("imageData")
    return _bytes(data, "imageData", file) if not os.path.isfile(path) and data else path


def _bytes(text: Any, where: str, file: Path) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (ValueError, TypeError) as error:
        raise DataError(f"{file}, {where}: not base64 ({error})") from error


def _entries(shapes: list[Any], size: tuple[int, int], file: Path) -> tuple[Entry, ...]:
    """A phrase a label, in the order in which labels come."""
    objects: dict[str, dict[Any, list[Any]]] = {}
    for n, shape in enumerate(shapes):
        where = f"shapes[{n}]"
        label = field(as_object(shape, where, file), "label", str, where, file)
        group = shape.get("group_id")
        drawn = _outline(shape, where, size, file)
        key = (where if group is None or isinstance(drawn, dict) else str(group), isinstance(drawn, dict))
        objects.setdefault(label, {}).setdefault(key, []).append(drawn)
    return tuple(
        Entry(caption=label, objects=tuple(o[0] if isinstance(o[0], dict) else o for o in parts.values()))
        for label, parts in objects.items()
    )


def _outline(shape: Shape, where: str, size: tuple[int, int], file: Path) -> Outline | None:
    """A polygon as flat numbers, or a mask's RLE, or None for a shape without an area."""
    points = field(shape, "points", list, where, file)
    if not all(isinstance(p, list) and len(p) == 2 and all(isinstance(v, int | float) for v in p) for p in points):
        raise DataError(f"{file}, {where}: 'points' must be pairs of numbers, this is {brief(points)}")
    kind = shape.get("shape_type") or "polygon"
    if kind == "polygon":
        return [number for point in points for number in point]
    if kind in ("rectangle", "circle", "mask") and len(points) != 2:
        raise DataError(f"{file}, {where}: a {kind} has 2 points, this has {len(points)}")
    if kind == "rectangle":
        (left, top), (right, bottom) = points
        return [left, top, right, top, right, bottom, left, bottom]
    if kind == "circle":
        return _circle(*points)
    return _mask(shape, points[0], where, size, file) if kind == "mask" else None


def _circle(centre: list[float], rim: list[float]) -> list[float]:
    """A polygon with a corner a pixel of the circle's length, at least 16."""
    radius = math.dist(centre, rim)
    if not math.isfinite(radius):
        return []
    corners = round(min(max(16, 2 * math.pi * radius), MOST_POINTS))
    angles = np.arange(corners) * (2 * math.pi / corners)
    points = np.stack([centre[0] + radius * np.cos(angles), centre[1] + radius * np.sin(angles)], axis=1)
    flat: list[float] = points.ravel().tolist()
    return flat


def _mask(shape: Shape, corner: list[float], where: str, size: tuple[int, int], file: Path) -> Outline:
    """A mask that LabelMe stores as the PNG of its box, put where the box's corner is."""
    name = f"{file}, {where}.mask"
    inside = load_mask(_bytes(shape.get("mask"), f"{where}.mask", file), name=name)
    left, top = (round(v) if math.isfinite(v) else -1 for v in corner)
    canvas = np.zeros(size, np.uint8)
    if min(left, top) < 0 or top + inside.shape[0] > size[0] or left + inside.shape[1] > size[1]:
        raise DataError(f"{name}: reaches out of the picture")
    canvas[top : top + inside.shape[0], left : left + inside.shape[1]] = inside
    return {"size": list(size), "counts": rle_encode(canvas)}
