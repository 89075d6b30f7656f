"""From the network's scores to masks in the form that a client asked for, at the picture's own size."""

from __future__ import annotations

import base64
import io
from typing import cast

import contourpy
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from rlfseg import images
from rlfseg.results import Result
from serve import schema
from serve.refusal import Refusal

MOST_POINTS = 1_000_000


def found(phrase: str, result: Result, output: schema.Output) -> schema.Found:
    """One entry of an answer.

    Args:
        phrase: As the client wrote it.
        result: Scores at the picture's size.
        output: Form of the mask.

    Returns:
        The mask with its figures.

    Raises:
        Refusal: The network gave NaN, which is no mask, or the outline is too long.
    """
    if result.failed:
        raise Refusal("failed", "the network gave NaN for this phrase on this picture")
    mask = result.mask
    return schema.Found(
        phrase=phrase,
        score=result.confidence,
        area=int(mask.sum(dtype=np.int64)),
        box=box(mask),
        threshold=result.threshold,
        gamma=result.gamma,
        clipped=result.clipped,
        truncated=result.truncated,
        mask=encode(mask, result, output),
    )


def box(mask: NDArray[np.uint8]) -> tuple[int, int, int, int] | None:
    """The smallest [left, top, right, bottom) around a mask [H, W]; None if it is empty."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not rows.size:
        return None
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def encode(mask: NDArray[np.uint8], result: Result, output: schema.Output) -> schema.Mask:
    """A mask, uint8 {0, 1} [H, W], in the form `output`."""
    size = (mask.shape[0], mask.shape[1])
    if output == "rle":
        return schema.Rle(size=size, counts=images.rle_encode(mask))
    if output == "png":
        return schema.Png(data=_png(mask * np.uint8(255)))
    if output == "score":
        return schema.Score(data=_png(np.rint(result.score * 65535).astype(np.uint16)))
    points = sum(int(np.count_nonzero(np.diff(mask, axis=axis))) for axis in (0, 1))
    if points > MOST_POINTS:
        raise Refusal(
            "too_large", f"the outline has about {points} points, more than {MOST_POINTS}; ask for rle or png"
        )
    return schema.Polygons(size=size, rings=rings(result.score, result.threshold))


def length(mask: schema.Mask) -> int:
    """Bytes that a mask takes in an answer, about."""
    if isinstance(mask, schema.Rle):
        return len(mask.counts)
    if isinstance(mask, schema.Polygons):
        return 16 * sum(len(line) for ring in mask.rings for line in (ring.outer, *ring.holes))
    return len(mask.data)


def rings(score: NDArray[np.float32], threshold: float) -> list[schema.Ring]:
    """Outlines of where a score is above a threshold, between pixel centres by linear interpolation.

    Args:
        score: float32 [H, W] in [0, 1].
        threshold: In [0, 1].

    Returns:
        Polygons with their holes; points (x, y) in pixels, in which a pixel's centre is at (column + .5, row + .5).
    """
    # A border one below the threshold: the outline of what touches the edge ends at most half a pixel beyond a centre,
    # and so within the picture.
    padded = np.pad(score.astype(np.float64), 1, constant_values=threshold - 1)
    # The line runs where score equals threshold, and such pixels are not mask: it is moved up by the least possible.
    level = float(np.nextafter(np.float32(threshold), np.float32(2)))
    lines_at = contourpy.contour_generator(z=padded, fill_type=contourpy.FillType.OuterOffset)
    outlines = cast("tuple[list[NDArray[np.float64]], list[NDArray[np.uint32]]]", lines_at.filled(level, np.inf))
    found = []
    for points, offsets in zip(*outlines, strict=True):
        lines = np.split(np.round(points - 0.5, 3), offsets[1:-1].astype(int))
        outer, *holes = ([(float(x), float(y)) for x, y in line] for line in lines)
        found.append(schema.Ring(outer=outer, holes=holes))
    return found


def _png(pixels: NDArray[np.uint8] | NDArray[np.uint16]) -> str:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=3)
    return base64.b64encode(buffer.getvalue()).decode("ascii")
