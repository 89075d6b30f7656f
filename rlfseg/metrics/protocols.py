"""Protocols by name."""

from __future__ import annotations

from rlfseg.metrics import clipseg, referring
from rlfseg.metrics.clipseg import ClipSeg
from rlfseg.metrics.default import Sums
from rlfseg.metrics.masks import Mask
from rlfseg.metrics.referring import GRES_SIDE, REFER_SIDE, Gres, PhraseCut, Refer
from rlfseg.metrics.scores import Score
from rlfseg.metrics.sums import Additive

# Those that measure a phrase at a time; `semseg` measures a picture.
PROTOCOLS: dict[str, type[Additive]] = {
    "rlfseg": Sums,
    "clipseg": ClipSeg,
    "phrasecut": PhraseCut,
    "refer": Refer,
    "gres": Gres,
}


def measure(
    protocol: str,
    score: Score,
    truth: Mask,
    threshold: float,
    *,
    missing: bool = False,
    clipseg_side: int = clipseg.SIDE,
    refer_side: int = REFER_SIDE,
) -> Additive:
    """Measures one phrase of one picture by a protocol, in that protocol's frame.

    Args:
        protocol: One of PROTOCOLS.
        score: Scores at the picture's size.
        truth: True mask.
        threshold: Score above which a pixel is mask; `clipseg` has its own.
        missing: There is no prediction, and `score` is all 0; only `phrasecut` tells that from an empty one.
        clipseg_side: Square of `clipseg`, in pixels.
        refer_side: Square of `refer`, in pixels.

    Returns:
        Its sums.

    Raises:
        DataError: A score is NaN or outside [0, 1], or the shapes differ.
    """
    if protocol == "rlfseg":
        return Sums.of(score, truth, threshold)
    if protocol == "clipseg":
        return ClipSeg.of(*clipseg.to_square(score, truth, clipseg_side))
    pred = score > float(threshold)
    if protocol == "phrasecut":
        return PhraseCut.of(None if missing else pred, truth)
    if protocol == "refer":
        return Refer.of(*referring.to_square(pred, truth, refer_side))
    return Gres.of(pred, truth, GRES_SIDE)
