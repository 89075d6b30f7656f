"""What `rlfseg submit` says and exits with, by a played job server; tests/drills/test_cluster.py has a real one."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
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
def test_data_and_history_stay_at_home(root: Path) -> None:
    kept_out = (root / ".rayignore").read_text().split() + (root / ".gitignore").read_text().split()
    assert {".git/", "*.h5", "*.parquet"} <= set(kept_out)
    assert any(line.strip("/") == "runs" for line in kept_out)


@pytest.mark.fault("job-04")
def test_nothing_is_installed_on_the_way(server: Server, root: Path) -> None:
    assert cli.main("submit", ["--working_dir", str(root), "--", "train"]) == 0
    assert server.asked["runtime_env"] == {"working_dir": str(root)}
