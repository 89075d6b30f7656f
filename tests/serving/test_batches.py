"""Batches: which paths they may read, what is written, which job is started, and what a restart finds."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import resource
import shlex
import sys
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import requests
import stamina
import yaml

from rlfseg.config import BatchesConfig, LimitsConfig, PredictConfig, ServeConfig, WorkersConfig
from rlfseg.pipeline.folders import write_json
from serve.api import build_api
from serve.batches import Batches
from serve.catalog import Catalog
from serve.front import _resume
from serve.manifest import MOST_BYTES, read_manifest
from serve.refusal import Refusal
from serve.schema import BatchRequest
from tests.serving.played import Counted, is_ready

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


@pytest.fixture
def roots(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    (folder / "shop").mkdir(parents=True)
    for name in ("a.png", "shop/b.png"):
        (folder / name).write_bytes(b"")
    (tmp_path / "secret.png").write_bytes(b"")
    return folder


@pytest.fixture
def config(tmp_path: Path, roots: Path) -> ServeConfig:
    return ServeConfig(
        device="cpu", gpus=0, batches=BatchesConfig(out=str(tmp_path / "out"), roots=(str(roots),), images=4)
    )


@pytest.fixture
def jobs() -> FakeRay:
    return FakeRay()


def batches(config: ServeConfig, jobs: FakeRay, have: dict[str, float] = HAVE) -> Batches:
    return Batches(config, Catalog(config.models), lambda: jobs, lambda: have)


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlfseg.pipeline.stages.ray.cluster_resources", lambda: HAVE)


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


# --- manifests -----------------------------------------------------------------------------------------------------


def asked(**fields: Any) -> BatchRequest:
    return BatchRequest(**({"images": ["a.png"], "phrases": ["dog"]} | fields))


def test_paths_become_absolute_and_phrases_are_joined(config: ServeConfig, roots: Path) -> None:
    table = read_manifest(asked(images=["a.png", "shop/../shop/b.png", str(roots / "a.png")]), config)
    assert table.to_pylist() == [
        {"path": str(roots / "a.png"), "phrases": ["dog"]},
        {"path": str(roots / "shop" / "b.png"), "phrases": ["dog"]},
    ]


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_manifests(config: ServeConfig, roots: Path, kind: str) -> None:
    rows = [{"path": "b.png", "phrases": ["cat"]}, {"path": "../a.png", "phrases": []}]
    file = roots / "shop" / f"list.{kind}"
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), file)
    else:
        file.write_text("".join(json.dumps(row) + "\n\n" for row in rows))
    table = read_manifest(asked(images=[], manifest=f"shop/list.{kind}"), config)
    assert table.to_pylist() == [
        {"path": str(roots / "shop" / "b.png"), "phrases": ["cat", "dog"]},
        {"path": str(roots / "a.png"), "phrases": ["dog"]},
    ]


@pytest.mark.parametrize(
    "text", [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int8(), pa.string())]
)
def test_parquet_of_all_writers(config: ServeConfig, roots: Path, text: pa.DataType) -> None:
    phrases = pa.array([["cat", "cat"], [], None], pa.list_(pa.string())).cast(pa.list_(text))
    table = {"path": pa.array(["a.png", "shop/b.png", "a.png"]).cast(text), "phrases": phrases, "size": [1, 2, 3]}
    pq.write_table(pa.table(table), roots / "list.parquet")
    found = read_manifest(asked(images=[], manifest="list.parquet"), config)
    assert found["phrases"].to_pylist() == [["cat", "dog"], ["dog"]]


def test_a_parquet_manifest_may_leave_phrases_to_the_request(config: ServeConfig, roots: Path) -> None:
    pq.write_table(pa.table({"path": ["a.png"]}), roots / "list.parquet")
    found = read_manifest(asked(images=[], manifest="list.parquet"), config)
    assert found.to_pylist() == [{"path": str(roots / "a.png"), "phrases": ["dog"]}]


def same(text: str, times: int) -> pa.Array:
    """Takes little room in memory and in a file, however often the text is named."""
    return pa.DictionaryArray.from_arrays(np.zeros(times, "int32"), [text])


def one_list(array: pa.Array) -> pa.Array:
    return pa.ListArray.from_arrays([0, len(array)], array)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        # Texts in a dictionary, a million of them in one row, and a column that is large itself
        ({"path": same("x" * 300_000, 4), "phrases": [["a"]] * 4}, "bytes are more than"),
        ({"path": ["a"], "phrases": one_list(same("x" * 100_000, 16))}, "bytes are more than"),
        ({"path": ["a"], "phrases": one_list(same("x" * 100_000, 10**6))}, "more than 16 phrases"),
        ({"path": [f"{n}" + "x" * 300_000 for n in range(4)], "phrases": [["a"]] * 4}, "bytes are more than"),
        ({"path": ["a"] * 5, "phrases": [["b"]] * 5}, "4 pictures"),
        ({"path": [1], "phrases": [["b"]]}, "TypeError"),
        ({"path": ["a"], "phrases": [[1]]}, "TypeError"),
        ({"path": ["a"], "phrases": [[["b"]]]}, "TypeError"),
        ({"path": [{"path": "a"}], "phrases": [["b"]]}, "TypeError"),
        ({"path": ["a"], "phrases": ["b"]}, r"manifest\[0\]: needs"),
        ({"path": [None], "phrases": [["b"]]}, r"manifest\[0\]: needs"),
        ({"path": ["a"], "phrases": [[None]]}, r"manifest\[0\]: needs"),
        ({"phrases": [["a"]]}, "KeyError"),
    ],
)
def test_parquet_that_is_refused_before_it_is_decoded(
    config: ServeConfig, roots: Path, table: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve.manifest.MOST_BYTES", 2**20)
    pq.write_table(pa.table(table), roots / "list.parquet", compression="zstd", store_schema=False)
    with pytest.raises(Refusal, match=message):
        read_manifest(asked(images=[], manifest="list.parquet"), config)


def test_a_kilobyte_that_stands_for_gigabytes(config: ServeConfig, roots: Path) -> None:
    most, text = 16, "x" * 100_000_000
    phrases = pa.ListArray.from_arrays([0, most, 2 * most, 3 * most], same(text, 3 * most))
    pq.write_table(pa.table({"path": ["a.png"] * 3, "phrases": phrases}), roots / "list.parquet", compression="zstd")
    assert (roots / "list.parquet").stat().st_size < 50_000
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(Refusal, match="4800000015 bytes are more than"):
        read_manifest(asked(images=[], manifest="list.parquet"), config)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1_000_000  # KiB


def test_a_long_jsonl_manifest_is_refused_unread(config: ServeConfig, roots: Path) -> None:
    with (roots / "list.jsonl").open("wb") as file:
        file.truncate(MOST_BYTES + 1)  # takes no room on the disk
    with pytest.raises(Refusal, match="bytes are more than") as refusal:
        read_manifest(asked(images=[], manifest="list.jsonl"), config)
    assert refusal.value.status == 413


def test_a_manifest_that_is_a_pipe_is_not_waited_for(config: ServeConfig, roots: Path) -> None:
    os.mkfifo(roots / "list.jsonl")
    with pytest.raises(Refusal, match="no such file"):
        read_manifest(asked(images=[], manifest="list.jsonl"), config)


OUTSIDE = ["../secret.png", "/etc/passwd", "shop/../../secret.png", "", ".", "a\0b", "link.png", "loop/a"]


@pytest.mark.parametrize("path", OUTSIDE)
@pytest.mark.parametrize("way", ["images", "manifest", "row"])
def test_nothing_outside_the_roots_is_read(config: ServeConfig, roots: Path, path: str, way: str) -> None:
    os.symlink(roots.parent / "secret.png", roots / "link.png")
    os.symlink(roots / "loop", roots / "loop")
    (roots / "list.jsonl").write_text(json.dumps({"path": path, "phrases": []}) + "\n")
    fields: dict[str, Any] = {
        "images": {"images": [path]},
        "manifest": {"images": [], "manifest": path or "/"},
        "row": {"images": [], "manifest": "list.jsonl"},
    }[way]
    with pytest.raises(Refusal, match="lies outside") as refusal:
        read_manifest(asked(**fields), config)
    assert str(roots) not in refusal.value.message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "names no picture"),
        ("{", "can't be read"),
        ('{"phrases": []}\n', "can't be read"),
        ("[1]\n", "can't be read"),
        ('{"path": 3}\n', r"manifest\[0\]: needs"),
        ('{"path": "a.png", "phrases": "dog"}\n', r"manifest\[0\]: needs"),
        ('{"path": "a.png", "phrases": [" "]}\n', "empty"),
        ('{"path": "a.png"}\n' * 5, "4 pictures"),
        ("\xff\xfe", "can't be read"),
        ("[" * 100_000, "can't be read: RecursionError"),
    ],
)
def test_manifests_that_are_none(config: ServeConfig, roots: Path, text: str, message: str) -> None:
    (roots / "list.jsonl").write_bytes(text.encode("latin-1"))
    with pytest.raises(Refusal, match=message):
        read_manifest(asked(images=[], manifest="list.jsonl"), config)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"images": []}, "either"),
        ({"manifest": "a"}, "either"),
        ({"phrases": []}, "no phrases"),
        ({"phrases": ["a"] * 17}, "17 phrases are more than 16"),
        ({"images": [], "manifest": "none.parquet"}, "no such file"),
        ({"images": [], "manifest": "a.png"}, "names no picture"),
    ],
)
def test_wrong_batches(config: ServeConfig, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(Refusal, match=message):
        read_manifest(asked(**fields), config)


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


# --- records and folders that are not what they should be ----------------------------------------------------------


def test_what_was_refused_is_never_started(config: ServeConfig, jobs: FakeRay) -> None:
    service, jobs.refused = batches(config, jobs), ("",)
    with pytest.raises(Refusal, match="did not take"):
        service.create(asked())
    jobs.refused = ()
    service.resume()
    assert (service.list(), jobs.jobs, list(service.out.glob("*"))) == ([], {}, [service.out / ".lock"])


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "{}", '{"model": 1}', "[" * 100_000, "\xff"])
def test_a_damaged_record_harms_no_other(config: ServeConfig, jobs: FakeRay, text: str) -> None:
    service = batches(config, jobs)
    bad, good = service.create(asked()), service.create(asked())
    (service.out / bad.id / "batch.json").write_bytes(text.encode("latin-1"))
    jobs.jobs.clear()
    service.resume()
    assert service.list() == [good]
    assert list(jobs.jobs) == [f"{good.id}-2"]
    assert len(service.list()) < len([service.create(asked()), *service.list()])
    for ask in (service.get, service.cancel):
        with pytest.raises(Refusal, match="damaged"):
            ask(bad.id)


def test_damaged_results_harm_no_other(config: ServeConfig, jobs: FakeRay) -> None:
    service = batches(config, jobs)
    bad, good = service.create(asked()), service.create(asked())
    Path(bad.results).mkdir()
    (Path(bad.results) / "_SUCCESS.json").write_text("{")
    assert service.list() == [good]


def test_a_batch_that_ray_does_not_take_again_keeps_no_other_from_going_on(config: ServeConfig, jobs: FakeRay) -> None:
    service = batches(config, jobs, {"CPU": 20.0})
    first, second, third = (service.create(asked()).id for _ in range(3))
    jobs.jobs.clear()
    jobs.refused = (second,)
    with pytest.raises(Refusal, match="1 of the batches"):
        service.resume()
    assert set(jobs.jobs) == {f"{first}-2", f"{third}-2"}
    assert {batch.state for batch in service.list()} == {"queued"}
    jobs.refused = ()
    service.resume()
    assert f"{second}-2" in jobs.jobs


def test_the_front_tries_until_all_batches_go_on(config: ServeConfig, jobs: FakeRay) -> None:
    service = batches(config, jobs)
    batch = service.create(asked())
    jobs.jobs.clear()
    jobs.without_agent = 20  # more often than one submission is repeated
    with stamina.set_testing(True, attempts=9):
        _resume(service)
    assert list(jobs.jobs) == [f"{batch.id}-2"]


# --- room ----------------------------------------------------------------------------------------------------------


def test_two_fronts_do_not_both_take_the_last_cpu(config: ServeConfig, jobs: FakeRay) -> None:
    each, refused = 6, []
    have = {"CPU": 2.0 + each}
    other = batches(config, jobs, have)

    def create() -> None:
        try:
            other.create(asked())
        except Refusal as refusal:
            refused.append(refusal.kind)

    thread = threading.Thread(target=create)

    def counted() -> dict[str, float]:  # while the first one counts, another front is asked too
        thread.start()
        thread.join(0.5)  # it has to wait, or else is done by then
        return have

    first = Batches(config, Catalog(config.models), lambda: jobs, counted).create(asked())
    thread.join()
    assert (list(jobs.jobs), refused) == ([f"{first.id}-1"], ["short"])


def test_who_waits_too_long_for_another_front_is_told_to_ask_again(config: ServeConfig, jobs: FakeRay) -> None:
    service = batches(replace(config, limits=LimitsConfig(deadline_s=0.1)), jobs)
    with (service.out / ".lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(Refusal, match="ask again") as refusal:
            service.create(asked())
    assert refusal.value.status == 503
    assert service.create(asked()).state == "queued"


def test_a_batch_that_would_wait_for_ever_is_refused_with_the_sum(config: ServeConfig, jobs: FakeRay) -> None:
    each = 1 + 2 + 3  # a worker, a loader before and after it, and what Ray Data itself takes
    service = batches(config, jobs, {"CPU": 2 + 2 * each})  # room for the service's two replicas and two batches
    first = service.create(asked())
    service.create(asked())
    with pytest.raises(
        Refusal, match=rf"takes {each} CPUs; this Ray has 14, of which .* 2 and 2 running .* 12"
    ) as refusal:
        service.create(asked())
    assert refusal.value.status == 503
    service.cancel(first.id)
    service.create(asked())
    assert len(jobs.jobs) == 3


def test_gpus_are_counted_too(config: ServeConfig, jobs: FakeRay) -> None:
    with_gpu = BatchesConfig(out=config.batches.out, roots=config.batches.roots, run=WorkersConfig(gpus=1))
    short = ServeConfig(gpus=0.5, batches=with_gpu)
    with pytest.raises(Refusal, match=r"takes 1 GPUs; this Ray has 1, of which the service holds 0\.5"):
        batches(short, jobs, HAVE | {"GPU": 1.0}).create(asked())


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"steps": 51}, "51 is more than 50"), ({"steps": 2, "rescale": "aos"}, "needs a single step")],
)
def test_steps_are_limited_as_those_of_requests(
    config: ServeConfig, jobs: FakeRay, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(Refusal, match=message) as refusal:
        batches(config, jobs).create(asked(**fields))
    assert (refusal.value.status, jobs.jobs) == (422, {})


def test_an_unknown_model_is_refused(config: ServeConfig, jobs: FakeRay) -> None:
    with pytest.raises(Refusal, match="tiny") as refusal:
        batches(config, jobs).create(asked(model="/etc"))
    assert refusal.value.status == 404


# --- over HTTP -----------------------------------------------------------------------------------------------------


def api_of(config: ServeConfig, service: Any) -> httpx.AsyncClient:
    config = replace(config, auth=False, limits=LimitsConfig(deadline_s=0.2))
    work: Any = None  # no picture is asked for
    parts = {"catalog": Catalog(config.models), "work": work, "keys": None, "ready": is_ready, "meters": Counted()}
    transport = httpx.ASGITransport(build_api(config, batches=service, **parts))
    return httpx.AsyncClient(transport=transport, base_url="http://localhost")


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
