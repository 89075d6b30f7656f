"""The measures of section 4.1, each by a named protocol: what the field calls mIoU and AP is not one thing.

    rlfseg     default.py    original size, one calibrated threshold; mean and overall IoU, P@k, AP, boundaries
    clipseg    clipseg.py    a square of 352 (LD-ZNet: 384), 49 thresholds, CLIPSeg's own AP
    phrasecut  referring.py  original size, strict P@k, both empty = 0, predictions that are missing
    refer      referring.py  a square of 512 (LAVT: 480), every sentence a sample
    gres       referring.py  a square of 480, phrases that mean nothing in the picture
    semseg     semseg.py     per image the class with the highest score

A protocol is a class of sums (`Additive`): `of(...)` measures one sample, `merge` adds up, `results()` gives figures.
"""

from rlfseg.metrics.bootstrap import draw_images, intervals, resampled
from rlfseg.metrics.clipseg import ClipSeg
from rlfseg.metrics.default import Sums
from rlfseg.metrics.masks import Mask, boundary_f, boundary_iou, iou
from rlfseg.metrics.protocols import PROTOCOLS, measure
from rlfseg.metrics.referring import Gres, PhraseCut, Refer
from rlfseg.metrics.scores import (
    BINS,
    THRESHOLDS,
    Score,
    average_precision,
    iou_by_threshold,
    precision_recall,
    score_histograms,
)
from rlfseg.metrics.semseg import VOID, Argmax, SemSeg, true_labels
from rlfseg.metrics.sums import PRECISION_AT, Additive, units

__all__ = [
    "BINS",
    "PRECISION_AT",
    "PROTOCOLS",
    "THRESHOLDS",
    "VOID",
    "Additive",
    "Argmax",
    "ClipSeg",
    "Gres",
    "Mask",
    "PhraseCut",
    "Refer",
    "Score",
    "SemSeg",
    "Sums",
    "average_precision",
    "boundary_f",
    "boundary_iou",
    "draw_images",
    "intervals",
    "iou",
    "iou_by_threshold",
    "measure",
    "precision_recall",
    "resampled",
    "score_histograms",
    "true_labels",
    "units",
]
