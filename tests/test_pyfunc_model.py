"""`predict` is called with a stand-in that counts its calls; the real segmenter is tested elsewhere."""

from __future__ import annotations

import base64
from dataclasses import dataclass

import numpy as np
import pandas as pd
import pytest
from mlflow.models.utils import _enforce_schema
from mlflow.pyfunc.model import PythonModelContext
from numpy.typing import NDArray

from rlfseg import pyfunc_model
from rlfseg.errors import BadSample
from rlfseg.images import load_image, rle_decode
from rlfseg.pyfunc_model import COLUMNS, EXAMPLE, SIGNATURE, SegmenterModel

CONTEXT = PythonModelContext({}, {})


@dataclass
class Result:
    mask: NDArray[np.uint8]
    score: NDArray[np.float32]


class StandIn:
    """Marks as many pixels, in reading order, as the phrase has letters; they score 0.75, the others 0.25."""

    def __init__(self) -> None:
        self.calls: list[tuple[bytes, list[str]]] = []

    def __call__(self, image: bytes, phrases: list[str]) -> list[Result]:
        self.calls.append((image, phrases))
        masks = [(np.arange(12).reshape(3, 4) < len(p)).astype(np.uint8) for p in phrases]
        return [Result(m, np.where(m, 0.75, 0.25).astype(np.float32)) for m in masks]


@pytest.fixture
def model() -> SegmenterModel:
    model = SegmenterModel()
    model.segmenter = StandIn()  # type: ignore[assignment]
    return model


def test_rows_of_one_image_share_a_call_and_keep_their_places(model: SegmenterModel) -> None:
    rows = pd.DataFrame(
        {"image": [b"A", b"B", base64.b64encode(b"A").decode(), b"B"], "phrase": ["ring", "a", "", "star!"]},
        index=[7, 3, 5, 1],
    )
    out = model.predict(CONTEXT, rows)
    assert model.segmenter.calls == [(b"A", ["ring", ""]), (b"B", ["a", "star!"])]  # type: ignore[attr-defined]
    assert list(out.columns) == list(COLUMNS)
    assert list(out.index) == [7, 3, 5, 1]
    assert list(out["phrase"]) == ["ring", "a", "", "star!"]
    assert list(out["area"]) == [4, 1, 0, 5]
    assert list(out["score"]) == [0.75, 0.75, 0.0, 0.75]
    assert set(zip(out["height"], out["width"], strict=True)) == {(3, 4)}
    masks = [rle_decode(rle, (3, 4)).ravel().tolist() for rle in out["rle"]]
    assert masks == [[1] * n + [0] * (12 - n) for n in (4, 1, 0, 5)]


def test_no_rows(model: SegmenterModel) -> None:
    out = model.predict(CONTEXT, pd.DataFrame(EXAMPLE).iloc[:0])
    assert list(out.columns) == list(COLUMNS)
    assert out.empty


@pytest.mark.parametrize(("image", "text"), [("not base64!", "not base64"), (3.5, "image is float")])
def test_images_that_are_none(model: SegmenterModel, image: object, text: str) -> None:
    with pytest.raises(BadSample, match=f"row 1: .*{text}"):
        model.predict(CONTEXT, pd.DataFrame({"image": [b"A", image], "phrase": ["a", "b"]}))


@pytest.mark.parametrize("image", [b"\x89PNG", "iVBORw=="])
def test_mlflow_lets_bytes_and_base64_through(image: object) -> None:
    rows = pd.DataFrame({"image": [image], "phrase": ["ring"]})
    assert _enforce_schema(rows, SIGNATURE.inputs)["image"].tolist() == [image]


def test_the_example_is_a_picture_and_the_output_has_the_signature_s_types(model: SegmenterModel) -> None:
    picture = load_image(base64.b64decode(pyfunc_model.PIXELS), name="example")
    assert picture.shape == (2, 2, 3)
    _enforce_schema(model.predict(CONTEXT, pd.DataFrame(EXAMPLE)), SIGNATURE.outputs)
