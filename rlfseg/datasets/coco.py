"""COCO: a phrase is a category that is present, its mask all of that category; and `instances.json` for the refer sets.

    annotations/instances_val2017.json    images, categories, annotations with polygons, crowds as run-length encodings
    annotations/panoptic_val2017.json     annotations with segments_info; label maps in annotations/panoptic_val2017/
    val2017/                              the pictures

Which of the two a file is shows in its annotations. Pictures without any annotation aren't written. The task of a
phrase is its category's id.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlfseg.datasets.lists import as_object, brief, field, pictures_folder, read_json, size_of
from rlfseg.datasets.raster import Outline, rasterise
from rlfseg.datasets.records import Counts, Entry, Plan, Record
from rlfseg.errors import DataError

Tree = dict[str, Any]
OFFICIAL = {
    "train2014": Counts(82_783, None),
    "val2014": Counts(40_504, None),
    "train2017": Counts(118_287, None),
    "val2017": Counts(5_000, None),
}
MATERIALS = ("brick", "concrete", "marble", "panel", "stone", "tile", "wood")
PLAIN = {
    "playingfield": "playing field",
    "solid-other": "solid object",
    "structural-other": "structure",
    "waterdrops": "water drops",
    "window-blind": "window blind",
}


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A picture of an annotation file: its file's name, and (height, width) in pixels."""

    file: str
    size: tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class Annotations:
    """An annotation file by ids.

    Attributes:
        path: The file.
        pictures: Id -> picture.
        rows: Annotations of the file, each with an `image_id` that is among the pictures.
        categories: Id -> name as written, in the order of the ids; empty where the file has none.
    """

    path: Path
    pictures: Mapping[int, Picture]
    rows: list[Tree]
    categories: Mapping[int, str]


def read_annotations(path: Path) -> Annotations:
    """Reads an annotation file; needs no `info`, `licenses` or, but for phrases, `categories`.

    Args:
        path: The JSON file.

    Returns:
        What it holds.

    Raises:
        DataError: Not whole, not COCO's form, or ids that come twice or lead nowhere; names the place.
    """
    tree = read_json(path, keys=("images", "annotations"))
    pictures: dict[int, Picture] = {}
    for n, image in enumerate(tree["images"]):
        where = f"images[{n}]"
        key = field(as_object(image, where, path), "id", int, where, path)
        if key in pictures:
            raise DataError(f"{path}, {where}: id {key} came before")
        pictures[key] = Picture(file=field(image, "file_name", str, where, path), size=size_of(image, where, path))
    for n, row in enumerate(tree["annotations"]):
        where = f"annotations[{n}]"
        if field(as_object(row, where, path), "image_id", int, where, path) not in pictures:
            raise DataError(f"{path}, {where}: no image has id {row['image_id']}")
    categories = {}
    known = tree.get("categories") or []
    if not isinstance(known, list):
        raise DataError(f"{path}: 'categories' must be a list, this is {known!a:.80}")
    for n, row in enumerate(known):
        where = f"categories[{n}]"
        key = field(as_object(row, where, path), "id", int, where, path)
        categories[key] = field(row, "name", str, where, path)
    return Annotations(
        path=path, pictures=pictures, rows=tree["annotations"], categories=dict(sorted(categories.items()))
    )


def check(path: Path) -> int:
    """Reads an annotation file of either kind without its pictures.

    Args:
        path: The JSON file.

    Returns:
        How many annotations it holds.

    Raises:
        DataError: As `read_annotations`, or an annotation without a shape, or an RLE that doesn't add up.
    """
    known = read_annotations(path)
    for n, row in enumerate(known.rows):
        where = f"annotations[{n}]"
        if "segments_info" in row:
            field(row, "segments_info", list, where, path)
        elif isinstance(outline := outline_of(row, where, path), Mapping):
            try:
                rasterise(outline, known.pictures[row["image_id"]].size, "pycocotools")
            except DataError as error:
                raise DataError(f"{path}, {where}, id {_name(row, n)}: {error}") from error
    return len(known.rows)


def plan(path: Path, images: str | None) -> Plan:
    """Reads an instances or panoptic file.

    Args:
        path: The JSON file.
        images: Folder of the pictures; None: as in COCO's own layout.

    Returns:
        A record for every picture with an annotation, its split from the file's name.

    Raises:
        DataError: See `read_annotations`.
        ConfigError: No folder of pictures.
    """
    known = read_annotations(path)
    split = path.stem.rpartition("_")[2]
    folder = pictures_folder(images, path.parent.parent / split, path.parent / split, path.parent.parent / "images")
    is_panoptic = bool(known.rows) and "segments_info" in known.rows[0]
    entries, labels = _panoptic(known) if is_panoptic else (_instances(known), {})
    records = [
        Record(
            id=str(key),
            image=str(folder / picture.file),
            size=picture.size,
            split=split,
            phrases=tuple(entries[key]),
            source=str(path),
            labels=labels.get(key),
            coco_id=str(key),
        )
        for key, picture in known.pictures.items()
        if entries.get(key)
    ]
    return Plan(
        name=f"COCO {'panoptic' if is_panoptic else 'instances'}",
        records=records,
        rule="pycocotools",
        found={split: Counts(len(known.pictures), sum(len(r.phrases) for r in records))},
        official={s: c for s, c in OFFICIAL.items() if s == split},
        folder=str(folder),
        without_phrases=len(known.pictures) - len(records),
        listed=frozenset(p.file for p in known.pictures.values()),
    )


def readable(name: str) -> str:
    """COCO's name of a stuff class as one would say it: `sky-other-merged` is sky, `wall-brick` brick wall."""
    name = name.removesuffix("-merged")
    what, _, kind = name.rpartition("-")
    if name in PLAIN:
        return PLAIN[name]
    if kind in MATERIALS and what:
        return f"{kind} {what}"
    return what if kind in ("other", "stuff") and what else name


def id_in_name(name: str) -> str | None:
    """The id in COCO's own file names, such as 000000000030.jpg and COCO_train2014_000000000030.jpg; else None."""
    found = re.fullmatch(r"(?:COCO_\w+_)?(\d{12})\.jpg", name, re.ASCII)
    return str(int(found[1])) if found else None


def outline_of(row: Tree, where: str, source: Path) -> Outline:
    """An annotation's segmentation, polygons or run-length encoding; DataError if it is neither."""
    outline = row.get("segmentation")
    if not isinstance(outline, list | dict):
        raise DataError(f"{source}, {where}: 'segmentation' must be polygons or an RLE, this is {brief(outline)}")
    return outline


def _name(row: Tree, n: int) -> str:
    """An annotation's id for messages, else its place in the file."""
    return str(row["id"]) if isinstance(row.get("id"), int) else f"[{n}]"


def _category(row: Tree, where: str, known: Annotations) -> int:
    key = field(row, "category_id", int, where, known.path)
    if key not in known.categories:
        raise DataError(f"{known.path}, {where}: no category has id {key}")
    return key


def _instances(known: Annotations) -> dict[int, list[Entry]]:
    """Image id -> an entry a category, an object an annotation."""
    found: dict[int, dict[int, list[tuple[Outline, str]]]] = {}
    for n, row in enumerate(known.rows):
        where = f"annotations[{n}]"
        present = found.setdefault(row["image_id"], {})
        drawn = outline_of(row, where, known.path), _name(row, n)
        present.setdefault(_category(row, where, known), []).append(drawn)
    return {
        image: [
            Entry(
                caption=name,
                task=str(key),
                objects=tuple(outline for outline, _ in present[key]),
                annotations=tuple(named for _, named in present[key]),
            )
            for key, name in known.categories.items()
            if key in present
        ]
        for image, present in found.items()
    }


def _panoptic(known: Annotations) -> tuple[dict[int, list[Entry]], dict[int, str]]:
    """Image id -> an entry a category, an object a segment; and image id -> path of the label map."""
    maps = known.path.with_suffix("")
    entries: dict[int, list[Entry]] = {}
    labels: dict[int, str] = {}
    for n, row in enumerate(known.rows):
        where = f"annotations[{n}]"
        labels[row["image_id"]] = str(maps / field(row, "file_name", str, where, known.path))
        present: dict[int, list[int]] = {}
        for k, segment in enumerate(field(row, "segments_info", list, where, known.path)):
            here = f"{where}.segments_info[{k}]"
            value = field(as_object(segment, here, known.path), "id", int, here, known.path)
            present.setdefault(_category(segment, here, known), []).append(value)
        entries[row["image_id"]] = [
            Entry(caption=readable(name), task=str(key), values=tuple(present[key]))
            for key, name in known.categories.items()
            if key in present
        ]
    return entries, labels
