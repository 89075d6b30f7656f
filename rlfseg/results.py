"""What is asked and what comes out: apart from the networks, so that whoever handles results loads none of them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from rlfseg import images
from rlfseg.errors import BadSample, DataError

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor  # drivers check phrases, and need no torch for that

NESTED = {"captions": "caption", "masks": "mask", "scores": "score", "areas": "area", "outcomes": "outcome"}


@dataclass(frozen=True, kw_only=True, eq=False)
class Result:
    """What a phrase means on a picture.

    Attributes:
        caption: The phrase.
        score: float32 [H, W] in [0, 1]; all NaN where the network failed.
        threshold: Score above which a pixel is mask.
        gamma: Factor of Eq. 7 or 10 after clipping; 0 without rescaling.
        clipped: Whether gamma ran into its upper limit.
        truncated: Whether the text encoder saw only the beginning of the phrase.
    """

    caption: str
    score: NDArray[np.float32]
    threshold: float
    gamma: float
    clipped: bool
    truncated: bool

    @cached_property
    def mask(self) -> NDArray[np.uint8]:
        """Where the score is above the threshold.

        Returns:
            uint8 {0, 1} [H, W].

        Raises:
            BadSample: The network gave NaN: no mask is not an empty mask.
        """
        if self.failed:
            raise BadSample("the network gave NaN for this phrase", file="segmenter", sample=self.caption)
        return (self.score > self.threshold).astype(np.uint8)

    @cached_property
    def failed(self) -> bool:
        """Whether the network gave NaN."""
        return bool(np.isnan(self.score).any())

    @property
    def confidence(self) -> float:
        """Mean score inside the mask, 0 where it is empty."""
        inside = self.score[self.mask.view(np.bool_)]
        return float(inside.mean()) if inside.size else 0.0


@dataclass(frozen=True, kw_only=True, eq=False)
class Square:
    """What the network itself says of a phrase, in its own frame; a service sends this between processes.

    Attributes:
        caption: The phrase.
        score: float32 [R, R] in [0, 1], on the CPU; NaN where the network failed.
        gamma: Factor of Eq. 7 or 10 after clipping; 0 without rescaling.
        clipped: Whether gamma ran into its upper limit.
        truncated: Whether the text encoder saw only the beginning of the phrase.
    """

    caption: str
    score: Float[Tensor, "R R"]
    gamma: float
    clipped: bool
    truncated: bool

    def at(self, size: tuple[int, int], threshold: float) -> Result:
        """The same on a picture of `size` (H, W), with the score above which a pixel is mask."""
        return Result(
            caption=self.caption,
            score=images.square_to_score(self.score, size).numpy(),
            threshold=threshold,
            gamma=self.gamma,
            clipped=self.clipped,
            truncated=self.truncated,
        )


def checked_phrase(phrase: str) -> str:
    """The phrase without surrounding blanks.

    Args:
        phrase: As somebody wrote it.

    Returns:
        The stripped phrase.

    Raises:
        BadSample: Nothing is left of it.
    """
    if not phrase.strip():
        raise BadSample(f"the phrase {phrase!r} is empty; say what to look for", file="phrases")
    return phrase.strip()


def unnest(folder: str | os.PathLike[str]) -> pd.DataFrame:
    """What `rlfseg predict` found, as a table with a row a phrase; `images.rle_decode(mask, (height, width))` decodes.

    Args:
        folder: The `out` of `predict`.

    Returns:
        Columns `id`, `height`, `width`, `caption`, `mask` (COCO RLE; None where the phrase failed), `score`, `area`
        and `outcome`. Pictures that were refused have no row.

    Raises:
        DataError: There are no predictions.
    """
    import pandas as pd

    parts = sorted(Path(folder, "data").glob("*.parquet"))
    if not parts:
        raise DataError(f"{folder} holds no predictions; give the `out` of `rlfseg predict`")
    rows = pd.concat([pd.read_parquet(part) for part in parts])
    rows = rows[(rows["status"] == "ok") & (rows["captions"].str.len() > 0)]
    phrases = rows.explode(list(NESTED), ignore_index=True).rename(columns=NESTED)
    return phrases[["id", "height", "width", *NESTED.values()]]
