"""VG-PhraseCut: phrases of Visual Genome with the polygons of every object that they mean.

    refer_train.json  refer_val.json  refer_test.json  refer_miniv.json     tasks: a phrase and its polygons
    image_data_split.json (or image_data_split3000.json)                    pictures: size, split, COCO's id
    images/{image_id}.jpg

`Polygons[object][polygon][point]` are [x, y] in pixels of the picture as annotated. A phrase that a picture has twice,
with other boxes, stays two; the task id tells them apart. `val` is without `miniv`. Some pictures have another size
than annotated (17 are known); they are refused by name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from rlfseg.datasets.lists import as_object, field, pictures_folder, read_items, read_json, size_of, storable
from rlfseg.datasets.records import Counts, Entry, Plan, Record, tally
from rlfseg.errors import ConfigError, DataError

# Pictures and phrases, from the data set's own README.
OFFICIAL = {
    "train": Counts(71_746, 310_816),
    "val": Counts(2_971, 20_316),
    "test": Counts(2_545, 14_354),
    "miniv": Counts(100, 821),
}
# A phrase is about stuff if one of these is in its `name`, about an object if not: the data set's own two subsets.
STUFF = re.compile(
    "water|sea|river|fog|ground|field|platform|rail|pavement|road|gravel|mud|dirt|snow|sand|solid|hill|mountain|stone|rock"
    "|wood|sky|cloud|vegetation|straw|moss|branch|leaf|leaves|bush|tree|grass|forest|net|cage|fence|building|roof|tent"
    "|bridge|house|food|vegetable|salad|textile|banner|blanket|curtain|cloth|napkin|towel|mat|rug|stairs|light|counter"
    "|mirror|cupboard|cabinet|shelf|table|desk|door|window|floor|carpet|ceiling|wall|brick|metal|plastic|paper|cardboard"
    "|street|shadow|sidewalk|plant|wave|reflection|ocean|beach"
)
PICTURES = ("image_data_split.json", "image_data_split3000.json")


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A picture of the list: (height, width) as annotated, and its id in COCO or None."""

    size: tuple[int, int]
    coco_id: str | None


def plan(path: Path, images: str | None, splits: Sequence[str]) -> Plan:
    """Reads the tasks of the splits and the list of pictures.

    Args:
        path: Folder of the JSON files.
        images: Folder of the pictures; None: `images` in it.
        splits: Of train, val, test and miniv; empty: all whose file is there.

    Returns:
        A record for every picture with a task, and a row a phrase with its structure, for evaluation by subset.

    Raises:
        DataError: A file is missing, damaged or not of this form; names the place.
        ConfigError: No folder of pictures, or no file of a split.
    """
    there = [split for split in OFFICIAL if (path / f"refer_{split}.json").is_file()]
    if not there or not set(splits) <= set(there):
        raise ConfigError(f"splits: {path} has refer_*.json of {', '.join(there) or 'no split'}, not of {list(splits)}")
    pictures = _pictures(path)
    folder = pictures_folder(images, path / "images")
    records: list[Record] = []
    rows: list[dict[str, str]] = []
    for split in splits or there:
        source = path / f"refer_{split}.json"
        entries: dict[int, list[Entry]] = {}
        for image, entry, structure in _tasks(source):
            if image not in pictures:
                raise DataError(f"{source}, task {entry.task}: no picture of the list has id {image}")
            entries.setdefault(image, []).append(entry)
            rows.append({"id": str(image), "task": storable(str(entry.task)), "split": split, **_sorted(structure)})
        records += [
            Record(
                id=str(image),
                image=str(folder / f"{image}.jpg"),
                size=pictures[image].size,
                split=split,
                phrases=tuple(phrases),
                source=str(source),
                coco_id=pictures[image].coco_id,
            )
            for image, phrases in entries.items()
        ]
    return Plan(
        name="PhraseCut",
        records=records,
        rule="pil",
        found=tally(records),
        official=OFFICIAL,
        folder=str(folder),
        listed=frozenset(f"{image}.jpg" for image in pictures),
        phrases=pa.Table.from_pylist(rows),
        sorts=("kind", "phrase_type"),
    )


def _pictures(path: Path) -> dict[int, Picture]:
    source = next((path / name for name in PICTURES if (path / name).is_file()), None)
    if source is None:
        raise DataError(f"{path}: has neither {' nor '.join(PICTURES)}")
    pictures = {}
    tree = read_json(source)
    for n, row in enumerate(tree if isinstance(tree, list) else [tree]):
        where = f"[{n}]"
        key = field(as_object(row, where, source), "image_id", int, where, source)
        coco_id = row.get("coco_id")
        pictures[key] = Picture(size=size_of(row, where, source), coco_id=None if coco_id is None else str(coco_id))
    return pictures


def _tasks(source: Path) -> Iterator[tuple[int, Entry, Any]]:
    """Image id, entry and phrase structure of every task."""
    for where, task in read_items(source):
        objects = field(task, "Polygons", list, where, source)
        entry = Entry(
            caption=field(task, "phrase", str, where, source),
            task=field(task, "task_id", str, where, source),
            # A task without any object is no claim that nothing is there: it is an object without polygons.
            objects=tuple(_flat(polygons) for polygons in objects) or ([],),
            annotations=_names(task.get("ann_ids"), len(objects)),
        )
        yield field(task, "image_id", int, where, source), entry, task.get("phrase_structure")


def _names(ids: Any, count: int) -> tuple[str, ...] | None:
    """Ids of a task's objects, if it has one for each; they serve messages alone."""
    fit = isinstance(ids, list) and len(ids) == count > 0 and all(isinstance(key, int) for key in ids)
    return tuple(map(str, ids)) if fit else None


def _sorted(structure: Any) -> dict[str, str]:
    """A phrase's structure as JSON, and the subsets that it puts the phrase in."""
    known = structure if isinstance(structure, dict) else {}
    name = str(known.get("name", ""))
    return {
        "structure": json.dumps(structure),
        "kind": "stuff" if STUFF.search(name) else "object",
        "phrase_type": storable(str(known.get("type", ""))),
    }


def _flat(polygons: Any) -> list[Any]:
    """The polygons of an object, each from a list of points to a flat list of numbers."""
    return [_numbers(polygon) for polygon in polygons] if isinstance(polygons, list) else [None]


def _numbers(polygon: Any) -> list[Any] | None:
    """A polygon's numbers; None where it isn't a list of pairs, which is then left out and counted."""
    if not isinstance(polygon, list) or not all(isinstance(p, list) and len(p) == 2 for p in polygon):
        return None
    return [number for point in polygon for number in point]
