"""Two local nodes and the Jobs API, with a token: the same results as one node, and exit codes that tell the truth."""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file

pytestmark = [pytest.mark.drill, pytest.mark.timeout(2400)]
RAY = str(Path(sys.executable).with_name("ray"))
CPUS = 8  # logical, of a node


class Cluster:
    """Where it is and how to call it."""

    def __init__(self, env: dict[str, str], nodes: list[subprocess.Popen[bytes]]):
        self.env, self.nodes = env, nodes

    def job(self, name: str, *flags: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """`python -m jobs.NAME` as a driver of its own."""
        return subprocess.run(
            [sys.executable, "-m", f"jobs.{name}", *flags], env=self.env, check=check, text=True, capture_output=True
        )


@contextmanager
def started(folder: Path, root: Path, *, nodes: int, dashboard: bool = False) -> Iterator[Cluster]:
    """`nodes` raylets with folders and free ports of their own, and a token."""
    env = os.environ | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "PYTHONPATH": str(root)}
    common = ["--block", f"--num-cpus={CPUS}", "--object-store-memory=200000000", "--disable-usage-stats"]
    port = ["--dashboard-port=0"] if dashboard else []
    with ExitStack() as stack:

        def start(number: int, *flags: str) -> subprocess.Popen[bytes]:
            log = stack.enter_context((folder / f"node{number}.log").open("wb"))
            process = subprocess.Popen(
                [RAY, "start", *common, *flags], env=env, stdout=log, stderr=log, start_new_session=True
            )
            stack.callback(_kill, process)
            return process

        home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="r-")))  # a socket's path is short
        head = [f"--temp-dir={home}", "--head", "--port=0", f"--include-dashboard={str(dashboard).lower()}", *port]
        processes = [start(0, *head)]
        env["RAY_ADDRESS"] = _first_line(home / "ray_current_cluster", processes[0])
        for number in range(1, nodes):
            processes.append(start(number, f"--address={env['RAY_ADDRESS']}"))
        cluster = Cluster(env, processes)
        _wait_for_nodes(cluster, nodes)
        yield cluster


def _kill(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


def _first_line(path: Path, process: subprocess.Popen[bytes]) -> str:
    while not (path.is_file() and path.read_text().strip()):
        assert process.poll() is None, "ray start failed"
        time.sleep(0.1)
    return path.read_text().strip()


def _wait_for_nodes(cluster: Cluster, nodes: int) -> None:
    code = (
        "import ray, time; ray.init(log_to_driver=False, configure_logging=False)\n"
        f"while sum(n['Alive'] for n in ray.nodes()) < {nodes}: time.sleep(0.2)"
    )
    subprocess.run([sys.executable, "-c", code], env=cluster.env, check=True, timeout=120)


def stages(cluster: Cluster, samples: Path, out: Path, root: Path) -> None:
    """Refine, encode, train with two workers, predict."""
    configs = root / "jobs" / "configs" / "quickstart"
    cpus = 5 if len(cluster.nodes) > 1 else 1  # two workers of 5 don't fit on one node
    wide = ["--run.workers=2", f"--run.cpus={cpus}", "--run.batch_size=4"]
    cluster.job("refine", f"--samples={samples}", f"--out={out / 'refined'}", "--max_rounds=2", *wide)
    cluster.job(
        "encode",
        f"--config={configs / 'encode.yaml'}",
        f"--samples={out / 'refined'}",
        f"--out={out / 'latents'}",
        *wide,
    )
    cluster.job(
        "train",
        f"--config={configs / 'train.yaml'}",
        f"--latents={out / 'latents'}",
        f"--out={out / 'train'}",
        "--max_steps=4",
        "--batch_size=4",
        f"--cpus={cpus}",
        "--tracking.enabled=false",
    )
    adapter = f"--adapter={out / 'train' / 'adapter'}"
    cluster.job("predict", f"--images={samples}", adapter, f"--out={out / 'masks'}", *wide)


def table(folder: Path, *columns: str) -> dict[str, list[object]]:
    parts = (pq.read_table(p, columns=["id", *columns]).to_pylist() for p in (folder / "data").glob("*.parquet"))
    return {row["id"]: [row[c] for c in columns] for rows in parts for row in rows}


def test_two_nodes_give_what_one_gives(tmp_path: Path, root: Path) -> None:
    samples, one, two = tmp_path / "samples", tmp_path / "one", tmp_path / "two"
    for folder, nodes in ((one, 1), (two, 2)):
        folder.mkdir()
        with started(folder, root, nodes=nodes) as cluster:
            if nodes == 1:
                cluster.job("prepare", f"--out={samples}", "--shapes.count=32", "--shapes.labels=coarse")
            stages(cluster, samples, folder, root)
    assert table(one / "refined", "masks", "outcomes") == table(two / "refined", "masks", "outcomes")
    assert table(one / "latents", "z1", "z0") == table(two / "latents", "z1", "z0")
    ours, theirs = (load_file(f / "train" / "adapter" / "adapter_model.safetensors") for f in (one, two))
    assert {k: v.tobytes() for k, v in ours.items()} == {k: v.tobytes() for k, v in theirs.items()}
    assert table(one / "masks", "masks") == table(two / "masks", "masks")
    assert len(table(two / "masks")) == 32


def test_jobs_are_submitted_with_a_token_and_their_exit_codes_are_true(tmp_path: Path, root: Path) -> None:
    with started(tmp_path, root, nodes=1, dashboard=True) as cluster:
        submit = [sys.executable, "-m", "jobs.submit", "--working_dir", str(root)]

        def submitted(*command: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
            # away from the checkout: what runs is what was uploaded
            return subprocess.run(
                [*submit, "--", *command],
                env=env or cluster.env,
                cwd=tmp_path,
                text=True,
                capture_output=True,
                check=False,
            )

        good = submitted("prepare", f"--out={tmp_path / 'samples'}", "--shapes.count=4")
        assert good.returncode == 0, good.stderr[-2000:]
        assert "4 in, 4 out" in good.stdout
        assert json.loads((tmp_path / "samples" / "_SUCCESS.json").read_text())["rows_out"] == 4

        failed = submitted("refine", f"--samples={tmp_path / 'nothing'}", f"--out={tmp_path / 'x'}")
        assert failed.returncode == 1
        assert "no folder" in failed.stdout + failed.stderr
        wrong = submitted("refine", f"--samples={tmp_path / 'samples'}", f"--out={tmp_path / 'y'}", "--tau=2")
        assert wrong.returncode == 2

        endless = [*submit, "--", "prepare", f"--out={tmp_path / 'w'}", "--shapes.count=1000000"]
        with subprocess.Popen(endless, env=cluster.env, cwd=tmp_path, text=True, stdout=subprocess.PIPE) as stopped:
            assert stopped.stdout
            job = stopped.stdout.readline().split()[1].rstrip(";")
            while not (tmp_path / "w" / "_STARTED.json").exists():
                assert stopped.poll() is None
                time.sleep(0.1)
            subprocess.run([RAY, "job", "stop", job], env=cluster.env, check=True, capture_output=True)
            stopped.communicate()
        assert stopped.returncode == 143

        stranger = submitted("prepare", f"--out={tmp_path / 'z'}", env=cluster.env | {"RAY_AUTH_TOKEN": "0" * 64})
        assert stranger.returncode == 1
        assert "token" in stranger.stderr
        assert "Traceback" not in stranger.stderr
        assert not (tmp_path / "z").exists()
