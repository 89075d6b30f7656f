"""Batches: which paths they may read, what is written, which job is started, and what a restart finds."""

from __future__ import annotations

import json
import os
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import stamina
import yaml

from rlfseg.config import BatchesConfig, PredictConfig, ServeConfig, WorkersConfig
from rlfseg.pipeline.folders import write_json
from serve.batches import Batches
from serve.catalog import Catalog
from serve.manifest import read_manifest
from serve.refusal import Refusal
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
    without_agent: int = 0  # submissions to come before a node's agent is there

    def submit_job(self, *, entrypoint: str, submission_id: str) -> str:
        if self.without_agent:
            self.without_agent -= 1
            raise RuntimeError(
                "Request failed with status code 500: No available agent to submit job, please try again"
            )
        if submission_id in self.jobs:
            raise RuntimeError(f"Job with submission_id {submission_id} already exists")
        self.jobs[submission_id] = Job(submission_id, entrypoint)
        return submission_id

    def list_jobs(self) -> list[Any]:
        return list(self.jobs.values())

    def stop_job(self, job_id: str) -> bool:
        self.stopped.append(job_id)
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


def test_an_unknown_model_is_refused(config: ServeConfig, jobs: FakeRay) -> None:
    with pytest.raises(Refusal, match="tiny") as refusal:
        batches(config, jobs).create(asked(model="/etc"))
    assert refusal.value.status == 404
