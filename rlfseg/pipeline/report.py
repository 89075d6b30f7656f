"""What an evaluation comes to: sums over the set and its subsets, intervals, tables, curves and overlays.

Sums are read from the stage's Parquet a few rows at a time; nothing grows with the set but a line an image.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from rlfseg import draw, images, metrics
from rlfseg.config import EvaluateConfig, flatten
from rlfseg.datasets import sources
from rlfseg.metrics import PROTOCOLS, Additive, ClipSeg, SemSeg, Sums
from rlfseg.pipeline import effective
from rlfseg.pipeline.folders import good_rows, identity_of, require_finished, write_json
from rlfseg.pipeline.rows import OK, Row
from rlfseg.pipeline.samples import LoadSample, open_samples

SMALL, LARGE = 0.02, 0.2  # shares of the image's area, as PhraseCut's subsets
MAX_VALUES = 32  # of an attribute that makes subsets
ROWS = 64  # images read at a time
MEANS = ("miou", "oiou", "giou", "ciou")  # what every protocol is compared by, side by side


# --- subsets ---------------------------------------------------------------------------------------------------------


def attributes(index: pa.Table) -> list[str]:
    """Columns of an index that sort phrases: a text a phrase, with few different ones (stuff / object, say)."""
    counts = [len(own) for own in index["captions"].to_pylist()]
    found = []
    for column in index.schema:
        if column.type != pa.list_(pa.string()) or column.name in ("captions", "masks"):
            continue
        texts = index[column.name].to_pylist()
        if [len(own or ()) for own in texts] == counts and len({t for own in texts for t in own or ()}) <= MAX_VALUES:
            found.append(column.name)
    return found


def subsets_of(mask: NDArray[np.uint8], instances: int | None) -> list[str]:
    """Subsets that a phrase belongs to by its true mask and the number of its objects, where that is known."""
    share = float(np.count_nonzero(mask)) / mask.size
    size = "empty" if not share else "small" if share < SMALL else "large" if share > LARGE else "mid"
    if not instances:
        return [f"size_{size}"]
    numbers = ["1"] if instances == 1 else ["2_up", "2_4" if instances < 5 else "5_up"]
    return [f"size_{size}", *(f"instances_{number}" for number in numbers)]


# --- sums ------------------------------------------------------------------------------------------------------------


class Part(NamedTuple):
    """Some images' sums of one protocol."""

    ids: list[str]
    vectors: NDArray[np.int64]  # [measured, d]: a row a phrase, or an image
    starts: NDArray[np.int64]  # where each image's rows begin
    subsets: list[list[str]]  # of each row


def _parts(out: Path, protocol: str) -> Iterator[Part]:
    """The sums of a protocol, some images at a time; images without phrases have none."""
    for path in sorted((out / "data").glob("*.parquet")):
        columns = ["id", "status", "captions", "subsets", protocol]
        for batch in pq.ParquetFile(path).iter_batches(ROWS, columns=columns):
            lengths = np.array([len(c or ()) for c in batch["captions"].to_pylist()])
            keep = pa.array((lengths > 0) & np.array([s == OK for s in batch["status"].to_pylist()]))
            batch, lengths = batch.filter(keep), lengths[keep.to_numpy(zero_copy_only=False)]
            if not batch.num_rows:
                continue
            by_phrase = protocol in PROTOCOLS
            vectors = batch[protocol].flatten() if by_phrase else batch[protocol]
            measured = lengths if by_phrase else np.ones(batch.num_rows, np.int64)
            subsets = batch["subsets"].flatten().to_pylist() if by_phrase else [[]] * batch.num_rows
            table = vectors.flatten().to_numpy().reshape(len(vectors), -1)
            yield Part(batch["id"].to_pylist(), table, np.cumsum(measured) - measured, subsets)


def _zero(protocol: str, classes: tuple[str, ...]) -> Additive:
    return PROTOCOLS[protocol]() if protocol in PROTOCOLS else SemSeg.none(len(classes))


def _add_up(out: Path, protocol: str, zero: Additive) -> tuple[Additive, dict[str, Additive]]:
    """The sums of the whole set and of each of its subsets."""
    whole, by_subset = zero.vector(), dict[str, NDArray[np.int64]]()
    for part in _parts(out, protocol):
        whole = whole + part.vectors.sum(axis=0)
        for name in {n for own in part.subsets for n in own}:
            inside = np.array([name in own for own in part.subsets])
            by_subset[name] = by_subset.get(name, 0) + part.vectors[inside].sum(axis=0)
    return zero.like(whole), {name: zero.like(v) for name, v in sorted(by_subset.items())}


# --- results ---------------------------------------------------------------------------------------------------------


def write(config: EvaluateConfig, out: Path, what: Row, classes: tuple[str, ...], unused: int, counts: Row) -> Row:
    """Adds all sums and writes what people look at.

    Args:
        config: Settings of the command.
        out: Its folder, with all rows written.
        what: What was computed, and on what: of `effective.what`.
        classes: Of `semseg`.
        unused: Predictions that belong to no picture of the set.
        counts: What the stage has counted.

    Returns:
        The counts.

    Raises:
        DataError: Nothing could be measured.
    """
    seen = list(good_rows(out, ["id", "iou", "missing", "clipped", "n_classes", "empty", "unused"]))
    ranked = sorted((sum(row["iou"]) / len(row["iou"]), row["id"]) for row in seen if row["iou"])
    draws = metrics.draw_images(len(ranked), config.resamples, config.seed) if config.resamples and ranked else None
    # By id, not as they lie in the files: a job that went on, or had more workers, gives the same intervals
    number = {image: n for n, image in enumerate(sorted(image for _, image in ranked))}
    results: Row = {"what": what, "protocols": {}, "subsets": {}, "intervals": {}}
    sums: dict[str, Additive] = {}
    for protocol in config.protocols:
        zero = _zero(protocol, classes)
        sums[protocol], by_subset = _add_up(out, protocol, zero)
        results["protocols"][protocol] = sums[protocol].results()
        for name, part in by_subset.items():
            results["subsets"].setdefault(name, {})[protocol] = part.results()
        if draws is not None:
            per_image = (
                ([number[i] for i in p.ids], np.add.reduceat(p.vectors, p.starts, axis=0))
                for p in _parts(out, protocol)
            )
            results["intervals"][protocol] = metrics.intervals(zero, metrics.resampled(draws, per_image))
    results["bootstrap"] = {"resamples": config.resamples, "seed": config.seed, "level": 0.95, "unit": "image"}
    if "semseg" in sums:
        results["class_iou"] = dict(zip(classes, _numbers(sums["semseg"].iou()), strict=True))  # type: ignore[attr-defined]
    refused, told = _left_out(Path(config.samples).absolute())
    results["denominator"] = _denominator(config, counts, seen, unused, refused, told)
    results["notes"] = [*effective.notes(config, what), *(sources.notes(told) if told else ())]
    headline = {
        "threshold": what["threshold"],
        "n_images": len(ranked),
        "n_refused": len(counts["refused"]),
        "n_gamma_clipped": sum(row["clipped"] for row in seen),
        "n_missing_predictions": results["denominator"]["n_missing_predictions"],
    }
    results = results["protocols"].get("rlfseg", {}) | headline | results
    write_json(out / "results.json", results)
    (out / "results.md").write_text(_markdown(results))
    _curves(out, sums)
    _overlays(config, out, ranked)
    return counts


def _numbers(values: NDArray[np.float64]) -> list[float | None]:
    return [None if np.isnan(v) else float(v) for v in values]


def _denominator(
    config: EvaluateConfig, counts: Row, seen: list[Row], unused: int, refused: dict[str, str], told: Row
) -> Row:
    """What the figures are over, and what is not in them."""
    with_phrases = [row for row in seen if row["iou"]]
    phrases: dict[str, str] = told.get("skipped", {})
    note: Row = {
        "n_evaluated": sum(len(row["iou"]) for row in seen),
        "n_images": len(with_phrases),
        "n_images_without_phrases": len(seen) - len(with_phrases) + told.get("without_phrases", 0),
        "n_images_excluded": len(told.get("excluded", ())),
        "n_skipped": len(counts["refused"]) + len(refused),
        "skipped_in_prepare": dict(Counter(refused.values())),
        "skipped_here": dict(Counter(counts["refused"].values())),
        "n_empty_phrases": sum(row["empty"] for row in seen),
        "n_phrases_skipped": len(phrases),
        "phrases_skipped_in_prepare": dict(Counter(phrases.values())),
        "n_phrases_drawn_partly": len(told.get("partly", ())),
        "n_missing_predictions": sum(sum(row["missing"]) for row in seen),
        "n_unused_predictions": unused + sum(row["unused"] for row in seen),
        "splits": told.get("splits", {}),
    }
    if "semseg" in config.protocols:
        note["semseg_classes_an_image"] = float(np.mean([row["n_classes"] for row in seen]))
    return note


def _left_out(folder: Path) -> tuple[dict[str, str], Row]:
    """Why images are not in the samples, by `prepare` and by `refine` after it; and all that `prepare` reports."""
    refused, told = dict[str, str](), Row()
    for _ in range(2):
        if not (folder / "_SUCCESS.json").is_file():
            break
        state = require_finished(folder)
        refused |= state.get("refused", {})
        told = state.get("report") or told
        folder = Path(str(identity_of(state, folder).get("samples", folder / "none")))
    return refused, told


def figures(results: Row) -> dict[str, float]:
    """The numbers of results.json under flat names, for people and MLflow: the default protocol's as they are."""
    flat = {k: v for k, v in results.items() if isinstance(v, int | float)}
    for protocol, own in results["protocols"].items():
        if protocol != "rlfseg":
            flat |= {f"{protocol}/{k}": v for k, v in own.items()}
    for protocol, own in results["intervals"].items():
        for k in MEANS:
            if k in own:
                flat |= {f"{protocol}/{k}_low": own[k][0], f"{protocol}/{k}_high": own[k][1]}
    for name, of_protocols in results["subsets"].items():
        for protocol, own in of_protocols.items():
            flat |= {f"{protocol}/{name}/{k}": own[k] for k in MEANS if k in own}
    return flat


def _markdown(results: Row) -> str:
    text = ["# Results", "", *(f"- {note}" for note in results["notes"]), *([""] if results["notes"] else [])]
    text += ["| protocol | mean IoU | overall IoU | samples |", "|---|---|---|---|"]
    for protocol, own in results["protocols"].items():
        text.append(f"| {protocol} | {_mean(own)} | {_overall(own)} | {own.get('n_samples', own.get('n_images'))} |")
    for protocol, own in results["protocols"].items():
        text += ["", f"## {protocol}", "", "| metric | value | 95 % interval |", "|---|---|---|"]
        ends = results["intervals"].get(protocol, {})
        text += [f"| {k} | {_cell(v)} | {_interval(ends.get(k))} |" for k, v in own.items()]
    first = next(iter(results["protocols"]))
    if results["subsets"]:
        text += ["", f"## Subsets ({first})", "", "| subset | mean IoU | overall IoU | samples |", "|---|---|---|---|"]
        for name, of_protocols in results["subsets"].items():
            own = of_protocols[first]
            text.append(f"| {name} | {_mean(own)} | {_overall(own)} | {own['n_samples']} |")
    over = {k: json.dumps(v) if isinstance(v, dict) else v for k, v in results["denominator"].items()}
    for title, told in (("What was computed", flatten(results["what"])), ("What the figures are over", over)):
        text += ["", f"## {title}", "", "| | |", "|---|---|", *(f"| {k} | {v} |" for k, v in told.items())]
    boot = results["bootstrap"]
    text += ["", f"Intervals: bootstrap over images, {boot['resamples']} resamples, seed {boot['seed']}.", ""]
    return "\n".join(text)


def _mean(own: Row) -> str:
    return _cell(next((own[k] for k in ("miou", "giou", "miou_best") if k in own), None))


def _overall(own: Row) -> str:
    return _cell(next((own[k] for k in ("oiou", "ciou", "fgiou_best") if k in own), None))


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)


def _interval(ends: tuple[float, float] | None) -> str:
    return "" if ends is None else f"{ends[0]:.4f} to {ends[1]:.4f}"


# --- pictures --------------------------------------------------------------------------------------------------------


def _curves(out: Path, sums: dict[str, Additive]) -> None:
    """IoU by threshold and precision by recall, as pictures and as numbers."""
    ious, points = {}, {}
    for name, own in sums.items():
        if isinstance(own, Sums):
            ious[name] = own.miou_by_threshold()
            precision, recall = metrics.precision_recall(own.histograms())
            points[f"{name}: all pixels"] = (recall, precision)
        if isinstance(own, ClipSeg):
            ious[name] = own.miou_by_threshold()
            precision, recall = own.precision_recall()
            points[f"{name}: 49 thresholds"] = (recall, precision)
    if not ious:
        return
    draw.iou_by_threshold(out / "iou_by_threshold.png", metrics.THRESHOLDS, ious)
    draw.curves(out / "precision_recall.png", points, title="Precision and recall", x="recall", y="precision")
    numbers = {name: {"recall": r.tolist(), "precision": p.tolist()} for name, (r, p) in points.items()}
    by_threshold = {name: curve.tolist() for name, curve in ious.items()}
    tree = {"thresholds": metrics.THRESHOLDS.tolist(), "miou": by_threshold, "precision_recall": numbers}
    write_json(out / "curves.json", tree)


def _overlays(config: EvaluateConfig, out: Path, ranked: list[tuple[float, str]]) -> None:
    """A sheet with the worst and one with the best images: true masks beside predicted ones."""
    if not config.overlays or not ranked:
        return
    samples = open_samples(config.samples)
    load = LoadSample(samples.folder)
    chosen = {"worst": ranked[: config.overlays], "best": ranked[::-1][: config.overlays]}
    wanted = {image_id for own in chosen.values() for _, image_id in own}
    index = {r["id"]: r for r in samples.rows.to_pylist() if r["id"] in wanted}
    predicted = {r["id"]: r for r in good_rows(out, ["id", "masks", "iou"]) if r["id"] in wanted}
    for name, own in chosen.items():
        cells = []
        for _, image_id in own:
            row, found = load(index[image_id]), predicted[image_id]
            masks = [images.rle_decode(m, row["image"].shape[:2]) for m in found["masks"]]
            cells.append(
                [
                    draw.overlay(row["image"], row["labels"], row["captions"]),
                    draw.overlay(row["image"], masks, row["captions"], notes=[f"{i:.2f}" for i in found["iou"]]),
                ]
            )
        draw.save(out / f"{name}.png", draw.contact_sheet(cells, titles=["truth", "predicted, with IoU"]))
