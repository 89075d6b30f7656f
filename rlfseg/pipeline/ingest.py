"""Training ingest: who sees which phrase in which step is a pure function of (seed, epoch, workers); Ray carries it.

The files of an epoch are shuffled by seed, then the phrases inside every few files; the sequence is cut into global
batches and every rank takes its own contiguous part. So all ranks have equal steps whatever the blocks, every phrase is
seen once an epoch (but for a tail shorter than a global batch, which is counted), and a resumed run starts at the very
step without reading what came before. Each worker reads its own part: no barrier and no coordinator between ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import torch
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask

from rlfseg.errors import DataError
from rlfseg.pipeline.encode import from_bytes
from rlfseg.pipeline.folders import require_finished
from rlfseg.pipeline.rows import OK
from rlfseg.training import Batch

WINDOW = 8  # files whose phrases are shuffled together
MAX_TASK = 1024  # phrases that one read task brings: bounds memory


@dataclass(frozen=True, kw_only=True)
class Latents:
    """What lies in a folder of `encode`.

    Attributes:
        files: Parquet files, sorted.
        phrases: For each file the number of phrases of each row; refused rows have none.
        shape: [C, h, w] of a latent.
    """

    files: tuple[str, ...]
    phrases: tuple[tuple[int, ...], ...]
    shape: tuple[int, ...]

    @property
    def total(self) -> int:
        """Phrases in all."""
        return sum(map(sum, self.phrases))

    def steps(self, world: int, batch: int) -> int:
        """Steps an epoch; the same on every rank."""
        return self.total // (world * batch)


def open_latents(folder: Path) -> Latents:
    """Reads the captions' counts, no latents.

    Args:
        folder: Written by `encode`.

    Returns:
        Files, and phrases in each of their rows.

    Raises:
        DataError: The folder is unfinished or holds no phrase.
    """
    require_finished(folder)
    files: list[str] = []
    phrases: list[tuple[int, ...]] = []
    shape: tuple[int, ...] = ()
    for path in sorted((folder / "data").glob("*.parquet")):
        rows = pq.read_table(path, columns=["status", "captions", "shape"]).to_pylist()
        files.append(str(path))
        phrases.append(tuple(len(r["captions"]) if r["status"] == OK else 0 for r in rows))
        shape = shape or next((tuple(r["shape"]) for r in rows if r["status"] == OK), ())
    latents = Latents(files=tuple(files), phrases=tuple(phrases), shape=shape)
    if not latents.total:
        raise DataError(f"{folder} holds no phrase to train on")
    return latents


def plan(
    latents: Latents, *, seed: int, epoch: int, rank: int, world: int, batch: int, start: int = 0
) -> list[tuple[int, int, int]]:
    """The phrases of one rank in one epoch in order, as (file, row, phrase), from step `start` on."""
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(latents.files))
    sequence: list[tuple[int, int, int]] = []
    for n in range(0, len(order), WINDOW):
        window = [
            (int(f), row, k)
            for f in order[n : n + WINDOW]
            for row, count in enumerate(latents.phrases[f])
            for k in range(count)
        ]
        sequence += [window[i] for i in rng.permutation(len(window))]
    own = latents.steps(world, batch) * batch
    return sequence[rank * own + start * batch : (rank + 1) * own]


class LatentSource(Datasource):
    """Planned phrases as a Ray Data source, a row a phrase, in the order of the plan."""

    def __init__(self, latents: Latents, order: Sequence[tuple[int, int, int]]):
        super().__init__()  # type: ignore[no-untyped-call]
        self.latents, self.order = latents, order

    def estimate_inmemory_data_size(self) -> int | None:
        """Of all planned latents, in bytes."""
        return len(self.order) * 3 * int(np.prod(self.latents.shape)) * 2

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None
    ) -> list[ReadTask]:
        """A task every MAX_TASK phrases."""
        parts = [self.order[n : n + MAX_TASK] for n in range(0, len(self.order), MAX_TASK)]
        return [
            ReadTask(
                partial(_one_block, self.latents.files, part),
                BlockMetadata(num_rows=len(part), size_bytes=None, input_files=None, exec_stats=None),
                per_task_row_limit=per_task_row_limit,
            )
            for part in parts
        ]


def _one_block(files: Sequence[str], part: Sequence[tuple[int, int, int]]) -> Iterator[pa.Table]:
    return iter([read_phrases(files, part)])


def read_phrases(files: Sequence[str], part: Sequence[tuple[int, int, int]]) -> pa.Table:
    """Reads phrases, each file once; columns id, caption, shape, z1, z0, z0_refined."""
    found: dict[tuple[int, int, int], dict[str, Any]] = {}
    for f in sorted({f for f, _, _ in part}):
        wanted = sorted({row for g, row, _ in part if g == f})
        table = pq.read_table(files[f]).take(wanted)
        for row, r in zip(wanted, table.to_pylist(), strict=True):
            for k, caption in enumerate(r["captions"]):
                found[f, row, k] = {
                    "id": f"{r['id']}#{k}",
                    "caption": caption,
                    "shape": r["shape"],
                    "z1": r["z1"],
                    "z0": r["z0"][k],
                    "z0_refined": r["z0_refined"][k],
                }
    return pa.Table.from_pylist([found[key] for key in part])


def batches(
    latents: Latents, *, seed: int, epoch: int, rank: int, world: int, batch: int, start: int = 0
) -> Iterator[Batch]:
    """Batches of one rank in one epoch from step `start` on, read ahead by Ray Data."""
    order = plan(latents, seed=seed, epoch=epoch, rank=rank, world=world, batch=batch, start=start)
    if not order:
        return
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    ds = ray.data.read_datasource(LatentSource(latents, order))
    for table in ds.iter_batches(batch_size=batch, batch_format="pyarrow", prefetch_batches=2, drop_last=True):
        yield to_batch(table)


def to_batch(table: pa.Table) -> Batch:
    """Rows of `read_phrases` as tensors."""
    c = table.to_pydict()
    shape = c["shape"][0]
    refined = [z if r is None else r for z, r in zip(c["z0"], c["z0_refined"], strict=True)]
    return Batch(
        ids=c["id"],
        phrases=c["caption"],
        z1=from_bytes(c["z1"], shape),
        z0=from_bytes(c["z0"], shape),
        z0_refined=from_bytes(refined, shape),
        has_refined=torch.tensor([r is not None for r in c["z0_refined"]]),
    )
