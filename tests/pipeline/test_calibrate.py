"""Calibrate's two halves called directly: the curves of an image, and the choice by the curves of all."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rlfseg.config import CalibrateConfig, SamplingConfig
from rlfseg.datasets.shapes import draw_scene
from rlfseg.errors import DataError
from rlfseg.metrics import THRESHOLDS, iou
from rlfseg.metrics.sums import UNIT
from rlfseg.pipeline.calibrate import SCHEMA, Calibrator, _choose
from rlfseg.segmenter import Segmenter

EPS = (0.05, 1.0)  # far apart, so that the ways differ by them
CONFIG = CalibrateConfig(adapter="tiny", samples="s", out="o", eps=EPS, gamma_max=None)


@pytest.fixture(scope="module")
def segmenter() -> Segmenter:
    return Segmenter.load("tiny", device="cpu")


def test_curves_are_the_iou_of_what_the_segmenter_gives(segmenter: Segmenter) -> None:
    """At every threshold, for every way and eps; an empty phrase is not asked."""
    scene = draw_scene(5, split="val", size=48)
    captions, masks = [p.caption for p in scene.phrases], [p.mask for p in scene.phrases]
    row = {"id": "a", "image": scene.image, "captions": [*captions, " "], "labels": [*masks, masks[0]]}
    nothing = row | {"id": "b", "captions": [""], "labels": masks[:1]}
    got, silent = Calibrator("", CONFIG, segmenter)([row, nothing])
    assert (got["status"], got["phrases"]) == ("ok", len(captions))
    assert (silent["status"], silent["phrases"], silent["curves"]) == ("ok", 0, "{}")
    curves = json.loads(got["curves"])
    ways = {"one step": SamplingConfig()}
    for eps in EPS:
        ways[f"aos {eps:g}"] = SamplingConfig(rescale="aos", eps=eps, gamma_max=None)
        ways[f"hss {eps:g}"] = SamplingConfig(rescale="hss", eps=eps, gamma_max=None)
    assert curves.keys() == ways.keys()
    for name, sampling in ways.items():
        results = segmenter(scene.image, captions, sampling=sampling)
        for threshold, total in zip(THRESHOLDS, curves[name], strict=True):
            pairs = zip(results, masks, strict=True)
            naive = sum(iou((r.score > threshold).astype(np.uint8), mask) for r, mask in pairs)
            assert total / UNIT == pytest.approx(naive, abs=1e-9), (name, threshold)
    assert len({str(curve) for curve in curves.values()}) == len(ways)


def test_many_phrases_are_computed_some_at_a_time(segmenter: Segmenter, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fifty in one call of a network of SD's size would not fit onto a GPU; the curves are the same."""
    scene = draw_scene(5, split="val", size=48)
    phrases = [scene.phrases[n % len(scene.phrases)] for n in range(5)]
    row = {
        "image": scene.image,
        "captions": [p.caption for p in phrases],
        "labels": [p.mask for p in phrases],
        "id": "a",
    }
    decoded, decode = list[int](), segmenter.backbone.decode
    monkeypatch.setattr(segmenter.backbone, "decode", lambda z0: decoded.append(len(z0)) or decode(z0))
    (whole,) = Calibrator("", CONFIG, segmenter)([row])
    monkeypatch.setattr(segmenter, "max_batch", 2)
    (parts,) = Calibrator("", CONFIG, segmenter)([row])
    half = len(decoded) // 4
    assert decoded == [5] * half + [2] * half + [2] * half + [1] * half
    curves, others = json.loads(whole["curves"]), json.loads(parts["curves"])
    assert curves.keys() == others.keys()
    for name, curve in curves.items():  # a batch of another size differs in last bits, and a pixel may pass a threshold
        np.testing.assert_allclose(curve, others[name], atol=0.01 * UNIT)


def test_the_best_threshold_is_chosen_by_one_step_and_each_eps_at_that_threshold(tmp_path: Path) -> None:
    """Against a loop over scripted curves, of two images and a refused one."""
    rng = np.random.default_rng(3)
    names = ["one step", *(f"{way} {eps:g}" for eps in EPS for way in ("aos", "hss"))]
    scripted = [{n: rng.integers(0, 3 * UNIT, len(THRESHOLDS)).tolist() for n in names} for _ in range(2)]
    rows = [{"id": str(n), "status": "ok", "curves": json.dumps(c), "phrases": 3} for n, c in enumerate(scripted)]
    rows += [{"id": "2", "status": "ok", "curves": "{}", "phrases": 0}, {"id": "3", "status": "refused: damaged"}]
    write(tmp_path, rows)
    assert _choose(tmp_path, {"rows_out": 3}) == {"rows_out": 3}

    means = {n: [sum(c[n][t] for c in scripted) / (6 * UNIT) for t in range(len(THRESHOLDS))] for n in names}
    best = 0
    for t in range(len(THRESHOLDS)):
        if means["one step"][t] > means["one step"][best]:
            best = t
    naive = {"threshold": THRESHOLDS[best], "miou_one_step": means["one step"][best]}
    for way in ("aos", "hss"):
        eps = EPS[0] if means[f"{way} {EPS[0]:g}"][best] > means[f"{way} {EPS[1]:g}"][best] else EPS[1]
        naive |= {f"eps_{way}": eps, f"miou_{way}": means[f"{way} {eps:g}"][best]}
    assert len({naive["eps_aos"], naive["eps_hss"]}) == 2  # so that neither is always the first
    written = json.loads((tmp_path / "calibration.json").read_text())
    assert written["chosen"] == pytest.approx(naive)
    assert written["phrases"] == 6
    assert (tmp_path / "calibration.png").stat().st_size > 0


def test_nothing_to_calibrate_on_is_told(tmp_path: Path) -> None:
    write(tmp_path, [{"id": "0", "status": "ok", "curves": "{}", "phrases": 0}])
    with pytest.raises(DataError, match="no sample has a phrase"):
        _choose(tmp_path, {})


def write(out: Path, rows: list[dict[str, object]]) -> None:
    (out / "data").mkdir()
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), out / "data" / "0.parquet")
