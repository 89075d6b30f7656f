"""Inspect and audit, and faults of files through the commands."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import h5py
import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from rlfseg import cli, hdf5
from rlfseg.config import RefineConfig
from rlfseg.pipeline import audit, refine
from rlfseg.pipeline.refine import Refiner
from rlfseg.pipeline.samples import LoadSample, open_samples
from tests.pipeline.stored import prepared, run, scene, stage_of
from tests.test_preflight import child_that

# --- inspect ---------------------------------------------------------------------------------------------------------


def test_inspect_counts_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scenes = [scene(n, coco_id=str(n)) for n in range(6)]
    folder = prepared(tmp_path / "a", scenes)
    theirs = tmp_path / "theirs.h5"
    with h5py.File(theirs, "w") as file:
        file["9/image"], file["9/mask/white/black dog\x1b[2J"] = scenes[0].image, scenes[0].phrases[0].mask * 255
        file["10/image"] = scenes[0].image
    code, said = run(capsys, "inspect", folder, theirs, "--out", tmp_path / "out", "--pictures", 4)
    counts = json.loads((tmp_path / "out" / "contents.json").read_text())
    assert code == 3  # a sample is bad
    assert counts["files"] == 3
    assert counts["images"] == 7
    assert counts["phrases"] == 1 + sum(len(s.phrases) for s in scenes)
    assert counts["images_with_coco_id"] == 6
    assert counts["problems"] == [f"{theirs} [10]: has no group 'mask'"]
    areas = [p.mask.mean() for s in scenes for p in s.phrases] + [scenes[0].phrases[0].mask.mean()]
    assert counts["masks_by_share_of_image"]["to 10 %"] == sum(0.01 < a <= 0.1 for a in areas) > 0
    assert "7 out, 1 refused" in said
    assert "height: 64 to 64, median 64" in said
    assert "\x1b" not in said  # a caption can't move the cursor
    sheet = np.asarray(Image.open(tmp_path / "out" / "contact_sheet.png"))
    assert sheet.shape[2] == 3
    assert np.unique(sheet.reshape(-1, 3), axis=0).shape[0] > 100


def test_inspect_takes_files_that_are_no_hdf5(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.h5").write_bytes(b"<html>404")
    code, said = run(capsys, "inspect", tmp_path / "a.h5", "--out", tmp_path / "out")
    assert (code, "a.h5: not a whole HDF5 file" in said) == (3, True)
    assert not (tmp_path / "out" / "contact_sheet.png").exists()
    code, said = run(capsys, "inspect", tmp_path / "out", "--out", tmp_path / "out")
    assert (code, "holds no HDF5 file" in said) == (2, True)


def test_inspect_does_not_open_what_crashed_its_reader(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, ids in (("bad.h5", "0 poison"), ("good.h5", "2")):
        hdf5.write_shard(tmp_path / name, [replace(scene(n), id=i) for n, i in enumerate(ids.split())])
    monkeypatch.setattr(hdf5.child, "CHILD", child_that("os.abort()"))
    opened = list[str]()
    read = hdf5.read_sample
    monkeypatch.setattr(hdf5, "read_sample", lambda file, i: opened.append(Path(file).name) or read(file, i))
    code, said = run(capsys, "inspect", tmp_path / "bad.h5", tmp_path / "good.h5", "--out", tmp_path / "out")
    assert (code, "bad.h5: reading its sample 'poison' crashed (SIGABRT)" in said) == (3, True), said
    assert opened == ["good.h5"]


# --- audit -----------------------------------------------------------------------------------------------------------


@pytest.mark.fault("image-14")
def test_audit_finds_what_two_sets_share(ray: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train = prepared(tmp_path / "train", [scene(n, coco_id="900" if n == 5 else None) for n in range(8)])
    test = tmp_path / "test"
    test.mkdir()
    for n in (2, 6):
        suffix = "JPG" if n == 2 else "JPEG"  # listed in any case
        Image.fromarray(scene(n).image).resize((128, 128)).save(test / f"copy-{n}.{suffix}", quality=80)
    for n in range(3):
        Image.fromarray(scene(n, split="test").image).save(test / f"other-{n}.PNG")
    Image.fromarray(scene(9, split="test").image).save(test / "COCO_val2014_000000000900.jpg")
    (test / "broken.png").write_bytes(b"no picture")
    line = ["audit", train, test, f"--out={tmp_path / 'out'}", "--run.batch_size=3", "--similarity=0.95"]
    code, said = run(capsys, *line)
    assert code == 3  # a picture could not be compared
    report = json.loads((tmp_path / "out" / "audit.json").read_text())
    assert report["compared"] == {"train": 8, "test": 6}
    assert list(report["unreadable"]) == ["test/broken.png"]
    pairs = {(p["train"], p["test"], p["how"]) for p in report["pairs"]}
    assert pairs == {
        ("train/2", "copy-2.JPG", "picture"),
        ("train/6", "copy-6.JPEG", "picture"),
        ("train/5", "COCO_val2014_000000000900.jpg", "coco_id"),
    }
    assert (tmp_path / "out" / "exclude_ids.txt").read_text().splitlines() == ["train/2", "train/5", "train/6"]
    assert "15 in, 14 out, 1 refused" in said  # 8 samples and 7 files, whatever the case of their suffixes
    assert "shared_train_images: 3" in said
    assert np.asarray(Image.open(tmp_path / "out" / "pairs.png")).shape[1] == 2 * (384 + 10) + 10
    code, said = run(capsys, *line)
    assert "14 of them done before" in said or "15 of them done before" in said
    code, said = run(capsys, *line[:-1], "--similarity=0.5")
    assert (code, "similarity (0.95 then, 0.5 now)" in said) == (1, True)


@pytest.mark.parametrize("audited", ["pictures", "prepared"])
def test_what_an_audit_finds_prepare_leaves_out(
    ray: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], audited: str
) -> None:
    photos, test = tmp_path / "val2017", tmp_path / "test"
    for folder in (photos, test, tmp_path / "annotations"):
        folder.mkdir()
    for n in range(3):
        Image.fromarray(scene(n).image).save(photos / f"{n:012}.jpg", quality=95)
    Image.fromarray(scene(1).image).save(test / "copy.png")
    square = {"category_id": 18, "segmentation": [[9, 9, 9, 40, 40, 40]]}
    tree = {
        "images": [{"id": n, "file_name": f"{n:012}.jpg", "width": 64, "height": 64} for n in range(3)],
        "annotations": [{"id": n, "image_id": n, **square} for n in range(3)],
        "categories": [{"id": 18, "name": "dog"}],
    }
    (tmp_path / "annotations" / "instances_val2017.json").write_text(json.dumps(tree))
    line = ["prepare", "--source=coco", f"--path={tmp_path / 'annotations' / 'instances_val2017.json'}"]
    train = photos
    if audited == "prepared":
        train = tmp_path / "all"
        assert run(capsys, *line, f"--out={train}")[0] == 0
    assert run(capsys, "audit", train, test, f"--out={tmp_path / 'audit'}", "--similarity=0.95")[0] == 0
    listed = tmp_path / "audit" / "exclude_ids.txt"
    assert listed.read_text() == {"pictures": "000000000001.jpg\n", "prepared": "1\n"}[audited]
    code, said = run(capsys, *line, f"--exclude_ids={listed}", f"--out={tmp_path / 'out'}")
    assert code == 0, said
    kind = {"pictures": "file names", "prepared": "ids"}[audited]
    assert f"exclude_ids: 1 of 1 {kind} are in this set" in said
    assert sorted(hdf5.read_index(tmp_path / "out")["id"].to_pylist()) == ["0", "2"]


def test_audit_of_nothing_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a").mkdir()
    code, said = run(capsys, "audit", tmp_path / "a", tmp_path / "a", f"--out={tmp_path / 'out'}")
    assert (code, "train: " in said, "holds no pictures" in said) == (2, True, True)


def test_audit_knows_a_picture_that_was_fetched_again(tmp_path: Path) -> None:
    Image.new("RGB", (10, 8)).save(tmp_path / "a.png")
    rows, known = audit._pictures("train", tmp_path)
    os.utime(tmp_path / "a.png", ns=(7, 7))
    again, now = audit._pictures("train", tmp_path)
    assert again.equals(rows)
    assert {k for k in now if now[k] != known[k]} == {"files"}


def test_audit_names_a_file_whose_name_is_no_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (10, 8)).save(os.fsencode(tmp_path) + b"/\xff.png")
    code, said = run(capsys, "audit", tmp_path, tmp_path, f"--out={tmp_path / 'out'}")
    assert (code, r"the file name '\udcff.png' isn't Unicode; rename it" in said) == (1, True), said


def test_refined_samples_keep_their_coco_ids(tmp_path: Path) -> None:
    """So that an audit of a folder of `refine` still knows them."""
    folder = prepared(tmp_path / "a", [scene(n, coco_id=str(70 + n)) for n in range(2)])
    samples = open_samples(folder)
    refiner = Refiner(RefineConfig(samples="s", out="o"))
    table = pa.Table.from_pylist(refiner(list(map(LoadSample(folder), samples.rows.to_pylist()))), schema=refine.SCHEMA)
    refined = stage_of(tmp_path / "b", table, identity={"samples": str(folder)})
    rows, _ = audit._pictures("train", refined)
    assert {row["name"]: row["coco_id"] for row in rows.to_pylist()} == {"train/0": "70", "train/1": "71"}


# --- faults of files, through the commands ---------------------------------------------------------------------------


@pytest.mark.fault("h5-io-06")
def test_two_bad_files_of_ten_are_named_and_the_rest_is_converted(
    ray: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    for n in range(10):
        hdf5.write_shard(theirs / f"{n}.h5", [scene(n)])
    (theirs / "7.h5").write_bytes((theirs / "7.h5").read_bytes()[:9000])
    (theirs / "8.h5").write_bytes(b"")
    line = ["prepare", "--source=hdf5", f"--path={theirs}"]
    code, said = run(capsys, *line, f"--out={tmp_path / 'stopped'}")
    assert code == 1
    assert "7.h5" in said
    assert "8.h5" in said
    code, said = run(capsys, *line, f"--out={tmp_path / 'out'}", "--on_error=skip")
    assert code == 3
    assert "8 out, 2 refused" in said
    for name in ("7.h5", "8.h5"):
        assert f"{name}: not a whole HDF5 file" in said
    assert sorted(hdf5.read_index(tmp_path / "out")["id"].to_pylist()) == sorted(
        f"train/{n}" for n in range(10) if n not in (7, 8)
    )
    assert cli.main("verify", [str(tmp_path / "out")]) == 0


@pytest.mark.fault("h5-io-01")
def test_a_reader_goes_to_rays_workers(ray: ModuleType, tmp_path: Path) -> None:
    folder = prepared(tmp_path / "a", [scene(n) for n in range(6)])
    reader = hdf5.Reader(folder)
    first = reader.sample("shard-00000.h5", "train/0")  # its handle is open now

    def digest(held: Any, n: int) -> int:
        return int(held.image(f"shard-{n // 4 * 4:05d}.h5", f"train/{n}").astype(int).sum())

    class Digests:
        def __init__(self, held: hdf5.Reader):
            self.held = held

        def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
            return {"n": batch["id"], "sum": np.array([digest(self.held, int(n)) for n in batch["id"]])}

    truth = [int(scene(n).image.astype(int).sum()) for n in range(6)]
    assert int(first.image.astype(int).sum()) == truth[0]
    held = ray.put(reader)
    assert ray.get([ray.remote(digest).remote(held, n) for n in range(6)]) == truth
    done = ray.data.range(6).map_batches(
        Digests, fn_constructor_args=(reader,), batch_size=2, compute=ray.data.ActorPoolStrategy(size=2)
    )
    assert [row["sum"] for row in sorted(done.take_all(), key=lambda row: row["n"])] == truth
