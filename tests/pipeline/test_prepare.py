"""prepare as users type it: a data set with gaps becomes shards on Ray, and every gap is said."""

from __future__ import annotations

import errno
import json
import os
from dataclasses import replace
from functools import partial
from pathlib import Path

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from rlfseg import cli, hdf5
from rlfseg.config import PrepareConfig, ShapesConfig
from rlfseg.datasets import records, sources
from rlfseg.errors import BadSample, DataError
from rlfseg.pipeline import prepare
from rlfseg.pipeline.folders import require_finished
from rlfseg.pipeline.prepare import PHRASES, ShardWriter, drawn
from rlfseg.pipeline.rows import Attempts
from rlfseg.pipeline.stages import Summary
from tests.pipeline import works

SQUARE = [[2, 2], [2, 6], [6, 6], [6, 2]]


def phrasecut(root: Path, pictures: int = 12) -> Path:
    """PhraseCut's layout: 3 pictures missing, 5 unused, 1 of another size, 1 phrase without a polygon, 1 with half."""
    (root / "images").mkdir(parents=True)
    names = [n for n in range(pictures) if n not in (1, 5, 9)] + list(range(900, 905))
    for n in names:
        Image.new("RGB", (11 if n == 7 else 10, 8), (n % 256, 0, 0)).save(root / "images" / f"{n}.jpg")
    sizes = [{"image_id": n, "coco_id": 100 + n, "width": 10, "height": 8} for n in range(pictures)]
    polygons = {(3, 1): [[]], (4, 0): [[SQUARE, [[1, 1]]]]}
    structures = ({"name": "foothills", "type": "name"}, {"name": "dog", "type": "attribute"})
    tasks = [
        {"task_id": f"{n}__{k}", "image_id": n, "phrase": "hill", "Polygons": polygons.get((n, k), [[SQUARE]])}
        | {"phrase_structure": structures[k]}
        for n in range(pictures)
        for k in range(2)
    ]
    (root / "image_data_split.json").write_text(json.dumps(sizes))
    (root / "refer_val.json").write_text(json.dumps(tasks))
    return root


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return phrasecut(tmp_path_factory.mktemp("phrasecut"))


@pytest.fixture(scope="module")
def out(source: Path, ray: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("prepared") / "val"
    assert cli.main("prepare", flags(source, out)) == cli.REFUSED_SOME
    return out


def flags(source: Path, out: Path, *more: str) -> list[str]:
    known = ["--source=phrasecut", "--splits=[val]", "--images_per_shard=3", "--on_error=skip", "--exclude_ids=11"]
    return [*known, f"--path={source}", f"--out={out}", *more]


@pytest.mark.fault("ingest-03")
def test_what_is_missing_unused_excluded_or_short_is_counted_and_said(out: Path) -> None:
    done = require_finished(out)
    index = hdf5.read_index(out)
    assert (done["rows_in"], done["rows_out"], done["phrases"]) == (11, 7, 13)
    assert sorted(done["refused"]) == ["1", "5", "7", "9"]
    assert "is 11 x 8 pixels as displayed" in done["refused"]["7"]
    assert sorted(index["id"].to_pylist()) == ["0", "10", "2", "3", "4", "6", "8"]
    assert dict(zip(index["id"].to_pylist(), index["coco_id"].to_pylist(), strict=True))["4"] == "104"
    report = done["report"]
    assert report["missing"] == ["1.jpg", "5.jpg", "9.jpg"]
    assert report["unused"]["count"] == 5
    assert report["excluded"] == ["11"]
    assert report["skipped"] == {"3: 3__1": "no outline that covers a pixel"}
    assert report["partly"] == {"4: 4__0": "1 polygons"}
    assert report["splits"]["val"] == {
        "found": {"images": 12, "phrases": 24},
        "official": {"images": 2_971, "phrases": 20_316},
    }
    sorts = {row["id"]: (row["kind"], row["phrase_type"]) for row in index.to_pylist()}
    assert sorts["0"] == (["stuff", "object"], ["name", "attribute"])
    assert sorts["3"] == (["stuff"], ["name"])
    assert pq.read_table(out / PHRASES)["task"].to_pylist() == [f"{n}__{k}" for n in range(12) for k in range(2)]


def test_shards_name_their_source_and_rule_and_hold_the_masks(out: Path, source: Path) -> None:
    shards = sorted(out.glob("*.h5"))
    assert len(shards) == 3  # 8 pictures on disk, 3 a shard
    for shard in shards:
        with h5py.File(shard) as file:
            assert dict(file.attrs) == {"source": "PhraseCut", "rasteriser": "pil", "rlfseg_schema": 1}
    for row in hdf5.read_index(out).to_pylist():
        sample = hdf5.read_sample(out / row["shard"], row["id"])
        assert np.array_equal(sample.image, np.asarray(Image.open(source / "images" / f"{row['id']}.jpg")))
        assert [p.task for p in sample.phrases] == [f"{row['id']}__{k}" for k in range(2)][
            : 1 if row["id"] == "3" else 2
        ]
        for phrase in sample.phrases:
            assert phrase.mask.sum() == phrase.mask[2:7, 2:7].sum() == 25


def test_again_it_repeats_nothing_and_tells_the_same(
    out: Path, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {p.name: p.stat().st_mtime_ns for p in out.iterdir()}
    assert cli.main("prepare", flags(source, out)) == cli.REFUSED_SOME
    said = capsys.readouterr().out
    assert "11 in, 7 out, 4 refused, 11 of them done before" in said
    assert "val is not the official split: 12 images instead of 2,971 and 24 phrases instead of 20,316" in said
    assert "missing: 3 pictures are not on disk: 1.jpg, 5.jpg, 9.jpg" in said
    assert "unused: 5 pictures that no list names: 900.jpg" in said
    assert "exclude_ids: 1 of 1 ids are in this set" in said
    assert "skipped: 1 phrases can't be drawn: 3: 3__1 (no outline that covers a pixel)" in said
    assert "partly: 1 phrases are drawn without a part: 4: 4__0 (1 polygons)" in said
    assert {p.name: p.stat().st_mtime_ns for p in out.iterdir()} == before


@pytest.mark.parametrize("setting", ["--rasteriser=pycocotools", "--exclude_ids=10", "--splits=[]"])
def test_another_rule_or_choice_is_another_job(
    out: Path, source: Path, capsys: pytest.CaptureFixture[str], setting: str
) -> None:
    assert cli.main("prepare", flags(source, out, setting)) == 1
    assert f"was begun with other settings: {setting[2:].split('=')[0]} (" in capsys.readouterr().err


def test_other_annotations_under_the_same_path_are_another_job(
    out: Path, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = source / "refer_val.json"
    known = path.read_text()
    try:
        path.write_text(known.replace("6, 6", "6, 5"))
        assert cli.main("prepare", flags(source, out)) == 1
        assert "other settings: records (" in capsys.readouterr().err
    finally:
        path.write_text(known)


def test_a_picture_that_was_fetched_again_is_another_job(
    out: Path, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = source / "images" / "8.jpg"
    known = picture.stat()
    try:
        os.utime(picture, ns=(known.st_atime_ns, known.st_mtime_ns + 1))
        assert cli.main("prepare", flags(source, out)) == 1
        assert "other settings: files (" in capsys.readouterr().err
    finally:
        os.utime(picture, ns=(known.st_atime_ns, known.st_mtime_ns))
    assert cli.main("prepare", flags(source, out)) == cli.REFUSED_SOME


def test_a_picture_that_kills_its_process_is_lost_alone(ray: None, tmp_path: Path) -> None:
    scenes = ShapesConfig()
    job = prepare.Job(
        items=[str(n) for n in range(7)],
        load=partial(works.deadly_scene, "4"),
        id_of=partial(prepare._scene_id, scenes),
        shard="shard",
        attributes={},
        identity={},
        refused={"gone": "gone.jpg: no such file"},
    )
    config = PrepareConfig(out=str(tmp_path / "out"), images_per_shard=4, on_error="skip")
    summary = prepare.write(job, config)
    assert (summary.rows_in, summary.rows_out) == (8, 6)
    told = "prepare [train-000004]: its process died 2 times while working on it; if for want of memory, "
    assert summary.refused["train-000004"].startswith(told)
    assert sorted(summary.refused) == ["gone", "train-000004"]
    written = hdf5.read_index(tmp_path / "out")["id"].to_pylist()
    assert sorted(written) == [f"train-{n:06d}" for n in range(7) if n != 4]


def test_by_default_the_first_gap_stops_it(tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main("prepare", flags(source, tmp_path / "out", "--on_error=stop")) == 1
    assert "3 of 11 pictures can't be had: " in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# --- without Ray -----------------------------------------------------------------------------------------------------


def test_a_writer_keeps_the_good_and_names_the_bad(source: Path, tmp_path: Path) -> None:
    found = sources.survey(
        PrepareConfig(out="x", source="phrasecut", path=str(source), splits=("val",), on_error="skip")
    )
    items = [r.to_json() for r in found.records if r.id in ("3", "7", "8")]

    def load(item: str) -> records.Loaded:
        return records.load(records.Record.from_json(item), found.rule)

    (row,) = ShardWriter(tmp_path, load, prepare._record_id, {}, skip=True)([{"id": "shard-00000", "items": items}])
    assert (row["status"], row["images"]) == ("ok", 2)
    assert list(json.loads(row["refused"])) == ["7"]
    assert list(json.loads(row["skipped"])) == ["3: 3__1"]
    assert list(hdf5.iter_ids(tmp_path / "shard-00000.h5")) == ["3", "8"]
    (row,) = ShardWriter(tmp_path, load, prepare._record_id, {}, skip=False)([{"id": "shard-00000", "items": items}])
    assert row["status"].startswith("refused: ")


def test_a_disk_that_fails_refuses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stale(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ESTALE, "Stale file handle")

    def load(item: str) -> records.Loaded:
        return records.load(records.Record(id=item, image=item, size=None, split="", phrases=(), source="x"), "pil")

    monkeypatch.setattr(Image, "open", stale)
    with pytest.raises(DataError, match=r"^a\.png can't be read: Stale file handle; start again") as caught:
        ShardWriter(tmp_path, load, str, {}, skip=True)([{"id": "shard-00000", "items": ["a.png"]}])
    assert not isinstance(caught.value, BadSample)
    assert list(tmp_path.glob("*.h5")) == []


def test_every_image_of_a_refused_shard_is_refused(tmp_path: Path) -> None:
    """And an image that is neither written nor refused is an error."""
    parts = {f"shard-{n:05d}": [str(3 * n + k) for k in range(3)] for n in range(3)}
    items = [item for part in parts.values() for item in part]
    job = prepare.Job(items=items, load=scene, id_of=name, shard="shard", attributes={}, identity={})
    rows = ShardWriter(tmp_path, scene, name, {}, skip=True)(
        [{"id": shard, "items": parts[shard]} for shard in list(parts)[:2]]
    )
    (tmp_path / "data").mkdir()
    pq.write_table(pa.Table.from_pylist(rows, schema=prepare.SCHEMA), tmp_path / "data" / "0.parquet")
    counts = prepare._index(tmp_path, {"refused": {"shard-00002": "the disk"}}, job, parts)
    assert (counts["rows_in"], counts["rows_out"]) == (9, 5)
    assert counts["refused"] == {
        "train-000005": "nowhere: no such scene",
        **{f"train-{n:06d}": "its shard shard-00002: the disk" for n in (6, 7, 8)},
    }
    with pytest.raises(DataError, match="of 9 images 5 were written and 1 refused"):
        prepare._index(tmp_path, {"refused": {}}, job, dict(list(parts.items())[:2]))


def scene(item: str) -> records.Loaded:
    if item == "5":
        raise BadSample("no such scene", file="nowhere")
    return records.Loaded(drawn(int(item), ShapesConfig()), {}, {})


name = partial(prepare._scene_id, ShapesConfig())


@pytest.mark.parametrize(
    ("left_by_the_dead", "refused"),
    [
        ({}, []),
        ({"train-000001": 1}, []),  # once: it may have been the node
        ({"train-000001": 2}, ["train-000001"]),
        ({"train-000001": 2, "train-000002": 2}, ["train-000001", "train-000002"]),
    ],
)
def test_a_writer_knows_where_earlier_ones_died(
    tmp_path: Path, left_by_the_dead: dict[str, int], refused: list[str]
) -> None:
    notes = tmp_path / "_attempts" / "items"
    notes.mkdir(parents=True)
    (notes / "x.json").write_text(json.dumps(left_by_the_dead))
    shard = {"id": "a", "items": ["0", "1", "2"]}
    (row,) = ShardWriter(tmp_path, scene, name, {}, skip=True)([shard])
    assert (row["images"], list(json.loads(row["refused"]))) == (3 - len(refused), refused)
    assert [note.name for note in notes.iterdir()] == ["x.json"]
    Attempts(notes).forgive()  # as whoever starts the job again does: whatever killed it may have been anything
    (row,) = ShardWriter(tmp_path, scene, name, {}, skip=True)([shard])
    assert row["images"] == 3


def test_phrases_that_say_or_show_nothing_are_kept_and_named(tmp_path: Path) -> None:
    plain = drawn(0, ShapesConfig())
    first, second, *rest = plain.phrases
    odd = replace(
        plain, phrases=(replace(first, caption=" "), replace(second, mask=second.mask * 0, instances=None), *rest)
    )
    writer = ShardWriter(tmp_path, lambda item: records.Loaded(odd, {}, {}), str, {}, skip=True)
    (row,) = writer([{"id": "a", "items": ["0"]}])
    assert json.loads(row["empty"]) == {f"{plain.id}: 0": "no text", f"{plain.id}: 1": "no pixel"}
    assert len(hdf5.read_sample(tmp_path / "a.h5", plain.id).phrases) == len(plain.phrases)


def test_whatever_file_changes_it_is_another_job(tmp_path: Path) -> None:
    """A picture or a mask with another time or size; the list may be touched."""
    Image.new("RGB", (10, 8)).save(tmp_path / "a.png")
    Image.new("1", (10, 8), 1).save(tmp_path / "m.png")
    (tmp_path / "index.json").write_text(
        json.dumps({"images": [{"image": "a.png", "phrases": [{"phrase": "x", "mask": "m.png"}]}]})
    )
    config = PrepareConfig(out="x", source="folder", path=str(tmp_path))
    known = prepare._converting(config).identity
    assert prepare._converting(config).identity == known
    os.utime(tmp_path / "index.json", ns=(7, 7))
    assert prepare._converting(config).identity == known
    for file in ("a.png", "m.png"):
        os.utime(tmp_path / file, ns=(7, 7))
        now = prepare._converting(config).identity
        assert {k for k in now if now[k] != known[k]} == {"files"}
        (tmp_path / file).write_bytes((tmp_path / file).read_bytes() + b"\0")
        os.utime(tmp_path / file, ns=(7, 7))
        known, before = prepare._converting(config).identity, now
        assert known["files"] != before["files"]


def test_drawn_scenes_are_samples() -> None:
    exact, coarse = (drawn(3, ShapesConfig(labels=labels)) for labels in ("exact", "coarse"))  # type: ignore[arg-type]
    assert exact.id == coarse.id == "train-000003"
    assert not all(np.array_equal(a.mask, b.mask) for a, b in zip(exact.phrases, coarse.phrases, strict=True))


def test_names_that_no_terminal_can_show_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    refused, notes = {"\ud800.png": "\udcff.png: no such file"}, ("missing: \udcff.png",)
    cli._show(Summary(name="x", out="y", rows_in=1, rows_out=0, refused=refused, seconds=0, notes=notes))
    said = capsys.readouterr().out
    assert r"refused \ud800.png: \udcff.png: no such file" in said
    assert r"missing: \udcff.png" in said
