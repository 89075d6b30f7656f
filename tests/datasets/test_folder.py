"""datasets/folder.py: three forms of one list, exact masks, and every fault named with its row."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rlfseg import hdf5
from rlfseg.datasets import folder, records
from rlfseg.datasets.records import Record
from rlfseg.errors import BadSample, DataError

ROWS = [
    {"image": "a.png", "phrase": "black/white cat", "mask": "m1.png", "split": "train"},
    {"image": "b.png", "phrase": 'the "left", one', "mask": "m1.png", "split": "val"},
    {"image": "a.png", "phrase": "person", "mask": "m1.png", "split": "train"},
    {"image": "a.png", "phrase": "person", "mask": "m2.png", "split": "train"},
]


def plan(path: Path) -> list[Record]:
    return folder.plan(path).records


def load(record: Record) -> hdf5.Sample:
    return records.load(record, "pil").sample


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Two pictures of 7 x 5 pixels and two masks."""
    rng = np.random.default_rng(0)
    for name in "ab":
        Image.fromarray(rng.integers(0, 256, (5, 7, 3), dtype=np.uint8)).save(tmp_path / f"{name}.png")
    for n in (1, 2):
        Image.fromarray(rng.random((5, 7)) > 0.5).save(tmp_path / f"m{n}.png")
    return tmp_path


def as_json(root: Path, rows: list[dict[str, Any]]) -> Path:
    names = dict.fromkeys(row["image"] for row in rows)
    images = [
        {"image": n, "split": r["split"], "phrases": [q for q in rows if q["image"] == n]}
        for n in names
        for r in [next(q for q in rows if q["image"] == n)]
    ]
    (root / "index.json").write_text(json.dumps({"images": images}))
    return root / "index.json"


def as_jsonl(root: Path, rows: list[dict[str, Any]]) -> Path:
    (root / "phrases.jsonl").write_text("\n\n".join(map(json.dumps, rows)), encoding="utf-8")
    return root / "phrases.jsonl"


def as_csv(root: Path, rows: list[dict[str, Any]]) -> Path:
    with (root / "phrases.csv").open("w", newline="", encoding="utf-8-sig") as stream:  # as Excel writes it
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return root / "phrases.csv"


Form = Callable[[Path, list[dict[str, Any]]], Path]
FORMS = pytest.mark.parametrize("form", [as_json, as_jsonl, as_csv])


@FORMS
def test_every_form_gives_the_same_samples(pictures: Path, form: Form) -> None:
    path = form(pictures, ROWS)
    planned = plan(path)
    assert plan(pictures) == planned
    assert folder.plan(path).found == {"train": (1, 3), "val": (1, 1)}
    assert [(r.id, r.split) for r in planned] == [("a.png", "train"), ("b.png", "val")]
    assert [Record.from_json(r.to_json()) for r in planned] == planned
    sample = load(planned[0])
    assert [p.caption for p in sample.phrases] == ["black/white cat", "person", "person"]
    for phrase, name in zip(sample.phrases, ("m1", "m1", "m2"), strict=True):
        assert np.array_equal(phrase.mask, np.asarray(Image.open(pictures / f"{name}.png")).astype(np.uint8))
    assert np.array_equal(sample.image, np.asarray(Image.open(pictures / "a.png")))
    assert load(planned[1]).phrases[0].caption == 'the "left", one'


@pytest.mark.fault("h5-key-06")
@FORMS
def test_a_phrase_asked_twice_stays_two_in_the_shard(pictures: Path, form: Form) -> None:
    hdf5.write_shard(pictures / "0.h5", map(load, plan(form(pictures, ROWS))))
    read = hdf5.read_sample(pictures / "0.h5", "a.png")
    masks = [p.mask for p in read.phrases if p.caption == "person"]
    assert len(masks) == 2
    assert not np.array_equal(*masks)


def test_ids_sizes_tasks_and_pictures_without_phrases(pictures: Path) -> None:
    phrase = {"phrase": "", "mask": "m1.png", "task_id": "30__7"}
    images = [
        {"image": "a.png", "image_id": 30, "width": 7, "height": 5, "phrases": [phrase]},
        {"image": "b.png", "phrases": []},
    ]
    (pictures / "index.json").write_text(json.dumps({"images": images}))
    one, two = plan(pictures)
    assert (one.id, one.size, two.id, two.size) == ("30", (5, 7), "b.png", None)
    assert load(one).phrases[0].task == "30__7"
    assert load(one).phrases[0].caption == ""
    assert load(two).phrases == ()


@pytest.mark.fault("raster-10", part="convert")
def test_codings_of_a_mask_make_no_difference(pictures: Path) -> None:
    mask = np.asarray(Image.open(pictures / "m1.png"))
    for name, array in {"bool": mask, "one": mask.astype(np.uint8), "full": mask.astype(np.uint8) * 255}.items():
        Image.fromarray(array).save(pictures / f"{name}.png")
    Image.fromarray(mask.astype(np.float32)).save(pictures / "float.tiff")
    names = ["bool.png", "one.png", "full.png", "float.tiff"]
    (record,) = plan(as_jsonl(pictures, [{"image": "a.png", "phrase": n, "mask": n} for n in names]))
    hdf5.write_shard(pictures / "0.h5", [load(record)])
    read = hdf5.read_sample(pictures / "0.h5", "a.png")
    assert all(np.array_equal(p.mask, mask.astype(np.uint8)) for p in read.phrases)
    Image.fromarray(mask.astype(np.uint8) * 7).save(pictures / "one.png")
    with pytest.raises(BadSample, match=r"one\.png \[a\.png\]: a mask must hold only 0 and 1"):
        load(record)


@pytest.mark.fault("image-01", part="convert")
def test_a_rotated_photo_has_its_masks_as_displayed(pictures: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 20), "red").save(pictures / "turned.jpg", exif=exif.tobytes())
    for name, size in (("shown", (20, 40)), ("raw", (40, 20))):
        Image.new("1", size).save(pictures / f"{name}.png")
    rows = [{"image": "turned.jpg", "image_id": n, "phrase": "x", "mask": f"{n}.png"} for n in ("shown", "raw")]
    shown, raw = plan(as_jsonl(pictures, rows))
    sample = load(shown)
    assert sample.image.shape == (40, 20, 3)
    assert sample.phrases[0].mask.shape == (40, 20)
    with pytest.raises(BadSample, match=r"raw\.png \[raw\]: the mask is 40 x 20 pixels, its picture 20 x 40 .*EXIF"):
        load(raw)


@pytest.mark.fault("image-06", part="convert")
def test_cmyk_reaches_the_shard_as_rgb(pictures: Path) -> None:
    Image.new("RGB", (7, 5), "red").convert("CMYK").save(pictures / "a.jpg", quality=95)
    (record,) = plan(as_jsonl(pictures, [{"image": "a.jpg", "phrase": "x", "mask": "m1.png"}]))
    hdf5.write_shard(pictures / "0.h5", [load(record)])
    image = hdf5.read_image(pictures / "0.h5", "a.jpg")
    assert image.shape == (5, 7, 3)
    assert abs(image.astype(int) - [255, 0, 0]).max() <= 10


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda root: (root / "a.png").unlink(), r"a\.png \[a\.png\]: no such file"),
        (lambda root: (root / "m2.png").write_text("<html>404"), r"m2\.png \[a\.png\]: not a picture"),
        (lambda root: Image.new("1", (7, 6)).save(root / "m2.png"), r"m2\.png \[a\.png\]: the mask is 7 x 6 pixels"),
        (lambda root: Image.new("RGB", (7, 6)).save(root / "a.png"), r"m1\.png .* its picture 7 x 6 as displayed"),
    ],
)
def test_a_bad_file_is_that_samples_fault(pictures: Path, spoil: Callable[[Path], object], reason: str) -> None:
    first, second = plan(as_jsonl(pictures, ROWS))
    spoil(pictures)
    with pytest.raises(BadSample, match=reason) as caught:
        load(first)
    assert caught.value.sample == "a.png"
    assert load(second).id == "b.png"


def test_declared_sizes_are_held_against_the_picture(pictures: Path) -> None:
    row = {"image": "a.png", "phrase": "x", "mask": "m1.png", "width": 5, "height": 7}
    (record,) = plan(as_csv(pictures, [row]))
    with pytest.raises(BadSample, match=r"a\.png .*: is 7 x 5 pixels as displayed; .*phrases\.csv says 5 x 7"):
        load(record)


@pytest.mark.fault("h5-key-05", part="ingest")
def test_a_lone_surrogate_is_refused_with_image_and_caption(pictures: Path) -> None:
    (record,) = plan(as_jsonl(pictures, [{"image": "a.png", "phrase": "a\ud800", "mask": "m1.png"}]))
    with pytest.raises(BadSample, match=r"\[a\.png\]: the caption 'a\\ud800' isn't Unicode text"):
        load(Record.from_json(record.to_json()))


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("index.json", "[]", r"index\.json: must be"),
        ("index.json", '{"images": {}}', r"index\.json: must be"),
        ("index.json", '{"images": []}', "names no picture"),
        ("index.json", '{"images": [{"image": "a.png"}]}', r"images\[0\]: 'phrases' must be a list, this is None"),
        ("index.json", '{"images": [7]}', r"images\[0\]: must be an object, this is 7"),
        ("index.json", '{"images": [{"image": 7, "phrases": []}]}', r"images\[0\]: 'image' must be text, this is 7"),
        (
            "index.json",
            '{"images": [{"image": "a", "phrases": [{"phrase": "x"}]}]}',
            r"phrases\[0\]: 'mask' must be text",
        ),
        ("index.json", "{", r"index\.json: not whole JSON .*cut short"),
        ("phrases.jsonl", '{"image": "a", "mask": "m"}', r"line 1: 'phrase' must be text, this is None"),
        ("phrases.jsonl", '\n{"image"', "line 2: not JSON"),
        ("phrases.jsonl", '{"image": "a", "width": "x", "height": 1}', "line 1: 'height' and 'width' must be whole"),
        ("phrases.jsonl", '{"image": "a", "width": 4}', "line 1: 'height' and 'width' must be whole"),
        ("phrases.jsonl", b'{"image": "caf\xe9"}', "can't be read .*utf-8"),
        ("phrases.jsonl", '{"image": "a", "split": "x"}\n{"image": "a"}', "line 2: id 'a' came before .* split"),
        ("phrases.csv", "image,caption\na,b", "lacks the columns mask, phrase; it has image, caption"),
        ("phrases.csv", "image,phrase,mask\na.png,the left, one,m.png", "line 2: too many fields; quote"),
        ("phrases.csv", "image,phrase,mask\na.png,dog", "line 2: 'mask' must be text, this is None"),
        ("phrases.csv", 'image,phrase,mask\n"a.png,dog', "can't be read"),
        ("phrases.csv", "", "lacks the columns"),
        ("phrases.txt", "", "a list of phrases is .json, .jsonl or .csv"),
        ("notes", "", "can't be read|a list of phrases is"),
    ],
)
def test_a_bad_list_is_named_with_its_row(tmp_path: Path, name: str, text: str | bytes, reason: str) -> None:
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError, match=reason) as caught:
        plan(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)


def test_a_folder_must_have_one_list(pictures: Path) -> None:
    with pytest.raises(DataError, match=r"needs exactly one of index\.json, .*; it has none"):
        plan(pictures)
    as_csv(pictures, ROWS)
    as_jsonl(pictures, ROWS)
    with pytest.raises(DataError, match=r"it has phrases\.jsonl, phrases\.csv"):
        plan(pictures)
    with pytest.raises(DataError, match="can't be read"):
        plan(pictures / "gone.json")


@pytest.mark.fault("image-07", part="batch")
@pytest.mark.fault("image-09", part="batch")
@pytest.mark.fault("image-10", part="ingest")
def test_a_batch_names_the_bad_pictures_and_keeps_the_rest(pictures: Path) -> None:
    whole = (pictures / "a.png").read_bytes()
    bomb = whole[:16] + (20_000).to_bytes(4, "big") * 2 + whole[24:]  # its checksum is wrong, its size is read first
    spoilt = {"bomb.png": bomb, "half.png": whole[: len(whole) // 2], "page.jpg": b"<html>404", "none.png": b""}
    for name, data in spoilt.items():
        (pictures / name).write_bytes(data)
    rows = [{"image": n, "phrase": "x", "mask": "m1.png"} for n in (*spoilt, "a.png", "b.png")]
    bad, good = {}, []
    for record in plan(as_jsonl(pictures, rows)):
        try:
            good.append(load(record))
        except BadSample as error:
            bad[error.sample] = error.file
    assert bad == {name: str(pictures / name) for name in spoilt}
    assert hdf5.write_shard(pictures / "0.h5", good) == 2


def test_all_photographs_and_masks_come_back_exactly(shared_data: Path, tmp_path: Path) -> None:
    """124 photographs with 650 masks: through the list, into HDF5 and back, against Pillow's own reading."""
    root = shared_data / "coco_photos"
    listed = json.loads((root / "index.json").read_text())["images"]
    planned = plan(root / "index.json")
    assert len(planned) == len(listed) == 124
    assert hdf5.write_shard(tmp_path / "photos.h5", map(load, planned)) == 124
    reader = hdf5.Reader(tmp_path)
    for entry in listed:
        sample = reader.sample("photos.h5", str(entry["image_id"]))
        assert np.array_equal(sample.image, np.asarray(Image.open(root / entry["image"]).convert("RGB")))
        assert [p.caption for p in sample.phrases] == [p["phrase"] for p in entry["phrases"]]
        for phrase, truth in zip(sample.phrases, entry["phrases"], strict=True):
            assert np.array_equal(phrase.mask, np.asarray(Image.open(root / truth["mask"])).astype(np.uint8))
            assert phrase.mask.mean() == pytest.approx(truth["area_frac"], abs=1e-5)
    table = hdf5.build_index(tmp_path)
    assert sum(table["n_phrases"].to_pylist()) == 650
