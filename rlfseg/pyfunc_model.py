"""The MLflow model that serves an adapter: `tracking.log_model_folder` logs this file itself, as code.

In: a DataFrame with a row a phrase, columns `image` (the bytes of an image file, or the same as a base64 string, which
is what JSON can carry) and `phrase`. Out: a row a row, columns `phrase`, `height`, `width`, `rle`, `score`, `area`.
"""

from __future__ import annotations

import base64
import binascii
import typing
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from mlflow.models import ModelSignature, set_model
from mlflow.pyfunc.model import PythonModel, PythonModelContext
from mlflow.types import ColSpec, DataType, Schema
from mlflow.types.schema import AnyType
from numpy.typing import NDArray

from rlfseg.errors import BadSample
from rlfseg.images import rle_encode

if typing.TYPE_CHECKING:
    from rlfseg.segmenter import Segmenter

COLUMNS = {
    "phrase": DataType.string,
    "height": DataType.long,
    "width": DataType.long,
    "rle": DataType.string,
    "score": DataType.double,
    "area": DataType.long,
}
SIGNATURE = ModelSignature(
    # MLflow has no type for "bytes or text"; `predict` checks the column itself.
    inputs=Schema([ColSpec(AnyType(), "image"), ColSpec(DataType.string, "phrase")]),
    outputs=Schema([ColSpec(kind, name) for name, kind in COLUMNS.items()]),
)
# A grey picture of 2 x 2 pixels; MLflow stores it beside the model, as a request that works.
PIXELS = "iVBORw0KGgoAAAANSUhEUgAAAAIAAAACCAAAAABX3VL4AAAADklEQVR42mNsYGBiYAAAApIAhOoU7S4AAAAASUVORK5CYII="
EXAMPLE = {"image": [PIXELS], "phrase": ["red ring"]}
# What this file and the part of rlfseg behind it import; rlfseg itself is shipped in the model
PACKAGES = (
    *("mlflow", "torch", "diffusers", "transformers", "peft", "safetensors", "numpy", "pandas", "pillow"),
    *("pycocotools", "jaxtyping", "cachetools", "pydantic", "PyYAML"),
)


class SegmenterModel(PythonModel):
    """An adapter behind MLflow's interface."""

    segmenter: Segmenter

    def load_context(self, context: PythonModelContext) -> None:
        """Loads the adapter folder that was logged with this file."""
        from rlfseg.segmenter import Segmenter  # here, so that logging the model needs no torch

        self.segmenter = Segmenter.load(context.artifacts["adapter"])

    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> pd.DataFrame:
        """Segments each row's phrase in its image; rows of one image share one encoding of it.

        Args:
            context: Unused.
            model_input: Columns `image` (bytes or base64 text of an image file) and `phrase`.
            params: Unused.

        Returns:
            The rows in the same order, under the same index: `phrase`; `height` and `width` of the image in pixels;
            `rle`, COCO's compressed counts of the mask at that size; `score`, the mean score in [0, 1] of the mask's
            pixels, 0 for an empty mask; `area`, its pixels.

        Raises:
            BadSample: An image that is neither bytes nor base64 text, or can't be decoded.
        """
        images = [_image_bytes(value, row) for row, value in enumerate(model_input["image"])]
        phrases = [str(phrase) for phrase in model_input["phrase"]]
        rows: list[dict[str, Any]] = [{} for _ in images]
        for data, members in _group(images).items():
            results = self.segmenter(data, [phrases[i] for i in members])
            for i, result in zip(members, results, strict=True):
                rows[i] = _row(phrases[i], result.mask, result.score)
        return pd.DataFrame(rows, index=model_input.index, columns=list(COLUMNS))


def _image_bytes(value: object, row: int) -> bytes:
    if isinstance(value, (bytes, bytearray, memoryview)):
        return bytes(value)
    if not isinstance(value, str):
        raise BadSample(
            f"image is {type(value).__name__}; give the bytes of an image file or base64 text", file=f"row {row}"
        )
    try:
        return base64.b64decode(value, validate=True)
    except binascii.Error as error:
        raise BadSample(f"image is not base64 text: {error}", file=f"row {row}") from error


def _group(images: Sequence[bytes]) -> dict[bytes, list[int]]:
    groups: dict[bytes, list[int]] = {}
    for i, data in enumerate(images):
        groups.setdefault(data, []).append(i)
    return groups


def _row(phrase: str, mask: NDArray[np.uint8], score: NDArray[np.float32]) -> dict[str, Any]:
    area = int(mask.sum())
    return {
        "phrase": phrase,
        "height": mask.shape[0],
        "width": mask.shape[1],
        "rle": rle_encode(mask),
        "score": float(score[mask > 0].mean(dtype=np.float64)) if area else 0.0,
        "area": area,
    }


set_model(SegmenterModel())  # how MLflow finds the model in a file; it only remembers the object
