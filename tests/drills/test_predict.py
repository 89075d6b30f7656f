"""Predict, disturbed: drivers and actors killed at seeded moments, and an object store with little room to spill."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
from PIL import Image

from rlfseg.cli import REFUSED_SOME
from rlfseg.datasets.shapes import draw_scene
from rlfseg.pipeline.stages import Committed

pytestmark = [pytest.mark.drill, pytest.mark.timeout(3600)]
PICTURES, KILLS = 56, 5
Answers = dict[str, Any]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for n in range(PICTURES):
        scene = Image.fromarray(draw_scene(n, split="test").image)
        scene.resize((64 + n, 64)).save(folder / f"{n:02d}.png")
    (folder / "broken.png").write_bytes((folder / "00.png").read_bytes()[:200])
    return folder


def command(pictures: Path, out: Path) -> list[str]:
    settings = [f"--images={pictures}", f"--out={out}", "--phrases=[red ring, star]", "--run.batch_size=4"]
    return [sys.executable, "-m", "jobs.predict", *settings]


def start(pictures: Path, out: Path, root: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(command(pictures, out), cwd=root, start_new_session=True)


def answers(out: Path) -> Answers:
    rows = [row for path in (out / "data").glob("*.parquet") for row in pq.read_table(path).to_pylist()]
    found = {row["id"]: (row["status"], row["masks"], row["areas"]) for row in rows}
    assert len(found) == len(rows)  # none twice
    return found


@pytest.fixture(scope="module")
def undisturbed(pictures: Path, tmp_path_factory: pytest.TempPathFactory, root: Path) -> Answers:
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    assert start(pictures, out, root).wait() == REFUSED_SOME
    found = answers(out)
    assert len(found) == PICTURES + 1
    return found


def moments(seed: int) -> Iterator[int]:
    """Numbers of pictures on disk at which to strike, in order."""
    return iter(sorted(random.Random(seed).sample(range(PICTURES - 8), KILLS)))


def wait_until(reached: Callable[[], bool], driver: subprocess.Popen[bytes]) -> bool:
    """Whether it was before the driver ended."""
    while driver.poll() is None:
        if reached():
            return True
        time.sleep(0.02)
    return False


@pytest.mark.parametrize("seed", [1, 2])
def test_drivers_killed_again_and_again(
    pictures: Path, undisturbed: Answers, tmp_path: Path, root: Path, seed: int
) -> None:
    out = tmp_path / "out"
    for moment in moments(seed):
        driver = start(pictures, out, root)
        if wait_until(lambda at=moment: out.exists() and Committed(out)() >= at, driver):  # type: ignore[misc]
            os.killpg(driver.pid, signal.SIGKILL)
        driver.wait()
    assert start(pictures, out, root).wait() == REFUSED_SOME
    assert answers(out) == undisturbed


def actors(driver: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """Processes under a driver that hold a model."""
    try:
        family = psutil.Process(driver.pid).children(recursive=True)
        return [p for p in family if "_Actor" in " ".join(p.cmdline()) and "__init__" not in " ".join(p.cmdline())]
    except psutil.Error:
        return []


def test_actors_killed_again_and_again(pictures: Path, undisturbed: Answers, tmp_path: Path, root: Path) -> None:
    out, killed = tmp_path / "out", 0
    driver = start(pictures, out, root)
    for moment in moments(3):
        if wait_until(lambda at=moment: Committed(out)() >= at and bool(actors(driver)), driver):  # type: ignore[misc]
            for actor in actors(driver):
                actor.kill()
                actor.wait()
                killed += 1
    assert driver.wait() == REFUSED_SOME
    assert killed >= 2
    assert answers(out) == undisturbed


# --- no room to spill ------------------------------------------------------------------------------------------------

TIGHT = """
import sys
from pathlib import Path
import pyarrow as pa, ray
from rlfseg.config import WorkersConfig
from rlfseg.pipeline.stages import Stage, run_stage
from tests.pipeline.works import Count, Megabyte
out, spill = Path(sys.argv[1]), sys.argv[2]
ray.init(num_cpus=8, object_store_memory=100_000_000, object_spilling_directory=spill, include_dashboard=False,
         log_to_driver=False, configure_logging=False)
rows = pa.table({"id": [str(n) for n in range(2000)]})
schema = pa.schema([("id", pa.string()), ("status", pa.string()), ("value", pa.int64())])
stage = Stage(name="tight", rows=rows, load=Megabyte(), work=Count, schema=schema, out=out, identity={},
              run=WorkersConfig(batch_size=8, loaders=3))
print(run_stage(stage).rows_out)
"""


@pytest.mark.fault("raydata-08")
def test_two_gigabytes_through_a_store_of_a_tenth(tmp_path: Path, root: Path) -> None:
    """Back-pressure holds the loaders: 2,000 pictures of 1 MB pass a store of 100 MB that can spill 200 MB."""
    spill, script = tmp_path / "spill", tmp_path / "tight.py"
    spill.mkdir()
    script.write_text(TIGHT)
    unshare = shutil.which("unshare")
    if not unshare:
        pytest.skip("no unshare(1): a file system of 200 MB can't be mounted for this process alone")
    inner = f"mount -t tmpfs -o size=200m tmpfs {spill} && exec {sys.executable} {script} {tmp_path / 'out'} {spill}"
    own = [unshare, "-m" if os.geteuid() == 0 else "-rm", "bash", "-c", inner]
    done = subprocess.run(own, cwd=root, capture_output=True, text=True, check=False, timeout=1500)
    if "mount" in done.stderr and "denied" in done.stderr:
        pytest.skip(f"mounting is not allowed here: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2000" in done.stdout.splitlines(), done.stdout[-3000:]
