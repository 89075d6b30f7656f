"""What two masks say of each other: IoU, Boundary IoU and DAVIS's boundary F, at whatever size they have.

Masks are bool or uint8 {0, 1} [H, W], both of one size.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Bool, UInt8
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial import KDTree

Mask = UInt8[NDArray[np.uint8], "H W"] | Bool[NDArray[np.bool_], "H W"]


def ratio(intersection: Any, union: Any) -> NDArray[np.float64]:
    """Intersection over union, elementwise; 1 where there is nothing at all."""
    return np.where(np.equal(union, 0), 1.0, intersection / np.maximum(union, 1))


def overlap(pred: Mask, truth: Mask) -> tuple[int, int]:
    """Pixels of the intersection and of the union."""
    return int(np.count_nonzero(pred & truth)), int(np.count_nonzero(pred | truth))


def iou(pred: Mask, truth: Mask) -> float:
    """Intersection over union of two masks of the same size; 1 if both are empty."""
    return float(ratio(*overlap(pred, truth)))


def boundary_iou(pred: Mask, truth: Mask, dilation: float = 0.02) -> float:
    """Boundary IoU (Cheng et al., 2021): IoU of the two masks' inner borders.

    COCO's own evaluation reports the smaller of this and the masks' IoU; so does `boundary_iou_coco` of the results.

    Args:
        pred: Predicted mask.
        truth: True mask.
        dilation: Width of the border as a fraction of the image's diagonal; at least a pixel.

    Returns:
        In [0, 1]; 1 if both masks are empty.
    """
    width = max(1, round(dilation * float(np.hypot(*truth.shape))))
    return iou(_border(pred, width), _border(truth, width))


def boundary_f(pred: Mask, truth: Mask, tolerance: float = 0.008) -> float:
    """F of DAVIS (Perazzi et al., 2016): harmonic mean of the shares of each contour that the other comes near to.

    Args:
        pred: Predicted mask.
        truth: True mask.
        tolerance: How near, as a fraction of the image's diagonal; rounded up to whole pixels.

    Returns:
        In [0, 1]; 1 if neither has a contour (it is empty, or covers all), 0 if only one has.
    """
    a, b = _contour(pred), _contour(truth)
    if not len(a) or not len(b):
        return float(len(a) == len(b))
    radius = float(np.ceil(tolerance * np.linalg.norm(truth.shape)))
    precision, recall = _share_near(a, b, radius), _share_near(b, a, radius)
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def _border(mask: Mask, width: int) -> Bool[NDArray[np.bool_], "H W"]:
    """The mask's pixels nearer than `width` to its outside, by rows and columns; beyond the image is outside."""
    inside = mask.astype(np.bool_)
    eroded: NDArray[np.bool_] = ndimage.minimum_filter(inside, size=2 * width + 1, mode="constant", cval=False)
    return inside & ~eroded


def _contour(mask: Mask) -> NDArray[np.int64]:
    """Pixels that differ from the next one to the right, below or both, [n, 2]; the image's edge is no contour."""
    m = np.pad(mask.astype(np.bool_), (0, 1), mode="edge")
    here = m[:-1, :-1]
    return np.argwhere((here ^ m[:-1, 1:]) | (here ^ m[1:, :-1]) | (here ^ m[1:, 1:]))


def _share_near(points: NDArray[np.int64], others: NDArray[np.int64], radius: float) -> float:
    distance, _ = KDTree(others).query(points, distance_upper_bound=radius + 0.5)  # beyond that: infinite
    return float(np.mean(distance <= radius))
