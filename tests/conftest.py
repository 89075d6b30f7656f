"""What all tests share: a safe environment, checked shapes, one Ray, and the fixtures that need either."""

from __future__ import annotations

import logging
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import hypothesis
import jaxtyping
import pytest

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared" / "data"
FAULT_ROW = re.compile(r"[a-z0-9]+(-[a-z]+)?-\d+")
THREADS = 1  # of the test process: on a busy machine two threads wait for each other at every small tensor
# `pytest -m gpu`: only then is a GPU seen, so that all other tests are of the CPU on any machine; and without beartype,
# which torch can't compile.
ON_GPU = "gpu" in sys.argv

# Modules whose annotations give shapes: in this process beartype checks each call into them. Not those that check what
# users hand in (hdf5, datasets): their own refusals are what tests want to see.
SHAPED = ("backbone", "flow", "images", "metrics", "refine", "sam", "sampling", "segmenter", "training")


def _make_environment_safe() -> None:
    """Nothing of the user's is read or written, nothing is fetched; child processes and Ray's workers inherit it."""
    for name in [n for n in os.environ if n.startswith(("MLFLOW_", "RAY_", "HF_", "AWS_"))]:
        del os.environ[name]
    os.environ |= {
        "HOME": tempfile.mkdtemp(prefix="rlfseg-home-"),
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        "MPLCONFIGDIR": str(ROOT / ".cache" / "matplotlib"),  # kept: building the list of fonts takes seconds
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL": "1",  # seconds; with MLflow's 10 a short run ends before the first
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "RAY_AUTH_MODE": "disabled",  # on purpose: with a token, ray.init would write one into HOME
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # what later versions of Ray do; else it warns
    }
    if not ON_GPU:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


_make_environment_safe()
if not ON_GPU:
    jaxtyping.install_import_hook([f"rlfseg.{module}" for module in SHAPED], "beartype.beartype").__enter__()

# Speed is no property here: the machine may be busy. In CI the examples are the same each time.
hypothesis.settings.register_profile(
    "rlfseg",
    deadline=None,
    derandomize=bool(os.environ.get("CI")),
    print_blob=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("rlfseg")


# --- hooks --------------------------------------------------------------------------------------------------------


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Checks the names of rows, and skips with a reason what this machine can't run."""
    for item in items:
        for marker in item.iter_markers("fault"):
            if len(marker.args) != 1 or not FAULT_ROW.fullmatch(str(marker.args[0])):
                raise pytest.UsageError(f"{item.nodeid}: fault() takes the id of one row, such as 'h5-key-01'")
        if item.get_closest_marker("gpu") and not (ON_GPU and _gpus()):
            reason = "there is no CUDA device" if ON_GPU else "for a CUDA device: pytest -m gpu"
            item.add_marker(pytest.mark.skip(reason=reason))


def pytest_collection_finish(session: pytest.Session) -> None:
    """Torch is set only where a test has brought it in."""
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(THREADS)


def pytest_report_collectionfinish(config: pytest.Config, items: list[pytest.Item]) -> list[str]:
    """With `--collect-only -m fault`: the rows that tests stand for."""
    if not (config.option.collectonly and "fault" in (config.option.markexpr or "")):
        return []
    rows = sorted((m.args[0], item.nodeid.split("[")[0]) for item in items for m in item.iter_markers("fault"))
    named = dict.fromkeys(rows)
    return [f"{row:14} {test}" for row, test in named] + [f"{len({row for row, _ in rows})} rows"]


def pytest_unconfigure() -> None:
    """Removes the home of this run."""
    home = os.environ["HOME"]
    if "rlfseg-home-" in home:
        shutil.rmtree(home, ignore_errors=True)


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()


# --- fixtures -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session", autouse=True)
def _commit(pytestconfig: pytest.Config, record_testsuite_property: Callable[[str, object], None]) -> None:
    """For `--junit-xml`, of which scripts/test_report.py makes a page."""
    if pytestconfig.option.xmlpath:
        line = ["git", "describe", "--always", "--dirty"]
        found = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)
        record_testsuite_property("commit", found.stdout.strip() or "unknown")


@pytest.fixture(scope="session")
def ray() -> Iterator[ModuleType]:
    """The module `ray`, started: one start takes 10 s, so all tests share it. 8 *logical* CPUs on any machine."""
    import ray

    _leave_the_agents_port()
    ray.init(
        address="local",
        num_cpus=8,
        num_gpus=_gpus(),
        object_store_memory=300_000_000,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="warning",
    )
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    yield ray
    ray.shutdown()


def _leave_the_agents_port() -> None:
    """Lets this Ray's agent listen elsewhere than at 52365, which `ray.init` can't say: a tested service's needs it."""
    from ray._private.parameter import RayParams

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    RayParams.__init__.__defaults__ = tuple(port if d == 52365 else d for d in RayParams.__init__.__defaults__ or ())


@pytest.fixture(scope="module")
def s3_server() -> Iterator[str]:
    """HOST:PORT of a local S3 that takes any key."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    yield "{}:{}".format(*server.get_host_and_port())
    server.stop()


@pytest.fixture
def bucket_uri(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Of a folder in a bucket there, as pyarrow takes it; the bucket is made when it is written to."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    return f"s3://bucket/runs?scheme=http&endpoint_override={s3_server}&allow_bucket_creation=true&region=us-east-1"


@pytest.fixture(scope="session")
def migrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database of MLflow that needs no migration, to copy: each takes six seconds."""
    from mlflow import MlflowClient

    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").get_experiment_by_name("rlfseg")
    return path


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real data that lies beside some checkouts: photographs, annotations in their native formats, CRDs."""
    if not SHARED.is_dir():
        pytest.skip("../shared/data is absent: the real photographs and annotations are not part of the repository")
    return SHARED


@pytest.fixture(scope="session")
def root() -> Path:
    """Folder of the repository."""
    return ROOT


@pytest.fixture
def authors(tmp_path: Path) -> Callable[[dict[str, Any]], Path]:
    """Writes a file as the paper's appendix has it: names as they are, no attributes."""
    import h5py

    def write(tree: dict[str, Any]) -> Path:
        path = tmp_path / "authors.h5"
        with h5py.File(path, "w") as file:
            for name, data in tree.items():
                file[name] = data
        return path

    return write
