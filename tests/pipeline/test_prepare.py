"""prepare as users type it: a data set with gaps becomes shards on Ray, and every gap is said."""

from __future__ import annotations

import json
from pathlib import Path

import h5py
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from rlfseg import cli, hdf5
from rlfseg.config import ShapesConfig
from rlfseg.datasets import records, sources
from rlfseg.pipeline.folders import require_finished
from rlfseg.pipeline.prepare import PHRASES, ShardWriter, drawn
from rlfseg.pipeline.stages import Summary

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


def test_by_default_the_first_gap_stops_it(tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main("prepare", flags(source, tmp_path / "out", "--on_error=stop")) == 1
    assert "3 of 11 pictures can't be had: " in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# --- without Ray -----------------------------------------------------------------------------------------------------


def test_a_writer_keeps_the_good_and_names_the_bad(source: Path, tmp_path: Path) -> None:
    from rlfseg.config import PrepareConfig

    found = sources.survey(
        PrepareConfig(out="x", source="phrasecut", path=str(source), splits=("val",), on_error="skip")
    )
    items = [r.to_json() for r in found.records if r.id in ("3", "7", "8")]

    def load(item: str) -> records.Loaded:
        return records.load(records.Record.from_json(item), found.rule)

    (row,) = ShardWriter(tmp_path, load, {}, skip=True)([{"id": "shard-00000", "items": items}])
    assert (row["status"], row["images"]) == ("ok", 2)
    assert list(json.loads(row["refused"])) == ["7"]
    assert list(json.loads(row["skipped"])) == ["3: 3__1"]
    assert list(hdf5.iter_ids(tmp_path / "shard-00000.h5")) == ["3", "8"]
    (row,) = ShardWriter(tmp_path, load, {}, skip=False)([{"id": "shard-00000", "items": items}])
    assert row["status"].startswith("refused: ")


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
