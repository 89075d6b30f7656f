"""Sums of whole numbers: those of any parts of a set, merged in any order, equal those of the whole to the last bit."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

UNIT = 2**40  # ratios are summed as whole multiples of 1 / UNIT: floats would add up differently in another order
PRECISION_AT = (0.5, 0.6, 0.7, 0.8, 0.9)
S = TypeVar("S", bound="Additive")


@dataclass(kw_only=True, eq=False)
class Additive(ABC):
    """What all measures of a protocol are computed from: each field a whole number or an int64 array of them."""

    @abstractmethod
    def results(self) -> dict[str, float]:
        """All measures by name; raises DataError where nothing was measured."""

    def merge(self: S, other: S) -> None:
        """Adds the sums of another part of the set."""
        for f in fields(self):
            setattr(self, f.name, getattr(self, f.name) + getattr(other, f.name))

    def vector(self) -> NDArray[np.int64]:
        """All fields one after the other, int64 [n]; vectors of parts add up to the whole's."""
        return np.concatenate([np.atleast_1d(np.asarray(getattr(self, f.name), np.int64)) for f in fields(self)])

    def like(self: S, vector: NDArray[np.int64]) -> S:
        """Sums with fields of the same lengths as these, from a `vector`."""
        parts = [np.asarray(getattr(self, f.name)) for f in fields(self)]
        cuts = np.cumsum([p.size for p in parts])[:-1]
        values = [p if old.ndim else int(p[0]) for p, old in zip(np.split(vector, cuts), parts, strict=True)]
        return type(self)(**{f.name: v for f, v in zip(fields(self), values, strict=True)})

    def to_dict(self) -> dict[str, Any]:
        """Whole numbers and lists of them, for JSON or Arrow."""
        return {f.name: np.asarray(getattr(self, f.name)).tolist() for f in fields(self)}

    @classmethod
    def from_dict(cls: type[S], sums: dict[str, Any]) -> S:
        """The inverse of `to_dict`."""
        return cls(**{k: int(v) if np.ndim(v) == 0 else np.asarray(v, np.int64) for k, v in sums.items()})


def zeros(n: int) -> Callable[[], NDArray[np.int64]]:
    """For a field's `default_factory`: n whole numbers, all 0, int64 [n]."""
    return lambda: np.zeros(n, np.int64)


def units(values: Any) -> Any:
    """Fractions as whole multiples of 1 / UNIT: an int, or int64 of the same shape."""
    whole = np.rint(np.asarray(values) * UNIT).astype(np.int64)
    return whole if whole.ndim else int(whole)
