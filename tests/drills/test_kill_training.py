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
from pathlib import Path

import psutil
import pytest

from rlfseg.pipeline.checkpoints import Store
from tests.drills.training import STEPS, Training

pytestmark = [pytest.mark.drill, pytest.mark.timeout(3600)]
RNG = random.Random(42)
MOMENTS = [(RNG.randint(1, STEPS - 2), RNG.random()) for _ in range(5)]


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


def kill_driver(driver: subprocess.Popen[str], *, wait: bool = True) -> None:
    """Its workers go on until their Ray sees that it is gone; `wait` until then."""
    orphans = workers(driver)
    os.killpg(driver.pid, signal.SIGKILL)
    driver.communicate()
    _, alive = psutil.wait_procs(orphans, timeout=120 * wait)
    assert not (wait and alive)


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
    saved = training.saved()
    victims[step % 2].kill()
    training.finish(driver)
    training.check_like(undisturbed)
    # Where it has gone on: the tag is of the last start
    assert int(training.logged()[1]["rlfseg.started_at_step"]) >= saved


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
    saved = training.saved()
    training.finish()
    training.check_like(undisturbed)
    assert int(training.logged()[1]["rlfseg.started_at_step"]) == saved


@pytest.mark.usefixtures("clock")
def test_started_again_at_once_it_waits_for_the_workers_of_the_killed_driver(
    undisturbed: Training, latents: Path, root: Path, tmp_path: Path
) -> None:
    training = Training(root, latents, tmp_path / "train")
    driver = training.start()
    training.wait_for(5, driver)
    kill_driver(driver, wait=False)
    training.finish()
    training.check_like(undisturbed)


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
