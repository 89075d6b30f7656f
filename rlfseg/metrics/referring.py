"""The protocols of referring segmentation, which compare two masks a phrase: `phrasecut`, `refer` and `gres`.

They differ in what looks like trifles: whether IoU k counts for P@k, what two empty masks are worth, the size.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from rlfseg.errors import DataError
from rlfseg.metrics.masks import Mask, overlap, ratio
from rlfseg.metrics.scores import Counts
from rlfseg.metrics.sums import PRECISION_AT, UNIT, Additive, units, zeros

REFER_SIDE = 512  # pixels, as VPD; LAVT: 480
GRES_SIDE = 480  # pixels, as ReLA
GRES_PRECISION_AT = (0.7, 0.8, 0.9)


def to_square(pred: Mask, truth: Mask, side: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Both masks stretched to a square by nearest pixel, as Pillow does it; uint8 {0, 1} [side, side] each."""
    size = (side, side)
    planes = (Image.fromarray(mask.astype(np.uint8)).resize(size, Image.Resampling.NEAREST) for mask in (pred, truth))
    small, true = map(np.asarray, planes)
    return small, true


@dataclass(kw_only=True, eq=False)
class PhraseCut(Additive):
    """Sums of the protocol `phrasecut`: PhraseCut's own evaluator, at original size.

    Attributes:
        n_samples: Phrases that have a prediction.
        n_missing: Phrases that have none.
        iou: Sum of IoU, 0 where nothing overlaps (so for two empty masks, too), in 1 / UNIT.
        intersection: Pixels of all intersections.
        union: Pixels of all unions.
        hits: Phrases whose IoU is *above* each of PRECISION_AT.
    """

    n_samples: int = 0
    n_missing: int = 0
    iou: int = 0
    intersection: int = 0
    union: int = 0
    hits: Counts = field(default_factory=zeros(len(PRECISION_AT)))

    @classmethod
    def of(cls, pred: Mask | None, truth: Mask) -> PhraseCut:
        """Measures one phrase.

        Args:
            pred: Predicted mask; None: there is none.
            truth: True mask.

        Returns:
            Its sums.
        """
        if pred is None:
            return cls(n_missing=1)
        intersection, union = overlap(pred, truth)
        iou = intersection / union if intersection else 0.0
        hits = (iou > np.array(PRECISION_AT)).astype(np.int64)
        return cls(n_samples=1, iou=units(iou), intersection=intersection, union=union, hits=hits)

    def results(self) -> dict[str, float]:
        """PhraseCut's figures: `mean_mask_iou` is `miou`, `cum_mask_iou` is `oiou`, `pred_mask_acc@k` is `p@k`.

        As in its evaluator, a missing prediction counts as an empty one in `miou` alone; `oiou`, `p@k` and
        `miou_predicted` are over the phrases that have one.

        Returns:
            Fractions, and the counts `n_samples` and `n_missing`.

        Raises:
            DataError: No phrase was measured.
        """
        n = self.n_samples
        _require(n + self.n_missing)
        return {
            "miou": self.iou / UNIT / (n + self.n_missing),
            "oiou": float(self.intersection / max(self.union, 1)),
            "miou_predicted": self.iou / UNIT / max(n, 1),
            **{f"p@{k}": float(hits / max(n, 1)) for k, hits in zip(PRECISION_AT, self.hits, strict=True)},
            "n_samples": n,
            "n_missing": self.n_missing,
        }


@dataclass(kw_only=True, eq=False)
class Refer(Additive):
    """Sums of the protocol `refer`: LAVT's and VPD's evaluation on RefCOCO, RefCOCO+ and G-Ref; a sentence a sample.

    Attributes:
        n_samples: Sentences.
        iou: Sum of IoU, 0 for two empty masks, in 1 / UNIT.
        intersection: Pixels of all intersections.
        union: Pixels of all unions.
        hits: Sentences whose IoU reaches each of PRECISION_AT.
    """

    n_samples: int = 0
    iou: int = 0
    intersection: int = 0
    union: int = 0
    hits: Counts = field(default_factory=zeros(len(PRECISION_AT)))

    @classmethod
    def of(cls, pred: Mask, truth: Mask) -> Refer:
        """Measures one sentence in the frame that its masks have; `to_square` first."""
        intersection, union = overlap(pred, truth)
        iou = intersection / union if union else 0.0
        hits = (iou >= np.array(PRECISION_AT)).astype(np.int64)
        return cls(n_samples=1, iou=units(iou), intersection=intersection, union=union, hits=hits)

    def results(self) -> dict[str, float]:
        """`miou` is the peers' Mean IoU, `oiou` their overall IoU, `p@k` the share of sentences with IoU >= k.

        Returns:
            Fractions, and the count `n_samples`.

        Raises:
            DataError: No sentence was measured.
        """
        _require(self.n_samples)
        return {
            "miou": self.iou / UNIT / self.n_samples,
            "oiou": float(self.intersection / max(self.union, 1)),
            **{f"p@{k}": float(hits / self.n_samples) for k, hits in zip(PRECISION_AT, self.hits, strict=True)},
            "n_samples": self.n_samples,
        }


@dataclass(kw_only=True, eq=False)
class Gres(Additive):
    """Sums of the protocol `gres`: ReLA's evaluation on gRefCOCO, where a phrase may mean nothing in the picture.

    Attributes:
        n_samples: Phrases.
        n_no_target: Those of them that mean nothing: their true mask is empty.
        found_no_target: Those of these whose predicted mask is empty too.
        lost_target: Phrases that mean something, predicted empty.
        iou: Sum of IoU, 1 for two empty masks, in 1 / UNIT.
        intersection: Pixels of all intersections.
        union: Pixels of all unions.
        hits: Phrases that mean something whose IoU reaches each of GRES_PRECISION_AT.
    """

    n_samples: int = 0
    n_no_target: int = 0
    found_no_target: int = 0
    lost_target: int = 0
    iou: int = 0
    intersection: int = 0
    union: int = 0
    hits: Counts = field(default_factory=zeros(len(GRES_PRECISION_AT)))

    @classmethod
    def of(cls, pred: Mask, truth: Mask, side: int | None = None) -> Gres:
        """Measures one phrase. ReLA has an output of its own for "nothing"; here an empty mask says so.

        Args:
            pred: Predicted mask.
            truth: True mask.
            side: Of the square to measure in; None: the masks' own frame. Whether a mask is empty is seen before.

        Returns:
            Its sums.
        """
        target, found = bool(truth.any()), bool(pred.any())
        intersection, union = overlap(*(to_square(pred, truth, side) if side else (pred, truth)))
        iou = (intersection / union if union else 0.0) if target else float(not found)
        hits = (iou >= np.array(GRES_PRECISION_AT)) & target
        return cls(
            n_samples=1,
            n_no_target=int(not target),
            found_no_target=int(not target and not found),
            lost_target=int(target and not found),
            iou=units(iou),
            intersection=intersection,
            union=union,
            hits=hits.astype(np.int64),
        )

    def results(self) -> dict[str, float]:
        """`giou` is the mean of the phrases' IoU, `ciou` all intersections over all unions.

        `n_acc` is the share of the phrases without a target that are predicted empty, `t_acc` that of the others that
        are not, `pr@k` the share of those with IoU >= k. Where there is no such phrase, they are left out.

        Returns:
            Fractions, and the counts `n_samples` and `n_no_target`.

        Raises:
            DataError: No phrase was measured.
        """
        _require(self.n_samples)
        figures = {"giou": self.iou / UNIT / self.n_samples, "ciou": float(ratio(self.intersection, self.union))}
        if self.n_no_target:
            figures["n_acc"] = self.found_no_target / self.n_no_target
        if targets := self.n_samples - self.n_no_target:
            figures["t_acc"] = 1 - self.lost_target / targets
            figures |= {f"pr@{k}": float(h / targets) for k, h in zip(GRES_PRECISION_AT, self.hits, strict=True)}
        return figures | {"n_samples": self.n_samples, "n_no_target": self.n_no_target}


def _require(n: int) -> None:
    if n == 0:
        raise DataError("no sample was measured: the set is empty, or all its samples were refused")
