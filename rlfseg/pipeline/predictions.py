"""Predictions already made, by rlfseg or by another system, as scores a phrase beside the true masks.

    a folder of `prepare`               HDF5: masks by caption
    a folder of `predict` or `refine`   Parquet: masks by caption
    a list, .jsonl or .csv              `id`, `phrase`, `png` a line; paths relative to the list
    a folder                            ID/PHRASE.png, or ID/N.png for the N-th phrase of the picture, from 0

A list may also lie in the folder, as predictions.jsonl or predictions.csv. PNGs hold grey levels of 8 or 16 bits as
scores, or masks. In a folder's names what a file system can't hold is written as by `rlfseg predict --png true`, whose
folder `png` is read as it is. A phrase that comes twice in a picture is matched in order; by N.png, exactly.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from rlfseg import hdf5, images
from rlfseg.errors import BadSample, DataError
from rlfseg.pipeline.folders import file_name, fingerprint, read_rows, require_finished
from rlfseg.pipeline.rows import Row
from rlfseg.pipeline.samples import LoadSample

LISTS = ("predictions.jsonl", "predictions.csv")
COLUMNS = ("id", "phrase", "png")
TEXTS = pa.list_(pa.string())
GREY = {"L": 255, "I;16": 65535}  # Pillow's modes, and the level that means 1
Values = Literal["auto", "masks", "scores"]
Predicted = list[tuple[str, str | None]]  # a phrase, and its mask as RLE or the path of its PNG; None: none


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """What was found of a set's pictures.

    Attributes:
        rows: The set's index with `predicted_captions`, and `predicted_masks` (RLE) or `predicted_pngs` beside them;
            as it was where the predictions lie in HDF5.
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
        source: Folder or list, in any of the forms above.
        classes: Phrases that may have been asked of every picture, for `semseg`.

    Returns:
        The index with what was found.

    Raises:
        DataError: None of these forms, or unfinished, or a line of the list lacks something.
    """
    if (source / hdf5.INDEX).is_file():
        require_finished(source)
        have = set(index["id"].to_pylist())
        unused = sum(i not in have for i in hdf5.read_index(source)["id"].to_pylist())
        return Predictions(rows=index, fingerprint=fingerprint(source), unused=unused)
    if (source / "_STARTED.json").is_file():
        stored = read_rows(source, ["id", "captions", "masks"])
        found = {r["id"]: list(zip(r["captions"], r["masks"], strict=True)) for r in stored}
        return _beside(index, found, "predicted_masks", fingerprint(source))
    listed = [p for p in (source, *(source / name for name in LISTS)) if p.is_file()]
    if listed:
        return _beside(index, _of_list(listed[0]), "predicted_pngs", _hash(listed[0].read_text("utf-8-sig")))
    if not source.is_dir():
        raise DataError(f"predictions: no folder or list {source}")
    return _of_folder(index, source, classes)


def _beside(index: pa.Table, found: dict[str, Predicted], column: str, mark: str) -> Predictions:
    rows = [found.pop(i, []) for i in index["id"].to_pylist()]
    table = index.append_column("predicted_captions", pa.array([[c for c, _ in row] for row in rows], TEXTS))
    table = table.append_column(column, pa.array([[m for _, m in row] for row in rows], TEXTS))
    return Predictions(rows=table, fingerprint=mark, unused=sum(map(len, found.values())))


def _hash(text: str) -> str:
    return sha256(text.encode()).hexdigest()[:12]


def _of_list(path: Path) -> dict[str, Predicted]:
    found: dict[str, Predicted] = {}
    try:
        for where, row in _lines(path):
            if missing := [c for c in COLUMNS if row.get(c) in (None, "")]:
                raise DataError(f"{path}, {where}: lacks {', '.join(missing)}; a prediction has {', '.join(COLUMNS)}")
            found.setdefault(str(row["id"]), []).append((row["phrase"], str((path.parent / row["png"]).absolute())))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, csv.Error) as error:
        raise DataError(f"{path}: can't be read ({error})") from error
    return found


def _lines(path: Path) -> Iterator[tuple[str, Row]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        if path.suffix.lower() == ".csv":
            yield from ((f"line {n}", row) for n, row in enumerate(csv.DictReader(file), 2))
            return
        for n, line in enumerate(file, 1):
            row = json.loads(line) if line.strip() else None
            if isinstance(row, dict):
                yield f"line {n}", row
            elif line.strip():
                raise DataError(f"{path}, line {n}: not an object with {', '.join(COLUMNS)}")


def _of_folder(index: pa.Table, source: Path, classes: tuple[str, ...]) -> Predictions:
    """Folders by id, files by phrase or number; what fits nothing is counted as unused."""
    folders = {p.name: sorted(p.glob("*.[pP][nN][gG]")) for p in source.iterdir() if p.is_dir()}
    if not any(folders.values()):
        raise DataError(f"predictions: {source} is no folder of rlfseg and has no ID/*.png, {' or '.join(LISTS)}")
    found: dict[str, Predicted] = {}
    unused, marks = 0, []
    for row in index.select(["id", "captions"]).to_pylist():
        files = folders.pop(row["id"], None) or folders.pop(file_name(row["id"]), [])
        found[row["id"]] = _by_name(files, row["captions"], classes)
        unused += len(files) - sum(path is not None for _, path in found[row["id"]])
        marks += [(str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in files]
    unused += sum(map(len, folders.values()))
    return replace(_beside(index, found, "predicted_pngs", _hash(repr(marks))), unused=unused)


def _by_name(files: list[Path], captions: list[str], classes: tuple[str, ...]) -> Predicted:
    numbered = {int(p.stem): str(p) for p in files if re.fullmatch(r"[0-9]+", p.stem)}
    if numbered:
        return [(caption, numbered.get(n)) for n, caption in enumerate(captions)]
    phrases = {name: c for c in (*classes, *captions) for name in (c, file_name(c))}
    found: Predicted = []
    for path in files:
        name = path.stem if path.stem in phrases else re.sub(r"^[0-9]+-", "", path.stem)
        if name in phrases:
            found.append((phrases[name], str(path)))
    return found


# --- pixels ----------------------------------------------------------------------------------------------------------


class LoadPredicted:
    """Index row of `find` -> phrases with their scores, or None where a prediction is there but failed.

    Args:
        source: The folder or list, as given to `find`.
        values: What PNGs hold.
    """

    def __init__(self, source: Path, values: Values = "auto"):
        self.source, self.values = source, values
        self.other, self.shards = None, {}
        if (source / hdf5.INDEX).is_file():
            index = hdf5.read_index(source)  # the same ids may lie in shards of other names
            self.other = LoadSample(source)
            self.shards = dict(zip(index["id"].to_pylist(), index["shard"].to_pylist(), strict=True))

    def __call__(self, row: Row, size: tuple[int, int]) -> list[tuple[str, NDArray[np.float32] | None]]:
        """Reads the predictions of one picture.

        Args:
            row: Its index row.
            size: (H, W) of the picture.

        Returns:
            Phrase and float32 scores [H, W] in [0, 1].

        Raises:
            BadSample: A prediction is damaged, or of another size than the picture.
        """
        found: list[tuple[str, NDArray[np.float32] | None]] = []
        for caption, mask in self._masks(row, size):
            if mask is not None and mask.shape != size:
                here, wanted = (" x ".join(map(str, s[::-1])) for s in (mask.shape, size))
                reason = (
                    f"the prediction of {caption!r} is {here} pixels, the picture {wanted}; predict at original size"
                )
                raise BadSample(reason, file=str(self.source), sample=row["id"])
            found.append((caption, None if mask is None else mask.astype(np.float32)))
        return found

    def _masks(self, row: Row, size: tuple[int, int]) -> Iterator[tuple[str, NDArray[np.uint8 | np.float32] | None]]:
        if self.other is not None:
            shard = self.shards.get(row["id"])
            sample = self.other(row | {"shard": shard}) if shard else {"captions": [], "labels": []}
            yield from zip(sample["captions"], sample["labels"], strict=True)
        elif "predicted_masks" in row:
            for caption, counts in zip(row["predicted_captions"], row["predicted_masks"], strict=True):
                try:
                    yield caption, None if counts is None else images.rle_decode(counts, size)
                except DataError as error:
                    raise BadSample(str(error), file=str(self.source), sample=row["id"]) from error
        else:
            for caption, png in zip(row["predicted_captions"], row["predicted_pngs"], strict=True):
                yield caption, None if png is None else load_score(png, sample=row["id"], values=self.values)


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
