"""What the map stages share: a plain class becomes a Ray Data pipeline in which every row is accounted for.

    index rows  ->  load on CPU  ->  work in actors, on GPUs where there are some  ->  finish on CPU  ->  Parquet

All of them run at the same time on different rows. Resume is Ray Data's own checkpointing by id. A bad sample is a row
with a status, never an exception, which would cost its whole block. A sample that kills its process, in any of the
steps, is tried alone and refused after two deaths. Nothing counts as finished before rows in = rows out + rows refused.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray
from ray.data import ActorPoolStrategy, Dataset, TaskPoolStrategy
from ray.data.block import BlockMetadata
from ray.data.checkpoint import CheckpointConfig
from ray.data.datasource import Datasource, ReadTask

from rlfseg.config import WorkersConfig
from rlfseg.errors import BadSample, DataError, RlfsegError
from rlfseg.pipeline.causes import full_disk, full_gpu, our_cause
from rlfseg.pipeline.cluster import check_budget, check_nodes, connect, cpus_needed, hide_unreserved_gpus, nodes, where
from rlfseg.pipeline.folders import alone, begin, finish, read_table, require_finished, unclaim, unseen
from rlfseg.pipeline.progress import Progress
from rlfseg.pipeline.rows import OK, Attempts, Row, RowByRow, Rows, Work, pack, reason, runs, unpack

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
# A task is so large a part of a worker's share: of all rows, which a kill may cost, and of those that are left
OF_ALL, OF_THE_REST = 16, 4
CALL_BYTES = 2**30  # most that a call of the work gives; it goes through Ray's object store in one piece


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A stage as data.

    Attributes:
        name: For progress and messages.
        rows: Index rows, with a unique string column `id`; small, without pixels.
        load: Picklable, index row -> row with pixels; raises BadSample. Runs in CPU tasks.
        work: Class or factory of the per-item work; called inside each actor with `kwargs`.
        kwargs: Its arguments, picklable.
        finish: Picklable, a row as the work left it -> columns of `schema`; raises BadSample. Runs in CPU tasks, for
            which no GPU waits; None: the work gives these columns.
        schema: Columns of the output; `id` and `status` come first.
        out: Folder to write.
        run: Actors, batch size and so on.
        gpus: GPUs an actor.
        arithmetic: What the work computes in, see `arithmetic`; for the Summary.
        identity: Whatever changes the result; another identity in the same folder is refused.
        unit: What a row is, in the plural.
        largest_task: Most rows that a worker does before they are on disk.
        row_group: Rows that are read together from a file of the output; None: all of them.
        weigh: Picklable, a loaded row -> bytes that the work makes of it; None: they are few.
        on_error: `stop` or `skip`.
        finalize: Called when all rows are written and before the folder counts as whole; may correct the counts, and
            add `figures` and `notes` for the Summary.
    """

    name: str
    rows: pa.Table
    load: Callable[[Row], Row]
    work: Callable[..., Work]
    schema: pa.Schema
    out: Path
    run: WorkersConfig
    identity: Row
    kwargs: Row = field(default_factory=dict)
    finish: Callable[[Row], Row] | None = None
    gpus: float = 0
    arithmetic: str = ""
    unit: str = "images"
    largest_task: int = 256
    row_group: int | None = None
    weigh: Callable[[Row], int] | None = None
    on_error: str = "stop"
    finalize: Callable[[Row], Row] = lambda counts: counts


@dataclass(frozen=True, kw_only=True)
class Summary:
    """How a stage ended: rows in = rows out + rows refused; `where` it ran; `notes` that the user should read."""

    name: str
    out: str
    rows_in: int
    rows_out: int
    refused: dict[str, str]
    seconds: float
    resumed: int = 0
    pace: str = ""  # how fast it was, where rows a second don't tell
    where: str = ""
    figures: dict[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def run_stage(stage: Stage) -> Summary:
    """Runs a stage to its end, going on from where an earlier start stopped.

    Args:
        stage: What to run.

    Returns:
        Counts, refusals and seconds.

    Raises:
        DataError: Rows were lost or doubled, or the folder belongs to another job, or to one that runs.
        BadSample: A sample was refused and `on_error` is `stop`.
        ResourceError: The cluster is too small.
    """
    start = time.monotonic()
    state = begin(stage.out, stage.identity)
    if state == "done":
        done = require_finished(stage.out)
        return _summary(stage, done, 0.0, resumed=done["rows_in"])
    connect()
    cpus, gpus = cpus_needed(stage.run, bool(stage.finish)), stage.run.workers * stage.gpus
    check_budget(stage.name, cpus, gpus, lower="its workers, loaders, cpus or gpus")
    check_nodes(stage.name, {"run.cpus": stage.run.cpus, "run.gpus": stage.gpus, "run.memory_gb": stage.run.memory_gb})
    with alone(stage.out):
        count = Committed(stage.out)
        before = count()
        _work_off(stage, count)
        counts = stage.finalize(_account(stage))
        shutil.rmtree(stage.out / "_attempts", ignore_errors=True)
        finish(stage.out, stage.identity, counts)
    return _summary(stage, counts, time.monotonic() - start, resumed=before)


def _work_off(stage: Stage, count: Committed) -> None:
    """Writes every row that isn't on disk yet."""
    for notes in (stage.out / "_attempts").glob("*"):
        Attempts(notes).forgive()
    with Progress(stage.name, total=stage.rows.num_rows, count=count, unit=stage.unit):
        try:
            _written(stage, _pipeline(stage))
        except Exception as error:  # noqa: BLE001 -- raised again: Ray wraps ours in its own; the user must see the cause
            ours = our_cause(error)
            unclaim(stage.out, ours, count)
            raise ours or full_disk(error, stage.out) or full_gpu(error, stage.out) or error from None


def _written(stage: Stage, rows: Dataset) -> None:
    # Blocks may hold a few rows each, where pixels or scores are many. Where a GPU makes them in no time they wait for
    # each other; on a CPU, where a row may take a minute, each block is safe at once
    together = largest_task(stage.rows.num_rows, stage.run, stage.largest_task) if stage.gpus else 0
    rows.write_parquet(
        str(stage.out / "data"),
        min_rows_per_file=together or None,
        row_group_size=stage.row_group,
        write_page_checksum=True,  # for `verify`
    )


def _pipeline(stage: Stage) -> Dataset:
    run = stage.run
    parts = split(stage.rows, run, stage.largest_task)
    ds = read_rows(parts)
    ds.context.checkpoint_config = CheckpointConfig(
        id_column="id", checkpoint_path=str(stage.out / "_checkpoint"), delete_checkpoint_on_success=False
    )

    ds.context.execution_no_progress_timeout_s = -1  # a task may take as long as it likes, and tells nothing before

    def step(name: str, last: bool) -> Row:
        own = {"name": name, "schema": stage.schema if last else None}
        return own | {"stage": stage.name, "out": stage.out, "stop": stage.on_error == "stop"}

    batches: Any = {"batch_size": run.batch_size, "batch_format": "pyarrow"}
    on_cpu = batches | {
        "compute": TaskPoolStrategy(size=max(1, min(run.loaders, len(parts)))),
        "memory": run.memory_gb * 2**30,  # also keeps the step from being fused into the actors
    }
    ds = ds.map_batches(Step(RowByRow(stage.load), **step("load", last=False)), **on_cpu)
    ds = ds.map_batches(
        _Actor,
        fn_constructor_kwargs={
            "make": stage.work,
            "kwargs": stage.kwargs,
            "workers": -(-run.workers // nodes()),
            "step": step("work", last=stage.finish is None) | {"weigh": stage.weigh},
        },
        compute=ActorPoolStrategy(size=run.workers),
        num_cpus=run.cpus,
        num_gpus=stage.gpus or None,
        **batches,
    )
    if stage.finish is not None:
        ds = ds.map_batches(Step(RowByRow(stage.finish), **step("finish", last=True)), **on_cpu)
    return ds


def read_rows(parts: list[pa.Table]) -> Dataset:
    """Index rows as a data set, a read task and a block a table."""
    # Else Ray splits them again, by the number of CPUs, and batches are of whatever rows arrive together
    ds: Dataset = ray.data.read_datasource(IndexDatasource(parts), override_num_blocks=max(1, len(parts)))
    return ds


def split(rows: pa.Table, run: WorkersConfig, largest: int) -> list[pa.Table]:
    """Index rows, a table a task: large ones first, which cost least, small ones last, so that workers end together.

    Whole batches: who is in one with whom, and so a result's last bits, depend on no number of CPUs or nodes.

    Args:
        rows: All of them.
        run: Settings of the workers.
        largest: Most rows a task, where a batch is not more.

    Returns:
        All rows, in order.
    """
    parts, start, workers = list[pa.Table](), 0, max(run.workers, run.loaders)
    largest = largest_task(rows.num_rows, run, largest)
    while start < rows.num_rows:
        share = min(largest, (rows.num_rows - start) // (OF_THE_REST * workers))
        parts.append(rows.slice(start, max(1, share // run.batch_size) * run.batch_size).combine_chunks())
        start += parts[-1].num_rows
    return parts


def largest_task(rows: int, run: WorkersConfig, largest: int) -> int:
    """Rows of a task while many are left, of so many in all; 0 where a task is a batch."""
    return min(largest, rows // (OF_ALL * max(run.workers, run.loaders)))


class IndexDatasource(Datasource):
    """Index rows as a Ray Data source: ids only, so that finished ones are dropped before any pixel is read."""

    def __init__(self, parts: list[pa.Table]):
        super().__init__()  # type: ignore[no-untyped-call]
        self.parts = parts

    def estimate_inmemory_data_size(self) -> int | None:
        """Of the index rows, in bytes."""
        return sum(int(part.nbytes) for part in self.parts)

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None
    ) -> list[ReadTask]:
        """A task for each of the parts."""
        return [
            ReadTask(
                partial(iter, [part]),
                BlockMetadata(num_rows=part.num_rows, size_bytes=part.nbytes, input_files=None, exec_stats=None),
                per_task_row_limit=per_task_row_limit,
            )
            for part in self.parts
        ]


class Step:
    """What runs on a batch of rows in one process: unpacks them, does the work, keeps the books, packs them again.

    Args:
        work: The per-item work.
        stage: For messages.
        out: Folder of the stage, which all nodes must see: they write into it.
        name: Of the step, for its notes on what is being worked on.
        schema: Columns to write; None: rows go on to another step.
        stop: Whether a refused row ends the job.
        weigh: A row -> bytes that the work makes of it; a call of the work gives at most CALL_BYTES.
    """

    def __init__(
        self,
        work: Work,
        *,
        stage: str,
        out: Path,
        name: str,
        schema: pa.Schema | None,
        stop: bool,
        weigh: Callable[[Row], int] | None = None,
    ):
        self.work, self.stage, self.out, self.schema, self.stop, self.weigh = work, stage, out, schema, stop, weigh
        self.attempts = Attempts(out / "_attempts" / name)

    def __call__(self, table: pa.Table) -> Iterator[pa.Table]:
        """Index rows or packed rows in; packed rows or columns of `schema` out, in another order."""
        if blind := unseen(self.out):
            raise blind
        rows = unpack(table)
        for part in runs(rows, self.weigh, CALL_BYTES) if self.weigh else [rows]:
            yield self._worked(part)

    def _worked(self, rows: Rows) -> pa.Table:
        waiting = [row for row in rows if row.get("status", OK) == OK]
        done = [row for row in rows if row.get("status", OK) != OK] + self.attempts.guard(self.work, waiting)
        check_rows(self.stage, [row["id"] for row in rows], done)
        bad = next((row for row in done if row["status"] != OK), None)
        if bad and self.stop:
            raise BadSample(reason(bad["status"]), file=self.stage, sample=bad["id"])
        if self.schema is not None:
            return pa.Table.from_pylist(done, schema=self.schema)
        return pack(done)


class _Actor:
    """Holds the work; made inside the process that runs it, so that nothing of a GPU is ever sent."""

    def __init__(self, make: Callable[..., Work], kwargs: Row, workers: int, step: Row):
        keep_freed_memory()
        hide_unreserved_gpus()
        self.step: Step | RlfsegError
        try:
            self.step = Step(make(**kwargs), **step)
        except RlfsegError as error:
            self.step = error  # raised here, only its text would arrive
        if torch := sys.modules.get("torch"):
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // workers))  # of this node; Ray allows one

    def __call__(self, table: pa.Table) -> Iterator[pa.Table]:
        if isinstance(self.step, RlfsegError):
            raise self.step
        yield from self.step(table)


def keep_freed_memory() -> None:
    """Has this process keep up to 128 MiB that it has freed. Without glibc it does nothing.

    glibc gives freed memory back to the system at once, which zeroes it before it gives it again: a network on the CPU,
    which takes and frees some MiB a layer, spends a seventh of its time in that.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, 32 * 2**20)  # as high as glibc goes; by itself it gets there step by step
        libc.mallopt(M_TRIM_THRESHOLD, 128 * 2**20)


def check_rows(stage: str, ids: Sequence[str], rows: Rows) -> None:
    """Rows in = rows out: raises if a row is missing, doubled or new; our own bug, not the user's."""
    if sorted(ids) != sorted(row["id"] for row in rows):
        raise AssertionError(f"{stage} lost or doubled rows: {len(ids)} in, {len(rows)} out")


class Committed:
    """Rows of a stage that no kill can take back, as Ray Data's checkpoint tells; each file is looked into once.

    Args:
        out: Folder of the stage.
    """

    def __init__(self, out: Path):
        self.checkpoint, self.rows = out / "_checkpoint", dict[str, int]()

    def __call__(self) -> int:
        """Their number now."""
        for path in self.checkpoint.glob("*.parquet"):
            if path.name not in self.rows and not path.name.endswith(".pending.parquet"):
                self.rows[path.name] = pq.read_metadata(path).num_rows
        return sum(self.rows.values())


def _account(stage: Stage) -> Row:
    status: dict[str, str] = {}
    for path in (stage.out / "data").glob("*.parquet"):
        table = read_table(path, ["id", "status"])
        for row in table.to_pylist():
            if row["id"] in status:
                raise DataError(f"{stage.out}: {row['id']} was written twice")
            status[row["id"]] = row["status"]
    ids = set(stage.rows["id"].to_pylist())
    if strange := sorted(status.keys() - ids):
        raise DataError(f"{stage.out}: {strange[0]} is none of this job's rows: its files are mixed with another's")
    missing = ids - status.keys()
    if missing:
        raise DataError(f"{stage.out}: {len(missing)} of {stage.rows.num_rows} rows are missing, e.g. {min(missing)}")
    bad = {k: reason(v) for k, v in sorted(status.items()) if v != OK}
    return {"rows_in": stage.rows.num_rows, "rows_out": len(status) - len(bad), "refused": bad}


def _summary(stage: Stage, counts: Row, seconds: float, resumed: int) -> Summary:
    return Summary(
        name=stage.name,
        out=str(stage.out),
        rows_in=counts["rows_in"],
        rows_out=counts["rows_out"],
        refused=counts["refused"],
        seconds=seconds,
        resumed=resumed,
        where=where(stage.run.workers, stage.run.workers * stage.gpus, stage.arithmetic),
        figures=counts.get("figures", {}),
        notes=tuple(counts.get("notes", ())),
    )
