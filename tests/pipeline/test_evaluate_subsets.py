"""Subsets of an evaluation, and confidence intervals."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given as drawn_by
from hypothesis import strategies as st

from rlfseg import metrics
from rlfseg.pipeline import report
from tests.pipeline.evaluated import config, given, made, written


def test_subsets_add_up_to_the_whole(tmp_path: Path) -> None:
    got = written(made(1, 12), tmp_path, config(protocol=("phrasecut", "rlfseg")))
    for kind in ("size_", "instances_"):
        parts = [own["rlfseg"] for name, own in got["subsets"].items() if name.startswith(kind)]
        total = sum(p["n_samples"] for p in parts)
        if kind == "size_":
            assert total == got["n_samples"]
            assert sum(p["n_samples"] * p["miou"] for p in parts) / total == pytest.approx(got["miou"])
    assert all(set(own) == {"phrasecut", "rlfseg"} for own in got["subsets"].values())


@pytest.mark.parametrize(
    ("pixels", "instances", "names"),
    [
        (0, 0, ["size_empty"]),
        (0, None, ["size_empty"]),
        (19, 1, ["size_small", "instances_1"]),
        (20, 2, ["size_mid", "instances_2_up", "instances_2_4"]),
        (200, 4, ["size_mid", "instances_2_up", "instances_2_4"]),
        (201, 5, ["size_large", "instances_2_up", "instances_5_up"]),
    ],
)
def test_subsets_of_a_phrase(pixels: int, instances: int | None, names: list[str]) -> None:
    mask = np.zeros(1000, np.uint8)
    mask[:pixels] = 1
    assert report.subsets_of(mask.reshape(20, 50), instances) == names


def phrasecut_subsets(share: float, boxes: int) -> set[str]:
    """As the data set's `utils/subset.py` defines them; of "more than one" its text and its code differ."""
    number = {"i_single": boxes == 1, "i_multi (text)": boxes > 1, "i_multi (code)": 1 < boxes < 5, "i_many": boxes > 4}
    size = {"s_small": share < 0.02, "s_large": share > 0.2, "s_mid": 0.02 <= share <= 0.2}
    return {name for name, inside in (number | size).items() if inside}


@drawn_by(st.integers(1, 1000), st.integers(1, 9))
def test_phrasecuts_subsets_are_among_ours(pixels: int, instances: int) -> None:
    names = {
        **{"instances_1": "i_single", "instances_2_up": "i_multi (text)", "instances_2_4": "i_multi (code)"},
        **{"instances_5_up": "i_many", "size_small": "s_small", "size_mid": "s_mid", "size_large": "s_large"},
    }
    mask = (np.arange(1000) < pixels).astype(np.uint8)
    ours = report.subsets_of(mask.reshape(20, 50), instances)
    assert {names[own] for own in ours} == phrasecut_subsets(pixels / 1000, instances)


def test_attributes_are_columns_with_few_texts_one_a_phrase() -> None:
    texts = pa.list_(pa.string())
    index = pa.table(
        {
            "id": ["a", "b"],
            "captions": pa.array([["x", "y"], ["z"]], texts),
            "type": pa.array([["stuff", "object"], ["object"]], texts),
            "short": pa.array([["stuff"], ["object"]], texts),
            "absent": pa.array([None, ["object"]], texts),
        }
    )
    assert report.attributes(index) == ["type"]
    many = pa.table({"captions": pa.array([["x"]] * 40, texts), "task": pa.array([[str(n)] for n in range(40)], texts)})
    assert report.attributes(many) == []


def test_intervals_hold_the_value_and_are_the_same_again(tmp_path: Path) -> None:
    got = [written(made(2, 30), tmp_path / name, config(seed=s)) for name, s in (("a", 1), ("b", 1), ("c", 2))]
    assert got[0]["intervals"] == got[1]["intervals"] != got[2]["intervals"]
    low, high = got[0]["intervals"]["rlfseg"]["miou"]
    assert low < got[0]["miou"] < high
    assert got[0]["bootstrap"] == {"resamples": 50, "seed": 1, "level": 0.95, "unit": "image"}
    none = written(made(2, 30), tmp_path / "d", config(resamples=0))
    assert none["intervals"] == {}


def test_intervals_do_not_depend_on_how_the_images_lie_in_the_files(tmp_path: Path) -> None:
    rows = made(5, 30)
    one = written(rows, tmp_path / "one", config(seed=1))
    other = written(rows[::-1], tmp_path / "other", config(seed=1), files=3)
    assert one == other


def test_intervals_are_of_whole_images(tmp_path: Path) -> None:
    rows, settings = made(7, 12), config(protocol="phrasecut", resamples=40, seed=3)
    got = written(rows, tmp_path, settings, files=2)
    means, sums = [], []
    for row in sorted(rows, key=lambda row: str(row["id"])):  # not as they lie in the two files
        pairs = [(given(row, c), t) for c, t in zip(row["captions"], row["labels"], strict=True)]
        ious = [0.0 if s is None else metrics.iou((s > 0.5).astype(np.uint8), t) for s, t in pairs]
        if ious:
            sums.append((sum(ious), len(ious)))
    for draw in metrics.draw_images(len(sums), 40, 3):
        total, count = (draw.astype(float) @ [part[i] for part in sums] for i in (0, 1))
        means.append(total / count)
    assert got["intervals"]["phrasecut"]["miou"] == pytest.approx(np.quantile(means, [0.025, 0.975]), abs=1e-9)
