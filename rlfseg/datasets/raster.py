"""Outlines as annotators drew them become masks at the picture's size, by a rule that has a name.

    pil          PhraseCut's own evaluator: points cut to whole numbers, the outline belongs to the polygon
    pycocotools  COCO and what is built on it: half-open, on a grid five times as fine

A square with corners 0 and 9 has 100 pixels by the first and 81 by the second, so the rule is stored with the masks.
Polygons of one object are joined (OR): where they overlap there is no hole. COCO's run-length encodings carry their
pixels with them and are the same by either rule.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import pycocotools.mask as coco
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from rlfseg.errors import DataError
from rlfseg.images import rle_decode

Rule = Literal["pil", "pycocotools"]
Mask = NDArray[np.uint8]
# Polygons [[x, y, x, y, ...], ...], or COCO's {"size": [H, W], "counts": ...}.
Outline = Sequence[Any] | Mapping[str, Any]

LEAST_NUMBERS: dict[Rule, int] = {"pil": 4, "pycocotools": 6}  # PIL draws two points as a line, as PhraseCut does
# What no annotator draws, and what would take a rasteriser hours or all memory.
MOST_POINTS = 100_000
FAR = 10  # sides of the picture that a point may lie outside of it
LONGEST = 1_000  # sides of the picture that a polygon may be long


class Drawn(NamedTuple):
    """An object's mask, uint8 {0, 1} [H, W], or None where nothing of it can be drawn, and what was left out."""

    mask: Mask | None
    dropped: int  # polygons that are none: too few points, an odd count, no numbers, out of all bounds


def rasterise(outline: Outline, size: tuple[int, int], rule: Rule) -> Drawn:
    """The mask of one object.

    Args:
        outline: Its polygons, in pixels, each a flat list of x, y; or a run-length encoding.
        size: (H, W) of the picture.
        rule: How polygons are filled.

    Returns:
        The mask and how many polygons were left out. The order of polygons makes no difference.

    Raises:
        DataError: A run-length encoding that doesn't add up, or of another size; or something else altogether.
    """
    if isinstance(outline, Mapping):
        return Drawn(_from_rle(outline, size), 0)
    if isinstance(outline, str) or not isinstance(outline, Sequence):
        raise DataError(f"an outline is a list of polygons or an RLE, not {outline!a:.80}")
    rings = [ring for ring in (_ring(polygon, size, rule) for polygon in outline) if ring is not None]
    if not rings:
        return Drawn(None, len(outline))
    mask = (_by_pil if rule == "pil" else _by_pycocotools)(rings, size)
    return Drawn(mask if mask.any() else None, len(outline) - len(rings))


def _ring(polygon: Any, size: tuple[int, int], rule: Rule) -> NDArray[np.float64] | None:
    """A polygon's points, [n, 2], or None where it is none."""
    if not isinstance(polygon, Sequence) or not LEAST_NUMBERS[rule] <= len(polygon) <= 2 * MOST_POINTS:
        return None
    if len(polygon) % 2 or not all(type(number) in (int, float) for number in polygon):
        return None
    try:
        points = np.array(polygon, np.float64).reshape(-1, 2)
    except OverflowError:
        return None
    side = max(size)
    if not (np.isfinite(points).all() and np.abs(points).max() <= (FAR + 1) * side):
        return None
    length = np.abs(np.diff(points, axis=0, append=points[:1])).sum()
    return points if length <= LONGEST * side else None


def _by_pil(rings: list[NDArray[np.float64]], size: tuple[int, int]) -> Mask:
    canvas = Image.new("L", size[::-1])
    for ring in rings:
        # astype cuts towards zero, as int() does
        ImageDraw.Draw(canvas).polygon(ring.astype(np.int64).ravel().tolist(), outline=1, fill=1)
    return np.array(canvas)


def _by_pycocotools(rings: list[NDArray[np.float64]], size: tuple[int, int]) -> Mask:
    encoded = coco.frPyObjects([ring.ravel().tolist() for ring in rings], *size)
    return rle_decode(coco.merge(encoded)["counts"], size)


def _from_rle(rle: Mapping[str, Any], size: tuple[int, int]) -> Mask | None:
    if (declared := rle.get("size")) != list(size):
        raise DataError(f"an RLE of size {declared!a:.80}; the picture has {list(size)}")
    counts = rle.get("counts")
    if not isinstance(counts, str | bytes | list):
        raise DataError(f"RLE counts are text, bytes or a list, not {counts!a:.80}")
    mask = rle_decode(counts, size)
    return mask if mask.any() else None
