"""Each map stage with its driver, or its actors, killed at five seeded moments: nothing is lost, nothing done twice."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest

from rlfseg import draw, hdf5
from rlfseg.config import ASSETS
from rlfseg.datasets.shapes import draw_scene
from rlfseg.pipeline.stages import Committed

pytestmark = [pytest.mark.drill, pytest.mark.timeout(3600)]
SCENES, SHARDS, KILLS = 96, 16, 5
BLOCKS = 8  # in which one worker's rows are written
STAGES = {
    "prepare": [f"--shapes.count={SCENES}", "--shapes.labels=coarse", "--images_per_shard=6", "--workers=1"],
    "refine": ["--samples={samples}", "--max_rounds=2", "--run.batch_size=4"],
    "encode": ["--samples={samples}", "--backbone.base=tiny", "--backbone.resolution=64", "--run.batch_size=4"],
    "calibrate": ["--samples={samples}", "--adapter={adapter}", "--run.batch_size=4", "--tracking.enabled=false"],
    # One picture a call: what was in work is done again alone, and a network's last bits, by which a pixel may turn and
    # the order of scores does, depend on how many go through it together
    "evaluate": ["--samples={samples}", "--adapter=tiny", "--run.batch_size=1", "--tracking.enabled=false"],
    "predict": [
        *("--images={pictures}", "--adapter=tiny", "--run.batch_size=1", "--phrases=[red ring, star]"),
        *("--png=true", "--overlays=true", "--on_error=skip"),
    ],
}
LATENTS = {"z1", "z0", "z0_refined"}
HELD = ("refine", "encode", "predict")  # with actors that hold a model


class Job:
    """A stage into a folder, as often as it takes; an adapter of its own, since calibrating changes it."""

    def __init__(self, stage: str, folder: Path, samples: Path, root: Path):
        self.out, self.adapter, self.root = folder / "out", folder / "adapter", root
        shutil.copytree(ASSETS / "adapter", self.adapter)
        places = {"samples": samples, "pictures": samples.with_name("pictures"), "adapter": self.adapter}
        flags = [flag.format(**places) for flag in STAGES[stage]]
        self.line = [sys.executable, "-m", f"jobs.{stage}", f"--out={self.out}", *flags]
        self.total = SHARDS if stage == "prepare" else SCENES
        self.code = 3 if stage == "predict" else 0  # one of its pictures is broken

    def start(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen(self.line, cwd=self.root, start_new_session=True)

    def finish(self) -> str:
        done = subprocess.run(self.line, cwd=self.root, capture_output=True, text=True, check=False)
        assert done.returncode == self.code, done.stderr[-3000:]
        return done.stdout

    def moments(self, seed: int) -> list[int]:
        """Numbers of rows on disk at which to strike, in order: each in another block, and two blocks are left then."""
        rng, size = random.Random(seed), self.total // BLOCKS
        return [block * size + rng.randint(1, size) for block in sorted(rng.sample(range(BLOCKS - 2), KILLS))]

    def reaches(self, moment: int, driver: subprocess.Popen[bytes], also: Callable[[], bool] = lambda: True) -> bool:
        """Waits until so many rows are on disk; False: the job ended before."""
        while driver.poll() is None:
            if self.out.exists() and Committed(self.out)() >= moment and also():
                return True
            time.sleep(0.02)
        return False

    def rows(self) -> dict[str, Any]:
        """What it says of each id; an id that came twice is an error."""
        tables = [pq.read_table(p).to_pylist() for p in sorted((self.out / "data").glob("*.parquet"))]
        every = [row for table in tables for row in table]
        assert len({row["id"] for row in every}) == len(every)
        return {row["id"]: row for row in every}

    def results(self) -> dict[str, Any]:
        """What it comes to, beside its rows."""
        names = ("results.json", "calibration.json", "refused.json")
        found = {n: json.loads((self.out / n).read_text()) for n in names if (self.out / n).is_file()}
        if (self.out / hdf5.INDEX).is_file():
            found["index"] = hdf5.read_index(self.out).drop_columns("shard").to_pylist()
        for tree in found.values():
            if isinstance(tree, dict):
                tree.pop("adapter", None)  # a path of its own
        drawn = [p for folder in ("png", "overlays") for p in (self.out / folder).rglob("*") if p.is_file()]
        found["drawn"] = {str(p.relative_to(self.out)): sha256(p.read_bytes()).hexdigest() for p in drawn}
        return found | {"card": (self.adapter / "rlfseg.yaml").read_text()}

    def check_like(self, whole: Job) -> None:
        mine, other = self.rows(), whole.rows()
        assert mine.keys() == other.keys()
        for key, row in mine.items():
            for name in LATENTS & row.keys():
                # As above, and these are many pictures a call
                for found, theirs in zip(_parts(row.pop(name)), _parts(other[key].pop(name)), strict=True):
                    np.testing.assert_allclose(found, theirs, rtol=0, atol=0.01)
            assert row == other[key]
        assert self.results() == whole.results()


def _parts(stored: Any) -> list[Any]:
    """Latents of a column, an array each; empty ones where there is none."""
    kept = [stored] if isinstance(stored, bytes) else stored
    return [np.frombuffer(part or b"", np.float16).astype(np.float32) for part in kept]


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory, root: Path) -> Path:
    folder = tmp_path_factory.mktemp("drill") / "samples"
    flags = [f"--shapes.count={SCENES}", "--shapes.labels=coarse", f"--out={folder}"]
    subprocess.run([sys.executable, "-m", "jobs.prepare", *flags], cwd=root, check=True)
    for n in range(SCENES):
        path = draw.save(folder.with_name("pictures") / f"{n:03d}.png", draw_scene(n, split="test").image)
    broken = path.with_name(f"{SCENES // 2:03d}.png")
    broken.write_bytes(broken.read_bytes()[:500])
    return folder


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, samples: Path, root: Path) -> Callable[[str], Job]:
    done: dict[str, Job] = {}

    def job(stage: str) -> Job:
        if stage not in done:
            done[stage] = Job(stage, tmp_path_factory.mktemp(stage), samples, root)
            done[stage].finish()
        return done[stage]

    return job


@pytest.mark.parametrize("stage", STAGES)
def test_the_driver_is_killed_again_and_again(
    stage: str, undisturbed: Callable[[str], Job], samples: Path, tmp_path: Path, root: Path
) -> None:
    job, kills = Job(stage, tmp_path, samples, root), 0
    for moment in job.moments(seed=len(stage)):
        driver = job.start()
        if job.reaches(moment, driver):
            os.killpg(driver.pid, signal.SIGKILL)
            kills += 1
        driver.wait()
    said = job.finish()
    assert kills == KILLS
    assert "done before" in said
    job.check_like(undisturbed(stage))
    if stage == "predict":
        results = job.results()
        assert list(results["refused.json"]) == [str(samples.with_name("pictures") / f"{SCENES // 2:03d}.png")]
        assert len(results["drawn"]) == 3 * (SCENES - 1)  # two masks and an overlay a picture


def actors(driver: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """Processes under a driver that hold a model."""
    try:
        family = psutil.Process(driver.pid).children(recursive=True)
        return [p for p in family if "_Actor" in " ".join(p.cmdline()) and "__init__" not in " ".join(p.cmdline())]
    except psutil.Error:
        return []


@pytest.mark.parametrize("stage", HELD)
def test_actors_are_killed_again_and_again(
    stage: str,
    undisturbed: Callable[[str], Job],
    samples: Path,
    tmp_path: Path,
    root: Path,
    record_property: Callable[[str, object], None],
) -> None:
    job, killed = Job(stage, tmp_path, samples, root), 0
    driver = job.start()
    for moment in job.moments(seed=3):
        if job.reaches(moment, driver, also=lambda: bool(actors(driver))):
            for actor in actors(driver):
                actor.kill()
                actor.wait()
                killed += 1
    assert driver.wait() == job.code
    record_property("actors killed", killed)  # fewer than five where all rows were through before the last moment
    assert killed >= 2
    job.check_like(undisturbed(stage))
