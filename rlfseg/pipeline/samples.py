"""Samples as stages read them: a folder of `prepare`, or one of `refine`, which adds a refined label a phrase."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from rlfseg import hdf5
from rlfseg.errors import DataError
from rlfseg.hdf5 import Reader
from rlfseg.pipeline.folders import fingerprint, identity_of, read_table, require_finished
from rlfseg.pipeline.rows import OK, Row

REFINED = ("masks", "outcomes")  # columns that refining adds to the index's


@dataclass(frozen=True, kw_only=True)
class Samples:
    """A finished folder of samples.

    Attributes:
        folder: Folder of the HDF5 shards.
        rows: Their index; with the columns of REFINED after refining.
        fingerprint: Changes when the samples do.
    """

    folder: Path
    rows: pa.Table
    fingerprint: str

    @property
    def identity(self) -> Row:
        """For a job's own identity."""
        return {"samples": str(self.folder), "fingerprint": self.fingerprint}


def open_samples(path: str | Path) -> Samples:
    """Opens a folder of `prepare` or `refine`.

    Args:
        path: The folder.

    Returns:
        Its index rows, and where the shards are.

    Raises:
        DataError: It is neither, or not finished.
    """
    folder = Path(path).absolute()
    if not folder.is_dir():
        raise DataError(f"samples: no folder {folder}; `rlfseg prepare` writes one")
    state = require_finished(folder)
    if (folder / hdf5.INDEX).is_file():
        return Samples(folder=folder, rows=hdf5.read_index(folder), fingerprint=fingerprint(folder))
    source = Path(str(identity_of(state, folder).get("samples")))
    if not os.path.isdir(source):  # it may be any text
        raise DataError(f"samples: {folder} was refined from {source}, which is gone; its pixels are needed")
    parts = [read_table(p) for p in sorted((folder / "data").glob("*.parquet"))]
    if not parts or any("status" not in part.column_names for part in parts):
        raise DataError(f"samples: {folder} holds neither an index nor rows of `refine`")
    rows = pa.concat_tables(parts)
    rows = rows.filter(pa.compute.equal(rows["status"], OK))
    hashes = [hdf5.id_hash(i) for i in rows["id"].to_pylist()]
    rows = rows.take(sorted(range(len(hashes)), key=hashes.__getitem__))  # the order of an index
    return Samples(folder=source, rows=rows, fingerprint=fingerprint(folder))


def askable(captions: Sequence[str]) -> list[int]:
    """Numbers of the phrases of a sample that ask for something: an empty one is left out wherever phrases are used."""
    return [n for n, caption in enumerate(captions) if caption.strip()]


class LoadSample:
    """Index row -> the same row with `image`, `captions`, `tasks`, `labels` and `instances`.

    Args:
        folder: Folder of the shards.
    """

    def __init__(self, folder: Path):
        self.reader = Reader(folder)

    def __call__(self, row: Row) -> Row:
        """Reads one sample.

        Args:
            row: An index row.

        Returns:
            The row with pixels and masks.

        Raises:
            BadSample: The file or the sample is damaged.
        """
        sample = self.reader.sample(row["shard"], row["id"])
        return row | {
            "image": sample.image,
            "captions": [p.caption for p in sample.phrases],
            "tasks": [p.task for p in sample.phrases],
            "labels": [p.mask for p in sample.phrases],
            "instances": [p.instances for p in sample.phrases],
        }
