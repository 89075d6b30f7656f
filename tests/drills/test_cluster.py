"""Two local nodes and the Jobs API, with a token: the same results as one node, and exit codes that tell the truth."""

from __future__ import annotations

import json
import os
import random
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file

from rlfseg import hdf5
from rlfseg.pipeline.curve import read_curve
from rlfseg.pipeline.folders import begin, finish
from rlfseg.pipeline.stages import Committed

pytestmark = [pytest.mark.drill, pytest.mark.timeout(2400)]
RAY = str(Path(sys.executable).with_name("ray"))
CPUS, SCENES = 8, 48  # logical CPUs of a node


class Cluster:
    """Raylets with folders and free ports of their own, and a token; `node 1` and on may come and go.

    Args:
        folder: For their logs.
        root: Of the checkout.
        dashboard: Whether the head has a job server.
        pinned: Whether nodes take turns on the cores, one each.
    """

    def __init__(self, folder: Path, root: Path, *, dashboard: bool, pinned: bool):
        self.folder, self.root, self.pinned, self.started = folder, root, pinned, 0
        self.nodes, self.stack = list[subprocess.Popen[bytes]](), ExitStack()
        token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        self.env = os.environ | token | {"PYTHONPATH": str(root)}
        head = ["--head", "--port=0", f"--include-dashboard={str(dashboard).lower()}"]
        home = self._start(*head, *(["--dashboard-port=0"] if dashboard else []))
        self.env["RAY_ADDRESS"] = _first_line(home / "ray_current_cluster", self.nodes[0])

    def add(self) -> None:
        """Another node; waits until it has joined."""
        self._start(f"--address={self.env['RAY_ADDRESS']}")
        code = (
            "import ray, time; ray.init(log_to_driver=False, configure_logging=False)\n"
            f"while sum(n['Alive'] for n in ray.nodes()) < {len(self.nodes)}: time.sleep(0.2)"
        )
        subprocess.run([sys.executable, "-c", code], env=self.env, check=True, timeout=120)

    def lose(self) -> None:
        """The youngest node dies, with all that runs on it, without a word."""
        node = self.nodes.pop()
        for process in [*psutil.Process(node.pid).children(recursive=True), psutil.Process(node.pid)]:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        node.wait()

    def command(self, name: str, *flags: str) -> list[str]:
        """`python -m jobs.NAME` as a driver of its own."""
        return [sys.executable, "-m", f"jobs.{name}", *flags]

    def job(self, name: str, *flags: str) -> None:
        """Runs it to its end."""
        self._run(self.command(name, *flags))

    def submitted(self, name: str, *flags: str) -> None:
        """The same as a job, away from the checkout: what runs is what was uploaded."""
        line = [RAY, "job", "submit", "--working-dir", str(self.root), "--", "python", "-m", f"jobs.{name}", *flags]
        # A node's agent may not be there yet, which `rlfseg submit` waits for
        self._run([*submit(self.root), name, *flags] if name == "prepare" else line)

    def close(self) -> None:
        """Ends all nodes."""
        while self.nodes:
            self.lose()
        self.stack.close()

    def _run(self, line: list[str]) -> None:
        done = subprocess.run(line, env=self.env, cwd=self.folder, check=False, text=True, capture_output=True)
        assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]

    def _start(self, *flags: str) -> Path:
        home = Path(self.stack.enter_context(tempfile.TemporaryDirectory(prefix="r-")))  # a socket's path is short
        log = self.stack.enter_context((self.folder / f"node{self.started}.log").open("wb"))
        common = ["--block", f"--num-cpus={CPUS}", "--object-store-memory=200000000", "--disable-usage-stats"]
        common.append("--dashboard-agent-listen-port=0")  # else all nodes of this machine want the same one
        # A core each, where there are two: so a worker has as many threads as on one node with two workers
        core = ["taskset", "-c", str(self.started % 2)] if self.pinned and (os.cpu_count() or 1) > 1 else []
        line = [*core, RAY, "start", *common, f"--temp-dir={home}", *flags]
        node = subprocess.Popen(line, env=self.env, stdout=log, stderr=log, start_new_session=True)
        self.nodes.append(node)
        self.started += 1
        return home


@contextmanager
def started(folder: Path, root: Path, *, nodes: int, dashboard: bool = False) -> Iterator[Cluster]:
    """A cluster of so many nodes; it ends with the block."""
    cluster = Cluster(folder, root, dashboard=dashboard, pinned=nodes > 1)
    try:
        for _ in range(1, nodes):
            cluster.add()
        yield cluster
    finally:
        cluster.close()


def submit(root: Path) -> list[str]:
    """`rlfseg submit --`, to be followed by a command."""
    return [sys.executable, "-m", "jobs.submit", "--working_dir", str(root), "--"]


def _first_line(path: Path, process: subprocess.Popen[bytes]) -> str:
    while not (path.is_file() and path.read_text().strip()):
        assert process.poll() is None, "ray start failed"
        time.sleep(0.1)
    return path.read_text().strip()


CPUS_OF = {1: 1, 2: 5}  # of a worker, by nodes: two workers of 5 don't fit on one node


def settings(cluster: Cluster, samples: Path, out: Path, root: Path) -> dict[str, list[str]]:
    """All from refine on with two workers: each job with its flags, in order."""
    configs, cpus = root / "jobs" / "configs" / "quickstart", CPUS_OF[len(cluster.nodes)]
    wide = ["--run.workers=2", f"--run.cpus={cpus}", "--run.batch_size=4"]
    data, trained = f"--latents={out / 'latents'}", f"--adapter={out / 'train' / 'adapter'}"
    pace = ["--max_steps=8", "--batch_size=4", "--checkpoint_every=2", "--log_every=1"]
    return {
        "refine": [f"--samples={samples}", f"--out={out / 'refined'}", "--max_rounds=2", *wide],
        "encode": [
            f"--config={configs / 'encode.yaml'}",
            f"--samples={out / 'refined'}",
            f"--out={out / 'latents'}",
            *wide,
        ],
        "train": [
            f"--config={configs / 'train.yaml'}",
            *(data, f"--out={out / 'train'}", *pace, "--workers=2", f"--cpus={cpus}"),
            "--tracking.enabled=false",
        ],
        "calibrate": [
            f"--samples={samples}",
            trained,
            f"--out={out / 'calibration'}",
            *wide,
            "--tracking.enabled=false",
        ],
        "evaluate": [f"--samples={samples}", trained, f"--out={out / 'test'}", *wide, "--tracking.enabled=false"],
        "predict": [f"--images={samples}", trained, f"--out={out / 'masks'}", *wide],
    }


def drawing(samples: Path) -> list[str]:
    return [f"--out={samples}", f"--shapes.count={SCENES}", "--shapes.labels=coarse"]


def adapter(out: Path) -> dict[str, bytes]:
    return {k: v.tobytes() for k, v in load_file(out / "train" / "adapter" / "adapter_model.safetensors").items()}


def table(folder: Path, *columns: str) -> dict[str, list[object]]:
    parts = (pq.read_table(p, columns=["id", *columns]).to_pylist() for p in (folder / "data").glob("*.parquet"))
    return {row["id"]: [row[c] for c in columns] for rows in parts for row in rows}


def check_same(one: Path, two: Path) -> None:
    assert table(one / "refined", "masks", "outcomes") == table(two / "refined", "masks", "outcomes")
    assert table(one / "latents", "z1", "z0") == table(two / "latents", "z1", "z0")
    assert adapter(one) == adapter(two)
    assert table(one / "masks", "masks") == table(two / "masks", "masks")
    for results in ("calibration/calibration.json", "test/results.json"):
        mine, theirs = (json.loads((folder / results).read_text()) | {"what": "has paths"} for folder in (one, two))
        assert mine == theirs
    assert len(table(two / "masks")) == SCENES


def test_jobs_on_two_nodes_give_what_commands_on_one_give(tmp_path: Path, root: Path) -> None:
    """From prepare to predict, submitted with a token; in the training one worker a node."""
    one, two = tmp_path / "one", tmp_path / "two"
    for folder, nodes in ((one, 1), (two, 2)):
        folder.mkdir()
        with started(folder, root, nodes=nodes, dashboard=nodes > 1) as cluster:
            run = cluster.submitted if nodes > 1 else cluster.job
            run("prepare", *drawing(folder / "samples"))
            for name, flags in settings(cluster, folder / "samples", folder, root).items():
                run(name, *flags)
    check_same(one, two)


def test_a_node_is_lost_again_and_again(
    tmp_path: Path, root: Path, record_property: Callable[[str, object], None]
) -> None:
    """In each of three jobs the second node dies, and another takes its place, as on any cloud.

    Five times where the job lasts so long, never less than twice; how often and when is recorded.
    """
    samples, whole, torn = tmp_path / "samples", tmp_path / "whole", tmp_path / "torn"
    rng = random.Random(7)
    with started(tmp_path, root, nodes=2) as cluster:
        cluster.job("prepare", *drawing(samples))
        for name, flags in settings(cluster, samples, whole, root).items():
            cluster.job(name, *flags)
        for name, flags in settings(cluster, samples, torn, root).items():
            if name not in SURVIVE:
                cluster.job(name, *flags)
                continue
            out = torn / {"refine": "refined", "train": "train", "predict": "masks"}[name]
            progress = Committed(out) if name != "train" else partial(_step, out)
            moments = sorted(rng.sample(range(7), 5)) if name == "train" else sorted(rng.sample(range(SCENES - 12), 5))
            losses = 0
            with subprocess.Popen(cluster.command(name, *flags, *SURVIVE[name]), env=cluster.env) as driver:
                for moment in moments:
                    while driver.poll() is None and progress() < moment:
                        time.sleep(0.02)
                    if driver.poll() is None:
                        cluster.lose()
                        losses += 1
                        cluster.add()
            assert driver.returncode == 0
            record_property(f"nodes lost in {name}", f"{losses}, at {moments}")
            assert losses >= 2
    check_same(whole, torn)


SURVIVE = {"refine": [], "predict": [], "train": ["--max_failures=10"]}


def _step(out: Path) -> int:
    curve = read_curve(out)
    return int(curve[-1]["step"]) if curve else 0


def failures(submitted: Callable[..., subprocess.CompletedProcess[str]], folder: Path) -> None:
    """Jobs that begin and fail: a training on all its ranks, an evaluation of nothing."""
    begin(folder / "empty", {})
    pq.write_table(hdf5.read_index(folder / "samples").slice(0, 0), folder / "empty" / hdf5.INDEX)
    finish(folder / "empty", {}, {"rows_in": 0})
    pace = ["--max_steps=2", "--batch_size=2", "--workers=2", "--backbone.base=tiny", "--backbone.resolution=64"]
    trained = [*pace, f"--samples={folder / 'samples'}", "--lora.targets=[to_x]", "--tracking.enabled=false"]
    for command, cause in (
        (["train", *trained, f"--out={folder / 'trained'}"], "lora.targets: ['to_x'] matches no layer"),
        (["evaluate", "--adapter=tiny", f"--samples={folder / 'empty'}", f"--out={folder / 'none'}"], "no sample"),
    ):
        done = submitted(*command)
        assert done.returncode != 0
        said = [line for line in (done.stdout + done.stderr).splitlines() if line.startswith("rlfseg ")]
        assert cause in said[-1]


def leave(line: list[str], env: dict[str, str], out: Path) -> None:
    """Ctrl-C leaves a job without end running, the same command finds it again, and stopping it ends that one."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}

    def heed() -> None:
        """Whoever runs these tests in the background has had Ctrl-C ignored, by all that they start."""
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    with subprocess.Popen(line, env=env, cwd=out.parent, preexec_fn=heed, **pipes) as leaving:  # type: ignore[call-overload]
        job = leaving.stdout.readline().split()[1].rstrip(";")
        while not (out / "_STARTED.json").exists():
            assert leaving.poll() is None
            time.sleep(0.1)
        leaving.send_signal(signal.SIGINT)
        said = leaving.communicate()[1]
    assert leaving.returncode == 130
    assert f"job {job} goes on" in said
    assert "Traceback" not in said
    with subprocess.Popen(line, env=env, cwd=out.parent, **pipes) as watching:  # type: ignore[call-overload]
        assert watching.stdout.readline().startswith(f"job {job} runs this command already")
        subprocess.run([RAY, "job", "stop", job], env=env, check=True, capture_output=True)
        watching.communicate()
    assert watching.returncode == 143


@pytest.mark.fault("job-02")
def test_jobs_are_submitted_with_a_token_and_their_exit_codes_are_true(tmp_path: Path, root: Path) -> None:
    with started(tmp_path, root, nodes=1, dashboard=True) as cluster:

        def submitted(*command: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
            line = [*submit(root), *command]
            return subprocess.run(
                line, env=env or cluster.env, cwd=tmp_path, text=True, capture_output=True, check=False
            )

        good = submitted("prepare", f"--out={tmp_path / 'samples'}", "--shapes.count=4")
        assert good.returncode == 0, good.stderr[-2000:]
        assert "4 in, 4 out" in good.stdout
        assert json.loads((tmp_path / "samples" / "_SUCCESS.json").read_text())["rows_out"] == 4

        failures(submitted, tmp_path)
        failed = submitted("refine", f"--samples={tmp_path / 'nothing'}", f"--out={tmp_path / 'x'}")
        assert failed.returncode == 1
        assert "no folder" in failed.stdout + failed.stderr
        wrong = submitted("refine", f"--samples={tmp_path / 'samples'}", f"--out={tmp_path / 'y'}", "--tau=2")
        assert wrong.returncode == 2

        endless = ["prepare", f"--out={tmp_path / 'w'}", "--shapes.count=1000000"]
        leave([*submit(root), *endless], cluster.env, tmp_path / "w")

        stranger = submitted("prepare", f"--out={tmp_path / 'z'}", env=cluster.env | {"RAY_AUTH_TOKEN": "0" * 64})
        assert stranger.returncode == 1
        assert "token" in stranger.stderr
        assert "Traceback" not in stranger.stderr
        assert not (tmp_path / "z").exists()
