"""A disk that runs full under the map stages: an error of a line, and the same command goes on once there is room."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest

pytestmark = [pytest.mark.drill, pytest.mark.timeout(1800)]
SCENES = 64
STAGES = {
    "prepare": ["--shapes.count=64", "--images_per_shard=8"],
    "refine": ["--samples={samples}", "--max_rounds=1"],
    "encode": ["--samples={samples}", "--backbone.base=tiny", "--backbone.resolution=64"],
    "predict": ["--images={samples}", "--overlays=true"],
}
ROOM = {"prepare": "300k", "refine": "64k", "encode": "300k", "predict": "200k"}  # less than each writes


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory, root: Path) -> Path:
    folder = tmp_path_factory.mktemp("drill") / "samples"
    line = [sys.executable, "-m", "jobs.prepare", f"--out={folder}", f"--shapes.count={SCENES}"]
    subprocess.run([*line, "--shapes.labels=coarse"], cwd=root, check=True)
    return folder


@pytest.fixture
def small(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={ROOM[request.getfixturevalue('stage')]}", "none", disk]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this user may not mount a tmpfs")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


@pytest.mark.parametrize("stage", STAGES)
def test_a_full_disk_is_told_and_the_stage_goes_on(stage: str, samples: Path, small: Path, root: Path) -> None:
    flags = [flag.format(samples=samples) for flag in STAGES[stage]]
    line = [sys.executable, "-m", f"jobs.{stage}", f"--out={small / 'out'}", "--run.batch_size=4", *flags]
    line = [part for part in line if stage != "prepare" or not part.startswith("--run")]
    full = subprocess.run(line, cwd=root, capture_output=True, text=True, check=False)
    assert full.returncode == 1, full.stderr[-3000:]
    last = full.stderr.strip().splitlines()[-1]
    assert last.startswith(f"rlfseg {stage}: "), full.stderr[-3000:]
    assert "full" in last
    assert "Traceback" not in full.stderr
    assert not (small / "out" / "_SUCCESS.json").exists()
    subprocess.run(["mount", "-o", "remount,size=100m", small], check=True)
    again = subprocess.run(line, cwd=root, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr[-3000:]
    assert f"{SCENES} in, {SCENES} out" in again.stdout
    rows = [row for p in (small / "out" / "data").glob("*.parquet") for row in pq.read_table(p)["id"].to_pylist()]
    assert len(rows) == len(set(rows)) == (SCENES if stage != "prepare" else SCENES // 8)
