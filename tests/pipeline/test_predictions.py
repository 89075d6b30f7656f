"""Predictions of other systems: how they are found, matched and read; no Ray."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray
from PIL import Image

from rlfseg import hdf5, images
from rlfseg.errors import BadSample, DataError
from rlfseg.pipeline.folders import begin, file_name, finish
from rlfseg.pipeline.predictions import LoadPredicted, find, load_score
from rlfseg.pipeline.rows import Row

SIZE = (4, 6)
INDEX = pa.table(
    {
        "id": ["1", "dir/2", "3"],
        "captions": [["dog", "red ring", "dog"], ["a/b", "7"], []],
    }
)
TASKS: list[list[str | None]] = [["1__7", "1__8", "1__9"], [None, "2__1"], []]


def grey(path: Path, level: float, depth: int = 8) -> Path:
    """A PNG of one grey level."""
    path.parent.mkdir(parents=True, exist_ok=True)
    dtype, top = (np.uint8, 255) if depth == 8 else (np.uint16, 65535)
    Image.fromarray(np.full(SIZE, round(level * top), dtype)).save(path)
    return path


def read(table: pa.Table, source: Path, **kwargs: Any) -> dict[str, Row]:
    """What was found of each picture, with the level of its first pixel for a score."""
    load, tasks = LoadPredicted(source, **kwargs), dict(zip(INDEX["id"].to_pylist(), TASKS, strict=True))
    found = {row["id"]: load(row, SIZE, row["captions"], tasks[row["id"]]) for row in table.to_pylist()}
    for own in found.values():
        own["scores"] = [None if s is None else level(s) for s in own["scores"]]
        own["others"] = [(phrase, level(s)) for phrase, s in own["others"]]
    return found


def level(score: NDArray[np.float32]) -> float:
    return round(float(score[0, 0]), 3)


def scores(*levels: float | None, unused: int = 0, others: tuple[tuple[str, float], ...] = ()) -> Row:
    return {"scores": list(levels), "others": list(others), "unused": unused}


# --- a folder -----------------------------------------------------------------------------------------------------


def test_a_folder_by_phrase(tmp_path: Path) -> None:
    grey(tmp_path / "1" / "dog.png", 0.2)
    grey(tmp_path / "1" / f"01-{file_name('red ring')}.png", 0.4)  # as `predict --png true` names it
    grey(tmp_path / "1" / "cat.PNG", 0.6)
    grey(tmp_path / file_name("dir/2") / f"{file_name('a/b')}.png", 0.8)
    grey(tmp_path / "4" / "dog.png", 0.2)
    found = find(INDEX, tmp_path)
    got = read(found.rows, tmp_path)
    assert got["1"] == scores(0.2, 0.4, None, unused=1)  # a cat nobody asked for
    assert got["dir/2"] == scores(0.8, None)
    assert got["3"] == scores()
    assert found.unused == 1  # of a picture that isn't there
    asked = read(find(INDEX, tmp_path, classes=("cat",)).rows, tmp_path, classes=("cat",))
    assert asked["1"] == scores(0.2, 0.4, None, others=(("cat", 0.6),))


def test_a_folder_by_number(tmp_path: Path) -> None:
    for n, level in ((0, 0.2), (2, 0.8), (9, 1)):
        grey(tmp_path / "1" / f"{n}.png", level)
    grey(tmp_path / "1" / "dog.png", 0.2)
    found = find(INDEX, tmp_path)
    # the second dog is the third phrase: the first is there, too, and "red ring" is missing
    assert read(found.rows, tmp_path)["1"] == scores(0.2, None, 0.8, unused=2)
    assert found.unused == 0


@pytest.mark.parametrize("form", ["1/{}.png", "{}.png"])
def test_a_folder_by_task_as_phrasecuts_evaluator_takes_it(tmp_path: Path, form: str) -> None:
    for task, level in (("1__9", 0.8), ("1__7", 0.2), ("1__5", 0.4)):
        grey(tmp_path / form.format(task), level)
    grey(tmp_path / "2__1.png", 0.2)
    found = find(INDEX, tmp_path)
    assert read(found.rows, tmp_path)["1"] == scores(0.2, None, 0.8, unused=1)
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
    assert read(found.rows, source) == {"1": scores(0.2, None, 0.4), "dir/2": scores(None, 0.6), "3": scores()}
    assert found.unused == 1


def test_predictions_of_other_phrases_are_unused_and_not_even_read(tmp_path: Path) -> None:
    grey(tmp_path / "a.png", 0.2)
    (tmp_path / "b.png").write_text("damaged")
    lines = [{"id": "1", "phrase": p, "png": f"{n}.png"} for p, n in (("Dog", "b"), ("dog", "a"), ("cat", "b"))]
    (tmp_path / "predictions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    found = find(INDEX, tmp_path)
    assert read(found.rows, tmp_path)["1"] == scores(0.2, None, None, unused=2)


@pytest.mark.parametrize("form", ["csv", "jsonl"])
def test_a_list_by_task(tmp_path: Path, form: str) -> None:
    """By task where both sides have one for all, in any order; else by phrase."""
    lines = [
        {"id": "1", "task": "1__9", "png": "a.png", "phrase": "dog"},
        {"id": "1", "task": "1__7", "png": "b.png", "phrase": ""},
        {"id": "1", "task": "2__7", "png": "b.png", "phrase": "red ring"},
        {"id": "dir/2", "task": "2__1", "png": "a.png", "phrase": "a/b"},  # its first phrase has no task
    ]
    grey(tmp_path / "a.png", 0.2)
    grey(tmp_path / "b.png", 0.4)
    path = tmp_path / f"theirs.{form}"
    with path.open("w", newline="") as file:
        if form == "csv":
            writer = csv.DictWriter(file, ["id", "phrase", "png", "task"])
            writer.writeheader()
            writer.writerows(lines)
        else:
            del lines[1]["phrase"]
            file.write("\n".join(map(json.dumps, lines)))
    got = read(find(INDEX, path).rows, path)
    assert (got["1"], got["dir/2"]) == (scores(0.4, None, 0.2, unused=1), scores(0.2, None))


def test_a_changed_png_of_a_list_changes_its_fingerprint(tmp_path: Path) -> None:
    grey(tmp_path / "a.png", 0.2)
    lines = [{"id": "1", "phrase": "dog", "png": png} for png in ("a.png", "absent.png", "\0")]
    (tmp_path / "predictions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    before = find(INDEX, tmp_path).fingerprint
    assert find(INDEX, tmp_path).fingerprint == before
    state = (tmp_path / "a.png").stat()
    os.utime(tmp_path / "a.png", ns=(state.st_atime_ns, state.st_mtime_ns + 1))
    touched = find(INDEX, tmp_path).fingerprint
    grey(tmp_path / "absent.png", 0.2)
    assert len({before, touched, find(INDEX, tmp_path).fingerprint}) == 3


DOG = {"id": "1", "phrase": "dog", "png": "a.png"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"id": "1", "phrase": "dog"}', "lacks png; a prediction has id, png, and phrase or task"),
        ('{"id": "1", "png": "a.png"}', "'phrase' must be Unicode text, this is None"),
        ("[1]", r"not an object with id, .*, but \[1\]"),
        ('{"id": "1", ', "can't be read as JSON"),
        ("[" * 100_000, "can't be read as JSON"),
        (json.dumps(DOG)[:-1] + ', "n": ' + "1" * 100_000 + "}", "can't be read as JSON"),
        (json.dumps(DOG | {"png": 7}), "'png' must be Unicode text, this is 7"),
        (json.dumps(DOG | {"phrase": 7}), "'phrase' must be Unicode text, this is 7"),
        (json.dumps(DOG | {"phrase": ["dog"]}), r"'phrase' must be Unicode text, this is \['dog'\]"),
        (json.dumps(DOG | {"phrase": "\ud800"}), r"'phrase' must be Unicode text, this is '\\ud800'"),
        (json.dumps(DOG | {"id": True}), "'id' must be Unicode text, this is True"),
        (json.dumps(DOG | {"task": {}}), "'task' must be Unicode text, this is {}"),
    ],
    ids=range(12),
)
def test_a_bad_line_is_named_with_its_number(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "predictions.jsonl").write_text(f"{json.dumps(DOG)}\n\n{line}\n")
    with pytest.raises(DataError, match=f"predictions.jsonl, line 3: {message}"):
        find(INDEX, tmp_path)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("1,dog,\n", "line 2: lacks png"),
        ("1\n", "line 2: lacks png"),
        ('1,"two\nlines",a.png\n1,dog\n', "line 4: lacks png"),
        (f"1,dog,{'x' * 200_000}\n", "after line 1: not CSV"),
    ],
)
def test_a_bad_row_of_a_table_is_named_with_its_line(tmp_path: Path, rows: str, message: str) -> None:
    (tmp_path / "predictions.csv").write_text(f"id,phrase,png\n{rows}")
    with pytest.raises(DataError, match=f"predictions.csv, {message}"):
        find(INDEX, tmp_path)


# --- Parquet and HDF5 ---------------------------------------------------------------------------------------------


def rle(level: int) -> str:
    return images.rle_encode(np.full(SIZE, level, np.uint8))


A_PICTURE = {
    "id": ["1", "dir/2", "9"],
    "captions": [["dog", "Dog", "dog", "cat"], ["7"], ["dog", "cat"]],
    "masks": [[rle(1), rle(1), rle(0), None], [None], [rle(1), rle(1)]],
}
A_PHRASE = {
    "id": ["1", "1", "1", "9", "9"],
    "phrase": ["dog", "Dog", "dog", "dog", "cat"],
    "mask": [rle(1).encode(), rle(1).encode(), rle(0).encode(), rle(1).encode(), rle(1).encode()],
}


UNNESTED = {"caption" if name == "phrase" else name: column for name, column in A_PHRASE.items()}  # as our own table


@pytest.mark.parametrize("columns", [A_PICTURE, A_PHRASE, UNNESTED])
@pytest.mark.parametrize("inside", [True, False])
def test_any_parquet(tmp_path: Path, columns: dict[str, Any], inside: bool) -> None:
    path = tmp_path / "theirs.parquet"
    pq.write_table(pa.table(columns | {"score": [0.5] * len(columns["id"])}), path)
    source = tmp_path if inside else path
    found = find(INDEX, source)
    assert read(found.rows, source, classes=("cat",)) == {
        "1": scores(1, None, 0, unused=1),  # Dog isn't dog, and a cat that failed isn't there
        "dir/2": scores(None, None),
        "3": scores(),
    }
    assert found.unused == 2
    os.utime(path, ns=(0, 0))
    assert find(INDEX, source).fingerprint != found.fingerprint


def test_parquet_by_task(tmp_path: Path) -> None:
    table = {"id": [1, 1], "captions": [["dog"], ["dog"]], "tasks": [["1__9"], ["1__7"]], "masks": [[rle(1)], [rle(0)]]}
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    assert read(find(INDEX, tmp_path).rows, tmp_path)["1"] == scores(0, None, 1)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"phrase": ["a"]}, "has no column id, nor masks or mask; it has "),
        ({"id": ["1"], "captions": [["a", "b"]], "masks": [["0"]]}, "row 0: 1 masks for 2 phrases and 0 tasks"),
        (
            {"id": ["1"], "phrase": ["a"], "mask": [{"counts": "0"}]},
            "row 0: 'mask' must be Unicode text, this is {'counts",
        ),
        ({"id": [None], "phrase": ["a"], "mask": ["0"]}, "row 0: 'id' must be Unicode text, this is None"),
    ],
)
def test_bad_parquet_is_named_with_its_row(tmp_path: Path, columns: dict[str, Any], message: str) -> None:
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=f"a.parquet[:,] {message}"):
        find(INDEX, tmp_path)


def test_masks_in_hdf5_by_task(tmp_path: Path) -> None:
    """Two tasks with one phrase, the other way round than in the set, and what it doesn't have."""

    def phrase(caption: str, task: str, value: int) -> hdf5.Labelled:
        return hdf5.Labelled(caption=caption, task=task, mask=np.full(SIZE, value, np.uint8))

    picture = np.zeros((*SIZE, 3), np.uint8)
    own = (phrase("dog", "1__9", 1), phrase("dog", "1__7", 0), phrase("cat", "1__1", 1))
    begin(tmp_path, {})
    samples = [hdf5.Sample(id="1", image=picture, phrases=own), hdf5.Sample(id="9", image=picture, phrases=own[:2])]
    hdf5.write_shard(tmp_path / "a.h5", samples)
    hdf5.build_index(tmp_path)
    finish(tmp_path, {}, {})
    found = find(INDEX, tmp_path)
    assert read(found.rows, tmp_path)["1"] == scores(0, None, 1, unused=1)
    assert found.unused == 2


def test_nothing_there_says_what_would_do(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has no ID/\*.png, \*.parquet, predictions.jsonl or"):
        find(INDEX, tmp_path)
    with pytest.raises(DataError, match="no folder, list or Parquet file"):
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
