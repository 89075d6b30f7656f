"""Prepare: a data set becomes HDF5 shards in the paper's layout, with an index. A row is a shard, whole or absent."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from rlfseg import hdf5
from rlfseg.config import PrepareConfig, ShapesConfig, WorkersConfig, as_dict
from rlfseg.datasets import folder, shapes
from rlfseg.errors import BadSample, ConfigError
from rlfseg.hdf5 import Labelled, Sample
from rlfseg.pipeline.rows import OK, Row, Rows, refused
from rlfseg.pipeline.stages import Stage, Summary, run_stage

SCHEMA = pa.schema(
    [("id", pa.string()), ("status", pa.string()), ("images", pa.int64()), ("refused", pa.string())]
)  # `refused`: JSON, image id -> reason


def run(config: PrepareConfig) -> Summary:
    """Writes the shards and the index of `config.out`.

    Args:
        config: Settings of the command.

    Returns:
        Counts, refusals and seconds.

    Raises:
        BadSample: An image or mask can't be used and `on_error` is `stop`.
        ConfigError: `path` is missing for a source that needs one.
    """
    out = Path(config.out).absolute()
    rows = _plan(config)
    settings = as_dict(config)
    identity = {k: settings[k] for k in ("source", "path", "splits", "shapes", "images_per_shard")}
    return run_stage(
        Stage(
            name="prepare",
            rows=rows,
            load=_nothing_to_load,
            work=ShardWriter,
            kwargs={"out": out, "shapes_config": config.shapes, "skip": config.on_error == "skip"},
            schema=SCHEMA,
            out=out,
            run=WorkersConfig(workers=min(config.workers, rows.num_rows), batch_size=1),
            identity=identity,
            on_error=config.on_error,
            finalize=lambda counts: _index(out, counts),
        )
    )


def _plan(config: PrepareConfig) -> pa.Table:
    """Shards to write: id, and either the first and last scene or the records of a folder."""
    if config.source == "shapes":
        items = [str(n) for n in range(config.shapes.count)]
        name = f"{config.shapes.split}-{config.shapes.labels}"
    else:
        if config.path is None:
            raise ConfigError(
                "path: null; give the list of phrases, or the folder that holds it, e.g. --path data/index.json"
            )
        records = [r for r in folder.plan(Path(config.path)) if not config.splits or r.split in config.splits]
        if not records:
            raise ConfigError(f"splits: no image of {config.path} is in {', '.join(config.splits)}")
        items = [r.to_json() for r in records]
        name = "shard"
    size = config.images_per_shard
    parts = [items[n : n + size] for n in range(0, len(items), size)]
    return pa.table({"id": [f"{name}-{n:05d}" for n in range(len(parts))], "items": parts})


class ShardWriter:
    """Writes one HDF5 shard a row.

    Args:
        out: Folder of the shards.
        shapes_config: How scenes are drawn.
        skip: Count and leave out a bad image instead of refusing its shard.
    """

    def __init__(self, out: Path, shapes_config: ShapesConfig, *, skip: bool):
        self.out, self.shapes, self.skip = out, shapes_config, skip

    def __call__(self, rows: Rows) -> Rows:
        """Rows `id`, `items` in; `images` and `refused` (JSON) out."""
        return [self._shard(row) for row in rows]

    def _shard(self, row: Row) -> Row:
        bad: dict[str, str] = {}
        try:
            count = hdf5.write_shard(self.out / f"{row['id']}.h5", self._samples(row["items"], bad))
        except BadSample as error:
            return refused(row, error)
        return {"id": row["id"], "status": OK, "images": count, "refused": json.dumps(bad)}

    def _samples(self, items: list[str], bad: dict[str, str]) -> Iterator[Sample]:
        for item in items:
            if item.isdigit():
                yield drawn(int(item), self.shapes)
                continue
            record = folder.Record.from_json(item)
            try:
                yield folder.load(record)
            except BadSample as error:
                if not self.skip:
                    raise
                bad[record.id] = str(error)


def drawn(index: int, config: ShapesConfig) -> Sample:
    """A scene as a sample, with exact or coarse labels."""
    scene = shapes.draw_scene(index, split=config.split, seed=config.seed, size=config.size, n_phrases=config.phrases)
    coarse = config.labels == "coarse"
    return Sample(
        id=f"{config.split}-{index:06d}",
        image=scene.image,
        phrases=tuple(
            Labelled(
                caption=p.caption,
                mask=p.coarse if coarse else p.mask,
                instances=p.coarse_instances if coarse else p.instances,
            )
            for p in scene.phrases
        ),
    )


def _nothing_to_load(row: Row) -> Row:
    return row


def _index(out: Path, counts: Row) -> Row:
    """Builds the index and counts images instead of shards."""
    bad: dict[str, str] = dict(counts["refused"])
    for path in (out / "data").glob("*.parquet"):
        for row in pq.read_table(path).to_pylist():
            bad |= json.loads(row["refused"] or "{}")
    index = hdf5.build_index(out)
    return {
        "rows_in": index.num_rows + len(bad),
        "rows_out": index.num_rows,
        "refused": bad,
        "phrases": sum(index["n_phrases"].to_pylist()),
    }
