"""A folder of pictures with mask PNGs and a list of phrases: JSON, JSONL or CSV.

    index.json      {"images": [{"image": "a.jpg", "image_id": 30, "split": "train", "width": 640, "height": 428,
                                 "phrases": [{"phrase": "potted plant", "mask": "a_0.png", "task_id": "30__7"}]}]}
    phrases.jsonl   {"image": "a.jpg", "phrase": "potted plant", "mask": "a_0.png", "split": "train"} a line
    phrases.csv     the same columns under a header, UTF-8

Paths are relative to the list. `image_id` (else the picture's path), `split`, `width`, `height` and `task_id` may be
left out, anything else is ignored. A row with neither phrase nor mask is a picture without phrases. A phrase that a
picture has twice stays two. Masks: see `images.load_mask`; they have the picture's size *as displayed*, so a mask drawn
on a photo before its EXIF rotation is refused where that shows.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from rlfseg.datasets.lists import as_object, read_json
from rlfseg.datasets.records import Entry, Plan, Record, tally
from rlfseg.errors import DataError

LISTS = ("index.json", "phrases.jsonl", "phrases.csv")


def plan(path: Path) -> Plan:
    """Reads a list of phrases; pictures and masks are left alone.

    Args:
        path: The list, or the folder that holds it under one of the names above.

    Returns:
        A record a picture, in the order in which the list names them.

    Raises:
        DataError: No list, or a row that lacks something or contradicts another; names the row.
    """
    source = _list_in(path.absolute())
    read = {".json": _json_rows, ".jsonl": _jsonl_rows, ".csv": _csv_rows}.get(source.suffix.lower())
    if read is None:
        raise DataError(f"{source}: a list of phrases is .json, .jsonl or .csv")
    try:
        records = _records(read(source), source)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{source}: can't be read ({error})") from error
    if not records:
        raise DataError(f"{source}: names no picture")
    return Plan(name=source.name, records=records, found=tally(records))


def _list_in(path: Path) -> Path:
    if not path.is_dir():
        return path
    found = [path / name for name in LISTS if (path / name).is_file()]
    if len(found) != 1:
        have = ", ".join(p.name for p in found) or "none"
        raise DataError(f"{path}: needs exactly one of {', '.join(LISTS)}; it has {have}")
    return found[0]


# --- forms: each yields (where, row) with a row a phrase, or one without `phrase` for a picture that has none ---------

Rows = Iterator[tuple[str, dict[str, Any]]]


def _json_rows(source: Path) -> Rows:
    for n, image in enumerate(read_json(source, keys=("images",))["images"]):
        where = f"images[{n}]"
        phrases = as_object(image, where, source).get("phrases")
        if not isinstance(phrases, list):
            raise DataError(f"{source}, {where}: 'phrases' must be a list, this is {phrases!a}")
        shared = {key: image.get(key) for key in ("image", "image_id", "split", "width", "height")}
        if not phrases:
            yield where, shared
        for k, phrase in enumerate(phrases):
            here = f"{where}.phrases[{k}]"
            row = as_object(phrase, here, source)
            yield here, {**shared, **{key: row.get(key) for key in ("phrase", "mask", "task_id")}}


def _jsonl_rows(source: Path) -> Rows:
    with source.open(encoding="utf-8-sig") as lines:
        for n, line in enumerate(lines, 1):
            if line.strip():
                try:
                    yield f"line {n}", as_object(json.loads(line), f"line {n}", source)
                except (ValueError, RecursionError) as error:
                    raise DataError(f"{source}, line {n}: not JSON ({error})") from error


def _csv_rows(source: Path) -> Rows:
    with source.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines, strict=True)
        columns = reader.fieldnames or ()
        if missing := {"image", "phrase", "mask"} - set(columns):
            raise DataError(f"{source}: lacks the columns {', '.join(sorted(missing))}; it has {', '.join(columns)}")
        for row in reader:
            if None in row:
                raise DataError(f"{source}, line {reader.line_num}: too many fields; quote phrases with commas")
            # A cell left empty is a value that is left out, but a phrase may be empty.
            yield f"line {reader.line_num}", {k: v for k, v in row.items() if v or (k == "phrase" and v is not None)}


# --- rows to records -------------------------------------------------------------------------------------------------


def _records(rows: Iterable[tuple[str, dict[str, Any]]], source: Path) -> list[Record]:
    heads: dict[str, Record] = {}
    phrases: dict[str, list[Entry]] = {}
    for where, row in rows:
        head, entry = _record(row, where, source), _entry(row, where, source)
        first = heads.setdefault(head.id, head)
        if first != head:
            differ = [k for k in ("image", "size", "split") if getattr(first, k) != getattr(head, k)]
            raise DataError(f"{source}, {where}: id {head.id!a} came before with another {' and '.join(differ)}")
        phrases.setdefault(head.id, []).extend(entry)
    return [Record(**{**vars(head), "phrases": tuple(phrases[key])}) for key, head in heads.items()]


def _record(row: dict[str, Any], where: str, source: Path) -> Record:
    image = _text(row, "image", where, source)
    identity = row.get("image_id")
    return Record(
        id=image if identity is None else str(identity),
        image=str(source.parent / image),
        size=_size(row, where, source),
        split=str(row.get("split") or ""),
        phrases=(),
        source=str(source),
    )


def _entry(row: dict[str, Any], where: str, source: Path) -> list[Entry]:
    if "phrase" not in row and "mask" not in row:
        return []
    mask = str(source.parent / _text(row, "mask", where, source))
    task = row.get("task_id")
    return [Entry(caption=_text(row, "phrase", where, source), mask=mask, task=None if task is None else str(task))]


def _text(row: dict[str, Any], key: str, where: str, source: Path) -> str:
    value = row.get(key)
    if not isinstance(value, str) or (not value and key != "phrase"):
        raise DataError(f"{source}, {where}: {key!r} must be text, this is {value!a}")
    return value


def _size(row: dict[str, Any], where: str, source: Path) -> tuple[int, int] | None:
    values = row.get("height"), row.get("width")
    if values == (None, None):
        return None
    try:
        height, width = (int(str(v)) for v in values)
    except ValueError:
        raise DataError(f"{source}, {where}: 'height' and 'width' must be whole numbers, not {values}") from None
    return height, width
