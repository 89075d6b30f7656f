"""The table of predictions, a row a phrase."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rlfseg.errors import DataError
from rlfseg.pipeline.predict import SCHEMA
from rlfseg.results import unnest


def picture(name: str, captions: list[str], status: str = "ok") -> dict[str, object]:
    return {
        "id": name,
        "status": status,
        "height": 3,
        "width": 4,
        "captions": captions,
        "masks": [None if c == "bad" else f"rle of {c}" for c in captions],
        "scores": [0.5 for _ in captions],
        "areas": [len(c) for c in captions],
        "outcomes": ["ok" for _ in captions],
    }


def test_each_phrase_has_a_row(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    parts = [[picture("a", ["dog", "bad"]), picture("b", [])], [picture("c", ["cat"]), picture("d", [], "no picture")]]
    for n, rows in enumerate(parts):
        pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), tmp_path / "data" / f"{n}.parquet")
    table = unnest(tmp_path)
    assert list(table.columns) == ["id", "height", "width", "caption", "mask", "score", "area", "outcome"]
    assert table["mask"].isna().tolist() == [False, True, False]
    seen = [tuple(row) for row in table[["id", "height", "width", "caption", "area"]].itertuples(index=False)]
    assert seen == [("a", 3, 4, "dog", 3), ("a", 3, 4, "bad", 3), ("c", 3, 4, "cat", 3)]
    assert table["mask"][2] == "rle of cat"
    assert len(table.index.unique()) == 3


def test_no_predictions(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no predictions"):
        unnest(tmp_path)
