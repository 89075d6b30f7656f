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
from pathlib import Path
from typing import Any

import ray
import yaml
from pydantic import TypeAdapter, ValidationError
from ray import serve
from ray.exceptions import RayError

from rlfseg.config import LOOPBACK, ServeConfig, WorkersConfig
from rlfseg.errors import ConfigError, ServiceError
from rlfseg.pipeline.stages import check_budget, gpus_per_worker
from serve.catalog import Catalog
from serve.front import Front
from serve.guard import Keys
from serve.incoming import wrong_fields
from serve.model import Model
from serve.proxy import CALLBACK

NAME = "rlfseg"


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
    return build(settings(args))


def build(config: ServeConfig) -> serve.Application:
    """The application by its settings; the same errors as `app`."""
    config = resolved(config)
    most, limits = config.max_replicas or config.replicas, config.limits
    check_budget("serve", most * config.cpus + config.fronts, most * (config.gpus or 0))
    common: dict[str, Any] = {
        "graceful_shutdown_timeout_s": config.drain_s,
        "max_constructor_retry_count": 3,  # a wrong model is an error, not a loop
        "backpressure_config": {"status_code": 503, "retry_after_s": limits.retry_after_s},
    }
    model: Any = serve.deployment(Model).options(  # type: ignore[attr-defined]  # Serve's types know decorators alone
        **common,
        ray_actor_options={"num_cpus": config.cpus, "num_gpus": config.gpus},
        # twice a batch: the next one gathers while one is in the network
        max_ongoing_requests=2 * config.batch_size,
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
        ConfigError: `auth` is off on an address that others can reach.
        ResourceError: The machine is too small.
    """
    local = config.host in LOOPBACK
    if config.auth is False and not local:
        raise ConfigError(f"auth: off on {config.host}, which others can reach; use auth=on with a keys_file")
    auth = not local if config.auth is None else config.auth
    config = dataclasses.replace(config, auth=auth, hosts=tuple(dict.fromkeys([*config.hosts, config.host])))
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    _join_ray(config)
    try:
        application = build(config)
        _start(application, config)
        print(
            f"rlfseg: http://{config.host}:{config.port} (auth {'on' if auth else 'off'}); stop with Ctrl-C", flush=True
        )
        stop.wait()
        print("rlfseg: finishing what is in work", flush=True)
        serve.delete(NAME)  # waits for requests in work, at most drain_s
    finally:
        serve.shutdown()
        ray.shutdown()


def _join_ray(config: ServeConfig) -> None:
    os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "60")  # 5 are too few on a busy machine
    os.environ.setdefault(CALLBACK, "serve.proxy.middlewares")
    if os.environ.get("RAY_ADDRESS"):
        ray.init()
        return
    room = 8 + (config.max_replicas or config.replicas) + config.fronts  # logical: a batch beside the service
    # Batches need Ray's job server, which is its dashboard; without them there is none
    with_jobs = config.batches.out is not None
    ray.init(num_cpus=max(room, os.cpu_count() or 1), include_dashboard=with_jobs, dashboard_host="127.0.0.1")


def _start(application: serve.Application, config: ServeConfig) -> None:
    try:
        serve.start(http_options={"host": config.host, "port": config.port})
        serve.run(application, name=NAME)
    except (RayError, RuntimeError) as error:  # Serve raises RuntimeError with a replica's whole traceback in it
        cause = str(error).strip().splitlines()[-1]
        raise ServiceError(
            f"the service can't be started: {cause}; Ray's logs of this session have the rest"
        ) from error


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
    gpus = gpus_per_worker(WorkersConfig(gpus=config.gpus), config.device)
    return dataclasses.replace(config, auth=auth, gpus=gpus, models=models)
