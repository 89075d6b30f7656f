"""Training killed at random moments: its last adapter is bit-equal to that of the run that nobody disturbed.

The moments are drawn by a seed: a step, and a part of a second after it. `pytest -m drill -s` shows them.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from mlflow import MlflowClient

from rlfseg.pipeline.loop import read_curve

pytestmark = [pytest.mark.drill, pytest.mark.timeout(3600)]
STEPS = 14
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
    os.killpg(driver.pid, signal.SIGKILL)
    driver.communicate()


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory, root: Path) -> Path:
    folder = tmp_path_factory.mktemp("data")
    drawn = [f"--out={folder / 'samples'}", "--shapes.count=40", "--images_per_shard=20"]
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
    assert training.adapter() == undisturbed.adapter()
    steps, _, status = training.logged()
    assert (steps, status) == (list(range(1, STEPS + 1)), "FINISHED")


@pytest.mark.usefixtures("clock")
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
    training.finish()
    assert training.adapter() == undisturbed.adapter()
    steps, _, status = training.logged()
    assert (steps, status) == (list(range(1, STEPS + 1)), "FINISHED")


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
def test_the_newest_checkpoint_is_truncated(undisturbed: Training, latents: Path, root: Path, tmp_path: Path) -> None:
    training = Training(root, latents, tmp_path / "train")
    driver = training.start()
    training.wait_for(8, driver)
    kill_driver(driver)
    newest, before, *_ = training.checkpoints()
    weights = newest / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    training.finish()
    tags = training.logged()[1]
    assert int(tags["rlfseg.started_at_step"]) == int(before.name.split("-")[1])
    assert training.adapter() == undisturbed.adapter()


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
def test_fewer_workers_than_asked_for_do_the_same_steps(
    undisturbed: Training, latents: Path, root: Path, tmp_path: Path
) -> None:
    """Of 8 logical CPUs two workers of 5 have no room: one does the work of both. Equal but for rounding."""
    training = Training(root, latents, tmp_path / "train", "--min_workers=1", "--cpus=5")
    training.finish()
    for one, two in zip(read_curve(training.out), read_curve(undisturbed.out), strict=True):
        for figure in ("step", "loss", "lr", "chose_refined"):
            assert one[figure] == pytest.approx(two[figure], rel=2e-2), f"{figure} of step {one['step']}"
