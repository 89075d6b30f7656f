"""A job does not die of its bookkeeping: against a real MLflow server that is stopped and started."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient

from rlfseg import tracking
from rlfseg.config import TrackingConfig
from rlfseg.tracking import Run
from tests.tracked import stand_in, steps


@pytest.fixture
def home(migrated: Path, tmp_path: Path) -> Path:
    """A folder with a database that needs no migration."""
    shutil.copy(migrated, tmp_path / "mlflow.db")
    return tmp_path


@contextlib.contextmanager
def server(home: Path, port: int) -> Iterator[str]:
    """A real `mlflow server`; leaving the block stops it and all its children."""
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{home}/mlflow.db", "--artifacts-destination", str(home / "served")]
    env = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with (home / "server.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=env, start_new_session=True, cwd=home)
    try:
        url = f"http://127.0.0.1:{port}"
        _wait_for(f"{url}/health", process)
        yield url
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _wait_for(url: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert process.poll() is None, "the server died"
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5):
            return
        time.sleep(0.1)
    raise TimeoutError(url)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")


def train_through_an_outage(home: Path, port: int) -> Run:
    """Ten steps; the server is stopped before the fifth."""
    (home / "sheet.png").write_bytes(b"a picture")
    with server(home, port) as url:
        run = Run.start(TrackingConfig(uri=url), params={"lr": 1}, default_dir=home, system_metrics=False)
        for step in range(1, 5):
            run.log_metrics({"loss": 1 / step}, step)
    for step in range(5, 11):
        run.log_metrics({"loss": 1 / step}, step)
        (home / f"checkpoint-{step}").touch()
    run.log_artifact(home / "sheet.png", "overlays")
    assert tracking.log_model_folder(run, home, stand_in(home), code_paths=()) is None
    return run


@pytest.mark.fault("mlflow-07")
@pytest.mark.usefixtures("impatient")
def test_a_server_that_stops_midway(home: Path, caplog: pytest.LogCaptureFixture) -> None:
    with train_through_an_outage(home, free_port()) as run:
        pass
    assert len(list(home.glob("checkpoint-*"))) == 6
    assert steps(run, "loss", f"sqlite:///{home}/mlflow.db") == [1, 2, 3, 4]
    left = [json.loads(line) for line in (home / f"unsent-{run.id}.jsonl").read_text().splitlines()]
    assert [(n["key"], n["step"], n["value"]) for n in left] == [("loss", s, 1 / s) for s in range(5, 11)]
    assert sum("is away; everything is kept" in r.message for r in caplog.records) == 1
    assert "not recorded: artifact" in caplog.text


@pytest.mark.slow
@pytest.mark.usefixtures("impatient")
def test_a_server_that_comes_back(home: Path) -> None:
    port = free_port()
    run = train_through_an_outage(home, port)
    with server(home, port):
        run.end()
    database = f"sqlite:///{home}/mlflow.db"
    assert steps(run, "loss", database) == list(range(1, 11))
    assert MlflowClient(database).get_run(str(run.id)).info.status == "FINISHED"
    assert [p.name for p in (home / "served").rglob("*.png")] == ["sheet.png"]


@pytest.mark.fault("mlflow-07")
@pytest.mark.usefixtures("impatient")
def test_a_server_that_is_away_from_the_start(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    uri = f"http://127.0.0.1:{free_port()}"
    with Run.start(TrackingConfig(uri=uri), params={}, default_dir=tmp_path) as run:
        for step in range(10):
            run.log_metrics({"loss": 1.0}, step)
    assert run.id is None
    assert [r.levelno for r in caplog.records if r.name == "rlfseg.tracking"] == [logging.WARNING]
    assert "goes on without being recorded" in caplog.text


def test_outages_cost_seconds_not_minutes_and_users_may_say_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in tracking.PATIENCE:
        monkeypatch.delenv(f"MLFLOW_HTTP_REQUEST_{name}", raising=False)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    Run.start(TrackingConfig(uri=f"http://127.0.0.1:{free_port()}"), params={}, default_dir=tmp_path)
    assert os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == "0"
    assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "20"
