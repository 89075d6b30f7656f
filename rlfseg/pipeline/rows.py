"""Rows on their way through a stage, and the guard against a sample that kills its process."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from rlfseg.errors import BadSample

Row = dict[str, Any]
Rows = list[Row]
OK = "ok"
ALONE_DEATHS = 2  # a sample that took its process down so often while alone is refused


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


class Attempts:
    """Notes on disk of what is being worked on, so that a sample that kills its process is found out.

    A batch's note is written before its work and removed after it. What a process finds when it looks for the first
    time was left by dead ones: Ray gives a dead process's batch to a new one.

    Args:
        folder: Where the notes lie; shared by all processes that do the same work.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.deaths: dict[str, int] | None = None

    def guard(self, work: Work, rows: Rows) -> Rows:
        """`work(rows)`; rows that an earlier process died on are worked on alone, refused after two deaths alone."""
        if self.deaths is None:
            self.deaths = self._read()
        if any(row["id"] in self.deaths for row in rows):
            return [self._alone(work, row, self.deaths.get(row["id"], 0)) for row in rows]
        return self._noted(work, rows, 1) if rows else []

    def _alone(self, work: Work, row: Row, deaths: int) -> Row:
        if deaths > ALONE_DEATHS:
            return refused(row, f"its process died {deaths} times while working on it")
        return self._noted(work, [row], deaths + 1)[0]

    def _noted(self, work: Work, rows: Rows, deaths: int) -> Rows:
        note = self.folder / f"{uuid.uuid4().hex}.json"
        note.write_text(json.dumps(dict.fromkeys([row["id"] for row in rows], deaths)))
        done = work(rows)
        note.unlink()
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
