"""Where pictures and phrases may come from: each way against what was put there."""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from rlfseg.errors import BadSample, ConfigError, DataError
from rlfseg.pipeline.pictures import OfFiles, Pictures, find
from tests.s3 import point_to

Array = np.ndarray[Any, Any]
ASK = ["red ring"]


def picture(n: int) -> Array:
    return np.random.default_rng(n).integers(256, size=(4 + n, 9, 3), dtype=np.uint8)


def png(n: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture(n)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, n in (("a.png", 0), ("b.PNG", 1), ("deep/er/c.png", 2)):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(n))
    (tmp_path / "photos" / "notes.txt").write_text("no picture")
    (tmp_path / "photos" / ".hidden.png").write_bytes(png(3))
    return tmp_path / "photos"


def seen(found: Pictures, *, skip: tuple[str, ...] = ()) -> dict[str, tuple[Array, list[str]]]:
    rows = [row for row in found.rows.to_pylist() if not row["id"].endswith(skip)]
    return {row["id"]: found.read(row) for row in rows}


def check(found: Pictures, numbers: list[int], phrases: list[list[str]]) -> None:
    got = list(seen(found).values())
    assert [own for _, own in got] == phrases
    for (image, _), n in zip(got, numbers, strict=True):
        np.testing.assert_array_equal(image, picture(n))


# --- pictures ------------------------------------------------------------------------------------------------------


def test_folder_glob_and_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check(find(str(folder), ASK, "phrases"), [0, 1], [ASK] * 2)
    check(find(f"{folder}/**/*.png", ASK, "phrases"), [0, 2], [ASK] * 2)
    check(find(str(folder / "a.png"), ASK, "phrases"), [0], [ASK])
    monkeypatch.chdir(folder)
    assert list(seen(find("deep/er", ASK, "phrases"))) == [
        str(folder / "deep/er/c.png")
    ]  # whole: a worker stands elsewhere


def test_a_picture_may_have_so_many_pixels(folder: Path) -> None:
    pq.write_table(pa.table({"image": [png(0), png(1)]}), folder.parent / "inside.parquet")
    pq.write_table(pa.table({"path": ["photos/a.png", "photos/b.PNG"]}), folder.parent / "beside.parquet")
    for source in (str(folder), str(folder.parent / "inside.parquet"), str(folder.parent / "beside.parquet")):
        found = find(source, ASK, "phrases", pixels=4 * 9)
        small, large = found.rows.to_pylist()
        np.testing.assert_array_equal(found.read(small)[0], picture(0))
        with pytest.raises(BadSample, match="9 x 5 pixels are more than the limit of 36"):
            found.read(large)


def test_a_folder_whose_name_looks_like_a_glob(folder: Path) -> None:
    odd = folder / "holiday [1]*"
    odd.mkdir()
    (odd / "x.png").write_bytes(png(4))
    check(find(str(odd), ASK, "phrases"), [4], [ASK])


def test_globs_take_pictures_only(folder: Path) -> None:
    def names(pattern: str) -> list[str]:
        return [
            Path(i).relative_to(folder).as_posix() for i in find(f"{folder}/{pattern}", ASK, "x").rows["id"].to_pylist()
        ]

    (folder / "album.png").mkdir()
    (folder / "raw.dat").write_bytes(png(6))
    (folder / "README").touch()
    assert names("") == names("*") == names("*.*") == ["a.png", "b.PNG"]
    assert names("**") == ["a.png", "b.PNG", "deep/er/c.png"]
    assert names("*.p*") == names("*.png") == ["a.png"]
    assert names("*.dat") == names("raw.dat") == ["raw.dat"]
    with pytest.raises(ConfigError, match="names no picture"):
        names("READ*")


def test_a_name_that_is_not_utf_8_is_refused_with_its_file(folder: Path) -> None:
    odd = Path(os.fsdecode(os.fsencode(folder) + b"/caf\xe9.png"))
    odd.write_bytes(png(1))
    found = find(str(folder), ASK, "phrases")
    good, *_, bad = sorted(found.rows.to_pylist(), key=lambda row: row["bad"] or "")
    np.testing.assert_array_equal(found.read(good)[0], picture(0))
    with pytest.raises(BadSample, match=r"caf\\udce9\.png: its name isn't UTF-8; rename it"):
        found.read(bad)
    odd.rename(odd.with_suffix(".parquet"))
    for file in folder.glob("*.[pP][nN][gG]"):
        file.unlink()
    with pytest.raises(DataError, match=r"caf\\udce9\.parquet': its name isn't UTF-8; rename it"):
        find(str(folder), ASK, "phrases")


def test_what_is_drawn_below_a_glob_is_none_of_its_pictures(folder: Path) -> None:
    """Else the same command would find others, and refuse to go on."""
    found = partial(find, f"{folder}/**/*.png", ["a"], "", but=folder / "masks")
    before = found()
    shutil.copytree(folder, folder / "masks" / "overlays", ignore=lambda at, names: set(names) - {"a.png"})
    assert list((folder / "masks").rglob("*.png"))
    assert found().fingerprint == before.fingerprint


def test_one_kind_at_a_time(folder: Path) -> None:
    (folder / "more.parquet").touch()
    with pytest.raises(ConfigError, match="holds Parquet files and pictures: say which, by a glob"):
        find(str(folder), ASK, "phrases")
    check(find(str(folder / "*.png"), ASK, "phrases"), [0], [ASK])


@pytest.mark.parametrize("source", ["", "/no/such/folder", "nothing*.png"])
def test_nothing_there(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="names no picture"):
        find(source, ASK, "phrases")


def test_every_picture_has_something_to_look_for(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"phrases: empty, and .*a\.png brings none"):
        find(str(folder), [], "phrases")


def test_fingerprints_tell_pictures_and_phrases_apart(folder: Path) -> None:
    first = find(str(folder), ASK, "phrases").fingerprint
    assert first == find(f"{folder}/", ASK, "phrases").fingerprint
    assert first != find(str(folder), ["blue ring"], "phrases").fingerprint
    (folder / "new.jpg").write_bytes(png(5))
    assert first != find(str(folder), ASK, "phrases").fingerprint


def test_fingerprints_tell_other_contents_apart(folder: Path) -> None:
    """Of a picture, of a link's target, of a Parquet file; whatever the size, as the time tells."""
    link = folder / "link.png"
    link.symlink_to(folder / "deep/er/c.png")
    held = Path(table(folder.parent / "held.parquet", image=[png(0)]))
    for source, changed in ((folder, folder / "a.png"), (folder, folder / "deep/er/c.png"), (held, held)):
        first = find(str(source), ASK, "phrases").fingerprint
        assert first == find(str(source), ASK, "phrases").fingerprint
        state = changed.stat()
        os.utime(changed, ns=(state.st_atime_ns, state.st_mtime_ns + 1000))
        assert first != find(str(source), ASK, "phrases").fingerprint


def test_phrases_for_all_are_not_kept_a_row(folder: Path) -> None:
    many = [f"a phrase {n} of a common length" for n in range(80)]
    found = find(str(folder), many, "phrases")
    assert found.rows.nbytes < 200 * found.rows.num_rows
    check(found, [0, 1], [many] * 2)


def test_unknown_kinds_of_urls_are_told_in_a_line() -> None:
    for url in ("nonsense://bucket/a.png", "abfs://container/a.png"):
        with pytest.raises((ConfigError, DataError), match=url):
            find(url, ASK, "phrases")


# --- Parquet -------------------------------------------------------------------------------------------------------


def table(file: Path, /, **columns: Any) -> str:
    pq.write_table(pa.table(columns), file, row_group_size=2)
    return str(file)


def test_parquet_with_paths_and_their_own_phrases(folder: Path) -> None:
    list_of = table(folder / "l.parquet", path=["a.png", str(folder / "b.PNG")], phrases=[["one"], ["two", " three "]])
    check(find(list_of, [], "phrases"), [0, 1], [["one"], ["two", "three"]])
    check(find(list_of, ASK, "phrases"), [0, 1], [["one", *ASK], ["two", "three", *ASK]])


def test_parquet_with_a_row_a_phrase(folder: Path) -> None:
    rows = table(folder / "r.parquet", path=["a.png", "b.PNG", "a.png"], sentence=["one", "two", "three"])
    check(find(rows, ASK, "sentence"), [0, 1], [["one", "three", *ASK], ["two", *ASK]])
    check(find(rows, ASK, "no such column"), [0, 1], [ASK, ASK])


def test_parquet_that_holds_the_pictures(tmp_path: Path) -> None:
    raw = table(tmp_path / "raw.parquet", image=[png(n) for n in range(5)], phrases=[[f"p{n}"] for n in range(5)])
    check(find(raw, [], "phrases"), list(range(5)), [[f"p{n}"] for n in range(5)])
    hub = table(tmp_path / "hub.parquet", image=[{"bytes": png(n), "path": "same.png"} for n in range(3)])
    check(find(hub, ASK, "phrases"), [0, 1, 2], [ASK] * 3)
    check(
        find(str(tmp_path / "*.parquet"), ASK, "phrases"),
        [0, 1, 2, 0, 1, 2, 3, 4],
        [ASK] * 3 + [[f"p{n}", *ASK] for n in range(5)],
    )
    empty = find(table(tmp_path / "none.parquet", image=pa.array([None, b"junk"], pa.binary())), ASK, "phrases")
    for row in empty.rows.to_pylist():
        with pytest.raises(BadSample, match=r"none\.parquet#"):
            empty.read(row)


@pytest.mark.parametrize(
    ("columns", "told"),
    [
        ({"name": ["a.png"]}, "needs `path` or `image`, and `phrases`.*it has name"),
        ({"path": ["a.png"]}, "needs `path` or `image`, and `phrases`"),
        ({"path": [None], "phrases": [["x"]]}, "row 0: None is no path"),
        ({"path": [7], "phrases": [["x"]]}, "row 0: 7 is no path"),
        ({"path": ["a\0.png"], "phrases": [["x"]]}, "is no path"),
        ({"path": ["a.png", "b.png"], "phrases": [[" "], None]}, "row 0: the phrase ' ' is empty.*no other row"),
        ({"path": ["a.png"], "phrases": [3]}, "row 0: 3 is no phrase"),
        ({"path": ["a.png"], "phrases": [[None]]}, "row 0: the phrase '' is empty"),
    ],
)
def test_lists_without_a_good_row_are_refused(tmp_path: Path, columns: Any, told: str) -> None:
    with pytest.raises(DataError, match=told):
        find(table(tmp_path / "bad.parquet", **columns), [], "phrases")


def test_bad_rows_of_parquet_are_refused_alone(folder: Path) -> None:
    def refused(found: Pictures, told: dict[str, str]) -> None:
        for row in found.rows.to_pylist():
            for name, why in told.items():
                if row["id"].endswith(name):
                    with pytest.raises(BadSample, match=why):
                        found.read(row)
        assert list(seen(found, skip=tuple(told))) == [str(folder / "a.png")]

    paths = ["a.png", "n.png", "e.png", "b.PNG", "z.png", None]
    phrases = [["x"], None, [], [" "], [None], ["x"]]
    list_of = table(folder / "l.parquet", path=paths, phrases=phrases)
    no_phrase, empty = "its `phrases` holds no phrase", "the phrase '.*' is empty"
    told = {
        "b.PNG": rf"b\.PNG: l\.parquet, row 3: {empty}",
        "z.png": f"row 4: {empty}",
        "l.parquet#5": "None is no path",
    }
    refused(find(list_of, [], "phrases"), told | {"n.png": no_phrase, "e.png": no_phrase})
    for name in ("n.png", "e.png"):
        (folder / name).write_bytes(png(7))
    found = find(list_of, ASK, "phrases")
    assert [own for _, own in seen(found, skip=tuple(told)).values()] == [["x", *ASK], ASK, ASK]

    for nothing in (pa.array([None, []], pa.list_(pa.string())), pa.array([None, None], pa.string())):
        silent = table(folder / "s.parquet", path=["a.png", "b.PNG"], phrases=nothing)
        with pytest.raises(ConfigError, match=r"phrases: empty, and .*a\.png brings none"):
            find(silent, [], "phrases")


def test_a_truncated_parquet_file_is_named(tmp_path: Path) -> None:
    whole = Path(table(tmp_path / "a.parquet", path=["a.png"] * 50))
    whole.write_bytes(whole.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"a\.parquet: not a whole Parquet file"):
        find(str(whole), ASK, "phrases")


# --- HDF5 ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def authors(tmp_path: Path) -> Path:
    """Two files as the paper's authors write them: no attributes, no index."""
    for name, numbers in (("one.h5", (0, 1)), ("two.hdf5", (2,))):
        with h5py.File(tmp_path / name, "w") as file:
            for n in numbers:
                group = file.create_group(f"id-{n}")
                group["image"] = picture(n)
                group.create_group("mask")[f"thing {n}"] = np.ones(picture(n).shape[:2], np.uint8)
    return tmp_path


@pytest.mark.usefixtures("ray")
def test_hdf5_of_anybody(authors: Path) -> None:
    check(find(str(authors), [], "phrases"), [0, 1, 2], [["thing 0"], ["thing 1"], ["thing 2"]])
    check(find(str(authors / "one.h5"), ASK, "phrases"), [0, 1], [ASK] * 2)
    (authors / "three.h5").write_bytes((authors / "one.h5").read_bytes())
    with pytest.raises(DataError, match="id-0 is there twice"):
        find(str(authors), ASK, "phrases")
    (authors / "three.h5").write_bytes(b"nothing")
    with pytest.raises(BadSample, match=r"three\.h5"):
        find(str(authors), ASK, "phrases")
    with pytest.raises(ConfigError, match="HDF5 is read from local or mounted folders"):
        find("memory://a.h5", ASK, "phrases") if _in_memory("a.h5") else None


def _in_memory(name: str) -> bool:
    import fsspec

    fsspec.filesystem("memory").pipe(f"/{name}", b"x")
    return True


# --- S3 ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bucket(s3_server: str) -> Iterator[Any]:
    import s3fs

    with pytest.MonkeyPatch.context() as patch:
        point_to(s3_server, patch)
        fs = s3fs.S3FileSystem()
        fs.mkdir("pictures")
        yield fs
    s3fs.S3FileSystem.clear_instance_cache()


def test_pictures_and_lists_on_s3(bucket: Any, tmp_path: Path) -> None:
    for n in range(3):
        bucket.pipe(f"pictures/photos/{n}.png", png(n))
    bucket.pipe("pictures/photos/readme.txt", b"no picture")
    check(find("s3://pictures/photos", ASK, "phrases"), [0, 1, 2], [ASK] * 3)
    check(find("s3://pictures/photos/[01].png", ASK, "phrases"), [0, 1], [ASK] * 2)
    found = find("s3://pictures/photos", ASK, "phrases")
    assert found.rows["id"].to_pylist()[0] == "s3://pictures/photos/0.png"

    path = table(tmp_path / "l.parquet", path=["photos/2.png", "s3://pictures/photos/0.png"], phrases=["two", "zero"])
    bucket.put(path, "pictures/l.parquet")
    check(find("s3://pictures/l.parquet", [], "phrases"), [2, 0], [["two"], ["zero"]])
    held = table(tmp_path / "h.parquet", image=[png(n) for n in range(3)])
    bucket.put(held, "pictures/h.parquet")
    check(find("s3://pictures/h.parquet", ASK, "phrases"), [0, 1, 2], [ASK] * 3)

    first = find("s3://pictures/photos", ASK, "phrases").fingerprint
    assert first == find("s3://pictures/photos", ASK, "phrases").fingerprint
    bucket.pipe("pictures/photos/0.png", png(0)[:-1] + b"x")  # as many bytes
    for source in ("s3://pictures/photos", "s3://pictures/photos/*"):
        assert first != find(source, ASK, "phrases").fingerprint
    bucket.pipe("pictures/photos/0.png", png(0))
    assert find("s3://pictures/photos/*", ASK, "phrases").rows.num_rows == 3

    with pytest.raises(ConfigError, match="names no picture"):
        find("s3://pictures/none", ASK, "phrases")
    with pytest.raises(BadSample, match=r"s3://pictures/gone\.png: can't be read"):
        OfFiles(ASK)({"id": "s3://pictures/gone.png"})


def test_a_server_that_is_gone_is_no_fault_of_the_picture(bucket: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    type(bucket).clear_instance_cache()
    try:
        _check_gone()
    finally:
        type(bucket).clear_instance_cache()


def _check_gone() -> None:
    with pytest.raises(DataError, match="start again, it goes on from here"):
        OfFiles(ASK)({"id": "s3://pictures/a.png"})
    with pytest.raises(DataError, match="can't be listed"):
        find("s3://pictures/", ASK, "phrases")
