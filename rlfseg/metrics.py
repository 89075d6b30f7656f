"""The measures of section 4.1 in the default protocol, `rlfseg`: at original size, one threshold for the whole set.

All thresholds come at once from histograms of the scores. Everything is summed in integers, so that the sums of any
parts, merged in any order, equal those of the whole to the last bit.

Arrays: `score` float32 or float64 [H, W] in [0, 1]; masks bool or uint8 {0, 1} [H, W]. A pixel is predicted where
score > t. Two empty masks have IoU 1.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int64, UInt8
from numpy.typing import NDArray
from scipy import ndimage

from rlfseg.errors import DataError

# Axes of their own: scores and mask that differ in size are a caller's error, and get a DataError.
Score = Float32[NDArray[np.float32], "h w"] | Float64[NDArray[np.float64], "h w"]
Mask = UInt8[NDArray[np.uint8], "H W"] | Bool[NDArray[np.bool_], "H W"]
Counts = NDArray[np.int64]

THRESHOLDS: NDArray[np.float64] = np.linspace(0, 1, 51)[1:-1]
PRECISION_AT = (0.5, 0.6, 0.7, 0.8, 0.9)
BINS = 1024
UNIT = 2**40  # ratios are summed as whole multiples of 1 / UNIT: floats would add up differently in another order

# Each of the BINS equal bins of the score holds at most one threshold and is cut there: bins 2 j and 2 j + 1 are the
# j-th up to its threshold (to its end where it has none) and beyond. So `score > t` is exact for every threshold.
_BIN_OF_THRESHOLD = (THRESHOLDS * BINS).astype(np.int64)
_ABOVE_THRESHOLD = 2 * _BIN_OF_THRESHOLD + 1
_CUT = np.full(BINS, np.inf)
_CUT[_BIN_OF_THRESHOLD] = THRESHOLDS


def iou(pred: Mask, truth: Mask) -> float:
    """Intersection over union of two masks of the same size; 1 if both are empty."""
    return float(_ratio(np.count_nonzero(pred & truth), np.count_nonzero(pred | truth)))


def boundary_iou(pred: Mask, truth: Mask, dilation: float = 0.02) -> float:
    """Boundary IoU (Cheng et al., 2021): IoU of the two masks' inner borders, at original size.

    Args:
        pred: Predicted mask.
        truth: True mask.
        dilation: Width of the border as a fraction of the image's diagonal; at least a pixel.

    Returns:
        In [0, 1]; 1 if both masks are empty.
    """
    width = max(1, round(dilation * float(np.hypot(*truth.shape))))
    return iou(_border(pred, width), _border(truth, width))


def score_histograms(score: Score, truth: Mask) -> Int64[NDArray[np.int64], "2 bins"]:
    """Counts the pixels of each score, apart for the outside and the inside of the true mask.

    Args:
        score: Scores at the mask's size.
        truth: True mask.

    Returns:
        Negatives and positives in 2 x 1,024 bins of rising score, int64 [2, 2048].

    Raises:
        DataError: A score is NaN or outside [0, 1], or the shapes differ.
    """
    _check(score, truth)
    j = np.minimum((score * BINS).astype(np.uint16), BINS - 1)
    above = np.greater(score, _CUT.astype(score.dtype)[j])
    code = (truth.astype(np.uint16) * BINS + j) * 2 + above
    return np.bincount(code.ravel(), minlength=4 * BINS).reshape(2, 2 * BINS)


def average_precision(histograms: Int64[NDArray[np.int64], "2 bins"]) -> float:
    """AP = sum_k (R_k - R_{k-1}) P_k over falling scores (scikit-learn's definition); 0 where nothing is positive.

    Args:
        histograms: Negatives and positives by rising score, as from `score_histograms` or a sum of such.

    Returns:
        In [0, 1]: the AP of the scores as they are binned.
    """
    negatives, positives = histograms[:, ::-1]
    tp, fp = positives.cumsum(), negatives.cumsum()
    precision = tp / np.maximum(tp + fp, 1)
    return float((positives * precision).sum() / max(tp[-1], 1))


@dataclass(kw_only=True, eq=False)
class Sums:
    """What all measures of a set are computed from; parts of a set are measured apart and merged.

    Attributes:
        n_samples: Samples measured.
        n_empty_truth: Those of them whose true mask is empty; they have no AP of their own.
        iou: Sum of IoU at the given threshold, in 1 / UNIT.
        iou_by_threshold: The same for each of THRESHOLDS.
        intersection: Pixels of all intersections at the given threshold.
        union: Pixels of all unions at the given threshold.
        hits: Samples whose IoU reaches each of PRECISION_AT.
        ap: Sum of the samples' own AP, in 1 / UNIT.
        boundary_iou: Sum of boundary IoU, in 1 / UNIT.
        negatives: Histogram of the scores outside the true masks.
        positives: Histogram of the scores inside them.
    """

    n_samples: int = 0
    n_empty_truth: int = 0
    iou: int = 0
    iou_by_threshold: Counts = field(default_factory=lambda: np.zeros(len(THRESHOLDS), np.int64))
    intersection: int = 0
    union: int = 0
    hits: Counts = field(default_factory=lambda: np.zeros(len(PRECISION_AT), np.int64))
    ap: int = 0
    boundary_iou: int = 0
    negatives: Counts = field(default_factory=lambda: np.zeros(2 * BINS, np.int64))
    positives: Counts = field(default_factory=lambda: np.zeros(2 * BINS, np.int64))

    def add(self, score: Score, truth: Mask, threshold: float) -> None:
        """Measures one sample.

        Args:
            score: Scores at the image's original size.
            truth: True mask.
            threshold: The one calibrated threshold, the same for every sample of the set.

        Raises:
            DataError: A score is NaN or outside [0, 1], or the shapes differ; nothing is added then.
        """
        histograms = score_histograms(score, truth)
        pred, truth = score > float(threshold), truth.astype(bool)
        sample_iou = iou(pred, truth)
        self.merge(
            Sums(
                n_samples=1,
                n_empty_truth=int(not truth.any()),
                iou=round(sample_iou * UNIT),
                iou_by_threshold=np.rint(_iou_by_threshold(*histograms) * UNIT).astype(np.int64),
                intersection=int(np.count_nonzero(pred & truth)),
                union=int(np.count_nonzero(pred | truth)),
                hits=(sample_iou >= np.array(PRECISION_AT)).astype(np.int64),
                ap=round(average_precision(histograms) * UNIT),
                boundary_iou=round(boundary_iou(pred, truth) * UNIT),
                negatives=histograms[0],
                positives=histograms[1],
            )
        )

    def merge(self, other: Sums) -> None:
        """Adds the sums of another part of the set."""
        for f in fields(self):
            setattr(self, f.name, getattr(self, f.name) + getattr(other, f.name))

    def miou_by_threshold(self) -> NDArray[np.float64]:
        """Mean IoU at each of THRESHOLDS, float64 [49]."""
        return self.iou_by_threshold / (UNIT * max(self.n_samples, 1))

    def results(self) -> dict[str, float]:
        """All measures by name.

        `miou` and `oiou` are at the given threshold: the mean of the samples' IoU, and all intersections over all
        unions. `best_miou` is the highest mean over THRESHOLDS, with one `best_threshold` for the whole set. `p@k` is
        the share of samples with IoU >= k. `ap_pooled` is over all pixels of the set, `ap_sample` the mean over the
        samples whose true mask isn't empty; both are 0 where there is none.

        Returns:
            Fractions in [0, 1], where more is better, `best_threshold`, and the counts `n_samples` and `n_empty_truth`.

        Raises:
            DataError: No sample was measured.
        """
        n = self.n_samples
        if n == 0:
            raise DataError("no sample was measured: the set is empty, or all its samples were refused")
        curve = self.miou_by_threshold()
        best = int(curve.argmax())
        return {
            "miou": self.iou / UNIT / n,
            "best_miou": float(curve[best]),
            "best_threshold": float(THRESHOLDS[best]),
            "oiou": float(_ratio(self.intersection, self.union)),
            **{f"p@{k}": float(hits / n) for k, hits in zip(PRECISION_AT, self.hits, strict=True)},
            "ap_pooled": average_precision(np.stack([self.negatives, self.positives])),
            "ap_sample": self.ap / UNIT / max(n - self.n_empty_truth, 1),
            "boundary_iou": self.boundary_iou / UNIT / n,
            "n_samples": n,
            "n_empty_truth": self.n_empty_truth,
        }

    def to_dict(self) -> dict[str, Any]:
        """Whole numbers and lists of them, for JSON or Arrow."""
        return {f.name: np.asarray(getattr(self, f.name)).tolist() for f in fields(self)}

    @classmethod
    def from_dict(cls, sums: dict[str, Any]) -> Sums:
        """The inverse of `to_dict`."""
        values: dict[str, Any] = {k: int(v) if np.ndim(v) == 0 else np.asarray(v, np.int64) for k, v in sums.items()}
        return cls(**values)


def _check(score: Score, truth: Mask) -> None:
    if score.shape != truth.shape:
        raise DataError(f"scores of {score.shape} for a mask of {truth.shape}: resize the scores, never the mask")
    if not (score.min() >= 0 and score.max() <= 1):  # false for NaN, too
        bad = np.count_nonzero(~((score >= 0) & (score <= 1)))
        raise DataError(f"{bad} of {score.size} scores are NaN or outside [0, 1] ({np.isnan(score).sum()} NaN)")


def _ratio(intersection: Any, union: Any) -> NDArray[np.float64]:
    return np.where(np.equal(union, 0), 1.0, intersection / np.maximum(union, 1))


def _iou_by_threshold(negatives: Counts, positives: Counts) -> NDArray[np.float64]:
    fp, tp = (h[::-1].cumsum()[::-1][_ABOVE_THRESHOLD] for h in (negatives, positives))
    return _ratio(tp, positives.sum() + fp)


def _border(mask: Mask, width: int) -> Bool[NDArray[np.bool_], "H W"]:
    """The mask's pixels nearer than `width` to its outside, by rows and columns; beyond the image is outside."""
    inside = mask.astype(np.bool_)
    eroded: NDArray[np.bool_] = ndimage.minimum_filter(inside, size=2 * width + 1, mode="constant", cval=False)
    return inside & ~eroded
