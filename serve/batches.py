"""Batch jobs: each is a Ray job with a constant entry point and a folder of its own.

OUT/ID/batch.json        what the service knows of it; outlives the service
OUT/ID/manifest.parquet  pictures and phrases
OUT/ID/config.yaml       settings of `jobs.predict`, written by the service
OUT/ID/results/          what `predict` writes; whole once it holds _SUCCESS.json

No text of a client reaches a command line. A job that Ray has forgotten, because it was started again, is submitted
again: `predict` goes on from what is on disk.
"""

from __future__ import annotations

import json
import logging
import shlex
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

import pyarrow.parquet as pq
import yaml

from rlfseg.config import PredictConfig, SamplingConfig, ServeConfig, as_dict
from rlfseg.pipeline.folders import require_finished, write_json
from rlfseg.pipeline.stages import Committed, cpus_needed, gpus_per_worker
from rlfseg.pipeline.submit import once_taken
from serve.catalog import Catalog
from serve.manifest import read_manifest
from serve.refusal import Refusal
from serve.schema import Batch, BatchRequest

log = logging.getLogger("ray.serve")
STATES = {"PENDING": "queued", "RUNNING": "running"}
LOST = "JOB_SUPERVISOR_ACTOR_DIED"  # the node of the driver went away
MOST_STARTS = 10
Record = dict[str, Any]


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
        self.lock = threading.Lock()  # of this process: two requests must not both take the last free CPU

    def create(self, asked: BatchRequest) -> Batch:
        """Checks a batch, writes its folder and starts its job.

        Args:
            asked: Checked by the schema.

        Returns:
            The batch, queued.

        Raises:
            Refusal: A path outside the roots, a wrong manifest, an unknown model, or too few CPUs or GPUs.
        """
        entry = self.catalog[asked.model]
        self.catalog.check(entry, asked.rescale)
        if asked.rescale != "none" and asked.steps != 1:
            raise Refusal("invalid", f"steps: {asked.steps} with rescale {asked.rescale}, which needs a single step")
        table = read_manifest(asked, self.config)
        batch_id = uuid.uuid4().hex
        folder = self.out / batch_id
        settings = PredictConfig(
            images=str(folder / "manifest.parquet"),
            out=str(folder / "results"),
            adapter=entry.reference,
            sampling=SamplingConfig(steps=asked.steps, rescale=asked.rescale),
            threshold=asked.threshold,
            png=asked.png,
            overlays=asked.overlays,
            device=self.config.device,
            fast=self.config.fast,
            run=self.config.batches.run,
            on_error="skip",
        )
        with self.lock:
            self._check_budget()
            folder.mkdir()
            pq.write_table(table, folder / "manifest.parquet")
            (folder / "config.yaml").write_text(yaml.safe_dump(as_dict(settings), allow_unicode=True), encoding="utf-8")
            record = {
                "id": batch_id,
                "model": entry.name,
                "images": table.num_rows,
                "created": datetime.now(UTC).isoformat(timespec="seconds"),
                "starts": 0,
            }
            self._write(record)
            self._submit(record)
        return self._batch(record, "queued")

    def get(self, batch_id: str) -> Batch:
        """State and progress of a batch; raises Refusal where there is none."""
        return self._state(self._read(batch_id), self._known_jobs())

    def list(self) -> list[Batch]:
        """All batches, newest first."""
        known = self._known_jobs()
        return [self._state(record, known) for record in sorted(self._records(), key=_created, reverse=True)]

    def cancel(self, batch_id: str) -> Batch:
        """Stops a batch for good; one that has ended stays as it is. Raises Refusal where there is none."""
        record = self._read(batch_id)
        batch = self._state(record, self._known_jobs())
        if batch.state not in ("queued", "running"):
            return batch
        record |= {"end": "cancelled"}
        self._write(record)
        try:
            self.jobs().stop_job(_job(record))
        except RuntimeError:
            log.exception("batch %s: its job could not be stopped", batch_id)
        return self._batch(record, "cancelled")

    def resume(self) -> None:
        """Starts what Ray has forgotten; called when the service starts."""
        self.list()

    # --- states ----------------------------------------------------------------------------------------------------

    def _state(self, record: Record, known: dict[str, Any]) -> Batch:
        if "end" in record:
            return self._batch(record, record["end"])
        if (self.out / record["id"] / "results" / "_SUCCESS.json").is_file():
            return self._batch(record, "succeeded")
        job = known.get(_job(record))
        lost = job is None or job.error_type == LOST
        if lost and record["starts"] < MOST_STARTS:
            self._submit(record)
            return self._batch(record, "queued")
        status = str(getattr(job.status, "value", job.status)) if job is not None else "lost"
        if status in STATES:
            return self._batch(record, STATES[status])
        record |= {"end": "failed", "error": _cause(job.message if job is not None else "its job was lost too often")}
        self._write(record)
        return self._batch(record, "failed")

    def _batch(self, record: Record, state: Any) -> Batch:
        results = self.out / record["id"] / "results"
        return Batch(
            id=record["id"],
            state=state,
            model=record["model"],
            images=record["images"],
            done=Committed(results)(),
            refused=len(require_finished(results)["refused"]) if state == "succeeded" else None,
            results=str(results),
            created=record["created"],
            error=record.get("error"),
        )

    def _submit(self, record: Record) -> None:
        file = self.out / record["id"] / "config.yaml"
        command = shlex.join([sys.executable, "-m", "jobs.predict", "--config", str(file)])
        record["starts"] += 1
        try:
            once_taken(lambda: self.jobs().submit_job(entrypoint=command, submission_id=_job(record)))
        except RuntimeError as error:
            # Another front replica may have been quicker: the id then is taken, and its job is this one
            if _job(record) not in self._known_jobs():
                log.exception("batch %s could not be started", record["id"])
                raise Refusal("failed", "Ray did not take the batch; the server's log has the cause") from error
        self._write(record)

    def _known_jobs(self) -> dict[str, Any]:
        return {job.submission_id: job for job in self.jobs().list_jobs() if job.submission_id}

    # --- records ---------------------------------------------------------------------------------------------------

    def _records(self) -> Iterator[Record]:
        for path in self.out.glob("*/batch.json"):
            yield json.loads(path.read_text())

    def _read(self, batch_id: str) -> Record:
        path = self.out / batch_id / "batch.json"
        if not path.is_file():
            raise Refusal("not_found", f"batch {batch_id}: there is none")
        return dict(json.loads(path.read_text()))

    def _write(self, record: Record) -> None:
        write_json(self.out / record["id"] / "batch.json", record)

    # --- room ------------------------------------------------------------------------------------------------------

    def _check_budget(self) -> None:
        """Refuses a batch that would wait for CPUs or GPUs that the service itself or other batches hold."""
        config, run = self.config, self.config.batches.run
        replicas = config.max_replicas or config.replicas
        active = sum(batch.state in ("queued", "running") for batch in self.list())
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


def _job(record: Record) -> str:
    return f"{record['id']}-{record['starts']}"


def _created(record: Record) -> str:
    return str(record["created"])


def _cause(message: str | None) -> str:
    """The line in which the command says why it failed, or the last one."""
    lines = (message or "no message").strip().splitlines()
    return next((line for line in reversed(lines) if line.startswith("rlfseg predict:")), lines[-1])[:500]
