"""Calibrate: the mask threshold and the eps of AOS and HSS, tuned on a validation split, written into the adapter."""

from __future__ import annotations

import dataclasses
import json
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from rlfseg import adapter, draw, images, sampling, tracking
from rlfseg.config import CalibrateConfig, SamplingConfig, as_dict
from rlfseg.errors import DataError
from rlfseg.metrics import THRESHOLDS, Sums, iou_by_threshold, score_histograms, units
from rlfseg.pipeline.bases import open_adapter
from rlfseg.pipeline.cluster import arithmetic, connect, gpus_per_worker
from rlfseg.pipeline.folders import good_rows, weights, write_json
from rlfseg.pipeline.rows import OK, Row, Rows
from rlfseg.pipeline.samples import LoadSample, askable, open_samples
from rlfseg.pipeline.stages import Stage, Summary, run_stage
from rlfseg.segmenter import Segmenter

ONE_STEP = "one step"
HSS_STEPS = SamplingConfig().hss_steps
SCHEMA = pa.schema([("id", pa.string()), ("status", pa.string()), ("curves", pa.string()), ("phrases", pa.int32())])


def run(config: CalibrateConfig) -> Summary:
    """Searches and writes the choice into `config.adapter`; the search is in `config.out`/calibration.json.

    Args:
        config: Settings of the command.

    Returns:
        Counts, refusals and seconds.

    Raises:
        BadSample: A sample can't be read and `on_error` is `stop`.
        DataError: No sample has a phrase.
        ModelError: The adapter can't be loaded.
    """
    samples, out = open_samples(config.samples), Path(config.out).absolute()
    folder, card = open_adapter(str(Path(config.adapter).absolute()), SamplingConfig())
    settings = as_dict(config)
    connect()
    gpus = gpus_per_worker(config.run, config.device)
    summary = run_stage(
        Stage(
            name="calibrate",
            rows=samples.rows,
            load=LoadSample(samples.folder),
            work=Calibrator,
            kwargs={"reference": str(folder), "config": config},
            schema=SCHEMA,
            out=out,
            run=config.run,
            gpus=gpus,
            arithmetic=arithmetic("auto", gpus),
            # not the whole card: the choice is written into it
            identity=samples.identity
            | {k: settings[k] for k in ("eps", "gamma_max")}
            | {"base": card.base, "resolution": card.resolution, "weights": weights(folder)},
            on_error=config.on_error,
            finalize=partial(_choose, out),
        )
    )
    chosen = json.loads((out / "calibration.json").read_text())["chosen"]
    calibrated = {k: chosen[k] for k in ("threshold", "eps_aos", "eps_hss")}
    figures = {way: chosen[f"miou_{way}"] for way in ("one_step", "aos", "hss")}
    adapter.write_card(folder, dataclasses.replace(card, calibration=figures, **calibrated))
    with tracking.Run.start(
        config.tracking,
        params=settings,
        run_name=out.name,
        tags={"rlfseg.stage": "calibrate"},
        parent=card.run_id or None,
    ) as recorded:
        recorded.log_metrics({f"calibration/{k}": v for k, v in chosen.items()})
        for path in (out / "calibration.json", out / "calibration.png"):
            recorded.log_artifact(path, "calibration")
        model = _publish(recorded, folder, card.run_id, out)
    notes = (*summary.notes, f"as an MLflow model: {model}") if model else summary.notes
    return Summary(**{**vars(summary), "figures": chosen, "notes": notes})


def _publish(recorded: tracking.Run, folder: Path, run_id: str, out: Path) -> str | None:
    """Logs the adapter once more under its training: what MLflow has of it was logged before it was calibrated."""
    if not (recorded.id and run_id):
        return None
    with tracking.Run.attach(recorded.uri, run_id, default_dir=out) as trained:
        trained.log_artifacts(folder, "adapter")
        return tracking.log_model_folder(trained, folder)


class Calibrator:
    """The per-image work: mIoU at every threshold, for one step and for AOS and HSS at every eps.

    Args:
        reference: Adapter folder.
        config: Values to try.
        segmenter: A loaded one, instead of `reference`.
    """

    def __init__(self, reference: str, config: CalibrateConfig, segmenter: Segmenter | None = None):
        self.config = config
        self.segmenter = segmenter or Segmenter.load(reference, device=config.device)

    def __call__(self, rows: Rows) -> Rows:
        """Rows with `image`, `captions`, `labels` in; sums of IoU by threshold out, as JSON.

        An empty phrase asks for nothing and is left out, as in training and evaluation.
        """
        return [self._image(row) for row in rows]

    @torch.no_grad()
    def _image(self, row: Row) -> Row:
        backbone, size = self.segmenter.backbone, row["image"].shape[:2]
        curves: dict[str, np.ndarray] = {}
        asked = [(row["captions"][n], row["labels"][n]) for n in askable(row["captions"])]
        most = self.segmenter.max_batch
        z1 = self.segmenter.encode([row["image"]]) if asked else torch.empty(0)
        for part in (asked[start : start + most] for start in range(0, len(asked), most)):
            with backbone.autocast():
                text = backbone.text([caption for caption, _ in part])
                candidates = self._candidates(z1.expand(len(part), -1, -1, -1), text)
            for name, z0 in candidates.items():
                for square, (_, truth) in zip(backbone.decode(z0), part, strict=True):
                    score = images.tensor_to_score(square[None], size)[0].cpu().numpy()
                    # IoU alone of what `Sums` would measure: boundaries and AP of every candidate are asked by nobody
                    curve = units(iou_by_threshold(score_histograms(score, truth)))
                    curves[name] = curves.get(name, 0) + curve
        sums = {name: curve.tolist() for name, curve in curves.items()}
        return {"id": row["id"], "status": OK, "curves": json.dumps(sums), "phrases": len(asked)}

    def _candidates(self, z1: Tensor, text: Tensor) -> dict[str, Tensor]:
        """Mask latents of every setting; the UNet is asked once for the step and four times for HSS's reference."""
        v, limit, backbone = self.segmenter.backbone.velocity, self.config.gamma_max, self.segmenter.backbone
        z0, dz = sampling.one_step(v, z1, text)
        multi = sampling.euler(v, z1, text, HSS_STEPS, dz)
        found = {ONE_STEP: z0}
        for eps in self.config.eps:
            found[f"aos {eps:g}"] = sampling.aos(z1, dz, backbone.black(), eps, limit).z0
            found[f"hss {eps:g}"] = sampling.rescale(z1, dz, multi, eps, limit).z0
        return found


def _choose(out: Path, counts: Row) -> Row:
    """The threshold by the single step; then each eps by mIoU at that threshold."""
    total: dict[str, np.ndarray] = {}
    phrases = 0
    for row in good_rows(out):
        phrases += row["phrases"]
        for name, curve in json.loads(row["curves"]).items():
            total[name] = total.get(name, 0) + np.array(curve, dtype=object)
    if not total:
        raise DataError(f"{out}: no sample has a phrase to calibrate on")
    sums = {name: Sums(n_samples=phrases, iou_by_threshold=np.array(c, dtype=np.int64)) for name, c in total.items()}
    curves = {name: s.miou_by_threshold() for name, s in sums.items()}
    best = int(curves[ONE_STEP].argmax())
    at_threshold = {name: float(curve[best]) for name, curve in curves.items()}
    chosen: dict[str, float] = {"threshold": float(THRESHOLDS[best]), "miou_one_step": at_threshold[ONE_STEP]}
    for way in ("aos", "hss"):
        name = max((n for n in curves if n.startswith(way)), key=at_threshold.__getitem__)
        chosen |= {f"eps_{way}": float(name.split()[1]), f"miou_{way}": at_threshold[name]}
    write_json(out / "calibration.json", {"chosen": chosen, "miou": at_threshold, "phrases": phrases})
    draw.iou_by_threshold(out / "calibration.png", THRESHOLDS, curves)
    return counts
