"""Against a real MLflow on sqlite; tests/test_tracking_outage.py has a server that is stopped and started."""

from __future__ import annotations

import math
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from mlflow import MlflowClient
from mlflow.utils.validation import path_not_unique, validate_param_and_metric_name

from rlfseg import outbox, tracking
from rlfseg.config import TrackingConfig
from rlfseg.errors import ConfigError, ModelError
from rlfseg.outbox import metric_name
from rlfseg.tracking import Run
from tests.tracked import client, log_stand_in, recorded, stand_in, start, steps


@pytest.fixture
def home(migrated: Path, tmp_path: Path) -> Path:
    """A folder with a database that needs no migration."""
    shutil.copy(migrated, tmp_path / "mlflow.db")
    return tmp_path


# --- names and places


def test_default_is_an_absolute_sqlite_with_artifacts_beside_it(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)
    assert tracking.resolve_uri() == f"sqlite:///{home}/runs/mlflow.db"
    assert tracking.resolve_uri("sqlite:///here.db") == f"sqlite:///{home}/here.db"
    run = start(home)
    assert recorded(run).info.artifact_uri.startswith(f"{home.as_uri()}/artifacts/")
    assert not (home / "mlruns").exists()


def test_environment_names_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")
    assert tracking.resolve_uri() == "http://mlflow:5000"
    assert tracking.resolve_uri("https://other") == "https://other"


@pytest.mark.parametrize(
    "uri", ["file:///tmp/mlruns", "./mlruns", "/tmp/mlruns", "sqlite://", "sqlite:///:memory:", "ftp://x"]
)
def test_places_that_cannot_hold_runs_are_refused(uri: str) -> None:
    with pytest.raises(ConfigError, match=r"tracking\.uri.*sqlite:///ABSOLUTE"):
        tracking.resolve_uri(uri)


def test_a_damaged_database_stops_the_job_before_it_starts(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_bytes(b"this is no database" * 300)
    with pytest.raises(ConfigError, match="not a database"):
        start(tmp_path)


def test_names() -> None:
    assert metric_name("val/miou") == "val/miou"
    assert metric_name("mIoU@0.5") == "mIoU_at_0.5"
    assert metric_name("IoU[person]") == "IoU/person"
    assert metric_name("AP: chien e\u0301") == metric_name("AP: chien é") == "AP: chien é"


@given(st.text(max_size=300))
def test_every_name_is_one_that_mlflow_takes(name: str) -> None:
    kept = metric_name(name)
    assert validate_param_and_metric_name(kept)
    assert not path_not_unique(kept)
    assert "\n" not in kept
    assert len(kept) <= 250
    assert metric_name(kept) == kept


@given(st.text("ab/.#!é ", max_size=8), st.text("ab/.#!é ", max_size=8))
def test_two_names_never_become_one(a: str, b: str) -> None:
    assert (metric_name(a) == metric_name(b)) == (a == b)


# --- a run


def test_parameters_config_and_status(home: Path) -> None:
    with start(home, params={"lora": {"rank": 4, "targets": ["to_q"]}, "out": None}, run_name="first") as run:
        assert recorded(run).info.status == "RUNNING"
    seen = recorded(run)
    assert seen.data.params == {"lora.rank": "4", "lora.targets": '["to_q"]', "out": "null"}
    assert (seen.info.run_name, seen.info.status) == ("first", "FINISHED")
    assert (
        yaml.safe_load(tracking.download(f"runs:/{run.id}/config.yaml", uri=run.uri).read_text())["lora"]["rank"] == 4
    )


@pytest.mark.parametrize(("error", "status"), [(RuntimeError, "FAILED"), (KeyboardInterrupt, "KILLED")])
def test_status_of_a_job_that_breaks(home: Path, error: type[BaseException], status: str) -> None:
    with pytest.raises(error), start(home) as run:
        raise error
    assert recorded(run).info.status == status


def test_off(tmp_path: Path) -> None:
    run = Run.start(TrackingConfig(enabled=False), params={}, default_dir=tmp_path)
    with run, Run.attach(run.uri, run.id, node="a") as attached:
        attached.log_metrics({"loss": 1.0}, 1)
        attached.log_dict({}, "a.yaml")
    assert tracking.log_model_folder(run, tmp_path, tmp_path) is None
    assert run.id is None
    assert list(tmp_path.iterdir()) == []


def test_no_active_run_is_needed_in_another_thread(home: Path) -> None:
    run = start(home)
    thread = threading.Thread(target=lambda: run.log_metrics({"loss": 0.5}, 3))
    thread.start()
    thread.join()
    assert steps(run, "loss") == [3]


def test_artifacts(home: Path) -> None:
    run = start(home)
    (home / "a").mkdir()
    (home / "a" / "x.txt").write_text("x")
    run.log_artifacts(home / "a", "all")
    run.log_artifact(home / "a" / "x.txt", "one")
    run.log_artifact(home / "missing.txt")  # an upload that can't work must not stop the next
    run.log_dict({"best": 1}, "one/best.json")
    run.end()
    folder = Path(recorded(run).info.artifact_uri.removeprefix("file://"))
    files = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    assert tracking.download(f"runs:/{run.id}/all", home / "copy", uri=run.uri) == home / "copy" / "all"
    assert (home / "copy" / "all" / "x.txt").read_text() == "x"
    assert files == {"all/x.txt", "one/x.txt", "one/best.json", "config.yaml"}
    assert recorded(run).info.status == "FINISHED"


def test_evaluation_links_to_its_training_run(home: Path) -> None:
    trained = start(home)
    run = start(home, parent=trained.id, tags={"rlfseg.stage": "evaluate"})
    tags = recorded(run).data.tags
    assert tags["mlflow.parentRunId"] == tags["rlfseg.training_run"] == trained.id
    assert tags["rlfseg.stage"] == "evaluate"
    assert "mlflow.user" in tags


def test_system_metrics_while_the_run_is_open(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.1")
    with start(home, system_metrics=True) as run, Run.attach(run.uri, run.id, node="node-1"):
        deadline = time.monotonic() + 20
        wanted = {"system/cpu_utilization_percentage", "system/node-1/cpu_utilization_percentage"}
        while not wanted <= recorded(run).data.metrics.keys() and time.monotonic() < deadline:
            time.sleep(0.1)
    assert wanted <= recorded(run).data.metrics.keys()
    assert not [t for t in threading.enumerate() if t.name == "SystemMetricsMonitor"]


def test_a_worker_process_attaches_and_leaves_the_run_open(home: Path) -> None:
    run = start(home)
    code = (
        "import sys; from rlfseg.tracking import Run\nwith Run.attach(*sys.argv[1:]) as r: r.log_metrics({'x': 1}, 7)"
    )
    subprocess.run([sys.executable, "-c", code, run.uri, str(run.id)], check=True, cwd="/")
    assert steps(run, "x") == [7]
    assert recorded(run).info.status == "RUNNING"


def test_steps_repeated_after_a_restart_are_logged_once(home: Path) -> None:
    run = start(home)
    for first in (1, 4):  # the first worker dies after step 6, its last checkpoint was at 3
        worker = Run.attach(run.uri, run.id)
        for step in range(first, first + 6):
            worker.log_metrics({"loss": step / 10}, step)
    assert steps(run, "loss") == list(range(1, 10))


def test_a_restarted_driver_reopens_its_run_and_ends_it(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = start(home)
    run.log_metrics({"loss": 1.0}, 1)
    run.end("FAILED")
    with Run.resume(run.uri, str(run.id), default_dir=home) as again:
        assert recorded(again).info.status == "RUNNING"
        again.log_metrics({"loss": 1.0}, 1)
        again.log_metrics({"loss": 0.5}, 2)
    assert recorded(run).info.status == "FINISHED"
    assert steps(run, "loss") == [1, 2]


def test_a_database_that_a_worker_cannot_open_costs_no_step(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where the driver's lies on another node, or is away just then."""
    monkeypatch.setattr(outbox, "PAUSE", 0.0)
    run = Run.attach("sqlite:////proc/nowhere/mlflow.db", "0" * 32, node="other", default_dir=tmp_path)
    run.log_metrics({"loss": 0.5}, 1)
    run.end()
    assert [r.getMessage() for r in caplog.records if "1 numbers were not recorded" in r.getMessage()]


@pytest.mark.parametrize("error", [ImportError("no boto3"), type("ClientError", (Exception,), {})("expired")])
def test_what_a_store_of_artifacts_raises_ends_no_job(
    home: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def broken(*_: object) -> None:
        raise error

    monkeypatch.setattr(MlflowClient, "log_artifact", broken)
    with start(home) as run:
        run.log_artifact(home / "mlflow.db", "curves")
    assert any(str(error) in r.getMessage() for r in caplog.records)


# --- known faults


@pytest.mark.fault("mlflow-01")
def test_nan_at_the_step_at_which_the_adapter_is_logged(home: Path) -> None:
    with start(home) as run:
        for step in range(1, 5):
            run.log_metrics({"loss": math.nan if step == 3 else 0.1, "lr": 1.0}, step)
            if step == 3:
                model = log_stand_in(run, home)
    seen = recorded(run)
    assert seen.info.status == "FINISHED"
    assert seen.data.tags["rlfseg.nonfinite.loss"] == "1, first nan at step 3"
    assert (steps(run, "loss"), steps(run, "lr")) == ([1, 2, 4], [1, 2, 3, 4])
    assert (tracking.download(str(model), uri=run.uri) / "artifacts" / "adapter" / "word.txt").read_text() == "Hello, "


@pytest.mark.fault("mlflow-03")
def test_infinite_gradients_are_counted_not_stored(home: Path) -> None:
    run = start(home)
    for step, value in enumerate([1.0, math.inf, -math.inf, 2.0]):
        run.log_metrics({"train/grad_norm": value}, step)
    history = client(run).get_metric_history(str(run.id), "train/grad_norm")
    assert [(m.step, m.value) for m in history] == [(0, 1.0), (3, 2.0)]
    assert recorded(run).data.tags["rlfseg.nonfinite.train/grad_norm"] == "2, first inf at step 1"


@pytest.mark.fault("mlflow-05")
def test_odd_metric_names(home: Path) -> None:
    run = start(home)
    names = ["mIoU@0.5", "IoU[person]", "AP: chien é", "IoU[a/b]", "IoU(a/b)", "", "x" * 400, "../up"]
    run.log_metrics(dict.fromkeys(names, 0.5) | {"fine": math.nan, "what?": math.inf})
    seen = recorded(run).data
    assert seen.metrics.keys() == {metric_name(name) for name in names}
    assert len(seen.metrics) == len(names)
    assert f"rlfseg.nonfinite.{metric_name('what?')}" in seen.tags


@pytest.mark.fault("mlflow-06")
def test_long_and_many_parameters(home: Path) -> None:
    targets = [f"layer.{i}.to_q" for i in range(700)]
    config = {"lora": {"targets": targets}, **{f"field{i}": i for i in range(300)}}
    assert len(str(targets)) > 10_000
    with start(home, params=config) as run:
        run.log_metrics({"loss": 0.5}, 1)
    seen = recorded(run)
    assert len(seen.data.params) == 301
    assert seen.data.params["field299"] == "299"
    assert seen.data.params["lora.targets"].endswith("characters, cut here, whole in config.yaml]")
    assert seen.data.tags["rlfseg.truncated_params"] == "lora.targets"
    assert (seen.info.status, steps(run, "loss")) == ("FINISHED", [1])
    assert yaml.safe_load(tracking.download(f"runs:/{run.id}/config.yaml", uri=run.uri).read_text()) == config


# --- models


def test_a_logged_model_serves_in_a_fresh_process(home: Path) -> None:
    run = start(home)
    uri = log_stand_in(run, home)
    code = (
        "import sys, mlflow, pandas as pd\n"
        "mlflow.set_tracking_uri(sys.argv[1])\n"
        "model = mlflow.pyfunc.load_model(sys.argv[2])\n"
        "print(model.predict(pd.DataFrame({'phrase': ['ring', 'star']}))['said'].tolist(), model.metadata.run_id)"
    )
    seen = subprocess.run(
        [sys.executable, "-c", code, run.uri, str(uri)], check=True, cwd="/", capture_output=True, text=True
    )
    assert seen.stdout.strip() == f"['Hello, ring', 'Hello, star'] {run.id}"
    assert [m.model_id for m in recorded(run).outputs.model_outputs] == [str(uri).removeprefix("models:/")]
    requirements = (tracking.download(str(uri), uri=run.uri) / "requirements.txt").read_text()
    assert "torch==" in requirements
    assert "+" not in requirements


def test_a_registered_model_is_found_by_alias_and_version_on_the_server_that_is_named(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = start(home)
    uri = str(log_stand_in(run, home))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", run.uri)
    registry = client(run)
    registry.create_registered_model("shapes")
    entry = registry.create_model_version("shapes", uri, run_id=run.id, model_id=uri.removeprefix("models:/"))
    registry.set_registered_model_alias("shapes", "champion", entry.version)
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    (home / "elsewhere").mkdir()
    monkeypatch.chdir(home / "elsewhere")
    for reference in (uri, "models:/shapes@champion", "models:/shapes/1", "models:/shapes/latest"):
        assert (tracking.download(reference, uri=run.uri) / "artifacts" / "adapter" / "word.txt").is_file()
    assert list((home / "elsewhere").iterdir()) == []


def test_downloads_are_files_that_are_never_run(home: Path) -> None:
    run = start(home)
    bomb = stand_in(home)
    uri = log_stand_in(run, home)
    for copy in (home / "artifacts").rglob(bomb.name):
        copy.write_text("raise SystemExit('it was run')")
    folder = tracking.download(str(uri), home / "copy", uri=run.uri)
    assert folder.is_relative_to(home / "copy")
    assert (folder / "artifacts" / "adapter" / "word.txt").is_file()


@pytest.mark.parametrize(
    "reference", ["models:/none@champion", "models:/m-0123", "runs:/0123456789abcdef/adapter", "runs:/"]
)
def test_references_to_nothing(home: Path, reference: str) -> None:
    with pytest.raises(ModelError, match=reference):
        tracking.download(reference, uri=f"sqlite:///{home}/mlflow.db")
