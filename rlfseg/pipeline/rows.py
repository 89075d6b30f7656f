"""Rows on their way through a stage, and the guard against a sample that kills its process."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol

Row = dict[str, Any]
Rows = list[Row]
OK = "ok"
ALONE_DEATHS = 2  # a sample that took its process down so often while alone is refused


class Work(Protocol):
    """The per-item work: a plain class, tested by calling it."""

    def __call__(self, rows: Rows) -> Rows:
        """One row out a row in, with the same `id` and a `status` (`ok`, or why it was refused)."""
        ...


def refused(row: Row, error: Exception | str) -> Row:
    """The status row of a sample that could not be worked on."""
    return {"id": row["id"], "status": f"refused: {error}"}


class Attempts:
    """Notes on disk of what is being worked on, so that a sample that kills its process is found out.

    Args:
        folder: Where the notes lie, one a sample; shared by all actors of the stage.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def guard(self, work: Work, rows: Rows) -> Rows:
        """`work(rows)`; rows that an earlier process died on are worked on alone, refused after two deaths alone."""
        deaths = {row["id"]: self._read(row["id"]) for row in rows}
        if any(deaths.values()):
            return [self._alone(work, row, deaths[row["id"]]) for row in rows]
        return self._noted(work, rows, 1) if rows else []

    def _alone(self, work: Work, row: Row, deaths: int) -> Row:
        if deaths > ALONE_DEATHS:
            return refused(row, f"its process died {deaths} times while working on it")
        return self._noted(work, [row], deaths + 1)[0]

    def _noted(self, work: Work, rows: Rows, deaths: int) -> Rows:
        notes = [self._note(row["id"]) for row in rows]
        for note in notes:
            note.write_text(str(deaths))
        done = work(rows)
        for note in notes:
            note.unlink(missing_ok=True)
        return done

    def _read(self, row_id: str) -> int:
        try:
            return int(self._note(row_id).read_text() or 1)
        except FileNotFoundError:
            return 0

    def _note(self, row_id: str) -> Path:
        return self.folder / sha256(row_id.encode(errors="surrogatepass")).hexdigest()[:24]
