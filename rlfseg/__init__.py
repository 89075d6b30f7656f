"""rlfseg: pixel-exact masks from words, by rectified flow in one step.

from rlfseg import Segmenter
masks = Segmenter.load("tiny")("picture.jpg", ["red ring"])
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from rlfseg.errors import BadSample, ConfigError, DataError, ModelError, ResourceError, RlfsegError

if TYPE_CHECKING:
    from rlfseg.results import Result
    from rlfseg.segmenter import Segmenter

__version__ = "0.1.0"
HOMES = {"Result": "results", "Segmenter": "segmenter"}
__all__ = [
    "BadSample",
    "ConfigError",
    "DataError",
    "ModelError",
    "ResourceError",
    "Result",
    "RlfsegError",
    "Segmenter",
    "__version__",
]


def __getattr__(name: str) -> Any:
    """Loads torch only when a model is asked for."""
    if name in HOMES:
        return getattr(importlib.import_module(f"rlfseg.{HOMES[name]}"), name)
    raise AttributeError(f"module 'rlfseg' has no attribute {name!r}")
