"""Confidence intervals by drawing images, with their phrases, again and again with replacement."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress

import numpy as np
from numpy.typing import NDArray

from rlfseg.errors import DataError
from rlfseg.metrics.sums import Additive

LEVEL = 0.95


def draw_images(n: int, resamples: int, seed: int) -> NDArray[np.uint8]:
    """How often each image is drawn in each resample.

    Args:
        n: Images.
        resamples: How many times n images are drawn.
        seed: Of the draw.

    Returns:
        uint8 [resamples, n]; each row sums to n.
    """
    rng = np.random.default_rng(seed)
    counts = (np.bincount(rng.integers(0, n, n), minlength=n) for _ in range(resamples))
    return np.stack([c.astype(np.uint8) for c in counts])


def resampled(draws: NDArray[np.uint8], parts: Iterable[NDArray[np.int64]]) -> NDArray[np.int64]:
    """The sums of each resample.

    Args:
        draws: From `draw_images`, [resamples, n].
        parts: Vectors of sums of the images in order, [some, d] each, n rows in all; one part is held at a time.

    Returns:
        int64 [resamples, d], to 2^-53 of each (the products are in float64, which is what makes them quick).
    """
    total, start = np.zeros(()), 0
    for part in parts:
        drawn = draws[:, start : start + len(part)].astype(np.float64)
        total, start = total + drawn @ part.astype(np.float64), start + len(part)
    return np.rint(total).astype(np.int64)


def intervals(zero: Additive, sums: NDArray[np.int64]) -> dict[str, tuple[float, float]]:
    """Percentile intervals of every fraction among a protocol's results.

    Args:
        zero: Sums of the protocol, for their form.
        sums: From `resampled`.

    Returns:
        Name to (low, high) at LEVEL; counts and thresholds are left out, and what a resample doesn't define.
    """
    found: dict[str, list[float]] = {}
    for vector in sums:
        with suppress(DataError):  # nothing that can be measured was drawn
            for name, value in zero.like(vector).results().items():
                found.setdefault(name, []).append(value)
    ends = ((1 - LEVEL) / 2, (1 + LEVEL) / 2)
    return {
        name: (float(low), float(high))
        for name, values in found.items()
        if not name.startswith("n_") and not name.endswith(("_t", "_threshold"))
        for low, high in [np.quantile(values, ends)]
    }
