"""datasets/raster.py: each rule against the library that it names, called as its own tools call it."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask as coco
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from rlfseg.datasets.raster import Rule, rasterise
from rlfseg.errors import DataError

# pycocotools 2.0.11 hands NumPy 2 an array in the old way.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
SIZE = (23, 31)
SQUARE = [0, 0, 0, 9, 9, 9, 9, 0]
RULES: tuple[Rule, ...] = ("pil", "pycocotools")
numbers = st.floats(-8, 40, allow_nan=False)
rings = st.lists(numbers, min_size=6, max_size=16).map(lambda r: r[: len(r) // 2 * 2])


def drawn(outline: Any, rule: Rule, size: tuple[int, int] = SIZE) -> NDArray[np.uint8]:
    mask = rasterise(outline, size, rule).mask
    return np.zeros(size, np.uint8) if mask is None else mask


@pytest.mark.fault("raster-07")
@pytest.mark.parametrize(("rule", "area"), [("pil", 100), ("pycocotools", 81)])
def test_a_square_has_the_area_of_its_rule(rule: Rule, area: int) -> None:
    mask = drawn([SQUARE], rule)
    assert mask.sum() == area
    assert np.array_equal(mask, drawn([SQUARE], rule))  # one function draws for data and for its evaluation


@given(st.lists(rings, min_size=1, max_size=3))
def test_pil_is_phrasecuts_own_rule(polygons: list[list[float]]) -> None:
    canvas = Image.new("L", SIZE[::-1])
    for ring in polygons:
        points = [(int(ring[n]), int(ring[n + 1])) for n in range(0, len(ring), 2)]
        ImageDraw.Draw(canvas).polygon(points, outline=1, fill=1)
    assert np.array_equal(drawn(polygons, "pil"), np.asarray(canvas))


@given(st.lists(rings, min_size=1, max_size=3))
def test_pycocotools_is_cocos_own_rule_and_parts_are_joined(polygons: list[list[float]]) -> None:
    parts = [coco.decode(coco.frPyObjects([ring], *SIZE))[..., 0] for ring in polygons]
    assert np.array_equal(drawn(polygons, "pycocotools"), np.any(parts, axis=0))


@pytest.mark.parametrize("rule", RULES)
def test_overlapping_parts_are_no_holes(rule: Rule) -> None:
    inner = [3, 3, 3, 6, 6, 6, 6, 3]
    assert np.array_equal(drawn([SQUARE, inner], rule), drawn([SQUARE], rule))


def test_two_points_are_a_line_as_phrasecut_draws_them_and_nothing_for_coco() -> None:
    assert drawn([[2, 2, 7, 2]], "pil").sum() == 6
    assert rasterise([[2, 2, 7, 2]], SIZE, "pycocotools") == (None, 1)
    assert rasterise([[2, 2]], SIZE, "pil") == (None, 1)


def test_outside_is_clipped() -> None:
    assert drawn([[-5, -5, -5, 3, 3, 3, 3, -5]], "pil").sum() == 16
    assert drawn([[50, 50, 50, 60, 60, 60]], "pil").sum() == 0
    assert rasterise([[50, 50, 50, 60, 60, 60]], SIZE, "pil").mask is None


@pytest.mark.fault("raster-01", part="draw")
@pytest.mark.fault("raster-02", part="others")
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    "bad",
    [
        *([], [1], [0, 0, 0, 9, 9, 9, 9], None, 7, "text"),
        *([0, 0, x, 9, 9, 9] for x in (float("nan"), float("inf"), "0", None, [0, 9], True, 10**400)),
    ],
    ids=lambda bad: repr(bad)[:30],
)
def test_a_degenerate_polygon_is_left_out_and_counted_wherever_it_stands(rule: Rule, bad: Any) -> None:
    alone, first, last = (rasterise(outline, SIZE, rule) for outline in ([bad], [bad, SQUARE], [SQUARE, bad]))
    assert alone == (None, 1)
    for found in (first, last):
        assert found.dropped == 1
        assert np.array_equal(found.mask, drawn([SQUARE], rule))


@pytest.mark.fault("raster-02")
@pytest.mark.parametrize("order", [1, -1])
def test_four_numbers_are_no_box(order: int) -> None:
    """pycocotools itself raises, or gives areas 45 and 0, by the order; ours drops one ring and says so."""
    rings = [[1, 1, 5, 5], [0, 0, 0, 9, 9, 9]][::order]
    with contextlib.suppress(TypeError):
        assert coco.area(coco.frPyObjects(rings, *SIZE)).tolist() == [45, 0]
    found = rasterise(rings, SIZE, "pycocotools")
    assert found.dropped == 1
    assert found.mask is not None
    assert found.mask.sum() == coco.area(coco.frPyObjects([[0, 0, 0, 9, 9, 9]], *SIZE))[0]


@pytest.mark.fault("raster-01")
@pytest.mark.parametrize("empty", [[], [[]], [[], []]])
def test_an_empty_segmentation_is_no_mask_and_no_crash(empty: list[Any]) -> None:
    assert [rasterise(empty, SIZE, rule).mask for rule in RULES] == [None, None]


def test_hostile_coordinates_cost_neither_time_nor_memory(root: Path) -> None:
    # In a process with limits: what goes through here would take the rasterisers hours or all memory.
    code = """
import resource, signal
resource.setrlimit(resource.RLIMIT_AS, (3 << 30, 3 << 30)); signal.alarm(60)
from rlfseg.datasets.raster import rasterise
far, back_and_forth, long = [0, 0, 1e9, 0, 1e9, 1e9], [0, 0, 300, 300] * 40_000, [1, 2, 3, 4] * 10**6
for rule in ("pil", "pycocotools"):
    print([rasterise([ring], (64, 64), rule) for ring in (far, back_and_forth, long, [-1e30] * 6)])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-500:]
    assert done.stdout.count("Drawn(mask=None, dropped=1)") == 8


# --- run-length encodings --------------------------------------------------------------------------------------------


@pytest.mark.fault("raster-05")
@given(rings)
def test_one_object_in_four_codings_is_one_mask(ring: list[float]) -> None:
    (packed,) = coco.frPyObjects([ring], *SIZE)
    mask = coco.decode(packed)
    changes = np.flatnonzero(np.diff(np.concatenate([[0], mask.T.ravel(), [2]])))
    plain = np.diff(np.concatenate([[0], changes])).tolist()
    codings = [plain, packed["counts"], packed["counts"].decode()]
    for outline in ([ring], *({"size": list(SIZE), "counts": counts} for counts in codings)):
        for rule in ("pycocotools",) if isinstance(outline, list) else RULES:
            assert np.array_equal(drawn(outline, rule), mask)


@pytest.mark.fault("raster-04", part="draw")
@pytest.mark.parametrize(
    ("counts", "reason"),
    [
        ([1, 2], r"counts \[1, 2\] don't describe a mask of 2 x 3 pixels"),
        ([7], "don't describe"),
        ([7, -1], "don't describe"),
        ([3, 3.0], "don't describe"),
        ([2**64, 6], "don't describe"),
        ([2**63 - 1, 2**63 - 1, 8], "don't describe"),
        ([True, 5], "don't describe"),
        ([], "don't describe"),
        ("", "don't describe"),
        ("~~~", "don't describe"),
        (b"\xff\x00", "don't describe"),
        (None, "counts are text, bytes or a list, not None"),
        ({"a": 1}, "counts are text, bytes or a list"),
    ],
)
def test_an_rle_that_does_not_add_up_is_refused(counts: Any, reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        rasterise({"size": [2, 3], "counts": counts}, (2, 3), "pil")


def test_an_rle_of_another_size_is_refused() -> None:
    for size in ([3, 2], [2], None, "2x3"):
        with pytest.raises(DataError, match=r"an RLE of size .*; the picture has \[2, 3\]"):
            rasterise({"size": size, "counts": [6]}, (2, 3), "pil")


@pytest.mark.parametrize("outline", [7, "text", None])
def test_anything_else_is_refused(outline: Any) -> None:
    with pytest.raises(DataError, match="an outline is a list of polygons or an RLE"):
        rasterise(outline, SIZE, "pil")
