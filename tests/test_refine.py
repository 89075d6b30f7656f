"""Eq. 3 and Algorithm 1 with scripted SAMs: small real callables whose answers are known beforehand."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import ndimage
from sklearn.metrics import jaccard_score

from rlfseg.config import GuardConfig
from rlfseg.refine import (
    MAX_OBJECTS,
    Answer,
    Mask,
    Predict,
    Prompt,
    Refined,
    anchors,
    iou,
    iterate,
    refine_image,
    refine_mask,
)

GUARD = GuardConfig(min_iou=0.4, max_area_ratio=3, min_pixels=16, max_cover=0.9)
POINTS = np.array([[5, 5]], dtype=np.float32)


def box(left: int, top: int, right: int, bottom: int, size: tuple[int, int] = (40, 60)) -> Mask:
    mask = np.zeros(size, dtype=np.uint8)
    mask[top:bottom, left:right] = 1
    return mask


def answer(mask: Mask, tag: float = 0, iou: float = 0.9) -> Answer:
    return Answer(mask=mask, logits=np.full((4, 4), tag, dtype=np.float32), iou=iou)


class Script:
    """A SAM that answers what it is told, in turn, and keeps the prompts of each call."""

    def __init__(self, *masks: Mask) -> None:
        self.masks, self.calls = list(masks), list[list[Prompt]]()

    def __call__(self, prompts: Sequence[Prompt]) -> list[Answer]:
        self.calls.append(list(prompts))
        return [answer(self.masks.pop(0), tag=len(self.calls)) for _ in prompts]


class Grower:
    """A SAM that answers an object's mask grown by a pixel; in later rounds it knows the object by its logits."""

    def __init__(self) -> None:
        self.calls: list[list[Prompt]] = []
        self.grown: list[Mask] = []

    def __call__(self, prompts: Sequence[Prompt]) -> list[Answer]:
        self.calls.append(list(prompts))
        return [self.answer(p) for p in prompts]

    def answer(self, prompt: Prompt) -> Answer:
        if prompt.logits is not None:
            known = int(prompt.logits[0, 0])
            return answer(self.grown[known], tag=known)
        assert prompt.mask is not None
        self.grown.append(ndimage.binary_dilation(prompt.mask, np.ones((3, 3))).astype(np.uint8))
        return answer(self.grown[-1], tag=len(self.grown) - 1)


def refine(
    predict: Predict,
    masks: list[Mask],
    instances: Sequence[NDArray[np.uint8] | None] | None = None,
    n: int = 4,
    guard: GuardConfig = GUARD,
) -> list[Refined]:
    none = [None] * len(masks)
    settings = {"n_anchors": n, "max_rounds": 4, "tau": 0.95, "guard": guard, "seed": 42}
    return refine_image(predict, masks, instances or none, **settings)  # type: ignore[arg-type]


def areas(prompts: list[Prompt]) -> list[int]:
    return [int(p.mask.sum()) for p in prompts if p.mask is not None]


# --- Eq. 3 --------------------------------------------------------------------------------------------------------


def on_mask(points: NDArray[np.float32], mask: Mask) -> bool:
    x, y = points.astype(int).T
    return bool(mask[y, x].all())


@pytest.mark.fault("sam-05")
def test_points_are_x_y_inside_mask_and_image() -> None:
    mask = box(880, 40, 921, 61, size=(100, 1000))  # around x = 900, y = 50
    seen: list[Prompt] = []

    def predict(prompts: Sequence[Prompt]) -> list[Answer]:
        seen.extend(prompts)
        return [answer(mask) for _ in prompts]

    refine(predict, [mask], n=8)
    (points,) = {id(p.points): p.points for p in seen}.values()
    assert points.shape == (8, 2)
    assert points.dtype == np.float32
    assert on_mask(points, mask)
    assert (points[:, 0] >= 880).all()
    assert (points[:, 1] < 100).all()
    # spread like centres of clusters, around the object's own centre
    np.testing.assert_allclose(points.mean(axis=0), (900, 50), atol=4)


def test_one_centre_is_the_mean() -> None:
    assert anchors(box(10, 20, 21, 25), 1, 0).tolist() == [[15, 22]]


def test_two_blobs_two_centres() -> None:
    mask = box(0, 0, 5, 5) | box(50, 30, 55, 35)
    assert sorted(anchors(mask, 2, 0).tolist()) == [[2, 2], [52, 32]]


def ring() -> Mask:
    y, x = np.mgrid[:41, :41] - 20
    r = np.hypot(x, y)
    return ((r <= 18) & (r >= 14)).astype(np.uint8)


@pytest.mark.fault("sam-10")
def test_anchors_off_the_mask_snap_and_repeat_in_another_process() -> None:
    for n in (1, 2, 3, 8):
        points = anchors(ring(), n, 7)
        assert len(points) == n
        assert on_mask(points, ring())
    # the centre of the ring snaps to the nearest pixel: 14 away
    assert np.hypot(*(anchors(ring(), 1, 7)[0] - 20)) == pytest.approx(14, abs=0.5)
    code = "import numpy, rlfseg.refine as r; print(r.anchors(numpy.eye(50, dtype=numpy.uint8), 8, 3).tolist())"
    elsewhere = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout
    diagonal = anchors(np.eye(50, dtype=np.uint8), 8, 3)
    assert len(diagonal) == 8
    assert elsewhere == f"{diagonal.tolist()}\n".encode()


@pytest.mark.fault("sam-09")
@pytest.mark.parametrize("pixels", [0, 1, 3])
def test_fewer_pixels_than_anchors(pixels: int) -> None:
    mask, where = np.zeros((20, 30), dtype=np.uint8), [(4, 2), (17, 9), (29, 19)][:pixels]
    for x, y in where:
        mask[y, x] = 1
    assert sorted(map(tuple, anchors(mask, 10, 0).tolist())) == where
    (kept,) = refine(Script(), [mask], n=10)  # SAM isn't asked: it would have no answer
    assert kept.status == ("kept: too small" if pixels else "kept: empty")
    assert kept.mask is mask
    assert (kept.rounds, kept.iou, kept.sam_iou) == (0, 1, None)
    if pixels:
        sam = Script(mask)
        (refined,) = refine(sam, [mask], [mask[None]], n=10, guard=GuardConfig(min_pixels=1))
        assert refined.status == "refined"
        assert sam.calls[0][0].points.shape == (pixels, 2)


@given(st.integers(0, 2**32 - 1), st.integers(1, 12), st.floats(0.01, 0.6))
def test_anchors_are_distinct_pixels_of_the_mask(seed: int, n: int, density: float) -> None:
    mask = (np.random.default_rng(seed).random((12, 17)) < density).astype(np.uint8)
    points = anchors(mask, n, seed)
    assert len(points) <= min(n, mask.sum())
    assert len(np.unique(points, axis=0)) == len(points)
    assert len(points) == mask.sum() if mask.sum() <= n else len(points) >= 1
    assert on_mask(points, mask)


def test_k_means_sees_a_seeded_choice_of_pixels() -> None:
    mask = box(0, 0, 60, 40)
    few = anchors(mask, 4, 0, max_pixels=50)
    assert np.array_equal(few, anchors(mask, 4, 0, max_pixels=50))
    assert on_mask(few, mask)
    assert not np.array_equal(few, anchors(mask, 4, 0))


# --- Algorithm 1 --------------------------------------------------------------------------------------------------


@given(st.integers(0, 2**32 - 1))
def test_iou_is_scikit_learn_s(seed: int) -> None:
    a, b = (np.random.default_rng(seed).random((2, 5, 6)) < 0.4).astype(np.uint8)
    a[0, 0] = 1
    assert iou(a, b) == pytest.approx(jaccard_score(a.ravel(), b.ravel()))


def test_iou_of_empty_masks() -> None:
    empty = np.zeros((3, 3), dtype=np.uint8)
    assert iou(empty, empty) == 1
    assert iou(empty, 1 - empty) == 0


def test_stops_when_two_rounds_agree_and_not_before() -> None:
    # areas 200, 300, 380, 400 of one another's parts: IoU .667, .789, .95
    m0, m1, m2, m3 = (box(0, 0, w, 20) for w in (10, 15, 19, 20))
    for tau, rounds in ((0.5, 1), (0.75, 2), (0.95, 3)):
        sam = Script(m1, m2, m3, m3)
        result = refine_mask(sam, m0, POINTS, 8, tau)
        assert (result.rounds, result.mask.sum()) == (rounds, (m1, m2, m3)[rounds - 1].sum())
        assert len(sam.calls) == rounds


def test_does_not_stop_because_the_mask_still_moves() -> None:
    # the paper's printed test, IoU < tau, would stop after the first round, where the mask moves most
    m0, far, near = box(0, 0, 10, 10), box(5, 0, 25, 10), box(6, 0, 25, 10)
    assert refine_mask(Script(far, near), m0, POINTS, 8, 0.9).rounds == 2


def test_stops_at_t_max() -> None:
    a, b = box(0, 0, 10, 10), box(10, 0, 20, 10)
    for t_max in (1, 2, 5):
        sam = Script(*[(a, b)[t % 2] for t in range(1, 10)])
        result = refine_mask(sam, a, POINTS, t_max, 0.98)
        assert result.rounds == len(sam.calls) == t_max
        assert np.array_equal(result.mask, (a, b)[t_max % 2])


def test_prompts_are_mask_first_then_sam_s_own_logits_with_fixed_anchors() -> None:
    m0, m1, m2 = box(0, 0, 10, 10), box(0, 0, 20, 10), box(0, 0, 40, 10)
    run = iterate(m0, POINTS, 3, 0.98)
    first = next(run)
    assert first.mask is m0
    assert first.logits is None
    a1, a2 = answer(m1, tag=1), answer(m2, tag=2)
    second, third = run.send(a1), run.send(a2)
    assert second.mask is None
    assert second.logits is a1.logits
    assert third.mask is None
    assert third.logits is a2.logits
    assert all(p.points is POINTS for p in (first, second, third))
    with pytest.raises(StopIteration) as end:
        run.send(answer(m2, iou=0.7))
    assert end.value.value.rounds == 3
    assert end.value.value.sam_iou == 0.7


# --- images -------------------------------------------------------------------------------------------------------


def test_objects_are_refined_one_by_one_and_joined() -> None:
    left, right = box(5, 5, 15, 15), box(30, 20, 45, 35)
    sam = Grower()
    (refined,) = refine(sam, [left | right], [np.stack([left, right])])
    assert areas(sam.calls[0]) == [100, 225]
    assert np.array_equal(refined.mask, box(4, 4, 16, 16) | box(29, 19, 46, 36))
    assert refined.status == "refined"
    assert refined.rounds == 2
    assert refined.iou == pytest.approx((100 + 225) / (144 + 289))
    assert refined.sam_iou == pytest.approx(0.9)


def test_without_instances_the_connected_components_are_the_objects() -> None:
    left, right, speck = box(5, 5, 15, 15), box(30, 20, 45, 35), box(50, 0, 52, 2)
    corner = box(15, 15, 18, 18)  # touches `left` by a corner: the same object
    sam = Grower()
    (refined,) = refine(sam, [left | right | speck | corner])
    assert areas(sam.calls[0]) == [225, 109]
    assert refined.mask[speck > 0].all()  # too small to be an object, still part of the label


def test_noise_does_not_ask_for_thousands_of_objects() -> None:
    noise = np.zeros((200, 200), dtype=np.uint8)
    noise[::5, ::2] = 1  # 4,000 specks
    sam = Grower()
    refine(sam, [noise], n=2, guard=GuardConfig(min_pixels=1, min_iou=0, max_area_ratio=20))
    assert len(sam.calls[0]) == MAX_OBJECTS


def test_phrases_of_an_image_advance_together_bucketed_by_number_of_anchors() -> None:
    masks = [box(0, 0, 8, 8), box(20, 0, 30, 10), box(40, 0, 56, 1), box(40, 20, 56, 30)]
    sam = Grower()
    refined = refine(sam, masks, n=20)  # the third has 16 pixels and so 16 anchors
    assert [sorted({len(p.points) for p in call}) for call in sam.calls] == [[16], [20], [16], [20]]
    assert [len(call) for call in sam.calls] == [1, 3, 1, 3]
    alone = [refine(Grower(), [m], n=20)[0] for m in masks]
    for r, a in zip(refined, alone, strict=True):
        assert np.array_equal(r.mask, a.mask)
        assert (r.status, r.rounds, r.iou) == (a.status, a.rounds, a.iou)


def test_those_that_settle_earlier_are_asked_no_more() -> None:
    a, b = box(0, 0, 10, 10), box(20, 0, 30, 10)
    sam = Script(a, box(20, 0, 32, 10), box(20, 0, 32, 10))  # `a` agrees at once, `b` moves, then agrees
    first, second = refine(sam, [a, b])
    assert [len(call) for call in sam.calls] == [2, 1]
    assert (first.rounds, second.rounds) == (1, 2)


# --- guards -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mask", "status"),
    [
        (box(0, 0, 0, 0), "kept: empty"),
        (box(0, 0, 5, 3), "kept: too small"),
        (box(0, 0, 60, 40), "kept: covers the image"),
    ],
)
def test_what_is_not_worth_asking(mask: Mask, status: str) -> None:
    for instances in (None, mask[None]):
        (refined,) = refine(Script(), [mask], [instances])
        assert refined.status == status
        assert refined.mask is mask
        assert refined.rounds == 0


@pytest.mark.parametrize(
    ("refined_mask", "status"),
    [
        (box(0, 0, 0, 0), "kept: area changed"),
        (box(0, 0, 60, 40), "kept: area changed"),
        (box(8, 0, 18, 10), "kept: low IoU"),
        (box(3, 0, 13, 10), "refined"),
        (box(0, 0, 10, 5), "refined"),
    ],
)
def test_what_is_not_to_be_trusted(refined_mask: Mask, status: str) -> None:
    mask = box(0, 0, 10, 10)
    (refined,) = refine(Script(refined_mask, refined_mask), [mask])
    assert refined.status == status
    assert refined.rounds == 2
    assert refined.sam_iou == pytest.approx(0.9)
    assert np.array_equal(refined.mask, refined_mask if status == "refined" else mask)
    assert refined.iou == pytest.approx(iou(mask, refined.mask))


def test_a_distrusted_object_keeps_its_own_original_only() -> None:
    good, bad = box(0, 0, 10, 10), box(30, 0, 40, 10)
    grown = box(0, 0, 12, 10)
    away = box(50, 30, 60, 40)
    (refined,) = refine(Script(grown, away, grown, away), [good | bad], [np.stack([good, bad])])
    assert refined.status == "refined"
    assert np.array_equal(refined.mask, grown | bad)


def test_the_largest_object_says_why_all_are_kept() -> None:
    small, large = box(0, 0, 4, 5), box(20, 0, 40, 20)
    sam = Script(box(0, 0, 60, 39), box(0, 20, 20, 40), box(0, 0, 60, 39), box(0, 20, 20, 40))
    (refined,) = refine(sam, [small | large], [np.stack([small, large])])
    assert refined.status == "kept: low IoU"
    assert np.array_equal(refined.mask, small | large)


def test_an_image_without_phrases_asks_nothing() -> None:
    assert refine(Script(), [], []) == []
