"""Small folders of the commands, for tests of what looks into them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rlfseg import cli, hdf5
from rlfseg.datasets.shapes import draw_scene
from rlfseg.hdf5 import Labelled, Sample
from rlfseg.pipeline.folders import write_json
from rlfseg.pipeline.prepare import PHRASES


def scene(n: int, *, coco_id: str | None = None, split: str = "train") -> Sample:
    drawn = draw_scene(n, split=split)  # type: ignore[arg-type]
    phrases = tuple(Labelled(caption=p.caption, mask=p.mask, instances=p.instances) for p in drawn.phrases)
    return Sample(id=f"{split}/{n}", image=drawn.image, phrases=phrases, coco_id=coco_id)


def prepared(folder: Path, samples: list[Sample], per_shard: int = 4) -> Path:
    """What `prepare` leaves, but for its manifest."""
    folder.mkdir()
    for n in range(0, len(samples), per_shard):
        hdf5.write_shard(folder / f"shard-{n:05d}.h5", samples[n : n + per_shard])
    hdf5.build_index(folder)
    phrases = pa.table({"id": [s.id for s in samples], "task": [f"{s.id}__1" for s in samples]})
    pq.write_table(phrases, folder / PHRASES, write_page_checksum=True)
    counts = dict.fromkeys(("rows_in", "rows_out", "phrase_rows"), len(samples))
    for name in ("_STARTED.json", "_SUCCESS.json"):
        write_json(folder / name, {"schema": 1, "hash": "x", "identity": {}, **counts})
    return folder


def stage_of(folder: Path, table: pa.Table, **success: Any) -> Path:
    """What a stage leaves."""
    (folder / "data").mkdir(parents=True)
    pq.write_table(table, folder / "data" / "0.parquet", write_page_checksum=True)
    for name in ("_STARTED.json", "_SUCCESS.json"):
        write_json(folder / name, {"schema": 1, "hash": "x", "identity": {}, "rows_in": table.num_rows, **success})
    return folder


def run(capsys: pytest.CaptureFixture[str], *line: object) -> tuple[int, str]:
    """Exit code, and everything that was said."""
    code = cli.main(str(line[0]), list(map(str, line[1:])))
    said = capsys.readouterr()
    return code, said.out + said.err
