"""Rows in = rows out, and the guard against samples that kill their process, driven by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from rlfseg.errors import BadSample
from rlfseg.pipeline.rows import OK, Attempts, Row, RowByRow, Rows, pack, unpack
from rlfseg.pipeline.stages import check_rows


class Killed(BaseException):
    """Stands for SIGKILL: nothing after it runs."""


def work(rows: Rows) -> Rows:
    if any(row["id"].startswith("poison") for row in rows):
        raise Killed
    return [{"id": row["id"], "status": OK} for row in rows]


def restart_until_done(notes: Path, rows: Rows) -> tuple[int, Rows]:
    """What Ray does with a batch whose process died: a new process, the same batch."""
    for deaths in range(10):
        try:
            return deaths, Attempts(notes).guard(work, rows)
        except Killed:
            continue
    raise AssertionError("died for ever")


def test_a_poison_sample_is_refused_after_two_deaths_alone_and_its_batch_survives(tmp_path: Path) -> None:
    rows: list[Row] = [{"id": name} for name in ("a", "poison", "b")]
    deaths, done = restart_until_done(tmp_path, rows)
    assert deaths == 3  # once together, twice alone
    assert [row["id"] for row in done] == ["a", "poison", "b"]
    assert [row["status"] for row in done][::2] == [OK, OK]
    assert "died 3 times" in done[1]["status"]


def test_two_poison_samples_in_a_batch_are_both_found(tmp_path: Path) -> None:
    deaths, done = restart_until_done(tmp_path, [{"id": name} for name in ("poison-1", "a", "poison-2")])
    assert deaths == 5  # once together, twice each alone
    assert ["refused" in row["status"] for row in done] == [True, False, True]


def test_work_that_ends_leaves_no_notes(tmp_path: Path) -> None:
    assert len(Attempts(tmp_path).guard(work, [{"id": "a"}, {"id": "b"}])) == 2
    assert list(tmp_path.iterdir()) == []


def test_an_exception_is_no_death(tmp_path: Path) -> None:
    def away(rows: Rows) -> Rows:
        raise OSError("the bucket can't be reached")

    for _ in range(5):
        with pytest.raises(OSError, match="bucket"):
            Attempts(tmp_path).guard(away, [{"id": "a"}])
    assert Attempts(tmp_path).guard(work, [{"id": "a"}]) == [{"id": "a", "status": OK}]


def test_a_job_that_was_killed_often_blames_nobody(tmp_path: Path) -> None:
    rows: list[Row] = [{"id": name} for name in ("a", "b")]

    def driver_killed(rows: Rows) -> Rows:
        raise Killed

    for _ in range(6):
        with pytest.raises(Killed):
            Attempts(tmp_path).guard(driver_killed, rows)
        Attempts(tmp_path).forgive()
    calls: list[int] = []

    def counted(rows: Rows) -> Rows:
        calls.append(len(rows))
        return work(rows)

    assert [row["status"] for row in Attempts(tmp_path).guard(counted, rows)] == [OK, OK]
    assert calls == [1, 1]  # alone: one of them may have killed it
    deaths, done = restart_until_done(tmp_path, [*rows, {"id": "poison"}])
    assert [row["status"] == OK for row in done] == [True, True, False]
    assert deaths == 3


def test_notes_of_living_processes_and_half_written_ones_blame_nobody(tmp_path: Path) -> None:
    early = Attempts(tmp_path)
    early.guard(work, [{"id": "a"}])
    (tmp_path / "of-another.json").write_text('{"b": 1}')
    (tmp_path / "half.json").write_text('{"c"')
    calls: list[int] = []

    def counted(rows: Rows) -> Rows:
        calls.append(len(rows))
        return work(rows)

    early.guard(counted, [{"id": "b"}, {"id": "c"}])  # began before the note was there: its writer is alive
    Attempts(tmp_path).guard(counted, [{"id": "c"}, {"id": "d"}])
    assert calls == [2, 2]


def test_a_bad_row_is_refused_and_the_others_go_on() -> None:
    def half(row: Row) -> Row:
        if row["n"] % 2:
            raise BadSample("odd", file="numbers", sample=row["id"])
        return {"id": row["id"], "half": row["n"] // 2}

    done = RowByRow(half)([{"id": str(n), "n": n} for n in range(4)])
    assert [row["status"] for row in done] == [OK, "refused: numbers [1]: odd", OK, "refused: numbers [3]: odd"]
    assert [row.get("half") for row in done] == [0, None, 1, None]


@pytest.mark.parametrize("rows", [[], [{"id": "a"}, {"id": "a"}], [{"id": "b"}]])
def test_lost_doubled_and_new_rows_are_found(rows: Rows) -> None:
    with pytest.raises(AssertionError, match="lost or doubled"):
        check_rows("refine", ["a"], rows)
    check_rows("refine", ["a"], [{"id": "a"}])


# --- on the way ------------------------------------------------------------------------------------------------------


@given(
    arrays=st.lists(hnp.arrays(st.sampled_from([np.uint8, np.float32, np.bool_]), hnp.array_shapes(min_side=0))),
    cut=st.integers(0, 3),
)
def test_rows_arrive_as_they_were_sent(arrays: list[NDArray[Any]], cut: int) -> None:
    rows = [{"id": str(n), "status": OK, "array": a, "turned": a.T, "text": "a\0ü"} for n, a in enumerate(arrays)]
    table = pack(rows)
    assert table.num_rows == len(rows)
    for got, sent in zip(unpack(table.slice(cut)), rows[cut:], strict=True):
        assert got.keys() == sent.keys()
        assert (got["id"], got["text"]) == (sent["id"], sent["text"])
        for key in ("array", "turned"):
            assert got[key].dtype == sent[key].dtype
            np.testing.assert_array_equal(got[key], sent[key])
            assert not got[key].flags.writeable  # it lies in Ray's store


def test_index_rows_are_unpacked_as_they_are() -> None:
    rows = [{"id": "1", "captions": ["a", "b"]}, {"id": "2", "captions": []}]
    assert unpack(pa.Table.from_pylist(rows)) == rows
