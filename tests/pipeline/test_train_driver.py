"""What the driver of a training settles before a worker starts: its store, its MLflow run, what it starts from."""

from __future__ import annotations

import json
import logging
import os
import queue
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from mlflow import MlflowClient
from safetensors.torch import load_file

from rlfseg import adapter, tracking
from rlfseg.adapter import Card
from rlfseg.backbone import Backbone
from rlfseg.config import BackboneConfig, LoraConfig, TrackingConfig, TrainConfig, as_dict
from rlfseg.datasets.shapes import draw_scene
from rlfseg.errors import ConfigError, DataError, ResourceError
from rlfseg.hdf5 import Labelled, Sample, build_index, write_shard
from rlfseg.pipeline import cluster, loop, train
from rlfseg.pipeline.checkpoints import Store
from rlfseg.pipeline.curve import CURVE, latest
from rlfseg.pipeline.folders import STARTED, alone, write_json
from rlfseg.pipeline.loop import Job
from rlfseg.training import PROGRESS, TrainState
from tests.tracked import stand_in, start

TINY = BackboneConfig(base="tiny", resolution=64, device="cpu")
LORA = LoraConfig(rank=2)
OFF = TrackingConfig(enabled=False)


class Ready(Exception):
    """All is settled; what follows would need Ray."""

    def __init__(self, job: Job, store: Store):
        super().__init__("ready")
        self.job, self.store = job, store


@pytest.fixture(autouse=True)
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    def ready(job: Job, store: Store) -> None:
        raise Ready(job, store)

    monkeypatch.setattr(train, "connect", lambda: None)
    for name in ("check_budget", "check_nodes"):
        monkeypatch.setattr(train, name, lambda *_, **__: None)
    monkeypatch.setattr(train, "lacks", lambda *_: "")
    monkeypatch.setattr("ray.nodes", list)
    monkeypatch.setattr(train, "_fit", ready)
    monkeypatch.setenv("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "false")


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("samples")
    phrase = draw_scene(0).phrases[0]
    labelled = (Labelled(caption=phrase.caption, mask=phrase.mask),)
    write_shard(folder / "0.h5", [Sample(id="0", image=draw_scene(0).image, phrases=labelled)])
    build_index(folder)
    write_json(folder / "_SUCCESS.json", {"identity": {}})
    return folder


def settings(samples: Path, out: Path, **others: Any) -> TrainConfig:
    own: dict[str, Any] = {"samples": str(samples), "out": str(out), "backbone": TINY, "lora": LORA, "batch_size": 1}
    return TrainConfig(**own | {"tracking": OFF} | others)


def started(config: TrainConfig) -> Ready:
    with pytest.raises(Ready) as ready:
        train.run(config)
    return ready.value


def trained(folder: Path, value: float) -> Path:
    """An adapter whose weights are all of one value."""
    backbone = Backbone.load(TINY)
    backbone.add_lora(LORA)
    for weight in backbone.trainable():
        weight.data.fill_(value)
    config = as_dict(TrainConfig(out="", backbone=TINY, lora=LORA))
    adapter.save(backbone, folder, Card(base="tiny", resolution=64, config=config))
    return folder


# --- the adapter to start from ------------------------------------------------------------------------------------


def values(folder: Path) -> set[float]:
    return {float(v) for w in load_file(folder / "adapter_model.safetensors").values() for v in w.flatten()}


@pytest.mark.parametrize("default", [True, False], ids=["default store", "tracking.uri"])
def test_a_model_of_mlflow_is_fetched_once_by_the_driver_from_where_the_settings_say(
    samples: Path, migrated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, default: bool
) -> None:
    home = tmp_path / ("runs" if default else "elsewhere")
    home.mkdir()
    shutil.copy(migrated, home / "mlflow.db")
    run = start(home)
    registry = MlflowClient(run.uri, run.uri)
    registry.create_registered_model("rings")
    for n in (1, 2):
        uri = str(
            tracking.log_model_folder(run, trained(tmp_path / f"{n}" / "adapter", n), stand_in(home), code_paths=())
        )
        monkeypatch.setenv("MLFLOW_TRACKING_URI", run.uri)
        registry.create_model_version("rings", uri, run_id=run.id, model_id=uri.removeprefix("models:/"))
        monkeypatch.delenv("MLFLOW_TRACKING_URI")
    registry.set_registered_model_alias("rings", "best", "1")
    run.end()
    monkeypatch.chdir(tmp_path)
    told = TrackingConfig(uri=None if default else run.uri, enabled=False)
    config = settings(samples, tmp_path / "out", init="models:/rings@best", tracking=told)
    job = started(config).job
    assert job.init == tmp_path / "out" / "init"
    assert values(job.init) == {1.0}

    # What a worker does, in the folder that Ray has moved it to
    (tmp_path / "worker").mkdir()
    monkeypatch.chdir(tmp_path / "worker")
    backbone = Backbone.load(TINY)
    backbone.add_lora(LORA)
    own = loop.Loop.__new__(loop.Loop)
    vars(own).update(rank=0, world=1, job=job, store=Store(job.storage, job.name), recorded=tracking.Run(""))
    own.state = TrainState(job.config, backbone, 1)
    own._resume()
    assert {float(v) for w in own.state.weights for v in w.detach().flatten()} == {1.0}
    assert not list((tmp_path / "worker").iterdir())

    # The same weights by another name are the same training, others by the same name are not
    monkeypatch.chdir(tmp_path)
    assert started(settings(samples, tmp_path / "out", init=str(tmp_path / "1" / "adapter"))).job.name == job.name
    registry.set_registered_model_alias("rings", "best", "2")
    with pytest.raises(DataError, match=r"begun with other settings: init \('\w{12}' then, '\w{12}' now\)"):
        train.run(config)


# --- where checkpoints go -----------------------------------------------------------------------------------------


def test_trainings_of_one_name_share_a_storage_and_nothing_in_it(samples: Path, tmp_path: Path) -> None:
    shared = str(tmp_path / "storage")
    first = started(settings(samples, tmp_path / "a" / "train", storage=shared)).store
    first.keep(1, lambda folder: (folder / "weights").touch())
    second = started(settings(samples, tmp_path / "b" / "train", storage=shared)).store
    assert not list(second.newest_first())
    again = started(settings(samples, tmp_path / "a" / "train", storage=shared)).store
    assert again.newest_step() == 1
    shutil.rmtree(tmp_path / "a" / "train")  # to train anew
    assert started(settings(samples, tmp_path / "a" / "train", storage=shared)).store.newest_step() == 0


@pytest.mark.parametrize("storage", ["file", "s3"])
def test_a_storage_that_cannot_be_written_to_is_told_before_a_run_is_opened(
    samples: Path, tmp_path: Path, storage: str, request: pytest.FixtureRequest
) -> None:
    (tmp_path / "file").touch()
    place = str(tmp_path / "file" / "checkpoints")
    if storage == "s3":  # a bucket that may not be made, of a name that no other test has made
        place = request.getfixturevalue("bucket_uri").replace("allow_bucket_creation=true&", "")
        place = place.replace("s3://bucket/", "s3://missing/")
    out = tmp_path / "out"
    tracked = TrackingConfig(uri=f"sqlite:///{tmp_path}/mlflow.db")
    with pytest.raises(ConfigError, match=r"storage: .*can't be written to: "):
        train.run(settings(samples, out, storage=place, tracking=tracked))
    assert not out.exists()
    assert not (tmp_path / "mlflow.db").exists()
    started(settings(samples, out))
    with pytest.raises(ConfigError, match=r"storage: .*can't be written to: "):
        train.run(settings(samples, out, storage=place))
    assert out.exists()  # it has begun: settings were good once


def test_another_storage_on_resume_must_hold_what_was_done(samples: Path, tmp_path: Path) -> None:
    """Else it would begin at step 0 again without a word."""
    first = started(settings(samples, tmp_path / "out")).store
    first.keep(1, lambda folder: (folder / "weights").touch())
    other = settings(samples, tmp_path / "out", storage=str(tmp_path / "big"))
    with pytest.raises(
        ConfigError, match=rf"storage: {tmp_path}/big holds no checkpoint .* in {first.shown}; give that"
    ):
        train.run(other)
    assert first.newest_step() == 1
    shutil.copytree(first.folder, tmp_path / "big" / first.name, dirs_exist_ok=True)
    assert started(other).store.newest_step() == 1
    shutil.rmtree(first.folder)
    assert started(other).store.newest_step() == 1


# --- passwords ----------------------------------------------------------------------------------------------------


def test_what_is_written_holds_no_password(
    samples: Path, migrated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(migrated, tmp_path / "mlflow.db")
    real = f"sqlite:///{tmp_path}/mlflow.db"
    # As if the database asked for a password: what MLflow itself opens has none
    asked = "postgresql://me:hush@host/db"
    client, resume = MlflowClient, tracking.Run.resume
    monkeypatch.setattr(tracking, "MlflowClient", lambda *uris: client(*(real if u == asked else u for u in uris)))
    monkeypatch.setattr(tracking.Run, "_watch", lambda *_: None)
    opened = list[str]()

    def noted(uri: str, *args: Any, **settings: Any) -> tracking.Run:
        opened.append(uri)
        return resume(uri, *args, **settings)

    monkeypatch.setattr(tracking.Run, "resume", noted)
    storage = f"memory://key:hush@bucket/{tmp_path.name}"
    config = settings(samples, tmp_path / "out", storage=storage, tracking=TrackingConfig(uri=asked))
    ready = started(config)
    assert ready.job.uri == asked
    assert ready.job.storage == storage

    backbone = Backbone.load(TINY)
    backbone.add_lora(LORA)
    TrainState(ready.job.config, backbone, 1).save(tmp_path / "out" / "saved", loop._card(ready.job))
    texts = {p.name: p.read_text() for p in (tmp_path / "out").rglob("*") if p.suffix in (".json", ".yaml", ".md")}
    assert {"rlfseg.yaml", "README.md", PROGRESS, "mlflow.json", "_STARTED.json"} <= texts.keys()
    files = MlflowClient(real).download_artifacts(str(ready.job.run_id), "config.yaml", str(tmp_path))
    texts["config.yaml"] = Path(files).read_text()
    texts["parameters"] = str(MlflowClient(real).get_run(str(ready.job.run_id)).data.params)
    assert not [name for name, text in texts.items() if "hush" in text]
    for name in ("rlfseg.yaml", PROGRESS, "parameters", "config.yaml"):
        assert "postgresql://host/db" in texts[name], name
    assert json.loads(texts[PROGRESS])["config"]["storage"] == f"memory://bucket/{tmp_path.name}"
    # The same command goes on in the same run, with the password
    assert started(config).job.run_id == ready.job.run_id
    assert opened == [asked]


# --- its run in MLflow --------------------------------------------------------------------------------------------


def test_a_resume_records_where_it_is_told_to(
    samples: Path, migrated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tracking.Run, "_watch", lambda *_: None)
    places = {name: f"sqlite:///{tmp_path}/{name}.db" for name in ("first", "moved", "other")}
    for name in ("first", "other"):
        shutil.copy(migrated, tmp_path / f"{name}.db")

    def at(name: str | None, **more: Any) -> Job:
        tracked = TrackingConfig(uri=places[name] if name else None, **more)
        return started(settings(samples, tmp_path / "out", tracking=tracked)).job

    first = at("first")
    assert at(None).run_id == first.run_id  # the default is another one in each folder: none is asked for
    off = at("first", enabled=False)
    assert (off.run_id, off.uri) == (None, "")
    shutil.copy(tmp_path / "first.db", tmp_path / "moved.db")
    moved = at("moved")
    assert (moved.run_id, moved.uri) == (first.run_id, places["moved"])
    assert at(None).uri == places["moved"]
    with caplog.at_level(logging.WARNING):
        other = at("other")
    assert (other.run_id != first.run_id, other.uri) == (True, places["other"])
    assert f"run {first.run_id} is at {places['moved']} and not at {places['other']}" in caplog.text
    assert MlflowClient(places["other"]).get_run(str(other.run_id)).data.tags["rlfseg.continues"] == first.run_id
    monkeypatch.setenv("MLFLOW_TRACKING_URI", places["other"])
    assert at(None).run_id == other.run_id


# --- how far it is ------------------------------------------------------------------------------------------------


def test_the_last_whole_row_is_read_from_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert latest(tmp_path) == {}
    curve = tmp_path / CURVE
    curve.touch()
    assert latest(tmp_path) == {}
    rows = [{"step": n, "loss": n / 7} for n in range(1000)]
    curve.write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(Path, "read_text", lambda *_: pytest.fail("all of it is read"))
    assert latest(tmp_path) == rows[-1]
    with curve.open("a") as file:
        file.write('{"step": 1000, "lo')
    assert latest(tmp_path) == rows[-1]
    os.truncate(curve, len('{"step": 0, "loss'))
    assert latest(tmp_path) == {}


# --- fewer nodes than it needs ------------------------------------------------------------------------------------


def test_what_a_cluster_lacks_is_told_while_an_elastic_training_waits(
    samples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    have, said = {"CPU": 9.0}, list[str]()
    monkeypatch.setattr("ray.cluster_resources", lambda: have)
    monkeypatch.setattr(train, "lacks", cluster.lacks)
    backbone = replace(TINY, device="cuda")
    config = settings(samples, tmp_path / "out", backbone=backbone, min_workers=1, cpus=3)
    assert train._needs(config) == (5, 1)
    assert train._needs(replace(config, workers=8, min_workers=None)) == (33, 8)

    class Watched:
        def __init__(self, *_: object, tell: Callable[[], str], **__: object):
            self.tell = tell

        def __enter__(self) -> None:
            said.append(self.tell())
            have["GPU"] = 1.0  # a node has come
            said.append(self.tell())

        def __exit__(self, *_: object) -> None:
            pass

    monkeypatch.setattr(train, "Progress", Watched)
    started(config)
    assert said == ["waiting: it needs 1 GPUs and this Ray has 0", ""]


def test_a_worker_larger_than_any_node_is_refused(
    samples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "check_nodes", cluster.check_nodes)
    monkeypatch.setattr("ray.nodes", lambda: [{"Alive": True, "Resources": {"CPU": 8.0}}])
    with pytest.raises(
        ResourceError, match=r"^train: cpus: 16 for each process, and no node has more than 8; lower it$"
    ):
        train.run(settings(samples, tmp_path / "out", cpus=16))
    started(settings(samples, tmp_path / "out", cpus=8))


# --- a driver that was killed -------------------------------------------------------------------------------------


def test_the_first_worker_waits_for_those_of_a_driver_that_was_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    main, began = threading.get_ident(), queue.Queue[str]()
    rank = SimpleNamespace(get_world_rank=lambda: int(threading.get_ident() == main))
    monkeypatch.setattr("ray.train.get_context", lambda: rank)
    monkeypatch.setattr(loop, "Loop", lambda job: SimpleNamespace(run=lambda: began.put(job.name)))
    write_json(tmp_path / STARTED, {})
    with ThreadPoolExecutor(1) as thread:
        with alone(tmp_path, "_lock-workers"):
            first = thread.submit(loop.work, {"job": SimpleNamespace(out=tmp_path, name="first")})
            assert loop.work({"job": SimpleNamespace(out=tmp_path, name="second")}) is None
            assert began.get(timeout=60) == "second"
            assert not first.done()
        assert first.result(timeout=60) is None
    assert began.get_nowait() == "first"


def test_workers_that_never_end_are_told_and_not_waited_for_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As on NFS, where the node of the first one was lost."""
    began: list[int] = []
    monkeypatch.setattr(loop, "ORPHANS_S", 0.1)
    monkeypatch.setattr(loop, "Loop", lambda job: SimpleNamespace(run=lambda: began.append(1)))
    monkeypatch.setattr("ray.train.get_context", lambda: SimpleNamespace(get_world_rank=lambda: 0))
    write_json(tmp_path / STARTED, {})
    with alone(tmp_path, "_lock-workers"):
        loop.work({"job": SimpleNamespace(out=tmp_path)})
    assert began
    assert "still hold _lock-workers" in caplog.text


def test_a_node_that_does_not_see_out_does_not_make_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "Loop", lambda job: SimpleNamespace(run=lambda: None))
    monkeypatch.setattr("ray.train.get_context", lambda: SimpleNamespace(get_world_rank=lambda: 0))
    loop.work({"job": SimpleNamespace(out=tmp_path / "elsewhere")})
    assert not (tmp_path / "elsewhere").exists()
