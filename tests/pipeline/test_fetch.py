"""Bytes at URLs and inside of Parquet files: whose fault it is when there are none, and what a row group costs."""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rlfseg.errors import BadSample, DataError
from rlfseg.pipeline import fetch
from rlfseg.pipeline.pictures import find
from tests.s3 import point_to

# --- S3's own words --------------------------------------------------------------------------------------------------


class Refusing(BaseHTTPRequestHandler):
    """Answers as S3 does; like there, the answer to a HEAD has no body that would say why."""

    status, code = 400, "ExpiredToken"

    def do_GET(self) -> None:
        said = f"<?xml version='1.0'?><Error><Code>{self.code}</Code><Message>As said</Message></Error>".encode()
        self.send_response(self.status)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(said)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(said)

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int, str], None]]:
    """An S3 that answers with a given status and code."""
    import s3fs

    server = ThreadingHTTPServer(("127.0.0.1", 0), Refusing)
    Thread(target=server.serve_forever, daemon=True).start()
    point_to(f"127.0.0.1:{server.server_port}", monkeypatch)

    def say(status: int, code: str) -> None:
        monkeypatch.setattr(Refusing, "status", status)
        monkeypatch.setattr(Refusing, "code", code)

    yield say
    s3fs.S3FileSystem.clear_instance_cache()
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (400, "ExpiredToken"),
        (403, "RequestTimeTooSkewed"),
        (403, "InvalidAccessKeyId"),
        (403, "SignatureDoesNotMatch"),
        (400, "RequestTimeout"),
        (400, "InvalidToken"),
    ],
)
def test_keys_that_expire_are_no_fault_of_the_picture(
    answers: Callable[[int, str], None], status: int, code: str
) -> None:
    answers(status, code)
    with pytest.raises(DataError, match=r"^s3://b/a\.png can't be read: .+; start again, it goes on") as caught:
        fetch.of_url("s3://b/a.png")
    assert not isinstance(caught.value, BadSample)


@pytest.mark.parametrize(("status", "code"), [(404, "NoSuchKey"), (403, "AccessDenied"), (403, "InvalidObjectState")])
def test_a_missing_or_forbidden_object_is_refused(answers: Callable[[int, str], None], status: int, code: str) -> None:
    answers(status, code)
    with pytest.raises(BadSample, match=r"^s3://b/a\.png: can't be read"):
        fetch.of_url("s3://b/a.png")


def test_files_by_url_are_refused_where_they_are_gone(tmp_path: Path) -> None:
    for path in (tmp_path / "gone.png", tmp_path):
        with pytest.raises(BadSample, match="can't be read"):
            fetch.of_url(path.as_uri())


# --- Parquet that can't be read --------------------------------------------------------------------------------------


class Unreachable(Exception):
    """As botocore's: no OSError."""


@pytest.fixture
def held(tmp_path: Path) -> str:
    """A row group of 4,096 values of 4 kB, four pages or more; the number of each is at its beginning."""
    filling = np.random.default_rng(0)
    values = [n.to_bytes(4, "big") + filling.bytes(4092) for n in range(4096)]
    pq.write_table(pa.table({"image": values, "phrases": ["x"] * len(values)}), tmp_path / "held.parquet")
    return str(tmp_path / "held.parquet")


@pytest.mark.parametrize("error", [TimeoutError("timed out"), ConnectionResetError(), Unreachable("no endpoint")])
def test_a_server_that_fails_is_no_fault_of_a_row(held: str, error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = find(held, ["x"], "phrases")
    [row] = pictures.rows.slice(4000, 1).to_pylist()
    open_file = fsspec.open

    class Failing:
        def __init__(self, file: Any):
            self.file, self.left = file, 4

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

        def read(self, *size: int) -> bytes:
            self.left -= 1
            if self.left < 0:
                raise error
            return bytes(self.file.read(*size))

    monkeypatch.setattr(fsspec, "open", lambda file: _Opened(Failing(open_file(file).open())))
    with pytest.raises(
        DataError, match=r"held\.parquet can't be read: .+; start again, it goes on from here"
    ) as caught:
        pictures.read(row)
    assert not isinstance(caught.value, BadSample)
    monkeypatch.setattr(fsspec, "open", lambda file: _raise(error))
    with pytest.raises(DataError, match=r"held\.parquet can't be read: .+; start again"):
        find(held, ["x"], "phrases")
    monkeypatch.setattr(fsspec, "open", open_file)
    assert fetch.of_group(held, 0, 4000)[:4] == (4000).to_bytes(4, "big")  # nothing of it is remembered


class _Opened:
    def __init__(self, file: Any):
        self.file = file

    def __enter__(self) -> Any:
        return self.file

    def __exit__(self, *_: object) -> None:
        self.file.close()


def _raise(error: Exception) -> None:
    raise error


def test_a_damaged_row_group_refuses_what_lies_behind(held: str, monkeypatch: pytest.MonkeyPatch) -> None:
    column = pq.read_metadata(held).row_group(0).column(0)
    data = bytearray(Path(held).read_bytes())
    at = column.data_page_offset + 6_000_000  # behind the dictionary
    data[at : at + 9000] = b"\xff" * 9000
    Path(held).write_bytes(data)
    starts = _count_starts(monkeypatch)
    outcomes = []
    for row in range(0, 4096, 16):
        try:
            outcomes.append(fetch.of_group(held, 0, row, ("damaged",))[:4] == row.to_bytes(4, "big"))
        except BadSample:
            outcomes.append(None)
    good = outcomes.index(None)
    assert good > 0
    assert outcomes == [True] * good + [None] * (256 - good)
    with pytest.raises(BadSample, match="its row group is damaged"):
        fetch.of_group(held, 0, 4095, ("damaged",))
    assert len(starts) == 1


# --- what it costs ---------------------------------------------------------------------------------------------------


def _count_starts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    starts: list[str] = []
    open_file = fsspec.open

    def counting(file: str) -> Any:
        starts.append(file)
        return open_file(file)

    monkeypatch.setattr(fsspec, "open", counting)
    return starts


def test_rows_in_any_order_and_one_way_through_for_those_in_order(held: str, monkeypatch: pytest.MonkeyPatch) -> None:
    starts = _count_starts(monkeypatch)

    def check(rows: Any) -> None:
        for row in rows:
            assert fetch.of_group(held, 0, int(row))[:4] == int(row).to_bytes(4, "big")

    fetch._group.cache_clear()
    for first in range(512, 4096, 1024):  # tasks of one process: forward, with those of others in between
        check(range(first, first + 256))
    assert len(starts) == 1
    check([3839, 3830, 3839])  # near behind
    assert len(starts) <= 2
    check(np.random.default_rng(0).integers(4096, size=20))


def test_another_file_of_that_name_is_another(held: str, tmp_path: Path) -> None:
    assert fetch.of_group(held, 0, 5, ("first",))[:4] == (5).to_bytes(4, "big")
    pq.write_table(pa.table({"image": [b"new"] * 9}), tmp_path / "held.parquet")
    assert fetch.of_group(held, 0, 5, ("second",)) == b"new"


@pytest.mark.parametrize("size", [16384, 1024])
def test_row_groups_take_little_memory(tmp_path: Path, size: int) -> None:
    """Of 64 MB some pages of 1,024 values, and nothing of the groups before, whenever garbage is collected."""
    values = np.random.default_rng(0).bytes(64 << 20)
    table = pa.table({"image": [values[n : n + 4096] for n in range(0, len(values), 4096)]})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=size)
    del table
    before, most = pa.total_allocated_bytes(), 0
    gc.disable()
    tracemalloc.start()
    try:
        for n in range(0, 16384, 8):
            found = fetch.of_group(str(tmp_path / "a.parquet"), *divmod(n, size))
            assert found == values[n * 4096 : (n + 1) * 4096]
            most = max(most, pa.total_allocated_bytes() - before)
        most += tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
        gc.enable()
    assert most < 24 << 20
