"""Confidence intervals by drawing images, with their phrases, again and again with replacement."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress

import numpy as np
from numpy.typing import NDArray

from rlfseg.errors import DataError
from rlfseg.metrics.sums import Additive

LEVEL = 0.95
LOW_BITS = 26  # of a sum; float64 adds up 2^27 images of these, and the rest of the 63 bits, without rounding


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


def resampled(draws: NDArray[np.uint8], parts: Iterable[tuple[Sequence[int], NDArray[np.int64]]]) -> NDArray[np.int64]:
    """The sums of each resample, the same whatever the order of the images.

    Args:
        draws: From `draw_images`, [resamples, n].
        parts: Of some images their numbers, 0 to n - 1, and their vectors of sums >= 0, [some, d]; all images come
            once, in any order; one part is held at a time.

    Returns:
        int64 [resamples, d], exact. The products are in float64, which is what makes them quick.
    """
    total = np.zeros((), np.int64)
    for numbers, vectors in parts:
        drawn = draws[:, numbers].astype(np.float64)
        high, low = (drawn @ half.astype(np.float64) for half in np.divmod(vectors, 1 << LOW_BITS))
        total = total + (high.astype(np.int64) << LOW_BITS) + low.astype(np.int64)
    return total


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
