"""Scores and masks for tests of the protocols."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from rlfseg.metrics import (
    Additive,
    SemSeg,
)

SEEDS = st.integers(0, 2**32 - 1)
Sample = tuple[NDArray[np.float32], NDArray[np.uint8]]


def draw(seed: int, n: int = 5) -> list[Sample]:
    """Samples of different sizes; some masks empty, some scores on thresholds, some all 0."""
    rng = np.random.default_rng(seed)
    samples = []
    for _ in range(n):
        truth = (rng.random(rng.integers(2, 12, size=2)) < rng.choice([0, 0.3, 0.7])).astype(np.uint8)
        score = np.clip(rng.beta(1, 2, truth.shape) + 0.4 * truth, 0, 1) * rng.choice([0, 1, 1, 1])
        score = np.where(rng.random(truth.shape) < 0.3, score.round(2), score)
        samples.append((score.astype(np.float32), truth))
    return samples


def add_up(parts: list[Additive]) -> Any:
    whole = type(parts[0])() if not isinstance(parts[0], SemSeg) else SemSeg.none(parts[0].true.size)
    for part in parts:
        whole.merge(part)
    return whole
