"""Protocols of referring and semantic segmentation against worked examples, naive code and other libraries."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pycocotools.mask as coco
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage
from sklearn.metrics import confusion_matrix, jaccard_score
from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex

from rlfseg import metrics
from rlfseg.datasets.raster import rasterise
from rlfseg.errors import DataError
from rlfseg.metrics import (
    PROTOCOLS,
    VOID,
    Additive,
    Argmax,
    Gres,
    PhraseCut,
    Refer,
    SemSeg,
    Sums,
    boundary_f,
    boundary_iou,
    iou,
    masks,
    measure,
    referring,
    true_labels,
)
from tests.measured import SEEDS, add_up, draw


def pair(intersection: int, union: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Prediction and truth, neither of them empty, with just this intersection and union."""
    pred, truth = np.zeros((1, union + 5), np.uint8), np.zeros((1, union + 5), np.uint8)
    pred[0, :union], truth[0, :intersection] = 1, 1
    if not intersection:
        pred[0, 0], truth[0, 0] = 0, 1
    return pred, truth


EXAMPLE_C = ((2, 2), (3, 4), (0, 2), (1, 2))


def no_targets() -> list[tuple[NDArray[np.uint8], NDArray[np.uint8]]]:
    """Two phrases that mean nothing: one predicted empty, one with 10 pixels."""
    nothing, ten = np.zeros((1, 20), np.uint8), np.zeros((1, 20), np.uint8)
    ten[0, :10] = 1
    return [(nothing, nothing), (ten, nothing)]


# --- phrasecut, refer, gres ---------------------------------------------------------------------------------------


def test_worked_example_c() -> None:
    pairs = [pair(i, u) for i, u in EXAMPLE_C]
    strict = add_up([PhraseCut.of(*p) for p in pairs]).results()
    loose = add_up([Refer.of(*p) for p in pairs]).results()
    assert (strict["miou"], strict["oiou"], strict["p@0.5"]) == (0.5625, 0.6, 0.5)
    assert (loose["miou"], loose["oiou"], loose["p@0.5"]) == (0.5625, 0.6, 0.75)
    more = [*pairs, *no_targets()]
    gres = add_up([Gres.of(*p) for p in more]).results()
    assert round(gres["giou"], 4) == 0.5417
    assert (gres["ciou"], gres["n_acc"], gres["t_acc"]) == (6 / 20, 0.5, 1)
    assert (gres["pr@0.7"], gres["pr@0.8"]) == (0.5, 0.25)  # over the four that mean something
    assert (gres["n_samples"], gres["n_no_target"]) == (6, 2)
    for protocol in (PhraseCut, Refer):
        assert add_up([protocol.of(*p) for p in more]).results()["miou"] == 0.375
    counts = np.array([(2, 2), (3, 4), (0, 2), (1, 2), (0, 0), (0, 10)])  # as LISA's evaluation has them
    i, u = counts.T
    giou, ciou = np.mean(i / (u + 1e-5) + (u == 0)), i.sum() / (u.sum() + 1e-10)
    lisas = add_up([Sums.of(p.astype(np.float32), t, 0.5) for p, t in more]).results()  # at original size, as ours
    assert round(giou, 5) == round(lisas["miou"], 5) == 0.54167
    assert round(ciou, 3) == lisas["oiou"] == 0.300


def test_a_perfect_mask_by_another_rule_is_not_perfect() -> None:
    """A square with corners 2 and 12 has 121 pixels as PhraseCut draws it, and 100 as a half-open area."""
    inclusive, half_open = (rasterise([[2, 2, 12, 2, 12, 12, 2, 12]], (20, 20), r).mask for r in ("pil", "pycocotools"))
    assert inclusive is not None
    assert half_open is not None
    assert (inclusive.sum(), half_open.sum()) == (121, 100)
    assert round(PhraseCut.of(half_open, inclusive).results()["miou"], 3) == 0.826


@pytest.mark.parametrize("side", [480, 512])
def test_refer_is_measured_in_the_square_of_either_peer(side: int) -> None:
    mask = np.zeros((33, 50), np.uint8)
    mask[3:20, 7:31] = 1
    wanted = np.asarray(Image.fromarray(mask).resize((side, side), Image.Resampling.NEAREST))
    got = measure("refer", mask.astype(np.float32), mask, 0.5, refer_side=side)
    assert got.union == wanted.sum()  # type: ignore[attr-defined]


def test_gres_without_a_kind_leaves_its_figures_out() -> None:
    assert "n_acc" not in Gres.of(*pair(1, 2)).results()
    alone = Gres.of(*no_targets()[0]).results()
    assert (alone["giou"], alone["ciou"], alone["n_acc"]) == (1, 1, 1)
    assert not {"t_acc", "pr@0.7"} & set(alone)


def test_gres_sees_a_target_that_its_square_loses() -> None:
    truth = np.zeros((2000, 2000), np.uint8)
    truth[1, 1] = 1
    got = Gres.of(truth, truth, 480)
    assert (got.n_no_target, got.lost_target, got.union) == (0, 0, 0)
    assert got.iou == 0  # as ReLA: nothing is left to agree on


def test_missing_predictions_as_phrasecut_has_them() -> None:
    pairs = [pair(2, 2), pair(1, 2)]
    got = add_up([*(PhraseCut.of(*p) for p in pairs), PhraseCut.of(None, pairs[0][1])]).results()
    assert got["miou"] == pytest.approx((1 + 0.5) / 3)
    assert (got["miou_predicted"], got["oiou"], got["n_samples"], got["n_missing"]) == (0.75, 3 / 4, 2, 1)
    empty = np.zeros_like(pairs[0][1], np.float32)
    for protocol in PROTOCOLS:  # in the others a missing one is an empty one
        given, lost = (measure(protocol, empty, pairs[0][1], 0.5, missing=m).vector() for m in (False, True))
        assert np.array_equal(given, lost) == (protocol != "phrasecut")


def test_strict_and_loose_p_at_k() -> None:
    for k, (i, u) in {"0.5": (1, 2), "0.6": (3, 5), "0.7": (7, 10), "0.8": (4, 5), "0.9": (9, 10)}.items():
        pred, truth = pair(i, u)
        assert PhraseCut.of(pred, truth).results()[f"p@{k}"] == 0
        assert Refer.of(pred, truth).results()[f"p@{k}"] == 1


@settings(max_examples=40)
@given(SEEDS)
def test_masks_equal_scikit_learn_and_pycocotools(seed: int) -> None:
    masks = [((s > 0.5).astype(np.uint8), t) for s, t in draw(seed)]
    wanted = [jaccard_score(t.ravel(), p.ravel(), zero_division=0) for p, t in masks]
    got = add_up([PhraseCut.of(p, t) for p, t in masks]).results()
    assert got["miou"] == pytest.approx(np.mean(wanted), abs=1e-9)
    assert got["p@0.6"] == np.mean(np.array(wanted) > 0.6)
    for pred, truth in masks:
        encoded = [coco.encode(np.asfortranarray(m)) for m in (pred, truth)]
        if pred.any() and truth.any():
            assert iou(pred, truth) == pytest.approx(coco.iou(encoded[:1], encoded[1:], [0])[0, 0])


def test_refer_square_is_pillows() -> None:
    rng = np.random.default_rng(1)
    mask = (rng.random((33, 50)) < 0.5).astype(np.uint8)
    got = referring.to_square(mask, mask, 512)
    wanted = np.asarray(Image.fromarray(mask).resize((512, 512), Image.Resampling.NEAREST))
    np.testing.assert_array_equal(got[0], wanted)
    score = mask.astype(np.float32)
    assert measure("refer", score, mask, 0.5).results()["miou"] == 1
    assert measure("refer", score, mask, 0.5).union == wanted.sum()  # type: ignore[attr-defined]


# --- boundaries ---------------------------------------------------------------------------------------------------


def test_worked_example_d() -> None:
    square, moved = np.zeros((100, 100), np.uint8), np.zeros((100, 100), np.uint8)
    square[30:70, 30:70], moved[32:72, 30:70] = 1, 1
    assert round(iou(square, moved), 4) == 0.9048
    borders = [masks._border(m, 3) for m in (square, moved)]  # 3 pixels: 2 % of the diagonal
    assert [np.count_nonzero(b) for b in borders] == [444, 444]
    assert [np.count_nonzero(b) for b in (borders[0] & borders[1], borders[0] | borders[1])] == [296, 592]
    assert boundary_iou(square, moved) == 296 / 592 == 0.5
    assert boundary_f(square, moved) == 1
    assert boundary_f(square, np.roll(moved, 1, axis=0)) < 1  # three rows are one too many
    got = Sums.of(moved.astype(np.float32), square, 0.5).results()
    assert (got["boundary_iou"], got["boundary_iou_coco"], got["boundary_f"]) == (0.5, 0.5, 1)


def test_cocos_boundary_rule_takes_the_smaller() -> None:
    truth = np.zeros((200, 200), np.uint8)
    truth[10:20] = 1  # so thin that all of it is border
    pred = truth.copy()
    pred[60:180, 60:180] = 1  # much area, little border
    got = Sums.of(pred.astype(np.float32), truth, 0.5).results()
    assert got["miou"] == pytest.approx(2000 / (2000 + 120**2))
    assert got["boundary_iou"] == pytest.approx(2000 / (2000 + 120**2 - 108**2))
    assert got["boundary_iou_coco"] == got["miou"]


def naive_boundary_f(pred: NDArray[np.uint8], truth: NDArray[np.uint8], tolerance: float) -> float:
    """Contours by loops, dilation by a disc."""
    h, w = truth.shape
    radius = math.ceil(tolerance * math.hypot(h, w))
    contours = []
    for mask in (pred, truth):
        contour = np.zeros((h, w), bool)
        for y, x in itertools.product(range(h), range(w)):
            down, right = min(y + 1, h - 1), min(x + 1, w - 1)
            contour[y, x] = len({mask[y, x], mask[y, right], mask[down, x], mask[down, right]}) > 1
        contours.append(contour)
    yy, xx = np.mgrid[-radius : radius + 1, -radius : radius + 1]
    a, b = contours
    if not a.any() or not b.any():
        return float(a.any() == b.any())
    wide_a, wide_b = (ndimage.binary_dilation(c, yy**2 + xx**2 <= radius**2) for c in contours)
    precision, recall = (a & wide_b).sum() / a.sum(), (b & wide_a).sum() / b.sum()
    return float(2 * precision * recall / (precision + recall)) if precision + recall else 0.0


@settings(max_examples=60)
@given(SEEDS, st.sampled_from([0.008, 0.05, 0.15]))
def test_boundary_f_equals_dilation_by_a_disc(seed: int, tolerance: float) -> None:
    rng = np.random.default_rng(seed)
    pred, truth = (
        np.kron(rng.random((3, 4)) < rng.choice([0, 0.4, 1]), np.ones((4, 5))).astype(np.uint8) for _ in "ab"
    )
    assert boundary_f(pred, truth, tolerance) == pytest.approx(naive_boundary_f(pred, truth, tolerance))


def scene(seed: int, n_classes: int = 4) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
    """Scores [C, H, W], some of them equal, and a label map [H, W] with VOID."""
    rng = np.random.default_rng(seed)
    size = tuple(rng.integers(3, 12, size=2))
    truth = rng.integers(-1, n_classes, size=size).astype(np.int32)
    scores = rng.random((n_classes, *size)) + 0.6 * (truth == np.arange(n_classes)[:, None, None])
    return np.clip(scores.round(1) * 0.6 + 0.01, 0, 1).astype(np.float32), truth


def labels_of(scores: NDArray[np.float32], order: Any = None) -> NDArray[np.int32]:
    best = Argmax(scores.shape[1:])
    for k in range(len(scores)) if order is None else order:
        best.add(scores[k], int(k))
    return best.labels


# --- semseg -------------------------------------------------------------------------------------------------------


@given(SEEDS)
def test_argmax_one_class_at_a_time_is_numpys_in_any_order(seed: int) -> None:
    scores, _ = scene(seed)
    np.testing.assert_array_equal(labels_of(scores), scores.argmax(axis=0))
    order = np.random.default_rng(seed).permutation(len(scores))
    np.testing.assert_array_equal(labels_of(scores, order), scores.argmax(axis=0))


def test_a_pixel_that_no_mask_covers_is_given_to_no_class() -> None:
    scores = np.zeros((2, 1, 3), np.float32)
    scores[1, 0, 2] = 1
    assert labels_of(scores).tolist() == [[VOID, VOID, 1]]
    got = SemSeg.of(labels_of(scores), np.array([[0, 1, 1]], np.int32), 2).results()
    assert got["miou"] == (0 + 1 / 2) / 2
    assert got["pixel_acc"] == pytest.approx(1 / 3)


def test_true_labels_leave_out_what_is_void_or_claimed_twice() -> None:
    a, b, c = (np.array([m], np.uint8) for m in ([1, 1, 0, 0, 0], [0, 1, 1, 0, 0], [0, 0, 0, 1, 0]))
    assert true_labels([a, b, c], [0, 1, 0], (1, 5)).tolist() == [[0, VOID, 1, 0, VOID]]
    assert true_labels([a, a], [3, 3], (1, 5)).tolist() == [[3, 3, VOID, VOID, VOID]]
    assert true_labels([a, b, a], [0, 1, 0], (1, 5)).tolist()[0][1] == VOID  # two against one is no majority
    assert true_labels([], [], (1, 2)).tolist() == [[VOID, VOID]]


@settings(max_examples=40)
@given(SEEDS, st.integers(1, 5))
def test_semseg_equals_scikit_learn_and_torchmetrics(seed: int, n: int) -> None:
    scenes = [scene(seed + i) for i in range(n)]
    maps = [(labels_of(scores), truth) for scores, truth in scenes]
    sums = add_up([SemSeg.of(p, t, 5) for p, t in maps])  # the fifth class never occurs
    pred, truth = (np.concatenate([m[i].ravel() for m in maps]) for i in (0, 1))
    if not (truth != VOID).any():
        return
    matrix = confusion_matrix(truth[truth != VOID], pred[truth != VOID], labels=range(5))
    np.testing.assert_array_equal(sums.right, matrix.diagonal())
    np.testing.assert_array_equal(sums.predicted, matrix.sum(axis=0))
    np.testing.assert_array_equal(sums.true, matrix.sum(axis=1))
    union = matrix.sum(axis=0) + matrix.sum(axis=1) - matrix.diagonal()
    got = sums.results()
    assert got["miou"] == pytest.approx(np.mean(matrix.diagonal()[union > 0] / union[union > 0]))
    assert got["oiou"] == pytest.approx(matrix.diagonal().sum() / union.sum())
    ignored = torch.from_numpy(np.where(truth == VOID, 255, truth)).long()
    index = MulticlassJaccardIndex(5, average="none", ignore_index=255)(torch.from_numpy(pred).long(), ignored)
    np.testing.assert_allclose(np.nan_to_num(sums.iou()), index.numpy(), atol=1e-6)
    accuracy = MulticlassAccuracy(5, average="micro", ignore_index=255)(torch.from_numpy(pred).long(), ignored)
    assert got["pixel_acc"] == pytest.approx(accuracy.item(), abs=1e-6)


def test_semseg_of_nothing_is_an_error() -> None:
    void = np.full((2, 2), VOID, np.int32)
    with pytest.raises(DataError, match="no pixel has exactly one true class"):
        SemSeg.of(void, void, 3).results()


ONE = {
    **{name: (lambda s, t, name=name: measure(name, s, t, 0.5, missing=not s.any())) for name in PROTOCOLS},
    "semseg": lambda s, t: SemSeg.of((s * 3).astype(np.int32) - 1, t.astype(np.int32) - 1, 3),
}


# --- all protocols ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", ONE)
@settings(max_examples=15)
@given(seed=SEEDS, parts=st.integers(1, 4))
def test_merged_parts_equal_the_whole_to_the_last_bit(protocol: str, seed: int, parts: int) -> None:
    one: Callable[..., Additive] = ONE[protocol]
    rng = np.random.default_rng(seed)
    measured = [one(s, t) for s, t in draw(seed, 6)]
    whole, where = add_up(measured), rng.integers(0, parts, len(measured))
    merged, summed = add_up(measured[:1]), np.zeros_like(whole.vector())
    merged = merged.like(summed)
    for part in rng.permutation(parts):
        own = [measured[i] for i in rng.permutation(len(measured)) if where[i] == part]
        if own:
            of_part = add_up(own)
            merged.merge(type(of_part).from_dict(json.loads(json.dumps(of_part.to_dict()))))
            summed += of_part.vector()
    assert merged.to_dict() == whole.to_dict() == whole.like(summed).to_dict()
    np.testing.assert_array_equal(summed, whole.vector())


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_nothing_measured_is_an_error(protocol: str) -> None:
    with pytest.raises(DataError, match="no sample was measured"):
        PROTOCOLS[protocol]().results()


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.fault("metric-01")
def test_two_empty_masks_are_finite_and_by_the_protocols_rule(protocol: str) -> None:
    square, empty = np.array([[1, 1, 0]], np.uint8), np.zeros((1, 3), np.uint8)
    got = add_up([measure(protocol, m.astype(np.float32), m, 0.5) for m in (square, square, empty)]).results()
    assert all(math.isfinite(v) for v in got.values())
    wanted = {"rlfseg": 1, "gres": 1, "phrasecut": 2 / 3, "refer": 2 / 3}.get(protocol)
    if wanted:
        assert got.get("miou", got.get("giou")) == pytest.approx(wanted)
    else:  # clipseg's `+ 1`
        assert 0 < got["miou_0.5"] < 2 / 3


@pytest.mark.parametrize("protocol", ["rlfseg", "phrasecut", "refer", "gres"])
@pytest.mark.fault("metric-03")
def test_an_empty_prediction_of_something_counts_as_0(protocol: str) -> None:
    square = np.array([[1, 1, 0]], np.uint8)
    scores = (square.astype(np.float32), np.zeros((1, 3), np.float32))
    got = add_up([measure(protocol, s, square, 0.5) for s in scores]).results()
    assert got.get("miou", got.get("giou")) == 0.5


# --- bootstrap ----------------------------------------------------------------------------------------------------


def test_resampled_sums_equal_a_loop() -> None:
    rng = np.random.default_rng(0)
    vectors = rng.integers(0, 2**57, size=(23, 7))
    draws = metrics.draw_images(23, 50, seed=1)
    assert draws.shape == (50, 23)
    assert (draws.sum(axis=1) == 23).all()
    wanted = [sum(int(n) * v for n, v in zip(row, vectors.astype(object), strict=True)) for row in draws]
    for order in (np.arange(23), rng.permutation(23)):  # exact, however the images lie
        parts = [order[:5], order[5:6], order[6:]]
        got = metrics.resampled(draws, [(part.tolist(), vectors[part]) for part in parts])
        np.testing.assert_array_equal(got, np.array(wanted).astype(np.int64))
    np.testing.assert_array_equal(metrics.draw_images(23, 50, seed=1), draws)
    assert not np.array_equal(metrics.draw_images(23, 50, seed=2), draws)


def test_interval_of_a_mean_is_the_textbooks() -> None:
    rng = np.random.default_rng(5)
    pairs = [pair(int(i), 100) for i in rng.integers(20, 90, size=400)]
    vectors = np.stack([Refer.of(*p).vector() for p in pairs])
    ious = np.array([iou(*p) for p in pairs])
    got = metrics.intervals(Refer(), metrics.resampled(metrics.draw_images(400, 2000, 7), [(range(400), vectors)]))
    half = 1.96 * ious.std() / 20
    assert got["miou"] == pytest.approx((ious.mean() - half, ious.mean() + half), abs=0.1 * half)
    assert set(got) == {"miou", "oiou", *(f"p@{k}" for k in metrics.PRECISION_AT)}  # no counts


def test_intervals_leave_out_what_a_resample_does_not_define() -> None:
    vectors = np.stack([SemSeg.of(m, m, 2).vector() for m in (np.array([[VOID]], np.int32), np.array([[1]], np.int32))])
    sums = metrics.resampled(np.array([[2, 0], [1, 1]], np.uint8), [([0, 1], vectors)])
    assert metrics.intervals(SemSeg.none(2), sums)["miou"] == (1, 1)
