"""The default protocol against scikit-learn, torchmetrics, naive loops over the thresholds and worked examples."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from sklearn.metrics import average_precision_score, jaccard_score
from torchmetrics.classification import BinaryAveragePrecision, BinaryJaccardIndex

from rlfseg.errors import DataError
from rlfseg.metrics import BINS, THRESHOLDS, Sums, average_precision, boundary_iou, iou, score_histograms

Score = NDArray[np.float32]
Truth = NDArray[np.uint8]
SEEDS = st.integers(0, 2**32 - 1)


def draw(seed: int, n: int = 5) -> list[tuple[Score, Truth]]:
    """Samples of different sizes whose scores are better than chance and often lie on a threshold or a bin's edge."""
    rng = np.random.default_rng(seed)
    samples = []
    for _ in range(n):
        truth = (rng.random(rng.integers(2, 12, size=2)) < rng.choice([0, 0.3, 0.7])).astype(np.uint8)
        score = np.clip(rng.beta(1, 2, truth.shape) + 0.4 * truth, 0, 1)
        on_grid = rng.random(truth.shape)
        score = np.where(on_grid < 0.2, score.round(2), np.where(on_grid < 0.4, (score * 64).round() / 64, score))
        samples.append((score.astype(np.float32), truth))
    return samples


def measure(samples: list[tuple[Score, Truth]], threshold: float = 0.5) -> Sums:
    sums = Sums()
    for score, truth in samples:
        sums.add(score, truth, threshold)
    return sums


def binary(*masks: list[list[int]]) -> list[Truth]:
    return [np.array(m, dtype=np.uint8) for m in masks]


def rows(intersection: int, union: int) -> tuple[Score, Truth]:
    """A sample with just this intersection and union."""
    score, truth = np.zeros((1, union + 5), np.float32), np.zeros((1, union + 5), np.uint8)
    score[0, :union], truth[0, :intersection] = 1, 1
    return score, truth


def naive_iou(pred: NDArray[np.bool_], truth: NDArray[np.bool_]) -> float:
    return float((pred & truth).sum() / (pred | truth).sum()) if (pred | truth).any() else 1.0


def quantised(score: Score) -> NDArray[np.float64]:
    """A number for each bin, rising: the bin of 1,024, and the thresholds below the score."""
    below = (score[..., None] > THRESHOLDS.astype(score.dtype)).sum(axis=-1)
    return np.minimum(np.floor(score * float(BINS)), BINS - 1) + below


# --- worked examples ----------------------------------------------------------------------------------------------

EXAMPLE_A = [
    ([[0.9, 0.6, 0.4], [0.1, 0.1, 0.1]], [[1, 1, 0], [0, 0, 0]]),
    ([[0.2, 0.8, 0.8], [0.35, 0.8, 0.25]], [[0, 1, 1], [0, 1, 1]]),
    ([[0.7, 0.1, 0.1], [0.1, 0.1, 0.15]], [[0, 0, 0], [0, 0, 1]]),
]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_three_samples_by_hand(dtype: type) -> None:
    got = measure([(np.array(s, dtype), np.array(t, np.uint8)) for s, t in EXAMPLE_A]).results()
    assert got["miou"] == pytest.approx((1 + 3 / 4 + 0) / 3)
    assert got["oiou"] == pytest.approx(5 / 8)
    assert got["ap_pooled"] == pytest.approx(0.8766, abs=5e-5)
    assert got["ap_sample"] == pytest.approx((1 + 0.95 + 0.5) / 3)
    assert [got[f"p@{k}"] for k in (0.5, 0.6, 0.7, 0.8, 0.9)] == pytest.approx([2 / 3, 2 / 3, 2 / 3, 1 / 3, 1 / 3])
    # lowered to .1: IoU 2/3, 2/3 -> 3 of .9 .6 .4; all 6 against 4; .7 and .15 against 1
    assert got["best_miou"] == pytest.approx((2 / 3 + 4 / 6 + 1 / 2) / 3)
    assert got["best_threshold"] == pytest.approx(0.1)


def test_p_at_k_counts_equality() -> None:
    got = measure([rows(i, u) for i, u in ((2, 2), (3, 4), (0, 2), (1, 2))]).results()
    assert (got["miou"], got["oiou"], got["p@0.5"]) == (0.5625, 0.6, 0.75)
    assert measure([rows(7, 10)]).results()["p@0.7"] == 1  # 0.7 isn't 0.7000000000000001


def test_boundary_iou_by_hand() -> None:
    square, moved = np.zeros((100, 100), np.uint8), np.zeros((100, 100), np.uint8)
    square[30:70, 30:70], moved[32:72, 30:70] = 1, 1
    assert iou(square, moved) == pytest.approx(1520 / 1680)
    assert boundary_iou(square, moved) == pytest.approx(296 / 592)
    assert boundary_iou(square, square) == boundary_iou(square * 0, square * 0) == 1


@given(SEEDS, st.sampled_from([0.02, 0.1, 0.2]))
def test_boundary_is_what_erosion_pixel_by_pixel_takes_away(seed: int, dilation: float) -> None:
    rng = np.random.default_rng(seed)
    masks = [np.kron(rng.random((3, 4)) < 0.7, np.ones((4, 5), bool)) for _ in range(2)]
    width = max(1, round(dilation * math.hypot(12, 20)))
    borders = []
    for mask in masks:
        inner = np.pad(mask, width)
        windows = np.lib.stride_tricks.sliding_window_view(inner, (2 * width + 1, 2 * width + 1))
        borders.append(mask & ~windows.all(axis=(2, 3)))
    assert boundary_iou(masks[0], masks[1], dilation) == naive_iou(*borders)


# --- against naive code and other libraries -----------------------------------------------------------------------


@settings(max_examples=30)
@given(SEEDS, st.sampled_from([0.0, 0.3, 0.5, 0.62, 1.0]))
def test_results_equal_loops_over_samples_and_49_thresholds(seed: int, threshold: float) -> None:
    samples = draw(seed)
    sums, pairs = measure(samples, threshold), [(s, t > 0) for s, t in samples]
    curve = [np.mean([naive_iou(s > t, truth) for s, truth in pairs]) for t in THRESHOLDS.tolist()]
    ious = [naive_iou(s > threshold, truth) for s, truth in pairs]
    got = sums.results()
    np.testing.assert_allclose(sums.miou_by_threshold(), curve, rtol=0, atol=1e-11)
    assert got["best_miou"] == pytest.approx(max(curve), abs=1e-11)
    assert np.mean([naive_iou(s > got["best_threshold"], t) for s, t in pairs]) == pytest.approx(max(curve), abs=1e-11)
    assert got["miou"] == pytest.approx(np.mean(ious), abs=1e-11)
    assert [got[f"p@{k}"] for k in (0.5, 0.9)] == [np.mean(np.array(ious) >= k) for k in (0.5, 0.9)]
    assert got["oiou"] == pytest.approx(
        naive_iou(*(np.concatenate([x.ravel() for x in p]) for p in zip(*[(s > threshold, t) for s, t in pairs])))  # noqa: B905
    )
    assert got["boundary_iou"] == pytest.approx(np.mean([boundary_iou(s > threshold, t) for s, t in pairs]), abs=1e-11)
    assert got["n_empty_truth"] == sum(not t.any() for _, t in pairs)


@settings(max_examples=30)
@given(SEEDS)
def test_ap_equals_scikit_learn_on_quantised_scores(seed: int) -> None:
    samples = [(quantised(s).ravel(), t.ravel(), average_precision(score_histograms(s, t))) for s, t in draw(seed, 8)]
    for score, truth, ap in samples:
        if truth.any():
            assert ap == pytest.approx(average_precision_score(truth, score))
    got = measure(draw(seed, 8)).results()
    own = [ap for _, truth, ap in samples if truth.any()]
    assert got["ap_sample"] == pytest.approx(np.mean(own) if own else 0)
    if own:
        pooled = average_precision_score(*(np.concatenate([s[i] for s in samples]) for i in (1, 0)))
        assert got["ap_pooled"] == pytest.approx(pooled)


def test_ap_and_iou_equal_torchmetrics_on_a_large_sample() -> None:
    rng = np.random.default_rng(0)
    truth = (rng.random((97, 131)) < 0.3).astype(np.uint8)
    score = np.clip(rng.normal(0.35 + 0.3 * truth, 0.2), 0, 1).astype(np.float32)
    got = measure([(score, truth)]).results()
    s, t = torch.from_numpy(score).flatten(), torch.from_numpy(truth).flatten().long()
    q = torch.from_numpy(quantised(score)).flatten().float() / 2048
    assert got["ap_pooled"] == pytest.approx(BinaryAveragePrecision()(q, t).item(), abs=1e-5)
    assert got["ap_pooled"] == pytest.approx(BinaryAveragePrecision()(s, t).item(), abs=1e-3)  # the bins cost little
    assert got["ap_sample"] == pytest.approx(got["ap_pooled"])
    best = max(BinaryJaccardIndex(threshold=t_)(s, t).item() for t_ in THRESHOLDS.tolist())
    assert got["best_miou"] == pytest.approx(best, abs=1e-6)
    assert got["miou"] == pytest.approx(jaccard_score(t, s > 0.5))


@given(SEEDS)
def test_every_pixel_is_counted_once(seed: int) -> None:
    for score, truth in draw(seed):
        histograms = score_histograms(score, truth)
        assert histograms.sum(axis=1).tolist() == [(truth == 0).sum(), truth.sum()]


def test_scores_at_both_ends_and_on_thresholds() -> None:
    score = np.concatenate([[0, 1, np.nextafter(1, 0)], THRESHOLDS]).astype(np.float32)[None]
    got = measure([(score, np.ones_like(score, dtype=np.uint8))])
    # on the k-th threshold are the two high ones and all thresholds above it, not itself: p > t
    np.testing.assert_allclose(got.miou_by_threshold(), (2 + 48 - np.arange(49)) / score.size)


# --- faults of the field ------------------------------------------------------------------------------------------


@pytest.mark.fault("metric-01")
def test_empty_prediction_of_empty_truth_is_perfect() -> None:
    square, empty = binary([[1, 1, 0]], [[0, 0, 0]])
    got = measure([(m.astype(np.float32), m) for m in (square, square, empty)]).results()
    assert got["miou"] == got["best_miou"] == got["oiou"] == got["boundary_iou"] == 1
    assert (got["n_samples"], got["n_empty_truth"]) == (3, 1)
    alone = measure([(empty.astype(np.float32), empty)]).results()
    assert alone["miou"] == alone["oiou"] == 1


@pytest.mark.fault("metric-03")
def test_empty_prediction_of_something_counts_as_0() -> None:
    (square,) = binary([[1, 1, 0]])
    got = measure([(square.astype(np.float32), square), (np.zeros((1, 3), np.float32), square)]).results()
    assert got["miou"] == got["best_miou"] == 0.5


@pytest.mark.fault("metric-04")
def test_ap_without_positives() -> None:
    (truth, empty), score = binary([[1, 0, 0]], [[0, 0, 0]]), np.array([[0.9, 0.8, 0.1]], np.float32)
    got = measure([(score, truth), (score, empty)]).results()
    assert got["ap_sample"] == 1  # the sample without positives is left out
    assert got["ap_pooled"] == 0.5  # but its pixels compete with the others'
    assert got["n_empty_truth"] == 1
    alone = measure([(score, empty)]).results()
    assert alone["ap_sample"] == alone["ap_pooled"] == 0
    assert all(math.isfinite(v) for v in alone.values())


@pytest.mark.fault("metric-06")
def test_iou_is_taken_at_original_size() -> None:
    truth = np.zeros((427, 640), np.uint8)
    truth[:, 300] = 1  # a pixel wide
    small = np.zeros((64, 64), np.float32)
    small[:, 30] = 1
    with pytest.raises(DataError, match=r"scores of \(64, 64\) for a mask of \(427, 640\)"):
        Sums().add(small, truth, 0.5)
    score = np.asarray(Image.fromarray(small).resize((640, 427), Image.Resampling.NEAREST))
    got = measure([(score, truth)]).results()["miou"]
    assert got == pytest.approx(1 / 10)  # ten pixels wide against one
    shrunk = np.asarray(Image.fromarray(truth * 255).resize((64, 64))) > 0
    assert got < iou(small > 0, shrunk)  # the wrong way flatters


@pytest.mark.fault("metric-08")
def test_mean_and_overall_iou_are_two_figures() -> None:
    got = measure([rows(10, 10), rows(5000, 10000)]).results()
    assert got["miou"] == 0.75
    assert got["oiou"] == pytest.approx(5010 / 10010)


@pytest.mark.fault("metric-09")
def test_one_threshold_for_the_whole_set() -> None:
    truth = np.array([[1, 1, 0, 0]], np.uint8)
    low, high = np.array([[0.3, 0.3, 0.1, 0.1], [0.9, 0.9, 0.7, 0.7]], np.float32)[:, None]
    for score in (low, high):  # each alone has a perfect threshold
        assert measure([(score, truth)]).results()["best_miou"] == 1
    got = measure([(low, truth), (high, truth)]).results()
    assert got["best_miou"] == 0.75
    assert got["best_threshold"] == pytest.approx(0.1)


@pytest.mark.parametrize("bad", [np.nan, -0.01, 1.01, np.inf])
def test_a_bad_score_is_an_error_and_adds_nothing(bad: float) -> None:
    score, truth = rows(2, 3)
    sums = measure([(score, truth)])
    before, score = sums.to_dict(), score.copy()
    score[0, 0] = bad
    with pytest.raises(DataError, match=rf"1 of 8 scores are NaN or outside.*\({int(np.isnan(bad))} NaN\)"):
        sums.add(score, truth, 0.5)
    assert sums.to_dict() == before


def test_nothing_measured_is_an_error() -> None:
    with pytest.raises(DataError, match="no sample was measured"):
        Sums().results()


# --- sums ---------------------------------------------------------------------------------------------------------


@settings(max_examples=30)
@given(SEEDS, st.integers(1, 4))
def test_merged_parts_equal_the_whole_to_the_last_bit(seed: int, parts: int) -> None:
    samples = draw(seed, 7)
    whole, rng, merged = measure(samples), np.random.default_rng(seed), Sums()
    where = rng.integers(0, parts, len(samples))
    for part in rng.permutation(parts):
        of_part = measure([samples[i] for i in rng.permutation(len(samples)) if where[i] == part])
        merged.merge(Sums.from_dict(json.loads(json.dumps(of_part.to_dict()))))
    assert merged.to_dict() == whole.to_dict()
    assert merged.results() == whole.results()


def test_merging_leaves_the_other_part_alone() -> None:
    a, b = measure(draw(0)), measure(draw(1))
    before = b.to_dict()
    a.merge(b)
    a.merge(b)
    a.add(*draw(2)[0], 0.5)
    assert b.to_dict() == before


def test_bool_masks_are_masks_too() -> None:
    samples = draw(3)
    assert measure(samples).to_dict() == measure([(s, t.astype(bool)) for s, t in samples]).to_dict()  # type: ignore[misc]
