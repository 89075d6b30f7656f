"""Works and loaders for stages on real Ray, apart from the tests: a worker imports this and no model."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import numpy as np

from rlfseg.config import ShapesConfig
from rlfseg.datasets.records import Loaded
from rlfseg.errors import BadSample, ConfigError
from rlfseg.pipeline.prepare import drawn
from rlfseg.pipeline.rows import OK, Row, Rows

PATIENCE = 120.0  # seconds to wait for what happens at once, on a busy machine


class Count:
    """Work: counts the pixels of each picture."""

    def __call__(self, rows: Rows) -> Rows:
        return [{"id": row["id"], "status": OK, "value": row["image"].size} for row in rows]


class Slow(Count):
    """Work: takes two seconds a batch."""

    def __call__(self, rows: Rows) -> Rows:
        time.sleep(2)
        return super().__call__(rows)


class TooLarge:
    """Work: more than a GPU holds."""

    def __call__(self, rows: Rows) -> Rows:
        raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB")


def weight_of_its_number(row: Row) -> int:
    """Bytes: a quarter of a GiB a row, times its number."""
    return int(row["id"]) * 2**28


class Together:
    """Work: the number of the first row that was in the batch."""

    def __call__(self, rows: Rows) -> Rows:
        first = min(int(row["id"]) for row in rows)
        return [{"id": row["id"], "status": OK, "value": first} for row in rows]


def paint(row: Row) -> Row:
    """Load: pictures of as many sizes as there are rows."""
    n = int(row["id"])
    return row | {"image": np.zeros((3 + n % 7, 2 + n, 3), np.uint8)}


class Megabyte:
    """Load: a picture of 1 MB."""

    def __call__(self, row: Row) -> Row:
        return row | {"image": np.full((600, 600, 3), int(row["id"]) % 256, np.uint8)}


def truth(n: int) -> int:
    """What Count makes of it."""
    return 3 * (3 + n % 7) * (2 + n)


def as_it_is(row: Row) -> Row:
    """Finish: nothing to do."""
    return row


def wait_for(folder: Path, pattern: str) -> None:
    """Until there is such a file."""
    end = time.monotonic() + PATIENCE
    while not any(folder.glob(pattern)):
        if time.monotonic() > end:
            raise BadSample(f"{pattern} never came", file=str(folder))
        time.sleep(0.02)


class PaintBackwards:
    """Load: a block waits until the one behind it is loaded, so that they end in reverse order."""

    def __init__(self, folder: Path, blocks: int):
        self.folder, self.blocks = folder, blocks

    def __call__(self, row: Row) -> Row:
        block = int(row["id"]) // 2
        if block + 1 < self.blocks:
            wait_for(self.folder, f"{2 * (block + 1)}.loaded")
        (self.folder / f"{row['id']}.loaded").touch()
        return paint(row)


class PaintLast:
    """Load: the last picture is not there before the first has been written."""

    def __init__(self, out: Path, last: int):
        self.out, self.last = out, last

    def __call__(self, row: Row) -> Row:
        if row["id"] == str(self.last):
            wait_for(self.out / "_checkpoint", "*[!g].parquet")  # committed: not `.pending.parquet`
        return paint(row)


class Deadly:
    """A step that dies on one sample, as a decoder in C may."""

    def __init__(self, poison: str, step: Any):
        self.poison, self.step = poison, step

    def __call__(self, given: Any) -> Any:
        if any(row["id"] == self.poison for row in (given if isinstance(given, list) else [given])):
            os._exit(1)
        return self.step(given)


def deadly_count(poison: str) -> Deadly:
    """Work: as Count, but for one sample."""
    return Deadly(poison, Count())


def deadly_scene(poison: str, item: str) -> Loaded:
    """Load of `prepare`: drawn scenes, one of which kills its process."""
    if item == poison:
        os._exit(1)
    return Loaded(drawn(int(item), ShapesConfig()), {}, {})


class Hopeless:
    """Load: every sample is bad."""

    def __call__(self, row: Row) -> Row:
        raise BadSample("it never came", file="nowhere", sample=row["id"])


class Unmade:
    """Work that can't be made."""

    def __init__(self) -> None:
        raise ConfigError("adapter: no such model")
