"""The curve of a training: a row every few steps, appended by rank 0 and read by the driver while it grows."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from rlfseg.pipeline.rows import Row

CURVE = "curve.jsonl"
TAIL = 4096  # bytes that hold its last rows

logger = logging.getLogger(__name__)


@contextmanager
def spared(path: Path) -> Iterator[None]:
    """A training is worth more than a file that shows how it goes: where that can't be written, it goes on."""
    try:
        yield
    except OSError as error:
        logger.warning("%s can't be written, the training goes on: %s", path, error)


def append(path: Path, row: Row) -> None:
    """Writes a row behind the others, as JSON."""
    with spared(path), path.open("a") as lines:
        lines.write(json.dumps(row) + "\n")


def latest(out: Path) -> Row:
    """The last whole row of the curve, read from its end: a driver asks twice a second."""
    with suppress(OSError), (out / CURVE).open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL))
        for line in reversed(file.read().splitlines()):
            with suppress(ValueError):  # half written
                row: Row = json.loads(line)
                return row
    return {}


def read_curve(out: Path) -> list[Row]:
    """The training's curve, a row every `log_every` steps; a repeated step counts once, a line cut by a death not."""
    rows: dict[int, Row] = {}
    path = out / CURVE
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            row = json.loads(line)
            rows[row["step"]] = row
        except (ValueError, KeyError):
            continue
    return [rows[k] for k in sorted(rows)]
