"""The default protocol, `rlfseg` (section 4.1): at original size, one threshold for the whole set."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from rlfseg.errors import DataError
from rlfseg.metrics.masks import Mask, boundary_f, boundary_iou, overlap, ratio
from rlfseg.metrics.scores import (
    BINS,
    THRESHOLDS,
    Counts,
    Score,
    average_precision,
    iou_by_threshold,
    score_histograms,
)
from rlfseg.metrics.sums import PRECISION_AT, UNIT, Additive, units, zeros


@dataclass(kw_only=True, eq=False)
class Sums(Additive):
    """What all measures of the default protocol are computed from.

    Attributes:
        n_samples: Samples measured.
        n_empty_truth: Those of them whose true mask is empty; they have no AP of their own.
        iou: Sum of IoU at the given threshold, in 1 / UNIT.
        iou_by_threshold: The same for each of THRESHOLDS.
        intersection: Pixels of all intersections at the given threshold.
        union: Pixels of all unions at the given threshold.
        hits: Samples whose IoU reaches each of PRECISION_AT.
        ap: Sum of the samples' own AP, in 1 / UNIT.
        boundary_iou: Sum of Boundary IoU, in 1 / UNIT.
        boundary_iou_coco: Sum of the smaller of IoU and Boundary IoU, in 1 / UNIT.
        boundary_f: Sum of DAVIS's boundary F, in 1 / UNIT.
        negatives: Histogram of the scores outside the true masks.
        positives: Histogram of the scores inside them.
    """

    n_samples: int = 0
    n_empty_truth: int = 0
    iou: int = 0
    iou_by_threshold: Counts = field(default_factory=zeros(len(THRESHOLDS)))
    intersection: int = 0
    union: int = 0
    hits: Counts = field(default_factory=zeros(len(PRECISION_AT)))
    ap: int = 0
    boundary_iou: int = 0
    boundary_iou_coco: int = 0
    boundary_f: int = 0
    negatives: Counts = field(default_factory=zeros(2 * BINS))
    positives: Counts = field(default_factory=zeros(2 * BINS))

    @classmethod
    def of(cls, score: Score, truth: Mask, threshold: float) -> Sums:
        """Measures one sample.

        Args:
            score: Scores at the image's original size.
            truth: True mask.
            threshold: The one calibrated threshold, the same for every sample of the set.

        Returns:
            Its sums.

        Raises:
            DataError: A score is NaN or outside [0, 1], or the shapes differ.
        """
        histograms = score_histograms(score, truth)
        pred, truth = score > float(threshold), truth.astype(bool)
        intersection, union = overlap(pred, truth)
        iou, border = float(ratio(intersection, union)), boundary_iou(pred, truth)
        return cls(
            n_samples=1,
            n_empty_truth=int(not truth.any()),
            iou=units(iou),
            iou_by_threshold=units(iou_by_threshold(histograms)),
            intersection=intersection,
            union=union,
            hits=(iou >= np.array(PRECISION_AT)).astype(np.int64),
            ap=units(average_precision(histograms)),
            boundary_iou=units(border),
            boundary_iou_coco=units(min(iou, border)),
            boundary_f=units(boundary_f(pred, truth)),
            negatives=histograms[0],
            positives=histograms[1],
        )

    def add(self, score: Score, truth: Mask, threshold: float) -> None:
        """Adds one sample; raises as `of`, and adds nothing then."""
        self.merge(self.of(score, truth, threshold))

    def miou_by_threshold(self) -> NDArray[np.float64]:
        """Mean IoU at each of THRESHOLDS, float64 [49]."""
        return self.iou_by_threshold / (UNIT * max(self.n_samples, 1))

    def histograms(self) -> NDArray[np.int64]:
        """Negatives and positives of the whole set, int64 [2, 2048]."""
        return np.stack([self.negatives, self.positives])

    def results(self) -> dict[str, float]:
        """All measures by name.

        `miou` and `oiou` are at the given threshold: the mean of the samples' IoU, and all intersections over all
        unions. `best_miou` is the highest mean over THRESHOLDS, with one `best_threshold` for the whole set. `p@k` is
        the share of samples with IoU >= k. `ap_pooled` is over all pixels of the set, `ap_sample` the mean over the
        samples whose true mask isn't empty; both are 0 where there is none. The boundary measures are means.

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
            "oiou": float(ratio(self.intersection, self.union)),
            "best_miou": float(curve[best]),
            "best_threshold": float(THRESHOLDS[best]),
            **{f"p@{k}": float(hits / n) for k, hits in zip(PRECISION_AT, self.hits, strict=True)},
            "ap_pooled": average_precision(self.histograms()),
            "ap_sample": self.ap / UNIT / max(n - self.n_empty_truth, 1),
            "boundary_iou": self.boundary_iou / UNIT / n,
            "boundary_iou_coco": self.boundary_iou_coco / UNIT / n,
            "boundary_f": self.boundary_f / UNIT / n,
            "n_samples": n,
            "n_empty_truth": self.n_empty_truth,
        }
