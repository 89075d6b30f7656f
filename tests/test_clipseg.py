"""CLIPSeg's protocol against worked examples and naive code."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from numpy.typing import NDArray
from scipy import integrate, ndimage

from rlfseg.errors import DataError
from rlfseg.metrics import (
    THRESHOLDS,
    Argmax,
    ClipSeg,
    Sums,
    clipseg,
    measure,
)
from tests.measured import SEEDS, Sample, add_up, draw


def discs(seed: int = 0, n: int = 40) -> list[tuple[NDArray[np.float64], NDArray[np.uint8]]]:
    """Distance inside a displaced disc, in pixels, and the true disc: [64, 64] each."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:64, :64]
    made = []
    for _ in range(n):
        (cy, cx), radius = rng.uniform(20, 44, 2), rng.uniform(8, 16)
        dy, dx = rng.normal(0, 3, 2)
        inside = radius * rng.uniform(0.85, 1.15) - np.hypot(y - cy - dy, x - cx - dx)
        made.append((inside, (np.hypot(y - cy, x - cx) < radius).astype(np.uint8)))
    return made


EXAMPLE_A = [
    ([[0.9, 0.6, 0.4], [0.1, 0.1, 0.1]], [[1, 1, 0], [0, 0, 0]]),
    ([[0.2, 0.8, 0.8], [0.35, 0.8, 0.25]], [[0, 1, 1], [0, 1, 1]]),
    ([[0.7, 0.1, 0.1], [0.1, 0.1, 0.15]], [[0, 0, 0], [0, 0, 1]]),
]


def example_a() -> list[Sample]:
    return [(np.array(s, np.float32), np.array(t, np.uint8)) for s, t in EXAMPLE_A]


def test_worked_example_a() -> None:
    got = add_up([ClipSeg.of(s, t) for s, t in example_a()]).results()
    printed = {"miou_0.5": 0.4222, "fgiou_0.5": 0.5556, "biniou_0.5": 0.6349, "miou_0.3": 0.3333, "miou_best": 0.4683}
    assert {k: round(got[k], 4) for k in printed} == printed
    assert got["miou_best_t"] == pytest.approx(0.1)
    assert round(got["ap_clipseg"], 4) == 0.2853
    assert round(got["ap_clipseg_trapezoid"], 4) == 0.4637
    plain = add_up([Sums.of(s, t, 0.5) for s, t in example_a()]).results()
    assert {k: round(plain[k], 4) for k in ("miou", "oiou", "ap_pooled", "ap_sample")} == {
        "miou": 0.5833,
        "oiou": 0.625,
        "ap_pooled": 0.8766,
        "ap_sample": 0.8167,
    }


def test_clipseg_ap_falls_as_masks_grow_sharper_and_the_others_do_not() -> None:
    """In the manner of worked example B: the same 40 shapes, soft, nearly binary and binary.

    That example's own discs are not known: it gives .859, .167 and .000 for `ap_clipseg`, and none of 41,110 plain ways
    to draw forty (places, radii, shifts, seeds) gives its figures. So these are our discs, here and in the docs.
    """
    figures = {}
    for name, width in (("soft", 4.0), ("sharp", 0.15), ("binary", None)):
        scores = [
            ((inside > 0) if width is None else 1 / (1 + np.exp(np.minimum(-inside / width, 80)))).astype(np.float32)
            for inside, _ in discs()
        ]
        pairs = [(s, t) for s, (_, t) in zip(scores, discs(), strict=True)]
        theirs, ours = add_up([ClipSeg.of(*p) for p in pairs]), add_up([Sums.of(*p, 0.5) for p in pairs]).results()
        recall = theirs.precision_recall()[1]
        got = [*(theirs.results()[k] for k in ("miou_best", "miou_0.5", "ap_clipseg")), recall[0], recall[-1]]
        figures[name] = [round(float(v), 3) for v in (*got, ours["ap_pooled"], ours["ap_sample"])]
    assert figures == {  # best mIoU, mIoU at 0.5, CLIPSeg's AP, the recalls that it spans, pooled AP, AP of a sample
        "soft": [0.670, 0.670, 0.899, 0.001, 1.000, 0.900, 0.900],
        "sharp": [0.671, 0.670, 0.067, 0.759, 0.842, 0.760, 0.760],
        "binary": [0.670, 0.670, 0.000, 0.804, 0.804, 0.675, 0.671],
    }


def naive_clipseg(samples: list[Sample]) -> dict[str, float]:
    """By loops over samples and thresholds, from the formulas."""
    counts = np.zeros((len(samples), len(THRESHOLDS), 4))
    for i, (score, truth) in enumerate(samples):
        for k, t in enumerate(THRESHOLDS.astype(np.float32)):
            p, g = score > t, truth > 0
            counts[i, k] = (p & g).sum(), (p & ~g).sum(), (~p & g).sum(), (~p & ~g).sum()
    tp, fp, fn, tn = counts.sum(axis=0).T
    some = tp + fp > 0
    points = sorted(
        set(zip(tp[some] / (1 + tp + fn)[some], tp[some] / (1 + tp + fp)[some], strict=True)), key=lambda p: p[0]
    )
    recall, precision = np.array(points).reshape(-1, 2).T
    i_tp, i_fp, i_fn, _ = np.moveaxis(counts, 2, 0)
    miou = (i_tp / (1 + i_tp + i_fp + i_fn)).mean(axis=0)
    at = {t: round(t * 50) - 1 for t in (0.1, 0.2, 0.3, 0.5)}
    fg = tp / (1 + tp + fp + fn)
    return {
        "miou_best": miou.max(),
        "miou_best_t": THRESHOLDS[miou.argmax()],
        **{f"miou_{t}": miou[k] for t, k in at.items()},
        "fgiou_best": fg.max(),
        "biniou_0.3": 0.5 * fg[at[0.3]] + 0.5 * (tn / (1 + tn + fn + fp))[at[0.3]],
        "ap_clipseg": integrate.simpson(precision, x=recall) if len(points) > 1 else 0,
        "ap_clipseg_trapezoid": integrate.trapezoid(precision, recall) if len(points) > 1 else 0,
        "n_samples": len(samples),
    }


@settings(max_examples=40)
@given(SEEDS)
def test_clipseg_equals_loops_over_samples_and_49_thresholds(seed: int) -> None:
    got, wanted = add_up([ClipSeg.of(s, t) for s, t in draw(seed)]).results(), naive_clipseg(draw(seed))
    # the mean is summed in whole 2^-40ths, so two thresholds that tie may come out either way round
    assert {k: got[k] for k in wanted if k != "miou_best_t"} == pytest.approx(
        {k: v for k, v in wanted.items() if k != "miou_best_t"}, abs=1e-9
    )


def test_clipseg_square_is_torchs() -> None:
    rng = np.random.default_rng(3)
    score, truth = rng.random((37, 61)).astype(np.float32), (rng.random((37, 61)) < 0.4).astype(np.uint8)
    got_score, got_truth = clipseg.to_square(score, truth, 24)
    at = [np.linspace(0, n - 1, 24) for n in score.shape]  # aligned corners
    wanted = ndimage.map_coordinates(score.astype(np.float64), np.meshgrid(*at, indexing="ij"), order=1)
    np.testing.assert_allclose(got_score, wanted, atol=1e-5)
    rows, columns = (np.arange(24) * n // 24 for n in truth.shape)
    np.testing.assert_array_equal(got_truth, truth[rows][:, columns])
    same = rng.random((24, 24)).astype(np.float32)
    np.testing.assert_array_equal(clipseg.to_square(same, truth, 24)[0], same)
    for side in (352, 384):
        assert clipseg.to_square(score, truth, side)[0].shape == (side, side)


def test_a_bad_score_is_refused_in_every_protocol() -> None:
    bad = np.array([[0.5, np.nan]], np.float32)
    for protocol in ("rlfseg", "clipseg"):
        with pytest.raises(DataError, match="1 of 2 scores are NaN"):
            measure(protocol, bad, np.ones((1, 2), np.uint8), 0.5)
    with pytest.raises(DataError, match="1 of 2 scores are NaN"):
        Argmax((1, 2)).add(bad, 0)
