"""Refine's per-image work with a scripted SAM, and the count of what came of the labels."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rlfseg.config import RefineConfig
from rlfseg.pipeline.refine import SCHEMA, Refiner, _count
from rlfseg.pipeline.rows import Row, Rows
from rlfseg.pipeline.stages import Stage, _summary

CONFIG = RefineConfig(samples="s", out="o", anchors=10, max_rounds=3)
Array = np.ndarray[Any, Any]


class Sam:
    """Answers every prompt with the mask that it was asked about, and keeps count."""

    def __init__(self) -> None:
        self.embedded: list[tuple[int, ...]] = []
        self.prompts: list[Array] = []

    def embed(self, image: Array) -> Any:
        self.embedded.append(image.shape)
        return SimpleNamespace(size=image.shape[:2])

    def predict(self, embedding: Any, points: Array, *, masks: Array | None = None, logits: Array | None = None) -> Any:
        assert masks is not None, "the first answer is the mask itself: there is no second round"
        assert masks.shape[1:] == embedding.size
        self.prompts += list(masks)
        return masks, np.zeros((len(points), 4, 4), np.float32), np.ones(len(points), np.float32)


def box(*where: tuple[slice, slice]) -> Array:
    mask = np.zeros((20, 30), np.uint8)
    for part in where:
        mask[part] = 1
    return mask


def row(name: str, labels: list[Array], instances: list[Array | None]) -> Row:
    captions = [f"phrase {n}" for n in range(len(labels))]
    place = {"shard": "a.h5", "height": 20, "width": 30, "n_phrases": len(labels), "bytes": 1800}
    image = np.zeros((20, 30, 3), np.uint8)
    return {"id": name, "image": image, "captions": captions, "labels": labels, "instances": instances, **place}


LEFT, RIGHT = box((slice(2, 12), slice(2, 10))), box((slice(2, 12), slice(10, 20)))  # they touch


def test_an_image_is_embedded_once_however_many_phrases_it_has() -> None:
    sam, labels = Sam(), [LEFT, RIGHT, LEFT | RIGHT]
    rows = Refiner(CONFIG, sam)([row("a", labels, [None] * 3), row("b", labels, [None] * 3)])  # type: ignore[arg-type]
    assert sam.embedded == [(20, 30, 3)] * 2
    assert [r["outcomes"] for r in rows] == [["refined"] * 3] * 2
    assert len(sam.prompts) == 6


def test_objects_are_those_of_the_data_not_the_components_of_their_mask() -> None:
    """Two objects that touch are one component; SAM's prompts mean one object each."""
    together = LEFT | RIGHT
    as_told, as_seen = Sam(), Sam()
    Refiner(CONFIG, as_told)([row("a", [together], [np.stack([LEFT, RIGHT])])])  # type: ignore[arg-type]
    Refiner(CONFIG, as_seen)([row("a", [together], [None])])  # type: ignore[arg-type]
    assert sorted(p.tobytes() for p in as_told.prompts) == sorted([LEFT.tobytes(), RIGHT.tobytes()])
    assert [p.tobytes() for p in as_seen.prompts] == [together.tobytes()]


@pytest.mark.fault("sam-09")
def test_labels_that_sam_is_not_asked_about_are_kept_and_counted(tmp_path: Path) -> None:
    """Masks of 0, 1 and 3 pixels, and one large enough, with N = 10; the counts reach the Summary."""
    tiny = [box(), box((slice(4, 5), slice(7, 8))), box((slice(4, 5), slice(7, 10)))]
    rows: Rows = Refiner(CONFIG, Sam())([row("a", [*tiny, LEFT], [None] * 4), row("b", [RIGHT, box()], [None] * 2)])  # type: ignore[arg-type]
    rows.append({"id": "c", "status": "refused: damaged"})
    (tmp_path / "data").mkdir()
    for n, part in enumerate((rows[:1], rows[1:])):
        pq.write_table(pa.Table.from_pylist(part, schema=SCHEMA), tmp_path / "data" / f"{n}.parquet")
    counts = _count(tmp_path, {"rows_in": 3, "rows_out": 2, "refused": {"c": "damaged"}})
    outcomes = {"refined": 2, "kept: empty": 2, "kept: too small": 2}
    assert counts == {"rows_in": 3, "rows_out": 2, "refused": {"c": "damaged"}, "figures": outcomes}
    stage: Any = SimpleNamespace(name="refine", out=tmp_path, run=CONFIG.run, gpus=0, arithmetic="fp32")
    shown = _summary(stage, counts, 1.0, 0)
    assert (shown.figures, shown.where) == (outcomes, "1 worker, CPU, fp32")
    assert Stage.__dataclass_fields__.keys() >= vars(stage).keys()
