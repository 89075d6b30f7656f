"""What `rlfseg submit` says and exits with, by a played job server; tests/drills/test_cluster.py has a real one."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from zipfile import ZipFile

import aiohttp
import pytest
import requests
import stamina
from ray._private.runtime_env.packaging import create_package
from ray.dashboard.utils import get_address_for_submission_client
from ray.job_submission import JobStatus

from rlfseg import cli
from rlfseg.pipeline import submit


class Server:
    """Takes a job and tells how it ended."""

    status, code, message = JobStatus.SUCCEEDED, 0, ""
    refusal: Exception | None = None
    cut: BaseException | None = None  # what the log ends with
    before: Iterator[JobStatus | Exception] = iter(())  # what is told of the job before `status` is
    jobs: tuple[SimpleNamespace, ...] = ()
    asked: dict[str, Any] | None = None

    def list_jobs(self) -> tuple[SimpleNamespace, ...]:
        return self.jobs

    def submit_job(self, **asked: Any) -> str:
        self.asked = asked
        if self.refusal:
            raise self.refusal
        return "job-1"

    async def tail_job_logs(self, job: str) -> AsyncIterator[str]:
        yield f"what {job} prints\n"
        if self.cut:
            raise self.cut

    def get_job_info(self, job: str) -> SimpleNamespace:
        told = next(self.before, self.status)
        if isinstance(told, Exception):
            raise told
        return SimpleNamespace(status=told, driver_exit_code=self.code, message=self.message)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Server:
    for name in [n for n in os.environ if n.startswith("MLFLOW_")]:
        monkeypatch.delenv(name)
    played = Server()
    monkeypatch.setattr(submit, "JobSubmissionClient", lambda address: played)
    monkeypatch.setattr(submit, "POLL_S", 0)
    return played


@pytest.mark.parametrize(
    ("status", "code", "exits"),
    [
        (JobStatus.SUCCEEDED, 0, 0),
        (JobStatus.FAILED, 2, 2),
        (JobStatus.FAILED, 3, 3),  # done, but for what it has refused
        (JobStatus.FAILED, None, 1),  # it never started
        (JobStatus.FAILED, -9, 137),  # killed, for want of memory for example
        (JobStatus.STOPPED, None, 143),
        (JobStatus.STOPPED, 0, 143),  # and caught the signal
    ],
)
def test_the_exit_code_is_the_jobs(
    server: Server, root: Path, capsys: pytest.CaptureFixture[str], status: JobStatus, code: int | None, exits: int
) -> None:
    server.status, server.code, server.message = status, code, "the cause\nand more"  # type: ignore[assignment]
    assert cli.main("submit", ["--working_dir", str(root), "--", "train", "--out", "a b"]) == exits
    assert server.asked
    assert server.asked["entrypoint"] == "python -m jobs.train --out 'a b'"
    said = capsys.readouterr()
    assert "what job-1 prints" in said.out
    if code == 3:
        assert "job job-1 is done; what it has refused stands above" in said.err
    elif status == JobStatus.FAILED:
        assert said.err.strip().endswith("the cause")


def test_the_last_line_tells_what_the_job_told(server: Server, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = "Job entrypoint command failed with exit code 2, last logs:\nrlfseg train: lr: too low\n(raylet) a word\n"
    server.status, server.code, server.message = JobStatus.FAILED, 2, told  # type: ignore[assignment]
    assert cli.main("submit", ["--working_dir", str(root), "--", "train"]) == 2
    assert capsys.readouterr().err.strip().endswith("ended as FAILED: rlfseg train: lr: too low")


@pytest.mark.parametrize(
    "cut",  # what Ray's client raises for a connection that breaks, and for one that can't be made; and a close
    [RuntimeError("closed unexpectedly with close code 1006"), aiohttp.ClientConnectionError("no connection"), None],
)
def test_a_log_that_is_cut_short_ends_no_job(
    server: Server, root: Path, capsys: pytest.CaptureFixture[str], cut: Exception | None
) -> None:
    server.cut, server.status, server.code = cut, JobStatus.FAILED, 3
    server.before = iter([JobStatus.RUNNING, requests.ConnectionError("the server is away"), JobStatus.RUNNING])
    with stamina.set_testing(True, attempts=3):  # without its waits
        assert cli.main("submit", ["--working_dir", str(root), "--", "train"]) == 3
    assert ("job job-1 goes on, its log is lost" in capsys.readouterr().err) == (cut is not None)


def test_a_job_server_that_stays_away_is_told(server: Server, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    server.before = iter([requests.ConnectionError("nobody there")] * 3)
    with stamina.set_testing(True, attempts=3):
        assert cli.main("submit", ["--working_dir", str(root), "--", "train"]) == 1
    assert "job job-1: its server is away" in capsys.readouterr().err


def test_a_job_that_is_left_goes_on_and_is_found_again(
    server: Server, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["--working_dir", str(root), "--", "train", "--out", "/nfs/a"]
    server.cut = KeyboardInterrupt()
    assert cli.main("submit", line) == 130
    assert "job job-1 goes on; `ray job stop job-1` stops it" in capsys.readouterr().err

    assert server.asked
    same = {"entrypoint": server.asked["entrypoint"], "submission_id": "job-0", "status": JobStatus.RUNNING}
    server.cut, server.asked, server.jobs = None, None, (SimpleNamespace(**same),)
    assert cli.main("submit", line) == 0
    assert server.asked is None  # a second one would write into the same folder
    said = capsys.readouterr().out
    assert "job job-0 runs this command already" in said
    assert "what job-0 prints" in said
    others = ({"entrypoint": "python -m jobs.train"}, {"status": JobStatus.STOPPED}, {"submission_id": None})
    server.jobs = tuple(SimpleNamespace(**(same | other)) for other in others)
    assert cli.main("submit", line) == 0
    assert server.asked


def test_the_address_that_is_given_is_asked(server: Server, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also inside of a job, whose RAY_ADDRESS is its own cluster's."""
    asked: list[str] = []

    def client(address: str | None) -> Server:
        asked.append(get_address_for_submission_client(address))  # as Ray's own does
        return server

    monkeypatch.setattr(submit, "JobSubmissionClient", client)
    monkeypatch.setenv("RAY_ADDRESS", "http://own-head:8265")
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "")  # so that it is put back afterwards
    line = ["--working_dir", str(root), "--", "train"]
    assert cli.main("submit", line) == cli.main("submit", ["--address", "http://other-head:8265", *line]) == 0
    assert asked == ["http://own-head:8265", "http://other-head:8265"]


@pytest.mark.fault("job-01")
def test_what_is_too_large_names_its_biggest_parts(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs" / "train.py").touch()
    (tmp_path / "data").mkdir()
    for name, size in (("data/all.h5", 3 << 20), ("notes.txt", 10), ("film.mp4", 1 << 20)):
        (tmp_path / name).write_bytes(bytes(size))
    server.refusal = RuntimeError("Request failed with status code 413: Request Entity Too Large")
    assert cli.main("submit", ["--working_dir", str(tmp_path), "--", "train"]) == 1
    said = capsys.readouterr().err
    assert "100 MiB" in said
    assert "data 3 MiB, film.mp4 1 MiB" in said
    assert ".rayignore" in said


@pytest.mark.fault("job-01")
def test_what_is_uploaded_is_small_and_has_the_weights(root: Path, tmp_path: Path) -> None:
    """By Ray's own packing, which reads .rayignore and .gitignore."""
    create_package(str(root), tmp_path / "package.zip", include_gitignore=True)
    names = ZipFile(tmp_path / "package.zip").namelist()
    assert (tmp_path / "package.zip").stat().st_size < 40 * 2**20
    assert {"jobs/train.py", "rlfseg/assets/adapter/adapter_model.safetensors", "serve/app.py"} <= set(names)
    assert {name.partition("/")[0] for name in names} == {"rlfseg", "jobs", "serve"}


@pytest.mark.fault("job-01")
def test_nothing_is_uploaded_that_lies_beside_the_code(root: Path, tmp_path: Path) -> None:
    own, foreign = tmp_path / "checkout", ("sam_vit_h_4b8939.pth", "photos/a.jpg", "my.yaml", "tests/jobs/a.py")
    code = ("rlfseg/a.py", "jobs/configs/b.yaml", "serve/page/c.js")
    for name in (*code, *foreign, ".venv/d.py", ".env", "rlfseg/__pycache__/a.pyc", "jobsx/e.py"):
        (own / name).parent.mkdir(parents=True, exist_ok=True)
        (own / name).touch()
    for name in (".rayignore", ".gitignore"):
        shutil.copy(root / name, own)
    create_package(str(own), tmp_path / "package.zip", include_gitignore=True)
    assert sorted(ZipFile(tmp_path / "package.zip").namelist()) == sorted(code)


@pytest.mark.fault("job-04")
def test_nothing_is_installed_on_the_way(server: Server, root: Path) -> None:
    assert cli.main("submit", ["--working_dir", str(root), "--", "train"]) == 0
    assert server.asked
    assert server.asked["runtime_env"] == {"working_dir": str(root)}


def test_a_job_records_where_its_submitter_would(server: Server, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"MLFLOW_TRACKING_URI": "http://head:5000", "MLFLOW_TRACKING_TOKEN": "abc"}
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MLFLOWER", "rose")
    assert cli.main("submit", ["--working_dir", str(root), "--", "train"]) == 0
    assert server.asked
    assert server.asked["runtime_env"]["env_vars"] == settings


def test_the_papers_run_wants_a_tracking_server(root: Path, tmp_path: Path) -> None:
    def run(**variables: str) -> subprocess.CompletedProcess[str]:
        """The script with a `rlfseg` that says what it is asked."""
        (tmp_path / "rlfseg").write_text('#!/bin/sh\necho "$@ to $MLFLOW_TRACKING_URI"\n')
        (tmp_path / "rlfseg").chmod(0o755)
        env = {"PATH": f"{tmp_path}:/usr/bin:/bin", "STORE": "/store", "DATA": "/data", **variables}
        return subprocess.run(["bash", root / "jobs" / "paper.sh"], env=env, capture_output=True, text=True, cwd=root)

    done = run()
    assert done.returncode != 0
    assert "MLFLOW_TRACKING_URI: an MLflow server" in done.stderr
    assert done.stdout == ""
    done = run(MLFLOW_TRACKING_URI="http://head:5000")
    assert done.returncode == 0, done.stderr
    asked = [line.removesuffix(" to http://head:5000").split()[2:] for line in done.stdout.splitlines()]
    stages = ["refine", "encode", "train", "calibrate"]
    assert [a[0] for a in asked] == [*3 * ["prepare"], *stages, *2 * ["evaluate"]]
    for command, *flags in asked:  # and each is one that our own parser takes
        cli.parse(command, flags)
