"""Training killed at random moments: its last adapter is bit-equal to that of the run that nobody disturbed.

The moments are drawn by a seed: a step, and a part of a second after it. `pytest -m drill -s` shows them.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from mlflow import MlflowClient
from safetensors.torch import load_file

from rlfseg.pipeline.checkpoints import Store, damage
from rlfseg.pipeline.loop import read_curve
from tests.drills.test_cluster import started

pytestmark = [pytest.mark.drill, pytest.mark.timeout(3600)]
STEPS = 14  # into the second epoch
RNG = random.Random(42)
MOMENTS = [(RNG.randint(1, STEPS - 2), RNG.random()) for _ in range(5)]


class Training:
    """`python -m jobs.train` into a folder, as often as it takes."""

    def __init__(self, root: Path, latents: Path, out: Path, *flags: str):
        self.root, self.out = root, out
        settings = ["--backbone.base=tiny", "--backbone.resolution=64", "--lora.rank=8", "--optimizer.lr=3e-3"]
        pace = [f"--max_steps={STEPS}", "--checkpoint_every=3", "--log_every=1", "--batch_size=4", "--workers=2"]
        where = [f"--latents={latents}", f"--out={out}", f"--tracking.uri=sqlite:///{out}.db"]
        self.line = [sys.executable, "-m", "jobs.train", *settings, *pace, *where, *flags]

    def start(self) -> subprocess.Popen[str]:
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen(self.line, cwd=self.root, text=True, start_new_session=True, **pipes)

    def finish(self, driver: subprocess.Popen[str] | None = None) -> None:
        driver = driver or self.start()
        _, errors = driver.communicate()
        assert driver.returncode == 0, errors[-3000:]

    def wait_for(self, step: int, driver: subprocess.Popen[str]) -> None:
        """Until the curve shows that step; not a guess at how long that takes."""
        while self.step() < step:
            assert driver.poll() is None, driver.communicate()[1][-3000:]
            time.sleep(0.02)

    def step(self) -> int:
        curve = read_curve(self.out)
        return int(curve[-1]["step"]) if curve else 0

    def adapter(self) -> bytes:
        return (self.out / "adapter" / "adapter_model.safetensors").read_bytes()

    def checkpoints(self) -> list[Path]:
        """Newest first."""
        return sorted(self.out.glob("checkpoints/*/step-*"), reverse=True)

    def whole(self) -> list[Path]:
        """The checkpoints whose seals hold."""
        return [c for c in self.checkpoints() if damage(c) is None]

    def last_weights(self) -> bytes:
        """Of the newest checkpoint."""
        return (self.checkpoints()[0] / "adapter_model.safetensors").read_bytes()

    def check_like(self, undisturbed: Training) -> None:
        """Bit-equal in weights and losses, finished, and every step logged once."""
        assert self.adapter() == undisturbed.adapter()
        assert [r["loss"] for r in read_curve(self.out)] == [r["loss"] for r in read_curve(undisturbed.out)]
        steps, _, status = self.logged()
        assert (steps, status) == (list(range(1, STEPS + 1)), "FINISHED")

    def logged(self) -> tuple[list[int], dict[str, str], str]:
        """Steps of the loss in MLflow, tags and status of the only run."""
        note = json.loads((self.out / "mlflow.json").read_text())
        client = MlflowClient(note["uri"])
        runs = client.search_runs([e.experiment_id for e in client.search_experiments()])
        assert [r.info.run_id for r in runs] == [note["run_id"]]
        history = client.get_metric_history(note["run_id"], "train/loss")
        return [m.step for m in history], runs[0].data.tags, runs[0].info.status


def workers(driver: subprocess.Popen[str]) -> list[psutil.Process]:
    found = [
        p for p in psutil.Process(driver.pid).children(recursive=True) if _title(p).startswith("ray::RayTrainWorker")
    ]
    return sorted(found, key=lambda p: p.pid)


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""


def kill_driver(driver: subprocess.Popen[str]) -> None:
    """And waits for its workers: they go on until their Ray sees that it is gone."""
    orphans = workers(driver)
    os.killpg(driver.pid, signal.SIGKILL)
    driver.communicate()
    _, alive = psutil.wait_procs(orphans, timeout=120)
    assert not alive


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory, root: Path) -> Path:
    folder = tmp_path_factory.mktemp("data")
    drawn = [f"--out={folder / 'samples'}", "--shapes.count=26", "--images_per_shard=13"]
    subprocess.run([sys.executable, "-m", "jobs.prepare", *drawn], cwd=root, check=True)
    base = ["--backbone.base=tiny", "--backbone.resolution=64"]
    encoded = [f"--samples={folder / 'samples'}", f"--out={folder / 'latents'}"]
    subprocess.run([sys.executable, "-m", "jobs.encode", *base, *encoded], cwd=root, check=True)
    return folder / "latents"


@pytest.fixture(scope="module")
def undisturbed(latents: Path, root: Path, tmp_path_factory: pytest.TempPathFactory) -> Training:
    training = Training(root, latents, tmp_path_factory.mktemp("undisturbed") / "train")
    training.finish()
    assert training.logged()[0] == list(range(1, STEPS + 1))
    return training


@pytest.fixture
def clock(request: pytest.FixtureRequest) -> Iterator[None]:
    start = time.monotonic()
    yield
    print(f"\n| {request.node.name} | bit-equal | {time.monotonic() - start:.0f} s |")


@pytest.mark.usefixtures("clock")
@pytest.mark.parametrize(("step", "later"), MOMENTS, ids=[f"step {s} + {t:.2f} s" for s, t in MOMENTS])
def test_a_worker_is_killed(
    undisturbed: Training, latents: Path, root: Path, tmp_path: Path, step: int, later: float
) -> None:
    training = Training(root, latents, tmp_path / "train")
    driver = training.start()
    training.wait_for(step, driver)
    time.sleep(later)
    victims = workers(driver)
    assert len(victims) == 2
    victims[step % 2].kill()
    training.finish(driver)
    training.check_like(undisturbed)


@pytest.mark.usefixtures("clock")
@pytest.mark.fault("lora-03")
@pytest.mark.parametrize(("step", "later"), MOMENTS, ids=[f"step {s} + {t:.2f} s" for s, t in MOMENTS])
def test_the_driver_is_killed(
    undisturbed: Training, latents: Path, root: Path, tmp_path: Path, step: int, later: float
) -> None:
    training = Training(root, latents, tmp_path / "train")
    driver = training.start()
    training.wait_for(step, driver)
    time.sleep(later)
    kill_driver(driver)
    assert not (training.out / "_SUCCESS.json").exists()
    saved = max((json.loads((c / "progress.json").read_text())["step"] for c in training.whole()), default=0)
    training.finish()
    training.check_like(undisturbed)
    assert int(training.logged()[1]["rlfseg.started_at_step"]) == saved


@pytest.mark.usefixtures("clock")
@pytest.mark.fault("dist-08")
def test_a_worker_that_dies_after_a_checkpoint_goes_on_from_it(
    undisturbed: Training, latents: Path, root: Path, tmp_path: Path
) -> None:
    training = Training(root, latents, tmp_path / "train", "--max_failures=1", "--checkpoint_every=2")
    driver = training.start()
    training.wait_for(7, driver)
    saved = int(training.checkpoints()[0].name.split("-")[1])
    workers(driver)[1].kill()
    training.finish(driver)
    steps, tags, status = training.logged()
    assert saved >= 6
    assert int(tags["rlfseg.started_at_step"]) >= saved
    assert (steps, status) == (list(range(1, STEPS + 1)), "FINISHED")
    assert training.adapter() == undisturbed.adapter()


@pytest.mark.usefixtures("clock")
@pytest.mark.parametrize("validated", [False, True], ids=["without validation", "with validation"])
def test_the_newest_checkpoint_is_truncated(
    undisturbed: Training, latents: Path, root: Path, tmp_path: Path, validated: bool
) -> None:
    """With validation the one before it that is kept is one of the best, however old."""
    held_out = [f"--val_samples={latents.parent / 'samples'}", "--val_images=4", "--validate_every=3"]
    training = Training(root, latents, tmp_path / "train", *(held_out if validated else []))
    driver = training.start()
    training.wait_for(8, driver)
    kill_driver(driver)
    newest, before, *_ = training.checkpoints()
    weights = newest / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    training.finish()
    tags = training.logged()[1]
    assert int(tags["rlfseg.started_at_step"]) == int(before.name.split("-")[1])
    assert training.last_weights() == undisturbed.adapter()  # what is published may be an earlier one, the best


@pytest.mark.usefixtures("clock")
@pytest.mark.fault("ckpt-04")
def test_the_disk_of_the_checkpoints_is_full(undisturbed: Training, latents: Path, root: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    size = sum(p.stat().st_size for p in undisturbed.checkpoints()[0].rglob("*") if p.is_file())
    mount = ["mount", "-t", "tmpfs", "-o", f"size={int(1.5 * size)}", "none", disk]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this user may not mount a tmpfs")
    try:
        training = Training(root, latents, tmp_path / "train", f"--storage={disk}")
        driver = training.start()
        errors = driver.communicate()[1]
        assert driver.returncode == 1
        last = errors.strip().splitlines()[-1]
        assert last.startswith("rlfseg train: storage: the checkpoint of step 6 can't be written")
        assert "the disk is full" in last
        assert "Traceback" not in errors
        subprocess.run(["mount", "-o", f"remount,size={10 * size}", disk], check=True)
        training.finish()
        assert training.logged()[1]["rlfseg.started_at_step"] == "3"
        assert training.adapter() == undisturbed.adapter()
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


@pytest.mark.usefixtures("clock")
def test_more_deaths_than_allowed_are_told_in_a_line_and_the_work_is_kept(
    undisturbed: Training, latents: Path, root: Path, tmp_path: Path
) -> None:
    training = Training(root, latents, tmp_path / "train", "--max_failures=0")
    driver = training.start()
    training.wait_for(5, driver)
    workers(driver)[0].kill()
    errors = driver.communicate()[1]
    assert driver.returncode == 1
    # The one that was killed, or the other for want of it, whichever is seen first
    told = r"rlfseg train: a worker failed, more often than max_failures: 0: (The actor died|.*(peer|closed|reset)).*"
    assert re.search(told + "; the same command goes on", errors), errors[-3000:]
    assert "Traceback" not in errors
    assert training.logged()[2] == "FAILED"
    training.finish()
    assert int(training.logged()[1]["rlfseg.started_at_step"]) >= 3
    assert training.logged()[2] == "FINISHED"
    assert training.adapter() == undisturbed.adapter()


@pytest.mark.usefixtures("clock")
@pytest.mark.fault("mlflow-01")
@pytest.mark.fault("mlflow-03")
def test_a_gradient_that_stays_nan_ends_the_training_with_its_work_saved(
    latents: Path, root: Path, tmp_path: Path
) -> None:
    flags = ["--optimizer.lr=1e30", "--max_bad_steps=2"]
    training = Training(root, latents, tmp_path / "train", *flags)
    driver = training.start()
    errors = driver.communicate()[1]
    assert driver.returncode == 1
    last = errors.strip().splitlines()[-1]
    assert re.match(r"rlfseg train: step \d+: the gradient is (nan|inf) for 3 steps in a row", last)
    steps, _, status = training.logged()
    assert status == "FAILED"
    assert max(steps) < STEPS
    store = Store(*map(str, (training.checkpoints()[0].parents[1], training.checkpoints()[0].parent.name)))
    _, saved = next(store.whole())
    skipped = [json.loads(line) for line in (training.out / "skipped.jsonl").read_text().splitlines()]
    assert all(s["phrases"] for s in skipped)
    numbers = [s["step"] for s in skipped]
    finite = numbers[-3] - 1
    assert numbers[-3:] == [finite + 1, finite + 2, finite + 3]
    assert int(saved.name.split("-")[1]) == finite + 3
    assert f"has the weights as they were at step {finite} (the last" in last
    # A training that ends with that step
    until_then = Training(root, latents, tmp_path / "until-then", *flags, f"--max_steps={finite}")
    until_then.finish()
    assert (saved / "adapter_model.safetensors").read_bytes() == until_then.adapter()


@pytest.mark.usefixtures("clock")
@pytest.mark.fault("mlflow-07")
def test_the_tracking_server_dies_midway(undisturbed: Training, latents: Path, root: Path, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    line = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    line += ["--backend-store-uri", f"sqlite:///{tmp_path}/server.db", "--artifacts-destination", str(tmp_path / "a")]
    with (tmp_path / "server.log").open("wb") as log:
        server = subprocess.Popen(line, stdout=log, stderr=log, start_new_session=True, cwd=tmp_path)
    try:
        url = f"http://127.0.0.1:{port}"
        while not _answers(f"{url}/health"):
            assert server.poll() is None
            time.sleep(0.2)
        training = Training(root, latents, tmp_path / "train", f"--tracking.uri={url}")
        driver = training.start()
        training.wait_for(5, driver)
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()
    training.finish(driver)
    assert training.adapter() == undisturbed.adapter()
    rows = [json.loads(n) for f in training.out.glob("unsent-*.jsonl") for n in f.read_text().splitlines()]
    unsent = sorted(n["step"] for n in rows if n["key"] == "train/loss")
    assert unsent[-1] == STEPS
    assert unsent == list(range(unsent[0], STEPS + 1))


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except OSError:
        return False


@pytest.mark.usefixtures("clock")
def test_checkpoints_in_a_bucket(
    undisturbed: Training, latents: Path, root: Path, tmp_path: Path, bucket_uri: str
) -> None:
    training = Training(root, latents, tmp_path / "train", f"--storage={bucket_uri}")
    driver = training.start()
    training.wait_for(8, driver)
    kill_driver(driver)
    training.finish()
    assert int(training.logged()[1]["rlfseg.started_at_step"]) >= 3
    assert training.adapter() == undisturbed.adapter()
    assert training.checkpoints() == []


@pytest.mark.usefixtures("clock")
def test_fewer_workers_than_asked_for_do_the_same_steps(
    undisturbed: Training, latents: Path, root: Path, tmp_path: Path
) -> None:
    """Of 8 logical CPUs two workers of 5 have no room: one does the work of both. Equal but for rounding."""
    training = Training(root, latents, tmp_path / "train", "--min_workers=1", "--cpus=5")
    training.finish()
    assert {row["workers"] for row in read_curve(training.out)} == {1}
    check_same_steps(training.out, undisturbed.out)


def check_same_steps(out: Path, undisturbed: Path) -> None:
    """Equal but for the order of sums, which grows from step to step."""
    for one, two in zip(read_curve(out), read_curve(undisturbed), strict=True):
        assert one["step"] == two["step"]
        for figure in ("loss", "lr", "grad_norm"):
            assert one[figure] == pytest.approx(two[figure], rel=2e-2), f"{figure} of step {one['step']}"


# The command, but that Ray looks for room every second, each process writes down what it learns, and two processes wait
# at step 5 until a node is lost, one process at step 9 until another has come: so much for a test that needs no luck
WATCHED = """
import json, os, sys, time
from functools import partial
from rlfseg import cli
from rlfseg.pipeline import train

def work(loop_config):
    import ray
    from rlfseg.pipeline import loop
    from rlfseg.training import TrainState
    out, step = loop_config["job"].out, TrainState.step
    world = ray.train.get_context().get_world_size()

    def watched(state, *batches, weight):
        while state.step_number == (9 if world == 1 else 5 if not (out / "lost").exists() else -1):
            time.sleep(0.05)
        figures = step(state, *batches, weight=weight)
        row = {"step": state.step_number, "epoch": state.epoch, "ids": [i for b in batches for i in b.ids]}
        with (out / f"seen-{os.getpid()}.jsonl").open("a") as lines:
            lines.write(json.dumps(row) + chr(10))
        return figures

    TrainState.step = watched
    return loop.work(loop_config)

train.work, train.ScalingConfig = work, partial(train.ScalingConfig, elastic_resize_monitor_interval_s=1.0)
sys.exit(cli.main("train", sys.argv[1:]))
"""


@pytest.mark.usefixtures("clock")
def test_a_node_is_lost_and_another_comes_and_each_step_is_the_same(
    undisturbed: Training, latents: Path, root: Path, tmp_path: Path
) -> None:
    """Two workers, then one, then two: a step's phrases are those of a run of two, and each is seen once an epoch."""
    training = Training(root, latents, tmp_path / "train", "--min_workers=1", "--cpus=5")
    line = [sys.executable, "-c", WATCHED, *training.line[3:]]
    with started(tmp_path, root, nodes=2) as cluster, (tmp_path / "errors").open("w") as errors:
        with subprocess.Popen(line, env=cluster.env, cwd=tmp_path, stdout=errors, stderr=errors) as driver:

            def wait_for(step: int, workers: int) -> None:
                while not any((r["step"], r["workers"]) == (step, workers) for r in read_curve(training.out)):
                    assert driver.poll() is None, (tmp_path / "errors").read_text()[-3000:]
                    time.sleep(0.05)

            wait_for(5, 2)
            cluster.lose()
            (training.out / "lost").touch()
            wait_for(9, 1)
            cluster.add()
        assert driver.returncode == 0, (tmp_path / "errors").read_text()[-3000:]
    worlds = [int(row["workers"]) for row in read_curve(training.out)]
    assert worlds[:3] == [2, 2, 2]  # before the checkpoint that one worker went on from
    assert 1 in worlds
    assert worlds[9:] == [2] * (STEPS - 9)
    check_same_steps(training.out, undisturbed.out)

    seen = dict[tuple[int, int], set[str]]()
    for part in training.out.glob("seen-*.jsonl"):
        for row in map(json.loads, part.read_text().splitlines()):
            seen.setdefault((row["epoch"], row["step"]), set()).update(row["ids"])
    assert sorted(step for _, step in seen) == list(range(1, STEPS + 1))
    assert {len(ids) for ids in seen.values()} == {8}  # also where a step was taken twice: the same phrases
    for epoch in {epoch for epoch, _ in seen}:
        steps = [ids for (e, _), ids in seen.items() if e == epoch]
        assert len(set.union(*steps)) == 8 * len(steps)
    first = load_file(training.out / "adapter" / "adapter_model.safetensors")
    second = load_file(undisturbed.out / "adapter" / "adapter_model.safetensors")
    far = sum(float(((first[k] - second[k]) ** 2).sum()) for k in second)
    assert far < 1e-3 * sum(float((w**2).sum()) for w in second.values())
