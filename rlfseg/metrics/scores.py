"""What scores say at all thresholds at once: histograms that add up, and average precision from them.

`score` is float32 or float64 [H, W] in [0, 1]; a pixel is predicted where score > t.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float32, Float64, Int64
from numpy.typing import NDArray

from rlfseg.errors import DataError
from rlfseg.metrics.masks import Mask, ratio

# Axes of their own: scores and mask that differ in size are a caller's error, and get a DataError.
Score = Float32[np.ndarray, "h w"] | Float64[np.ndarray, "h w"]
Counts = NDArray[np.int64]

THRESHOLDS: NDArray[np.float64] = np.linspace(0, 1, 51)[1:-1]
BINS = 1024

# Each of the BINS equal bins of the score holds at most one threshold and is cut there: bins 2 j and 2 j + 1 are the
# j-th up to its threshold (to its end where it has none) and beyond. So `score > t` is exact for every threshold.
_BIN_OF_THRESHOLD = (THRESHOLDS * BINS).astype(np.int64)
_ABOVE_THRESHOLD = 2 * _BIN_OF_THRESHOLD + 1
_CUT = np.full(BINS + 1, np.inf)  # the score 1 falls into a bin of its own, and is then counted with the last
_CUT[_BIN_OF_THRESHOLD] = THRESHOLDS


def score_histograms(score: Score, truth: Mask) -> Int64[np.ndarray, "2 bins"]:
    """Counts the pixels of each score, apart for the outside and the inside of the true mask.

    Args:
        score: Scores at the mask's size.
        truth: True mask.

    Returns:
        Negatives and positives in 2 x 1,024 bins of rising score, int64 [2, 2048].

    Raises:
        DataError: A score is NaN or outside [0, 1], or the shapes differ.
    """
    if score.shape != truth.shape:
        raise DataError(f"scores of {score.shape} for a mask of {truth.shape}: resize the scores, never the mask")
    check_values(score)
    # In place and in 16 bits: the passes over memory are what this costs
    code = (score * BINS).astype(np.uint16)
    above = np.greater(score, _CUT.astype(score.dtype).take(code, mode="clip"))
    code += code
    code += above
    code += truth.astype(np.uint16) * np.uint16(2 * BINS + 2)
    histograms = np.bincount(code.ravel(), minlength=4 * BINS + 4).reshape(2, BINS + 1, 2)
    histograms[:, -2] += histograms[:, -1]
    return histograms[:, :-1].reshape(2, 2 * BINS)


def above_thresholds(histogram: Counts) -> Counts:
    """Pixels of one histogram whose score is above each of THRESHOLDS, int64 [49]."""
    above: Counts = histogram[::-1].cumsum()[::-1][_ABOVE_THRESHOLD]
    return above


def iou_by_threshold(histograms: Int64[np.ndarray, "2 bins"]) -> NDArray[np.float64]:
    """IoU of a sample at each of THRESHOLDS, float64 [49]; 1 where prediction and truth are both empty."""
    false, true = map(above_thresholds, histograms)
    return ratio(true, histograms[1].sum() + false)


def average_precision(histograms: Int64[np.ndarray, "2 bins"]) -> float:
    """AP = sum_k (R_k - R_{k-1}) P_k over falling scores (scikit-learn's definition); 0 where nothing is positive.

    Args:
        histograms: Negatives and positives by rising score, as from `score_histograms` or a sum of such.

    Returns:
        In [0, 1]: the AP of the scores as they are binned.
    """
    precision, _ = precision_recall(histograms)
    positives = histograms[1, ::-1]
    return float((positives * precision).sum() / max(positives.sum(), 1))


def precision_recall(histograms: Int64[np.ndarray, "2 bins"]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Precision and recall as the threshold falls through the bins, float64 [2048] each; 0 where there is nothing."""
    negatives, positives = histograms[:, ::-1]
    tp, fp = positives.cumsum(), negatives.cumsum()
    return tp / np.maximum(tp + fp, 1), tp / max(tp[-1], 1)


def check_values(score: Score) -> None:
    """Raises DataError where a score is NaN or outside [0, 1]."""
    if not (score.min() >= 0 and score.max() <= 1):  # false for NaN, too
        bad = np.count_nonzero(~((score >= 0) & (score <= 1)))
        raise DataError(f"{bad} of {score.size} scores are NaN or outside [0, 1] ({np.isnan(score).sum()} NaN)")
