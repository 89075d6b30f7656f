"""The drawn world: what its phrases say is checked on the pixels, never on its own bookkeeping."""

from __future__ import annotations

import re

import numpy as np
import pytest
from scipy import ndimage

from rlfseg.datasets.shapes import COLOURS, Mask, Phrase, Scene, coarsen, draw_scene
from rlfseg.metrics import iou


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [draw_scene(i, split="val") for i in range(60)]


def test_a_scene_is_a_function_of_seed_split_and_index() -> None:
    first, again = draw_scene(3, split="train", seed=1), draw_scene(3, split="train", seed=1)
    assert np.array_equal(first.image, again.image)
    assert [p.caption for p in first.phrases] == [p.caption for p in again.phrases]
    assert all(np.array_equal(a.coarse, b.coarse) for a, b in zip(first.phrases, again.phrases, strict=True))
    others = [
        draw_scene(4, seed=1),
        draw_scene(3, seed=2),
        *(draw_scene(3, split=s, seed=1) for s in ("val", "test", "tiny")),
    ]
    assert len({s.image.tobytes() for s in (first, *others)}) == 6


def test_forms(scenes: list[Scene]) -> None:
    for scene in scenes:
        assert scene.image.shape == (64, 64, 3)
        assert scene.image.dtype == np.uint8
        assert 1 <= len(scene.phrases) <= 3
        assert len({p.caption for p in scene.phrases}) == len(scene.phrases)
    assert draw_scene(0, size=96, n_phrases=1).image.shape == (96, 96, 3)


def test_a_mask_is_the_or_of_its_instances(scenes: list[Scene]) -> None:
    for phrase in phrases(scenes):
        assert phrase.mask.dtype == np.uint8
        assert np.array_equal(phrase.mask, np.any(phrase.instances, axis=0))
        assert np.array_equal(phrase.coarse, np.any(phrase.coarse_instances, axis=0))
        assert phrase.instances.shape == phrase.coarse_instances.shape
        assert phrase.instances.sum(axis=(1, 2)).min() >= 12


def test_phrases_name_the_colour_of_their_pixels(scenes: list[Scene]) -> None:
    named = [(s.image[inner(m)], w) for s in scenes for p in s.phrases for m in p.instances for w in colour_words(p)]
    assert len(named) > 60
    for pixels, word in named:
        assert nearest_colour(pixels) == word


def test_phrases_mean_all_that_they_could_mean(scenes: list[Scene]) -> None:
    plain = [(s, p) for s in scenes for p in s.phrases if re.fullmatch(rf"({'|'.join(COLOURS)}) \w+", p.caption)]
    assert max(len(p.instances) for _, p in plain) > 1
    for scene, phrase in plain:
        assert len(phrase.instances) == scene.text.count(phrase.caption)


def test_phrases_name_the_place_of_their_pixels(scenes: list[Scene]) -> None:
    sides = {"on the left": (1, -1), "on the right": (1, 1), "at the top": (0, -1), "at the bottom": (0, 1)}
    placed = [(m, *side) for p in phrases(scenes) for w, side in sides.items() if w in p.caption for m in p.instances]
    assert len(placed) > 5
    for mask, axis, sign in placed:
        assert (np.nonzero(mask)[axis].mean() - 31.5) * sign > 0


def test_rings_have_holes_and_other_shapes_have_none(scenes: list[Scene]) -> None:
    holes: dict[bool, list[bool]] = {True: [], False: []}
    for phrase in phrases(scenes):
        for mask in phrase.instances:
            holes["ring" in phrase.caption].append(bool((ndimage.binary_fill_holes(mask) > mask).any()))
    assert np.mean(holes[True]) > 0.8  # a neighbour may cut a ring open
    assert np.mean(holes[False]) < 0.02


def test_small_is_smaller_than_large(scenes: list[Scene]) -> None:
    extent = {"small": [], "large": []}  # type: dict[str, list[int]]
    for phrase in phrases(scenes):
        word = phrase.caption.split()[0]
        if word in extent:
            extent[word] += [max(np.ptp(i) for i in np.nonzero(m)) for m in phrase.instances]
    assert max(extent["small"]) < np.median(extent["large"])


def test_coarse_labels_are_worse_than_exact_ones_but_overlap(scenes: list[Scene]) -> None:
    pairs = [pair for p in phrases(scenes) for pair in zip(p.instances, p.coarse_instances, strict=True)]
    got = np.array([iou(coarse, exact) for exact, coarse in pairs])
    assert 0.45 < got.mean() < 0.8
    assert got.min() > 0.1
    assert got.max() < 1


def test_a_coarse_ring_is_filled() -> None:
    y, x = np.mgrid[:64, :64]
    ring = ((np.hypot(x - 32, y - 30) < 16) & (np.hypot(x - 32, y - 30) > 9)).astype(np.uint8)
    assert coarsen(ring, np.random.default_rng(0))[30, 32] == 1


def phrases(scenes: list[Scene]) -> list[Phrase]:
    return [p for s in scenes for p in s.phrases]


def colour_words(phrase: Phrase) -> list[str]:
    return [w for w in phrase.caption.split() if w in COLOURS]


def inner(mask: Mask) -> np.ndarray:
    eroded = ndimage.binary_erosion(mask)
    return eroded if eroded.sum() > 5 else mask == 1


def nearest_colour(pixels: np.ndarray) -> str:
    """By direction in RGB: textures darken a colour and leave its direction."""
    mean = pixels.astype(float).mean(axis=0)
    cosine = {w: np.dot(mean, c) / np.linalg.norm(mean) / np.linalg.norm(c) for w, c in COLOURS.items()}
    return max(cosine, key=lambda w: cosine[w])
