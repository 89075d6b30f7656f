"""Audit: do two sets share images? Ray Data looks at every picture once; the looks are compared in the driver.

A look is a kilobyte, so that two sets of 100,000 images each are compared in less than a gigabyte.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from rlfseg import draw, images
from rlfseg.audit import Looks, Pair, look, shared
from rlfseg.config import AuditConfig, as_dict, digest
from rlfseg.datasets.coco import id_in_name
from rlfseg.datasets.lists import storable
from rlfseg.errors import ConfigError, DataError
from rlfseg.hdf5 import Reader
from rlfseg.pipeline.folders import STARTED, read_table, stamp, write_json
from rlfseg.pipeline.rows import OK, Row, Rows
from rlfseg.pipeline.samples import open_samples
from rlfseg.pipeline.stages import Stage, Summary, run_stage

SETS = ("train", "test")
SCHEMA = pa.schema(
    [
        ("id", pa.string()),  # the set and the image's id: one id may be in both
        ("status", pa.string()),
        ("set", pa.string()),
        ("name", pa.string()),
        ("coco_id", pa.string()),
        ("hash", pa.uint64()),
        ("thumbnail", pa.binary()),  # 32 x 32 grey
    ]
)
INDEX = pa.schema([(name, pa.string()) for name in ("id", "set", "name", "coco_id", "shard", "folder")])


def run(config: AuditConfig) -> Summary:
    """Writes audit.json, exclude_ids.txt and a contact sheet of the pairs.

    Args:
        config: Settings of the command.

    Returns:
        Counts, refusals, seconds, and how many images are shared.

    Raises:
        BadSample: An image can't be read and `on_error` is `stop`.
        ConfigError: A folder holds no pictures.
        DataError: A folder of `prepare` is unfinished, or a file's name isn't Unicode.
    """
    out = Path(config.out).absolute()
    settings = as_dict(config)
    tables, identities = zip(*(_pictures(name, Path(settings[name]).absolute()) for name in SETS), strict=True)
    rows = pa.concat_tables(tables)
    summary = run_stage(
        Stage(
            name="audit",
            rows=rows,
            load=LoadPicture(),
            work=Looker,
            schema=SCHEMA,
            out=out,
            run=config.run,
            identity={k: settings[k] for k in ("distance", "similarity")} | dict(zip(SETS, identities, strict=True)),
            on_error=config.on_error,
            finalize=partial(_compare, config, out, {row["id"]: row for row in rows.to_pylist()}),
        )
    )
    report = json.loads((out / "audit.json").read_text())
    return Summary(**{**vars(summary), "figures": report["shared"]})


def _pictures(name: str, folder: Path) -> tuple[pa.Table, Row]:
    """Index rows of one set, and what identifies it."""
    if (folder / STARTED).is_file():
        samples = open_samples(folder)
        index = samples.rows.select([c for c in ("id", "shard", "coco_id") if c in samples.rows.column_names])
        rows = [{**row, "folder": str(samples.folder)} for row in index.to_pylist()]
        identity = samples.identity
    else:
        paths = images.list_images(folder)
        rows = [{"id": p.name, "folder": str(folder), "coco_id": id_in_name(p.name)} for p in paths]
        if odd := [p.name for p in paths if storable(p.name) != p.name]:
            raise DataError(f"{name}: {folder}: the file name {odd[0]!a} isn't Unicode; rename it")
        identity = {"pictures": str(folder), "files": digest({p.name: stamp(p) for p in paths})}
    if not rows:
        raise ConfigError(f"{name}: {folder} holds no pictures; give a folder of `prepare` or of pictures")
    named = [{**row, "id": f"{name}/{row['id']}", "set": name, "name": row["id"]} for row in rows]
    return pa.Table.from_pylist(named, schema=INDEX), identity


class LoadPicture:
    """Index row -> the same row with `image`, from a shard or from a file of its own."""

    def __init__(self) -> None:
        self.readers: dict[str, Reader] = {}

    def __call__(self, row: Row) -> Row:
        """Reads one picture.

        Args:
            row: An index row.

        Returns:
            The row with `image`, uint8 RGB [H, W, 3].

        Raises:
            BadSample: It is damaged.
        """
        if row["shard"] is None:
            path = Path(row["folder"], row["name"])
            return row | {"image": images.load_image(path, name=str(path))}
        reader = self.readers.setdefault(row["folder"], Reader(row["folder"]))
        return row | {"image": reader.image(row["shard"], row["name"])}


class Looker:
    """The per-image work: takes what is compared of a picture."""

    def __call__(self, rows: Rows) -> Rows:
        """Rows with `image` in; columns of SCHEMA out."""
        return [self._row(row) for row in rows]

    def _row(self, row: Row) -> Row:
        hashed, thumbnail = look(row["image"])
        kept = {k: row[k] for k in ("id", "set", "name", "coco_id")}
        return {**kept, "status": OK, "hash": hashed, "thumbnail": thumbnail}


def _compare(config: AuditConfig, out: Path, rows: dict[str, Row], counts: Row) -> Row:
    table = pa.concat_tables([read_table(path) for path in sorted((out / "data").glob("*.parquet"))])
    table = table.filter(pa.compute.equal(table["status"], OK)).sort_by("id")
    train, test = (_looks(table.filter(pa.compute.equal(table["set"], name))) for name in SETS)
    pairs = shared(train, test, distance=config.distance, similarity=config.similarity)
    lines = [pair.train for pair in pairs if pair.train.splitlines() == [pair.train.strip()]]
    (out / "exclude_ids.txt").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    _draw_pairs(out / "pairs.png", pairs, config.pairs, rows)
    report = {
        "compared": {"train": len(train.ids), "test": len(test.ids)},
        "unreadable": counts["refused"],
        "shared": {
            "shared_train_images": len(pairs),
            "of_them_by_coco_id": sum(pair.how == "coco_id" for pair in pairs),
            "shared_test_images": len({pair.test for pair in pairs}),
            "not_listed": len(pairs) - len(lines),  # ids with line breaks or blanks at their ends
        },
        "settings": as_dict(config),
        "pairs": [vars(pair) for pair in pairs],
    }
    write_json(out / "audit.json", report)
    return counts


def _looks(table: pa.Table) -> Looks:
    thumbnails: NDArray[Any] = np.frombuffer(b"".join(table["thumbnail"].to_pylist()), np.uint8)
    return Looks(
        ids=table["name"].to_pylist(),
        coco_ids=table["coco_id"].to_pylist(),
        hashes=table["hash"].to_numpy().astype(np.uint64),
        thumbnails=thumbnails.reshape(table.num_rows, -1) if table.num_rows else np.zeros((0, 1024), np.uint8),
    )


def _draw_pairs(path: Path, pairs: Sequence[Pair], most: int, rows: dict[str, Row]) -> None:
    """The most doubtful pairs side by side."""
    chosen = sorted(pairs, key=lambda pair: pair.similarity)[:most]
    if not chosen:
        return
    load = LoadPicture()
    sides = [[load(rows[f"{name}/{vars(pair)[name]}"])["image"] for name in SETS] for pair in chosen]
    notes = [f"{p.train} = {p.test} ({p.how}, {p.distance} bits, {p.similarity:.3f})" for p in chosen]
    draw.save(path, draw.contact_sheet(sides, titles=SETS, notes=notes))
