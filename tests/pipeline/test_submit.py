"""What `rlfseg submit` says and exits with, by a played job server; tests/drills/test_cluster.py has a real one."""

from __future__ import annotations

import os
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from zipfile import ZipFile

import pytest
from ray._private.runtime_env.packaging import create_package
from ray.job_submission import JobStatus

from rlfseg import cli
from rlfseg.pipeline import submit


class Server:
    """Takes a job and tells how it ended."""

    status, code, message = JobStatus.SUCCEEDED, 0, ""
    refusal: Exception | None = None

    def submit_job(self, **asked: Any) -> str:
        self.asked = asked
        if self.refusal:
            raise self.refusal
        return "job-1"

    async def tail_job_logs(self, job: str) -> AsyncIterator[str]:
        yield f"what {job} prints\n"

    def get_job_info(self, job: str) -> SimpleNamespace:
        return SimpleNamespace(status=self.status, driver_exit_code=self.code, message=self.message)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Server:
    for name in [n for n in os.environ if n.startswith("MLFLOW_")]:
        monkeypatch.delenv(name)
    played = Server()
    monkeypatch.setattr(submit, "JobSubmissionClient", lambda address: played)
    return played


@pytest.mark.parametrize(
    ("status", "code", "exits"),
    [
        (JobStatus.SUCCEEDED, 0, 0),
        (JobStatus.FAILED, 2, 2),
        (JobStatus.FAILED, None, 1),  # it never started
        (JobStatus.STOPPED, None, 143),
        (JobStatus.STOPPED, 0, 143),  # and caught the signal
    ],
)
def test_the_exit_code_is_the_jobs(
    server: Server, root: Path, capsys: pytest.CaptureFixture[str], status: JobStatus, code: int | None, exits: int
) -> None:
    server.status, server.code, server.message = status, code, "the cause\nand more"  # type: ignore[assignment]
    assert cli.main("submit", ["--working_dir", str(root), "--", "train", "--out", "a b"]) == exits
    assert server.asked["entrypoint"] == "python -m jobs.train --out 'a b'"
    said = capsys.readouterr()
    assert "what job-1 prints" in said.out
    if status == JobStatus.FAILED:
        assert said.err.strip().endswith("the cause")


def test_the_last_line_tells_what_the_job_told(server: Server, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = "Job entrypoint command failed with exit code 2, last logs:\nrlfseg train: lr: too low\n(raylet) a word\n"
    server.status, server.code, server.message = JobStatus.FAILED, 2, told  # type: ignore[assignment]
    assert cli.main("submit", ["--working_dir", str(root), "--", "train"]) == 2
    assert capsys.readouterr().err.strip().endswith("ended as FAILED: rlfseg train: lr: too low")


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
    assert {"jobs/train.py", "rlfseg/assets/adapter/adapter_model.safetensors"} <= set(names)
    assert not [n for n in names if n.startswith((".git/", ".venv/", "runs/", "tests/"))]


@pytest.mark.fault("job-04")
def test_nothing_is_installed_on_the_way(server: Server, root: Path) -> None:
    assert cli.main("submit", ["--working_dir", str(root), "--", "train"]) == 0
    assert server.asked["runtime_env"] == {"working_dir": str(root)}


def test_a_job_records_where_its_submitter_would(server: Server, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"MLFLOW_TRACKING_URI": "http://head:5000", "MLFLOW_TRACKING_TOKEN": "abc"}
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MLFLOWER", "rose")
    assert cli.main("submit", ["--working_dir", str(root), "--", "train"]) == 0
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
