"""The bench of data, small: its two sides come to the same, whatever time they take."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from rlfseg.metrics import ClipSeg
from rlfseg.pipeline import bench_data
from rlfseg.pipeline.bench_data import SETS, measures, memory, reading, scored, write_sets


def test_measures_come_to_the_same_as_loops() -> None:
    rows = measures([scored(n)[:2] for n in range(2)], rounds=1)
    assert [row.goal for row in rows] == [20, 20, None]
    assert all(row.ours > 0 and row.ratio == pytest.approx(row.baseline / row.ours) for row in rows)


def test_measures_that_differ_are_no_comparison(monkeypatch: pytest.MonkeyPatch) -> None:
    real = ClipSeg.of

    def wrong(score: np.ndarray, truth: np.ndarray) -> ClipSeg:
        found = real(score, truth)
        found.tp[3] -= 1
        return found

    monkeypatch.setattr(ClipSeg, "of", wrong)
    with pytest.raises(AssertionError, match="came to"):
        measures([scored(0)], rounds=1)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_reading_and_memory_on_ray(tmp_path: Path, ray: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_data, "DIFFERENT", 3)
    write_sets(tmp_path, 8)
    row = reading(tmp_path, rounds=1)
    assert row.ours > 0 < row.baseline
    row = memory(tmp_path)
    assert f"{8 * bench_data.PHRASES * SETS['half'] // SETS['all']} saved" in row.name
    assert 0.01 < row.ours < 64  # GiB
