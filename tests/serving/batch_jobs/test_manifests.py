"""Which pictures a batch may ask for."""

from __future__ import annotations

import json
import os
import resource
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rlfseg.config import ServeConfig
from serve.manifest import MOST_BYTES, read_manifest
from serve.refusal import Refusal
from tests.serving.jobs import asked


def test_paths_become_absolute_and_phrases_are_joined(config: ServeConfig, roots: Path) -> None:
    table = read_manifest(asked(images=["a.png", "shop/../shop/b.png", str(roots / "a.png")]), config)
    assert table.to_pylist() == [
        {"path": str(roots / "a.png"), "phrases": ["dog"]},
        {"path": str(roots / "shop" / "b.png"), "phrases": ["dog"]},
    ]


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_manifests(config: ServeConfig, roots: Path, kind: str) -> None:
    rows = [{"path": "b.png", "phrases": ["cat"]}, {"path": "../a.png", "phrases": []}]
    file = roots / "shop" / f"list.{kind}"
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), file)
    else:
        file.write_text("".join(json.dumps(row) + "\n\n" for row in rows))
    table = read_manifest(asked(images=[], manifest=f"shop/list.{kind}"), config)
    assert table.to_pylist() == [
        {"path": str(roots / "shop" / "b.png"), "phrases": ["cat", "dog"]},
        {"path": str(roots / "a.png"), "phrases": ["dog"]},
    ]


@pytest.mark.parametrize(
    "text", [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int8(), pa.string())]
)
def test_parquet_of_all_writers(config: ServeConfig, roots: Path, text: pa.DataType) -> None:
    phrases = pa.array([["cat", "cat"], [], None], pa.list_(pa.string())).cast(pa.list_(text))
    table = {"path": pa.array(["a.png", "shop/b.png", "a.png"]).cast(text), "phrases": phrases, "size": [1, 2, 3]}
    pq.write_table(pa.table(table), roots / "list.parquet")
    found = read_manifest(asked(images=[], manifest="list.parquet"), config)
    assert found["phrases"].to_pylist() == [["cat", "dog"], ["dog"]]


def test_a_parquet_manifest_may_leave_phrases_to_the_request(config: ServeConfig, roots: Path) -> None:
    pq.write_table(pa.table({"path": ["a.png"]}), roots / "list.parquet")
    found = read_manifest(asked(images=[], manifest="list.parquet"), config)
    assert found.to_pylist() == [{"path": str(roots / "a.png"), "phrases": ["dog"]}]


def same(text: str, times: int) -> pa.Array:
    """Takes little room in memory and in a file, however often the text is named."""
    return pa.DictionaryArray.from_arrays(np.zeros(times, "int32"), [text])


def one_list(array: pa.Array) -> pa.Array:
    return pa.ListArray.from_arrays([0, len(array)], array)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        # Texts in a dictionary, a million of them in one row, and a column that is large itself
        ({"path": same("x" * 300_000, 4), "phrases": [["a"]] * 4}, "bytes are more than"),
        ({"path": ["a"], "phrases": one_list(same("x" * 100_000, 16))}, "bytes are more than"),
        ({"path": ["a"], "phrases": one_list(same("x" * 100_000, 10**6))}, "more than 16 phrases"),
        ({"path": [f"{n}" + "x" * 300_000 for n in range(4)], "phrases": [["a"]] * 4}, "bytes are more than"),
        ({"path": ["a"] * 5, "phrases": [["b"]] * 5}, "4 pictures"),
        ({"path": [1], "phrases": [["b"]]}, "TypeError"),
        ({"path": ["a"], "phrases": [[1]]}, "TypeError"),
        ({"path": ["a"], "phrases": [[["b"]]]}, "TypeError"),
        ({"path": [{"path": "a"}], "phrases": [["b"]]}, "TypeError"),
        ({"path": ["a"], "phrases": ["b"]}, r"manifest\[0\]: needs"),
        ({"path": [None], "phrases": [["b"]]}, r"manifest\[0\]: needs"),
        ({"path": ["a"], "phrases": [[None]]}, r"manifest\[0\]: needs"),
        ({"phrases": [["a"]]}, "KeyError"),
    ],
)
def test_parquet_that_is_refused_before_it_is_decoded(
    config: ServeConfig, roots: Path, table: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve.manifest.MOST_BYTES", 2**20)
    pq.write_table(pa.table(table), roots / "list.parquet", compression="zstd", store_schema=False)
    with pytest.raises(Refusal, match=message):
        read_manifest(asked(images=[], manifest="list.parquet"), config)


def test_a_kilobyte_that_stands_for_gigabytes(config: ServeConfig, roots: Path) -> None:
    most, text = 16, "x" * 100_000_000
    phrases = pa.ListArray.from_arrays([0, most, 2 * most, 3 * most], same(text, 3 * most))
    pq.write_table(pa.table({"path": ["a.png"] * 3, "phrases": phrases}), roots / "list.parquet", compression="zstd")
    assert (roots / "list.parquet").stat().st_size < 50_000
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(Refusal, match="4800000015 bytes are more than"):
        read_manifest(asked(images=[], manifest="list.parquet"), config)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1_000_000  # KiB


def test_a_long_jsonl_manifest_is_refused_unread(config: ServeConfig, roots: Path) -> None:
    with (roots / "list.jsonl").open("wb") as file:
        file.truncate(MOST_BYTES + 1)  # takes no room on the disk
    with pytest.raises(Refusal, match="bytes are more than") as refusal:
        read_manifest(asked(images=[], manifest="list.jsonl"), config)
    assert refusal.value.status == 413


def test_a_manifest_that_is_a_pipe_is_not_waited_for(config: ServeConfig, roots: Path) -> None:
    os.mkfifo(roots / "list.jsonl")
    with pytest.raises(Refusal, match="no such file"):
        read_manifest(asked(images=[], manifest="list.jsonl"), config)


OUTSIDE = ["../secret.png", "/etc/passwd", "shop/../../secret.png", "", ".", "a\0b", "link.png", "loop/a"]


@pytest.mark.parametrize("path", OUTSIDE)
@pytest.mark.parametrize("way", ["images", "manifest", "row"])
def test_nothing_outside_the_roots_is_read(config: ServeConfig, roots: Path, path: str, way: str) -> None:
    os.symlink(roots.parent / "secret.png", roots / "link.png")
    os.symlink(roots / "loop", roots / "loop")
    (roots / "list.jsonl").write_text(json.dumps({"path": path, "phrases": []}) + "\n")
    fields: dict[str, Any] = {
        "images": {"images": [path]},
        "manifest": {"images": [], "manifest": path or "/"},
        "row": {"images": [], "manifest": "list.jsonl"},
    }[way]
    with pytest.raises(Refusal, match="lies outside") as refusal:
        read_manifest(asked(**fields), config)
    assert str(roots) not in refusal.value.message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "names no picture"),
        ("{", "can't be read"),
        ('{"phrases": []}\n', "can't be read"),
        ("[1]\n", "can't be read"),
        ('{"path": 3}\n', r"manifest\[0\]: needs"),
        ('{"path": "a.png", "phrases": "dog"}\n', r"manifest\[0\]: needs"),
        ('{"path": "a.png", "phrases": [" "]}\n', "empty"),
        ('{"path": "a.png"}\n' * 5, "4 pictures"),
        ("\xff\xfe", "can't be read"),
        ("[" * 100_000, "can't be read: RecursionError"),
    ],
)
def test_manifests_that_are_none(config: ServeConfig, roots: Path, text: str, message: str) -> None:
    (roots / "list.jsonl").write_bytes(text.encode("latin-1"))
    with pytest.raises(Refusal, match=message):
        read_manifest(asked(images=[], manifest="list.jsonl"), config)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"images": []}, "either"),
        ({"manifest": "a"}, "either"),
        ({"phrases": []}, "no phrases"),
        ({"phrases": ["a"] * 17}, "17 phrases are more than 16"),
        ({"images": [], "manifest": "none.parquet"}, "no such file"),
        ({"images": [], "manifest": "a.png"}, "names no picture"),
    ],
)
def test_wrong_batches(config: ServeConfig, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(Refusal, match=message):
        read_manifest(asked(**fields), config)
