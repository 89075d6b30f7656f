"""Rows in = rows out, and the guard against samples that kill their process, driven by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlfseg.pipeline.rows import OK, Attempts, Row, Rows
from rlfseg.pipeline.stages import check_rows


class Killed(BaseException):
    """Stands for SIGKILL: nothing after it runs."""


def work(rows: Rows) -> Rows:
    if any(row["id"] == "poison" for row in rows):
        raise Killed
    return [{"id": row["id"], "status": OK} for row in rows]


def restart_until_done(attempts: Attempts, rows: Rows) -> tuple[int, Rows]:
    """What Ray does with a batch whose actor died: a new actor, the same batch."""
    for deaths in range(10):
        try:
            return deaths, attempts.guard(work, rows)
        except Killed:
            continue
    raise AssertionError("died for ever")


def test_a_poison_sample_is_refused_after_two_deaths_alone_and_its_batch_survives(tmp_path: Path) -> None:
    rows: list[Row] = [{"id": name} for name in ("a", "poison", "b")]
    deaths, done = restart_until_done(Attempts(tmp_path), rows)
    assert deaths == 3  # once together, twice alone
    assert [row["id"] for row in done] == ["a", "poison", "b"]
    assert [row["status"] for row in done][::2] == [OK, OK]
    assert "died 3 times" in done[1]["status"]


def test_work_that_ends_leaves_no_notes(tmp_path: Path) -> None:
    assert len(Attempts(tmp_path).guard(work, [{"id": "a"}, {"id": "b"}])) == 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("rows", [[], [{"id": "a"}, {"id": "a"}], [{"id": "b"}]])
def test_lost_doubled_and_new_rows_are_found(rows: Rows) -> None:
    with pytest.raises(AssertionError, match="lost or doubled"):
        check_rows("refine", ["a"], rows)
    check_rows("refine", ["a"], [{"id": "a"}])
