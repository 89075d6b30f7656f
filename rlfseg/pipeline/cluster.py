"""What the Ray has that a job runs on: joining it, its GPUs and CPUs, and whether they are enough."""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Mapping
from typing import Any

import ray

from rlfseg.config import WorkersConfig
from rlfseg.errors import ResourceError

NEW = "local"  # in $RAY_ADDRESS, Ray's own word for a new one
QUIET: dict[str, Any] = {"log_to_driver": False, "configure_logging": False}
NODES_HAVE = {"cpus": ("CPU", 1), "gpus": ("GPU", 1), "memory_gb": ("memory", 2**30)}  # as Ray has it, and its unit


def connect() -> None:
    """Joins the Ray that $RAY_ADDRESS names, or starts one of 8 CPUs or more here; ResourceError where that fails."""
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # it logs what it raises
    if not ray.is_initialized():
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # its C++ part tells users what only its makers can use
        if remote := named_ray():
            join_ray(remote, **QUIET)
        else:  # Ray guards what it starts here by a token; given one, it writes none into the user's home
            os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
            logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)  # it would tell how to undo that
            start_ray(num_cpus=max(8, os.cpu_count() or 1), include_dashboard=False, **QUIET)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.raise_original_map_exception = True  # else the cause arrives as a text only
    context.execution_options.verbose_progress = False


def join_ray(remote: str, **options: Any) -> None:
    """Joins a Ray by `ray.init`.

    Args:
        remote: What `named_ray` gave.
        **options: Of `ray.init`.

    Raises:
        ResourceError: Nobody is there, or of another version of Ray or Python, or it is no address.
    """
    try:
        ray.init(**options)
    except (ConnectionError, RuntimeError, ValueError) as error:
        told = " ".join(str(error).split())[:300]
        raise ResourceError(f"RAY_ADDRESS: the Ray at {remote} can't be joined: {told}") from error


def start_ray(**options: Any) -> None:
    """Starts a Ray on this machine by `ray.init`.

    Args:
        **options: Of `ray.init`, `num_cpus` among them.

    Raises:
        ResourceError: `ray start` has left word of one on this machine, which `init` would join instead.
    """
    if os.environ.get("RAY_ADDRESS") == NEW:
        options["address"] = os.environ.pop("RAY_ADDRESS")  # processes of the new one are to find that one
    try:
        ray.init(**options)
    except ValueError as error:
        if "existing cluster" not in str(error):
            raise
        raise ResourceError(
            "RAY_ADDRESS: not set, and `ray start` has started a Ray on this machine: RAY_ADDRESS=auto joins it, "
            "RAY_ADDRESS=local starts another"
        ) from error


def named_ray() -> str:
    """The Ray that $RAY_ADDRESS says to join, "" where it says none; ResourceError where it names a job server."""
    named = os.environ.get("RAY_ADDRESS", "")
    if named == NEW:
        return ""
    if named.startswith("http"):
        raise ResourceError(f"RAY_ADDRESS: {named} is a job server, for `rlfseg submit`; give HOST:6379 or unset it")
    return named


def gpus_per_worker(run: WorkersConfig, device: str) -> float:
    """GPUs that a worker reserves: as told, else 1 where the cluster has any and the device may be one.

    Args:
        run: Settings of the workers.
        device: `auto`, `cpu` or `cuda`.

    Returns:
        A number of GPUs; 0 where the work runs on the CPU.

    Raises:
        ResourceError: `cuda` is asked for, and this Ray has no GPU or is told to give none.
    """
    have = ray.cluster_resources().get("GPU", 0)
    if device == "cuda" and (not have or run.gpus == 0):
        raise ResourceError(
            f"device: cuda is asked for, this Ray has {have:g} GPUs and run.gpus is {run.gpus}: a worker would see "
            "none; unset run.gpus, start Ray on nodes with GPUs, or set device: cpu"
        )
    if run.gpus is not None:
        return run.gpus
    return 1.0 if device != "cpu" and have else 0.0


def hide_unreserved_gpus() -> None:
    """Hides a node's GPUs from a process to which Ray gave none: it leaves them in sight, and `auto` would take one."""
    if not ray.get_runtime_context().get_accelerator_ids().get("GPU"):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def arithmetic(dtype: str, gpus: float) -> str:
    """`fp32` or `bf16`: what `device.choose_dtype` will choose in a worker with so many GPUs."""
    return dtype if dtype != "auto" else "bf16" if gpus else "fp32"


def where(workers: int, gpus: float, arithmetic: str = "") -> str:
    """For a Summary: `2 workers, 2 GPUs, bf16`; `gpus` of all of them."""
    device = f"{gpus:g} GPU{'s' * (gpus != 1)}" if gpus else "CPU"
    return ", ".join(filter(None, [f"{workers} worker{'s' * (workers != 1)}", device, arithmetic]))


def cpus_needed(run: WorkersConfig, finish: bool = False) -> float:
    """Logical CPUs that a stage takes at once; `finish`: whether it has a step after the work."""
    # a reader, a writer, and the filter that drops finished ids on resume take one each
    return run.workers * run.cpus + run.loaders * (2 if finish else 1) + 3


def check_budget(name: str, cpus: float, gpus: float, *, lower: str) -> None:
    """Refuses what would wait for ever.

    Args:
        name: The stage, for the message.
        cpus: Logical CPUs that it takes at once.
        gpus: GPUs that it takes at once.
        lower: The settings that decide on them.

    Raises:
        ResourceError: More is asked for than the cluster has; names the sums.
    """
    if short := lacks(cpus, gpus):
        raise ResourceError(
            f"{name} needs {short}: lower {lower}, or start Ray with more (`ray start --head --num-cpus N`; logical "
            "CPUs may exceed the cores)"
        )


def lacks(cpus: float, gpus: float) -> str:
    """`8 GPUs and this Ray has 4` where it has too few of either, else nothing."""
    have = ray.cluster_resources()
    kinds = (("CPU", cpus), ("GPU", gpus))
    short = (f"{n:g} {kind}s and this Ray has {have.get(kind, 0):g}" for kind, n in kinds if n > have.get(kind, 0))
    return next(short, "")


def nodes() -> int:
    """How many of them are there, at least the one that we are on."""
    return max(1, len(_alive()))


def _alive() -> list[dict[str, Any]]:
    return [node for node in ray.nodes() if node["Alive"]]


def check_nodes(name: str, settings: Mapping[str, float]) -> None:
    """Refuses a process that no node has the room for; it would wait for ever.

    Args:
        name: The stage, for the message.
        settings: What one process takes: some of `cpus`, `gpus` and `memory_gb`, by their full names (`run.cpus`).

    Raises:
        ResourceError: No node has as much; names the setting.
    """
    alive = _alive()
    for setting, wanted in settings.items():
        kind, unit = NODES_HAVE[setting.rpartition(".")[2]]
        most = max((node["Resources"].get(kind, 0) / unit for node in alive), default=0)
        if wanted > most:
            raise ResourceError(
                f"{name}: {setting}: {wanted:g} for each process, and no node has more than {most:.3g}; lower it"
            )
