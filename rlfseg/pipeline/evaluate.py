"""Evaluate: an adapter, or masks already made, against true masks at original size. Sums add up, pixels stay put."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from rlfseg import adapter, draw, hdf5, images, metrics, tracking
from rlfseg.config import EvaluateConfig, as_dict
from rlfseg.errors import ConfigError, DataError
from rlfseg.metrics import Sums
from rlfseg.pipeline.folders import read_rows, require_finished, write_json
from rlfseg.pipeline.rows import OK, Row, Rows, refused
from rlfseg.pipeline.samples import LoadSample, Samples, open_samples
from rlfseg.pipeline.stages import Stage, Summary, connect, gpus_per_worker, run_stage

if TYPE_CHECKING:  # imported where it is used: the driver needs no torch
    from rlfseg.segmenter import Segmenter

MASK_THRESHOLD = 0.5  # for masks already made, whose scores are 0 and 1
SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("status", pa.string()),
        ("captions", pa.list_(pa.string())),
        ("masks", pa.list_(pa.string())),  # COCO RLE counts of the predictions
        ("iou", pa.list_(pa.float64())),
        ("gamma", pa.list_(pa.float32())),
        ("clipped", pa.int32()),  # phrases whose gamma ran into its limit
        ("sums", pa.string()),  # JSON of `metrics.Sums`
    ]
)


def run(config: EvaluateConfig) -> Summary:
    """Measures and writes results.json, results.md, a curve and the best and worst overlays.

    Args:
        config: Settings of the command.

    Returns:
        Counts, refusals and seconds.

    Raises:
        ConfigError: Neither an adapter nor predictions are given, or both.
        DataError: The samples or predictions are unfinished.
        ModelError: The adapter can't be loaded.
    """
    if (config.adapter is None) == (config.predictions is None):
        raise ConfigError(f"adapter: {config.adapter}, predictions: {config.predictions}; give exactly one of the two")
    samples, out = open_samples(config.samples), Path(config.out).absolute()
    settings = as_dict(config)
    folder = adapter.resolve(config.adapter) if config.adapter else None
    source = None if config.predictions is None else Path(config.predictions).absolute()
    rows = samples.rows if source is None else _with_predictions(samples, source)
    connect()
    summary = run_stage(
        Stage(
            name="evaluate",
            rows=rows,
            load=LoadTruth(samples.folder, source),
            work=Evaluator,
            kwargs={"config": config, "reference": None if folder is None else str(folder.absolute())},
            schema=SCHEMA,
            out=out,
            run=config.run,
            gpus=gpus_per_worker(config.run, config.device) if folder else 0,
            identity=samples.identity
            | {k: settings[k] for k in ("adapter", "predictions", "base_only", "sampling", "threshold")}
            | {"card": None if folder is None else (folder / adapter.CARD).read_text()},
            on_error=config.on_error,
            finalize=partial(_results, config, out),
        )
    )
    _record(config, out, folder, samples)
    figures = json.loads((out / "results.json").read_text())
    return Summary(**{**vars(summary), "figures": figures})


class LoadTruth:
    """Index row -> image, captions and true masks; and predicted masks, where those lie in HDF5 too."""

    def __init__(self, folder: Path, predictions: Path | None):
        self.load = LoadSample(folder)
        self.other, self.shards = None, {}
        if predictions and (predictions / hdf5.INDEX).is_file():
            index = hdf5.read_index(predictions)  # the same ids may lie in shards of other names
            self.other = LoadSample(predictions)
            self.shards = dict(zip(index["id"].to_pylist(), index["shard"].to_pylist(), strict=True))

    def __call__(self, row: Row) -> Row:
        """Reads one sample.

        Args:
            row: An index row.

        Returns:
            The row with pixels and masks.

        Raises:
            BadSample: It is damaged.
        """
        loaded = self.load(row)
        if self.other is not None:
            shard = self.shards.get(row["id"])
            found = self.other(row | {"shard": shard}) if shard else {"captions": [], "labels": []}
            loaded["predicted"] = list(zip(found["captions"], found["labels"], strict=True))
        elif "predicted_masks" in row:
            size = loaded["image"].shape[:2]
            masks = [None if m is None else images.rle_decode(m, size) for m in row["predicted_masks"] or ()]
            loaded["predicted"] = list(zip(row["predicted_captions"] or (), masks, strict=True))
        return loaded


class Evaluator:
    """The per-image work: holds one segmenter, or takes masks as they come.

    Args:
        config: What to measure and how.
        reference: Adapter folder; None: the rows bring `predicted`.
        segmenter: A loaded one, instead of `reference`.
    """

    def __init__(self, config: EvaluateConfig, reference: str | None = None, segmenter: Segmenter | None = None):
        self.config = config
        self.segmenter = segmenter
        if reference is not None:
            from rlfseg.segmenter import Segmenter

            self.segmenter = Segmenter.load(reference, device=config.device, base_only=config.base_only)

    def __call__(self, rows: Rows) -> Rows:
        """Rows with `image`, `captions`, `labels` in; columns of SCHEMA out."""
        if self.segmenter is None:
            return [self._row(r, _matched(r), [0.0] * len(r["captions"]), 0, MASK_THRESHOLD) for r in rows]
        results = self.segmenter.segment(
            [r["image"] for r in rows],
            [r["captions"] for r in rows],
            sampling=self.config.sampling,
            threshold=self.config.threshold,
        )
        threshold = self.segmenter.card.threshold if self.config.threshold is None else self.config.threshold
        return [
            refused(row, "the network gave NaN")
            if any(r.failed for r in own)
            else self._row(row, [r.score for r in own], [r.gamma for r in own], sum(r.clipped for r in own), threshold)
            for row, own in zip(rows, results, strict=True)
        ]

    def _row(
        self, row: Row, scores: list[NDArray[np.float32]], gamma: list[float], clipped: int, threshold: float
    ) -> Row:
        sums, ious, masks = Sums(), [], []
        for score, truth in zip(scores, row["labels"], strict=True):
            sums.add(score, truth, threshold)
            mask = (score > threshold).astype(np.uint8)
            ious.append(metrics.iou(mask, truth))
            masks.append(images.rle_encode(mask))
        return {
            "id": row["id"],
            "status": OK,
            "captions": row["captions"],
            "masks": masks,
            "iou": ious,
            "gamma": gamma,
            "clipped": clipped,
            "sums": json.dumps(sums.to_dict()),
        }


def _matched(row: Row) -> list[NDArray[np.float32]]:
    """Predicted masks in the order of the true captions, as scores; what is missing counts as empty.

    A caption that comes twice is matched in order.
    """
    waiting: dict[str, list[NDArray[np.uint8] | None]] = {}
    for caption, mask in row.get("predicted", ()):
        waiting.setdefault(caption, []).append(mask)
    size, scores = row["image"].shape[:2], []
    for caption in row["captions"]:
        mask = waiting[caption].pop(0) if waiting.get(caption) else None
        if mask is not None and mask.shape != size:
            raise DataError(
                f"{row['id']}: a predicted mask is {mask.shape}, the image {size}; predict at original size"
            )
        scores.append(np.zeros(size, np.float32) if mask is None else mask.astype(np.float32))
    return scores


def _with_predictions(samples: Samples, source: Path) -> pa.Table:
    """The index with predicted masks beside it; rows without any get none."""
    if (source / hdf5.INDEX).is_file():
        require_finished(source)
        return samples.rows
    found = {r["id"]: r for r in read_rows(source, ["id", "captions", "masks"])}
    rows = [found.get(i) for i in samples.rows["id"].to_pylist()]
    text = pa.list_(pa.string())
    table = samples.rows.append_column("predicted_captions", pa.array([r and r["captions"] for r in rows], text))
    return table.append_column("predicted_masks", pa.array([r and r["masks"] for r in rows], text))


# --- results ---------------------------------------------------------------------------------------------------------


def _results(config: EvaluateConfig, out: Path, counts: Row) -> Row:
    """Adds all sums, writes what people look at."""
    whole, clipped, ranked = Sums(), 0, []
    for row in _rows(out):
        whole.merge(Sums.from_dict(json.loads(row["sums"])))
        clipped += row["clipped"]
        if row["iou"]:
            ranked.append((sum(row["iou"]) / len(row["iou"]), row["id"]))
    figures: Row = whole.results() | {
        "n_images": len(ranked),
        "n_refused": len(counts["refused"]),
        "n_gamma_clipped": clipped,
    }
    write_json(out / "results.json", figures)
    lines = [f"| {k} | {v:.4f} |" if isinstance(v, float) else f"| {k} | {v} |" for k, v in figures.items()]
    (out / "results.md").write_text("\n".join(["| metric | value |", "|---|---|", *lines, ""]))
    draw.iou_by_threshold(out / "iou_by_threshold.png", metrics.THRESHOLDS, {"mIoU": whole.miou_by_threshold()})
    _overlays(config, out, sorted(ranked))
    return counts


def _overlays(config: EvaluateConfig, out: Path, ranked: list[tuple[float, str]]) -> None:
    """A sheet with the worst and one with the best images: true masks beside predicted ones."""
    if not config.overlays or not ranked:
        return
    samples = open_samples(config.samples)
    load = LoadSample(samples.folder)
    index = {r["id"]: r for r in samples.rows.to_pylist()}
    predicted = {r["id"]: r for r in _rows(out)}
    for name, chosen in (("worst", ranked[: config.overlays]), ("best", ranked[::-1][: config.overlays])):
        cells = []
        for _, image_id in chosen:
            row, own = load(index[image_id]), predicted[image_id]
            masks = [images.rle_decode(m, row["image"].shape[:2]) for m in own["masks"]]
            notes = [f"{i:.2f}" for i in own["iou"]]
            cells.append(
                [
                    draw.overlay(row["image"], row["labels"], row["captions"]),
                    draw.overlay(row["image"], masks, row["captions"], notes=notes),
                ]
            )
        draw.save(out / f"{name}.png", draw.contact_sheet(cells, titles=["truth", "predicted, with IoU"]))


def _rows(out: Path) -> Iterator[Row]:
    for path in sorted((out / "data").glob("*.parquet")):
        yield from (row for row in pq.read_table(path).to_pylist() if row["status"] == OK)


def _record(config: EvaluateConfig, out: Path, folder: Path | None, samples: Samples) -> None:
    """An MLflow run, linked to the training that made the adapter."""
    parent = adapter.read_card(folder).run_id if folder else ""
    tags = {"rlfseg.stage": "evaluate", "rlfseg.samples": str(samples.folder)}
    figures = json.loads((out / "results.json").read_text())
    with tracking.Run.start(
        config.tracking, params=as_dict(config), run_name=out.name, tags=tags, parent=parent or None
    ) as recorded:
        recorded.log_metrics({f"test/{k}": v for k, v in figures.items()})
        for path in (*out.glob("*.png"), *out.glob("results.*")):
            recorded.log_artifact(path, "evaluation")
