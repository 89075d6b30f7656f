"""Predictions of other systems: how they are found, matched and read; no Ray."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from rlfseg.errors import BadSample, DataError
from rlfseg.pipeline.predictions import LoadPredicted, find, load_score

SIZE = (4, 6)
INDEX = pa.table(
    {
        "id": ["1", "dir/2", "3"],
        "captions": [["dog", "red ring", "dog"], ["a/b", "7"], []],
    }
)


def grey(path: Path, level: float, depth: int = 8) -> Path:
    """A PNG of one grey level."""
    path.parent.mkdir(parents=True, exist_ok=True)
    dtype, top = (np.uint8, 255) if depth == 8 else (np.uint16, 65535)
    Image.fromarray(np.full(SIZE, round(level * top), dtype)).save(path)
    return path


def read(table: pa.Table, source: Path, **kwargs: Any) -> dict[str, list[tuple[str, float | None]]]:
    """What was found of each picture: phrase and the level of its first pixel."""
    load = LoadPredicted(source, **kwargs)
    return {
        row["id"]: [(c, None if s is None else round(float(s[0, 0]), 3)) for c, s in load(row, SIZE)]
        for row in table.to_pylist()
    }


# --- a folder -----------------------------------------------------------------------------------------------------


def test_a_folder_by_phrase(tmp_path: Path) -> None:
    from rlfseg.pipeline.folders import file_name

    grey(tmp_path / "1" / "dog.png", 0.2)
    grey(tmp_path / "1" / f"01-{file_name('red ring')}.png", 0.4)  # as `predict --png true` names it
    grey(tmp_path / "1" / "cat.PNG", 0.6)
    grey(tmp_path / file_name("dir/2") / f"{file_name('a/b')}.png", 0.8)
    grey(tmp_path / "4" / "dog.png", 0.2)
    found = find(INDEX, tmp_path)
    got = read(found.rows, tmp_path)
    assert sorted(got["1"]) == [("dog", 0.2), ("red ring", 0.4)]
    assert got["dir/2"] == [("a/b", 0.8)]
    assert got["3"] == []
    assert found.unused == 2  # a cat nobody asked for, and a picture that isn't there
    asked = find(INDEX, tmp_path, classes=("cat",))
    assert ("cat", 0.6) in read(asked.rows, tmp_path)["1"]
    assert asked.unused == 1


def test_a_folder_by_number(tmp_path: Path) -> None:
    for n, level in ((0, 0.2), (2, 0.8), (9, 1)):
        grey(tmp_path / "1" / f"{n}.png", level)
    found = find(INDEX, tmp_path)
    # the second dog is the third phrase: the first is there, too, and "red ring" is missing
    assert read(found.rows, tmp_path)["1"] == [("dog", 0.2), ("red ring", None), ("dog", 0.8)]
    assert found.unused == 1


def test_a_folder_changes_its_fingerprint(tmp_path: Path) -> None:
    grey(tmp_path / "1" / "dog.png", 0.2)
    before = find(INDEX, tmp_path).fingerprint
    assert find(INDEX, tmp_path).fingerprint == before
    grey(tmp_path / "1" / "red ring.png", 0.2)
    assert find(INDEX, tmp_path).fingerprint != before


# --- a list -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["csv", "jsonl"])
@pytest.mark.parametrize("inside", [True, False])
def test_a_list(tmp_path: Path, form: str, inside: bool) -> None:
    lines = [
        {"id": "1", "phrase": "dog", "png": "a.png"},
        {"id": "1", "phrase": "dog", "png": "b.png"},
        {"id": "dir/2", "phrase": "7", "png": str(grey(tmp_path / "deep" / "c.png", 0.6))},
        {"id": "9", "phrase": "dog", "png": "a.png"},
    ]
    grey(tmp_path / "a.png", 0.2)
    grey(tmp_path / "b.png", 0.4, depth=16)
    path = tmp_path / (f"predictions.{form}" if inside else f"theirs.{form}")
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        if form == "csv":
            writer = csv.DictWriter(file, ["id", "phrase", "png"])
            writer.writeheader()
            writer.writerows(lines)
        else:
            file.write("\n".join(map(json.dumps, lines)) + "\n\n")
    source = tmp_path if inside else path
    found = find(INDEX, source)
    got = read(found.rows, source)
    assert got == {"1": [("dog", 0.2), ("dog", 0.4)], "dir/2": [("7", 0.6)], "3": []}
    assert found.unused == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"id": "1", "phrase": "dog"}', "line 1: lacks png"),
        ('{"id": "1", "phrase": "dog", "png": "a.png"}\n[1]', "line 2: not an object"),
        ('{"id": "1", ', "can't be read"),
    ],
)
def test_a_bad_list_is_named_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "predictions.jsonl"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        find(INDEX, tmp_path)


def test_nothing_there_says_what_would_do(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has no ID/\*.png, predictions.jsonl or predictions.csv"):
        find(INDEX, tmp_path)
    with pytest.raises(DataError, match="no folder or list"):
        find(INDEX, tmp_path / "absent")


# --- pixels -------------------------------------------------------------------------------------------------------


def test_a_prediction_of_another_size_is_refused(tmp_path: Path) -> None:
    Image.new("L", (3, 3), 200).save(grey(tmp_path / "1" / "dog.png", 0.2))
    found = find(INDEX, tmp_path)
    with pytest.raises(BadSample, match=r"\[1\]: the prediction of 'dog' is 3 x 3 pixels, the picture 6 x 4"):
        read(found.rows, tmp_path)


def test_grey_levels_are_scores(tmp_path: Path) -> None:
    for depth, top, dtype in ((8, 255, np.uint8), (16, 65535, np.uint16)):
        levels = np.array([[0, 1, 2], [top // 3, top - 1, top]], dtype)
        path = tmp_path / f"{depth}.png"
        Image.fromarray(levels).save(path)
        np.testing.assert_array_equal(load_score(str(path)), (levels / np.float32(top)).astype(np.float32))


def test_masks_are_scores_of_0_and_1(tmp_path: Path) -> None:
    mask = np.array([[0, 1], [1, 0]], np.uint8)
    palette = Image.fromarray(mask).convert("P")
    palette.putpalette([0, 0, 0, 200, 30, 30])
    forms = {
        "bits": (Image.fromarray(mask.astype(bool)), "auto"),
        "white": (Image.fromarray(mask * 255), "auto"),
        "white, told": (Image.fromarray(mask * 255), "masks"),
        "ones, told": (Image.fromarray(mask), "masks"),
        "palette": (palette, "auto"),
        "rgb": (Image.fromarray(mask * 255).convert("RGB"), "auto"),
    }
    for name, (image, values) in forms.items():
        image.save(tmp_path / f"{name}.png")
        got = load_score(str(tmp_path / f"{name}.png"), values=values)  # type: ignore[arg-type]
        np.testing.assert_array_equal(got, mask.astype(np.float32), err_msg=name)


def test_what_may_be_a_mask_or_a_faint_score_is_not_guessed(tmp_path: Path) -> None:
    path = str(tmp_path / "a.png")
    Image.fromarray(np.array([[0, 1]], np.uint8)).save(path)
    with pytest.raises(BadSample, match="Give --png_values masks, or scores"):
        load_score(path)
    assert load_score(path, values="scores").max() == np.float32(1 / 255)
    assert load_score(path, values="masks").max() == 1
    Image.fromarray(np.zeros((2, 2), np.uint8)).save(path)  # nothing is nothing, either way
    assert load_score(path).max() == 0


def test_a_damaged_png_is_a_bad_sample(tmp_path: Path) -> None:
    path = grey(tmp_path / "a.png", 0.5)
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64)).astype(np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:-900])
    for values in ("auto", "masks", "scores"):
        with pytest.raises(BadSample, match="can't be decoded"):
            load_score(str(path), values=values)  # type: ignore[arg-type]
    path.write_text("<html>not found</html>")
    with pytest.raises(BadSample, match="not a picture"):
        load_score(str(path))
    with pytest.raises(BadSample, match="no such file"):
        load_score(str(tmp_path / "absent.png"))
