"""Verify: whole folders pass, and each damage is found."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from rlfseg import cli, hdf5, images
from rlfseg.config import ASSETS
from rlfseg.datasets.shapes import draw_scene
from rlfseg.errors import DataError
from rlfseg.pipeline.prepare import PHRASES
from rlfseg.pipeline.verify import verified
from tests.pipeline.stored import prepared, run, scene, stage_of


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
