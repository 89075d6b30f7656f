"""Small sets to evaluate."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from rlfseg.config import EvaluateConfig
from rlfseg.metrics import PROTOCOLS
from rlfseg.pipeline import evaluate, report
from rlfseg.pipeline.evaluate import Measure
from rlfseg.pipeline.rows import Row, RowByRow

CLASSES = ("grass", "sky", "tree")
ALL = (*PROTOCOLS, "semseg")
WHAT = {"threshold": 0.5, "threshold_from": "a test", "truth": {"source": "drawn", "rasteriser": "pycocotools"}}


def config(**settings: Any) -> EvaluateConfig:
    given = {"samples": "nowhere", "out": "out", "predictions": "p", "protocol": ALL, "overlays": 0, "resamples": 50}
    return EvaluateConfig(**{**given, **settings})


def made(seed: int, n: int = 9) -> list[Row]:
    """Rows as the loader gives them: masks apart from each other, predictions of which some are missing."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(n):
        size = (int(rng.integers(5, 20)), int(rng.integers(5, 20)))
        owner = rng.integers(-1, len(CLASSES), size=size)
        captions = [c for k, c in enumerate(CLASSES) if (owner == k).any() and (i + k) % 4]
        labels = [(owner == CLASSES.index(c)).astype(np.uint8) for c in captions]
        scores = {c: np.clip(0.6 * (owner == k) + 0.5 * rng.random(size), 0, 1) for k, c in enumerate(CLASSES)}
        predicted = {c: s.astype(np.float32) for c, s in scores.items()}
        if captions and i % 3 == 2:
            del predicted[captions[0]]
        rows.append(
            {
                "id": f"i{i}",
                "size": size,
                "captions": captions,
                "labels": labels,
                "subsets": [report.subsets_of(m, k % 7) for k, m in enumerate(labels)],
                "empty": 0,
                "scores": [predicted.get(c) for c in captions],
                "others": [(c, s) for c, s in predicted.items() if c not in captions],
            }
        )
    return rows


def written(rows: list[Row], out: Path, settings: EvaluateConfig, files: int = 3) -> Row:
    """The report of rows that went through the evaluator."""
    (out / "data").mkdir(parents=True)
    done = RowByRow(Measure(settings, 0.5, CLASSES))(rows)
    for n in range(files):
        table = pa.Table.from_pylist(done[n::files], schema=evaluate.schema(settings.protocols))
        pq.write_table(table, out / "data" / f"{n}.parquet")
    refused = {r["id"]: r["status"] for r in done if r["status"] != "ok"}
    report.write(settings, out, WHAT, CLASSES, 4, {"refused": refused})
    return dict(json.loads((out / "results.json").read_text()))


def given(row: Row, caption: str) -> NDArray[np.float32] | None:
    return dict([*zip(row["captions"], row["scores"], strict=True), *row["others"]]).get(caption)
