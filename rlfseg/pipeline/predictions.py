"""Predictions already made, by rlfseg or by another system, as scores a phrase beside the true masks.

    a folder of `prepare`               HDF5: masks by caption
    a folder of `predict` or `refine`   Parquet: masks by caption
    Parquet files                       `id`, `captions` or `phrase`, `masks` or `mask`: a row a picture or a phrase
    a list, .jsonl or .csv              `id`, `phrase`, `png` a line; paths relative to the list
    a folder                            ID/PHRASE.png, ID/N.png for the N-th phrase of the picture, from 0; ID/TASK.png

A list may also lie in the folder, as predictions.jsonl or predictions.csv. PNGs hold grey levels of 8 or 16 bits as
scores, or masks. In a folder's names what a file system can't hold is written as by `rlfseg predict --png true`, whose
folder `png` is read as it is. TASK is a phrase's id in its data set; PhraseCut's own form, ID__ANN.png in one folder,
is read too. Lists and Parquet may have it as `task` or `tasks`. Where all phrases of a picture and all its predictions
have one, it decides; else the phrase does, and one that comes twice is matched in order; by N.png, exactly.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from rlfseg import hdf5, images
from rlfseg.datasets.lists import brief, read_text
from rlfseg.errors import BadSample, DataError
from rlfseg.pipeline.folders import (
    STARTED,
    file_name,
    fingerprint,
    read_rows,
    read_table,
    require_finished,
    stamp,
)
from rlfseg.pipeline.rows import Row
from rlfseg.pipeline.samples import LoadSample

LISTS = ("predictions.jsonl", "predictions.csv")
OF_A_LIST = "id, png, and phrase or task"
OF_PARQUET = {"phrase": ("captions", "caption", "phrase"), "task": ("tasks", "task"), "mask": ("masks", "mask")}
TEXTS = pa.list_(pa.string())
NOT_UNICODE = re.compile("[\ud800-\udfff]")  # lone surrogates: Arrow can't hold them
GREY = {"L": 255, "I;16": 65535}  # Pillow's modes, and the level that means 1
Values = Literal["auto", "masks", "scores"]


class Given(NamedTuple):
    """One prediction.

    Attributes:
        phrase: What was asked.
        task: The phrase's id in its data set, or None.
        mask: As RLE, as the path of a PNG, or as it is; None: there should be one, but there is none.
    """

    phrase: str
    task: str | None
    mask: Any


Found = dict[str, list[Given]]  # of each picture


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """What was found of a set's pictures.

    Attributes:
        rows: The set's index with `predicted_captions`, `predicted_tasks`, and `predicted_masks` (RLE) or
            `predicted_pngs` beside them; as it was where the predictions lie in HDF5.
        fingerprint: Changes when the predictions do.
        unused: Predictions of pictures that the set doesn't have.
    """

    rows: pa.Table
    fingerprint: str
    unused: int


def find(index: pa.Table, source: Path, classes: tuple[str, ...] = ()) -> Predictions:
    """Finds the predictions of a set's pictures; no pixel is read.

    Args:
        index: Index rows of the set.
        source: Folder, list or Parquet file, in any of the forms above.
        classes: Phrases that may have been asked of every picture, for `semseg`.

    Returns:
        The index with what was found.

    Raises:
        DataError: None of these forms, or unfinished, or a line of the list lacks something.
    """
    if (source / hdf5.INDEX).is_file():
        require_finished(source)
        have, other = set(index["id"].to_pylist()), hdf5.read_index(source).select(["id", "n_phrases"]).to_pylist()
        unused = sum(row["n_phrases"] for row in other if row["id"] not in have)
        return Predictions(rows=index, fingerprint=fingerprint(source), unused=unused)
    if (source / STARTED).is_file():
        rows = ((f"{source} [{row['id']}]", row) for row in read_rows(source, ["id", "captions", "masks"]))
        return _beside(index, _masks_of(rows), "predicted_masks", fingerprint(source))
    for path in (source, *(source / name for name in LISTS)):
        if path.is_file() and path.suffix != ".parquet":
            found = _pngs_of(path)
            pngs = [Path(given.mask) for own in found.values() for given in own]
            return _beside(index, found, "predicted_pngs", _hash([read_text(path), *map(_mark, pngs)]))
    if files := [source] if source.is_file() else sorted(source.glob("*.parquet")):
        rows = ((f"{path}, row {n}", row) for path in files for n, row in enumerate(_columns(path)))
        return _beside(index, _masks_of(rows), "predicted_masks", _hash(map(_mark, files)))
    if not source.is_dir():
        raise DataError(f"predictions: no folder, list or Parquet file {source}")
    return _of_folder(index, source, classes)


def _beside(index: pa.Table, found: Found, column: str, mark: str) -> Predictions:
    rows = [found.pop(i, []) for i in index["id"].to_pylist()]
    table = index
    for number, name in enumerate(("predicted_captions", "predicted_tasks", column)):
        table = table.append_column(name, pa.array([[given[number] for given in row] for row in rows], TEXTS))
    return Predictions(rows=table, fingerprint=mark, unused=sum(map(len, found.values())))


def _mark(path: Path) -> tuple[Any, ...]:
    """What changes when a file does, without reading it."""
    return str(path), *(stamp(path) or ("absent",))


def _hash(parts: Iterable[Any]) -> str:
    return sha256(repr(list(parts)).encode()).hexdigest()[:12]


# --- lists and Parquet -----------------------------------------------------------------------------------------------


def _pngs_of(path: Path) -> Found:
    found: Found = {}
    for where, row in _lines(path):
        if missing := [c for c in ("id", "png") if row.get(c) in (None, "")]:
            raise DataError(f"{where}: lacks {', '.join(missing)}; a prediction has {OF_A_LIST}")
        sample, given = _checked(where, row, _text(row, "png", where))
        found.setdefault(sample, []).append(given._replace(mask=str((path.parent / given.mask).absolute())))
    return found


def _lines(path: Path) -> Iterator[tuple[str, Row]]:
    """The place of each line and what it holds."""
    text = io.StringIO(read_text(path), newline="")
    if path.suffix.lower() == ".csv":
        rows = csv.DictReader(text)
        try:
            for row in rows:
                yield f"{path}, line {rows.line_num}", row
        except csv.Error as error:
            raise DataError(f"{path}, after line {rows.line_num}: not CSV ({error})") from error
        return
    for where, line in ((f"{path}, line {n}", line) for n, line in enumerate(text, 1) if line.strip()):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}: can't be read as JSON ({error})") from error
        if not isinstance(row, dict):
            raise DataError(f"{where}: not an object with {OF_A_LIST}, but {brief(row)}")
        yield where, row


def _columns(path: Path) -> list[Row]:
    """Rows of any Parquet file, with those of its columns that matter here."""
    table = read_table(path)
    columns = ["id", *(name for names in OF_PARQUET.values() for name in names)]
    kept = table.select([n for n, name in enumerate(table.column_names) if name in columns])
    needed = (("id",), OF_PARQUET["phrase"], OF_PARQUET["mask"])
    if lacks := [" or ".join(names) for names in needed if not {*names} & {*kept.column_names}]:
        raise DataError(f"{path}: has no column {', nor '.join(lacks)}; it has {brief(table.column_names)}")
    return list(kept.to_pylist())


def _masks_of(rows: Iterable[tuple[str, Row]]) -> Found:
    """Of rows with a picture's lists of phrases and masks, or with a phrase and a mask each."""
    found: Found = {}
    for where, row in rows:
        given_as = (next((row[n] for n in names if n in row), None) for names in OF_PARQUET.values())
        phrases, tasks, masks = map(_several, given_as)
        if len(phrases) != len(masks) or (tasks and len(tasks) != len(masks)):
            raise DataError(f"{where}: {len(masks)} masks for {len(phrases)} phrases and {len(tasks)} tasks")
        for phrase, task, mask in zip(phrases, tasks or [None] * len(masks), masks, strict=True):
            parts = {"id": row["id"], "phrase": phrase, "task": task, "mask": mask}
            sample, given = _checked(where, parts, None if mask is None else _text(parts, "mask", where))
            found.setdefault(sample, []).append(given)
    return found


def _several(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _checked(where: str, row: Row, mask: str | None) -> tuple[str, Given]:
    """The picture's id, and the prediction as somebody else wrote it; a task says enough without its phrase."""
    task = None if row.get("task") in (None, "") else _text(row, "task", where)
    phrase = "" if task is not None and row.get("phrase") is None else _text(row, "phrase", where)
    return _text(row, "id", where), Given(phrase, task, mask)


def _text(row: Row, key: str, where: str) -> str:
    """A value that must be text, or, as an id, a whole number."""
    value = row.get(key)
    if key in ("id", "task") and type(value) is int:
        return str(value)
    if isinstance(value, bytes) and value.isascii():  # as pycocotools has its counts
        return value.decode()
    if not isinstance(value, str) or NOT_UNICODE.search(value):
        raise DataError(f"{where}: {key!r} must be Unicode text, this is {brief(value)}")
    return value


# --- folders of PNGs -------------------------------------------------------------------------------------------------


def _of_folder(index: pa.Table, source: Path, classes: tuple[str, ...]) -> Predictions:
    """Folders by id, files by phrase, number or task."""
    folders = {p.name: sorted(p.glob("*.[pP][nN][gG]")) for p in source.iterdir() if p.is_dir()}
    for path in sorted(source.glob("*__*.png")):  # PhraseCut's evaluator takes such a name for a task's id
        folders.setdefault(path.name.split("__")[0], []).append(path)
    if not any(folders.values()):
        raise DataError(
            f"predictions: {source} is no folder of rlfseg and has no ID/*.png, *.parquet, {' or '.join(LISTS)}"
        )
    found: Found = {}
    marks = [_mark(path) for _, own in sorted(folders.items()) for path in own]
    for row in index.select(["id", "captions"]).to_pylist():
        files = folders.pop(row["id"], None) or folders.pop(file_name(row["id"]), [])
        found[row["id"]] = _by_name(files, row["captions"], classes)
    return replace(_beside(index, found, "predicted_pngs", _hash(marks)), unused=sum(map(len, folders.values())))


def _by_name(files: list[Path], captions: list[str], classes: tuple[str, ...]) -> list[Given]:
    """Files whose names are neither a phrase nor a number are of a task of that name, or of nothing."""
    if bad := [path for path in files if NOT_UNICODE.search(str(path))]:
        raise DataError(f"predictions: {brief(str(bad[0]))}: the name isn't Unicode text")
    if numbers := {p: int(p.stem) for p in files if re.fullmatch("[0-9]+", p.stem)}:
        numbered, n_phrases = {n: str(p) for p, n in numbers.items()}, len(captions)
        own = [Given(caption, None, numbered.get(n)) for n, caption in enumerate(captions)]
        return own + [Given(p.name, None, str(p)) for p in files if numbers.get(p, n_phrases) >= n_phrases]
    phrases = {name: c for c in (*classes, *captions) for name in (c, file_name(c))}
    found = []
    for path in files:
        name = path.stem if path.stem in phrases else re.sub(r"^[0-9]+-", "", path.stem)
        task = None if name in phrases else path.stem
        found.append(Given(phrases.get(name, path.name), task, str(path)))
    return found


# --- pixels ----------------------------------------------------------------------------------------------------------


class LoadPredicted:
    """Index row of `find`, and the true phrases -> the score of each of them.

    Args:
        source: The folder or list, as given to `find`.
        values: What PNGs hold.
        classes: Phrases whose predictions are wanted even where the picture doesn't have them, for `semseg`.
    """

    def __init__(self, source: Path, values: Values = "auto", classes: Iterable[str] = ()):
        self.source, self.values, self.classes = source, values, frozenset(classes)
        self.other, self.shards = None, {}
        if (source / hdf5.INDEX).is_file():
            index = hdf5.read_index(source)  # the same ids may lie in shards of other names
            self.other = LoadSample(source)
            self.shards = dict(zip(index["id"].to_pylist(), index["shard"].to_pylist(), strict=True))

    def __call__(self, row: Row, size: tuple[int, int], captions: Sequence[str], tasks: Sequence[str | None]) -> Row:
        """Matches and reads the predictions of one picture.

        Args:
            row: Its index row.
            size: (H, W) of the picture.
            captions: Its true phrases.
            tasks: Their ids in the data set, where they have one.

        Returns:
            `scores`, float32 [H, W] in [0, 1] a true phrase, None where there is none; `others`, phrase and score of
            each of `classes` that the picture doesn't have; `unused`, how many predictions are neither.

        Raises:
            BadSample: A prediction is damaged, or of another size than the picture.
        """
        given = list(self._given(row))
        by_task = all(tasks) and all(g.task for g in given)
        waiting: dict[str | None, list[Given]] = {}
        for g in given:
            waiting.setdefault(g.task if by_task else g.phrase, []).append(g)
        own = [waiting[key].pop(0) if waiting.get(key) else None for key in (tasks if by_task else captions)]
        left = [g for rest in waiting.values() for g in rest if g.mask is not None]
        others = [g for g in left if g.phrase in self.classes.difference(captions)]
        return {
            "scores": [None if g is None or g.mask is None else self._read(g, row, size) for g in own],
            "others": [(g.phrase, self._read(g, row, size)) for g in others],
            "unused": len(left) - len(others),
        }

    def _given(self, row: Row) -> Iterable[Given]:
        if self.other is not None:
            shard = self.shards.get(row["id"])
            sample = self.other(row | {"shard": shard}) if shard else {"captions": [], "tasks": [], "labels": []}
            return map(Given, sample["captions"], sample["tasks"], sample["labels"])
        masks = row["predicted_masks"] if "predicted_masks" in row else row["predicted_pngs"]
        return map(Given, row["predicted_captions"], row["predicted_tasks"], masks)

    def _read(self, given: Given, row: Row, size: tuple[int, int]) -> NDArray[np.float32]:
        if self.other is not None:
            mask = given.mask
        elif "predicted_pngs" in row:
            mask = load_score(given.mask, sample=row["id"], values=self.values)
        else:
            try:
                mask = images.rle_decode(given.mask, size)
            except DataError as error:
                raise BadSample(str(error), file=str(self.source), sample=row["id"]) from error
        if mask.shape != size:
            here, wanted = (" x ".join(map(str, s[::-1])) for s in (mask.shape, size))
            reason = (
                f"the prediction of {given.phrase!r} is {here} pixels, the picture {wanted}; predict at original size"
            )
            raise BadSample(reason, file=str(self.source), sample=row["id"])
        return np.asarray(mask, np.float32)


def load_score(path: str, *, sample: str | None = None, values: Values = "auto") -> NDArray[np.float32]:
    """Decodes a prediction: grey levels of 8 or 16 bits as scores, or a mask as scores of 0 and 1.

    Args:
        path: The PNG.
        sample: Id of the picture, for errors.
        values: What the numbers are: `scores` are divided by 255 or 65535, `masks` read as by `images.load_mask`.
            `auto` tells them apart, and refuses the one file that may be either: 8-bit grey with nothing above 1.

    Returns:
        float32 [H, W] in [0, 1].

    Raises:
        BadSample: Damaged, too large, no such values, or it isn't clear what the numbers are.
    """
    with images.opened(path, name=path, sample=sample) as image:
        highest = GREY.get(image.mode)
        levels = np.array(image) if highest and values != "masks" else None
    if levels is None or highest is None:
        return images.load_mask(path, name=path, sample=sample).astype(np.float32)
    if values == "auto" and highest == 255 and levels.max() == 1:
        reason = "8-bit grey with nothing above 1: a mask, or very low scores? Give --png_values masks, or scores"
        raise BadSample(reason, file=path, sample=sample)
    return levels.astype(np.float32) / np.float32(highest)
