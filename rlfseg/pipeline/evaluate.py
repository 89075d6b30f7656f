"""Evaluate: an adapter, or predictions already made, against true masks. Sums add up, pixels stay put.

    load    CPU tasks    true masks, and the picture in the network's square or the predictions
    work    actors       the networks alone; without an adapter they measure
    finish  CPU tasks    scores at the picture's own size, and all protocols at once

Out come sums, of every protocol and phrase a vector of whole numbers; `report.py` adds them up.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from rlfseg import images, metrics, tracking
from rlfseg.config import EvaluateConfig, as_dict
from rlfseg.errors import BadSample, ConfigError, DataError
from rlfseg.metrics import PROTOCOLS, Argmax, SemSeg
from rlfseg.pipeline import effective, report
from rlfseg.pipeline.bases import Opened, fetch_autoencoder, open_adapter
from rlfseg.pipeline.cluster import arithmetic, connect, gpus_per_worker
from rlfseg.pipeline.predictions import LoadPredicted, find
from rlfseg.pipeline.rows import OK, Row, RowByRow, Rows, refused, score_bytes
from rlfseg.pipeline.samples import LoadSample, Samples, askable, open_samples
from rlfseg.pipeline.stages import Stage, Summary, run_stage
from rlfseg.results import checked_phrase

if TYPE_CHECKING:  # imported where it is used: the driver and the CPU tasks need no networks
    from torch import Tensor

    from rlfseg.segmenter import Segmenter

Score = NDArray[np.float32]
Mask = NDArray[np.uint8]

MAX_CLASSES = 2000  # of `semseg`: LVIS has 1,203
IDENTITY = (
    *("adapter", "predictions", "png_values", "base_only", "sampling", "threshold"),
    *("clipseg_side", "refer_side", "present_only", "resamples", "seed"),
)
KNOWN = (*PROTOCOLS, "semseg")
PARTS = ("captions", "tasks", "labels", "instances")  # of a phrase
COLUMNS = [
    ("id", pa.string()),
    ("status", pa.string()),
    ("captions", pa.list_(pa.string())),
    ("masks", pa.list_(pa.string())),  # COCO RLE counts of the predictions
    ("iou", pa.list_(pa.float64())),
    ("gamma", pa.list_(pa.float32())),
    ("clipped", pa.int32()),  # phrases whose gamma ran into its limit
    ("missing", pa.list_(pa.bool_())),  # phrases without a prediction
    ("empty", pa.int32()),  # empty phrases, which are left out
    ("unused", pa.int32()),  # predictions of other phrases
    ("subsets", pa.list_(pa.list_(pa.string()))),  # to which each phrase belongs
    ("n_classes", pa.int32()),  # among which `semseg` chose
]


def schema(protocols: Iterable[str]) -> pa.Schema:
    """Columns of the output: those above, and for each protocol the vector of its sums a phrase, of `semseg` one."""
    vector = pa.list_(pa.int64())
    own = [(p, pa.list_(vector) if p in PROTOCOLS else vector) for p in protocols]
    return pa.schema([*COLUMNS, *own])


def run(config: EvaluateConfig) -> Summary:
    """Measures and writes results.json, results.md, curves and the best and worst overlays.

    Args:
        config: Settings of the command.

    Returns:
        Counts, refusals and seconds.

    Raises:
        ConfigError: Neither an adapter nor predictions are given, or both; no or unknown protocols; too many classes.
        DataError: The samples or predictions are unfinished.
        ModelError: The adapter can't be loaded.
    """
    if (config.adapter is None) == (config.predictions is None):
        raise ConfigError(f"adapter: {config.adapter}, predictions: {config.predictions}; give exactly one of the two")
    if unknown := [p for p in config.protocols if p not in KNOWN]:
        raise ConfigError(f"protocol: {', '.join(map(repr, unknown))} unknown; the protocols are {', '.join(KNOWN)}")
    if not config.protocols:
        raise ConfigError(f"protocol: empty; give some of {', '.join(KNOWN)}")
    samples, out = open_samples(config.samples), Path(config.out).absolute()
    classes = _classes(samples) if "semseg" in config.protocols else ()
    used = open_adapter(config.adapter, config.sampling) if config.adapter else None
    source = config.predictions
    found = None if source is None else find(samples.rows, Path(source).absolute(), classes)
    settings, identity = as_dict(config), samples.identity
    identity |= {k: settings[k] for k in IDENTITY} | {"autoencoder": fetch_autoencoder(config.fast.autoencoder)}
    identity |= {"protocol": list(config.protocols)}
    what = effective.what(config, samples, used, found)
    identity |= {k: what.get(k) for k in ("adapter_version", "predictions_fingerprint")}
    connect()
    summary = run_stage(
        Stage(
            name="evaluate",
            rows=samples.rows if found is None else found.rows,
            **_steps(config, samples, used, classes, what["threshold"]),
            schema=schema(config.protocols),
            out=out,
            run=config.run,
            identity=identity,
            on_error=config.on_error,
            finalize=partial(report.write, config, out, what, classes, 0 if found is None else found.unused),
        )
    )
    results = json.loads((out / "results.json").read_text())
    figures = report.figures(results)
    _record(config, out, used, samples, what, figures)
    idle = config.sampling.idle if used else ()
    return replace(summary, figures=figures, notes=(*summary.notes, *idle, *results["notes"]))


def _steps(
    config: EvaluateConfig, samples: Samples, used: Opened | None, classes: tuple[str, ...], threshold: float
) -> dict[str, Any]:
    """What loads, works and finishes."""
    if used is None:
        assert config.predictions is not None
        source = Path(config.predictions).absolute()
        asked = () if config.present_only else classes
        return {
            "load": LoadTruth(samples, LoadPredicted(source, config.png_values, asked)),
            "work": RowByRow,
            "kwargs": {"function": Measure(config, threshold, classes)},
        }
    gpus = gpus_per_worker(config.run, config.device)
    return {
        "load": LoadTruth(samples, used.card.resolution),
        "work": Scorer,
        "kwargs": {"config": config, "classes": classes, "reference": str(used.folder)},
        "finish": Measure(config, threshold, classes),
        "weigh": partial(score_bytes, used.card.resolution),
        "gpus": gpus,
        "arithmetic": arithmetic("auto", gpus),
    }


def _classes(samples: Samples) -> tuple[str, ...]:
    """Every phrase of the set but the empty, sorted: for `semseg` each is a class."""
    found = sorted({c for own in samples.rows["captions"].to_pylist() for c in own if c.strip()})
    if len(found) > MAX_CLASSES:
        raise ConfigError(
            f"protocol: semseg takes every phrase of the set for a class, and {samples.folder} has {len(found)} "
            f"different ones (limit {MAX_CLASSES}); leave semseg out"
        )
    return tuple(found)


class LoadTruth:
    """Index row -> captions, true masks, the subsets that they belong to; and the picture or the predictions.

    Args:
        samples: The set.
        source: Side of the network's square, or what reads predictions.
    """

    def __init__(self, samples: Samples, source: int | LoadPredicted):
        self.load, self.source = LoadSample(samples.folder), source
        self.attributes = report.attributes(samples.rows)

    def __call__(self, row: Row) -> Row:
        """Reads one sample.

        Args:
            row: An index row.

        Returns:
            `id`, `size` (H, W), `captions`, `labels` and `subsets` of its phrases but the `empty`, of which the number;
            and `square` float32 [3, R, R], or what `LoadPredicted` gives.

        Raises:
            BadSample: It, or a prediction, is damaged.
        """
        loaded = self.load(row)
        image: NDArray[np.uint8] = loaded["image"]
        size = (image.shape[0], image.shape[1])
        asked = askable(loaded["captions"])
        captions, tasks, labels, instances = ([loaded[k][n] for n in asked] for k in PARTS)
        counts = [None if i is None else len(i) for i in instances]
        own = [[f"{a}_{row[a][n]}" for a in self.attributes] for n in asked]
        truth = {
            "id": row["id"],
            "size": size,
            "captions": captions,
            "labels": labels,
            "empty": len(loaded["captions"]) - len(asked),
            "subsets": [
                [*report.subsets_of(mask, n), *more] for mask, n, more in zip(labels, counts, own, strict=True)
            ],
        }
        if isinstance(self.source, LoadPredicted):
            return truth | self.source(row, size, captions, tasks)
        return truth | {"square": images.image_to_tensor(image, self.source).numpy()}


class Scorer:
    """The networks: holds one segmenter.

    Args:
        config: How masks are sampled, and what is measured.
        classes: Of `semseg`, in their order.
        reference: Adapter folder.
        segmenter: A loaded one, instead of `reference`.
    """

    def __init__(
        self,
        config: EvaluateConfig,
        classes: tuple[str, ...] = (),
        reference: str = "tiny",
        segmenter: Segmenter | None = None,
    ):
        if segmenter is None:
            from rlfseg.segmenter import Segmenter

            segmenter = Segmenter.load(reference, device=config.device, base_only=config.base_only, fast=config.fast)
        self.config, self.classes, self.segmenter = config, classes, segmenter

    def __call__(self, rows: Rows) -> Rows:
        """Rows with `square` in; with `squares`, a Square a phrase, and `absent`, the best of absent classes, out."""
        import torch

        z1 = self.segmenter.encode_squares(torch.from_numpy(np.stack([row.pop("square") for row in rows])))
        asked = [[checked_phrase(c) for c in row["captions"]] for row in rows]
        found = self.segmenter.squares(z1, asked, sampling=self.config.sampling)
        done = [row | {"status": OK, "squares": squares} for row, squares in zip(rows, found, strict=True)]
        if "semseg" not in self.config.protocols or self.config.present_only:
            return done
        return [self._with_absent(row, latent[None]) for row, latent in zip(done, z1, strict=True)]

    def _with_absent(self, row: Row, z1: Tensor) -> Row:
        """Asks for the classes that the picture doesn't show; keeps of each pixel the best alone."""
        best, most = Argmax(row["size"]), self.segmenter.max_batch
        absent = [(n, c.strip()) for n, c in enumerate(self.classes) if c not in row["captions"]]
        try:
            for part in (absent[start : start + most] for start in range(0, len(absent), most)):
                squares = self.segmenter.squares(z1, [[c for _, c in part]], sampling=self.config.sampling)[0]
                for (label, _), square in zip(part, squares, strict=True):
                    best.add(square.at(row["size"], 0).score, label)
        except DataError as error:
            return refused(row, error)
        return row | {"absent": best}


class Measure:
    """Scores and true masks of a picture -> columns of `schema`.

    Args:
        config: What to measure.
        threshold: Score above which a pixel is mask.
        classes: Of `semseg`, in their order.
    """

    def __init__(self, config: EvaluateConfig, threshold: float, classes: tuple[str, ...] = ()):
        self.config, self.threshold = config, threshold
        self.labels = {caption: n for n, caption in enumerate(classes)}

    def __call__(self, row: Row) -> Row:
        """Measures one picture.

        Args:
            row: Of `Scorer`, or of `LoadTruth` with predictions.

        Returns:
            Columns of `schema`.

        Raises:
            BadSample: A score is NaN or outside [0, 1].
        """
        try:
            return self._measured(row)
        except DataError as error:
            raise BadSample(str(error), file="evaluate", sample=row["id"]) from error

    def _measured(self, row: Row) -> Row:
        phrases, best = list[Row](), None
        if "semseg" in self.config.protocols:
            best = row.get("absent") or Argmax(row["size"])
        for n, (caption, truth) in enumerate(zip(row["captions"], row["labels"], strict=True)):
            # One at a time: at the size of a photograph, the scores of all phrases are gigabytes
            score, about = self._given(row, n)
            phrases.append(about | self._compared(score, truth, missing=about["missing"]))
            if best is not None:
                best.add(score, self.labels[caption])
        lists = ("masks", "iou", "missing", "gamma", *(p for p in self.config.protocols if p in PROTOCOLS))
        done: Row = {key: [phrase[key] for phrase in phrases] for key in lists}
        done |= {key: row[key] for key in ("id", "captions", "subsets", "empty")}
        done |= {"status": OK, "unused": row.get("unused", 0), "clipped": sum(p["clipped"] for p in phrases)}
        return done if best is None else done | self._semseg(row, best)

    def _given(self, row: Row, n: int) -> tuple[Score, Row]:
        """The score of a phrase at the picture's size, 0 everywhere where none was predicted, and how it came about."""
        if "squares" not in row:
            score = row["scores"][n]
            given = np.zeros(row["size"], np.float32) if score is None else score
            return given, {"missing": score is None, "gamma": 0.0, "clipped": False}
        result = row["squares"][n].at(row["size"], self.threshold)
        if result.failed:
            raise DataError("the network gave NaN")
        return result.score, {"missing": False, "gamma": result.gamma, "clipped": result.clipped}

    def _compared(self, score: Score, truth: Mask, *, missing: bool) -> Row:
        """A phrase's part of each list of `schema`."""
        mask = (score > self.threshold).astype(np.uint8)
        sides = {"clipseg_side": self.config.clipseg_side, "refer_side": self.config.refer_side}
        measured = {
            protocol: metrics.measure(protocol, score, truth, self.threshold, missing=missing, **sides).vector()
            for protocol in self.config.protocols
            if protocol in PROTOCOLS
        }
        return {"masks": images.rle_encode(mask), "iou": metrics.iou(mask, truth)} | measured

    def _semseg(self, row: Row, best: Argmax) -> Row:
        """The picture's own classes against each other and those that it doesn't show."""
        own = [self.labels[c] for c in row["captions"]]
        asked = len(self.labels) if "absent" in row else len(set(own))
        for caption, given in row.get("others", ()):
            best.add(given, self.labels[caption])
            asked += 1
        truth = metrics.true_labels(row["labels"], own, row["size"])
        return {"semseg": SemSeg.of(best.labels, truth, len(self.labels)).vector(), "n_classes": asked}


def _record(
    config: EvaluateConfig, out: Path, used: Opened | None, samples: Samples, what: Row, figures: dict[str, float]
) -> None:
    """An MLflow run, linked to the training that made the adapter."""
    parent = used.card.run_id if used else ""
    tags = {"rlfseg.stage": "evaluate", "rlfseg.samples": str(samples.folder)}
    with tracking.Run.start(
        config.tracking, params=as_dict(config) | {"what": what}, run_name=out.name, tags=tags, parent=parent or None
    ) as recorded:
        recorded.log_metrics({f"test/{k}": v for k, v in figures.items()})
        for path in (*out.glob("*.png"), *out.glob("*.json"), *out.glob("results.md")):
            if not path.name.startswith("_"):
                recorded.log_artifact(path, "evaluation")
