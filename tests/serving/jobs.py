"""A Ray that is played, for tests of batch jobs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import requests

from rlfseg.config import ServeConfig
from serve.batches import Batches
from serve.catalog import Catalog
from serve.schema import BatchRequest

HAVE = {"CPU": 16.0}


@dataclass
class Job:
    submission_id: str
    entrypoint: str
    status: str = "PENDING"
    message: str | None = None
    error_type: str | None = None


@dataclass
class FakeRay:
    """Ray's job server as `Batches` sees it: ids are unique, and it forgets all when it is started again."""

    jobs: dict[str, Job] = field(default_factory=dict)
    stopped: list[str] = field(default_factory=list)
    refused: tuple[str, ...] = ()  # ids that it does not take, by how they begin
    deaf: bool = False  # to whoever wants a job stopped
    listing: Callable[[], Any] = lambda: None  # what happens just before jobs are listed
    submitting: Callable[[], Any] = lambda: None  # and before a job is taken
    without_agent: int = 0  # submissions to come before a node's agent is there

    def submit_job(self, *, entrypoint: str, submission_id: str) -> str:
        if self.without_agent:
            self.without_agent -= 1
            raise RuntimeError(
                "Request failed with status code 500: No available agent to submit job, please try again"
            )
        if submission_id.startswith(self.refused):
            raise requests.ConnectionError("Connection refused")
        hook, self.submitting = self.submitting, lambda: None
        hook()
        if submission_id in self.jobs:
            raise RuntimeError(f"Job with submission_id {submission_id} already exists")
        self.jobs[submission_id] = Job(submission_id, entrypoint)
        return submission_id

    def list_jobs(self) -> list[Any]:
        hook, self.listing = self.listing, lambda: None
        hook()
        return list(self.jobs.values())

    def stop_job(self, job_id: str) -> bool:
        self.stopped.append(job_id)
        if self.deaf:
            raise RuntimeError("Request failed with status code 500")
        self.jobs[job_id].status = "STOPPED"
        return True


def batches(config: ServeConfig, jobs: FakeRay, have: dict[str, float] = HAVE) -> Batches:
    return Batches(config, Catalog(config.models), lambda: jobs, lambda: have)


def asked(**fields: Any) -> BatchRequest:
    return BatchRequest(**({"images": ["a.png"], "phrases": ["dog"]} | fields))
