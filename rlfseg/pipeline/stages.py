"""What the map stages share: a plain class becomes a Ray Data pipeline in which every row is accounted for.

    index rows (id, ...)  ->  load on CPU  ->  work in actors, on GPUs where there are some  ->  Parquet, a row an id

Resume is Ray Data's own checkpointing by id. A bad sample is a row with a status, never an exception, which would cost
its whole block. A sample that kills its process is tried alone and refused after two deaths. Nothing counts as finished
before rows in = rows out + rows refused.
"""

from __future__ import annotations

import logging
import os
import pickle
import time
from collections.abc import Callable, Sequence
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
from rlfseg.errors import BadSample, DataError, ResourceError, RlfsegError
from rlfseg.pipeline.folders import begin, finish, require_finished
from rlfseg.pipeline.progress import Progress
from rlfseg.pipeline.rows import OK, Attempts, Row, Rows, Work, refused

MOVED = pa.schema([("id", pa.string()), ("packed", pa.binary()), ("error", pa.string())])


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A stage as data.

    Attributes:
        name: For progress and messages.
        rows: Index rows, with a unique string column `id`; small, without pixels.
        load: Picklable, index row -> row with pixels; raises BadSample. Runs in CPU tasks.
        work: Class or factory of the per-item work; called inside each actor with `kwargs`.
        kwargs: Its arguments, picklable.
        schema: Columns of the output; `id` and `status` come first.
        out: Folder to write.
        run: Actors, batch size and so on.
        gpus: GPUs an actor.
        identity: Whatever changes the result; another identity in the same folder is refused.
        on_error: `stop` or `skip`.
        finalize: Called when all rows are written and before the folder counts as whole; may correct the counts.
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
    gpus: float = 0
    on_error: str = "stop"
    finalize: Callable[[Row], Row] = lambda counts: counts


@dataclass(frozen=True, kw_only=True)
class Summary:
    """How a stage ended: rows in = rows out + rows refused."""

    name: str
    out: str
    rows_in: int
    rows_out: int
    refused: dict[str, str]
    seconds: float
    resumed: int = 0
    figures: dict[str, float] = field(default_factory=dict)


# --- Ray -----------------------------------------------------------------------------------------------------------


def connect() -> None:
    """Joins the Ray that $RAY_ADDRESS names, or starts one here with a few more logical CPUs than cores."""
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    if not ray.is_initialized():
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # its C++ part tells users what only its makers can use
        remote = os.environ.get("RAY_ADDRESS")
        here: dict[str, Any] = {} if remote else {"num_cpus": max(8, os.cpu_count() or 1), "include_dashboard": False}
        ray.init(log_to_driver=False, configure_logging=False, **here)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.verbose_progress = False


def gpus_per_worker(run: WorkersConfig, device: str) -> float:
    """GPUs that a worker reserves: as told, else 1 where the cluster has any and the device may be one."""
    if run.gpus is not None:
        return run.gpus
    return 1.0 if device != "cpu" and ray.cluster_resources().get("GPU", 0) > 0 else 0.0


def check_budget(name: str, cpus: float, gpus: float) -> None:
    """Refuses what would wait for ever.

    Args:
        name: The stage, for the message.
        cpus: Logical CPUs that it takes at once.
        gpus: GPUs that it takes at once.

    Raises:
        ResourceError: More is asked for than the cluster has; names the sums.
    """
    have = ray.cluster_resources()
    for kind, wanted in (("CPU", cpus), ("GPU", gpus)):
        if wanted > have.get(kind, 0):
            raise ResourceError(
                f"{name} needs {wanted:g} {kind}s and this Ray has {have.get(kind, 0):g}: lower run.workers, "
                f"run.{kind.lower()}s or run.loaders, or start Ray with more (`ray start --head --num-cpus N`; logical "
                "CPUs may exceed the cores)"
            )


def run_stage(stage: Stage) -> Summary:
    """Runs a stage to its end, going on from where an earlier start stopped.

    Args:
        stage: What to run.

    Returns:
        Counts, refusals and seconds.

    Raises:
        DataError: Rows were lost or doubled, or the folder belongs to another job.
        BadSample: A sample was refused and `on_error` is `stop`.
        ResourceError: The cluster is too small.
    """
    start = time.monotonic()
    state = begin(stage.out, stage.identity)
    if state == "done":
        done = require_finished(stage.out)
        return _summary(stage, done, 0.0, resumed=done["rows_in"])
    connect()
    # a reader, a writer, and the filter that drops finished ids on resume take a CPU each
    check_budget(stage.name, stage.run.workers * stage.run.cpus + stage.run.loaders + 3, stage.run.workers * stage.gpus)
    data = stage.out / "data"
    before = _committed(data)
    with Progress(stage.name, total=stage.rows.num_rows, count=lambda: _committed(data)):
        try:
            _pipeline(stage).write_parquet(str(data))
        except Exception as error:  # noqa: BLE001 -- raised again: Ray wraps ours in its own; the user must see the cause
            raise our_cause(error) or error from None
    counts = stage.finalize(_account(stage))
    finish(stage.out, stage.identity, counts)
    return _summary(stage, counts, time.monotonic() - start, resumed=before)


def _pipeline(stage: Stage) -> Dataset:
    run = stage.run
    rows_per_task = max(run.batch_size, min(256, -(-stage.rows.num_rows // (8 * run.workers))))
    ds = ray.data.read_datasource(IndexDatasource(stage.rows, rows_per_task))
    ds.context.checkpoint_config = CheckpointConfig(
        id_column="id", checkpoint_path=str(stage.out / "_checkpoint"), delete_checkpoint_on_success=False
    )
    ds = ds.map_batches(
        _Load(stage.load),
        batch_size=run.batch_size,
        batch_format="pyarrow",
        compute=TaskPoolStrategy(size=run.loaders),
        memory=run.memory_gb * 2**30,  # also keeps this stage from being fused into the actors
    )
    threads = max(1, (os.cpu_count() or 1) // run.workers)
    worked: Dataset = ds.map_batches(
        _Worker,
        fn_constructor_kwargs={
            "stage": stage.name,
            "make": stage.work,
            "kwargs": stage.kwargs,
            "schema": stage.schema,
            "attempts": stage.out / "_attempts",
            "stop": stage.on_error == "stop",
            "threads": threads,
        },
        batch_size=run.batch_size,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(size=run.workers),
        num_cpus=run.cpus,
        num_gpus=stage.gpus or None,
    )
    return worked


class IndexDatasource(Datasource):
    """Index rows as a Ray Data source: ids only, so that finished ones are dropped before any pixel is read."""

    def __init__(self, rows: pa.Table, rows_per_task: int):
        super().__init__()  # type: ignore[no-untyped-call]
        self.rows, self.rows_per_task = rows, rows_per_task

    def estimate_inmemory_data_size(self) -> int | None:
        """Of the index rows, in bytes."""
        return int(self.rows.nbytes)

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None
    ) -> list[ReadTask]:
        """A task every `rows_per_task` rows."""
        starts = range(0, self.rows.num_rows, self.rows_per_task)
        parts = [self.rows.slice(n, self.rows_per_task).combine_chunks() for n in starts]
        return [
            ReadTask(
                partial(iter, [part]),
                BlockMetadata(num_rows=part.num_rows, size_bytes=part.nbytes, input_files=None, exec_stats=None),
                per_task_row_limit=per_task_row_limit,
            )
            for part in parts
        ]


class _Load:
    """Reads pixels; what can't be read becomes a row with an error."""

    def __init__(self, load: Callable[[Row], Row]):
        self.load = load

    def __call__(self, table: pa.Table) -> pa.Table:
        return pa.Table.from_pylist([self._row(row) for row in table.to_pylist()], schema=MOVED)

    def _row(self, row: Row) -> Row:
        try:
            # Written and read by this job alone, inside Ray's object store
            return {"id": row["id"], "packed": pickle.dumps(self.load(row), protocol=5), "error": None}
        except BadSample as error:
            return {"id": row["id"], "packed": None, "error": str(error)}


class _Worker:
    """An actor: holds the work, keeps the books."""

    def __init__(
        self,
        stage: str,
        make: Callable[..., Work],
        kwargs: Row,
        schema: pa.Schema,
        attempts: Path,
        stop: bool,
        threads: int,
    ):
        import torch

        torch.set_num_threads(threads)  # Ray allows one, whatever the node has
        self.stage, self.schema, self.stop = stage, schema, stop
        self.attempts = Attempts(attempts)
        self.work = make(**kwargs)

    def __call__(self, table: pa.Table) -> pa.Table:
        moved = table.to_pylist()
        rows = [pickle.loads(m["packed"]) for m in moved if m["error"] is None]  # noqa: S301  packed by _Load
        done = [refused(m, m["error"]) for m in moved if m["error"] is not None] + self.attempts.guard(self.work, rows)
        check_rows(self.stage, [m["id"] for m in moved], done)
        bad = [row for row in done if row["status"] != OK]
        if bad and self.stop:
            raise BadSample(bad[0]["status"].removeprefix("refused: "), file=self.stage, sample=bad[0]["id"])
        return pa.Table.from_pylist(done, schema=self.schema)


def check_rows(stage: str, ids: Sequence[str], rows: Rows) -> None:
    """Rows in = rows out: raises if a row is missing, doubled or new; our own bug, not the user's."""
    if sorted(ids) != sorted(row["id"] for row in rows):
        raise AssertionError(f"{stage} lost or doubled rows: {len(ids)} in, {len(rows)} out")


def our_cause(error: BaseException | None) -> RlfsegError | None:
    """The first of our own errors in a chain of causes, as Ray Data and Ray Train nest them."""
    while error is not None:
        if isinstance(error, RlfsegError):
            return error
        of_workers = getattr(error, "worker_failures", {}).values()
        error = next(iter(of_workers), None) or getattr(error, "cause", None) or error.__cause__
    return None


def _committed(data: Path) -> int:
    total = 0
    for path in data.glob("*.parquet"):
        try:
            total += pq.read_metadata(path).num_rows
        except (OSError, pa.ArrowInvalid):
            continue  # being written
    return total


def _account(stage: Stage) -> Row:
    status: dict[str, str] = {}
    for path in (stage.out / "data").glob("*.parquet"):
        table = pq.read_table(path, columns=["id", "status"])
        for row in table.to_pylist():
            if row["id"] in status:
                raise DataError(f"{stage.out}: {row['id']} was written twice")
            status[row["id"]] = row["status"]
    missing = set(stage.rows["id"].to_pylist()) - set(status)
    if missing:
        raise DataError(f"{stage.out}: {len(missing)} of {stage.rows.num_rows} rows are missing, e.g. {min(missing)}")
    bad = {k: v.removeprefix("refused: ") for k, v in sorted(status.items()) if v != OK}
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
    )
