"""The index of a folder of shards: Parquet, a row an image, in the order of a hash of the ids."""

from __future__ import annotations

import hashlib
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rlfseg.errors import BadSample, DataError
from rlfseg.hdf5.reading import AnyPath, index_rows

SUFFIXES = frozenset({".h5", ".hdf5", ".hdf"})
INDEX = "index.parquet"
INDEX_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("shard", pa.string()),  # file name relative to the index, with /
        ("height", pa.int32()),  # pixels
        ("width", pa.int32()),
        ("captions", pa.list_(pa.string())),
        ("n_phrases", pa.int32()),
        ("coco_id", pa.string()),  # null where the source doesn't tell
        ("bytes", pa.int64()),  # on disk, image and masks
    ]
)


def id_hash(sample_id: str) -> str:
    """What rows are sorted by: spreads neighbours of one source over the whole index, the same everywhere."""
    return hashlib.sha256(sample_id.encode()).hexdigest()


def add_columns(folder: AnyPath, columns: Mapping[str, pa.Array]) -> pa.Table:
    """Adds columns to the index of a folder, in the order of its rows; gives what `read_index` now will."""
    table = read_index(Path(folder))
    for name, values in columns.items():
        table = table.append_column(name, values)
    return _write(Path(folder), table)


def _write(folder: Path, table: pa.Table) -> pa.Table:
    """Writes an index under `INDEX`, whole or not at all."""
    temporary = folder / f".{INDEX}.{uuid.uuid4().hex[:12]}.tmp"
    try:
        pq.write_table(table, temporary, write_page_checksum=True)
        if not pq.read_table(temporary).equals(table):
            raise DataError(f"{folder / INDEX}: reads back differently from what was written")
        temporary.replace(folder / INDEX)
    finally:
        temporary.unlink(missing_ok=True)
    return table


def read_index(folder: Path | str) -> pa.Table:
    """The index of a folder, with whatever columns were added to those of `INDEX_SCHEMA`.

    Args:
        folder: Holds `index.parquet`.

    Returns:
        A row a sample, in the order of the file.

    Raises:
        DataError: None there, damaged, or without those columns.
    """
    path = Path(folder) / INDEX
    try:
        table = pq.read_table(path, page_checksum_verification=True)
        table.validate(full=True)  # texts are UTF-8
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; `rlfseg prepare` writes it") from None
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{path}: not a whole Parquet file ({error})") from error
    if "coco_id" not in table.column_names:  # written before audits knew it
        table = table.append_column("coco_id", pa.nulls(table.num_rows, pa.string()))
    if missing := [name for name in INDEX_SCHEMA.names if name not in table.column_names]:
        raise DataError(f"{path}: lacks the columns {', '.join(missing)}; it has {', '.join(table.column_names)}")
    for wanted in INDEX_SCHEMA:
        if table.schema.field(wanted.name).type != wanted.type:
            found = table.schema.field(wanted.name).type
            raise DataError(f"{path}: the column {wanted.name} must be {wanted.type}, this is {found}")
    return table


def build_index(
    folder: AnyPath, files: Sequence[AnyPath] | None = None, *, on_bad: Callable[[BadSample], None] | None = None
) -> pa.Table:
    """Checks every shard and sample without reading pixels, and writes the folder's index.

    Args:
        folder: Where the index goes.
        files: The shards; None: all HDF5 files directly in the folder.
        on_bad: Called for every bad shard or sample, which is then left out; None: any of them is an error.

    Returns:
        What `read_index` will give, columns `INDEX_SCHEMA`.

    Raises:
        DataError: No samples, or bad ones (all named) and no `on_bad`. Ids must differ across shards.
    """
    root = Path(folder)
    paths = list_shards(root) if files is None else [Path(f) for f in files]
    rows: dict[str, dict[str, Any]] = {}
    bad: list[BadSample] = []
    for path in paths:
        for row in index_rows(path, Path(os.path.relpath(path, root)).as_posix()):
            if isinstance(row, BadSample):
                bad.append(row)
            elif row["id"] in rows:
                bad.append(BadSample(f"this id is in {rows[row['id']]['shard']} too", file=str(path), sample=row["id"]))
            else:
                rows[row["id"]] = row
    if bad and on_bad is None:
        raise DataError(f"{len(bad)} bad shards or samples: " + "; ".join(map(str, bad)))
    for error in bad:
        assert on_bad is not None
        on_bad(error)
    if not rows:
        raise DataError(f"{root}: no samples in {len(paths)} HDF5 files")
    in_order = sorted(rows.values(), key=lambda row: id_hash(row["id"]))
    return _write(root, pa.Table.from_pylist(in_order, schema=INDEX_SCHEMA))


def list_shards(folder: AnyPath) -> list[Path]:
    """The HDF5 files directly in a folder, by suffix in any case, sorted; hidden files are left out."""
    return sorted(p for p in Path(folder).iterdir() if p.suffix.lower() in SUFFIXES and not p.name.startswith("."))
