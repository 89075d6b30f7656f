"""The service on Ray Serve: front replicas speak HTTP, model replicas hold the network.

rlfseg serve                          one machine, the shipped model, loopback, no key
serve run serve.app:app auth=off      the same on a Ray that runs already
serve deploy serve/config.yaml        a cluster
"""

from __future__ import annotations

import dataclasses
import os
import signal
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray
import yaml
from pydantic import TypeAdapter, ValidationError
from ray import serve
from ray.exceptions import RayError
from ray.serve.context import _get_global_client
from ray.serve.exceptions import RayServeException

from rlfseg.config import LOOPBACK, ServeConfig, WorkersConfig
from rlfseg.errors import ConfigError, ServiceError
from rlfseg.pipeline.cluster import check_budget, gpus_per_worker, join_ray, named_ray, start_ray
from serve.catalog import Catalog
from serve.front import Front
from serve.guard import Keys
from serve.incoming import wrong_fields
from serve.model import Model
from serve.proxy import CALLBACK

NAME = "rlfseg"
LATE_S = 5.0  # beyond a request's deadline Serve itself gives it up, as one that waits for a front that hangs


def app(args: dict[str, Any]) -> serve.Application:
    """The application, for `serve run serve.app:app key=value ...` and for `args` of a Serve config file.

    Args:
        args: Settings as in ServeConfig, nested, or with dotted names and YAML values as a command line gives them.

    Returns:
        Both deployments, bound.

    Raises:
        ConfigError: A setting is unknown, of the wrong type, or missing.
        ResourceError: The cluster is too small.
    """
    config = settings(args)
    if not ray.is_initialized():  # `serve run` asks before it joins Ray
        ray.init()
    return build(config)


def build(config: ServeConfig) -> serve.Application:
    """The application by its settings; the same errors as `app`."""
    config = resolved(config)
    most, limits = config.max_replicas or config.replicas, config.limits
    cpus, gpus = most * config.cpus + config.fronts, most * (config.gpus or 0)
    check_budget("serve", cpus, gpus, lower="replicas, max_replicas, cpus, gpus or fronts")
    common: dict[str, Any] = {
        "graceful_shutdown_timeout_s": config.drain_s,
        "max_constructor_retry_count": 3,  # a wrong model is an error, not a loop
        "backpressure_config": {"status_code": 503, "retry_after_s": limits.retry_after_s},
    }
    model: Any = serve.deployment(Model).options(  # type: ignore[attr-defined]  # Serve's types know decorators alone
        **common,
        ray_actor_options={"num_cpus": config.cpus, "num_gpus": config.gpus},
        # all that may wait: Serve asks a replica that is full again only after a while, up to half a second
        max_ongoing_requests=config.batch_size + limits.queue,
        max_queued_requests=limits.queue,
        max_surge_percent=config.surge_percent,
        autoscaling_config={
            "min_replicas": config.replicas,
            "max_replicas": most,
            "target_ongoing_requests": config.batch_size,
        },
    )
    front: Any = serve.deployment(Front).options(  # type: ignore[attr-defined]
        **common,
        num_replicas=config.fronts,
        max_surge_percent=100,
        max_ongoing_requests=limits.requests,
        max_queued_requests=limits.requests,
    )
    application: serve.Application = front.bind(config, model.bind(config))
    return application


def settings(args: dict[str, Any]) -> ServeConfig:
    """Settings from nested or dotted arguments.

    Args:
        args: As `app` takes them.

    Returns:
        Checked settings.

    Raises:
        ConfigError: A setting is unknown or of the wrong type; one line with field and what is allowed.
    """
    tree: dict[str, Any] = {}
    for name, value in args.items():
        *above, last = name.split(".")
        node = tree
        for part in above:
            node = node.setdefault(part, {})
        node[last] = yaml.safe_load(value) if isinstance(value, str) else value
    try:
        return TypeAdapter(ServeConfig).validate_python(tree)
    except ValidationError as error:
        raise ConfigError(wrong_fields(error.errors(include_input=False))) from None


def run(config: ServeConfig) -> None:
    """`rlfseg serve`: starts Ray and Serve here, or joins the Ray of $RAY_ADDRESS, and serves until it is stopped.

    Args:
        config: Settings of the command.

    Raises:
        ConfigError: `auth` is off on an address that others can reach, or Serve runs there already on another one.
        ResourceError: The machine is too small.
        ServiceError: It can't be started, or is served there already.
    """
    local = config.host in LOOPBACK
    if config.auth is False and not local:
        raise ConfigError(f"auth: off on {config.host}, which others can reach; use auth=on with a keys_file")
    auth = not local if config.auth is None else config.auth
    config = dataclasses.replace(config, auth=auth, hosts=tuple(dict.fromkeys([*config.hosts, config.host])))
    own = _join_ray(config)
    signal.signal(signal.SIGTERM, _interrupt)  # ray.init sets one of its own, which aborts the process in three seconds
    try:
        application = build(config)
        _start_serve(config)
        try:
            with suppress(KeyboardInterrupt):
                _deploy(application)
                _greet(config)
                threading.Event().wait()
            print("rlfseg: finishing what is in work", flush=True)
            _drain(config)
        finally:
            with suppress(TimeoutError):  # Serve waits for a minute at most
                serve.delete(NAME)
    finally:
        if own:
            serve.shutdown()
        ray.shutdown()


def _greet(config: ServeConfig) -> None:
    nodes = [f"http://{n['NodeManagerAddress']}:{n['MetricsExportPort']}/metrics" for n in ray.nodes() if n["Alive"]]
    print(f"rlfseg: metrics at {', '.join(nodes)}")
    auth = "on" if config.auth else "off"
    print(f"rlfseg: http://{config.host}:{config.port} (auth {auth}); stop with Ctrl-C", flush=True)


def _join_ray(config: ServeConfig) -> bool:
    """Whether it is a Ray of our own."""
    os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "60")  # 5 are too few on a busy machine
    os.environ.setdefault(CALLBACK, "serve.proxy.middlewares")
    if remote := named_ray():
        join_ray(remote)
        return False
    room = 8 + (config.max_replicas or config.replicas) + config.fronts  # logical: a batch beside the service
    start_ray(
        num_cpus=max(room, os.cpu_count() or 1),
        # Batches need Ray's job server, which is its dashboard; without them there is none
        include_dashboard=config.batches.out is not None,
        dashboard_host="127.0.0.1",
        _metrics_export_port=config.metrics_port or None,
    )
    return True


def _start_serve(config: ServeConfig) -> None:
    """Starts Serve, or joins the one that runs, unless it listens elsewhere than we say and decided `auth` by."""
    try:
        serve.start(
            http_options={
                "host": config.host,
                "port": config.port,
                "request_timeout_s": config.limits.deadline_s + LATE_S,
            }
        )
    except (RayError, RuntimeError) as error:
        raise _cannot_start(error) from error
    client = _get_global_client()
    assert client is not None
    real = client.http_config  # where Serve runs already, our options are ignored
    if (real.host, real.port) != (config.host, config.port):
        raise ConfigError(
            f"host, port: {config.host}:{config.port}, but Serve runs here already at {real.host}:{real.port}; "
            "give these as host and port, or stop it with `serve shutdown`"
        )
    if NAME in serve.status().applications:
        raise ServiceError(f"{NAME} is served here already; stop it first, or use another Ray")


def _deploy(application: serve.Application) -> None:
    try:
        serve.run(application, name=NAME)
    except (RayError, RayServeException, RuntimeError) as error:  # RuntimeError: a replica's whole traceback
        raise _cannot_start(error) from error


def _cannot_start(error: Exception) -> ServiceError:
    cause = str(error).strip().splitlines()[-1]
    return ServiceError(f"the service can't be started: {cause}; Ray's logs of this session have the rest")


def _drain(config: ServeConfig) -> None:
    """Closes the fronts, and waits for them: Serve stops models at the same time as the fronts that still ask them."""
    with suppress(TimeoutError, RayError, RayServeException):  # the last two: there are none
        serve.get_app_handle(NAME).broadcast("drain").results(timeout_s=config.drain_s)


def _interrupt(*_: object) -> None:
    """SIGTERM, once, is as Ctrl-C."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise KeyboardInterrupt


def resolved(config: ServeConfig) -> ServeConfig:
    """Settings with what only the cluster or this directory can say; refuses what can't work."""
    auth = config.auth is not False
    if auth and not config.keys_file:
        raise ConfigError("keys_file: null: give a file with an API key a line, or auth=off where nobody else can ask")
    if auth:
        Keys(config.keys_file or "")  # in time to say what is wrong with it
    if not config.models:
        raise ConfigError("models: {}: give at least one, such as {tiny: tiny}")
    if config.batches.out and not config.batches.roots:
        raise ConfigError("batches.roots: empty: name the folders that batches may read, or leave batches.out away")
    # replicas and jobs work in other directories
    models = {n: r if r == "tiny" or ":" in r else str(Path(r).absolute()) for n, r in config.models.items()}
    Catalog(models)
    return dataclasses.replace(
        config,
        auth=auth,
        gpus=gpus_per_worker(WorkersConfig(gpus=config.gpus), config.device),
        models=models,
        keys_file=_absolute(config.keys_file),
        batches=dataclasses.replace(
            config.batches, out=_absolute(config.batches.out), roots=tuple(map(os.path.abspath, config.batches.roots))
        ),
    )


def _absolute(path: str | None) -> str | None:
    return os.path.abspath(path) if path else None
