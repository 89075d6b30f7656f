"""Runs in MLflow: parameters, metrics, artifacts and models. The only file that talks to a tracking server.

A job must not die of its bookkeeping: once a run is open, nothing raises because the server is away. What it didn't
take is kept (`outbox`); numbers still unsent at the end go to a JSON-lines file. All goes through `MlflowClient`,
never MLflow's "active run", which belongs to one thread, and Ray Train's loop to another.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import os
import runpy
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import mlflow
from mlflow import MlflowClient
from mlflow.entities import LoggedModelOutput, Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.models import Model
from mlflow.store.artifact.utils.models import get_model_name_and_version
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor
from mlflow.tracking.context import registry as context

from rlfseg.config import TrackingConfig, flatten, without_passwords
from rlfseg.errors import ConfigError, ModelError, RlfsegError
from rlfseg.outbox import CUT, Away, Number, Outbox, Refused, metric_name, parameter

PARENT = "mlflow.parentRunId"  # MLflow's own: nests the run in its pages
TRAINING_RUN = "rlfseg.training_run"  # the same id under a name that people can search for
NONFINITE, TRUNCATED = "rlfseg.nonfinite.", "rlfseg.truncated_params"
LONGEST_TAG, PARAMS_A_CALL = 5000, 100  # MLflow takes 8,000, and 1 MB a request
PYFUNC = Path(__file__).with_name("pyfunc_model.py")
RUNS = Path("runs")  # in the working directory of the moment
SCHEMES = ("sqlite", "http", "https", "postgresql", "mysql", "mssql", "databricks")

# MLflow's own (7 retries, backoff 2, 120 s) hold a training step for minutes; so a refusal costs 3 s, silence a minute.
PATIENCE = {"MAX_RETRIES": "2", "BACKOFF_FACTOR": "1", "TIMEOUT": "20"}
logger = logging.getLogger(__name__)
logging.getLogger("mlflow").setLevel(logging.WARNING)  # it tells of tables, examples, each start and stop


def resolve_uri(uri: str | None = None, default_dir: Path = RUNS) -> str:
    """The tracking URI to use: the one given, else $MLFLOW_TRACKING_URI, else sqlite in `default_dir`.

    Args:
        uri: `sqlite:///PATH`, a server's `http(s)://...`, or another database that MLflow knows.
        default_dir: Folder of the default database.

    Returns:
        The URI; a path in it is absolute, because Ray Train moves its workers' working directory.

    Raises:
        ConfigError: The URI is a folder (MLflow's file store is no longer maintained), in memory, or of no known kind.
    """
    uri = uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{default_dir / 'mlflow.db'}"
    scheme, _, rest = uri.partition(":")
    if scheme.partition("+")[0] not in SCHEMES or rest in ("//", "///", "///:memory:"):
        ways = "give sqlite:///ABSOLUTE/PATH.db or a server's http(s)://HOST:PORT"
        raise ConfigError(f"tracking.uri: {without_passwords(uri)!r} can't hold runs; {ways}")
    return f"sqlite:///{Path(rest.removeprefix('///')).absolute()}" if scheme == "sqlite" else uri


def _artifact_location(uri: str, default_dir: Path) -> str | None:
    """Where a new experiment keeps its files: beside a database of ours; a server decides itself."""
    if uri.startswith(("http", "databricks")):
        return None
    beside = Path(uri.removeprefix("sqlite:///")).parent if uri.startswith("sqlite") else default_dir.absolute()
    return (beside / "artifacts").as_uri()


class Run:
    """An open run: by `start` in the job's driver, by `attach` in another process. Not for several threads at once.

    As a context manager it ends as FINISHED, FAILED (an exception) or KILLED (Ctrl-C). An attached run only sends what
    is left: the status belongs to the driver. A run that is off (`id` is None) takes every call and does nothing.

    Args:
        uri: Tracking URI, absolute; with `id` it is all that another process needs.
        run_id: MLflow's run id, kept as `id`; None: nothing is recorded.
        attached: Skip steps that MLflow has, and leave the status alone.
        unsent: File for numbers that stay unsent; None: one in ./runs.
    """

    def __init__(self, uri: str, run_id: str | None = None, *, attached: bool = False, unsent: Path | None = None):
        self.uri, self.id = uri, run_id
        self._id, self._resumed, self._owned = run_id or "", attached, not attached
        self._monitor: SystemMetricsMonitor | None = None
        self._outbox: Outbox | None = None
        self._nonfinite: dict[str, tuple[int, str]] = {}
        self._last: dict[str, int] = {}
        if run_id is not None:
            self._outbox = Outbox(self._deliver, unsent=unsent or RUNS / f"unsent-{run_id}.jsonl")

    @classmethod
    def start(
        cls,
        config: TrackingConfig,
        *,
        params: Mapping[str, Any],
        run_name: str | None = None,
        tags: Mapping[str, str] | None = None,
        parent: str | None = None,
        default_dir: Path = RUNS,
        system_metrics: bool = True,
    ) -> Run:
        """Opens a run, in the driver, before workers start; creates database and experiment where there are none.

        Args:
            config: Where to record, and whether at all.
            params: The resolved config as a tree; URIs lose passwords. Its leaves become parameters; those over 1,000
                characters are cut and listed in the tag `rlfseg.truncated_params`, `config.yaml` has them whole.
            run_name: Name, if the config gives none.
            tags: More tags.
            parent: Id of the training run that this run (an evaluation, a calibration) belongs to.
            default_dir: Folder of the default database and of unsent numbers.
            system_metrics: Log the load of this machine and its GPUs every ten seconds, as `system/...`.

        Returns:
            The run; one that is off if the server is away, after a warning: the job goes on unrecorded.

        Raises:
            ConfigError: The URI can't hold runs, the database can't be used, or the server refuses us.
        """
        if not config.enabled:
            return cls("")
        uri = resolve_uri(config.uri, default_dir)
        links = {PARENT: parent, TRAINING_RUN: parent} if parent else {}
        try:
            with _answers(final=(400, 401, 403, 404)):
                client = MlflowClient(uri, uri)
                experiment = _experiment(client, config.experiment, _artifact_location(uri, default_dir))
                all_tags = {**context.resolve_tags(), **links, **(tags or {})}
                run_id = client.create_run(experiment, tags=all_tags, run_name=config.run_name or run_name).info.run_id
        except (Away, Refused) as error:
            if isinstance(error, Refused) or uri.startswith("sqlite"):
                raise ConfigError(f"tracking.uri: {without_passwords(uri)} can't be used: {error}") from error
            where = without_passwords(uri)
            logger.warning("MLflow at %s is away; this job goes on without being recorded: %s", where, error)
            return cls(uri)
        run = cls(uri, run_id, unsent=default_dir.absolute() / f"unsent-{run_id}.jsonl")
        run._log_params(without_passwords(dict(params)))
        if system_metrics:
            run._watch()
        return run

    @classmethod
    def attach(cls, uri: str, run_id: str | None, *, node: str | None = None, default_dir: Path = RUNS) -> Run:
        """Continues a run in another process, such as a training worker, which may be its second life.

        Numbers up to the last step that MLflow had when this process first logged that metric are skipped: after a
        restart from a checkpoint no step appears twice.

        Args:
            uri: `uri` of the driver's run.
            run_id: Its `id`; None gives a run that is off.
            node: If given, this machine's load is logged too, as `system/NODE/...`.
            default_dir: Folder for numbers that stay unsent.

        Returns:
            The run; end it too, so that nothing stays behind.
        """
        unsent = default_dir.absolute() / f"unsent-{run_id}-{os.getpid()}.jsonl"
        run = cls(uri, run_id, attached=True, unsent=unsent)
        if node is not None:
            run._watch(node)
        return run

    @classmethod
    def resume(cls, uri: str, run_id: str, *, default_dir: Path = RUNS) -> Run:
        """Reopens the run of an earlier, interrupted life of this driver: as `attach`, but this process ends it."""
        run = cls.attach(uri, run_id, default_dir=default_dir)
        run._owned = True
        run._call("the run's status", lambda client, run: client.update_run(run, "RUNNING"))
        run._watch()
        return run

    def log_metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        """Logs numbers, by name, at an optimiser step (0 for a result); NaN and infinity are only counted, in a tag."""
        if self._outbox is not None:
            now = int(time.time() * 1000)
            numbers = [Number(metric_name(name), float(value), step, now) for name, value in values.items()]
            tags = dict(self._count_nonfinite(n) for n in numbers if not math.isfinite(n.value))
            self._outbox.add([n for n in numbers if math.isfinite(n.value)], tags)

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Sets tags; values are cut at 5,000 characters."""
        if self._outbox is not None:
            self._outbox.add(tags={metric_name(key): value[:LONGEST_TAG] for key, value in tags.items()})

    def log_artifact(self, path: Path, folder: str | None = None) -> None:
        """Uploads a file into a folder of the run's artifacts. It must stay on disk until the run ends."""
        self._call(f"artifact {path}", lambda client, run: client.log_artifact(run, str(path), folder))

    def log_artifacts(self, path: Path, folder: str | None = None) -> None:
        """Uploads a folder's content into a folder of the run's artifacts. It must stay on disk until the run ends."""
        self._call(f"artifacts {path}", lambda client, run: client.log_artifacts(run, str(path), folder))

    def log_dict(self, tree: Mapping[str, Any], name: str) -> None:
        """Stores a tree of plain values as the artifact `name`: YAML or JSON, by its ending."""
        self._call(f"artifact {name}", lambda client, run: client.log_dict(run, dict(tree), name))

    def end(self, status: Literal["FINISHED", "FAILED", "KILLED"] = "FINISHED") -> None:
        """Sends what is left and closes the run (not so an attached one). A second call does nothing."""
        if self._monitor is not None:
            self._monitor.finish()
        if self._outbox is not None:
            last = self._answering(lambda client, run: client.set_terminated(run, status)) if self._owned else None
            self._outbox.close("the run's status", last)
        self._outbox = self._monitor = None

    def __enter__(self) -> Run:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.end("FINISHED" if kind is None else "KILLED" if issubclass(kind, KeyboardInterrupt) else "FAILED")

    def _deliver(self, numbers: Sequence[Number], tags: Mapping[str, str]) -> None:
        with _answers():
            fresh = [Metric(n.key, n.value, n.time, n.step) for n in numbers if n.step > self._last_step(n.key)]
            self._client.log_batch(self._id, metrics=fresh, tags=[RunTag(key, value) for key, value in tags.items()])

    def _last_step(self, key: str) -> int:
        """The last step of a metric from an earlier life of this process, else -1; asked for once a metric."""
        if self._resumed and key not in self._last:
            self._last[key] = max((m.step for m in self._client.get_metric_history(self._id, key)), default=-1)
        return self._last.get(key, -1)

    def _call(self, what: str, call: Callable[[MlflowClient, str], object]) -> None:
        if self._outbox is not None:
            self._outbox.call(what, self._answering(call))

    def _answering(self, call: Callable[[MlflowClient, str], object]) -> Callable[[], object]:
        return _answers()(lambda: call(self._client, self._id))

    @functools.cached_property
    def _client(self) -> MlflowClient:
        """Made by whoever sends first: of a database, that opens it."""
        return MlflowClient(self.uri, self.uri)

    def _log_params(self, params: Mapping[str, Any]) -> None:
        self.log_dict(params, "config.yaml")
        texts = {metric_name(key): parameter(value) for key, value in flatten(dict(params)).items()}
        entries = [Param(key, text) for key, text in texts.items()]

        def send(client: MlflowClient, run: str) -> None:
            for i in range(0, len(entries), PARAMS_A_CALL):
                client.log_batch(run, params=entries[i : i + PARAMS_A_CALL])

        self._call("parameters", send)
        if long := [key for key, text in texts.items() if text.endswith(CUT)]:
            self.set_tags({TRUNCATED: ", ".join(long)})

    def _count_nonfinite(self, n: Number) -> tuple[str, str]:
        count, first = self._nonfinite.get(n.key, (0, f"{n.value} at step {n.step}"))
        self._nonfinite[n.key] = count + 1, first
        if count == 0:
            logger.warning("%s is %s; that is counted in a tag, not logged as a number", n.key, first)
        return metric_name(NONFINITE + n.key), f"{count + 1}, first {first}"

    def _watch(self, node: str | None = None) -> None:
        if self.id is not None:
            at = {"node_id": node, "tracking_uri": self.uri}
            with contextlib.suppress(Away, Refused), _answers():  # it asks for what was logged before
                self._monitor = SystemMetricsMonitor(self.id, resume_logging=self._resumed, **at)
                self._monitor.start()


@contextlib.contextmanager
def _answers(final: Sequence[int] = (400,)) -> Iterator[None]:
    """Tells what will never work (`Refused`) from what may work later (`Away`); `final`: HTTP codes that won't change.

    MLflow's retries are shortened for this process, unless the user has set them. Only environment variables
    (MLFLOW_HTTP_REQUEST_...) do that, read at each request; they stay, for the thread that logs system metrics.
    """
    for key, value in PATIENCE.items():
        os.environ.setdefault(f"MLFLOW_HTTP_REQUEST_{key}", value)
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    try:
        yield
    except MlflowException as error:
        raise (Refused if error.get_http_status_code() in final else Away)(_line(error)) from error
    except RlfsegError:
        raise
    except Exception as error:  # of requests, SQLAlchemy, boto3: MLflow hands on what its stores raise
        # The file to upload, the store's library
        raise (Refused if isinstance(error, FileNotFoundError | ImportError) else Away)(_line(error)) from error


def _experiment(client: MlflowClient, name: str, location: str | None) -> str:
    """The id of the experiment, created if need be with an artifact location of its own."""
    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return str(client.create_experiment(name, artifact_location=location))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":  # another job was quicker
                raise
            found = client.get_experiment_by_name(name)
    assert found is not None
    if found.lifecycle_stage == "deleted":
        raise ConfigError(f"tracking.experiment: {name!r} was deleted in MLflow; restore it there or give another name")
    return str(found.experiment_id)


def _line(error: BaseException) -> str:
    return str(error).partition("\n")[0][:300]


def log_model_folder(
    run: Run, folder: Path, code: Path = PYFUNC, *, code_paths: Sequence[Path] = (PYFUNC.parent,)
) -> str | None:
    """Logs an adapter folder as an MLflow model, from code and without network; `mlflow.pyfunc.load_model` serves it.

    Args:
        run: The run that made the adapter.
        folder: Adapter folder; the code finds it as `context.artifacts["adapter"]`.
        code: A Python file that sets a model and names its SIGNATURE, an EXAMPLE of its input, and the PACKAGES that it
            needs; their versions here (2.14.1+cpu as 2.14.1) are its requirements.
        code_paths: Packages to ship inside the model: rlfseg comes from no index that a server could ask.

    Returns:
        `models:/m-...`; None if the run is off, or if the server is away, which is logged.
    """
    if run.id is None:
        return None
    settings = runpy.run_path(str(code))
    try:
        with _answers(), tempfile.TemporaryDirectory() as temporary:
            client = MlflowClient(run.uri, run.uri)
            entry = client.create_logged_model(
                client.get_run(run.id).info.experiment_id, "rlfseg", source_run_id=run.id
            )
            mlflow.pyfunc.save_model(
                path=f"{temporary}/model",
                python_model=str(code),
                artifacts={"adapter": str(folder)},
                signature=settings["SIGNATURE"],
                input_example=settings["EXAMPLE"],
                pip_requirements=[f"{p}=={version(p).partition('+')[0]}" for p in settings["PACKAGES"]],
                code_paths=[str(path) for path in code_paths] or None,
                mlflow_model=Model(entry.artifact_location, run.id, model_uuid=entry.model_id, model_id=entry.model_id),
            )
            client.log_model_artifacts(entry.model_id, f"{temporary}/model")
            client.finalize_logged_model(entry.model_id, "READY")
            client.log_outputs(run.id, [LoggedModelOutput(entry.model_id, step=0)])
    except (Away, Refused) as error:
        logger.warning("the model in %s is not in MLflow: %s", folder, error)
        return None
    return f"models:/{entry.model_id}"


def has_run(uri: str, run_id: str) -> bool:
    """Whether that MLflow answers and knows the run: the one that recorded it, under another address."""
    with contextlib.suppress(Away, Refused), _answers():
        return bool(MlflowClient(uri, uri).get_run(run_id))
    return False


def download(reference: str, folder: Path | None = None, *, uri: str | None = None) -> Path:
    """Fetches `models:/...` or `runs:/ID/path` as plain files; nothing in it is loaded or run.

    Args:
        reference: What to fetch.
        folder: Where to; None: MLflow's choice, which for a store on this disk is the store itself (don't write there).
        uri: Tracking URI; None: as `resolve_uri`.

    Returns:
        The local folder or file.

    Raises:
        ModelError: There is no such thing, or the server is away.
    """
    place = resolve_uri(uri)
    try:
        with _answers():
            source = _location(MlflowClient(place, place), reference)
            target = str(folder) if folder else None
            return Path(mlflow.artifacts.download_artifacts(source, None, None, target, place, place))
    except (Away, Refused) as error:
        raise ModelError(f"{reference}: can't be fetched from MLflow at {without_passwords(place)}: {error}") from error


def _location(client: MlflowClient, reference: str) -> str:
    """Where the files of `models:/...` lie; MLflow 3.17 would ask the process's default server, whatever it is told."""
    if not reference.startswith("models:/"):
        return reference
    name, *number = get_model_name_and_version(client, reference)
    if number:
        return client.get_model_version_download_uri(name, *number)
    return client.get_logged_model(name).artifact_location
