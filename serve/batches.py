"""Batch jobs: each is a Ray job with a constant entry point and a folder of its own.

OUT/ID/batch.json        what the service knows of it; outlives the service
OUT/ID/manifest.parquet  pictures and phrases
OUT/ID/config.yaml       settings of `jobs.predict`, written by the service
OUT/ID/results/          what `predict` writes; whole once it holds _SUCCESS.json

No text of a client reaches a command line. A job that Ray has forgotten, because it was started again, is submitted
again: `predict` goes on from what is on disk.
"""

from __future__ import annotations

import logging
import shlex
import shutil
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal, Protocol

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from filelock import FileLock, Timeout
from pydantic import BaseModel, Field
from ray.exceptions import RayError

from rlfseg.config import PredictConfig, SamplingConfig, ServeConfig, as_dict
from rlfseg.errors import DataError
from rlfseg.pipeline.cluster import cpus_needed, gpus_per_worker
from rlfseg.pipeline.folders import read_json, require_finished, write_json
from rlfseg.pipeline.stages import Committed
from rlfseg.pipeline.submit import once_taken
from serve.catalog import Catalog, Entry
from serve.incoming import check_steps
from serve.manifest import read_manifest
from serve.refusal import Refusal
from serve.schema import Batch, BatchRequest

log = logging.getLogger("ray.serve")
STATES = {"PENDING": "queued", "RUNNING": "running", "STOPPED": "cancelled"}
LOST = "JOB_SUPERVISOR_ACTOR_DIED"  # the node of the driver went away
MOST_STARTS = 10


class Record(BaseModel):
    """What `batch.json` holds; `starts` counts the jobs that were submitted, the last of which is the batch's."""

    id: str = Field(pattern="^[0-9a-f]{32}$")
    model: str
    images: int
    created: str
    starts: int = 0
    end: Literal["failed", "cancelled"] | None = None
    error: str | None = None


class Jobs(Protocol):
    """What is used of Ray's JobSubmissionClient."""

    def submit_job(self, *, entrypoint: str, submission_id: str) -> str:
        """Raises RuntimeError if the id is taken."""
        ...

    def list_jobs(self) -> list[Any]:
        """All jobs that this Ray knows."""
        ...

    def stop_job(self, job_id: str) -> bool:
        """Stops one."""
        ...


class Batches:
    """All batches of the service. Everything here blocks: call it in a thread.

    Args:
        config: Settings of the service, with `batches.out`.
        catalog: Its models.
        jobs: Makes a client of Ray's job server.
        have: Gives CPUs and GPUs of the cluster, such as {"CPU": 8.0}.
    """

    def __init__(
        self, config: ServeConfig, catalog: Catalog, jobs: Callable[[], Jobs], have: Callable[[], dict[str, float]]
    ):
        self.config, self.catalog, self.jobs, self.have = config, catalog, jobs, have
        self.out = Path(config.batches.out or "").absolute()
        self.out.mkdir(parents=True, exist_ok=True)
        # Of all fronts: two must not take the last free CPU, nor one start a batch that the other cancels
        self.lock = FileLock(self.out / ".lock", timeout=config.limits.deadline_s)

    def create(self, asked: BatchRequest) -> Batch:
        """Checks a batch, writes its folder and starts its job.

        Args:
            asked: Checked by the schema.

        Returns:
            The batch, queued.

        Raises:
            Refusal: A path outside the roots, a wrong manifest, an unknown model, too few CPUs or GPUs, or Ray does not
                take the job; nothing of the batch is left then.
        """
        entry = self.catalog[asked.model]
        self.catalog.check(entry, asked.rescale)
        check_steps(asked, self.config.limits)
        table = read_manifest(asked, self.config)
        created = datetime.now(UTC).isoformat(timespec="seconds")
        record = Record(id=uuid.uuid4().hex, model=entry.name, images=table.num_rows, created=created)
        folder = self.out / record.id
        settings = self._settings(asked, entry, folder)
        with self._alone():
            self._check_budget()
            folder.mkdir()
            try:
                pq.write_table(table, folder / "manifest.parquet")
                text = yaml.safe_dump(as_dict(settings), allow_unicode=True)
                (folder / "config.yaml").write_text(text, encoding="utf-8")
                self._write(record)
                return self._batch(self._started(record), "queued")
            except BaseException:
                shutil.rmtree(folder, ignore_errors=True)  # what was refused must not be started later
                raise

    def get(self, batch_id: str) -> Batch:
        """State and progress of a batch; raises Refusal where there is none."""
        return self._batch(*self._settled(self._read(batch_id), self._known_jobs()))

    def list(self) -> list[Batch]:
        """All batches, newest first, without those whose folders are damaged: the log names them."""
        found = []
        for record, state in self._all():
            try:
                found.append(self._batch(record, state))
            except (DataError, OSError, pa.ArrowException):
                log.exception("batch %s is left out: its results are damaged", record.id)
        return found

    def cancel(self, batch_id: str) -> Batch:
        """Stops a batch for good; one that has ended stays as it is.

        Args:
            batch_id: Of the batch.

        Returns:
            The batch; it is cancelled only once Ray has agreed to stop it.

        Raises:
            Refusal: There is none, or Ray does not stop it.
        """
        with self._alone():
            record, known = self._read(batch_id), self._known_jobs()
            if self._seen(record, known) in ("queued", "running", "lost"):
                with _of_ray("stop the batch"):
                    for name, job in known.items():
                        if name.startswith(f"{record.id}-") and _status(job) in ("PENDING", "RUNNING"):
                            self.jobs().stop_job(name)
                record = self._ended(record, "cancelled")
            return self._batch(*self._settled(record, known))

    def resume(self) -> None:
        """Starts what Ray has forgotten, when the service starts; raises Refusal while Ray does not take it all."""
        lost = [record.id for record, state in self._all() if state == "lost"]
        if lost:
            raise Refusal("failed", f"Ray did not take {len(lost)} of the batches; the server's log has the cause")

    # --- states ----------------------------------------------------------------------------------------------------

    def _all(self) -> Iterator[tuple[Record, str]]:
        known = self._known_jobs()
        for record in sorted(self._records(), key=attrgetter("created"), reverse=True):
            yield self._settled(record, known)

    def _seen(self, record: Record, known: dict[str, Any]) -> str:
        """The state that a record, its folder and Ray's jobs tell: one of `Batch`, or `lost`, to be started again."""
        if record.end:
            return record.end
        if (self.out / record.id / "results" / "_SUCCESS.json").is_file():
            return "succeeded"
        job = known.get(_job(record))
        if job is None or job.error_type == LOST:
            return "lost" if record.starts < MOST_STARTS else "failed"
        return STATES.get(_status(job), "failed")

    def _settled(self, record: Record, known: dict[str, Any]) -> tuple[Record, str]:
        """A record and its state, after what is lost was started again and an end was written down."""
        state = self._seen(record, known)
        if record.end or state in ("queued", "running", "succeeded"):
            return record, state
        try:
            with self._alone():
                record, known = self._read(record.id), self._known_jobs()  # as others have left them meanwhile
                state = self._seen(record, known)
                if state == "lost":
                    return self._started(record), "queued"
                if state in ("failed", "cancelled") and not record.end:
                    record = self._ended(record, state, known.get(_job(record)))
        except (Refusal, OSError):
            log.exception("batch %s is %s, which is acted upon when it is next asked for", record.id, state)
        return record, state

    def _batch(self, record: Record, state: Any) -> Batch:
        results = self.out / record.id / "results"
        return Batch(
            id=record.id,
            state="queued" if state == "lost" else state,
            model=record.model,
            images=record.images,
            done=Committed(results)(),
            refused=len(require_finished(results).get("refused", ())) if state == "succeeded" else None,
            results=str(results),
            created=record.created,
            error=record.error,
        )

    # --- changes, which only one makes at a time -------------------------------------------------------------------

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Among all threads of all fronts."""
        try:
            with self.lock:
                yield
        except Timeout:
            raise Refusal("overloaded", "other batches are being started or stopped; ask again later") from None

    def _started(self, record: Record) -> Record:
        file = self.out / record.id / "config.yaml"
        command = shlex.join([sys.executable, "-m", "jobs.predict", "--config", str(file)])
        record = record.model_copy(update={"starts": record.starts + 1})
        with _of_ray("take the batch"):
            try:
                once_taken(lambda: self.jobs().submit_job(entrypoint=command, submission_id=_job(record)))
            except RuntimeError:
                # A front that died before it wrote this down has submitted it: the id is taken, and its job is this one
                if _job(record) not in self._known_jobs():
                    raise
        self._write(record)
        return record

    def _ended(self, record: Record, end: str, job: Any = None) -> Record:
        error = None
        if end == "failed":
            error = "its job was lost too often" if job is None or job.error_type == LOST else _cause(job.message)
        record = record.model_copy(update={"end": end, "error": error})
        self._write(record)
        return record

    def _known_jobs(self) -> dict[str, Any]:
        with _of_ray("list its jobs"):
            return {job.submission_id: job for job in self.jobs().list_jobs() if job.submission_id}

    # --- records ---------------------------------------------------------------------------------------------------

    def _records(self) -> Iterator[Record]:
        for path in self.out.glob("*/batch.json"):
            try:
                yield self._read(path.parent.name)
            except Refusal:
                log.exception("%s is left out", path)

    def _read(self, batch_id: str) -> Record:
        path = self.out / batch_id / "batch.json"
        if not path.is_file():
            raise Refusal("not_found", f"batch {batch_id}: there is none")
        try:
            return Record.model_validate(read_json(path) | {"id": batch_id})
        except ValueError as error:
            reason = f"batch {batch_id}: its record is damaged; the server's log has the cause"
            raise Refusal("failed", reason) from error

    def _write(self, record: Record) -> None:
        write_json(self.out / record.id / "batch.json", record.model_dump(exclude_none=True))

    # --- settings and room -------------------------------------------------------------------------------------------

    def _settings(self, asked: BatchRequest, entry: Entry, folder: Path) -> PredictConfig:
        return PredictConfig(
            images=str(folder / "manifest.parquet"),
            out=str(folder / "results"),
            adapter=entry.reference,
            sampling=SamplingConfig(steps=asked.steps, rescale=asked.rescale),
            threshold=asked.threshold,
            pixels=self.config.limits.pixels,
            png=asked.png,
            overlays=asked.overlays,
            device=self.config.device,
            fast=self.config.fast,
            run=self.config.batches.run,
            on_error="skip",
        )

    def _check_budget(self) -> None:
        """Refuses a batch that would wait for CPUs or GPUs that the service itself or other batches hold."""
        config, run = self.config, self.config.batches.run
        replicas = config.max_replicas or config.replicas
        active = sum(state in ("queued", "running", "lost") for _, state in self._all())
        have = self.have()
        for kind, each, service in (
            ("CPU", cpus_needed(run, finish=True), replicas * config.cpus + config.fronts),
            ("GPU", run.workers * gpus_per_worker(run, config.device), replicas * (config.gpus or 0)),
        ):
            if service + (active + 1) * each > have.get(kind, 0):
                raise Refusal(
                    "short",
                    f"a batch takes {each:g} {kind}s; this Ray has {have.get(kind, 0):g}, of which the service holds "
                    f"{service:g} and {active} running batches {active * each:g}: ask again later, lower "
                    f"batches.run, or start Ray with more",
                )


@contextmanager
def _of_ray(what: str) -> Iterator[None]:
    """Trouble of Ray's job server, and on the way to it, as a refusal."""
    try:
        yield
    except (RuntimeError, OSError, RayError) as error:  # OSError: of `requests`
        log.exception("Ray did not %s", what)
        raise Refusal("failed", f"Ray did not {what}; the server's log has the cause") from error


def _job(record: Record) -> str:
    return f"{record.id}-{record.starts}"


def _status(job: Any) -> str:
    return str(getattr(job.status, "value", job.status))


def _cause(message: str | None) -> str:
    """The line in which the command says why it failed, or the last one."""
    lines = (message or "no message").strip().splitlines()
    return next((line for line in reversed(lines) if line.startswith("rlfseg predict:")), lines[-1])[:500]
