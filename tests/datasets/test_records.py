"""datasets/records.py: from a record to a sample, through JSON and HDF5 and back, exactly or refused by name."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from rlfseg import hdf5, images
from rlfseg.datasets import records
from rlfseg.datasets.records import Entry, Record
from rlfseg.errors import BadSample
from rlfseg.pipeline import sources
from rlfseg.pipeline.sources import Pixels

H, W = 9, 12
TRIANGLE = [[1, 1, 1, 7, 7, 7]]


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("records") / "a.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (H, W, 3), dtype=np.uint8)).save(path)
    return path


def record(picture: Path, *phrases: Entry, **fields: Any) -> Record:
    known = {"id": "7", "image": str(picture), "size": (H, W), "split": "train", "source": "refer_train.json"}
    return Record(**{**known, **fields, "phrases": phrases})


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
AWKWARD = ["white/black dog", "/abs", "a//b", "./x", "nul\0b", "trail/", "", ".", "..", "x ", "%2F", "%", "#2", "dog#2"]
SLANTED = ["café", unicodedata.normalize("NFD", "café"), "Dog", "dog", "dog", "😀", "x" * 5000, "a\nb", "\t", "ß", "SS"]


@settings(max_examples=60)
@given(st.lists(texts | st.sampled_from(AWKWARD + SLANTED), max_size=8), texts.filter(bool))
@example(AWKWARD + SLANTED + AWKWARD, "1/2")
def test_any_caption_comes_back_exactly(
    picture: Path, tmp_path_factory: pytest.TempPathFactory, captions: list[str], key: str
) -> None:
    """Each phrase has a mask of its own, so a caption that took another's place would show."""
    shapes = [{"size": [H, W], "counts": [n, n + 1, H * W - 2 * n - 1]} for n in range(len(captions))]
    entries = [Entry(caption=c, task=f"{key}__{n}", objects=(shapes[n],)) for n, c in enumerate(captions)]
    line = record(picture, *entries, id=key, coco_id=key).to_json()
    sample, skipped, partly = records.load(Record.from_json(line), "pil")
    path = tmp_path_factory.mktemp("shard") / "0.h5"
    hdf5.write_shard(path, [sample], {"rasteriser": "pil"})
    read = hdf5.read_sample(path, key)
    assert (skipped, partly) == ({}, {})
    assert [(p.caption, p.task) for p in read.phrases] == [(c, f"{key}__{n}") for n, c in enumerate(captions)]
    assert read.coco_id == key
    for phrase, shape in zip(read.phrases, shapes, strict=True):
        first, on, _ = shape["counts"]
        assert np.flatnonzero(phrase.mask.T).tolist() == list(range(first, first + on))
        assert phrase.instances is not None
        assert np.array_equal(phrase.instances, phrase.mask[None])
    assert np.array_equal(read.image, np.asarray(Image.open(picture)))


def test_a_record_comes_through_json() -> None:
    entries = (
        Entry(caption="a", mask="m.png"),
        Entry(caption="b", task="1__2", objects=([[0.1, 2, 3.5, 4, 5, 1e-7]], {"size": [2, 3], "counts": "06"})),
        Entry(caption="c", objects=()),
        Entry(caption="d", values=(3, 70_000)),
    )
    for fields in ({}, {"size": None, "labels": "l.png", "coco_id": "9"}):
        one = record(Path("a.png"), *entries, **fields)
        assert Record.from_json(one.to_json()) == one


def test_objects_are_kept_apart_and_joined_in_the_mask(picture: Path) -> None:
    other = [[0, 5, 11, 5, 11, 8]]
    (phrase,) = records.load(record(picture, Entry(caption="x", objects=(TRIANGLE, other))), "pil").sample.phrases
    alone = [
        records.load(record(picture, Entry(caption="x", objects=(o,))), "pil").sample.phrases[0].mask
        for o in (TRIANGLE, other)
    ]
    assert phrase.instances is not None
    assert np.array_equal(phrase.instances, alone)
    assert np.array_equal(phrase.mask, alone[0] | alone[1])
    assert (alone[0] & alone[1]).any()


def test_nothing_meant_is_an_empty_mask_and_nothing_drawable_is_left_out(picture: Path) -> None:
    entries = [
        Entry(caption="absent", task="1", objects=()),
        Entry(caption="no polygon", task="2", objects=([],)),
        Entry(caption="outside", task="3", objects=([[50, 50, 60, 50, 60, 60]],)),
        Entry(caption="half", task="4", objects=([], TRIANGLE, [TRIANGLE[0], [1, 2]])),
        Entry(caption="whole", objects=(TRIANGLE,)),
    ]
    sample, skipped, partly = records.load(record(picture, *entries), "pycocotools")
    assert [p.caption for p in sample.phrases] == ["absent", "half", "whole"]
    assert sample.phrases[0].mask.shape == (H, W)
    assert sample.phrases[0].mask.sum() == 0
    assert sample.phrases[0].instances is not None
    assert sample.phrases[0].instances.shape == (0, H, W)
    assert skipped == {
        "7: 2": "no outline that covers a pixel",
        "7: 3": "no outline that covers a pixel",
    }
    assert partly == {"7: 4": "1 objects, 1 polygons"}


def test_label_maps(picture: Path, tmp_path: Path) -> None:
    labels = np.zeros((H, W, 3), np.uint8)
    labels[:3], labels[3:5] = (1, 2, 3), (1, 0, 0)
    Image.fromarray(labels).save(tmp_path / "l.png")
    entry = Entry(caption="wall", values=(1 + 2 * 256 + 3 * 65536, 1, 77))
    sample, skipped, partly = records.load(record(picture, entry, labels=str(tmp_path / "l.png")), "pil")
    assert sample.phrases[0].instances is not None
    assert sample.phrases[0].instances.sum(axis=(1, 2)).tolist() == [3 * W, 2 * W]
    assert (skipped, partly) == ({}, {"7: 0": "1 objects (value 77)"})
    Image.new("L", (W, H - 1)).save(tmp_path / "small.png")
    with pytest.raises(BadSample, match=r"small\.png \[7\]: the mask is 12 x 8 pixels, its picture 12 x 9"):
        records.load(record(picture, entry, labels=str(tmp_path / "small.png")), "pil")


@pytest.mark.parametrize("mode", ["L", "P", "1", "I;16"])
def test_label_maps_are_read_by_index(tmp_path: Path, mode: str) -> None:
    values = np.arange(6, dtype=np.uint16 if mode == "I;16" else np.uint8).reshape(2, 3) % (2 if mode == "1" else 7)
    image = Image.fromarray(values.astype(bool)) if mode == "1" else Image.fromarray(values)
    if mode == "P":
        image = Image.fromarray(values).convert("P")
        image.putpalette([9, 9, 9] * 256)  # every index has one colour
    image.save(tmp_path / "l.png")
    assert images.load_labels(tmp_path / "l.png", name="l.png").tolist() == values.tolist()
    Image.new("RGBA", (3, 2)).save(tmp_path / "l.png")
    with pytest.raises(BadSample, match=r"l\.png: a label map holds whole numbers or RGB"):
        images.load_labels(tmp_path / "l.png", name="l.png")


@pytest.mark.fault("raster-04")
def test_a_damaged_rle_names_picture_phrase_and_task(picture: Path) -> None:
    entry = Entry(caption="blue\ncar", task="7__12", objects=({"size": [H, W], "counts": [1, 2]},))
    with pytest.raises(
        BadSample, match=r"refer_train\.json \[7\]: the phrase 'blue\\ncar', 7__12: RLE counts \[1, 2\]"
    ):
        records.load(record(picture, entry), "pil")


def test_sizes_are_held_against_the_list(picture: Path, tmp_path: Path) -> None:
    with pytest.raises(BadSample, match=r"a\.png \[7\]: is 12 x 9 pixels as displayed; refer_train\.json says 13 x 9$"):
        records.load(record(picture, size=(H, W + 1)), "pil")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (W, H)).save(tmp_path / "turned.jpg", exif=exif.tobytes())
    with pytest.raises(BadSample, match=r"is 9 x 12 .* says 12 x 9; was it annotated before the EXIF rotation"):
        records.load(record(tmp_path / "turned.jpg"), "pil")


def test_more_than_a_reader_takes_is_refused_before_it_is_drawn(picture: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    many = Entry(caption="crowd", objects=(TRIANGLE,) * 6)
    records.load(record(picture, many), "pil")
    monkeypatch.setattr(records, "MAX_BYTES", 10 * H * W - 1)
    with pytest.raises(BadSample, match=r"its picture and masks take 1,080 bytes; the limit of one sample is 1,079"):
        records.load(record(picture, many), "pil")


def test_the_limit_is_that_of_the_reader() -> None:
    from rlfseg.hdf5.check import MAX_SAMPLE_BYTES

    assert records.MAX_BYTES == MAX_SAMPLE_BYTES


@pytest.mark.fault("raster-09")
def test_masks_stay_two_valued_up_to_the_networks_square(picture: Path, tmp_path: Path) -> None:
    """From the file through the training's own loader to what the autoencoder gets."""
    eye = np.eye(7, dtype=np.uint8) * 255
    Image.fromarray(eye).save(tmp_path / "eye.png")
    Image.new("RGB", (7, 7)).save(tmp_path / "p.png")
    entry = Entry(caption="diagonal", mask=str(tmp_path / "eye.png"))
    sample, _, _ = records.load(record(tmp_path / "p.png", entry, size=None), "pil")
    hdf5.write_shard(tmp_path / "0.h5", [sample])
    mask = hdf5.read_sample(tmp_path / "0.h5", "7").phrases[0].mask
    assert np.array_equal(mask, np.eye(7))
    hdf5.build_index(tmp_path)
    for name in ("_STARTED.json", "_SUCCESS.json"):
        (tmp_path / name).write_text('{"identity": {}}')
    (table,) = Pixels(tmp_path, 16).reader([(0, 0)])()
    (loaded,) = table["mask"].to_pylist()
    square = np.frombuffer(loaded, np.uint8).reshape(16, 16)
    assert np.unique(square).tolist() == [0, 1]
    assert np.array_equal(square, square.T)  # a diagonal stays one
    assert square.diagonal().all()
    assert sources._masks([loaded], 16).unique().tolist() == [-1, 1]


def test_json_is_one_line_without_what_is_not_given(picture: Path) -> None:
    line = record(picture, Entry(caption="a\nb", objects=())).to_json()
    assert "\n" not in line
    assert json.loads(line)["phrases"] == [{"caption": "a\nb", "objects": []}]
