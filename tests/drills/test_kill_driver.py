"""The driver of each map stage killed in the middle and started again: nothing is lost, nothing is done twice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from rlfseg import hdf5

pytestmark = [pytest.mark.drill, pytest.mark.timeout(1800)]
SCENES = 64
STAGES = {
    "prepare": ["--shapes.count=64", "--shapes.labels=coarse", "--images_per_shard=8", "--workers=1"],
    "refine": ["--samples={samples}", "--max_rounds=2", "--run.batch_size=4"],
    "encode": ["--samples={samples}", "--backbone.base=tiny", "--backbone.resolution=64", "--run.batch_size=4"],
    "evaluate": ["--samples={samples}", "--adapter=tiny", "--run.batch_size=4", "--tracking.enabled=false"],
    "predict": ["--images={samples}", "--adapter=tiny", "--run.batch_size=4"],
}


def command(name: str, *flags: str) -> list[str]:
    return [sys.executable, "-m", f"jobs.{name}", *flags]


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory, root: Path) -> Path:
    folder = tmp_path_factory.mktemp("drill") / "samples"
    subprocess.run(command("prepare", f"--out={folder}", *STAGES["prepare"]), cwd=root, check=True)
    return folder


def committed(out: Path) -> bool:
    return any((out / "data").glob("*.parquet"))


def rows(out: Path) -> dict[str, Any]:
    """What a stage says of each id; an id that came twice is an error."""
    tables = [pq.read_table(p).to_pylist() for p in sorted((out / "data").glob("*.parquet"))]
    every = [row for table in tables for row in table]
    assert len({row["id"] for row in every}) == len(every)
    return {row["id"]: row for row in every}


@pytest.mark.parametrize("stage", STAGES)
def test_a_killed_driver_goes_on_where_it_was(stage: str, samples: Path, tmp_path: Path, root: Path) -> None:
    out, whole = tmp_path / "killed", tmp_path / "whole"
    flags = [flag.format(samples=samples) for flag in STAGES[stage]]
    driver = subprocess.Popen(command(stage, f"--out={out}", *flags), cwd=root, start_new_session=True)
    while not committed(out) and driver.poll() is None:
        time.sleep(0.02)  # until the first file is there; not a guess at how long that takes
    os.killpg(driver.pid, signal.SIGKILL)
    driver.wait()
    assert not (out / "_SUCCESS.json").exists()
    before = rows(out)

    again = subprocess.run(
        command(stage, f"--out={out}", *flags), cwd=root, capture_output=True, text=True, check=False
    )
    assert again.returncode == 0, again.stderr[-2000:]
    assert "done before" in again.stdout
    subprocess.run(command(stage, f"--out={whole}", *flags), cwd=root, check=True)
    assert rows(out) == rows(whole)
    assert {key: row for key, row in rows(out).items() if key in before} == before
    if stage == "prepare":
        assert hdf5.read_index(out).drop_columns("shard").equals(hdf5.read_index(whole).drop_columns("shard"))
        assert len(hdf5.read_index(out)) == SCENES
    if stage == "evaluate":
        assert json.loads((out / "results.json").read_text()) == json.loads((whole / "results.json").read_text())
