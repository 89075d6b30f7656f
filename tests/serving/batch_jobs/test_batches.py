"""Batch jobs with a Ray that is played, and over HTTP."""

from __future__ import annotations

import asyncio
import json
import shlex
import sys
import threading
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import pyarrow.parquet as pq
import pytest
import requests
import stamina
import yaml

from rlfseg.config import LimitsConfig, PredictConfig, ServeConfig
from rlfseg.pipeline.folders import write_json
from serve.api import build_api
from serve.catalog import Catalog
from serve.refusal import Refusal
from tests.serving.jobs import FakeRay, asked, batches
from tests.serving.played import Counted, is_ready


@pytest.mark.parametrize(("missing", "taken"), [(2, True), (99, False)])
def test_a_job_server_whose_agent_is_not_there_yet_is_asked_again(
    config: ServeConfig, missing: int, taken: bool
) -> None:
    server = FakeRay(without_agent=missing)
    with stamina.set_testing(True, attempts=3):  # without its waits
        if taken:
            assert batches(config, server).create(asked()).state == "queued"
        else:
            with pytest.raises(Refusal, match="did not take"):
                batches(config, server).create(asked())
    assert len(server.jobs) == taken


# --- jobs ----------------------------------------------------------------------------------------------------------


def test_the_job_is_constant_and_its_settings_are_a_file(config: ServeConfig, jobs: FakeRay, roots: Path) -> None:
    nasty = "dog'; touch /tmp/x; $(id) `id` \n--out=/"
    batch = batches(config, jobs).create(asked(phrases=[nasty], steps=2, threshold=0.5, overlays=True))
    assert (batch.state, batch.images, batch.done, batch.refused, batch.model) == ("queued", 1, 0, None, "tiny")
    [job] = jobs.jobs.values()
    folder = Path(config.batches.out or "") / batch.id
    assert shlex.split(job.entrypoint) == [
        sys.executable,
        "-m",
        "jobs.predict",
        "--config",
        str(folder / "config.yaml"),
    ]
    settings = PredictConfig(**yaml.safe_load((folder / "config.yaml").read_text()))
    assert (settings.sampling.steps, settings.threshold, settings.overlays, settings.png) == (2, 0.5, True, False)
    assert settings.pixels == config.limits.pixels == 24_000_000
    assert (settings.adapter, settings.on_error, settings.out) == ("tiny", "skip", str(folder / "results"))
    assert pq.read_table(settings.images).to_pylist() == [{"path": str(roots / "a.png"), "phrases": [nasty.strip()]}]


def test_states(config: ServeConfig, jobs: FakeRay) -> None:
    service = batches(config, jobs)
    batch = service.create(asked())
    [job] = jobs.jobs.values()
    job.status = "RUNNING"
    assert service.get(batch.id).state == "running"
    job.status, job.message = "FAILED", "noise\nrlfseg predict: the cause\nmore noise"
    failed = service.get(batch.id)
    assert (failed.state, failed.error) == ("failed", "rlfseg predict: the cause")
    assert service.list() == [failed]
    for unknown in ("0" * 32, "../" + batch.id):
        with pytest.raises(Refusal) as refusal:
            service.get(unknown)
        assert refusal.value.status == 404


def test_a_finished_folder_counts_whatever_ray_says(config: ServeConfig, jobs: FakeRay) -> None:
    service = batches(config, jobs)
    batch = service.create(asked())
    [job] = jobs.jobs.values()
    job.status = "FAILED"  # as Ray calls a job that refused pictures: its exit code is 3
    results = Path(batch.results)
    results.mkdir()
    write_json(results / "_SUCCESS.json", {"refused": {"a": "damaged"}})
    done = service.get(batch.id)
    assert (done.state, done.refused) == ("succeeded", 1)


def test_what_ray_forgot_is_started_once_more_by_whoever_comes_first(config: ServeConfig, jobs: FakeRay) -> None:
    batch = batches(config, jobs).create(asked())
    jobs.jobs.clear()
    fronts = [batches(config, jobs) for _ in range(2)]
    for front in fronts:
        front.resume()
    assert list(jobs.jobs) == [f"{batch.id}-2"]
    assert [front.get(batch.id).state for front in fronts] == ["queued", "queued"]
    assert list(jobs.jobs) == [f"{batch.id}-2"]


def test_a_service_that_died_between_writing_and_starting(config: ServeConfig, jobs: FakeRay) -> None:
    service = batches(config, jobs)
    batch = service.create(asked())
    record = Path(batch.results).parent / "batch.json"
    write_json(record, json.loads(record.read_text()) | {"starts": 0})
    service.resume()
    assert list(jobs.jobs) == [f"{batch.id}-1"]


def test_a_job_whose_node_went_away_goes_on(config: ServeConfig, jobs: FakeRay) -> None:
    service = batches(config, jobs)
    batch = service.create(asked())
    jobs.jobs[f"{batch.id}-1"].status, jobs.jobs[f"{batch.id}-1"].error_type = "FAILED", "JOB_SUPERVISOR_ACTOR_DIED"
    assert service.get(batch.id).state == "queued"
    assert list(jobs.jobs) == [f"{batch.id}-1", f"{batch.id}-2"]


def test_cancelled_is_for_good(config: ServeConfig, jobs: FakeRay) -> None:
    service = batches(config, jobs)
    batch = service.create(asked())
    assert service.cancel(batch.id).state == "cancelled"
    assert jobs.stopped == [f"{batch.id}-1"]
    jobs.jobs.clear()
    service.resume()
    assert jobs.jobs == {}
    assert service.cancel(batch.id).state == "cancelled"


@pytest.mark.parametrize("fault", ["deaf", "unreachable"])
def test_a_batch_is_cancelled_only_when_ray_has_stopped_it(config: ServeConfig, jobs: FakeRay, fault: str) -> None:
    def unreachable() -> None:
        raise requests.ConnectionError("Connection refused")

    service = batches(config, jobs)
    batch = service.create(asked())
    jobs.jobs[f"{batch.id}-1"].status = "RUNNING"
    jobs.deaf = fault == "deaf"
    jobs.listing = unreachable if fault == "unreachable" else jobs.listing
    with pytest.raises(Refusal, match="did not") as refusal:
        service.cancel(batch.id)
    assert refusal.value.status == 500
    assert service.get(batch.id).state == "running"
    jobs.deaf = False
    assert service.cancel(batch.id).state == "cancelled"
    assert jobs.jobs[f"{batch.id}-1"].status == "STOPPED"


def test_a_job_that_was_stopped_by_hand_is_a_cancelled_batch(config: ServeConfig, jobs: FakeRay) -> None:
    service = batches(config, jobs)
    batch = service.create(asked())
    jobs.stop_job(f"{batch.id}-1")
    assert (service.get(batch.id).state, service.get(batch.id).error) == ("cancelled", None)
    jobs.jobs.clear()
    service.resume()
    assert jobs.jobs == {}


def test_a_lost_batch_is_cancelled_and_not_started_for_it(config: ServeConfig, jobs: FakeRay) -> None:
    service = batches(config, jobs)
    batch = service.create(asked())
    jobs.jobs.clear()
    assert service.cancel(batch.id).state == "cancelled"
    assert jobs.jobs == {}


def test_who_read_the_record_before_it_was_cancelled_does_not_write_over_it(config: ServeConfig, jobs: FakeRay) -> None:
    service, other = batches(config, jobs), batches(config, jobs)
    batch = service.create(asked())

    def cancelled() -> None:
        other.cancel(batch.id)
        jobs.jobs[f"{batch.id}-1"].status = "FAILED"  # as its driver ends when it is killed

    jobs.listing = cancelled
    assert service.get(batch.id).state == "cancelled"
    assert other.get(batch.id).state == "cancelled"


def test_who_starts_a_batch_again_does_not_write_over_its_cancellation(config: ServeConfig, jobs: FakeRay) -> None:
    service, other = batches(config, jobs), batches(config, jobs)
    batch = service.create(asked())
    jobs.jobs.clear()
    thread = threading.Thread(target=other.cancel, args=[batch.id])
    jobs.submitting = lambda: (thread.start(), thread.join(0.5))  # it has to wait, or else is done by then
    service.get(batch.id)
    thread.join()
    assert service.get(batch.id).state == "cancelled"
    assert jobs.jobs[f"{batch.id}-2"].status == "STOPPED"


def api_of(config: ServeConfig, service: Any) -> httpx.AsyncClient:
    config = replace(config, auth=False, limits=LimitsConfig(deadline_s=0.2))
    work: Any = None  # no picture is asked for
    parts = {"catalog": Catalog(config.models), "work": work, "keys": None, "ready": is_ready, "meters": Counted()}
    transport = httpx.ASGITransport(build_api(config, batches=service, **parts))
    return httpx.AsyncClient(transport=transport, base_url="http://localhost")


# --- over HTTP -----------------------------------------------------------------------------------------------------


def test_batches_that_wait_hold_up_no_pictures(config: ServeConfig) -> None:
    @dataclass
    class Slow:
        going: threading.Event

        def list(self) -> list[Any]:
            assert self.going.wait(60)
            return []

    async def ask() -> list[int]:
        service = Slow(threading.Event())
        async with api_of(config, service) as client:
            asking = [
                asyncio.create_task(client.get("/v1/batches")) for _ in range(40)
            ]  # more than asyncio has threads
            try:
                async with asyncio.timeout(30):
                    await asyncio.gather(*(asyncio.to_thread(lambda: None) for _ in range(40)))
                assert not any(task.done() for task in asking)
            finally:
                service.going.set()
            return [(await task).status_code for task in asking]

    assert set(asyncio.run(ask())) == {200}


def test_a_batch_whose_request_does_not_end(config: ServeConfig, jobs: FakeRay) -> None:
    async def body() -> AsyncIterator[bytes]:
        yield b"{"
        await asyncio.Event().wait()

    async def ask() -> httpx.Response:
        async with api_of(config, batches(config, jobs)) as client:
            headers = {"Content-Type": "application/json"}
            return await client.post("/v1/batches", content=body(), headers=headers)

    reply = asyncio.run(ask())
    assert (reply.status_code, reply.json()["error"]["kind"]) == (504, "deadline")
