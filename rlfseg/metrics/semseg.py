"""The protocol `semseg` (Table 3, COCO-Stuff): a pixel goes to the class whose phrase has the highest score there."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int
from numpy.typing import NDArray

from rlfseg.errors import DataError
from rlfseg.metrics.masks import Mask, ratio
from rlfseg.metrics.scores import Counts, Score, check_values
from rlfseg.metrics.sums import Additive

VOID = -1  # of no class; as a truth, such pixels are ignored (255 in COCO-Stuff's label maps)
Labels = Int[np.ndarray, "H W"]


class Argmax:
    """The class with the highest score of each pixel, one class at a time, so that no stack of scores is held.

    Args:
        size: (H, W).
    """

    def __init__(self, size: tuple[int, int]):
        self.labels = np.full(size, VOID, np.int32)
        self._best = np.zeros(size, np.float32)

    def add(self, score: Score, label: int) -> None:
        """Gives a class the pixels where it is the best so far.

        A pixel that no class has a score above 0 for stays VOID: 0/1 masks of another system need not cover a picture.
        Of equal scores that of the lowest label counts, as in numpy's argmax, whatever the order of the calls.

        Args:
            score: Scores of the class at the picture's size.
            label: Its number.

        Raises:
            DataError: A score is NaN or outside [0, 1].
        """
        check_values(score)
        better = (score > self._best) | ((score == self._best) & (label < self.labels))
        self.labels[better], self._best[better] = label, score[better]


def true_labels(masks: list[Mask], labels: list[int], size: tuple[int, int]) -> Labels:
    """A label map of the masks of classes.

    Args:
        masks: True masks of one picture; several may be of one class.
        labels: The class of each.
        size: (H, W).

    Returns:
        int32 [H, W]; VOID where no class is, or more than one.
    """
    label_map = np.full(size, VOID, np.int32)
    claimed = np.zeros(size, np.bool_)
    for mask, label in zip(masks, labels, strict=True):
        inside = mask.astype(np.bool_)
        other = claimed & inside & (label_map != label)
        label_map[inside] = label
        label_map[other] = VOID
        claimed |= inside
    return label_map


@dataclass(kw_only=True, eq=False)
class SemSeg(Additive):
    """Sums of the protocol `semseg`: the diagonal and both margins of the confusion matrix of a set.

    Attributes:
        n_images: Pictures measured.
        right: Pixels of each class that are predicted so.
        predicted: Pixels predicted as each class, where the truth isn't VOID.
        true: Pixels of each class.
    """

    n_images: int = 0
    right: Counts
    predicted: Counts
    true: Counts

    @classmethod
    def none(cls, n_classes: int) -> SemSeg:
        """Sums of nothing yet."""
        right, predicted, true = np.zeros((3, n_classes), np.int64)
        return cls(right=right, predicted=predicted, true=true)

    @classmethod
    def of(cls, pred: Labels, truth: Labels, n_classes: int) -> SemSeg:
        """Measures one picture.

        Args:
            pred: Predicted class of each pixel, or VOID.
            truth: True class of each pixel; VOID pixels are ignored.
            n_classes: How many classes there are.

        Returns:
            Its sums.
        """
        seen = truth != VOID
        pred, truth = pred[seen], truth[seen]
        parts = {"right": truth[pred == truth], "predicted": pred[pred != VOID], "true": truth}
        return cls(n_images=1, **{name: np.bincount(part, minlength=n_classes) for name, part in parts.items()})

    def iou(self) -> NDArray[np.float64]:
        """IoU of each class over the whole set, float64 [n_classes]; NaN for one neither seen nor predicted."""
        union = self.true + self.predicted - self.right
        return np.where(union, self.right / np.maximum(union, 1), np.nan)

    def results(self) -> dict[str, float]:
        """`miou` is the mean of the classes' IoU, over those that occur in the truth or a prediction.

        `oiou` is all intersections over all unions, `pixel_acc` the share of pixels given the right class, `mean_acc`
        the mean of that over the classes of the truth.

        Returns:
            Fractions, and the counts `n_classes` (that occur) and `n_images`.

        Raises:
            DataError: No pixel was measured.
        """
        if not self.true.any():
            raise DataError("semseg: no pixel has exactly one true class; each phrase should be a class's name")
        iou, there = self.iou(), self.true > 0
        return {
            "miou": float(np.nanmean(iou)),
            "oiou": float(ratio(self.right.sum(), (self.true + self.predicted - self.right).sum())),
            "pixel_acc": float(self.right.sum() / self.true.sum()),
            "mean_acc": float(np.mean(self.right[there] / self.true[there])),
            "n_classes": int(np.count_nonzero(~np.isnan(iou))),
            "n_images": self.n_images,
        }
