"""inspect, verify and audit as users type them; verify against every kind of damage that was done on purpose."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from rlfseg import cli, hdf5, images
from rlfseg.config import ASSETS, RefineConfig
from rlfseg.datasets.shapes import draw_scene
from rlfseg.errors import DataError
from rlfseg.hdf5 import Labelled, Sample
from rlfseg.pipeline import audit, refine
from rlfseg.pipeline.folders import write_json
from rlfseg.pipeline.prepare import PHRASES
from rlfseg.pipeline.refine import Refiner
from rlfseg.pipeline.samples import LoadSample, open_samples
from rlfseg.pipeline.verify import verified
from tests.test_preflight import child_that


def scene(n: int, *, coco_id: str | None = None, split: str = "train") -> Sample:
    drawn = draw_scene(n, split=split)  # type: ignore[arg-type]
    phrases = tuple(Labelled(caption=p.caption, mask=p.mask, instances=p.instances) for p in drawn.phrases)
    return Sample(id=f"{split}/{n}", image=drawn.image, phrases=phrases, coco_id=coco_id)


def prepared(folder: Path, samples: list[Sample], per_shard: int = 4) -> Path:
    """What `prepare` leaves, but for its manifest."""
    folder.mkdir()
    for n in range(0, len(samples), per_shard):
        hdf5.write_shard(folder / f"shard-{n:05d}.h5", samples[n : n + per_shard])
    hdf5.build_index(folder)
    phrases = pa.table({"id": [s.id for s in samples], "task": [f"{s.id}__1" for s in samples]})
    pq.write_table(phrases, folder / PHRASES, write_page_checksum=True)
    counts = dict.fromkeys(("rows_in", "rows_out", "phrase_rows"), len(samples))
    for name in ("_STARTED.json", "_SUCCESS.json"):
        write_json(folder / name, {"schema": 1, "hash": "x", "identity": {}, **counts})
    return folder


def stage_of(folder: Path, table: pa.Table, **success: Any) -> Path:
    """What a stage leaves."""
    (folder / "data").mkdir(parents=True)
    pq.write_table(table, folder / "data" / "0.parquet", write_page_checksum=True)
    for name in ("_STARTED.json", "_SUCCESS.json"):
        write_json(folder / name, {"schema": 1, "hash": "x", "identity": {}, "rows_in": table.num_rows, **success})
    return folder


def predictions() -> pa.Table:
    mask = draw_scene(0).phrases[0].mask
    row = {
        "id": "a.png",
        "status": "ok",
        "height": mask.shape[0],
        "width": mask.shape[1],
        "captions": ["dog", "cat"],
        "masks": [images.rle_encode(mask), None],
        "areas": [int(mask.sum()), None],
        "outcomes": ["ok", "failed: the network gave NaN"],
    }
    refused = {"id": "b.png", "status": "refused: no picture"}
    return pa.Table.from_pylist([row, {**row, "id": "c.png"}, refused], schema=STAGE)


STAGE = pa.schema(
    [("id", pa.string()), ("status", pa.string()), ("height", pa.int32()), ("width", pa.int32())]
    + [(name, pa.list_(pa.string())) for name in ("captions", "masks", "outcomes")]
    + [("areas", pa.list_(pa.int64()))]
)


def latents() -> pa.Table:
    z = np.linspace(-1, 1, 8 * 4 * 4, dtype=np.float16).tobytes()
    row = {"id": "1", "status": "ok", "captions": ["a"], "shape": [8, 4, 4], "z1": z, "z0": [z], "z0_refined": [None]}
    schema = pa.schema(
        [("id", pa.string()), ("status", pa.string()), ("captions", pa.list_(pa.string()))]
        + [("shape", pa.list_(pa.int32())), ("z1", pa.binary())]
        + [(name, pa.list_(pa.binary())) for name in ("z0", "z0_refined")]
    )
    return pa.Table.from_pylist([row, {**row, "id": "2"}], schema=schema)


def run(capsys: pytest.CaptureFixture[str], *line: object) -> tuple[int, str]:
    """Exit code, and everything that was said."""
    code = cli.main(str(line[0]), list(map(str, line[1:])))
    said = capsys.readouterr()
    return code, said.out + said.err


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


# --- verify ----------------------------------------------------------------------------------------------------------


def test_verify_reads_everything_that_is_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = prepared(tmp_path / "a", [scene(n) for n in range(6)])
    made = [
        folder,
        folder / "shard-00000.h5",
        stage_of(tmp_path / "b", predictions()),
        stage_of(tmp_path / "c", latents()),
        ASSETS / "adapter",
        ASSETS / "base" / "vae" / "diffusion_pytorch_model.safetensors",
    ]
    Image.fromarray(scene(0).image).save(tmp_path / "p.png")
    code, said = run(capsys, "verify", *made, tmp_path / "p.png")
    assert code == 0
    assert f"{folder}: 6" in said
    assert f"{made[1]}: 4" in said
    assert f"{made[2]}: 3" in said
    assert f"{made[3]}: 2" in said
    assert "all of it is whole" in said


def flip(path: Path, at: int | None = None, find: bytes = b"") -> None:
    """One bit of a file."""
    data = bytearray(path.read_bytes())
    place = data.index(find) if find else len(data) // 2 if at is None else at
    data[place] ^= 16
    path.write_bytes(data)


def _pixels(folder: Path) -> None:
    flip(folder / "shard-00000.h5", find=scene(1).image.tobytes()[:200])


def _shard_cut(folder: Path) -> None:
    path = folder / "shard-00004.h5"
    path.write_bytes(path.read_bytes()[:-100])


def _shard_gone(folder: Path) -> None:
    (folder / "shard-00004.h5").unlink()


def _shard_stray(folder: Path) -> None:
    hdf5.write_shard(folder / "more.h5", [scene(77)])


def _index_old(folder: Path) -> None:
    table = hdf5.read_index(folder)
    captions = pa.array([["other"]] * table.num_rows, pa.list_(pa.string()))
    pq.write_table(table.set_column(table.column_names.index("captions"), "captions", captions), folder / hdf5.INDEX)


def _index_bits(folder: Path) -> None:
    flip(folder / hdf5.INDEX, at=60)


def _half_gone(folder: Path) -> None:
    """Half of the shards, and an index that knows of no more."""
    (folder / "shard-00004.h5").unlink()
    hdf5.build_index(folder)


def _phrases_bits(folder: Path) -> None:
    flip(folder / PHRASES, at=40)


def _phrases_gone(folder: Path) -> None:
    (folder / PHRASES).unlink()


def _phrases_fewer(folder: Path) -> None:
    pq.write_table(pq.read_table(folder / PHRASES).slice(1), folder / PHRASES, write_page_checksum=True)


def _unfinished(folder: Path) -> None:
    (folder / "_SUCCESS.json").unlink()


def _success_cut(folder: Path) -> None:
    (folder / "_SUCCESS.json").write_text('{"schema": 1')


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (_pixels, r"shard-00000\.h5 \[train/1\]: was changed or damaged since it was written"),
        (_shard_cut, r"shard-00004\.h5: not a whole HDF5 file"),
        (_shard_gone, r"shard-00004\.h5: no such file"),
        (_shard_stray, r"more\.h5 \[train/77\]: this sample is not in index\.parquet"),
        (_index_old, r"shard-0000\d\.h5 \[train/\d\]: index\.parquet says other things"),
        (_index_bits, r"index\.parquet: not a whole Parquet file"),
        (_half_gone, r"index\.parquet: holds 4 samples, _SUCCESS\.json says 6"),
        (_phrases_bits, r"phrases\.parquet: damaged"),
        (_phrases_gone, r"phrases\.parquet: damaged"),
        (_phrases_fewer, r"phrases\.parquet: holds 5 rows, _SUCCESS\.json says 6"),
        (_unfinished, r"is unfinished"),
        (_success_cut, r"_SUCCESS\.json: damaged"),
    ],
)
def test_verify_names_the_damage_in_samples(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[Path], None], reason: str
) -> None:
    folder = prepared(tmp_path / "a", [scene(n) for n in range(6)])
    damage(folder)
    code, said = run(capsys, "verify", folder)
    assert code == 1
    assert len(said.splitlines()) == 1
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(said)


def changed(table: pa.Table, column: str, value: Any) -> pa.Table:
    """The second row's value is another."""
    rows = table.to_pylist()
    rows[1] = rows[1] | {column: value}
    return pa.Table.from_pylist(rows, schema=table.schema)


def _z(dtype: str, count: int, value: float) -> bytes:
    return np.full(count, value, dtype).tobytes()


@pytest.mark.parametrize(
    ("table", "reason"),
    [
        (lambda: changed(predictions(), "masks", ["0000", None]), r"\[c\.png\]: RLE counts"),
        (lambda: changed(predictions(), "areas", [7, None]), r"\[c\.png\]: a mask has \d+ pixels, its row says 7"),
        (lambda: changed(predictions(), "masks", [None]), r"\[c\.png\]: masks holds 1 values for 2 phrases"),
        (lambda: changed(predictions(), "id", "a.png"), r"\[a\.png\]: this id was written twice"),
        (lambda: changed(latents(), "z1", b"abc"), r"\[2\]: a latent has 3 bytes, its shape is \[8, 4, 4\]"),
        (lambda: changed(latents(), "z0", [_z("<f2", 128, np.nan)]), r"\[2\]: a latent holds NaN"),
        (lambda: changed(latents(), "z0_refined", [_z("<f2", 128, np.inf)]), r"\[2\]: a latent holds NaN or infinity"),
        (lambda: changed(latents(), "shape", None), r"\[2\]: a latent has 256 bytes, its shape is None"),
        (lambda: latents().set_column(0, "id", pa.array([1, 2])), r"the column id must be string, this is int64"),
    ],
)
def test_verify_names_the_damage_in_a_stage(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], table: Callable[[], pa.Table], reason: str
) -> None:
    code, said = run(capsys, "verify", stage_of(tmp_path / "a", table()))
    assert code == 1
    with pytest.raises(AssertionError, match=r"0\.parquet.*" + reason):
        raise AssertionError(said)


def test_verify_counts_the_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, said = run(capsys, "verify", stage_of(tmp_path / "a", latents(), rows_in=3))
    assert (code, "holds 2 rows, _SUCCESS.json says 3" in said) == (1, True)


def assert_no_bit_is_lost(path: Path, step: int) -> None:
    """Bits of a Parquet file's pages, flipped in turn: what was written is read, or the file is named."""
    whole, table = path.read_bytes(), pq.read_table(path)
    pages_end = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
    noticed = 0
    for at in range(4, pages_end, step):
        path.write_bytes(whole)
        flip(path, at=at)
        try:
            verified(path)
        except DataError as error:
            noticed += str(path) in str(error)
        else:
            assert pq.read_table(path).equals(table), at
    assert noticed > pages_end // step // 8
    path.write_bytes(whole)


def test_every_bit_of_a_latent_counts(tmp_path: Path) -> None:
    """Without checksums of pages, a flipped bit in a latent's bytes would be another latent."""
    assert_no_bit_is_lost(stage_of(tmp_path / "a", latents()) / "data" / "0.parquet", step=3)


def test_the_stages_write_checksums(ray: ModuleType, tmp_path: Path) -> None:
    assert cli.main("prepare", [f"--out={tmp_path / 'a'}", "--shapes.count=2", "--images_per_shard=2"]) == 0
    assert cli.main("verify", [str(tmp_path / "a")]) == 0
    (path,) = (tmp_path / "a" / "data").glob("*.parquet")
    assert_no_bit_is_lost(path, step=17)
    assert_no_bit_is_lost(tmp_path / "a" / hdf5.INDEX, step=23)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda f: (f / "adapter_model.safetensors").write_bytes(b"x" * 50), r"adapter_model\.safetensors: damaged"),
        (lambda f: (f / "adapter_model.safetensors").unlink(), "has no weights in safetensors"),
        (lambda f: (f / "rlfseg.yaml").write_bytes(b"base: \xff"), r"rlfseg\.yaml: 'utf-8'"),
        (lambda f: (f / "rlfseg.yaml").write_text("base: tiny"), r"rlfseg\.yaml: .*resolution"),
    ],
)
def test_verify_names_the_damage_in_an_adapter(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[Path], None], reason: str
) -> None:
    folder = Path(shutil.copytree(ASSETS / "adapter", tmp_path / "a"))
    damage(folder)
    code, said = run(capsys, "verify", folder)
    assert code == 1
    with pytest.raises(AssertionError, match=f"(?s){reason}"):
        raise AssertionError(said)


def test_verify_finds_weights_that_are_no_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path(shutil.copytree(ASSETS / "adapter", tmp_path / "a"))
    weights = load_file(folder / "adapter_model.safetensors")
    name = sorted(weights)[3]
    weights[name] = weights[name].copy()
    weights[name].flat[5] = np.nan
    save_file(weights, folder / "adapter_model.safetensors")
    code, said = run(capsys, "verify", folder)
    assert (code, f"{name} holds NaN or infinity" in said) == (1, True)


def test_verify_reads_a_list_with_its_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    drawn = scene(0)
    Image.fromarray(drawn.image).save(tmp_path / "a.png")
    Image.fromarray(drawn.phrases[0].mask).save(tmp_path / "m.png")
    (tmp_path / "phrases.jsonl").write_text('{"image": "a.png", "phrase": "dog", "mask": "m.png"}\n')
    code, said = run(capsys, "verify", tmp_path / "phrases.jsonl")
    assert (code, "phrases.jsonl: 1" in said) == (0, True), said
    (tmp_path / "m.png").write_bytes((tmp_path / "m.png").read_bytes()[:60])
    code, said = run(capsys, "verify", tmp_path / "phrases.jsonl")
    assert (code, "m.png [a.png]: can't be decoded" in said) == (1, True), said


SQUARE = [[1, 1], [8, 1], [8, 7]]
LISTED = {  # file: what it holds, how many objects, what to break, and what is said then
    "refer_train.json": ([{"task_id": "1__2", "Polygons": [[SQUARE]], "phrase": "dog"}] * 3, 3, "]", "closing ]"),
    "instances_val2017.json": (
        {
            "images": [{"id": 1, "file_name": "gone.jpg", "width": 3, "height": 2}],
            "annotations": [
                {"id": 8, "image_id": 1, "segmentation": [[0, 0, 1, 0, 1, 1]]},
                {"id": 9, "image_id": 1, "segmentation": {"size": [2, 3], "counts": [1, 5]}},
            ],
        },
        2,
        "5]",
        r"annotations\[1\], id 9: RLE counts \[1, 6\] don't describe",
    ),
    "panoptic_val2017.json": (
        {
            "images": [{"id": 1, "file_name": "gone.jpg", "width": 3, "height": 2}],
            "annotations": [{"image_id": 1, "file_name": "gone.png", "segments_info": [{"id": 1, "category_id": 1}]}],
        },
        1,
        "[{",
        "not whole JSON",
    ),
    "name_att_rel_count.json": ({"cat": [["dog", 7]], "att": [], "rel": []}, 1, "}", "not whole JSON"),
}


@pytest.mark.parametrize("name", LISTED)
def test_verify_reads_annotations_without_their_pictures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    tree, count, spoil, reason = LISTED[name]
    path = tmp_path / name
    path.write_text(json.dumps(tree))
    code, said = run(capsys, "verify", path)
    assert (code, f"{name}: {count}" in said) == (0, True), said
    head, found, tail = path.read_text().rpartition(spoil)
    assert found
    path.write_text(head + ("6]" if spoil == "5]" else "") + tail)
    code, said = run(capsys, "verify", path)
    assert code == 1
    with pytest.raises(AssertionError, match=name.replace(".", r"\.") + ".*" + reason):
        raise AssertionError(said)


def test_verify_reads_refs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "refs(unc).p"
    path.write_bytes(pickle.dumps([{"ref_id": 1}, {"ref_id": 2}], 2))
    code, said = run(capsys, "verify", path)
    assert (code, "refs(unc).p: 2" in said) == (0, True), said
    path.write_bytes(pickle.dumps([Path("x")], 2))
    code, said = run(capsys, "verify", path)
    assert (code, "nothing of it was run" in said) == (1, True), said


def test_verify_reads_the_real_annotations(shared_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [*(shared_data / "coco_instances").glob("*.json"), *(shared_data / "native_formats").rglob("*.json")]
    files += (shared_data / "native_formats").rglob("*.p")
    assert len(files) > 12
    code, said = run(capsys, "verify", *files)
    assert code == 0, said


def test_verify_refuses_what_it_does_not_know(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.doc").touch()
    (tmp_path / "b").mkdir()
    for name, reason in (("a.doc", "no kind of file"), ("gone.xyz", "no such file"), ("b", "holds nothing")):
        code, said = run(capsys, "verify", tmp_path / name)
        assert (code, reason in said) == (2, True), said


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
