"""Rows in a stage: how they travel between its steps, and the guard against a sample that kills its process."""

from __future__ import annotations

import itertools
import json
import pickle
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from rlfseg.errors import BadSample

Row = dict[str, Any]
Rows = list[Row]
OK = "ok"
ALONE_DEATHS = 2


class Work(Protocol):
    """The per-item work: a plain class, tested by calling it."""

    def __call__(self, rows: Rows) -> Rows:
        """One row out a row in, with the same `id` and a `status` (`ok`, or why it was refused)."""
        ...


class RowByRow:
    """Work on one row at a time: a row whose function raises BadSample is refused, the others go on.

    Args:
        function: Row -> row.
    """

    def __init__(self, function: Callable[[Row], Row]):
        self.function = function

    def __call__(self, rows: Rows) -> Rows:
        """One row out a row in."""
        return [self._one(row) for row in rows]

    def _one(self, row: Row) -> Row:
        try:
            return {"status": OK} | self.function(row)
        except BadSample as error:
            return refused(row, error)


def refused(row: Row, error: Exception | str) -> Row:
    """The status row of a sample that could not be worked on."""
    return {"id": row["id"], "status": f"refused: {error}"}


def reason(status: str) -> str:
    """Why a row was refused, from its status; `refused` wrote it."""
    return status.removeprefix("refused: ")


MOVED = pa.schema(  # rows between two steps: each a pickle, and then the arrays that it leaves out
    [("id", pa.string()), ("status", pa.string()), ("packed", pa.list_(pa.large_binary()))]
)


def pack(rows: Rows) -> pa.Table:
    """Rows as a table of MOVED; pixels are copied once, into the one buffer that Arrow holds them in."""
    parts, starts = list[Any](), [0]
    for row in rows:
        arrays: list[pickle.PickleBuffer] = []
        parts.append(pickle.dumps(row, protocol=5, buffer_callback=arrays.append))
        parts += [array.raw() for array in arrays]
        starts.append(len(parts))
    ends = np.cumsum([0, *(len(part) for part in parts)], dtype=np.int64)
    joined = [None, pa.py_buffer(ends), pa.py_buffer(b"".join(parts))]
    values = pa.Array.from_buffers(pa.large_binary(), len(parts), joined)
    packed = pa.ListArray.from_arrays(pa.array(starts, pa.int32()), values)
    ids, status = (pa.array([row[key] for row in rows], pa.string()) for key in ("id", "status"))
    return pa.table([ids, status, packed], schema=MOVED)


def unpack(table: pa.Table) -> Rows:
    """What `pack` has packed, arrays as they lie in Ray's store, where nothing is changed; index rows as they are."""
    if "packed" not in table.column_names:
        return list(table.to_pylist())
    return [row for chunk in table["packed"].chunks for row in _unpacked(chunk)]


def _unpacked(chunk: pa.ListArray) -> Iterator[Row]:
    """By Arrow's buffers: its scalars copy."""
    _, ends, data = chunk.values.buffers()
    borders = np.frombuffer(ends, np.int64)[chunk.values.offset :]
    parts = [data.slice(a, b - a) for a, b in itertools.pairwise(borders[: len(chunk.values) + 1].tolist())]
    for first, last in itertools.pairwise(chunk.offsets.to_pylist()):
        # Written by this very job and handed over inside of Ray's object store, where nothing can be changed
        yield dict(pickle.loads(parts[first], buffers=parts[first + 1 : last]))  # noqa: S301


def runs(rows: Rows, weigh: Callable[[Row], int], most: int) -> Iterator[Rows]:
    """Rows in order, as many together as weigh no more than `most`; one that weighs more is alone."""
    start = weight = 0
    for n, row in enumerate(rows):
        weight += (own := weigh(row))
        if weight > most and n > start:
            yield rows[start:n]
            start, weight = n, own
    if rows:
        yield rows[start:]


def score_bytes(resolution: int, row: Row) -> int:
    """What the networks make of a loaded row: scores of each of its `captions` in their own frame, in bytes."""
    return 4 * len(row.get("captions", ())) * resolution**2


class Attempts:
    """Notes on disk of what is being worked on, so that a sample that kills its process is found out.

    A batch's note is written before its work and removed after it, also where it raises. What a process finds when it
    looks for the first time was left by dead ones: Ray gives a dead process's batch to a new one.

    Args:
        folder: Where the notes lie; shared by all processes that do the same work.
        alone_deaths: A sample that took its process down so often while alone is refused.
    """

    def __init__(self, folder: Path, alone_deaths: int = ALONE_DEATHS):
        self.folder, self.alone_deaths = folder, alone_deaths
        self.deaths: dict[str, int] | None = None

    def guard(self, work: Work, rows: Rows) -> Rows:
        """`work(rows)`; rows that an earlier process died on are worked on alone, refused after `alone_deaths`."""
        if self.deaths is None:
            self.deaths = self._read()
        if any(row["id"] in self.deaths for row in rows):
            return [self._alone(work, row, self.deaths.get(row["id"], 0)) for row in rows]
        return self._noted(work, rows, 1) if rows else []

    def forgive(self) -> None:
        """For a job that is started again: what was in work when it died is worked on alone, but not held against it.

        The job may have been killed for any reason; a sample that kills its process will do so again.
        """
        deaths, old = self._read(), list(self.folder.glob("*.json"))
        (self.folder / f"{uuid.uuid4().hex}.json").write_text(json.dumps(dict.fromkeys(deaths, 1)))
        for note in old:
            note.unlink(missing_ok=True)

    def _alone(self, work: Work, row: Row, deaths: int) -> Row:
        if deaths > self.alone_deaths:
            fix = "if for want of memory, start into another `out` with fewer workers or more run.memory_gb"
            return refused(row, f"its process died {deaths} times while working on it; {fix}")
        return self._noted(work, [row], deaths + 1)[0]

    def _noted(self, work: Work, rows: Rows, deaths: int) -> Rows:
        note = self.folder / f"{uuid.uuid4().hex}.json"
        note.write_text(json.dumps(dict.fromkeys([row["id"] for row in rows], deaths)))
        try:
            done = work(rows)
        except Exception:
            note.unlink()  # it lives: the disk is full, say, and these rows are not to blame
            raise
        note.unlink(missing_ok=True)
        return done

    def _read(self) -> dict[str, int]:
        self.folder.mkdir(parents=True, exist_ok=True)
        deaths: dict[str, int] = {}
        for note in self.folder.glob("*.json"):
            try:
                left = json.loads(note.read_text())
            except (FileNotFoundError, ValueError):
                continue  # of a living process: just removed, or being written
            deaths |= {row_id: max(count, deaths.get(row_id, 0)) for row_id, count in left.items()}
        return deaths
