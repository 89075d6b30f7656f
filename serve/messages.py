"""What a front replica and a model replica say to each other; a front needs no network for it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rlfseg.config import SamplingConfig
from rlfseg.results import Square


@dataclass(frozen=True, kw_only=True)
class Ask:
    """A picture and its phrases, on their way to the network.

    Attributes:
        request: Id of the request, for logs.
        key: Hash of the picture's file.
        square: float32 [3, R, R] in [-1, 1].
        phrases: None of them empty.
        sampling: How masks are sampled.
    """

    request: str
    key: str
    square: NDArray[np.float32]
    phrases: tuple[str, ...]
    sampling: SamplingConfig


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What the network says, in its own frame.

    Attributes:
        squares: One a phrase, on the CPU.
        version: Of the adapter that answered.
        threshold: The adapter's own.
        cached: Whether the latent was known.
        batch: Pictures that went through the network together.
        encode_ms: Image to latent, of the whole batch.
        network_ms: Latent to scores, of the whole batch.
    """

    squares: list[Square]
    version: str
    threshold: float
    cached: bool
    batch: int
    encode_ms: float
    network_ms: float
