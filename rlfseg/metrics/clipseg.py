"""CLIPSeg's measures, which LD-ZNet reports too: every sample in one square, 49 thresholds, `+ 1` below each fraction.

Its AP is Simpson's integral over the recalls that happen to be reached, so that it falls as masks grow sharper: the
same shapes give .86 with soft edges, .17 with hard ones, 0 as 0/1 masks. It is named `ap_clipseg` for that reason.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from operator import itemgetter

import numpy as np
from jaxtyping import Float32, UInt8
from numpy.typing import NDArray
from scipy import integrate

from rlfseg.errors import DataError
from rlfseg.metrics.masks import Mask
from rlfseg.metrics.scores import THRESHOLDS, Counts, Score, above_thresholds, check_values, score_histograms
from rlfseg.metrics.sums import UNIT, Additive, units, zeros

SIDE = 352  # pixels; LD-ZNet: 384
PRINTED = (0.1, 0.2, 0.3, 0.5)  # the thresholds at which CLIPSeg prints its figures


@dataclass(kw_only=True, eq=False)
class ClipSeg(Additive):
    """Sums of the protocol `clipseg`.

    Attributes:
        n_samples: Samples measured.
        pixels: Pixels of all samples.
        positives: Pixels of all true masks.
        tp: Pixels rightly predicted, for each of THRESHOLDS.
        fp: Pixels wrongly predicted, for each.
        iou: Sum of tp / (1 + tp + fp + fn) of the samples, for each, in 1 / UNIT.
    """

    n_samples: int = 0
    pixels: int = 0
    positives: int = 0
    tp: Counts = field(default_factory=zeros(len(THRESHOLDS)))
    fp: Counts = field(default_factory=zeros(len(THRESHOLDS)))
    iou: Counts = field(default_factory=zeros(len(THRESHOLDS)))

    @classmethod
    def of(cls, score: Score, truth: Mask) -> ClipSeg:
        """Measures one sample in the frame that it has; `to_square` first.

        Args:
            score: Scores at the mask's size.
            truth: True mask.

        Returns:
            Its sums.

        Raises:
            DataError: A score is NaN or outside [0, 1], or the shapes differ.
        """
        negatives, positives = score_histograms(score, truth)
        tp, fp, total = above_thresholds(positives), above_thresholds(negatives), int(positives.sum())
        return cls(n_samples=1, pixels=truth.size, positives=total, tp=tp, fp=fp, iou=units(tp / (1 + total + fp)))

    def miou_by_threshold(self) -> NDArray[np.float64]:
        """Mean IoU at each of THRESHOLDS, float64 [49]."""
        return self.iou / (UNIT * max(self.n_samples, 1))

    def precision_recall(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Precision and recall of all pixels at the thresholds that predict any, by rising recall, float64 [n] each."""
        some = self.tp + self.fp > 0
        precision, recall = (self.tp / (1 + self.tp + self.fp))[some], (self.tp / (1 + self.positives))[some]
        # The order of two precisions at one recall sways Simpson's rule, so it is kept as there: that of a Python set.
        points = sorted(set(zip(recall.tolist(), precision.tolist(), strict=True)), key=itemgetter(0))
        r, p = np.array(points, np.float64).reshape(-1, 2).T
        return p, r

    def results(self) -> dict[str, float]:
        """CLIPSeg's figures by its own names, the best ones with the threshold that gives them.

        `miou_t` is the mean of the samples' IoU at threshold t, `fgiou_t` the IoU of all pixels together, `biniou_t`
        the mean of that and the background's. `ap_clipseg` is by Simpson's rule, `ap_clipseg_trapezoid` a check by
        trapezoids; both are 0 where fewer than two points are reached.

        Returns:
            Fractions, and the count `n_samples`.

        Raises:
            DataError: No sample was measured.
        """
        if self.n_samples == 0:
            raise DataError("no sample was measured: the set is empty, or all its samples were refused")
        fn, tn = self.positives - self.tp, self.pixels - self.positives - self.fp
        foreground = self.tp / (1 + self.tp + self.fp + fn)
        curves = {
            "miou": self.miou_by_threshold(),
            "fgiou": foreground,
            "biniou": (foreground + tn / (1 + tn + fn + self.fp)) / 2,
        }
        figures: dict[str, float] = {}
        for name, curve in curves.items():
            best = int(curve.argmax())
            figures |= {f"{name}_best": float(curve[best]), f"{name}_best_t": float(THRESHOLDS[best])}
            figures |= {f"{name}_{t}": float(curve[_index(t)]) for t in PRINTED}
        precision, recall = self.precision_recall()
        enough = len(recall) > 1
        return figures | {
            "ap_clipseg": float(integrate.simpson(precision, x=recall)) if enough else 0.0,
            "ap_clipseg_trapezoid": float(np.trapezoid(precision, recall)) if enough else 0.0,
            "n_samples": self.n_samples,
        }


def to_square(
    score: Score, truth: Mask, side: int = SIDE
) -> tuple[Float32[np.ndarray, "S S"], UInt8[np.ndarray, "S S"]]:
    """A sample in CLIPSeg's frame: the true mask by nearest pixel, the scores bilinear with aligned corners.

    CLIPSeg stretches logits and takes the sigmoid after; where its network's own size is the square, as in its
    published figures, nothing is stretched and the two agree.

    Args:
        score: Scores at any size.
        truth: True mask.
        side: Of the square, in pixels; the aspect ratio is lost.

    Returns:
        float32 scores and uint8 mask, [side, side] each.

    Raises:
        DataError: A score is NaN or outside [0, 1].
    """
    import torch
    from torch.nn.functional import interpolate

    check_values(score)
    scores = torch.from_numpy(np.array(score, np.float32))[None, None]
    labels = torch.from_numpy(np.array(truth, np.uint8))[None, None]
    stretched = interpolate(scores, size=(side, side), mode="bilinear", align_corners=True)
    # rounding may carry a weighted mean of ones beyond 1
    return stretched[0, 0].numpy().clip(0, 1), interpolate(labels, size=(side, side), mode="nearest")[0, 0].numpy()


def _index(threshold: float) -> int:
    return int(np.abs(THRESHOLDS - threshold).argmin())
