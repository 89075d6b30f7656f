"""datasets/lists.py: whole files read as the json module reads them, cut ones named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlfseg.datasets.lists import read_items, read_json
from rlfseg.errors import DataError

values = st.recursive(st.none() | st.booleans() | st.floats(allow_nan=False) | st.text(), st.lists, max_leaves=6)
objects = st.lists(st.dictionaries(st.text(), values, max_size=3), max_size=5)


@given(
    tree=objects, indent=st.sampled_from([None, 0, 2]), mark=st.sampled_from(["", "\ufeff"]), ascii_only=st.booleans()
)
def test_items_are_those_of_the_json_module(
    tmp_path_factory: pytest.TempPathFactory, tree: list[Any], indent: int | None, mark: str, ascii_only: bool
) -> None:
    path = tmp_path_factory.mktemp("lists") / "a.json"
    text = mark + json.dumps(tree, indent=indent, ensure_ascii=ascii_only)
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    try:
        path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        with pytest.raises(DataError, match="can't be read"):
            list(read_items(path))
        return
    assert list(read_items(path)) == [(f"[{n}]", item) for n, item in enumerate(tree)]


@pytest.mark.fault("ingest-01", part="cut")
def test_a_list_cut_anywhere_is_named_with_what_was_whole(tmp_path: Path) -> None:
    path = tmp_path / "refer_train.json"
    text = json.dumps([{"task_id": str(n), "Polygons": [[[[1.5, 2.5]]]]} for n in range(3)])
    for end in range(len(text)):
        path.write_text(text[:end])
        with pytest.raises(
            DataError, match=r"refer_train\.json: (broken|ends) after \d whole items|must be a JSON list"
        ):
            list(read_items(path))
        with pytest.raises(DataError, match=r"refer_train\.json: not whole JSON .*cut short"):
            read_json(path)
    path.write_text(text[: text.index('"2"')])
    with pytest.raises(DataError, match="broken after 2 whole items"):
        list(read_items(path))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"a": 1}', "must be a JSON list of objects, it begins with '{\"a\": 1}'"),
        ("[1]", r"\[0\]: must be an object, this is 1"),
        ('[{"a": 1} {"a": 2}]', "without a closing"),
        ("[" * 100_000, "broken after 0 whole items"),
        ("[{]", "broken after 0 whole items"),
        ("", "must be a JSON list"),
        ('[{"a": 1},]', "broken after 1 whole items"),
        ('[{"a": 1}]\n[{"a": 2}]', r"goes on behind its closing \], after 1 items"),
    ],
)
def test_other_things_are_refused(tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(DataError, match=reason):
        list(read_items(tmp_path / "a.json"))


def test_lists_that_must_be_there(tmp_path: Path) -> None:
    path = tmp_path / "instances.json"
    for tree in ([], {"images": []}, {"images": [], "annotations": {}}):
        path.write_text(json.dumps(tree))
        with pytest.raises(DataError, match="must be an object with the lists images, annotations"):
            read_json(path, keys=("images", "annotations"))
    path.write_text("{" + '"a":{' * 100_000)
    with pytest.raises(DataError, match="not whole JSON"):
        read_json(path)
    with pytest.raises(DataError, match="can't be read"):
        read_json(tmp_path / "gone.json")
