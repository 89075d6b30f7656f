"""Label refinement by SAM: anchors (Eq. 3) and iteration until the mask stops moving (Algorithm 1).

SAM comes in as a callable, `Predict`. What happens to one object is a generator that yields a prompt and is sent SAM's
answer: it is free of I/O, and the objects of an image advance together, one call a round for all that have the same N.

Frame: points are (x, y) = (column, row) in whole pixels of the image; masks are uint8 {0, 1} [H, W].
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from jaxtyping import Float32, UInt8
from scipy import ndimage
from sklearn.cluster import KMeans

from rlfseg.config import GuardConfig

Mask = UInt8[np.ndarray, "H W"]
Masks = UInt8[np.ndarray, "n H W"]
Points = Float32[np.ndarray, "N 2"]
Logits = Float32[np.ndarray, "h w"]
T = TypeVar("T")

MAX_OBJECTS = 64  # connected components of one mask that are refined, the largest; noise has thousands


@dataclass(frozen=True, kw_only=True, eq=False)
class Prompt:
    """What SAM is asked: anchors and the last round's mask.

    Attributes:
        points: Anchors (x, y), float32 [N, 2], all of them foreground.
        mask: The object's mask M_0, in the first round only.
        logits: SAM's own low-resolution logits of the last round, float32 [h, w], unchanged; None in the first.
    """

    points: Points
    mask: Mask | None = None
    logits: Logits | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Answer:
    """What SAM answers: mask M_t, its low-resolution logits float32 [h, w], and the IoU that SAM expects of it."""

    mask: Mask
    logits: Logits
    iou: float


Predict = Callable[[Sequence[Prompt]], list[Answer]]
"""Answers the prompts of one image in their order; all of a call have the same N, and all masks or all logits."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Refinement:
    """Result of Algorithm 1 for one object: M_refine, the rounds it took, and SAM's own IoU in the last."""

    mask: Mask
    rounds: int
    sam_iou: float


@dataclass(frozen=True, kw_only=True, eq=False)
class Refined:
    """Refined label of one phrase.

    Attributes:
        mask: The label to use; the original where it is kept.
        status: `refined`, if at least one of the phrase's objects was, else `kept: ` and why its largest object was.
        rounds: Most rounds that any of the objects took; 0 where SAM wasn't asked.
        iou: IoU of `mask` with the original.
        sam_iou: Mean over the objects of SAM's own IoU; None where SAM wasn't asked.
    """

    mask: Mask
    status: str
    rounds: int
    iou: float
    sam_iou: float | None


def anchors(mask: Mask, n: int, seed: int, max_pixels: int = 4096) -> Points:
    """Eq. 3: the mask's pixels that lie nearest to the N k-means centres of all its pixels.

    Args:
        mask: The object's mask M_0.
        n: N.
        seed: Of k-means and of the choice of pixels; the same seed gives the same anchors.
        max_pixels: k-means sees at most so many pixels, chosen by chance.

    Returns:
        Distinct (x, y), float32 [m, 2]; m <= N, and all pixels where the mask has no more than N.
    """
    pixels = np.argwhere(mask > 0.5)[:, ::-1]  # (x, y), from numpy's (row, column)
    if len(pixels) <= n:
        return pixels.astype(np.float32)
    seen = pixels
    if len(pixels) > max_pixels:
        seen = np.random.default_rng(seed).choice(pixels, max_pixels, replace=False)
    centres = KMeans(n, n_init=1, random_state=seed).fit(seen.astype(np.float64)).cluster_centers_
    # A ring's centre isn't on the ring. Rounded, so that a tie doesn't hang on the order in which threads add up.
    nearest = [np.square(pixels - centre).sum(axis=1).argmin() for centre in centres.round(6)]
    return np.unique(pixels[nearest], axis=0).astype(np.float32)


def iou(a: Mask, b: Mask) -> float:
    """Intersection over union of two masks of the same size; 1 if both are empty."""
    union = np.count_nonzero(a | b)
    return np.count_nonzero(a & b) / union if union else 1.0


def iterate(mask: Mask, points: Points, max_rounds: int, tau: float) -> Generator[Prompt, Answer, Refinement]:
    """Algorithm 1 for one object, free of I/O.

    Args:
        mask: M_0.
        points: P, the anchors, fixed through all rounds.
        max_rounds: T_max, 1 or more.
        tau: Stop when two rounds' masks agree to this IoU.

    Returns:
        A generator that yields each round's prompt, with M_0 in the first and SAM's own logits thereafter, is sent
        SAM's answers, and returns M_refine.
    """
    previous, prompt = mask, Prompt(points=points, mask=mask)
    for t in range(1, max_rounds + 1):
        answer = yield prompt  # line 2: M_t <- SAM(P, M_{t-1})
        result = Refinement(mask=answer.mask, rounds=t, sam_iou=answer.iou)
        # Line 1 prints "until IoU < tau", which would stop while the mask still moves; the text means its contrary.
        if iou(result.mask, previous) >= tau:
            break
        previous, prompt = result.mask, Prompt(points=points, logits=answer.logits)
    return result  # line 4: M_refine <- M_t


def refine_mask(predict: Predict, mask: Mask, points: Points, max_rounds: int, tau: float) -> Refinement:
    """Algorithm 1 for one object with SAM at hand; arguments as in `iterate`."""
    return _lockstep(predict, [iterate(mask, points, max_rounds, tau)])[0]


def refine_image(
    predict: Predict,
    masks: Sequence[Mask],
    instances: Sequence[Masks | None],
    *,
    n_anchors: int,
    max_rounds: int,
    tau: float,
    guard: GuardConfig,
    seed: int,
) -> list[Refined]:
    """Refines the labels of all phrases of one image, object by object: SAM's prompts mean one object each.

    Args:
        predict: SAM on this image.
        masks: A mask a phrase.
        instances: A phrase's objects, whose OR is its mask; None or no object: the mask's connected components.
        n_anchors: N of Eq. 3.
        max_rounds: T_max of Algorithm 1.
        tau: tau of Algorithm 1.
        guard: When an object keeps its original mask.
        seed: Seed of the anchors.

    Returns:
        One result a phrase, in their order.
    """
    objects = [i if i is not None and len(i) else _components(m, guard) for m, i in zip(masks, instances, strict=True)]
    flat = [_refine_object(o, n_anchors, max_rounds, tau, guard, seed) for phrase in objects for o in phrase]
    outcomes = iter(_lockstep(predict, flat))
    return [_join(m, o, [next(outcomes) for _ in o]) for m, o in zip(masks, objects, strict=True)]


@dataclass(frozen=True, kw_only=True, eq=False)
class _Outcome:
    """Of one object: the mask to use, why it is the original (None: it isn't), and what SAM did if asked."""

    mask: Mask
    kept: str | None
    refinement: Refinement | None


def _refine_object(
    mask: Mask, n_anchors: int, max_rounds: int, tau: float, guard: GuardConfig, seed: int
) -> Generator[Prompt, Answer, _Outcome]:
    kept = _not_worth_asking(mask, guard)
    if kept:
        return _Outcome(mask=mask, kept=kept, refinement=None)
    result = yield from iterate(mask, anchors(mask, n_anchors, seed), max_rounds, tau)
    kept = _not_to_be_trusted(mask, result.mask, guard)
    return _Outcome(mask=mask if kept else result.mask, kept=kept, refinement=result)


def _not_worth_asking(mask: Mask, guard: GuardConfig) -> str | None:
    area = np.count_nonzero(mask)
    if area == 0:
        return "empty"
    if area < guard.min_pixels:
        return "too small"
    return "covers the image" if area > guard.max_cover * mask.size else None


def _not_to_be_trusted(mask: Mask, refined: Mask, guard: GuardConfig) -> str | None:
    small, large = sorted((np.count_nonzero(mask), np.count_nonzero(refined)))
    if large > guard.max_area_ratio * small:
        return "area changed"
    return "low IoU" if iou(mask, refined) < guard.min_iou else None


def _components(mask: Mask, guard: GuardConfig) -> Masks:
    """The connected parts (8 neighbours) that are large enough to be an object, largest first."""
    labels, _ = ndimage.label(mask, structure=np.ones((3, 3)))
    areas = np.bincount(labels.ravel())
    areas[0] = 0  # the background
    chosen = [k for k in np.argsort(-areas, kind="stable")[:MAX_OBJECTS] if areas[k] >= guard.min_pixels]
    parts: Masks = (labels == np.reshape(chosen, (-1, 1, 1))).astype(np.uint8)
    return parts


def _join(mask: Mask, objects: Masks, outcomes: list[_Outcome]) -> Refined:
    """One phrase's label: the OR of its objects' masks and of whatever belongs to none of them."""
    asked = [o.refinement for o in outcomes if o.refinement is not None]
    rounds = max((r.rounds for r in asked), default=0)
    sam_iou = float(np.mean([r.sam_iou for r in asked])) if asked else None
    if all(o.kept for o in outcomes):
        largest = max(outcomes, key=lambda o: np.count_nonzero(o.mask), default=None)
        why = largest.kept if largest else "too small" if mask.any() else "empty"
        return Refined(mask=mask, status=f"kept: {why}", rounds=rounds, iou=1.0, sam_iou=sam_iou)
    rest = mask & (1 - objects.max(axis=0))
    joined = np.maximum.reduce([rest, *(o.mask for o in outcomes)])
    return Refined(mask=joined, status="refined", rounds=rounds, iou=iou(mask, joined), sam_iou=sam_iou)


def _lockstep(predict: Predict, runs: Sequence[Generator[Prompt, Answer, T]]) -> list[T]:
    """Drives all generators to their ends, a round at a time."""
    results: dict[int, T] = {}
    answers: dict[int, Answer | None] = dict.fromkeys(range(len(runs)))
    while answers:
        prompts: dict[int, Prompt] = {}
        for i, answer in answers.items():
            try:
                prompts[i] = next(runs[i]) if answer is None else runs[i].send(answer)
            except StopIteration as end:
                results[i] = end.value
        answers = _ask(predict, prompts)
    return [results[i] for i in range(len(runs))]


def _ask(predict: Predict, prompts: dict[int, Prompt]) -> dict[int, Answer | None]:
    """One call for all prompts with the same N: padding to a common N would change SAM's answers."""
    answers: dict[int, Answer | None] = {}
    for n in sorted({len(p.points) for p in prompts.values()}):
        group = [i for i, p in prompts.items() if len(p.points) == n]
        answers |= zip(group, predict([prompts[i] for i in group]), strict=True)
    return answers
