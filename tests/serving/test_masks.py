"""Masks in every form, against Pillow, matplotlib and NumPy."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from matplotlib.path import Path as Outline
from PIL import Image

from rlfseg.results import Result
from serve import masks, schema
from serve.refusal import Refusal

Array = np.ndarray[Any, Any]
# Multiples of 1/8 are never within rounding of a threshold of 0.3
SCORES = hnp.arrays(np.uint8, st.tuples(st.integers(1, 9), st.integers(1, 9)), elements=st.integers(0, 8)).map(
    lambda eighths: (eighths / 8).astype(np.float32)
)


def result(score: Array, threshold: float = 0.3) -> Result:
    return Result(caption="a", score=score, threshold=threshold, gamma=0.0, clipped=False, truncated=False)


def filled(rings: list[schema.Ring], size: tuple[int, ...]) -> Array:
    """Pixels whose centres lie inside an outline and outside its holes."""
    rows, columns = np.mgrid[: size[0], : size[1]]
    centres = np.stack([columns.ravel() + 0.5, rows.ravel() + 0.5], axis=1)
    inside = np.zeros(size, bool)
    for ring in rings:
        own = Outline(ring.outer).contains_points(centres)
        for hole in ring.holes:
            own &= ~Outline(hole).contains_points(centres)
        inside |= own.reshape(size)
    return inside


@given(SCORES)
def test_polygons_hold_exactly_the_mask(score: Array) -> None:
    rings = masks.rings(score, 0.3)
    assert np.array_equal(filled(rings, score.shape), score > 0.3)
    height, width = score.shape
    for ring in rings:
        for x, y in [*ring.outer, *(point for hole in ring.holes for point in hole)]:
            assert 0 <= x <= width
            assert 0 <= y <= height


def test_a_hole_is_a_hole() -> None:
    score = np.ones((9, 9), np.float32)
    score[3:6, 3:6] = 0
    [ring] = masks.rings(score, 0.5)
    assert len(ring.holes) == 1


@pytest.mark.parametrize("threshold", [0.0, 0.5, 1.0])
def test_a_score_at_the_threshold_is_no_mask(threshold: float) -> None:
    score = np.full((4, 5), threshold, np.float32)
    found = masks.found("a", result(score, threshold), "polygons")
    assert (found.area, found.box, found.mask.rings) == (0, None, [])  # type: ignore[union-attr]


@given(SCORES)
def test_box_is_the_smallest(score: Array) -> None:
    mask = (score > 0.3).astype(np.uint8)
    found = masks.box(mask)
    if not mask.any():
        assert found is None
        return
    rows, columns = np.nonzero(mask)
    assert found == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)


def opened(entry: schema.Found) -> Array:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(entry.mask.data))))  # type: ignore[union-attr]


def test_pngs_read_back() -> None:
    score = np.random.default_rng(0).random((7, 11), np.float32)
    score[0, :2] = 0, 1
    mask = masks.found("a", result(score), "png")
    exact = masks.found("a", result(score), "score")
    assert np.array_equal(opened(mask), np.where(score > np.float32(0.3), 255, 0))
    read = opened(exact)
    assert read.max() == 65535
    np.testing.assert_allclose(read / 65535, score, atol=0.5001 / 65535)


def test_figures_of_an_entry() -> None:
    score = np.zeros((4, 6), np.float32)
    score[1:3, 2:5] = 0.5, 0.75, 1.0
    entry = masks.found(" a ", result(score), "rle")
    assert (entry.phrase, entry.area, entry.box, entry.score) == (" a ", 6, (2, 1, 5, 3), 0.75)


def test_nan_is_no_mask() -> None:
    score = np.zeros((4, 6), np.float32)
    score[0, 0] = np.nan
    with pytest.raises(Refusal, match="NaN"):
        masks.found("a", result(score), "rle")


def test_an_endless_outline_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    chequered = np.indices((40, 40)).sum(axis=0).astype(np.float32) % 2
    monkeypatch.setattr(masks, "MOST_POINTS", 2 * 39 * 40 - 1)
    with pytest.raises(Refusal, match="about 3120 points, more than 3119"):
        masks.found("a", result(chequered), "polygons")
    assert masks.found("a", result(chequered), "rle").area == 800
